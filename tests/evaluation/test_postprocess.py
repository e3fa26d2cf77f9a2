"""Rules on small maps whose outcome is counted by hand, and their choice by validation patients."""

import json
from dataclasses import replace

import numpy as np
import pytest

from brats_helpers.evaluation import postprocess
from brats_helpers.evaluation.postprocess import NO_RULES, gain, read_rules
from brats_helpers.labels import DataError
from brats_helpers.scoring.scores import crop_tumour

NCR, ED, ET = 1, 2, 3


def volume(*boxes, shape=(24, 24, 24)):
    """Class indices; each box is (first corner, size, class), later ones on top."""
    out = np.zeros(shape, np.uint8)
    for corner, size, index in boxes:
        out[tuple(slice(at, at + side) for at, side in zip(corner, size, strict=True))] = index
    return out


def apply(classes, **rules):
    before = classes.copy()
    after = replace(NO_RULES, **rules)(classes)
    np.testing.assert_array_equal(classes, before)  # the argument stays as it was
    assert after.dtype == np.uint8
    return after


def test_no_rules_change_nothing():
    classes = np.random.default_rng(0).integers(0, 4, (9, 8, 7)).astype(np.uint8)
    np.testing.assert_array_equal(apply(classes), classes)
    assert not apply(np.zeros((4, 4, 4), np.uint8), component_voxels=9, fill_holes=True, et_voxels=9).any()


@pytest.mark.parametrize(("threshold", "becomes"), [(29, ET), (30, ET), (31, NCR)])
def test_enhancing_tumour_below_the_threshold_becomes_ncr(threshold, becomes):
    """30 voxels of ET in two places: the patient's total counts, and TC and WT stay."""
    classes = volume(((2, 2, 2), (8, 8, 8), ED), ((3, 3, 3), (2, 5, 2), ET), ((20, 20, 18), (1, 2, 5), ET))
    after = apply(classes, et_voxels=threshold)
    np.testing.assert_array_equal(after, np.where(classes == ET, becomes, classes))


def test_components_below_the_threshold_become_background():
    """Two voxels that touch at a corner hang together; of 12, 2 and 1 voxels, a threshold of 2 drops the last."""
    large, corner, speck = ((0, 0, 0), (3, 2, 2), ED), ((10, 10, 10), (1, 1, 1), ET), ((20, 0, 0), (1, 1, 1), NCR)
    classes = volume(large, corner, ((11, 11, 11), (1, 1, 1), ED), speck)
    np.testing.assert_array_equal(apply(classes, component_voxels=2), np.where(classes == NCR, 0, classes))
    np.testing.assert_array_equal(apply(classes, component_voxels=3), volume(large))
    assert not apply(classes, component_voxels=13).any()


def test_holes_are_filled_by_what_encloses_them():
    shell = [((4, 4, 4), (9, 9, 9), ED), ((6, 6, 6), (5, 5, 5), ET)]
    solid = volume(*shell, ((7, 7, 7), (3, 3, 3), NCR))
    hollow = volume(*shell, ((7, 7, 7), (3, 3, 3), 0), ((8, 8, 8), (1, 1, 1), ED), ((5, 5, 5), (1, 1, 1), 0))
    np.testing.assert_array_equal(apply(hollow, fill_holes=True), solid)
    opened = volume(*shell, ((8, 8, 0), (1, 1, 9), 0))  # a canal to the outside is no hole
    np.testing.assert_array_equal(apply(opened, fill_holes=True), opened)


def test_components_go_before_enhancing_tumour_is_counted():
    """40 voxels of ET, 20 of them in a speck that goes: the 20 that remain are too few."""
    tumour = ((4, 4, 4), (10, 10, 10), ED)
    classes = volume(tumour, ((5, 5, 5), (2, 2, 5), ET), ((20, 20, 20), (2, 2, 4), ET), ((22, 20, 20), (1, 1, 4), ET))
    after = apply(classes, component_voxels=30, et_voxels=30)
    np.testing.assert_array_equal(after, volume(tumour, ((5, 5, 5), (2, 2, 5), NCR)))


# ---- Choosing. The truth has no enhancing tumour; false ET of n voxels costs its whole ET Dice, 1/3 of the mean.

TRUTH = volume(((4, 4, 4), (10, 10, 10), ED), ((6, 6, 6), (5, 5, 5), NCR))


def choose(pairs, *, convention, spacing_mm=(1.0, 1.0, 1.0)):
    return postprocess.choose([(*pair, spacing_mm) for pair in pairs], convention=convention)


def false_et(voxels):
    pred = TRUTH.copy()
    pred[6, 6, 6 : 6 + voxels] = ET
    return pred, TRUTH


def test_the_mildest_of_the_best_thresholds_is_taken():
    rules, on_validation = choose([false_et(3), false_et(5)], convention="brats2020")
    assert rules == replace(NO_RULES, et_voxels=30)
    assert on_validation["n"] == 2
    assert (on_validation["before"]["ET"], on_validation["after"]["ET"]) == (0, 1)
    assert on_validation["before"]["TC"] == on_validation["after"]["TC"] == 1


