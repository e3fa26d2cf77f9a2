"""Batches: the right slices and patches, the right neighbours, every voxel, and nothing that depends on company."""

import dataclasses

import numpy as np
import pytest
import torch

from brats_helpers.data.cache import Packed, count_classes, prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.training import slices as slicing
from brats_helpers.training.batch import OUTSIDE, Draw, middle_slices
from brats_helpers.training.dataset import make_loader, patients, samples
from brats_helpers.training.patches import Patches
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.slices import Slices, training_window

CPU = torch.device("cpu")


def _case(name="A", depth=6, modalities=2, height=20, width=30, tumour=(2, 3), empty=()):
    """A patient whose slice z holds z + 1, and a tenth more in each further modality; one voxel of ET at (5, 5)."""
    values = np.arange(1, depth + 1)[:, None, None, None] + np.arange(modalities)[:, None, None] / 10
    images = np.broadcast_to(values, (depth, modalities, height, width)).astype(np.float16)
    images[list(empty)] = 0
    labels = np.zeros((depth, height, width), np.uint8)
    labels[list(tumour), 5, 5] = 3
    counts = count_classes(labels, (images != 0).any(axis=1))
    return Packed(name, images, labels, (0, 0, 0), (240, 240, 155), counts)


def _round_case(name, radii, seed):
    """A patient of noise within an ellipsoid, whose slices shrink towards the poles; class 2 in its middle."""
    depth, height, width = (2 * radius + 1 for radius in radii)
    z, y, x = np.meshgrid(*(np.arange(-radius, radius + 1) / (radius + 0.1) for radius in radii), indexing="ij")
    distance = z**2 + y**2 + x**2
    random = np.random.default_rng(seed)
    images = (random.uniform(1, 2, (depth, 2, height, width)) * (distance < 1)[:, None]).astype(np.float16)
    labels = np.where(distance < 0.3, 2, 0).astype(np.uint8)
    counts = count_classes(labels, distance < 1)
    return Packed(name, images, labels, (0, 0, 0), (width, height, depth), counts)


def test_slices_without_brain_are_left_out():
    slices = Slices([_case(empty=[0, 5])], context_slices=0, window=None)
    assert slices.index.tolist() == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert slices.has_tumour.tolist() == [False, True, True, False]


def test_a_slice_lies_in_the_middle_of_its_sample_with_its_mask():
    slices = Slices([_case()], context_slices=0, window=(32, 32))
    batch = slices.__getitems__([Draw(3, (32, 32), 0), Draw(0, (32, 32), 1)])
    assert batch.images.shape == (2, 2, 32, 32) and batch.masks.shape == (2, 32, 32)
    assert batch.index.tolist() == [[0, 3], [0, 0]] and batch.seeds == (0, 1)
    # 20 x 30 in 32 x 32: 6 rows above and 1 column to the left are background
    assert batch.images[0, :, 5].eq(0).all() and batch.images[0, 0, 6, 1] == 4
    assert batch.masks[0, 5 + 6, 5 + 1] == 3 and batch.masks[0].sum() == 3
    assert batch.masks[1].sum() == 0
    assert batch.places[0].tolist() == [[0, 3, 1], [6, 0, 20], [1, 0, 30]]


def test_neighbours_are_channels_from_below_and_0_beyond_the_box():
    slices = Slices([_case()], context_slices=1, window=None)
    assert slices.channels == 6
    middle, lowest = slices.__getitems__([Draw(2, (32, 32)), Draw(0, (32, 32))]).images[:, :, 10, 10]
    np.testing.assert_allclose(middle, [2, 2.1, 3, 3.1, 4, 4.1], rtol=1e-3)
    np.testing.assert_allclose(lowest, [0, 0, 1, 1.1, 2, 2.1], rtol=1e-3)


