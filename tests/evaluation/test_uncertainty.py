"""Uncertainty, error detection and calibration."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from brats_helpers.evaluation import uncertainty
from brats_helpers.evaluation.uncertainty import auc, entropy, examine


def test_entropy_runs_from_certain_to_all_classes_equal():
    soft = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25] * 4], np.float32)
    np.testing.assert_allclose(entropy(soft), [0, 0.5, 1], atol=1e-6)  # log 2 / log 4 = 1/2


def test_auc_by_hand():
    # Hits 0.9 and 0.4 against misses 0.1 and 0.4: of four pairs three are won and one is even.
    assert auc(np.array([0.9, 0.4, 0.1, 0.4]), np.array([True, True, False, False])) == 3.5 / 4
    assert auc(np.array([0.9, 0.1]), np.array([True, True])) is None
    assert auc(np.array([0.9, 0.1]), np.array([False, False])) is None


def test_calibration_agrees_with_scikit_learn():
    random = np.random.default_rng(0)
    chance = random.uniform(0.02, 0.98, 2000)
    truth = np.where(random.random(2000) < chance, 3, 0).astype(np.uint8)
    soft = np.zeros((1, 4, 1, 2000), np.float32)
    soft[0, 0, 0], soft[0, 3, 0] = 1 - chance, chance
    result = examine(soft, truth.reshape(1, 1, -1), np.ones((1, 1, 2000), bool))
    bins = uncertainty.collect({"a": result})["calibration"]["ET"]["bins"]
    observed, predicted = calibration_curve(truth == 3, soft[0, 3, 0], n_bins=uncertainty.BINS)
    assert [row["observed"] for row in bins] == pytest.approx(observed)
    assert [row["predicted"] for row in bins] == pytest.approx(predicted)


def patient():
    """Four brain voxels and one outside; probabilities of the classes, and the classes that they are."""
    soft = np.array(
        [
            [0.05, 0.05, 0.8, 0.1],  # ED, and it is
            [0.4, 0.1, 0.3, 0.2],  # background, but it is ED: wrong, and the most doubtful
            [0.995, 0.001, 0.002, 0.002],  # background, and it is
            [0.1, 0.1, 0.1, 0.7],  # ET, but it is NCR: wrong
            [0.1, 0.0, 0.0, 0.9],  # outside the brain
        ],
        np.float32,
    )
    truth = np.array([2, 2, 0, 1, 0], np.uint8)
    return soft.T.reshape(1, 4, 1, 5), truth.reshape(1, 1, 5), np.array([[[True] * 4 + [False]]])


def test_one_patient_by_hand():
    result = examine(*patient())
    # Entropies: voxel 1 over voxel 3 over 0 over 2 (0.94, 0.68, 0.51, ...): both errors above both others.
    assert result["auc"] == 1
    assert result["auc_tumour"] == 1  # voxels 0, 1 and 3
    # WT is given 0.95, 0.6, 0.005 (below the floor) and 0.9; it is there in all three.
    expected = np.zeros((10, 3))
    expected[6], expected[9] = (1, 0.6, 1), (2, 1.85, 2)
    np.testing.assert_allclose(result["bins"]["WT"], expected, atol=1e-6)
    # ET is given 0.1, 0.2 and 0.7, and is nowhere.
    expected = np.zeros((10, 3))
    expected[1], expected[2], expected[7] = (1, 0.1, 0), (1, 0.2, 0), (1, 0.7, 0)
    np.testing.assert_allclose(result["bins"]["ET"], expected, atol=1e-6)


def test_results_are_combined_over_patients():
    soft, truth, brain = patient()
    flawless = examine(soft, soft.argmax(axis=1).astype(np.uint8), brain)
    assert flawless["auc"] is None  # no error to detect
    result = uncertainty.collect({"b": flawless, "a": examine(soft, truth, brain)})
    assert list(result["cases"]) == ["a", "b"] and result["cases"]["b"] == {"auc": None, "auc_tumour": None}
    assert result["auc"] == result["auc_tumour"] == 1  # of the one that has errors
    # WT over both: 0.6 is there once of twice, 1.85 of 2 four times of four: |1.2 - 1| + |3.7 - 4| over 6 voxels.
    wt = result["calibration"]["WT"]
    assert wt["ece"] == pytest.approx((0.2 + 0.3) / 6)
    assert wt["bins"][0] == pytest.approx({"low": 0.6, "high": 0.7, "voxels": 2, "predicted": 0.6, "observed": 0.5})
    assert [row["voxels"] for row in wt["bins"]] == [2, 4]


def test_without_patients_the_uncertainty_is_unknown():
    result = uncertainty.collect({})
    assert result["auc"] is None and result["calibration"]["ET"] == {"ece": None, "bins": []}


def test_a_well_calibrated_network_has_no_calibration_error():
    random = np.random.default_rng(1)
    chance = random.uniform(0.02, 0.98, (200, 30, 40))
    truth = np.where(random.random(chance.shape) < chance, 3, 0).astype(np.uint8)
    soft = np.zeros((200, 4, 30, 40), np.float32)
    soft[:, 0], soft[:, 3] = 1 - chance, chance
    result = uncertainty.collect({"a": examine(soft, truth, np.ones(truth.shape, bool))})
    assert result["calibration"]["ET"]["ece"] < 0.01
    soft[:, 3] = chance**3  # says too little
    soft[:, 0] = 1 - soft[:, 3]
    result = uncertainty.collect({"a": examine(soft, truth, np.ones(truth.shape, bool))})
    assert result["calibration"]["ET"]["ece"] > 0.1
