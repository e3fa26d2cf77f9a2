"""The bootstrap cell and the resolver of data on a Colab, a Kaggle and a laptop that are simulated."""

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
import yaml

from brats_helpers.suite.environment import required

ROOT = Path(__file__).parents[2]
TAKEN = ("brats_helpers", "__editable__", "brats-helpers")
THEN = """
import importlib.util, json
import brats_helpers, brats_helpers.suite  # in the same process: no restart
from brats_helpers.data import kaggle
torch = importlib.util.find_spec("torch").origin
print(json.dumps({"from": brats_helpers.__file__, "torch": torch, "clients": kaggle.clients()}))
"""


@pytest.fixture(scope="module")
def bootstrap():
    cells = json.loads((ROOT / "notebooks" / "00_setup.ipynb").read_text("utf-8"))["cells"]
    return next("".join(cell["source"]) for cell in cells if cell.get("id") == "00-bootstrap")


@pytest.fixture
def machine(tmp_path, bootstrap):
    """A Python that has all that this one has but for the package, and a way to open a notebook in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "python"], check=True)
    packages = next((tmp_path / "python" / "lib").glob("python*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(TAKEN):
            (packages / path.name).symlink_to(path)
    for place in ("content", "kaggle/working", "kaggle/input", "modules"):
        (tmp_path / place).mkdir(parents=True)

    def open_notebook(here, *, run_dir="runs/demo", **environ):
        code = bootstrap.replace("/content", str(tmp_path / "content")).replace("/kaggle", str(tmp_path / "kaggle"))
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


def clone(folder: Path) -> Path:
    """The files of this checkout that the package is made from."""
    for name in ("pyproject.toml", "requirements.txt"):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "brats_helpers", folder / "brats_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_colab_with_a_clone_and_results_on_drive(machine, tmp_path):
    clone(tmp_path / "content" / "brats-helpers")
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


def test_a_notebook_alone_fetches_the_suite(machine, tmp_path):
    home = clone(tmp_path / "home")
    git = ["git", "-C", home, "-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "suite"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "alone").mkdir()
    address = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{home}.insteadOf"}
    done, facts = machine(tmp_path / "alone", **address, GIT_CONFIG_VALUE_0=_home())
    assert facts, done.stderr
    assert (tmp_path / "alone" / "brats-helpers" / "brats_helpers" / "environment.py").exists()


def test_an_offline_laptop_without_the_suite_fails_at_once(machine, tmp_path):
    done, facts = machine(tmp_path)
    assert not facts and "CalledProcessError" in done.stderr and "git" in done.stderr


@pytest.mark.parametrize(("name", "active"), [("base", ""), ("brats", "/opt/conda"), (None, "")])
def test_condas_base_is_not_filled(name, active):
    conda = {"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": name} if name else {}
    environ = {"PATH": os.environ["PATH"]} | conda
    command = ["bash", "-euo", "pipefail", "-c", f'source "{ROOT}/setup_env.sh"; echo "active: $active"']
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stdout == f"active: {active}\n"


def test_where_the_package_is_nothing_is_done(machine, tmp_path):
    done, facts = machine(tmp_path, PYTHONPATH=str(ROOT), PATH="/nowhere")
    assert facts["from"] == str(ROOT / "brats_helpers" / "__init__.py"), done.stderr
    assert len(done.stdout.splitlines()) == 1


def _home() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


# --- what others run ----------------------------------------------------------------------------------------------


def test_ci_runs_the_same_script_on_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert "run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    pythons = [entry["python"] for entry in job["strategy"]["matrix"]["include"]]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f">={pythons[0]}" == oldest
    assert f"| Python | | {pythons[0]} | {pythons[-1]} |" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_table_of_dependencies_is_of_the_requirements():
    table = (ROOT / "CONTRIBUTING.md").read_text().split("| package | reason")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    oldest = {
        name: bound
        for names, _, bounds, _ in rows[1:]
        for name, bound in zip(names.split(", "), bounds.split(", "), strict=True)
    }
    oldest.pop("Python")
    for requirement in required(ROOT):
        name, _, bound = requirement.partition(">=")
        assert oldest.pop(name).startswith(bound), requirement
    assert not oldest


def test_every_folder_of_the_package_is_named_for_setuptools():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "brats_helpers").rglob("*") if path.suffix != ".pyc"}
    assert sorted(named) == sorted(".".join(folder.parts) for folder in folders)


def test_every_module_is_on_the_map():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    modules = [path.stem for path in (ROOT / "brats_helpers").glob("[!_]*.py")]
    assert modules and [name for name in modules if f"`{name}`" not in page] == []


def test_constraints_meet_the_requirements():
    exact = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for requirement in required(ROOT):
        name, _, bound = requirement.lower().replace("_", "-").partition(">=")
        assert version_of(exact[name]) >= version_of(bound), requirement


def version_of(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
