"""What is wrong with the patients on disk, found in one pass over their bytes. Nothing is ever written there.

Findings by file name come from `cases.survey`; here the files are read, each once, and everything is asked of the one
array that comes out: geometry, range, non-finite voxels, labels, and a hash of the voxels, by which the same scan is
known under any name and packing.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.data.cases import Case, Finding, Survey
from brats_helpers.data.content import content_hash, hash_of
from brats_helpers.data.findings import SEVERITIES
from brats_helpers.data.identity import group_people, varies
from brats_helpers.data.names import recognise
from brats_helpers.data.nifti import (
    TOLERANCE_MM,
    FileError,
    in_lps,
    parse_nifti,
    read_bytes,
    same_place,
    scale_of,
    spacing_mm,
)
from brats_helpers.data.numbering import label_problems
from brats_helpers.data.tables import read_tables
from brats_helpers.files import whole_file
from brats_helpers.labels import MODALITIES, NUMBERINGS, DataError
from brats_helpers.log import warn

_MOST_LABELS = 20  # listed of a file whose labels are none
_LARGEST_TUMOUR = 0.5  # of the brain's voxels; an error, as whoever learns from a brain mask learns no tumour
_FORMAT = 7  # raise it when `_examine` finds other things: what was remembered is then forgotten


def audit(
    found: Survey, cases: Iterable[Case], *, workers: int, cache_dir: Path | None, patient_pattern: str = ""
) -> dict:
    """Read `cases` and put everything known about all patients of `found` together.

    Args:
        found: all patients by the names of their files.
        cases: those of them whose files are read.
        workers: cases read at once, each by a thread (numpy, zlib and hashlib let them run side by side).
        cache_dir: where to remember what was read, by name, size and times of change; None remembers nothing.
        patient_pattern: how an ID names a person, see `identity.person_of`.

    Returns:
        `{"cases": {ID: {"findings": [{"code", "severity", "file", "message"}, ...], ...}}, "summary": {...}}`. A case
        also has `files` (by modality: file, how it was recognised and, if read, shape, dtype, spacing, affine, range,
        labels, content), `content` (a hash of all its voxels), `group` (the same for patients that belong in one part
        of a split) and what the tables know. The summary counts patients by their worst finding and findings by code,
        and holds the `findings` that belong to no patient.
    """
    read = examine(found, cases, workers=workers, cache_dir=cache_dir)
    known, problems = read_tables(found.tables)
    findings = {case.id: list(found.findings.get(case.id, ())) for case in found.cases}
    loose = found.findings.get("", []) + [Finding("table", "warning", found.relative(p), text) for p, text in problems]
    entries = {}
    for case in found.cases:
        facts = read.get(case.id, {"files": {}, "findings": [], "content": None})
        files = {
            kind: {"file": found.relative(path), "recognised": _recognised(path)} | facts["files"].get(kind, {})
            for kind, path in case.files.items()
        }
        findings[case.id] += [Finding(**finding) for finding in facts["findings"]]
        entry = {"files": files, "content": facts["content"], "grade": _grade_of_folder(case, found.root)}
        if case.seg:
            entry["numbering"] = case.numbering
        entries[case.id] = entry | known.get(case.id, {})
    groups, alike = group_people(found, entries, pattern=patient_pattern)
    for case_id, finding in alike:
        findings[case_id].append(finding)

    for listed in (*findings.values(), loose):
        listed.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    worst = Counter(listed[0].severity if listed else "clean" for listed in findings.values())
    codes = Counter(finding.code for listed in (*findings.values(), loose) for finding in listed)
    return {
        "cases": {
            case_id: {"findings": [*map(asdict, findings[case_id])], "group": groups[case_id]} | entry
            for case_id, entry in entries.items()
        },
        "summary": {
            "data": str(found.root),
            "modalities": list(found.modalities),
            "patients": len(entries),
            "read": len(read),
            "worst": {name: worst[name] for name in (*SEVERITIES, "clean")},
            "codes": dict(sorted(codes.items())),
            "findings": [*map(asdict, loose)],
        },
    }


def excluded(report: dict) -> dict[str, list[str]]:
    """The patients that cannot be used, each with the codes of its errors."""
    errors = {
        case_id: sorted({finding["code"] for finding in entry["findings"] if finding["severity"] == "error"})
        for case_id, entry in report["cases"].items()
    }
    return {case_id: codes for case_id, codes in errors.items() if codes}


def patients_with(report: dict, code: str) -> list[str]:
    """The patients that have a finding of this code."""
    found = {case_id: {finding["code"] for finding in entry["findings"]} for case_id, entry in report["cases"].items()}
    return sorted(case_id for case_id, codes in found.items() if code in codes)


def leave_out(report: dict, cases: Iterable[Case]) -> list[Case]:
    """Return those of `cases` that can be used, and print a line for each patient of the report that cannot.

    Raises:
        DataError: none of them can.
    """
    out = excluded(report)
    for case_id, codes in out.items():
        warn(f"left out: {case_id}: {', '.join(codes)}")
    kept = [case for case in cases if case.id not in out]
    if not kept:
        raise DataError(f"none of the {len(out)} patients below {report['summary']['data']} can be used; see above.")
    return kept


def rows(report: dict, *, each: int) -> list[dict[str, str]]:
    """The findings for a person to read: worst first, at most `each` of a code.

    Returns:
        Dicts of `severity`, `code`, `patient`, `file` and `message`; where there are more than `each` of a code, a last
        one says how many.
    """
    by_code = defaultdict(list)
    owned = [(case_id, finding) for case_id, entry in report["cases"].items() for finding in entry["findings"]]
    for case_id, finding in owned + [("", finding) for finding in report["summary"]["findings"]]:
        by_code[SEVERITIES.index(finding["severity"]), finding["code"]].append({"patient": case_id} | finding)
    table = []
    for (severity, code), found in sorted(by_code.items()):
        table += found[:each]
        if len(found) > each:
            more = {"patient": "", "file": "", "message": f"… and {len(found) - each:,} more like these."}
            table.append({"code": code, "severity": SEVERITIES[severity]} | more)
    return [{key: row[key] for key in ("severity", "code", "patient", "file", "message")} for row in table]


def _recognised(path: Path) -> str:
    name = recognise(path)
    return f"its name ends in {name.ending}" if name.kind else "the one file of its folder that is no modality"


def _grade_of_folder(case: Case, root: Path) -> str | None:
    """HGG or LGG where a folder is called so, as in BraTS 2018 and 2019."""
    folders = {part.upper() for path in case.files.values() for part in (root.name, *path.relative_to(root).parts)}
    return next((grade for grade in ("HGG", "LGG") if grade in folders), None)


def examine(found: Survey, cases: Iterable[Case], *, workers: int, cache_dir: Path | None) -> dict[str, dict]:
    """Read patients, but for those that are remembered unchanged.

    Returns:
        By case ID: `files` (facts of each), `findings`, and `content`, 16 hex digits that stand for all voxels, or
        `unreadable`.
    """
    cases = list(cases)
    stamps = {case.id: [_FORMAT, case.numbering, *map(_stamp, case.files.values())] for case in cases}
    place = cache_dir and _memory(found, Path(cache_dir))
    remembered = _remembered(place) if place else {}
    todo = [case for case in cases if remembered.get(case.id, {}).get("stamp") != stamps[case.id]]
    with ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(partial(_examine, root=found.root), todo))
    read = {case.id: {"stamp": stamps[case.id]} | result for case, result in zip(todo, results, strict=True)}
    if place and read:
        with whole_file(place) as file:
            file.write(json.dumps(remembered | read))
    return {case.id: (remembered | read)[case.id] for case in cases}


def _memory(found: Survey, cache_dir: Path) -> Path:
    source = hashlib.sha256(f"{found.root.resolve()} {found.modalities}".encode()).hexdigest()[:16]
    return cache_dir / f"audit-{source}.json"


def _remembered(place: Path) -> dict:
    """What `examine` wrote; nothing where there is none, or one torn by a crash of the machine."""
    try:
        return json.loads(place.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _stamp(path: Path) -> list:
    """What tells cheaply that a file changed; the last, ctime, that two of one size and time have swapped names."""
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def _examine(case: Case, root: Path) -> dict:
    """Read every file of a patient once, and ask everything of it that is asked."""
    findings: list[Finding] = []
    files: dict[str, dict] = {}
    brains: list[np.ndarray] = []
    for kind, path in case.files.items():
        name = path.relative_to(root).as_posix()
        try:
            raw, packed = read_bytes(path)
            image = parse_nifti(raw, path)
        except FileError as error:
            message = str(error).removeprefix(f"{path} ")
            findings.append(Finding(error.code, "error", name, message[0].upper() + message[1:]))
            continue
        facts = files[kind] = _header_facts(image)
        problems = [*_packing_problems(path, packed), *_header_problems(image)]
        if not any(severity == "error" for _, severity, _ in problems):
            volume, slope, inter = _stored(image, raw)
            turned = image
            zero = _background(volume.dtype, slope, inter)
            filled = volume != zero
            if kind == "seg" and (slope, inter) != (1, 0):
                filled = np.rint(volume * slope + inter) != 0
            box = _box(filled)
            inside = np.ascontiguousarray(volume[box])  # all that is not 0; the rest need not be looked at again
            whole = inside.size == volume.size
            ends = [end(**({} if whole else {"initial": zero})) for end in (inside.min, inside.max)]
            facts["range"] = [float(end) * slope + inter if np.isfinite(end) else None for end in ends]
            with suppress(FileError):  # a singular affine: what is then hashed lies as stored
                turned = in_lps(image, path)
            if turned is image and (slope, inter) == (1, 0):
                facts["content"] = content_hash(volume.T, box[::-1])
            else:
                facts["content"] = content_hash(np.asanyarray(turned.dataobj))
            if kind == "seg":
                values, counts = np.unique(inside[inside != zero] * slope + inter, return_counts=True)
                facts["labels"] = {f"{v:g}": int(n) for v, n in zip(values[:_MOST_LABELS], counts, strict=False)}
                problems += _label_problems(values, counts, case, image)
                if brains and all(brain.shape == filled.shape for brain in brains):
                    most = max(map(np.count_nonzero, brains))
                    problems += _place_problems(filled[box], [brain[box] for brain in brains], most)
            else:
                problems += _image_problems(inside, ends, zero, whole=whole)
                brains.append(filled)
        findings += [Finding(code, severity, name, message) for code, severity, message in problems]
    names = {kind: case.files[kind].relative_to(root).as_posix() for kind in files}
    problems = [*_geometry_problems(files), *_likeness_problems(files)]
    findings += [Finding(code, severity, names[kind], message) for kind, code, severity, message in problems]
    whole = len(files) == len(case.files) and all("content" in facts for facts in files.values())
    return {
        "files": files,
        "findings": [asdict(finding) for finding in findings],
        "content": hash_of(*(f"{kind} {facts['content']}" for kind, facts in files.items())) if whole else "unreadable",
    }


def _header_facts(image: nib.Nifti1Image) -> dict:
    return {
        "shape": list(image.shape),
        "dtype": str(image.get_data_dtype()),
        "spacing_mm": list(spacing_mm(image)),
        "affine": image.affine.tolist(),
    }


def _stored(image: nib.Nifti1Image, raw: bytes) -> tuple[np.ndarray, float, float]:
    """The voxels as they lie in the file, (Z, Y, X), without a copy; times the slope plus the intercept they count."""
    data = image.dataobj
    return np.ndarray(data.shape[::-1], data.dtype, raw, data.offset), float(data.slope), float(data.inter)


def _background(dtype: np.dtype, slope: float, inter: float) -> int | float:
    """What is stored where the image is 0."""
    zero = -inter / slope
    return int(zero) if dtype.kind in "iu" and zero.is_integer() else zero


def _box(filled: np.ndarray) -> tuple[slice, slice, slice]:
    """The smallest box that holds every true voxel; empty where none is."""
    plane = filled.any(axis=0)
    sides = [np.flatnonzero(side) for side in (filled.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0))]
    return tuple(slice(int(side[0]), int(side[-1]) + 1) if len(side) else slice(0) for side in sides)


_Problem = tuple[str, str, str]


def _packing_problems(path: Path, packed: bool) -> Iterator[_Problem]:
    named = path.name.lower().endswith(".gz")
    if packed and not named:
        yield "gzip-as-nii", "warning", "A gzip file under the name of a plain one; it is read as what it is."
    if named and not packed:
        yield "nii-as-gzip", "warning", "A plain file under the name of a gzip one; it is read as what it is."


def _header_problems(image: nib.Nifti1Image) -> Iterator[_Problem]:
    if image.ndim != 3 or min(image.shape) < 1:
        yield "not-3d", "error", f"Shape {_times(image.shape)}, expected three axes of voxels; split or replace it."
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        yield "dtype", "error", f"Voxels of type {dtype}, expected one real number each; convert or replace it."


def _image_problems(inside: np.ndarray, ends: Sequence, zero: int | float, *, whole: bool) -> Iterator[_Problem]:
    if not np.isfinite(ends).all():
        bad = inside.size - np.count_nonzero(np.isfinite(inside))
        yield "non-finite", "error", f"NaN or infinite voxels: {bad:,}; fetch the file again or mend them."
    elif not inside.size:
        yield "empty-image", "error", "Every voxel is 0, expected a brain; fetch the file again."
    elif ends[0] == ends[1] or (zero in ends and _only(ends, inside[len(inside) // 2]) and _only(ends, inside)):
        yield "constant-image", "error", "All voxels of the brain have one value, expected a scan; fetch it again."
    elif whole and not (inside == zero).any():
        yield "no-background", "warning", "No voxel is 0, so all count as brain in normalising; was the skull stripped?"


def _only(values: Sequence, voxels: np.ndarray) -> bool:
    return bool(((voxels == values[0]) | (voxels == values[1])).all())


def _label_problems(values: np.ndarray, counts: np.ndarray, case: Case, image: nib.Nifti1Image) -> Iterator[_Problem]:
    yield from label_problems(values, counts, case, scale_of(image))
    usual = NUMBERINGS[case.numbering].either and 3 in values and 4 not in values
    if usual and all(recognise(path).ending in MODALITIES for path in case.images.values()):
        yield "label-3", "warning", "Label 3 and no 4; 3 is read as enhancing tumour, as from BraTS 2023 on."


def _place_problems(labelled: np.ndarray, brains: list[np.ndarray], brain_voxels: int) -> Iterator[_Problem]:
    outside = np.count_nonzero(labelled & ~np.logical_or.reduce(brains))
    if outside:
        share = outside / np.count_nonzero(labelled)
        text = f"{outside:,} labelled voxels ({share:.0%}) where every image is 0; they are kept. Is it this patient's?"
        yield "outside-brain", "warning", text
    share = (np.count_nonzero(labelled) - outside) / max(brain_voxels, 1)
    if share > _LARGEST_TUMOUR:
        text = f"{share:.0%} of the brain is labelled, more than any tumour fills; a brain mask? Replace or remove it."
        yield "mostly-labelled", "error", text


def _geometry_problems(files: dict[str, dict]) -> Iterator[tuple[str, str, str, str]]:
    """Compare every file with the one that most agree with."""
    if not files:
        return
    like = max(files, key=lambda kind: sum(_differs(files[kind], facts) is None for facts in files.values()))
    for kind, facts in files.items():
        if differs := _differs(files[like], facts):
            code, found, expected = differs
            text = f"{code.capitalize()} {found}, but {like} has {expected}; resample it onto {like} or fetch it again."
            yield kind, f"{code}-mismatch", "error", text


def _differs(one: dict, other: dict) -> tuple[str, str, str] | None:
    """In what the geometry of two files differs first, and how it is written in the other and the one."""
    if one["shape"] != other["shape"]:
        return "shape", _times(other["shape"]), _times(one["shape"])
    if same_place(one["affine"], other["affine"], one["shape"]):
        return None
    spaced = np.allclose(one["spacing_mm"], other["spacing_mm"], rtol=0, atol=TOLERANCE_MM)
    code, key = ("affine", "affine") if spaced else ("spacing", "spacing_mm")
    return code, _brief(other[key]), _brief(one[key])


def _likeness_problems(files: dict[str, dict]) -> Iterator[tuple[str, str, str, str]]:
    """Two modalities with the same voxels, or of different types."""
    images = {kind: facts for kind, facts in files.items() if kind != "seg"}
    first: dict[str, str] = {}
    for kind, facts in images.items():
        twin = first.setdefault(facts["content"], kind) if varies(facts) else kind
        if twin != kind:
            text = f"Voxel for voxel the same as {twin}, expected another modality; one of the two is misnamed."
            yield kind, "same-image", "error", text
    types = {kind: facts["dtype"] for kind, facts in images.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{kind} {dtype}" for kind, dtype in types.items())
        yield next(iter(types)), "mixed-dtypes", "note", f"The modalities differ in type ({listed}); that does no harm."


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _brief(numbers: Sequence) -> str:
    return " | ".join(" ".join(f"{number:g}" for number in row) for row in np.atleast_2d(np.round(numbers, 3))[:3])
