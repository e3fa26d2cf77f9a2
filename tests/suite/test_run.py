"""The headless run, on five notebooks of a few lines each in a checkout of their own."""

import signal
import sys
from functools import partial

import nbformat
import pytest

from brats_helpers.labels import DataError
from brats_helpers.runs import Run
from brats_helpers.suite import environment
from brats_helpers.suite.plan import make_plan
from brats_helpers.suite.stages import reason
from tests.suite.checkout import CELLS, dead, manifest, run, start, wait


def test_a_run_streams_output_records_facts_and_resumes(checkout):
    first = run(checkout, "--run", "whole")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "epoch 1 lr 0.01\nepoch 2 lr 0.01\n" in first.stdout
    assert "noise" not in first.stdout and first.stderr == ""
    report = checkout / "runs" / "whole" / "report" / "index.html"
    assert str(report) in first.stdout and report.exists()

    facts = manifest(checkout, "whole")
    assert facts["seen"] == ["phantom", "flair,t1,t1ce,t2", False]  # what the notebook recorded has stayed
    assert facts["profile"] == "demo" and facts["command"] == "./run_all.sh --run whole"
    assert facts["versions"]["papermill"] == environment.installed("papermill")
    assert facts["revision"] is None  # no repository
    assert {stage: entry["status"] for stage, entry in facts["stages"].items()} == dict.fromkeys(CELLS, "finished")
    trained = nbformat.read(checkout / "runs" / "whole" / "notebooks" / "02_train.ipynb", 4)
    assert trained.cells[-1].outputs[0].data["text/plain"] == repr(sys.executable)

    again = run(checkout, "--run", "whole")
    assert again.returncode == 0
    assert again.stdout.count("finished before") == 5 and "epoch" not in again.stdout

    changed = run(checkout, "--run", "whole", "-p", "lr", "0.5")
    started = [stage for stage in CELLS if f"{stage}: started" in changed.stdout]
    assert started == ["02_train", "03_evaluate", "04_advanced"]
    assert "scored 2 0.5" in changed.stdout

    other = run(checkout, "--run", "whole", "-p", "lr", "0.25", "--only", "03")
    assert other.returncode == 0
    assert "02_train ran with lr=0.5, not 0.25" in other.stdout and "started" not in other.stdout

    retrained = run(checkout, "--run", "whole", "-p", "lr", "0.25", "--only", "02")
    assert [stage for stage in CELLS if f"{stage}: started" in retrained.stdout] == ["02_train"]
    assert manifest(checkout, "whole")["stages"]["03_evaluate"]["status"] == "outdated"  # of the network before

    refused = run(checkout, "--run", "whole", "--prepare-only")
    assert refused.returncode == 2 and "would be lost" in refused.stdout
    Run(checkout / "runs" / "whole").record(profile="small")
    forgot = run(checkout, "--run", "whole")
    assert forgot.returncode == 2 and "--profile small" in forgot.stdout


def test_a_failing_notebook_names_the_cell_and_is_kept(checkout):
    answer = run(checkout, "--run", "bad", "--only", "00,02,03,04", "-p", "epochs", "13", "-p", "lr", "1e-3")
    assert answer.returncode == 1
    path = checkout / "runs" / "bad" / "notebooks" / "03_evaluate.ipynb"
    assert (
        "❌ 03_evaluate failed in code cell 4, under 'The last step': trained = Path(run_dir, 'trained').read_text()\n"
        "   AssertionError: thirteen\n   brings bad luck\n"
        f"   The notebook up to there: {path}\n"
    ) in answer.stdout
    assert "Traceback" not in answer.stdout + answer.stderr
    errors = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", ())]
    assert errors[-1].ename == "AssertionError"
    facts = manifest(checkout, "bad")["stages"]
    assert facts["03_evaluate"]["status"] == "failed" and "04_advanced" not in facts

    mended = run(checkout, "--run", "bad", "--only", "00,02,03", "-p", "epochs", "4")
    assert mended.returncode == 0
    assert [stage for stage in CELLS if f"{stage}: started" in mended.stdout] == ["02_train", "03_evaluate"]


def test_every_line_of_a_message_that_says_what_to_do_is_shown():
    tried = [f"  /kaggle/input/{k}: not there" for k in range(8)]
    message = "\n".join(["No brats2020", "Tried, in this order:", *tried, "Three ways out:", "x" * 480])
    assert reason(DataError(message)).splitlines() == [
        line if k == 0 else f"   {line}" for k, line in enumerate(f"DataError: {message}".splitlines())
    ]
    assert reason(ValueError("\n".join("y" * 600 for _ in range(30)))).count("\n") == 20


