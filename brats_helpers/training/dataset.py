"""Batches out of prepared cases: slices or 3D patches to learn from, whole patients to validate and predict.

`samples` and `patients` choose between the two kinds of network; whatever uses them sees `Samples` and `Batch` alone.
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
        kept: whether `keep_on` has copied them to a device, where batches are then made.
        channels: input channels of the network.
        size: the sides of the largest samples.
        once: how many samples cover every voxel once.
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
        """Copy the samples to a device if that pays and its memory allows."""


def samples(cases: Sequence[Packed], *, context_slices: int, patch_size: int) -> Samples:
    """What a network learns from. See `settings.Settings` for the arguments."""
    if not patch_size:
        return Slices(cases, context_slices=context_slices, window=training_window(cases))
    if context_slices:
        raise ValueError(f"context_slices {context_slices}: patches hold their neighbours already, so it must be 0.")
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
    """Batches that hold every voxel of every brain once, for a network in `eval()`.

    A network of slices gets up to `batch_size` slices of the same size at a time, each cut to its own box of brain;
    one of patches gets a whole patient. What lies outside these boxes is background. `Batch.write` puts answers back.

    Args:
        cases: prepared cases.
        context_slices, patch_size: see `settings.Settings`.
        batch_size: slices at a time at most.
        workers: processes that gather them.
        device: where they are used.
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
    """A loader of the batches that `batches`, a list or a sampler of lists of `Draw`, names.

    They do not depend on `workers`, the processes that gather them; samples that a GPU keeps need none.
    """
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=0 if data.kept else workers,
        collate_fn=_whole,
        pin_memory=device.type == "cuda" and not data.kept,  # so that the copy runs beside the work on the GPU
    )


def _whole(batch: Batch) -> Batch:
    """The data set gathers whole batches already."""
    return batch
