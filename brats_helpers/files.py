"""Files and folders that are there whole or not at all, whatever is killed in between."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PART = f".part-{platform.node()}-"


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file to write that takes its name only when it is whole and on disk; until then the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content: dict) -> None:
    """Write JSON by `whole_file`."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def part_folder(beside: Path) -> Iterator[Path]:
    """A hidden folder inside `beside` to work in; rename it when whole. `sweep` removes what a kill leaves."""
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PART}{os.getpid()}-", dir=beside))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(beside: Path) -> None:
    """Remove the folders of `part_folder` whose process, of this machine, is no more."""
    for folder in beside.glob(f"{_PART}*"):
        process = int(folder.name.removeprefix(_PART).partition("-")[0])
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # somebody else's, and alive
