"""Score label maps on disk."""

import itertools

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.evaluation.folders import read_leakage, score_folders
from brats_helpers.files import write_json
from brats_helpers.labels import DataError, classes_to_labels
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.scores import score_case
from brats_helpers.scoring.statistics import summarise
from tests.scoring.shapes import MM, tumour
from tests.volumes import AFFINE, save


def put(path, classes, numbering="2020", affine=AFFINE):
    save(path, classes_to_labels(classes, numbering), np.uint8, affine)


@pytest.fixture
def folders(tmp_path):
    """Patients A and B as BraTS has them, with FLAIR only, and the predictions of both, each one patch too small."""
    for seed, case in enumerate("AB"):
        truth = tumour((16, 14, 12), seed)
        put(tmp_path / f"truth/{case}/{case}_flair.nii.gz", truth)
        put(tmp_path / f"truth/{case}/{case}_seg.nii.gz", truth)
        pred = truth.copy()
        pred[:5] = 0
        put(tmp_path / f"pred/{case}_seg.nii.gz", pred)
    return tmp_path / "pred", tmp_path / "truth"


def score(pred_dir, truth_dir, convention="brats2020"):
    return score_folders(pred_dir, truth_dir, convention=convention, simulated=True, allow_leakage=False)


def test_score_folders(folders):
    result = score(*folders)
    assert list(result) == ["convention", "rule", "simulated", "cases", "summary", "not_scored", "leakage", "labels"]
    assert (result["convention"], result["simulated"]) == (CONVENTIONS["brats2020"], True)
    assert list(result["cases"]) == ["A", "B"] and result["not_scored"] == {}
    truth = tumour((16, 14, 12), 0)
    pred = truth.copy()
    pred[:5] = 0
    assert result["cases"]["A"] == score_case(pred, truth, spacing_mm=MM, convention="brats2020")
    assert result["summary"] == summarise(result["cases"])
    assert 0 < result["summary"]["ET"]["dice"]["mean"] < 1


def test_any_numbering_and_any_layout_give_the_same_figures(folders, tmp_path):
    pred_dir, truth_dir = folders
    expected = score(pred_dir, truth_dir)
    for seed, case in enumerate("AB"):
        truth = tumour((16, 14, 12), seed)
        pred = truth.copy()
        pred[:5] = 0
        put(tmp_path / f"theirs/{case}.nii", pred, "2023")
        put(tmp_path / f"nested/{case}/{case}-seg.nii.gz", pred, "2023")
        put(tmp_path / f"flat/{case}_seg.nii", truth, "2023")
        put(tmp_path / f"bare/{case}.nii.gz", truth)
    for preds, truths in itertools.product(("pred", "theirs", "nested"), ("truth", "flat", "bare")):
        assert score(tmp_path / preds, tmp_path / truths) | {"labels": expected["labels"]} == expected


