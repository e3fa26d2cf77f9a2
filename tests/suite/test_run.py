"""The headless run, on five notebooks of a few lines each in a checkout of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nbformat
import nibabel as nib
import numpy as np
import pytest
import yaml

from brats_helpers.__main__ import main
from brats_helpers.labels import DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.rules import CONVENTIONS
from brats_helpers.suite import environment
from brats_helpers.suite import plan as planning
from brats_helpers.suite import run as suite

HERE = Path(__file__).parents[2]

CELLS = {
    "00_setup": [
        'run_dir: str = "runs/demo"  # folder of the run\n'
        'data: str = "phantom"  # where the patients are\n'
        'modalities: str = "flair,t1,t1ce,t2"  # which images, in order\n'
        "skip: bool = False  # leave incomplete patients out\n"
        'cache_dir: str = "cache"  # prepared patients\n'
        'data_dir: str = "data"  # downloads',
        "from brats_helpers.runs import Run\n\nRun(run_dir).record(seen=[data, modalities, skip])",
    ],
    "01_explore": ['run_dir: str = "runs/demo"  # folder of the run', "print('explored')"],
    "02_train": [
        'run_dir: str = "runs/demo"  # folder of the run\n'
        "epochs: int = 3  # passes over the training slices\n"
        "lr: float = 0.001  # learning rate\n"
        "minutes: float = 0.0  # of training; 0: no limit\n"
        'wait_for: str = ""  # a file that must be there before the training ends',
        "from pathlib import Path\nimport os, sys, time",
        "for epoch in range(epochs):\n    print(f'epoch {epoch + 1} lr {lr}')\n    print('noise', file=sys.stderr)",
        "Path(run_dir, 'pid').write_text(str(os.getpid()))\n"
        "while wait_for and not Path(wait_for).exists():\n    time.sleep(0.05)",
        "Path(run_dir, 'trained').write_text(f'{epochs} {lr}')\nsys.executable",
    ],
    "03_evaluate": [
        'run_dir: str = "runs/demo"  # folder of the run',
        "from pathlib import Path",
        "trained = Path(run_dir, 'trained').read_text()\n"
        "assert trained != '13 0.001', 'thirteen\\nbrings bad luck'\nprint('scored', trained)",
    ],
    "04_advanced": [
        'run_dir: str = "runs/demo"  # folder of the run\nminutes: float = 2.0  # training time a variant\n'
        "epochs: int = 1  # of each variant",
        "print('compared', minutes)",
    ],
}
REPORT = """
def fresh_report(run):
    run.report.parent.mkdir(exist_ok=True)
    run.report.write_text("report")
    return run.report
"""


def write_notebooks(folder: Path, cells_of=CELLS) -> None:
    folder.mkdir(exist_ok=True)
    for stage, sources in cells_of.items():
        cells = [nbformat.v4.new_markdown_cell(f"# {stage}"), *map(nbformat.v4.new_code_cell, sources)]
        cells[1].metadata["tags"] = ["parameters"]
        cells.insert(-1, nbformat.v4.new_markdown_cell("Text.\n\n## The last step"))
        kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, folder / f"{stage}.ipynb")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the suite's driver, tiny notebooks and two profiles."""
    root = tmp_path_factory.mktemp("checkout")
    package = root / "brats_helpers"
    for name in (
        "__init__",
        "__main__",
        "files",
        "log",
        "runs",
        "suite/__init__",
        "suite/environment",
        "suite/plan",
        "suite/run",
    ):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "brats_helpers" / f"{name}.py", (package / name).parent)
    (package / "report").mkdir()
    (package / "report" / "__init__.py").touch()
    (package / "report" / "build.py").write_text(REPORT)
    for name in ("run_all.sh", "setup_env.sh", "pyproject.toml"):
        shutil.copy(HERE / name, root)
    (root / "requirements.txt").write_text("papermill>=2.6  # why\nno-such-package\n")
    write_notebooks(root / "notebooks")
    (root / "profiles").mkdir()
    (root / "profiles" / "demo.yaml").write_text("# for the newcomer\nepochs: 2  # in 02 and 04\nlr: 1e-2\n")
    (root / "profiles" / "small.yaml").write_text('# on real data\nmodalities: "flair,t1ce"\n')
    kernel = root / "jupyter" / "kernels" / "python3"  # a stranger's, which must not be taken
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "Other", "language": "python"}')
    return root


