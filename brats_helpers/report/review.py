"""Read a run's written predictions again: find failures and their causes, and check that the scores repeat."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import read_seg, same_affine, spacing_mm
from brats_helpers.data.numbering import predicted_as
from brats_helpers.data.patients import ChangedError, load_parts
from brats_helpers.labels import REGIONS, DataError
from brats_helpers.runs import Run, RunError
from brats_helpers.scoring.overlap import dice
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.scores import conventions_table, score_case

LOW_DICE = 0.7
SMALL_ML = 5.0
FAR_MM = 10.0
FAR_ML = 0.1
CAUSES = {
    "missed enhancing tumour": "the reference has ET, and the prediction overlaps none of it",
    "missed tumour": "the reference has WT or TC, and the prediction overlaps none of it",
    "false enhancing tumour": "the prediction has ET, and the reference has none",
    "false tumour": "the prediction has WT or TC, and the reference has none",
    "small tumour": f"a region of less than {SMALL_ML:g} ml with a Dice below {LOW_DICE:g}",
    "under-segmented": f"a Dice below {LOW_DICE:g}, and less than two thirds of the reference's volume",
    "over-segmented": f"a Dice below {LOW_DICE:g}, and more than one and a half times the reference's volume",
    "misplaced": f"a Dice below {LOW_DICE:g} for none of the reasons above",
    "far false positive": f"{FAR_ML:g} ml or more of predicted tumour, over {FAR_MM:g} mm from any reference tumour",
}
"""What counts as a failure, by cause, in the order in which the report lists them. Dice is of the whole volume."""


@dataclass(frozen=True)
class Failure:
    """One failure of one patient: its cause (a key of `CAUSES`), the region, its Dice, and the volumes."""

    cause: str
    case: str
    region: str
    dice: float
    seen: str


@dataclass
class Review:
    """The result of reading the scored predictions of a run again.

    Attributes:
        cases: by ID, the scored patients whose scans and prediction could be read and match.
        problem: why there is none, or empty.
        changed: whether the reason is that the patients are no longer the ones that were split.
        unreadable: by ID, what is wrong with a prediction or its reference.
        failures: in the order of `CAUSES`, the lowest Dice first.
        conventions: see `scores.conventions_table`.
        reference_labels, predicted_labels: numbers of tumour labels on disk.
        off_grid: IDs whose prediction lacks the shape or affine of the patient's first modality.
        recounted: how many scores of `metrics.json` were computed again, by the same rules.
        largest_difference: the largest difference between old and new scores.
    """

    cases: dict[str, Case] = field(default_factory=dict)
    problem: str = ""
    changed: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    conventions: dict[str, dict[str, float | None]] = field(default_factory=dict)
    reference_labels: set[int] = field(default_factory=set)
    predicted_labels: set[int] = field(default_factory=set)
    off_grid: list[str] = field(default_factory=list)
    recounted: int = 0
    largest_difference: float = 0.0


def review(run: Run, metrics: Mapping) -> Review:
    """Read every scored prediction of a run and its reference. `metrics` is the content of the run's `metrics.json`."""
    result = Review()
    scores = metrics.get("cases", {})
    if not scores:
        return result
    try:
        parts = load_parts(run)
    except (DataError, RunError, KeyError) as error:
        result.problem = f"the patients' files could not be read again: {error}"
        result.changed = isinstance(error, ChangedError)
        return result
    result.cases = {case.id: case for cases in parts.values() for case in cases if case.id in scores and case.seg}
    result.conventions = conventions_table(_pairs(run, metrics, result))
    for case_id in result.unreadable:
        del result.cases[case_id]
    if not result.cases:
        result.problem = f"no prediction could be read again: {'; '.join(result.unreadable.values())}"
    order = list(CAUSES)
    result.failures.sort(key=lambda failure: (order.index(failure.cause), failure.dice))
    return result


