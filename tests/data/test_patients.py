"""A run's patients: drawn, found again, and described for its checkpoints."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import patients
from brats_helpers.data.audit import audit, leave_out
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.identity import seen_before
from brats_helpers.data.patients import ChangedError, draw_patients, facts_of, hashes_of, load_parts, voxel_ml
from brats_helpers.data.sources import Source
from brats_helpers.data.splits import write_splits
from brats_helpers.labels import DataError
from brats_helpers.runs import Run
from tests.conftest import write_tiny_case


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
        (lambda data: write_tiny_case(data, "Tiny_4", seed=4), "Tiny_4 is new"),
        (lambda data: os.rename(data / "Tiny_3", data / "Tiny_4") or rename_files(data / "Tiny_4"), "Tiny_4 is new"),
    ],
)
def test_patients_that_were_read_and_differ_are_noticed(split_run, tmp_path, change, what):
    load_parts(split_run)
    change(tmp_path / "data")
    with pytest.raises(ChangedError, match=f"{what}. Run 00_setup again"):
        load_parts(split_run)


def rename_files(folder):
    for path in list(folder.iterdir()):
        path.rename(folder / f"{folder.name}_{path.name.rpartition('_')[2]}")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (shutil.rmtree, "not a folder"),
        (lambda data: [shutil.rmtree(folder) for folder in data.iterdir()], "No patient"),
        (lambda data: shutil.rmtree(data / "Tiny_3"), "lacks 1 of the 4 patients of .*: Tiny_3 is gone"),
        (lambda data: (data / "Tiny_2" / "Tiny_2_t2.nii").unlink(), "Tiny_2 is gone"),
        (lambda data: [path.unlink() for path in data.glob("*/*_seg.nii")], "Tiny_0 has no segmentation any more"),
        (lambda data: [os.rename(f, f.with_name(f"X_{k}")) or rename_files(data / f"X_{k}")
                       for k, f in enumerate(sorted(data.iterdir()))], "lacks 4 of the 4 patients"),
    ],
    ids=["unmounted", "emptied", "one patient", "one file", "masks", "another data set"],
)  # fmt: skip
def test_patients_out_of_reach_have_not_changed(split_run, tmp_path, change, what):
    load_parts(split_run)
    change(tmp_path / "data")
    with pytest.raises(DataError, match=what) as caught:
        load_parts(split_run)
    assert not isinstance(caught.value, ChangedError)


def test_a_file_that_cannot_be_opened_has_not_changed(split_run, tmp_path, monkeypatch):
    load_parts(split_run)
    really = open

    def refuse(path, *args, **how):
        if str(path).endswith("Tiny_1_t1.nii"):
            raise PermissionError(13, "Permission denied")
        return really(path, *args, **how)

    os.utime(tmp_path / "data" / "Tiny_1" / "Tiny_1_t1.nii", (1, 1))
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    with pytest.raises(DataError, match="Tiny_1 cannot be opened") as caught:
        load_parts(split_run)
    assert not isinstance(caught.value, ChangedError)


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


def test_a_mount_that_is_gone_is_asked_for_again(split_run, monkeypatch):
    """As the data of a machine in the cloud that was given back."""
    here = Path(split_run.manifest["data"])
    asked = {"data": "kaggle", "data_dir": "data", "phantom_cases": 3, "seed": 0}
    split_run.record(data=str(here.with_name("gone")), asked=asked)
    monkeypatch.setattr(patients, "find_data", lambda **given: Source(here, False, "again") if given == asked else None)
    assert load_parts(split_run)["train"]


# --- drawing


def test_counts_mean_usable_patients(tmp_path):
    """Of six labelled patients two are broken; three are asked for, and three are there whatever the seed draws."""
    for k in range(6):
        write_tiny_case(tmp_path / "data", f"Tiny_{k}", seed=k)
    for broken in (1, 4):
        (tmp_path / "data" / f"Tiny_{broken}" / f"Tiny_{broken}_t1.nii.gz").write_bytes(b"\x1f\x8bbroken")
    found = survey(tmp_path / "data")
    for seed in range(6):
        drawn, report = draw_patients(found, split="1,1,1", seed=seed, workers=1, cache_dir=tmp_path / "cache")
        usable = leave_out(report, drawn)
        assert len(usable) == 3 and not {"Tiny_1", "Tiny_4"} & {case.id for case in usable}
        assert len([entry for entry in report["cases"].values() if entry["content"]]) == len(drawn)


# --- what a network is told about its patients


def test_facts_let_a_network_recognise_its_patients(split_run, tmp_path):
    facts = facts_of(split_run)
    assert facts["spacing_mm"] == [1, 1, 1] and facts["patients"].keys() == {"Tiny_0", "Tiny_1"}
    json.dumps(facts)
    cases = find_cases(tmp_path / "data")
    assert seen_before(facts, cases).keys() == {"Tiny_0", "Tiny_1"}
    shutil.copytree(tmp_path / "data" / "Tiny_1", tmp_path / "renamed" / "Other_1")
    rename_files(tmp_path / "renamed" / "Other_1")
    (tmp_path / "renamed" / "Other_1" / "Other_1_seg.nii").unlink()
    assert seen_before(facts, find_cases(tmp_path / "renamed")).keys() == {"Other_1"}
    hashes = hashes_of(split_run)
    assert facts["patients"]["Tiny_0"]["images"] == hashes["Tiny_0"]
    assert seen_before({"patients": {"X": facts["patients"]["Tiny_0"]}}, cases, hashes=hashes).keys() == {"Tiny_0"}


def test_the_spacing_is_that_of_lps_axes(split_run, tmp_path):
    """Stored with the axes S, P, L: slices of 3 mm first."""
    for path in (tmp_path / "data").glob("*/*"):
        image = nib.load(path)
        affine = np.array([[0, 0, -1.0, 0], [0, -2.0, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
        path.write_bytes(nib.Nifti1Image(np.asarray(image.dataobj), affine).to_bytes())
    found = survey(tmp_path / "data")
    report = audit(found, found.cases, workers=1, cache_dir=tmp_path / "cache")
    contents = {case.id: report["cases"][case.id]["content"] for case in found.cases}
    parts = {"train": ["Tiny_0"], "val": ["Tiny_1"], "test": ["Tiny_2"]}
    write_splits(split_run.splits, parts, unlabelled=[], contents=contents)
    assert facts_of(split_run)["spacing_mm"] == [1, 2, 3]
    assert voxel_ml(report["cases"]["Tiny_0"]) == pytest.approx(1 * 2 * 3 / 1000)
