"""Training in several processes as a notebook starts it."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.runs import Run
from brats_helpers.training import launch as launching
from brats_helpers.training.launch import launch
from tests.tiny_training import HOW, SETTINGS


@pytest.fixture
def parts(tiny_patients, tmp_path):
    packed = prepare(find_cases(tiny_patients), cache_dir=tmp_path / "cache", workers=1)
    return packed[:3], packed[3:]


def test_two_processes_train_a_run_and_print_as_one(parts, tmp_path, capsys):
    """On an encoder with layers that a U-Net does not use, which processes must not wait for."""
    run = Run(tmp_path / "run")
    settings = dataclasses.replace(SETTINGS, epochs=2, encoder="efficientnet-b0", encoder_weights="none")
    history = launch(run, settings, *parts, processes=2, **HOW)
    said = capsys.readouterr().out
    assert [row["epoch"] for row in history] == [1, 2] and history[1]["train_loss"] < history[0]["train_loss"]
    assert said.count("epoch 1/2") == 1 and "processes 2" in said
    assert run.best.exists() and run.last.exists()
    assert json.loads((run.folder / "preflight.json").read_text())["processes"] == 2


def test_the_error_of_a_process_is_repeated(parts, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="failed in one of 3 processes.*batch_size 4 cannot be shared evenly"):
        launch(Run(tmp_path / "run"), SETTINGS, *parts, processes=3, **HOW)


def test_an_error_in_another_process_than_the_main_one_reaches_the_user(parts, tmp_path, monkeypatch):
    """Process 1 alone cannot read what it is to train on."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import brats_helpers.training.launch as launch\n"
        "    def load(place):\n"
        "        raise OSError('disk 1 is\\nunreadable')\n"
        "    launch.load = load\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
    with pytest.raises(RuntimeError, match="in one of 2 processes. process 1: disk 1 is unreadable"):
        launch(Run(tmp_path / "run"), SETTINGS, *parts, processes=2, **HOW)


def test_the_error_of_a_killed_process_comes_from_torchrun(parts, tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *sys.path]))
    with pytest.raises(RuntimeError, match="(?s)in one of 2 processes.*SIGKILL"):
        launch(Run(tmp_path / "run"), SETTINGS, *parts, processes=2, **HOW)


def test_a_process_ends_with_the_one_that_started_it():
    """Also where that one was killed: the next one trains in the same folder."""
    code = (
        "import sys, time; from brats_helpers.training.launch import _end_with\n"
        "_end_with(int(sys.argv[1])), print('begun', flush=True), time.sleep(60)"
    )
    starter = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code, str(starter.pid)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        starter.kill()
        starter.wait()
        assert process.wait(20) == 1
    finally:
        starter.kill()
        process.kill()


def test_as_many_processes_as_gpus_that_share_the_batch_evenly(parts, tmp_path, monkeypatch):
    """Here, without a GPU, one; it trains in this process."""
    monkeypatch.setattr(launching, "fit", lambda *arguments, **how: [how])
    (how,) = launch(Run(tmp_path), SETTINGS, *parts, processes=0, **HOW)
    assert how == HOW | {"facts": None, "follow": None}


def test_of_three_gpus_two_share_a_batch_of_four(parts, tmp_path, monkeypatch):
    def started(command, **how):
        raise InterruptedError(*command)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(launching.subprocess, "Popen", started)
    with pytest.raises(InterruptedError) as command:
        launch(Run(tmp_path), SETTINGS, *parts, processes=0, **HOW | {"device": torch.device("cuda")})
    assert "--nproc-per-node=2" in command.value.args
