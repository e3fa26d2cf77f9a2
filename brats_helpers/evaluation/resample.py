"""Resample a volume from one voxel size to another, along each axis by linear weights."""

from collections.abc import Sequence

import numpy as np
import torch

TOLERANCE = 0.05
"""Relative difference of voxel sizes up to which a network is used as it is."""


def differs(spacing_mm: Sequence[float], network_mm: Sequence[float]) -> bool:
    """Whether voxels differ so much from those a network was trained on that they are resampled."""
    return any(abs(own - known) > TOLERANCE * known for own, known in zip(spacing_mm, network_mm, strict=True))


def resample_images(images: np.ndarray, spacing_mm: Sequence[float], new_mm: Sequence[float]) -> np.ndarray:
    """Resample normalised images. Background does not leak into the brain: it has no part in the means.

    Args:
        images: float16 (slices, channels, height, width), axes Z, channel, Y, X; background 0.
        spacing_mm: voxel size along X, Y, Z.
        new_mm: voxel size to resample to.

    Returns:
        float16 of the same axes. A voxel is background if more than half of what it covers is.
    """
    steps = [new / old for new, old in zip(new_mm[::-1], spacing_mm[::-1], strict=True)]
    sides = (images.shape[0], *images.shape[2:])
    shape = [max(1, int(np.ceil(side / step - 1e-3))) for side, step in zip(sides, steps, strict=True)]
    out = np.zeros((shape[0], images.shape[1], *shape[1:]), np.float16)
    for channel in range(images.shape[1]):  # one at a time, which needs a fraction of the memory
        values = torch.from_numpy(np.ascontiguousarray(images[:, channel])).float()
        brain = resample((values != 0).float(), shape, steps)
        values = resample(values, shape, steps) / brain.clamp_min(0.5)
        out[:, channel] = (values * (brain >= 0.5)).half().numpy()
    return out


def resample_back(
    soft: np.ndarray, shape: Sequence[int], spacing_mm: Sequence[float], network_mm: Sequence[float]
) -> np.ndarray:
    """Bring probabilities on a network's grid back to a patient's grid, each class by itself.

    Args:
        soft: float32 (slices, classes, height, width).
        shape: (slices, height, width) of the patient's box.
        spacing_mm: the patient's voxel size along X, Y, Z.
        network_mm: the network's voxel size.

    Returns:
        float32 (*shape, with the classes on the second axis); where the probabilities summed to 1, they still do.
    """
    steps = [own / known for own, known in zip(spacing_mm[::-1], network_mm[::-1], strict=True)]
    out = np.empty((shape[0], soft.shape[1], *shape[1:]), np.float32)
    for index in range(soft.shape[1]):
        out[:, index] = resample(torch.from_numpy(np.ascontiguousarray(soft[:, index])), shape, steps).numpy()
    return out


def resample(volume: torch.Tensor, shape: Sequence[int], steps: Sequence[float]) -> torch.Tensor:
    """Resample a volume whose first corner stays in its place.

    Args:
        volume: float32, three axes.
        shape: new number of voxels along each axis.
        steps: size of a new voxel along each axis, in old voxels. Above 1, the weights widen as much, so that
            every old voxel counts.
    """
    for axis, (new, step) in enumerate(zip(shape, steps, strict=True)):
        weights = _weights(volume.shape[axis], new, step)
        volume = torch.movedim(torch.tensordot(weights, volume, dims=([1], [axis])), 0, axis)
    return volume


def _weights(old: int, new: int, step: float) -> torch.Tensor:
    """Weights (new, old) of old voxels in new ones: a triangle about the new voxel's centre; each row sums to 1."""
    centres = ((torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5).clamp(0, old - 1)
    distance = (centres[:, None] - torch.arange(old, dtype=torch.float64)).abs()
    weights = (1 - distance / max(step, 1.0)).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()
