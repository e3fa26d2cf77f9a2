"""Axial slices of prepared cases, each cropped to its brain."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from brats_helpers.data.cache import Packed
from brats_helpers.training.batch import OUTSIDE, Batch, Draw, ranges
from brats_helpers.training.model import SIDE_MULTIPLE

SMALLEST = 64
"""Smallest side of a slice in training: of one slice of 32 x 32, BatchNorm would see a single value per channel."""
HELD_WHOLE = 0.9
"""Share of the patients whose brain the training window holds without cropping."""


class Slices(Dataset):
    """The axial slices with brain of some cases, each cropped to the bounding box of its brain.

    A slice has the smallest sides in multiples of 32 that hold its brain, but at most those of the window. The seed of
    a draw chooses the visible part of a larger brain, so that in time every voxel is seen.

    Args:
        cases: prepared cases.
        context_slices: neighbouring slices on each side that become further channels (0: plain 2D).
            Channels are ordered by slice from below, then by modality; outside the box they are 0.
        window: largest (height, width); None: no brain is cropped.
    """

    def __init__(self, cases: Sequence[Packed], *, context_slices: int, window: tuple[int, int] | None):
        self.cases = list(cases)
        self.context_slices = context_slices
        filled = [np.flatnonzero(case.boxes[:, 1]) for case in cases]
        owners = np.repeat(np.arange(len(cases)), [len(z) for z in filled])
        self.index = np.stack([owners, np.concatenate(filled)], axis=1)
        self.boxes = np.concatenate([case.boxes[z] for case, z in zip(cases, filled, strict=True)])
        self.sizes = rounded_up(self.boxes[:, 1::2] - self.boxes[:, ::2])
        if window:
            self.sizes = np.clip(self.sizes, np.minimum(SMALLEST, window), window)
        tumour = [case.counts[z, 1:].any(axis=1) for case, z in zip(cases, filled, strict=True)]
        self.has_tumour = np.concatenate(tumour)
        self.padding = 0 if window else OUTSIDE
        self._kept: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def channels(self) -> int:
        """Channels of a slice: modalities times slices."""
        return self.cases[0].images.shape[1] * (2 * self.context_slices + 1)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.sizes.max(axis=0).tolist()
        return height, width

    @property
    def once(self) -> int:
        return len(self)

    @property
    def kept(self) -> bool:
        return self._kept is not None

    def __len__(self) -> int:
        return len(self.index)

    def keep_on(self, device: torch.device) -> None:
        """Copy every slice to a GPU if that takes no more than a quarter of its free memory.

        A CPU needs no copy: the system keeps memory-mapped files in memory where they fit.
        """
        reach = self.context_slices
        starts = np.cumsum([reach, *(len(case.images) + reach for case in self.cases)])  # slices of 0 between cases
        sides = np.max([case.images.shape[2:] for case in self.cases], axis=0)
        shape = (int(starts[-1]), self.cases[0].images.shape[1], *map(int, sides))
        if math.prod(shape) * 2 + math.prod(shape) // shape[1] > _free_bytes(device) / 4:
            return
        images = torch.zeros(shape, dtype=torch.float16, device=device)
        masks = torch.zeros(shape[0], *shape[2:], dtype=torch.uint8, device=device)
        for case, start in zip(self.cases, starts, strict=False):
            depth, _, height, width = case.images.shape
            box = slice(start, start + depth), slice(height), slice(width)
            images[box[0], :, box[1], box[2]] = torch.tensor(case.images, device=device)
            if case.labels is not None:
                masks[box] = torch.tensor(case.labels, device=device)
        self._kept = images, masks, torch.tensor(starts)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        """Assemble a whole batch at once, with one copy per slice."""
        index = torch.from_numpy(self.index[[draw.item for draw in draws]])
        spans = np.array([self._spans(draw) for draw in draws])
        depth = np.stack([np.zeros(len(draws), np.int64), index[:, 1].numpy(), np.ones(len(draws), np.int64)], axis=1)
        places = torch.from_numpy(np.stack([depth, *spans[:, :, :3].swapaxes(0, 1)], axis=1))
        gather = self._from_device if self._kept else self._from_files
        return Batch(*gather(draws, index, spans), index, places, tuple(draw.seed for draw in draws))

    def _spans(self, draw: Draw) -> list[tuple[int, int, int, int, int, int]]:
        """For rows and columns: the brain's place in the sample and in the case's box, and its length (see `places`).

        Then the same for the copied region: the brain and its surroundings, within the sample's own size.
        """
        random = None if draw.seed is None else np.random.default_rng(draw.seed)
        case = self.cases[self.index[draw.item, 0]]
        spans = []
        for axis in (0, 1):
            start, end = self.boxes[draw.item, 2 * axis : 2 * axis + 2].tolist()
            side = int(self.sizes[draw.item, axis])
            length = min(end - start, side)
            if end - start > side:
                start += int(random.integers(end - start - side + 1))
            low = start - (side - length) // 2  # where the sample begins in the box
            offset = (draw.size[axis] - side) // 2 - low  # from a row of the box to the same row of the batch
            first, last = max(low, 0), min(low + side, case.images.shape[2 + axis])
            spans.append((start + offset, start, length, first + offset, first, last - first))
        return spans

    def _from_files(self, draws, index, spans) -> tuple[torch.Tensor, torch.Tensor]:
        reach, size = self.context_slices, draws[0].size
        images = np.zeros((len(draws), 2 * reach + 1, self.cases[0].images.shape[1], *size), np.float16)
        masks = np.full((len(draws), *size), self.padding, np.uint8)
        for row, ((k, z), (rows, columns)) in enumerate(zip(index.tolist(), spans.tolist(), strict=True)):
            case = self.cases[k]
            (to_rows, from_rows), (to_columns, from_columns) = ranges(rows[3:]), ranges(columns[3:])
            low, high = max(z - reach, 0), min(z + reach + 1, len(case.images))
            around = slice(low - z + reach, high - z + reach)
            images[row, around, :, to_rows, to_columns] = case.images[low:high, :, from_rows, from_columns]
            if self.padding == OUTSIDE:  # only the brain's own box counts
                (to_rows, from_rows), (to_columns, from_columns) = ranges(rows[:3]), ranges(columns[:3])
            labels = 0 if case.labels is None else case.labels[z, from_rows, from_columns]
            masks[row, to_rows, to_columns] = labels
        # torch converts several times faster than numpy; numpy's memory lies in large pages, which spares page faults.
        channels = torch.from_numpy(np.empty((len(draws), self.channels, *size), np.float32))
        channels.copy_(torch.from_numpy(images).flatten(1, 2))
        return channels, torch.from_numpy(masks)

    def _from_device(self, draws, index, spans) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks, starts = self._kept
        reach, size = self.context_slices, draws[0].size
        numbers = torch.cat([(starts[index[:, 0]] + index[:, 1])[:, None], torch.from_numpy(spans).flatten(1)], dim=1)
        numbers = numbers.to(images.device, non_blocking=True)
        at, spans = numbers[:, 0], numbers[:, 1:].unflatten(1, (2, 6))
        (rows, in_rows, own_rows), (columns, in_columns, own_columns) = (
            _lookup(spans[:, axis], size[axis], images.shape[2 + axis]) for axis in (0, 1)
        )
        around = at[:, None] + torch.arange(-reach, reach + 1, device=at.device)
        found = images[around[:, :, None, None], :, rows[:, None, :, None], columns[:, None, None, :]]
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None, :, :, None]
        channels = (found * inside).movedim(-1, 2).flatten(1, 2).float()
        if self.padding == OUTSIDE:
            in_rows, in_columns = own_rows, own_columns
        labels = masks[at[:, None, None], rows[:, :, None], columns[:, None, :]]
        labels = labels.where(in_rows[:, :, None] & in_columns[:, None, :], self.padding)
        return channels, labels


def _lookup(spans: torch.Tensor, side: int, limit: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row of the samples: its row in the box, whether it is copied, and whether it is the brain's own."""
    place = torch.arange(side, device=spans.device)
    own, copied = ((place >= spans[:, k, None]) & (place < spans[:, k, None] + spans[:, k + 2, None]) for k in (0, 3))
    rows = place - spans[:, 3, None] + spans[:, 4, None]
    return rows.clamp(0, limit - 1), copied, own


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    kept_by_torch = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free for tensors
    return torch.cuda.mem_get_info(device)[0] + kept_by_torch


def rounded_up(sides: np.ndarray) -> np.ndarray:
    """Sides in pixels, each rounded up to the multiples of 32 that a U-Net can halve five times."""
    return -(-np.asarray(sides) // SIDE_MULTIPLE) * SIDE_MULTIPLE


def training_window(cases: Sequence[Packed]) -> tuple[int, int]:
    """The smallest (height, width) in multiples of 32 that hold the brains of `HELD_WHOLE` of the cases.

    Without this limit, one large head would enlarge every batch with its slices, and the copy on the GPU.
    """
    largest = np.array([(case.boxes[:, 1::2] - case.boxes[:, ::2]).max(axis=0) for case in cases])
    height, width = np.quantile(rounded_up(largest.clip(SMALLEST)), HELD_WHOLE, axis=0, method="inverted_cdf")
    return int(height), int(width)
