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
        return next(iter(self.images.values())).parent


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
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is no folder. Give the folder that holds the patients' folders.")

    found: dict[tuple[Path, str], dict[str, Path]] = {}
    strangers: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if not path.name.lower().endswith((".nii", ".nii.gz")) or path.name.startswith(".") or not path.is_file():
            continue
        case_id, kind = _recognise(path)
        if kind is None:
            strangers.setdefault(path.parent, []).append(path)
            continue
        files = found.setdefault((path.parent, case_id), {})
        if kind in files:
            raise DataError(
                f"{case_id}: two files for {kind}, {files[kind].name} and {path.name} in {path.parent}. Keep one of them."
            )
        files[kind] = path

    cases: dict[str, Case] = {}
    incomplete: list[str] = []
    for (folder, case_id), files in found.items():
        seg = files.pop("seg", None)
        if not files:
            continue  # a segmentation alone, such as a folder of predictions
        others = strangers.get(folder, [])
        if seg is None and others and sum(place == folder for place, _ in found) == 1:
            if len(others) > 1:
                names = ", ".join(path.name for path in others)
                raise DataError(f"{case_id}: which of {names} in {folder} is the segmentation? Keep one of them there.")
            seg = others[0]
        missing = [name for name in modalities if name not in files]
        if missing:
            incomplete.append(
                f"{case_id}: no {case_id}_{missing[0]}.nii or .nii.gz in {folder}"
                f" (missing: {', '.join(missing)}; found: {', '.join(files)})"
            )
            continue
        if case_id in cases:
            raise DataError(f"{case_id} lies in two folders, {cases[case_id].folder} and {folder}. Keep one of them.")
        cases[case_id] = Case(case_id, {name: files[name] for name in modalities}, seg)

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
    return [cases[case_id] for case_id in sorted(cases)]


def check_modalities(modalities: Iterable[str]) -> None:
    """Raise `DataError` unless `modalities` are names from `MODALITIES`, none twice, at least one."""
    names = list(modalities)
    unknown = [name for name in names if name not in MODALITIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(f"modalities {', '.join(names) or 'none'}: expected one or more of {', '.join(MODALITIES)}, each once.")


def _recognise(path: Path) -> tuple[str, str | None]:
    """Split `BraTS20_Training_001_t1ce.nii` into its case ID and what it holds (None: unknown)."""
    stem = path.name.lower().removesuffix(".gz").removesuffix(".nii")
    for cut in range(len(stem) - 1, -1, -1):
        if stem[cut] in "_-":
            return path.name[:cut], _SUFFIXES.get(stem[cut + 1 :])
    return path.parent.name, _SUFFIXES.get(stem)  # `t1.nii` in the patient's folder


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
    except (OSError, EOFError, zlib.error, nib.spatialimages.HeaderDataError, nib.filebasedimages.ImageFileError) as error:
        raise DataError(f"{path} cannot be read as NIfTI ({error}). Fetch or copy the file again.") from error
    header = image.header
    needed = int(header["vox_offset"]) + int(np.prod(image.shape)) * header.get_data_dtype().itemsize
    if len(raw) < needed:
        raise DataError(f"{path} is truncated: {len(raw):,} bytes, its header promises {needed:,}. Fetch or copy it again.")
    return image


def read_image(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read one modality: the voxels as stored (usually int16), shape (X, Y, Z), and the NIfTI image around them."""
    image = read_nifti(path)
    if image.ndim != 3:
        raise DataError(f"{path} has shape {image.shape}, expected three axes.")
    return np.asanyarray(image.dataobj), image


def read_mask(path: Path) -> np.ndarray:
    """Read a segmentation as class indices 0 to 3, uint8, shape (X, Y, Z). See `labels_to_classes`."""
    labels, _ = read_image(path)
    try:
        return labels_to_classes(labels)
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
        raise ValueError(f"labels from {labels.min():g} to {labels.max():g}; expected 0, 1, 2, 4 (or 3 for 4, from BraTS 2023 on).")
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
    header.set_slope_inter(1, 0)
    dtype = header.get_data_dtype() if header.get_data_dtype().kind in "iu" else np.dtype(np.uint8)
    header.set_data_dtype(dtype)
    labels = classes_to_labels(classes, numbering).astype(dtype)
    nib.save(nib.Nifti1Image(labels, like.affine, header), path)


def spacing_mm(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z."""
    return tuple(float(size) for size in image.header.get_zooms()[:3])
