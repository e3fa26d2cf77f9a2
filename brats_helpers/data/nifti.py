"""Read and write NIfTI volumes. Voxels are always returned with axes towards left, posterior, superior (LPS)."""

import filecmp
import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from brats_helpers.labels import USUAL, DataError, classes_to_labels, find_numbering, labels_to_classes, whole_labels
from brats_helpers.log import warn

TOLERANCE_MM = 1e-3
"""Largest difference between two equal affine entries or voxel sizes: headers hold rounded numbers."""
_FAR_END_MM = 0.05  # largest distance between the same corner of two equal grids
_FLATTEST = 1e-3  # volume of a voxel over the product of its sides, below which an affine counts as singular
_HEADER_BYTES = 348
_NIFTI2_HEADER_BYTES = 540
_LPS = axcodes2ornt("LPS")


class FileError(DataError):
    """A file cannot be used. `code` names the reason as audit findings do, such as `truncated`."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a file lie.

    Attributes:
        shape: voxels along the three axes as stored.
        affine: from voxel indices as stored to mm, 4 x 4.
        remarks: pairs of code and sentence about a header that had to be interpreted.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    remarks: tuple[tuple[str, str], ...] = ()


def read_nifti(path: Path) -> nib.Nifti1Image:
    """Read a NIfTI-1 or NIfTI-2 file as stored, compressed or not: its first bytes decide, not its name.

    Raises:
        FileError: the file is missing, truncated, damaged or not NIfTI.
    """
    return parse_nifti(read_bytes(path)[0], path)


def read_bytes(path: Path) -> tuple[bytes, bool]:
    """Return the bytes of a file, unpacked if they are gzip, and whether they were. Errors as `read_nifti`."""
    try:
        raw = Path(path).read_bytes()
        packed = raw[:2] == b"\x1f\x8b"
        return (gzip.decompress(raw) if packed else raw), packed
    except EOFError as error:
        message = f"{path} is truncated: its gzip stream has no end. Fetch or copy it again."
        raise FileError("truncated", message) from error
    except (OSError, zlib.error) as error:
        raise _unreadable(path, error) from error


def parse_nifti(raw: bytes, path: Path) -> nib.Nifti1Image:
    """Parse the bytes that `read_bytes` read from `path`; the voxels stay in `raw`. Errors as `read_nifti`."""
    nifti2 = raw[4:7] == b"n+2"
    least = _NIFTI2_HEADER_BYTES if nifti2 else _HEADER_BYTES
    if len(raw) < least:
        raise FileError(
            "truncated",
            f"{path} is truncated: {len(raw):,} bytes, a header alone has {least}. Fetch or copy it again.",
        )
    if raw[344:347] == b"ni1" or raw[4:7] == b"ni2":
        raise FileError("unreadable", f"{path} is half of a .hdr/.img pair. Convert the pair to one .nii.gz file.")
    try:
        if not nifti2 and raw[344:347] != b"n+1":
            raise HeaderDataError("it does not begin as such a file does; is it half of a .hdr/.img pair?")
        image = (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(raw)
    except (OSError, EOFError, ValueError, HeaderDataError, WrapStructError) as error:
        raise _unreadable(path, error) from error
    needed = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if len(raw) < needed:
        raise FileError(
            "truncated",
            f"{path} is truncated: {len(raw):,} bytes, its header promises {needed:,}. Fetch or copy it again.",
        )
    return image


def _unreadable(path: Path, error: Exception) -> FileError:
    return FileError("unreadable", f"{path} cannot be read as NIfTI ({error}). Fetch or copy the file again.")


def grid_of(image: nib.Nifti1Image, path: Path | str = "the file", *, channels: bool = False) -> Grid:
    """Return where the voxels of a stored image lie.

    Axes of length 1 after the third are dropped. The sform gives the affine; if it is singular, the qform does.

    Args:
        image: from `read_nifti`.
        path: named in errors.
        channels: whether a fourth axis of any length may hold modalities.

    Raises:
        FileError: `not-3d`, or `singular-affine` where neither qform nor sform gives every voxel its own place.
    """
    shape, more = image.shape[:3], image.shape[3 + channels :]
    if len(shape) < 3 or min(shape) < 1 or set(more) - {1}:
        raise FileError(
            "not-3d", f"{path} has shape {image.shape}, expected three axes of voxels; split or replace it."
        )
    remarks = []
    if image.ndim > 3 + channels:
        axes = "A fourth axis" if image.ndim == 4 else "Further axes"
        remarks.append(("fourth-axis", f"{axes} of length 1, {image.shape}; dropped on reading."))
    header, affine, qform = image.header, image.affine, _qform(image.header)
    if not _invertible(affine):
        if qform is None or not _invertible(qform):
            text = (
                f"{path} has a singular affine ({_rows(affine)}): voxels have no position or size. Correct its header."
            )
            raise FileError("singular-affine", text)
        remarks.append(("singular-affine", f"The sform is singular ({_rows(affine)}); the qform is used instead."))
        affine = qform
    elif qform is not None and int(header["sform_code"]) and not same_place(qform, affine, shape):
        text = f"qform and sform disagree: {difference(qform, affine, shape)} The sform is used."
        remarks.append(("qform-sform", text))
    elif qform is None and not int(header["sform_code"]):
        text = "The header gives no orientation (qform and sform codes are 0); left, anterior, superior are assumed."
        remarks.append(("no-orientation", text))
    return Grid(shape, affine, tuple(remarks))


def two_places(path: Path) -> str:
    """A sentence with a trailing space if the qform and sform of a file disagree, else an empty string."""
    remarks = grid_of(read_nifti(path), path, channels=True).remarks
    return "".join(f"{text} Write the right one into both. " for code, text in remarks if code == "qform-sform")


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    """The affine of the qform; None if there is none, or its quaternion is not a rotation."""
    try:
        return header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):
        return None


def _invertible(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all():
        return False
    sides = nib.affines.voxel_sizes(affine)
    return min(sides) > TOLERANCE_MM and abs(np.linalg.det(affine[:3, :3])) > _FLATTEST * np.prod(sides)


def _rows(affine: np.ndarray) -> str:
    return "; ".join(" ".join(map("{:g}".format, row)) for row in affine[:3])


def read_image(path: Path, channel: int | None = None) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read one modality in LPS order.

    Args:
        path: a volume, or a file of four axes whose last one holds modalities.
        channel: the index of the modality on that axis.

    Returns:
        The voxels in the stored dtype (usually int16), shape (X, Y, Z), and the NIfTI image around them.

    Raises:
        FileError: see `read_nifti` and `grid_of`.
    """
    image = in_lps(read_nifti(path), path, channel=channel)
    return np.asanyarray(image.dataobj), image


