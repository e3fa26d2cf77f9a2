"""Unpack zip and tar archives of unknown origin, with checks and a progress bar."""

import errno
import os
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from tqdm import tqdm  # not tqdm.auto, which freezes under papermill

from brats_helpers.labels import DataError

MAKE_ROOM = "Make room or choose another data_dir, then run again."
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)
"""What a damaged archive makes zipfile and tarfile raise."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or an exhausted quota."""
_MAX_RATIO = 200  # contents to zip; BraTS images reach 4 to 6, and only a forged or hostile zip reaches this
_SMALL = 1 << 30  # bytes of contents that are harmless at any ratio
_BLOCK = 1 << 20


class Damaged(DataError):
    """The archive itself is at fault. Fetching it again may help."""


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DataError` unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{what} needs {needed / 1e9:.1f} GB; the disk of {folder} has {free / 1e9:.1f} free. {MAKE_ROOM}"
        )


def calm_bar() -> dict:
    """Arguments of a tqdm bar: none in a terminal or notebook; elsewhere a line a minute instead of a bar."""
    if sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ:
        return {}
    line = "{desc}{n_fmt}B of {total_fmt}B, {remaining} left\n"
    return {"file": sys.stdout, "bar_format": line, "leave": False, "delay": 60, "mininterval": 60, "maxinterval": 60}


def unpack(packed: Path, folder: Path, what: str) -> None:
    """Unpack a zip with the tars inside it, or all tars of a folder, into `folder`.

    Each tar gets a folder of its own. A file that another archive already held, by name and size, is skipped:
    the small tars of BraTS 2021 repeat patients of the large one.

    Args:
        packed: the zip, or a folder (perhaps read-only) with tars.
        folder: an existing folder to fill.
        what: the data set's name, for messages.

    Raises:
        Damaged: not an archive, truncated, a wrong checksum, an absurd size, or an entry that would leave `folder`.
        DataError: too little room.
    """
    with faults_named(packed, folder.parent):
        if packed.is_file():
            _unzip(packed, folder, what)
            return
        tars = sorted(packed.rglob("*.tar"), key=lambda tar: tar.stat().st_size, reverse=True)
        total = sum(tar.stat().st_size for tar in tars)
        check_space(folder, total, f"{what}, unpacked,")
        there: set[tuple[str, int]] = set()
        with _bar(what, total) as bar:
            for tar in tars:
                with open(tar, "rb") as content:
                    _untar(content, (folder / tar.relative_to(packed)).with_suffix(""), there, bar)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(desc=f"{what}: unpacking: ", total=total, unit="B", unit_scale=True, **calm_bar())


def _unzip(archive: Path, folder: Path, what: str) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
        for member in members:
            _check_member(member)
        total = sum(member.file_size for member in members)
        if total > max(_SMALL, _MAX_RATIO * archive.stat().st_size):
            raise Damaged(
                f"the archive {archive.name} is not to be trusted: {archive.stat().st_size / 1e6:.1f} MB claim to"
                f" hold {total / 1e9:.1f} GB. Nothing was unpacked. Fetch it again, or from elsewhere."
            )
        check_space(folder, total, f"{what}, unpacked,")
        tars = [member for member in members if member.filename.endswith(".tar")]
        with _bar(what, total) as bar:
            for member in members:
                if member not in tars:
                    opened.extract(member, folder)
                    bar.update(member.file_size)
            there = {(path.name, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}
            for member in sorted(tars, key=lambda tar: tar.file_size, reverse=True):
                with opened.open(member) as content:  # read as it lies in the zip, so it takes no room of its own
                    _untar(content, (folder / member.filename).with_suffix(""), there, bar)
                    while content.read(_BLOCK):
                        pass  # zipfile compares the checksum at the end


def _check_member(member: zipfile.ZipInfo) -> None:
    """Refuse a link, and a path that leaves the folder by the rules of any system."""
    path = PureWindowsPath(member.filename)
    if path.anchor or ".." in path.parts:
        fault = "would leave the folder"
    elif stat.S_ISLNK(member.external_attr >> 16):
        fault = "is a link"
    else:
        member.filename = path.as_posix()  # some packers on Windows write backslashes
        return
    raise Damaged(
        f"the archive is not to be trusted: {member.filename!r} {fault}. Nothing was unpacked. Fetch it again, or from"
        " elsewhere."
    )


def _untar(content: IO[bytes], folder: Path, there: set[tuple[str, int]], bar) -> None:
    with tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            key = (PurePosixPath(member.name).name, member.size)
            if not (member.isfile() and key in there):
                tar.extract(member, folder, filter="data")
                there.add(key)
            bar.update(member.size)


@contextmanager
def faults_named(packed: Path, place: Path) -> Iterator[None]:
    """Turn what zipfile, tarfile and the disk raise into one sentence each."""
    try:
        yield
    except tarfile.FilterError as error:
        raise Damaged(
            f"the archive {packed.name} is not to be trusted: {error.tarinfo.name!r} is a device, or leads out of the"
            " folder. Nothing was kept. Fetch it again, or from elsewhere."
        ) from error
    except (*DAMAGE, NotImplementedError, RuntimeError) as error:
        raise Damaged(
            f"the archive {packed.name} is damaged or truncated ({error}). Nothing was kept. Fetch it again."
        ) from error
    except OSError as error:
        if error.errno in FULL:
            raise DataError(f"the disk of {place} filled up while unpacking. {MAKE_ROOM}") from error
        raise DataError(f"unpacking into {place} failed ({error}).") from error
