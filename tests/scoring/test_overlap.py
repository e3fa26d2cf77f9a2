import numpy as np
import pytest

from brats_helpers.scoring.overlap import dice, dice_scores, mean_dice
from brats_helpers.scoring.scores import score_case
from tests.scoring.shapes import MM, PAIRS, mask


def test_dice_by_hand():
    # Voxels 0-3 and 2-7 of a line: 2 shared of 4 + 6.
    pred, truth = mask((9, 1, 1), ((0, 0, 0), (4, 1, 1))), mask((9, 1, 1), ((2, 0, 0), (6, 1, 1)))
    assert dice(pred, truth) == pytest.approx(2 * 2 / 10)
    assert dice(pred & False, truth) == 0 and dice(pred & False, truth & False) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_dice_agrees_with_medpy(name, medpy):
    pred, truth, _ = PAIRS[name]
    assert dice(pred, truth) == pytest.approx(medpy.dc(pred, truth), abs=1e-12)


def test_mean_dice_is_over_the_three_regions_that_have_one():
    assert mean_dice({"WT": 0.9, "TC": 0.6, "ET": 0.3, "NCR": 0.0}) == pytest.approx(0.6)
    assert mean_dice({"WT": 0.9, "TC": 0.6, "ET": None}) == pytest.approx(0.75)
    assert mean_dice({"WT": None, "TC": None, "ET": None}) == 1


def test_dice_from_a_confusion_table_is_that_of_the_masks():
    random = np.random.default_rng(0)
    pred, truth = random.integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    table = np.bincount(4 * truth.ravel() + pred.ravel(), minlength=16).reshape(4, 4)
    scores = score_case(pred, truth, spacing_mm=MM, convention="brats2020")
    assert dice_scores(table) == pytest.approx({name: scores[name]["dice"] for name in scores})
    empty = np.diag([10, 0, 3, 0])  # no NCR, no ET, and none predicted
    assert dice_scores(empty) == {"WT": 1, "TC": 1, "ET": 1, "NCR": 1, "ED": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda good: good[:3], "shape"), (lambda good: good.astype(float), "uint8"), (lambda good: good + 4, "class 4")],
)
def test_masks_of_another_kind_are_refused(change, message):
    good = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=message):
        score_case(change(good), good, spacing_mm=MM, convention="brats2020")
