"""The vocabulary (modalities, labels, regions) and the patients' files on disk.

A *case* is one patient's scans. This module is the one home of the names of modalities, the
numbers of labels and the sets of classes that make up a region; everything else imports them.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from brats_helpers.data.tables import ENDINGS as TABLE_ENDINGS
from brats_helpers.labels import MODALITIES, DataError, check_modalities

# File names end in one of these; BraTS 2023 renamed the modalities.
_SUFFIXES = {name: name for name in (*MODALITIES, "seg")} | {
    "t1n": "t1",
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t2w": "t2",
    "t2f": "flair",
}
_NAMED = 3  # patients in one error
_STRAYS = ("__MACOSX", "Thumbs.db", "desktop.ini")  # beside everything that is hidden
_NO_SEGMENTATION = re.compile("brain|skull|pred", re.IGNORECASE)  # names of other label maps people keep there
_AMBIGUOUS = ("two-files", "two-folders", "two-segmentations")


@dataclass(frozen=True)
class Case:
    """One patient: the files of its modalities and, where there is one, its segmentation."""

    id: str
    images: dict[str, Path] = field(hash=False)
    seg: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files by modality, the segmentation last, as `seg`."""
        return self.images | ({"seg": self.seg} if self.seg else {})

    @property
    def folder(self) -> Path:
        """Where the patient's files lie."""
        return next(iter(self.files.values())).parent


@dataclass(frozen=True)
class Finding:
    """One thing about the data that somebody should know.

    Attributes:
        code: a short name that stays, such as `missing-modality`.
        severity: `error`, the patient cannot be used; `warning`, it can, and the message says what was done; `note`.
        file: where, relative to the data's folder; empty where it is about no single file.
        message: a sentence: what was found, what was expected, what was or is to be done.
    """

    code: str
    severity: str
    file: str
    message: str


@dataclass(frozen=True)
class Survey:
    """What lies below a folder, by the names of the files alone.

    Attributes:
        root: the folder.
        modalities: what every patient is expected to have.
        cases: all patients, sorted by ID, with those of `modalities` that they have.
        findings: by case ID; under the empty ID what belongs to no patient.
        tables: CSV and Excel files.
    """

    root: Path
    modalities: tuple[str, ...] = MODALITIES
    cases: list[Case] = field(default_factory=list)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)

    def complete(self, *, skip_incomplete: bool) -> list[Case]:
        """The patients whose names leave no error.

        Args:
            skip_incomplete: leave out a patient that lacks a modality, as one with any other error, instead of raising.

        Raises:
            DataError: a patient lacks a modality, or none is left.
        """
        if not skip_incomplete:
            self.refuse("missing-modality")
        faulty = {case_id for case_id, findings in self.findings.items() if has_error(findings)}
        cases = [case for case in self.cases if case.id not in faulty]
        if not cases:
            raise DataError(
                f"No patient with {', '.join(self.modalities)} below {self.root}. Expected files such as"
                " BraTS20_Training_001/BraTS20_Training_001_t1.nii or"
                " BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1n.nii.gz."
            )
        return cases

    def refuse(self, *codes: str) -> None:
        """Raise `DataError` if a patient has a finding of one of `codes`, naming the first few."""
        found = [(case_id, finding) for case_id in sorted(self.findings) for finding in self.findings[case_id]]
        found = [(case_id, finding) for case_id, finding in found if finding.code in codes]
        if not found:
            return
        lines = [f"{case_id}: {finding.message}" for case_id, finding in found[:_NAMED]]
        if len(found) > _NAMED:
            lines.append(f"… and {len(found) - _NAMED:,} more, which `python -m brats_helpers check` lists.")
        if "missing-modality" in {finding.code for _, finding in found}:
            lines.append(
                "Ask for modalities that every patient has (-p modalities flair,t1ce),"
                " or go on without these patients (-p skip_incomplete true)."
            )
        raise DataError("\n".join([*lines, f"All of it below {self.root}."]))

    def relative(self, path: Path) -> str:
        """A path as findings name it: from the data's folder."""
        return path.relative_to(self.root).as_posix()

    def _add(self, case_id: str, code: str, severity: str, path: Path | None, message: str) -> None:
        file = self.relative(path) if path else ""
        self.findings.setdefault(case_id, []).append(Finding(code, severity, file, message))

    def _unused(self, path: Path) -> None:
        self._add("", "unused-file", "note", path, "By its name no patient's scan or segmentation; it is not used.")

    def _once(self, cases: Iterable[Case]) -> list[Case]:
        """Sort by ID, with a finding where two patients share one."""
        found: dict[str, Case] = {}
        for case in cases:
            if case.id in found:
                both = (found[case.id], case)
                if case.folder == found[case.id].folder:
                    places = " and ".join(self.relative(one.seg) for one in both)
                    self._add(case.id, "two-files", "error", case.seg, f"Two label maps, {places}; keep one of them.")
                    continue
                places = " and ".join(self.relative(one.folder) for one in both)
                self._add(
                    case.id, "two-folders", "error", case.folder, f"Lies in two folders, {places}; keep one of them."
                )
            else:
                found[case.id] = case
        return [found[case_id] for case_id in sorted(found)]


