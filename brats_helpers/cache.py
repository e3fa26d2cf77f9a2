"""From disk to memory map: normalise, crop to the brain, pack. Once per patient, for every later epoch.

A prepared case is a folder of three files, made in a hidden folder beside it and renamed when
whole, so that a kill or a second run never leaves half a case behind:

    images.npy   float16 (slices, modalities, height, width): one slice with all its modalities,
                 and its neighbours, is one contiguous read
    labels.npy   uint8 (slices, height, width), class indices; absent without a segmentation
    case.json    where the box lies in the volume, voxels per slice and class, what it was made from
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from brats_helpers.cases import CLASSES, Case, DataError, read_image, read_mask
from brats_helpers.files import part_folder, sweep

_FORMAT = 1  # raise it when the files' meaning changes: older ones are then made anew


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
    """

    id: str
    images: np.ndarray
    labels: np.ndarray | None
    origin: tuple[int, int, int]
    shape: tuple[int, int, int]
    counts: np.ndarray

    @property
    def brain(self) -> np.ndarray:
        """Where any modality is not background, bool (slices, height, width)."""
        return (self.images != 0).any(axis=1)

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
    brain = volume != 0
    values = volume[brain].astype(np.float32)
    if not values.size:
        return np.zeros(volume.shape, np.float32)
    mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
    scores = (volume.astype(np.float32) - np.float32(mean)) * np.float32(1 / max(std, 1e-6))
    scores *= brain
    return scores


def pack(case: Case) -> Packed:
    """Read a case, crop it to the box that holds every brain and every labelled voxel, and normalise it.

    Raises:
        DataError: a file cannot be read, shapes differ between files, or nothing but background is in them.
    """
    volumes = {name: read_image(path)[0] for name, path in case.images.items()}
    shapes = {name: volume.shape for name, volume in volumes.items()}
    mask = None
    if case.seg:
        mask = read_mask(case.seg)
        shapes["seg"] = mask.shape
    if len(set(shapes.values())) > 1:
        raise DataError(
            f"{case.id}: the files in {case.folder} differ in shape ({shapes}); expected one shape for all."
        )
    shape = next(iter(shapes.values()))

    # On disk X runs fastest, so (Z, Y, X) is the order in which slices are contiguous.
    stack = [volume.T for volume in volumes.values()]
    box = _bounds(stack if mask is None else [*stack, mask.T])
    if box is None:
        raise DataError(f"{case.id}: every voxel of every file in {case.folder} is 0; expected a brain.")
    images = np.empty(
        (len(range(*box[0].indices(shape[2]))), len(stack), *(b.stop - b.start for b in box[1:])), np.float16
    )
    brain = np.zeros((images.shape[0], *images.shape[2:]), bool)
    for channel, volume in enumerate(stack):
        crop = volume[box]
        images[:, channel] = normalise(crop)
        brain |= crop != 0
    labels = None
    counts = np.zeros((len(images), len(CLASSES)), np.int64)
    if mask is not None:
        labels = np.ascontiguousarray(mask.T[box])
        for index in range(1, len(CLASSES)):
            counts[:, index] = np.count_nonzero(labels == index, axis=(1, 2))
        brain &= labels == 0
    counts[:, 0] = np.count_nonzero(brain, axis=(1, 2))
    return Packed(case.id, images, labels, tuple(side.start for side in box), shape, counts)


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

    Can be killed and started again at any moment, and run twice at once.

    Args:
        cases: patients with the same modalities.
        cache_dir: made where it does not exist; several data sets may share it.
        workers: processes; 1 works in this one.

    Returns:
        The cases in the order given, their arrays memory-mapped.
    """
    cache_dir = Path(cache_dir)
    sweep(cache_dir)
    _allow_open_files(2 * len(cases))
    todo = [case for case in cases if _stamp(case) != _read_stamp(_place(case, cache_dir))]
    work = partial(_store, cache_dir=cache_dir)
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn")) as pool:
            list(pool.map(work, todo))
    else:
        list(map(work, todo))
    return [load(_place(case, cache_dir)) for case in cases]


def load(folder: Path) -> Packed:
    """Open a prepared case; its arrays are memory-mapped, read-only."""
    facts = json.loads((folder / "case.json").read_text())
    labels = folder / "labels.npy"
    return Packed(
        facts["id"],
        np.load(folder / "images.npy", mmap_mode="r"),
        np.load(labels, mmap_mode="r") if labels.exists() else None,
        tuple(facts["origin"]),
        tuple(facts["shape"]),
        np.array(facts["counts"], np.int64),
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


def _place(case: Case, cache_dir: Path) -> Path:
    """A folder for the case that no case of another data set or other modalities shares."""
    source = hashlib.sha256(f"{case.folder.resolve()} {list(case.images)}".encode()).hexdigest()[:8]
    return Path(cache_dir) / f"{case.id}.{source}"


def _stamp(case: Case) -> list:
    """What the case is made from: format, and name, size and time of change of each file."""
    files = [*case.images.values(), *([case.seg] if case.seg else [])]
    return [_FORMAT, *([path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files)]


def _read_stamp(folder: Path) -> list | None:
    try:
        return json.loads((folder / "case.json").read_text())["made_from"]
    except FileNotFoundError:
        return None


def _store(case: Case, cache_dir: Path) -> None:
    place = _place(case, cache_dir)
    stamp = _stamp(case)
    packed = pack(case)
    with part_folder(cache_dir) as part:
        np.save(part / "images.npy", packed.images)
        if packed.labels is not None:
            np.save(part / "labels.npy", packed.labels)
        facts = {"id": case.id, "origin": packed.origin, "shape": packed.shape, "made_from": stamp}
        facts["counts"] = packed.counts.tolist()
        (part / "case.json").write_text(json.dumps(facts))
        try:
            if place.exists():  # made from other files, or by another run a moment ago
                os.rename(place, part / "outdated")
            os.rename(part, place)
        except OSError:
            if _read_stamp(place) != stamp:  # not merely a second run that was faster
                raise
    shutil.rmtree(place / "outdated", ignore_errors=True)
