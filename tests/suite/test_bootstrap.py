"""The set-up cell of the notebooks on a simulated Colab, Kaggle and laptop."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from brats_helpers.suite import bootstrap
from brats_helpers.suite.bootstrap import set_up
from brats_helpers.suite.environment import version_of
from tests.suite.checkout import clone

ROOT = Path(__file__).parents[2]
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
TAKEN = ("brats_helpers", "__editable__", "brats-helpers")
THEN = """
import importlib.util, json
from brats_helpers.suite.environment import installed
import brats_helpers, brats_helpers.suite  # in the same process: no restart
from brats_helpers.data import kaggle
torch = importlib.util.find_spec("torch").origin
print(json.dumps({"from": brats_helpers.__file__, "torch": torch, "clients": kaggle.clients(),
    "version": installed("brats-helpers")}))
"""
HOOK = """
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "brats_helpers":
            return importlib.util.spec_from_file_location(
                name, "{package}/__init__.py", submodule_search_locations=["{package}"]
            )
sys.meta_path.append(Finder)
"""


@pytest.fixture(scope="module")
def cell():
    cells = json.loads((ROOT / "notebooks" / "00_setup.ipynb").read_text("utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell["id"] == "00-bootstrap")


@pytest.fixture
def machine(tmp_path, cell):
    """A Python that has all that this one has but for the package, and a way to open a notebook in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "python"], check=True)
    packages = next((tmp_path / "python" / "lib").glob("python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(TAKEN):
            (packages / path.name).symlink_to(path)
    for place in ("content", "kaggle/working", "kaggle/input", "modules"):
        (tmp_path / place).mkdir(parents=True)

    def open_notebook(here, *, run_dir="runs/demo", **environ):
        code = cell.replace("/content", str(tmp_path / "content")).replace("/kaggle", str(tmp_path / "kaggle"))
        code = f"run_dir = {str(run_dir)!r}\n{code}\n{THEN}"
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "COLAB", "PYTHON"))
        }
        offline = {
            "PIP_NO_INDEX": "1",
            "PIP_CONFIG_FILE": os.devnull,
            "HOME": str(tmp_path),
            "GIT_ALLOW_PROTOCOL": "file",
        }
        done = subprocess.run(
            [tmp_path / "python" / "bin" / "python", "-c", code],
            cwd=here,
            env=clean | offline | {"PYTHONPATH": str(tmp_path / "modules")} | environ,
            capture_output=True,
            text=True,
        )
        return done, done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])

    return open_notebook


def test_colab_with_a_clone_and_results_on_drive(machine, tmp_path):
    with_drive_in(clone(tmp_path / "content" / "brats-helpers"), tmp_path / "content" / "drive")
    drive = tmp_path / "modules" / "google" / "colab"
    drive.mkdir(parents=True)
    (drive / "drive.py").write_text(
        "import os\ndef mount(place): os.makedirs(place + '/MyDrive'); print('mounted', place)"
    )
    done, facts = machine(
        tmp_path / "content", run_dir=tmp_path / "content/drive/MyDrive/first", COLAB_RELEASE_TAG="release"
    )
    assert facts, done.stderr
    assert f"mounted {tmp_path}/content/drive\n" in done.stdout
    assert facts["from"].startswith(str(tmp_path / "python"))  # a plain install, that a running kernel can import
    assert facts["torch"].startswith(str(tmp_path / "python"))
    assert not (tmp_path / "python" / "bin" / "torchrun").exists()  # the torch that was there, not another
    assert facts["clients"] == ["kagglehub"]

    again, facts = machine(tmp_path / "content", run_dir=tmp_path / "content/drive/MyDrive/first")
    assert facts and "installing" not in again.stdout and "mounted" not in again.stdout


@pytest.mark.parametrize("attached", ["suite/brats-helpers-main", "datasets/somebody/suite"])
def test_kaggle_with_the_suite_attached_read_only(machine, tmp_path, attached):
    folder = clone(tmp_path / "kaggle" / "input" / attached)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(folder.rglob("*"))
    done, facts = machine(tmp_path / "kaggle" / "working", KAGGLE_KERNEL_RUN_TYPE="Interactive")
    assert facts, done.stderr
    assert facts["from"].startswith(str(tmp_path / "python"))
    assert sorted(folder.rglob("*")) == before
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o755)


def with_drive_in(suite: Path, folder: Path) -> Path:
    """Let a copy of the suite look for Google Drive in a folder of the simulated machine."""
    path = suite / "brats_helpers" / "suite" / "bootstrap.py"
    path.write_text(path.read_text("utf-8").replace(f'"{bootstrap.DRIVE}"', f'"{folder}"'), "utf-8")
    return suite


