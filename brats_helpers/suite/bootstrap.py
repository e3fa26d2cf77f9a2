"""Make the suite importable in a notebook, wherever it was opened. Needs only the standard library.

The second code cell of every notebook looks for this file in the usual places and in what is installed, clones the
suite if there is no copy, and runs it. This file mounts Google Drive if the run's folder is there, and installs the
suite if it is missing or was made from other sources. If this checkout is imported already, nothing is installed.
"""

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DRIVE = "/content/drive"
"""Where Colab mounts Google Drive."""


def set_up(script: Path, *, run_dir: str = "") -> None:
    """Install the suite that `script` belongs to, if this Python cannot import it as it is.

    Args:
        script: this file, in a checkout or in an installed copy of the package.
        run_dir: folder of the run; Google Drive is mounted if it is there.

    Raises:
        RuntimeError: Python is too old, Drive cannot be mounted, or the suite is incomplete or cannot be installed.
    """
    if sys.version_info < (3, 11):  # noqa: UP036
        raise RuntimeError(f"The suite needs Python 3.11 or newer; this is Python {sys.version.split()[0]}.")
    if run_dir.startswith(f"{DRIVE}/"):
        mount_drive(run_dir)
    root = script.resolve().parent.parent.parent
    package, other = map(find_spec, ("brats_helpers", "segmentation_models_pytorch"))
    ready = package is not None and other is not None
    first = root / "brats_helpers" / "__init__.py"
    if ready and (first.samefile(package.origin) or not is_checkout(root)):
        return
    if not is_checkout(root):
        raise RuntimeError(
            f"{first.parent} lacks the packages that it needs, and the pyproject.toml and requirements.txt that list"
            " them are not beside it. Put the whole folder of the suite beside this notebook."
        )
    done = subprocess.run([sys.executable, "-P", str(root / "brats_helpers" / "suite" / "environment.py")])
    if done.returncode:
        raise RuntimeError(f"The suite in {root} could not be installed; the lines above say why.")
    importlib.invalidate_caches()


def is_checkout(folder: Path) -> bool:
    """Whether `folder` holds the files that the package is made from."""
    return (folder / "pyproject.toml").exists() and (folder / "brats_helpers" / "suite" / "environment.py").exists()


def mount_drive(run_dir: str) -> None:
    """Mount Google Drive unless it is mounted.

    Raises:
        RuntimeError: this is not Colab.
    """
    if (Path(DRIVE) / "MyDrive").is_dir():
        return
    try:
        drive = importlib.import_module("google.colab.drive")
    except ImportError:
        raise RuntimeError(
            f"run_dir {run_dir} is on Google Drive, which only Colab can mount. Set run_dir to a folder here."
        ) from None
    drive.mount(DRIVE)


if __name__ == "<run_path>":
    set_up(Path(__file__), run_dir=globals().get("run_dir", ""))
