"""Group the files below a folder into patients, in every common layout.

Files are grouped by folder and by the case ID in their names. Then the parts of one patient are joined by ID: scans in
one folder and masks in another, or two copies of one patient. Names decide; a file is opened only to compare copies,
to recognise DICOM and NIfTI of another ending, or to read `dataset.json`.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brats_helpers.data.filenames import (
    MODALITY_WORDS,
    Name,
    is_nifti,
    is_other_map,
    is_segmentation_folder,
    recognise,
    stem_of,
)
from brats_helpers.data.findings import Finding
from brats_helpers.data.nifti import same_volume
from brats_helpers.data.tables import ENDINGS as TABLE_ENDINGS
from brats_helpers.data.walk import is_stray, is_text, walk

_CONVERT = "Convert them to .nii.gz, with SimpleITK for instance: WriteImage(ReadImage('x{0}'), 'x.nii.gz')."
_UNREAD = {
    ".mha": _CONVERT,
    ".mhd": _CONVERT,
    ".nrrd": _CONVERT,
    ".nhdr": _CONVERT,
    ".hdr": _CONVERT,
    ".img": _CONVERT,
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"), "Unpack the files that you need."),
    ".mgz": "Convert them to .nii.gz, with mri_convert for instance.",
    ".mnc": "Convert them to .nii.gz, with mnc2nii for instance.",
    "DICOM": "Convert each series to .nii.gz, with dcm2niix for instance.",
}
_DICOM_NAMES = re.compile(r"(.*\.(dcm|ima)|dicomdir)", re.IGNORECASE)
_IMAGE_FOLDER = re.compile(r"(images?|imgs?)(tr|ts|va|val)?", re.IGNORECASE)
_PREDICTION_FOLDER = re.compile(r"(^|[_\-. ])(pred|inference|output|submission|result)", re.IGNORECASE)


@dataclass
class Patient:
    """The files of one patient.

    Attributes:
        id: the case ID.
        files: by modality, and `seg`.
        channels: by modality, its index on the last axis of a file that holds several modalities.
        dataset: the `dataset.json` that describes the files, if one does.
    """

    id: str
    files: dict[str, Path] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    dataset: Path | None = None

    @property
    def imaged(self) -> bool:
        """Whether the patient has at least one modality."""
        return bool(self.files.keys() - {"seg"})

    @property
    def folder(self) -> Path:
        """The folder of the patient's first file."""
        return next(iter(self.files.values())).parent


@dataclass
class Layout:
    """Everything found below a folder.

    Attributes:
        root: the folder.
        patients: by ID, including those with only a segmentation.
        maps: files named `<case>.nii.gz` in folders without scans, by ID; they may be label maps.
        tables: files that may say something about patients.
        findings: by case ID; those that concern no patient have the empty ID.
    """

    root: Path
    patients: dict[str, Patient] = field(default_factory=dict)
    maps: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    tables: list[Path] = field(default_factory=list)
    findings: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, case_id: str, code: str, severity: str, path: Path | None, message: str) -> None:
        """Add a finding."""
        file = self.relative(path) if path else ""
        self.findings.setdefault(case_id, []).append(Finding(code, severity, file, message))

    def unused(self, path: Path, why: str = "By its name neither a scan nor a segmentation") -> None:
        """Note a file that is not used."""
        self.add("", "unused-file", "note", path, f"{why}; it is not used.")

    def add_map(self, case_id: str, paths: Sequence[Path]) -> None:
        """Use files named `<case>.nii.gz` as the segmentation of a patient without scans."""
        patient = self.patients.setdefault(case_id, Patient(case_id))
        if not patient.imaged:
            paths = [*patient.files.values(), *paths]
            _compare(self, case_id, paths, "two-files", "Two label maps")
            patient.files["seg"] = paths[0]

    def relative(self, path: Path) -> str:
        """A path relative to the data folder, as findings give it."""
        return path.relative_to(self.root).as_posix().encode("utf-8", "backslashreplace").decode()

    def both(self, paths: Iterable[Path]) -> str:
        """Name several files."""
        return " and ".join(map(self.relative, paths))


def lay_out(root: Path) -> Layout:
    """Group the files below `root` by patient."""
    layout = Layout(root)
    folders = {folder: _parts_of(layout, folder, paths) for folder, paths in _by_folder(layout).items()}
    imaged = {part.id for parts in folders.values() for part in parts.values() if part.imaged}
    found: dict[str, list[Patient]] = defaultdict(list)
    for folder, parts in folders.items():
        _adopt(layout, folder, parts, imaged)
        for part in parts.values():
            found[part.id].append(part)
    if imaged:
        _drop_predictions(layout, found)
    for case_id in sorted(found):
        layout.patients[case_id] = _joined(layout, found[case_id])
    return layout


