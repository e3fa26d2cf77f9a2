"""The real `kaggle` client and kagglehub against a server on loopback; mounts, archives and folders on disk."""

import errno
import gzip
import io
import json
import subprocess
import sys
import tarfile
import time
import types
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import sources
from brats_helpers.data.cases import find_cases
from brats_helpers.data.sources import KAGGLE_SETS, Source, find_data
from brats_helpers.labels import DataError
from tests.kaggle_server import TOKEN

pytestmark = pytest.mark.usefixtures("machine")
MIB = 1 << 20
NAME = "brats20-dataset-training-validation"
KINDS = ("flair", "t1", "t1ce", "t2", "seg")
rng = np.random.default_rng(0)


def nifti(compressed: bool = False) -> bytes:
    """A small volume, of noise, so that it does not shrink when packed: the clients write blocks of 1 MiB."""
    image = nib.Nifti1Image(rng.integers(-32768, 32767, (64, 64, 20), dtype=np.int16), np.eye(4))
    return gzip.compress(image.to_bytes()) if compressed else image.to_bytes()


def patient(case_id: str, suffix: str = ".nii") -> dict[str, bytes]:
    return {f"{case_id}_{kind}{suffix}": nifti(suffix.endswith("gz")) for kind in KINDS}


def brats2020(n: int = 2) -> dict[str, bytes]:
    top = "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData"
    ids = [f"BraTS20_Training_{number:03d}" for number in range(1, n + 1)]
    return {f"{top}/{i}/{name}": data for i in ids for name, data in patient(i).items()}


def pack_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def pack_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def brats2021() -> dict[str, bytes]:
    """Three tars as on Kaggle: two of them repeat a patient of the first, without a folder."""
    first, second = patient("BraTS2021_00495", ".nii.gz"), patient("BraTS2021_00621", ".nii.gz")
    third = patient("BraTS2021_00000", ".nii.gz")
    large = {f"./{name[:15]}/{name}": data for one in (first, second, third) for name, data in one.items()}
    return {
        "BraTS2021_00495.tar": pack_tar(first),
        "BraTS2021_00621.tar": pack_tar(second),
        "BraTS2021_Training_Data.tar": pack_tar(large),
    }


