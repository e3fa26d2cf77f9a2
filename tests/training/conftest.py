"""What the tests of training share."""

import pytest

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases


@pytest.fixture(scope="session")
def prepared(tiny_patients, tmp_path_factory):
    """The four tiny patients, prepared."""
    return prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)
