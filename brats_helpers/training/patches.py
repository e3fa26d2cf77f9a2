"""What a network sees: slices or patches to learn from, whole patients to be validated and predicted.

A network of slices and one of patches differ in `patch_size` alone (0: slices). Here is where that is looked at; but
for what it costs (precision, and how many at once), which the training and its preflight ask as well.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.training.dataset import Batch, Slices, make_loader
from brats_helpers.training.model import build_model, sees_patches

SLICES = {"cuda": 16, "cpu": 4}
"""Slices a step, if nobody says otherwise: a CPU is as fast in small steps, and more steps learn more."""
EDGES = (128, 96, 64, 32)
LARGEST = {"cuda": (128, 8), "cpu": (64, 2)}
"""Edge and number of the patches of a step at most. A CPU has memory for more, but takes minutes a step then."""


def choose_patches(
    encoder: str, *, patch_size: int, batch_size: int, in_channels: int, device: torch.device
) -> tuple[int, int]:
    """Settle the 0 in patch and batch size: the largest patches of which the device's memory holds two, then more.

    Args:
        encoder: see `model.build_model`.
        patch_size: edge in voxels; 0 lets the memory decide.
        batch_size: slices or patches a step; 0 takes `SLICES`, or as many patches as the memory holds.
        in_channels: modalities.
        device: to train on.

    Returns:
        Patch size (of a network of slices as given) and batch size.
    """
    if not sees_patches(encoder):
        return patch_size, batch_size or SLICES[device.type]
    largest_edge, largest_batch = LARGEST[device.type]
    facts = machine.describe(device)
    memory = facts.get("device_memory_gib", facts.get("memory_gib", 8)) * 2**30
    whole = facts["precision"] == "no" or device.type == "cpu"  # see `window.Windows`
    voxel = _training_bytes(encoder, in_channels) * (2 if whole else 1)  # half of it is for all else
    edges = [patch_size] if patch_size else [edge for edge in EDGES if edge <= largest_edge]
    edge = next((edge for edge in edges if 2 * voxel * edge**3 <= memory), edges[-1])
    fitting = int(memory / (voxel * edge**3))
    return edge, batch_size or max(n for n in (1, 2, 4, 8) if n <= max(min(fitting, largest_batch), 1))


def _training_bytes(encoder: str, in_channels: int) -> float:
    """Bytes per voxel of a patch, float32, that a network keeps for its backward pass. Nothing is computed."""
    edge, kept = 32, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.device("meta"):
        network = build_model(encoder=encoder, weights="none", in_channels=in_channels, patch_size=edge)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.empty(1, in_channels, edge, edge, edge))
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    return (sum(kept.values()) - parameters) / edge**3


class Patches(Dataset):
    """Cubes out of some cases' boxes: about a voxel of tumour of each slice that has any, and about one of its brain.

    Which voxel is drawn once for all, from the place in the list. A cube is moved to lie within the box; along axes
    where the box is smaller, it is centred and the rest is background.

    Args:
        cases: prepared cases.
        edge: of the cubes, in voxels.

    Attributes:
        index: int64 (patches, 2), as of `dataset.Slices`: the case and the slice about which the cube lies.
        has_tumour: bool, whether a patch was drawn about tumour.
    """

    kept = False

    def __init__(self, cases: Sequence[Packed], edge: int):
        self.cases = list(cases)
        self.size = (edge, edge, edge)
        counts = [(k, z, case.counts[z]) for k, case in enumerate(cases) for z in range(len(case.counts))]
        brain = [(k, z) for k, z, count in counts if count[0]]
        tumour = [(k, z) for k, z, count in counts if count[1:].any()]
        self.index = np.array(brain + tumour, np.int64)
        self.has_tumour = np.arange(len(self.index)) >= len(brain)

    @property
    def channels(self) -> int:
        return self.cases[0].images.shape[1]

    @property
    def once(self) -> int:
        """Patches that hold as many voxels as the boxes do."""
        return -(-sum(case.images[:, 0].size for case in self.cases) // self.size[0] ** 3)

    def keep_on(self, device: torch.device) -> None:
        """Nothing is copied ahead: to fetch a patch costs little beside what a network does with it."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> Batch:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[int]) -> Batch:
        images = torch.zeros(len(items), self.channels, *self.size)
        masks = torch.zeros(len(items), *self.size, dtype=torch.uint8)
        for row, item in enumerate(items):
            case = self.cases[self.index[item][0]]
            sides = len(case.images), *case.images.shape[2:]
            box, place = zip(*map(self._side, self._centre(item), sides), strict=True)
            depth, *plane = box
            part = torch.from_numpy(case.images[depth, :, *plane].copy())
            images[row, :, *place] = part.movedim(0, 1).float()
            if case.labels is not None:
                masks[row, *place] = torch.from_numpy(case.labels[box].copy())
        return Batch(images, masks, torch.from_numpy(self.index[items]))

    def _centre(self, item: int) -> tuple[int, int, int]:
        k, z = self.index[item].tolist()
        case = self.cases[k]
        brain = (case.images[z] != 0).any(axis=0)
        voxels = np.argwhere(case.labels[z] if self.has_tumour[item] else brain)
        y, x = np.random.default_rng(int(item)).choice(voxels)
        return z, int(y), int(x)

    def _side(self, centre: int, length: int) -> tuple[slice, slice]:
        """Where a cube about `centre` lies along a side of the box, and which part of the cube that fills."""
        edge = self.size[0]
        copied = min(edge, length)
        low, free = min(max(centre - edge // 2, 0), length - copied), (edge - copied) // 2
        return slice(low, low + copied), slice(free, free + copied)


class Volumes(Dataset):
    """Whole patients, one at a time: all slices of the box in order, like a batch of `dataset.Slices`, not padded."""

    kept = False

    def __init__(self, cases: Sequence[Packed]):
        self.cases = list(cases)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitems__(self, items: Sequence[int]) -> Batch:
        (k,) = items
        case = self.cases[k]
        images = torch.from_numpy(np.array(case.images)).float()
        labels = np.zeros(images[:, 0].shape, np.uint8) if case.labels is None else np.array(case.labels)
        index = torch.tensor([(k, z) for z in range(len(images))])
        return Batch(images, torch.from_numpy(labels), index)


def middle_slices(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of patches the slice in the middle, for a picture; slices as they are."""
    if images.ndim == 4:
        return images, masks
    middle = images.shape[2] // 2
    return images[:, :, middle], masks[:, middle]


def samples(cases: Sequence[Packed], *, context_slices: int, patch_size: int) -> Slices | Patches:
    """What a network learns from. See `train.Settings` for the arguments."""
    if not patch_size:
        return Slices(cases, context_slices=context_slices)
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
    processes: int = 1,
) -> DataLoader:
    """Every slice with brain once, in order, in batches for a network in `eval()`.

    A network of slices gets `batch_size` of them at a time, one of patches a whole patient (in each process).
    """
    if patch_size:
        data, batch_size = Volumes(cases), processes
    else:
        data = Slices(cases, context_slices=context_slices)
        data.keep_on(device)
    return make_loader(data, batch_size=batch_size, workers=workers, pin_memory=device.type == "cuda")
