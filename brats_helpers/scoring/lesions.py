"""Lesions: connected components of a region, and the matching of predicted with reference lesions."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, optimize
from scipy.sparse import coo_matrix, csgraph

from brats_helpers.boxes import bounding_box

_EARLIER_LINES = ((-1, -1), (-1, 0), (-1, 1), (0, -1))  # (X, Y) steps to the earlier neighbours of a line of voxels
_ENOUGH_OVERLAP = 1e-6  # Dice from which BraTS-evaluation calls two lesions a match
_LARGEST_TABLE = 10**8  # lesions by lesions, 800 MB; beyond, only those that overlap are in the table


@dataclass(frozen=True)
class Detection:
    """How many lesions were found, falsely predicted and missed."""

    found: int
    false: int
    missed: int

    @property
    def f1(self) -> float | None:
        """2 TP / (2 TP + FP + FN); None without any lesion."""
        return _share(2 * self.found, self.false + self.missed)

    @property
    def precision(self) -> float | None:
        """TP / (TP + FP); None if nothing was predicted."""
        return _share(self.found, self.false)

    @property
    def recall(self) -> float | None:
        """TP / (TP + FN); None if there was nothing to find."""
        return _share(self.found, self.missed)


def _share(right: int, wrong: int) -> float | None:
    return right / (right + wrong) if right + wrong else None


@dataclass(frozen=True)
class Components:
    """The 26-connected components of a boolean mask, as runs of voxels along Z.

    Attributes:
        mask: boolean, shape (X, Y, Z).
        starts, ends: of each run, first and one past the last position in an array padded with background.
        number: of each run, the component that it belongs to, from 0 in the order of their first voxels, X fastest.
        count: how many components there are.
    """

    mask: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    number: np.ndarray
    count: int

    @classmethod
    def of(cls, mask: np.ndarray) -> "Components":
        """Join the runs that touch in neighbouring lines; on masks of tumours faster than `ndimage.label`."""
        nx, ny, nz = mask.shape
        line, plane = nz + 1, (ny + 1) * (nz + 1)  # background before each line of voxels and before each plane
        flat = np.zeros(nx * plane + 1, bool)
        flat[:-1].reshape(nx, ny + 1, line)[:, 1:, 1:] = mask
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        starts, ends = changes[::2], changes[1::2]
        if not starts.size:
            return cls(mask, starts, ends, starts, 0)
        steps = [dx * plane + dy * line for dx, dy in _EARLIER_LINES]
        joined = [_overlaps(starts + step - 1, ends + step + 1, starts, ends) for step in steps]
        here, there = np.concatenate(joined, axis=1)
        graph = coo_matrix((np.ones(here.size, bool), (here, there)), shape=(starts.size,) * 2)
        count, number = csgraph.connected_components(graph, directed=False)
        x, yz = np.divmod(starts, plane)
        y, z = np.divmod(yz, line)
        first = np.full(count, flat.size)
        np.minimum.at(first, number, (z * (ny + 1) + y) * nx + x)
        return cls(mask, starts, ends, np.argsort(np.argsort(first))[number], int(count))

    @property
    def voxels(self) -> np.ndarray:
        """Size of each component, shape (count,)."""
        return np.bincount(self.number, self.ends - self.starts, self.count)

    def labels(self) -> np.ndarray:
        """Return component numbers from 1, int32, shape (X, Y, Z); 0 in the background."""
        labels = np.zeros(self.mask.shape, np.int32)
        labels[self.mask] = np.repeat(self.number + 1, self.ends - self.starts)
        return labels


def _overlaps(starts: np.ndarray, ends: np.ndarray, others: np.ndarray, other_ends: np.ndarray) -> np.ndarray:
    """Pairs of runs that overlap, shape (2, pairs): index of a run and of one of the others; each list is sorted."""
    first = np.searchsorted(other_ends, starts, side="right")
    count = np.maximum(np.searchsorted(others, ends) - first, 0)
    run = np.repeat(np.arange(starts.size), count)
    return np.stack((run, np.arange(run.size) + np.repeat(first - np.cumsum(count) + count, count)))


@dataclass(frozen=True)
class Matching:
    """Lesions of a prediction and a reference, matched one to one by overlap.

    Attributes:
        pred, truth: the lesions, in the box around both masks.
        pairs: shape (matches, 2): numbers of a predicted and a reference lesion, from 0.
        dice: Dice of each pair, shape (matches,).
    """

    pred: Components
    truth: Components
    pairs: np.ndarray
    dice: np.ndarray

    @property
    def detection(self) -> Detection:
        """How many lesions were matched, false and missed."""
        found = len(self.pairs)
        return Detection(found=found, false=self.pred.count - found, missed=self.truth.count - found)

    def masks(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the boolean masks of each pair, (prediction, reference), cropped to the box around both."""
        pred, truth = self.pred.labels(), self.truth.labels()
        pred_boxes, truth_boxes = ndimage.find_objects(pred), ndimage.find_objects(truth)
        cropped = []
        for p, t in self.pairs:
            sides = zip(pred_boxes[p], truth_boxes[t], strict=True)
            box = tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in sides)
            cropped.append((pred[box] == p + 1, truth[box] == t + 1))
        return cropped


