"""Batches: the right slices, the right neighbours, the same draw for the same seed."""

import dataclasses

import numpy as np
import pytest
import torch

from brats_helpers.data.cache import Packed, prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.training import dataset
from brats_helpers.training.dataset import BalancedSampler, Slices, common_size, make_loader


def _case(name="A", depth=6, modalities=2, height=20, width=30, tumour=(2, 3), empty=()):
    images = np.arange(1, depth + 1, dtype=np.float16)[:, None, None, None] * np.ones(
        (modalities, height, width), np.float16
    )
    images = images + np.arange(modalities, dtype=np.float16)[:, None, None] / 10
    labels = np.zeros((depth, height, width), np.uint8)
    labels[list(tumour), 5, 5] = 3
    counts = np.zeros((depth, 4), np.int64)
    counts[:, 0] = height * width
    counts[list(tumour), 3] = 1
    counts[list(empty)] = 0
    return Packed(name, images.astype(np.float16), labels, (0, 0, 0), (240, 240, 155), counts)


def test_slices_without_brain_are_left_out():
    slices = Slices([_case(empty=[0, 5])], context_slices=0)
    assert slices.index.tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert slices.has_tumour.tolist() == [False, True, True, False]


def test_the_common_size_cuts_no_case():
    assert common_size([_case(height=33, width=64), _case(height=20, width=65)]) == (64, 96)


def test_a_slice_sits_in_the_middle_of_the_common_size_with_its_mask():
    batch = Slices([_case()], context_slices=0).__getitems__([3, 0])
    assert batch.images.shape == (2, 2, 32, 32) and batch.masks.shape == (2, 32, 32)
    assert batch.index.tolist() == [[0, 3], [0, 0]]
    # 20 x 30 in 32 x 32: 6 rows above and 1 column to the left are background
    assert batch.images[0, :, 5].eq(0).all() and batch.images[0, 0, 6, 1] == 4
    assert batch.masks[0, 5 + 6, 5 + 1] == 3 and batch.masks[0].sum() == 3
    assert batch.masks[1].sum() == 0


def test_neighbours_are_channels_from_below_and_0_beyond_the_box():
    slices = Slices([_case()], context_slices=1)
    assert slices.channels == 6
    middle, lowest = slices.__getitems__([2, 0]).images[:, :, 10, 10]
    np.testing.assert_allclose(middle, [2, 2.1, 3, 3.1, 4, 4.1], rtol=1e-3)
    np.testing.assert_allclose(lowest, [0, 0, 1, 1.1, 2, 2.1], rtol=1e-3)


@pytest.mark.parametrize("foreground, expected", [(0.5, 50), (0.9, 90), (0.0, 0), (-1, 33)])
def test_the_share_of_slices_with_tumour_is_as_asked(foreground, expected):
    slices = Slices([_case(), _case("B")], context_slices=0)  # a third of the slices hold tumour
    picked = list(BalancedSampler(slices, n=100, foreground=foreground, seed=0))
    assert len(picked) == 100
    assert slices.has_tumour[picked].sum() == expected


def test_no_slice_comes_twice_before_all_came_once():
    slices = Slices([_case(depth=40, tumour=range(10))], context_slices=0)
    picked = np.array(list(BalancedSampler(slices, n=30, foreground=0.5, seed=0)))
    counts = np.bincount(picked, minlength=40)
    assert set(counts[:10]) == {1, 2}  # 15 draws of 10 slices
    assert counts[10:].max() == 1  # 15 draws of 30


def test_a_set_without_tumour_or_of_tumour_alone_still_fills_an_epoch():
    for tumour in ((), range(6)):
        slices = Slices([_case(tumour=tumour)], context_slices=0)
        assert len(list(BalancedSampler(slices, n=20, foreground=0.7, seed=0))) == 20


def test_the_draw_follows_seed_and_epoch_alone():
    slices = Slices([_case()], context_slices=0)
    sampler = BalancedSampler(slices, n=50, foreground=0.5, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.epoch = 2
    second = list(sampler)
    assert second != first
    other = BalancedSampler(slices, n=50, foreground=0.5, seed=1)
    other.epoch = 2
    assert list(other) == second
    assert list(BalancedSampler(slices, n=50, foreground=0.5, seed=2)) != first


@pytest.mark.parametrize("reach", [0, 2])
def test_slices_kept_on_the_device_are_the_same(monkeypatch, reach):
    cases = [_case(), _case("B", height=33, width=17, empty=[0, 5]), dataclasses.replace(_case("C"), labels=None)]
    mapped, kept = (Slices(cases, context_slices=reach) for _ in range(2))
    kept.keep_on(torch.device("cpu"))
    assert not kept.kept  # a CPU needs no copy
    n_bytes = (18 + 4 * reach) * (2 * 2 + 1) * 64 * 32  # slices with those of 0 around each case; size 64 x 32
    for free, fits in ((4 * n_bytes - 1, False), (4 * n_bytes, True)):
        monkeypatch.setattr(dataset, "_free_bytes", lambda device, free=free: free)
        kept.keep_on(torch.device("cpu"))
        assert kept.kept == fits
    items = np.random.default_rng(0).permutation(len(mapped)).tolist()
    for one, other in zip(mapped.__getitems__(items), kept.__getitems__(items), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert make_loader(kept, batch_size=2, workers=2, pin_memory=True).num_workers == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_whole_batches_in_order(workers):
    slices = Slices([_case(), _case("B")], context_slices=0)
    batches = list(make_loader(slices, batch_size=5, workers=workers))
    assert [len(batch.images) for batch in batches] == [5, 5, 2]
    assert np.concatenate([batch.index.numpy() for batch in batches]).tolist() == slices.index.tolist()
    sampler = BalancedSampler(slices, n=12, foreground=0.5, seed=0)
    sizes = [len(batch.images) for batch in make_loader(slices, batch_size=5, workers=workers, sampler=sampler)]
    assert sizes == [5, 5]


def test_the_batches_do_not_depend_on_the_number_of_workers(tiny_patients, tmp_path):
    slices = Slices(prepare(find_cases(tiny_patients), cache_dir=tmp_path, workers=1), context_slices=1)
    sampler = BalancedSampler(slices, n=24, foreground=0.5, seed=3)
    epochs = []
    for workers in (0, 2):
        loader = make_loader(slices, batch_size=5, workers=workers, sampler=sampler)
        batches = []
        for sampler.epoch in (1, 2):
            batches += loader
        epochs.append(batches)
    assert len(epochs[0]) == len(epochs[1]) == 8
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert not torch.equal(epochs[0][0].index, epochs[0][4].index)  # each epoch is another draw
