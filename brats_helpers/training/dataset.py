"""Batches from prepared cases: slices or 3D patches for training, whole patients for validation and prediction.

`samples` and `patients` choose between 2D and 3D; their callers see only `Samples` and `Batch`.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from brats_helpers.data.cache import Packed
from brats_helpers.training.batch import Batch, Draw
from brats_helpers.training.patches import Patches, Volumes
from brats_helpers.training.slices import Slices, training_window


class Samples(Protocol):
    """Slices or patches of some cases.

    Attributes:
        cases: prepared cases.
        index: int64 (samples, 2): the position of each sample's case, and its slice in the case's box.
        sizes: int64 (samples, axes): the sides that each sample needs.
        has_tumour: bool (samples,).
        kept: whether `keep_on` has copied them to a device, which then assembles the batches.
        channels: input channels of the network.
        size: the sides of the largest samples.
        once: number of samples that cover every voxel once.
    """

    cases: list[Packed]
    index: np.ndarray
    sizes: np.ndarray
    has_tumour: np.ndarray
    kept: bool
    channels: int
    size: tuple[int, ...]
    once: int

    def __len__(self) -> int: ...

    def __getitems__(self, draws: Sequence[Draw]) -> Batch: ...

    def keep_on(self, device: torch.device) -> None:
        """Copy the samples to a device if this saves time and its memory allows it."""


def samples(cases: Sequence[Packed], *, context_slices: int, patch_size: int) -> Samples:
    """Return the samples for training. See `settings.Settings` for the arguments."""
    if not patch_size:
        return Slices(cases, context_slices=context_slices, window=training_window(cases))
    if context_slices:
        raise ValueError(f"context_slices {context_slices}: patches include their neighbours, so it must be 0.")
    return Patches(cases, patch_size)


def patients(
    cases: Sequence[Packed],
    *,
    context_slices: int,
    patch_size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
) -> DataLoader:
    """Batches that cover every voxel of every brain once, for a network in `eval()`.

    A 2D network gets up to `batch_size` slices of one size, each cropped to its brain; a 3D network gets a whole
    patient. Everything outside is background. `Batch.write` writes the outputs back.

    Args:
        cases: prepared cases.
        context_slices, patch_size: see `settings.Settings`.
        batch_size: most slices in a batch.
        workers: processes that load batches.
        device: of the network.
        rank, processes: this process gets every batch whose number is `rank` modulo `processes`.
    """
    data = Volumes(cases) if patch_size else Slices(cases, context_slices=context_slices, window=None)
    data.keep_on(device)
    order = np.lexsort(data.sizes.T[::-1]).tolist()
    batches = []
    at_once = 1 if patch_size else batch_size
    for size, items in groupby(order, key=lambda item: tuple(data.sizes[item].tolist())):
        draws = [Draw(item, size) for item in items]
        batches += [draws[first : first + at_once] for first in range(0, len(draws), at_once)]
    return make_loader(data, batches[rank::processes], workers=workers, device=device)


def make_loader(data: Dataset, batches, *, workers: int, device: torch.device) -> DataLoader:
    """Return a loader for `batches`, a list or a sampler of lists of `Draw`.

    The batches do not depend on `workers`, the processes that load them. Samples kept on a GPU need no workers.
    """
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=0 if data.kept else workers,
        collate_fn=_whole,
        pin_memory=device.type == "cuda" and not data.kept,  # so that the copy runs beside the work on the GPU
    )


def _whole(batch: Batch) -> Batch:
    """Do nothing: the data set returns whole batches."""
    return batch
