"""Where patients are found: folders, mounts, archives, and a loopback server for Kaggle's real clients."""

import errno
import gzip
import json
import shutil
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import kaggle as kaggle_data
from brats_helpers.data import sources
from brats_helpers.data.cases import find_cases
from brats_helpers.data.sources import KAGGLE_SETS, Source, find_data
from brats_helpers.labels import DataError
from tests.kaggle_server import TOKEN, pack_tar, pack_zip

pytestmark = pytest.mark.usefixtures("machine")
MIB = 1 << 20
NAME = "brats20-dataset-training-validation"
KINDS = ("flair", "t1", "t1ce", "t2", "seg")
CLIENTS = ("kaggle", "kagglehub")
rng = np.random.default_rng(0)


def nifti(compressed: bool = False) -> bytes:
    """A small volume of noise, which compression does not shrink: the clients write blocks of 1 MiB."""
    image = nib.Nifti1Image(rng.integers(-32768, 32767, (64, 64, 20), dtype=np.int16), np.eye(4))
    return gzip.compress(image.to_bytes()) if compressed else image.to_bytes()


def patient(case_id: str, suffix: str = ".nii") -> dict[str, bytes]:
    return {f"{case_id}_{kind}{suffix}": nifti(suffix.endswith("gz")) for kind in KINDS}


TOP = "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData"
FILES = {
    f"{TOP}/{case_id}/{name}": data
    for case_id in ("BraTS20_Training_001", "BraTS20_Training_002")
    for name, data in patient(case_id).items()
}
ZIP = pack_zip(FILES)
"""BraTS 2020 of two patients, as Kaggle packs it."""
TARS = {
    "BraTS2021.tar": pack_tar(
        {
            f"./{case_id}/{name}": data
            for case_id in ("BraTS2021_00000", "BraTS2021_00495")
            for name, data in patient(case_id, ".nii.gz").items()
        }
    )
}
"""BraTS 2021 of two patients, as Kaggle packs it."""


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
def no_choice(monkeypatch):
    """Ignore a client that the caller's environment asks for."""
    monkeypatch.delenv("BRATS_KAGGLE_CLIENT", raising=False)


@pytest.fixture
def kaggle(kaggle):
    """The loopback server, with a data set."""
    kaggle.archive = ZIP
    return kaggle


@pytest.fixture(params=CLIENTS)
def client(request, kaggle, monkeypatch):
    """Each of Kaggle's clients; `kaggle` with an account, and without its pauses between attempts."""
    if request.param == "kaggle":
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        monkeypatch.setattr(time, "sleep", lambda _: None)
    return request.param


def find(data: str, tmp_path: Path) -> Source:
    return find_data(data, data_dir=tmp_path / "data", phantom_cases=2, seed=5)


def failure(data: str, tmp_path: Path) -> str:
    """The message of a failure, which names the data set, each place and the ways out, and leaves no folder."""
    with pytest.raises(DataError) as caught:
        find(data, tmp_path)
    message = str(caught.value)
    short = "brats2020" if data == "kaggle" else data
    wanted = KAGGLE_SETS[short]
    assert message.startswith(f"No {short} ({wanted.handle} on Kaggle): ")
    assert str(tmp_path / "input" / wanted.name) in message
    assert str(tmp_path / "input" / "datasets" / wanted.handle) in message
    for way in ("--data PATH", "KAGGLE_API_TOKEN", f"{wanted.name}.zip", "--data phantom"):
        assert way in message.split("Three ways out:")[1]
    assert TOKEN not in message and "signature" not in message
    assert not list((tmp_path / "data").glob(".part-*"))
    return message


# --- what needs no Kaggle ------------------------------------------------------------------------------------------


def test_a_folder_is_taken_as_given(tmp_path):
    root = place(tmp_path / "mine", {f"A/{name}": data for name, data in patient("A").items()})
    assert find(str(root), tmp_path) == Source(root, False, f"{root}, as given")
    (root / "SIMULATED.txt").touch()
    assert find(str(root), tmp_path).simulated
    (root / "SIMULATED.txt").write_text("These patients are simulated by someone, from seed 7.\n")
    assert find(str(root), tmp_path).origin == f"simulated by someone, from seed 7, in {root}"


