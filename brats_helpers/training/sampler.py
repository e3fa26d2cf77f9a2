"""Sampling: the slices or patches of an epoch, in batches."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
from torch.utils.data import Sampler

from brats_helpers.training.augment import seed_of
from brats_helpers.training.batch import Draw
from brats_helpers.training.dataset import Samples


class BalancedBatches(Sampler[list[Draw]]):
    """Batches of randomly drawn samples, a given share of them with tumour. Each batch holds samples of similar size.

    The drawn samples and their seeds depend on the seed and the epoch alone. Batch size and grouping affect only the
    padding. A last batch that would be short is dropped.

    Args:
        samples: what to draw from.
        n: samples per epoch; 0: as many as cover every voxel once.
        batch_size: samples per batch, over all processes.
        foreground: share of samples with tumour, 0 to 1; a negative number: the share in the data.
        seed: of every draw.
        rank, processes: this process gets the `rank`-th of `processes` equal parts of each batch.

    Attributes:
        epoch: set it before each pass.
        first: number of the first batch; set it to resume within an epoch.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        n: int,
        batch_size: int,
        foreground: float,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ):
        self.samples = samples
        self.n = n or samples.once
        self.batch_size = batch_size
        self.seed = seed
        self.rows = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        self.epoch = self.first = 0
        tumour = np.flatnonzero(samples.has_tumour)
        rest = np.flatnonzero(~samples.has_tumour)
        share = foreground if foreground >= 0 else len(tumour) / max(len(samples), 1)
        n_tumour = self.n if not len(rest) else 0 if not len(tumour) else round(self.n * share)
        self.pools = [(tumour, n_tumour), (rest, self.n - n_tumour)]

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.n // self.batch_size

    def draw(self) -> np.ndarray:
        """The items of this epoch by their positions in the draw, int64 (n,)."""
        return self._draw(np.random.default_rng([self.seed, self.epoch]))

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        return random.permutation(np.concatenate([_some_of(pool, n, random) for pool, n in self.pools]))

    def __iter__(self) -> Iterator[list[Draw]]:
        random = np.random.default_rng([self.seed, self.epoch])
        items = self._draw(random)[: len(self) * self.batch_size]
        by_size = np.lexsort(self.samples.sizes[items].T[::-1])  # positions; equal sizes stay in the order of the draw
        batches = random.permutation(by_size.reshape(len(self), self.batch_size))
        for positions in islice(batches, self.first, None):
            size = tuple(self.samples.sizes[items[positions]].max(axis=0).tolist())
            yield [
                Draw(int(items[position]), size, seed_of(self.seed, self.epoch, int(position)))
                for position in positions[self.rows]
            ]


def _some_of(pool: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """Draw `n` items; none is repeated before every item has been drawn."""
    rounds = [random.permutation(pool) for _ in range(-(-n // max(len(pool), 1)))]
    return np.concatenate(rounds)[:n] if rounds else pool[:0]
