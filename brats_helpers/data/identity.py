"""The person behind each case.

One person may have several cases: visits, or one scan under two names. All of them belong in one part of a split, and a
network that has seen one of them has seen the person.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from brats_helpers.data.cases import Case, Finding, Survey, survey
from brats_helpers.data.content import image_hash
from brats_helpers.labels import DataError
from brats_helpers.log import warn

_DATE = r"(?:19|20)\d\d(?P<dot>[-._])\d\d?(?P=dot)\d\d?"
_COMPACT_DATE = r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
_NUMBERED = r"(?:week|wk|month|day|year|visit|session|time[-_]?point|tp|fu|follow[-_]?up)[-_]?\d+d?(?:[-_]\d+)?"
_NAMED = r"ses-[a-z0-9]+|baseline|follow[-_]?up|pre[-_]?(?:op|treatment)|post[-_]?(?:op|treatment)"
_VISIT = rf"{_DATE}|{_NUMBERED}|{_NAMED}"
_SHORT = rf"{_COMPACT_DATE}|t\d\d?|v\d\d?|ses[-_]?\d+|scan[-_]?\d\d?|pre|post"
"""Names of visits only after something with a digit in it: `P01_T0`, but not `Site_T0`."""
_VISITS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(BraTS(?:-[a-z]+)+-\d{4,5})-\d{1,3}",  # BraTS-GLI-02062-100, BraTS-MEN-RT-0402-1
        r"([a-z]+(?:-[a-z]+)*-\d{4,})_\d{1,2}",  # UPENN-GBM-00001_11, UCSD-PTGBM-0002_01
        r"(brats_\w+_pat\d+)_\d+",  # brats_tcia_pat117_0083
        rf"(.+?)[-_.](?:{_VISIT})",  # AAAC_0_2008.03.30, Patient-007_week000, sub-01_ses-02
        rf"(.*\d.*?)[-_.](?:{_SHORT})",  # P01_20010203, P01_T0
    )
]
_BRATS_2017_TO_2019 = re.compile(r"brats1[789]_(2013|[a-z]+)\d*_(\w+?)_\d+", re.IGNORECASE)
"""`Brats17_TCIA_201_1` is `Brats18_TCIA01_201_1`; `Brats18_2013_2_1` is someone else. The last number is the visit."""
_COLLECTION = re.compile(
    r".*(?:train|valid).*|(?:val|test|testing|hgg|lgg|all|images?(?:tr|ts)?|labels?(?:tr|ts)?|masks?|data"
    r"|(?:fold|batch|part|site|group)[-_ ]?\d*)",
    re.IGNORECASE,
)
"""Names of folders that hold many persons."""
_MOST_VISITS = 10
"""If more cases than this have IDs that differ only in the last part, they are numbered persons, not visits."""


def person_of(case_id: str, pattern: str = "") -> str:
    """Return the person that an ID names: the ID without its visit, or the ID itself.

    Args:
        case_id: a case's ID.
        pattern: a regular expression that is searched for in the ID. Its first group, or else the whole match, is the
            person. Where it is empty or not found, the naming of public data sets applies.
    """
    if pattern and (match := re.search(pattern, case_id)):
        person = match[1] if match.re.groups else match[0]
        if person:
            return person
    if match := _BRATS_2017_TO_2019.fullmatch(case_id):
        return f"{match[1]}_{match[2]}"
    return next((match[1] for known in _VISITS if (match := known.fullmatch(case_id))), case_id)


def check_pattern(pattern: str, ids: Iterable[str]) -> None:
    """Raise `DataError` if `pattern` is not a regular expression or is found in none of `ids`."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise DataError(f"patient_pattern {pattern!r} is not a regular expression: {error}.") from error
    ids = list(ids)
    if pattern and ids and not any(map(found.search, ids)):
        raise DataError(
            f"patient_pattern {pattern!r} is found in no ID, such as {ids[0]}; expected a regular expression"
            " whose first group, or whole match, is the person."
        )


