"""Bounding boxes of masks."""

import numpy as np


def bounding_box(*masks: np.ndarray) -> tuple[slice, ...]:
    """Return the smallest box that holds every non-zero voxel of all `masks`, bool or numbers, shape (X, Y, Z).

    The box is empty if there is no such voxel.
    """
    boxes = []
    for mask in masks:
        mask = mask if mask.dtype.kind in "bu" else mask != 0  # the maximum below would miss negative numbers
        box = [slice(None)] * 3
        for axis in np.argsort(mask.strides)[::-1]:  # slowest axis first, then only the remaining box
            used = np.flatnonzero(mask[tuple(box)].max(axis=tuple({0, 1, 2} - {axis}), initial=0))
            if not used.size:
                break
            box[axis] = slice(int(used[0]), int(used[-1]) + 1)
        else:
            boxes.append(box)
    if not boxes:
        return (slice(0, 0),) * 3
    return tuple(map(_span, *boxes))


def _span(*sides: slice) -> slice:
    """The smallest slice that holds all `sides`."""
    return slice(min(side.start for side in sides), max(side.stop for side in sides))
