"""Splits: by patient, disjoint, repeatable, never empty."""

import json
from pathlib import Path

import numpy as np
import pytest

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.data.splits import (
    check_disjoint,
    fingerprint,
    fold_cases,
    pick_cases,
    read_splits,
    split_cases,
    write_splits,
)
from brats_helpers.labels import DataError


def _patient(k, volume=100, enhancing=True):
    counts = np.array([[1000, volume, volume, volume * enhancing]])
    return Packed(f"P{k:03d}", np.zeros((1, 1, 8, 8), np.float16), None, (0, 0, 0), (8, 8, 1), counts)


PATIENTS = [_patient(k) for k in range(50)]
IDS = [case.id for case in PATIENTS]


def test_shares_give_every_patient_one_part():
    parts = split_cases(PATIENTS, split="0.8,0.1,0.1", seed=0)
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 40, "val": 5, "test": 5}
    assert sorted(sum(parts.values(), [])) == IDS


def test_counts_are_drawn_at_random_and_at_most():
    cases = [Case(f"P{k:03d}", {}, Path("seg.nii") if k < 50 else None) for k in range(60)]
    picked = pick_cases(cases, split="10,2,2", seed=0)
    assert sum(case.seg is not None for case in picked) == 14 and len(picked) == 16
    assert picked == pick_cases(cases[::-1], split="10,2,2", seed=0) == sorted(picked, key=lambda case: case.id)
    assert picked != pick_cases(cases, split="10,2,2", seed=1)
    assert len(pick_cases(cases[48:52], split="10,2,2", seed=0)) == 4
    faulty = {picked[0].id}
    others = pick_cases(cases, split="10,2,2", seed=0, unusable=faulty)
    assert len(others) == 16 and {case.id for case in picked} - faulty < {case.id for case in others}
    assert pick_cases(cases, split="0.8,0.1,0.1", seed=0) == cases
    assert [len(ids) for ids in split_cases(PATIENTS[:14], split="10,2,2", seed=0).values()] == [10, 2, 2]


def test_the_seed_decides_and_the_order_of_ids_does_not():
    first = split_cases(PATIENTS, split="0.8,0.1,0.1", seed=3)
    assert split_cases(PATIENTS[::-1], split="0.8,0.1,0.1", seed=3) == first
    assert split_cases(PATIENTS, split="0.8,0.1,0.1", seed=4) != first


@pytest.mark.parametrize("split", ["0.8,0.1,0.1", "10,2,2", "1,1,1", "0.1,0.1,0.8"])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_tiny_sets_have_a_patient_in_each_part(n, split):
    parts = split_cases(PATIENTS[:n], split=split, seed=0)
    assert min(len(ids) for ids in parts.values()) >= 1
    check_disjoint(parts)


def test_too_few_patients_is_said():
    with pytest.raises(DataError, match="2 labelled patients: .*so 3 or more"):
        split_cases(PATIENTS[:2], split="0.8,0.1,0.1", seed=0)


@pytest.mark.parametrize("split", ["0.8,0.2", "a,b,c", "0.8,0.2,0", "10,0.1,0.1", "1.5,1,1", ""])
def test_a_split_that_is_none_is_refused(split):
    with pytest.raises(ValueError, match="split"):
        split_cases(PATIENTS, split=split, seed=0)


