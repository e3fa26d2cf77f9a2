"""The loop on tiny patients: it learns, it resumes to the bit, it says what is wrong."""

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from brats_helpers import train
from brats_helpers.cache import prepare
from brats_helpers.cases import find_cases
from brats_helpers.model import PACKAGED_ENCODER, build_model
from brats_helpers.train import Settings, fit, lr_factor

SETTINGS = Settings(
    modalities="flair,t1,t1ce,t2",
    encoder="tu-tf_mobilenetv3_small_minimal_100",
    encoder_weights="none",
    context_slices=0,
    epochs=3,
    minutes=0,
    batch_size=4,
    slices_per_epoch=16,
    foreground=0.7,
    augment="basic",
    class_weights="1,1,1,1",
    lr=2e-3,
    encoder_lr=1.0,
    weight_decay=0.01,
    warm_up=0.05,
    frozen_epochs=0,
    unfreeze_epochs=0,
    frozen_statistics=True,
    ema=0.9,
    patience=0,
    seed=0,
)


@pytest.fixture(scope="module")
def prepared(tiny_patients, tmp_path_factory):
    return prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)


HOW = {
    "device": torch.device("cpu"),
    "workers": 0,
    "checkpoint_minutes": 0.0,
    "deterministic": False,
    "tracker": "none",
}


def _fit(prepared, folder, how=None, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return fit(settings, prepared[:3], prepared[3:], folder, **HOW | (how or {}))


def _weights(folder, name="last.pt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def _same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """An uninterrupted training of three epochs."""
    folder = tmp_path_factory.mktemp("whole")
    _fit(prepared, folder)
    return folder


def test_it_learns(prepared, tmp_path):
    history = _fit(prepared, tmp_path, epochs=8, slices_per_epoch=64, batch_size=8)
    assert history[-1]["val_loss"] < history[0]["val_loss"] / 2
    assert max(row["dice_WT"] for row in history) > 0.8
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [float(row["dice_WT"]) for row in rows] == [row["dice_WT"] for row in history]
    means = [(row["dice_WT"] + row["dice_TC"] + row["dice_ET"]) / 3 for row in history]
    assert _weights(tmp_path, "best.pt")["epoch"] == 1 + means.index(max(means))


def test_the_seed_decides_whatever_the_number_of_workers(prepared, whole, tmp_path):
    _fit(prepared, tmp_path, {"workers": 2})
    assert _same(_weights(tmp_path)["model"], _weights(whole)["model"])
    other = tmp_path / "other"
    _fit(prepared, other, seed=1)
    assert not _same(_weights(other)["model"], _weights(whole)["model"])


def test_stopped_after_an_epoch_and_started_again_it_ends_to_the_bit_the_same(prepared, whole, tmp_path, monkeypatch):
    saved = []

    def stop_after_two(path, content):
        _original(path, content)
        saved.append(path.name)
        if saved.count("last.pt") == 2:
            raise KeyboardInterrupt

    _original = train.save_file
    monkeypatch.setattr(train, "save_file", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        _fit(prepared, tmp_path)
    monkeypatch.setattr(train, "save_file", _original)
    history = _fit(prepared, tmp_path)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    first, second = _weights(tmp_path), _weights(whole)
    assert _same(first["model"], second["model"]) and _same(first["averaged"], second["averaged"])
    assert _fit(prepared, tmp_path) == history  # finished: nothing more is done


def test_killed_at_any_moment_it_ends_to_the_bit_the_same(tiny_patients, whole, tmp_path):
    program = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from pathlib import Path
from test_train import SETTINGS, _fit, find_cases, prepare
prepared = prepare(find_cases(sys.argv[1]), cache_dir=Path(sys.argv[2]) / "cache", workers=1)
print("go", flush=True)
_fit(prepared, Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", program, str(tiny_patients), str(tmp_path)]
    for wait in (0.6, 1.2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "checkpoints" / "last.pt").exists():
            _weights(tmp_path)  # readable
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert _same(_weights(tmp_path)["model"], _weights(whole)["model"])


def test_other_settings_start_afresh_and_say_what_differs(prepared, whole, tmp_path, capsys):
    shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    _fit(prepared, tmp_path, lr=1e-3, epochs=1)
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


def test_patience_stops_it(prepared, tmp_path):
    history = _fit(prepared, tmp_path, lr=0.0, epochs=20, patience=2)  # only statistics move: no lasting progress
    best = _weights(tmp_path, "best.pt")["epoch"]
    assert len(history) == best + 2 < 20


def test_minutes_stop_it_and_bring_the_learning_rate_down(prepared, tmp_path):
    history = _fit(prepared, tmp_path, epochs=1000, minutes=0.05)
    assert 1 <= len(history) < 1000
    assert history[-1]["seconds"] < 3 + 3  # one validation may come after
    assert history[-1]["lr"] < 0.3 * SETTINGS.lr


def test_without_averaging_the_weights_themselves_are_kept(prepared, tmp_path):
    _fit(prepared, tmp_path, epochs=1, ema=0.0)
    assert _same(_weights(tmp_path, "best.pt")["model"], _weights(tmp_path)["model"])


def test_frozen_epochs_leave_the_encoder_alone(prepared, tmp_path):
    _fit(prepared, tmp_path / "a", epochs=1, frozen_epochs=1, ema=0.0)
    _fit(prepared, tmp_path / "b", epochs=1, frozen_epochs=1, ema=0.0, lr=1e-4)
    a, b = (_weights(tmp_path / name)["model"] for name in "ab")
    encoder = [key for key in a if key.startswith("encoder.")]
    assert all(torch.equal(a[key], b[key]) for key in encoder)
    assert not _same(a, b)


def test_pretrained_statistics_stay_and_others_are_learned(prepared, tmp_path):
    imagenet = {"encoder": PACKAGED_ENCODER, "encoder_weights": "imagenet"}
    for folder, changes in (("pretrained", imagenet), ("random", {})):
        _fit(prepared, tmp_path / folder, epochs=1, slices_per_epoch=4, **changes)
    key = "encoder.model.bn1.running_mean"
    pretrained = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).state_dict()[key]
    assert torch.equal(_weights(tmp_path / "pretrained")["model"][key], pretrained)
    assert _weights(tmp_path / "random")["model"][key].any()  # 0 before training


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

    from brats_helpers.dataset import Slices, make_loader
    from brats_helpers.losses import CrossEntropyDice

    loader = make_loader(Slices(prepared, context_slices=0), batch_size=7, workers=0)
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1))
    scores = train.validate(Bound(), loader, len(prepared), criterion, Accelerator(cpu=True))
    expected = []
    for case in prepared:
        pred, truth = np.asarray(case.images[:, 0]) > 1.0, np.asarray(case.labels) > 0
        expected.append(2 * (pred & truth).sum() / (pred.sum() + truth.sum()))
    assert scores["dice_WT"] == pytest.approx(np.mean(expected)) and 0 < scores["dice_WT"] < 1
    assert scores["dice_NCR"] == 0
