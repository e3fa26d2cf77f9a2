"""The loop on tiny patients: it learns, it resumes to the bit, it says what is wrong."""

import csv
import dataclasses
import gc
import json
import os
import signal  # noqa: F401, of the programs below
import subprocess
import sys
import time  # noqa: F401
import weakref
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from brats_helpers import machine
from brats_helpers.evaluation import networks
from brats_helpers.scoring.rules import region_dice
from brats_helpers.training import loop, preflight, progress, session, steps
from brats_helpers.training.dataset import patients
from brats_helpers.training.loop import Stopped, fit, lr_factor
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import build_model
from brats_helpers.training.weights import PACKAGED_ENCODER
from tests.tiny_training import CUBES, HOW, SETTINGS, fit_tiny, same, stop, weights


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """An uninterrupted training of three epochs."""
    folder = tmp_path_factory.mktemp("whole")
    fit_tiny(prepared, folder)
    return folder


def ends_like(folder, whole):
    """Whether a training ended with the same weights, averaged weights and losses as the uninterrupted one."""
    one, other = weights(folder), weights(whole)
    losses = [[row["train_loss"] for row in saved["progress"]["history"]] for saved in (one, other)]
    averaged = [saved["averaged"]["network"] for saved in (one, other)]
    return same(one["model"], other["model"]) and same(*averaged) and losses[0] == losses[1]


def test_training_learns(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, epochs=8, slices_per_epoch=64, batch_size=8)
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert max(row["dice_WT"] for row in history) > 0.8
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [float(row["dice_WT"]) for row in rows] == [row["dice_WT"] for row in history]
    means = [(row["dice_WT"] + row["dice_TC"] + row["dice_ET"]) / 3 for row in history]
    assert weights(tmp_path, "best.pt")["epoch"] == 1 + means.index(max(means))


def test_the_seed_decides_whatever_the_number_of_workers(prepared, whole, tmp_path):
    fit_tiny(prepared, tmp_path, {"workers": 2})
    assert ends_like(tmp_path, whole)
    fit_tiny(prepared, tmp_path / "other", seed=1)
    assert not ends_like(tmp_path / "other", whole)


def test_a_training_stopped_after_an_epoch_ends_with_the_same_bits(prepared, whole, tmp_path):
    with pytest.raises(Stopped, match="stopped; run this again to resume") as stopped:
        fit_tiny(prepared, tmp_path, {"follow": stop})
    assert stopped.value._render_traceback_() == [str(stopped.value)]  # all that a notebook shows
    history = fit_tiny(prepared, tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3] and ends_like(tmp_path, whole)
    assert fit_tiny(prepared, tmp_path) == history  # finished: nothing more is done


def test_a_training_stopped_within_an_epoch_resumes_there(prepared, whole, tmp_path, monkeypatch, capsys):
    """`last.pt` is written after every step: five times in the first epoch of four, then the second of two more."""
    written, original = [], session.save_file

    def stop_at_seven(path, content):
        original(path, content)
        written.append(path.name)
        if written.count("last.pt") == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(session, "save_file", stop_at_seven)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"checkpoint_minutes": 1e-6})
    monkeypatch.setattr(session, "save_file", original)
    saved = weights(tmp_path)
    assert torch.__version__.startswith(saved["versions"]["torch"]) and len(saved["fingerprint"]) == 16
    fit_tiny(prepared, tmp_path)
    assert "resuming after epoch 1 of 3 and 2 steps" in capsys.readouterr().out
    assert ends_like(tmp_path, whole)


@pytest.mark.parametrize("lost", ["best.pt", "history.csv"])
def test_files_agree_again_after_a_kill_between_two_of_them(prepared, tmp_path, monkeypatch, lost):
    """The second epoch is the best, and the kill comes after its `last.pt`, before the file `lost` is written."""
    monkeypatch.setattr(loop, "validate", _scores(0.1, 0.5))
    name = {"best.pt": "save_file", "history.csv": "whole_file"}[lost]
    original, written = getattr(progress, name), []

    def killed(path, *given):
        written.append(path.name)
        if written.count(lost) == 2:
            raise KeyboardInterrupt
        return original(path, *given)

    monkeypatch.setattr(progress, name, killed)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path)
    monkeypatch.undo()
    assert weights(tmp_path)["progress"]["best_epoch"] == 2
    assert weights(tmp_path, "best.pt")["epoch"] == (1 if lost == "best.pt" else 2)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 1

    monkeypatch.setattr(loop, "validate", _scores(0.3))
    history = fit_tiny(prepared, tmp_path)
    assert [row["dice_WT"] for row in history] == [0.1, 0.5, 0.3]
    assert weights(tmp_path, "best.pt")["epoch"] == 2
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 3


