"""Expected values are derived by hand, or come from peers: medpy, MONAI, surface-distance and BraTS-evaluation."""

import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from brats_helpers.labels import DataError
from brats_helpers.scoring.rules import CONVENTIONS, RULES, region_dice, rule_for, task_of
from brats_helpers.scoring.scores import score_case
from tests.scoring.shapes import MM, PAIRS, blob, mask, tumour

SHARED = ("dice", "hd95_mm", "nsd_0.5mm", "nsd_1mm", "lesion_f1", "lesion_precision", "lesion_recall")


def score(rule, pred, truth, spacing_mm=MM):
    return RULES[rule].score(pred, truth, spacing_mm)


def values(rule, pred, truth, *names):
    figures = score(rule, pred, truth)
    return tuple(figures[name] for name in names)


# ---- Every rule


@pytest.mark.parametrize("rule", RULES)
def test_every_figure_is_finite_or_none(rule):
    empty = np.zeros((17, 13, 11), bool)
    dot = empty.copy()
    dot[16, 0, 10] = True
    masks = [empty, dot, ~empty, blob(empty.shape, 1, 1.5, 0.2), blob(empty.shape, 8, 0, 0.1)]
    for pred, truth in itertools.product(masks, repeat=2):
        figures = score(rule, pred, truth, (1, 2, 3))
        assert list(figures)[:4] == list(SHARED[:4]) and set(SHARED) <= set(figures)
        assert all(value is None or (isinstance(value, float) and math.isfinite(value)) for value in figures.values())
        assert rule.startswith("brats2026") or None not in figures.values()
        assert RULES[rule].dice(pred, truth, (1, 2, 3)) == figures["dice"]


