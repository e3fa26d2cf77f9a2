"""Means, intervals and paired comparisons."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

from brats_helpers.labels import STRUCTURES, DataError

ENOUGH = 10
"""Patients; of fewer, a mean and its interval are an indication."""
ENOUGH_PAIRS = 6
"""Patients that two runs are compared by; of fewer even full agreement may be chance: five coins fall alike once in 16
times."""
_BOOTSTRAPS = 10_000


def summarise(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict]]:
    """Statistics over patients of every metric of every structure.

    Args:
        cases: by ID, what `score_case` returns.

    Returns:
        Per structure and metric: `mean`, `median`, `std` (of the sample; 0 for one patient), the
        quartiles `q1` and `q3`, `ci95` (95 % interval of the mean: percentiles of 10,000 bootstrap
        samples of patients, always the same ones, further out where patients are few) and `n`. Empty without patients.
    """
    if not cases:
        return {}
    columns = _columns(cases)
    values = _values(cases, columns)
    summary: dict[str, dict[str, dict]] = {}
    for (structure, metric), column, interval in zip(columns, values.T, _mean_intervals(values), strict=True):
        q1, median, q3 = np.percentile(column, (25, 50, 75))
        summary.setdefault(structure, {})[metric] = {
            "mean": float(column.mean()),
            "median": float(median),
            "std": float(column.std(ddof=1)) if column.size > 1 else 0.0,
            "q1": float(q1),
            "q3": float(q3),
            "ci95": interval,
            "n": column.size,
        }
    return summary


def _columns(cases: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """The (structure, metric) pairs that every patient has."""
    return [(structure, metric) for structure, metrics in next(iter(cases.values())).items() for metric in metrics]


def _values(cases: Mapping[str, Mapping], columns: list[tuple[str, str]]) -> np.ndarray:
    """Figures of shape (patients sorted by ID, columns)."""
    return np.array([[cases[case][structure][metric] for structure, metric in columns] for case in sorted(cases)])


def _mean_intervals(values: np.ndarray) -> list[list[float]]:
    """95 % bootstrap intervals of the mean over the first axis, one for each column of (patients, columns).

    Plain percentiles of few patients are too close: of six, they hold the true mean 87 times in 100. So they are taken
    further out, as far as Student's interval is from the normal one (the expanded percentile interval of Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015); of many patients they are the plain ones.
    """
    patients, random = len(values), np.random.default_rng(0)
    if patients == 1:
        return values.T.repeat(2, axis=1).tolist()
    at_once = min(_BOOTSTRAPS, max(1, 10**7 // patients))  # in memory, however many patients there are
    means = []
    for done in range(0, _BOOTSTRAPS, at_once):
        draws = random.multinomial(patients, np.full(patients, 1 / patients), size=min(at_once, _BOOTSTRAPS - done))
        means.append(draws @ values / patients)
    tail = special.ndtr(special.stdtrit(patients - 1, 0.025) * math.sqrt(patients / (patients - 1)))
    return np.quantile(np.concatenate(means), (tail, 1 - tail), axis=0).T.tolist()


def interval_text(ci95: Sequence[float], n: int, figure: str = ".3f") -> str:
    """A 95 % interval over `n` patients in words, as "0.612 to 0.745"; of one patient there is none."""
    low, high = ci95
    return f"{low:{figure}} to {high:{figure}}" if n > 1 else "no interval"


def compare(metrics_a: Mapping, metrics_b: Mapping) -> dict[str, object]:
    """Compare two runs patient by patient.

    Args:
        metrics_a, metrics_b: what `collect` returns, of one convention and the same references.

    Returns:
        `convention`; `simulated`; `leakage`, those compared whom a network had seen; `n`, the
        patients that both scored; `only_a` and `only_b`, the
        IDs of the others; `differences`: per structure and metric the mean over patients of b minus
        a, `mean_difference`, and its 95 % bootstrap interval over patients, `ci95`.

    Raises:
        DataError: the conventions differ, no patient is in both, or one has another reference in the other run.
    """
    if metrics_a["convention"] != metrics_b["convention"]:
        raise DataError(
            f"Scored by different rules, {metrics_a['convention']} and {metrics_b['convention']}. Score both by one."
        )
    a, b = metrics_a["cases"], metrics_b["cases"]
    shared = a.keys() & b.keys()
    if not shared:
        raise DataError("The two runs have no scored patient in common, so there is nothing to compare.")
    for case, name in itertools.product(sorted(shared), STRUCTURES):
        ml_a, ml_b = (found[case].get(name, {}).get("volume_ml_truth") for found in (a, b))
        if None not in (ml_a, ml_b) and not np.isclose(ml_a, ml_b, rtol=1e-4):
            raise DataError(
                f"{case}: its reference has {ml_a:.3f} ml of {name} in one run and {ml_b:.3f} ml in the other: other"
                " patients of one name, or references that were changed. Score both runs by the same references."
            )
    in_b = set(_columns(b))
    columns = [column for column in _columns(a) if column in in_b]
    gains = _values({case: b[case] for case in shared}, columns) - _values({case: a[case] for case in shared}, columns)
    differences: dict[str, dict[str, dict]] = {}
    for (structure, metric), gain, interval in zip(columns, gains.T, _mean_intervals(gains), strict=True):
        differences.setdefault(structure, {})[metric] = {"mean_difference": float(gain.mean()), "ci95": interval}
    return {
        "convention": metrics_a["convention"],
        "simulated": metrics_a["simulated"] or metrics_b["simulated"],
        "leakage": sorted({*metrics_a.get("leakage", ()), *metrics_b.get("leakage", ())} & shared),
        "n": len(shared),
        "only_a": sorted(a.keys() - shared),
        "only_b": sorted(b.keys() - shared),
        "differences": differences,
    }