def _scores(*wanted):
    """Stands for a validation, with the Dice wanted one after the other."""
    left = list(wanted)

    def validate(*given, **how):
        dice = left.pop(0)
        return {"val_loss": 1.0} | {f"dice_{name}": dice for name in loop.STRUCTURES}

    return validate


def test_a_stopped_training_leaves_nothing_in_the_memory(prepared, tmp_path, monkeypatch):
    """Although a notebook keeps the error."""
    networks = []

    def build(**kwargs):
        network = build_model(**kwargs)
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(session, "build_model", build)
    with pytest.raises(Stopped) as stopped:
        fit_tiny(prepared, tmp_path, {"follow": stop})
    gc.collect()
    assert stopped.value.__traceback__ and [network() for network in networks] == [None]


def program(text, *arguments, processes=None):
    """Run a Python program that has this module's names, in one process or in several of torchrun; its output."""
    head = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]
from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
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


def test_killed_at_random_moments_a_training_ends_with_the_same_bits(tiny_patients, tmp_path):
    """The moments fall into steps, validations and the writing of checkpoints, one of which follows every step."""
    said = program(KILLED, tiny_patients, tmp_path, os.environ.get("TEST_KILLS", "3"))
    assert "killed True" in said and ends_like(tmp_path / "killed", tmp_path / "whole")
    saved = weights(tmp_path / "killed")
    assert saved["progress"]["epoch"] == 4
    assert weights(tmp_path / "killed", "best.pt")["epoch"] == saved["progress"]["best_epoch"]


SHARED_OUT = """
session.train_mode = lambda model, frozen_statistics: model.eval()
changes = {"class_weights": (1, 2, 3, 4), "epochs": 3, "batch_size": 6, "slices_per_epoch": 24}
fit_tiny(prepared, Path(sys.argv[2]), **changes, frozen_epochs=1, unfreeze_epochs=1)
"""


def test_two_processes_train_as_one(tiny_patients, tmp_path):
    """Sharing the same batch, they reach the same losses and validation figures, within rounding.

    BatchNorm keeps its statistics here: what makes it see the whole batch, SyncBatchNorm, exists on GPUs only.
    """
    for folder, processes in ("one", None), ("two", 2):
        program(SHARED_OUT, tiny_patients, tmp_path / folder, processes=processes)
    one, two = (weights(tmp_path / folder)["progress"]["history"] for folder in ("one", "two"))
    assert len(one) == len(two) == 3
    for first, second in zip(one, two, strict=True):
        for name in ("train_loss", "val_loss", "lr", *(f"dice_{name}" for name in loop.STRUCTURES)):
            assert second[name] == pytest.approx(first[name], rel=2e-3, abs=2e-3), (first["epoch"], name)
    assert one[-1]["train_loss"] < one[0]["train_loss"]  # it did learn


def test_synchronised_batchnorm_is_the_same_network():
    network = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).eval()
    image = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(image)
        synchronised = session.convert_sync_batchnorm(network)
        assert torch.equal(synchronised(image), before)
    kinds = {type(module) for module in synchronised.modules()}
    assert torch.nn.SyncBatchNorm in kinds and torch.nn.BatchNorm2d not in kinds


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

    monkeypatch.setattr(session, "build_model", build)
    return seen


