"""Normalise patients, crop them to the brain and pack them for memory mapping, once for all epochs.

A prepared case is a folder of three files, written to a hidden folder beside it and renamed when
complete, so that an interruption or a second run never leaves half a case behind:

    images.npy   float16 (slices, modalities, height, width): one slice with all its modalities,
                 and its neighbours, is one contiguous read
    labels.npy   uint8 (slices, height, width), class indices; absent without a segmentation
    case.json    where the box lies in the volume, voxels per slice and class, each slice's own box

Its name holds a hash of the content that it is made from: other files are never taken for it, and
the same files, moved or copied, are not packed again. A small file beside it says which files are
known to have this content, so that they need not be read.
"""

import errno
import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from glob import escape
from pathlib import Path

import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cases import Case
from brats_helpers.data.content import content_hash, hash_of
from brats_helpers.data.nifti import difference, read_seg, same_affine, two_places
from brats_helpers.data.stamps import stamp
from brats_helpers.files import part_folder, read_json, sweep, write_json
from brats_helpers.labels import CLASSES, DataError
from brats_helpers.log import progress, warn

_FORMAT = 4  # raise it when the files' meaning changes: older files are then made again


@dataclass(frozen=True)
class Packed:
    """One patient, normalised and cropped to the brain.

    Attributes:
        id: the case's ID.
        images: float16 (slices, modalities, height, width), axes Z, modality, Y, X; z-scores, background 0.
        labels: uint8 (slices, height, width), class indices, or None without a segmentation.
        origin: where the box begins in the volume, (z, y, x).
        shape: the whole volume, (X, Y, Z).
        counts: int64 (slices, 4), voxels of each class per slice; background counts brain voxels only.
        boxes: int64 (slices, 4), first and end row, first and end column of each slice's brain; 0 where it has none.
    """

    id: str
    images: np.ndarray
    labels: np.ndarray | None
    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    counts: np.ndarray
    boxes: np.ndarray | None = None

    def __post_init__(self):
        if self.boxes is None:
            object.__setattr__(self, "boxes", slice_boxes(self.brain))

    @property
    def brain(self) -> np.ndarray:
        """Where any modality is not background, bool (slices, height, width)."""
        return (self.images != 0).any(axis=1)

    def __reduce__(self):
        """Pickle the folder rather than the arrays, for processes that load batches."""
        if isinstance(self.images, np.memmap):
            return load, (Path(self.images.filename).parent,)
        return Packed, tuple(vars(self).values())

    def to_volume(self, box: np.ndarray) -> np.ndarray:
        """Put an array over the box, (slices, height, width), back into the whole volume, (X, Y, Z); the rest is 0."""
        volume = np.zeros(self.shape[::-1], box.dtype)
        z, y, x = self.origin
        depth, height, width = box.shape
        volume[z : z + depth, y : y + height, x : x + width] = box
        return volume.transpose(2, 1, 0)

    def to_box(self, volume: np.ndarray) -> np.ndarray:
        """Cut the box, (slices, height, width), out of an array over the whole volume, (X, Y, Z)."""
        z, y, x = self.origin
        depth, _, height, width = self.images.shape
        return volume.transpose(2, 1, 0)[z : z + depth, y : y + height, x : x + width]


def normalise(volume: np.ndarray) -> np.ndarray:
    """Z-score over the brain (the voxels that are not 0); background stays 0.

    Args:
        volume: intensities, any shape and real dtype.

    Returns:
        float32 of the same shape.
    """
    if volume.dtype.kind == "f":  # by a power of two, so that no square overflows or vanishes and no digit changes
        volume = np.ldexp(volume, -np.frexp(np.abs(volume).max(initial=0))[1])
    scores = volume.astype(np.float32, order="C")
    brain = scores != 0
    n = max(np.count_nonzero(brain), 1)
    scores -= float(scores.sum(dtype=np.float64) / n)  # the background adds nothing to a sum
    scores *= brain
    scores *= 1 / max(float(np.sqrt(np.square(scores).sum() / n)), 1e-6)
    return scores


@dataclass(frozen=True)
class _Source:
    """A case as read: volumes by modality, (X, Y, Z), LPS order; class indices or None; and a hash of both."""

    volumes: dict[str, np.ndarray]
    mask: np.ndarray | None
    content: str


def pack(case: Case) -> Packed:
    """Read a case, crop it to the box that holds every brain and every labelled voxel, and normalise it.

    NaN counts as background where every other modality is background. So does a modality that the case lacks.

    Raises:
        DataError: a file cannot be read, shapes or affines differ between files, a voxel is not finite, or every
            voxel is background.
    """
    return _pack(case, _read(case))