def test_a_gain_in_one_patient_alone_chooses_no_rule():
    for pairs in ([false_et(3)], [false_et(3), (TRUTH, TRUTH)], [false_et(3), (TRUTH, TRUTH), (TRUTH, TRUTH)]):
        rules, on_validation = choose(pairs, convention="brats2020")
        assert rules == NO_RULES and on_validation["before"] == on_validation["after"]


def test_a_rule_that_costs_others_more_is_not_chosen():
    """Small ET that is right is lost by the rule: a patient loses a third of the mean Dice where others gain one."""
    right = false_et(4)[0]
    gainers, loser = [false_et(3), false_et(4), false_et(5)], (right, right)
    assert choose([*gainers, loser], convention="brats2020")[0].et_voxels == 30
    assert choose([*gainers[:2], loser], convention="brats2020")[0] == NO_RULES  # without one of them no gain is left
    assert choose([*gainers[:2], loser, loser, loser], convention="brats2020")[0] == NO_RULES


def test_a_tie_changes_nothing():
    assert choose([(TRUTH, TRUTH)] * 3, convention="brats2020")[0] == NO_RULES
    assert choose([], convention="brats2020") == (NO_RULES, {"n": 0, "before": {}, "after": {}})


def test_rules_build_on_one_another():
    """A far speck of 20 voxels of ET costs WT and TC and ET; dropped as a component, it leaves the ET rule no work."""
    pairs = []
    for _ in range(2):
        pred = TRUTH.copy()
        pred[20:22, 20:22, 15:20] = ET
        pairs.append((pred, TRUTH))
    assert choose(pairs, convention="brats2020")[0] == replace(NO_RULES, component_voxels=30)


def test_the_convention_decides_what_is_a_gain():
    """Lesion-wise, a speck of 12 voxels beside a tumour of 1,000 halves WT; by the whole volume it costs 0.006."""
    pred = TRUTH.copy()
    pred[20:22, 20:22, 20:23] = ED
    _, whole = choose([(pred, TRUTH)] * 2, convention="brats2020")
    rules, lesions = choose([(pred, TRUTH)] * 2, convention="brats2023")
    assert rules.component_voxels == 30
    assert lesions["before"]["WT"] == pytest.approx(1 / 2)
    assert whole["before"]["WT"] == pytest.approx(2 * 1000 / (1000 + 1012))


def test_the_voxel_size_decides_whether_a_metastasis_counts():
    """A metastasis of 125 voxels is 42.9 mm³ with voxels of 0.7 mm, and 15.6 mm³, too small to count, with 0.5 mm."""
    truth = volume(((6, 6, 6), (5, 5, 5), ED))
    pred = truth.copy()
    pred[20:22, 20:22, 20:23] = ED
    rules, change = choose([(pred, truth)] * 2, convention="brats2026-MET", spacing_mm=(0.7, 0.7, 0.7))
    assert rules.component_voxels == 30 and change["before"]["WT"] == 1 / 2
    rules, change = choose([(pred, truth)] * 2, convention="brats2026-MET", spacing_mm=(0.5, 0.5, 0.5))
    assert rules == NO_RULES and "WT" not in change["before"]


def test_gain_is_a_mean_over_patients_and_may_be_a_loss():
    before = [{"WT": 0.8, "TC": 0.5, "ET": 1.0}, {"WT": 0.6, "TC": 0.5, "ET": 0.0}]
    after = [{"WT": 0.9, "TC": 0.5, "ET": 0.0}, {"WT": 0.6, "TC": 0.5, "ET": 0.0}]
    assert gain(before, after) == {
        "n": 2,
        "before": pytest.approx({"WT": 0.7, "TC": 0.5, "ET": 0.5}),
        "after": pytest.approx({"WT": 0.75, "TC": 0.5, "ET": 0.0}),
    }


def test_rules_come_back_from_their_file(tmp_path):
    file = tmp_path / "postprocess.json"
    file.write_text(json.dumps({"rules": {"component_voxels": 10, "fill_holes": True, "et_voxels": 200}}))
    assert read_rules(file) == replace(NO_RULES, component_voxels=10, fill_holes=True, et_voxels=200)
    file.write_text('{"rules": {"et": 200}}')
    with pytest.raises(DataError, match="holds no rules"):
        read_rules(file)
    with pytest.raises(DataError, match="holds no rules"):
        read_rules(tmp_path / "nowhere.json")


def test_a_patient_without_any_tumour_changes_no_choice():
    """Cut to its tumour nothing is left of it, see `predict_validation`."""
    pair = crop_tumour(*np.zeros((2, 8, 8, 8), np.uint8))
    assert pair[0].size == 0
    rules, change = choose([pair], convention="brats2020")
    assert rules == NO_RULES and change["before"] == change["after"] == {"WT": 1, "TC": 1, "ET": 1}
