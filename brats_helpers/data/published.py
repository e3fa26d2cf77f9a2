"""Published splits: nnU-Net's `splits_final.json` and MONAI's `brats21_folds.json`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from brats_helpers.data.cases import Case
from brats_helpers.data.filenames import recognise
from brats_helpers.files import read_json
from brats_helpers.labels import DataError
from brats_helpers.runs import PARTS, from_root, parts_of

_NAMED = 3  # IDs in one error
_FORMATS = (
    "expected a list of folds with `train` and `val` (nnU-Net's splits_final.json), a list `training` of files with"
    " their `fold` (MONAI's brats21_folds.json), or `train`, `val` and `test` (splits.json of a run)"
)


def is_published(split: str) -> bool:
    """Whether `split` names a file, such as `splits_final.json`, or `splits_final.json:2` for its fold 2."""
    return _place(split) is not None


def read_published(split: str) -> tuple[list[dict[str, list[str]]], int]:
    """Read the folds of a published split, and the number of the chosen fold: the one after the colon, or 0.

    Both formats have two parts. The part that a fold holds out, on which published scores are computed, is `test`
    here and chooses nothing. The patients that choose the epoch (`val`) are drawn from `train` by `splits.split_cases`.

    Returns:
        The folds, each `{"train": [...], "test": [...]}`, with `val` where the file has all three; and a number.

    Raises:
        DataError: there is no such file, it has another format, or it lacks the fold.
    """
    name, number = _place(split)
    path, fold = from_root(name), int(number or 0)
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"the split {path} cannot be read ({error}).") from error
    folds = _folds(content)
    if not folds:
        raise DataError(f"{path} is no split of a known format: {_FORMATS}.")
    if fold >= len(folds):
        raise DataError(f"{path} has {len(folds)} folds, 0 to {len(folds) - 1}, but no fold {fold}.")
    return folds, fold


def named_in(folds: Iterable[Mapping[str, Iterable[str]]]) -> set[str]:
    """Return every ID that the folds of a published split name."""
    return {case_id for fold in folds for part in fold.values() for case_id in part}


def check_published(split: str, cases: Iterable[Case]) -> None:
    """Raise `DataError` if a published split names patients that are not among `cases` or have no segmentation.

    The message gives the most similar IDs of the data.
    """
    named = named_in(read_published(split)[0])
    labelled = {case.id: bool(case.seg) for case in cases}
    wrong = sorted(case_id for case_id in named if not labelled.get(case_id))
    if not wrong:
        return
    said = []
    for case_id in wrong[:_NAMED]:
        near = difflib.get_close_matches(case_id, sorted(labelled), n=1, cutoff=0.5)
        nearest = f"is not there{f'; the nearest ID is {near[0]}' if near else ''}"
        said.append(f"{case_id} {'has no segmentation' if case_id in labelled else nearest}")
    more = f", and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
    raise DataError(
        f"{split} does not fit the data: {', '.join(said)}{more}. Expected IDs of the data, each with a segmentation."
    )


def _place(split: str) -> tuple[str, str | None] | None:
    match = re.fullmatch(r"(.+\.json)(?::(\d+))?", split.strip(), re.IGNORECASE)
    return match and (match[1], match[2])


def _folds(content: object) -> list[dict[str, list[str]]]:
    """The folds of any of the formats; empty if it is none of them."""
    match content:
        case [*folds] if folds and all(_are_ids(fold, "train", "val") for fold in folds):
            return [{"train": fold["train"], "test": fold["val"]} for fold in folds]
        case {"training": [*entries]} if entries and all(map(_is_datalist_entry, entries)):
            count = 1 + max(entry["fold"] for entry in entries)
            return [_monai_fold(entries, number) for number in range(count)]
        case {"folds": [*folds]} if folds and all(_are_ids(fold, *PARTS) for fold in folds):
            return list(map(parts_of, folds))
        case dict() if _are_ids(content, *PARTS):
            return [parts_of(content)]
    return []


def _are_ids(fold: object, *parts: str) -> bool:
    return isinstance(fold, dict) and all(_is_id_list(fold.get(part)) for part in parts)


def _is_id_list(ids: object) -> bool:
    return isinstance(ids, list) and bool(ids) and all(isinstance(case_id, str) for case_id in ids)


def _is_datalist_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    fold, image = entry.get("fold"), entry.get("image")
    named = isinstance(image, str) or (isinstance(image, list) and image and isinstance(image[0], str))
    return bool(named) and isinstance(fold, int) and fold >= 0


def _monai_fold(entries: list[dict], number: int) -> dict[str, list[str]]:
    """MONAI's convention: the entries with this number are held out, and all others are for training."""
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for entry in entries:
        image = entry["image"]
        parts["test" if entry["fold"] == number else "train"].append(
            _case_id(image if isinstance(image, str) else image[0])
        )
    return parts


def _case_id(file: str) -> str:
    """The ID in a file's name, read as `filenames.recognise` reads those of the patients' own files."""
    path = Path(file)
    name = recognise(path)
    return name.case_id if name.kind else re.sub(r"(_0000)?\.nii(\.gz)?$", "", path.name)
