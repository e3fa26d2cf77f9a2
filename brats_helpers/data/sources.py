"""Where the patients come from: a folder, the simulator, or one of three Kaggle data sets.

`find_data` is the one resolver. For a Kaggle data set it looks, in this order, at

1. the mounts of a Kaggle notebook, `/kaggle/input/<name>` and `/kaggle/input/datasets/<owner>/<name>`,
2. an earlier download of ours, `data_dir/<short name>` with its `listing.json`,
3. an archive fetched by hand, `data_dir/<name>.zip`,
4. Kaggle: with kagglehub in Colab and without an account, else with the `kaggle` client; or with the one that the
   variable BRATS_KAGGLE_CLIENT names.

The Kaggle packages authenticate when imported, wait without a time limit and print what they like, so they run in a
child process that reports into a file. The parent watches the bytes arrive, ends a child that stands still, starts
another that resumes, and shows nothing that the packages said. Credentials are read by those packages alone.

HDF5 slices, of `brats2020-slices` or in a folder, are put together to volumes in `data_dir` by `slices.assemble`.
"""

import contextlib
import difflib
import errno
import importlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from urllib.parse import urlsplit

from brats_helpers.data.cases import walk
from brats_helpers.data.hdf5 import NAME, assemble, need_h5py
from brats_helpers.files import write_json
from brats_helpers.labels import DataError
from brats_helpers.log import done, duration


@dataclass(frozen=True)
class Source:
    """A folder of patients, whether they are simulated, and one line on where they come from."""

    root: Path
    simulated: bool
    origin: str


@dataclass(frozen=True)
class KaggleSet:
    """A data set on Kaggle.

    Attributes:
        handle: `owner/name`.
        pattern: what its files look like.
        archive_bytes: of the zip that Kaggle makes of it; estimated, as Kaggle tells it only while it sends.
        unpacked_bytes: of what is in the zip. Zip and contents lie side by side until all is unpacked, and so do tars
            from the zip and theirs, which are as large.
    """

    handle: str
    pattern: str
    archive_bytes: int
    unpacked_bytes: int

    @property
    def name(self) -> str:
        """The data set's name without its owner; Kaggle mounts it under this."""
        return self.handle.split("/")[1]

    @property
    def url(self) -> str:
        """The page where a person reads the terms and downloads by hand."""
        return f"https://www.kaggle.com/datasets/{self.handle}"


_VOLUME = 240 * 240 * 155  # voxels
_TAR_2021 = 13_396_408_320  # bytes of brats2021's large tar: 1251 patients in .nii.gz, which a zip makes no smaller
_SLICE = 128 << 10
KAGGLE_SETS = {
    # plain .nii: four int16 images of 494 patients, one mask of at least 8 bits for 369 of them; zipped like 2021's
    "brats2020": KaggleSet(
        "awsaf49/brats20-dataset-training-validation", "*.nii*", 494 * _TAR_2021 // 1251, (494 * 8 + 369) * _VOLUME
    ),
    "brats2021": KaggleSet("dschettler8845/brats-2021-task1", "*.nii*", _TAR_2021, _TAR_2021),
    # a guess: 57,195 slices of 128 kB; and the volumes made of them, compressed, 20 MB a patient
    "brats2020-slices": KaggleSet("awsaf49/brats2020-training-data", "*.h5", 57_195 * _SLICE, 57_195 * _SLICE),
}
"""Kaggle data sets by short name; `kaggle` means the first."""
MOUNT = Path("/kaggle/input")
"""Where Kaggle, and kagglehub in Colab, mount data sets; read-only."""
_LISTING = "listing.json"  # {path: bytes} of a whole download; written last, checked at each use
_REACH_S = 12  # to start the client and get any answer from Kaggle
_STALL_S = 120  # without a byte more or less before the client is restarted
_PAUSE_S = 2  # after an attempt that brought nothing
_ATTEMPTS = 20  # restarts of a download that does get on
_BLOCK = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAKE_ROOM = "Make room or choose another data_dir, then run again."


