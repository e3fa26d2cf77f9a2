"""Cross-validation and sweeps: shared among processes of which one is killed, and the same table in the end.

The notebooks here are of a few lines: a fold's training waits for a file where a test says so, and its scores follow
from the patients' IDs alone, so that the table of a whole run is known beforehand.
"""

import dataclasses
import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from brats_helpers import files
from brats_helpers.data.cache import pack
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.patients import load_parts, load_prepared
from brats_helpers.data.splits import write_splits
from brats_helpers.evaluation.inference import evaluate, load_network, predict
from brats_helpers.files import write_json
from brats_helpers.labels import MODALITIES
from brats_helpers.runs import PER_FOLD, Run
from brats_helpers.suite import folds, workers
from brats_helpers.suite.plan import Plan
from brats_helpers.training.loop import fit
from tests.conftest import write_tiny_case
from tests.suite.test_run import write_notebooks
from tests.tiny_training import HOW, SETTINGS

HERE = Path(__file__).parents[2]
N = 2
FOLD_CELLS = {
    "00_setup": [
        'run_dir: str = ""  # folder of the run\nfolds: int = 0  # folds to write',
        "import json\n\nfrom brats_helpers.runs import Run\n\nrun = Run(run_dir)",
        f"ids = [f'P{{k}}' for k in range({2 * N})]\n"
        "tests = [ids[k::folds] for k in range(folds)] or [ids[:1]]\n"
        "rest = [[i for i in ids if i not in test] for test in tests]\n"
        "parts = [{'train': r[1:], 'val': r[:1], 'test': t} for r, t in zip(rest, tests)]\n"
        "rest = {'unlabelled': [], 'folds': parts[:folds], 'contents': dict.fromkeys(ids)}\n"
        "run.splits.write_text(json.dumps(parts[0] | rest))\n"
        "run.record(simulated=True, seed=0, data='patients', modalities=['t2'], cache_dir='cache')",
    ],
    "01_explore": ['run_dir: str = ""  # folder of the run', "1"],
    "02_train": [
        'run_dir: str = ""  # folder of the run\nlr: float = 0.5  # learning rate\n'
        'hold: str = ""  # a file to wait for',
        "import os\nimport time\nfrom pathlib import Path",
        "here = Path(run_dir)\n(here / 'trained').open('a').write(f'{os.getppid()} ')\n"
        "while hold and here.name == '1' and not Path(hold).exists():\n    time.sleep(0.05)\n"
        "epochs = f'1,0,0,{lr}\\n2,0,0,{3 * lr}\\n3,0,0,0\\n'\n"
        "(here / 'history.csv').write_text(f'seconds,dice_WT,dice_TC,dice_ET\\n{epochs}')",
    ],
    "03_evaluate": [
        'run_dir: str = ""  # folder of the run\ndevice: str = "cpu"  # device\nflips: bool = False  # mirrored too\n'
        'labels: str = "2020"  # numbers\nconvention: str = "brats2020"  # rules',
        "import json\n\nfrom brats_helpers.metrics import collect\nfrom brats_helpers.runs import Run",
        "run = Run(run_dir)\n"
        "dice = {i: int(i[1:]) / 10 for i in json.loads(run.splits.read_text())['test']}\n"
        "cases = {i: {r: {'dice': d, 'hd95_mm': 1.0} for r in ('WT', 'TC', 'ET')} for i, d in dice.items()}\n"
        "scores = collect(cases, convention=convention, simulated=True, not_scored={}, leakage=[])\n"
        "run.metrics.write_text(json.dumps(scores))\n"
        "run.emptied(run.predictions)\nfor i in dice:\n    (run.predictions / f'{i}_seg.nii.gz').write_text(i)",
    ],
    "04_advanced": ['run_dir: str = ""  # folder of the run', "1"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the whole package and these notebooks."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(HERE / "brats_helpers", root / "brats_helpers", ignore=shutil.ignore_patterns("__pycache__"))
    write_notebooks(root / "notebooks", FOLD_CELLS)
    for k in range(2 * N):
        write_tiny_case(root / "patients", f"P{k}", seed=k, modalities=["t2"])
    (root / "profiles").mkdir()
    (root / "profiles" / "demo.yaml").write_text("# a profile\n")
    (root / "requirements.txt").write_text("papermill\n")
    return root


def start(checkout, *arguments):
    command = [sys.executable, "-m", "brats_helpers", "run", *arguments]
    environ = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=checkout, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def holder(run, others=()):
    """The process that trains fold 1, once there is one that is none of `others`."""
    trained = run / "folds" / "1" / "trained"
    for _ in range(1100):  # 55 s, less than `STALE_S`: that the one before is dead is known at once
        pids = trained.read_text().split() if trained.exists() else []
        if new := [int(pid) for pid in pids if int(pid) not in others]:
            return new[-1]
        time.sleep(0.05)
    raise AssertionError("nobody trains fold 1")


def trainings(run):
    return [len((run / "folds" / str(k) / "trained").read_text().split()) for k in range(N)]


def check_table(run):
    """Every patient is scored once, by the fold that tested it, and the means are those of 0, 0.1, and so on."""
    metrics = json.loads((run / "metrics.json").read_text())
    dice = {case: scores["TC"]["dice"] for case, scores in metrics["cases"].items()}
    assert dice == {f"P{k}": k / 10 for k in range(2 * N)}
    assert metrics["summary"]["WT"]["dice"]["mean"] == pytest.approx((2 * N - 1) / 20) and metrics["simulated"] is True
    assert sorted(path.read_text() for path in (run / "predictions").iterdir()) == sorted(dice)
    assert (run / "cases.csv").exists() and "fold 1" in (run / "report" / "index.html").read_text("utf-8")
    assert (run / "folds" / "1" / "report" / "index.html").exists()


def test_folds_shared_by_two_processes_survive_kills_and_a_restart(checkout, tmp_path):
    go, run = tmp_path / "go", checkout / "runs" / "shared"
    command = ["--folds", str(N), "--run", "shared", "-p", "hold", str(go)]
    both = {process.pid: process for process in (start(checkout, *command), start(checkout, *command))}
    first = holder(run)
    both[first].kill()  # the other one takes the fold over
    finish(both[first])
    second = holder(run, {first})
    assert {first, second} == set(both)
    both[second].kill()
    finish(both[second])
    assert not (run / "metrics.json").exists()

    go.touch()
    code, said = finish(start(checkout, *command))
    assert code == 0, said
    check_table(run)
    assert trainings(run) == [1, 3]  # nothing was done twice but what was cut off
    code, said = finish(start(checkout, *command))
    assert code == 0 and said.count("finished before") == 2 + 2 * N and trainings(run) == [1, 3]


def test_workers_of_submitit_finish_although_one_is_killed(checkout, tmp_path):
    pytest.importorskip("submitit")
    go, run = tmp_path / "go", checkout / "runs" / "cluster"
    launcher = start(checkout, "--folds", str(N), "--run", "cluster", "-p", "hold", str(go), "--workers", "2")
    first = holder(run)
    os.kill(first, signal.SIGKILL)
    assert holder(run, {first}) != first
    go.touch()
    code, said = finish(launcher)
    assert code == 0 and "died" in said, said
    check_table(run)
    assert trainings(run) == [1, 2]


def test_a_sweep_is_told_by_validation_and_keeps_each_combination(checkout):
    command = ["--run", "swept", "--sweep", "lr", "0.1", "0.2", "--sweep", "flips", "true"]
    code, said = finish(start(checkout, *command))
    assert code == 0, said
    run = checkout / "runs" / "swept"
    # The stub's best epoch has Dice 0, 0 and 3 lr.
    assert (run / "sweep.csv").read_text().splitlines()[1:] == ["lr=0.2;flips=true,0.2", "lr=0.1;flips=true,0.1"]
    assert "lr=0.2;flips=true" in (run / "report" / "index.html").read_text("utf-8")
    for lr in (0.1, 0.2):
        stages = json.loads((run / "sweep" / f"lr={lr};flips=true" / "manifest.json").read_text())["stages"]
        assert stages["02_train"]["parameters"]["lr"] == lr and stages["03_evaluate"]["parameters"]["flips"] is True


def test_a_sweep_of_folds_gathers_each_combination_and_two_may_share_it_to_its_end(checkout):
    command = ["--run", "both", "--folds", str(N), "--sweep", "lr", "0.1", "0.2"]
    together = [start(checkout, *command) for _ in range(2)]
    for process in together:
        code, said = finish(process)
        assert code == 0, said
    run = checkout / "runs" / "both"
    for lr in (0.1, 0.2):
        check_table(run / "sweep" / f"lr={lr}")
    assert (run / "sweep.csv").read_text().splitlines()[1:] == ["lr=0.2,0.2,0.2,0.2", "lr=0.1,0.1,0.1,0.1"]
    assert not (run / "metrics.json").exists()


def test_other_parameters_leave_nothing_of_the_old_scores(checkout):
    run = checkout / "runs" / "changed"
    code, said = finish(start(checkout, "--folds", str(N), "--run", "changed"))
    assert code == 0, said
    process = start(checkout, "--folds", str(N), "--run", "changed", "-p", "hold", str(run / "never"))
    holder(run, set(map(int, (run / "folds" / "1" / "trained").read_text().split())))
    process.kill()
    finish(process)
    assert not (run / "metrics.json").exists()
    assert "-p hold" in json.loads((run / "folds" / "1" / "manifest.json").read_text())["command"]
    code, said = finish(start(checkout, "--folds", str(N), "--run", "changed"))
    assert code == 0, said
    check_table(run)
    assert "-p hold" not in json.loads((run / "folds" / "1" / "manifest.json").read_text())["command"]


def test_folds_leave_nothing_to_a_sweep_of_the_same_run_and_the_other_way_round(checkout):
    run, command = checkout / "runs" / "other", ["--run", "other", "--folds", str(N)]
    for more, gathered in ([], True), (["--sweep", "lr", "0.1"], False), ([], True):
        code, said = finish(start(checkout, *command, *more))
        assert code == 0, said
        assert ((run / "metrics.json").exists(), (run / "sweep.csv").exists()) == (gathered, not gathered)
        assert ("Folds</h2>" in (run / "report" / "index.html").read_text("utf-8")) == gathered
    check_table(run)


def test_workers_are_refused_where_they_would_fight_for_gpus(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.AutoExecutor, "which", lambda *_: "local")
    monkeypatch.setattr(workers, "_has_gpu", lambda: True)
    with pytest.raises(OSError, match="start the same command once for each"):
        workers.start(print, [], workers=2, folder=tmp_path, job={})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--folds", "1"], "--folds 1: two or more"),
        (["--folds", "3", "--only", "02"], "--only does not go with --folds"),
        (["--sweep", "lrr", "1"], "--sweep lrr: no parameter of 02_train or 03_evaluate; did you mean lr?"),
        (["--sweep", "lr", "fast"], "lr takes a float"),
        (["--workers", "2"], "add --folds N"),
        (["--folds", "3", "--workers", "-2"], "--workers -2: 1 or more"),
    ],
)
def test_what_folds_and_sweeps_cannot_do_is_said_before_anything_is_written(checkout, arguments, message):
    code, said = finish(start(checkout, "--run", "never", *arguments))
    assert code == 2 and message in said and not (checkout / "runs" / "never").exists()