def place(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files.pop("listing.json", None)
    return files


@pytest.fixture(autouse=True)
def small_sets(machine, monkeypatch):
    """No test needs room for a real archive, nor heeds a client that its caller asks for."""
    monkeypatch.delenv("BRATS_KAGGLE_CLIENT", raising=False)
    sets = {short: replace(one, archive_bytes=0) for short, one in sources.KAGGLE_SETS.items()}
    monkeypatch.setattr(sources, "KAGGLE_SETS", sets)


@pytest.fixture
def kaggle(kaggle):
    """The loopback server, with a data set."""
    kaggle.archive = pack_zip(brats2020())
    return kaggle


def find(data: str, tmp_path: Path) -> Source:
    return find_data(data, data_dir=tmp_path / "data", phantom_cases=2, seed=5)


def failure(data: str, tmp_path: Path) -> str:
    """The message of a failure, which must name the data set, each place and the ways out, and leave no folder."""
    with pytest.raises(DataError) as caught:
        find(data, tmp_path)
    message = str(caught.value)
    short = "brats2020" if data == "kaggle" else data
    assert message.startswith(f"No {short} (")
    assert KAGGLE_SETS[short].handle in message.splitlines()[0]
    assert str(tmp_path / "input" / KAGGLE_SETS[short].name) in message
    assert str(tmp_path / "input" / "datasets" / KAGGLE_SETS[short].handle) in message
    assert str(tmp_path / "data" / short) in message
    for way in ("--data PATH", "KAGGLE_API_TOKEN", "--data phantom"):
        assert way in message.split("Three ways out:")[1]
    assert TOKEN not in message and "signature" not in message
    assert not (tmp_path / "data" / f".{short}.unpacking").exists()
    return message


# --- what needs no Kaggle ------------------------------------------------------------------------------------------


def test_importing_sources_imports_no_client():
    code = "import sys, brats_helpers.sources; print([m for m in sys.modules if m.startswith(('kaggle', 'requests'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_path(tmp_path):
    root = place(tmp_path / "mine", {f"A/{name}": data for name, data in patient("A").items()})
    assert find(str(root), tmp_path) == Source(root, False, f"{root}, as given")
    (root / "SIMULATED.txt").touch()
    assert find(str(root), tmp_path).simulated


@pytest.mark.parametrize(("data", "hint"), [("phantoms", "did you mean phantom?"), ("/nowhere", "no such folder.")])
def test_a_path_that_is_none(data, hint, tmp_path):
    with pytest.raises(DataError) as caught:
        find(data, tmp_path)
    assert data in str(caught.value) and hint in str(caught.value) and "--data phantom" in str(caught.value)


def test_phantoms_of_other_seeds_and_numbers_are_kept_apart(tmp_path, monkeypatch):
    from brats_helpers.data import phantom

    made = []
    monkeypatch.setattr(phantom, "make_cases", lambda root, **how: made.append((root, how)))
    roots = [find_data("phantom", data_dir=tmp_path, phantom_cases=n, seed=s).root for n, s in ((2, 0), (3, 0), (2, 1))]
    assert len(set(roots)) == 3 and not any(a in b.parents for a in roots for b in roots)
    assert made == [
        (root, {"n_cases": n, "seed": s, "workers": None})
        for root, n, s in zip(roots, (2, 3, 2), (0, 0, 1), strict=True)
    ]
    assert find_data("phantom", data_dir=tmp_path, phantom_cases=2, seed=0).simulated


@pytest.mark.parametrize("mount", [NAME, f"datasets/awsaf49/{NAME}"])
def test_kaggle_mounts_old_and_new(mount, tmp_path):
    root = place(tmp_path / "input" / mount, brats2020())
    for data in ("kaggle", "brats2020"):
        found = find(data, tmp_path)
        assert found.root == root and not found.simulated and str(root) in found.origin
    assert len(find_cases(found.root)) == 2
    assert not (tmp_path / "data").exists()
    (root / "SIMULATED.txt").touch()  # simulated patients that somebody attached say so all the same
    assert find("kaggle", tmp_path).simulated


def test_tars_of_a_read_only_mount_are_unpacked_elsewhere(tmp_path):
    mount = place(tmp_path / "input" / "brats-2021-task1", brats2021())
    before = contents(mount)
    for path in (*mount.iterdir(), mount):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for _ in range(2):  # the second time from what the first unpacked
        found = find("brats2021", tmp_path)
        assert found.root == tmp_path / "data" / "brats2021"
        ids = ["BraTS2021_00000", "BraTS2021_00495", "BraTS2021_00621"]
        assert [case.id for case in find_cases(found.root)] == ids
    mount.chmod(0o755)
    assert contents(mount) == before


def test_an_archive_fetched_by_hand(tmp_path):
    files = brats2020()
    archive = place(tmp_path / "data", {f"{NAME}.zip": pack_zip(files)}) / f"{NAME}.zip"
    found = find("kaggle", tmp_path)
    assert contents(found.root) == files
    assert json.loads((found.root / "listing.json").read_text()) == {name: len(data) for name, data in files.items()}
    assert archive.exists()


def test_inner_tars_of_an_archive(tmp_path):
    place(tmp_path / "data", {"brats-2021-task1.zip": pack_zip(brats2021())})
    root = find("brats2021", tmp_path).root
    assert [case.id for case in find_cases(root)] == ["BraTS2021_00000", "BraTS2021_00495", "BraTS2021_00621"]
    assert not list(root.rglob("*.tar"))


def test_a_folder_that_is_not_whole_is_never_taken(tmp_path):
    files = brats2020()
    place(tmp_path / "data" / "brats2020", files)
    assert "no listing.json" in failure("kaggle", tmp_path)

    (tmp_path / "data" / "brats2020").rename(tmp_path / "aside")
    place(tmp_path / "data", {f"{NAME}.zip": pack_zip(files)})
    victim = find("kaggle", tmp_path).root / next(iter(files))
    victim.write_bytes(victim.read_bytes()[:-1])
    message = failure("kaggle", tmp_path)
    assert f"1 of {len(files)} files" in message and victim.name in message


@pytest.mark.parametrize("files", [{}, {"BraTS2020_TrainingData/name_mapping.csv": b"Grade"}], ids=["empty", "other"])
def test_an_archive_without_patients_is_refused(files, tmp_path):
    place(tmp_path / "data", {f"{NAME}.zip": pack_zip(files)})
    message = failure("kaggle", tmp_path)
    assert f"holds no *.nii*, only {next(iter(files), 'nothing')}" in message and "fetch it again" in message
    assert not (tmp_path / "data" / "brats2020").exists()


def test_unpacking_that_was_killed_is_begun_anew(tmp_path):
    files = brats2020()
    place(tmp_path / "data" / ".brats2020.unpacking", {"BraTS20_Training_009/half.nii": b"half"})
    place(tmp_path / "data", {f"{NAME}.zip": pack_zip(files)})
    assert contents(find("kaggle", tmp_path).root) == files


def link_in_zip() -> bytes:
    member = zipfile.ZipInfo("BraTS20_Training_001/link.nii")
    member.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def link_in_tar() -> bytes:
    member = tarfile.TarInfo("BraTS2021_00000/link.nii")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member)
    return pack_zip({"inner.tar": buffer.getvalue()})


