"""Splits: by patient, disjoint, repeatable, never empty."""

import json
from pathlib import Path

import numpy as np
import pytest

from brats_helpers.cache import Packed
from brats_helpers.cases import Case, DataError
from brats_helpers.splits import check_disjoint, pick_cases, read_splits, split_cases, write_splits


def _patient(k, volume=100, enhancing=True):
    counts = np.array([[1000, volume, volume, volume * enhancing]])
    return Packed(f"P{k:03d}", np.zeros((1, 1, 8, 8), np.float16), None, (0, 0, 0), (8, 8, 1), counts)


PATIENTS = [_patient(k) for k in range(50)]
IDS = [case.id for case in PATIENTS]


def test_shares_give_every_patient_one_part():
    parts = split_cases(PATIENTS, split="0.8,0.1,0.1", seed=0)
    assert {name: len(ids) for name, ids in parts.items()} == {"train": 40, "val": 5, "test": 5}
    assert sorted(sum(parts.values(), [])) == IDS


def test_counts_take_so_many_patients_at_most():
    cases = [Case(f"P{k:03d}", {}, Path("seg.nii") if k < 50 else None) for k in range(60)]
    picked = pick_cases(cases, split="10,2,2", seed=0)
    assert sum(case.seg is not None for case in picked) == 14 and len(picked) == 16
    assert picked == pick_cases(cases[::-1], split="10,2,2", seed=0) == sorted(picked, key=lambda case: case.id)
    assert picked != pick_cases(cases, split="10,2,2", seed=1)
    assert len(pick_cases(cases[48:52], split="10,2,2", seed=0)) == 4
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
    with pytest.raises(DataError, match="2 labelled patients.*three or more"):
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