@pytest.mark.parametrize("rule", RULES)
def test_a_perfect_prediction_scores_perfectly(rule):
    truth = mask((40, 20, 20), ((2, 2, 2), (6, 6, 6)), ((25, 5, 5), (5, 5, 5)))
    assert [score(rule, truth, truth)[name] for name in SHARED] == [1, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_region_dice_is_that_of_the_scores(rule):
    pred, truth = tumour((24, 22, 20), 1), tumour((24, 22, 20), 4)
    scores = score_case(pred, truth, spacing_mm=MM, convention=rule)
    expected = {region: scores[region]["dice"] for region in ("WT", "TC", "ET")}
    assert region_dice(pred, truth, convention=rule) == expected


@pytest.mark.parametrize(
    ("rule", "pred", "truth", "expected"),
    [
        ("brats2020", 0, 0, (1, 0, 1, 1, 1, 1, 1)),
        ("brats2020", 0, 1, (0, 373.12866, 0, 0, 0, 0, 0)),
        ("brats2020", 1, 0, (0, 373.12866, 0, 0, 0, 0, 0)),
        ("brats2023", 0, 0, (1, 0, 1, 1, 1, 1, 1)),
        ("brats2023", 0, 1, (0, 374, 0, 0, 0, 0, 0)),
        ("brats2023", 1, 0, (0, 374, 0, 0, 0, 0, 0)),
        ("brats2026", 0, 0, (None,) * 7),
        ("brats2026", 0, 1, (0, 373, 0, 0, 0, None, 0)),
        ("brats2026", 1, 0, (0, 373, 0, 0, 0, 0, None)),
        ("brats2026-MET", 0, 0, (None,) * 7),
        ("brats2026-MET", 0, 1, (0, 373, 0, 0, 0, None, 0)),
        ("brats2026-MET", 1, 0, (None, None, None, None, 0, 0, None)),
    ],
)
def test_empty_masks(rule, pred, truth, expected):
    cube = mask((10, 10, 10), ((3, 3, 3), (4, 4, 4)))
    assert values(rule, cube & bool(pred), cube & bool(truth), *SHARED) == expected


# ---- brats2020


def test_whole_region_by_hand():
    pred, truth = mask((5, 5, 5), ((2, 2, 1), (1, 1, 1))), mask((5, 5, 5), ((2, 2, 2), (1, 1, 1)))
    figures = score("brats2020", pred, truth, (1, 1, 2))  # two voxels 2 mm apart
    assert [figures[name] for name in SHARED] == [0, 2, 0, 0, 0, 0, 0]
    # Two rods, voxels 0-3 and 2-7: distances 0, 0, 1, 2 and 0, 0, 1, 2, 3, 4. The 95th percentile of these ten lies
    # at rank 0.95 * 9 = 8.55: 3 + 0.55.
    pred, truth = mask((9, 1, 1), ((0, 0, 0), (4, 1, 1))), mask((9, 1, 1), ((2, 0, 0), (6, 1, 1)))
    expected = (2 * 2 / 10, 3.55, 4 / 10, 6 / 10, 1, 1, 1)
    assert values("brats2020", pred, truth, *SHARED) == pytest.approx(expected)


@pytest.mark.parametrize("name", PAIRS)
def test_whole_region_agrees_with_medpy(name, medpy):
    pred, truth, spacing = PAIRS[name]
    figures = score("brats2020", pred, truth, spacing)
    expected = medpy.dc(pred, truth), medpy.hd95(pred, truth, voxelspacing=spacing)
    assert (figures["dice"], figures["hd95_mm"]) == pytest.approx(expected, abs=1e-9)


def test_no_peer_has_a_distance_for_an_empty_mask(medpy, monai):
    torch = pytest.importorskip("torch")
    cube = mask((10, 10, 10), ((3, 3, 3), (4, 4, 4)))
    for pred, truth in ((cube & False, cube & False), (cube & False, cube), (cube, cube & False)):
        p, t = (torch.tensor(each)[None, None] for each in (pred, truth))
        assert score("brats2020", pred, truth)["dice"] == monai.compute_dice(p, t, ignore_empty=False).item()
        with pytest.raises(RuntimeError, match="does not contain any binary object"):
            medpy.hd95(pred, truth)


# ---- brats2023


def test_dilated_lesions_by_hand():
    shape, cube = (60, 20, 20), (4, 4, 4)
    truth = mask(shape, ((2, 2, 2), cube), ((30, 2, 2), cube))
    pred = mask(shape, ((2, 2, 2), cube), ((55, 15, 15), (1, 1, 1)))
    # One lesion is hit exactly, one is missed, one is false: three terms.
    expected = (1 / 3, (0 + 374 + 374) / 3, 1 / 3, 1 / 3, 2 / (2 + 1 + 1), 1 / 2, 1 / 2)
    assert values("brats2023", pred, truth, *SHARED) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rule", "lesions", "smallest"), [("brats2023", 1, 51), ("brats2023-MEN", 2, 51), ("brats2023-MET", 2, 3)]
)
def test_tasks_differ_in_dilation_and_smallest_lesion(rule, lesions, smallest):
    # Two cubes 3 voxels apart: dilated once they stay apart, three times they become one lesion.
    first, second = ((2, 4, 4), (4, 4, 4)), ((9, 4, 4), (4, 4, 4))
    truth = mask((30, 12, 12), first, second)
    expected = 2 * 64 / (64 + 128) if lesions == 1 else 1 / 2
    assert RULES[rule].dice(mask(truth.shape, first), truth, MM) == pytest.approx(expected)
    for voxels in (smallest - 1, smallest):
        truth = mask((60, 9, 9), ((3, 4, 4), (voxels, 1, 1)))
        assert RULES[rule].dice(truth & False, truth, MM) == float(voxels < smallest)