def start(checkout, *arguments, python=(sys.executable,)):
    command = [*python, "-m", "brats_helpers", "run", *arguments]
    environ = os.environ | {"JUPYTER_PATH": str(checkout / "jupyter")}
    return subprocess.Popen(
        command, cwd=checkout, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(checkout, *arguments, python=(sys.executable,)):
    with start(checkout, *arguments, python=python) as process:
        stdout, stderr = process.communicate(timeout=100)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def manifest(checkout, name):
    return json.loads((checkout / "runs" / name / "manifest.json").read_text())


# --- what is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--profle", "small"], "unknown argument --profle; did you mean --profile?"),
        (["small"], "unknown argument small"),
        (["--run"], "expected one argument"),
        (["--profile", "smal"], "unknown profile smal; did you mean small?"),
        (["--profile", "huge"], "there are: demo, small"),
        (["--only", "02,3"], "unknown notebook '3'; did you mean 03?"),
        (["--only", ""], "unknown notebook ''"),
        (["--log", "."], "--log .: a folder, expected a file"),
        (["--time-limit", "nan"], "--time-limit nan: minutes, more than 0"),
        (["--only", "02_trian"], "did you mean 02_train?"),
        (["-p", "epoch", "3"], "-p epoch: no notebook has that parameter; did you mean epochs?"),
        (["-p", "epochs", "abc"], "epochs takes an int (passes over the training slices), got 'abc'"),
        (["-p", "epochs", "1e3"], "epochs takes an int"),
        (["-p", "lr", "fast"], "lr takes a float (learning rate), got 'fast'"),
        (["-p", "skip", "perhaps"], "skip takes true or false"),
        (["-p", "run_dir", "x"], "--run"),
        (["--run", ".elsewhere"], "--run '.elsewhere'"),
        (["--run", "/no/such/drive/first"], "there is no folder /no/such/drive; make it, or mount its drive, first"),
        (["--log", "/no/such/folder/log"], "--log /no/such/folder/log: there is no folder /no/such/folder"),
        (["--time-limit", "soon"], "--time-limit: invalid float value: 'soon'"),
        (["--time-limit", "-3"], "minutes, more than 0"),
        (["--yes"], "--yes agrees to the upload of --on kaggle"),
        (["--on", "colab"], "invalid choice: 'colab'"),
        (["--data", "phantm"], "--data phantm: no such folder; did you mean phantom?"),
        (["--only", "03"], "03_evaluate needs 02_train, which has not finished in run demo"),
    ],
)
def test_wrong_arguments_stop_before_anything_is_written(checkout, capsys, arguments, message):
    before = sorted(checkout.rglob("*"))
    assert suite.main(arguments, checkout) == 2
    assert message in capsys.readouterr().out
    assert sorted(checkout.rglob("*")) == before


def test_a_profile_with_a_key_of_no_notebook_is_an_error(checkout, capsys):
    profile = checkout / "profiles" / "typo.yaml"
    profile.write_text("epoch: 3\n")
    try:
        assert suite.main(["--profile", "typo"], checkout) == 2
    finally:
        profile.unlink()
    assert "typo.yaml: no notebook has a parameter epoch; did you mean epochs?" in capsys.readouterr().out


