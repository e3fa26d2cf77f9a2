"""Failures by cause and the second look at a run's predictions, on masks whose answer is plain."""

import json

import numpy as np
import pytest

from brats_helpers.data.cases import Case
from brats_helpers.data.nifti import write_mask
from brats_helpers.report.review import CAUSES, find_failures, review
from tests.tiny_run import HOSTILE, PARTS, write_tiny_run

MM = (1.0, 1.0, 1.0)


def box(side, classes=3, at=5):
    """A cube of one class in an empty volume of 60 x 40 x 40 voxels."""
    volume = np.zeros((60, 40, 40), np.uint8)
    volume[at : at + side, 5 : 5 + side, 5 : 5 + side] = classes
    return volume


def causes(pred, truth, spacing_mm=MM):
    return [(failure.cause, failure.region) for failure in find_failures("P", pred, truth, spacing_mm)]


def test_a_perfect_and_an_empty_patient_have_no_failure():
    assert causes(box(20), box(20)) == []
    assert causes(box(0), box(0)) == []


def test_missed_and_false_enhancing_tumour():
    without_et = box(20, classes=1)  # 8 ml of necrotic core instead
    assert causes(without_et, box(20)) == [("missed enhancing tumour", "ET")]
    assert causes(box(20), without_et) == [("false enhancing tumour", "ET")]
    failure = find_failures("P", without_et, box(20), MM)[0]
    assert (failure.case, failure.dice, failure.seen) == ("P", 0.0, "predicted 0.000 ml, reference 8.0 ml")


def test_a_tumour_of_which_nothing_was_found_is_missed_in_every_region():
    missed = [("missed tumour", "WT"), ("missed tumour", "TC"), ("missed enhancing tumour", "ET")]
    assert causes(box(0), box(20)) == missed
    assert causes(box(0), box(3)) == missed  # a small one as well: that nothing was found says more


def test_enhancing_tumour_that_lies_elsewhere_is_missed_although_there_is_some():
    truth = box(20)
    pred = truth.copy()
    pred[truth == 3] = 1
    pred[26:29, 5:25, 5:25] = 3  # beside the tumour, one voxel away from it
    assert ("missed enhancing tumour", "ET") in causes(pred, truth)


