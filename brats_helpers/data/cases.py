"""Patients and their files. A *case* is one patient's scans, or one visit of a patient."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.data.filenames import named_like
from brats_helpers.data.findings import Finding, why_unusable
from brats_helpers.data.layouts import Layout, Patient, lay_out
from brats_helpers.data.nifti import in_lps, read_image, read_nifti, spacing_mm
from brats_helpers.data.walk import is_text
from brats_helpers.labels import (
    MODALITIES,
    DataError,
    check_modalities,
    numbering_of_id,
    numbering_of_names,
    usual_numbering,
)
from brats_helpers.log import warn

_NAMED = 3  # patients in one error


@dataclass(frozen=True)
class Case:
    """One patient: the files of its modalities and, where there is one, its segmentation.

    Attributes:
        id: the case ID.
        images: files by modality.
        seg: the segmentation.
        modalities: the channels that are wanted, in order; those of `images` by default. One that is not in `images`
            counts as background, see `missing`.
        channels: by modality, its index on the last axis of a file that holds several modalities.
        dataset: the `dataset.json` that describes the files in the layouts of the Decathlon and nnU-Net.
        numbering: how the segmentation's labels are numbered, a key of `labels.NUMBERINGS`; by default the one that
            the ID or the data set implies, else `labels.usual_numbering`. See `numbering.resolve`.
    """

    id: str
    images: dict[str, Path] = field(hash=False)
    seg: Path | None = None
    modalities: tuple[str, ...] = ()
    channels: dict[str, int] = field(default_factory=dict, hash=False)
    dataset: Path | None = None
    numbering: str = ""

    def __post_init__(self):
        if not self.modalities:
            object.__setattr__(self, "modalities", tuple(self.images))
        if not self.numbering:
            object.__setattr__(self, "numbering", self.told_numbering or usual_numbering(self.id))

    @property
    def told_numbering(self) -> str:
        """The numbering that the ID or `dataset.json` implies, or an empty string."""
        return numbering_of_id(self.id) or (_numbering_of(self.dataset) if self.dataset else "")

    @property
    def missing(self) -> tuple[str, ...]:
        """The wanted modalities that the patient lacks."""
        return tuple(name for name in self.modalities if name not in self.images)

    @property
    def files(self) -> dict[str, Path]:
        """The files by modality, the segmentation last, as `seg`."""
        return self.images | ({"seg": self.seg} if self.seg else {})

    @property
    def folder(self) -> Path:
        """The folder that holds the patient's files."""
        return next(iter(self.files.values())).parent

    def read(self, modality: str) -> tuple[np.ndarray, nib.Nifti1Image]:
        """Read one modality in LPS order, see `nifti.read_image`. A `missing` modality is 0 everywhere."""
        if modality in self.missing:
            voxels, image = self.read(next(iter(self.images)))
            empty = np.zeros_like(voxels)
            return empty, type(image)(empty, image.affine, image.header)
        return read_image(self.images[modality], self.channels.get(modality))


def stored(case: Case) -> tuple[nib.Nifti1Image, tuple[float, float, float]]:
    """A case's first image as stored, and the voxel size in mm along X, Y, Z in LPS order."""
    name, path = next(iter(case.images.items()))
    image = read_nifti(path)
    return image, spacing_mm(in_lps(image, path, channel=case.channels.get(name)))


