"""The loop on tiny patients: it learns, it resumes to the bit, it says what is wrong."""

import csv
import dataclasses
import gc
import json
import math
import os
import shutil
import signal  # noqa: F401, of the programs below
import subprocess
import sys
import time  # noqa: F401
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from brats_helpers import machine
from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.training import loop as train
from brats_helpers.training.loop import Stopped, fit, lr_factor
from brats_helpers.training.model import PACKAGED_ENCODER, build_model
from brats_helpers.training.preflight import Preflight, measure
from brats_helpers.training.steps import gradients
from tests.tiny_training import HOW, SETTINGS, fit_tiny


@pytest.fixture(scope="module")
def prepared(tiny_patients, tmp_path_factory):
    return prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)


def _weights(folder, name="last.pt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def _same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """An uninterrupted training of three epochs."""
    folder = tmp_path_factory.mktemp("whole")
    fit_tiny(prepared, folder)
    return folder


def test_it_learns(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, epochs=8, slices_per_epoch=64, batch_size=8)
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert max(row["dice_WT"] for row in history) > 0.8
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [float(row["dice_WT"]) for row in rows] == [row["dice_WT"] for row in history]
    means = [(row["dice_WT"] + row["dice_TC"] + row["dice_ET"]) / 3 for row in history]
    assert _weights(tmp_path, "best.pt")["epoch"] == 1 + means.index(max(means))


def test_the_seed_decides_whatever_the_number_of_workers(prepared, whole, tmp_path):
    fit_tiny(prepared, tmp_path, {"workers": 2})
    assert _same(_weights(tmp_path)["model"], _weights(whole)["model"])
    other = tmp_path / "other"
    fit_tiny(prepared, other, seed=1)
    assert not _same(_weights(other)["model"], _weights(whole)["model"])


def test_stopped_after_an_epoch_and_started_again_it_ends_to_the_bit_the_same(prepared, whole, tmp_path):
    def stop_after_two(history):
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="stopped; run this again, and it goes on") as stopped:
        fit_tiny(prepared, tmp_path, {"follow": stop_after_two})
    assert stopped.value._render_traceback_() == [str(stopped.value)]  # all that a notebook shows
    history = fit_tiny(prepared, tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    first, second = _weights(tmp_path), _weights(whole)
    assert _same(first["model"], second["model"]) and _same(first["averaged"], second["averaged"])
    assert fit_tiny(prepared, tmp_path) == history  # finished: nothing more is done


def test_a_stopped_training_leaves_nothing_in_the_memory(prepared, tmp_path, monkeypatch):
    """Although a notebook keeps the error."""
    networks = []

    def build(**kwargs):
        network = build_model(**kwargs)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(train, "build_model", build)
    with pytest.raises(Stopped) as stopped:
        fit_tiny(prepared, tmp_path, {"follow": _stop})
    gc.collect()
    assert stopped.value.__traceback__ and [network() for network in networks] == [None]


def test_another_limit_of_time_does_not_throw_a_training_away(prepared, tmp_path, capsys):
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"follow": _stop}, minutes=50)
    assert [row["epoch"] for row in fit_tiny(prepared, tmp_path, minutes=40)] == [1, 2, 3]
    assert "going on after epoch 1 of 3" in capsys.readouterr().out


def test_killed_after_the_last_epoch_before_its_checkpoint_it_repeats_it(prepared, whole, tmp_path, monkeypatch):
    def killed(path, content):
        if path.name == "last.pt" and content["state"]["epoch"] == 3:
            raise KeyboardInterrupt
        _save_file(path, content)

    _save_file = train.save_file
    monkeypatch.setattr(train, "save_file", killed)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path)
    monkeypatch.setattr(train, "save_file", _save_file)
    assert len(fit_tiny(prepared, tmp_path)) == len(pd.read_csv(tmp_path / "history.csv")) == 3
    assert (tmp_path / "preflight.json").exists() and _same(_weights(tmp_path)["model"], _weights(whole)["model"])


def test_stopped_within_an_epoch_it_goes_on_from_there(prepared, whole, tmp_path, monkeypatch, capsys):
    """`last.pt` is written after every step: five times in the first epoch of four, then the second of two more."""
    written = []

    def stop_at_seven(path, content):
        _save_file(path, content)
        written.append(path.name)
        if written.count("last.pt") == 7:
            raise KeyboardInterrupt

    _save_file = train.save_file
    monkeypatch.setattr(train, "save_file", stop_at_seven)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"checkpoint_minutes": 1e-6})
    monkeypatch.setattr(train, "save_file", _save_file)
    saved = _weights(tmp_path)
    assert torch.__version__.startswith(saved["versions"]["torch"]) and len(saved["fingerprint"]) == 16
    fit_tiny(prepared, tmp_path)
    assert "going on after epoch 1 of 3 and 2 of 4 steps" in capsys.readouterr().out
    first, second = _weights(tmp_path), _weights(whole)
    assert _same(first["model"], second["model"]) and _same(first["averaged"], second["averaged"])


def test_a_checkpoint_of_an_older_suite_is_left_alone_and_says_why(prepared, tmp_path, capsys):
    train.save_file(tmp_path / "checkpoints" / "last.pt", {"rng": torch.zeros(1)})
    fit_tiny(prepared, tmp_path, epochs=1)
    assert "is no checkpoint of this suite" in capsys.readouterr().out


def _program(text, *arguments, processes=None):
    """Run a Python program that has this module's names, in one process or in several of torchrun; its output."""
    head = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from tests.training.test_loop import *
torch.set_num_threads(1)
prepared = prepare(find_cases(sys.argv[1]), cache_dir=Path(sys.argv[2]) / "cache", workers=1)
"""
    place = Path(arguments[1])
    place.mkdir(parents=True, exist_ok=True)
    (place / "program.py").write_text(head + text)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    command = [sys.executable, *start, place / "program.py", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


KILLED = """
import random
kills, seconds, random = int(sys.argv[3]), [], random.Random(0)

def child(folder):
    process = os.fork()
    if not process:
        fit_tiny(prepared, Path(sys.argv[2]) / folder, {"checkpoint_minutes": 1e-6}, epochs=4)
        os._exit(0)
    return process

started = time.monotonic()
assert os.waitpid(child("whole"), 0)[1] == 0
whole_s = time.monotonic() - started
for k in range(kills):
    process = child("killed")
    time.sleep(random.uniform(0, whole_s / 2))
    os.kill(process, signal.SIGKILL)
    print("killed", os.waitpid(process, 0)[1] == signal.SIGKILL)
    last = Path(sys.argv[2], "killed", "checkpoints", "last.pt")
    if last.exists():
        torch.load(last, weights_only=True)
assert os.waitpid(child("killed"), 0)[1] == 0
"""


def test_killed_at_random_moments_it_ends_to_the_bit_the_same(tiny_patients, tmp_path):
    """The moments fall into steps, validations and the writing of checkpoints, one of which follows every step."""
    kills = int(os.environ.get("TEST_KILLS", 3))
    said = _program(KILLED, tiny_patients, tmp_path, str(kills))
    assert "killed True" in said
    whole, killed = (_weights(tmp_path / name) for name in ("whole", "killed"))
    assert whole["state"]["epoch"] == killed["state"]["epoch"] == 4
    assert _same(whole["model"], killed["model"]) and _same(whole["averaged"], killed["averaged"])
    losses = [[row["train_loss"] for row in saved["state"]["history"]] for saved in (whole, killed)]
    assert losses[0] == losses[1]


SHARED_OUT = """
from brats_helpers import machine
machine.choose_precision = lambda device: "no"
train.train_mode = lambda model, frozen_statistics: model.eval()
changes = {"class_weights": (1, 2, 3, 4), "epochs": 3, "batch_size": 6, "slices_per_epoch": 24}
fit_tiny(prepared, Path(sys.argv[2]), **changes, frozen_epochs=1, unfreeze_epochs=1)
"""


def test_two_processes_train_as_one(tiny_patients, tmp_path):
    """With the same batch, shared out: the same losses and validation figures, within rounding.

    BatchNorm keeps its statistics here: what makes it see the whole batch, SyncBatchNorm, exists on GPUs only.
    """
    for folder, processes in ("one", None), ("two", 2):
        _program(SHARED_OUT, tiny_patients, tmp_path / folder, processes=processes)
    one, two = (_weights(tmp_path / folder)["state"]["history"] for folder in ("one", "two"))
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss", "lr", *(f"dice_{name}" for name in train.STRUCTURES)):
            assert second[name] == pytest.approx(first[name], rel=2e-3, abs=2e-3), (first["epoch"], name)
    assert one[-1]["dice_WT"] > 0.2  # it did learn


def test_synchronised_batchnorm_is_the_same_network(prepared):
    network = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).eval()
    image = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(image)
        synchronised = train.convert_sync_batchnorm(network)
        assert torch.equal(synchronised(image), before)
    kinds = {type(module) for module in synchronised.modules()}
    assert torch.nn.SyncBatchNorm in kinds and torch.nn.BatchNorm2d not in kinds


def _stop(history):
    raise KeyboardInterrupt


def _needs_memory(monkeypatch, fits, *, training=True):
    """Let every network run out of memory when it gets more than `fits` slices; the batches that it got.

    `training`: in training, else in validation.
    """
    seen = []

    def build(**kwargs):
        network = build_model(**kwargs)
        network.register_forward_pre_hook(remember)
        return network

    def remember(network, inputs):
        if network.training == training:
            seen.append(len(inputs[0]))
            if seen[-1] > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(train, "build_model", build)
    return seen


def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one(prepared, tmp_path, monkeypatch, capsys):
    seen = _needs_memory(monkeypatch, fits=3)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"follow": _stop}, batch_size=8, epochs=2)
    assert capsys.readouterr().out.count("⚠️ out of memory: going on with 2 slices at a time") == 1
    assert seen[:3] == [8, 4, 2] and set(seen[2:]) == {2}
    # Two steps of 8 slices in four pieces each, and before them four steps that were measured.
    assert len(seen) == 2 + 4 * 4 + 2 * 4
    assert len(_weights(tmp_path)["optimizer"]["state"]) and _weights(tmp_path)["optimizer"]["state"][0]["step"] == 2
    assert list(_weights(tmp_path)["state"]["pieces"].values()) == [2]
    assert json.loads((tmp_path / "preflight.json").read_text())["slices_at_a_time"] == 2

    seen.clear()  # on the same device it is not tried again
    fit_tiny(prepared, tmp_path, batch_size=8, epochs=2)
    assert set(seen) == {2}


def test_out_of_memory_in_validation_halves_it_too(prepared, tmp_path, monkeypatch):
    seen = _needs_memory(monkeypatch, fits=3, training=False)
    history = fit_tiny(prepared, tmp_path, epochs=1)
    assert seen[:2] == [8, 4] and set(seen[2:]) == {2} and history[0]["dice_WT"] >= 0


def test_gradients_in_pieces_are_those_of_the_batch():
    """For a loss that is a mean over slices, to rounding."""
    model = torch.nn.Conv2d(2, 4, 3, padding=1)
    images, masks = torch.randn(6, 2, 8, 8), torch.randint(0, 4, (6, 8, 8))
    accelerator = Accelerator(cpu=True)

    def loss_of(logits, masks):
        return torch.nn.functional.cross_entropy(logits.float(), masks)

    found = []
    for piece in (6, 4, 1):
        loss = gradients(model, loss_of, images, masks, accelerator, piece)
        found.append((loss, model.weight.grad.clone()))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(gradient, found[0][1], rtol=2e-2, atol=1e-3)


def test_a_slice_that_does_not_fit_is_a_clear_error(prepared, tmp_path, monkeypatch):
    _needs_memory(monkeypatch, fits=0)
    with pytest.raises(MemoryError, match="one slice alone.*smaller encoder"):
        fit_tiny(prepared, tmp_path)


def test_other_settings_start_afresh_and_say_what_differs(prepared, whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    fit_tiny(prepared, tmp_path, lr=1e-3, epochs=1)
    out = capsys.readouterr().out
    assert "epochs 3 then, 1 now" in out and "lr 0.002 then, 0.001 now" in out and "starting afresh" in out
    assert "batch_size" not in out


def test_other_patients_start_afresh(prepared, whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    fit(SETTINGS, prepared[1:3], prepared[3:], tmp_path, **HOW)
    assert "train_cases" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_it_and_names_the_slices(prepared, tmp_path):
    broken = prepared[0].images.astype(np.float16)
    broken[:] = np.nan
    cases = [dataclasses.replace(prepared[0], images=broken)]
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 0.*Tiny_0 slice \d+.*lower lr"):
        fit(SETTINGS, cases, prepared[3:], tmp_path, **HOW)


def test_a_gradient_that_is_not_finite_stops_it_before_it_reaches_a_weight(prepared, tmp_path, monkeypatch):
    def broken(model, *given):
        loss = gradients(model, *given)
        next(model.parameters()).grad[0] = math.nan
        return loss

    monkeypatch.setattr(train, "gradients", broken)
    with pytest.raises(FloatingPointError, match=r"the loss or its gradient is not finite.*lower lr\.$"):
        fit_tiny(prepared, tmp_path, {"checkpoint_minutes": 1e-6})
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def test_patience_stops_it(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, lr=1e-30, epochs=20, patience=2)  # only statistics move: no lasting progress
    best = _weights(tmp_path, "best.pt")["epoch"]
    assert len(history) == best + 2 < 20


def test_minutes_stop_it_and_bring_the_learning_rate_down(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, epochs=1000, minutes=0.05)
    assert 1 <= len(history) < 1000
    assert history[-1]["seconds"] < 3 + 3  # one validation may come after
    assert history[-1]["lr"] < 0.3 * SETTINGS.lr


def test_without_averaging_the_weights_themselves_are_kept(prepared, tmp_path):
    fit_tiny(prepared, tmp_path, epochs=1, ema=0.0)
    assert _same(_weights(tmp_path, "best.pt")["model"], _weights(tmp_path)["model"])


def test_frozen_epochs_leave_the_encoder_alone(prepared, tmp_path):
    fit_tiny(prepared, tmp_path / "a", epochs=1, frozen_epochs=1, ema=0.0)
    fit_tiny(prepared, tmp_path / "b", epochs=1, frozen_epochs=1, ema=0.0, lr=1e-4)
    a, b = (_weights(tmp_path / name)["model"] for name in "ab")
    encoder = [key for key in a if key.startswith("encoder.")]
    assert all(torch.equal(a[key], b[key]) for key in encoder)
    assert not _same(a, b)


def test_pretrained_statistics_stay_and_others_are_learned(prepared, tmp_path):
    imagenet = {"encoder": PACKAGED_ENCODER, "encoder_weights": "imagenet"}
    for folder, changes in (("pretrained", imagenet), ("random", {})):
        fit_tiny(prepared, tmp_path / folder, epochs=1, slices_per_epoch=4, **changes)
    key = "encoder.model.bn1.running_mean"
    pretrained = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).state_dict()[key]
    assert torch.equal(_weights(tmp_path / "pretrained")["model"][key], pretrained)
    assert _weights(tmp_path / "random")["model"][key].any()  # 0 before training


def test_the_encoder_comes_free_from_the_deepest_layers_on():
    """Two frozen epochs, then two in which a third and two thirds of the layers are free, then all."""
    settings = dataclasses.replace(SETTINGS, frozen_epochs=2, unfreeze_epochs=2)
    shares = [train.frozen_share(epoch, settings) for epoch in range(1, 7)]
    assert shares == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0])
    plain = dataclasses.replace(SETTINGS, frozen_epochs=1)
    assert [train.frozen_share(epoch, plain) for epoch in (1, 2)] == [1, 0]


def test_memory_is_the_process_s_own(tmp_path):
    before = machine.used_memory_gib(torch.device("cpu"))
    kept = np.ones(2**27, np.uint8)
    assert machine.used_memory_gib(torch.device("cpu")) - before == pytest.approx(2**-3, abs=0.02)
    np.save(tmp_path / "mapped.npy", kept)
    assert int(np.load(tmp_path / "mapped.npy", mmap_mode="r").sum()) == 2**27  # every page of it is read
    assert machine.used_memory_gib(torch.device("cpu")) - before == pytest.approx(2**-3, abs=0.02)


def test_the_cost_is_predicted_and_then_measured(prepared, tmp_path, capsys, monkeypatch):
    plans = []
    monkeypatch.setattr(train, "measure", lambda *given, **how: plans.append(measure(*given, **how)) or plans[-1])
    fit_tiny(prepared, tmp_path, epochs=2, slices_per_epoch=64, unfreeze_epochs=1)
    assert plans[0].shares == [0.5, 0.0] and plans[0].step_s > 0 < plans[0].frozen_step_s
    report = json.loads((tmp_path / "preflight.json").read_text())
    predicted, measured = report["predicted"], report["measured"]
    assert report["steps_per_epoch"] == 16 and report["deterministic"] and report["processes"] == 1
    assert set(predicted) == set(measured) and predicted["epochs"] == measured["epochs"] == 2
    assert predicted["seconds"] == pytest.approx(2 * predicted["seconds_per_epoch"])
    assert predicted["seconds"] == pytest.approx(measured["seconds"], rel=0.9)
    assert 1 <= measured["memory_gib"] / predicted["memory_gib"] < 1.3
    assert "expected: 2 epochs of 16 steps" in capsys.readouterr().out


PLAN = Preflight(
    facts={"device": "CPU"},
    batch_size=4,
    piece=4,
    steps=10,
    shares=[1.0, 0.5, 0.0],
    limit_s=math.inf,
    step_s=2.0,
    frozen_step_s=1.0,
    validation_s=5.0,
    memory_gib=1.0,
)


def test_an_epoch_that_the_clock_cut_short_does_not_count_as_one():
    rows = [{"epoch": k, "seconds": s, "slices_per_s": 2.0, "memory_gib": 1.0} for k, s in ((1, 20.0), (2, 31.0))]
    timed = dataclasses.replace(PLAN, limit_s=30)
    assert timed.report(rows, 4)["measured"]["seconds_per_epoch"] == 20
    assert PLAN.report(rows, 4)["measured"]["seconds_per_epoch"] == 15.5
    assert "seconds_per_epoch" not in dataclasses.replace(PLAN, limit_s=10).report(rows[:1], 4)["measured"]


def test_epochs_cost_what_is_frozen_in_them():
    # Ten steps of 1 s, of 1.5 s, of 2 s, and 5 s of validation each.
    assert [PLAN.epochs_s(k, k) for k in (1, 2, 3)] == [15, 20, 25]
    assert PLAN.epochs_s(1, 3) == PLAN.predicted()["seconds"] == 60 and PLAN.epochs_s(4, 3) == 0
    assert PLAN.predicted()["slices_per_s"] == 3 * 10 * 4 / 45
    short = dataclasses.replace(PLAN, limit_s=30).predicted()
    assert short["epochs"] == 2 and short["seconds"] == 30  # the second epoch is cut short


def test_the_time_left_goes_by_the_last_epoch_and_what_is_to_come():
    # The second epoch took 30 s instead of 20, so the third will take 37.5 instead of 25.
    history = [{"epoch": 1, "seconds": 30}, {"epoch": 2, "seconds": 60}]
    assert PLAN.left_s(history) == 37.5
    assert dataclasses.replace(PLAN, limit_s=70).left_s(history) == 10


def test_a_hopeless_training_says_so_before_it_begins(capsys):
    """All 369 patients, 20 epochs, at 10 slices a second: 51,200 slices take 85 minutes an epoch."""
    dataclasses.replace(PLAN, steps=3200, shares=[0.0] * 20, step_s=1.6, validation_s=100).announce()
    assert "⚠️ 29 h 00 min is longer than a session lasts" in capsys.readouterr().out
    PLAN.announce()
    assert "⚠️" not in capsys.readouterr().out


def test_a_tracker_that_is_not_installed_is_named(prepared, tmp_path):
    with pytest.raises(ValueError, match="tracker 'tensorbord' is not installed: pip install tensorbord"):
        fit_tiny(prepared, tmp_path, {"tracker": "tensorbord"})


def test_tensorboard_gets_every_epoch(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit_tiny(prepared, tmp_path, {"tracker": "tensorboard"}, epochs=2)
    events = EventAccumulator(str(next(tmp_path.glob("brats/events*")).parent)).Reload().Scalars("dice_WT")
    assert [event.step for event in events] == [1, 2]
    assert [event.value for event in events] == pytest.approx([row["dice_WT"] for row in history])


def test_determinism_is_asked_of_torch_by_parameter():
    for on in (True, False):
        machine.set_deterministic(on)
        assert torch.are_deterministic_algorithms_enabled() is on
        assert torch.backends.cudnn.benchmark is not on


def test_nobody_watches_a_test():
    assert machine.watched() is False


def test_the_learning_rate_rises_and_falls():
    assert lr_factor(0, 0.05) < 0.05 and lr_factor(0.05, 0.05) == 1
    assert lr_factor(0.525, 0.05) == pytest.approx(0.5) and lr_factor(1, 0.05) == pytest.approx(0)


def test_validation_is_dice_per_patient_over_the_volume(prepared):
    """A network that answers class 3 wherever the first channel is above a bound, scored here voxel by voxel."""

    class Bound(torch.nn.Module):
        def forward(self, images):
            above = (images[:, :1] > 1.0).float() * 20
            return torch.cat([10 - above, above * 0, above * 0, above - 10], dim=1)

    from accelerate import Accelerator

    from brats_helpers.training.dataset import Slices, make_loader
    from brats_helpers.training.losses import CrossEntropyDice

    loader = make_loader(Slices(prepared, context_slices=0), batch_size=7, workers=0)
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1))
    scores = train.validate(Bound(), loader, len(prepared), criterion, Accelerator(cpu=True), 3)
    expected = []
    for case in prepared:
        pred, truth = np.asarray(case.images[:, 0]) > 1.0, np.asarray(case.labels) > 0
        expected.append(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))
    assert scores["dice_WT"] == pytest.approx(np.mean(expected)) and 0 < scores["dice_WT"] < 1
    assert scores["dice_NCR"] == 0
