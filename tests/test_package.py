"""What `import brats_helpers` gives."""

import ast
import importlib
import subprocess
import sys

import pytest

import brats_helpers
from tests.conftest import ROOT


@pytest.mark.parametrize("name", brats_helpers.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(brats_helpers, name).__module__.startswith("brats_helpers.")
    assert name in dir(brats_helpers)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'brats_helpers' has no attribute 'find_casses'"):
        _ = brats_helpers.find_casses


def test_importing_the_package_loads_nothing():
    code = "import sys; before = set(sys.modules); import brats_helpers; print(sorted(set(sys.modules) - before))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(eval(said)) <= {"brats_helpers", "importlib"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").rglob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_from_the_package_is_there(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("brats_helpers"):
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")