HOSTILE = {
    "parent": pack_zip(brats2020() | {"../evil.nii": b"x"}),
    "absolute": pack_zip(brats2020() | {"/tmp/evil.nii": b"x"}),
    "drive": pack_zip(brats2020() | {"C:\\evil.nii": b"x"}),
    "backslash": pack_zip(brats2020() | {"a\\..\\..\\evil.nii": b"x"}),
    "link": link_in_zip(),
    "tar-parent": pack_zip({"inner.tar": pack_tar({"a.nii": b"x", "../../evil.nii": b"x"})}),
    "tar-absolute": pack_zip({"inner.tar": pack_tar({"/tmp/evil.nii": b"x"})}),
    "tar-link": link_in_tar(),
}


@pytest.mark.parametrize("archive", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_archive_leaves_nothing(archive, tmp_path):
    place(tmp_path / "data", {f"{NAME}.zip": archive})
    before = {path for path in tmp_path.rglob("*")}
    assert "not to be trusted" in failure("kaggle", tmp_path)
    assert {path for path in tmp_path.rglob("*")} - before == {tmp_path / "data" / ".brats2020.lock"}
    assert not Path("/tmp/evil.nii").exists()


def test_damage_inside_an_archive(tmp_path):
    archive = bytearray(pack_zip(brats2020()))
    archive[200] ^= 0xFF  # in the packed bytes of the first file
    place(tmp_path / "data", {f"{NAME}.zip": bytes(archive)})
    assert "damaged" in failure("kaggle", tmp_path)


def test_the_disk_fills_up_while_unpacking(tmp_path, monkeypatch):
    place(tmp_path / "data", {f"{NAME}.zip": pack_zip(brats2020())})

    def write(path, mode):
        if path.name == "BraTS20_Training_002_t1.nii":
            raise OSError(errno.ENOSPC, "No space left on device")
        return path.open(mode)

    monkeypatch.setattr(sources, "open", write, raising=False)
    message = failure("kaggle", tmp_path)
    assert "filled up while unpacking" in message and "Make room" in message


def test_two_runs_do_not_fetch_at_once(tmp_path):
    with sources._alone(tmp_path / "data" / "brats2020"):
        assert "another run is fetching" in failure("kaggle", tmp_path)


def test_progress_is_a_bar_for_a_person_and_a_calm_line_for_a_log(monkeypatch, capsys):
    clock = iter([0.0, 30.0, 61.0, 90.0, 0.0, 61.0])  # at the start, then after each GB
    monkeypatch.setattr(sources.time, "monotonic", lambda: next(clock))
    with sources._Progress("set", total=4_000_000_000, start=1_000_000_000) as progress:
        for gigabytes in (2, 3, 4):
            progress.show(gigabytes * 1_000_000_000)
    # a minute has passed at the second: 2 GB since the start in 61 s, so the last takes 30.5 s
    assert capsys.readouterr() == ("set: 3.0 of 4.0 GB, 30 s left\n", "")
    with sources._Progress("set", total=4_000_000_000, start=2_000_000_000) as progress:
        progress.show(1_000_000_000)  # the server sends all of it again
    assert capsys.readouterr() == ("set: 1.0 of 4.0 GB\n", "")
    monkeypatch.undo()

    monkeypatch.setenv("JPY_SESSION_NAME", "notebook")
    with sources._Progress("set", total=2048) as progress:
        progress.add(2048)
    shown = capsys.readouterr()
    assert "100%" in shown.err and shown.out == ""


# --- with the kaggle client ----------------------------------------------------------------------------------------


def test_download(kaggle, account, tmp_path, capfd):
    files = brats2020()
    kaggle.archive = pack_zip(files)
    found = find("kaggle", tmp_path)
    assert found.root == tmp_path / "data" / "brats2020" and not found.simulated
    assert contents(found.root) == files
    assert [case.id for case in find_cases(found.root)] == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert any(who == f"Bearer {TOKEN}" for *_, who in kaggle.requests)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"brats2020", ".brats2020.lock"}

    asked = len(kaggle.requests)
    assert find("kaggle", tmp_path).root == found.root
    assert len(kaggle.requests) == asked  # the earlier download, without a word to Kaggle
    shown = "".join(capfd.readouterr())
    assert "awsaf49" in shown and TOKEN not in shown and "signature" not in shown
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in stored