def group_people(
    found: Survey, entries: Mapping[str, Mapping], *, pattern: str = ""
) -> tuple[dict[str, str], list[tuple[str, Finding]]]:
    """Group cases by person, using the content of their files, tables, IDs and folders.

    Args:
        found: the cases.
        entries: by case ID what the audit knows: `files` (with `content` and `range` where they were read) and
            `earlier_ids`. Cases without an entry are known by name alone.
        pattern: see `person_of`.

    Returns:
        The person of each case, and findings as pairs of case ID and finding. A person is named as its IDs or folders
        say if they agree, otherwise by the ID of the first case.

    Raises:
        DataError: see `check_pattern`.
    """
    ids = [case.id for case in found.cases]
    check_pattern(pattern, ids)
    folders = _person_folders(found.cases, found.root)
    pairs, findings = [], []
    for case_id, other, finding in [*_same_scans(entries), *_same_names(found.cases, entries, folders, pattern)]:
        pairs.append((case_id, other))
        findings.append((case_id, finding))
    groups: dict[str, str] = {}
    for members in _joined(ids, pairs):
        names = {folders.get(case_id) or person_of(case_id, pattern) for case_id in members}
        groups |= dict.fromkeys(members, names.pop() if len(names) == 1 else members[0])
    for case_id, other in _similar_ids(ids, groups):
        text = (
            f"Its ID differs from {other} only in the last part. If both are visits of one person, say how IDs name"
            " a person (-p patient_pattern REGEX); otherwise they may land in different parts of the split."
        )
        findings.append((case_id, Finding("similar-id", "note", "", text)))
    return groups, findings


def seen_before(
    facts: Mapping | None, cases: Iterable[Case], *, hashes: Mapping[str, Collection[str]] | None = None
) -> dict[str, str]:
    """Find the cases of persons whose scans a network was trained or selected on.

    Args:
        facts: of the network's checkpoint, see `patients.facts_of`; None or empty matches nobody.
        cases: the cases to look up.
        hashes: by case ID, hashes of the case's images, where they are known (see `content.image_hash`). The images of
            other cases are read, each until one is recognised.

    Returns:
        By case ID the reason, in words that continue a sentence about the case. Unreadable files are passed over.
    """
    patients = (facts or {}).get("patients") or {}
    pattern = (facts or {}).get("patient_pattern", "")
    names: dict[str, str] = {}
    images: dict[str, str] = {}
    for case_id, known in patients.items():
        group = known.get("group") or case_id
        own = (case_id, person_of(case_id, pattern), group, Path(group).name, *known.get("names", ()))
        names |= dict.fromkeys(own, case_id)
        images |= dict.fromkeys(known.get("images", ()), case_id)
    seen = {}
    for case in cases:
        if case.id in patients:
            seen[case.id] = "has the ID of a patient that it has seen"
        elif other := names.get(case.id) or names.get(person_of(case.id, pattern)):
            seen[case.id] = f"is by its ID the same person as {other}"
        elif (folder := _above_visit(case.folder)) and folder.name in names:
            seen[case.id] = f"lies in the folder of {folder.name}, the same person as {names[folder.name]}"
        elif images:
            own = hashes[case.id] if hashes and case.id in hashes else _image_hashes(case)
            if other := next((images[content] for content in own if content in images), None):
                seen[case.id] = f"has a scan that is voxel for voxel one of {other}"
    return seen


def _image_hashes(case: Case) -> Iterator[str]:
    for modality in case.images:
        try:
            content = image_hash(case.read(modality)[0])
        except DataError:  # predicting or scoring the case reports it
            continue
        if content:
            yield content


def varies(facts: Mapping) -> bool:
    """Whether a file was read and holds more than one value: only then does its content identify somebody."""
    return "content" in facts and facts["range"][0] != facts["range"][1]


def _same_scans(entries: Mapping[str, Mapping]) -> Iterator[tuple[str, str, Finding]]:
    """Pairs of cases that share a file, masks included: no two tumours are alike. Takes linear time."""
    first: dict[str, tuple[str, str]] = {}  # content: the first case that has it, and as what
    shared: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case_id, entry in entries.items():
        for kind, facts in entry["files"].items():
            if varies(facts):
                owner, as_kind = first.setdefault(facts["content"], (case_id, kind))
                if owner != case_id:
                    shared[case_id, owner].append(kind)
                    shared[owner, case_id].append(as_kind)
    for (case_id, other), kinds in shared.items():
        text = f"{', '.join(kinds)}: voxel for voxel the same as a file of {other}; both go into one part of a split."
        yield case_id, other, Finding("same-scan", "warning", entries[case_id]["files"][kinds[0]]["file"], text)


def _same_names(
    cases: Sequence[Case], entries: Mapping[str, Mapping], folders: Mapping[str, str], pattern: str
) -> Iterator[tuple[str, str, Finding]]:
    """Pairs of cases that have a name in common: an ID, a person in an ID, or a folder."""
    owners: dict[str, tuple[str, str]] = {}
    by_id = "its ID, read by patient_pattern" if pattern else "its ID"
    for case in cases:
        earlier = entries.get(case.id, {}).get("earlier_ids", ())
        names = {f"folder {folders[case.id]}": "its folder"} if case.id in folders else {}
        for other in earlier:
            names |= {other: "the tables", person_of(other, pattern): "the tables"}
        names |= {person_of(case.id, pattern): by_id, case.id: by_id}
        told = set()
        for name, how in sorted(names.items()):
            owner, its_how = owners.setdefault(name, (case.id, how))
            if owner != case.id and owner not in told:
                told.add(owner)
                known_by = how if "tables" not in its_how else its_how
                text = f"The same patient as {owner}, by {known_by}; both go into one part of a split."
                yield case.id, owner, Finding("same-patient", "note", "", text)


