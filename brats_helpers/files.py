"""Files and folders that are complete or absent, even if the process is killed while it writes."""

import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

PART = ".part-"
"""Prefix of the names of unfinished folders."""
_STALE_S = 24 * 3600  # no write takes this long


@contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing that gets its name only when it is complete and on disk; until then the old one stays.

    If several processes write it at once, the last to finish wins.
    """
    sweep(path.parent)
    with part_folder(path.parent) as folder:
        part = folder / path.name
        binary = "b" in mode
        with open(part, mode, encoding=None if binary else "utf-8", newline=None if binary else "") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)


_REQUIRED = object()


def read_json(path: Path, default: object = _REQUIRED) -> Any:
    """Read JSON as UTF-8, whatever the locale; return `default`, if given, if there is no such file.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content is not JSON in UTF-8; the message names the file.
    """
    if default is not _REQUIRED and not path.exists():
        return default
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({error}). Restore or remove it.") from error


def write_json(path: Path, content: object) -> None:
    """Write JSON as UTF-8 by `whole_file`."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def file_digest(path: Path) -> str:
    """Hash a file's bytes to 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


@contextmanager
def part_folder(beside: Path) -> Iterator[Path]:
    """Yield a hidden work folder inside `beside`; move complete files out. `sweep` removes it after a kill."""
    folder = beside / f"{PART}{processes()}-{os.getpid()}-{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. It replaces `path` when it is complete; until then the old one stays."""
    sweep(path.parent)
    with part_folder(path.parent) as folder:
        new = folder / path.name
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, folder / "old")
        os.replace(new, path)


def sweep(beside: Path) -> None:
    """Remove the folders of `part_folder` whose process has ended, or that are a day old.

    The age decides for other machines and containers, whose processes are not visible here.
    """
    for folder in beside.glob(f"{PART}*"):
        own = re.fullmatch(rf"{PART}{processes()}-(\d+)-[0-9a-f]+", folder.name)
        with suppress(OSError):  # another process swept it
            if (own and not alive(int(own[1]))) or time.time() - folder.stat().st_mtime > _STALE_S:
                shutil.rmtree(folder, ignore_errors=True)


def alive(process: int) -> bool:
    """Whether a process with this number is running, in the scope of `processes`."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True


@cache
def processes() -> str:
    """Return a digest of the scope in which a process number is unique: this boot of this machine or container."""
    facts = [platform.node()]
    with suppress(OSError):  # Linux alone has these
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text("utf-8"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256(str(facts).encode()).hexdigest()[:12]
