"""Compare what is installed with requirements.txt, and install the rest. Needs only the standard library.

    python -P brats_helpers/suite/environment.py [--editable] [EXTRA]

installs what is missing into this Python, including what pyproject.toml lists for EXTRA. Packages that meet the
requirements, above all torch, are left alone. A copy of this package made from other sources is replaced.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "brats-helpers"
_VERSION = re.compile(r'(?<=^__version__ = ")[^"]+', re.MULTILINE)


def required(root: Path, extra: str | None = None) -> list[str]:
    """Return the lines of `root/requirements.txt`, and of `extra` in `root/pyproject.toml`: `torch>=2.4`."""
    lines = [line.partition("#")[0].strip() for line in (root / "requirements.txt").read_text("utf-8").splitlines()]
    if extra:
        project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
        lines += project["optional-dependencies"][extra]
    return [line for line in lines if line]


def installed(name: str) -> str | None:
    """Return the installed version of package `name`, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_met(requirement: str) -> bool:
    """Whether the installed version meets `requirement`; without `packaging`, nothing is installed yet."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return False
    wanted = Requirement(requirement)
    found = installed(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def missing(root: Path, extra: str | None = None) -> list[str]:
    """Return the requirements that are not met, the package itself among them."""
    lacking = [line for line in required(root, extra) if not is_met(line)]
    return lacking if is_current(root) else [*lacking, PACKAGE]


def is_current(root: Path) -> bool:
    """Whether the package is installed from `root`: editable, or as a copy of its present sources."""
    return any(_is_from(own, root) for own in distributions(name=PACKAGE))


def _is_from(own: Distribution, root: Path) -> bool:
    origin = json.loads(own.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return origin["url"] == root.resolve().as_uri()
    return own.version == version_of(root)


def version_of(root: Path) -> str:
    """Return the version of a copy of the package: the release and a digest of its sources, `0.1.0+d4f1c22ab`."""
    release = _VERSION.search((root / "brats_helpers" / "__init__.py").read_text("utf-8"))[0]
    return f"{release}+d{digest(root / 'brats_helpers')}"


def digest(package: Path) -> str:
    """Return eight hexadecimal digits that stand for the names and contents of a package's files."""
    sources = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            sources.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return sources.hexdigest()[:8]


def shadow_of(root: Path) -> Path | None:
    """Return the folder in PYTHONPATH whose copy of the package differs from `root`'s and would be imported."""
    for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
        package = Path(entry) / "brats_helpers"
        if (package / "__init__.py").exists():
            return None if digest(package) == digest(root / "brats_helpers") else Path(entry)
    return None


def install(root: Path, extra: str | None, *, editable: bool) -> int:
    """Install what is missing into the Python that runs this, and return pip's exit code.

    Args:
        root: a checkout, which may be read-only unless `editable`.
        extra: an extra of `pyproject.toml`, or None.
        editable: let imports read `root`. A kernel that is already running can import a plain copy only.
    """
    if shadow := shadow_of(root):
        print(f"❌ PYTHONPATH puts another copy of the package first, in {shadow}. Remove that folder from PYTHONPATH.")
        return 1
    lacking = missing(root, extra)
    if not lacking:
        return 0
    torch = installed("torch")
    print(f"installing{'' if torch else ' (torch takes minutes and gigabytes)'}: {', '.join(lacking)}", flush=True)
    if importlib.util.find_spec("pip") is None:
        subprocess.run([sys.executable, "-m", "ensurepip"], check=True, stdout=subprocess.DEVNULL)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input"]
    pip.append("--no-compile")  # compiling what may never be imported takes two fifths of the processor time
    if is_met("setuptools>=70.1"):
        pip.append("--no-build-isolation")  # which would fetch setuptools again, and fail without a network
    if torch:
        pip.append(f"torch=={torch}")
    if editable:
        return _pip(pip + ["-e"], root, extra)
    with tempfile.TemporaryDirectory() as scratch:  # pip builds beside the sources
        _copy(root, Path(scratch))
        return _pip(pip, Path(scratch), extra)


def _pip(command: list[str], place: Path, extra: str | None) -> int:
    return subprocess.run([*command, f"{place}[{extra}]" if extra else str(place)]).returncode


def _copy(root: Path, place: Path) -> None:
    """Copy what pip needs, with a version that distinguishes it from a copy of other sources."""
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copyfile(root / name, place / name)
    shutil.copytree(root / "brats_helpers", place / "brats_helpers", copy_function=shutil.copyfile)
    (place / "brats_helpers").chmod(0o755)
    first = place / "brats_helpers" / "__init__.py"
    first.write_text(_VERSION.sub(version_of(root), first.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    extras = [word for word in sys.argv[1:] if word != "--editable"]
    sys.exit(install(ROOT, *extras or [None], editable="--editable" in sys.argv))