def match(pred: np.ndarray, truth: np.ndarray) -> Matching:
    """Match the 26-connected components of two boolean masks, shape (X, Y, Z), one to one by overlap.

    The assignment maximises the sum of the pairs' Dice (`MaxBipartiteMatching` of panoptica, which BraTS 2026 uses).
    If several do, it is panoptica's, because the cost table has its order and also holds pairs without overlap.
    """
    box = bounding_box(pred, truth)
    pred, truth = Components.of(pred[box]), Components.of(truth[box])
    run, other = _overlaps(pred.starts, pred.ends, truth.starts, truth.ends)
    shared = np.minimum(pred.ends[run], truth.ends[other]) - np.maximum(pred.starts[run], truth.starts[other])
    overlap = coo_matrix((shared, (pred.number[run], truth.number[other])), shape=(pred.count, truth.count))
    overlap.sum_duplicates()
    p, t = overlap.row, overlap.col
    dice = 2 * overlap.data / (pred.voxels[p] + truth.voxels[t])
    p, t, dice = (values[dice >= _ENOUGH_OVERLAP] for values in (p, t, dice))
    rows, columns = np.arange(truth.count), np.arange(pred.count)
    if rows.size * columns.size > _LARGEST_TABLE:
        rows, columns = np.unique(t), np.unique(p)
    cost = np.full((rows.size, columns.size), 1 + _ENOUGH_OVERLAP)
    cost[np.searchsorted(rows, t), np.searchsorted(columns, p)] = 1 - dice
    row, column = optimize.linear_sum_assignment(cost)
    matched = cost[row, column] < 1
    row, column = row[matched], column[matched]
    return Matching(pred, truth, np.stack((columns[column], rows[row]), axis=1), 1 - cost[row, column])


def by_dilation(
    pred: np.ndarray, truth: np.ndarray, *, dilations: int, dropped_voxels: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], Detection]:
    """Split two boolean masks, shape (X, Y, Z), into lesions by the rules of BraTS 2023.

    The reference is dilated by the 18-neighbourhood; each 26-connected component of the result holds one lesion.
    Predicted components that touch it are its prediction; those that touch none are false. Small reference lesions
    are dropped, with no penalty for what touches them.

    Args:
        dilations: how many times the reference is dilated.
        dropped_voxels: reference lesions of this many voxels or fewer are dropped.

    Returns:
        Prediction and reference of each remaining lesion as boolean masks, shape (X, Y, Z); and how many were found.
    """
    near = ndimage.binary_dilation(truth, ndimage.generate_binary_structure(3, 2), iterations=dilations)
    (zones, count), (parts, predicted) = ((each.labels(), each.count) for each in map(Components.of, (near, pred)))
    touching = np.zeros((count + 1, predicted + 1), bool)
    touching[zones[pred], parts[pred]] = True
    touching[0] = False
    sizes = np.bincount(zones[truth], minlength=count + 1)
    counted = np.flatnonzero(sizes[1:] > dropped_voxels) + 1
    lesions = [(touching[zone].take(parts), truth & (zones == zone)) for zone in counted]
    found = int(touching[counted].any(axis=1).sum())
    false = predicted - int(touching.any(axis=0).sum())
    return lesions, Detection(found=found, false=false, missed=len(lesions) - found)