def test_values_are_typed_and_reach_every_notebook_that_declares_them(checkout):
    arguments = [
        "--data",
        str(checkout),
        "-p",
        "lr",
        "1e-3",
        "-p",
        "skip",
        "yes",
        "-p",
        "epochs",
        "5",
        "--run",
        "x",
        "-p",
        "data_dir",
        "d",
    ]
    plan = suite.make_plan(arguments, checkout)
    folder = str(checkout / "runs" / "x")
    assert plan.given == {
        "00_setup": {
            "data": str(checkout),
            "skip": True,
            "run_dir": folder,
            "cache_dir": str(checkout / "cache"),
            "data_dir": str(Path.cwd() / "d"),
        },
        "01_explore": {"run_dir": folder},
        "02_train": {"epochs": 5, "lr": 0.001, "run_dir": folder},
        "03_evaluate": {"run_dir": folder},
        "04_advanced": {"epochs": 5, "run_dir": folder},
    }
    assert plan.values["00_setup"]["modalities"] == "flair,t1,t1ce,t2"
    assert plan.values["04_advanced"] == {"run_dir": folder, "minutes": 2.0, "epochs": 5}


def test_help_and_checks_need_no_package_but_python(checkout):
    bare = (sys.executable, "-S")  # without site-packages
    assert subprocess.run([*bare, "-c", "import papermill"], capture_output=True).returncode != 0
    answer = run(checkout, "--help", python=bare)
    assert answer.returncode == 0
    words = " ".join(answer.stdout.split())
    assert "demo for the newcomer" in words
    assert "02_train run_dir str runs/demo folder of the run epochs int 3 passes over the training slices" in words
    assert "130 stopped" in words
    assert run(checkout, "--check", "--profile", "small", python=bare).returncode == 0
    assert run(checkout, "--check", "--profile", "smal", python=bare).returncode == 2
    assert not (checkout / "runs").exists()


@pytest.mark.parametrize("name", planning.profiles(HERE))
def test_profiles_are_yaml_and_say_what_they_are_for(name):
    text = (HERE / "profiles" / f"{name}.yaml").read_text()
    assert planning.read_profile(HERE / "profiles" / f"{name}.yaml") == yaml.load(text, yaml.BaseLoader)
    assert text.startswith("# ")


def test_profiles_fit_the_notebooks_and_repeat_none_of_their_defaults():
    assert planning.profiles(HERE) == ["demo", "optimal", "production", "quick", "small", "smoke"]
    notebooks = planning.read_notebooks(HERE)
    for name in planning.profiles(HERE):
        plan = suite.make_plan(["--profile", name, "--run", "no-such-run"])
        for key in planning.read_profile(HERE / "profiles" / f"{name}.yaml"):
            defaults = [
                (given[key], notebooks[stage].parameters[key].default)
                for stage, given in plan.given.items()
                if key in given
            ]
            assert any(value != default for value, default in defaults), f"{name}: {key} is {defaults[0][1]} anyway"


def test_a_parameters_cell_that_computes_is_an_error(tmp_path):
    with pytest.raises(suite.UsageError, match="line 2"):
        planning._declared("epochs: int = 3\nsteps = epochs * 2", tmp_path)


# --- running it ---------------------------------------------------------------------------------------------------


def test_a_run_streams_records_and_picks_up(checkout):
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
    assert "03_evaluate" not in manifest(checkout, "whole")["stages"]  # scores of the network before

    refused = run(checkout, "--run", "whole", "--prepare-only")
    assert refused.returncode == 2 and "would be lost" in refused.stdout
    Run(checkout / "runs" / "whole").record(profile="small")
    forgot = run(checkout, "--run", "whole")
    assert forgot.returncode == 2 and "--profile small" in forgot.stdout