def in_lps(image: nib.Nifti1Image, path: Path | str = "the file", *, channel: int | None = None) -> nib.Nifti1Image:
    """Turn a stored image, or one `channel` of it, so that its axes run left, posterior, superior. No voxel changes.

    Raises:
        FileError: see `grid_of`; or `dtype` if voxels are not real numbers.
    """
    grid = grid_of(image, path, channels=channel is not None)
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise FileError("dtype", f"{path} has voxels of type {dtype}, expected one real number each.")
    if channel is not None and (image.ndim < 4 or image.shape[3] <= channel):
        text = f"{path} has shape {image.shape}, expected a fourth axis with {channel + 1} modalities or more."
        raise FileError("not-3d", text)
    if grid.affine is not image.affine:
        image = type(image)(image.dataobj, grid.affine, image.header)
    if image.ndim > 3:
        image = image.slicer[(..., channel or 0, *[0] * (image.ndim - 4))]
    return image.as_reoriented(ornt_transform(io_orientation(grid.affine), _LPS))


def from_lps(volume: np.ndarray, like: nib.Nifti1Image) -> np.ndarray:
    """Turn an array in LPS order, (X, Y, Z) or (X, Y, Z, ...), back to the axes of the stored image `like`."""
    grid = grid_of(like, channels=True)
    turned = apply_orientation(volume, ornt_transform(_LPS, io_orientation(grid.affine)))
    if turned.shape[:3] != grid.shape:
        raise ValueError(f"a volume of shape {volume.shape} does not fit an image of shape {grid.shape}")
    return turned


def read_mask(path: Path, numbering: str) -> np.ndarray:
    """Read a segmentation as class indices 0 to 3, uint8, shape (X, Y, Z), LPS order. See `read_seg`."""
    return read_seg(path, numbering)[0]


