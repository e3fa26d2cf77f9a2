"""Train, validation and test by patient, never by slice."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.files import write_json
from brats_helpers.labels import CLASSES, DataError

PARTS = ("train", "val", "test")
ENHANCING = CLASSES.index("ET")


def pick_cases(cases: Sequence[Case], *, split: str, seed: int) -> list[Case]:
    """The patients that a run takes, sorted by ID: all of them, or as many as a `split` by counts asks for.

    With counts, labelled patients are drawn at random, and of the unlabelled as many as test has.
    """
    wanted = _parse(split)
    if wanted[0] < 1:
        return sorted(cases, key=lambda case: case.id)
    draw = random.Random(seed)
    picked = []
    for labelled, n in ((True, sum(wanted)), (False, wanted[2])):
        pool = sorted((case for case in cases if bool(case.seg) == labelled), key=lambda case: case.id)
        picked += draw.sample(pool, min(int(n), len(pool)))
    return sorted(picked, key=lambda case: case.id)


def split_cases(
    cases: Sequence[Packed],
    *,
    split: str,
    seed: int,
    grades: Mapping[str, str | None] | None = None,
    groups: Mapping[str, str] | None = None,
) -> dict[str, list[str]]:
    """Share labelled patients out among train, val and test, each part alike in what is hard to find.

    The patients are ranked by grade, then by enhancing tumour (absent or present), then by tumour volume, and
    val and test take theirs at even distances along that ranking, from a random start.

    Args:
        cases: the prepared cases of labelled patients, each once.
        split: three numbers whose proportions count, such as `0.8,0.1,0.1` or `10,2,2`.
        seed: the same seed and patients give the same parts, in whatever order they come.
        grades: HGG or LGG by ID, where known.
        groups: by ID; those with the same group, such as two names of one scan, land in one part.

    Returns:
        `{"train": [...], "val": [...], "test": [...]}`, IDs sorted, disjoint, none empty.

    Raises:
        DataError: fewer than three patients, or groups of them.
        ValueError: `split` is no such triple.
    """
    wanted = _parse(split)
    draw = random.Random(seed)
    ranked = _rank(cases, draw, grades=grades or {}, groups=groups or {})
    _need(len(PARTS), ranked, "at least one each for train, val and test is needed")
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
    """Share labelled patients out for a cross-validation, as `split_cases` does for one training.

    Each patient is tested in one fold; those that a fold does not test are its train and val, in the proportion of
    `split`. Of each run of `folds` neighbours in the ranking every fold tests one.

    Args:
        folds: how many, two or more; the rest as for `split_cases`.

    Returns:
        For each fold what `split_cases` returns.

    Raises:
        DataError: fewer patients, or groups of them, than folds; four for two folds.
        ValueError: `folds` is below two, or `split` is no such triple.
    """
    if folds < 2:
        raise ValueError(f"folds {folds}: expected two or more.")
    train_share, val_share, _ = _parse(split)
    draw = random.Random(seed)
    ranked = _rank(cases, draw, grades=grades or {}, groups=groups or {})
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


def _rank(
    cases: Sequence[Packed], draw: random.Random, *, grades: Mapping[str, str | None], groups: Mapping[str, str]
) -> list[list[str]]:
    """Groups of IDs by the grade, the enhancing tumour and the volume of their first; equals in random order."""
    together: dict[str, list[Packed]] = {}
    for case in sorted(cases, key=lambda case: case.id):
        together.setdefault(groups.get(case.id, case.id), []).append(case)
    pool = draw.sample(list(together.values()), len(together))
    pool.sort(key=lambda group: _rarity(group[0], grades.get(group[0].id)))
    return [[case.id for case in group] for group in pool]


def _rarity(case: Packed, grade: str | None) -> tuple:
    return grade or "", case.counts[:, ENHANCING].any(), case.counts[:, 1:].sum()


def _need(n: int, ranked: list[list[str]], why: str) -> None:
    if len(ranked) < n:
        there = sum(map(len, ranked))
        distinct = f", {len(ranked)} of them different" if len(ranked) < there else ""
        raise DataError(f"{there} labelled patient{'s' * (there != 1)}{distinct}: {why}, so {n} or more.")


def _parts(*parts: list[list[str]]) -> dict[str, list[str]]:
    return {name: sorted(sum(groups, [])) for name, groups in zip(PARTS, parts, strict=True)}


def _spread_out(ranked: list[list[str]], n: int, draw: random.Random) -> tuple[list[list[str]], list[list[str]]]:
    """`n` of a ranking at even distances, from a random start; and the rest, still in order."""
    start = draw.random()
    taken = {int((k + start) * len(ranked) / n) for k in range(n)}
    return [ranked[k] for k in sorted(taken)], [group for k, group in enumerate(ranked) if k not in taken]


def _parse(split: str) -> list[float]:
    try:
        numbers = [float(text) for text in split.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != len(PARTS) or min(numbers) <= 0 or len({number >= 1 for number in numbers}) > 1:
        raise ValueError(f"split {split!r}: expected three shares such as 0.8,0.1,0.1 or three counts such as 10,2,2.")
    if numbers[0] >= 1 and any(number != int(number) for number in numbers):
        raise ValueError(f"split {split!r}: counts of patients are whole numbers.")
    return numbers


def fingerprint(contents: Mapping[str, str | None]) -> str:
    """16 hex digits that change when a patient comes, goes or has other voxels, and not when files are packed anew.

    Args:
        contents: by ID the hash of the patient's voxels, or None for one that the run did not take.
    """
    lines = [f"{case_id}:{contents[case_id]}" for case_id in sorted(contents)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_splits(path: Path, parts: dict[str, list[str]], *, folds: Sequence[dict] = (), **facts) -> None:
    """Write the parts, `folds` and `facts` such as the seed to `splits.json`; first check that no patient is in two."""
    for each in (parts, *folds):
        check_disjoint(each, facts.get("groups", {}))
    write_json(path, parts | facts | ({"folds": list(folds)} if folds else {}))


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read the parts of `splits.json`.

    Raises:
        DataError: a patient is in two parts, or a part is empty or missing.
    """
    content = json.loads(path.read_text())
    parts = {name: content.get(name, []) for name in PARTS}
    check_disjoint(parts, content.get("groups", {}))
    return parts


def check_disjoint(parts: dict[str, list[str]], groups: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise `DataError` unless every patient, under any of its names, is in one part only and no part is empty.

    `groups` gives names of one patient the same group, see `audit.audit`.
    """
    empty = [name for name in PARTS if not parts.get(name)]
    if empty:
        raise DataError(f"no patient in {', '.join(empty)}; every part needs at least one.")
    seen: set[str] = set()
    home: dict[str, tuple[str, str]] = {}
    for name in PARTS:
        for case_id in parts[name]:
            other, part = home.setdefault(groups.get(case_id, case_id), (case_id, name))
            if part != name or case_id in seen:
                known = "" if other == case_id else f", where it is called {other},"
                raise DataError(
                    f"{case_id} is in {part}{known} and in {name}: a network would be scored on what it saw."
                )
            seen.add(case_id)