def test_out_of_memory_halves_the_batch_and_keeps_the_effective_one(prepared, tmp_path, monkeypatch, capsys):
    seen = _needs_memory(monkeypatch, fits=3)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"follow": stop}, batch_size=8, epochs=2)
    assert capsys.readouterr().out.count("⚠️ out of memory: continuing with 2 slices at a time") == 1
    assert seen[:3] == [8, 4, 2] and set(seen[2:]) == {2}
    # Two steps of 8 slices in four micro-batches each, and before them four steps that were timed.
    assert len(seen) == 2 + 4 * 4 + 2 * 4
    assert weights(tmp_path)["optimizer"]["state"][0]["step"] == 2
    assert list(weights(tmp_path)["progress"]["micro_batch"].values()) == [2]
    assert json.loads((tmp_path / "preflight.json").read_text())["slices_at_a_time"] == 2

    seen.clear()  # on the same device it is not tried again
    fit_tiny(prepared, tmp_path, batch_size=8, epochs=2)
    assert set(seen) == {2}


def test_out_of_memory_in_validation_halves_it_too(prepared, tmp_path, monkeypatch):
    seen = _needs_memory(monkeypatch, fits=3, training=False)
    history = fit_tiny(prepared, tmp_path, epochs=1)
    assert seen[1] == -(-seen[0] // 2) > 3 and max(seen[2:]) == 2 and history[0]["dice_WT"] >= 0


def test_a_slice_that_does_not_fit_is_a_clear_error(prepared, tmp_path, monkeypatch):
    _needs_memory(monkeypatch, fits=0)
    with pytest.raises(MemoryError, match="one slice alone.*smaller encoder"):
        fit_tiny(prepared, tmp_path)


def test_a_loss_that_is_not_finite_stops_training_and_names_the_slices(prepared, tmp_path):
    broken = prepared[0].images.astype(np.float16)
    broken[:] = np.nan
    cases = [dataclasses.replace(prepared[0], images=broken)]
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 0.*Tiny_0 slice \d+.*lower lr"):
        fit(SETTINGS, cases, prepared[3:], tmp_path, **HOW)


def _breaking(monkeypatch, which):
    """Make a gradient of the steps `which`, counted from 0, infinite; the list of steps made so far."""
    original, made = session.gradients, []

    def broken(model, *given, **how):
        loss = original(model, *given, **how)
        if len(made) in which:
            next(model.parameters()).grad[0] = torch.inf
        made.append(loss)
        return loss

    monkeypatch.setattr(session, "gradients", broken)
    for module in (loop, preflight, steps):  # a CPU computes fp16 very slowly: here only its loss scale matters
        monkeypatch.setattr(module, "autocast", lambda device, precision: nullcontext())
    return made


def test_a_gradient_that_is_not_finite_stops_training_before_it_reaches_a_weight(prepared, tmp_path, monkeypatch):
    _breaking(monkeypatch, {0})
    with pytest.raises(FloatingPointError, match=r"the loss or its gradient is not finite.*lower lr\.$"):
        fit_tiny(prepared, tmp_path, {"checkpoint_minutes": 1e-6})
    assert not (tmp_path / "checkpoints" / "last.pt").exists()


def test_under_fp16_a_skipped_step_changes_neither_weights_nor_average(prepared, tmp_path, monkeypatch):
    """Of two epochs of one step each, the second is skipped."""
    made = _breaking(monkeypatch, {1})
    states = []

    def remember(history):
        saved = weights(tmp_path)
        states.append((saved["model"], saved["averaged"]["network"], saved["scaler"]["scale"]))

    how = {"epochs": 2, "slices_per_epoch": 4, "precision": "fp16", "ema": 0.0}
    fit_tiny(prepared, tmp_path, {"follow": remember}, **how)
    (before, average, scale), (after, later, less) = states
    trained = [name for name in before if "running" not in name and "num_batches" not in name]
    assert len(made) == 2 and all(torch.equal(before[name], after[name]) for name in trained)
    assert same(average, later) and less == scale / 2


def test_under_fp16_gradients_that_stay_infinite_stop_it_after_twenty_skipped_steps(prepared, tmp_path, monkeypatch):
    made = _breaking(monkeypatch, range(100))
    with pytest.raises(FloatingPointError, match="epoch 1, step 20, on Tiny"):
        fit_tiny(prepared, tmp_path, precision="fp16", slices_per_epoch=120)
    assert len(made) == 21


def test_patience_stops_training(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, lr=1e-30, epochs=20, patience=2)  # only statistics move: no lasting progress
    best = weights(tmp_path, "best.pt")["epoch"]
    assert len(history) == best + 2 < 20


def test_a_limit_in_minutes_stops_training_and_lowers_the_learning_rate(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path, epochs=1000, minutes=0.05)
    assert 1 <= len(history) < 1000
    assert history[-1]["seconds"] < 3 + 3  # one validation may come after
    assert history[-1]["lr"] < 0.3 * SETTINGS.lr


def test_without_averaging_the_weights_themselves_are_kept(prepared, tmp_path):
    fit_tiny(prepared, tmp_path, epochs=1, ema=0.0)
    assert same(weights(tmp_path, "best.pt")["model"], weights(tmp_path)["model"])


def test_frozen_epochs_leave_the_encoder_alone(prepared, tmp_path):
    fit_tiny(prepared, tmp_path / "a", epochs=1, frozen_epochs=1, ema=0.0)
    fit_tiny(prepared, tmp_path / "b", epochs=1, frozen_epochs=1, ema=0.0, lr=1e-4)
    a, b = (weights(tmp_path / name)["model"] for name in "ab")
    encoder = [key for key in a if key.startswith("encoder.")]
    assert all(torch.equal(a[key], b[key]) for key in encoder)
    assert not same(a, b)


@pytest.mark.parametrize("settings", [SETTINGS, CUBES], ids=["slices", "patches"])
def test_modality_dropout_hides_modalities_in_training_but_not_in_validation(prepared, tmp_path, monkeypatch, settings):
    shown = {True: [], False: []}

    def build(**network):
        model = build_model(**network)
        # Padding around a brain is no modality that was hidden: any voxel of a channel will do.
        model.register_forward_pre_hook(lambda module, args: shown[module.training].append(args[0].flatten(2).any(2)))
        return model

    monkeypatch.setattr("brats_helpers.training.session.build_model", build)
    fit_tiny(prepared, tmp_path, settings=settings, modality_dropout=1.0, augment="none", epochs=1)
    learning, validating = torch.cat(shown[True]).sum(dim=1), torch.cat(shown[False]).sum(dim=1)
    assert learning.min() >= 1 and learning.max() < 4 and validating.min() == 4


def test_pretrained_statistics_stay_and_others_are_learned(prepared, tmp_path):
    imagenet = {"encoder": PACKAGED_ENCODER, "encoder_weights": "imagenet"}
    for folder, changes in (("pretrained", imagenet), ("random", {})):
        fit_tiny(prepared, tmp_path / folder, epochs=1, slices_per_epoch=4, **changes)
    key = "encoder.model.bn1.running_mean"
    pretrained = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).state_dict()[key]
    assert torch.equal(weights(tmp_path / "pretrained")["model"][key], pretrained)
    assert weights(tmp_path / "random")["model"][key].any()  # 0 before training


