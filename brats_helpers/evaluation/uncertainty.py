"""Does a network know where it is wrong? Entropy per voxel, detection of errors, calibration.

Everything is computed from the probabilities averaged over networks and mirror images, before post-processing, and
within the brain. With the empty space around it, every network would look certain and correct.
"""

from collections.abc import Mapping
from operator import itemgetter

import numpy as np

from brats_helpers.labels import REGIONS
from brats_helpers.scoring.statistics import mean_known

BINS = 10
"""Bins of equal width, from probability 0 to 1, of the calibration."""
FLOOR = 0.01
"""Calibration counts voxels where a region has at least this probability; elsewhere nearly all are 0."""
_AREAS = ("auc", "auc_tumour")


def entropy(soft: np.ndarray) -> np.ndarray:
    """Uncertainty per voxel: entropy of the class probabilities on the last axis, 0 (certain) to 1 (all equal)."""
    return -(soft * np.log(np.maximum(soft, 1e-12))).sum(axis=-1) / np.log(soft.shape[-1])


def auc(scores: np.ndarray, hits: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a hit has the higher score than a miss; equal scores count half.

    Args:
        scores: real numbers, one axis.
        hits: booleans of the same shape.

    Returns:
        0 to 1 (0.5: chance), or None if there are no hits or no misses.
    """
    from sklearn.metrics import roc_auc_score  # takes a second to import, and prediction does not need it

    return float(roc_auc_score(hits, scores)) if 0 < np.count_nonzero(hits) < hits.size else None


def examine(soft: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> dict[str, object]:
    """Compare one patient's probabilities with the reference.

    Args:
        soft: float32 (slices, 4, height, width), see `networks.predict`.
        truth: class indices, uint8 (slices, height, width).
        brain: bool (slices, height, width), the voxels that count.

    Returns:
        `auc`: whether errors have the higher entropy, see `auc`; `auc_tumour`: the same among the voxels that are
        tumour in prediction or reference, where errors are harder to find; `bins`: per region float64 (BINS, 3), by
        predicted probability: voxels, sum of the probability, voxels of the region.
    """
    soft, truth = np.moveaxis(soft, 1, -1)[brain], truth[brain]
    pred = soft.argmax(axis=-1)
    doubt, wrong, tumour = entropy(soft), pred != truth, (pred > 0) | (truth > 0)
    bins = {}
    for region, classes in REGIONS.items():
        probability = soft[:, classes].sum(axis=-1)
        given = probability >= FLOOR
        probability, inside = probability[given].clip(max=1), np.isin(truth[given], classes)
        counts = [
            np.histogram(probability, BINS, (0, 1), weights=w)[0] for w in (None, probability, inside.astype(float))
        ]
        bins[region] = np.stack(counts, axis=1).astype(float)
    return {"auc": auc(doubt, wrong), "auc_tumour": auc(doubt[tumour], wrong[tumour]), "bins": bins}


def collect(cases: Mapping[str, Mapping]) -> dict[str, object]:
    """Combine the patients into the entry `uncertainty` of `metrics.json`.

    Args:
        cases: by ID, what `examine` returns.

    Returns:
        `auc` and `auc_tumour`, means over the patients that have one (None if none has); `cases`: both by ID;
        `calibration`: per region, see `_calibration`, over the voxels of all patients together.
    """
    means = {name: mean_known(map(itemgetter(name), cases.values())) for name in _AREAS}
    found = {}
    for case, result in sorted(cases.items()):
        found[case] = {name: result[name] for name in _AREAS}
    calibration = {}
    for region in REGIONS:
        tables = [result["bins"][region] for result in cases.values()]
        calibration[region] = _calibration(np.sum(tables, axis=0) if tables else np.zeros((BINS, 3)))
    return means | {"cases": found, "calibration": calibration}


def _calibration(table: np.ndarray) -> dict[str, object]:
    """Compute a calibration curve from counts, float64 (BINS, 3) as in `examine`.

    Returns:
        `ece`, the expected calibration error: the mean distance of probability and observed frequency, weighted by
        voxels (None without voxels); `bins`, those with voxels: `low` and `high` end, `voxels`, mean `predicted`
        probability, `observed` frequency.
    """
    filled = np.flatnonzero(table[:, 0]).tolist()
    bins = []
    for k in filled:
        voxels, predicted, observed = table[k].tolist()
        ends = {"low": max(k / BINS, FLOOR), "high": (k + 1) / BINS}
        bins.append(ends | {"voxels": int(voxels), "predicted": predicted / voxels, "observed": observed / voxels})
    gaps = np.abs(table[:, 1] - table[:, 2]).sum()
    return {"ece": float(gaps / table[:, 0].sum()) if filled else None, "bins": bins}
