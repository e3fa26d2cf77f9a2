"""Batches for a network: slices, patches or a whole patient."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

OUTSIDE = 255
"""Marks padding in the masks of `dataset.patients`. These voxels belong to no class and are ignored."""


class Draw(NamedTuple):
    """One sample, as drawn by a sampler.

    Attributes:
        item: its position among the samples.
        size: the sides that all samples of its batch are padded to.
        seed: determines everything random about the sample, whatever else its batch holds; None: nothing is random.
    """

    item: int
    size: tuple[int, ...]
    seed: int | None = None


class Batch(NamedTuple):
    """Some samples, ready for the network.

    Attributes:
        images: float32 (batch, channels, [depth,] height, width); z-scores, background 0.
        masks: uint8 (batch, [depth,] height, width), class indices; `OUTSIDE` in padding.
        index: int64 (batch, 2), on the CPU: the position of each sample's case, and its first slice in the case's box.
        places: int64 (batch, 3, 3), on the CPU. For each axis z, y and x: the first voxel in the sample, the first
            voxel in the case's box, and how many voxels the two share.
        seeds: of each sample, see `Draw`.
    """

    images: torch.Tensor
    masks: torch.Tensor
    index: torch.Tensor
    places: torch.Tensor
    seeds: tuple[int | None, ...]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with images and masks on `device`."""
        images, masks = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.masks))
        return self._replace(images=images, masks=masks)

    def write(self, values: torch.Tensor, box: np.ndarray) -> None:
        """Write the outputs of a network to their places in the box of their case.

        Args:
            values: (batch, classes, [depth,] height, width), for each voxel of `images`.
            box: (slices, classes, height, width); voxels outside the samples keep their values.
        """
        if values.ndim == 4:
            values = values[:, :, None]
        for value, place in zip(values.cpu().numpy(), self.places.tolist(), strict=True):
            depth, rows, columns = (slice(start, start + length) for start, _, length in place)
            z, y, x = (slice(start, start + length) for _, start, length in place)
            box[z, :, y, x] = value[:, depth, rows, columns].swapaxes(0, 1)


def ranges(span: Sequence[int]) -> tuple[slice, slice]:
    """Return the slices of the sample and of the box for a span (start in the sample, start in the box, length)."""
    to, origin, length = span
    return slice(to, to + length), slice(origin, origin + length)


def middle_slices(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the middle slice of each patch for a figure; return slices unchanged."""
    if images.ndim == 4:
        return images, masks
    middle = images.shape[2] // 2
    return images[:, :, middle], masks[:, middle]
