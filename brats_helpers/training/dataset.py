"""Batches of slices out of prepared cases."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from brats_helpers.data.cache import Packed
from brats_helpers.training.model import SIDE_MULTIPLE


class Batch(NamedTuple):
    """Some slices, ready for the network.

    Attributes:
        images: float32 (batch, channels, height, width); z-scores, background 0.
        masks: uint8 (batch, height, width), class indices.
        index: int64 (batch, 2), for each slice the position of its case and its place in the case's box.
    """

    images: torch.Tensor
    masks: torch.Tensor
    index: torch.Tensor


class Slices(Dataset):
    """The axial slices of some cases that hold brain.

    Args:
        cases: prepared cases.
        context_slices: neighbours on each side that are fed as further channels (0: plain 2D).
            Channels are ordered by slice from below, then by modality; outside the box they are 0.
        size: (height, width) of the slices; None takes the smallest multiples of 32 that hold every case.
    """

    def __init__(self, cases: Sequence[Packed], *, context_slices: int, size: tuple[int, int] | None = None):
        self.cases = list(cases)
        self.context_slices = context_slices
        self.size = size or common_size(cases)
        filled = [np.flatnonzero(case.counts.any(axis=1)) for case in cases]
        owners = np.repeat(np.arange(len(cases)), [len(z) for z in filled])
        self.index = np.stack([owners, np.concatenate(filled)], axis=1)
        tumour = [case.counts[z, 1:].any(axis=1) for case, z in zip(cases, filled, strict=True)]
        self.has_tumour = np.concatenate(tumour)
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def channels(self) -> int:
        """Channels of a slice: modalities times slices."""
        return self.cases[0].images.shape[1] * (2 * self.context_slices + 1)

    @property
    def kept(self) -> bool:
        """Whether `keep_on` has copied the slices to a device, where batches are then made."""
        return self._kept is not None

    def keep_on(self, device: torch.device) -> None:
        """Copy every slice to a GPU if that takes no more than a quarter of its free memory.

        A CPU needs no copy: the system keeps memory-mapped files in memory where they fit.
        """
        reach = self.context_slices
        starts = np.cumsum([reach, *(len(case.images) + reach for case in self.cases)])  # slices of 0 between cases
        shape = (int(starts[-1]), self.cases[0].images.shape[1], *self.size)
        if math.prod(shape) * 2 + math.prod(shape) // shape[1] > _free_bytes(device) / 4:
            return
        images = torch.zeros(shape, dtype=torch.float16, device=device)
        masks = torch.zeros(shape[0], *self.size, dtype=torch.uint8, device=device)
        for case, start in zip(self.cases, starts, strict=False):
            depth, rows, columns = slice(start, start + len(case.images)), *self._middle(case)
            images[depth, :, rows, columns] = torch.tensor(case.images, device=device)
            if case.labels is not None:
                masks[depth, rows, columns] = torch.tensor(case.labels, device=device)
        places = torch.tensor(starts[self.index[:, 0]] + self.index[:, 1], device=device)
        self._kept = images, masks, places

    @property
    def once(self) -> int:
        """Slices that hold every voxel of the brain once."""
        return len(self)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Gather a whole batch at once: one copy per slice, cropped boxes centred in the common size."""
        reach = self.context_slices
        index = torch.from_numpy(self.index[items])
        if self._kept:
            images, masks, places = self._kept
            at = places[torch.as_tensor(items, device=places.device)]
            around = at[:, None] + torch.arange(-reach, reach + 1, device=at.device)
            return Batch(images[around].flatten(1, 2).float(), masks[at], index.to(at.device))
        images = np.zeros((len(items), 2 * reach + 1, self.cases[0].images.shape[1], *self.size), np.float16)
        masks = np.zeros((len(items), *self.size), np.uint8)
        for row, (k, z) in enumerate(index.tolist()):
            case = self.cases[k]
            rows, columns = self._middle(case)
            low, high = max(z - reach, 0), min(z + reach + 1, len(case.images))
            images[row, low - z + reach : high - z + reach, :, rows, columns] = case.images[low:high]
            if case.labels is not None:
                masks[row, rows, columns] = case.labels[z]
        # torch converts several times faster than numpy; numpy's memory lies in large pages, which spares page faults.
        channels = torch.from_numpy(np.empty((len(items), self.channels, *self.size), np.float32))
        channels.copy_(torch.from_numpy(images).flatten(1, 2))
        return Batch(channels, torch.from_numpy(masks), index)

    def _middle(self, case: Packed) -> tuple[slice, slice]:
        """The rows and columns of the common size that the case's box takes."""
        h, w = case.images.shape[2:]
        y, x = (self.size[0] - h) // 2, (self.size[1] - w) // 2
        return slice(y, y + h), slice(x, x + w)


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free for tensors
    return torch.cuda.mem_get_info(device)[0] + kept_by_torch


def common_size(cases: Sequence[Packed]) -> tuple[int, int]:
    """The smallest (height, width) in multiples of 32 that cuts no brain of any case."""
    largest = np.max([case.images.shape[2:] for case in cases], axis=0)
    return tuple(int(-(-side // SIDE_MULTIPLE) * SIDE_MULTIPLE) for side in largest)


class BalancedSampler(Sampler):
    """Each epoch a new draw of slices, a given share of them with tumour; the same for the same seed and epoch.

    Args:
        slices: what to draw from.
        n: slices an epoch; 0 takes as many as there are.
        foreground: share of slices with tumour, 0 to 1; a negative number keeps the data's own share.
        seed: of every draw.
    """

    def __init__(self, slices: Slices, *, n: int, foreground: float, seed: int):
        self.n = n or slices.once
        self.seed = seed
        self.epoch = 0
        tumour = np.flatnonzero(slices.has_tumour)
        rest = np.flatnonzero(~slices.has_tumour)
        share = foreground if foreground >= 0 else len(tumour) / max(len(slices), 1)
        n_tumour = self.n if not len(rest) else 0 if not len(tumour) else round(self.n * share)
        self.pools = [(tumour, n_tumour), (rest, self.n - n_tumour)]

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        picked = [_draw(pool, n, random) for pool, n in self.pools]
        order = random.permutation(np.concatenate(picked))
        return iter(order.tolist())


def _draw(pool: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """`n` of the pool, none a second time before all were taken once."""
    rounds = [random.permutation(pool) for _ in range(-(-n // max(len(pool), 1)))]
    return np.concatenate(rounds)[:n] if rounds else pool[:0]


def make_loader(
    slices: Slices, *, batch_size: int, workers: int, sampler: Sampler | None = None, pin_memory: bool = False
) -> DataLoader:
    """Batches by `sampler`, the last one dropped if it is short; without one, every slice once, in order.

    The batches do not depend on `workers`, the processes that gather them; slices that a GPU keeps need none.
    `pin_memory` lets the copy to a GPU run beside the work on it.
    """
    return DataLoader(
        slices,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=0 if slices.kept else workers,
        collate_fn=_whole,
        pin_memory=pin_memory and not slices.kept,
    )


def _whole(batch: Batch) -> Batch:
    """The data set gathers whole batches already."""
    return batch
