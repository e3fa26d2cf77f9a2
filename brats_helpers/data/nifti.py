"""Reading and writing NIfTI files."""

import gzip
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from brats_helpers.labels import DataError, classes_to_labels, labels_to_classes

TOLERANCE_MM = 1e-3
"""By which affines and voxel sizes may differ: headers hold rounded numbers."""
_FAR_END_MM = 0.05  # by which a voxel may lie elsewhere for it
_HEADER_BYTES = 348


class TruncatedError(DataError):
    """A file ends before it should."""


def read_nifti(path: Path) -> nib.Nifti1Image:
    """Read a NIfTI file, compressed or not: its first bytes decide, not its name.

    Raises:
        TruncatedError: the file ends too early.
        DataError: the file is missing, damaged or not NIfTI.
    """
    return parse_nifti(read_bytes(path)[0], path)


def read_bytes(path: Path) -> tuple[bytes, bool]:
    """The bytes of a file, unpacked where they are gzip, and whether they were. Errors as `read_nifti`."""
    try:
        raw = Path(path).read_bytes()
        packed = raw[:2] == b"\x1f\x8b"
        return (gzip.decompress(raw) if packed else raw), packed
    except EOFError as error:
        raise TruncatedError(f"{path} is truncated: its gzip stream has no end. Fetch or copy it again.") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as NIfTI ({error}). Fetch or copy the file again.") from error


def parse_nifti(raw: bytes, path: Path) -> nib.Nifti1Image:
    """Make an image of what `read_bytes` read from `path`; its voxels stay in `raw`. Errors as `read_nifti`."""
    if len(raw) < _HEADER_BYTES:
        raise TruncatedError(
            f"{path} is truncated: {len(raw):,} bytes, a header alone has {_HEADER_BYTES}. Fetch or copy it again."
        )
    try:
        if raw[344:347] != b"n+1":
            raise HeaderDataError("it does not begin as such a file does")
        image = nib.Nifti1Image.from_bytes(raw)
    except (OSError, EOFError, ValueError, HeaderDataError, WrapStructError) as error:
        raise DataError(f"{path} cannot be read as NIfTI ({error}). Fetch or copy the file again.") from error
    needed = image.dataobj.offset + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    if len(raw) < needed:
        raise TruncatedError(
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


def write_mask(path: Path, classes: np.ndarray, like: nib.Nifti1Image, *, numbering: str = "2020") -> None:
    """Write class indices, shape (X, Y, Z), as label numbers in the geometry and header of `like`.

    In its dtype as well where that is one of whole numbers, else as uint8.
    """
    header = like.header.copy()
    dtype = header.get_data_dtype() if header.get_data_dtype().kind in "iu" else np.dtype(np.uint8)
    header.set_data_dtype(dtype)
    labels = classes_to_labels(classes, numbering).astype(dtype)
    nib.save(nib.Nifti1Image(labels, like.affine, header), path)


def spacing_mm(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z, by the affine: the header's own sizes may say otherwise."""
    return tuple(np.round(nib.affines.voxel_sizes(image.affine), 6).tolist())


def same_affine(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    """Whether voxels of the same index lie in the same place: numbers to `TOLERANCE_MM`, corners to 0.05 mm."""
    return same_place(one.affine, other.affine, one.shape)


def same_place(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """`same_affine` by the affines, 4 x 4, of volumes of one shape."""
    corners = np.array([*product(*((0, side - 1) for side in shape[:3]), (1,))])
    apart = corners @ (np.asarray(one) - other).T
    return np.allclose(one, other, rtol=0, atol=TOLERANCE_MM) and bool(np.all(np.abs(apart) <= _FAR_END_MM))
