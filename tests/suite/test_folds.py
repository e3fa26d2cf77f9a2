"""Cross-validation and sweeps, here and on workers of which one is killed: the table is the same.

The notebooks here are of a few lines: a fold's training waits for a file where a test says so, and its scores follow
from the patients' IDs alone, so that the table of a whole run is known beforehand.
"""

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest

from brats_helpers.data.cache import pack
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.patients import load_parts, load_prepared
from brats_helpers.data.splits import write_splits
from brats_helpers.evaluation.inference import evaluate, load_network, predict
from brats_helpers.files import write_json
from brats_helpers.labels import MODALITIES
from brats_helpers.runs import PER_FOLD, Run
from brats_helpers.suite import cluster, folds
from brats_helpers.suite.plan import make_plan
from brats_helpers.suite.run import main
from brats_helpers.training.loop import fit
from tests.conftest import write_tiny_case
from tests.suite.checkout import N, contents, run, start, wait, write_splitting_checkout
from tests.tiny_training import HOW, SETTINGS


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose notebooks split patients, train and score."""
    return write_splitting_checkout(tmp_path_factory.mktemp("checkout"))


def folds_of(checkout, name, *more, code=0):
    """Run a cross-validation; return its folder and what it printed."""
    done = run(checkout, "--folds", str(N), "--run", name, *more)
    assert done.returncode == code, done.stdout + done.stderr
    return checkout / "runs" / name, done.stdout


def trainers(folder):
    """The process of each worker that began to train fold 1."""
    trained = folder / "folds" / "1" / "trained"
    return [int(pid) for pid in trained.read_text().split()] if trained.exists() else []


def trainings(folder):
    return [len((folder / "folds" / str(k) / "trained").read_text().split()) for k in range(N)]


def table(folder):
    """Every patient is scored once, by the fold that tested it, and the means are those of 0, 0.1, and so on."""
    metrics = json.loads((folder / "metrics.json").read_text())
    dice = {case: scores["TC"]["dice"] for case, scores in metrics["cases"].items()}
    assert dice == {f"P{k}": k / 10 for k in range(2 * N)}
    assert metrics["summary"]["WT"]["dice"]["mean"] == pytest.approx((2 * N - 1) / 20) and metrics["simulated"] is True
    assert sorted(path.read_text() for path in (folder / "predictions").iterdir()) == sorted(dice)
    assert "fold 1" in (folder / "report" / "index.html").read_text("utf-8")
    assert (folder / "folds" / "1" / "report" / "index.html").exists()
    return (folder / "cases.csv").read_bytes()


@pytest.fixture(scope="module")
def finished(checkout):
    """A cross-validation that nobody disturbed."""
    return folds_of(checkout, "finished")[0]


@pytest.fixture
def again(finished, request):
    """A copy of it, for a test to change."""
    return shutil.copytree(finished, finished.parent / request.node.name[:40])


def test_a_killed_worker_does_not_change_the_table(checkout, finished, tmp_path):
    pytest.importorskip("distributed")
    go, folder = tmp_path / "go", checkout / "runs" / "workers"
    command = ["--folds", str(N), "--run", "workers", "-p", "hold", str(go), "--workers", "2"]
    launcher = start(checkout, *command)
    wait(lambda: trainers(folder))
    os.kill(trainers(folder)[0], signal.SIGKILL)
    wait(lambda: len(trainers(folder)) == 2)
    go.touch()
    said, errors = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, said + errors
    assert trainings(folder) == [1, 2] and len(set(trainers(folder))) == 2
    assert (folder / "folds" / "1" / "log.txt").exists() and trainings(finished) == [1, 1]
    assert table(folder) == table(finished)


def test_a_killed_command_continues_and_a_second_one_is_refused_meanwhile(checkout, tmp_path):
    go = tmp_path / "go"
    first = start(checkout, "--folds", str(N), "--run", "killed", "-p", "hold", str(go))
    folder = checkout / "runs" / "killed"
    wait(lambda: trainers(folder))
    _, said = folds_of(checkout, "killed", "-p", "hold", str(go), code=1)
    assert f"process {first.pid} is running in {folder}" in said
    first.kill()
    first.communicate()
    go.touch()
    _, said = folds_of(checkout, "killed", "-p", "hold", str(go))
    table(folder)
    assert trainings(folder) == [1, 2]  # only what was cut off was repeated
    assert said.count("finished before") == 4  # 00, 01, and both notebooks of fold 0


def test_old_scores_stay_until_the_new_ones_of_every_fold_are_complete(checkout, again):
    before = table(again)
    _, said = folds_of(checkout, again.name, "-p", "lr", "0.25", "-p", "fail_in", "0", code=1)
    assert f"1 of 2 did not finish: {again.name}, fold 0" in said and trainings(again) == [2, 2]  # fold 1 went on
    assert table(again) == before
    stages = json.loads((again / "manifest.json").read_text())["stages"]
    assert {stages[stage]["status"] for stage in PER_FOLD} == {"outdated"}
    folds_of(checkout, again.name, "-p", "lr", "0.25")
    stages = json.loads((again / "manifest.json").read_text())["stages"]
    assert stages["02_train"]["status"] == "finished" and stages["02_train"]["parameters"]["lr"] == 0.25


def test_folds_whose_data_cannot_be_reached_are_unchanged(checkout, again):
    patients = checkout / "patients"
    patients.rename(checkout / "unmounted")
    try:
        files = contents(again)
        _, said = folds_of(checkout, again.name)
        assert "the results stay as they are" in said and contents(again) == files
        _, said = folds_of(checkout, again.name, "-p", "lr", "0.25", code=1)
        assert "❌" in said and contents(again) == files
    finally:
        (checkout / "unmounted").rename(patients)


def test_folds_and_a_sweep_of_folds_take_turns_in_one_run(checkout, again):
    for more, gathered in (["--sweep", "lr", "0.1"], False), ([], True):
        folds_of(checkout, again.name, *more)
        assert ((again / "metrics.json").exists(), (again / "sweep.csv").exists()) == (gathered, not gathered)
        assert ("Folds</h2>" in (again / "report" / "index.html").read_text("utf-8")) == gathered
        if not gathered:
            assert (again / "sweep.csv").read_text().splitlines()[1:] == ["lr=0.1,0.1,0.1,0.1"]
            table(again / "sweep" / "lr=0.1")
    table(again)
    assert trainings(again) == [1, 1]


def test_a_sweep_is_ranked_by_validation_and_keeps_each_combination(checkout):
    done = run(checkout, "--run", "swept", "--sweep", "lr", "0.1", "0.2", "--sweep", "smooth", "true")
    assert done.returncode == 0, done.stdout
    folder = checkout / "runs" / "swept"
    # The stub's best epoch has Dice 0, 0 and 3 lr.
    assert (folder / "sweep.csv").read_text().splitlines()[1:] == ["lr=0.2;smooth=true,0.2", "lr=0.1;smooth=true,0.1"]
    assert "lr=0.2;smooth=true" in (folder / "report" / "index.html").read_text("utf-8")
    for lr in (0.1, 0.2):
        stages = json.loads((folder / "sweep" / f"lr={lr};smooth=true" / "manifest.json").read_text())["stages"]
        assert stages["02_train"]["parameters"]["lr"] == lr and stages["02_train"]["parameters"]["smooth"] is True


# --- clusters


@pytest.fixture
def plan(checkout):
    pytest.importorskip("distributed")
    return make_plan(["--folds", "2", "--run", "cluster", "--workers", "2"], checkout)


@pytest.fixture
def busy_cluster():
    """A cluster of threads of this process, one worker of two threads."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as own:
        yield own