def test_a_broken_connection_is_resumed(kaggle, account, tmp_path):
    kaggle.cuts = [1_300_000]
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(kaggle.archive)
    assert kaggle.ranges() == [None, None, f"bytes={MIB}-"]


def contents_of_zip(archive: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def test_a_connection_that_stays_broken_is_resumed_by_the_next_run(kaggle, account, tmp_path):
    kaggle.cuts = [1_300_000, 0, 0, 0, 0, 0, 0, 0]
    message = failure("kaggle", tmp_path)
    assert "the connection broke" in message and "Run again" in message
    assert (tmp_path / "data" / ".brats2020.zip.part").stat().st_size == MIB
    kaggle.cuts, kaggle.requests = [], []
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(kaggle.archive)
    assert kaggle.ranges() == [None, f"bytes={MIB}-"]


def test_a_download_that_stands_still_is_resumed_and_in_the_end_given_up(kaggle, account, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_STALL_S", 3)
    kaggle.stall_after = MIB  # what is left fits: the second attempt comes through
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(kaggle.archive)
    assert kaggle.ranges() == [None, None, f"bytes={MIB}-"]

    (tmp_path / "data" / "brats2020").rename(tmp_path / "aside")
    kaggle.stall_after = 1000
    assert "nothing arrived for 3 s after 0.00 GB" in failure("kaggle", tmp_path)


def test_a_truncated_archive_is_removed(kaggle, account, tmp_path):
    whole = kaggle.archive
    kaggle.archive = whole[:-500]
    message = failure("kaggle", tmp_path)
    assert "truncated" in message and "again" in message
    kaggle.archive = whole
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(whole)


@pytest.mark.parametrize(
    ("status", "what", "remedy"),
    [
        (401, "KAGGLE_API_TOKEN were not accepted", "https://www.kaggle.com/settings"),
        (403, "access refused", "accept its terms"),
        (404, "has no awsaf49", "give a copy by --data"),
        (503, "answered with an error", "Run again later"),
    ],
)
def test_refusals(status, what, remedy, kaggle, account, tmp_path, capfd):
    kaggle.status = status
    message = failure("kaggle", tmp_path)
    assert str(status) in message and what in message and remedy in message
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_accepted(status, kaggle, account, tmp_path):
    kaggle.token_status = status
    assert "the credentials in KAGGLE_API_TOKEN were not accepted" in failure("kaggle", tmp_path)


def test_too_little_room_is_said_before_the_download(kaggle, account, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage(0, 0, 2 * len(kaggle.archive) - 1))
    message = failure("kaggle", tmp_path)
    assert "needs" in message and "free" in message and "Make room" in message
    part = tmp_path / "data" / ".brats2020.zip.part"
    assert not part.exists()
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage(0, 0, 2 * len(kaggle.archive)))
    find("kaggle", tmp_path)


@pytest.mark.parametrize("client", ["kaggle", "kagglehub"])
def test_archive_and_contents_must_fit_side_by_side(client, kaggle, tmp_path, monkeypatch):
    if client == "kaggle":
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    one = replace(sources.KAGGLE_SETS["brats2020"], archive_bytes=2_000_000_000, unpacked_bytes=5_000_000_000)
    monkeypatch.setitem(sources.KAGGLE_SETS, "brats2020", one)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _: usage(0, 0, 7_000_000_000 - 1))
    assert "archive and unpacked, needs 7.0 GB" in failure("kaggle", tmp_path)
    assert not kaggle.requests
    place(tmp_path / "data", {".brats2020.zip.part": kaggle.archive[:1], ".brats2020.kagglehub/3.archive": b"1"})
    find("kaggle", tmp_path)  # a byte that is there already needs no room


def test_every_set_that_is_fetched_says_what_room_it_needs():
    assert all(one.archive_bytes and one.unpacked_bytes for one in KAGGLE_SETS.values() if one.pattern != "*.h5")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a disk that is always full")