def find_data(data: str, *, data_dir: Path, phantom_cases: int, seed: int) -> Source:
    """Find, fetch or simulate the patients.

    Args:
        data: a folder; or `phantom`; or `kaggle`, `brats2020`, `brats2021`, `brats2020-slices`.
        data_dir: where simulated and downloaded patients are kept.
        phantom_cases: how many patients `phantom` simulates.
        seed: what `phantom` draws them from.

    Returns:
        The folder to give to `find_cases`.

    Raises:
        DataError: nothing there, and nothing to be had; the message lists each place tried and the ways out.
            Without a network it comes within 30 seconds.
    """
    data_dir = Path(data_dir)
    from brats_helpers.data.phantom import MARKER, VERSION, is_simulated, make_cases

    if data == "phantom":
        root = data_dir / f"simulated-{seed}-{phantom_cases}-v{VERSION}"
        make_cases(root, n_cases=phantom_cases, seed=seed, workers=None)
        return Source(root, True, f"{phantom_cases} simulated patients from seed {seed}, in {root}")
    short = next(iter(KAGGLE_SETS)) if data == "kaggle" else data
    if short in KAGGLE_SETS:
        if KAGGLE_SETS[short].pattern == "*.h5":
            need_h5py()  # before anything is fetched
        source = _from_kaggle(short, data_dir)
        return _as_volumes(replace(source, simulated=any(source.root.rglob(MARKER))), data_dir)

    root = Path(data).expanduser()
    if root.is_dir():
        return _as_volumes(Source(root, is_simulated(root), f"{root}, as given"), data_dir)
    near = difflib.get_close_matches(data, ["phantom", "kaggle", *KAGGLE_SETS], n=1)
    what = "a file, expected a folder" if root.exists() else "no such folder"
    hint = f"; did you mean {near[0]}?" if near else "."
    raise DataError(f"--data {data}: {what}{hint}\n{_ways_out(KAGGLE_SETS['brats2020'], data_dir)}")


def _as_volumes(source: Source, data_dir: Path) -> Source:
    """Slices put together to volumes; anything else as it is."""
    from brats_helpers.data.phantom import MARKER

    # `data_dir` may lie within, with what was put together before
    places = [path for path in walk(source.root) if not re.search(r"(^|/)volumes-", str(path.relative_to(source.root)))]
    slices = any(NAME.fullmatch(path.name) for path in places)
    if not slices or any(path.name.lower().endswith((".nii", ".nii.gz")) for path in places):
        return source
    volumes, says = assemble(source.root, data_dir)
    if source.simulated:
        (volumes / MARKER).touch()
    return Source(volumes, source.simulated, f"{source.origin}, put together in {volumes}: {says}")


def _ways_out(wanted: KaggleSet, data_dir: Path) -> str:
    return (
        "Three ways out:\n"
        "  1. Patients you have: --data PATH, the folder that holds their folders.\n"
        f"  2. Kaggle, {wanted.url}: make a token at https://www.kaggle.com/settings and set KAGGLE_API_TOKEN to it;\n"
        "     in a Kaggle notebook attach the data set (Add Input); or download it by hand and save it as\n"
        f"     {data_dir / f'{wanted.name}.zip'}.\n"
        "  3. No data at all: --data phantom simulates patients."
    )


def _from_kaggle(short: str, data_dir: Path) -> Source:
    wanted = KAGGLE_SETS[short]
    tried: list[str] = []
    try:
        return _look(short, data_dir, tried)
    except DataError as error:
        lines = [f"No {short} ({wanted.handle} on Kaggle): {error}", "Tried, in this order:"]
        lines += [f"  {place}" for place in tried]
        raise DataError("\n".join([*lines, _ways_out(wanted, data_dir)])) from error