def test_a_patient_in_two_parts_is_refused_in_writing_and_reading(tmp_path):
    parts = {"train": ["A", "B"], "val": ["C"], "test": ["A"]}
    with pytest.raises(DataError, match="A is in train and in test"):
        write_splits(tmp_path / "splits.json", parts)
    (tmp_path / "splits.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match="A is in train and in test"):
        read_splits(tmp_path / "splits.json")


def test_an_empty_part_is_refused(tmp_path):
    (tmp_path / "splits.json").write_text(json.dumps({"train": ["A"], "val": ["B"]}))
    with pytest.raises(DataError, match="no patient in test"):
        read_splits(tmp_path / "splits.json")


def test_written_parts_are_read_again_beside_their_facts(tmp_path):
    parts = split_cases(PATIENTS, split="0.8,0.1,0.1", seed=0)
    write_splits(tmp_path / "splits.json", parts, seed=0)
    assert read_splits(tmp_path / "splits.json") == parts
    assert json.loads((tmp_path / "splits.json").read_text())["seed"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_alike_in_enhancing_tumour_and_size(seed):
    """40 patients, 10 of them without enhancing tumour; volumes 1 to 40."""
    patients = [_patient(k, volume=k + 1, enhancing=k % 4 > 0) for k in range(40)]
    parts = split_cases(patients, split="0.6,0.2,0.2", seed=seed)
    for part in ("val", "test"):
        numbers = [int(case_id[1:]) for case_id in parts[part]]
        assert len(numbers) == 8
        assert 1 <= sum(number % 4 == 0 for number in numbers) <= 3  # 2 of 8 is their share
        enhancing = sorted(number for number in numbers if number % 4)
        assert enhancing[0] < 20 <= enhancing[-1]  # small tumours and large ones


def test_parts_are_alike_in_grade():
    """40 patients, 8 of them LGG, whatever their tumours: 2 of 10 in every part of 10."""
    patients = [_patient(k, volume=k + 1, enhancing=k % 4 > 0) for k in range(40)]
    for seed in range(20):
        low = set(np.random.default_rng(seed).choice(40, 8, replace=False))
        grades = {case.id: "LGG" if k in low else "HGG" for k, case in enumerate(patients)}
        parts = split_cases(patients, split="0.5,0.25,0.25", seed=seed, grades=grades)
        for part in ("val", "test"):
            assert 1 <= sum(grades[case_id] == "LGG" for case_id in parts[part]) <= 3


def test_names_of_one_scan_stay_together():
    """Every third patient has a twin: groups of two and of one."""
    groups = {case_id: IDS[k - 1] if k % 3 == 1 else case_id for k, case_id in enumerate(IDS)}
    for seed in range(10):
        parts = split_cases(PATIENTS, split="0.6,0.2,0.2", seed=seed, groups=groups)
        assert sorted(sum(parts.values(), [])) == IDS
        homes = {(groups[case_id], name) for name, ids in parts.items() for case_id in ids}
        assert len(homes) == len(set(groups.values()))
    with pytest.raises(DataError, match="50 labelled patients of 2 persons: .*so 3 or more"):
        groups = {case_id: f"G{k % 2}" for k, case_id in enumerate(IDS)}
        split_cases(PATIENTS, split="0.6,0.2,0.2", seed=0, groups=groups)


# --- folds


def test_every_patient_is_tested_in_one_fold():
    folds = fold_cases(PATIENTS, folds=5, split="0.8,0.1,0.1", seed=0)
    assert len(folds) == 5
    assert sorted(sum((fold["test"] for fold in folds), [])) == IDS
    for fold in folds:
        check_disjoint(fold)
        # 40 are not tested; of these one ninth, 4.4, choose the epoch
        assert {name: len(ids) for name, ids in fold.items()} == {"train": 36, "val": 4, "test": 10}
    assert fold_cases(PATIENTS[::-1], folds=5, split="0.8,0.1,0.1", seed=0) == folds
    assert fold_cases(PATIENTS, folds=5, split="0.8,0.1,0.1", seed=1) != folds


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_alike_and_keep_groups_together(seed):
    patients = [_patient(k, volume=k + 1, enhancing=k % 4 > 0) for k in range(40)]
    groups = {case.id: patients[k - 1].id if k in (9, 21) else case.id for k, case in enumerate(patients)}
    folds = fold_cases(patients, folds=4, split="0.8,0.1,0.1", seed=seed, groups=groups)
    assert sorted(sum((fold["test"] for fold in folds), [])) == [case.id for case in patients]
    for fold in folds:
        numbers = [int(case_id[1:]) for case_id in fold["test"]]
        assert 9 <= len(numbers) <= 11
        assert 2 <= sum(number % 4 == 0 for number in numbers) <= 3  # 10 of 40 lack enhancing tumour
        homes = {(groups[case_id], name) for name, ids in fold.items() for case_id in ids}
        assert len(homes) == 38


@pytest.mark.parametrize(("n", "folds"), [(4, 2), (5, 2), (3, 3), (5, 5), (7, 5)])
def test_few_patients_in_folds(n, folds):
    for fold in fold_cases(PATIENTS[:n], folds=folds, split="0.8,0.1,0.1", seed=0):
        check_disjoint(fold)


def test_folds_that_cannot_be():
    with pytest.raises(DataError, match="4 labelled patients: each of 5 folds .*so 5 or more"):
        fold_cases(PATIENTS[:4], folds=5, split="0.8,0.1,0.1", seed=0)
    with pytest.raises(DataError, match="so 4 or more"):
        fold_cases(PATIENTS[:3], folds=2, split="0.8,0.1,0.1", seed=0)
    with pytest.raises(ValueError, match="folds 1"):
        fold_cases(PATIENTS, folds=1, split="0.8,0.1,0.1", seed=0)


def test_folds_are_written_beside_the_parts(tmp_path):
    path = tmp_path / "splits.json"
    parts = split_cases(PATIENTS, split="0.8,0.1,0.1", seed=0)
    folds = fold_cases(PATIENTS, folds=3, split="0.8,0.1,0.1", seed=0)
    write_splits(path, parts, folds=folds, seed=0)
    assert read_splits(path) == parts
    assert json.loads(path.read_text())["folds"] == folds
    folds[1]["test"].append(folds[1]["train"][0])
    with pytest.raises(DataError, match="is in train and in test"):
        write_splits(path, parts, folds=folds)


# --- what is on disk is what was split


def test_the_fingerprint_is_of_patients_and_contents():
    contents = {"A": "1", "B": None}
    assert len(fingerprint(contents)) == 16
    assert fingerprint({"B": None, "A": "1"}) == fingerprint(contents)
    others = [{"A": "2", "B": None}, {"A": "1"}, {"A": "1", "C": None}, {"A": "1", "B": "1"}]
    assert len({fingerprint(other) for other in (contents, *others)}) == 5


def test_one_patient_under_two_names_in_two_parts_is_refused(tmp_path):
    parts = {"train": ["A", "B"], "val": ["C"], "test": ["D"]}
    path = tmp_path / "splits.json"
    write_splits(path, parts, groups={"A": "A", "B": "A", "C": "C", "D": "D"})  # both in train
    content = json.loads(path.read_text())
    content["groups"]["D"] = "A"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="D is in train as A, the same person, and in test"):
        read_splits(path)
    with pytest.raises(DataError, match="B is in train and in test"):
        write_splits(path, parts | {"test": ["B"]})