def test_low_scores_of_small_and_of_other_tumours():
    # The lower half of a cube: Dice 2 x 0.5 / 1.5 = 0.667. 1 ml is small, 8 ml is not.
    for side, cause in ((10, "small tumour"), (20, "under-segmented")):
        pred = box(side)
        pred[:, :, 5 + side // 2 :] = 0
        assert causes(pred, box(side)) == [(cause, region) for region in ("WT", "TC", "ET")]
    # Voxels of 2 mm: 1,000 of them are 8 ml.
    pred = box(10)
    pred[:, :, 10:] = 0
    assert causes(pred, box(10), (2.0, 2.0, 2.0))[0] == ("under-segmented", "WT")


def test_a_score_just_above_the_bound_is_no_failure():
    # 14 of 26 layers: 2 x 14 / (14 + 26) = 0.7, which is not below 0.7.
    truth = np.zeros((40, 40, 40), np.uint8)
    truth[:26, :20, :20] = 3
    pred = truth.copy()
    pred[14:] = 0
    assert causes(pred, truth) == []
    pred[13:] = 0  # 2 x 13 / 39 = 0.667
    assert ("under-segmented", "WT") in causes(pred, truth)
    assert ("over-segmented", "WT") in causes(truth, pred)
    assert ("misplaced", "WT") in causes(np.roll(truth, 10, axis=0), truth)  # 16 of 26 layers: 0.615


def test_far_false_positives_are_counted_by_piece_and_distance():
    truth = box(10)  # from 5 to 14
    pred = truth.copy()
    pred[24, 5:15, 5:15] = 2  # 24 - 14 = 10 mm away: not more than 10
    assert causes(pred, truth) == []
    pred[59, 14, 14] = 2  # 45 mm: far, but one voxel is a speck
    assert causes(pred, truth) == []
    pred[26:28, 5:15, 5:15] = 2  # 12 mm: far, 200 voxels
    failure = find_failures("P", pred, truth, MM)[-1]
    assert (failure.cause, failure.region) == ("far false positive", "WT")
    assert failure.seen == "2 components, 0.2 ml in total, up to 45 mm away"
    # The same voxels of half the size are near.
    assert ("far false positive", "WT") not in causes(pred[:40], truth[:40], (0.5, 0.5, 0.5))


def test_a_prediction_where_there_is_no_tumour_is_far():
    found = find_failures("P", box(10, classes=2), box(0), MM)
    assert [failure.cause for failure in found] == ["false tumour", "far false positive"]
    assert "no tumour" in found[-1].seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_tiny_run(tmp_path_factory.mktemp("review"))


@pytest.fixture
def metrics(run):
    return json.loads(run.metrics.read_text())


def test_a_run_is_read_again_once(run, metrics):
    found = review(run, metrics)
    assert list(found.cases) == PARTS["test"] and found.problem == ""
    assert found.reference_labels == {1, 2, 4} and found.predicted_labels == {1, 2, 4}
    assert found.off_grid == [] and found.largest_difference < 1e-12
    assert [(f.cause, f.case) for f in found.failures if f.region == "ET"][0] == ("missed enhancing tumour", "NoET_0")
    assert [f.cause for f in found.failures] == sorted((f.cause for f in found.failures), key=list(CAUSES).index)
    mean = np.mean([metrics["cases"][case_id]["WT"]["dice"] for case_id in PARTS["test"]])
    line = next(line for line in found.conventions if line.startswith("brats2020"))
    assert found.conventions[line]["WT"] == pytest.approx(mean)


def test_scores_that_are_not_those_of_the_files_are_noticed(run, metrics):
    metrics["cases"][HOSTILE]["TC"]["dice"] += 0.01
    assert review(run, metrics).largest_difference == pytest.approx(0.01)


def test_a_prediction_off_the_patients_grid_is_noticed(run, metrics, monkeypatch):
    real = Case.read  # which finds a modality in a file of several, too

    def moved(case, modality):
        voxels, image = real(case, modality)
        if case.id == "Exact_0":
            image.affine[0, 3] += 1
        return voxels, image

    monkeypatch.setattr(Case, "read", moved)
    assert review(run, metrics).off_grid == ["Exact_0"]


def test_a_missing_prediction_is_named_and_the_others_are_read(tmp_path, metrics):
    run = write_tiny_run(tmp_path)
    (run.predictions / "Exact_0_seg.nii.gz").unlink()
    found = review(run, metrics)
    assert list(found.unreadable) == ["Exact_0"] and "Exact_0_seg.nii.gz cannot be read" in found.unreadable["Exact_0"]
    assert list(found.cases) == [HOSTILE, "NoET_0"] and found.problem == "" and found.recounted == 2 * 5 * 12
    for path in run.predictions.iterdir():
        path.unlink()
    found = review(run, metrics)
    assert found.cases == {} and "no prediction could be read again" in found.problem


def test_missing_patients_are_a_problem_but_no_error(tmp_path, metrics):
    run = write_tiny_run(tmp_path)
    run.record(data=str(tmp_path / "nowhere"))
    found = review(run, metrics)
    assert "could not be read again" in found.problem and found.cases == {} and found.failures == []
    assert review(run, {}).problem == ""


def test_a_prediction_of_another_shape_is_a_problem(tmp_path, metrics):
    import nibabel as nib

    run = write_tiny_run(tmp_path)
    small = np.zeros((2, 2, 2), np.uint8)
    write_mask(run.predictions / "Exact_0_seg.nii.gz", small, nib.Nifti1Image(small, np.eye(4)))
    assert "Exact_0: prediction of shape (2, 2, 2)" in review(run, metrics).unreadable["Exact_0"]
