"""The preflight: sizes that fit, the faster precision, and a cost that comes true."""

import dataclasses
import json
import math
import mmap

import numpy as np
import pytest
import torch

from brats_helpers import machine
from brats_helpers.training import preflight
from brats_helpers.training.preflight import Preflight, choose_sizes, settle
from brats_helpers.training.settings import Execution, SettingsError
from tests.tiny_training import fit_tiny, weights

PLAN = Preflight(
    facts={"device": "CPU"},
    batch_size=4,
    steps=10,
    epochs=3,
    limit_s=math.inf,
    step_s=2.0,
    validation_s=5.0,
    memory_gib=1.0,
)
"""Three epochs of 25 s."""


def test_patch_and_batch_follow_the_memory(monkeypatch):
    """MONAI's U-Net keeps about 203 bytes a voxel. With as much again for all else, float32 patches take 0.79 GiB
    at 128 cubed, 0.33 at 96, 0.012 at 32, and half of that in half precision."""
    of = {"encoder": "monai-unet", "in_channels": 4, "device": torch.device("cuda")}

    def chosen(gib, precision, patch_size=0, batch_size=0):
        facts = {"device_memory_gib": gib, "memory_gib": 100, "precision": precision}
        monkeypatch.setattr(preflight.machine, "describe", lambda device: facts)
        return choose_sizes(**of, patch_size=patch_size, batch_size=batch_size)

    assert chosen(15, "fp16") == (128, 8)
    assert chosen(5, "no") == (128, 4)
    assert chosen(1, "no") == (96, 2)
    assert chosen(0.01, "no") == (32, 1)
    assert chosen(1, "no", patch_size=32) == (32, 8)
    assert chosen(1, "no", batch_size=3) == (96, 3)
    of["device"] = torch.device("cpu")
    assert chosen(15, "no") == (64, 2)
    of["encoder"] = "acs-tu-tf_efficientnet_lite0"
    assert chosen(0.01, "no") == (64, 1)
    of["encoder"] = "acs-tf_efficientnet_lite0"
    with pytest.raises(ValueError, match="'acs-tf_efficientnet_lite0': expected one of .*acs-tu-tf_efficientnet_lite0"):
        chosen(15, "no")
    of["encoder"] = "resnet18"
    assert chosen(15, "no") == (0, 4) and chosen(15, "no", batch_size=8) == (0, 8)
    of["device"] = torch.device("cuda")
    assert chosen(15, "fp16") == (0, 16)


OF_THE_CELL = {
    "patients": 2,
    "modalities": ["flair", "t1"],
    "encoder": "resnet18",
    "encoder_weights": "none",
    "context_slices": 0,
    "epochs": 2,
    "minutes": 0.0,
    "batch_size": 0,
    "lr": 0.01,
    "augment": "none",
    "seed": 3,
}
"""What notebook 02 has parameters for."""


def test_settings_are_completed_by_defaults_and_by_the_device():
    settings, execution = settle("ema=0.5, processes=2", device=torch.device("cpu"), **OF_THE_CELL)
    assert (settings.ema, settings.warm_up, settings.batch_size, settings.patch_size) == (0.5, 0.05, 4, 0)
    assert settings.modalities == ("flair", "t1") and execution == Execution(processes=2)
    cubes = OF_THE_CELL | {"encoder": "monai-unet", "batch_size": 1}
    settings, _ = settle("patch_size=32", device=torch.device("cpu"), **cubes)
    assert (settings.patch_size, settings.batch_size) == (32, 1)
    settings, _ = settle("", device=torch.device("cpu"), **cubes)
    assert settings.patch_size in preflight.EDGES  # by the memory


