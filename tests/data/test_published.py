"""Splits that others published are used as they are, or refused."""

import json

import numpy as np
import pytest

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.data.published import check_published
from brats_helpers.data.splits import fold_cases, pick_cases, split_cases
from brats_helpers.labels import DataError

IDS = [f"BraTS2021_{k:05}" for k in range(20)]
PACKED = [
    Packed(case_id, np.zeros((1, 1, 8, 8), np.float16), None, (0, 0, 0), (8, 8, 1), np.array([[100, 9, 9, k]]))
    for k, case_id in enumerate(IDS)
]
CASES = [Case(case_id, {}, "seg.nii") for case_id in IDS]
HELD_OUT = [IDS[k::5] for k in range(5)]


def nnunet():
    return [{"train": [i for i in IDS if i not in held_out], "val": held_out} for held_out in HELD_OUT]


def monai():
    def entry(k, case_id):
        files = [f"TrainingData/{case_id}/{case_id}_{kind}.nii.gz" for kind in ("flair", "t1ce", "t1", "t2")]
        return {"fold": k % 5, "image": files, "label": f"TrainingData/{case_id}/{case_id}_seg.nii.gz"}

    return {"training": [entry(k, case_id) for k, case_id in enumerate(IDS)]}


def write(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("content", [nnunet(), monai()], ids=["nnU-Net", "MONAI"])
def test_the_part_that_a_fold_holds_out_is_test(tmp_path, content):
    """Of the 16 others two, a tenth, choose the epoch."""
    split = write(tmp_path, content)
    for fold in range(5):
        parts = split_cases(PACKED, split=f"{split}:{fold}" if fold else split, seed=0)
        assert parts["test"] == HELD_OUT[fold]
        assert len(parts["val"]) == 2 and sorted(sum(parts.values(), [])) == IDS
    folds = fold_cases(PACKED, folds=5, split=split, seed=0)
    assert [fold["test"] for fold in folds] == HELD_OUT
    assert folds[4] == parts
    with pytest.raises(DataError, match="has 5 folds, not 3"):
        fold_cases(PACKED, folds=3, split=split, seed=0)
    with pytest.raises(DataError, match="0 to 4, but no fold 5"):
        split_cases(PACKED, split=f"{split}:5", seed=0)


def test_val_depends_on_the_seed_alone(tmp_path):
    split = write(tmp_path, nnunet())
    drawn = {
        tuple(split_cases(PACKED[::step], split=split, seed=seed)["val"]) for seed in (0, 1, 2) for step in (1, -1)
    }
    assert len(drawn) == 3


def test_the_splits_of_a_run_are_used_as_they_are(tmp_path):
    parts = split_cases(PACKED, split="10,5,5", seed=3)
    assert split_cases(PACKED, split=write(tmp_path, parts | {"seed": 3}), seed=0) == parts


def test_only_the_named_patients_are_taken_and_the_unlabelled(tmp_path):
    fold = {"train": IDS[:8], "val": IDS[8:10]}
    cases = [*CASES, Case("Unlabelled", {})]
    picked = pick_cases(cases, split=write(tmp_path, [fold]), seed=0, unusable=[IDS[0]])
    assert [case.id for case in picked] == [*IDS[1:10], "Unlabelled"]


def test_ids_that_are_not_there_are_refused_with_the_nearest(tmp_path):
    split = write(tmp_path, [{"train": ["BraTS21_00003", *IDS[:3]], "val": ["U"]}])
    with pytest.raises(DataError, match="BraTS21_00003 is not there; the nearest ID is BraTS2021_00003, U has no segm"):
        check_published(split, [*CASES, Case("U", {})])
    check_published(write(tmp_path, nnunet()), CASES)


def test_one_person_in_two_published_parts_is_refused(tmp_path):
    split = write(tmp_path, nnunet())
    with pytest.raises(DataError, match="split.json cannot be used here: .* the same person"):
        split_cases(PACKED, split=split, seed=0, groups={IDS[0]: "P", IDS[1]: "P"})


@pytest.mark.parametrize(
    "content",
    [[], {}, 3, [{"train": ["A"]}], [{"train": ["A"], "val": []}], [{"train": "A", "val": "B"}], {"training": []}]
    + [{"training": [{"image": "a.nii"}]}, {"training": [{"fold": 0, "image": []}]}, {"train": ["A"], "val": [1]}],
)
def test_other_formats_are_refused(tmp_path, content):
    with pytest.raises(DataError, match="split.json is no split of a known format"):
        split_cases(PACKED, split=write(tmp_path, content), seed=0)


def test_a_split_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "torn.json").write_text("[")
    for name in ("none.json", "torn.json"):
        with pytest.raises(DataError, match=f"{name} .*cannot be read|{name} cannot be read"):
            split_cases(PACKED, split=str(tmp_path / name), seed=0)