@pytest.mark.parametrize(("data", "hint"), [("phantoms", "did you mean phantom?"), ("/nowhere", "no such folder.")])
def test_a_folder_that_does_not_exist_is_refused(data, hint, tmp_path):
    with pytest.raises(DataError) as caught:
        find(data, tmp_path)
    assert data in str(caught.value) and hint in str(caught.value) and "--data phantom" in str(caught.value)


def test_simulations_of_other_seeds_and_sizes_are_kept_apart(tmp_path, monkeypatch):
    from brats_helpers.data import phantom

    made = []
    monkeypatch.setattr(phantom, "make_cases", lambda root, **how: made.append((root, how["n_cases"], how["seed"])))
    wanted = ((2, 0), (3, 0), (2, 1))
    found = [find_data("phantom", data_dir=tmp_path, phantom_cases=n, seed=s) for n, s in wanted]
    assert len({one.root for one in found}) == 3 and all(one.simulated for one in found)
    assert made == [(one.root, n, s) for one, (n, s) in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("mount", [NAME, f"datasets/awsaf49/{NAME}"])
def test_kaggle_mounts_old_and_new(mount, tmp_path):
    root = place(tmp_path / "input" / mount, FILES)
    for data in ("kaggle", "brats2020"):
        found = find(data, tmp_path)
        assert found.root == root and not found.simulated and str(root) in found.origin
    assert len(find_cases(found.root)) == 2 and not (tmp_path / "data").exists()
    (root / "SIMULATED.txt").touch()  # somebody attached simulated patients
    assert find("kaggle", tmp_path).simulated


def test_tars_of_a_read_only_mount_are_unpacked_elsewhere(tmp_path):
    mount = place(tmp_path / "input" / "brats-2021-task1", TARS)
    for path in (*mount.iterdir(), mount):
        path.chmod(0o555 if path.is_dir() else 0o444)
    for origin in ("unpacked from", "downloaded earlier"):
        found = find("brats2021", tmp_path)
        assert found.root == tmp_path / "data" / "brats2021" and origin in found.origin
        assert [case.id for case in find_cases(found.root)] == ["BraTS2021_00000", "BraTS2021_00495"]
    mount.chmod(0o755)


def test_an_archive_downloaded_by_hand_is_unpacked_and_listed(tmp_path):
    archive = place(tmp_path / "data", {f"{NAME}.zip": ZIP}) / f"{NAME}.zip"
    (tmp_path / "data" / ".part-of-a-killed-run").mkdir()
    found = find("kaggle", tmp_path)
    assert contents(found.root) == FILES and archive.exists()
    assert json.loads((found.root / "listing.json").read_text()) == {name: len(data) for name, data in FILES.items()}


def test_an_incomplete_folder_is_never_accepted(tmp_path):
    target = place(tmp_path / "data" / "brats2020", FILES)
    assert "no listing.json" in failure("kaggle", tmp_path)
    (target / "listing.json").write_text("{")
    assert "listing.json is damaged" in failure("kaggle", tmp_path)
    target.rename(tmp_path / "aside")
    place(tmp_path / "data", {f"{NAME}.zip": ZIP})
    victim = find("kaggle", tmp_path).root / next(iter(FILES))
    size = victim.stat().st_size
    victim.write_bytes(victim.read_bytes()[:-1])
    message = failure("kaggle", tmp_path)
    assert f"{victim} has {size - 1:,} bytes, expected {size:,}" in message and "Remove" in message


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        (pack_zip({}), "holds no *.nii*, only nothing"),
        (
            pack_zip({"BraTS2020_TrainingData/name_mapping.csv": b"Grade"}),
            "only BraTS2020_TrainingData/name_mapping.csv",
        ),
        (pack_zip(FILES | {"../evil.nii": b"x"}), "not to be trusted"),
        (pack_zip({"a.nii": b"x", "inner.tar": pack_tar({"../../evil.nii": b"x"})}), "not to be trusted"),
        (ZIP[:-500], "damaged or truncated"),
    ],
    ids=["empty", "no patients", "hostile zip", "hostile tar", "truncated"],
)
def test_an_archive_that_is_refused_leaves_nothing(archive, fault, tmp_path):
    place(tmp_path / "data", {f"{NAME}.zip": archive})
    before = set(tmp_path.rglob("*"))
    message = failure("kaggle", tmp_path)
    assert fault in message and "etch it again" in message
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "data" / ".brats2020.lock"}


