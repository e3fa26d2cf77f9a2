"""What is installed, against what requirements.txt asks for; the standard library alone, as nothing else may be there.

    python -P brats_helpers/suite/environment.py [--editable] [EXTRA]

installs into this Python what is missing, with what pyproject.toml lists for EXTRA. What is there and meets the
requirements stays as it is, above all torch.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "brats-helpers"


def required(root: Path, extra: str | None = None) -> list[str]:
    """The lines of `root/requirements.txt`, and of `extra` in `root/pyproject.toml`: `torch>=2.4`."""
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text("utf-8").splitlines()]
    if extra:
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if line]


def name_of(requirement: str) -> str:
    """`torch` of `torch>=2.4,<3`."""
    return re.match(r"[\w.-]+", requirement)[0]


def installed(name: str) -> str | None:
    """The version that is installed of package `name`, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_met(requirement: str) -> bool:
    """Whether what is installed meets `requirement`; bounds are `>=` and `<`."""
    found = installed(name_of(requirement))
    if found is None:
        return False
    bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement)
    return all((_numbers(found) >= _numbers(bound)) == (sign == ">=") for sign, bound in bounds)


def _numbers(version_text: str) -> tuple[int, ...]:
    release = re.match(r"[\d.]*\d", version_text)[0]
    return tuple(int(number) for number in re.sub(r"(\.0)+$", "", release).split("."))


def missing(root: Path, extra: str | None = None) -> list[str]:
    """The requirements that are not met, the package itself among them."""
    return [line for line in [*required(root, extra), PACKAGE] if not is_met(line)]


def install(root: Path, extra: str | None, *, editable: bool) -> int:
    """Install what is missing into the Python that runs this, and return pip's exit code.

    Args:
        root: a checkout, which may be read-only unless `editable`.
        extra: an extra of `pyproject.toml`, or None.
        editable: let imports read `root`. A kernel that is already running can import a plain install only.
    """
    lacking = missing(root, extra)
    if not lacking:
        return 0
    torch = installed("torch")
    print(f"installing{'' if torch else ' (torch takes minutes and gigabytes)'}: {', '.join(lacking)}", flush=True)
    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
    if is_met("setuptools>=70.1"):
        pip.append("--no-build-isolation")  # which would fetch setuptools again, and fail without a network
    if torch:
        pip.append(f"torch=={torch}")
    with tempfile.TemporaryDirectory() as scratch:
        place = root
        if not editable:  # pip builds beside the sources
            place = Path(scratch)
            for name in ("pyproject.toml", "requirements.txt"):
                shutil.copy(root / name, place)
            shutil.copytree(root / "brats_helpers", place / "brats_helpers")
        what = f"{place}[{extra}]" if extra else str(place)
        return subprocess.run(pip + ["-e"] * editable + [what]).returncode


if __name__ == "__main__":
    extras = [word for word in sys.argv[1:] if word != "--editable"]
    sys.exit(install(ROOT, *extras or [None], editable="--editable" in sys.argv))