@cache
def _numbering_of(dataset: Path) -> str:
    """The numbering that the labels of a `dataset.json` have, or an empty string."""
    try:
        return numbering_of_names(json.loads(dataset.read_text("utf-8-sig"))["labels"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


@dataclass(frozen=True)
class Survey:
    """The patients below a folder, found by file name.

    Attributes:
        root: the folder.
        modalities: what every patient is expected to have.
        cases: all patients, sorted by ID, with those of `modalities` that they have.
        findings: by case ID; those that concern no patient have the empty ID.
        tables: files that may say something about patients, CSV or Excel.
    """

    root: Path
    modalities: tuple[str, ...] = MODALITIES
    cases: list[Case] = field(default_factory=list)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)

    def complete(self, *, skip_incomplete: bool) -> list[Case]:
        """The patients whose file names give no error.

        Args:
            skip_incomplete: leave out patients that lack a modality, like those with other errors, instead of raising.

        Raises:
            DataError: a patient lacks a modality, or no patient is left.
        """
        if not skip_incomplete:
            self._refuse_incomplete()
        faulty = self.faulty()
        cases = [case for case in self.cases if case.id not in faulty]
        if not cases:
            raise DataError(self.nothing())
        return cases

    def nothing(self) -> str:
        """The message for a folder without patients: what was expected, and what was found but not read."""
        return (
            f"No patient with {', '.join(self.modalities)} below {self.root}. Expected files such as"
            " BraTS20_Training_001/BraTS20_Training_001_t1.nii or"
            f" BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1n.nii.gz.{_unread(self.findings)}"
        )

    def faulty(self) -> dict[str, str]:
        """Why each patient with an error cannot be used, by ID."""
        return {
            case_id: why
            for case_id, listed in sorted(self.findings.items())
            if case_id and (why := why_unusable(listed))
        }

    def _refuse_incomplete(self) -> None:
        """Raise `DataError` if a patient lacks a modality, naming the first few."""
        lines = [
            f"{case_id}: {finding.message}"
            for case_id in sorted(self.findings)
            for finding in self.findings[case_id]
            if finding.code == "missing-modality"
        ]
        if len(lines) > _NAMED:
            lines[_NAMED:] = [f"… and {len(lines) - _NAMED:,} more, which `python -m brats_helpers check` lists."]
        if lines:
            lines.append(
                "Ask for modalities that every patient has (-p modalities flair,t1ce),"
                " go on without these patients (-p skip_incomplete true)"
                " or treat missing modalities as background (-p fill_missing true)."
            )
            raise DataError("\n".join([*lines, f"The patients are below {self.root}."]))

    def relative(self, path: Path) -> str:
        """A path relative to the data folder, as findings give it."""
        return path.relative_to(self.root).as_posix()


def find_cases(root: Path | str, modalities: Sequence[str] = MODALITIES) -> list[Case]:
    """Find every usable patient below `root`, in the layouts of BraTS, the Decathlon and nnU-Net.

    Folders may be nested, or links to folders. Files end in `_t1.nii`, `-t1n.nii.gz` and the like, a segmentation in
    `seg`, `segm`, `label`, `OT`, `gtv` and the like. Masks may lie in a folder of their own. `_brain` and `_final` are
    not part of the ID. A patient with ambiguous files is left out, with a warning that names them.

    Args:
        root: a folder of patients, or one patient's folder.
        modalities: names from `MODALITIES` that every patient must have.

    Returns:
        The cases sorted by ID, each with exactly `modalities`, in that order.

    Raises:
        DataError: nothing found, or a modality missing.
    """
    found = survey(root, modalities)
    cases = found.complete(skip_incomplete=False)
    for case_id, reason in found.faulty().items():
        warn(f"left out: {case_id}: {reason}")
    return cases


def survey_segs(root: Path | str) -> tuple[dict[str, Path | None], dict[str, str]]:
    """Find every patient's segmentation below `root`, whatever modalities lie beside it.

    Label maps without scans are enough, in one folder or several, named `<case>_seg` or just `<case>`. Files named
    `<case>_soft`, the probabilities that `predict` writes, do not count.

    Returns:
        Files by case ID, sorted, None for a patient with images only; and by case ID, why patients with ambiguous
        files are left out.

    Raises:
        DataError: nothing found.
    """
    layout = _lay_out(root)
    for case_id, paths in layout.maps.items():
        layout.add_map(case_id, paths)
    segs, faulty = {}, {}
    for case_id, patient in sorted(layout.patients.items()):
        if why := why_unusable(layout.findings.get(case_id, ())):
            faulty[case_id] = why
        elif patient.imaged or not case_id.endswith("_soft"):
            segs[case_id] = patient.files.get("seg")
    if not segs and not faulty:
        expected = "Expected files such as BraTS20_Training_001_seg.nii.gz."
        raise DataError(f"No segmentation below {root}. {expected}{_unread(layout.findings)}")
    return segs, faulty


def survey(root: Path | str, modalities: Sequence[str] = MODALITIES, *, fill_missing: bool = False) -> Survey:
    """Find the patients below `root` by file name. Every problem becomes a finding.

    Args:
        root: a folder of patients, or one patient's folder.
        modalities: names from `MODALITIES` that every patient is expected to have.
        fill_missing: treat a modality that a patient lacks as background, with a warning instead of an error.

    Raises:
        DataError: `root` is not a folder, or a name in `modalities` is not one of `MODALITIES`.
    """
    check_modalities(modalities)
    layout = _lay_out(root)
    for paths in layout.maps.values():
        for path in paths:
            layout.unused(path)
    cases = [
        _wanted(layout, patient, tuple(modalities), fill_missing=fill_missing) for patient in layout.patients.values()
    ]
    return Survey(layout.root, tuple(modalities), cases, layout.findings, layout.tables)


def _lay_out(root: Path | str) -> Layout:
    if not Path(root).is_dir():
        raise DataError(f"{root} is not a folder. Give the folder that holds the patients' folders.")
    if not is_text(Path(root)):
        raise DataError(f"The name {str(root)!r} is not UTF-8. Rename the folder.")
    return lay_out(Path(root))


def _wanted(layout: Layout, patient: Patient, modalities: tuple[str, ...], *, fill_missing: bool) -> Case:
    """Make a case with the wanted modalities, and add findings about missing files."""
    images = {name: patient.files[name] for name in modalities if name in patient.files}
    seg, missing = patient.files.get("seg"), [name for name in modalities if name not in images]
    if not patient.imaged:
        text = "No images beside this segmentation; add them there."
        layout.add(patient.id, "no-images", "error", seg, text)
    elif missing and images and fill_missing:
        text = f"No {', '.join(missing)}: every voxel there counts as background."
        layout.add(patient.id, "filled-modality", "warning", None, text)
    elif missing:
        others = [name for name in MODALITIES if name in patient.files]
        path = patient.files[others[0]]
        lacks, has = ", ".join(missing), ", ".join(others)
        if patient.dataset:
            text = f"No file or channel of dataset.json is {missing[0]} (missing: {lacks}; found: {has})."
        else:
            path = named_like(path, missing[0])
            folder = layout.relative(path.parent)
            text = f"No {path.name} in {folder} (missing: {lacks}; found: {has}); put it there."
        layout.add(patient.id, "missing-modality", "error", path, text)
    if seg is None:
        layout.add(
            patient.id, "no-segmentation", "note", None, "No segmentation: the patient is predicted but not scored."
        )
    wanted = modalities if fill_missing and images else ()
    channels = {name: patient.channels[name] for name in images if name in patient.channels}
    return Case(patient.id, images, seg, wanted, channels, patient.dataset)


def _unread(findings: dict[str, list[Finding]]) -> str:
    """What was found but not read, for the error that nothing was found."""
    return "".join(f" {finding.message}" for finding in findings.get("", ()) if finding.code == "unread-format")