def read_seg(path: Path, numbering: str) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read a segmentation as `read_mask` does, and the NIfTI image around it.

    Args:
        path: the file.
        numbering: of its labels, a key of `labels.NUMBERINGS`. Labels without a class become background.

    Raises:
        DataError: labels that are not whole, or not of this numbering.
        FileError: see `read_image`.
    """
    labels, image = read_labels(path)
    return to_classes(labels, numbering, path), image


def to_classes(labels: np.ndarray, numbering: str, path: Path) -> np.ndarray:
    """Map the labels of a file, see `labels.labels_to_classes`; `DataError` names the file."""
    try:
        return labels_to_classes(labels, numbering)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error


def read_labels(path: Path) -> tuple[np.ndarray, nib.Nifti1Image]:
    """Read the label numbers of a segmentation, shape (X, Y, Z), LPS order, and the NIfTI image around them.

    Floats are rounded, with a warning, if all lie near whole numbers, see `labels.whole_labels`.
    """
    stored = read_nifti(path)
    image = in_lps(stored, path)
    values = np.asanyarray(image.dataobj)
    try:
        labels = whole_labels(values)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if labels is not values and not np.array_equal(labels, values):
        _warn_rounded(Path(path), scale_of(stored))
    return labels, image


def scale_of(stored: nib.Nifti1Image) -> str:
    """Slope, intercept and type of a stored image, in words."""
    return f"slope {stored.dataobj.slope:g}, intercept {stored.dataobj.inter:g}, type {stored.get_data_dtype()}"


@cache
def _warn_rounded(path: Path, scale: str) -> None:
    """Warn once per process that the labels of a file were rounded."""
    warn(f"{path}: labels are not exactly whole ({scale}); each is taken as the nearest number.")


def write_mask(path: Path, classes: np.ndarray, like: nib.Nifti1Image, *, numbering: str = USUAL) -> None:
    """Write class indices in LPS order, shape (X, Y, Z), as label numbers in the grid and orientation of `like`.

    Header, qform and sform are those of `like`, the stored image; if the two disagree, the qform follows the sform. The
    dtype is that of `like` if it is an integer, else uint8.

    Raises:
        DataError: `numbering` is none of `labels.NUMBERINGS`, or has no number for a class in the mask.
    """
    dtype = like.get_data_dtype() if like.get_data_dtype().kind in "iu" else np.dtype(np.uint8)
    try:
        labels = classes_to_labels(classes, find_numbering(numbering))
    except ValueError as error:
        raise DataError(f"{path} is not written: {error}") from error
    nib.save(type(like)(from_lps(labels.astype(dtype), like), *placed_as(like, dtype)), path)


def placed_as(like: nib.Nifti1Image, dtype: np.dtype) -> tuple[np.ndarray, nib.Nifti1Header]:
    """Return affine and header for a file on the grid of the stored image `like`; qform and sform agree in it."""
    grid, header = grid_of(like, channels=True), like.header.copy()
    header.set_data_dtype(dtype)
    for code, write in (("sform_code", header.set_sform), ("qform_code", header.set_qform)):
        if int(header[code]) and grid.remarks:
            write(grid.affine, int(header[code]))
    qform = _qform(header)
    if qform is None or not same_place(qform, grid.affine, grid.shape):
        header["qform_code"] = 0  # none before, or the affine has shears, which a qform cannot hold
    return grid.affine, header


def spacing_mm(image: nib.Nifti1Image) -> tuple[float, float, float]:
    """Voxel size in mm along X, Y, Z by the affine: the header's own sizes may say otherwise."""
    return spacing_of(image.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along the axes of an affine."""
    return tuple(np.round(nib.affines.voxel_sizes(np.asarray(affine)), 6).tolist())


def spacing_in_lps(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel size in mm along left, posterior, superior, whatever the order of the axes of `affine`."""
    axes = io_orientation(np.asarray(affine))[:, 0].astype(int)
    return tuple(side for _, side in sorted(zip(axes, spacing_of(affine), strict=True)))


def same_affine(one: nib.Nifti1Image, other: nib.Nifti1Image) -> bool:
    """Whether equal indices mean the same place: affine entries within `TOLERANCE_MM`, corners within 0.05 mm."""
    return same_place(one.affine, other.affine, one.shape)


def same_place(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """`same_affine` for two affines, 4 x 4, of volumes of one shape (X, Y, Z)."""
    close = np.allclose(one, other, rtol=0, atol=TOLERANCE_MM)
    return close and bool(np.all(np.abs(_corners(shape) @ (np.asarray(one) - other).T) <= _FAR_END_MM))


def same_volume(one: Path, other: Path) -> bool:
    """Whether two files hold the same voxels in the same place, however they are packed."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    try:
        (first, image), (second, other_image) = read_image(one), read_image(other)
    except FileError:
        return False
    same = first.shape == second.shape and np.array_equal(first, second)
    return same and same_affine(image, other_image)


def difference(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> str:
    """Say how two affines of volumes of one shape differ: orientation, origin and how far apart voxels lie."""
    one, other = np.asarray(one), np.asarray(other)
    apart = np.linalg.norm((_corners(shape) @ (one - other).T)[:, :3], axis=1).max()
    codes = ["".join(nib.aff2axcodes(affine)) for affine in (one, other)]
    said = [f"voxels lie up to {apart:.3g} mm apart"]
    if codes[0] != codes[1]:
        said.append(f"axes {codes[0]} against {codes[1]}")
    shift = one[:3, 3] - other[:3, 3]
    if np.abs(shift).max() > TOLERANCE_MM:
        said.append(f"origins differ by ({', '.join(f'{mm:.4g}' for mm in shift)}) mm")
    turn = np.abs(one[:3, :3] - other[:3, :3]).max()
    if turn > 0 and codes[0] == codes[1]:
        said.append(f"axis directions by up to {turn:.2g} mm a voxel")
    return "; ".join(said) + "."


def _corners(shape: Sequence[int]) -> np.ndarray:
    return np.array([*product(*((0, side - 1) for side in shape[:3]), (1,))])