def test_a_worker_with_several_threads_is_refused(plan, busy_cluster, capsys):
    plan = dataclasses.replace(plan, workers=0, scheduler=busy_cluster.scheduler_address)
    assert cluster.run_on_cluster(plan, print, [plan]) == [plan]
    assert "has 2 threads" in capsys.readouterr().out


def test_any_cluster_runs_the_tasks_and_reports_their_errors(plan, capsys, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(plan.root)  # which the threads of this process would change for good

    def say(plan):
        print("on a worker")
        return True

    Run(plan.folder)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as own:
        plan = dataclasses.replace(plan, workers=0, scheduler=own.scheduler_address)
        assert cluster.run_on_cluster(plan, say, [plan]) == []
        assert cluster.run_on_cluster(plan, lambda plan: 1 / 0, [plan]) == [plan]
    assert (plan.folder / cluster.LOG).read_text("utf-8") == "on a worker\n"
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_a_scheduler_that_does_not_answer_is_named(plan, capsys, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_S", 0.5)
    plan = dataclasses.replace(plan, workers=0, scheduler="tcp://127.0.0.1:9")
    assert cluster.run_on_cluster(plan, print, [plan]) == [plan]
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().out


def test_without_dask_the_message_says_what_to_install(plan, capsys, monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert cluster.run_on_cluster(plan, print, [plan]) == [plan]
    assert "-m pip install 'dask[distributed]'" in capsys.readouterr().out


def test_each_worker_needs_a_gpu_of_its_own(plan, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cluster.run_on_cluster(plan, print, [plan]) == [plan]
    assert "this machine has 1. Use --workers 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--folds", "1"], "--folds 1: expected 2 or more"),
        (["--folds", "3", "--only", "02"], "--only cannot be combined with --folds"),
        (["--sweep", "lrr", "1"], "--sweep lrr: no parameter of 02_train; did you mean lr?"),
        (["--sweep", "lr", "fast"], "lr takes a float"),
        (["--sweep", "flips", "true", "false"], "--sweep flips: only 03_evaluate has it, and a sweep ranks by"),
        (["--workers", "2"], "add --folds N"),
        (["--scheduler", "tcp://host:8786"], "add --folds N"),
        (["--folds", "3", "--workers", "-2"], "--workers -2: expected 1 or more"),
        (["--folds", "3", "--workers", "2", "--scheduler", "tcp://host:8786"], "give one of the two"),
    ],
)
def test_what_folds_and_sweeps_cannot_do_is_refused_before_anything_is_written(checkout, capsys, arguments, message):
    assert main(["--run", "never", *arguments], checkout) == 2
    assert message in capsys.readouterr().out and not (checkout / "runs" / "never").exists()