def _by_folder(layout: Layout) -> dict[Path, list[Path]]:
    """NIfTI files by the folder that they belong to; other files become tables or findings."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    unread: dict[str, list[Path]] = defaultdict(list)
    nameless: dict[Path, list[Path]] = defaultdict(list)

    def lost(error: OSError) -> None:
        text = f"This folder cannot be read ({error.strerror}), so patients in it are not found. Make it readable."
        layout.add("", "unreadable-folder", "warning", Path(error.filename), text)

    for path in walk(layout.root, lost=lost):
        suffix = path.suffix.lower()
        if remark := _why_not(path):
            layout.add("", *remark[:2], path, remark[2])
        elif suffix in TABLE_ENDINGS:
            layout.tables.append(path)
        elif is_nifti(path) and path.is_file():
            inside = is_nifti(path.parent) and path.parent != layout.root
            folders[path.parent.parent if inside else path.parent].append(path)
        elif suffix in _UNREAD:
            unread[suffix].append(path)
        elif _DICOM_NAMES.fullmatch(path.name):
            unread["DICOM"].append(path)
        elif _is_misnamed(path):
            text = "A NIfTI file, perhaps incomplete, whose name does not end in .nii or .nii.gz; it is not read."
            layout.add("", "unread-format", "warning", path, f"{text} Fetch it again or give it that ending.")
        elif not suffix or suffix[1:].isdigit():
            nameless[path.parent].append(path)
    for paths in nameless.values():
        if _is_dicom(paths[0]):
            unread["DICOM"] += paths
    for kind, paths in unread.items():
        text = f"{len(paths):,} {kind} file{'s' if len(paths) > 1 else ''} found but not read, such as this one."
        layout.add("", "unread-format", "warning", paths[0], f"{text} {_UNREAD[kind].format(kind)}")
    return folders


def _why_not(path: Path) -> tuple[str, str, str] | None:
    """Code, severity and message for a path that cannot be used, whatever its name; None for a usable one."""
    if is_stray(path.name):
        return "stray-file", "note", "Left by an operating system or an interrupted copy; it is not used."
    if not is_text(path):
        text = "Its name is not UTF-8, as in some old archives; the file is not used. Rename it."
        return "unreadable-name", "warning", text
    if path.is_file():
        return None
    if path.is_symlink():
        text = (
            f"A link to {os.readlink(path)}, which does not exist; it is not used. Fetch that file or repair the link."
        )
        return "broken-link", "warning", text
    if path.is_dir():
        return "empty-folder", "warning", "An empty folder. If a patient belongs there, fetch or unpack it again."
    return None


def _is_dicom(path: Path) -> bool:
    return _head_of(path)[128:132] == b"DICM"


def _is_misnamed(path: Path) -> bool:
    """Whether a file that lacks the ending of NIfTI is one: `X_seg`, `X_seg.gz`, `X_seg.nii.gz.part`."""
    meant = path.suffix.lower() in ("", ".gz") and recognise(path).kind
    if not meant and ".nii" not in path.name.lower():
        return False
    head = _head_of(path)
    return head[:2] == b"\x1f\x8b" or head[4:7] == b"n+2" or head[344:347] == b"n+1"


def _head_of(path: Path) -> bytes:
    """The bytes that tell a format; none of what cannot be read, or is no regular file and might block."""
    try:
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(352)
    except OSError:
        pass
    return b""


def _parts_of(layout: Layout, folder: Path, paths: Sequence[Path]) -> dict[str, Patient]:
    """Each patient's files in one folder, by ID."""
    named: dict[str, dict[str, list[tuple[Name, Path]]]] = defaultdict(lambda: defaultdict(list))
    unrecognised = []
    for path in paths:
        name = recognise(path)
        if name.kind:
            named[name.case_id][name.kind].append((name, path))
        else:
            unrecognised.append(path)
    _join_t2_flair(named, folder)
    parts = {case_id: _part(layout, case_id, kinds) for case_id, kinds in named.items()}
    dataset = folder.parent / "dataset.json"
    if _IMAGE_FOLDER.fullmatch(folder.name) and dataset.is_file():
        unrecognised = _by_dataset(layout, parts, dataset, unrecognised)
    elif is_segmentation_folder(folder):
        about = dataset if dataset.is_file() else None
        maps = [path for path in unrecognised if stem_of(path) not in parts and not is_other_map(stem_of(path))]
        parts |= {stem_of(path): Patient(stem_of(path), {"seg": path}, dataset=about) for path in maps}
        unrecognised = [path for path in unrecognised if path not in maps]
    elif folder != layout.root and _holds_one_mask(folder, paths) and unrecognised:  # labels/P_1/mask.nii.gz
        parts, unrecognised = {folder.name: Patient(folder.name, {"seg": unrecognised[0]})}, []
    parts = {part.id: part for part in parts.values() if part.files}
    imaged = any(part.imaged for part in parts.values())
    if _IMAGE_FOLDER.fullmatch(folder.name) and not parts and not dataset.is_file():
        text = (
            f"{len(unrecognised):,} files of unknown modality: no dataset.json lies beside this folder, as in the"
            " Decathlon and nnU-Net layouts; they are not used."
        )
        layout.add("", "dataset-json", "warning", folder, text)
    for path in unrecognised:
        if imaged or _IMAGE_FOLDER.fullmatch(folder.name):
            layout.unused(path)
        else:
            layout.maps[stem_of(path)].append(path)
    return parts


