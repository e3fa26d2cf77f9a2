"""3D patches of prepared cases for training, and whole patients for validation and prediction."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from brats_helpers.data.cache import Packed
from brats_helpers.training.batch import Batch, Draw, ranges


class Patches(Dataset):
    """Cubes from some cases' boxes: for each slice one around its brain, and one around its tumour, if it has any.

    The seed of a draw chooses the cube's centre among the slice's voxels of brain, or of tumour. A cube is shifted to
    lie within the box; along axes where the box is smaller, the box is centred in the cube.

    Args:
        cases: prepared cases.
        edge: of the cubes, in voxels.
    """

    kept = False

    def __init__(self, cases: Sequence[Packed], edge: int):
        self.cases = list(cases)
        self.size = (edge, edge, edge)
        counts = [(k, z, case.counts[z]) for k, case in enumerate(cases) for z in range(len(case.counts))]
        brain = [(k, z) for k, z, count in counts if cases[k].boxes[z, 1]]
        tumour = [(k, z) for k, z, count in counts if count[1:].any()]
        self.index = np.array(brain + tumour, np.int64)
        self.has_tumour = np.arange(len(self.index)) >= len(brain)
        self.sizes = np.tile(np.array(self.size), (len(self.index), 1))

    @property
    def channels(self) -> int:
        return self.cases[0].images.shape[1]

    @property
    def once(self) -> int:
        """Patches with as many voxels as the boxes have."""
        return -(-sum(case.images[:, 0].size for case in self.cases) // self.size[0] ** 3)

    def keep_on(self, device: torch.device) -> None:
        """Do nothing: loading a patch is cheap compared with the network's work on it."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, draw: Draw) -> Batch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        images = torch.zeros(len(draws), self.channels, *self.size)
        masks = torch.zeros(len(draws), *self.size, dtype=torch.uint8)
        places = torch.zeros(len(draws), 3, 3, dtype=torch.int64)
        for row, draw in enumerate(draws):
            case = self.cases[self.index[draw.item][0]]
            sides = len(case.images), *case.images.shape[2:]
            spans = [self._span(*pair) for pair in zip(self.centre(draw), sides, strict=True)]
            places[row] = torch.tensor(spans)
            to, (depth, *plane) = zip(*map(ranges, spans), strict=True)
            part = torch.from_numpy(case.images[depth, :, *plane].copy())
            images[row, :, *to] = part.movedim(0, 1).float()
            if case.labels is not None:
                masks[row, *to] = torch.from_numpy(case.labels[depth, *plane].copy())
        index = torch.from_numpy(self.index[[draw.item for draw in draws]])
        return Batch(images, masks, index, places, tuple(draw.seed for draw in draws))

    def centre(self, draw: Draw) -> tuple[int, int, int]:
        """Return the centre (z, y, x) of a patch in its case's box."""
        k, z = self.index[draw.item].tolist()
        case = self.cases[k]
        brain = (case.images[z] != 0).any(axis=0)
        voxels = np.argwhere(case.labels[z] if self.has_tumour[draw.item] else brain)
        y, x = np.random.default_rng(draw.seed).choice(voxels)
        return z, int(y), int(x)

    def _span(self, centre: int, side: int) -> tuple[int, int, int]:
        """Along one axis: first voxel in the cube and in the box, and length, of the part of a cube within the box."""
        edge = self.size[0]
        length = min(edge, side)
        low = min(max(centre - edge // 2, 0), side - length)
        return (edge - length) // 2, low, length


class Volumes(Dataset):
    """Whole patients, each a sample of its own size, (1, channels, depth, height, width)."""

    kept = False

    def __init__(self, cases: Sequence[Packed]):
        self.cases = list(cases)
        self.sizes = np.array([(len(case.images), *case.images.shape[2:]) for case in cases])

    def __len__(self) -> int:
        return len(self.cases)

    def keep_on(self, device: torch.device) -> None:
        """Do nothing, see `Patches.keep_on`."""

    def __getitems__(self, draws: Sequence[Draw]) -> Batch:
        (draw,) = draws
        case = self.cases[draw.item]
        images = torch.from_numpy(np.array(case.images)).float().movedim(0, 1)[None]
        labels = np.zeros(draw.size, np.uint8) if case.labels is None else np.array(case.labels)
        places = torch.tensor([[(0, 0, side) for side in draw.size]])
        return Batch(images, torch.from_numpy(labels)[None], torch.tensor([[draw.item, 0]]), places, (draw.seed,))
