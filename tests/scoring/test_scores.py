import csv

import numpy as np
import pytest

from brats_helpers.scoring import scores as scoring
from brats_helpers.scoring.rules import CONVENTIONS, RULES
from brats_helpers.scoring.scores import collect, conventions_table, score_case
from brats_helpers.scoring.statistics import summarise
from tests.scoring.shapes import MM, mask, tumour


def test_structures_by_hand():
    # A row of 10 voxels of 1 x 2 x 3 mm = 0.006 ml.
    truth = np.array([1, 1, 2, 2, 2, 3, 3, 0, 0, 0], np.uint8).reshape(10, 1, 1)
    pred = np.array([1, 2, 2, 2, 0, 3, 1, 3, 2, 0], np.uint8).reshape(10, 1, 1)
    scores = score_case(pred, truth, spacing_mm=(1, 2, 3), convention="brats2020")
    # Voxels shared, predicted, in the reference:
    hits = {"WT": (6, 8, 7), "TC": (3, 4, 4), "ET": (1, 2, 2), "NCR": (1, 2, 2), "ED": (2, 4, 3)}
    assert list(scores) == list(hits)
    for structure, (shared, found, true) in hits.items():
        figures = scores[structure]
        assert figures["dice"] == pytest.approx(2 * shared / (found + true))
        assert figures["sensitivity"] == pytest.approx(shared / true)
        assert figures["specificity"] == pytest.approx((10 - found - true + shared) / (10 - true))
        assert figures["volume_ml"] == pytest.approx(found * 0.006)
        assert figures["volume_ml_truth"] == pytest.approx(true * 0.006)
        assert figures["volume_difference_ml"] == pytest.approx((found - true) * 0.006)
    assert scores["ET"]["hd95_mm"] == pytest.approx(1.0)  # 5, 7 and 5, 6: distances 0, 1, 0, 1
    # Two predicted voxels apart, one lesion of two voxels: one is found, one is false.
    assert (scores["ET"]["lesion_precision"], scores["ET"]["lesion_recall"]) == (0.5, 1)


@pytest.mark.parametrize(("pred", "truth", "expected"), [(0, 0, (1, 1)), (0, 1, (0, 1)), (1, 0, (0, 1 - 64 / 1000))])
def test_sensitivity_and_specificity_of_empty_masks(pred, truth, expected):
    cube = mask((10, 10, 10), ((3, 3, 3), (4, 4, 4))).astype(np.uint8)
    for rule in RULES:
        found = score_case(3 * pred * cube, 3 * truth * cube, spacing_mm=MM, convention=rule)["ET"]
        assert (found["sensitivity"], found["specificity"]) == pytest.approx(expected)


def test_a_full_volume_has_no_negatives():
    full = np.full((3, 3, 3), 2, np.uint8)
    assert score_case(full, full, spacing_mm=MM, convention="brats2020")["WT"]["specificity"] == 1
    assert score_case(0 * full, full, spacing_mm=MM, convention="brats2020")["WT"]["specificity"] == 0


@pytest.mark.parametrize("rule", RULES)
def test_background_around_the_tumour_changes_nothing(rule):
    pred, truth = tumour((20, 18, 16), 1), tumour((20, 18, 16), 4)
    padded = [np.asfortranarray(np.pad(each, 9)) for each in (pred, truth)]
    small = score_case(pred, truth, spacing_mm=(1, 2, 3), convention=rule)
    large = score_case(padded[0], np.ascontiguousarray(padded[1]), spacing_mm=(1, 2, 3), convention=rule)
    for structure, figures in small.items():
        del figures["specificity"], large[structure]["specificity"]  # there is more background
        assert large[structure] == pytest.approx(figures)


def test_an_unknown_rule_and_an_impossible_voxel_size_are_refused():
    good = np.zeros((4, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="brats2020, brats2023"):
        score_case(good, good, spacing_mm=MM, convention="brats2021")
    for side in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="voxel size"):
            score_case(good, good, spacing_mm=(1.0, side, 1.0), convention="brats2020")


def test_six_conventions_by_hand():
    # Patient 1, enhancing tumour along Z, reference | prediction by slice: empty | empty twice, 2 | 1 of these,
    # 2 | 2 others, empty | 1. Too small to be a lesion of 2023; the prediction in slice 4 touches it.
    shape = (4, 1, 5)
    truth, pred = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    truth[:2, 0, 2:4] = 3
    pred[0, 0, 2], pred[2:, 0, 3], pred[0, 0, 4] = 3, 3, 3
    # Patient 2: nothing to find in its one slice, nothing found.
    nothing = np.zeros((4, 1, 1), np.uint8)
    table = conventions_table([(pred, truth), (nothing, nothing)])
    first, whole = 2 * 1 / (1 + 2), 2 * 1 / (4 + 4)
    # Of the predicted components in slices 2, 3 and 4, those in 2 and 3 do not touch: one voxel of 1 + 4 fits.
    matched = 2 * 1 / (1 + 4)
    assert [row["ET"] for row in table.values()] == pytest.approx(
        [(1 + 1 + first + 0 + 0 + 1) / 6, (first + 0) / 2, whole, (whole + 1) / 2, (1 + 1) / 2, matched]
    )
    assert all(list(row) == ["WT", "TC", "ET"] for row in table.values())
    nothing = np.zeros((4, 4, 4), np.uint8)
    assert [row["ET"] for row in conventions_table([(nothing, nothing)]).values()] == [1, None, None, 1, 1, None]


def test_collected_scores_and_their_table(tmp_path):
    truth = tumour((16, 14, 12), 0)
    cases = {name: score_case(np.roll(truth, k, axis=0), truth, spacing_mm=MM, convention="brats2023-MET")
             for k, name in enumerate("BA")}  # fmt: skip
    found = collect(cases, convention="brats2023-MET", simulated=True, not_scored={"C": "missing"}, leakage=["B", "A"])
    assert found["convention"] == CONVENTIONS["brats2023-MET"] and found["rule"] == "brats2023-MET"
    assert list(found["cases"]) == found["leakage"] == ["A", "B"]
    assert found["summary"] == summarise(cases) and found["not_scored"] == {"C": "missing"}
    scoring.write_cases_csv(tmp_path / "cases.csv", found)
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [row["case"] for row in rows] == ["A", "B"]
    assert rows[0]["convention"] == "brats2023-MET" and rows[0]["simulated"] == "True"
    for structure, figures in found["cases"]["B"].items():
        assert {metric: float(rows[1][f"{structure}_{metric}"]) for metric in figures} == figures
