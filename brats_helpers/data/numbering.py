"""Find out how a set of masks is numbered, from names, label numbers and the anatomy that the labels outline.

Oedema has the largest share of its surface towards healthy brain. Of the other labels, enhancing tumour gains most from
T1 to T1ce. A resection cavity is darker on FLAIR than healthy brain. Each patient shows this with more or less
certainty, so patients vote. HDF5 slices, whose masks and channels have no names, are identified by the same rules.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from brats_helpers.boxes import bounding_box
from brats_helpers.data.cases import Case, Survey
from brats_helpers.data.findings import Finding
from brats_helpers.data.nifti import read_labels
from brats_helpers.labels import (
    CLASSES,
    KNOWN_LABELS,
    NUMBERINGS,
    OTHERWISE,
    USUAL,
    DataError,
    Numbering,
    find_numbering,
    whole_labels,
)

AUTO = "auto"
AGREE = 2 / 3
"""Share of the patients that have to agree."""
NEARLY_ALL = 0.9
"""Share of the patients that count as nearly all."""
_VOTERS = 12  # patients read, spread over the set
_ENOUGH = 3  # patients that can outvote the usual numbering where the numbers fit it
_FEW_VOXELS = 10  # a label with fewer gives no evidence
_CLEARER = 0.1  # by which the share of outer surface has to lead
_BRIGHTER = 0.2  # by which the gain from T1 to T1ce has to lead, in standard deviations of the healthy brain
_DARK = -0.5  # of a cavity on FLAIR, in the same unit
_CANDIDATES = (USUAL, "msd", "brats2012", "gli2024", "ped")  # the others map the same numbers in the same way
_ED, _ET = CLASSES.index("ED"), CLASSES.index("ET")


@dataclass(frozen=True)
class Evidence:
    """What one patient shows about the meaning of its labels.

    Attributes:
        numbers: tumour labels in the mask.
        outer: share of each label's surface that borders no tumour; empty with fewer than two labels.
        gain: brightness of each label on T1ce minus that on T1, as z-scores of the healthy brain; empty without T1ce.
        flair: brightness of each label on FLAIR, likewise.
    """

    numbers: frozenset[int]
    outer: dict[int, float] = field(default_factory=dict)
    gain: dict[int, float] = field(default_factory=dict)
    flair: dict[int, float] = field(default_factory=dict)

    @property
    def oedema(self) -> int | None:
        """The label that borders healthy brain most, or None if none clearly leads."""
        return _leader(self.outer, _CLEARER)

    def enhancing(self, *others: int | None) -> int | None:
        """The label that gains most from T1 to T1ce, except for `others`, or None if none clearly leads."""
        return _leader({label: gain for label, gain in self.gain.items() if label not in others}, _BRIGHTER)


@dataclass(frozen=True)
class Verdict:
    """How a set of masks is numbered.

    Attributes:
        numbering: key of `NUMBERINGS`, for cases whose ID or data set implies none, or for all if a user named it.
        asked: what the user asked for, `auto` or a name; a name as well if the masks contradict the cases' names.
        says: one sentence on how it was found.
        unusual: whether a numbering other than the usual one was chosen from the anatomy alone.
    """

    numbering: str
    asked: str
    says: str
    unusual: bool = False

    def apply(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases with their numbering."""
        return with_numbering(cases, numbering=self.numbering, asked=self.asked)


def with_numbering(cases: Iterable[Case], *, numbering: str, asked: str) -> list[Case]:
    """Return `cases` with `numbering`. What a case's ID implies takes precedence unless a user named one."""
    return [replace(case, numbering=(asked == AUTO and case.told_numbering) or numbering) for case in cases]


def written_as(case: Case, asked: str) -> str:
    """The numbering in which a patient's prediction is written: its own for `auto`, else the one that was asked for."""
    return case.numbering if asked == AUTO else find_numbering(asked)


