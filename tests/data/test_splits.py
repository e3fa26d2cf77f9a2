"""Splits: by patient, disjoint, repeatable, never empty."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import patients
from brats_helpers.data.audit import audit
from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case, survey
from brats_helpers.data.patients import load_parts
from brats_helpers.data.sources import Source
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
from brats_helpers.runs import Run
from tests.conftest import write_tiny_case


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
    with pytest.raises(DataError, match="50 labelled patients, 2 of them different: .*so 3 or more"):
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


@pytest.fixture
def split_run(tmp_path):
    """A run over four tiny patients in plain files, split as notebook 00 does it; `Tiny_3` was not taken."""
    data = tmp_path / "data"
    for k in range(4):
        for path in list(write_tiny_case(data, f"Tiny_{k}", seed=k).iterdir()):
            nib.save(nib.load(path), path.with_suffix(""))
            path.unlink()
    found = survey(data)
    report = audit(found, found.cases[:3], workers=1, cache_dir=tmp_path / "cache")
    run = Run(tmp_path / "run")
    contents = {case.id: report["cases"][case.id]["content"] for case in found.cases}
    parts = {"train": ["Tiny_0"], "val": ["Tiny_1"], "test": ["Tiny_2"]}
    write_splits(run.splits, parts, unlabelled=[], contents=contents)
    run.record(data=str(data), modalities=list(found.modalities), cache_dir=str(tmp_path / "cache"))
    return run


def test_the_parts_of_a_run_are_found_again(split_run):
    parts = load_parts(split_run)
    assert {name: [case.id for case in cases] for name, cases in parts.items()} == {
        "train": ["Tiny_0"],
        "val": ["Tiny_1"],
        "test": ["Tiny_2"],
        "unlabelled": [],
    }


def test_copied_or_packed_anew_they_are_still_the_same(split_run, tmp_path):
    data = shutil.move(tmp_path / "data", tmp_path / "moved")
    for path in (data / "Tiny_1").iterdir():
        os.utime(path, (1, 1))
    flair = data / "Tiny_2" / "Tiny_2_flair.nii"
    nib.save(nib.load(flair), flair.with_name("Tiny_2_flair.nii.gz"))
    flair.unlink()
    split_run.record(data=str(data))
    assert len(load_parts(split_run)["train"]) == 1


def mend(path):
    """One voxel of a plain file gets another value; name and size stay."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: mend(data / "Tiny_1" / "Tiny_1_t1.nii"), "Tiny_1 has other voxels"),
        (lambda data: mend(data / "Tiny_1" / "Tiny_1_seg.nii"), "Tiny_1 has other voxels"),
        (lambda data: (data / "Tiny_2" / "Tiny_2_seg.nii").unlink(), "Tiny_2 has other voxels"),
        (lambda data: (data / "Tiny_2" / "Tiny_2_t2.nii").unlink(), "Tiny_2 is gone"),
        (lambda data: shutil.rmtree(data / "Tiny_3"), "Tiny_3 is gone"),
        (lambda data: write_tiny_case(data, "Tiny_4", seed=4), "Tiny_4 is new"),
    ],
)
def test_patients_that_changed_are_noticed(split_run, tmp_path, change, what):
    load_parts(split_run)
    change(tmp_path / "data")
    with pytest.raises(DataError, match=f"{what}. Run 00_setup again"):
        load_parts(split_run)


def test_a_faulty_patient_that_was_mended_is_noticed(split_run, tmp_path):
    path = tmp_path / "data" / "Tiny_2" / "Tiny_2_t1.nii"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    found = survey(tmp_path / "data")
    report = audit(found, found.cases, workers=1, cache_dir=tmp_path / "cache")
    contents = {case.id: report["cases"][case.id]["content"] for case in found.cases}
    parts = {"train": ["Tiny_0"], "val": ["Tiny_1"], "test": ["Tiny_3"]}
    write_splits(split_run.splits, parts, unlabelled=[], contents=contents)
    load_parts(split_run)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="Tiny_2 has other voxels"):
        load_parts(split_run)


def test_a_run_of_an_older_version_is_told_to_start_again(split_run):
    content = json.loads(split_run.splits.read_text())
    del content["contents"]
    split_run.splits.write_text(json.dumps(content))
    with pytest.raises(DataError, match="Run 00_setup again"):
        load_parts(split_run)


def test_one_patient_under_two_names_in_two_parts_is_refused(tmp_path):
    parts = {"train": ["A", "B"], "val": ["C"], "test": ["D"]}
    path = tmp_path / "splits.json"
    write_splits(path, parts, groups={"A": "A", "B": "A", "C": "C", "D": "D"})  # both in train
    content = json.loads(path.read_text())
    content["groups"]["D"] = "A"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="D is in train, where it is called A, and in test"):
        read_splits(path)
    with pytest.raises(DataError, match="B is in train and in test"):
        write_splits(path, parts | {"test": ["B"]})


def test_a_mount_that_is_gone_is_asked_for_again(split_run, monkeypatch):
    """As the data of a machine in the cloud that was given back."""
    here = Path(split_run.manifest["data"])
    asked = {"data": "kaggle", "data_dir": "data", "phantom_cases": 3, "seed": 0}
    split_run.record(data=str(here.with_name("gone")), asked=asked)
    monkeypatch.setattr(patients, "find_data", lambda **given: Source(here, False, "again") if given == asked else None)
    assert load_parts(split_run)["train"]