def test_a_stopped_run_resumes(checkout):
    gate = checkout / "gate"
    arguments = ["--run", "stopped", "--only", "00,02", "-p", "wait_for", str(gate)]
    pid = checkout / "runs" / "stopped" / "pid"
    for how, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)):
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's background would start it
        process = start(checkout, *arguments)
        signal.signal(signal.SIGINT, before)
        with process:
            wait(pid.exists)
            process.send_signal(how)
            output, errors = process.communicate(timeout=30)
        assert process.returncode == code
        assert (f"this continues: ./run_all.sh {' '.join(arguments)}" in output) == (code == 130)
        assert errors == ""
        wait(partial(dead, int(pid.read_text())))
        pid.unlink()
        assert manifest(checkout, "stopped")["stages"]["02_train"]["status"] != "finished"

    gate.touch()
    answer = run(checkout, *arguments)
    assert answer.returncode == 0, answer.stdout
    assert "00_setup: finished before" in answer.stdout and "02_train: started" in answer.stdout


def test_a_run_may_lie_anywhere_and_its_log_too(checkout, tmp_path):
    drive = tmp_path / "drive" / "first"
    drive.parent.mkdir()
    plan = make_plan(["--run", str(drive)], checkout)
    assert plan.values["00_setup"]["cache_dir"] == str(checkout / "cache")  # not on the slow drive
    arguments = ["--run", str(drive), "--only", "00,01", "--log", str(tmp_path / "log.txt")]
    printed = run(checkout, *arguments).stdout
    assert (drive / "notebooks" / "01_explore.ipynb").exists() and "explored" in printed
    again = run(checkout, *arguments).stdout
    assert again.count("finished before") == 2
    assert (tmp_path / "log.txt").read_text() == printed + again


def test_a_time_limit_ends_the_run_where_it_is(checkout):
    assert run(checkout, "--run", "late", "--only", "00,01").returncode == 0
    late = run(checkout, "--run", "late", "--time-limit", "0.1", "-p", "wait_for", str(checkout / "never"))
    assert late.returncode == 1, late.stdout
    assert "❌ the time limit of 0.1 minutes was reached in 02_train" in late.stdout
    assert manifest(checkout, "late")["stages"]["02_train"]["status"] == "stopped"

    notebook = checkout / "notebooks" / "04_advanced.ipynb"
    before = notebook.read_text()
    notebook.write_text(before.replace("print('compared', minutes)", "import time; time.sleep(60)"))
    try:
        scored = run(checkout, "--run", "scored", "--time-limit", "0.25")
    finally:
        notebook.write_text(before)
    assert scored.returncode == 0, scored.stdout
    assert "⚠️ the time limit of 0.25 minutes was reached in 04_advanced" in scored.stdout
    assert (checkout / "runs" / "scored" / "report" / "index.html").exists()


def test_prepared_notebooks_carry_their_parameters_and_no_outputs(checkout):
    answer = run(checkout, "--prepare-only", "--run", "prepared", "--only", "02", "-p", "lr", "1e-3")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    folder = checkout / "runs" / "prepared" / "notebooks"
    assert [path.name for path in folder.iterdir()] == ["02_train.ipynb"]
    cells = nbformat.read(folder / "02_train.ipynb", 4).cells
    injected = next(cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", ()))
    values = {}
    exec(injected.source, values)
    assert (values["epochs"], values["lr"], values["run_dir"]) == (2, 0.001, str(folder.parent))
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_kernel_that_does_not_start_is_tried_twice_more(checkout, tmp_path, deaths):
    """As where another process took one of its ports; here it dies at once, so often as there are files to take."""
    for number in range(deaths):
        (tmp_path / f"death{number}").touch()
    (tmp_path / "ipykernel_launcher.py").write_text(
        "import runpy, sys\nfrom pathlib import Path\n"
        "here = Path(__file__).parent\nsys.path.remove(str(here))\n"
        "for death in here.glob('death*'):\n    death.unlink()\n    sys.exit(1)\n"
        "runpy.run_module('ipykernel_launcher', run_name='__main__')\n"
    )
    python = ("env", f"PYTHONPATH={tmp_path}", sys.executable)
    done = run(checkout, "--run", f"deaths{deaths}", "--only", "00", python=python)
    assert "00_setup: its kernel did not start; trying again" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (deaths > 2), done.stdout + done.stderr
    assert ("00_setup failed before its first cell\n   RuntimeError: Kernel died" in done.stdout) == (deaths > 2)
    assert not any(tmp_path.glob("death*"))