def _person_folders(cases: Iterable[Case], root: Path) -> dict[str, str]:
    """The person's folder relative to `root`, by case ID, if folders of visits lie in folders of persons."""
    visits: dict[Path, list[str]] = defaultdict(list)
    for case in cases:
        folder = case.folder
        while folder != root and not _is_visit(folder):
            if folder == folder.parent:
                break
            folder = folder.parent
        visits[folder].append(case.id)
    persons = {
        ids[0]: folder.parent.relative_to(root).as_posix()
        for folder, ids in visits.items()
        if len(ids) == 1 and _is_visit(folder) and root in folder.parent.parents
    }
    return persons if len(set(persons.values())) > 1 else {}


def _above_visit(folder: Path) -> Path | None:
    """The folder above `folder` if `folder` is named like one visit, else None."""
    return folder.parent if _is_visit(folder) else None


def _is_visit(folder: Path) -> bool:
    """Whether a folder is named like one visit of the person whose folder it lies in."""
    person = folder.parent.name
    if not person or _COLLECTION.fullmatch(person):
        return False
    visit = re.fullmatch(rf"{re.escape(person)}[-_.](.+)", folder.name)
    name, digits = (visit[1], r"\d\d?") if visit else (folder.name, r"\d")
    return bool(re.fullmatch(rf"{_VISIT}|{_SHORT}|{digits}", name, re.IGNORECASE))


def _similar_ids(ids: Iterable[str], groups: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of cases whose IDs differ only in the last part, after what looks like a person's number."""
    stems: dict[str, list[str]] = defaultdict(list)
    for case_id in ids:
        stems[re.sub(r"[-_.][^-_.]*$", "", case_id)].append(case_id)
    for stem, members in stems.items():
        apart = len({groups[case_id] for case_id in members}) == len(members)
        if len(stems) > 1 and stem[-1:].isdigit() and 1 < len(members) <= _MOST_VISITS and apart:
            yield from ((case_id, members[0]) for case_id in members[1:])


def _joined(ids: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of IDs that are connected by pairs, each in the order of `ids`."""
    parent = {case_id: case_id for case_id in ids}

    def top(case_id: str) -> str:
        while parent[case_id] != case_id:
            parent[case_id] = case_id = parent[parent[case_id]]
        return case_id

    for one, other in pairs:
        first, second = sorted((top(one), top(other)))
        parent[second] = first
    groups: dict[str, list[str]] = defaultdict(list)
    for case_id in parent:
        groups[top(case_id)].append(case_id)
    return list(groups.values())


def survey_folders(
    folders: Iterable[Path], modalities: Sequence[str], *, fill_missing: bool
) -> tuple[list[Case], dict[str, str]]:
    """Find the patients below several folders; warnings are printed, and copies of a patient count once.

    Args:
        folders, modalities, fill_missing: see `cases.survey`.

    Returns:
        The usable patients; and by ID or folder, why others are left out, such as two patients with one ID.
    """
    cases: dict[str, Case] = {}
    skipped: dict[str, str] = {}
    for folder in folders:
        try:
            found = survey(folder, modalities, fill_missing=fill_missing)
        except DataError as error:
            skipped[str(folder)] = str(error)
            continue
        faulty = found.faulty()
        skipped |= faulty if found.cases else {str(folder): found.nothing()}
        for case_id, findings in found.findings.items():
            for finding in findings:
                if finding.severity == "warning" and case_id not in faulty:
                    warn(": ".join(text for text in (case_id, finding.file, finding.message) if text))
        for case in found.cases:
            if case.id in faulty:
                continue
            if case.id not in cases:
                cases[case.id] = case
            elif not _same_images(case, cases[case.id]):
                skipped[case.id] = (
                    f"lies in {cases[case.id].folder} and in {case.folder} with other scans; predict one at a time."
                )
    return [case for case_id, case in cases.items() if case_id not in skipped], skipped


def _same_images(one: Case, other: Case) -> bool:
    """Whether two cases of one ID have the same images, voxel for voxel."""
    if one.images.keys() != other.images.keys():
        return False
    return all(image_hash(one.read(name)[0]) == image_hash(other.read(name)[0]) for name in one.images)
