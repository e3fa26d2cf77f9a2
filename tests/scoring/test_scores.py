"""Expected values are derived by hand, by brute force in the test, or by medpy, MONAI and surface-distance."""

import csv
import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brats_helpers.evaluation.folders import score_folders
from brats_helpers.files import write_json
from brats_helpers.labels import DataError, classes_to_labels
from brats_helpers.scoring import overlap, statistics, surface
from brats_helpers.scoring import scores as metrics
from brats_helpers.scoring.rules import brats2020, brats2023, region_dice
from brats_helpers.scoring.scores import score_case
from brats_helpers.scoring.surface import edge_distances, hd95_by_area

MM = (1.0, 1.0, 1.0)


def mask(shape, *boxes):
    """True in `boxes`, each given as (first corner, size)."""
    out = np.zeros(shape, bool)
    for corner, size in boxes:
        out[tuple(slice(at, at + side) for at, side in zip(corner, size, strict=True))] = True
    return out


def blob(shape, seed, smooth, share):
    """A random smooth mask that covers `share` of the volume."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    return noise > np.quantile(noise, 1 - share)


def tumour(shape, seed):
    """A random map of all four classes, uint8."""
    whole, core, enhancing = (blob(shape, seed + i, 1.5, share) for i, share in enumerate((0.3, 0.2, 0.1)))
    return (2 * whole - (whole & core) + 2 * (whole & core & enhancing)).astype(np.uint8)


PAIRS = {
    "random": (blob((17, 13, 11), 1, 0, 0.4), blob((17, 13, 11), 2, 0, 0.4), MM),
    "smooth": (blob((30, 26, 22), 3, 3, 0.2), blob((30, 26, 22), 4, 3, 0.2), MM),
    "anisotropic": (blob((20, 20, 9), 5, 1, 0.1), blob((20, 20, 9), 6, 1, 0.2), (0.9, 1.1, 5.0)),
    "touching": (mask((12, 9, 9), ((1, 1, 1), (4, 5, 6))), mask((12, 9, 9), ((5, 1, 1), (4, 5, 6))), MM),
    "inside": (mask((20, 20, 20), ((1, 1, 1), (17, 17, 17))), mask((20, 20, 20), ((8, 8, 8), (3, 3, 3))), MM),
    "one voxel": (mask((9, 9, 9), ((4, 4, 4), (1, 1, 1))), mask((9, 9, 9), ((0, 8, 3), (1, 1, 1))), MM),
    "far apart": (mask((60, 50, 9), ((0, 0, 0), (3, 3, 3))), mask((60, 50, 9), ((55, 44, 3), (5, 5, 5))), (1, 2, 1)),
    "whole volume": (np.ones((5, 6, 7), bool), mask((5, 6, 7), ((0, 2, 3), (2, 2, 4))), MM),
    "equal": (blob((15, 15, 15), 7, 2, 0.2), blob((15, 15, 15), 7, 2, 0.2), MM),
}
every_pair = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture(scope="module")
def full_size():
    """Two boolean masks of BraTS size."""
    small = [blob((60, 60, 39), seed, 5, 0.04) for seed in (11, 12)]
    shifted = [small[0], small[0] & ~small[1] | np.roll(small[0], 1, axis=0)]
    return [np.kron(each, np.ones((4, 4, 4), bool))[:, :, :155] for each in shifted]


@pytest.fixture
def surface_distance(monkeypatch):
    """google-deepmind/surface-distance 0.1, which needs a name that numpy 2 dropped."""
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    return pytest.importorskip("surface_distance", reason="surface-distance is not installed: no second opinion")


# ---- One pair of masks


def test_two_voxels_two_mm_apart():
    pred = mask((5, 5, 5), ((2, 2, 1), (1, 1, 1)))
    truth = mask((5, 5, 5), ((2, 2, 2), (1, 1, 1)))
    assert brats2020(pred, truth, (1, 1, 2)) == (0.0, 2.0)
    assert hd95_by_area(pred, truth, (1, 1, 2)) == 2.0


def test_dice_and_distances_of_two_rods():
    # Voxels 0-3 and 2-7 of a line: 2 shared of 4 + 6. All are edge voxels. Their distances to the other rod are
    # 2, 1, 0, 0 and 0, 0, 1, 2, 3, 4; the 95th percentile of these ten lies at rank 0.95 * 9 = 8.55: 3 + 0.55.
    pred, truth = mask((9, 1, 1), ((0, 0, 0), (4, 1, 1))), mask((9, 1, 1), ((2, 0, 0), (6, 1, 1)))
    assert [sorted(d) for d in edge_distances(pred, truth, MM)] == [[0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert brats2020(pred, truth, MM) == pytest.approx((2 * 2 / 10, 3.55))


def test_edges_leave_out_the_inside():
    cube, shifted = mask((9, 9, 9), ((1, 1, 1), (5, 5, 5))), mask((9, 9, 9), ((2, 1, 1), (5, 5, 5)))
    there, back = edge_distances(cube, shifted, MM)
    assert there.size == back.size == 5**3 - 3**3


@every_pair
def test_edge_distances_equal_brute_force(name):
    pred, truth, spacing = PAIRS[name]

    def edge_points(solid):
        around = np.pad(solid, 1)
        neighbours = (np.roll(around, step, axis)[1:-1, 1:-1, 1:-1] for axis in range(3) for step in (-1, 1))
        return np.argwhere(solid & ~np.logical_and.reduce(list(neighbours))) * spacing

    apart = np.linalg.norm(edge_points(pred)[:, None] - edge_points(truth)[None], axis=-1)
    there, back = edge_distances(pred, truth, spacing)
    np.testing.assert_allclose(there, apart.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(back, apart.min(axis=0), atol=1e-12)
    both = np.concatenate((apart.min(axis=1), apart.min(axis=0)))
    assert brats2020(pred, truth, spacing)[1] == pytest.approx(np.percentile(both, 95), abs=1e-12)


@every_pair
def test_agrees_with_medpy(name):
    binary = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: no second opinion")
    pred, truth, spacing = PAIRS[name]
    expected = binary.dc(pred, truth), binary.hd95(pred, truth, voxelspacing=spacing)
    assert brats2020(pred, truth, spacing) == pytest.approx(expected, abs=1e-9)


@every_pair
def test_agrees_with_monai(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: no second opinion")
    monai = pytest.importorskip("monai.metrics", reason="monai is not installed: no second opinion")
    pred, truth, spacing = PAIRS[name]
    p, t = (torch.tensor(each)[None, None] for each in (pred, truth))
    larger = max(np.percentile(distances, 95) for distances in edge_distances(pred, truth, spacing))
    expected = monai.compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(spacing))
    assert larger == pytest.approx(expected.item(), abs=1e-4)
    assert brats2020(pred, truth, spacing)[0] == pytest.approx(monai.compute_dice(p, t).item(), abs=1e-6)


@every_pair
def test_agrees_with_surface_distance(name, surface_distance):
    pred, truth, spacing = PAIRS[name]
    distances = surface_distance.compute_surface_distances(truth, pred, spacing)
    expected = surface_distance.compute_robust_hausdorff(distances, 95)
    assert hd95_by_area(pred, truth, spacing) == pytest.approx(expected, abs=1e-9)


def test_full_size_agrees_with_medpy(full_size):
    binary = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: no second opinion")
    pred, truth = full_size
    expected = binary.dc(pred, truth), binary.hd95(pred, truth, voxelspacing=MM)
    assert brats2020(pred, truth, MM) == pytest.approx(expected, abs=1e-9)


def test_full_size_agrees_with_monai_and_surface_distance(full_size, surface_distance):
    torch = pytest.importorskip("torch", reason="torch is not installed: no second opinion")
    monai = pytest.importorskip("monai.metrics", reason="monai is not installed: no second opinion")
    pred, truth = full_size
    p, t = (torch.tensor(each)[None, None] for each in full_size)
    larger = max(np.percentile(distances, 95) for distances in edge_distances(pred, truth, MM))
    expected = monai.compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(MM))
    assert larger == pytest.approx(expected.item(), abs=1e-4)
    distances = surface_distance.compute_surface_distances(truth, pred, MM)
    assert hd95_by_area(pred, truth, MM) == surface_distance.compute_robust_hausdorff(distances, 95)


def test_surface_area_of_a_box():
    # A box of 3 x 4 x 5 voxels, its surface half a voxel inwards: sides of 2 x 3, 2 x 4 and 3 x 4 mm twice, edges
    # (2 + 3 + 4 mm, four times) cut by a strip sqrt(1/2) wide, 8 corners by a triangle of sqrt(1/2) mm a side.
    codes = surface._corner_codes(mask((9, 9, 9), ((2, 2, 2), (3, 4, 5))))
    expected = 2 * (6 + 8 + 12) + 4 * 9 * math.sqrt(1 / 2) + 8 * math.sqrt(3) / 8
    assert surface._surface_areas(MM)[codes].sum() == pytest.approx(expected)


def test_surface_areas_agree_with_surface_distance(surface_distance):
    tables = pytest.importorskip("surface_distance.lookup_tables")
    weights = [int(tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL[at]) for at in itertools.product((0, 1), repeat=3)]
    theirs = [sum(weight for bit, weight in enumerate(weights) if code >> bit & 1) for code in range(256)]
    for spacing in (MM, (0.7, 1.3, 5.0)):
        expected = tables.create_table_neighbour_code_to_surface_area(spacing)[theirs]
        np.testing.assert_allclose(surface._surface_areas(spacing), expected, atol=1e-12)


# ---- Empty masks


@pytest.mark.parametrize(
    ("pred", "truth", "convention", "expected"),
    [
        (0, 0, "brats2020", (1, 0, 1, 1)),
        (0, 1, "brats2020", (0, 373.13, 0, 1)),
        (1, 0, "brats2020", (0, 373.13, 0, 1 - 64 / 1000)),
        (0, 0, "brats2023", (1, 0, 1, 1)),
        (0, 1, "brats2023", (0, 374, 0, 1)),
        (1, 0, "brats2023", (0, 374, 0, 1 - 64 / 1000)),
    ],
)
def test_empty_masks(pred, truth, convention, expected):
    cube = mask((10, 10, 10), ((3, 3, 3), (4, 4, 4))).astype(np.uint8)
    scores = score_case(3 * pred * cube, 3 * truth * cube, spacing_mm=MM, convention=convention)
    for structure in ("WT", "TC", "ET"):
        figures = scores[structure]
        assert (
            figures["dice"], figures["hd95_mm"], figures["sensitivity"], figures["specificity"]
        ) == pytest.approx(expected)  # fmt: skip
    assert (scores["NCR"]["dice"], scores["NCR"]["hd95_mm"]) == (1, 0)


@pytest.mark.parametrize(("pred", "truth"), [(False, False), (False, True), (True, False)])
def test_empty_masks_at_the_peers(pred, truth, surface_distance):
    """Dice is MONAI's where it is told not to skip them, and medpy's for one empty; no peer has a distance to give."""
    torch = pytest.importorskip("torch", reason="torch is not installed: no second opinion")
    monai = pytest.importorskip("monai.metrics", reason="monai is not installed: no second opinion")
    binary = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: no second opinion")
    cube = mask((10, 10, 10), ((3, 3, 3), (4, 4, 4)))
    pred, truth = cube & pred, cube & truth
    dice, hd95 = brats2020(pred, truth, MM)
    p, t = (torch.tensor(each)[None, None] for each in (pred, truth))
    assert dice == monai.compute_dice(p, t, ignore_empty=False).item()
    if pred.any() or truth.any():
        assert dice == binary.dc(pred, truth)
    with pytest.raises(RuntimeError, match="does not contain any binary object"):
        binary.hd95(pred, truth)
    theirs = monai.compute_hausdorff_distance(p, t, include_background=True, percentile=95).item()
    distances = surface_distance.compute_surface_distances(truth, pred, MM)
    assert math.isfinite(hd95)
    assert not math.isfinite(theirs) and not math.isfinite(surface_distance.compute_robust_hausdorff(distances, 95))


def test_region_dice_is_that_of_the_scores():
    pred, truth = tumour((24, 22, 20), 1), tumour((24, 22, 20), 4)
    for convention in metrics.CONVENTIONS:
        scores = score_case(pred, truth, spacing_mm=MM, convention=convention)
        expected = {region: scores[region]["dice"] for region in ("WT", "TC", "ET")}
        assert region_dice(pred, truth, convention=convention) == expected


def test_a_full_volume_has_no_negatives():
    full = np.full((3, 3, 3), 2, np.uint8)
    assert score_case(full, full, spacing_mm=MM, convention="brats2020")["WT"]["specificity"] == 1
    assert score_case(0 * full, full, spacing_mm=MM, convention="brats2020")["WT"]["specificity"] == 0


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_every_figure_is_finite(convention):
    empty = np.zeros((17, 13, 11), np.uint8)
    dot = empty.copy()
    dot[16, 0, 10] = 1
    masks = [empty, dot, np.full_like(empty, 3), tumour(empty.shape, 1), tumour(empty.shape, 8)]
    for pred, truth in itertools.product(masks, repeat=2):
        scores = score_case(pred, truth, spacing_mm=(1, 2, 3), convention=convention)
        figures = [value for figures in scores.values() for value in figures.values()]
        assert all(isinstance(value, float) and math.isfinite(value) for value in figures)
    summary = metrics.summarise({"a": scores, "b": scores})
    json.dumps(summary, allow_nan=False)


# ---- One patient


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


def test_the_box_changes_nothing():
    pred, truth = tumour((20, 18, 16), 1), tumour((20, 18, 16), 4)
    padded = [np.asfortranarray(np.pad(each, 9)) for each in (pred, truth)]
    for convention in metrics.CONVENTIONS:
        small = score_case(pred, truth, spacing_mm=(1, 2, 3), convention=convention)
        large = score_case(padded[0], np.ascontiguousarray(padded[1]), spacing_mm=(1, 2, 3), convention=convention)
        for structure, figures in small.items():
            del figures["specificity"], large[structure]["specificity"]  # there is more background
            assert large[structure] == pytest.approx(figures)


@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_a_wrong_reference_is_scored_as_wrong(convention):
    truth = tumour((30, 30, 20), 3)
    pred = truth.copy()
    pred[:2] = 0
    right = score_case(pred, truth, spacing_mm=MM, convention=convention)
    swapped = score_case(pred, np.array([0, 2, 1, 3], np.uint8)[truth], spacing_mm=MM, convention=convention)
    shifted = score_case(pred, np.roll(truth, 1, axis=2), spacing_mm=MM, convention=convention)
    for structure in ("TC", "NCR", "ED"):
        assert swapped[structure]["dice"] < right[structure]["dice"] - 0.1
    for structure in metrics.STRUCTURES:
        assert shifted[structure]["dice"] < right[structure]["dice"] - 0.05


def test_unfit_masks_are_refused():
    good = np.zeros((4, 4, 4), np.uint8)
    for bad, message in [
        (good[:3], "shape"),
        (good.astype(float), "uint8"),
        (good + np.uint8(4), "class 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            score_case(bad, good, spacing_mm=MM, convention="brats2020")
    with pytest.raises(ValueError, match="brats2020, brats2023"):
        score_case(good, good, spacing_mm=MM, convention="brats2021")


# ---- Lesion-wise


def test_lesions_by_hand():
    shape, cube = (60, 20, 20), (4, 4, 4)
    truth = mask(shape, ((2, 2, 2), cube), ((30, 2, 2), cube))
    pred = mask(shape, ((2, 2, 2), cube), ((55, 15, 15), (1, 1, 1)))
    # One lesion hit exactly, one missed, one false: three terms.
    assert brats2023(pred, truth, MM) == pytest.approx((1 / 3, (0 + 374 + 374) / 3))


@pytest.mark.parametrize(("voxels", "expected"), [(50, (1, 0)), (51, (0, 374))])
def test_reference_lesions_of_50_voxels_do_not_count(voxels, expected):
    truth = mask((60, 9, 9), ((3, 4, 4), (voxels, 1, 1)))
    assert brats2023(np.zeros_like(truth), truth, MM) == expected
    if voxels == 50:  # what lies on a dropped lesion is no false lesion
        assert brats2023(mask(truth.shape, ((10, 4, 4), (2, 1, 1))), truth, MM) == (1, 0)


@pytest.mark.parametrize(("gap", "lesions"), [(6, 1), (7, 2)])
def test_reference_lesions_that_nearly_touch_are_one(gap, lesions):
    # Each grows by 3 voxels, so a gap of 6 closes, and one of 7 leaves a voxel between.
    first, second = ((2, 4, 4), (4, 4, 4)), ((6 + gap, 4, 4), (4, 4, 4))
    truth = mask((30, 12, 12), first, second)
    expected = 2 * 64 / (64 + 128) if lesions == 1 else 1 / 2
    assert brats2023(mask(truth.shape, first), truth, MM)[0] == pytest.approx(expected)


@pytest.mark.parametrize(("away", "false"), [(3, 0), (4, 1)])
def test_a_prediction_beside_a_lesion_belongs_to_it(away, false):
    # The lesion ends at voxel 7. A voxel up to 3 farther lies in its dilation; one 4 farther is a lesion of its own.
    cube = ((4, 4, 4), (4, 4, 4))
    truth = mask((30, 12, 12), cube)
    pred = mask(truth.shape, cube, ((7 + away, 4, 4), (1, 1, 1)))
    assert brats2023(pred, truth, MM)[0] == pytest.approx(1 / 2 if false else 2 * 64 / (64 + 65))


def test_lesions_agree_with_the_rules_spelled_out(surface_distance):
    """The organisers' description, followed step by step, one lesion at a time, over the whole volume."""
    full, wide = np.ones((3, 3, 3)), ndimage.generate_binary_structure(3, 2)
    seen = set()
    for seed in range(8):
        pred, truth = blob((40, 40, 30), seed, 2, 0.03), blob((40, 40, 30), seed + seed % 3, 2, 0.03)
        grown, count = ndimage.label(ndimage.binary_dilation(truth, wide, iterations=3), full)
        parts, found = ndimage.label(pred, full)
        touched, dice, hd95 = set(), [], []
        for lesion in range(1, count + 1):
            reference = truth & (grown == lesion)
            zone = ndimage.binary_dilation(reference, wide, iterations=3)
            mine = set(np.unique(parts[zone])) - {0}
            touched |= mine
            if reference.sum() <= 50:
                continue
            predicted = np.isin(parts, list(mine))
            dice.append(2 * (predicted & reference).sum() / (predicted.sum() + reference.sum()))
            surfaces = surface_distance.compute_surface_distances(reference, predicted, MM)
            hd95.append(surface_distance.compute_robust_hausdorff(surfaces, 95) if mine else 374)
        false = found - len(touched)
        terms = len(dice) + false
        seen |= {("lesions", len(dice) > 1), ("false", false > 0), ("dropped", count > len(dice))}
        expected = sum(dice) / terms, (sum(hd95) + 374 * false) / terms
        assert brats2023(pred, truth, MM) == pytest.approx(expected, abs=1e-9)
    assert {("lesions", True), ("false", True), ("dropped", True)} <= seen


