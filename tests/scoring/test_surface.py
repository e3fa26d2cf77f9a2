"""Expected values are derived by hand or by brute force, or come from medpy, MONAI and surface-distance."""

import itertools
import math

import numpy as np
import pytest

from brats_helpers.scoring import surface
from brats_helpers.scoring.surface import area_distances, edge_distances, hd95_by_area, surface_dice_by_area
from tests.scoring.shapes import MM, PAIRS, blob, mask

every_pair = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture(scope="module")
def full_size():
    """Two boolean masks of BraTS size."""
    small = [blob((60, 60, 39), seed, 5, 0.04) for seed in (11, 12)]
    shifted = [small[0], small[0] & ~small[1] | np.roll(small[0], 1, axis=0)]
    return [np.kron(each, np.ones((4, 4, 4), bool))[:, :, :155] for each in shifted]


def pooled_hd95(pred, truth, spacing_mm):
    return np.percentile(np.concatenate(edge_distances(pred, truth, spacing_mm)), 95)


def test_edge_distances_and_surface_dice_of_two_rods():
    # Voxels 0-3 and 2-7 of a line are all edge voxels. Their distances to the other rod are 2, 1, 0, 0 and
    # 0, 0, 1, 2, 3, 4: 4 of 10 coincide, 6 of 10 lie within 1 mm; by rod 2 of 4 and 2 of 6, 3 of 4 and 3 of 6.
    pred, truth = mask((9, 1, 1), ((0, 0, 0), (4, 1, 1))), mask((9, 1, 1), ((2, 0, 0), (6, 1, 1)))
    there, back = edge_distances(pred, truth, MM)
    assert [sorted(there), sorted(back)] == [[0, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert [surface.surface_dice(there, back, mm) for mm in (0.5, 1)] == pytest.approx([4 / 10, 6 / 10])
    assert [surface.mean_surface_dice(there, back, mm) for mm in (0.5, 1)] == pytest.approx(
        [(2 / 4 + 2 / 6) / 2, (3 / 4 + 3 / 6) / 2]
    )


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


@every_pair
def test_edge_distances_agree_with_monai(name, monai):
    pred, truth, spacing = PAIRS[name]
    torch = pytest.importorskip("torch")
    p, t = (torch.tensor(each)[None, None] for each in (pred, truth))
    there, back = edge_distances(pred, truth, spacing)
    how = {"include_background": True, "spacing": list(spacing)}
    larger = max(np.percentile(distances, 95) for distances in (there, back))
    expected = monai.compute_hausdorff_distance(p, t, percentile=95, **how)
    assert larger == pytest.approx(expected.item(), abs=1e-4)
    for tolerance in (0.5, 1.0):
        expected = monai.compute_surface_dice(p, t, class_thresholds=[tolerance], **how)
        assert surface.surface_dice(there, back, tolerance) == pytest.approx(expected.item(), abs=1e-6)


@every_pair
def test_distances_by_area_agree_with_surface_distance(name, surface_distance):
    pred, truth, spacing = PAIRS[name]
    distances = surface_distance.compute_surface_distances(truth, pred, spacing)
    sides = area_distances(pred, truth, spacing)
    assert hd95_by_area(*sides) == pytest.approx(surface_distance.compute_robust_hausdorff(distances, 95), abs=1e-9)
    for tolerance in (0.5, 1.0):
        expected = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
        assert surface_dice_by_area(*sides, tolerance) == pytest.approx(expected, abs=1e-9)


def test_masks_of_full_size_agree_with_the_peers(full_size, medpy, monai, surface_distance):
    torch = pytest.importorskip("torch")
    pred, truth = full_size
    p, t = (torch.tensor(each)[None, None] for each in full_size)
    assert pooled_hd95(pred, truth, MM) == pytest.approx(medpy.hd95(pred, truth), abs=1e-9)
    larger = max(np.percentile(distances, 95) for distances in edge_distances(pred, truth, MM))
    expected = monai.compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=list(MM))
    assert larger == pytest.approx(expected.item(), abs=1e-4)
    distances = surface_distance.compute_surface_distances(truth, pred, MM)
    assert hd95_by_area(*area_distances(pred, truth, MM)) == surface_distance.compute_robust_hausdorff(distances, 95)


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
