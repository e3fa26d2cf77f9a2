"""Means, intervals and paired comparisons."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np
from scipy import special

from brats_helpers.labels import STRUCTURES, DataError

ENOUGH = 10
"""With fewer patients, a mean and its interval are only an indication."""
FEWEST = 5
"""With fewer patients no interval is shown: resampled from so few values, it says nothing about other patients."""
ENOUGH_PAIRS = 6
"""With fewer pairs, even a gain in every patient may be chance: five coins show the same side once in 16 throws."""
_BOOTSTRAPS = 10_000


def summarise(cases: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> dict[str, dict[str, dict]]:
    """Statistics over patients of every metric of every structure.

    Args:
        cases: by ID, what `score_case` returns; a figure of None has no part in the statistics.

    Returns:
        Per structure and metric: `mean`, `median`, `std` (of the sample; 0 for one patient), the quartiles `q1` and
        `q3`, `ci95` (95 % bootstrap interval of the mean, always from the same 10,000 samples of patients, widened
        if patients are few) and `n`, the patients counted. With `n` 0 all others are None. Empty without patients.
    """
    if not cases:
        return {}
    columns = _columns(cases)
    values = _values(cases, columns)
    summary: dict[str, dict[str, dict]] = {}
    for (structure, metric), column, interval in zip(columns, values.T, _mean_intervals(values), strict=True):
        summary.setdefault(structure, {})[metric] = _statistics(column[~np.isnan(column)]) | {"ci95": interval}
    return summary


def _statistics(values: np.ndarray) -> dict[str, float | int | None]:
    if not values.size:
        return dict.fromkeys(("mean", "median", "std", "q1", "q3")) | {"n": 0}
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {
        "mean": float(values.mean()),
        "median": float(median),
        "std": float(values.std(ddof=1)) if values.size > 1 else 0.0,
        "q1": float(q1),
        "q3": float(q3),
        "n": values.size,
    }


def mean_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _columns(cases: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """The (structure, metric) pairs that every patient has."""
    return [(structure, metric) for structure, metrics in next(iter(cases.values())).items() for metric in metrics]


def _values(cases: Mapping[str, Mapping], columns: list[tuple[str, str]]) -> np.ndarray:
    """Figures as float64, shape (patients sorted by ID, columns); NaN for None."""
    values = [cases[case][structure][metric] for case in sorted(cases) for structure, metric in columns]
    return np.array(values, np.float64).reshape(len(cases), len(columns))


def _mean_intervals(values: np.ndarray) -> list[list[float] | None]:
    """95 % bootstrap interval of the mean over patients for each column of (patients, columns); None if all are NaN."""
    intervals: dict[int, list[float] | None] = {}
    complete = ~np.isnan(values).any(axis=0)
    intervals |= zip(np.flatnonzero(complete).tolist(), _bootstrap(values[:, complete]), strict=True)
    for k in np.flatnonzero(~complete).tolist():
        present = values[~np.isnan(values[:, k]), k]
        intervals[k] = _bootstrap(present[:, None])[0] if present.size else None
    return [intervals[k] for k in range(values.shape[1])]


def _bootstrap(values: np.ndarray) -> list[list[float]]:
    """95 % intervals of the mean over patients, one for each column of (patients, columns), without NaN.

    With few patients the plain percentile interval is too narrow: with six, it covers the true mean 87 times in 100. It
    is therefore widened as Student's interval widens the normal one (the expanded percentile interval of Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015). With many patients the two are equal.
    """
    patients, random = len(values), np.random.default_rng(0)
    if patients == 1:
        return values.T.repeat(2, axis=1).tolist()
    at_once = min(_BOOTSTRAPS, max(1, 10**7 // patients))  # bounds the memory, however many patients there are
    means = []
    for done in range(0, _BOOTSTRAPS, at_once):
        draws = random.multinomial(patients, np.full(patients, 1 / patients), size=min(at_once, _BOOTSTRAPS - done))
        means.append(draws @ values / patients)
    tail = special.ndtr(special.stdtrit(patients - 1, 0.025) * math.sqrt(patients / (patients - 1)))
    return np.quantile(np.concatenate(means), (tail, 1 - tail), axis=0).T.tolist()


def interval_text(ci95: Sequence[float] | None, n: int, figure: str = ".3f") -> str:
    """Return a 95 % interval over `n` patients as text, such as "0.612 to 0.745"; fewer than `FEWEST` give none."""
    if ci95 is None or n < FEWEST:
        return "no interval"
    low, high = ci95
    return f"{low:{figure}} to {high:{figure}}"


def compare(metrics_a: Mapping, metrics_b: Mapping) -> dict[str, object]:
    """Compare two runs patient by patient.

    Args:
        metrics_a, metrics_b: what `collect` returns, scored by one rule and against the same references.

    Returns:
        `convention` and `rule`; `simulated`; `leakage`, the compared patients that a network had seen; `n`, the number
        of patients that both scored; `only_a` and `only_b`, the IDs of the others; `differences`: per structure and
        metric `mean_difference`, the mean of b minus a over the `n` patients with both figures, and `ci95`, its 95 %
        bootstrap interval over patients. Both are None with `n` 0.

    Raises:
        DataError: the rules differ, no patient is in both, or a patient has another reference in the other run.
    """
    if metrics_a["rule"] != metrics_b["rule"]:
        raise DataError(
            f"Scored by different rules, {metrics_a['rule']} and {metrics_b['rule']}. Score both by the same one."
        )
    a, b = metrics_a["cases"], metrics_b["cases"]
    shared = a.keys() & b.keys()
    if not shared:
        raise DataError("The two runs have no scored patient in common, so there is nothing to compare.")
    _check_references(a, b, sorted(shared))
    in_b = set(_columns(b))
    columns = [column for column in _columns(a) if column in in_b]
    gains = _values({case: b[case] for case in shared}, columns) - _values({case: a[case] for case in shared}, columns)
    differences: dict[str, dict[str, dict]] = {}
    for (structure, metric), gain, interval in zip(columns, gains.T, _mean_intervals(gains), strict=True):
        counted = _statistics(gain[~np.isnan(gain)])
        found = {"mean_difference": counted["mean"], "ci95": interval, "n": counted["n"]}
        differences.setdefault(structure, {})[metric] = found
    return {
        "convention": metrics_a["convention"],
        "rule": metrics_a["rule"],
        "simulated": metrics_a["simulated"] or metrics_b["simulated"],
        "leakage": sorted({*metrics_a.get("leakage", ()), *metrics_b.get("leakage", ())} & shared),
        "n": len(shared),
        "only_a": sorted(a.keys() - shared),
        "only_b": sorted(b.keys() - shared),
        "differences": differences,
    }


def sign_flip_p(differences: Sequence[float]) -> float:
    """Test whether the mean of paired differences is 0, by flipping their signs.

    Args:
        differences: one per patient.

    Returns:
        The two-sided p value: the share of all sign patterns whose mean is at least as far from 0 as the observed one.
        With more than 12 patients, the share of 10,000 random patterns and the observed one.
    """
    values = np.asarray(differences, float)
    n = len(values)
    if n <= 12:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.ones((_BOOTSTRAPS + 1, n), int)
        signs[1:] = np.random.default_rng(0).choice((-1, 1), (_BOOTSTRAPS, n))
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-12))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple tests (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _check_references(a: Mapping[str, Mapping], b: Mapping[str, Mapping], shared: Sequence[str]) -> None:
    """Raise `DataError` if a patient's reference has another volume in the other run."""
    for case, name in itertools.product(shared, STRUCTURES):
        ml_a, ml_b = (found[case].get(name, {}).get("volume_ml_truth") for found in (a, b))
        if None not in (ml_a, ml_b) and not np.isclose(ml_a, ml_b, rtol=1e-4):
            raise DataError(
                f"{case}: its reference has {ml_a:.3f} ml of {name} in one run and {ml_b:.3f} ml in the other: either"
                " these are different patients with the same name, or the references were changed. Score both runs"
                " against the same references."
            )
