"""Real patients, two modalities: a short training, the unlabelled one predicted in its own geometry."""

import dataclasses
import json

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.cache import pack, prepare
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.nifti import read_mask, read_nifti, write_mask
from brats_helpers.evaluation import inference
from brats_helpers.evaluation.folders import score_folders
from brats_helpers.labels import DataError
from brats_helpers.scoring.scores import score_case
from brats_helpers.training.loop import fit
from brats_helpers.training.model import PACKAGED_ENCODER
from tests.tiny_training import HOW, SETTINGS, fit_tiny

RULES = {"spacing_mm": (1.0, 1.0, 1.0), "convention": "brats2020"}
VOXELS = {
    "brats_2013_pat0001_1": (27_189, 53_050, 31_485),
    "brats_2013_pat0002_1": (1_106, 53_736, 8_219),
    "brats_2013_pat0003_1": (4_414, 148_264, 21_250),
}


def test_a_short_training_and_the_prediction_of_the_unlabelled_patient(real_patients, tmp_path):
    cases = find_cases(real_patients, ["flair", "t1ce"])
    packed = {case.id: case for case in prepare(cases, cache_dir=tmp_path / "cache", workers=1)}
    settings = dataclasses.replace(
        SETTINGS,
        modalities=("flair", "t1ce"),
        encoder=PACKAGED_ENCODER,
        encoder_weights="imagenet",
        epochs=4,
        batch_size=8,
        slices_per_epoch=64,
    )
    by_id = {case.id: case for case in cases}
    train = [packed[f"brats_2013_pat000{k}_1"] for k in (1, 2)]
    val = [packed["brats_2013_pat0003_1"]]
    history = fit(settings, train, val, tmp_path, **HOW)
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]

    # The one that chose the epoch: after a minute half of its tumour is found, and not where its mirror image would be.
    checkpoint = tmp_path / "checkpoints" / "best.pt"
    (chosen_by,) = [by_id[case.id] for case in val]
    inference.predict_folders(
        [checkpoint], [chosen_by.folder], tmp_path / "seen", device="cpu", flips=False, allow_leakage=True
    )
    pred, truth = (
        read_mask(path, "brats2020") for path in (tmp_path / "seen" / f"{chosen_by.id}_seg.nii.gz", chosen_by.seg)
    )
    dice, mirrored = (score_case(p, truth, **RULES)["WT"]["dice"] for p in (pred, pred[::-1]))
    assert dice > 0.5 and dice > 2 * mirrored

    patient = real_patients / "BraTS-GLI-00001-000"
    inference.predict_folders([checkpoint], [patient], tmp_path / "out", device="cpu", flips=False)
    written = nib.load(tmp_path / "out" / "BraTS-GLI-00001-000_seg.nii.gz")
    scan = nib.load(patient / "BraTS-GLI-00001-000-t2f.nii.gz")
    assert written.shape == scan.shape and np.array_equal(written.affine, scan.affine)
    assert written.header.get_zooms() == scan.header.get_zooms()
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 3}


def test_a_network_of_other_patients_predicts_them_all_and_score_prints_their_figures(
    real_patients, tiny_patients, tmp_path, capsys
):
    tiny = [pack(case) for case in find_cases(tiny_patients, ["flair", "t1ce"])]
    fit_tiny(tiny, tmp_path, modalities=("flair", "t1ce"), epochs=1)
    checkpoint, out, file = (tmp_path / name for name in ("checkpoints/best.pt", "out", "scores.json"))
    assert main(["predict", "--checkpoint", str(checkpoint), "--out", str(out), str(real_patients)]) == 0
    capsys.readouterr()
    assert main(["score", str(out), str(real_patients), "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    scores = json.loads(file.read_text())
    assert scores["not_scored"].keys() == {"BraTS-GLI-00001-000"} and "BraTS-GLI-00001-000 is not scored" in printed
    # The reference volumes are those counted by hand in the patients' README, 1,000 voxels of 1 mm a ml.
    for case_id, (ncr, ed, et) in VOXELS.items():
        assert f"\n{case_id} " in printed
        volumes = {name: figures["volume_ml_truth"] for name, figures in scores["cases"][case_id].items()}
        expected = {"WT": ncr + ed + et, "TC": ncr + et, "ET": et, "NCR": ncr, "ED": ed}
        assert volumes == pytest.approx({name: voxels / 1000 for name, voxels in expected.items()})


def test_a_real_segmentation_agrees_with_itself_and_not_with_itself_one_slice_off(real_patients, tmp_path):
    for case in find_cases(real_patients, ["flair", "t1ce"]):
        if case.seg is None:
            continue
        classes, like = read_mask(case.seg, case.numbering), read_nifti(case.seg)
        for name, moved in (("same", classes), ("shifted", np.roll(classes, 1, axis=2))):
            (tmp_path / name).mkdir(exist_ok=True)
            write_mask(tmp_path / name / f"{case.id}_seg.nii.gz", moved, like)
    how = {"convention": "brats2020", "simulated": False, "allow_leakage": False}
    same, shifted = (score_folders(tmp_path / name, real_patients, **how)["cases"] for name in ("same", "shifted"))
    assert len(same) == 3
    for case_id in same:
        for region in ("WT", "TC", "ET"):
            assert same[case_id][region]["dice"] == 1 and same[case_id][region]["hd95_mm"] == 0
            assert 0.5 < shifted[case_id][region]["dice"] < 0.99 and shifted[case_id][region]["hd95_mm"] >= 1


def test_four_modalities_are_asked_for_where_two_are(real_patients):
    with pytest.raises(DataError, match=r"brats_2013_pat0001_1: No brats_2013_pat0001_1_t1\.nii.*missing: t1, t2"):
        find_cases(real_patients)
    found = survey(real_patients).complete(skip_incomplete=True)
    assert [case.id for case in found] == ["BraTS-GLI-00001-000"]
