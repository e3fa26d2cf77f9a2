"""Train, validation and test by person, never by slice."""

import hashlib
import random
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.data.published import is_published, named_in, read_published
from brats_helpers.files import read_json, write_json
from brats_helpers.labels import CLASSES, DataError
from brats_helpers.runs import PARTS, parts_of

ENHANCING = CLASSES.index("ET")
_PUBLISHED_VAL = 0.1
"""Share of the training patients of a published split that choose the epoch."""


def pick_cases(cases: Sequence[Case], *, split: str, seed: int, unusable: Collection[str] = ()) -> list[Case]:
    """Choose the patients of a run: all, as many as the counts in `split`, or those of a published split.

    With counts, labelled patients are drawn at random, and as many unlabelled ones as the test part has.

    Args:
        cases: all patients.
        split: see `split_cases`.
        seed: the same seed and patients give the same choice.
        unusable: IDs of patients to replace by others.

    Returns:
        The patients sorted by ID.

    Raises:
        DataError: a published split cannot be read.
        ValueError: see `split_cases`.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    usable = [case for case in ordered if case.id not in unusable]
    if is_published(split):
        named = named_in(read_published(split)[0])
        return [case for case in usable if case.id in named or not case.seg]
    wanted = _parse(split)
    if wanted[0] < 1:
        return usable
    draw = random.Random(seed)
    picked = []
    for labelled, n in ((True, sum(wanted)), (False, wanted[2])):
        pool = [case for case in ordered if bool(case.seg) == labelled]
        drawn = [case for case in draw.sample(pool, len(pool)) if case.id not in unusable]
        picked += drawn[: int(n)]
    return sorted(picked, key=lambda case: case.id)


def split_cases(
    cases: Sequence[Packed],
    *,
    split: str,
    seed: int,
    grades: Mapping[str, str | None] | None = None,
    groups: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Split labelled patients into train, val and test, with a similar mix of patients in each part.

    The patients are ranked by grade, by whether they have enhancing tumour, and by tumour volume. Val and test are
    taken at even distances along that ranking, from a random start.

    Args:
        cases: the prepared cases of labelled patients, each once.
        split: three numbers in proportion, such as `0.8,0.1,0.1` or `10,2,2`; or a published split, see
            `published.read_published`, of which one fold is taken.
        seed: the same seed and patients give the same parts, in whatever order they come.
        grades: HGG or LGG by ID, where known.
        groups: the person by ID. All cases of one person land in one part.

    Returns:
        `{"train": [...], "val": [...], "test": [...]}`, IDs sorted, disjoint, none empty.

    Raises:
        DataError: fewer than three persons; or a published split has one person in two parts.
        ValueError: `split` is neither three numbers nor the name of a `.json` file.
    """
    if is_published(split):
        folds, chosen = read_published(split)
        return _published_parts(cases, split, folds[chosen], seed=seed, grades=grades, groups=groups)
    wanted = _parse(split)
    draw = random.Random(seed)
    ranked = _rank(cases, draw, grades=grades, groups=groups)
    _need(len(PARTS), ranked, "train, val and test need at least one each")
    n_val, n_test = (max(1, round(len(ranked) * number / sum(wanted))) for number in wanted[1:])
    while n_val + n_test >= len(ranked):  # a tiny set: training keeps at least one
        n_val, n_test = (n_val - 1, n_test) if n_val > n_test else (n_val, n_test - 1)
    test, rest = _spread_out(ranked, n_test, draw)
    val, train = _spread_out(rest, n_val, draw)
    return _parts(train, val, test)


def fold_cases(
    cases: Sequence[Packed],
    *,
    folds: int,
    split: str,
    seed: int,
    grades: Mapping[str, str | None] | None = None,
    groups: Mapping[str, str] | None = None,
) -> list[dict[str, list[str]]]:
    """Split labelled patients for a cross-validation, in the manner of `split_cases`.

    Every patient is a test patient of one fold. The others of a fold are its train and val, in the proportion of
    `split`. Each block of `folds` consecutive patients in the ranking gives one test patient to every fold.

    Args:
        folds: two or more; as many as the file has if `split` is a published split. The rest as for `split_cases`.

    Returns:
        For each fold what `split_cases` returns.

    Raises:
        DataError: fewer persons than folds (fewer than four for two folds), or see `split_cases`.
        ValueError: `folds` is below two, or see `split_cases`.
    """
    if folds < 2:
        raise ValueError(f"folds {folds}: expected two or more.")
    if is_published(split):
        published, _ = read_published(split)
        if len(published) != folds:
            raise DataError(f"{split} has {len(published)} folds, not {folds}; expected --folds {len(published)}.")
        how = {"seed": seed, "grades": grades, "groups": groups}
        return [_published_parts(cases, split, fold, **how) for fold in published]
    train_share, val_share, _ = _parse(split)
    draw = random.Random(seed)
    ranked = _rank(cases, draw, grades=grades, groups=groups)
    least = 4 if folds == 2 else folds
    _need(least, ranked, f"each of {folds} folds needs one to test and two others to train and choose by")
    tested_in = [fold for _ in range(0, len(ranked), folds) for fold in draw.sample(range(folds), folds)]
    parts = []
    for fold in range(folds):
        test = [group for group, where in zip(ranked, tested_in, strict=False) if where == fold]
        rest = [group for group, where in zip(ranked, tested_in, strict=False) if where != fold]
        n_val = round(len(rest) * val_share / (train_share + val_share))
        val, train = _spread_out(rest, min(max(1, n_val), len(rest) - 1), draw)
        parts.append(_parts(train, val, test))
    return parts