def test_a_slice_takes_the_smallest_multiples_of_32_that_hold_its_own_brain():
    case = _round_case("A", (20, 40, 60), seed=0)
    slices = Slices([case], context_slices=0, window=None)
    brain = case.brain
    for item in (0, 5, 20, 40):
        rows, columns = (np.flatnonzero(brain[item].any(axis=axis)) for axis in (1, 0))
        sides = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert slices.sizes[item].tolist() == [32 * -(-int(side) // 32) for side in sides]
    assert slices.size == (96, 128) and slices.sizes.prod(axis=1).mean() < 0.8 * 96 * 128


def test_the_window_holds_nine_brains_of_ten():
    cases = [_case(f"P{k}", height=30, width=90) for k in range(9)] + [_case("large", height=70, width=100)]
    assert training_window(cases) == (64, 96)  # at least 64
    assert training_window(cases[5:]) == (96, 128)  # of five, one is a fifth
    assert samples(cases, context_slices=0, patch_size=0).size == (64, 96)


def test_every_voxel_of_a_brain_larger_than_the_window_is_seen_in_time_tumour_included():
    case = _round_case("A", (2, 30, 30), seed=0)
    slices = Slices([case], context_slices=0, window=(32, 32))
    assert slices.size == (32, 32)
    seen = np.zeros(case.labels.shape, int)
    for seed in range(300):
        for item in range(len(slices)):
            batch = slices[Draw(item, (32, 32), seed)]
            (_, z, _), (row, y, height), (column, x, width) = batch.places[0].tolist()
            part = np.s_[z, y : y + height, x : x + width]
            inner = np.s_[row : row + height, column : column + width]
            np.testing.assert_array_equal(batch.images[0, 0][inner], case.images[:, 0][part])
            np.testing.assert_array_equal(batch.masks[0][inner], case.labels[part])
            seen[part] += 1
    assert seen[case.brain].all() and seen[case.labels > 0].all()


@pytest.mark.parametrize("window", [(32, 64), (96, 96)])
def test_a_sample_is_the_same_whatever_is_in_its_batch(window):
    """Larger companions only add background around it; the part that is seen follows from its own seed."""
    slices = Slices([_round_case("A", (9, 40, 45), seed=0)], context_slices=1, window=window)
    for item in (0, 3, 9):
        own = tuple(slices.sizes[item].tolist())
        alone = slices[Draw(item, own, 7)]
        others = [Draw(k, slices.size, 7 + k) for k in (9, 4)]
        among = slices.__getitems__([others[0], Draw(item, slices.size, 7), others[1]])
        y, x = ((whole - side) // 2 for whole, side in zip(slices.size, own, strict=True))
        assert torch.equal(among.images[1, :, y : y + own[0], x : x + own[1]], alone.images[0])
        assert torch.equal(among.masks[1, y : y + own[0], x : x + own[1]], alone.masks[0])
        assert among.images[1].count_nonzero() == alone.images.count_nonzero()
        assert among.places[1, 1:, 1:].tolist() == alone.places[0, 1:, 1:].tolist()


@pytest.mark.parametrize("patch_size", [0, 32])
def test_patients_come_back_whole_and_every_voxel_of_brain_once(patch_size):
    cases = [_round_case("A", (9, 40, 45), seed=0), _round_case("B", (12, 20, 17), seed=1)]
    boxes = [np.zeros_like(case.images, np.float32) for case in cases]
    counted = [np.zeros(case.labels.shape, int) for case in cases]
    loader = patients(cases, context_slices=0, patch_size=patch_size, batch_size=4, workers=0, device=CPU)
    for batch in loader:
        assert len(batch.images) <= 4 and patch_size or batch.images.ndim == 4
        for row, (k, _) in enumerate(batch.index.tolist()):
            one = batch._replace(places=batch.places[row : row + 1])
            one.write(batch.images[row : row + 1], boxes[k])
            z, y, x = (slice(start, start + length) for _, start, length in batch.places[row].tolist())
            counted[k][z, y, x] += 1
            own = batch.masks[row] != OUTSIDE
            assert own.sum() == counted[k][z, y, x].size
            np.testing.assert_array_equal(batch.masks[row][own], cases[k].labels[z, y, x].ravel())
    for case, box, count in zip(cases, boxes, counted, strict=True):
        np.testing.assert_array_equal(box, case.images)
        assert (count[case.brain] == 1).all() and count.max() == 1


def test_processes_share_the_batches_of_patients():
    how = {"context_slices": 0, "patch_size": 0, "batch_size": 2, "workers": 0, "device": CPU}
    cases = [_case(), _case("B")]
    parts = [patients(cases, **how, rank=rank, processes=2) for rank in range(2)]
    found = sorted(tuple(place) for part in parts for batch in part for place in batch.index.tolist())
    assert found == sorted(map(tuple, Slices(cases, context_slices=0, window=None).index.tolist()))


@pytest.mark.parametrize("window", [None, (32, 32)])
@pytest.mark.parametrize("reach", [0, 2])
def test_slices_kept_on_the_device_are_the_same(monkeypatch, reach, window):
    cases = [_case(), _round_case("B", (4, 20, 9), seed=0), dataclasses.replace(_case("C"), labels=None)]
    mapped, kept = (Slices(cases, context_slices=reach, window=window) for _ in range(2))
    kept.keep_on(CPU)
    assert not kept.kept  # a CPU needs no copy
    n_bytes = (6 + 9 + 6 + 4 * reach) * (2 * 2 + 1) * 41 * 30  # slices with those of 0 around each case
    for free, fits in ((4 * n_bytes - 1, False), (4 * n_bytes, True)):
        monkeypatch.setattr(slicing, "_free_bytes", lambda device, free=free: free)
        kept.keep_on(CPU)
        assert kept.kept == fits
    items = np.random.default_rng(0).permutation(len(mapped)).tolist()
    draws = [Draw(item, mapped.size, item) for item in items]
    one, other = mapped.__getitems__(draws), kept.__getitems__(draws)
    assert one.images.dtype == other.images.dtype and torch.equal(one.images, other.images)
    assert one.masks.dtype == other.masks.dtype and torch.equal(one.masks, other.masks)
    assert torch.equal(one.places, other.places)
    assert make_loader(kept, [draws], workers=2, device=CPU).num_workers == 0


@pytest.mark.parametrize("patch_size", [0, 16])
def test_the_batches_do_not_depend_on_the_number_of_workers(tiny_patients, tmp_path, patch_size):
    data = samples(
        prepare(find_cases(tiny_patients), cache_dir=tmp_path, workers=1), context_slices=0, patch_size=patch_size
    )
    batches = BalancedBatches(data, n=24, batch_size=5, foreground=0.5, seed=3)
    epochs = []
    for workers in (0, 2):
        loader = make_loader(data, batches, workers=workers, device=CPU)
        found = []
        for batches.epoch in (1, 2):
            found += loader
        epochs.append(found)
    assert len(epochs[0]) == len(epochs[1]) == 8
    for one, other in zip(*epochs, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[:4], other[:4], strict=True)) and one.seeds == other.seeds
    assert epochs[0][0].seeds != epochs[0][4].seeds  # each epoch is another draw


def _numbered(depth, height, width, tumour=()):
    """A patient whose voxels are numbered by their place; tumour (class 2) at the voxels listed."""
    images = 1 + np.arange(depth * height * width, dtype=np.float16).reshape(depth, 1, height, width)
    labels = np.zeros((depth, height, width), np.uint8)
    for voxel in tumour:
        labels[voxel] = 2
    counts = count_classes(labels, np.ones_like(labels, bool))
    return Packed("P", images, labels, (0, 0, 0), (width, height, depth), counts)


def test_a_patch_is_a_cube_of_the_box_around_its_voxel():
    case = _numbered(12, 10, 8, tumour=[(5, 7, 1)])
    data = Patches([case], 4)
    assert len(data) == 12 + 1 and data.has_tumour.tolist() == [False] * 12 + [True]
    batch = data[Draw(12, (4, 4, 4), 0)]
    # Two voxels before the centre in each axis, moved into the box: 3 to 6, 5 to 8, and 0 to 3 instead of -1 to 2.
    np.testing.assert_array_equal(batch.images[0, 0], case.images[3:7, 0, 5:9, 0:4])
    assert batch.masks[0].nonzero().tolist() == [[2, 2, 1]] and batch.masks[0, 2, 2, 1] == 2
    assert batch.index.tolist() == [[0, 5]] and batch.places[0].tolist() == [[0, 3, 4], [0, 5, 4], [0, 0, 4]]
    assert batch.images.dtype == torch.float32 and batch.masks.dtype == torch.uint8


def test_a_box_smaller_than_the_patch_lies_in_its_middle():
    images = Patches([_numbered(4, 16, 16)], 8)[Draw(3, (8, 8, 8), 0)].images
    filled = images[0, 0].numpy() != 0
    assert filled[2:6].all() and not filled[:2].any() and not filled[6:].any()


def test_patches_lie_around_tumour_and_brain_by_the_seed_of_the_draw(tiny_patients, tmp_path):
    cases = prepare(find_cases(tiny_patients), cache_dir=tmp_path, workers=1)
    data = Patches(cases, 16)
    for item in range(0, len(data), 7):
        k, z = data.index[item]
        centres = {data.centre(Draw(item, data.size, seed)) for seed in range(20)}
        assert len(centres) > 1 and data.centre(Draw(item, data.size, 3)) == data.centre(Draw(item, (0,), 3))
        for centre in centres:
            brain, label = (cases[k].images[z] != 0).any(axis=0)[centre[1:]], cases[k].labels[centre]
            assert centre[0] == z and (label > 0 if data.has_tumour[item] else brain)
    slices = sum(int(case.counts[:, 1:].any(axis=1).sum()) for case in cases)
    assert data.has_tumour.sum() == slices
    assert data.once == -(-sum(case.images[:, 0].size for case in cases) // 16**3)


def test_the_middle_slice_of_a_patch_is_shown():
    cubes, masks = torch.rand(2, 3, 8, 5, 6), torch.randint(0, 4, (2, 8, 5, 6))
    shown = middle_slices(cubes, masks)
    assert torch.equal(shown[0], cubes[:, :, 4]) and torch.equal(shown[1], masks[:, 4])
    assert all(map(torch.equal, middle_slices(*shown), shown))


def test_patches_have_no_neighbouring_slices():
    with pytest.raises(ValueError, match="context_slices 1: .*must be 0"):
        samples([_case()], context_slices=1, patch_size=32)
