"""What is installed, and what setup_env.sh and run_all.sh install."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from brats_helpers.suite import environment
from brats_helpers.suite.environment import digest, required
from tests.suite.checkout import clone

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "active"), [("base", ""), ("brats", "/opt/conda"), (None, "")])
def test_condas_base_is_not_filled(name, active):
    conda = {"CONDA_PREFIX": "/opt/conda", "CONDA_DEFAULT_ENV": name} if name else {}
    environ = {"PATH": os.environ["PATH"]} | conda
    command = ["bash", "-euo", "pipefail", "-c", f'source "{ROOT}/setup_env.sh"; echo "active: $active"']
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stdout == f"active: {active}\n"


def test_bytecode_is_written_because_pip_runs_with_no_compile():
    command = ["bash", "-c", f'source "{ROOT}/setup_env.sh"; echo "${{PYTHONDONTWRITEBYTECODE-unset}}"']
    environ = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run(command, env=environ, capture_output=True, text=True).stdout == "unset\n"


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