def _look(short: str, data_dir: Path, tried: list[str]) -> Source:
    """Go through the places, noting each in `tried`; raise `DataError` for the last or for one that needs mending."""
    wanted, target, tars = KAGGLE_SETS[short], data_dir / short, None
    for mount in (MOUNT / wanted.name, MOUNT / "datasets" / wanted.handle):
        if _holds(mount, wanted.pattern):
            return Source(mount, False, f"{short}, mounted at {mount}")
        if _holds(mount, "*.tar"):
            tars, what = mount, "tar files"
        else:
            what = f"no {wanted.pattern} in it" if mount.is_dir() else "not there"
        tried.append(f"{mount}: {what}")

    tried.append(f"{target}: not there")
    if target.exists():
        tried[-1] = f"{target}: not whole"
        _check_whole(target)
        return Source(target, False, f"{short}, fetched earlier to {target}")

    by_hand = data_dir / f"{wanted.name}.zip"
    tried.append(f"{by_hand}: {'there' if by_hand.is_file() else 'not there'}")
    with _alone(target):
        if tars:
            return _adopt(tars, target, short)
        if by_hand.is_file():
            _unzip(by_hand, target, short)
            return Source(target, False, f"{short}, unpacked from {by_hand} to {target}")
        for client in _clients():
            try:
                return _download(client, short, data_dir)
            except DataError as error:
                tried.append(f"download with {client}: {error}")
                reason = error
    raise reason


def _holds(folder: Path, pattern: str) -> bool:
    return next(folder.rglob(pattern), None) is not None


def _check_whole(target: Path) -> None:
    """Raise `DataError` unless `target` was made here and every file still has the size it had."""
    listing = target / _LISTING
    if not listing.is_file():
        raise DataError(f"{target} has no {_LISTING}: no download of ours. Move it away, or use it as --data {target}.")
    files = json.loads(listing.read_text())
    changed = [name for name, size in files.items() if _size(target / name) != size]
    if changed:
        raise DataError(
            f"{target}: {len(changed)} of {len(files)} files are gone or have another size, such as {changed[0]}"
            f" ({_size(target / changed[0]):,} bytes, expected {files[changed[0]]:,}). Remove the folder and run again."
        )


def _size(path: Path) -> int:
    """Bytes of a file; 0 for anything else, also for a file that a client removes just now."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep a second process from fetching or unpacking the same data set."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(target.parent / f".{target.name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be written ({error.strerror}). Choose another data_dir.") from error
    try:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            raise DataError(f"another run is fetching {target} just now. Wait for it, then run again.") from None
        yield
    finally:
        os.close(lock)


def _clients() -> list[str]:
    _take_colab_secret()
    if asked := os.environ.get("BRATS_KAGGLE_CLIENT"):
        if asked not in ("kaggle", "kagglehub"):
            raise DataError(f"BRATS_KAGGLE_CLIENT is {asked!r}, expected kaggle or kagglehub. Correct it or unset it.")
        return [asked]
    account = ["kaggle"] * bool(credentials())
    return ["kagglehub", *account] if _in_colab() else account or ["kagglehub"]


def _in_colab() -> bool:
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def _take_colab_secret() -> None:
    """Let the clients find a token that is in Colab's secrets, where its owner lets this notebook read it."""
    if "google.colab" not in sys.modules or "KAGGLE_API_TOKEN" in os.environ:
        return
    with contextlib.suppress(Exception):  # Colab has errors of its own for: no such secret, not allowed
        os.environ["KAGGLE_API_TOKEN"] = importlib.import_module("google.colab.userdata").get("KAGGLE_API_TOKEN")


def credentials() -> str | None:
    """Where the Kaggle packages will find credentials: a variable's name or a file, never what it holds."""
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    home = Path("~/.kaggle").expanduser()
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    config = Path(os.environ.get("KAGGLE_CONFIG_DIR") or home)
    files = [home / name for name in ("access_token", "access_token.txt", "credentials.json")]
    files += [folder / "kaggle.json" for folder in (config, home, xdg)]
    return next((str(file) for file in files if file.is_file()), None)