def test_a_second_run_does_not_fetch_at_the_same_time(tmp_path):
    with sources._alone(tmp_path / "data" / "brats2020"):
        assert "another run is fetching" in failure("kaggle", tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_announced(code, tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(code, "not here")

    monkeypatch.setattr(fcntl, "flock", flock)
    place(tmp_path / "data", {f"{NAME}.zip": ZIP})
    assert len(find_cases(find("kaggle", tmp_path).root)) == 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("⚠️")]
    assert f"no file locks in {tmp_path / 'data'} (not here)" in line


# --- with Kaggle's clients -----------------------------------------------------------------------------------------


def test_a_download_is_complete_quiet_and_used_again(client, kaggle, tmp_path, capfd):
    found = find("kaggle", tmp_path)
    assert found.root == tmp_path / "data" / "brats2020" and not found.simulated
    assert contents(found.root) == FILES
    account = f"Bearer {TOKEN}" if client == "kaggle" else None
    assert {who for _, path, _, who in kaggle.requests if "DownloadDataset" in path} == {account}
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"brats2020", ".brats2020.lock"}

    asked = len(kaggle.requests)
    assert find("kaggle", tmp_path).root == found.root
    assert len(kaggle.requests) == asked  # the earlier download, without a request
    shown = "".join(capfd.readouterr())
    assert f"with {client}" in shown and TOKEN not in shown and "signature" not in shown
    assert TOKEN.encode() not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_broken_connection_is_resumed(client, kaggle, tmp_path):
    kaggle.cuts = [1_300_000]
    assert contents(find("kaggle", tmp_path).root) == FILES
    # At port 7777 kagglehub reads an answer whole before it writes, so nothing of the first one is left to resume.
    assert (f"bytes={MIB}-" in kaggle.ranges()) == (client == "kaggle")


def test_a_silent_connection_is_resumed(account, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(kaggle_data, "_LIMITS_S", (1, 0.5))
    kaggle.stall_after = len(kaggle.archive) - 1000
    assert contents(find("kaggle", tmp_path).root) == FILES


def test_a_connection_that_stays_broken_is_resumed_by_the_next_run(account, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    kaggle.cuts = [1_300_000] + [0] * 100
    message = failure("kaggle", tmp_path)
    assert "the connection broke, and broke again after resuming. Run again" in message
    kaggle.cuts, kaggle.requests = [], []
    assert contents(find("kaggle", tmp_path).root) == FILES
    assert f"bytes={MIB}-" in kaggle.ranges()


def test_kagglehub_resumes_what_an_earlier_run_left_and_its_tars_are_unpacked(kaggle, tmp_path):
    kaggle.archive = pack_zip(TARS)
    cache = tmp_path / "data" / ".brats2021.download" / "datasets" / "dschettler8845" / "brats-2021-task1"
    place(cache, {"3.archive": kaggle.archive[:5000]})
    cases = find_cases(find("brats2021", tmp_path).root)
    assert [case.id for case in cases] == ["BraTS2021_00000", "BraTS2021_00495"]
    assert kaggle.ranges() == [None, "bytes=5000-"]


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        (pack_zip({"name_mapping.csv": b"Grade"}), "holds no *.nii*, only name_mapping.csv"),
        (ZIP[:-500] + bytes(500), "damaged"),
        (b"<html>Sign in</html>" * 100, "damaged"),
    ],
    ids=["no patients", "damaged", "no zip"],
)
def test_a_download_that_is_refused_is_fetched_anew_by_the_next_run(archive, fault, client, kaggle, tmp_path):
    kaggle.archive = archive
    assert fault in failure("kaggle", tmp_path)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {".brats2020.lock"}
    kaggle.archive = ZIP
    assert contents(find("kaggle", tmp_path).root) == FILES


