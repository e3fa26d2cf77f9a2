"""Overlap of two masks: Dice."""

from collections.abc import Iterable, Mapping

import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.labels import REGIONS, STRUCTURES
from brats_helpers.scoring.statistics import mean_known


def dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two boolean masks of one shape; 1 if both are empty (Dice, Ecology 26, 1945)."""
    total = np.count_nonzero(pred) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(pred & truth) / total) if total else 1.0


def mean_dice(by_region: Mapping[str, float | None]) -> float:
    """Mean Dice of WT, TC and ET, the figure that patients, epochs and runs are ranked by.

    Args:
        by_region: Dice by region; None where the rule leaves the patient out (`brats2026`, both masks empty). Other
            entries are ignored.

    Returns:
        The mean over the counted regions; 1 if the rule leaves the patient out in every region.
    """
    mean = mean_known(by_region[region] for region in REGIONS)
    return 1.0 if mean is None else mean


def mean_dice_of_case(scores: Mapping[str, Mapping[str, float | None]]) -> float:
    """Mean Dice of WT, TC and ET of one patient of `metrics.json`; see `mean_dice`."""
    return mean_dice(dice_by_region(scores))


def dice_by_region(scores: Mapping[str, Mapping[str, float | None]]) -> dict[str, float | None]:
    """Dice of WT, TC and ET of one patient of `metrics.json`; None where there is none."""
    return {region: scores.get(region, {}).get("dice") for region in REGIONS}


def mean_dice_of_epoch(row: Mapping[str, float]) -> float:
    """Mean validation Dice of WT, TC and ET in one row of `history.csv`; it decides which epoch is best."""
    return mean_dice({region: row[f"dice_{region}"] for region in REGIONS})


def dice_scores(table: np.ndarray) -> dict[str, float]:
    """Dice of each of `STRUCTURES` from one patient's confusion table; 1 if both masks are empty (`brats2020`).

    Args:
        table: voxel counts, integer, shape (4, 4): class in the reference by predicted class.
    """
    scores = {}
    for name, classes in STRUCTURES.items():
        both = table[np.ix_(classes, classes)].sum()
        total = table[list(classes)].sum() + table[:, list(classes)].sum()
        scores[name] = float(2 * both / total) if total else 1.0
    return scores


def members(classes: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """Return a boolean mask of the voxels of `classes`, uint8, whose class is one of `wanted`."""
    return np.isin(np.arange(4), tuple(wanted)).take(classes)


def crop_tumour(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check two maps of class indices and crop both to the box around all tumour in either.

    Args:
        pred, truth: class indices 0 to 3, uint8, shape (X, Y, Z).

    Raises:
        ValueError: the shapes differ, or the maps hold anything but class indices.
    """
    if pred.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"prediction of shape {pred.shape}, reference of {truth.shape}; expected the same three axes.")
    if pred.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"prediction is {pred.dtype}, reference {truth.dtype}; expected class indices as uint8.")
    box = bounding_box(pred, truth)
    pred, truth = np.ascontiguousarray(pred[box]), np.ascontiguousarray(truth[box])
    highest = max(pred.max(initial=0), truth.max(initial=0))
    if highest > 3:
        raise ValueError(f"class {highest} in a mask; expected 0 to 3. Read label maps with data.nifti.read_seg.")
    return pred, truth