def predicted_as(case: Case, metrics: Mapping) -> str:
    """The numbering of a patient's prediction in a run, by the run's `metrics.json`."""
    return written_as(case, metrics.get("labels", {}).get("predictions", AUTO))


def predicted_numberings(metrics: Mapping, *, own: str | None) -> list[str]:
    """The numberings of a run's predictions, by its `metrics.json` and, where that says nothing, that of its masks."""
    labels = metrics.get("labels", {})
    if (asked := labels.get("predictions", AUTO)) != AUTO:
        return [asked]
    return list(labels.get("references", ())) or [own if own in NUMBERINGS else USUAL]


def count_numberings(cases: Iterable[Case]) -> dict[str, int]:
    """How many of the cases have each numbering."""
    return dict(Counter(case.numbering for case in cases))


def resolve(cases: Iterable[Case], asked: str = AUTO) -> Verdict:
    """Find out how the masks of `cases` are numbered. Reads up to 12 patients of each kind.

    Args:
        cases: patients; those without a segmentation have no vote.
        asked: `auto`, or a numbering, which is then not checked.

    Raises:
        DataError: `asked` is not a numbering; or names, numbers and anatomy of most patients contradict each other.
    """
    if asked != AUTO:
        name = find_numbering(asked)
        return Verdict(name, name, f"read as {_meaning(name)}, as asked")
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.told_numbering, []).append(case)
    unnamed = groups.pop("", [])
    seen = {name: gather(named) for name, named in groups.items()}
    if groups and all(_contradicted(name, told) for name, told in seen.items()):
        verdict = decide([*chain(*seen.values()), *gather(unnamed)])
        says = f"{verdict.says}. The names say {' and '.join(map(_meaning, seen))}, which the numbers do not fit"
        return Verdict(verdict.numbering, verdict.numbering, says, unusual=True)
    for name, told in seen.items():
        _confirm(name, told)
    if not groups or any(case.seg for case in unnamed):
        return decide(gather(unnamed))
    name = max(groups, key=lambda name: len(groups[name]))
    counts = ", ".join(f"{len(named):,} as {_meaning(name)}" for name, named in groups.items())
    return Verdict(name, AUTO, f"read by the names of the patients: {counts}")


def number(found: Survey, asked: str = AUTO) -> tuple[Survey, Verdict]:
    """Resolve the numbering of a survey's patients, and return the survey with it; see `resolve`.

    An unusual numbering chosen from the anatomy adds a warning to the findings.
    """
    verdict = resolve(found.cases, asked)
    findings = dict(found.findings)
    if verdict.unusual:
        text = f"Masks {verdict.says}. If that is wrong: -p labels NAME, or --labels NAME."
        findings[""] = [*findings.get("", []), Finding("label-numbering", "warning", "", text)]
    return replace(found, cases=verdict.apply(found.cases), findings=findings), verdict


def gather(cases: Sequence[Case]) -> list[Evidence]:
    """The evidence of up to 12 labelled patients, spread over `cases`; patients that cannot be read have none."""
    voters = spread([case for case in cases if case.seg], _VOTERS)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        seen = list(pool.map(_evidence_or_none, voters))
    return [evidence for evidence in seen if evidence and evidence.numbers and evidence.numbers <= KNOWN_LABELS]