# --- claims


def test_a_task_is_held_by_one_and_free_afterwards(tmp_path):
    claim = partial(workers.claimed, tmp_path)
    with claim("a") as first, claim("a") as second, claim("b") as other:
        assert (first, second, other) == (True, False, True)
    with claim("a") as again:
        assert again


def test_a_task_may_be_called_like_another_with_its_number(tmp_path):
    with workers.claimed(tmp_path, "ema=0.99") as first, workers.claimed(tmp_path, "ema=0") as second:
        assert first and second
    with workers.claimed(tmp_path, "ema=0") as again, workers.claimed(tmp_path, "[a]*") as odd:
        assert again and odd


def test_a_holder_elsewhere_counts_as_dead_once_it_touches_no_more(tmp_path):
    claim = tmp_path / "a.1"
    claim.write_text("elsewhere 1")
    with workers.claimed(tmp_path, "a") as held:
        assert not held
    old = time.time() - workers.STALE_S - 5
    os.utime(claim, (old, old))
    with workers.claimed(tmp_path, "a") as held:
        assert held and (tmp_path / "a.2").exists()


def test_a_dead_holder_of_here_is_known_and_one_of_another_container_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for task, where in (("here", files.processes()), ("there", "0123456789ab")):  # of the same host name
        (tmp_path / f"{task}.1").write_text(f"{where} {gone.pid} on {platform.node()}")
    with workers.claimed(tmp_path, "here") as here, workers.claimed(tmp_path, "there") as there:
        assert here and not there


