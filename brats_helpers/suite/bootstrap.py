"""Make the suite importable in a notebook, wherever it was opened. Needs the standard library alone.

The second code cell of every notebook mounts Google Drive if the run's folder is there, looks for this file in the
usual places, fetches it if there is no copy of the suite, and runs it. This file then fetches the suite if it came
alone, and installs what is missing or was made from other sources. If this checkout is imported already, nothing
happens.
"""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HOME = "https://github.com/YOUR_NAME/brats-helpers"
"""The address in pyproject.toml, which cannot be read before the suite is fetched."""
CLONE = Path("brats-helpers")
"""Where the suite is fetched to, below the current folder."""


def set_up(script: Path) -> None:
    """Install the suite that `script` belongs to, or a fresh clone, if this Python cannot import it as it is.

    Args:
        script: this file, in a checkout, in an installed copy of the package, or fetched alone.

    Raises:
        RuntimeError: Python is too old, or the suite cannot be fetched or installed.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        raise RuntimeError(f"The suite needs Python 3.11 or newer; this is Python {sys.version.split()[0]}.")
    root = script.resolve().parent.parent.parent
    package, other = map(find_spec, ("brats_helpers", "segmentation_models_pytorch"))
    ready = package is not None and other is not None
    if not is_checkout(root):
        if ready:
            return
        root = fetch()
    first = root / "brats_helpers" / "__init__.py"
    if ready and first.samefile(package.origin):
        return
    done = subprocess.run([sys.executable, "-P", str(root / "brats_helpers" / "suite" / "environment.py")])
    if done.returncode:
        raise RuntimeError(f"The suite in {root} could not be installed; the lines above say why.")
    importlib.invalidate_caches()


def is_checkout(folder: Path) -> bool:
    """Whether `folder` holds the files that the package is made from."""
    return (folder / "pyproject.toml").exists() and (folder / "brats_helpers" / "suite" / "environment.py").exists()


def fetch() -> Path:
    """Clone the suite into the current folder and return the clone."""
    if CLONE.exists():
        raise RuntimeError(f"{CLONE.resolve()} is no usable copy of the suite. Rename or remove it, then try again.")
    try:
        subprocess.run(["git", "clone", "--depth=1", HOME, str(CLONE)], check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise RuntimeError(
            f"The suite could not be fetched from {HOME} ({error}). Put its folder beside this notebook instead."
        ) from None
    return CLONE


if __name__ == "<run_path>":
    set_up(Path(__file__))
