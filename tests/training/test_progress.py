"""Resuming: a training that fits resumes; another starts afresh, says why, and keeps the earlier files."""

import dataclasses
import shutil

import pytest
import torch

from brats_helpers.training.checkpoint import save_file
from brats_helpers.training.loop import Stopped, fit
from brats_helpers.training.progress import Progress
from brats_helpers.training.session import frozen_share
from tests.tiny_training import HOW, SETTINGS, fit_tiny, same, stop, weights


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """A finished training of two epochs; copy it before use."""
    folder = tmp_path_factory.mktemp("finished")
    fit_tiny(prepared, folder, epochs=2)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """A training of three epochs in 50 minutes, stopped after the first; copy it before use."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped):
        fit_tiny(prepared, folder, {"follow": stop}, minutes=50)
    return folder


@pytest.mark.parametrize("changes", [{"minutes": 40}, {"epochs": 2}, {"patience": 3}])
def test_changed_stopping_rules_keep_a_training(prepared, stopped, tmp_path, capsys, changes):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    history = fit_tiny(prepared, tmp_path, **changes)
    assert [row["epoch"] for row in history] == [*range(1, changes.get("epochs", 3) + 1)]
    assert "resuming after epoch 1" in capsys.readouterr().out


def test_a_training_begun_before_modality_dropout_existed_resumes(prepared, folder, capsys):
    last = folder / "checkpoints" / "last.pt"
    saved = weights(folder)
    assert saved["settings"].pop("modality_dropout") == 0
    save_file(last, saved)
    fit_tiny(prepared, folder, epochs=3)
    assert "finished after epoch 2: continuing to epoch 3" in capsys.readouterr().out


def test_epochs_added_after_the_end_get_their_own_schedule(prepared, folder, capsys):
    before = weights(folder)
    history = fit_tiny(prepared, folder, epochs=4)
    assert "finished after epoch 2: continuing to epoch 4 on a new schedule" in capsys.readouterr().out
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[:2] == before["progress"]["history"]
    # The rate is noted at the last of 4 steps an epoch: 7 of 8 steps are over by the end, 3 of 8 in its middle.
    rates = [row["lr"] / SETTINGS.lr for row in history]
    assert rates[1] == rates[3] < 0.1 < rates[0] == rates[2]
    assert weights(folder)["optimizer"]["state"][0]["step"] == 4 * 4  # it went on from the same state


def test_a_training_with_added_epochs_resumes_to_the_bit(prepared, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    fit_tiny(prepared, folder, epochs=4)
    with pytest.raises(Stopped):
        fit_tiny(prepared, other, {"follow": stop}, epochs=4)
    fit_tiny(prepared, other, epochs=4)
    assert same(weights(folder)["model"], weights(other)["model"])


def test_a_better_best_is_not_replaced_by_added_epochs(prepared, folder, monkeypatch):
    worse = {"val_loss": 1.0} | {f"dice_{name}": 0.0 for name in ("WT", "TC", "ET", "NCR", "ED")}
    monkeypatch.setattr("brats_helpers.training.loop.validate", lambda *given, **how: worse)
    before = weights(folder, "best.pt")
    fit_tiny(prepared, folder, epochs=3)
    after = weights(folder, "best.pt")
    assert after["epoch"] == before["epoch"] and same(after["model"], before["model"])


def test_added_epochs_without_time_are_refused_with_the_way_out(prepared, tmp_path, capsys):
    history = fit_tiny(prepared, tmp_path, epochs=1, minutes=1e-4)
    assert fit_tiny(prepared, tmp_path, epochs=3, minutes=1e-4) == history
    assert "epochs 1 then, 3 now, but its time is up: raise minutes as well" in capsys.readouterr().out


def test_a_finished_training_is_left_untouched(prepared, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    fit_tiny(prepared, folder, epochs=2)
    fit_tiny(prepared, folder, epochs=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} == before
    assert "already trained: epoch 2 was the last" in capsys.readouterr().out


def test_other_settings_start_afresh_say_what_differs_and_keep_the_finished_training(prepared, folder, capsys):
    best, history = weights(folder, "best.pt"), (folder / "history.csv").read_text()
    fit_tiny(prepared, folder, lr=1e-3, class_weights=(1, 1, 1, 2), epochs=1)
    out = capsys.readouterr().out
    assert "lr 0.002 then, 0.001 now" in out and "starting afresh" in out and "batch_size" not in out
    assert "class_weights 1.0,1.0,1.0,1.0 then, 1.0,1.0,1.0,2.0 now" in out
    kept = folder / "checkpoints" / "earlier-1"
    assert f"the files of an earlier training are kept in {kept}" in out
    assert same(torch.load(kept / "best.pt")["model"], best["model"]) and (kept / "last.pt").exists()
    assert (kept / "history.csv").read_text() == history
    fit_tiny(prepared, folder, lr=1e-4, epochs=1)
    assert (folder / "checkpoints" / "earlier-2" / "best.pt").exists()


def test_other_patients_start_afresh(prepared, folder, capsys):
    fit(dataclasses.replace(SETTINGS, epochs=1), prepared[1:3], prepared[3:], folder, **HOW)
    assert "train_cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, said",
    [
        ({"rng": torch.zeros(1)}, "is no checkpoint of this suite. The training starts afresh"),
        ({"settings": {}, "format": 2}, "written by another version of the suite (format 2; this one reads 3)"),
        (None, "is no checkpoint, or is damaged"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_kept_and_says_why(prepared, tmp_path, capsys, content, said):
    last = tmp_path / "checkpoints" / "last.pt"
    save_file(last, content or {})
    if content is None:
        last.write_bytes(last.read_bytes()[:-200])
    fit_tiny(prepared, tmp_path, epochs=1)
    assert said in capsys.readouterr().out and (tmp_path / "checkpoints" / "earlier-1" / "last.pt").exists()


def test_without_its_best_checkpoint_a_training_cannot_resume(prepared, folder, capsys, monkeypatch):
    saved = weights(folder)
    saved["progress"]["best_epoch"] = 1
    save_file(folder / "checkpoints" / "last.pt", saved)
    (folder / "checkpoints" / "best.pt").unlink()
    fit_tiny(prepared, folder, epochs=2)
    assert "best.pt, which belongs to" in capsys.readouterr().out and (folder / "checkpoints" / "best.pt").exists()


def test_the_schedule_follows_steps_or_the_clock_whichever_is_further():
    settings = dataclasses.replace(SETTINGS, epochs=4, minutes=1)
    progress = Progress(epoch=1, step=2)
    assert progress.share(settings, 4, seconds=6) == 6 / 16
    assert progress.share(settings, 4, seconds=30) == 0.5
    continued = Progress(epoch=3, step=1, start=2, start_s=20)
    assert continued.share(settings, 4, seconds=20) == 5 / 8
    assert continued.share(settings, 4, seconds=50) == 30 / 40


def test_patience_counts_from_the_best_epoch_or_from_where_a_finished_training_was_continued():
    settings = dataclasses.replace(SETTINGS, epochs=20, patience=3)
    assert Progress(epoch=6, best_epoch=3).finished(settings)
    assert not Progress(epoch=5, best_epoch=3).finished(settings)
    assert not Progress(epoch=6, best_epoch=3, start=6).finished(settings)


def test_the_encoder_is_unfrozen_from_the_deepest_layers_on():
    """Two frozen epochs, then two in which a third and two thirds of the layers are free, then all."""
    settings = dataclasses.replace(SETTINGS, frozen_epochs=2, unfreeze_epochs=2)
    shares = [frozen_share(epoch, settings) for epoch in range(1, 7)]
    assert shares == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0])
    plain = dataclasses.replace(SETTINGS, frozen_epochs=1)
    assert [frozen_share(epoch, plain) for epoch in (1, 2)] == [1, 0]
