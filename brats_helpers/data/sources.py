"""Where the patients come from: a folder, the simulator, or one of three Kaggle data sets.

`find_data` is the one resolver. For a Kaggle data set it looks, in this order, at

1. the mounts of a Kaggle notebook, `/kaggle/input/<name>` and `/kaggle/input/datasets/<owner>/<name>`,
2. an earlier download by the suite, `data_dir/<short name>` with its `listing.json`,
3. an archive downloaded by hand, `data_dir/<name>.zip`,
4. Kaggle itself, through one of Kaggle's own packages (see `kaggle`).

HDF5 slices, from `brats2020-slices` or in a folder, are reassembled into volumes in `data_dir` by `hdf5.assemble`.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from brats_helpers.data import kaggle
from brats_helpers.data.archives import Damaged, check_space, faults_named, unpack
from brats_helpers.data.hdf5 import NAME, assemble, need_h5py
from brats_helpers.data.kaggle import KaggleSet
from brats_helpers.data.walk import walk
from brats_helpers.files import part_folder, sweep, write_json
from brats_helpers.labels import DataError
from brats_helpers.log import done, warn


@dataclass(frozen=True)
class Source:
    """A folder of patients, whether they are simulated, and one line on where they come from."""

    root: Path
    simulated: bool
    origin: str


KAGGLE_SETS = {
    # 494 patients of four int16 images and 369 8-bit masks, 240 x 240 x 155: 39 GB; the zip is estimated by 2021's
    "brats2020": KaggleSet("awsaf49/brats20-dataset-training-validation", "*.nii*", 44_000_000_000),
    # a tar of 13.4 GB, full of .nii.gz, which zipping barely shrinks
    "brats2021": KaggleSet("dschettler8845/brats-2021-task1", "*.nii*", 26_800_000_000),
    # an estimate: 57,195 slices of 128 kB, and as much for the zip
    "brats2020-slices": KaggleSet("awsaf49/brats2020-training-data", "*.h5", 15_000_000_000),
}
"""Kaggle data sets by short name; `kaggle` means the first."""
MOUNT = Path("/kaggle/input")
"""Where Kaggle, and kagglehub in Colab, mount data sets; read-only."""
_LISTING = "listing.json"  # {path: bytes} of a complete download; written last, checked at each use


def find_data(data: str, *, data_dir: Path, phantom_cases: int, seed: int) -> Source:
    """Find, download or simulate the patients.

    Args:
        data: a folder; or `phantom`; or `kaggle`, `brats2020`, `brats2021`, `brats2020-slices`.
        data_dir: where simulated and downloaded patients are kept.
        phantom_cases: how many patients `phantom` simulates.
        seed: the seed of `phantom`.

    Returns:
        The folder to give to `find_cases`.

    Raises:
        DataError: no patients found; the message lists each place tried and three ways out. Without a network it is
            raised within 30 seconds.
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
            need_h5py()  # before anything is downloaded
        source = _from_kaggle(short, data_dir)
        return _as_volumes(replace(source, simulated=any(source.root.rglob(MARKER))), data_dir)

    root = Path(data).expanduser()
    if root.is_dir():
        marker = root / MARKER
        said = (
            marker.read_text("utf-8").strip().removeprefix("These patients are ").rstrip(".")
            if marker.is_file()
            else ""
        )
        origin = f"{said}, in {root}" if said else f"{root}, as given"
        return _as_volumes(Source(root, is_simulated(root), origin), data_dir)
    near = difflib.get_close_matches(data, ["phantom", "kaggle", *KAGGLE_SETS], n=1)
    what = "a file, expected a folder" if root.exists() else "no such folder"
    hint = f"; did you mean {near[0]}?" if near else "."
    raise DataError(f"--data {data}: {what}{hint}\n{_ways_out(KAGGLE_SETS['brats2020'], data_dir)}")


