"""What is wrong with the files of one patient. Each file is read once.

First every file is read and its header checked. Then the voxels are checked, file by file, and last the files are
compared with each other.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import nibabel as nib
import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cache import Packed, nan_in_brain
from brats_helpers.data.cases import Case
from brats_helpers.data.content import content_hash, hash_of
from brats_helpers.data.filenames import recognise
from brats_helpers.data.identity import varies
from brats_helpers.data.nifti import (
    TOLERANCE_MM,
    FileError,
    difference,
    grid_of,
    in_lps,
    parse_nifti,
    read_bytes,
    same_affine,
    scale_of,
    spacing_mm,
    spacing_of,
)
from brats_helpers.data.numbering import better_numbering, evidence_of, label_problems
from brats_helpers.labels import MODALITIES, NUMBERINGS, DataError, whole_labels
from brats_helpers.log import warn

_MOST_LABELS = 20  # listed at most, because a file that is not a mask may hold thousands of values
_LARGEST_TUMOUR = 0.5  # of the brain's voxels; more is an error, because the file is then a brain mask
_STRAY = 0.001  # share of the labelled voxels outside of the brain that is only a note
_FILLED_CORNERS = 0.1  # share of the voxels in the corners of the brain's box that are not 0; a brain leaves them empty
_REMARKS = {"fourth-axis": "note"}  # severity of the remarks of `nifti.grid_of`; others are warnings

_Problem = tuple[str, str, str]
"""Code, severity and message of a finding."""


@dataclass
class _Scan:
    """One file of a patient.

    Attributes:
        facts: what the report says about the file.
        problems: found so far.
        image: the volume in LPS order, or None if the file cannot be used.
        voxels: its voxels, shape (X, Y, Z).
        scale: how they are stored, in words.
    """

    facts: dict = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)
    image: nib.Nifti1Image | None = None
    voxels: np.ndarray | None = None
    scale: str = ""


def check_case(case: Case) -> dict:
    """Read every file of a patient and report what is wrong.

    Returns:
        `files`, facts about each NIfTI file: shape, dtype, spacing_mm, affine and orientation as stored, and if its
        voxels could be read, range, share of non-zero voxels (`filled`), labels, content. `findings`: dicts of
        `kind`, `code`, `severity`, `message`. `content`: 16 hex digits that stand for all voxels, or `unreadable`.
    """
    scans = _read_files(case)
    usable = {kind: scan for kind, scan in scans.items() if scan.image is not None}
    images = {kind: scan for kind, scan in usable.items() if kind != "seg"}
    _clear_nan(images)
    for scan in images.values():
        scan.problems += _image_problems(scan)
    if "seg" in usable:
        usable["seg"].problems += _mask_problems(usable["seg"], case, images)
    for kind, *problem in [*_geometry_problems(usable), *_likeness_problems(images)]:
        scans[kind].problems.append(tuple(problem))
    contents = [f"{kind} {scan.facts['content']}" for kind, scan in usable.items()]
    return {
        "files": {kind: scan.facts for kind, scan in scans.items() if scan.facts},
        "findings": [
            {"kind": kind, "code": code, "severity": severity, "message": message}
            for kind, scan in scans.items()
            for code, severity, message in scan.problems
        ],
        "content": hash_of(*contents) if len(usable) == len(case.files) else "unreadable",
    }


def check_packed(case: Case, packed: Packed) -> None:
    """Check the voxels of a prepared patient as `check_case` does: refuse faulty scans, and warn of doubtful ones."""
    scans = {name: packed.images[:, k] for k, name in enumerate(case.modalities) if name in case.images}
    for name, scan in scans.items():
        if not scan.any():
            raise DataError(f"all voxels of the brain in {case.images[name]} have one value; fetch the file again.")
        filled = scan != 0
        if text := _air_as_brain(filled[bounding_box(filled)], prod(packed.shape)):
            warn(f"{case.id}: {case.images[name].name}: {text}")
    for one, other in combinations(scans, 2):
        if np.array_equal(scans[one], scans[other]):
            files = f"{case.images[one]} and {case.images[other]}"
            raise DataError(f"{one} and {other} have the same voxels, {files}; one of the two is misnamed.")


# ---- Reading


def _read_files(case: Case) -> dict[str, _Scan]:
    scans, last = {}, (None, b"", False)
    for kind, path in case.files.items():
        scan = scans[kind] = _Scan()
        try:
            if path != last[0]:  # one file may hold several modalities
                last = (path, *read_bytes(path))
            image = parse_nifti(last[1], path)
            scan.facts |= {"shape": list(image.shape), "dtype": str(image.get_data_dtype())}
            scan.problems += _packing_problems(path.name, last[2])
            channel = None if kind == "seg" else case.channels.get(kind)
            grid = grid_of(image, path, channels=channel is not None)
            scan.problems += [(code, _REMARKS.get(code, "warning"), text) for code, text in grid.remarks]
            scan.image, scan.scale = in_lps(image, path, channel=channel), scale_of(image)
            scan.voxels = np.asanyarray(scan.image.dataobj)
        except FileError as error:
            message = str(error).removeprefix(f"{path} ")
            scan.problems.append((error.code, "error", message[0].upper() + message[1:]))
            continue
        scan.facts |= {
            "shape": list(grid.shape),
            "spacing_mm": list(spacing_of(grid.affine)),
            "affine": grid.affine.tolist(),
            "orientation": "".join(nib.aff2axcodes(grid.affine)),
        }
    return scans


def _packing_problems(name: str, packed: bool) -> Iterator[_Problem]:
    named = name.lower().endswith(".gz")
    if packed and not named:
        yield "gzip-as-nii", "warning", "A gzip file named like an uncompressed one; it is read as gzip."
    if named and not packed:
        yield "nii-as-gzip", "warning", "An uncompressed file named like a gzip one; it is read as it is."


# ---- Voxels


def _clear_nan(images: Mapping[str, _Scan]) -> None:
    """Treat NaN as background where every other modality is background, as `cache.pack` does."""
    volumes = {kind: scan.voxels for kind, scan in images.items()}
    for kind, scan in images.items():
        finite = np.isfinite(scan.voxels) if scan.voxels.dtype.kind == "f" else np.True_
        if finite.all():
            continue
        inside, bad = nan_in_brain(kind, volumes), int((~finite).sum())
        if inside or np.isinf(scan.voxels).any():
            text = f"NaN or infinite voxels: {bad:,}; fetch the file again or repair them."
            scan.problems.append(("non-finite", "error", text))
        else:
            text = f"NaN voxels: {bad:,}, all where every other modality is background; they count as background."
            scan.problems.append(("nan-background", "warning", text))
            scan.voxels = np.nan_to_num(scan.voxels)


def _image_problems(scan: _Scan) -> Iterator[_Problem]:
    filled = scan.voxels != 0
    box = _note_voxels(scan, filled)
    inside = filled[box]
    brain = scan.voxels[box][inside]
    scan.facts["filled"] = round(brain.size / filled.size, 4)
    if any(code == "non-finite" for code, *_ in scan.problems):
        return
    if not brain.size:
        yield "empty-image", "error", "Every voxel is 0, expected a brain; fetch the file again."
    elif brain.min() == brain.max():
        yield "constant-image", "error", "All voxels of the brain have one value, expected a scan; fetch it again."
    elif text := _air_as_brain(inside, filled.size):
        yield "no-background", "warning", text


def _air_as_brain(inside: np.ndarray, voxels: int) -> str:
    """Return a warning if the air in a scan is not 0, else an empty string.

    Args:
        inside: where the scan is not 0, bool (X, Y, Z), cropped to its bounding box.
        voxels: number of voxels in the whole scan.
    """
    if not inside.size or _corners(inside) <= _FILLED_CORNERS:
        return ""
    share = f"{np.count_nonzero(inside) / voxels:.0%} of the field is not 0"
    return f"{share}, so normalisation treats air as brain. Was the skull stripped? Set the air to 0."


def _note_voxels(scan: _Scan, filled: np.ndarray) -> tuple[slice, ...]:
    """Note range and content of a volume; return the box of its voxels that are not 0."""
    box = bounding_box(filled)
    inside = scan.voxels[box]
    background = {} if inside.size == filled.size else {"initial": 0}
    ends = inside.min(**background), inside.max(**background)
    scan.facts["range"] = [float(end) if np.isfinite(end) else None for end in ends]
    scan.facts["content"] = content_hash(scan.voxels, box)
    return box


def _corners(inside: np.ndarray) -> float:
    """The share of true voxels in the eight corners of a box, each an eighth of its sides long."""
    for axis, side in enumerate(inside.shape):
        length = max(side // 8, 1)
        inside = inside.take([*range(length), *range(side - length, side)], axis)
    return float(inside.mean())


def _mask_problems(scan: _Scan, case: Case, images: Mapping[str, _Scan]) -> Iterator[_Problem]:
    labelled = np.rint(scan.voxels) != 0 if scan.voxels.dtype.kind == "f" else scan.voxels != 0
    box = _note_voxels(scan, labelled)
    inside = scan.voxels[box]
    values, counts = np.unique(inside[inside != 0], return_counts=True)
    scan.facts["labels"] = {f"{v:g}": int(n) for v, n in zip(values[:_MOST_LABELS], counts, strict=False)}
    problems = [*label_problems(values, counts, case, scan.scale)]
    yield from problems
    usual = NUMBERINGS[case.numbering].either and 3 in values and 4 not in values
    if usual and all(recognise(path).ending in MODALITIES for path in case.images.values()):
        yield "label-3", "warning", "Label 3 but no 4; 3 is read as enhancing tumour, as in BraTS 2023 and later."
    if images and all(other.voxels.shape == labelled.shape for other in images.values()):
        yield from _place_problems(labelled[box], box, images)
        if not any(severity == "error" for _, severity, _ in problems):
            yield from _anatomy_problems(scan, case, images)


def _anatomy_problems(scan: _Scan, case: Case, images: Mapping[str, _Scan]) -> Iterator[_Problem]:
    """Say so if this patient clearly shows another numbering than the set has: some sets are put together of two."""
    sound = {kind: other.voxels for kind, other in images.items() if np.isfinite(other.voxels).all()}
    shown = evidence_of(whole_labels(scan.voxels), sound, sound.__getitem__)
    if other := better_numbering(case.numbering, shown):
        text = (
            f"Where the labels lie and what enhances speaks for {other} ({NUMBERINGS[other].explain()}), but the set is"
            f" read as {case.numbering} ({NUMBERINGS[case.numbering].explain()}). Number its labels as the others, or"
            " leave the patient out."
        )
        yield "other-numbering", "warning", text


def _place_problems(labelled: np.ndarray, box: tuple[slice, ...], images: Mapping[str, _Scan]) -> Iterator[_Problem]:
    brain = np.logical_or.reduce([scan.voxels[box] != 0 for scan in images.values()])
    most = max(scan.facts["filled"] * scan.voxels.size for scan in images.values())
    tumour, outside = np.count_nonzero(labelled), np.count_nonzero(labelled & ~brain)
    if outside:
        share = outside / tumour
        voxels = "1 labelled voxel" if outside == 1 else f"{outside:,} labelled voxels"
        if share < _STRAY:
            yield "outside-brain", "note", f"kept although every image is 0 there: {voxels} (below {_STRAY:.1%})."
        else:
            text = f"{voxels} ({share:.1%}) where every image is 0 are kept. Is it this patient's mask?"
            yield "outside-brain", "warning", text
    share = (tumour - outside) / max(most, 1)
    if share > _LARGEST_TUMOUR:
        text = (
            f"{share:.0%} of the brain is labelled, more than a tumour fills. Is it a brain mask? Replace or remove it."
        )
        yield "mostly-labelled", "error", text


# ---- Files compared


def _geometry_problems(scans: Mapping[str, _Scan]) -> Iterator[tuple[str, str, str, str]]:
    """Compare every file, in LPS order, with the one that most of the others agree with."""
    if not scans:
        return

    def agreeing(kind: str) -> int:
        return sum(not _differs(scans[kind], other) for other in scans.values())

    like = max(scans, key=agreeing)
    for kind, scan in scans.items():
        if differs := _differs(scan, scans[like]):
            code, text = differs
            why = [problem for problem in scan.problems if problem[0] == "qform-sform"]
            scan.problems = [problem for problem in scan.problems if problem not in why]  # one fault, one finding
            text = " ".join([f"{text} of {like}.", *(problem[2] for problem in why)])
            way = ("Write the right one into both, or resample" if why else "Resample") + f" it onto {like}"
            yield kind, f"{code}-mismatch", "error", f"{text} {way} or fetch it again."


def _differs(one: _Scan, other: _Scan) -> tuple[str, str] | None:
    """The first difference between the geometries of two files: a code, and a text to be followed by a file's name."""
    if one.image.shape != other.image.shape:
        return "shape", f"Shape {times(one.image.shape)} instead of the {times(other.image.shape)}"
    if same_affine(one.image, other.image):
        return None
    own, its = spacing_mm(one.image), spacing_mm(other.image)
    if not np.allclose(own, its, rtol=0, atol=TOLERANCE_MM):
        return "spacing", f"Voxels of {times(own)} mm instead of the {times(its)} mm"
    apart = difference(one.image.affine, other.image.affine, one.image.shape)
    return "affine", f"{apart[0].upper()}{apart[1:-1]}, compared with those"


def _likeness_problems(images: Mapping[str, _Scan]) -> Iterator[tuple[str, str, str, str]]:
    """Two modalities with the same voxels, or of different types."""
    first: dict[str, str] = {}
    for kind, scan in images.items():
        twin = first.setdefault(scan.facts["content"], kind) if varies(scan.facts) else kind
        if twin != kind:
            text = f"Voxel for voxel the same as {twin}, expected another modality; one of the two is misnamed."
            yield kind, "same-image", "error", text
    types = {kind: scan.facts["dtype"] for kind, scan in images.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{kind} {dtype}" for kind, dtype in types.items())
        yield next(iter(types)), "mixed-dtypes", "note", f"The modalities differ in type ({listed}); this is harmless."


def times(sides: tuple[float, ...]) -> str:
    """Sides of a box as people write them: `240 x 240 x 155`."""
    return " x ".join(f"{side:g}" for side in sides)