def _published_parts(
    cases: Sequence[Packed],
    split: str,
    fold: Mapping[str, Sequence[str]],
    *,
    seed: int,
    grades: Mapping[str, str | None] | None,
    groups: Mapping[str, str] | None,
) -> dict[str, list[str]]:
    """The parts of a published fold that `cases` belong to; val is drawn from train unless the file has one."""
    there = {case.id for case in cases}
    parts = {name: sorted(there.intersection(ids)) for name, ids in fold.items()}
    if "val" not in parts:
        draw = random.Random(seed)
        train = set(parts["train"])
        pool = [case for case in cases if case.id in train]
        ranked = _rank(pool, draw, grades=grades, groups=groups)
        if len(ranked) > 1:
            val, train = _spread_out(ranked, max(1, round(len(ranked) * _PUBLISHED_VAL)), draw)
            parts |= {"val": sorted(sum(val, [])), "train": sorted(sum(train, []))}
    try:
        check_disjoint(parts, groups or {})
    except DataError as error:
        raise DataError(f"{split} cannot be used here: {error}") from error
    return parts_of(parts)


def _rank(
    cases: Sequence[Packed],
    draw: random.Random,
    *,
    grades: Mapping[str, str | None] | None,
    groups: Mapping[str, str] | None,
) -> list[list[str]]:
    """IDs by person, ranked by grade, enhancing tumour and volume of the first case; ties in random order."""
    grades, groups = grades or {}, groups or {}
    together: dict[str, list[Packed]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        together.setdefault(groups.get(case.id, case.id), []).append(case)
    pool = draw.sample(list(together.values()), len(together))
    pool.sort(key=lambda group: _rarity(group[0], grades.get(group[0].id)))
    return [list(map(attrgetter("id"), group)) for group in pool]


def _rarity(case: Packed, grade: str | None) -> tuple:
    return grade or "", case.counts[:, ENHANCING].any(), case.counts[:, 1:].sum()


def _need(n: int, ranked: list[list[str]], why: str) -> None:
    if len(ranked) < n:
        there = sum(map(len, ranked))
        persons = f" of {len(ranked)} persons" if len(ranked) < there else ""
        raise DataError(f"{there} labelled patient{'s' * (there != 1)}{persons}: {why}, so {n} or more.")


def _parts(*parts: list[list[str]]) -> dict[str, list[str]]:
    return {name: sorted(sum(groups, [])) for name, groups in zip(PARTS, parts, strict=True)}


def _spread_out(ranked: list[list[str]], n: int, draw: random.Random) -> tuple[list[list[str]], list[list[str]]]:
    """Take `n` of a ranking at even distances from a random start; return these and the rest, both in order."""
    start = draw.random()
    taken = {int((k + start) * len(ranked) / n) for k in range(n)}
    return [ranked[k] for k in sorted(taken)], [group for k, group in enumerate(ranked) if k not in taken]


def _parse(split: str) -> list[float]:
    try:
        numbers = [float(text) for text in split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(PARTS) or min(numbers) <= 0 or len({number >= 1 for number in numbers}) > 1:
        raise ValueError(
            f"split {split!r}: expected three shares such as 0.8,0.1,0.1, three counts such as 10,2,2, or a published"
            " split such as splits_final.json."
        )
    if numbers[0] >= 1 and any(number != int(number) for number in numbers):
        raise ValueError(f"split {split!r}: counts of patients are whole numbers.")
    return numbers


def fingerprint(contents: Mapping[str, str | None]) -> str:
    """Hash the IDs and voxels of the patients; moving or recompressing files does not change the hash.

    Args:
        contents: by ID the hash of the patient's voxels, or None for one that the run does not use.

    Returns:
        16 hex digits.
    """
    lines = [f"{case_id}:{contents[case_id]}" for case_id in sorted(contents)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_splits(path: Path, parts: dict[str, list[str]], *, folds: Sequence[dict] = (), **facts) -> None:
    """Write the parts, `folds` and `facts` such as the seed to `splits.json`.

    Raises:
        DataError: see `check_disjoint`; nothing is written then.
    """
    for each in (parts, *folds):
        check_disjoint(each, facts.get("groups", {}))
    write_json(path, parts | facts | ({"folds": list(folds)} if folds else {}))


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read the parts of `splits.json`.

    Raises:
        DataError: see `check_disjoint`.
    """
    content = read_json(path)
    parts = {name: content.get(name, []) for name in PARTS}
    check_disjoint(parts, content.get("groups", {}))
    return parts


def check_disjoint(parts: dict[str, list[str]], groups: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise `DataError` unless every part has a patient and no person is in two parts.

    Args:
        parts: IDs by part.
        groups: the person by ID, see `identity.group_people`; a missing ID counts as a person of its own.
    """
    empty = [name for name in PARTS if not parts.get(name)]
    if empty:
        raise DataError(f"no patient in {', '.join(empty)}; every part needs at least one.")
    seen: set[str] = set()
    owners: dict[str, tuple[str, str]] = {}
    for name in PARTS:
        for case_id in parts[name]:
            other, part = owners.setdefault(groups.get(case_id, case_id), (case_id, name))
            if part != name or case_id in seen:
                known = "" if other == case_id else f" as {other}, the same person,"
                raise DataError(
                    f"{case_id} is in {part}{known} and in {name}: the network would be tested on what it has seen."
                )
            seen.add(case_id)