def test_the_disk_fills_up_during_the_download(kaggle, account, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ".brats2020.zip.part").symlink_to("/dev/full")
    message = failure("kaggle", tmp_path)
    assert "filled up" in message and "Make room" in message


def test_a_hostile_download_is_removed(kaggle, account, tmp_path):
    kaggle.archive = HOSTILE["parent"]
    assert "not to be trusted" in failure("kaggle", tmp_path)
    assert not list((tmp_path / "data").glob("*.zip*"))
    assert not list(tmp_path.rglob("evil*"))


# --- with kagglehub, without an account ----------------------------------------------------------------------------


def test_kagglehub_needs_no_account(kaggle, tmp_path):
    found = find("kaggle", tmp_path)
    assert contents(found.root) == contents_of_zip(kaggle.archive)
    assert all(who is None for *_, who in kaggle.requests)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"brats2020", ".brats2020.lock"}


def test_kagglehub_resumes_and_unpacks_tars(kaggle, tmp_path):
    """What an earlier run got is put there by hand: kagglehub, at port 7777, reads an answer whole before it writes."""
    kaggle.archive = pack_zip(brats2021())
    cache = tmp_path / "data" / ".brats2021.kagglehub" / "datasets" / "dschettler8845" / "brats-2021-task1"
    place(cache, {"3.archive": kaggle.archive[:5000]})
    cases = find_cases(find("brats2021", tmp_path).root)
    assert [case.id for case in cases] == ["BraTS2021_00000", "BraTS2021_00495", "BraTS2021_00621"]
    assert kaggle.ranges() == [None, "bytes=5000-"]


def test_kagglehub_survives_a_broken_connection(kaggle, tmp_path):
    kaggle.cuts = [5000]
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(kaggle.archive)


def test_kagglehub_and_a_damaged_archive(kaggle, tmp_path):
    whole = kaggle.archive
    kaggle.archive = whole[:-500] + bytes(500)  # of the right size, so only its removal makes kagglehub fetch it again
    assert "damaged" in failure("kaggle", tmp_path)
    kaggle.archive = whole
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(whole)


SLOW_KAGGLEHUB = b"""
import os, time
from pathlib import Path

def dataset_download(handle):
    folder = Path(os.environ["KAGGLEHUB_CACHE"], "datasets", handle, "versions", "3")
    for path in sorted(folder.iterdir()):
        with open(path, "wb", buffering=0) as out:
            for _ in range(10):
                time.sleep(0.06)
                out.write(bytes(100_000))
    return str(folder)
"""


def test_unpacking_over_what_an_earlier_run_had_unpacked_is_no_standstill(kaggle, tmp_path, monkeypatch):
    place(tmp_path / "fake", {"kagglehub/__init__.py": SLOW_KAGGLEHUB})
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.setattr(sources, "_STALL_S", 2)
    folder = f".brats2020.kagglehub/datasets/{KAGGLE_SETS['brats2020'].handle}/versions/3"
    place(tmp_path / "data", {f"{folder}/{number}.nii": bytes(1_000_000) for number in range(8)})
    assert len(contents(find("kaggle", tmp_path).root)) == 8  # nearly 5 s, at no time more bytes than at the start


def test_a_file_that_the_client_removes_while_it_is_looked_at_counts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_file", lambda _: True)  # it was there a moment ago
    monkeypatch.setattr(sources.os, "walk", lambda folder: [(folder, [], ["3.archive"])])
    assert sources._size(tmp_path / "3.archive") == 0
    assert sources._bytes_in(tmp_path) == 0


def disk_is_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_kagglehub_fetched_is_never_taken_for_whole_once_its_unpacking_broke_off(kaggle, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(sources, "write_json", disk_is_full)  # the listing, after all else
        assert "filled up while unpacking" in failure("kaggle", tmp_path)
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(kaggle.archive)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"brats2020", ".brats2020.lock"}


def test_tars_that_kagglehub_fetched_outlast_an_unpacking_that_broke_off(kaggle, tmp_path, monkeypatch):
    kaggle.archive = pack_zip(brats2021())
    with monkeypatch.context() as broken:
        broken.setattr(sources, "_write", disk_is_full)
        assert "filled up while unpacking" in failure("brats2021", tmp_path)
    asked = len(kaggle.requests)
    assert len(find_cases(find("brats2021", tmp_path).root)) == 3
    assert len(kaggle.requests) == asked
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"brats2021", ".brats2021.lock"}


