"""Walk through a folder of data: links are followed, and leftovers of operating systems are recognised."""

import os
from collections.abc import Callable
from pathlib import Path

_STRAYS = ("__MACOSX", "Thumbs.db", "desktop.ini")  # besides hidden files


def walk(root: Path, *, lost: Callable[[OSError], None] | None = None) -> list[Path]:
    """All files and empty folders below `root`, sorted. Stray folders are listed but not entered.

    Links to folders are followed, except those that lead back up. Each folder is visited once, by its own path if it
    lies below `root`.
    `lost` is called with the error for each folder that cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()
    tops = [os.fspath(root)]
    for top in tops:  # grows while links are found
        for folder, folders, files in os.walk(top, onerror=lost):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            strays = [name for name in folders if is_stray(name)]
            folders[:] = sorted({*folders}.difference(strays))
            found += [Path(folder, name) for name in (*files, *strays)]
            if not (folders or files or strays) and folder not in tops:
                found.append(Path(folder))
            for link in (os.path.join(folder, name) for name in folders):
                if os.path.islink(link) and not Path(real).is_relative_to(os.path.realpath(link)):
                    tops.append(link)
    return sorted(found)


def is_stray(name: str) -> bool:
    """Whether a file or folder was left by an operating system, or is hidden."""
    return name.startswith(".") or name in _STRAYS


def is_text(path: Path) -> bool:
    """Whether a path's bytes are UTF-8, whatever the locale."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
