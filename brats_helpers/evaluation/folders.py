"""Score label maps on disk against references."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brats_helpers.data.nifti import difference, read_labels, same_affine, to_classes
from brats_helpers.data.nifti import spacing_mm as spacing_of
from brats_helpers.data.numbering import AUTO
from brats_helpers.evaluation.labelling import label_folders
from brats_helpers.evaluation.pairing import find_pairs
from brats_helpers.files import read_json, write_json
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
    labels: str = AUTO,
    truth_labels: str = AUTO,
    by_digits: bool = False,
) -> dict[str, object]:
    """Score a folder of label maps against a folder of patients, or of label maps.

    Nothing is resampled or moved: a pair whose shapes or affines differ is refused. So are predictions of a network
    that had seen the patient, unless `allow_leakage` is set; `predict` lists them in `leakage.json` beside them.

    Args:
        pred_dir, truth_dir, by_digits: see `pairing.find_pairs`.
        convention, task: see `rules.rule_for`.
        simulated: whether these are simulated patients.
        allow_leakage: score predictions of networks that had seen the patient as well.
        labels, truth_labels: how the masks are numbered, see `labelling.label_folders`.

    Returns:
        What `collect` returns, with a reason in `not_scored` for every patient of either folder that could not be
        scored: missing, extra, unlabelled, ambiguous, leakage, misaligned or unreadable; `labels`, see
        `Labelling.summary`; and if `by_digits`, `paired`: by reference, the prediction of another name.

    Raises:
        DataError: a folder without label maps, references of unknown numbering, or patients of tasks that are scored by
            different rules.
    """
    pairs, reasons = find_pairs(pred_dir, truth_dir, by_digits=by_digits)
    seen = read_leakage(pred_dir)
    rule = rule_for(convention, task=task, cases=pairs).name
    files = {case: pair.pred for case, pair in pairs.items()}, {case: pair.truth for case, pair in pairs.items()}
    labelling = label_folders(*files, Path(truth_dir), labels=labels, truth_labels=truth_labels)
    cases, leakage = {}, []
    for case, pair in pairs.items():
        leaked = not seen.isdisjoint((case, pair.name))
        if leaked and not allow_leakage:
            reasons[case] = "leakage: the network that made the prediction had seen the patient"
            continue
        try:
            both = read_pair(pair.pred, pair.truth)
            cases[case] = both.score(labelling.predictions[case], labelling.references[case], convention=rule)
            labelling.compare(case, both.pred, both.truth)
            leakage += [case] * leaked
        except (DataError, MemoryError) as error:
            reasons[case] = str(error) or "out of memory"
    reasons = dict(sorted(reasons.items()))
    scores = collect(cases, convention=rule, simulated=simulated, not_scored=reasons, leakage=leakage)
    scores["labels"] = labelling.summary()
    if by_digits:
        scores["paired"] = {case: pair.name for case, pair in pairs.items() if pair.name != case}
    return scores


def read_leakage(pred_dir: Path | str) -> set[str]:
    """IDs of the patients in this folder that the network had seen, from its `leakage.json`."""
    return set(read_json(Path(pred_dir) / "leakage.json", []))


def note_leakage(folder: Path, case_id: str, seen: bool) -> None:
    """Update `leakage.json` in a folder of predictions for a patient who is about to be written."""
    before = read_leakage(folder)
    if (case_id in before) != seen:
        write_json(folder / "leakage.json", sorted(before ^ {case_id}))


@dataclass(frozen=True)
class Pair:
    """A prediction and its reference on one grid: label numbers, shape (X, Y, Z), LPS order, and their files."""

    pred: np.ndarray
    truth: np.ndarray
    spacing_mm: tuple[float, float, float]
    pred_path: Path
    truth_path: Path

    def score(self, pred_labels: str, truth_labels: str, *, convention: str) -> dict[str, dict[str, float]]:
        """Score the pair, see `score_case`; `pred_labels` and `truth_labels` are the numberings of their labels."""
        pred = to_classes(self.pred, pred_labels, self.pred_path)
        truth = to_classes(self.truth, truth_labels, self.truth_path)
        return score_case(pred, truth, spacing_mm=self.spacing_mm, convention=convention)


def read_pair(pred_path: Path, truth_path: Path) -> Pair:
    """Read a label map and its reference.

    Raises:
        DataError: both are one file, one cannot be read, or their shapes or affines differ; nothing is resampled.
    """
    if pred_path.resolve() == truth_path.resolve():
        raise DataError(f"itself: {pred_path} would be scored against itself; give a folder of predictions.")
    (pred, pred_image), (truth, truth_image) = read_labels(pred_path), read_labels(truth_path)
    if pred.shape != truth.shape:
        raise DataError(f"misaligned: {pred_path} has shape {pred.shape}, {truth_path} {truth.shape}. {_RESAMPLE}")
    if not same_affine(pred_image, truth_image):
        apart = difference(pred_image.affine, truth_image.affine, pred.shape)
        raise DataError(f"misaligned: {pred_path} does not lie where {truth_path} does: {apart} {_RESAMPLE}")
    return Pair(pred, truth, spacing_of(truth_image), pred_path, truth_path)


def score_files(
    pred_path: Path, truth_path: Path, *, convention: str, numberings: tuple[str, str] = (USUAL, USUAL)
) -> dict[str, dict[str, float]]:
    """Score one label map on disk against another, see `read_pair`; `numberings` are those of their labels."""
    return read_pair(pred_path, truth_path).score(*numberings, convention=convention)