def test_a_fetched_folder_that_is_removed_only_in_part_is_never_taken_for_whole(tmp_path, monkeypatch):
    folder = place(tmp_path / ".brats2021.fetched", brats2021())
    with monkeypatch.context() as killed:
        killed.setattr(sources.shutil, "rmtree", lambda *_, ignore_errors=False: ignore_errors or disk_is_full())
        with pytest.raises(OSError):
            sources._remove(folder)
    assert not folder.exists()
    sources._remove(place(folder, brats2021()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("client", ["kaggle", "kagglehub"])
def test_a_download_without_patients_is_refused_and_removed(client, kaggle, tmp_path, monkeypatch):
    if client == "kaggle":
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    whole, kaggle.archive = kaggle.archive, pack_zip({"name_mapping.csv": b"Grade"})
    assert "holds no *.nii*, only name_mapping.csv" in failure("kaggle", tmp_path)
    kaggle.archive = whole
    assert contents(find("kaggle", tmp_path).root) == contents_of_zip(whole)


def test_colab_tries_kagglehub_first_and_the_account_second(kaggle, account, tmp_path, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    kaggle.status = 404
    tried = failure("kaggle", tmp_path).split("Tried, in this order:")[1]
    assert tried.index("download with kagglehub") < tried.index("download with kaggle:")


@pytest.mark.parametrize(("asked", "other"), [("kaggle", "kagglehub"), ("kagglehub", "kaggle")])
def test_the_client_that_is_asked_for_is_the_only_one(asked, other, kaggle, account, tmp_path, monkeypatch):
    if asked == "kaggle":
        monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setenv("BRATS_KAGGLE_CLIENT", asked)
    kaggle.status = 404
    tried = failure("kaggle", tmp_path)
    assert f"download with {asked}:" in tried and f"download with {other}:" not in tried


def test_a_client_that_is_none(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("BRATS_KAGGLE_CLIENT", "curl")
    assert "BRATS_KAGGLE_CLIENT is 'curl', expected kaggle or kagglehub" in failure("kaggle", tmp_path)
    assert not kaggle.requests


# --- without a network ---------------------------------------------------------------------------------------------


def test_a_client_that_is_not_installed(kaggle, account, tmp_path, monkeypatch):
    place(tmp_path / "without", {"kaggle/__init__.py": b"raise ImportError"})
    monkeypatch.syspath_prepend(tmp_path / "without")
    assert "pip install kaggle" in failure("kaggle", tmp_path)


@pytest.mark.parametrize("with_account", [False, True])
def test_offline_ends_soon(with_account, port, tmp_path, monkeypatch):
    if with_account:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    began = time.monotonic()
    assert "Is there a network?" in failure("kaggle", tmp_path)
    assert time.monotonic() - began < 30


def test_a_network_that_swallows_everything_ends_soon(kaggle, tmp_path):
    kaggle.silent = True
    began = time.monotonic()
    assert "no answer from localhost:7777" in failure("kaggle", tmp_path)
    assert time.monotonic() - began < 30


def test_a_client_that_does_not_even_start_is_ended(kaggle, tmp_path, monkeypatch):
    kaggle.silent = True
    monkeypatch.setattr(sources, "_REACH_S", 1)
    began = time.monotonic()
    assert "no answer" in failure("kaggle", tmp_path)
    assert time.monotonic() - began < 4


def test_the_headless_run_takes_every_data_set_by_name():
    from brats_helpers.suite.plan import DATA_NAMES

    assert {"phantom", "kaggle", *KAGGLE_SETS} == set(DATA_NAMES)


def test_a_token_in_colabs_secrets_is_used_where_its_owner_allows_it(monkeypatch):
    secrets = types.ModuleType("google.colab.userdata")
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setitem(sys.modules, "google.colab.userdata", secrets)
    monkeypatch.setenv("KAGGLE_API_TOKEN", "")
    monkeypatch.delenv("KAGGLE_API_TOKEN")

    def refused(name):
        raise PermissionError(name)

    secrets.get = refused
    assert sources._clients() == ["kagglehub"]
    secrets.get = {"KAGGLE_API_TOKEN": "KGAT_secret"}.get
    assert sources._clients() == ["kagglehub", "kaggle"] and sources.credentials() == "KAGGLE_API_TOKEN"
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("BRATS_KAGGLE_CLIENT", "kaggle")
    assert sources._clients() == ["kaggle"] and sources.credentials() == "KAGGLE_API_TOKEN"
