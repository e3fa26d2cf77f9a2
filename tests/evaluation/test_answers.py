"""Answers: decided only where patients and seeds agree, and everything compared has learnt something."""

import itertools

import pytest

from brats_helpers.evaluation.answers import FLOOR, MARGIN, answers, keep_answers
from brats_helpers.evaluation.experiments import MEAN
from brats_helpers.files import read_json
from brats_helpers.runs import Run
from brats_helpers.scoring.scores import collect

N = 8


def scores(dice, seeds=None):
    cases = {f"P{k}": {MEAN: {"dice": value}} for k, value in enumerate(dice)}
    found = collect(cases, convention="brats2020", simulated=True, not_scored={}, leakage=[])
    return found | {"seeds": seeds or [sum(dice) / len(dice)]}


LOW, HIGH = scores([0.5] * N), scores([0.6] * N)


def test_a_gain_in_every_patient_is_an_answer():
    (sentence,) = answers({"a": LOW, "b": HIGH})
    assert sentence.startswith("b against a: better. Mean Dice of WT, TC and ET 0.600 against 0.500, +0.100 (")
    assert sentence.endswith(", 8 simulated patients to compare on, p = 0.008.")  # 2 of 2^8 patterns of signs
    (sentence,) = answers({"a": HIGH, "b": LOW})
    assert sentence.startswith("b against a: worse.")
    assert answers({"a": LOW}) == ["Not part of this run: there is nothing to compare a with."]


def test_several_comparisons_are_corrected_and_say_so():
    """Six of eight patients gain as much as two lose: p = 0.29, times two for Holm."""
    mixed = scores([0.6] * 6 + [0.4] * 2)
    better, undecided = answers({"a": LOW, "b": HIGH, "c": mixed})
    assert better.startswith("b against a: better.") and "p = 0.016 after Holm's correction for 2" in better
    assert undecided.startswith("c against a: not decided by this run.")
    five = {"a": LOW} | {name: HIGH for name in "bcdefgh"}  # 7 x 0.0078 is above 0.05
    assert all("not decided" in sentence for sentence in answers(five))


def test_too_few_patients_decide_nothing():
    (sentence,) = answers({"a": scores([0.5] * 5), "b": scores([0.6] * 5)})
    assert sentence.startswith("b against a: not decided by this run, which has fewer than 6 patients")


@pytest.mark.parametrize("names", itertools.permutations("ab"))
def test_a_network_that_did_not_learn_decides_nothing(names):
    found = dict(zip(names, (scores([FLOOR - 0.01] * N), HIGH), strict=True))
    (sentence,) = answers(dict(sorted(found.items())))
    assert sentence.startswith(f"b against a: {names[0]} did not learn in the time given (a mean Dice below 0.3).")


def test_a_small_difference_or_seeds_that_disagree_decide_nothing():
    (sentence,) = answers({"a": LOW, "b": scores([0.5 + MARGIN - 0.001] * N)})
    assert sentence.startswith("b against a: not decided by this run.")
    (sentence,) = answers({"a": scores([0.5] * N, seeds=[0.4, 0.6]), "b": scores([0.6] * N, seeds=[0.65, 0.55])})
    assert sentence.startswith("b against a: not decided by this run.")
    (sentence,) = answers({"a": scores([0.5] * N, seeds=[0.4, 0.6]), "b": scores([0.6] * N, seeds=[0.55, 0.65])})
    assert sentence.startswith("b against a: better.")


def test_answers_are_kept_for_the_report_by_question(tmp_path, capsys):
    run, found = Run(tmp_path), {"a": LOW, "b": HIGH}
    keep_answers(run, "04_start.png", found)
    keep_answers(run, "04_few_1.png", {"b": HIGH, "a": LOW}, besides=["Trained for 75 s."])
    kept = read_json(run.answers)
    assert list(kept) == ["04_start.png", "04_few_1.png"] and kept["04_start.png"] == answers(found)
    assert capsys.readouterr().out.splitlines() == sum(kept.values(), [])
    run.forget("04_advanced")
    assert not run.answers.exists()
