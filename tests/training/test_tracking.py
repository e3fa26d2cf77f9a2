"""Trackers get the parameters, every epoch and the final scores in one run; MLflow's local store is the example."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.scoring.scores import collect, score_case
from brats_helpers.training.loop import Stopped
from brats_helpers.training.tracking import log_scores
from tests.tiny_training import SETTINGS, fit_tiny, stop


@pytest.fixture(scope="module")
def prepared(tiny_patients, tmp_path_factory):
    return prepare(find_cases(tiny_patients), cache_dir=tmp_path_factory.mktemp("cache"), workers=1)


@pytest.fixture
def client(tmp_path, monkeypatch):
    """MLflow with a store of its own in a folder."""
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # else versions of 2026 want a database
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def runs_of(client):
    (experiment,) = client.search_experiments(filter_string="name = 'brats'")
    return client.search_runs([experiment.experiment_id])


def metrics_of(convention, *, simulated):
    """Scores of a patient without enhancing tumour, which none was predicted for, either."""
    classes = np.ones((4, 4, 4), np.uint8)
    scores = {"A": score_case(classes, classes, spacing_mm=(1, 1, 1), convention=convention)}
    return collect(scores, convention=convention, simulated=simulated, not_scored={}, leakage=[])


def test_a_tracker_that_is_not_installed_is_named(prepared, tmp_path):
    with pytest.raises(ValueError, match="tracker 'tensorbord' is not installed: pip install tensorbord"):
        fit_tiny(prepared, tmp_path, {"tracker": "tensorbord"})


def test_tensorboard_gets_every_epoch_and_the_scores(prepared, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit_tiny(prepared, tmp_path, {"tracker": "tensorboard"}, epochs=2)
    log_scores(tmp_path, metrics_of("brats2020", simulated=False))
    events = EventAccumulator(str(next(tmp_path.glob("brats/events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("dice_WT")] == [1, 2]
    assert [event.value for event in events.Scalars("dice_WT")] == pytest.approx([row["dice_WT"] for row in history])
    assert [event.value for event in events.Scalars("test_brats2020_WT_dice")] == [1]


def test_mlflow_has_the_parameters_every_epoch_and_the_scores_in_one_run(client, prepared, tmp_path):
    with pytest.raises(Stopped):
        fit_tiny(prepared, tmp_path, {"tracker": "mlflow", "follow": stop})
    history = fit_tiny(prepared, tmp_path, {"tracker": "mlflow"})
    log_scores(tmp_path, metrics_of("brats2026", simulated=True))
    (run,) = runs_of(client)
    assert run.data.params == {name: str(value) for name, value in asdict(SETTINGS).items()}
    rows = client.get_metric_history(run.info.run_id, "dice_WT")
    assert [(row.step, row.value) for row in rows] == [(row["epoch"], row["dice_WT"]) for row in history]
    assert run.data.metrics["simulated_test_brats2026_WT_dice"] == 1
    assert "simulated_test_brats2026_ET_dice" not in run.data.metrics  # no patient has a part in this mean
    assert run.info.status == "FINISHED"


def test_a_run_that_mlflow_no_longer_has_is_replaced_with_a_warning(client, prepared, tmp_path, capsys):
    fit_tiny(prepared, tmp_path, {"tracker": "mlflow"}, epochs=1)
    (tmp_path / "tracker.json").write_text(json.dumps({"tracker": "mlflow", "run": 32 * "0"}))
    fit_tiny(prepared, tmp_path, {"tracker": "mlflow"}, epochs=2)
    assert "starts another" in capsys.readouterr().out
    steps = [[row.step for row in client.get_metric_history(run.info.run_id, "lr")] for run in runs_of(client)]
    assert sorted(steps) == [[1], [2]]


def test_a_training_without_tracker_has_no_part_in_the_run_of_an_earlier_one(client, prepared, tmp_path):
    fit_tiny(prepared, tmp_path, {"tracker": "mlflow"}, epochs=1)
    fit_tiny(prepared, tmp_path, epochs=1, lr=1e-3)
    log_scores(tmp_path, metrics_of("brats2020", simulated=False))
    (run,) = runs_of(client)
    assert not any(name.startswith("test") for name in run.data.metrics)


def test_scores_that_a_tracker_refuses_are_a_warning(tmp_path, capsys):
    (tmp_path / "tracker.json").write_text(json.dumps({"tracker": "gone", "run": None}))
    log_scores(tmp_path, metrics_of("brats2020", simulated=False))
    assert "the scores are not in gone: tracker 'gone' is not installed" in capsys.readouterr().out