def _download(client: str, short: str, data_dir: Path) -> Source:
    wanted, target = KAGGLE_SETS[short], data_dir / short
    archive, part = data_dir / f".{short}.zip", data_dir / f".{short}.zip.part"
    folder, cache = data_dir / f".{short}.fetched", data_dir / f".{short}.kagglehub"
    if not archive.exists() and not folder.exists():
        print(f"{short}: fetching {wanted.handle} with {client} into {data_dir}", flush=True)
        place = cache if client == "kagglehub" else part
        needed = wanted.archive_bytes + wanted.unpacked_bytes - _bytes_in(place)
        if not (client == "kagglehub" and _in_colab()):  # which mounts, and needs no room
            _check_space(data_dir, needed, f"{short}, archive and unpacked,")
        found = _fetch(client, short, place)
        if not found.resolve().is_relative_to(place.resolve()):  # Colab and Kaggle mount instead of downloading
            if _holds(found, wanted.pattern):
                return Source(found, False, f"{short}, mounted at {found}")
            return _adopt(found, target, short)
        # In one step: by its marker kagglehub would for ever take for whole what is left of a folder half emptied.
        os.replace(found, folder if client == "kagglehub" else archive)
    try:
        if archive.exists():
            _unzip(archive, target, short)
        elif _holds(folder, "*.tar"):
            _adopt(folder, target, short)
        else:
            with _making(target, short, 0) as (temporary, _):
                temporary.rmdir()
                os.replace(folder, temporary)
    except _Damaged:
        _remove(archive, folder)
        raise
    _remove(archive, part, folder, cache)
    return Source(target, False, f"{short}, fetched from Kaggle to {target}")


def _remove(*places: Path) -> None:
    for place in places:
        if place.is_dir():  # out of sight first: a kill must not leave half of it under its name
            doomed = place.with_name(f"{place.name}.removing")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(place, doomed)
            shutil.rmtree(doomed)
        else:
            place.unlink(missing_ok=True)


def _fetch(client: str, short: str, place: Path) -> Path:
    """Run the client again and again until the data set is there or it no longer gets on.

    Args:
        place: the archive to write (`kaggle`), or the folder for kagglehub's cache.

    Returns:
        The archive, or the folder that kagglehub names.
    """
    wanted, idle = KAGGLE_SETS[short], 0
    for _ in range(_ATTEMPTS):
        before = _bytes_in(place)
        facts = _run_client(client, short, place)
        if facts.get("result"):
            return Path(facts["result"])
        arrived = _bytes_in(place)
        reason = _explain(facts, client, wanted, place, arrived)
        idle = 0 if arrived > before else idle + 1
        if idle >= {"cut": 2, "stalled": 1}.get(facts.get("end"), 0):
            break
        print(f"{short}: the connection broke after {arrived / 1e9:.2f} GB, resuming", flush=True)
        time.sleep(_PAUSE_S * idle)
    raise DataError(reason)


def _bytes_in(place: Path) -> int:
    # os.walk, unlike rglob, does not mind a folder that is removed meanwhile
    return _size(place) + sum(_size(Path(folder, name)) for folder, _, names in os.walk(place) for name in names)


def _run_client(client: str, short: str, place: Path) -> dict:
    """Run the client once in a child process.

    Returns:
        What the child reported, see `_child`, with `end` set to `unreachable` or `stalled` where it had to be ended.
    """
    wanted, facts = KAGGLE_SETS[short], {}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; from brats_helpers.sources import _child; _child(*sys.argv[1:])",
             client, wanted.handle, str(place), str(report)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
        )  # fmt: skip
        try:
            started = moved = time.monotonic()
            arrived = _bytes_in(place)
            with _Progress(short, start=arrived) as progress:
                while True:
                    alive = child.poll() is None
                    if report.exists():
                        facts = json.loads(report.read_text())
                    if not alive:
                        return facts
                    now, bytes_now = time.monotonic(), _bytes_in(place)
                    looking = time.monotonic() - now
                    # fewer count as well: kagglehub unpacks anew over what an earlier run had unpacked
                    if bytes_now != arrived or not facts.get("reached"):
                        arrived, moved = bytes_now, now
                    if not facts.get("reached") and now - started > _REACH_S:
                        return facts | {"end": "unreachable"}
                    if now - moved > _STALL_S:
                        return facts | {"end": "stalled"}
                    if "archive_bytes" in facts and progress.total is None:
                        progress.total = facts["archive_bytes"]
                        missing = progress.total - arrived
                        _check_space(place.parent, missing + max(progress.total, wanted.unpacked_bytes), short)
                        child.stdin.write(b"!")
                        child.stdin.flush()
                    progress.show(arrived)
                    time.sleep(max(0.2, 10 * looking))
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()


