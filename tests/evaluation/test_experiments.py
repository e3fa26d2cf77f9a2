"""Experiments: arms that take turns, shared where two questions ask for the same, scored on validation patients."""

import dataclasses

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
    backbones,
    hold_out,
    merged,
    rounds_of_few,
    starting_from,
)
from brats_helpers.evaluation.networks import load_network
from brats_helpers.labels import MODALITIES, DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import ENOUGH_PAIRS as ENOUGH
from brats_helpers.training.loop import fit
from brats_helpers.training.model import PACKAGED_ENCODER, build_model
from brats_helpers.training.settings import DECODER
from tests.tiny_training import SETTINGS, fit_tiny


def scores(dice, prefix="P"):
    cases = {f"{prefix}{k}": {MEAN: {"dice": value}} for k, value in enumerate(dice)}
    found = collect(cases, convention="brats2020", simulated=True, not_scored={}, leakage=[])
    return found | {"seeds": [float(np.mean(dice))]}


@pytest.fixture(scope="module")
def many(tiny_patients):
    """Twenty patients that differ in their IDs alone."""
    packed = pack(find_cases(tiny_patients)[0])
    return [dataclasses.replace(packed, id=f"P{k:02}") for k in range(20)]


def ids(cases):
    return [case.id for case in cases]


def test_patients_to_compare_on_are_drawn_with_the_seed_from_those_to_train_on(many):
    train, val = many[2:], many[:2]
    left, scored = hold_out(train, val, n=8, seed=0, groups={})
    assert len(scored) == 8 and ids(scored)[:2] == ["P00", "P01"]
    assert sorted(ids(left) + ids(scored)) == ids(many) and ids(left) == sorted(ids(left))
    assert ids(hold_out(train, val, n=8, seed=0, groups={})[1]) == ids(scored)
    assert ids(hold_out(train, val, n=8, seed=1, groups={})[1]) != ids(scored)
    assert hold_out(train, val, n=2, seed=0, groups={}) == (train, val)  # enough already
    assert len(hold_out(train[:5], val, n=8, seed=0, groups={})[0]) == 3  # at least half is left to learn from


def test_no_person_is_in_both_training_and_comparison(many):
    groups = {case.id: f"person {k // 4}" for k, case in enumerate(many)}
    for seed in range(5):
        left, scored = hold_out(many[4:], many[:4], n=8, seed=seed, groups=groups)
        assert not {groups[name] for name in ids(left)} & {groups[name] for name in ids(scored)}


def test_the_few_training_patients_are_drawn_with_the_seed(many):
    train, scored = many[ENOUGH:], many[:ENOUGH]
    drawn = [ids(rounds_of_few(train, scored, n=2, seed=seed, groups={})[0][0]) for seed in range(8)]
    assert len({*map(tuple, drawn)}) > 4 and all({*pair} <= {*ids(train)} for pair in drawn)
    ((few, chosen_by, compared),) = rounds_of_few(train, scored, n=2, seed=0, groups={})
    assert few == chosen_by and compared == scored
    assert rounds_of_few(train, scored, n=15, seed=0, groups={}) == []


def test_with_few_patients_to_compare_on_each_is_left_out_once(many):
    a, b, c, d = many[:4]
    rounds = rounds_of_few([a, b, c], [d], n=2, seed=0, groups={})
    assert len(rounds) == 4 and ids(rounds[0][2]) == ["P03"]
    assert {case.id for *_, test in rounds for case in test} == {"P00", "P01", "P02", "P03"}
    assert all(len(few) == 2 and few == by and test[0] not in few for few, by, test in rounds)
    assert rounds_of_few([a, b, c], [d], n=4, seed=0, groups={}) == []  # rather than three called four
    one_person = {a.id: "A", d.id: "A"}
    assert sorted(ids(rounds_of_few([a, b, c], [d], n=2, seed=0, groups=one_person)[0][0])) == ["P01", "P02"]
    assert len(rounds_of_few(many, [], n=1, seed=0, groups={})) == ENOUGH  # however many patients there are


def test_rounds_are_merged_by_patient():
    one, two = {"a": scores([0.2])}, {"a": scores([0.4], prefix="Q")}
    together = merged([one, two])["a"]
    assert together["summary"][MEAN]["dice"]["mean"] == pytest.approx(0.3)
    assert together["seeds"] == pytest.approx([0.3])