@pytest.mark.parametrize(("rule", "dilations", "dropped"), [("brats2023", 3, 50), ("brats2023-MET", 1, 2)])
def test_dilated_lesions_agree_with_the_rules_spelled_out(rule, dilations, dropped, surface_distance):
    """The organisers' description, followed step by step, one lesion at a time, over the whole volume."""
    full, wide = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)
    seen = set()
    for seed in range(8):
        pred, truth = blob((40, 40, 30), seed, 2, 0.03), blob((40, 40, 30), seed + seed % 3, 2, 0.03)
        grown, count = ndimage.label(ndimage.binary_dilation(truth, wide, iterations=dilations), full)
        parts, found = ndimage.label(pred, full)
        touched, dice, hd95, nsd = set(), [], [], []
        for lesion in range(1, count + 1):
            reference = truth & (grown == lesion)
            zone = ndimage.binary_dilation(reference, wide, iterations=dilations)
            mine = set(np.unique(parts[zone])) - {0}
            touched |= mine
            if reference.sum() <= dropped:
                continue
            predicted = np.isin(parts, list(mine))
            dice.append(2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()))
            surfaces = surface_distance.compute_surface_distances(reference, predicted, MM)
            hd95.append(surface_distance.compute_robust_hausdorff(surfaces, 95) if mine else 374)
            nsd.append(surface_distance.compute_surface_dice_at_tolerance(surfaces, 1) if mine else 0)
        false = found - len(touched)
        terms = len(dice) + false
        seen |= {("lesions", len(dice) > 1), ("false", false > 0), ("dropped", count > len(dice))}
        expected = sum(dice) / terms, (sum(hd95) + 374 * false) / terms, sum(nsd) / terms
        assert values(rule, pred, truth, "dice", "hd95_mm", "nsd_1mm") == pytest.approx(expected, abs=1e-9)
    assert {("lesions", True), ("false", True)} <= seen and (("dropped", True) in seen or dropped == 2)


# ---- brats2026

LARGE, SMALL, FALSE = ((2, 2, 2), (5, 5, 5)), ((20, 2, 2), (4, 4, 4)), ((32, 10, 10), (3, 3, 3))
TINY = ((2, 2, 2), (2, 2, 2))
MATCHED = [
    # Reference, prediction; BraTS-evaluation 0.0.10 with panoptica 2.1.7, configuration GoAT, `seg`, label 3:
    # lesionwise_dsc_mean, lesionwise_hd95_mean, lesionwise_nsd_mean, all_instance_f1, _prec, _rec.
    ([LARGE, SMALL], [((3, 2, 2), (4, 5, 6)), FALSE], (0.8163265306122449, 1.0, 1.0, 0.5, 0.5, 0.5)),
    ([((2, 2, 2), (4, 4, 4))], [((30, 10, 10), (5, 5, 5))], (0.0, math.inf, 0.0, 0.0, 0.0, 0.0)),
    (
        [LARGE, SMALL],
        [((2, 2, 2), (22, 4, 4))],
        (0.33542976939203356, 16.0, 0.6141956782713085, 0.6666666666666666, 1.0, 0.5),
    ),
    (
        [LARGE, SMALL],
        [((2, 2, 2), (2, 5, 5)), ((5, 2, 2), (2, 5, 5))],
        (0.5714285714285714, 3.0, 0.7908163265306123, 0.5, 0.5, 0.5),
    ),
]
METASTASES = [
    # The same, configuration mets, `mets`, --vol_threshold 20 --overlap_threshold 0.1.
    ([TINY, SMALL], [TINY], (0.0, 373.0, 0.0, 0.6666666666666666, 1.0, 0.5)),
    (
        [TINY, SMALL],
        [((20, 2, 2), (4, 4, 3))],
        (0.8571428571428571, 1.0, 1.0, 0.6666666666666666, 1.0, 0.5),
    ),
    ([TINY], [TINY, ((30, 2, 2), (4, 4, 4))], (None, None, None, 0.6666666666666666, 0.5, 1.0)),
    ([((2, 2, 2), (5, 2, 2))], [], (0.0, 373.0, 0.0, 0.0, None, 0.0)),  # 20 voxels are large
    (
        [SMALL],
        [((20, 2, 2), (4, 4, 3)), ((35, 20, 18), (1, 1, 1))],
        (0.42857142857142855, 187.0, 0.5, 0.6666666666666666, 0.5, 1.0),
    ),
]