def test_facts_are_in_every_checkpoint_and_patients_of_the_start_are_added(prepared, tmp_path):
    facts = {"labels": "2020", "patients": {"Tiny_0": {"content": "a", "group": "p"}}}
    fit_tiny(prepared, tmp_path / "a", {"facts": facts}, epochs=1)
    assert weights(tmp_path / "a")["facts"] == weights(tmp_path / "a", "best.pt")["facts"] == facts
    later = {"labels": "2023", "patients": {"New": {"content": None, "group": "New"}}}
    start = str(tmp_path / "a" / "checkpoints" / "best.pt")
    fit_tiny(prepared, tmp_path / "b", {"facts": later}, epochs=1, encoder_weights=start)
    assert weights(tmp_path / "b")["facts"] == {"labels": "2023", "patients": facts["patients"] | later["patients"]}
    assert weights(tmp_path / "b")["train_cases"] == ["Tiny_0", "Tiny_1", "Tiny_2"] * 2
    assert weights(tmp_path / "b")["val_cases"] == ["Tiny_3"]


def test_accelerate_still_lets_a_process_change_its_device():
    """`_reset_state` is private: where it goes, `session.forget_device` needs another way."""
    assert hasattr(session.AcceleratorState, "_reset_state")
    session.forget_device()
    assert not session.AcceleratorState._shared_state


def test_determinism_is_set_by_parameter():
    for on in (True, False):
        machine.set_deterministic(on)
        assert torch.are_deterministic_algorithms_enabled() is on
        assert torch.backends.cudnn.benchmark is not on