def test_what_cannot_be_scored_is_reported(folders):
    pred_dir, truth_dir = folders
    classes = tumour((16, 14, 12), 0)
    flipped = AFFINE * [[-1], [1], [1], [1]]
    for case in ("flipped", "cut", "torn", "odd", "no_answer"):
        put(truth_dir / case / f"{case}_seg.nii.gz", classes)
    put(truth_dir / "unlabelled" / "unlabelled_flair.nii.gz", classes)
    put(pred_dir / "flipped_seg.nii.gz", classes, affine=flipped)
    put(pred_dir / "cut_seg.nii.gz", classes[:-1])
    put(pred_dir / "unlabelled_seg.nii.gz", classes)
    put(pred_dir / "stranger_seg.nii.gz", classes)
    nib.save(nib.Nifti1Image(classes.astype(np.float32) / 2, AFFINE), pred_dir / "odd_seg.nii.gz")
    whole = (pred_dir / "A_seg.nii.gz").read_bytes()
    (pred_dir / "torn_seg.nii.gz").write_bytes(whole[: len(whole) // 2])
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["A", "B"]
    reasons = result["not_scored"]
    assert "torn_seg.nii.gz is truncated" in reasons.pop("torn")
    assert "odd_seg.nii.gz: fractional" in reasons.pop("odd")
    assert "(15, 14, 12)" in reasons["cut"] and "(16, 14, 12)" in reasons["cut"]
    assert {case: reason.split(":")[0] for case, reason in reasons.items()} == {
        "cut": "misaligned",
        "flipped": "misaligned",
        "no_answer": "missing",
        "stranger": "extra",
        "unlabelled": "unlabelled",
    }


def test_a_rounded_affine_is_no_misalignment_and_one_that_is_off_in_a_corner_is(folders):
    pred_dir, truth_dir = folders
    put(pred_dir / "A_seg.nii.gz", tumour((16, 14, 12), 0), affine=AFFINE + 1e-5)
    assert score(pred_dir, truth_dir)["cases"]["A"]["WT"]["dice"] == 1
    put(pred_dir / "A_seg.nii.gz", tumour((16, 14, 12), 0), affine=AFFINE + [[0, 0, 0, 0.01], *np.zeros((3, 4))])
    assert score(pred_dir, truth_dir)["not_scored"]["A"].startswith("misaligned")
    long = np.zeros((120, 4, 4), np.uint8)
    put(truth_dir / "long_seg.nii.gz", long)
    put(pred_dir / "long_seg.nii.gz", long, affine=AFFINE * [1.0009, 1, 1, 1])  # 0.1 mm at the far end
    assert score(pred_dir, truth_dir)["not_scored"]["long"].startswith("misaligned")


def test_a_prediction_is_found_whatever_lies_beside_it(folders):
    pred_dir, truth_dir = folders
    (pred_dir / "B_seg.nii.gz").rename(pred_dir / "B.nii.gz")  # A is still called A_seg
    put(pred_dir / "soft" / "A_soft.nii.gz", tumour((16, 14, 12), 0))
    put(pred_dir / "C" / "C_flair.nii.gz", tumour((16, 14, 12), 0))
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["A", "B"] and result["not_scored"] == {}
    (pred_dir / "A.nii.gz").write_bytes((pred_dir / "A_seg.nii.gz").read_bytes())
    assert list(score(pred_dir, truth_dir)["cases"]) == ["A", "B"]  # a copy counts once
    put(pred_dir / "A.nii.gz", tumour((16, 14, 12), 1))
    result = score(pred_dir, truth_dir)
    assert list(result["cases"]) == ["B"]
    assert result["not_scored"] == {"A": "Two label maps that differ, A_seg.nii.gz and A.nii.gz; keep one of them."}


def test_spacing_comes_from_the_file(tmp_path):
    for name, at in (("pred", 1), ("truth", 2)):
        classes = np.zeros((3, 3, 5), np.uint8)
        classes[1, 1, at] = 3
        put(tmp_path / name / "A_seg.nii.gz", classes, affine=np.diag([1.0, 1, 2, 1]))
    assert score(tmp_path / "pred", tmp_path / "truth")["cases"]["A"]["ET"]["hd95_mm"] == 2


def test_a_folder_without_label_maps_is_an_error(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No segmentation below"):
        score(tmp_path / "empty", folders[1])
    with pytest.raises(DataError, match="is not a folder"):
        score(tmp_path / "nowhere", folders[1])


def test_leakage_is_told_by_either_name(folders):
    pred_dir, truth_dir = folders
    (pred_dir / "A_seg.nii.gz").rename(pred_dir / "renamed_A1_seg.nii.gz")
    (truth_dir / "A").rename(truth_dir / "A1")
    for path in (truth_dir / "A1").iterdir():
        path.rename(path.with_name(path.name.replace("A_", "A1_")))
    how = {"convention": "brats2020", "simulated": True, "by_digits": True}
    for seen in ("renamed_A1", "A1"):
        write_json(pred_dir / "leakage.json", [seen])
        refused = score_folders(pred_dir, truth_dir, allow_leakage=False, **how)
        assert list(refused["cases"]) == ["B"] and refused["not_scored"]["A1"].startswith("leakage: ")
    allowed = score_folders(pred_dir, truth_dir, allow_leakage=True, **how)
    assert list(allowed["cases"]) == ["A1", "B"] and allowed["leakage"] == ["A1"]
    assert allowed["paired"] == {"A1": "renamed_A1"}


def test_a_torn_list_of_seen_patients_is_named(tmp_path):
    (tmp_path / "leakage.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"leakage\.json is not JSON"):
        read_leakage(tmp_path)


def test_the_names_of_the_patients_choose_the_task(tmp_path):
    classes = np.zeros((20, 6, 6), np.uint8)
    classes[2:5, 2, 2] = 3  # a lesion of three voxels, which counts for metastases alone
    put(tmp_path / "truth" / "BraTS-MET-00001-000-seg.nii.gz", classes, "2023")
    put(tmp_path / "pred" / "BraTS-MET-00001-000.nii.gz", classes * 0)
    how = {"simulated": True, "allow_leakage": False, "convention": "brats2023"}
    by_name = score_folders(tmp_path / "pred", tmp_path / "truth", **how)
    assert by_name["rule"] == "brats2023-MET" and by_name["cases"]["BraTS-MET-00001-000"]["ET"]["dice"] == 0
    as_glioma = score_folders(tmp_path / "pred", tmp_path / "truth", task="GLI", **how)
    assert as_glioma["rule"] == "brats2023" and as_glioma["cases"]["BraTS-MET-00001-000"]["ET"]["dice"] == 1


def test_labels_are_read_as_the_names_or_the_user_say(tmp_path):
    classes = tumour((16, 14, 12), 0)
    put(tmp_path / "truth" / "BraTS-PED-00001-000-seg.nii.gz", classes, "ped")
    put(tmp_path / "truth" / "Somebody_seg.nii.gz", classes, "2020")
    put(tmp_path / "pred" / "BraTS-PED-00001-000.nii.gz", classes, "ped")
    put(tmp_path / "pred" / "Somebody.nii.gz", classes, "2020")
    result = score(tmp_path / "pred", tmp_path / "truth")
    assert result["labels"]["references"] == {"ped": 1, "brats2020": 1}
    assert {figures["dice"] for scores in result["cases"].values() for figures in scores.values()} == {1}
    put(tmp_path / "pred" / "Somebody.nii.gz", classes, "msd")
    put(tmp_path / "pred" / "BraTS-PED-00001-000.nii.gz", classes, "msd")
    how = {
        "convention": "brats2020",
        "simulated": True,
        "allow_leakage": False,
        "labels": "msd",
        "truth_labels": "auto",
    }
    result = score_folders(tmp_path / "pred", tmp_path / "truth", **how)
    assert {figures["dice"] for scores in result["cases"].values() for figures in scores.values()} == {1}