@pytest.mark.parametrize(
    ("rule", "truth", "pred", "expected"),
    [("brats2026", *case) for case in MATCHED] + [("brats2026-MET", *case) for case in METASTASES],
)
def test_matched_lesions_agree_with_the_organisers_package(rule, truth, pred, expected):
    shape = (40, 24, 20)
    names = ("dice", "hd95_mm", "nsd", "lesion_f1", "lesion_precision", "lesion_recall")
    found = values(rule, mask(shape, *pred), mask(shape, *truth), *names)
    assert [value is None for value in found] == [value is None for value in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is None or ours == pytest.approx(373 if theirs == math.inf else theirs, abs=1e-9)


def test_misses_do_not_lower_the_matched_lesions_dice():
    truth = mask((40, 24, 20), LARGE, SMALL)
    pred = mask((40, 24, 20), LARGE, FALSE)
    assert values("brats2026", pred, truth, "dice", "lesion_f1") == (1, 0.5)
    assert values("brats2023", pred, truth, "dice", "lesion_f1") == (pytest.approx(1 / 3), 0.5)


def test_the_tolerance_of_2026_is_the_smallest_side_of_a_voxel():
    truth = mask((20, 20, 20), ((4, 4, 4), (8, 8, 8)))
    pred = np.roll(truth, 1, axis=0)
    near, far = (score("brats2026", pred, truth, (side, 1.0, 3.0)) for side in (0.4, 1.5))
    assert near["nsd"] == 1 and far["nsd"] < 1 and far["nsd_1mm"] == far["nsd"]
    assert near["nsd_0.5mm"] == 1


def test_volume_decides_what_a_large_metastasis_is():
    truth = mask((20, 20, 20), ((4, 4, 4), (4, 4, 4)))  # 64 voxels
    assert score("brats2026-MET", truth & False, truth, (0.5, 0.5, 0.5))["dice"] is None  # 8 mm³
    assert score("brats2026-MET", truth & False, truth, (0.7, 0.7, 0.7))["dice"] == 0  # 22 mm³


# ---- Choosing a rule


@pytest.mark.parametrize(
    ("convention", "task", "cases", "expected"),
    [
        ("brats2020", None, ["BraTS-MET-00001-000"], "brats2020"),
        ("brats2023", None, [], "brats2023"),
        ("brats2023", None, ["BraTS20_Training_001"], "brats2023"),
        ("brats2023", None, ["BraTS-GLI-00001-000", "BraTS-SSA-00002-000", "BraTS-PED-00003-000"], "brats2023"),
        ("brats2023", None, ["BraTS-MEN-00001-000"], "brats2023-MEN"),
        ("brats2023", None, ["BraTS-MET-00001-000", "somebody"], "brats2023-MET"),
        ("brats2023", "GLI", ["BraTS-MET-00001-000"], "brats2023"),
        ("brats2023", "MET", [], "brats2023-MET"),
        ("brats2026", None, ["BraTS-MEN-00001-000"], "brats2026"),
        ("brats2026", None, ["BraTS-MET-00001-000"], "brats2026-MET"),
        ("brats2023-MEN", None, ["BraTS-MET-00001-000"], "brats2023-MEN"),
    ],
)
def test_the_task_or_the_names_choose_the_rule(convention, task, cases, expected):
    assert rule_for(convention, task=task, cases=cases).name == expected


def test_names_of_several_tasks_need_a_choice():
    cases = ["BraTS-MET-00001-000", "BraTS-GLI-00001-000"]
    with pytest.raises(DataError, match="belong to GLI and MET, .* brats2023 and brats2023-MET.*--task"):
        rule_for("brats2023", cases=cases)
    assert rule_for("brats2020", cases=cases).name == "brats2020"
    with pytest.raises(ValueError, match="task 'XYZ': expected one of GLI"):
        rule_for("brats2023", task="XYZ")
    with pytest.raises(ValueError, match="brats2020, brats2023"):
        rule_for("brats2032")


def test_task_of_a_name():
    assert task_of("BraTS-MET-00217-000") == task_of("brats_met_7") == "MET"
    assert task_of("BraTS-METRIC-1") is task_of("BraTS20_Training_001") is task_of("MET-00217") is None


def test_lines_state_the_rule():
    assert all(line.startswith(f"{name}: ") for name, line in CONVENTIONS.items())
    assert "373.12866 mm" in CONVENTIONS["brats2020"]
    assert "GLI, SSA and PED; the reference is dilated 3 times" in CONVENTIONS["brats2023"]
    assert "50 voxels or fewer" in CONVENTIONS["brats2023"]
    assert "for MET; the reference is dilated once" in CONVENTIONS["brats2023-MET"]
    assert "2 voxels or fewer" in CONVENTIONS["brats2023-MET"]
