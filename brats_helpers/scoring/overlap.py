"""Overlap of two masks: Dice."""

from collections.abc import Iterable

import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.labels import STRUCTURES


def dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two boolean masks; both empty: 1."""
    both = np.count_nonzero(pred) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(pred & truth) / both) if both else 1.0


def dice_scores(table: np.ndarray) -> dict[str, float]:
    """Dice of each of `STRUCTURES` from one patient's confusion table, both empty: 1 (convention brats2020).

    Args:
        table: voxels, integer (4, 4), by class of the reference and class predicted.
    """
    scores = {}
    for name, classes in STRUCTURES.items():
        both = table[np.ix_(classes, classes)].sum()
        masses = table[list(classes)].sum() + table[:, list(classes)].sum()
        scores[name] = float(2 * both / masses) if masses else 1.0
    return scores


def members(classes: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """Where `classes` is one of `wanted`, as booleans."""
    return np.isin(np.arange(4), tuple(wanted)).take(classes)


def crop_tumour(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check two maps of classes, uint8, the same three axes, and cut both to the box that holds all tumour of either.

    Raises:
        ValueError: the shapes differ, or there is anything but class indices.
    """
    if pred.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"prediction of shape {pred.shape}, reference of {truth.shape}; expected the same three axes.")
    if pred.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"prediction is {pred.dtype}, reference {truth.dtype}; expected class indices as uint8.")
    box = bounding_box(pred, truth)
    pred, truth = np.ascontiguousarray(pred[box]), np.ascontiguousarray(truth[box])
    highest = max(pred.max(initial=0), truth.max(initial=0))
    if highest > 3:
        raise ValueError(f"class {highest} in a mask; expected 0 to 3. Map labels with cases.labels_to_classes.")
    return pred, truth
