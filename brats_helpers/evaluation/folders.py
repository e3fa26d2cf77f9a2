"""Score label maps on disk against references."""

import json
from pathlib import Path

from brats_helpers.data.cases import survey_segs
from brats_helpers.data.nifti import difference, read_seg, same_affine
from brats_helpers.data.nifti import spacing_mm as spacing_of
from brats_helpers.labels import USUAL, DataError
from brats_helpers.scoring.rules import rule_for
from brats_helpers.scoring.scores import collect, score_case

_RESAMPLE = "Write the prediction in the grid of the patient's scans."


def score_folders(
    pred_dir: Path | str,
    truth_dir: Path | str,
    *,
    convention: str,
    simulated: bool,
    allow_leakage: bool,
    task: str | None = None,
) -> dict[str, object]:
    """Score a folder of label maps against a folder of patients, or of label maps, by case ID.

    Either folder is read by `cases.survey_segs`, in either label numbering. Nothing is resampled,
    moved or relabelled: a pair whose shapes or affines differ is refused. So are predictions of a
    network that had seen the patient, which `predict` notes in `leakage.json` beside them, unless
    `allow_leakage` is set.

    Returns:
        What `collect` returns, with a reason in `not_scored` for every patient of either folder
        that could not be scored: missing, extra, unlabelled, leakage, misaligned, unreadable or found twice.

    Raises:
        DataError: a folder that holds no label map.
    """
    (preds, faulty_preds), (truths, faulty_truths) = survey_segs(pred_dir), survey_segs(truth_dir)
    seen = read_leakage(pred_dir)
    rule = rule_for(convention, task=task, cases=preds.keys() & truths.keys()).name
    cases, reasons = {}, faulty_preds | faulty_truths
    for case in sorted(({case for case, path in preds.items() if path} | truths.keys()) - reasons.keys()):
        if case not in truths:
            reasons[case] = f"extra: {preds[case]} has no patient in {truth_dir}"
        elif truths[case] is None:
            reasons[case] = f"unlabelled: the patient has no segmentation in {truth_dir}"
        elif preds.get(case) is None:
            reasons[case] = f"missing: no prediction in {pred_dir}"
        elif case in seen and not allow_leakage:
            reasons[case] = "leakage: the network that made the prediction had seen the patient"
        else:
            try:
                cases[case] = score_files(preds[case], truths[case], convention=rule)
            except DataError as error:
                reasons[case] = str(error)
    leakage = seen & cases.keys()
    return collect(cases, convention=rule, simulated=simulated, not_scored=reasons, leakage=leakage)


def read_leakage(pred_dir: Path | str) -> set[str]:
    """IDs of the patients that the network that predicted this folder had seen, as `leakage.json` there names them."""
    path = Path(pred_dir) / "leakage.json"
    return set(json.loads(path.read_text())) if path.exists() else set()


def score_files(
    pred_path: Path, truth_path: Path, *, convention: str, numberings: tuple[str, str] = (USUAL, USUAL)
) -> dict[str, dict[str, float]]:
    """Score one label map on disk against another, see `score_case`; `numberings` are those of their labels.

    Raises:
        DataError: both are one file, one cannot be read, or their shapes or affines differ; nothing is resampled.
    """
    if pred_path.resolve() == truth_path.resolve():
        raise DataError(f"itself: {pred_path} would be scored against itself; give a folder of predictions.")
    (pred, pred_image), (truth, truth_image) = map(read_seg, (pred_path, truth_path), numberings)
    if pred.shape != truth.shape:
        raise DataError(f"misaligned: {pred_path} has shape {pred.shape}, {truth_path} {truth.shape}. {_RESAMPLE}")
    if not same_affine(pred_image, truth_image):
        apart = difference(pred_image.affine, truth_image.affine, pred.shape)
        raise DataError(f"misaligned: {pred_path} does not lie where {truth_path} does: {apart} {_RESAMPLE}")
    return score_case(pred, truth, spacing_mm=spacing_of(truth_image), convention=convention)
