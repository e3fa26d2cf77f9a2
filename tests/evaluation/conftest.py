"""What the tests of evaluation share."""

import pytest

from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from tests.tiny_training import fit_tiny


@pytest.fixture(scope="session")
def checkpoint(tiny_patients, tmp_path_factory):
    """The best checkpoint of a training on three tiny patients, validated on the fourth."""
    folder = tmp_path_factory.mktemp("trained")
    fit_tiny([pack(case) for case in find_cases(tiny_patients)], folder)
    return folder / "checkpoints" / "best.pt"