@pytest.mark.parametrize(
    "text, message",
    [
        ("emma=0.9", "no setting 'emma': did you mean ema"),
        ("epochs=3", "epochs is a parameter of the notebook. Set it there"),
        ("patch_size=big", "patch_size 'big': expected a whole number of at least 0"),
        ("processes=-1", "processes -1: expected a whole number of at least 0"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(text, message):
    with pytest.raises(SettingsError, match=message):
        settle(text, device=torch.device("cpu"), **OF_THE_CELL)


def test_the_cost_is_predicted_and_then_measured(prepared, tmp_path, capsys):
    fit_tiny(prepared, tmp_path, epochs=2, slices_per_epoch=64)
    report = json.loads((tmp_path / "preflight.json").read_text())
    predicted, measured = report["predicted"], report["measured"]
    assert report["steps_per_epoch"] == 16 and report["deterministic"] and report["processes"] == 1
    assert set(predicted) == set(measured) and predicted["epochs"] == measured["epochs"] == 2
    assert predicted["seconds"] == pytest.approx(2 * predicted["seconds_per_epoch"])
    assert predicted["seconds"] == pytest.approx(measured["seconds"], rel=0.9)
    assert 1 <= measured["memory_gib"] / predicted["memory_gib"] < 1.3
    assert "expected: 2 epochs of 16 steps" in capsys.readouterr().out


@pytest.mark.parametrize("half_s, chosen", [(0.5, "bf16"), (0.9, "float32"), (2.0, "float32")])
def test_half_precision_is_chosen_where_it_is_clearly_faster(prepared, tmp_path, monkeypatch, half_s, chosen):
    """A step in float32 takes 1 s; a first, slow turn of each does not count."""
    turns = []

    def step_s(trial, draws, precision, micro_batch, workers=0):
        turns.append(precision)
        return (5.0 if turns.count(precision) == 1 else 1.0) * (half_s if precision == "bf16" else 1)

    monkeypatch.setattr(machine, "choose_precision", lambda device: "bf16")
    monkeypatch.setattr(preflight._Trial, "step_s", step_s)
    fit_tiny(prepared, tmp_path, precision="auto", epochs=1, slices_per_epoch=4)
    assert json.loads((tmp_path / "preflight.json").read_text())["precision"] == chosen
    assert list(weights(tmp_path)["progress"]["precision"].values()) == [chosen]

    turns.clear()  # resumed on the same device, it is not measured again
    fit_tiny(prepared, tmp_path, precision="auto", epochs=2, slices_per_epoch=4)
    assert set(turns) == {chosen}


def test_a_time_limit_allows_fewer_epochs():
    assert PLAN.predicted() == {
        "epochs": 3,
        "seconds_per_epoch": 25,
        "seconds": 75,
        "slices_per_s": 2,
        "memory_gib": 1,
    }
    short = dataclasses.replace(PLAN, limit_s=30).predicted()
    assert short["epochs"] == 2 and short["seconds"] == 30  # the second epoch is cut short


def test_an_epoch_that_the_clock_cut_short_does_not_count_as_one():
    rows = [{"epoch": k, "seconds": s, "slices_per_s": 2.0, "memory_gib": 1.0} for k, s in ((1, 20.0), (2, 31.0))]
    timed = dataclasses.replace(PLAN, limit_s=30)
    assert timed.report(rows, 4)["measured"]["seconds_per_epoch"] == 20
    assert PLAN.report(rows, 4)["measured"]["seconds_per_epoch"] == 15.5
    assert "seconds_per_epoch" not in dataclasses.replace(PLAN, limit_s=10).report(rows[:1], 4)["measured"]


def test_the_remaining_time_follows_from_the_last_epoch():
    history = [{"epoch": 1, "seconds": 50}, {"epoch": 2, "seconds": 80}]
    assert PLAN.left_s(history) == 30
    assert dataclasses.replace(PLAN, limit_s=90).left_s(history) == 10


@pytest.mark.parametrize("variable", [None, "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_a_very_long_training_is_announced_and_a_session_named_where_there_is_one(capsys, monkeypatch, variable):
    """All 369 patients, 20 epochs, at 10 slices a second: 51,200 slices take 85 minutes an epoch."""
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "x")
    dataclasses.replace(PLAN, steps=3200, epochs=20, step_s=1.6, validation_s=100).announce()
    out = capsys.readouterr().out
    assert "⚠️ would take about 29 h 00 min on this machine" in out
    assert ("session ends after 12 hours" in out) == bool(variable)
    PLAN.announce()
    assert "⚠️" not in capsys.readouterr().out


def test_memory_is_the_process_s_own(tmp_path):
    before = machine.used_memory_gib(torch.device("cpu"))
    fresh = mmap.mmap(-1, 2**27, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # NumPy may reuse what a test left behind
    kept = np.frombuffer(fresh, np.uint8)
    kept[:] = 1
    assert machine.used_memory_gib(torch.device("cpu")) - before == pytest.approx(2**-3, abs=0.02)
    np.save(tmp_path / "mapped.npy", kept)
    assert int(np.load(tmp_path / "mapped.npy", mmap_mode="r").sum()) == 2**27  # every page of it is read
    assert machine.used_memory_gib(torch.device("cpu")) - before == pytest.approx(2**-3, abs=0.02)
