"""Distances between surfaces."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from brats_helpers.boxes import bounding_box

_REACH = 3  # voxels around a surface point that are searched before the k-d tree is used; 2 to 6 are equally fast


def edge_distances(
    pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from each edge voxel of one mask to the nearest edge voxel of the other.

    Edge voxels are those that erosion by the 6-neighbourhood removes; outside the array is background.

    Args:
        pred, truth: boolean masks, shape (X, Y, Z), neither empty.
        spacing_mm: voxel size along X, Y, Z.

    Returns:
        Prediction to reference and reference to prediction, float64, in the order of the voxels.
    """
    box = bounding_box(pred, truth)
    pred, truth = _edges(_padded(pred[box], _REACH)), _edges(_padded(truth[box], _REACH))
    return _nearest(pred, truth, spacing_mm), _nearest(truth, pred, spacing_mm)


def _padded(mask: np.ndarray, margin: int) -> np.ndarray:
    """`mask` with `margin` voxels of background on every side, in C order."""
    out = np.zeros([side + 2 * margin for side in mask.shape], bool)
    out[(slice(margin, -margin),) * 3] = mask
    return out


def _edges(mask: np.ndarray) -> np.ndarray:
    """The voxels of `mask`, C-ordered, with a face neighbour outside it; its outermost voxels must be background."""
    flat, inner = mask.ravel(), mask.flatten()
    for step in mask.strides:
        inner[step:] &= flat[:-step]
        inner[:-step] &= flat[step:]
    return mask & ~inner.reshape(mask.shape)