def spread(items: Sequence, most: int) -> Sequence:
    """At most `most` of the items, spread evenly."""
    return items[:: max(1, -(-len(items) // most))]


def _evidence_or_none(case: Case) -> Evidence | None:
    try:
        return examine(case)
    except (DataError, ValueError, OSError):  # the audit says why
        return None


def examine(case: Case) -> Evidence:
    """Measure where a patient's labels lie and how bright they are."""
    return evidence_of(read_labels(case.seg)[0], case.images, lambda name: case.read(name)[0])


def evidence_of(labels: np.ndarray, modalities: Collection[str], read: Callable[[str], np.ndarray]) -> Evidence:
    """What label numbers, shape (X, Y, Z), show on the scans; `read` returns that of a modality, in the same order."""
    counts = dict(zip(*np.unique(labels[bounding_box(labels)], return_counts=True), strict=True))
    numbers = frozenset(int(label) for label in counts if label)
    if not numbers <= KNOWN_LABELS:
        return Evidence(numbers)
    shown = [label for label in sorted(numbers) if counts[label] >= _FEW_VOXELS]
    outer = outer_shares(labels)
    bright = {name: _brightness(read(name), labels, shown) for name in ("t1", "t1ce", "flair") if name in modalities}
    after, before = bright.get("t1ce", {}), bright.get("t1", {})
    return Evidence(
        numbers,
        {label: outer[label] for label in shown} if len(shown) > 1 else {},
        {label: value - before.get(label, 0) for label, value in after.items()},
        bright.get("flair", {}),
    )


def _brightness(volume: np.ndarray, labels: np.ndarray, shown: Sequence[int]) -> dict[int, float]:
    if volume.shape != labels.shape:
        return {}
    sample = volume[::3, ::3, ::3]
    healthy = sample[(sample != 0) & (labels[::3, ::3, ::3] == 0)]
    box = bounding_box(labels)
    inside, tumour = volume[box], labels[box]
    return z_scores(healthy, {label: inside[tumour == label] for label in shown})


def z_scores(healthy: np.ndarray, tissues: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Mean brightness of each tissue in standard deviations of the healthy brain.

    Args:
        healthy: voxels of healthy brain, shape (n,) or, with several channels, (n, channels).
        tissues: voxels of each tissue, likewise.

    Returns:
        A number, or one for each channel, by tissue; empty if the healthy brain does not vary.
    """
    if not healthy.size or not healthy.std(axis=0).all():
        return {}
    mean, spread_out = healthy.mean(axis=0, dtype=np.float64), healthy.std(axis=0, dtype=np.float64)
    return {tissue: (voxels.mean(axis=0, dtype=np.float64) - mean) / spread_out for tissue, voxels in tissues.items()}


def outer_shares(labels: np.ndarray) -> dict[int, float]:
    """Share of each label's surface that borders no tumour.

    Args:
        labels: small whole numbers, 0 where there is no tumour, shape (X, Y, Z).
    """
    faces = surfaces(labels)
    return {label: faces[label, 0] / max(faces[label].sum(), 1) for label in range(1, len(faces)) if faces[label].any()}


def surfaces(labels: np.ndarray) -> np.ndarray:
    """How many voxel faces each two labels share, int64 (n, n), symmetric; 0 for a label with itself."""
    box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in bounding_box(labels))
    labels = labels[box].astype(np.uint8)
    n = int(labels.max(initial=0)) + 1
    pairs = np.zeros(n * n, np.int64)
    for axis in range(3):
        along = np.moveaxis(labels, axis, 0)
        pairs += np.bincount((n * along[:-1] + along[1:]).ravel(), minlength=n * n)
    faces = pairs.reshape(n, n)
    return (faces + faces.T) * (1 - np.eye(n, dtype=np.int64))


def decide(seen: Sequence[Evidence]) -> Verdict:
    """Decide by numbers and anatomy, for patients whose names imply no numbering.

    The usual numbering is kept unless the anatomy of most patients supports another one. See `resolve` for errors.
    """
    usual = "brats2023" if _mostly(seen, lambda one: 3 in one.numbers and 4 not in one.numbers) else USUAL
    if not seen:
        return Verdict(usual, AUTO, f"read as {_meaning(usual)}; there is no mask to tell by")
    single = sum(one.numbers == {1} for one in seen)
    if single == len(seen) >= _ENOUGH:
        raise DataError(
            f"Every mask examined ({single}) holds the one label 1. If it is the whole tumour or target volume:"
            f" {_ways('menrt')}. If it is necrosis alone: {_ways(USUAL)}."
        )
    n = len(seen)
    against = _count(USUAL, seen, False)
    misfit = sum(not NUMBERINGS[USUAL].can_hold(one.numbers) for one in seen)
    votes = {name: _count(name, seen, True) for name in _CANDIDATES[1:]}
    other = max(votes, key=votes.get)
    alone = list(votes.values()).count(votes[other]) == 1
    few = (1 - NEARLY_ALL) * n
    better = votes[other] > n - against and min(votes[other], against) > n / 3  # one odd mask does not outvote the rest
    if against <= few or misfit <= max(1, few) and not better:
        return Verdict(usual, AUTO, f"read as {_meaning(usual)}: {_seen(seen)}")
    if alone and votes[other] >= AGREE * n and (votes[other] >= _ENOUGH or misfit >= AGREE * n):
        says = f"read as {_meaning(other)}, by the anatomy of {votes[other]} of {n} patients: {_seen(seen)}"
        return Verdict(other, AUTO, says, unusual=True)
    raise DataError(
        f"The masks' numbering is not clear: {_seen(seen)}. By numbers and anatomy {_meaning(usual)} explains"
        f" {n - against} of {n} patients, {_meaning(other)} {votes[other]}. Say which it is: {_ways(other)},"
        f" or one of {', '.join(NUMBERINGS)}."
    )


def _count(name: str, seen: Sequence[Evidence], answer: bool) -> int:
    """For how many patients `explains` gives this answer about a numbering."""
    return sum(explains(NUMBERINGS[name], one) is answer for one in seen)


def _contradicted(name: str, seen: Sequence[Evidence]) -> bool:
    """Whether most masks hold numbers that the numbering of their names does not have."""
    return sum(not NUMBERINGS[name].can_hold(one.numbers) for one in seen) >= AGREE * max(len(seen), 1)


def _confirm(name: str, seen: Sequence[Evidence]) -> None:
    """Raise `DataError` if most patients contradict the numbering that their names tell by what enhances."""
    table = NUMBERINGS[name]
    aside = (*table.no_class, *table.labels_of(_ED))
    enhanced = [one for one in seen if one.numbers & table.labels_of(_ET) and table.can_hold(one.numbers)]
    brightest = [one.enhancing(*aside) for one in enhanced]
    told = [label for label in brightest if label is not None]
    wrong = [label for label in told if table.classes[label] != _ET]
    if wrong and len(wrong) >= AGREE * len(told):
        label = max(wrong, key=wrong.count)
        raise DataError(
            f"The patients' names say {_meaning(name)}, but in {len(wrong)} of {len(told)} patients label {label}"
            f" enhances most from T1 to T1ce. Say how the masks are numbered: {_ways(name)} for what the names say, or"
            f" one of {', '.join(NUMBERINGS)}."
        )


def explains(table: Numbering, one: Evidence) -> bool | None:
    """Whether a numbering fits what a patient shows; None if the patient does not show enough."""
    if not table.can_hold(one.numbers):
        return False
    oedema = one.oedema
    enhancing = one.enhancing(oedema, *table.no_class)
    shown = [True]
    if oedema is not None:
        shown.append(table.classes.get(oedema) == _ED)
    if enhancing is not None and one.numbers & table.labels_of(_ET):
        shown.append(table.classes.get(enhancing) == _ET)
    for label in one.flair:
        if label in table.no_class:
            shown.append(one.flair[label] < _DARK)
        elif table.classes.get(label) == _ET:
            shown.append(one.flair[label] >= _DARK)
    if not all(shown):
        return False
    certain = oedema is not None and (enhancing is not None or not one.numbers.issuperset({3, 4}))
    return True if certain else None


def better_numbering(name: str, one: Evidence) -> str:
    """The numbering that a patient clearly shows where it contradicts the one called `name`; else an empty string.

    Two labels show too little: in a low-grade tumour the core may border more of the healthy brain than oedema does.
    """
    if len(one.outer) < 3 or explains(NUMBERINGS[name], one) is not False:
        return ""
    for other in _CANDIDATES:
        table = NUMBERINGS[other]
        if explains(table, one) and one.enhancing(one.oedema, *table.no_class) is not None:
            return other
    return ""


def _leader(values: dict[int, float], lead: float) -> int | None:
    """The key of the largest value if it leads by `lead`."""
    if len(values) < 2:
        return None
    first, second = sorted(values, key=values.get, reverse=True)[:2]
    return first if values[first] - values[second] >= lead else None


def _mostly(seen: Sequence[Evidence], holds: Callable[[Evidence], bool]) -> bool:
    return 2 * sum(map(holds, seen)) > len(seen)


def _meaning(name: str) -> str:
    return f"{name} ({NUMBERINGS[name].explain()})"


def _ways(name: str) -> str:
    return f"-p labels {name} for a run, --labels {name} for check and score"


def _seen(seen: Sequence[Evidence]) -> str:
    """The evidence in words."""
    numbers = sorted(frozenset().union(*(one.numbers for one in seen)))
    said = [f"labels {', '.join(map(str, numbers))} in {len(seen)} patient{'s' * (len(seen) > 1)}"]
    for what, told in (
        ("borders healthy brain most", [one.oedema for one in seen]),
        ("enhances most", [one.enhancing(one.oedema) for one in seen]),
        ("is dark on FLAIR", [4 if one.flair.get(4, 0) < _DARK else None for one in seen]),
    ):
        for label, n in sorted(Counter(label for label in told if label is not None).items()):
            said.append(f"label {label} {what} in {n}")
    return "; ".join(said)


def label_problems(values: np.ndarray, counts: np.ndarray, case: Case, scale: str) -> Iterator[tuple[str, str, str]]:
    """What is wrong with the labels of a mask, as code, severity and message of a finding.

    Args:
        values, counts: the labels as stored, each once, and how many voxels have them.
        case: the patient, with the numbering of its labels.
        scale: slope, intercept and type of the file, in words.
    """
    table = NUMBERINGS[case.numbering]
    expected = f"expected {table.explain()} ({case.numbering}: {table.source})"
    try:
        labels = whole_labels(values)
    except ValueError as error:
        text = str(error)
        yield "fractional-label", "error", f"{text[0].upper()}{text[1:]} E{expected[1:]}."
        return
    if not np.array_equal(labels, values):
        some = next(f"{value:g}" for value, label in zip(values, labels, strict=True) if value != label)
        text = f"Labels such as {some} ({scale}): rounded on writing. Each is taken as the nearest whole number."
        yield "rounded-label", "warning", text
    numbers = frozenset(int(label) for label in labels if label)
    if unknown := sorted(numbers - table.numbers):
        some = ", ".join(map(str, unknown[:5]))
        yield "unknown-label", "error", f"Labels such as {some}, {expected}. {OTHERWISE}"
    elif not table.can_hold(numbers):
        yield "labels-3-and-4", "error", f"Labels 3 and 4 in one mask, {expected}. {OTHERWISE}"
    elif not numbers:
        yield "no-tumour", "warning", "No voxel is labelled; the patient is kept, and scored as one without tumour."
    elif not numbers & table.labels_of(_ET):
        yield "no-enhancing", "note", "No enhancing tumour: its score there is all or nothing."
    for label in sorted(numbers & {*table.no_class}):
        voxels = int(counts[labels == label].sum())
        what = f"label {label} ({table.no_class[label]} in {case.numbering})"
        text = f"{voxels:,} voxels of {what} are read as background."
        yield "label-without-class", "warning", text


def settled(votes: Counter, what: str, way_out: str) -> Hashable:
    """The choice of the majority; raises `DataError` if fewer than two thirds agree."""
    (most, n), *others = votes.most_common()
    if n < AGREE * votes.total():
        raise DataError(
            f"the patients disagree on the order of {what}: {most} say {n}, {others[0][0]} {others[0][1]} of"
            f" {votes.total()}; expected two thirds. {way_out}"
        )
    return most