def _read(case: Case) -> _Source:
    """Read the files of a case and check that they fit together."""
    volumes, grids = {}, {}
    for name in case.images:
        volumes[name], grids[name] = case.read(name)
    mask = None
    if case.seg:
        mask, grids["seg"] = read_seg(case.seg, case.numbering)
    if len({grid.shape for grid in grids.values()}) > 1:
        shapes = ", ".join(f"{case.files[name].name} {grid.shape}" for name, grid in grids.items())
        raise DataError(
            f"{case.id}: the files in {case.folder} differ in shape ({shapes}); expected one shape for all."
        )
    first, grid = next(iter(grids.items()))
    for name, other in grids.items():
        if not same_affine(grid, other):
            why = two_places(case.files[name]) or two_places(case.files[first])
            raise DataError(
                f"{case.id}: {case.files[name]} does not lie where {first} does:"
                f" {difference(other.affine, grid.affine, grid.shape)} {why}Resample it onto {case.files[first].name}."
            )
    hashes = [content_hash(volume) for volume in [*volumes.values(), *([] if mask is None else [mask])]]
    content = hash_of(*hashes, str(grid.affine.round(3).tolist()))
    return _Source({name: _finite(case, name, volumes) for name in volumes}, mask, content)


def _finite(case: Case, name: str, volumes: Mapping[str, np.ndarray]) -> np.ndarray:
    """A volume whose NaN became background, or `DataError` if a voxel of the brain is not finite."""
    volume = volumes[name]
    if np.isfinite(volume.sum(dtype=np.float64)):
        return volume
    if np.isinf(volume).any() or nan_in_brain(name, volumes):
        raise DataError(
            f"{case.id}: {case.files[name]} holds voxels that are not finite (NaN or infinity); expected"
            " intensities. Fetch the file again, or set them to 0, the background."
        )
    return np.nan_to_num(volume)


def nan_in_brain(name: str, volumes: Mapping[str, np.ndarray]) -> int:
    """Count the NaN of one modality where another one has brain; all of them if there is no other to compare with."""
    nan = np.isnan(volumes[name])
    others = [volume for other, volume in volumes.items() if other != name and volume.shape == nan.shape]
    if not others:
        return int(np.count_nonzero(nan))
    return sum(int(np.count_nonzero(np.nan_to_num(other[nan]))) for other in others)


def _pack(case: Case, source: _Source) -> Packed:
    """Crop, normalise and pack what was read."""
    import torch  # takes a second, and opening prepared cases does not need it

    shape = next(iter(source.volumes.values())).shape
    box = bounding_box(*source.volumes.values(), *([] if source.mask is None else [source.mask]))
    # On disk X runs fastest, so (Z, Y, X) is the order in which slices are contiguous.
    depth, height, width = (side.stop - side.start for side in box[::-1])
    if not depth:
        raise DataError(f"{case.id}: every voxel of every file in {case.folder} is 0; expected a brain.")
    images = torch.zeros(depth, len(case.modalities), height, width, dtype=torch.float16)
    brain = np.zeros((depth, height, width), bool)
    for channel, name in enumerate(case.modalities):
        if name in source.volumes:
            crop = source.volumes[name][box].T
            images[:, channel] = torch.from_numpy(normalise(crop))  # numpy rounds to float16 20 times slower
            brain |= crop != 0
    labels = None if source.mask is None else np.ascontiguousarray(source.mask[box].T)
    counts = count_classes(np.zeros_like(brain) if labels is None else labels, brain)
    origin = tuple(side.start for side in box[::-1])
    return Packed(case.id, images.numpy(), labels, origin, shape, counts, slice_boxes(brain))


