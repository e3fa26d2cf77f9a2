"""Masks to score."""

import numpy as np
from scipy import ndimage

MM = (1.0, 1.0, 1.0)


def mask(shape, *boxes):
    """True in `boxes`, each given as (first corner, size)."""
    out = np.zeros(shape, bool)
    for corner, size in boxes:
        out[tuple(slice(at, at + side) for at, side in zip(corner, size, strict=True))] = True
    return out


def blob(shape, seed, smooth, share):
    """A random smooth mask that covers `share` of the volume."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    return noise > np.quantile(noise, 1 - share)


def tumour(shape, seed):
    """A random map of all four classes, uint8."""
    whole, core, enhancing = (blob(shape, seed + i, 1.5, share) for i, share in enumerate((0.3, 0.2, 0.1)))
    return (2 * whole - (whole & core) + 2 * (whole & core & enhancing)).astype(np.uint8)


PAIRS = {
    "random": (blob((17, 13, 11), 1, 0, 0.4), blob((17, 13, 11), 2, 0, 0.4), MM),
    "smooth": (blob((30, 26, 22), 3, 3, 0.2), blob((30, 26, 22), 4, 3, 0.2), MM),
    "anisotropic": (blob((20, 20, 9), 5, 1, 0.1), blob((20, 20, 9), 6, 1, 0.2), (0.9, 1.1, 5.0)),
    "touching": (mask((12, 9, 9), ((1, 1, 1), (4, 5, 6))), mask((12, 9, 9), ((5, 1, 1), (4, 5, 6))), MM),
    "inside": (mask((20, 20, 20), ((1, 1, 1), (17, 17, 17))), mask((20, 20, 20), ((8, 8, 8), (3, 3, 3))), MM),
    "one voxel": (mask((9, 9, 9), ((4, 4, 4), (1, 1, 1))), mask((9, 9, 9), ((0, 8, 3), (1, 1, 1))), MM),
    "far apart": (mask((60, 50, 9), ((0, 0, 0), (3, 3, 3))), mask((60, 50, 9), ((55, 44, 3), (5, 5, 5))), (1, 2, 1)),
    "whole volume": (np.ones((5, 6, 7), bool), mask((5, 6, 7), ((0, 2, 3), (2, 2, 4))), MM),
    "equal": (blob((15, 15, 15), 7, 2, 0.2), blob((15, 15, 15), 7, 2, 0.2), MM),
}
"""By name: prediction, reference and voxel size in mm."""
