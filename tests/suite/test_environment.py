"""What is installed, and the bootstrap cell on a simulated Colab, Kaggle and laptop."""

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
from packaging.requirements import Requirement

from brats_helpers.suite import environment
from brats_helpers.suite.environment import digest, required, version_of

ROOT = Path(__file__).parents[2]
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
    assert (tmp_path / "alone" / "brats-helpers" / "brats_helpers" / "suite" / "environment.py").exists()


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


def test_the_digest_follows_names_and_contents(tmp_path):
    package = clone(tmp_path) / "brats_helpers"
    digests = [digest(package)]
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "labels.pyc").touch()
    assert digest(package) == digests[0]
    (package / "report" / "pages" / "index.html").open("a").write(" ")
    digests.append(digest(package))
    (package / "labels.py").rename(package / "label.py")
    digests.append(digest(package))
    assert len(set(digests)) == 3


def bare(checkout, **environ):
    """Run `install_missing` of setup_env.sh without an active environment, with a pip that does nothing."""
    names = ("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
    clean = {name: value for name, value in os.environ.items() if name not in (*names, "PYTHONPATH")}
    command = f'source "{checkout}/setup_env.sh"; find_python; install_missing; echo "python: $python"'
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], env=clean | environ, capture_output=True, text=True
    )


@pytest.fixture
def own_venv(tmp_path):
    """A checkout whose folder `.venv` somebody filled, and whose installer does nothing."""
    shutil.copy(ROOT / "setup_env.sh", tmp_path)
    (tmp_path / "brats_helpers" / "suite").mkdir(parents=True)
    (tmp_path / "brats_helpers" / "suite" / "environment.py").touch()
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.mark.parametrize("python", [None, "exit 1"])
def test_a_venv_that_cannot_serve_is_refused_and_left_alone(own_venv, python):
    (own_venv / ".venv" / "precious").write_text("mine")
    if python:
        (own_venv / ".venv" / "bin").mkdir()
        (own_venv / ".venv" / "bin" / "python").write_text(f"#!/bin/sh\n{python}\n")
        (own_venv / ".venv" / "bin" / "python").chmod(0o755)
    before = sorted(own_venv.rglob("*"))
    done = bare(own_venv)
    assert done.returncode == 1 and "is left as it is" in done.stderr and "Rename or remove it" in done.stderr
    assert sorted(own_venv.rglob("*")) == before and (own_venv / ".venv" / "precious").read_text() == "mine"


def test_a_venv_that_the_suite_began_is_completed(own_venv):
    (own_venv / ".venv" / "being-made").touch()
    done = bare(own_venv)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"python: {own_venv}/.venv/bin/python\n"
    assert not (own_venv / ".venv" / "being-made").exists() and (own_venv / ".venv" / "bin" / "python").exists()
    assert bare(own_venv).stdout == done.stdout


# --- requirements


def test_requirements_are_held_against_what_is_installed(tmp_path, monkeypatch):
    versions = {"torch": "2.10.1+cu121", "numpy": "2.0.0rc1", "medpy": "0.5"}
    monkeypatch.setattr(environment, "installed", versions.get)
    monkeypatch.setattr(environment, "is_current", lambda root: True)
    (tmp_path / "requirements.txt").write_text("# why\ntorch>=2.4  # GradScaler\nnumpy>=1.26,<2\nnilearn\n\n")
    (tmp_path / "pyproject.toml").write_text("[project.optional-dependencies]\ntest = ['medpy>=0.5.0', 'pytest']\n")
    assert environment.missing(tmp_path) == ["numpy>=1.26,<2", "nilearn"]
    assert environment.missing(tmp_path, "test") == ["numpy>=1.26,<2", "nilearn", "pytest"]


@pytest.mark.parametrize("system, editable", [({}, ["-e"]), ({"COLAB_RELEASE_TAG": "release"}, [])])
def test_run_all_installs_what_is_missing_into_the_active_environment(checkout, tmp_path, system, editable):
    log = tmp_path / "pip.log"  # written by a pip that does nothing but write down what it is told
    (tmp_path / "pip.py").write_text(f"import sys\nwith open({str(log)!r}, 'a') as log: print(*sys.argv[1:], file=log)")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHONPATH": str(tmp_path)} | system

    def run_all(*arguments):
        command = [checkout / "run_all.sh", "--run", f"shell-{len(editable)}", "--only", "01", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    wrong = run_all("--prepare", "--data", "phantm")
    assert (wrong.returncode, log.exists()) == (2, False), wrong.stdout + wrong.stderr
    right = run_all("--prepare-only")
    assert right.returncode == 0, right.stdout + right.stderr
    assert "no-such-package" in right.stdout and "papermill>=2.6" not in right.stdout
    command, *flags, place = log.read_text().split()
    assert command == "install" and f"torch=={environment.installed('torch')}" in flags
    assert [flag for flag in flags if flag == "-e"] == editable
    assert (place == str(checkout)) == bool(editable)  # elsewhere from a copy, as the checkout may be read-only


# --- what others run ----------------------------------------------------------------------------------------------


def test_ci_runs_the_same_script_on_the_oldest_and_the_newest_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    assert "run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    pythons = [entry["python"] for entry in job["strategy"]["matrix"]["include"]]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f">={pythons[0]}" == oldest
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text("utf-8").split())
    assert f"Python {pythons[0]} and on the newest with Python {pythons[-1]}" in text


def test_setuptools_finds_every_folder_of_the_package():
    folders = {path.parent for path in (ROOT / "brats_helpers").rglob("*.py")}
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_constraints_meet_the_requirements():
    exact = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))
    for requirement in map(Requirement, required(ROOT)):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(exact[name]), requirement


def test_no_private_name_of_another_package_is_used():
    """What an earlier revision used of argparse, ipykernel and torch."""
    private = re.compile(r"parser\._actions|kernel\._allow_stdin|torch\.cpu\._|_is_avx512_bf16_supported")
    sources = {path: path.read_text("utf-8") for path in (ROOT / "brats_helpers").rglob("*.py")}
    assert [str(path) for path, source in sources.items() if private.search(source)] == []
