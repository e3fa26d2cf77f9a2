"""Train, validation and test by patient, never by slice."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from brats_helpers.cache import Packed, prepare
from brats_helpers.cases import CLASSES, Case, DataError, find_cases
from brats_helpers.files import write_json
from brats_helpers.runs import Run

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


def split_cases(cases: Sequence[Packed], *, split: str, seed: int) -> dict[str, list[str]]:
    """Share labelled patients out among train, val and test, each part alike in what is hard to find.

    The patients are ranked by enhancing tumour (absent or present) and then by tumour volume, and
    val and test take theirs at even distances along that ranking, from a random start.

    Args:
        cases: the prepared cases of labelled patients, each once.
        split: three numbers whose proportions count, such as `0.8,0.1,0.1` or `10,2,2`.
        seed: the same seed and patients give the same parts, in whatever order they come.

    Returns:
        `{"train": [...], "val": [...], "test": [...]}`, IDs sorted, disjoint, none empty.

    Raises:
        DataError: fewer than three patients.
        ValueError: `split` is no such triple.
    """
    wanted = _parse(split)
    if len(cases) < len(PARTS):
        raise DataError(
            f"{len(cases)} labelled patient{'s' * (len(cases) != 1)}: at least one each for train, val and test is"
            " needed, so three or more."
        )
    draw = random.Random(seed)
    pool = draw.sample(sorted(cases, key=lambda case: case.id), len(cases))  # so that equals rank at random
    pool.sort(key=lambda case: (case.counts[:, ENHANCING].any(), case.counts[:, 1:].sum()))
    ids = [case.id for case in pool]
    n_val, n_test = (max(1, round(len(ids) * number / sum(wanted))) for number in wanted[1:])
    while n_val + n_test >= len(ids):  # a tiny set: training keeps at least one
        n_val, n_test = (n_val - 1, n_test) if n_val > n_test else (n_val, n_test - 1)
    test = _spread_out(ids, n_test, draw)
    rest = [case_id for case_id in ids if case_id not in test]
    val = _spread_out(rest, n_val, draw)
    train = [case_id for case_id in rest if case_id not in val]
    return {"train": sorted(train), "val": sorted(val), "test": sorted(test)}


def _spread_out(ranked: list[str], n: int, draw: random.Random) -> list[str]:
    """`n` of a ranking at even distances, from a random start."""
    start = draw.random()
    return [ranked[int((k + start) * len(ranked) / n)] for k in range(n)]


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


def fingerprint(cases: Sequence[Case]) -> str:
    """16 hex digits that change when a patient, a file name or a file size does."""
    lines = []
    for case in sorted(cases, key=lambda case: case.id):
        for path in [*case.images.values(), *([case.seg] if case.seg else [])]:
            lines.append(f"{case.id}/{path.name}:{path.stat().st_size}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write_splits(path: Path, parts: dict[str, list[str]], **facts) -> None:
    """Write the parts and `facts` such as the seed to `splits.json`, after checking that no patient is in two."""
    check_disjoint(parts)
    write_json(path, parts | facts)


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read the parts of `splits.json`.

    Raises:
        DataError: a patient is in two parts, or a part is empty or missing.
    """
    content = json.loads(path.read_text())
    parts = {name: content.get(name, []) for name in PARTS}
    check_disjoint(parts)
    return parts


def check_disjoint(parts: dict[str, list[str]]) -> None:
    """Raise `DataError` unless every patient is in one part only and no part is empty."""
    empty = [name for name in PARTS if not parts.get(name)]
    if empty:
        raise DataError(f"no patient in {', '.join(empty)}; every part needs at least one.")
    home: dict[str, str] = {}
    for name in PARTS:
        for case_id in parts[name]:
            if case_id in home:
                raise DataError(
                    f"{case_id} is in {home[case_id]} and in {name}: a network would be scored on what it saw."
                )
            home[case_id] = name


def load_parts(run: Run) -> dict[str, list[Case]]:
    """The run's patients as 00_setup split them: lists of cases under `train`, `val`, `test` and `unlabelled`.

    Raises:
        RunError: 00_setup has not run.
        DataError: the patients are no longer those that were split.
    """
    content = json.loads(run.need(run.splits, "00_setup").read_text())
    parts = read_splits(run.splits) | {"unlabelled": content["unlabelled"]}
    manifest = run.manifest
    found = {case.id: case for case in find_cases(manifest["data"], manifest["modalities"], skip_incomplete=True)}
    missing = [case_id for ids in parts.values() for case_id in ids if case_id not in found]
    if missing or fingerprint(list(found.values())) != content["fingerprint"]:
        changed = f"{missing[0]} is gone" if missing else "files came, went or changed size"
        raise DataError(f"{manifest['data']} changed since {run.splits} was written: {changed}. Run 00_setup again.")
    return {name: [found[case_id] for case_id in ids] for name, ids in parts.items()}


def load_prepared(run: Run, part: str) -> list[Packed]:
    """The prepared scans of one part of the run's patients; what 00_setup prepared is opened, not made again."""
    return prepare(load_parts(run)[part], cache_dir=Path(run.manifest["cache_dir"]), workers=1)