def has_error(findings: Iterable[Finding]) -> bool:
    """Whether one of the findings makes the patient unusable."""
    return any(finding.severity == "error" for finding in findings)


def find_cases(root: Path | str, modalities: Sequence[str] = MODALITIES) -> list[Case]:
    """Find every patient below `root`, in the layouts of BraTS 2018 to 2023.

    Folders may be nested, or links to folders. Files end in `_t1.nii`, `-t1n.nii.gz` and the like; the
    segmentation is the file that ends in `seg` or, failing that, the one file of the folder that is no
    modality and by its name no brain mask or prediction (BraTS20_Training_355 calls it `W39_1998.09.19_Segm.nii`).

    Args:
        root: a folder of patients, or one patient's folder.
        modalities: names from `MODALITIES` that every patient must have.

    Returns:
        The cases sorted by ID, each with exactly `modalities`, in that order.

    Raises:
        DataError: nothing found, a modality missing, an ID found twice, or a folder in which
            the segmentation cannot be told from other files.
    """
    found = survey(root, modalities)
    found.refuse("missing-modality", *_AMBIGUOUS)
    return found.complete(skip_incomplete=False)


def find_segs(root: Path | str) -> dict[str, Path | None]:
    """Find every patient's segmentation below `root`, whatever modalities lie beside it.

    Label maps alone will do, flat or in folders, called `<case>_seg` or just `<case>`. Files called `<case>_soft`, as
    `predict` writes probabilities, are none.

    Returns:
        Case ID to file, sorted by ID; None for a patient with images only.

    Raises:
        DataError: as `find_cases`, but for modalities.
    """
    found = _scan(Path(root))
    cases = [case for case in found.cases if case.images or not case.id.endswith("_soft")]
    segs = {case.id: case.seg for case in found._once(cases)}
    found.refuse(*_AMBIGUOUS)
    if not segs:
        raise DataError(f"No segmentation below {root}. Expected files such as BraTS20_Training_001_seg.nii.gz.")
    return segs


def survey(root: Path | str, modalities: Sequence[str] = MODALITIES) -> Survey:
    """Look through the names of all files below `root`: no file is opened, and what is wrong becomes a finding.

    Raises:
        DataError: `root` is no folder, or `modalities` are none of `MODALITIES`.
    """
    check_modalities(modalities)
    found = _scan(Path(root))
    imaged = {case.id for case in found.cases if case.images}
    patients, cases = [], []
    for case in found.cases:
        if case.images or (recognise(case.seg)[2] == "seg" and case.id not in imaged):
            patients.append(case)
        else:
            found._unused(case.seg)
    for case in found._once(patients):
        images = {name: case.images[name] for name in modalities if name in case.images}
        missing = [name for name in modalities if name not in images]
        if not case.images:
            found._add(case.id, "no-images", "error", case.seg, "No image beside this segmentation; put them there.")
        elif missing:
            path = _expected(case, missing[0])
            found._add(
                case.id, "missing-modality", "error", path,
                f"No {path.name} in {found.relative(path.parent)}"
                f" (missing: {', '.join(missing)}; found: {', '.join(case.images)}); put it there.",
            )  # fmt: skip
        if case.seg is None:
            found._add(case.id, "no-segmentation", "note", None, "No segmentation: predicted, but never scored.")
        elif recognise(case.seg)[2] != "seg":
            found._add(
                case.id, "unusual-name", "warning", case.seg,
                "Taken as the segmentation: the one file of its folder that is no modality. Remove it if it is none.",
            )  # fmt: skip
        cases.append(Case(case.id, images, case.seg))
    return replace(found, modalities=tuple(modalities), cases=cases)


