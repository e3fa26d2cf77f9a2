"""Zips and tars on disk: complete, damaged, hostile, and too large."""

import errno
import io
import shutil
import stat
import tarfile
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from tqdm import tqdm

from brats_helpers.data import archives
from brats_helpers.data.archives import Damaged, calm_bar, unpack
from brats_helpers.labels import DataError
from tests.kaggle_server import pack_tar, pack_zip


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def unpacked(packed: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files that `unpack` makes, by name."""
    folder = tmp_path / "place" / "out"
    folder.mkdir(parents=True)
    unpack(packed, folder, "set")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def zip_link() -> bytes:
    member = zipfile.ZipInfo("link.nii")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def tar_of(kind: bytes) -> bytes:
    """A zip with a tar that holds a link to /etc/passwd, or a device."""
    member = tarfile.TarInfo("link.nii")
    member.type, member.linkname = kind, "/etc/passwd"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member)
    return pack_zip({"inner.tar": buffer.getvalue()})


def false_size() -> bytes:
    """A zip whose only file claims 4 GB: the size stands at byte 22 of its header and at byte 24 of its entry."""
    content = bytearray(pack_zip({"a.nii": b"x" * 1000}))
    for at in (content.index(b"PK\3\4") + 22, content.index(b"PK\1\2") + 24):
        content[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    return bytes(content)


HOSTILE = {
    "parent": pack_zip({"a.nii": b"x", "../evil.nii": b"x"}),
    "absolute": pack_zip({"a.nii": b"x", "/tmp/evil.nii": b"x"}),
    "drive": pack_zip({"a.nii": b"x", "C:\\evil.nii": b"x"}),
    "backslash": pack_zip({"a.nii": b"x", "a\\..\\..\\evil.nii": b"x"}),
    "link": zip_link(),
    "size": false_size(),
    "tar-parent": pack_zip({"inner.tar": pack_tar({"a.nii": b"x", "../../evil.nii": b"x"})}),
    "tar-symlink": tar_of(tarfile.SYMTYPE),
    "tar-hardlink": tar_of(tarfile.LNKTYPE),
    "tar-device": tar_of(tarfile.CHRTYPE),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_is_refused_and_writes_nothing_outside(content, tmp_path):
    packed = put(tmp_path / "set.zip", content)
    with pytest.raises(Damaged, match="set.zip is not to be trusted|'.*' (is a|would leave)") as caught:
        unpacked(packed, tmp_path)
    assert "Fetch it again" in str(caught.value)
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["out"]
    assert not Path("/tmp/evil.nii").exists()


def test_a_zip_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch):
    # 5 MB of zeros take about 5 kB: a ratio of 1000. Below 1 GB that is harmless and happens to blank volumes.
    packed = put(tmp_path / "set.zip", pack_zip({"a.nii": bytes(5_000_000)}))
    assert len(unpacked(packed, tmp_path)["a.nii"]) == 5_000_000
    monkeypatch.setattr(archives, "_SMALL", 4_000_000)
    with pytest.raises(Damaged, match="0.0 MB claim to hold 0.0 GB"):
        unpacked(packed, tmp_path / "again")


def test_an_absolute_name_in_a_tar_stays_inside_the_folder(tmp_path):
    packed = put(tmp_path / "set.zip", pack_zip({"inner.tar": pack_tar({"/tmp/evil.nii": b"x"})}))
    assert unpacked(packed, tmp_path) == {"inner/tmp/evil.nii": b"x"}
    assert not Path("/tmp/evil.nii").exists()


def flipped() -> bytes:
    content = bytearray(pack_zip({"a.nii": bytes(range(256)) * 40}))
    content[60] ^= 0xFF
    return bytes(content)


def encrypted() -> bytes:
    content = bytearray(pack_zip({"a.nii": b"x" * 100}))
    for at in (content.index(b"PK\3\4") + 6, content.index(b"PK\1\2") + 8):
        content[at] |= 1
    return bytes(content)


DAMAGED = {
    "flipped": flipped(),
    "truncated": pack_zip({"a.nii": b"x" * 100})[:-30],
    "no zip": b"<html>Sign in</html>",
    "empty": b"",
    "encrypted": encrypted(),
    "inner tar": pack_zip({"inner.tar": pack_tar({"a.nii": bytes(20_000)})[:15_000]}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_refused(content, tmp_path):
    with pytest.raises(Damaged, match="the archive set.zip is damaged or truncated.*Fetch it again"):
        unpacked(put(tmp_path / "set.zip", content), tmp_path)


def test_backslashes_from_windows_are_folders(tmp_path):
    files = {r"Training\A\A_t1.nii": b"x"}
    assert unpacked(put(tmp_path / "set.zip", pack_zip(files)), tmp_path) == {"Training/A/A_t1.nii": b"x"}


def brats2021() -> dict[str, bytes]:
    """Two tars as on Kaggle: the small one repeats a patient of the large one, without the patient's folder."""
    return {
        "BraTS2021_00495.tar": pack_tar({"BraTS2021_00495_t1.nii.gz": b"first"}),
        "BraTS2021_Training_Data.tar": pack_tar(
            {
                "./BraTS2021_00000/BraTS2021_00000_t1.nii.gz": b"other" * 9999,
                "./BraTS2021_00495/BraTS2021_00495_t1.nii.gz": b"first",
            }
        ),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["in a zip", "in a folder"])
def test_each_file_of_several_tars_is_unpacked_once(zipped, tmp_path):
    packed = tmp_path / "set"
    if zipped:
        put(packed, pack_zip(brats2021()))
    else:
        for name, content in brats2021().items():
            put(packed / name, content)
    files = unpacked(packed, tmp_path)
    top = "BraTS2021_Training_Data"
    assert files == {
        f"{top}/BraTS2021_00000/BraTS2021_00000_t1.nii.gz": b"other" * 9999,
        f"{top}/BraTS2021_00495/BraTS2021_00495_t1.nii.gz": b"first",
    }


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def copy(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    packed = put(tmp_path / "set.zip", pack_zip({"a.nii": b"x"}))
    with monkeypatch.context() as full:
        full.setattr(shutil, "copyfileobj", copy)
        with pytest.raises(DataError, match="the disk of .*place filled up while unpacking. Make room"):
            unpacked(packed, tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0))
    with pytest.raises(DataError, match="set, unpacked, needs 0.0 GB; the disk of .* has 0.0 free. Make room"):
        unpacked(packed, tmp_path / "again")


def test_progress_is_a_bar_for_a_person_and_a_calm_line_for_a_log(monkeypatch, capsys):
    def show(**faster):
        with tqdm(desc="set: ", total=4000, unit="B", unit_scale=True, **calm_bar() | faster) as bar:
            bar.update(1000)

    show()
    assert capsys.readouterr() == ("", "")  # less than a minute
    show(delay=1e-9, mininterval=0)
    shown = capsys.readouterr()
    assert "set: 1.00kB of 4.00kB, 00:00 left\n" in shown.out and shown.err == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    show()
    shown = capsys.readouterr()
    assert "25%" in shown.err and shown.out == ""
