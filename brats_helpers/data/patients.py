"""The patients of a run: choose and audit them, find them again, and describe them for checkpoints."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from brats_helpers.data.audit import audit, examine, excluded
from brats_helpers.data.cache import Packed, prepare
from brats_helpers.data.cases import Case, Survey, survey
from brats_helpers.data.identity import varies
from brats_helpers.data.nifti import spacing_in_lps
from brats_helpers.data.numbering import AUTO, with_numbering
from brats_helpers.data.published import check_published, is_published
from brats_helpers.data.sources import find_data
from brats_helpers.data.splits import pick_cases, read_splits
from brats_helpers.files import read_json
from brats_helpers.labels import USUAL, DataError
from brats_helpers.runs import PARTS, Run


class ChangedError(DataError):
    """The patients were read, and they differ from those that were split."""


def draw_patients(
    found: Survey,
    *,
    split: str,
    seed: int,
    workers: int,
    cache_dir: Path,
    skip_incomplete: bool = False,
    patient_pattern: str = "",
) -> tuple[list[Case], dict]:
    """Choose the patients of a run and audit them. Patients with errors do not count towards the numbers in `split`.

    Args:
        found: all patients.
        split, seed: see `splits.pick_cases`.
        workers, cache_dir, patient_pattern: see `audit.audit`.
        skip_incomplete: see `Survey.complete`.

    Returns:
        The patients, including those with errors (see `audit.leave_out`), and the report of `audit.audit`.

    Raises:
        DataError: no patient is complete, or a published split does not fit the data.
        ValueError: see `splits.pick_cases`.
    """
    if is_published(split):
        check_published(split, found.cases)
    complete = found.complete(skip_incomplete=skip_incomplete)
    how = {"workers": workers, "cache_dir": cache_dir, "patient_pattern": patient_pattern}
    read: dict[str, Case] = {}
    unusable: set[str] = set()
    while True:
        picked = {case.id: case for case in pick_cases(complete, split=split, seed=seed, unusable=unusable)}
        read |= picked
        report = audit(found, read.values(), **how)
        faulty = excluded(report).keys() & picked.keys()
        if not faulty:
            return sorted(read.values(), key=lambda case: case.id), report
        unusable |= faulty


def load_parts(run: Run) -> dict[str, list[Case]]:
    """Find a run's patients again, as 00_setup split them.

    Returns:
        Lists of cases under `train`, `val`, `test` and `unlabelled`.

    Raises:
        RunError: 00_setup has not run.
        ChangedError: the patients were read, and some are new or have different voxels.
        DataError: some patients cannot be read, so it is unknown whether they changed.
    """
    return _find_again(run)[0]


def load_prepared(run: Run, part: str) -> list[Packed]:
    """Open the prepared scans of one part of the run's patients, reusing what 00_setup prepared."""
    return prepare(load_parts(run)[part], cache_dir=Path(run.manifest["cache_dir"]), workers=1)


def facts_of(run: Run) -> dict:
    """Describe what a network of this run learns from, for its checkpoints.

    Returns:
        `labels`, the numbering of the masks; `spacing_mm`, the median voxel size of the training patients along X, Y, Z
        in LPS order; `patient_pattern`, see `identity.person_of`; and `patients`. The last gives for every training and
        validation patient `content`, a hash of all voxels; `group`, the person; `images`, a hash of each image; and
        `names`, the patient's IDs in other releases. `identity.seen_before` reads these facts.

    Raises:
        As `load_parts`.
    """
    parts, read = _find_again(run)
    splits, entries = read_json(run.splits), read_json(run.audit, {}).get("cases", {})
    groups = splits.get("groups", {})
    patients = {}
    for case in [*parts["train"], *parts["val"]]:
        patients[case.id] = {
            "content": read[case.id]["content"],
            "group": groups.get(case.id, case.id),
            "images": image_hashes(read[case.id]),
            "names": entries.get(case.id, {}).get("earlier_ids", []),
        }
    spacings = [spacing_in_lps(next(iter(read[case.id]["files"].values()))["affine"]) for case in parts["train"]]
    return {
        "labels": run.manifest.get("labels"),
        "spacing_mm": np.median(spacings, axis=0).tolist(),
        "patient_pattern": splits.get("patient_pattern", ""),
        "patients": patients,
    }