def _scan(root: Path) -> Survey:
    """Group the NIfTI files below `root` by patient; a label map without images is a case as well."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give the folder that holds the patients' folders.")
    scan = Survey(root)
    found: dict[Path, dict[str, dict[str, Path]]] = {}
    strangers: dict[Path, list[Path]] = {}
    for path in walk(root):
        if _is_stray(path.name):
            message = "Left by an operating system or a broken-off copy; it is not used."
            scan._add("", "stray-file", "note", path, message)
        elif path.name.lower().endswith(TABLE_ENDINGS):
            scan.tables.append(path)
        elif path.name.lower().endswith((".nii", ".nii.gz")) and path.is_file():
            case_id, _, kind = recognise(path)
            files = found.setdefault(path.parent, {}).setdefault(case_id, {}) if kind else {}
            if kind is None:
                strangers.setdefault(path.parent, []).append(path)
            elif kind in files:
                names = f"{files[kind].name} and {path.name} in {scan.relative(path.parent)}"
                scan._add(case_id, "two-files", "error", path, f"Two files for {kind}, {names}; keep one of them.")
            else:
                files[kind] = path

    for folder, patients in found.items():
        others = strangers.pop(folder, [])
        imaged = any({*files} - {"seg"} for files in patients.values())
        for case_id, files in patients.items():
            seg = files.pop("seg", None)
            if seg is None and len(patients) == 1:
                maps = [path for path in others if not _NO_SEGMENTATION.search(_stem(path).removeprefix(case_id))]
                if len(maps) > 1:
                    names = f"{', '.join(path.name for path in maps)} in {scan.relative(folder)}"
                    scan._add(
                        case_id, "two-segmentations", "error", maps[0],
                        f"Which of {names} is the segmentation? Keep one of them there.",
                    )  # fmt: skip
                seg = maps[0] if maps else None
                others = [path for path in others if path != seg]
            scan.cases.append(Case(case_id, files, seg))
        if not imaged:  # label maps alone, whether called `<case>_seg` or just `<case>`
            strangers[folder] = others
            continue
        for path in others:
            scan._unused(path)
    scan.cases.extend(Case(_stem(path), {}, path) for paths in strangers.values() for path in paths)
    return scan


def walk(root: Path) -> list[Path]:
    """All files below `root`, sorted, and strays, files or folders, which are not entered.

    Links to folders are followed, those that lead back up excepted. A folder comes once, by its own path if it has one.
    """
    found: list[Path] = []
    seen: set[str] = set()
    tops = [os.fspath(root)]
    for top in tops:  # which grows by the links
        for folder, folders, files in os.walk(top):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            strays = [name for name in folders if _is_stray(name)]
            folders[:] = sorted({*folders}.difference(strays))
            found += [Path(folder, name) for name in (*files, *strays)]
            for link in (os.path.join(folder, name) for name in folders):
                if os.path.islink(link) and not Path(real).is_relative_to(os.path.realpath(link)):
                    tops.append(link)
    return sorted(found)


def _is_stray(name: str) -> bool:
    return name.startswith(".") or name in _STRAYS


def recognise(path: Path) -> tuple[str, str, str | None]:
    """Split `BraTS20_Training_001_t1ce.nii` into its case ID, its ending, and what that stands for (None: unknown)."""
    stem = _stem(path)
    cut = max(stem.rfind("_"), stem.rfind("-"))
    case_id = stem[:cut] if cut >= 0 else path.parent.name  # `t1.nii` in the patient's folder
    ending = stem[cut + 1 :].lower()
    return case_id, ending, _SUFFIXES.get(ending)


def _expected(case: Case, modality: str) -> Path:
    """The file that a patient lacks, named as its others are."""
    like = next(iter(case.images.values()))
    ending = recognise(like)[1]
    names = [name for name, meaning in _SUFFIXES.items() if meaning == modality]  # the old one first
    start = len(_stem(like)) - len(ending)
    name = names[ending not in MODALITIES]
    return like.with_name(like.name[:start] + name + like.name[start + len(ending) :])


def _stem(path: Path) -> str:
    """The file's name without `.nii` or `.nii.gz`, in whatever case they are written."""
    return path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".nii"))]
