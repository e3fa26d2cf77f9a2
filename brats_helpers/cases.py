"""The vocabulary (modalities, labels, regions) and the patients' files on disk.

A *case* is one patient's scans. This module is the one home of the names of modalities, the
numbers of labels and the sets of classes that make up a region; everything else imports them.
"""

import gzip
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from brats_helpers.log import warn

MODALITIES = ("flair", "t1", "t1ce", "t2")
# File names end in one of these; BraTS 2023 renamed the modalities.
_SUFFIXES = {name: name for name in (*MODALITIES, "seg")} | {
    "t1n": "t1",
    "t1c": "t1ce",
    "t1gd": "t1ce",
    "t2w": "t2",
    "t2f": "flair",
}

CLASSES = ("background", "NCR", "ED", "ET")
"""Class indices 0 to 3 by name: what networks predict and caches hold."""
LABELS = {"2020": (0, 1, 2, 4), "2023": (0, 1, 2, 3)}
"""Label numbers on disk of classes 0 to 3, by numbering (`2020`: up to BraTS 2022)."""
REGIONS = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""The challenge's regions as sets of class indices; they overlap."""


class DataError(Exception):
    """Something about the data on disk is wrong; the message says which case and file, and how to mend it."""


@dataclass(frozen=True)
class Case:
    """One patient: the files of its modalities and, where there is one, its segmentation."""

    id: str
    images: dict[str, Path] = field(hash=False)
    seg: Path | None = None

    @property
    def folder(self) -> Path:
        """Where the patient's files lie."""
        return next(iter(self.images.values()), self.seg).parent


def find_cases(
    root: Path | str, modalities: Sequence[str] = MODALITIES, *, skip_incomplete: bool = False
) -> list[Case]:
    """Find every patient below `root`, in the layouts of BraTS 2018 to 2023.

    Folders may be nested. Files end in `_t1.nii`, `-t1n.nii.gz` and the like; the
    segmentation is the file that ends in `seg` or, failing that, the one file of the folder
    that is no modality (BraTS20_Training_355 calls it `W39_1998.09.19_Segm.nii`).

    Args:
        root: a folder of patients, or one patient's folder.
        modalities: names from `MODALITIES` that every patient must have.
        skip_incomplete: leave out a patient that lacks one, with a warning, instead of raising.

    Returns:
        The cases sorted by ID, each with exactly `modalities`, in that order.

    Raises:
        DataError: nothing found, a modality missing, an ID found twice, or a folder in which
            the segmentation cannot be told from other files.
    """
    check_modalities(modalities)
    cases: list[Case] = []
    incomplete: list[str] = []
    for case in _scan(root):
        if not case.images:
            continue  # a segmentation alone, such as a folder of predictions
        missing = [name for name in modalities if name not in case.images]
        if missing:
            incomplete.append(
                f"{case.id}: no {case.id}_{missing[0]}.nii or .nii.gz in {case.folder}"
                f" (missing: {', '.join(missing)}; found: {', '.join(case.images)})"
            )
        else:
            cases.append(Case(case.id, {name: case.images[name] for name in modalities}, case.seg))

    if incomplete and not skip_incomplete:
        raise DataError(
            "\n".join(incomplete) + "\nAsk for modalities that every patient has (-p modalities flair,t1ce),"
            " or go on without these patients (-p skip_incomplete true)."
        )
    for line in incomplete:
        warn(f"left out: {line}")
    if not cases:
        raise DataError(
            f"No patient with {', '.join(modalities)} below {root}. Expected files such as"
            " BraTS20_Training_001/BraTS20_Training_001_t1.nii or BraTS-GLI-00001-000/BraTS-GLI-00001-000-t1n.nii.gz."
        )
    return _sorted_once(cases)


def find_segs(root: Path | str) -> dict[str, Path | None]:
    """Find every patient's segmentation below `root`, whatever modalities lie beside it.

    Label maps alone will do, flat or in folders, called `<case>_seg` or just `<case>`.

    Returns:
        Case ID to file, sorted by ID; None for a patient with images only.

    Raises:
        DataError: as `find_cases`, but for modalities.
    """
    segs = {case.id: case.seg for case in _sorted_once(_scan(root))}
    if not segs:
        raise DataError(f"No segmentation below {root}. Expected files such as BraTS20_Training_001_seg.nii.gz.")
    return segs


def _sorted_once(cases: Iterable[Case]) -> list[Case]:
    """Sort by ID; raise `DataError` where two patients share one."""
    found: dict[str, Case] = {}
    for case in cases:
        if case.id in found:
            raise DataError(
                f"{case.id} lies in two folders, {found[case.id].folder} and {case.folder}. Keep one of them."
            )
        found[case.id] = case
    return [found[case_id] for case_id in sorted(found)]


