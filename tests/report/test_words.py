"""The first screen of a report in words: what the scores compare with, and what to do next."""

import pytest

from brats_helpers.report.words import compared, next_steps

REAL = {"cases": {"BraTS20_Training_001": {}}, "convention": "brats2020: per patient", "simulated": False}


def test_published_scores_stand_beside_runs_on_that_data_set_by_that_rule():
    text = compared(REAL)
    assert "WT 0.889, TC 0.851, ET 0.820 by nnU-Net" in text or "WT 0.890, TC 0.851, ET 0.820 by nnU-Net" in text
    assert "hidden test patients" in text and "only an indication" in text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"simulated": True}, "no published score is comparable: only runs on the same patients are"),
        ({"convention": "brats2023: lesion-wise"}, "No published score is comparable"),
        ({"cases": {"Site_01": {}, "BraTS20_Training_001": {}}}, "No published score is comparable"),
        ({"cases": {}}, ""),
    ],
)
def test_other_patients_and_other_rules_compare_with_no_published_score(change, said):
    text = compared(REAL | change)
    assert said in text and bool(text) == bool(said) and "nnU-Net" not in text


def test_the_next_steps_follow_from_the_run():
    steps = next_steps(REAL, best={"epoch": 5, "epochs": 5}, failed=2, parts=False)
    starts = [
        "Look at the patients under Failures (2)",
        "Train longer",
        "Test more patients",
        "Compare with the packaged",
    ]
    assert [step.startswith(start) for step, start in zip(steps, starts, strict=True)] == [True] * 4
    many = REAL | {"cases": {f"P{k}": {} for k in range(100)}}
    (only,) = next_steps(many, best={"epoch": 4, "epochs": 5}, failed=0, parts=False)
    assert only.startswith("Compare with the packaged network")
    first, *_ = next_steps(many | {"leakage": ["P1"]}, best={}, failed=0, parts=False)
    assert first.startswith("Score patients that the network has not seen")
    assert next_steps(many | {"simulated": True}, best={}, failed=0, parts=True)[-1].startswith("Use real patients")
    assert next_steps({}, best={}, failed=0, parts=True) == []
    assert next_steps({}, best={}, failed=0, parts=False)[0].startswith("Run the notebooks up to 03")


def test_the_packaged_network_on_the_same_patients_comes_first():
    own = REAL | {"summary": {region: {"dice": {"mean": 0.75}} for region in ("WT", "TC", "ET")}}
    text = compared(own | {"packaged": {"WT": 0.8, "TC": 0.7, "ET": None}})
    assert text.startswith("The packaged network, which comes with the suite")
    assert "Dice of WT 0.800, TC 0.700 on the same patients: better than this run's network in WT." in text
    assert "nnU-Net" in text
    ahead = own | {"packaged": {"WT": 0.8, "TC": 0.8, "ET": 0.8}}
    how = {"best": {}, "failed": 0, "parts": True}
    assert "`-p encoder_weights simulated -p encoder auto`" in next_steps(ahead, start="imagenet", **how)[0]
    assert next_steps(ahead, start="simulated", **how) == next_steps(ahead | {"simulated": True}, **how)[:-1] == []
    assert "packaged" not in compared(REAL | {"packaged": None})
    steps = next_steps(REAL | {"packaged": {"WT": 0.8}}, best={}, failed=0, parts=True)
    assert not any("packaged" in step for step in steps)
