"""Train, validation and test by patient, never by slice."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from brats_helpers.cache import Packed, prepare
from brats_helpers.cases import Case, DataError, find_cases
from brats_helpers.runs import Run, write_json

PARTS = ("train", "val", "test")


def split_cases(ids: Sequence[str], *, split: str, seed: int) -> dict[str, list[str]]:
    """Share patients out among train, val and test.

    Args:
        ids: the patients' IDs, each once.
        split: three numbers, `0.8,0.1,0.1` for shares or `10,2,2` for so many patients at most.
        seed: the same seed and IDs give the same parts, in whatever order the IDs come.

    Returns:
        `{"train": [...], "val": [...], "test": [...]}`, sorted, disjoint, none empty.

    Raises:
        DataError: fewer than three patients.
        ValueError: `split` is no such triple.
    """
    wanted = _parse(split)
    if len(ids) < len(PARTS):
        raise DataError(
            f"{len(ids)} labelled patient{'s' * (len(ids) != 1)}: at least one each for train, val and test is needed,"
            " so three or more."
        )
    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    if all(number >= 1 for number in wanted):
        shuffled = shuffled[: int(sum(wanted))]
    held_out = [max(1, round(len(shuffled) * number / sum(wanted))) for number in wanted[1:]]
    while sum(held_out) >= len(shuffled):  # a tiny set: training keeps at least one
        held_out[held_out.index(max(held_out))] -= 1
    cuts = {"val": shuffled[: held_out[0]], "test": shuffled[held_out[0] : sum(held_out)]}
    parts = {"train": shuffled[sum(held_out) :]} | cuts
    return {name: sorted(parts[name]) for name in PARTS}


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
                raise DataError(f"{case_id} is in {home[case_id]} and in {name}: a network would be scored on what it saw.")
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