def test_a_failing_notebook_says_where_and_leaves_itself(checkout):
    answer = run(checkout, "--run", "bad", "--only", "00,02,03,04", "-p", "epochs", "13", "-p", "lr", "1e-3")
    assert answer.returncode == 1
    path = checkout / "runs" / "bad" / "notebooks" / "03_evaluate.ipynb"
    assert (
        "❌ 03_evaluate failed in code cell 4, under 'The last step': trained = Path(run_dir, 'trained').read_text()\n"
        "   AssertionError: thirteen\n   brings bad luck\n"
        f"   The notebook as far as it came: {path}\n"
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
    assert suite._reason(DataError(message)).splitlines() == [
        line if k == 0 else f"   {line}" for k, line in enumerate(f"DataError: {message}".splitlines())
    ]
    assert suite._reason(ValueError("\n".join("y" * 600 for _ in range(30)))).count("\n") == 20


def test_a_stopped_run_goes_on_where_it_stopped(checkout):
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
        assert (f"this picks up: ./run_all.sh {' '.join(arguments)}" in output) == (code == 130)
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
    plan = suite.make_plan(["--run", str(drive)], checkout)
    assert plan.values["00_setup"]["cache_dir"] == str(checkout / "cache")  # not on the slow drive
    arguments = ["--run", str(drive), "--only", "00,01", "--log", str(tmp_path / "log.txt")]
    printed = run(checkout, *arguments).stdout
    assert (drive / "notebooks" / "01_explore.ipynb").exists() and "explored" in printed
    again = run(checkout, *arguments).stdout
    assert again.count("finished before") == 2
    assert (tmp_path / "log.txt").read_text() == printed + again


def test_an_attached_suite_that_is_read_only_writes_elsewhere(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != checkout)  # a root user may write to any folder
    monkeypatch.chdir(tmp_path)
    plan = suite.make_plan([], checkout)
    assert plan.folder == tmp_path / "runs" / "demo"
    assert plan.values["00_setup"]["cache_dir"] == str(Path(tempfile.gettempdir()) / "cache")


def test_a_time_limit_shortens_the_training(checkout):
    plan = suite.make_plan(["--time-limit", "100", "--run", "limited", "-p", "minutes", "5"], checkout)
    assert plan.given["02_train"]["minutes"] == 5  # shorter as it is
    plan = suite.make_plan(["--time-limit", "100", "--run", "limited"], checkout)
    assert plan.given["02_train"]["minutes"] == 70  # 0.7 of the whole
    suite._fit_training(plan, elapsed_s=10 * 60)
    assert plan.given["02_train"]["minutes"] == 70  # 100 less 10 for the set-up, less 20 for the scores
    suite._fit_training(plan, elapsed_s=30 * 60)
    assert plan.given["02_train"]["minutes"] == 50


def test_a_time_limit_ends_the_run_where_it_is(checkout):
    assert run(checkout, "--run", "late", "--only", "00,01").returncode == 0
    late = run(checkout, "--run", "late", "--time-limit", "0.1", "-p", "wait_for", str(checkout / "never"))
    assert late.returncode == 1, late.stdout
    assert "❌ the time limit, 0.1 minutes, came in 02_train" in late.stdout
    assert manifest(checkout, "late")["stages"]["02_train"]["status"] == "stopped"

    notebook = checkout / "notebooks" / "04_advanced.ipynb"
    before = notebook.read_text()
    notebook.write_text(before.replace("print('compared', minutes)", "import time; time.sleep(60)"))
    try:
        scored = run(checkout, "--run", "scored", "--time-limit", "0.25")
    finally:
        notebook.write_text(before)
    assert scored.returncode == 0, scored.stdout
    assert "⚠️ the time limit, 0.25 minutes, came in 04_advanced" in scored.stdout
    assert (checkout / "runs" / "scored" / "report" / "index.html").exists()


def wait(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def dead(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


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


# --- what is installed --------------------------------------------------------------------------------------------


def test_requirements_are_held_against_what_is_installed(tmp_path, monkeypatch):
    versions = {"torch": "2.10.1+cu121", "numpy": "2.0.0rc1", "brats-helpers": "0.1.0", "medpy": "0.5"}
    monkeypatch.setattr(environment, "installed", versions.get)
    (tmp_path / "requirements.txt").write_text("# why\ntorch>=2.4  # GradScaler\nnumpy>=1.26,<2\nnilearn\n\n")
    (tmp_path / "pyproject.toml").write_text("[project.optional-dependencies]\ntest = ['medpy>=0.5.0', 'pytest']\n")
    assert environment.missing(tmp_path) == ["numpy>=1.26,<2", "nilearn"]
    assert environment.missing(tmp_path, "test") == ["numpy>=1.26,<2", "nilearn", "pytest"]


@pytest.mark.parametrize("system, editable", [({}, ["-e"]), ({"COLAB_RELEASE_TAG": "release"}, [])])
def test_run_all_installs_what_is_missing_into_the_active_environment(checkout, tmp_path, system, editable):
    log = tmp_path / "pip.log"  # written by a pip that does nothing but write down what it is told
    (tmp_path / "pip.py").write_text(f"import sys\nwith open({str(log)!r}, 'a') as log: print(*sys.argv[1:], file=log)")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": path, "PYTHONPATH": str(tmp_path)} | system

    def run_all(*arguments):
        command = [checkout / "run_all.sh", "--run", f"shell-{len(editable)}", "--only", "01", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    wrong = run_all("--prepare", "--data", "phantm")
    assert (wrong.returncode, log.exists()) == (2, False), wrong.stdout + wrong.stderr
    right = run_all("--prepare-only")
    assert right.returncode == 0, right.stdout + right.stderr
    assert "no-such-package" in right.stdout and "papermill>=2.6" not in right.stdout
    command, *flags, place = log.read_text().split()
    assert command == "install" and f"torch=={environment.installed('torch')}" in flags
    assert [flag for flag in flags if flag == "-e"] == editable
    assert (place == str(checkout)) == bool(editable)  # elsewhere from a copy, as the checkout may be read-only


# --- the other verbs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["phantom", "predict", "score", "compare"])
def test_verbs_explain_themselves_without_loading_anything(verb):
    loaded = f"import sys; from brats_helpers.__main__ import main; main(['{verb}', '--help'])"
    answer = subprocess.run([sys.executable, "-S", "-c", loaded], cwd=HERE, capture_output=True, text=True)
    assert answer.returncode == 0 and "usage: python -m brats_helpers" in answer.stdout


def test_a_verb_without_its_arguments_is_a_usage_error():
    answer = subprocess.run([sys.executable, "-m", "brats_helpers", "phantom", "x"], cwd=HERE, capture_output=True)
    assert answer.returncode == 2 and b"--cases" in answer.stderr


def test_score_prints_and_writes_what_metrics_holds(tmp_path, capsys):
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2, 2, 2:4] = 4
    pred = np.zeros_like(truth)
    pred[2, 2, 2] = 4  # one of the two voxels: Dice 2 * 1 / (2 + 1)
    for folder, labels in (("truth/a", truth), ("truth/b", truth), ("pred", pred)):
        (tmp_path / folder).mkdir(parents=True)
        case = folder[-1] if "/" in folder else "a"
        nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / folder / f"{case}_seg.nii.gz")
    file = tmp_path / "scores.json"
    folders = [str(tmp_path / name) for name in ("pred", "truth")]
    assert main(["score", *folders, "--json", str(file)]) == 1  # b has no prediction
    printed = capsys.readouterr().out
    assert "⚠️ b is not scored: missing" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(("a ", "mean "))] == ["0.667", "0.667"]
    assert CONVENTIONS["brats2020"] in printed
    assert json.loads(file.read_text())["cases"]["a"]["ET"]["dice"] == pytest.approx(2 / 3)

    assert main(["score", str(tmp_path / "nowhere"), str(tmp_path / "truth")]) == 1
    assert capsys.readouterr().out.startswith("❌ ")


def test_score_knows_every_convention(tmp_path, capsys):
    for convention in CONVENTIONS:
        assert main(["score", str(tmp_path), str(tmp_path), "--convention", convention]) == 1  # nothing to score
    with pytest.raises(SystemExit, match="2"):
        main(["score", str(tmp_path), str(tmp_path), "--convention", "brats2032"])


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_kernel_that_does_not_come_up_is_started_twice_more(checkout, tmp_path, deaths):
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
    assert "00_setup: its kernel did not come up; once more" in done.stdout, done.stdout + done.stderr
    assert done.returncode == (deaths > 2), done.stdout + done.stderr
    assert ("00_setup failed before its first cell\n   RuntimeError: Kernel died" in done.stdout) == (deaths > 2)
    assert not any(tmp_path.glob("death*"))