# ---- Over patients


def one_metric(values):
    return {f"case{i}": {"WT": {"dice": value}} for i, value in enumerate(values)}


def test_summary_by_hand():
    # Of the 27 ways to draw three of three, one gives the mean 0.5 and one 0.9: 3.7 % each, further out than any tail.
    expected = {"mean": 0.7, "median": 0.7, "std": 0.2, "q1": 0.6, "q3": 0.8, "n": 3}
    summary = metrics.summarise(one_metric([0.9, 0.5, 0.7]))["WT"]["dice"]
    assert summary.pop("ci95") == pytest.approx([0.5, 0.9])
    assert summary == pytest.approx(expected)


def test_interval_of_many_patients_is_the_normal_one():
    values = np.random.default_rng(3).normal(0.8, 0.1, 400)
    low, high = metrics.summarise(one_metric(values.tolist()))["WT"]["dice"]["ci95"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


@pytest.mark.parametrize("patients", [6, 12])
def test_interval_of_few_patients_holds_the_mean_as_often_as_it_says(patients):
    values = np.random.default_rng(4).normal(0.8, 0.1, (patients, 4000))
    cases = {f"case{k}": {"WT": dict(enumerate(row))} for k, row in enumerate(values.tolist())}
    intervals = np.array([row["ci95"] for row in metrics.summarise(cases)["WT"].values()])
    held = np.mean((intervals[:, 0] <= 0.8) & (intervals[:, 1] >= 0.8))
    assert 0.935 < held < 0.965  # plain percentiles: 0.87 of six, 0.91 of twelve


def test_summary_of_few_patients():
    assert metrics.summarise({}) == {}
    alone = metrics.summarise(one_metric([0.6]))["WT"]["dice"]
    assert alone == {"mean": 0.6, "median": 0.6, "std": 0, "q1": 0.6, "q3": 0.6, "ci95": [0.6, 0.6], "n": 1}


def test_summary_does_not_depend_on_the_order():
    cases = one_metric([0.1, 0.5, 0.9, 0.4])
    assert metrics.summarise(dict(reversed(cases.items()))) == metrics.summarise(cases)


def collected(cases, convention="brats2020"):
    return metrics.collect(cases, convention=convention, simulated=False, not_scored={}, leakage=[])


def test_compare_by_hand():
    a, b = one_metric([0.5, 0.6, 0.7]), one_metric([0.6, 0.8, 1.0])
    a["only in a"], b["only in b"] = a["case0"], b["case0"]
    result = statistics.compare(collected(a), collected(b))
    assert (result["n"], result["only_a"], result["only_b"]) == (3, ["only in a"], ["only in b"])
    assert result["convention"] == metrics.CONVENTIONS["brats2020"]
    # Differences 0.1, 0.2, 0.3: paired, so far narrower than the runs' own intervals.
    assert result["differences"]["WT"]["dice"]["mean_difference"] == pytest.approx(0.2)
    assert result["differences"]["WT"]["dice"]["ci95"] == pytest.approx([0.1, 0.3])


def test_compare_refuses_what_cannot_be_compared():
    a = one_metric([0.5])
    with pytest.raises(DataError, match="different rules"):
        statistics.compare(collected(a), collected(a, "brats2023"))
    with pytest.raises(DataError, match="in common"):
        statistics.compare(collected(a), collected({"other": a["case0"]}))


def test_five_conventions_by_hand():
    # Patient 1, enhancing tumour along Z, reference | prediction by slice: empty | empty twice, 2 | 1 of these,
    # 2 | 2 others, empty | 1. Too small to be a lesion; the prediction in slice 4 touches it.
    shape = (4, 1, 5)
    truth, pred = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    truth[:2, 0, 2:4] = 3
    pred[0, 0, 2], pred[2:, 0, 3], pred[0, 0, 4] = 3, 3, 3
    # Patient 2: nothing to find in its one slice, nothing found.
    nothing = np.zeros((4, 1, 1), np.uint8)
    table = metrics.conventions_table([(pred, truth), (nothing, nothing)])
    first, whole = 2 * 1 / (1 + 2), 2 * 1 / (4 + 4)
    assert [row["ET"] for row in table.values()] == pytest.approx(
        [(1 + 1 + first + 0 + 0 + 1) / 6, (first + 0) / 2, whole, (whole + 1) / 2, (1 + 1) / 2]
    )
    assert all(list(row) == ["WT", "TC", "ET"] for row in table.values())


def test_five_conventions_without_any_tumour():
    nothing = np.zeros((4, 4, 4), np.uint8)
    assert [row["ET"] for row in metrics.conventions_table([(nothing, nothing)]).values()] == [1, None, None, 1, 1]


# ---- Folders


AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def put(path, classes, numbering="2020", affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(classes_to_labels(classes, numbering), affine), path)


@pytest.fixture
def folders(tmp_path):
    """Patients A and B as BraTS has them, with FLAIR only, and the predictions of both, each one patch too small."""
    for seed, case in enumerate("AB"):
        truth = tumour((16, 14, 12), seed)
        put(tmp_path / f"truth/{case}/{case}_flair.nii.gz", truth)
        put(tmp_path / f"truth/{case}/{case}_seg.nii.gz", truth)
        pred = truth.copy()
        pred[:5] = 0
        put(tmp_path / f"pred/{case}_seg.nii.gz", pred)
    return tmp_path / "pred", tmp_path / "truth"


def score(pred_dir, truth_dir, convention="brats2020"):
    return score_folders(pred_dir, truth_dir, convention=convention, simulated=True, allow_leakage=False)


def test_score_folders(folders):
    result = score(*folders)
    assert list(result) == ["convention", "simulated", "cases", "summary", "not_scored", "leakage"]
    assert (result["convention"], result["simulated"]) == (metrics.CONVENTIONS["brats2020"], True)
    assert list(result["cases"]) == ["A", "B"] and result["not_scored"] == {}
    truth = tumour((16, 14, 12), 0)
    pred = truth.copy()
    pred[:5] = 0
    assert result["cases"]["A"] == score_case(pred, truth, spacing_mm=MM, convention="brats2020")
    assert result["summary"] == metrics.summarise(result["cases"])
    assert 0 < result["summary"]["ET"]["dice"]["mean"] < 1


def test_any_numbering_and_any_layout_give_the_same_figures(folders, tmp_path):
    pred_dir, truth_dir = folders
    expected = score(pred_dir, truth_dir)
    for seed, case in enumerate("AB"):
        truth = tumour((16, 14, 12), seed)
        pred = truth.copy()
        pred[:5] = 0
        put(tmp_path / f"theirs/{case}.nii", pred, "2023")
        put(tmp_path / f"nested/{case}/{case}-seg.nii.gz", pred, "2023")
        put(tmp_path / f"flat/{case}_seg.nii", truth, "2023")
        put(tmp_path / f"bare/{case}.nii.gz", truth)
    for preds, truths in itertools.product(("pred", "theirs", "nested"), ("truth", "flat", "bare")):
        assert score(tmp_path / preds, tmp_path / truths) == expected


def test_what_cannot_be_scored_is_reported(folders):
    pred_dir, truth_dir = folders
    classes = tumour((16, 14, 12), 0)
    flipped = AFFINE * [[-1], [1], [1], [1]]
    for case in ("flipped", "cut", "torn", "odd", "no_answer"):
        put(truth_dir / case / f"{case}_seg.nii.gz", classes)
    put(truth_dir / "unlabelled" / "unlabelled_flair.nii.gz", classes)
    put(pred_dir / "flipped_seg.nii.gz", classes, affine=flipped)
    put(pred_dir / "cut_seg.nii.gz", classes[:-1])
    put(pred_dir / "unlabelled_seg.nii.gz", classes)
    put(pred_dir / "stranger_seg.nii.gz", classes)
    nib.save(nib.Nifti1Image(classes.astype(np.float32) / 2, AFFINE), pred_dir / "odd_seg.nii.gz")
    whole = (pred_dir / "A_seg.nii.gz").read_bytes()
    (pred_dir / "torn_seg.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["A", "B"]
    reasons = result["not_scored"]
    assert "torn_seg.nii.gz is truncated" in reasons.pop("torn")
    assert "odd_seg.nii.gz: fractional" in reasons.pop("odd")
    assert "(15, 14, 12)" in reasons["cut"] and "(16, 14, 12)" in reasons["cut"]
    assert {case: reason.split(":")[0] for case, reason in reasons.items()} == {
        "cut": "misaligned",
        "flipped": "misaligned",
        "no_answer": "missing",
        "stranger": "extra",
        "unlabelled": "unlabelled",
    }


def test_a_rounded_affine_is_no_misalignment_and_one_that_is_off_in_a_corner_is(folders):
    pred_dir, truth_dir = folders
    put(pred_dir / "A_seg.nii.gz", tumour((16, 14, 12), 0), affine=AFFINE + 1e-5)
    assert score(pred_dir, truth_dir)["cases"]["A"]["WT"]["dice"] == 1
    put(pred_dir / "A_seg.nii.gz", tumour((16, 14, 12), 0), affine=AFFINE + [[0, 0, 0, 0.01], *np.zeros((3, 4))])
    assert score(pred_dir, truth_dir)["not_scored"]["A"].startswith("misaligned")
    long = np.zeros((120, 4, 4), np.uint8)
    put(truth_dir / "long_seg.nii.gz", long)
    put(pred_dir / "long_seg.nii.gz", long, affine=AFFINE * [1.0009, 1, 1, 1])  # 0.1 mm at the far end
    assert score(pred_dir, truth_dir)["not_scored"]["long"].startswith("misaligned")


def test_a_prediction_is_found_whatever_lies_beside_it(folders):
    pred_dir, truth_dir = folders
    (pred_dir / "B_seg.nii.gz").rename(pred_dir / "B.nii.gz")  # A is still called A_seg
    put(pred_dir / "soft" / "A_soft.nii.gz", tumour((16, 14, 12), 0))
    put(pred_dir / "C" / "C_flair.nii.gz", tumour((16, 14, 12), 0))
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["A", "B"] and result["not_scored"] == {}
    (pred_dir / "A.nii.gz").write_bytes((pred_dir / "A_seg.nii.gz").read_bytes())
    assert list(score(pred_dir, truth_dir)["cases"]) == ["A", "B"]  # a copy counts once
    put(pred_dir / "A.nii.gz", tumour((16, 14, 12), 1))
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["B"]
    assert result["not_scored"] == {
        "A": "Two label maps that differ, A_seg.nii.gz and A.nii.gz; keep one of them.",
    }


def test_spacing_comes_from_the_file(tmp_path):
    for name, at in (("pred", 1), ("truth", 2)):
        classes = np.zeros((3, 3, 5), np.uint8)
        classes[1, 1, at] = 3
        put(tmp_path / name / "A_seg.nii.gz", classes, affine=np.diag([1.0, 1, 2, 1]))
    assert score(tmp_path / "pred", tmp_path / "truth")["cases"]["A"]["ET"]["hd95_mm"] == 2


def test_a_folder_without_label_maps_is_an_error(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No segmentation below"):
        score(tmp_path / "empty", folders[1])
    with pytest.raises(DataError, match="is no folder"):
        score(tmp_path / "nowhere", folders[1])


def test_files(folders, tmp_path):
    result = score(*folders)
    write_json(tmp_path / "metrics.json", result)
    metrics.write_cases_csv(tmp_path / "cases.csv", result)
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    rows = list(csv.DictReader((tmp_path / "cases.csv").open()))
    assert [row["case"] for row in rows] == ["A", "B"]
    assert rows[0]["convention"] == "brats2020" and rows[0]["simulated"] == "True"
    for structure, figures in result["cases"]["B"].items():
        for metric, value in figures.items():
            assert float(rows[1][f"{structure}_{metric}"]) == value


def test_lines_start_with_the_name():
    assert all(line.startswith(f"{name}: ") for name, line in metrics.CONVENTIONS.items())


def test_dice_from_a_confusion_table_is_that_of_the_masks():
    random = np.random.default_rng(0)
    pred, truth = random.integers(0, 4, (2, 6, 7, 8)).astype(np.uint8)
    table = np.bincount(4 * truth.ravel() + pred.ravel(), minlength=16).reshape(4, 4)
    scores = score_case(pred, truth, spacing_mm=(1, 1, 1), convention="brats2020")
    assert overlap.dice_scores(table) == pytest.approx({name: scores[name]["dice"] for name in scores})
    empty = np.diag([10, 0, 3, 0])  # no NCR, no ET, and none predicted
    assert overlap.dice_scores(empty) == {"WT": 1, "TC": 1, "ET": 1, "NCR": 1, "ED": 1}