def test_the_learning_rate_rises_and_falls():
    assert lr_factor(0, 0.05) < 0.05 and lr_factor(0.05, 0.05) == 1
    assert lr_factor(0.525, 0.05) == pytest.approx(0.5) and lr_factor(1, 0.05) == pytest.approx(0)


def _validated(network, cases, patch_size=0):
    loader = patients(cases, context_slices=0, patch_size=patch_size, batch_size=7, workers=0, device=HOW["device"])
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1))
    return loop.validate(network, loader, cases, criterion, Accelerator(cpu=True), precision="float32", at_once=3)


class _Bound(torch.nn.Module):
    """Answers class 3 wherever the first channel is above a bound; where nothing is, too, if `everywhere`."""

    def __init__(self, *, everywhere=False):
        super().__init__()
        self.everywhere = everywhere
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        above = (images[:, :1] > 1.0) | (self.everywhere & (images[:, :1] == 0))
        above = above.float() * 20
        return torch.cat([10 - above, above * 0, above * 0, above - 10], dim=1)


def test_validation_is_dice_per_patient_over_the_volume(prepared):
    """Scored here voxel by voxel."""
    scores = _validated(_Bound(), prepared)
    expected = []
    for case in prepared:
        pred, truth = np.asarray(case.images[:, 0]) > 1.0, np.asarray(case.labels) > 0
        expected.append(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))
    assert scores["dice_WT"] == pytest.approx(np.mean(expected)) and 0 < scores["dice_WT"] < 1
    assert scores["dice_NCR"] == 0


def test_validation_counts_no_padding_and_all_tumour(prepared):
    """A network that calls background tumour may do so within the boxes only; tumour outside the brain is missed."""
    case = prepared[0]
    labels = np.array(case.labels)
    labels[0, :2, :2] = 3
    counts = case.counts + np.array([0, 0, 0, 1]) * (np.arange(len(labels)) == 0)[:, None] * 4
    assert not case.brain[0, :2, :2].any()
    case = dataclasses.replace(case, labels=labels, counts=counts)
    pred = np.zeros_like(labels, bool)
    for z, (top, bottom, left, right) in enumerate(case.boxes.tolist()):
        image = np.asarray(case.images[z, 0, top:bottom, left:right])
        pred[z, top:bottom, left:right] = (image > 1.0) | (image == 0)
    truth = labels > 0
    expected = 2 * (pred & truth).sum() / (pred.sum() + truth.sum())
    assert _validated(_Bound(everywhere=True), [case])["dice_WT"] == pytest.approx(expected)


@pytest.mark.parametrize("patch_size", [0, 32])
def test_validation_gives_the_score_of_the_whole_predicted_volume(prepared, patch_size):
    torch.manual_seed(0)
    if patch_size:
        network = build_model(encoder="monai-unet", weights="none", in_channels=4, patch_size=patch_size)
        torch.nn.init.zeros_(network.network.model[-1][-1].conv.unit0.conv.bias)  # else it answers background alone
    else:
        network = _Bound(everywhere=True)
    row = _validated(network, prepared, patch_size)
    settings = dataclasses.asdict(SETTINGS) | {"patch_size": patch_size}
    one = networks.Network(network.eval(), settings, frozenset(), frozenset(), 1)
    expected = []
    for case in prepared:
        soft = networks.predict([one], case, channels=SETTINGS.modalities, flips=False)
        pred, truth = (case.to_volume(box) for box in (soft.argmax(axis=1).astype(np.uint8), np.asarray(case.labels)))
        expected.append(region_dice(pred, truth, convention="brats2020"))
    for region in ("WT", "TC", "ET"):
        mean = np.mean([scores[region] for scores in expected])
        assert row[f"dice_{region}"] == pytest.approx(mean, abs=1e-12) and 0 < mean < 1


def test_a_3d_network_trains_and_resumes_to_the_bit(prepared, tmp_path):
    history = fit_tiny(prepared, tmp_path / "whole", settings=CUBES)
    assert [row["epoch"] for row in history] == [1, 2] and all(np.isfinite(row["train_loss"]) for row in history)
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path / "stopped", {"follow": stop}, settings=CUBES)
    fit_tiny(prepared, tmp_path / "stopped", settings=CUBES)
    assert ends_like(tmp_path / "stopped", tmp_path / "whole")