def _join_t2_flair(named: dict[str, dict[str, list[tuple[Name, Path]]]], folder: Path) -> None:
    """Give `X_T2_FLAIR` to patient X if it is the only file of `X_T2`, which else is a visit, and X has no FLAIR."""
    for case_id in [case_id for case_id, kinds in named.items() if kinds.keys() == {"flair"}]:
        owner = re.fullmatch(r"(?:(.*?)[_\-. ]+)?t2", case_id, re.IGNORECASE)
        kinds = named.get(owner[1] or folder.name, {}) if owner else {}
        if kinds and "flair" not in kinds:
            kinds["flair"] = named.pop(case_id)["flair"]


def _holds_one_mask(folder: Path, paths: Sequence[Path]) -> bool:
    """Whether a folder inside a folder of segmentations holds a single file that may be a segmentation."""
    return is_segmentation_folder(folder.parent) and len(paths) == 1 and not is_other_map(stem_of(paths[0]))


def _part(layout: Layout, case_id: str, kinds: dict[str, list[tuple[Name, Path]]]) -> Patient:
    """Choose one file for each modality and the segmentation."""
    part = Patient(case_id)
    stripped = any(name.processed for kind, found in kinds.items() if kind != "seg" for name, _ in found)
    for kind, found in kinds.items():
        usable = [(name, path) for name, path in found if stripped or not name.doubtful]
        best = [path for name, path in usable if name.processed and not name.doubtful]
        chosen = best or [path for name, path in usable if not name.doubtful] or [path for _, path in usable]
        for _, path in found:
            if path not in chosen:
                why = f"{chosen[0].name} is used for {kind}" if chosen else "It may be a brain mask"
                layout.unused(path, why)
        if chosen:
            part.files[kind] = chosen[0]
            _compare(layout, case_id, chosen, "two-files", f"Two files for {kind}")
    return part


def _compare(layout: Layout, case_id: str, paths: Sequence[Path], code: str, what: str) -> bool:
    """Whether files for one purpose are copies of the first; add a finding that they are, or that they differ."""
    for other in paths[1:]:
        names = layout.both((paths[0], other))
        if not same_volume(paths[0], other):
            layout.add(case_id, code, "error", other, f"{what} that differ, {names}; keep one of them.")
            return False
        layout.add(case_id, "same-copy", "note", other, f"A copy of {layout.relative(paths[0])}; it counts once.")
    return True


def _adopt(layout: Layout, folder: Path, parts: dict[str, Patient], imaged: set[str]) -> None:
    """Find a segmentation with an unusual name for the only patient with scans in a folder, if it has none yet.

    That of BraTS20_Training_355 is `W39_1998.09.19_Segm.nii`. Files named after another of the `imaged` IDs do not
    count.
    """
    patient, *more = [part for part in parts.values() if part.imaged] or [None]
    if patient is None or more:
        return
    others = [part for part in parts.values() if part.id not in imaged]
    own = folder.name == patient.id or len(others) == 1
    maps = []
    for part in others:
        if not own and not part.id.startswith(patient.id):
            continue
        path = parts.pop(part.id).files["seg"]
        if is_other_map(stem_of(path).removeprefix(patient.id)):
            layout.unused(path, "By its name not a tumour segmentation")
        elif "seg" in patient.files:
            layout.unused(path, f"{patient.files['seg'].name} is used as the segmentation of {patient.id}")
        else:
            maps.append(path)
    if maps and _compare(layout, patient.id, maps, "two-segmentations", "Two segmentations"):
        patient.files["seg"] = maps[0]
        text = "Used as the segmentation, because no other file in the folder can be. Remove it if it is not one."
        layout.add(patient.id, "unusual-name", "warning", maps[0], text)