def _explain(facts: dict, client: str, wanted: KaggleSet, place: Path, arrived: int) -> str:
    """What happened and what to do, in words; never the client's own, which may quote signed addresses."""
    status, found = facts.get("status"), credentials()
    if status == 401 and found:
        return (f"the credentials in {found} were not accepted (401). Put a new token there, from"
                " https://www.kaggle.com/settings, or remove them: a public data set needs none.")  # fmt: skip
    if status == 401:
        return "Kaggle asks for an account here (401). Set KAGGLE_API_TOKEN to a token from https://www.kaggle.com/settings."
    if status == 403:
        return f"access refused (403). Sign in at {wanted.url}, accept its terms if it asks, then run again."
    if status == 404:
        return f"Kaggle has no {wanted.handle} (404): renamed or withdrawn? See {wanted.url}, or give a copy by --data."
    if status is not None:
        return f"Kaggle answered with an error ({status}). Run again later; what has arrived is kept."
    return {
        "unreachable": f"no answer from {facts.get('host', 'Kaggle')}. Is there a network? Does a firewall allow it?",
        "stalled": f"nothing arrived for {_STALL_S} s after {arrived / 1e9:.2f} GB. Run again: it resumes there.",
        "cut": f"the connection broke after {arrived / 1e9:.2f} GB and again on resuming. Run again: it resumes there.",
        "full": f"the disk of {place.parent} filled up after {arrived / 1e9:.2f} GB. {_MAKE_ROOM}",
        "damaged": "the archive that came is damaged; it was removed. Run again to fetch it anew.",
        "missing": f"the package {client} is not installed. pip install {client}",
    }.get(facts.get("end"), f"the client failed ({facts.get('end', 'without a word')}). Download by hand, see below.")


def _child(client: str, handle: str, place: str, report: str) -> None:
    """In the child process: fetch with one of Kaggle's packages, and report what a parent may know.

    The report grows: `host`, `reached`, `archive_bytes`, then `result` (a path), or `status` (HTTP), or `end` (what
    stopped it: unreachable, cut, full, damaged, missing, or the name of an exception).
    """
    facts = {}

    def tell(**news) -> None:
        facts.update(news)
        write_json(Path(report), facts)

    sys.stdin = io.StringIO()  # the client's `exit` closes it, and `_obey` reads from there
    go = threading.Event()
    threading.Thread(target=_obey, args=(go,), daemon=True).start()
    try:
        import requests
        from kagglesdk.kaggle_env import get_endpoint, get_env
    except ImportError:
        return tell(end="missing")
    endpoint = get_endpoint(get_env())
    tell(host=urlsplit(endpoint).netloc)
    try:
        requests.head(endpoint, timeout=5)
    except requests.RequestException:
        return tell(end="unreachable")
    tell(reached=True)
    try:
        if client == "kaggle":
            tell(result=_with_kaggle(handle, place, lambda size: (tell(archive_bytes=size), go.wait())))
        else:
            tell(result=_with_kagglehub(handle, place))
    except requests.HTTPError as error:
        status = error.response.status_code
        tell(status=status, end="cut" if status >= 500 or status == 429 else "refused")
    except (requests.RequestException, TimeoutError, ConnectionError):
        tell(end="cut")
    except ImportError:
        tell(end="missing")
    except OSError as error:
        tell(end="full" if error.errno in _FULL else type(error).__name__)
    except SystemExit:
        tell(status=401)  # how the kaggle client ends when it can use none of the credentials
    except Exception as error:
        damaged = type(error).__name__ in ("BadZipFile", "DataCorruptionError")
        tell(end="damaged" if damaged else type(error).__name__)


