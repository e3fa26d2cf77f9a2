"""Predictions are paired with references by names, folders or digits."""

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.evaluation.pairing import find_pairs

MET = ("BraTS-MET-00217-000", "BraTS-MET-00218-000")


def put(*paths, value=1):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.full((2, 2, 2), value, np.uint8), np.eye(4)), path)


@pytest.fixture
def place(tmp_path):
    for name in MET:
        put(tmp_path / "truth" / f"{name}-seg.nii.gz")
    return tmp_path


def pair(place, by_digits=False, truth="truth"):
    pairs, reasons = find_pairs(place / "pred", place / truth, by_digits=by_digits)
    return {
        case: (found.pred.relative_to(place / "pred").as_posix(), found.name) for case, found in pairs.items()
    }, reasons


def test_one_folder_per_patient(place):
    put(*(place / "pred" / name / "pred.nii.gz" for name in MET))
    assert pair(place) == ({name: (f"{name}/pred.nii.gz", name) for name in MET}, {})


def test_a_single_patient_in_a_folder(place):
    put(place / "pred" / MET[0] / "segmentation_result.nii")
    pairs, reasons = pair(place)
    assert pairs == {MET[0]: (f"{MET[0]}/segmentation_result.nii", MET[0])}
    assert list(reasons) == [MET[1]] and reasons[MET[1]].startswith("missing: ")


def test_names_of_files_come_before_names_of_folders(place):
    put(place / "pred" / "fold_0" / f"{MET[0]}.nii.gz", place / "pred" / "fold_1" / f"{MET[1]}_seg.nii.gz")
    pairs, reasons = pair(place)
    assert {case: name for case, (_, name) in pairs.items()} == {name: name for name in MET} and not reasons


def test_two_maps_in_a_patients_folder_are_ambiguous_and_the_others_are_paired(place):
    put(*(place / "pred" / name / "pred.nii.gz" for name in MET), place / "pred" / MET[0] / "other.nii.gz", value=1)
    put(place / "pred" / MET[0] / "other.nii.gz", value=2)
    pairs, reasons = pair(place)
    assert list(pairs) == [MET[1]]
    assert reasons[MET[0]].startswith("ambiguous: other.nii.gz and pred.nii.gz in ")


def test_names_that_nearly_match_suggest_the_nearest_reference(place):
    put(place / "pred" / "SEG-00217-000.nii.gz", place / "pred" / "BraTS-MET-0218-000.nii.gz")
    put(place / "pred" / "unrelated.nii.gz")
    pairs, reasons = pair(place)
    assert pairs == {} and set(reasons) == {*MET, "SEG-00217-000", "BraTS-MET-0218-000", "unrelated"}
    assert "the nearest name is BraTS-MET-00217-000: rename it, or pair by digits" in reasons["SEG-00217-000"]
    assert "the nearest name is BraTS-MET-00218-000" in reasons["BraTS-MET-0218-000"]
    assert reasons["unrelated"].startswith("extra: ") and "nearest" not in reasons["unrelated"]
    assert all(reasons[name].startswith("missing: ") for name in MET)


def test_digits_pair_names_that_differ(place):
    put(place / "pred" / "SEG-00217-000.nii.gz", place / "pred" / "SEG-218-0" / "pred.nii.gz")
    pairs, reasons = pair(place, by_digits=True)
    assert {case: name for case, (_, name) in pairs.items()} == dict(
        zip(MET, ("SEG-00217-000", "SEG-218-0"), strict=True)
    )
    assert reasons == {}


def test_the_year_of_the_data_set_is_no_digit_of_the_patient(place):
    put(place / "t20" / "BraTS20_Training_007_seg.nii")
    put(place / "pred" / "case_7.nii.gz")
    assert list(pair(place, by_digits=True, truth="t20")[0]) == ["BraTS20_Training_007"]


@pytest.mark.parametrize("name", ["A-00217-000", "BraTS-GLI-00217-000"])
def test_digits_that_are_not_unique_pair_nobody(place, name):
    put(place / "pred" / "SEG-00217-000.nii.gz", place / "pred" / f"{name}.nii.gz")
    pairs, reasons = pair(place, by_digits=True)
    assert pairs == {} and {"SEG-00217-000", name} <= set(reasons)


def test_digits_that_two_references_share_pair_nobody(place):
    put(place / "truth" / "BraTS-GLI-00217-000-seg.nii.gz", place / "pred" / "SEG-00217-000.nii.gz")
    pairs, reasons = pair(place, by_digits=True)
    assert pairs == {} and reasons["SEG-00217-000"].startswith("extra: ")


def test_the_same_name_has_priority_over_digits(place):
    put(place / "pred" / f"{MET[0]}.nii.gz", place / "pred" / "SEG-00217-000.nii.gz")
    pairs, reasons = pair(place, by_digits=True)
    assert pairs == {MET[0]: (f"{MET[0]}.nii.gz", MET[0])}
    assert reasons["SEG-00217-000"].startswith("extra: ")


def test_a_patient_without_a_reference_is_unlabelled(place):
    put(place / "truth" / "New" / "New_flair.nii.gz", place / "pred" / "New.nii.gz")
    pairs, reasons = pair(place)
    assert pairs == {} and reasons["New"].startswith("unlabelled: ")
