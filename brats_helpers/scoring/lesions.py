"""Lesions: connected components of a region."""

import statistics

import numpy as np
from scipy import ndimage

from brats_helpers.scoring.overlap import dice

_DILATIONS = 3
_SMALLEST_LESION = 51  # voxels


def lesions(pred: np.ndarray, truth: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Split by lesion: (prediction, reference) of each reference lesion that counts; how many lesions are false."""
    near = ndimage.binary_dilation(truth, ndimage.generate_binary_structure(3, 2), iterations=_DILATIONS)
    zones, count = ndimage.label(near, np.ones((3, 3, 3)))
    parts, found = ndimage.label(pred, np.ones((3, 3, 3)))
    touching = np.zeros((count + 1, found + 1), bool)
    touching[zones[pred], parts[pred]] = True
    touching[0] = False
    sizes = np.bincount(zones[truth], minlength=count + 1)
    counting = np.flatnonzero(sizes[1:] >= _SMALLEST_LESION) + 1
    counted = [(touching[zone].take(parts), truth & (zones == zone)) for zone in counting]
    return counted, found - int(touching.any(axis=0).sum())


def lesion_dice(lesions: list[tuple[np.ndarray, np.ndarray]], false: int) -> float:
    """Mean Dice of what `lesions` gives; no lesion at all: 1."""
    scores = [dice(p, t) for p, t in lesions] + [0.0] * false
    return statistics.fmean(scores) if scores else 1.0
