import itertools

import numpy as np
import pytest
from scipy import ndimage

from brats_helpers.scoring.lesions import Components, Detection, by_dilation, match
from brats_helpers.scoring.overlap import dice
from tests.scoring.shapes import blob, mask


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.9, 1])
def test_components_are_those_of_scipy(share):
    for seed, smooth in itertools.product(range(3), (0, 1)):
        voxels = blob((11, 13, 9), seed, smooth, share)
        found = Components.of(voxels)
        expected, count = ndimage.label(voxels.T, np.ones((3, 3, 3)))
        assert found.count == count
        np.testing.assert_array_equal(found.labels(), expected.T)
        np.testing.assert_array_equal(found.voxels, np.bincount(expected.ravel(), minlength=count + 1)[1:])


@pytest.mark.parametrize("step", list(itertools.product((-1, 0, 1), repeat=3)))
def test_voxels_that_touch_in_any_way_are_one_component(step):
    voxels = mask((5, 5, 5), ((2, 2, 2), (1, 1, 1)), (np.add(2, step), (1, 1, 1)))
    assert Components.of(voxels).count == 1
    far = mask((7, 7, 7), ((3, 3, 3), (1, 1, 1)), (np.add(3, 2 * np.array(step)), (1, 1, 1)))
    assert Components.of(far).count == (1 if step == (0, 0, 0) else 2)


def test_the_end_of_a_line_does_not_touch_the_start_of_the_next():
    voxels = mask(
        (4, 4, 4), ((1, 0, 3), (1, 1, 1)), ((1, 1, 0), (1, 1, 1)), ((0, 3, 1), (1, 1, 1)), ((3, 3, 3), (1, 1, 1))
    )
    assert Components.of(voxels).count == 4


def test_detection_by_hand():
    detection = Detection(found=2, false=1, missed=3)
    assert (detection.f1, detection.precision, detection.recall) == pytest.approx((2 * 2 / (4 + 1 + 3), 2 / 3, 2 / 5))
    none = Detection(found=0, false=0, missed=0)
    assert (none.f1, none.precision, none.recall) == (None, None, None)
    invented = Detection(found=0, false=2, missed=0)
    assert (invented.f1, invented.precision, invented.recall) == (0, 0, None)


def test_matching_has_the_largest_sum_of_dice():
    random = np.random.default_rng(0)
    for seed in range(6):
        pred, truth = blob((24, 20, 16), seed, 1, 0.06), blob((24, 20, 16), seed, 1, 0.08)
        pred = np.roll(pred, random.integers(0, 3, 3), axis=(0, 1, 2))
        p_labels, t_labels = Components.of(pred).labels(), Components.of(truth).labels()
        found, true = p_labels.max(), t_labels.max()
        table = np.array(
            [[dice(p_labels == p, t_labels == t) for t in range(1, true + 1)] for p in range(1, found + 1)]
        )
        matching = match(pred, truth)
        p, t = matching.pairs.T
        assert len(set(p)) == len(p) and len(set(t)) == len(t)
        np.testing.assert_allclose(matching.dice, table[p, t], atol=1e-12)
        # No exchange of two partners, and no pair of two that are left, gains anything.
        for a, b in itertools.permutations(range(len(p)), 2):
            assert table[p[a], t[a]] + table[p[b], t[b]] >= table[p[a], t[b]] + table[p[b], t[a]] - 1e-12
        left = np.ix_(sorted(set(range(found)) - set(p)), sorted(set(range(true)) - set(t)))
        assert not table[left].any()
        for (pred_one, truth_one), value in zip(matching.masks(), matching.dice, strict=True):
            assert dice(pred_one, truth_one) == pytest.approx(value)


def test_one_prediction_over_two_lesions_matches_the_one_it_fits_best():
    truth = mask((30, 8, 8), ((2, 2, 2), (5, 5, 5)), ((20, 2, 2), (4, 4, 4)))
    matching = match(mask((30, 8, 8), ((2, 2, 2), (22, 4, 4))), truth)
    assert matching.detection == Detection(found=1, false=0, missed=1)
    # 5 x 4 x 4 voxels of the larger lesion, 4 x 4 x 4 of the smaller one.
    assert 2 * 80 / (352 + 125) > 2 * 64 / (352 + 64)
    assert matching.dice == pytest.approx([2 * 80 / (352 + 125)])


@pytest.mark.parametrize(("dilations", "joined"), [(3, 6), (1, 2)])
def test_reference_lesions_that_nearly_touch_are_one(dilations, joined):
    # Each grows by `dilations` voxels, so a gap of twice as many closes, and a larger one leaves a voxel between.
    for gap, expected in ((joined, 1), (joined + 1, 2)):
        truth = mask((30, 12, 12), ((2, 4, 4), (4, 4, 4)), ((6 + gap, 4, 4), (4, 4, 4)))
        lesions, detection = by_dilation(truth, truth, dilations=dilations, dropped_voxels=50)
        assert len(lesions) == detection.found == expected


@pytest.mark.parametrize(("away", "false"), [(3, 0), (4, 1)])
def test_a_prediction_beside_a_lesion_belongs_to_it(away, false):
    # The lesion ends at voxel 7. A voxel up to 3 farther lies in its dilation; one 4 farther is a lesion of its own.
    truth = mask((30, 12, 12), ((4, 4, 4), (4, 4, 4)))
    pred = truth | mask(truth.shape, ((7 + away, 4, 4), (1, 1, 1)))
    assert by_dilation(pred, truth, dilations=3, dropped_voxels=50)[1] == Detection(found=1, false=false, missed=0)


@pytest.mark.parametrize("dropped", [2, 50])
def test_small_reference_lesions_are_dropped(dropped):
    for voxels, counted in ((dropped, 0), (dropped + 1, 1)):
        truth = mask((60, 9, 9), ((3, 4, 4), (voxels, 1, 1)))
        missed = by_dilation(truth & False, truth, dilations=1, dropped_voxels=dropped)[1]
        assert missed == Detection(found=0, false=0, missed=counted)
        on_it = by_dilation(truth, truth, dilations=1, dropped_voxels=dropped)[1]
        assert on_it == Detection(found=counted, false=0, missed=0)  # what lies on a dropped lesion is not false
