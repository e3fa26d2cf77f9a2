"""What the tests of the driver share."""

import pytest

from tests.suite.checkout import write_checkout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of the suite's driver with tiny notebooks."""
    root = tmp_path_factory.mktemp("checkout")
    write_checkout(root)
    return root
