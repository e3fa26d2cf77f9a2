"""Does a network know where it is wrong: doubt per voxel, detection of errors, calibration.

All of it is about the probabilities as averaged over networks and mirror images, before post-processing, and over the
voxels of the brain: the empty space around it would make every network look certain and right.
"""

from collections.abc import Mapping
from statistics import fmean

import numpy as np
from scipy.stats import rankdata

from brats_helpers.labels import REGIONS

BINS = 10
"""Bins of equal width, from probability 0 to 1, of the calibration."""
FLOOR = 0.01
"""Calibration is over the voxels to which a region is given at least this probability; elsewhere nearly all is 0."""


def entropy(soft: np.ndarray) -> np.ndarray:
    """Doubt per voxel: entropy of the class probabilities along the last axis, from 0 (sure) to 1 (all alike)."""
    return -(soft * np.log(np.maximum(soft, 1e-12))).sum(axis=-1) / np.log(soft.shape[-1])


def auc(scores: np.ndarray, hits: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a hit has the higher score than a miss; equal scores count half.

    Args:
        scores: real numbers, one axis.
        hits: booleans of the same shape.

    Returns:
        0 to 1 (0.5: chance), or None where there are no hits or no misses.
    """
    n_hits = int(np.count_nonzero(hits))
    n_misses = hits.size - n_hits
    if not n_hits or not n_misses:
        return None
    return float((rankdata(scores)[hits].sum() - n_hits * (n_hits + 1) / 2) / (n_hits * n_misses))


def examine(soft: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> dict[str, object]:
    """Hold one patient's probabilities against the reference.

    Args:
        soft: float32 (slices, 4, height, width), see `inference.predict`.
        truth: class indices, uint8 (slices, height, width).
        brain: bool (slices, height, width), the voxels that count.

    Returns:
        `auc`: do the errors have the higher entropy, see `auc`; `auc_tumour`: the same among voxels that are tumour in
        prediction or reference, where it is hard; `bins`: per region float64 (BINS, 3), by predicted probability:
        voxels, sum of the probability, voxels that are the region.
    """
    soft, truth = np.moveaxis(soft, 1, -1)[brain], truth[brain]
    pred = soft.argmax(axis=-1)
    doubt, wrong, tumour = entropy(soft), pred != truth, (pred > 0) | (truth > 0)
    bins = {}
    for region, classes in REGIONS.items():
        probability = soft[:, classes].sum(axis=-1)
        given = probability >= FLOOR
        probability, inside = probability[given], np.isin(truth[given], classes)
        place = np.minimum((probability * BINS).astype(np.intp), BINS - 1)
        bins[region] = np.stack([np.bincount(place, w, BINS) for w in (None, probability, inside)], axis=1)
    return {"auc": auc(doubt, wrong), "auc_tumour": auc(doubt[tumour], wrong[tumour]), "bins": bins}


def collect(cases: Mapping[str, Mapping]) -> dict[str, object]:
    """What `metrics.json` holds under `uncertainty`.

    Args:
        cases: by ID, what `examine` returns.

    Returns:
        `auc` and `auc_tumour`, means over the patients that have one (None: none has); `cases`: both by ID;
        `calibration`: per region, over the voxels of all patients together, `ece` (expected calibration error: mean
        distance of probability and observed frequency, weighted by voxels; None without voxels) and `bins`, those that
        are not empty: `low` and `high` end, `voxels`, mean `predicted` probability, `observed` frequency.
    """
    found = {case: {name: result[name] for name in ("auc", "auc_tumour")} for case, result in sorted(cases.items())}
    values = {
        name: [result[name] for result in found.values() if result[name] is not None] for name in ("auc", "auc_tumour")
    }
    calibration = {}
    for region in REGIONS:
        table = sum((result["bins"][region] for result in cases.values()), np.zeros((BINS, 3)))
        bins = [
            {
                "low": max(k / BINS, FLOOR),
                "high": (k + 1) / BINS,
                "voxels": int(voxels),
                "predicted": float(predicted / voxels),
                "observed": float(observed / voxels),
            }
            for k, (voxels, predicted, observed) in enumerate(table)
            if voxels
        ]
        gaps = np.abs(table[:, 1] - table[:, 2]).sum()
        calibration[region] = {"ece": float(gaps / table[:, 0].sum()) if bins else None, "bins": bins}
    means = {name: fmean(each) if each else None for name, each in values.items()}
    return means | {"cases": found, "calibration": calibration}