@pytest.mark.parametrize(
    ("status", "what", "remedy"),
    [
        (401, "KAGGLE_API_TOKEN were not accepted", "https://www.kaggle.com/settings"),
        (403, "access refused", "accept its terms"),
        (404, "has no awsaf49", "give a copy by --data"),
        (503, "answered with an error", "Run again later"),
    ],
)
def test_a_refusal_says_what_to_do(status, what, remedy, kaggle, account, tmp_path, capfd):
    kaggle.status = status
    message = failure("kaggle", tmp_path)
    assert str(status) in message and what in message and remedy in message
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_token_that_is_not_accepted_is_named(kaggle, account, tmp_path):
    for kaggle.token_status in (401, 403):
        assert "the credentials in KAGGLE_API_TOKEN were not accepted" in failure("kaggle", tmp_path)


def test_archive_and_contents_must_fit_side_by_side(client, kaggle, tmp_path, monkeypatch):
    one = replace(sources.KAGGLE_SETS["brats2020"], disk_bytes=7_000_000_000)
    monkeypatch.setitem(sources.KAGGLE_SETS, "brats2020", one)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(7_000_000_000 - 1))
    assert "archive and unpacked, needs 7.0 GB" in failure("kaggle", tmp_path)
    assert not kaggle.ranges()
    place(tmp_path / "data" / ".brats2020.download", {"a": b"1"})
    find("kaggle", tmp_path)  # a byte that has arrived needs no more room


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is a disk that is always full")
def test_a_disk_that_fills_up_during_the_download_is_named(kaggle, account, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    part = tmp_path / "data" / ".brats2020.download" / "part"
    part.mkdir(parents=True)
    (part / f"{NAME}.zip").symlink_to("/dev/full")
    message = failure("kaggle", tmp_path)
    assert "filled up" in message and "Make room" in message


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("short", ["brats2020", "brats2021"])
def test_what_arrived_outlasts_an_unpacking_that_broke_off(short, client, kaggle, tmp_path, monkeypatch):
    kaggle.archive = ZIP if short == "brats2020" else pack_zip(TARS)
    with monkeypatch.context() as broken:
        broken.setattr(sources, "write_json", no_space)  # the listing, after all else
        assert "filled up while unpacking" in failure(short, tmp_path)
    fetched = len(kaggle.ranges())
    assert len(find_cases(find(short, tmp_path).root)) == 2
    assert len(kaggle.ranges()) == fetched
    assert {path.name for path in (tmp_path / "data").iterdir()} == {short, f".{short}.lock"}


def test_a_download_that_is_discarded_only_in_part_is_never_used(tmp_path, monkeypatch):
    folder = place(tmp_path / ".brats2021.download", TARS)
    with monkeypatch.context() as killed:
        killed.setattr("brats_helpers.files.shutil.rmtree", lambda *_, **__: None)
        sources._discard(folder)
    assert not folder.exists() and [path.name[:6] for path in tmp_path.iterdir()] == [".part-"]


@pytest.mark.parametrize(
    ("short", "files", "origin"), [("brats2020", FILES, "mounted at"), ("brats2021", TARS, "from Kaggle to")]
)
def test_a_folder_that_colab_mounts_is_used_where_it_is(short, files, origin, kaggle, tmp_path, monkeypatch):
    mount = place(tmp_path / "colab", files)
    hub = type(sys)("kagglehub")
    hub.dataset_download = lambda handle: str(mount)
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setitem(sources.KAGGLE_SETS, short, replace(sources.KAGGLE_SETS[short], disk_bytes=1 << 60))
    found = find(short, tmp_path)  # a mount needs no room
    assert origin in found.origin and len(find_cases(found.root)) == 2 and contents(mount) == files


def test_a_client_that_is_not_installed_is_named(client, kaggle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.setitem(sys.modules, "kaggle.api.kaggle_api_extended", None)
    assert f"pip install {client}" in failure("kaggle", tmp_path)


# --- without a network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True], ids=["refused", "swallowed"])
def test_without_a_network_the_ways_out_come_soon(silent, request, port, tmp_path):
    if silent:
        request.getfixturevalue("kaggle").silent = True
    began = time.monotonic()
    message = failure("kaggle", tmp_path)
    assert "no answer from localhost:7777. Is there a network?" in message
    assert time.monotonic() - began < 30


def test_the_command_line_takes_every_data_set_by_name():
    from brats_helpers.suite.plan import DATA_NAMES

    assert {"phantom", "kaggle", *KAGGLE_SETS} == set(DATA_NAMES)
