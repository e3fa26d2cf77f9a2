"""Experiments: shared where two questions ask for the same, decided only where patients agree."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from brats_helpers.data.cache import pack, prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.evaluation import experiments
from brats_helpers.evaluation.experiments import (
    MEAN,
    Bench,
    answers,
    backbones,
    going_on_from,
    keep_answers,
    merged,
    rounds_of_few,
)
from brats_helpers.evaluation.inference import load_network
from brats_helpers.labels import DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import ENOUGH_PAIRS as ENOUGH
from brats_helpers.training.loop import fit
from brats_helpers.training.model import WeightsError, build_model
from tests.tiny_training import HOW, SETTINGS


def scores(dice, prefix="P"):
    cases = {f"{prefix}{k}": {MEAN: {"dice": value}} for k, value in enumerate(dice)}
    return collect(cases, convention="brats2020", simulated=True, not_scored={}, leakage=[])


def test_an_answer_needs_enough_patients_that_agree():
    low, high = [0.5] * ENOUGH, [0.6] * ENOUGH
    (sentence,) = answers({"a": scores(low), "b": scores(high)})
    assert (
        sentence.startswith("b against a: better.")
        and "0.600 against 0.500, +0.100 (+0.100 to +0.100), 6 simulated patients" in sentence
    )
    (sentence,) = answers({"a": scores(high), "b": scores(low)})
    assert sentence.startswith("b against a: worse.")
    (sentence,) = answers({"a": scores(low[1:]), "b": scores(high[1:])})  # five agree, which may be chance
    assert sentence.startswith("b against a: not decided by this run, which has fewer than 6 patients to score.")
    (sentence,) = answers({"a": scores(low), "b": scores([0.4, 0.7, 0.4, 0.7, 0.4, 0.7])})  # they do not agree
    assert sentence.startswith("b against a: not decided by this run.")
    assert answers({"a": scores(low)}) == ["Not asked by this run: there is nothing to compare a with."]


def test_a_network_that_has_not_started_decides_nothing():
    cases = {
        f"P{k}": {name: {"dice": 0.0 if name == "ET" else 0.9} for name in ("WT", "TC", "ET", MEAN)} for k in range(6)
    }
    fresh = collect(cases, convention="brats2020", simulated=False, not_scored={}, leakage=[])
    (sentence,) = answers({"a": scores([0.5] * ENOUGH), "b": fresh})
    assert sentence.startswith(
        "b against a: not decided by this run: b has not learnt ET yet (a mean Dice below 0.05). "
    )


def test_answers_are_kept_for_the_report_by_question(tmp_path, capsys):
    run, found = Run(tmp_path), {"a": scores([0.5] * ENOUGH), "b": scores([0.6] * ENOUGH)}
    keep_answers(run, "04_start.png", found)
    keep_answers(run, "04_few_1.png", {"b": found["b"], "a": found["a"]})
    kept = json.loads(run.answers.read_text())
    assert list(kept) == ["04_start.png", "04_few_1.png"] and kept["04_start.png"] == answers(found)
    assert capsys.readouterr().out.splitlines() == sum(kept.values(), [])
    run.forget("04_advanced")
    assert not run.answers.exists()


def test_with_few_to_test_everyone_is_left_out_once(tiny_patients):
    a, b, c, d = (pack(case) for case in find_cases(tiny_patients))
    rounds = rounds_of_few([a, b], [c], [d], n=2, groups={})
    assert [[case.id[-1] for case in test] for *_, test in rounds] == [["3"], ["2"], ["0"], ["1"]]
    assert [[case.id[-1] for case in train] for train, *_ in rounds] == [["0", "1"], ["0", "1"], ["1", "2"], ["0", "2"]]
    assert all(val == train for train, val, _ in rounds)
    assert rounds_of_few([a, b], [c], [d], n=4, groups={}) == []  # rather than to learn from three and call it four
    one_person = {a.id: "A", d.id: "A"}
    assert [case.id[-1] for case in rounds_of_few([a, b], [c], [d], n=2, groups=one_person)[0][0]] == ["1", "2"]
    assert len(rounds_of_few([a] * 20, [b] * 20, [c], n=1, groups={})) == ENOUGH  # however many patients there are
    enough = [d] * ENOUGH
    assert rounds_of_few([a, b], [c], enough, n=1, groups={}) == [([a], [a], enough)]
    assert rounds_of_few([a, b], [c], enough, n=3, groups={}) == []


def test_rounds_are_merged_by_patient():
    one, two = {"a": scores([0.2])}, {"a": scores([0.4], prefix="Q")}
    assert merged([one, two])["a"]["summary"][MEAN]["dice"]["mean"] == pytest.approx(0.3)


@pytest.fixture(scope="module")
def tried(tiny_patients, tmp_path_factory):
    """Two questions that share an experiment, and how many trainings they took."""
    cases = prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)
    trained = []

    def counting(*args, **how):
        trained.append(args[0])
        return fit(*args, **how)

    bench = Bench(folder=tmp_path_factory.mktemp("bench"), device=torch.device("cpu"), workers=0, simulated=True)
    arms = {"one epoch": dataclasses.replace(SETTINGS, epochs=1), "augmented": dataclasses.replace(SETTINGS, epochs=2)}
    again = {"the same": arms["one epoch"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "fit", counting)
        first = bench.try_out(arms, cases[:2], cases[2:3], cases[3:])
        second = bench.try_out(again, cases[:2], cases[2:3], cases[3:])
    return bench, arms, first, second, trained, cases


def test_what_two_questions_share_is_trained_once(tried):
    _, arms, (histories, metrics), (_, again), trained, _ = tried
    assert trained == list(arms.values())
    assert {name: len(history) for name, history in histories.items()} == {"one epoch": 1, "augmented": 2}
    assert again["the same"] == metrics["one epoch"]


def test_an_experiment_that_was_scored_is_not_trained_again(tried, monkeypatch, capsys):
    """By another session in the same folder; what only a training would need is gone."""
    bench, arms, (histories, metrics), _, _, cases = tried
    monkeypatch.setattr(experiments, "fit", None)
    later = Bench(folder=bench.folder, device=bench.device, workers=0, simulated=True)
    told, scores = later.try_out(arms, cases[:2], cases[2:3], cases[3:])
    assert capsys.readouterr().out == "one epoch: scored before\naugmented: scored before\n"
    assert scores == metrics and all(told[name].equals(history) for name, history in histories.items())
    for name in ("one-epoch", "augmented"):
        assert [path.name for path in next(bench.folder.glob(f"{name}-*/checkpoints")).iterdir()] == ["best.pt"]


def test_an_experiment_is_repeated_where_patients_weights_or_the_machine_changed(tried, tmp_path, monkeypatch):
    bench, arms, _, _, _, (a, b, c, d) = tried
    (settings, _), known = arms.values(), tmp_path / "known.pt"
    known.write_bytes(b"one")
    on_known = dataclasses.replace(settings, encoder_weights=str(known))
    keys = [bench._key(settings, [a, b], [c], [d]), bench._key(on_known, [a, b], [c], [d])]
    assert keys[0] == bench._key(settings, [a, b], [c], [d])
    counts = d.counts.copy()
    counts[0] += [-1, 1, 0, 0]  # a corrected segmentation of a test patient
    keys.append(bench._key(settings, [a, b], [c], [dataclasses.replace(d, counts=counts)]))
    known.write_bytes(b"another")
    keys.append(bench._key(on_known, [a, b], [c], [d]))
    monkeypatch.setattr(experiments.machine, "choose_precision", lambda device: "fp16")
    keys.append(bench._key(settings, [a, b], [c], [d]))
    assert len(set(keys)) == len(keys)


def test_the_scores_are_those_of_the_whole_volume(tried):
    """Against the confusion of the predicted volume with the reference, counted here."""
    bench, _, (_, metrics), _, _, cases = tried
    network = load_network(
        next(bench.folder.glob("one-epoch-*")) / "checkpoints" / "best.pt", device=torch.device("cpu")
    )
    soft = experiments.predict([network], cases[3], flips=False)
    pred, truth = cases[3].to_volume(soft.argmax(1).astype(np.uint8)), cases[3].to_volume(np.asarray(cases[3].labels))
    p, t = pred > 0, truth > 0
    found = metrics["one epoch"]["cases"]["Tiny_3"]
    assert found["WT"]["dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    assert found[MEAN]["dice"] == pytest.approx(sum(found[region]["dice"] for region in ("WT", "TC", "ET")) / 3)


def test_patients_that_the_weights_have_seen_do_not_score_and_nobody_is_trained(tried, monkeypatch):
    monkeypatch.setattr(experiments, "fit", None)
    bench, arms, _, _, _, cases = tried
    known = str(next(bench.folder.glob("one-epoch-*")) / "checkpoints" / "best.pt")
    settings = dataclasses.replace(arms["one epoch"], encoder_weights=known)
    with pytest.raises(DataError, match="Tiny_0: the weights to start from were trained on"):
        bench.try_out(
            {"other": dataclasses.replace(SETTINGS, epochs=3), "again": settings},
            cases[1:2],
            cases[2:3],
            [*cases[3:], cases[0]],
        )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"context_slices": 1}, "context_slices 0, not 1: "),
        ({"modalities": ("t1", "flair", "t1ce", "t2")}, "modalities flair,t1,t1ce,t2, not t1,flair,t1ce,t2: "),
    ],
)
def test_a_checkpoint_that_was_shown_something_else_is_no_start(tried, change, said):
    known = next(tried[0].folder.glob("one-epoch-*")) / "checkpoints" / "best.pt"
    start = going_on_from(known, dataclasses.replace(SETTINGS, encoder="resnet18", lr=0.5))
    assert (start.encoder, start.encoder_weights, start.lr) == (SETTINGS.encoder, str(known), 0.5)
    with pytest.raises(DataError, match=said):
        going_on_from(known, dataclasses.replace(SETTINGS, **change))


def test_the_table_of_backbones_says_what_each_costs(tried):
    _, arms, (histories, metrics), *_ = tried
    table = backbones(arms, histories, metrics, (4, 32, 64))
    network = build_model(encoder=SETTINGS.encoder, weights="none", in_channels=4)
    row = table.loc["one epoch"]
    assert row["parameters (M)"] == pytest.approx(sum(p.numel() for p in network.parameters()) / 1e6)
    assert row["slices per second"] == pd.Series(histories["one epoch"]["slices_per_s"]).mean()
    assert row["weights at the start"] == "none"


def test_a_network_goes_on_from_a_checkpoint_and_keeps_who_it_learnt_from(tried, tmp_path):
    bench, *_, cases = tried
    start = next(bench.folder.glob("one-epoch-*")) / "checkpoints" / "best.pt"
    settings = dataclasses.replace(SETTINGS, encoder_weights=str(start), epochs=1, lr=1e-30, ema=0.0)
    fit(settings, cases[3:], cases[3:], tmp_path, **HOW)
    network, before = (
        load_network(path, device=torch.device("cpu")) for path in (tmp_path / "checkpoints/best.pt", start)
    )
    for (
        name,
        weight,
    ) in network.model.named_parameters():  # unchanged by a learning rate of 1e-30
        assert torch.equal(weight, dict(before.model.named_parameters())[name]), name
    assert network.trained_on == {"Tiny_0", "Tiny_1", "Tiny_2", "Tiny_3"}
    with pytest.raises(WeightsError, match="does not fit"):
        build_model(encoder="resnet18", weights=str(start), in_channels=4)
