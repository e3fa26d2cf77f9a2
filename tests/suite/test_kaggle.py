"""The real `kaggle` client pushes the suite to a server on loopback, waits for the run and fetches its results."""

import ast
import base64
import json
import re
import shlex
import subprocess
import sys
import tarfile
from io import BytesIO, StringIO
from pathlib import Path

import pytest

from brats_helpers.suite import kaggle as kaggle_run
from brats_helpers.suite import run as suite
from brats_helpers.training.model_zip import PACKAGED
from tests.kaggle_server import TOKEN

ROOT = Path(__file__).parents[2]
LEFT = {
    "it/manifest.json": b'{"profile": "small"}',
    "it/report/index.html": b"report",
    "it/checkpoints/best.pt": bytes(3 << 20),
    "it/notebooks/00_setup.ipynb": b"{}",
    "it/metrics.json": b"{}",
}


@pytest.fixture(autouse=True)
def quick(machine, monkeypatch):
    monkeypatch.setattr(kaggle_run, "_POLL_S", 0.05)
    monkeypatch.setattr(sys, "stdin", StringIO())  # no terminal to answer from


@pytest.fixture
def kaggle(kaggle):
    kaggle.outputs = dict(LEFT)
    return kaggle


def push(tmp_path, *arguments):
    return suite.main(["--on", "kaggle", "--profile", "small", "--run", str(tmp_path / "it"), *arguments])


def left(tmp_path) -> dict[str, bytes]:
    return {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in (tmp_path / "it").rglob("*.*")}


def test_a_successful_run_is_pushed_watched_and_fetched(kaggle, account, tmp_path, capsys):
    kaggle.states = ["QUEUED", "RUNNING", "RUNNING", "COMPLETE"]
    kaggle.output_log = json.dumps([{"stream_name": "stdout", "time": 1, "data": "all is well\n"}])
    assert push(tmp_path, "--yes", "-p", "epochs", "3") == 0
    printed = capsys.readouterr().out
    assert [line.split(",")[0] for line in printed.splitlines() if line.startswith("Kaggle: ")] == [
        "Kaggle: queued",
        "Kaggle: running",
        "Kaggle: complete",
    ]
    found = left(tmp_path)
    assert {name: found[name] for name in LEFT} == LEFT
    assert found["it/kaggle.log"] == b"all is well\n"
    assert TOKEN not in printed and all(TOKEN.encode() not in content for content in found.values())

    (sent,) = kaggle.pushed
    assert (sent["slug"], sent["isPrivate"], sent["enableGpu"]) == ("tester/brats-it", True, True)
    assert sent["machineShape"] == "NvidiaTeslaT4" and sent["kernelType"] == "notebook"
    assert sent["datasetDataSources"] == ["awsaf49/brats20-dataset-training-validation"]
    assert "brats_helpers/ (" in printed.split("pushed: ")[0]  # shown before it is sent