def test_a_disk_that_is_away_for_a_moment_costs_no_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "BEAT_S", 0.02)
    touch, times = os.utime, []

    def stale(path, *args):
        times.append(path)
        if len(times) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        touch(path, *args)

    monkeypatch.setattr(os, "utime", stale)
    with workers.claimed(tmp_path, "a"):
        for _ in range(200):
            if len(times) > 2:
                break
            time.sleep(0.05)
        assert len(times) > 2


def test_a_claim_is_touched_while_it_is_held_and_its_loss_interrupts(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "BEAT_S", 0.02)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt), workers.claimed(tmp_path, "a"):
            os.utime(tmp_path / "a.1", (1, 1))
            for _ in range(200):
                if (tmp_path / "a.1").stat().st_mtime > 1:
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("nobody touches the claim")
            (tmp_path / "a.2").touch()
            time.sleep(10)
    finally:
        signal.signal(signal.SIGINT, before)


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


# --- the folds' networks together


@pytest.mark.parametrize("n, sweep, places", [(2, [""], ["folds/0", "folds/1"]), (0, "ab", ["sweep/a", "sweep/b"])])
def test_what_another_process_trains_otherwise_is_not_gathered(n, sweep, places, tmp_path, capsys):
    ids = ["P0", "P1", "P2"]
    parts = [{"train": [ids[k]], "val": [ids[k - 1]], "test": [ids[k - 2]]} for k in range(2)]
    run = Run(tmp_path)
    write_splits(run.splits, parts[0], folds=parts, unlabelled=[], contents=dict.fromkeys(ids))
    empty = {field.name: None for field in dataclasses.fields(Plan)}
    of_stages = {name: dict.fromkeys(PER_FOLD, {}) for name in ("values", "given")}
    plan = Plan(
        **empty
        | of_stages
        | {"keys": dict.fromkeys(PER_FOLD, "mine"), "folds": n, "sweep": {name: {} for name in sweep}}
    )

    def run_stages(plan, own, stages):
        done = {"status": "finished", "seconds": 1}
        own.record(stages=dict.fromkeys(stages, done | {"key": "mine"}))
        if own.folder == tmp_path / places[1]:  # meanwhile
            Run(tmp_path / places[0]).record(stages=dict.fromkeys(stages, done | {"key": "theirs"}))
        return True

    assert not folds.share_out(plan, run, begin=lambda *given, **how: None, run_stages=run_stages)
    assert "with other parameters: nothing is gathered" in capsys.readouterr().out
    assert not run.metrics.exists() and not (tmp_path / "sweep.csv").exists()


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
    soft = [predict([load_network(own.best, device=HOW["device"])], pack(case), flips=False) for own in members]
    classes = np.mean(soft, axis=0).argmax(axis=1).astype(np.uint8)
    # Of the folds' rules 0 and 10, 0 and 5 voxels the lower ones: none.
    assert np.array_equal(read_mask(run.predictions / "Tiny_4_seg.nii.gz"), pack(case).to_volume(classes))
    assert run.submission.with_suffix(".zip").exists()