def _obey(go: threading.Event) -> None:
    """Set `go` at the parent's word; end this process when the parent is gone."""
    while os.read(0, 1):
        go.set()
    os._exit(1)


def kaggle_api():
    """Kaggle's own client, authenticated; it exits where it can use none of the credentials."""
    import kagglesdk.kaggle_client as sdk
    from kagglesdk.kaggle_env import KaggleEnv, get_env

    if get_env() is not KaggleEnv.PROD:  # kaggle 2.2 asks for PROD whatever KAGGLE_API_ENVIRONMENT says
        real = sdk.KaggleHttpClient
        sdk.KaggleHttpClient = lambda env, *args, **kwargs: real(get_env(), *args, **kwargs)
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    return api


def _with_kaggle(handle: str, archive: str, agree: Callable[[int], object]) -> str:
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    api = kaggle_api()
    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = handle.split("/")
    with api.build_kaggle_client() as kaggle:
        response = kaggle.datasets.dataset_api_client.download_dataset(request)
        size = response.headers.get("Content-Length")
        if size is not None:
            agree(int(size))
        try:
            api.download_file(response, archive, kaggle.http_client(), quiet=True, resume=True, max_retries=0)
        except ValueError as error:  # how the client says that fewer bytes came than were promised
            raise ConnectionError from error
    return archive


def _with_kagglehub(handle: str, cache: str) -> str:
    os.environ["KAGGLEHUB_CACHE"] = cache
    import kagglehub

    try:
        return kagglehub.dataset_download(handle)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, ValueError) as error:
        for archive in Path(cache).rglob("*.archive"):  # else it would be taken for whole the next time
            archive.unlink()
        raise zipfile.BadZipFile from error


class _Damaged(DataError):
    """The archive itself is at fault; fetching it again may help."""


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _check_space(folder: Path, needed: int, what: str) -> None:
    if _free(folder) < needed:
        raise DataError(
            f"{what} needs {needed / 1e9:.1f} GB; the disk of {folder} has {_free(folder) / 1e9:.1f} free. {_MAKE_ROOM}"
        )


def _adopt(mount: Path, target: Path, short: str) -> Source:
    """Unpack the tars of a folder, perhaps a read-only mount, into `target`."""
    tars = _largest_first(mount.rglob("*.tar"))
    with _making(target, short, sum(map(_size, tars))) as (temporary, progress):
        _untar_files(tars, mount, temporary, progress)
    return Source(target, False, f"{short}, unpacked from {mount} to {target}")


