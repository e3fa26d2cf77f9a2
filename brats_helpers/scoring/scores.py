"""Scores of segmentations by the rules of the BraTS challenge.

Each patient is scored in 3D over the whole volume; then the scores are averaged over patients. The rule
(`rules.RULES`) is shown beside every figure.

Masks are class indices (see `labels.CLASSES`), uint8, shape (X, Y, Z). Distances are in mm, volumes in ml.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from brats_helpers.files import whole_file
from brats_helpers.labels import REGIONS, STRUCTURES
from brats_helpers.scoring.overlap import crop_tumour, members
from brats_helpers.scoring.rules import RULES, Figures, Spacing, get_rule
from brats_helpers.scoring.statistics import mean_known, summarise


def score_case(pred: np.ndarray, truth: np.ndarray, *, spacing_mm: Spacing, convention: str) -> dict[str, Figures]:
    """Score one patient.

    Sensitivity, specificity and volumes are those of the whole volume under every rule. With nothing to find,
    sensitivity is 1 if nothing was predicted and else 0, as in the challenge.

    Args:
        pred, truth: class indices 0 to 3, uint8, shape (X, Y, Z).
        spacing_mm: voxel size along X, Y, Z.
        convention: a name from `rules.RULES`.

    Returns:
        For each of `STRUCTURES` the figures of the rule (see `rules`) and `sensitivity`, `specificity`, `volume_ml`,
        `volume_ml_truth` and `volume_difference_ml` (predicted minus reference).

    Raises:
        ValueError: an unknown convention, a voxel size that is no positive number, or masks of another dtype, shape
            or other classes.
    """
    rule = get_rule(convention)
    if not all(0 < side < np.inf for side in spacing_mm):
        raise ValueError(f"voxel size {tuple(spacing_mm)} mm; expected three positive numbers.")
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    total = truth.size
    pred, truth = crop_tumour(pred, truth)
    scores = {}
    for name, classes in STRUCTURES.items():
        p, t = members(pred, classes), members(truth, classes)
        found, true, hit = (int(np.count_nonzero(mask)) for mask in (p, t, p & t))
        figures = rule.score(p, t, spacing_mm)
        first = {key: figures.pop(key) for key in ("dice", "hd95_mm")}
        whole = {
            "sensitivity": hit / true if true else float(found == 0),
            "specificity": (total - found - true + hit) / (total - true) if true < total else float(found == total),
            "volume_ml": found * voxel_ml,
            "volume_ml_truth": true * voxel_ml,
            "volume_difference_ml": (found - true) * voxel_ml,
        }
        scores[name] = first | whole | figures
    return scores


def collect(
    cases: Mapping[str, Mapping],
    *,
    convention: str,
    simulated: bool,
    not_scored: Mapping[str, str],
    leakage: Iterable[str],
) -> dict[str, object]:
    """Assemble the content of `metrics.json`.

    Args:
        cases: by ID, what `score_case` returns.
        convention: a name from `rules.RULES`. The file holds it as `rule`, and its line as `convention`.
        simulated: whether these are simulated patients.
        not_scored: by ID, why a patient has no figures.
        leakage: IDs of the patients that the network had seen.
    """
    rule = get_rule(convention)
    return {
        "convention": rule.line,
        "rule": rule.name,
        "simulated": simulated,
        "cases": {case: cases[case] for case in sorted(cases)},
        "summary": summarise(cases),
        "not_scored": dict(not_scored),
        "leakage": sorted(leakage),
    }


def scores_table(metrics: Mapping) -> str:
    """Format the result of `collect` as text: a line per patient, then the mean and its 95 % interval."""
    rows: dict[str, Mapping[str, Mapping]] = dict(metrics["cases"])
    rows["mean"] = _picked(metrics, lambda found: found["mean"])
    if len(metrics["cases"]) > 1:
        rows["95 % from"] = _picked(metrics, lambda found: found["ci95"] and found["ci95"][0])
        rows["95 % to"] = _picked(metrics, lambda found: found["ci95"] and found["ci95"][1])
    width = max(map(len, rows))
    columns = [(region, metric, *look) for region in REGIONS for metric, look in _COLUMNS.items()]
    lines = [" " * width + "".join(f"{head.format(region):>{cells}}" for region, _, head, cells, _ in columns)]
    for name, row in rows.items():
        figures = (_cell(row[region][metric], cells, digits) for region, metric, _, cells, digits in columns)
        lines.append(f"{name:{width}}" + "".join(figures))
    return "\n".join(lines)


_COLUMNS = {
    "dice": ("{} Dice", 9, 3),
    "hd95_mm": ("HD95 mm", 8, 2),
    "nsd_0.5mm": ("NSD 0.5", 8, 3),
    "nsd_1mm": ("NSD 1", 6, 3),
    "lesion_f1": ("F1", 6, 3),
}
"""Columns of `scores_table` for each region: heading, width and decimal places."""


def _picked(metrics: Mapping, pick: Callable[[Mapping], float | None]) -> dict[str, dict[str, float | None]]:
    """One statistic of every metric of the regions."""
    picked = {}
    for region in REGIONS:
        picked[region] = {name: pick(found) for name, found in metrics["summary"][region].items()}
    return picked


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def conventions_table(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, float | None]]:
    """Mean Dice of the same predictions under six conventions, with voxels of 1 mm and the rules for glioma.

    Args:
        pairs: per patient (prediction, reference), class indices 0 to 3, uint8, shape (X, Y, Z); slices are those
            along Z.

    Returns:
        For each convention, by its description: mean Dice of WT, TC and ET; None where the convention leaves nothing to
        average.
    """
    collected: dict[str, dict[str, list[float | None]]] = {}
    for pred, truth in pairs:
        slices = truth.shape[2]
        pred, truth = crop_tumour(pred, truth)
        for region, classes in REGIONS.items():
            for line, values in _by_convention(members(pred, classes), members(truth, classes), slices).items():
                collected.setdefault(line, {name: [] for name in REGIONS})[region].extend(values)
    means = {}
    for line, regions in collected.items():
        means[line] = {region: mean_known(values) for region, values in regions.items()}
    return means


def _by_convention(pred: np.ndarray, truth: np.ndarray, slices: int) -> dict[str, list[float | None]]:
    """The values that one patient adds to the mean Dice of a region, by convention; `slices`: of the whole volume."""
    hit, true = (pred & truth).sum(axis=(0, 1)), truth.sum(axis=(0, 1))
    both = true + pred.sum(axis=(0, 1))
    slice_dice = (2 * hit[both > 0] / both[both > 0]).tolist()
    by_rule = {name: RULES[name].dice(pred, truth, (1.0, 1.0, 1.0)) for name in ("brats2020", "brats2023", "brats2026")}
    return {
        "mean over slices, both empty = 1": [*slice_dice, *[1.0] * (slices - len(slice_dice))],
        "mean over slices whose reference is not empty": (2 * hit[true > 0] / both[true > 0]).tolist(),
        "mean over patients, those with an empty reference dropped": [by_rule["brats2020"]] if true.any() else [],
        "brats2020: mean over patients, both empty = 1, one empty = 0": [by_rule["brats2020"]],
        "brats2023: mean over patients of the lesion-wise Dice": [by_rule["brats2023"]],
        "brats2026: mean over patients of the matched lesions' Dice": [by_rule["brats2026"]],
    }


def write_cases_csv(path: Path, metrics: Mapping) -> None:
    """Write one row per patient: `case`, `WT_dice`, `WT_hd95_mm`, ..., then `convention` (by name) and `simulated`."""
    rows = []
    for case, scores in metrics["cases"].items():
        row = {"case": case}
        for structure, figures in scores.items():
            row |= {f"{structure}_{metric}": value for metric, value in figures.items()}
        rows.append(row | {"convention": metrics["rule"], "simulated": metrics["simulated"]})
    with whole_file(path) as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["case"])
        writer.writeheader()
        writer.writerows(rows)
