"""Pairing of predictions with references."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from brats_helpers.data.cases import survey_segs
from brats_helpers.data.filenames import is_nifti, recognise
from brats_helpers.data.walk import walk

_SUGGESTED = 20  # most names that get a suggestion, because finding one is slow
_YEAR = re.compile(r"^brats\d+", re.IGNORECASE)  # in BraTS20_Training_001; it does not identify the patient
Digits = tuple[int, ...]


@dataclass(frozen=True)
class PairedFiles:
    """A prediction and its reference.

    Attributes:
        pred, truth: the files.
        name: the prediction's name, which differs from the reference's if they were paired by digits.
    """

    pred: Path
    truth: Path
    name: str


def find_pairs(
    pred_dir: Path | str, truth_dir: Path | str, *, by_digits: bool
) -> tuple[dict[str, PairedFiles], dict[str, str]]:
    """Pair predictions with references by case ID.

    References are found by `cases.survey_segs`; so are predictions, which may also lie in one folder per patient under
    one name, such as `X/pred.nii.gz`.

    Args:
        by_digits: pair the remaining files by the numbers in their names, if no other name in the same folder has
            them. `SEG-00217-000` then belongs to `BraTS-MET-00217-000`.

    Returns:
        Pairs by the reference's ID; and by ID, why a patient of either folder is unpaired: ambiguous files, an extra or
        missing prediction, or no reference.

    Raises:
        DataError: a folder that holds no label map.
    """
    truths, reasons = survey_segs(truth_dir)
    preds, faulty = _predictions(Path(pred_dir), truths.keys() | reasons.keys())
    reasons = faulty | reasons
    pairs = {case: case for case in preds.keys() & truths.keys()}
    if by_digits:
        pairs |= _by_digits(preds.keys(), truths.keys())
    left = sorted(preds.keys() - set(pairs.values()) - reasons.keys())
    hints = _hints(left, truths.keys() - pairs.keys(), truths.keys())
    for name in left:
        reasons[name] = f"extra: {preds[name]} has no patient in {truth_dir}{hints.get(name, '')}"
    for case in truths.keys() - reasons.keys():
        if truths[case] is None:
            reasons[case] = f"unlabelled: the patient has no segmentation in {truth_dir}"
        elif case not in pairs:
            reasons[case] = f"missing: no prediction in {pred_dir}"
    found = {case: name for case, name in pairs.items() if case not in reasons and name not in reasons}
    return {case: PairedFiles(preds[name], truths[case], name) for case, name in sorted(found.items())}, reasons


def _predictions(root: Path, known: Container[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Label maps by ID, and by ID why there is none; a file whose name is not an ID takes the name of its folder."""
    in_folders = [path for path in walk(root) if is_nifti(path) and path.is_file() and path.parent != root]
    places = Counter(path.name for path in in_folders)
    by_folder = defaultdict(list)
    for path in in_folders:
        name, folder = recognise(path), path.parent.name
        if name.kind or name.case_id in known:
            continue
        if places[path.name] > 1 or folder in known or len(_digits(name.case_id)) < len(_digits(folder)):
            by_folder[folder].append(path)
    found, faulty = survey_segs(root)
    own = {recognise(path).case_id for paths in by_folder.values() for path in paths}
    found = {case: path for case, path in found.items() if path and case not in own}
    faulty = {case: reason for case, reason in faulty.items() if case not in own}
    for folder, paths in by_folder.items():
        if len(paths) == 1 and folder not in found:
            found[folder] = paths[0]
        elif len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            faulty[folder] = f"ambiguous: {names} in {paths[0].parent}; keep one label map there."
    return found, faulty


def _digits(name: str) -> Digits:
    """The numbers in a name, without the year of BraTS20_ and the like."""
    return tuple(map(int, re.findall(r"\d+", _YEAR.sub("", name))))


def _unique(names: Container[str]) -> dict[Digits, str]:
    """Names by their numbers, where no other name has the same ones."""
    digits = {name: _digits(name) for name in names}
    count = Counter(digits.values())
    return {found: name for name, found in digits.items() if found and count[found] == 1}


def _by_digits(preds: Container[str], truths: Container[str]) -> dict[str, str]:
    """Predictions by reference, for different names with the same numbers."""
    mine, theirs = _unique(preds), _unique(truths)
    shared = mine.keys() & theirs.keys()
    return {theirs[found]: mine[found] for found in shared}


def _hints(names: list[str], free: Container[str], truths: Container[str]) -> Mapping[str, str]:
    """By name, a suggestion of the reference that may be meant."""
    numbered = _unique(truths)
    hints = {}
    for name in names:
        if (nearest := numbered.get(_digits(name))) in free:
            hints[name] = f"; the nearest name is {nearest}: rename it, or pair by digits (--pair digits)"
    for name in [name for name in names if name not in hints][:_SUGGESTED]:
        nearest = difflib.get_close_matches(name, free, n=1)
        if nearest:
            hints[name] = f"; the nearest name is {nearest[0]}: rename it if that is the patient"
    return hints
