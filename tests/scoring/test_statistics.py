import json
import math

import numpy as np
import pytest
import scipy.stats

from brats_helpers.labels import DataError
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import FEWEST, compare, holm, interval_text, sign_flip_p, summarise


def one_metric(values):
    return {f"case{i}": {"WT": {"dice": value}} for i, value in enumerate(values)}


def collected(cases, rule="brats2020"):
    return collect(cases, convention=rule, simulated=False, not_scored={}, leakage=[])


def test_summary_by_hand():
    # Of the 27 ways to draw three of three, one gives the mean 0.5 and one 0.9: 3.7 % each, further out than any tail.
    expected = {"mean": 0.7, "median": 0.7, "std": 0.2, "q1": 0.6, "q3": 0.8, "n": 3}
    summary = summarise(one_metric([0.9, 0.5, 0.7]))["WT"]["dice"]
    assert summary.pop("ci95") == pytest.approx([0.5, 0.9])
    assert summary == pytest.approx(expected)


def test_patients_that_the_rule_leaves_out_have_no_part_in_the_summary():
    plain = summarise(one_metric([0.9, 0.5, 0.7]))["WT"]["dice"]
    cases = {case: {"WT": figures["WT"] | {"lesion_f1": 1.0}} for case, figures in one_metric([0.9, 0.5, 0.7]).items()}
    cases["left_out"] = {"WT": {"dice": None, "lesion_f1": 0.0}}
    summary = summarise(cases)["WT"]
    assert summary["dice"] == plain and summary["lesion_f1"]["n"] == 4
    nobody = summarise(one_metric([None, None]))["WT"]["dice"]
    assert nobody.pop("n") == 0 and set(nobody.values()) == {None}
    json.dumps([summary, nobody], allow_nan=False)


def test_interval_of_many_patients_is_the_normal_one():
    values = np.random.default_rng(3).normal(0.8, 0.1, 400)
    low, high = summarise(one_metric(values.tolist()))["WT"]["dice"]["ci95"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


@pytest.mark.parametrize("patients", [6, 12])
def test_interval_of_few_patients_covers_the_mean_as_often_as_it_says(patients):
    values = np.random.default_rng(4).normal(0.8, 0.1, (patients, 2000))
    cases = {f"case{k}": {"WT": dict(enumerate(row))} for k, row in enumerate(values.tolist())}
    intervals = np.array([row["ci95"] for row in summarise(cases)["WT"].values()])
    covered = np.mean((intervals[:, 0] <= 0.8) & (intervals[:, 1] >= 0.8))
    assert 0.935 < covered < 0.965  # plain percentiles: 0.87 of six, 0.91 of twelve


def test_summary_of_few_patients():
    assert summarise({}) == {}
    alone = summarise(one_metric([0.6]))["WT"]["dice"]
    assert alone == {"mean": 0.6, "median": 0.6, "std": 0, "q1": 0.6, "q3": 0.6, "ci95": [0.6, 0.6], "n": 1}
    assert interval_text(alone["ci95"], 1) == interval_text(None, 0) == "no interval"
    assert interval_text([0.25, 0.5], FEWEST) == "0.250 to 0.500"
    assert interval_text([0.25, 0.5], FEWEST - 1) == "no interval"


def test_summary_does_not_depend_on_the_order():
    cases = one_metric([0.1, 0.5, 0.9, 0.4])
    assert summarise(dict(reversed(cases.items()))) == summarise(cases)


def test_compare_by_hand():
    a, b = one_metric([0.5, 0.6, 0.7, None]), one_metric([0.6, 0.8, 1.0, 0.5])
    a["only in a"], b["only in b"] = a["case0"], b["case0"]
    result = compare(collected(a), collected(b))
    assert (result["n"], result["only_a"], result["only_b"]) == (4, ["only in a"], ["only in b"])
    assert (result["rule"], result["convention"]) == ("brats2020", CONVENTIONS["brats2020"])
    # Differences 0.1, 0.2, 0.3: paired, so far narrower than the runs' own intervals. The fourth patient has none.
    difference = result["differences"]["WT"]["dice"]
    assert difference["mean_difference"] == pytest.approx(0.2) and difference["n"] == 3
    assert difference["ci95"] == pytest.approx([0.1, 0.3])


def test_compare_refuses_what_cannot_be_compared():
    a = one_metric([0.5])
    with pytest.raises(DataError, match="different rules, brats2023 and brats2023-MET"):
        compare(collected(a, "brats2023"), collected(a, "brats2023-MET"))
    with pytest.raises(DataError, match="in common"):
        compare(collected(a), collected({"other": a["case0"]}))


def test_the_sign_flip_test_counts_patterns_of_signs():
    assert sign_flip_p([1.0] * 6) == 2 / 2**6  # all alike, or all alike the other way
    # Of the sums of +-1, +-2 and +-3, two are as far from 0 as 1 + 2 + 3; of 1 + 2 - 3 all eight are.
    assert sign_flip_p([1, 2, 3]) == 2 / 8 and sign_flip_p([1, 2, -3]) == 1
    random = np.random.default_rng(1).normal(0.3, 1, 30)
    exact = scipy.stats.ttest_1samp(random, 0).pvalue
    assert sign_flip_p(random) == pytest.approx(exact, abs=0.02)


def test_holms_correction_by_hand():
    """The smallest of three times 3, the next times 2, and none below the one before."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