# --- a fold's own run


def test_a_fold_follows_the_data_when_they_move(tmp_path):
    run, ids = Run(tmp_path), ["P0", "P1", "P2"]
    part = dict(zip(("train", "val", "test"), ([one] for one in ids), strict=True))
    write_splits(run.splits, part, folds=[part], unlabelled=[], contents=dict.fromkeys(ids))
    run.record(data="old", cache_dir="cache", seed=0)
    own = folds.member(run, "folds/0", part)
    own.record(stages={"02_train": {"status": "finished"}}, profile="its own")
    run.record(data="new", profile="another")
    manifest = folds.member(run, "folds/0", part).manifest
    assert (manifest["data"], manifest["cache_dir"], manifest["profile"]) == ("new", "cache", "its own")
    assert manifest["stages"] == {"02_train": {"status": "finished"}}
    other = {"train": ["P1"], "val": ["P0"], "test": ["P2"]}
    assert folds.member(run, "folds/0", other).manifest["stages"] == {"02_train": {"status": "outdated"}}


# --- the folds' networks together


def test_the_unlabelled_are_predicted_by_all_folds_together(tmp_path):
    """Two folds of real trainings: the label map is that of the averaged probabilities, under the lower thresholds."""
    for k in range(5):
        write_tiny_case(tmp_path / "data", f"Tiny_{k}", seed=k, labelled=k < 4)
    run = Run(tmp_path / "run")
    ids = [f"Tiny_{k}" for k in range(4)]
    parts = [{"train": ids[2:], "val": ids[1:2], "test": ids[:1]}, {"train": ids[:2], "val": ids[2:3], "test": ids[3:]}]
    write_splits(run.splits, parts[0], folds=parts, unlabelled=["Tiny_4"], contents=dict.fromkeys([*ids, "Tiny_4"]))
    cache = {"cache_dir": str(tmp_path / "cache"), "modalities": list(MODALITIES)}
    run.record(data=str(tmp_path / "data"), simulated=True, seed=0, **cache)
    members = []
    for k, part in enumerate(folds.shares(run)):
        own = folds.member(run, f"folds/{k}", part)
        settings = dataclasses.replace(SETTINGS, epochs=2, seed=k)
        fit(settings, load_prepared(own, "train"), load_prepared(own, "val"), own.folder, **HOW)
        scores = evaluate(
            [load_network(own.best, device=HOW["device"])],
            load_parts(own)["test"],
            own.predictions,
            flips=False,
            convention="brats2020",
            simulated=True,
        )
        write_json(own.metrics, scores)
        rules = {"component_voxels": 10 * k, "fill_holes": bool(k), "et_voxels": 5 * k}
        write_json(own.postprocess, {"rules": rules})
        members.append(own)
    folds.gather(run, members, device="cpu", flips=False, convention="brats2020", labels="2020")

    metrics = json.loads(run.metrics.read_text())
    assert list(metrics["cases"]) == ["Tiny_0", "Tiny_3"] and metrics["not_scored"] == {"Tiny_4": "unlabelled"}
    assert {path.name for path in run.predictions.iterdir()} == {f"Tiny_{k}_seg.nii.gz" for k in (0, 3, 4)}
    (case,) = load_parts(run)["unlabelled"]
    networks = [load_network(own.best, device=HOW["device"]) for own in members]
    soft = [predict([one], pack(case), channels=one.modalities, flips=False) for one in networks]
    classes = np.mean(soft, axis=0).argmax(axis=1).astype(np.uint8)
    # Of the folds' rules 0 and 10, 0 and 5 voxels the lower ones: none.
    assert np.array_equal(read_mask(run.predictions / "Tiny_4_seg.nii.gz", "brats2020"), pack(case).to_volume(classes))
    assert run.submission.with_suffix(".zip").exists()