@pytest.fixture(scope="module")
def tried(tiny_patients, tmp_path_factory):
    """Two questions that share an arm, and the trainings in the order of their turns."""
    cases = prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)
    turns = []

    def counting(settings, *args, **how):
        turns.append(settings.epochs)
        return fit(settings, *args, **how)

    run = Run(tmp_path_factory.mktemp("run"))
    bench = Bench(run=run, questions=["start"], device=torch.device("cpu"), workers=0, simulated=True, turn_s=0.0)
    arms = {"two epochs": dataclasses.replace(SETTINGS, epochs=2), "three": dataclasses.replace(SETTINGS, epochs=3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "fit", counting)
        first = bench.try_out(arms, cases[:2], cases[2:3], cases[2:])
        second = bench.try_out({"the same": arms["two epochs"]}, cases[:2], cases[2:3], cases[2:])
    return bench, arms, first, second, turns, cases


def test_arms_take_turns(tried):
    """Of an epoch each here; the last turn of each finds its training finished."""
    *_, turns, _ = tried
    assert turns == [2, 3, 2, 3, 2, 3, 3]


def test_no_turn_follows_the_last_epoch(tried, tmp_path, monkeypatch):
    """An epoch here passes the limit; without one, another turn would find the training finished."""
    *_, cases = tried
    calls = []
    monkeypatch.setattr(experiments, "fit", lambda *args, **how: calls.append(1) or fit(*args, **how))
    how = {"questions": [], "device": torch.device("cpu"), "workers": 0, "simulated": True, "turn_s": 0.0}
    arms = {"short": dataclasses.replace(SETTINGS, epochs=9, minutes=1e-6)}
    Bench(run=Run(tmp_path), **how).try_out(arms, cases[:2], cases[2:3], cases[2:])
    assert len(calls) == 1


def test_turns_change_nothing_but_the_order(tried, tmp_path):
    """Half of an arm's training in turns ends where it ends in one go."""
    bench, arms, (histories, _), *_, cases = tried
    alone = fit(arms["three"], cases[:2], cases[2:3], tmp_path, device=bench.device, workers=0,
                checkpoint_minutes=0, deterministic=False, tracker="none")  # fmt: skip
    for column in ("train_loss", "dice_WT", "lr"):
        assert histories["three"][column].tolist() == pytest.approx([row[column] for row in alone])


def test_an_arm_that_two_questions_share_is_trained_once(tried):
    _, _, (histories, metrics), (_, again), _, _ = tried
    assert {name: len(history) for name, history in histories.items()} == {"two epochs": 2, "three": 3}
    assert again["the same"] == metrics["two epochs"]


def test_an_experiment_that_was_scored_is_not_trained_again(tried, monkeypatch, capsys):
    bench, arms, (histories, metrics), _, _, cases = tried
    monkeypatch.setattr(experiments, "fit", None)
    later = dataclasses.replace(bench, _done={})
    again, found = later.try_out(arms, cases[:2], cases[2:3], cases[2:])
    assert capsys.readouterr().out == "two epochs: scored before\nthree: scored before\n"
    assert found == metrics and all(again[name].equals(history) for name, history in histories.items())
    for folder in (bench.run.folder / "experiments").glob("*/checkpoints"):
        assert [path.name for path in folder.iterdir()] == ["best.pt"]


def test_a_question_that_is_not_asked_prints_its_cost_and_the_command(tried, capsys):
    bench, arms, *_, cases = tried
    arms = {name: dataclasses.replace(settings, minutes=10.0) for name, settings in arms.items()}
    assert bench.ask("backbones", arms, cases[:2], cases[2:3], cases[2:]) is None
    assert capsys.readouterr().out == (
        "Not part of this run: 2 trainings of 10 min 00 s, 20 min 00 s in all. To run them: ./run_all.sh --run"
        f" {bench.run.folder} --only 04 -p questions start,backbones\n"
    )


def test_seeds_are_averaged_by_patient(tried, monkeypatch):
    bench, arms, *_, cases = tried
    both = dataclasses.replace(bench, seeds=2, _done={})
    monkeypatch.setattr(both.__class__, "_train_in_turns", lambda *args: None)

    def score(self, key, own, settings, scored):
        self._done[key] = pd.DataFrame(), self._collect({"P": {MEAN: {"dice": settings.seed + 1.0}}})

    monkeypatch.setattr(both.__class__, "_score", score)
    arms = {"new": dataclasses.replace(SETTINGS, epochs=9)}
    _, found = both.try_out(arms, cases[:2], cases[2:3], cases[2:])
    assert found["new"]["seeds"] == [1.0, 2.0] and found["new"]["cases"]["P"][MEAN]["dice"] == 1.5


def test_an_experiment_is_repeated_if_patients_weights_or_the_machine_changed(tried, tmp_path, monkeypatch):
    bench, arms, _, _, _, (a, b, c, d) = tried
    (settings, _), known = arms.values(), tmp_path / "known.pt"
    known.write_bytes(b"one")
    on_known = dataclasses.replace(settings, encoder_weights=str(known))
    keys = [bench._key(settings, [a, b], [c], [d]), bench._key(on_known, [a, b], [c], [d])]
    assert keys[0] == bench._key(settings, [a, b], [c], [d])
    counts = d.counts.copy()
    counts[0] += [-1, 1, 0, 0]  # a corrected segmentation of a patient to compare on
    keys.append(bench._key(settings, [a, b], [c], [dataclasses.replace(d, counts=counts)]))
    known.write_bytes(b"another")
    keys.append(bench._key(on_known, [a, b], [c], [d]))
    monkeypatch.setattr(experiments.machine, "choose_precision", lambda device: "fp16")
    keys.append(bench._key(settings, [a, b], [c], [d]))
    assert len(set(keys)) == len(keys)


def best(bench, name):
    return next((bench.run.folder / "experiments").glob(f"{name}-*")) / "checkpoints" / "best.pt"


def test_the_scores_are_those_of_the_whole_volume(tried):
    """Against the confusion of the predicted volume with the reference, counted here."""
    bench, _, (_, metrics), _, _, cases = tried
    network = load_network(best(bench, "three"), device=torch.device("cpu"))
    soft = experiments.predict([network], cases[3], channels=MODALITIES, flips=False)
    pred, truth = cases[3].to_volume(soft.argmax(1).astype(np.uint8)), cases[3].to_volume(np.asarray(cases[3].labels))
    p, t = pred > 0, truth > 0
    found = metrics["three"]["cases"]["Tiny_3"]
    assert found["WT"]["dice"] == pytest.approx(2 * (p & t).sum() / (p.sum() + t.sum()))
    assert found[MEAN]["dice"] == pytest.approx(sum(found[region]["dice"] for region in ("WT", "TC", "ET")) / 3)


def test_weights_that_have_seen_a_patient_to_compare_on_are_refused_before_anything_is_trained(tried, monkeypatch):
    monkeypatch.setattr(experiments, "fit", None)
    bench, arms, _, _, _, cases = tried
    settings = dataclasses.replace(arms["three"], encoder_weights=str(best(bench, "three")))
    with pytest.raises(DataError, match="Tiny_0: the weights to start from were trained on"):
        bench.try_out({"other": SETTINGS, "again": settings}, cases[1:2], cases[2:3], [*cases[3:], cases[0]])


def test_a_network_to_start_from_brings_its_encoder_and_decoder(tried, tmp_path):
    known = str(best(tried[0], "three"))
    other = dataclasses.replace(SETTINGS, encoder="resnet18", decoder=DECODER, lr=0.5)
    start = starting_from(known, other)
    assert start == dataclasses.replace(SETTINGS, encoder_weights=known, lr=0.5)
    assert starting_from("simulated", other).encoder == PACKAGED_ENCODER
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "encoder.pt")
    with pytest.raises(DataError, match="encoder.pt holds an encoder alone"):
        starting_from(str(tmp_path / "encoder.pt"), other)


