"""Which slices an epoch shows: the right share with tumour, the same draw for the same seed however it is batched."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from brats_helpers.training.sampler import BalancedBatches


class _Samples(SimpleNamespace):
    def __len__(self):
        return len(self.sizes)


def _samples(n=12, tumour=(2, 3, 8, 9), sides=None):
    """Stands for slices, of which only this is looked at."""
    sizes = np.full((n, 2), 32) if sides is None else np.array(sides)
    return _Samples(has_tumour=np.isin(np.arange(n), tumour), sizes=sizes, once=n)


def _batches(n=100, *, batch_size=5, foreground=0.5, seed=0, samples=None, **how):
    return BalancedBatches(samples or _samples(), n=n, batch_size=batch_size, foreground=foreground, seed=seed, **how)


@pytest.mark.parametrize("foreground, expected", [(0.5, 50), (0.9, 90), (0.0, 0), (-1, 33)])
def test_the_share_of_slices_with_tumour_is_as_set(foreground, expected):
    batches = _batches(foreground=foreground)  # a third of the slices hold tumour
    items = [draw.item for batch in batches for draw in batch]
    assert len(items) == 100 and batches.samples.has_tumour[items].sum() == expected


def test_no_slice_is_repeated_before_all_were_drawn():
    batches = _batches(30, samples=_samples(40, tumour=range(10)))
    counts = np.bincount(batches.draw(), minlength=40)
    assert set(counts[:10]) == {1, 2}  # 15 draws of 10 slices
    assert counts[10:].max() == 1  # 15 draws of 30


@pytest.mark.parametrize("tumour", [(), range(12)])
def test_a_set_without_tumour_or_of_tumour_alone_still_fills_an_epoch(tumour):
    assert len(_batches(20, foreground=0.7, samples=_samples(tumour=tumour)).draw()) == 20


def test_the_draw_follows_seed_and_epoch_alone():
    batches, again, other = _batches(seed=1), _batches(seed=1), _batches(seed=2)
    first = list(batches)
    assert list(batches) == first == list(again) != list(other)
    batches.epoch = again.epoch = 2
    assert list(batches) == list(again) != first


def test_neither_batch_size_nor_sizes_nor_processes_change_who_is_drawn_with_which_seed():
    sides = np.random.default_rng(0).choice([32, 64, 96, 128], (12, 2))
    varied = _samples(sides=sides)
    shares = [_batches(96, batch_size=8, samples=varied, rank=rank, processes=2) for rank in range(2)]
    drawn = [
        [draw for batch in _batches(96, batch_size=4) for draw in batch],
        [draw for batch in _batches(96, batch_size=8, samples=varied) for draw in batch],
        [draw for share in shares for batch in share for draw in batch],
    ]
    first, *others = (sorted((draw.item, draw.seed) for draw in draws) for draws in drawn)
    assert len(set(first)) == 96 and all(other == first for other in others)


def test_batches_hold_slices_of_similar_size_in_random_order():
    sides = np.random.default_rng(0).choice([32, 64, 96, 128], (400, 2))
    batches = list(_batches(400, batch_size=4, samples=_samples(400, tumour=range(100), sides=sides)))
    for batch in batches:
        needed = np.max([sides[draw.item] for draw in batch], axis=0)
        assert {draw.size for draw in batch} == {tuple(needed)}
    padded = sum(len(batch) * math.prod(batch[0].size) for batch in batches)
    needed = sum(int(sides[draw.item].prod()) for batch in batches for draw in batch)
    assert padded < 1.05 * needed
    areas = [math.prod(batch[0].size) for batch in batches]
    assert abs(np.corrcoef(areas, range(len(areas)))[0, 1]) < 0.2  # neither the small nor the large ones come first


def test_an_epoch_can_be_resumed_at_any_batch():
    batches = _batches(22)  # two of the draw are left over
    whole = list(batches)
    assert len(whole) == len(batches) == 4
    batches.first = 3
    assert list(batches) == whole[3:]