def _as_volumes(source: Source, data_dir: Path) -> Source:
    """Reassemble slices into volumes; return any other source unchanged."""
    from brats_helpers.data.phantom import MARKER

    # `data_dir` may lie within the source and hold volumes assembled earlier.
    paths = [path for path in walk(source.root) if not re.search(r"(^|/)volumes-", str(path.relative_to(source.root)))]
    slices = any(NAME.fullmatch(path.name) for path in paths)
    if not slices or any(path.name.lower().endswith((".nii", ".nii.gz")) for path in paths):
        return source
    volumes, says = assemble(source.root, data_dir)
    if source.simulated:
        (volumes / MARKER).touch()
    return Source(volumes, source.simulated, f"{source.origin}, reassembled in {volumes}: {says}")


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
    """Search the places in order, noting each in `tried`.

    Raises:
        DataError: why the last place failed, or what an earlier place needs first.
    """
    wanted, target, tars = KAGGLE_SETS[short], data_dir / short, None
    for mount in (MOUNT / wanted.name, MOUNT / "datasets" / wanted.handle):
        if _holds(mount, wanted.pattern):
            return Source(mount, False, f"{short}, mounted at {mount}")
        if _holds(mount, "*.tar"):
            tars, what = mount, "tar files"
        else:
            what = f"no {wanted.pattern} in it" if mount.is_dir() else "not there"
        tried.append(f"{mount}: {what}")

    tried.append(f"{target}: {'incomplete' if target.exists() else 'not there'}")
    if target.exists():
        _check_complete(target)
        return Source(target, False, f"{short}, downloaded earlier to {target}")

    by_hand = data_dir / f"{wanted.name}.zip"
    tried.append(f"{by_hand}: {'there' if by_hand.is_file() else 'not there'}")
    with _alone(target):
        if tars or by_hand.is_file():
            return _unpack(tars or by_hand, target, short)
        kaggle.reach()
        for client in kaggle.clients():
            try:
                return _download(client, short, data_dir)
            except DataError as error:
                tried.append(f"download with {client}: {error}")
                reason = error
    raise reason


def _holds(folder: Path, pattern: str) -> bool:
    return next(folder.rglob(pattern), None) is not None


def _check_complete(target: Path) -> None:
    """Raise `DataError` unless `target` was made here and every file still has the size it had."""
    listing = target / _LISTING
    if not listing.is_file():
        raise DataError(
            f"{target} has no {_LISTING}, so the suite did not download it. Move it, or use it as --data {target}."
        )
    try:
        files = dict(json.loads(listing.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{listing} is damaged ({error}). Remove {target} and run again.") from error
    for name, expected in files.items():
        size = (target / name).stat().st_size if (target / name).is_file() else 0
        if size != expected:
            raise DataError(
                f"{target / name} has {size:,} bytes, expected {expected:,}. Remove {target} and run again."
            )


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep a second process from downloading or unpacking the same data set."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(target.parent / f".{target.name}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be written ({error.strerror}). Choose another data_dir.") from error
    with open(descriptor, encoding="utf-8") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows
        except BlockingIOError:
            raise DataError(f"another run is fetching {target} just now. Wait for it, then run again.") from None
        except OSError as error:  # ENOSYS, ENOLCK: some network file systems
            warn(f"no file locks in {target.parent} ({error.strerror}): let no second run fetch {target.name}")
        yield


def _download(client: str, short: str, data_dir: Path) -> Source:
    wanted, target, place = KAGGLE_SETS[short], data_dir / short, data_dir / f".{short}.download"
    print(f"{short}: downloading {wanted.handle} with {client} into {data_dir}", flush=True)
    if not (client == "kagglehub" and kaggle.in_colab()):  # which mounts the data and needs no space
        check_space(data_dir, wanted.disk_bytes - kaggle.bytes_in(place), f"{short}, archive and unpacked,")
    try:
        found = kaggle.download(client, wanted, place)
        if not found.resolve().is_relative_to(place.resolve()) and _holds(found, wanted.pattern):
            return Source(found, False, f"{short}, mounted at {found}")
        if found.is_file() or _holds(found, "*.tar"):
            _unpack(found, target, short)
        else:
            _accept(found, target, short)
    except Damaged:
        _discard(place)
        raise
    _discard(place)
    return Source(target, False, f"{short}, downloaded from Kaggle to {target}")


def _unpack(packed: Path, target: Path, short: str) -> Source:
    """Unpack a zip, or the tars of a folder, into a hidden folder that becomes `target` once it is complete."""
    sweep(target.parent)
    with part_folder(target.parent) as part:
        unpack(packed, part, short)
        _accept(part, target, short)
    return Source(target, False, f"{short}, unpacked from {packed} to {target}")


def _accept(folder: Path, target: Path, short: str) -> None:
    """List the files of a complete folder, then move it to `target`."""
    wanted = KAGGLE_SETS[short]
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _LISTING)
    if not any(path.match(wanted.pattern) for path in paths):
        names = [path.relative_to(folder).as_posix() for path in paths[:3]]
        raise Damaged(
            f"what was unpacked holds no {wanted.pattern}, only {', '.join(names) or 'nothing'}: not {wanted.handle},"
            f" or not all of it. Nothing was kept; fetch it again, from {wanted.url}."
        )
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    with faults_named(folder, target.parent):
        write_json(folder / _LISTING, files)
        os.replace(folder, target)
    done(f"{short}: {len(files):,} files, {sum(files.values()) / 1e9:.1f} GB in {target}")


def _discard(place: Path) -> None:
    """Remove a folder, renaming it first: kagglehub would take a half-removed one for complete."""
    if place.exists():
        with part_folder(place.parent) as part:
            os.replace(place, part / place.name)
