"""From disk to memory map: normalise, crop to the brain, pack. Once per patient, for every later epoch.

A prepared case is a folder of three files, made in a hidden folder beside it and renamed when
whole, so that a kill or a second run never leaves half a case behind. Its name is a fingerprint of
what it is made from, so that a case made from other files is never taken for it:

    images.npy   float16 (slices, modalities, height, width): one slice with all its modalities,
                 and its neighbours, is one contiguous read
    labels.npy   uint8 (slices, height, width), class indices; absent without a segmentation
    case.json    where the box lies in the volume, voxels per slice and class, each slice's own box
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path

import numpy as np

from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import read_image, read_seg, same_affine
from brats_helpers.files import part_folder, sweep
from brats_helpers.labels import CLASSES, DataError

_FORMAT = 3  # raise it when the files' meaning changes: older ones are then made anew


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
        """Send a process that loads batches the files' place rather than their content."""
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
    scores = volume.astype(np.float32, order="C")
    brain = scores != 0
    n = max(np.count_nonzero(brain), 1)
    scores -= float(scores.sum(dtype=np.float64) / n)  # the background adds nothing to a sum
    scores *= brain
    scores *= 1 / max(float(np.sqrt(np.square(scores).sum() / n)), 1e-6)
    return scores


def pack(case: Case) -> Packed:
    """Read a case, crop it to the box that holds every brain and every labelled voxel, and normalise it.

    Raises:
        DataError: a file cannot be read, shapes or affines differ between files, a voxel is not finite, or nothing but
            background is in them.
    """
    import torch  # takes a second, which whoever only opens prepared cases need not wait for

    volumes, grids = {}, {}
    for name, path in case.images.items():
        volumes[name], grids[name] = read_image(path)
    mask = None
    if case.seg:
        mask, grids["seg"] = read_seg(case.seg)
    shapes = {name: grid.shape for name, grid in grids.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(
            f"{case.id}: the files in {case.folder} differ in shape ({shapes}); expected one shape for all."
        )
    first, shape = next(iter(shapes.items()))
    for name, grid in grids.items():
        if not same_affine(grid, grids[first]):
            raise DataError(
                f"{case.id}: {case.files[name]} has affine {grid.affine[:3].round(3).tolist()}, {first}"
                f" {grids[first].affine[:3].round(3).tolist()}; expected one grid for all. Resample it onto {first}."
            )

    # On disk X runs fastest, so (Z, Y, X) is the order in which slices are contiguous.
    stack = [volume.T for volume in volumes.values()]
    box = _bounds(stack if mask is None else [*stack, mask.T])
    if box is None:
        raise DataError(f"{case.id}: every voxel of every file in {case.folder} is 0; expected a brain.")
    depth, height, width = (side.stop - side.start for side in box)
    images = torch.empty(depth, len(stack), height, width, dtype=torch.float16)
    brain = np.zeros((depth, height, width), bool)
    for channel, (name, volume) in enumerate(zip(volumes, stack, strict=True)):
        crop = volume[box]
        scores = normalise(crop)
        if not np.isfinite(scores[0, 0, 0]):  # one voxel that is none makes all of them so
            raise DataError(
                f"{case.id}: {case.files[name]} holds voxels that are not finite (NaN or infinity); expected"
                " intensities. Fetch the file again, or set them to 0, the background."
            )
        images[:, channel] = torch.from_numpy(scores)  # numpy rounds to float16 20 times slower
        brain |= crop != 0
    labels = None if mask is None else np.ascontiguousarray(mask.T[box])
    counts = count_classes(np.zeros_like(brain) if labels is None else labels, brain)
    return Packed(case.id, images.numpy(), labels, tuple(side.start for side in box), shape, counts, slice_boxes(brain))


def count_classes(labels: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Count the voxels of each class in each slice.

    Args:
        labels: class indices, (slices, height, width).
        brain: of the same shape; background is counted only where it is true.

    Returns:
        int64 (slices, 4).
    """
    masks = [brain & (labels == 0), *(labels == index for index in range(1, len(CLASSES)))]
    # On a plane of bytes numpy counts at the memory's speed, along axes of a volume far slower.
    return np.array([[np.count_nonzero(plane) for plane in mask] for mask in masks], np.int64).T


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


def _bounds(volumes: list[np.ndarray]) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds every voxel that is not 0 in any of the volumes."""
    lows, highs = [], []
    for volume in volumes:
        filled = volume != 0
        plane = filled.any(axis=0)
        sides = (filled.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))
        if plane.any():
            where = [np.flatnonzero(side) for side in sides]
            lows.append([side[0] for side in where])
            highs.append([side[-1] + 1 for side in where])
    if not lows:
        return None
    return tuple(slice(int(low), int(high)) for low, high in zip(np.min(lows, 0), np.max(highs, 0), strict=True))


def prepare(cases: Sequence[Case], *, cache_dir: Path, workers: int) -> list[Packed]:
    """Pack every case into `cache_dir`, those that are there and still fit excepted, and open them.

    Can be killed and started again at any moment, and run twice at once. Takes time and memory in proportion to the
    cases: each is looked at alone.

    Args:
        cases: patients with the same modalities.
        cache_dir: made where it does not exist; several data sets may share it.
        workers: cases worked on at once, each by a thread (numpy and zlib let them run side by side).

    Returns:
        The cases in the order given, their arrays memory-mapped.

    Raises:
        DataError: as `pack`.
    """
    cache_dir = Path(cache_dir)
    sweep(cache_dir)
    _allow_open_files(2 * len(cases))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(partial(_prepared, cache_dir=cache_dir), cases))


def load(folder: Path) -> Packed:
    """Open a prepared case; its arrays are memory-mapped, read-only."""
    facts = json.loads((folder / "case.json").read_text())
    return Packed(
        facts["id"],
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(folder / "labels.npy", mmap_mode="r") if facts["labelled"] else None,
        tuple(facts["origin"]),
        tuple(facts["shape"]),
        np.array(facts["counts"], np.int64),
        np.array(facts["boxes"], np.int64),
    )


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
    """Open the case in `cache_dir`; pack it before if it is not there."""
    family, place = _place(case, cache_dir)
    packed = _open(place)
    if packed is not None:
        return packed
    with part_folder(cache_dir) as part:
        _save(pack(case), part)
        for old in cache_dir.glob(family):
            if old != place or _open(old) is None:
                _discard(old)
        with suppress(OSError):  # another run was faster
            os.rename(part, place)
    return load(place)


def _place(case: Case, cache_dir: Path) -> tuple[str, Path]:
    """The case's folder, and a pattern of its siblings made from an earlier state of the same files.

    The state of a file is its size and its times of change; the second, ctime, tells when two files that were
    unpacked in the same second have swapped names.
    """
    source = _fingerprint([case.folder.resolve(), list(case.images), case.seg is not None])
    state: list = [_FORMAT]
    for path in [*case.images.values(), *([case.seg] if case.seg else [])]:
        stat = path.stat()
        state.append([path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return f"{escape(case.id)}.{source}.*", cache_dir / f"{case.id}.{source}.{_fingerprint(state)}"


def _fingerprint(facts: list) -> str:
    return hashlib.sha256(str(facts).encode()).hexdigest()[:12]


def _open(place: Path) -> Packed | None:
    """The prepared case; None where it is not there, or torn by a crash of the machine."""
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
    (folder / "case.json").write_text(json.dumps(facts))


def _discard(place: Path) -> None:
    """Remove a prepared case; a kill halfway leaves nothing of it under its name."""
    with part_folder(place.parent) as bin, suppress(FileNotFoundError):
        os.rename(place, bin / "case")