def _by_dataset(layout: Layout, parts: dict[str, Patient], dataset: Path, paths: Sequence[Path]) -> list[Path]:
    """Read files as `dataset.json` describes them: `<case>_0000` is a channel, `<case>` holds all. Returns the rest."""
    try:
        about = json.loads(dataset.read_text("utf-8-sig"))
        channels = {
            int(number): str(name) for number, name in (about.get("channel_names") or about["modality"]).items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        text = f"dataset.json names no channels ({type(error).__name__}: {error}); the files beside it are not used."
        at = dataset if dataset.is_relative_to(layout.root) else None
        layout.add("", "dataset-json", "warning", at, text)
        return list(paths)
    kinds = {number: MODALITY_WORDS.get(re.sub(r"[^a-z0-9]", "", name.lower())) for number, name in channels.items()}
    numbered = {path: re.fullmatch(r"(.+)_(\d{4})", stem_of(path)) for path in paths}
    split = {match[1] for match in numbered.values() if match and match[2] == "0000"}
    rest = []
    for path, match in numbered.items():
        case_id = match[1] if match and match[1] in split else stem_of(path)
        part = parts.setdefault(case_id, Patient(case_id, dataset=dataset))
        part.dataset = dataset
        if case_id not in split:
            new = {kind: number for number, kind in kinds.items() if kind}
            part.files |= dict.fromkeys(new, path)
            part.channels |= new
        elif kind := kinds.get(int(match[2])):
            part.files[kind] = path
        else:
            rest.append(path)
    return rest


def _drop_predictions(layout: Layout, parts: dict[str, list[Patient]]) -> None:
    """Leave out label maps in folders of predictions: beside scans, a map counts as the reference."""
    for case_id, found in list(parts.items()):
        kept = []
        for part in found:
            folders = Path(layout.relative(next(iter(part.files.values())))).parts[:-1]
            if not part.imaged and any(_PREDICTION_FOLDER.search(name) for name in folders):
                layout.unused(part.files["seg"], "By its folder's name, it is a prediction")
            else:
                kept.append(part)
        if kept:
            parts[case_id] = kept
        else:
            del parts[case_id]


def _joined(layout: Layout, parts: Sequence[Patient]) -> Patient:
    """Join the parts found under one ID in several folders into one patient."""
    imaged = sorted((part for part in parts if part.imaged), key=lambda part: -len(part.files))
    maps = [part for part in parts if not part.imaged]
    if not imaged:
        _compare(layout, parts[0].id, [part.files["seg"] for part in maps], "two-files", "Two label maps")
        return parts[0]
    patient = imaged[0]
    for part in imaged[1:]:
        _merge(layout, patient, part)
    if not maps:
        return patient
    paths = [part.files["seg"] for part in maps]
    if "seg" in patient.files:
        for path in paths:
            layout.unused(path, f"{layout.relative(patient.files['seg'])} is used as the segmentation of {patient.id}")
    elif _compare(layout, patient.id, paths, "two-segmentations", "Two segmentations"):
        patient.files["seg"] = paths[0]
        patient.dataset = patient.dataset or maps[0].dataset
        if not is_segmentation_folder(paths[0].parent):
            text = f"Used as the segmentation of {patient.id} because of its ID. Move it elsewhere if it is not one."
            layout.add(patient.id, "mask-elsewhere", "warning", paths[0], text)
    return patient


def _merge(layout: Layout, patient: Patient, part: Patient) -> None:
    """Add a patient's files from another folder; add an error if shared files differ."""
    shared = [kind for kind in part.files if kind in patient.files]
    for kind in shared:
        pair = (patient.files[kind], part.files[kind])
        if not same_volume(*pair):
            text = f"Two files for {kind} that differ, {layout.both(pair)}; keep one of them."
            layout.add(patient.id, "two-folders", "error", part.files[kind], text)
            return
    if shared:
        text = f"A copy of {layout.relative(patient.folder)}; it counts once."
        layout.add(patient.id, "same-copy", "note", part.folder, text)
    else:
        text = f"Scans of this patient lie in {layout.both((patient.folder, part.folder))}; they are joined."
        layout.add(patient.id, "joined", "note", part.folder, text)
    patient.files = part.files | patient.files
    patient.channels = part.channels | patient.channels
