"""How good is a segmentation, by the rules of the BraTS challenge.

Every patient is scored in 3D over the whole volume, then patients are averaged. Two rule books
are known by name (`CONVENTIONS`); whoever shows a figure shows the convention beside it.

Masks are class indices (see `cases.CLASSES`), uint8, shape (X, Y, Z); distances are in mm,
volumes in ml. No function here returns NaN or infinity: the rule books say what an empty mask gets.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from brats_helpers.labels import REGIONS, STRUCTURES
from brats_helpers.scoring.lesions import lesion_dice, lesions
from brats_helpers.scoring.overlap import crop_tumour, dice, members
from brats_helpers.scoring.rules import CONVENTIONS, RULES, check_convention
from brats_helpers.scoring.statistics import summarise


def score_case(
    pred: np.ndarray, truth: np.ndarray, *, spacing_mm: tuple[float, float, float], convention: str
) -> dict[str, dict[str, float]]:
    """Score one patient.

    Sensitivity, specificity and volumes are those of the whole volume in either convention; with
    nothing to find, sensitivity is 1 if nothing was found and else 0, as the challenge has it.

    Args:
        pred, truth: class indices 0 to 3, uint8, shape (X, Y, Z).
        spacing_mm: voxel size along X, Y, Z.
        convention: a key of `CONVENTIONS`.

    Returns:
        For each of `STRUCTURES`: `dice`, `hd95_mm`, `sensitivity`, `specificity`, `volume_ml`,
        `volume_ml_truth` and `volume_difference_ml` (predicted minus reference).

    Raises:
        ValueError: an unknown convention, or masks of other dtype, shape or classes.
    """
    rule = RULES[check_convention(convention)]
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    total = truth.size
    pred, truth = crop_tumour(pred, truth)
    scores = {}
    for name, classes in STRUCTURES.items():
        p, t = members(pred, classes), members(truth, classes)
        found, true, hit = (int(np.count_nonzero(mask)) for mask in (p, t, p & t))
        dice, hd95 = rule(p, t, spacing_mm)
        scores[name] = {
            "dice": dice,
            "hd95_mm": hd95,
            "sensitivity": hit / true if true else float(found == 0),
            "specificity": (total - found - true + hit) / (total - true) if true < total else float(found == total),
            "volume_ml": found * voxel_ml,
            "volume_ml_truth": true * voxel_ml,
            "volume_difference_ml": (found - true) * voxel_ml,
        }
    return scores


def collect(
    cases: Mapping[str, Mapping],
    *,
    convention: str,
    simulated: bool,
    not_scored: Mapping[str, str],
    leakage: Iterable[str],
) -> dict[str, object]:
    """What `metrics.json` holds.

    Args:
        cases: by ID, what `score_case` returns.
        convention: a key of `CONVENTIONS`; the file holds its line.
        simulated: whether these are simulated patients.
        not_scored: by ID, why a patient has no figures.
        leakage: IDs of the patients that the network had seen.
    """
    return {
        "convention": CONVENTIONS[check_convention(convention)],
        "simulated": simulated,
        "cases": {case: cases[case] for case in sorted(cases)},
        "summary": summarise(cases),
        "not_scored": dict(not_scored),
        "leakage": sorted(leakage),
    }


def conventions_table(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, float | None]]:
    """Mean Dice of the same predictions under five conventions.

    Args:
        pairs: per patient (prediction, reference), class indices 0 to 3, uint8, shape (X, Y, Z);
            slices are those along Z.

    Returns:
        For each convention, by a line that says what it is: Dice of WT, TC and ET; None where the
        convention leaves nothing to average.
    """
    collected: dict[str, dict[str, list[float]]] = {}
    for pred, truth in pairs:
        slices = truth.shape[2]
        pred, truth = crop_tumour(pred, truth)
        for region, classes in REGIONS.items():
            p, t = members(pred, classes), members(truth, classes)
            hit, true, both = (mask.sum(axis=(0, 1)) for mask in (p & t, t, p.astype(np.uint8) + t))
            slice_dice = 2 * hit[both > 0] / both[both > 0]
            whole = dice(p, t)
            for line, values in {
                "mean over slices, both empty = 1": [*slice_dice, *[1.0] * (slices - slice_dice.size)],
                "mean over slices whose reference is not empty": 2 * hit[true > 0] / both[true > 0],
                "mean over patients, those with an empty reference dropped": [whole] if true.any() else [],
                "brats2020: mean over patients, both empty = 1, one empty = 0": [whole],
                "brats2023: mean over patients of the lesion-wise Dice": [lesion_dice(*lesions(p, t))],
            }.items():
                collected.setdefault(line, {name: [] for name in REGIONS})[region].extend(values)
    return {
        line: {region: float(np.mean(values)) if values else None for region, values in regions.items()}
        for line, regions in collected.items()
    }


def write_cases_csv(path: Path, metrics: Mapping) -> None:
    """Write one row per patient: `case`, `WT_dice`, `WT_hd95_mm`, ..., then `convention` (by name) and `simulated`."""
    rows = [
        {"case": case}
        | {f"{structure}_{metric}": value for structure, values in scores.items() for metric, value in values.items()}
        | {"convention": metrics["convention"].split(":")[0], "simulated": metrics["simulated"]}
        for case, scores in metrics["cases"].items()
    ]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["case"])
        writer.writeheader()
        writer.writerows(rows)