def _scan(root: Path | str) -> list[Case]:
    """Group the NIfTI files below `root` by patient; a label map without images is a case as well."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give the folder that holds the patients' folders.")
    found: dict[Path, dict[str, dict[str, Path]]] = {}
    strangers: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.name.lower().endswith((".nii", ".nii.gz")) or not path.is_file():
            continue
        case_id, kind = _recognise(path)
        if kind is None:
            strangers.setdefault(path.parent, []).append(path)
            continue
        files = found.setdefault(path.parent, {}).setdefault(case_id, {})
        if kind in files:
            raise DataError(
                f"{case_id}: two files for {kind}, {files[kind].name} and {path.name} in {path.parent}."
                " Keep one of them."
            )
        files[kind] = path

    cases: list[Case] = []
    for folder, patients in found.items():
        others = strangers.pop(folder, [])
        for case_id, files in patients.items():
            seg = files.pop("seg", None)
            if seg is None and others and len(patients) == 1:
                if len(others) > 1:
                    names = ", ".join(path.name for path in others)
                    raise DataError(
                        f"{case_id}: which of {names} in {folder} is the segmentation? Keep one of them there."
                    )
                seg = others[0]
            cases.append(Case(case_id, files, seg))
    return cases + [Case(_stem(path), {}, path) for paths in strangers.values() for path in paths]


def check_modalities(modalities: Iterable[str]) -> None:
    """Raise `DataError` unless `modalities` are names from `MODALITIES`, none twice, at least one."""
    names = list(modalities)
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(
            f"modalities {', '.join(names) or 'none'}: expected one or more of {', '.join(MODALITIES)}, each once."
        )


def _recognise(path: Path) -> tuple[str, str | None]:
    """Split `BraTS20_Training_001_t1ce.nii` into its case ID and what it holds (None: unknown)."""
    stem = _stem(path)
    for cut in range(len(stem) - 1, -1, -1):
        if stem[cut] in "_-":
            return stem[:cut], _SUFFIXES.get(stem[cut + 1 :].lower())
    return path.parent.name, _SUFFIXES.get(stem.lower())  # `t1.nii` in the patient's folder


def _stem(path: Path) -> str:
    """The file's name without `.nii` or `.nii.gz`, in whatever case they are written."""
    return path.name[: len(path.name.lower().removesuffix(".gz").removesuffix(".nii"))]


def read_nifti(path: Path) -> nib.Nifti1Image:
    """Read a NIfTI file, compressed or not: its first bytes decide, not its name.

    Raises:
        DataError: the file is missing, truncated or not NIfTI.
    """
    try:
        raw = Path(path).read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        image = nib.Nifti1Image.from_bytes(raw)
    except (OSError, EOFError, zlib.error, HeaderDataError, WrapStructError) as error:
        raise DataError(f"{path} cannot be read as NIfTI ({error}). Fetch or copy the file again.") from error
    needed = image.dataobj.offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    if len(raw) < needed:
        raise DataError(
            f"{path} is truncated: {len(raw):,} bytes, its header promises {needed:,}. Fetch or copy it again."
        )
    return image


def read_image(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read one modality: the voxels as stored (usually int16), shape (X, Y, Z), and the NIfTI image around them."""
    image = read_nifti(path)
    if image.ndim != 3 or min(image.shape) < 1:
        raise DataError(f"{path} has shape {image.shape}, expected three axes of voxels.")
    return np.asanyarray(image.dataobj), image


def read_mask(path: Path) -> np.ndarray:
    """Read a segmentation as class indices 0 to 3, uint8, shape (X, Y, Z). See `labels_to_classes`."""
    return read_seg(path)[0]


def read_seg(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read a segmentation as `read_mask` does, and the NIfTI image around it."""
    labels, image = read_image(path)
    try:
        return labels_to_classes(labels), image
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def labels_to_classes(labels: np.ndarray) -> np.ndarray:
    """Map label numbers to class indices: 0, 1, 2 stay, 4 becomes 3.

    Enhancing tumour is label 4 up to BraTS 2022 and 3 from 2023 on; a mask may hold either.

    Args:
        labels: numbers of any dtype and shape.

    Returns:
        uint8 of the same shape, values 0 to 3 (see `CLASSES`).

    Raises:
        ValueError: a fractional or unknown label, or 3 and 4 in one mask.
    """
    if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
        raise ValueError("fractional or non-finite labels; expected 0, 1, 2, 4. Was the mask resampled or rescaled?")
    if labels.size and (labels.min() < 0 or labels.max() > 4):
        raise ValueError(
            f"labels from {labels.min():g} to {labels.max():g}; expected 0, 1, 2, 4 (or 3 for 4, from BraTS 2023 on)."
        )
    classes = labels.astype(np.uint8)
    enhancing = classes == 4
    if enhancing.any():
        if (classes == 3).any():
            raise ValueError("labels 3 and 4 in one mask; enhancing tumour is 4 up to BraTS 2022 and 3 from 2023 on.")
        classes[enhancing] = 3
    return classes


def classes_to_labels(classes: np.ndarray, numbering: str = "2020") -> np.ndarray:
    """Map class indices 0 to 3 to label numbers, uint8, by a numbering of `LABELS`."""
    return np.array(LABELS[numbering], np.uint8)[classes]


def write_mask(path: Path, classes: np.ndarray, like: nib.Nifti1Image, *, numbering: str = "2020") -> None:
    """Write class indices, shape (X, Y, Z), as label numbers in the geometry, header and dtype of `like`."""
    header = like.header.copy()
    dtype = header.get_data_dtype() if header.get_data_dtype().kind in "iu" else np.dtype(np.uint8)
    header.set_data_dtype(dtype)
    labels = classes_to_labels(classes, numbering).astype(dtype)
    nib.save(nib.Nifti1Image(labels, like.affine, header), path)


def spacing_mm(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z."""
    return tuple(float(size) for size in image.header.get_zooms()[:3])