def hashes_of(run: Run) -> dict[str, list[str]]:
    """Return the image hashes of all the run's patients by ID, for `identity.seen_before`. Errors as `load_parts`."""
    return {case_id: image_hashes(facts) for case_id, facts in _find_again(run)[1].items()}


def image_hashes(facts: dict) -> list[str]:
    """Return the hashes of a patient's images from what `audit.examine` found; constant images have none."""
    return [file["content"] for kind, file in facts["files"].items() if kind != "seg" and varies(file)]


def voxel_ml(facts: dict) -> float:
    """Return the volume of a voxel in ml from what the audit knows of a patient whose files were read."""
    return float(np.prod(next(iter(facts["files"].values()))["spacing_mm"])) / 1000


def _find_again(run: Run) -> tuple[dict[str, list[Case]], dict[str, dict]]:
    """Return the parts as `load_parts` does, and what `audit.examine` finds in these patients' files."""
    content = read_json(run.need(run.splits, "00_setup"))
    parts = read_splits(run.splits) | {"unlabelled": content["unlabelled"]}
    manifest, before = run.manifest, content.get("contents", {})
    root = manifest["data"]
    if not Path(root).is_dir() and "asked" in manifest:  # such as a mount of an earlier Colab session
        root = find_data(**manifest["asked"]).root
    found = survey(root, manifest["modalities"], fill_missing=manifest.get("fill_missing", False))
    numbered = with_numbering(
        found.cases, numbering=manifest.get("labels", USUAL), asked=manifest.get("labels_asked", AUTO)
    )
    found = replace(found, cases=numbered)
    cases = {case.id: case for case in found.complete(skip_incomplete=True)}
    read = [case for case in cases.values() if before.get(case.id)]
    try:
        known = examine(found, read, workers=1, cache_dir=Path(manifest["cache_dir"]))
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error}. Mount or restore it.") from error
    labelled = {case_id for part in PARTS for case_id in parts[part]}
    lost = {case_id: "cannot be opened" for case_id, case in cases.items() if not _can_be_opened(case)}
    lost |= {case_id: "has no segmentation any more" for case_id in labelled & cases.keys() if not cases[case_id].seg}
    contents = dict.fromkeys(cases) | {case_id: facts["content"] for case_id, facts in known.items()}
    _refuse_changed(run, before, contents, lost)
    found_again = {}
    for name, ids in parts.items():
        found_again[name] = [cases[case_id] for case_id in ids]
    return found_again, known


def _refuse_changed(run: Run, before: dict[str, str | None], now: dict[str, str | None], lost: dict[str, str]) -> None:
    """Raise `ChangedError` if the content of the patients differs, `DataError` if patients cannot be reached.

    Args:
        run: the run.
        before, now: by ID the content of a patient, None if it was not read.
        lost: by ID, why a patient cannot be used, so that its content cannot be compared.
    """
    data = run.manifest["data"]
    lost = dict.fromkeys(before.keys() - now.keys(), "is gone") | lost
    other = {case_id for case_id in before.keys() & now.keys() - lost.keys() if before[case_id] != now[case_id]}
    new = (
        now.keys() - before.keys() if not before or before.keys() - lost.keys() else set()
    )  # otherwise another data set
    for what, ids in (("has other voxels", other), ("is new", new)):
        if ids:
            raise ChangedError(f"{data} changed since {run.splits} was written: {min(ids)} {what}. Run 00_setup again.")
    if lost:
        raise DataError(
            f"{data} lacks {len(lost)} of the {len(before)} patients of {run.splits}: {min(lost)} {lost[min(lost)]}."
            " Mount or restore them, or start a new run (--run) with the remaining patients."
        )


def _can_be_opened(case: Case) -> bool:
    try:
        for path in case.files.values():
            with open(path, "rb") as file:
                file.read(1)
    except OSError:
        return False
    return True