def test_the_table_of_backbones_says_what_each_costs(tried):
    _, arms, (histories, metrics), *_ = tried
    row = backbones(arms, histories, metrics, (4, 32, 64)).loc["three"]
    network = build_model(encoder=SETTINGS.encoder, weights="none", in_channels=4, decoder=SETTINGS.decoder)
    assert row["parameters (M)"] == pytest.approx(sum(p.numel() for p in network.parameters()) / 1e6)
    assert row["slices per second"] == pd.Series(histories["three"]["slices_per_s"]).mean()
    assert row["initial weights"] == "none"


def test_fine_tuning_a_checkpoint_keeps_its_weights_and_who_it_was_trained_on(tried, tmp_path):
    bench, *_, cases = tried
    start = best(bench, "three")
    fit_tiny([*cases[3:]] * 4, tmp_path, encoder_weights=str(start), epochs=1, lr=1e-12, weight_decay=0.0, ema=0.0)
    network, before = (
        load_network(path, device=torch.device("cpu")) for path in (tmp_path / "checkpoints/best.pt", start)
    )
    for name, weight in network.model.named_parameters():  # next to no learning rate
        torch.testing.assert_close(weight, dict(before.model.named_parameters())[name], msg=name)
    assert network.trained_on == before.trained_on | {"Tiny_3"}
    assert network.chosen_by == before.chosen_by | {"Tiny_3"}
    assert network.trained_on | network.chosen_by == {"Tiny_0", "Tiny_1", "Tiny_2", "Tiny_3"}