def test_what_is_pushed_is_a_suite_that_runs(kaggle, account, tmp_path):
    assert push(tmp_path, "--yes", "--only", "00,01", "-p", "modalities", "flair,t1ce", "--time-limit", "60") == 0
    unpack, start = (cell["source"] for cell in json.loads(kaggle.pushed[0]["text"])["cells"])
    texts = [node.value for node in ast.walk(ast.parse(unpack)) if isinstance(node, ast.Constant)]
    with tarfile.open(fileobj=BytesIO(base64.b64decode(max(texts, key=len)))) as tar:
        tar.extractall(tmp_path / "suite")
    package = [
        path
        for path in (ROOT / "brats_helpers").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.stem != PACKAGED.stem  # weights are too large
    ]
    assert len(package) > 20
    for path in [
        *package,
        *(ROOT / "profiles").glob("*.yaml"),
        *(ROOT / "notebooks").glob("*.ipynb"),
        ROOT / "run_all.sh",
    ]:
        assert (tmp_path / "suite" / path.relative_to(ROOT)).read_bytes() == path.read_bytes()

    words = shlex.split(re.match("!(.*)", start)[1])
    assert words[:2] == ["bash", "/tmp/suite/run_all.sh"] and "assert _exit_code == 0" in start
    here = [word.replace("/kaggle/working", str(tmp_path)) for word in words[2:]]
    command = [sys.executable, "-m", "brats_helpers", "run", "--check", *here]
    checked = subprocess.run(command, cwd=tmp_path / "suite", capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    plan = suite.make_plan(here)
    assert plan.stages == ["00_setup", "01_explore"] and plan.time_limit == 60 and plan.folder == tmp_path / "it"
    assert plan.values["00_setup"]["modalities"] == "flair,t1ce" and plan.values["00_setup"]["data"] == "kaggle"


def test_names_are_accepted_for_kaggle_and_paths_of_this_machine_are_refused():
    weights = ["-p", "encoder", "monai-segresnet", "-p", "encoder_weights", "none"]
    plan = suite.make_plan(["--on", "kaggle", "--data", "kaggle", *weights])
    assert plan.values["02_train"]["encoder_weights"] == "none"
    suite.make_plan(["--on", "kaggle", "--data", "kaggle", "-p", "encoder_weights", "simulated"])
    for key in ("encoder_weights", "pretrained", "checkpoints", "cache_dir"):
        with pytest.raises(suite.UsageError, match=f"-p {key}: a place on this machine"):
            suite.make_plan(["--on", "kaggle", "--data", "kaggle", "-p", key, "here.pt"])


def test_paths_are_relative_to_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").touch()
    plan = suite.make_plan(["-p", "pretrained", "a.pt", "-p", "checkpoints", "a.pt,not-yet.pt"])
    assert plan.values["04_advanced"]["pretrained"] == str(tmp_path / "a.pt")
    assert plan.values["03_evaluate"]["checkpoints"] == f"{tmp_path / 'a.pt'},not-yet.pt"


def test_nothing_is_uploaded_without_consent(kaggle, account, tmp_path, capsys, monkeypatch):
    assert push(tmp_path) == 2
    assert "--yes" in capsys.readouterr().out
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert push(tmp_path) == 2
    assert kaggle.pushed == []
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert push(tmp_path) == 0 and len(kaggle.pushed) == 1


def test_without_credentials_no_request_is_made(kaggle, tmp_path, capsys):
    assert push(tmp_path, "--yes") == 1
    assert "needs an account" in capsys.readouterr().out and kaggle.requests == []


def test_refused_credentials_are_named(kaggle, account, tmp_path, capsys):
    kaggle.token_status = 401
    assert push(tmp_path, "--yes") == 1
    printed = capsys.readouterr().out
    assert "did not accept the credentials in KAGGLE_API_TOKEN (401)" in printed and kaggle.pushed == []


def test_the_reason_of_a_refused_push_is_shown(kaggle, account, tmp_path, capsys):
    kaggle.push_answer = {"error": "Maximum weekly GPU quota reached", "url": ""}
    assert push(tmp_path, "--yes") == 1
    assert "Maximum weekly GPU quota reached" in capsys.readouterr().out
    kaggle.push_answer = {"url": "u", "invalidDatasetSources": ["awsaf49/gone"]}
    assert push(tmp_path, "--yes") == 1
    assert "no data set awsaf49/gone" in capsys.readouterr().out


def test_a_failed_run_says_where_it_failed_and_its_files_are_fetched(kaggle, account, tmp_path, capsys):
    kaggle.states = ["RUNNING", "ERROR"]
    del kaggle.outputs["it/report/index.html"]
    words = "00_setup: started\n❌ 00_setup failed in code cell 3\n   DataError: no patients\n"
    kaggle.output_log = json.dumps([{"stream_name": "stdout", "time": 1, "data": words}])
    assert push(tmp_path, "--yes") == 1
    printed = capsys.readouterr().out
    assert "❌ the run ended on Kaggle as ERROR: ❌ 00_setup failed in code cell 3" in printed
    assert (tmp_path / "it" / "manifest.json").exists() and "DataError" in (tmp_path / "it" / "kaggle.log").read_text()
    kaggle.states, kaggle.outputs = ["COMPLETE"], dict(LEFT)
    assert push(tmp_path, "--yes") == 0 and len(kaggle.pushed) == 2  # a failed run is pushed again


def test_a_broken_connection_is_retried(kaggle, account, tmp_path, capsys):
    kaggle.states = ["RUNNING", 503, 502, "RUNNING", "COMPLETE"]
    kaggle.cuts = [5, 1 << 20, 1 << 19]  # of the first files
    assert push(tmp_path, "--yes") == 0
    assert "no answer, trying again" in capsys.readouterr().out
    found = left(tmp_path)
    assert {name: found[name] for name in LEFT} == LEFT and len(kaggle.pushed) == 1


def test_a_connection_that_stays_broken_ends_the_wait_and_the_same_command_continues(
    kaggle, account, tmp_path, capsys, monkeypatch
):
    kaggle.states = ["RUNNING", 503]
    monkeypatch.setattr(kaggle_run, "_PATIENCE_S", 1)
    assert push(tmp_path, "--yes") == 1
    printed = capsys.readouterr().out
    assert "The run continues: https://kaggle/code/tester/it. The same command" in printed

    kaggle.states = ["COMPLETE"]
    assert push(tmp_path) == 0  # no consent needed
    assert "pushed before" in capsys.readouterr().out and len(kaggle.pushed) == 1


def test_credentials_that_expire_during_the_run(kaggle, account, tmp_path, capsys):
    kaggle.states = ["RUNNING", 401]
    assert push(tmp_path, "--yes") == 1
    printed = capsys.readouterr().out
    assert "(401)" in printed and "KAGGLE_API_TOKEN" in printed and "The run continues" in printed
    kaggle.states = ["COMPLETE"]
    assert push(tmp_path) == 0 and len(kaggle.pushed) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "."], "--on kaggle has Kaggle's data sets and simulated patients"),
        (["--prepare-only"], "--prepare-only"),
        (["--only", "03"], "03_evaluate needs 02_train"),
    ],
)
def test_options_that_kaggle_cannot_serve_are_refused_before_the_upload(tmp_path, capsys, arguments, message):
    assert push(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().out
