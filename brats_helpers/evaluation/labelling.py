"""How predictions and references in two folders are numbered, and whether another numbering would fit better."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cases import Case, survey
from brats_helpers.data.nifti import read_labels
from brats_helpers.data.numbering import AUTO, NEARLY_ALL, resolve
from brats_helpers.labels import CLASSES, KNOWN_LABELS, NUMBERINGS, USUAL, DataError, find_numbering, labels_to_classes

_BETTER = 0.05  # share of the reference's tumour by which another numbering must agree better to be suggested


@dataclass
class Labelling:
    """The numbering of every prediction and reference, and what scoring has found out about them.

    Attributes:
        predictions, references: key of `NUMBERINGS` by case ID.
        pairs: by case ID, how many voxels of each label of the prediction (rows) belong to each class of the reference.
        without_class: by case ID, voxels of the reference by label that count as background, as they have no class.
    """

    predictions: dict[str, str]
    references: dict[str, str]
    pairs: dict[str, np.ndarray] = field(default_factory=dict)
    without_class: dict[str, dict[int, int]] = field(default_factory=dict)

    def compare(self, case_id: str, pred: np.ndarray, truth: np.ndarray) -> None:
        """Record the labels of a pair of masks, label numbers of one shape."""
        box = bounding_box(pred, truth)
        pred, truth = pred[box].astype(np.uint8), truth[box].astype(np.uint8)
        table = NUMBERINGS[self.references[case_id]]
        found = {label: int(np.count_nonzero(truth == label)) for label in table.no_class}
        if any(found.values()):
            self.without_class[case_id] = {label: voxels for label, voxels in found.items() if voxels}
        classes = labels_to_classes(truth, self.references[case_id])
        n = max(KNOWN_LABELS) + 1
        joint = np.bincount((pred * len(CLASSES) + classes).ravel(), minlength=n * len(CLASSES))
        self.pairs[case_id] = joint.reshape(n, len(CLASSES))

    def hint(self) -> str:
        """Suggest another numbering of the predictions if it fits the references better in nearly all patients."""
        compared = [case_id for case_id, joint in self.pairs.items() if (joint[1:, 1:].sum(axis=0) > 0).sum() > 1]
        better: Counter[str] = Counter()
        for case_id in compared:
            joint, used = self.pairs[case_id], self.predictions[case_id]
            numbers = frozenset(np.flatnonzero(joint.any(axis=1)).tolist()) - {0}
            least = _agreeing(joint, used) + _BETTER * joint[:, 1:].sum()
            better.update(
                name for name in NUMBERINGS if NUMBERINGS[name].can_hold(numbers) and _agreeing(joint, name) > least
            )
        if not better:
            return ""
        name, patients = better.most_common(1)[0]
        if patients < NEARLY_ALL * len(compared):
            return ""
        used = ", ".join(sorted(set(self.predictions.values())))
        return (
            f"in {patients} of {len(compared)} patients the predictions fit the references far better as {name}"
            f" ({NUMBERINGS[name].explain()}) than as {used}, which these scores assume. If they are numbered so, score"
            f" again with --labels {name}"
        )

    def summary(self) -> dict:
        """Return the entry `labels` of `metrics.json`."""
        scored = self.pairs.keys()
        return {
            "predictions": dict(Counter(self.predictions[case_id] for case_id in scored)),
            "references": dict(Counter(self.references[case_id] for case_id in scored)),
            "without_class": {case_id: _keyed(found) for case_id, found in self.without_class.items()},
            "hint": self.hint(),
        }


def _keyed(found: Mapping[int, int]) -> dict[str, int]:
    return {str(label): voxels for label, voxels in found.items()}


def _agreeing(joint: np.ndarray, numbering: str) -> int:
    """Tumour voxels that prediction and reference give the same class."""
    return sum(int(joint[label, index]) for label, index in NUMBERINGS[numbering].classes.items() if index)


def label_folders(
    preds: Mapping[str, Path], truths: Mapping[str, Path], truth_dir: Path, *, labels: str, truth_labels: str
) -> Labelling:
    """Find out how two folders are numbered.

    `numbering.resolve` decides for the references, with the images beside them. Predictions have the numbering that
    `labels` names. If it is `auto`, they have that of their references if all their numbers fit it, else the usual one.

    Args:
        preds, truths: files by case ID.
        truth_dir: where the patients' images lie.
        labels: `auto`, or the numbering of the predictions; also used for references of unknown numbering.
        truth_labels: `auto`, or the numbering of the references.

    Raises:
        DataError: no such numbering, or that of the references is unknown.
    """
    imaged = {case.id: case for case in survey(truth_dir).cases}
    cases = [imaged.get(case_id) or Case(case_id, {}, path) for case_id, path in truths.items()]
    try:
        verdict = resolve(cases, truth_labels)
    except DataError:
        if labels == AUTO or truth_labels != AUTO:
            raise
        verdict = resolve(cases, labels)
    references = {case.id: case.numbering for case in verdict.apply(cases)}
    if labels != AUTO:
        return Labelling(dict.fromkeys(preds, find_numbering(labels)), references)
    numbers: dict[str, frozenset[int]] = {}
    for case_id, path in preds.items():
        group = references.get(case_id, USUAL)
        numbers[group] = numbers.get(group, frozenset()) | _numbers(path)
    read_as = {name: name if NUMBERINGS[name].can_hold(found) else USUAL for name, found in numbers.items()}
    return Labelling({case_id: read_as[references.get(case_id, USUAL)] for case_id in preds}, references)


def _numbers(path: Path) -> frozenset[int]:
    """The tumour labels of a mask; none if it cannot be read or holds others than any numbering has."""
    try:
        found = frozenset(np.unique(read_labels(path)[0]).astype(int).tolist()) - {0}
    except DataError:  # scoring says why
        return frozenset()
    return found if found <= KNOWN_LABELS else frozenset()


def label_notes(labels: Mapping) -> list[str]:
    """Return what a reader of scores should know about the labels, a line each; see `Labelling.summary`."""
    notes = [labels["hint"]] if labels["hint"] else []
    for what in ("references", "predictions"):
        for name in labels[what].keys() - {"brats2020", "brats2023"}:
            notes.append(f"{what} are read as {name} ({NUMBERINGS[name].explain()})")
    if labels["without_class"]:
        counts = Counter(label for found in labels["without_class"].values() for label in found)
        listed = ", ".join(f"label {label} in {n}" for label, n in counts.items())
        notes.append(f"labels without a class count as background in the references: {listed} of the patients")
    for name in labels["references"]:
        if len(NUMBERINGS[name].regions) == 1:
            notes.append(f"{name} tells only {NUMBERINGS[name].regions[0]}: TC and ET are the same voxels")
    return notes