def count_classes(labels: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Count the voxels of each class in each slice.

    Args:
        labels: class indices, (slices, height, width).
        brain: of the same shape; background is counted only where it is true.

    Returns:
        int64 (slices, 4).
    """
    masks = [brain & (labels == 0), *(labels == index for index in range(1, len(CLASSES)))]
    # numpy counts a plane of bytes at memory speed, and is far slower along the axes of a volume.
    return np.array([list(map(np.count_nonzero, mask)) for mask in masks], np.int64).T


def slice_boxes(brain: np.ndarray) -> np.ndarray:
    """Find the bounding box of each slice.

    Args:
        brain: bool (slices, height, width).

    Returns:
        int64 (slices, 4): first row, end row, first column, end column; all 0 where a slice holds nothing.
    """
    sides = []
    for axis in (2, 1):
        used = brain.any(axis=axis)
        first, last = used.argmax(axis=1), used.shape[1] - used[:, ::-1].argmax(axis=1)
        sides += [first, np.where(used.any(axis=1), last, 0)]
    return np.stack(sides, axis=1)


def prepare(cases: Sequence[Case], *, cache_dir: Path, workers: int) -> list[Packed]:
    """Pack every case into `cache_dir` unless it is there and up to date, and open all of them.

    An interrupted call can be repeated, and two runs may share the folder. Cases are independent of each other, so time
    and memory grow linearly with their number.

    Args:
        cases: patients with the same modalities.
        cache_dir: created if missing; several data sets may share it.
        workers: number of threads, each preparing one case (numpy and zlib run in parallel).

    Returns:
        The cases in the order given, their arrays memory-mapped.

    Raises:
        DataError: as `pack`.
    """
    cache_dir = Path(cache_dir)
    sweep(cache_dir)
    _allow_open_files(2 * len(cases))
    with ThreadPoolExecutor(workers) as pool:
        prepared = pool.map(partial(_prepared, cache_dir=cache_dir), cases)
        return list(progress(prepared, what="preparing", total=len(cases)))


def load(folder: Path) -> Packed:
    """Open a prepared case; its arrays are memory-mapped, read-only, if the file system supports that."""
    facts = read_json(folder / "case.json")
    return Packed(
        facts["id"],
        _array(folder / "images.npy"),
        _array(folder / "labels.npy") if facts["labelled"] else None,
        tuple(facts["origin"]),
        tuple(facts["shape"]),
        np.array(facts["counts"], np.int64),
        np.array(facts["boxes"], np.int64),
    )


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        _say_no_maps(path.parent.parent)
        return np.load(path)


@cache
def _say_no_maps(cache_dir: Path) -> None:
    """Warn once per process that prepared cases are read into memory."""
    warn(f"{cache_dir} lies on a file system without memory maps: prepared patients are read into memory as a whole.")


def _allow_open_files(more: int) -> None:
    """Let this process hold `more` files open: each memory map keeps one, and many systems begin at 1,024 or 256."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 4 * more + 512)  # a notebook may hold several parts of the patients at once
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepared(case: Case, cache_dir: Path) -> Packed:
    """Open the case from `cache_dir`, packing it first if its content is not there."""
    here = str(case.folder.resolve())
    state = _fingerprint([case.seg and case.numbering, *map(stamp, case.files.values())])
    kind = [_FORMAT, case.modalities, list(case.images), case.channels, case.seg is not None]
    family = f"{case.id}.{_fingerprint(kind)}"
    own = cache_dir / f"{family}.{_fingerprint([here])}.json"
    pointers = {path: _pointer(path) for path in cache_dir.glob(f"{escape(family)}.*.json")}
    before = pointers.pop(own, {})
    for known in (before, *pointers.values()):
        if known.get("state") == state and (packed := _open(cache_dir / known["place"])):
            break
    else:
        source = _read(case)
        known = {"state": state, "place": f"{family}.{source.content}"}
        packed = _open(cache_dir / known["place"]) or _make(case, source, cache_dir / known["place"])
    if known != before:
        write_json(own, known)
        if before and before["place"] not in {known["place"], *(other.get("place") for other in pointers.values())}:
            _discard(cache_dir / before["place"])
    return packed


def _make(case: Case, source: _Source, place: Path) -> Packed:
    with part_folder(place.parent) as part:
        _save(_pack(case, source), part)
        try:
            os.rename(part, place)
        except OSError:  # it exists: complete, because another run was faster, or damaged
            if not _open(place):  # two runs may repair it at once, file by file, with equal files
                for file in part.iterdir():
                    os.replace(file, place / file.name)
    return load(place)


def _pointer(path: Path) -> dict[str, str]:
    """The prepared case made from a folder's files, and the state of the files then; empty if damaged."""
    try:
        known = read_json(path)
        return {"state": known["state"], "place": known["place"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _fingerprint(facts: list) -> str:
    return hashlib.sha256(str(facts).encode()).hexdigest()[:12]


def _open(place: Path) -> Packed | None:
    """The prepared case; None if it does not exist or a crash damaged it."""
    try:
        return load(place)
    except (FileNotFoundError, EOFError, ValueError, KeyError):
        return None


def _save(packed: Packed, folder: Path) -> None:
    np.save(folder / "images.npy", packed.images)
    if packed.labels is not None:
        np.save(folder / "labels.npy", packed.labels)
    facts = {
        "id": packed.id,
        "labelled": packed.labels is not None,
        "origin": packed.origin,
        "shape": packed.shape,
        "counts": packed.counts.tolist(),
        "boxes": packed.boxes.tolist(),
    }
    write_json(folder / "case.json", facts)


def _discard(place: Path) -> None:
    """Remove a prepared case if it exists, renaming it first so that an interruption leaves no partial case."""
    with part_folder(place.parent) as bin, suppress(FileNotFoundError):
        os.rename(place, bin / "case")
