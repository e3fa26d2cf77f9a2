"""Batches of slices out of prepared cases."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from brats_helpers.cache import Packed

SIDE_MULTIPLE = 32
"""The U-Net halves a slice five times, so its sides must be multiples of 32."""


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
        places = [(k, z) for k, case in enumerate(cases) for z in np.flatnonzero(case.counts.sum(axis=1))]
        self.index = np.array(places, np.int64).reshape(-1, 2)
        self.has_tumour = np.array([self.cases[k].counts[z, 1:].any() for k, z in places], bool)

    @property
    def channels(self) -> int:
        """Channels of a slice: modalities times slices."""
        return self.cases[0].images.shape[1] * (2 * self.context_slices + 1)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int]) -> Batch:
        """Gather a whole batch at once: one copy per slice, cropped boxes centred in the common size."""
        height, width = self.size
        reach = self.context_slices
        modalities = self.cases[0].images.shape[1]
        images = np.zeros((len(items), 2 * reach + 1, modalities, height, width), np.float32)
        masks = np.zeros((len(items), height, width), np.uint8)
        for row, item in enumerate(items):
            k, z = self.index[item]
            case = self.cases[k]
            depth, _, h, w = case.images.shape
            y, x = (height - h) // 2, (width - w) // 2
            low, high = max(z - reach, 0), min(z + reach + 1, depth)
            images[row, low - z + reach : high - z + reach, :, y : y + h, x : x + w] = case.images[low:high]
            if case.labels is not None:
                masks[row, y : y + h, x : x + w] = case.labels[z]
        channels = images.reshape(len(items), -1, height, width)
        return Batch(torch.from_numpy(channels), torch.from_numpy(masks), torch.from_numpy(self.index[items]))


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
        self.n = n or len(slices)
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

    `pin_memory` lets the copy to a GPU run beside the work on it.
    """
    return DataLoader(
        slices,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=sampler is not None,
        num_workers=workers,
        collate_fn=_whole,
        pin_memory=pin_memory,
    )


def _whole(batch: Batch) -> Batch:
    """The data set gathers whole batches already."""
    return batch