def _pairs(run: Run, metrics: Mapping, result: Review) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield prediction and reference of each patient; record in `result` what they show."""
    convention = str(metrics.get("convention", "")).partition(":")[0]
    for case_id, case in result.cases.items():
        try:
            pred, pred_image = read_seg(run.predictions / f"{case_id}_seg.nii.gz", predicted_as(case, metrics))
            truth, truth_image = read_seg(case.seg, case.numbering)
            if pred.shape != truth.shape:
                raise DataError(f"{case_id}: prediction of shape {pred.shape}, reference of {truth.shape}")
            own = case.read(next(iter(case.images)))[1]
        except DataError as error:
            result.unreadable[case_id] = str(error)
            continue
        result.reference_labels |= _labels(truth, truth_image)
        result.predicted_labels |= _labels(pred, pred_image)
        if own.shape != pred.shape or not same_affine(own, pred_image):
            result.off_grid.append(case_id)
        result.failures += find_failures(case_id, pred, truth, spacing_mm(truth_image))
        if convention in CONVENTIONS:
            again = score_case(pred, truth, spacing_mm=spacing_mm(truth_image), convention=convention)
            stored = metrics["cases"][case_id]
            pairs = [
                (again[name][key], stored[name].get(key)) for name in again if name in stored for key in again[name]
            ]
            # Relative for large scores. NaN differs from every number.
            differences = [
                np.nan_to_num(abs(value - before) / max(abs(value), 1), nan=np.inf)
                for value, before in pairs
                if before is not None
            ]
            result.recounted += len(differences)
            result.largest_difference = float(max([result.largest_difference, *differences]))
        yield pred, truth


def _labels(classes: np.ndarray, image) -> set[int]:
    """The label numbers on disk of all tumour voxels."""
    return {int(number) for number in np.unique(np.asanyarray(image.dataobj)[classes > 0])}


def find_failures(
    case_id: str, pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]
) -> list[Failure]:
    """Find the reasons for a patient's low scores, see `CAUSES`.

    Args:
        case_id: the patient.
        pred, truth: class indices 0 to 3, uint8, shape (X, Y, Z).
        spacing_mm: voxel size along X, Y, Z.
    """
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    failures = []
    for region, classes in REGIONS.items():
        p, t = np.isin(pred, classes), np.isin(truth, classes)
        overlap = dice(p, t)
        predicted_ml, true_ml = np.count_nonzero(p) * voxel_ml, np.count_nonzero(t) * voxel_ml
        seen = f"predicted {_ml(predicted_ml)}, reference {_ml(true_ml)}"
        kind = "enhancing tumour" if region == "ET" else "tumour"
        if true_ml and not (p & t).any():
            cause = f"missed {kind}"
        elif predicted_ml and not true_ml:
            cause = f"false {kind}"
        elif overlap >= LOW_DICE:
            continue
        elif true_ml < SMALL_ML:
            cause = "small tumour"
        elif predicted_ml < true_ml / 1.5:
            cause = "under-segmented"
        elif predicted_ml > true_ml * 1.5:
            cause = "over-segmented"
        else:
            cause = "misplaced"
        failures.append(Failure(cause, case_id, region, overlap, seen))

    tumour, reference = pred > 0, truth > 0
    count, ml, mm = _far(tumour, reference, spacing_mm)
    if ml >= FAR_ML:
        away = f"up to {mm:.0f} mm away" if reference.any() else "the reference has no tumour"
        seen = f"{count} component{'s' * (count > 1)}, {_ml(ml)} in total, {away}"
        failures.append(Failure("far false positive", case_id, "WT", dice(tumour, reference), seen))
    return failures


def _far(pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[int, float, float]:
    """Predicted components (26-connected) beyond `FAR_MM` from the reference: count, ml, largest distance in mm."""
    if not pred.any():
        return 0, 0.0, 0.0
    box = bounding_box(pred, truth)
    pred, truth = pred[box], truth[box]
    components, count = ndimage.label(pred, np.ones((3, 3, 3)))
    if truth.any():
        distance = ndimage.distance_transform_edt(~truth, sampling=spacing_mm)
    else:
        distance = np.full(pred.shape, np.inf)
    nearest = ndimage.minimum(distance, components, range(1, count + 1))
    far = np.flatnonzero(np.asarray(nearest) > FAR_MM)
    if not far.size:
        return 0, 0.0, 0.0
    voxels = np.bincount(components.ravel(), minlength=count + 1)[1:][far].sum()
    return far.size, float(voxels * np.prod(spacing_mm) / 1000), float(np.max(np.asarray(nearest)[far]))


def _ml(volume_ml: float) -> str:
    return f"{volume_ml:.1f} ml" if volume_ml >= 0.1 else f"{volume_ml:.3f} ml"