def test_a_run_on_drive_needs_colab(machine, tmp_path):
    with_drive_in(clone(tmp_path / "content" / "brats-helpers"), tmp_path / "content" / "drive")
    done, facts = machine(tmp_path / "content", run_dir=tmp_path / "content/drive/MyDrive/first")
    assert not facts and "which only Colab can mount. Set run_dir to a folder here." in done.stderr


def test_a_notebook_alone_fetches_the_suite(machine, tmp_path):
    home = clone(tmp_path / "home")
    git = ["git", "-C", home, "-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "suite"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "alone").mkdir()
    address = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{home}.insteadOf"}
    done, facts = machine(tmp_path / "alone", **address, GIT_CONFIG_VALUE_0=HOME)
    assert facts, done.stderr
    assert (tmp_path / "alone" / "brats-helpers" / "brats_helpers" / "suite" / "environment.py").exists()


@pytest.mark.parametrize("unfinished", [False, True])
def test_without_the_suite_and_a_network_the_notebook_says_what_to_do(machine, tmp_path, unfinished):
    if unfinished:  # an earlier clone that was interrupted
        (tmp_path / "brats-helpers" / ".git").mkdir(parents=True)
    done, facts = machine(tmp_path)
    assert not facts and f"AssertionError: The suite could not be fetched from {HOME}. Turn the internet" in done.stderr


@pytest.mark.parametrize("editable", [True, False])
def test_an_installed_suite_is_found_from_anywhere(machine, tmp_path, editable):
    """An editable installation is known to an import hook alone: no folder of it is in sys.path."""
    home = clone(tmp_path / "home")
    packages = next((tmp_path / "python" / "lib").glob("python*/site-packages"))
    if editable:
        (packages / "hook.pth").write_text("import hook\n")
        (packages / "hook.py").write_text(HOOK.format(package=home / "brats_helpers"))
    else:
        shutil.copytree(home / "brats_helpers", packages / "brats_helpers")
    (tmp_path / "elsewhere").mkdir()
    done, facts = machine(tmp_path / "elsewhere")
    assert facts, done.stderr
    assert Path(facts["from"]).parent == (home if editable else packages) / "brats_helpers"
    assert len(done.stdout.splitlines()) == 1


def test_a_package_without_its_requirements_is_named(machine, tmp_path):
    """The folder of the package, copied out of the suite."""
    home = clone(tmp_path / "home")
    shutil.copytree(home / "brats_helpers", tmp_path / "alone" / "brats_helpers")
    packages = next((tmp_path / "python" / "lib").glob("python*/site-packages"))
    (packages / "segmentation_models_pytorch").unlink()
    done, facts = machine(tmp_path / "alone")
    assert not facts and "lacks the packages that it needs" in done.stderr


def test_a_failed_installation_stops_the_notebook(machine, tmp_path):
    home = clone(tmp_path / "content" / "brats-helpers")
    with open(home / "requirements.txt", "a") as file:
        file.write("no-such-package-anywhere\n")
    done, facts = machine(tmp_path / "content")
    assert not facts and "could not be installed" in done.stderr


def test_a_python_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10))
    with pytest.raises(RuntimeError, match="needs Python 3.11 or newer"):
        set_up(Path(bootstrap.__file__))


def test_where_the_package_is_nothing_is_done(machine, tmp_path):
    done, facts = machine(tmp_path, PYTHONPATH=str(ROOT), PATH="/nowhere")
    assert facts["from"] == str(ROOT / "brats_helpers" / "__init__.py"), done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_a_copy_of_other_sources_never_shadows_the_checkout(machine, tmp_path):
    home = clone(tmp_path / "content" / "brats-helpers")
    runs = [machine(tmp_path / "content", COLAB_RELEASE_TAG="release")]
    (home / "brats_helpers" / "labels.py").open("a").write("NEWER = True\n")
    runs += [machine(tmp_path / "content", COLAB_RELEASE_TAG="release") for _ in range(2)]
    assert all(facts for _, facts in runs), runs[-1][0].stderr
    assert ["installing" in done.stdout for done, _ in runs] == [True, True, False]
    versions = [facts["version"] for _, facts in runs]
    assert versions[0] != versions[1] == versions[2] == version_of(home)
    assert re.fullmatch(r"0\.1\.0\+d[0-9a-f]{8}", versions[0])
    assert "NEWER" in (Path(runs[-1][1]["from"]).parent / "labels.py").read_text()


def test_another_copy_in_pythonpath_is_named(machine, tmp_path):
    clone(tmp_path / "content" / "brats-helpers")
    other = clone(tmp_path / "other")
    (other / "brats_helpers" / "labels.py").open("a").write("OLDER = True\n")
    done, facts = machine(tmp_path / "content", PYTHONPATH=str(other))
    assert not facts and f"PYTHONPATH puts another copy of the package first, in {other}" in done.stdout
