"""The audit of the patients on disk: findings about names, about files and between patients.

Findings by file name come from `cases.survey`, those in the files from `checks.check_case`, and those between patients
from `outliers` and `identity`. Nothing is ever written among the data.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from brats_helpers.data.cases import Case, Finding, Survey
from brats_helpers.data.checks import check_case
from brats_helpers.data.filenames import recognise
from brats_helpers.data.findings import SEVERITIES
from brats_helpers.data.identity import group_people
from brats_helpers.data.outliers import compare_patients
from brats_helpers.data.stamps import stamp
from brats_helpers.data.tables import read_tables
from brats_helpers.files import read_json, whole_file
from brats_helpers.labels import DataError
from brats_helpers.log import warn

_FORMAT = 10  # raise it when `check_case` changes what it finds: remembered results are then discarded
_MOST_REMEMBERED = 20_000  # patients


def audit(
    found: Survey, cases: Iterable[Case], *, workers: int, cache_dir: Path | None, patient_pattern: str = ""
) -> dict:
    """Read `cases` and collect everything known about all patients of `found`.

    Args:
        found: all patients, found by file name.
        cases: the patients whose files are read.
        workers: number of threads, each reading one case (numpy, zlib and hashlib run in parallel).
        cache_dir: where to store results for later runs, see `stamps.stamp`; None stores nothing.
        patient_pattern: how an ID names a person, see `identity.person_of`.

    Returns:
        `{"cases": {ID: {"findings": [{"code", "severity", "file", "message"}, ...], ...}}, "summary": {...}}`. A case
        also has `files` (by modality: file, how it was recognised and, if read, the facts of `checks.check_case`),
        `content` (a hash of all its voxels), `group` (the same for patients that belong in one part
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
        findings[case.id] += [
            Finding(told["code"], told["severity"], files[told["kind"]]["file"], told["message"])
            for told in facts["findings"]
        ]
        entry = {"files": files, "content": facts["content"], "grade": _grade_of_folder(case, found.root)}
        if case.seg:
            entry["numbering"] = case.numbering
        entries[case.id] = entry | known.get(case.id, {})
    groups, alike = group_people(found, entries, pattern=patient_pattern)
    unstripped = {case_id for case_id, listed in findings.items() for told in listed if told.code == "no-background"}
    for case_id, finding in [*alike, *compare_patients(entries, unstripped=unstripped)]:
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
    errors = defaultdict(set)
    for case_id, finding in _of_patients(report):
        if finding["severity"] == "error":
            errors[case_id].add(finding["code"])
    return {case_id: sorted(codes) for case_id, codes in errors.items()}


def patients_with(report: dict, code: str) -> list[str]:
    """The patients that have a finding of this code."""
    return sorted({case_id for case_id, finding in _of_patients(report) if finding["code"] == code})


def _of_patients(report: dict) -> list[tuple[str, dict]]:
    """Every finding about a patient, with the case ID."""
    return [(case_id, finding) for case_id, entry in report["cases"].items() for finding in entry["findings"]]


def leave_out(report: dict, cases: Iterable[Case]) -> list[Case]:
    """Return those of `cases` that can be used, and print a warning for each patient of the report that cannot.

    Raises:
        DataError: none of them can be used.
    """
    out = excluded(report)
    for case_id, codes in out.items():
        warn(f"left out: {case_id}: {', '.join(codes)}")
    kept = [case for case in cases if case.id not in out]
    if not kept:
        raise DataError(f"none of the {len(out)} patients below {report['summary']['data']} can be used; see above.")
    return kept


def rows(report: dict, *, each: int) -> list[dict[str, str]]:
    """The findings as rows of a table: worst first, at most `each` per code.

    Returns:
        Dicts of `severity`, `code`, `patient`, `file` and `message`; where a code has more than `each` findings, its
        last row says how many more.
    """
    by_code = defaultdict(list)
    for case_id, finding in _of_patients(report) + [("", finding) for finding in report["summary"]["findings"]]:
        severity, code = finding["severity"], finding["code"]
        row = {"severity": severity, "code": code, "patient": case_id} | finding
        by_code[SEVERITIES.index(severity), code].append(row)
    table = []
    for (severity, code), found in sorted(by_code.items()):
        table += found[:each]
        if len(found) > each:
            more = {"patient": "", "file": "", "message": f"… and {len(found) - each:,} more like these."}
            table.append({"severity": SEVERITIES[severity], "code": code} | more)
    return table


def _recognised(path: Path) -> str:
    name = recognise(path)
    return f"its name ends in {name.ending}" if name.kind else "by its folder or dataset.json"


def _grade_of_folder(case: Case, root: Path) -> str | None:
    """HGG or LGG if a folder has that name, as in BraTS 2018 and 2019."""
    folders = {part.upper() for path in case.files.values() for part in (root.name, *path.relative_to(root).parts)}
    return next((grade for grade in ("HGG", "LGG") if grade in folders), None)


def examine(found: Survey, cases: Iterable[Case], *, workers: int, cache_dir: Path | None) -> dict[str, dict]:
    """Read patients, reusing the stored results of unchanged files even if they were moved.

    Returns:
        By case ID what `checks.check_case` returns.
    """
    cases = list(cases)
    keys = {case.id: _key(case) for case in cases}
    place = cache_dir and Path(cache_dir) / "audit.json"
    remembered = _remembered(place) if place else {}
    todo = [case for case in cases if keys[case.id] not in remembered]
    with ThreadPoolExecutor(workers) as pool:
        read = dict(zip((case.id for case in todo), pool.map(check_case, todo), strict=True))
    new = {keys[case_id]: result for case_id, result in read.items() if result["content"] != "unreadable"}
    if place and new:
        kept = list((remembered | new).items())[-_MOST_REMEMBERED:]
        with whole_file(place) as file:
            file.write(json.dumps(dict(kept)))
    return {case.id: read.get(case.id) or remembered[keys[case.id]] for case in cases}


def _key(case: Case) -> str:
    """Hash the state of a patient's files and everything else that the findings depend on."""
    stamps = [stamp(path) for path in case.files.values()]
    facts = [_FORMAT, case.id, list(case.files), case.channels, case.numbering, stamps]
    return hashlib.sha256(str(facts).encode()).hexdigest()[:20]


def _remembered(place: Path) -> dict:
    """What `examine` stored; empty if there is no file, or if a crash damaged it."""
    try:
        content = read_json(place)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