def _nearest(points: np.ndarray, targets: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Distance in mm from each voxel of `points` to the nearest of `targets`.

    Both are boolean and C-ordered, with at least `_REACH` voxels of background around them. Most surface points lie
    close to the other surface, so shells of growing distance up to `_REACH` voxels are searched first, for all points
    at once. A k-d tree finds the neighbours of the few points that remain.
    """
    flat = targets.ravel()
    place = np.flatnonzero(points)
    distances = np.empty(place.size)
    left = np.arange(place.size)
    for length, steps in _shells(tuple(spacing_mm), targets.strides):
        hit = flat.take(place + steps[0])
        for step in steps[1:]:
            hit |= flat.take(place + step)
        distances[left[hit]] = length
        missed = np.flatnonzero(~hit)
        left, place = left.take(missed), place.take(missed)
        if not left.size:
            return distances
    tree = cKDTree(np.argwhere(targets) * spacing_mm, leafsize=32, balanced_tree=False, compact_nodes=False)
    distances[left] = tree.query(np.stack(np.unravel_index(place, targets.shape), axis=1) * spacing_mm)[0]
    return distances


@functools.lru_cache(maxsize=64)
def _shells(spacing_mm: tuple[float, float, float], strides: tuple[int, int, int]) -> list[tuple[float, np.ndarray]]:
    """Steps in a flat array to the neighbours at each distance in mm, nearest first.

    The list ends before the first neighbour that is more than `_REACH` voxels away along an axis.
    """
    cube = np.array(list(itertools.product(range(-_REACH, _REACH + 1), repeat=3)))
    lengths = np.sqrt(((cube * spacing_mm) ** 2).sum(axis=1))
    inside = lengths < (_REACH + 1) * min(spacing_mm)
    steps = cube @ strides
    return [(float(length), steps[lengths == length]) for length in np.unique(lengths[inside])]


def surface_dice(there: np.ndarray, back: np.ndarray, tolerance_mm: float) -> float:
    """Share of the edge voxels of both masks within `tolerance_mm` of the other's edge; 1 if they coincide.

    This is MONAI's normalised surface Dice (Nikolov et al., arXiv 1809.04430, with voxels in place of surface areas).

    Args:
        there, back: distances in mm, as `edge_distances` returns them.
    """
    close = np.count_nonzero(there <= tolerance_mm) + np.count_nonzero(back <= tolerance_mm)
    return close / (there.size + back.size)


def mean_surface_dice(there: np.ndarray, back: np.ndarray, tolerance_mm: float) -> float:
    """As `surface_dice`, but the mean of the two masks' shares (panoptica, which BraTS 2026 uses)."""
    return float(np.mean([np.mean(distances <= tolerance_mm) for distances in (there, back)]))


@dataclass(frozen=True)
class AreaDistances:
    """Distances in mm from the surface elements of one mask to the other's surface, and their areas in mm^2."""

    distances_mm: np.ndarray
    areas_mm2: np.ndarray

    def percentile(self, share: float) -> float:
        """The distance that `share` of the area does not exceed."""
        order = np.argsort(self.distances_mm)
        reached = np.searchsorted(np.cumsum(self.areas_mm2[order]) / self.areas_mm2.sum(), share)
        return float(self.distances_mm[order[min(reached, order.size - 1)]])

    def area_within(self, tolerance_mm: float) -> float:
        """The area in mm^2 at most `tolerance_mm` away."""
        return float(self.areas_mm2[self.distances_mm <= tolerance_mm].sum())


def area_distances(
    pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[AreaDistances, AreaDistances]:
    """Distances between two surfaces as google-deepmind/surface-distance defines them, which BraTS 2023 uses.

    The surface passes between voxels. Its elements are the corners whose eight surrounding voxels are not all equal,
    each weighted by the area of the marching-cubes surface there.

    Args:
        pred, truth: boolean masks, shape (X, Y, Z), neither empty.
        spacing_mm: voxel size along X, Y, Z.

    Returns:
        Prediction to reference and reference to prediction.
    """
    box = bounding_box(pred, truth)
    pred, truth = _corner_codes(pred[box]), _corner_codes(truth[box])
    area = _surface_areas(tuple(spacing_mm))
    on_pred, on_truth = (pred > 0) & (pred < 255), (truth > 0) & (truth < 255)
    return (
        AreaDistances(_nearest(on_pred, on_truth, spacing_mm), area[pred[on_pred]]),
        AreaDistances(_nearest(on_truth, on_pred, spacing_mm), area[truth[on_truth]]),
    )


def hd95_by_area(there: AreaDistances, back: AreaDistances) -> float:
    """HD95 in mm: the larger of the two 95th percentiles by area (`compute_robust_hausdorff` of surface-distance)."""
    return max(there.percentile(0.95), back.percentile(0.95))


def surface_dice_by_area(there: AreaDistances, back: AreaDistances, tolerance_mm: float) -> float:
    """Share of both surfaces' area within `tolerance_mm` of the other (`compute_surface_dice_at_tolerance`)."""
    total = there.areas_mm2.sum() + back.areas_mm2.sum()
    return float((there.area_within(tolerance_mm) + back.area_within(tolerance_mm)) / total)


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Encode the eight voxels around each corner: bit 4x + 2y + z is set if voxel (x, y, z) of the eight is."""
    voxels = _padded(mask, _REACH + 1).view(np.uint8)
    codes = np.zeros([side - 1 for side in voxels.shape], np.uint8)
    for bit, corner in enumerate(itertools.product((0, 1), repeat=3)):
        codes |= voxels[tuple(slice(i, i + side) for i, side in zip(corner, codes.shape, strict=True))] << bit
    return codes


# The marching-cubes surface around each face-connected group of set corners of a unit cube, cutting edges half-way:
# eight times the absolute area vectors of its flat faces. Rotations and reflections give all other groups.
_SURFACES = {
    ((0, 0, 0),): [(1, 1, 1)],
    ((0, 0, 0), (0, 0, 1)): [(4, 4, 0)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0)): [(3, 3, 3), (0, 0, 4)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)): [(0, 0, 8)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)): [(6, 6, 6)],
    ((1, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)): [(3, 3, 3), (1, 1, 1), (0, 2, 2), (2, 0, 2)],
}


@functools.lru_cache(maxsize=16)
def _surface_areas(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Area in mm^2 of the marching-cubes surface for each of the 256 codes of `_corner_codes`.

    Each face-connected group of set corners has its own surface; if fewer corners are unset, their groups are used.
    """
    side_areas = np.prod(spacing_mm) / np.asarray(spacing_mm)
    group_areas = {}
    for (shape, vectors), axes, mirror in itertools.product(
        _SURFACES.items(), itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)
    ):
        corners = np.array(shape)[:, axes] ^ mirror
        turned = np.array(vectors)[:, axes] / 8 * side_areas
        group_areas[frozenset(map(tuple, corners.tolist()))] = np.linalg.norm(turned, axis=1).sum()
    areas = np.zeros(256)
    for code in range(256):
        cube = (code >> np.arange(8) & 1).reshape(2, 2, 2)
        groups, count = ndimage.label(cube if cube.sum() <= 4 else 1 - cube)
        for group in range(1, count + 1):
            areas[code] += group_areas[frozenset(map(tuple, np.argwhere(groups == group).tolist()))]
    return areas
