"""A hash of a scan's voxels, by which the same scan is known under any name.

The hash depends on the values and on where they lie in the volume. It does not depend on the file's name, packing,
voxel type, slope or affine.
"""

import hashlib

import numpy as np

from brats_helpers.boxes import bounding_box


def content_hash(volume: np.ndarray, box: tuple[slice, ...] | None = None) -> str:
    """Hash a volume.

    Args:
        volume: intensities or labels, shape (X, Y, Z), any real dtype, LPS order, slope and intercept applied.
        box: holds every non-zero voxel; found here if not given.

    Returns:
        16 hex digits.
    """
    box = bounding_box(volume) if box is None else box
    inside = _canonical(np.ascontiguousarray(volume[box].T))
    place = [side.indices(size)[:2] for side, size in zip(box, volume.shape, strict=True)]
    return hash_of(f"{volume.shape} {place} {inside.dtype}", inside)


def image_hash(volume: np.ndarray) -> str | None:
    """Hash an image as `content_hash` does; None if all its voxels are equal: such an image identifies nobody."""
    return None if volume.min() == volume.max() else content_hash(volume)


def hash_of(*parts: str | np.ndarray) -> str:
    """Hash texts and C-contiguous arrays to 16 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def _canonical(voxels: np.ndarray) -> np.ndarray:
    """The values in the first of int16, int64 and float32 that holds them, whatever type they are stored in."""
    if not voxels.size:
        return voxels.astype("<i2")
    low, high = float(voxels.min()), float(voxels.max())
    for dtype in ("<i2", "<i8"):
        limits = np.iinfo(dtype)
        if limits.min <= low and high < limits.max:  # false for NaN
            whole = voxels.astype(dtype, copy=False)
            if voxels.dtype.kind != "f" or np.array_equal(whole, voxels):
                return whole
    return voxels.astype("<f4")