@contextlib.contextmanager
def _making(target: Path, short: str, total: int) -> Iterator[tuple[Path, "_Progress"]]:
    """Fill a hidden folder beside `target`; list its files and rename it once it is whole, else remove it."""
    temporary = target.parent / f".{target.name}.unpacking"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    _check_space(target.parent, total, f"{short}, unpacked,")
    temporary.mkdir()
    try:
        with _Progress(f"{short}: unpacking", total=total) as progress:
            yield temporary, progress
        paths = sorted(path for path in temporary.rglob("*") if path.is_file())
        files = {path.relative_to(temporary).as_posix(): _size(path) for path in paths}
        wanted = KAGGLE_SETS[short]
        if not any(path.match(wanted.pattern) for path in paths):
            raise _Damaged(
                f"what was unpacked holds no {wanted.pattern}, only {', '.join([*files][:3]) or 'nothing'}: not"
                f" {wanted.handle}, or not all of it. Nothing was kept; fetch it again, from {wanted.url}."
            )
        write_json(temporary / _LISTING, files)
        os.replace(temporary, target)
        done(f"{short}: {len(files):,} files, {sum(files.values()) / 1e9:.1f} GB in {target}")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _Damaged(f"the archive is damaged ({error}); nothing was unpacked. Fetch it again.") from error
    except OSError as error:
        if error.errno in _FULL:
            raise DataError(f"the disk of {target.parent} filled up while unpacking. {_MAKE_ROOM}") from error
        raise DataError(f"unpacking into {target.parent} failed ({error}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unzip(archive: Path, target: Path, short: str) -> None:
    """Unpack a zip and the tars inside it; a tar is read as it lies in the zip and takes no room itself."""
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise _Damaged(f"the archive {archive.name} is truncated or no zip ({error}). Fetch it again.") from error
    with opened:
        members = [member for member in opened.infolist() if not member.is_dir()]
        for member in members:
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _Damaged(_hostile(member.filename, "is a link"))
            _inside(target, member.filename)
        with _making(target, short, sum(member.file_size for member in members)) as (temporary, progress):
            tars = [member for member in members if member.filename.endswith(".tar")]
            for member in members:
                if member not in tars:
                    with opened.open(member) as content:
                        _write(content, _inside(temporary, member.filename), member.file_size, progress)
            there = _names(temporary)
            for member in sorted(tars, key=lambda tar: -tar.file_size):
                with opened.open(member) as content:
                    _untar(content, _inside(temporary, member.filename).with_suffix(""), there, progress)
                    while content.read(_BLOCK):
                        pass  # to the end, where zipfile compares the checksum


def _untar_files(tars: list[Path], source: Path, temporary: Path, progress: "_Progress") -> None:
    there = _names(temporary)
    for tar in tars:
        with open(tar, "rb") as content:
            _untar(content, (temporary / tar.relative_to(source)).with_suffix(""), there, progress)


def _untar(content: BinaryIO, folder: Path, there: set[tuple[str, int]], progress: "_Progress") -> None:
    """Unpack a tar into a folder of its own, but for files that are `there`: small tars repeat some of the large."""
    with tarfile.open(fileobj=content, mode="r|") as tar:
        for member in tar:
            path = _inside(folder, member.name)
            if member.isdir():
                continue
            if not member.isfile():
                raise _Damaged(_hostile(member.name, "is a link or device"))
            if (path.name, member.size) not in there:
                there.add((path.name, member.size))
                _write(tar.extractfile(member), path, member.size, progress)


def _largest_first(tars: Iterable[Path]) -> list[Path]:
    return sorted(tars, key=_size, reverse=True)


def _names(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, _size(path)) for path in folder.rglob("*") if path.is_file()}


def _inside(folder: Path, name: str) -> Path:
    """Where a member goes; raise if that is outside of `folder` by the rules of any system."""
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts:
        raise _Damaged(_hostile(name, "would leave the folder"))
    return folder.joinpath(*path.parts)


def _hostile(name: str, what: str) -> str:
    return (
        f"the archive is not to be trusted, {name!r} {what}; nothing was unpacked. Fetch it again, or from elsewhere."
    )


def _write(content: BinaryIO, path: Path, size: int, progress: "_Progress") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb") as out:
        while block := content.read(_BLOCK):
            out.write(block)
            progress.add(len(block))
    if _size(path) != size:
        raise _Damaged(
            f"the archive is damaged: {path.name}, {_size(path):,} bytes, expected {size:,}. Fetch it again."
        )


class _Progress:
    """Bytes done: a bar where a person watches, else a line a minute."""

    def __init__(self, what: str, *, total: int | None = None, start: int = 0):
        self.what, self.total, self.start, self.done = what, total, start, start
        self._began = self._said = time.monotonic()
        self._bar = None
        if sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ:
            from tqdm import tqdm  # not tqdm.auto, which freezes under papermill

            self._bar = tqdm(desc=what, total=total, initial=start, unit="B", unit_scale=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.close()

    def add(self, count: int) -> None:
        self.show(self.done + count)

    def show(self, done: int) -> None:
        if self._bar:
            self._bar.total = self.total
            self._bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if not self._bar and now - self._said > 60:
            self._said = now
            rate = (done - self.start) / (now - self._began)
            rest = f" of {self.total / 1e9:.1f}" if self.total else ""
            left = f", {duration((self.total - done) / rate)} left" if self.total and rate > 0 else ""
            print(f"{self.what}: {done / 1e9:.1f}{rest} GB{left}", flush=True)
