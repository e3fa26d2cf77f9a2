"""The notebooks: clean as stored, whole as run, their compared outputs really compared."""

import ast
import csv
import dataclasses
import importlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from papermill.cli import papermill

from brats_helpers.runs import NEEDS, Run
from brats_helpers.suite.plan import profiles, read_notebooks, read_profile
from brats_helpers.training.settings import Execution, Settings, defaults

ROOT = Path(__file__).parents[1]
STAGES = list(NEEDS)
# run_all.sh uses the active environment: the one of the tests.
ACTIVE = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _run_all(*arguments):
    command = [ROOT / "run_all.sh", "--profile", "smoke", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ACTIVE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _cells(stage, kind="code"):
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def _source(cell):
    return "".join(cell["source"])


# --- as stored


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_reads_as_prose_with_small_cells(stage):
    code = [_source(cell) for cell in _cells(stage)]
    tree = [node for source in code for node in ast.walk(ast.parse(source))]
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree)
    assert not re.search(r"sys\.path|^%|^!|import \*", "\n".join(code), re.MULTILINE)
    lengths = [len(source.splitlines()) for source in code[3:]]  # after parameters, set-up and imports
    assert max(lengths) <= 15 and statistics.median(lengths) <= 5
    imports = [k for k, source in enumerate(code) if re.search(r"^(import|from) ", source, re.MULTILINE)]
    assert imports == [1, 2]  # two cells, right after the parameters: the set-up's and the notebook's own
    assert _source(_cells(stage, "markdown")[0]).startswith(f"# {stage[:2]} · ")


@pytest.mark.parametrize("stage", STAGES)
def test_every_small_cell_is_introduced_by_prose(stage):
    cells = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text("utf-8"))["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds[:5] == ["markdown", "code", "code", "code", "markdown"]
    assert "code code" not in " ".join(kinds[4:])


@pytest.mark.parametrize("stage", STAGES)
def test_a_notebook_tells_a_story(stage):
    """A question, a picture early, what to look for, a summary, exercises with folded answers, where to go next."""
    prose = [_source(cell) for cell in _cells(stage, "markdown")]
    assert "?**" in prose[0]
    figures = [k for k, cell in enumerate(_cells(stage)) if "save_figure" in _source(cell)]
    assert "/docs/overlays.png)" in prose[0] or figures[0] <= 7
    assert not figures or re.search(r"\*\*(L|l)ook(s|ed)? ", "\n".join(prose))
    summary, exercises, onward = prose[-3:]
    assert summary.startswith("## Summary\n") and len(re.findall(r"\.(?=\s|$)", summary)) == 3
    answers = re.findall(r"<details><summary>Answer</summary>\n\n.+\n\n</details>", exercises)
    assert exercises.startswith("## Exercises\n") and len(answers) == len(re.findall(r"^\*\*\d\.", exercises, re.M))
    assert 2 <= len(answers) <= 3
    assert onward.startswith("## Where to go next\n")
    assert all((ROOT / "notebooks" / link).exists() for link in re.findall(r"\]\(([^)]+)\)", onward))


def test_every_notebook_opens_by_itself():
    """The same collapsed set-up cell in each, and badges that lead to this notebook at the project's address."""
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    name = home.removeprefix("https://github.com/")
    cells = [_cells(stage)[1] for stage in STAGES]
    assert len({_source(cell) for cell in cells}) == 1 and f'"{home}"' in _source(cells[0])
    title, *code = _source(cells[0]).splitlines()
    assert title.startswith("# @title Set-up") and len(code) <= 6
    for stage, cell in zip(STAGES, cells, strict=True):
        assert cell["id"] == f"{stage[:2]}-bootstrap"
        assert cell["metadata"] == {
            "cellView": "form",  # Colab
            "jupyter": {"source_hidden": True},  # JupyterLab, and the report
            "tags": ["hide-input", "hide_input"],  # Jupyter Book, and the classic notebook's extension
        }
        links = re.findall(r"\)\]\(([^)]+)\)", _source(_cells(stage, "markdown")[0]))
        file = f"blob/main/notebooks/{stage}.ipynb"
        assert links == [
            f"https://colab.research.google.com/github/{name}/{file}",
            f"https://kaggle.com/kernels/welcome?src={home}/{file}",
            f"https://nbviewer.org/github/{name}/{file}",
        ]


def test_pictures_are_found_from_any_copy_of_a_notebook():
    """Colab and a run's folder know no path of the checkout; an address they do. The file that it names is there."""
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for stage in STAGES:
        pictures = re.findall(r"^!\[[^]]+\]\(([^)]+)\)", "\n".join(map(_source, _cells(stage, "markdown"))), re.M)
        assert all(picture.startswith(f"{home}/raw/main/docs/") for picture in pictures), stage
        assert all((ROOT / picture.removeprefix(f"{home}/raw/main/")).is_file() for picture in pictures), stage


def test_no_other_address_is_left_anywhere():
    home = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    name = home.removeprefix("https://github.com/")
    for stage in STAGES:
        for cell in [*_cells(stage), *_cells(stage, "markdown")]:
            assert set(re.findall(r"[\w.-]+/brats-helpers", _source(cell))) <= {name}


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_are_stored_where_a_test_compares_them_and_nowhere_else(stage):
    for cell in _cells(stage):
        assert bool(cell["outputs"]) == ("NBVAL_CHECK_OUTPUT" in _source(cell)), _source(cell)
        # nbstripout keeps the outputs of cells with this tag, and nbval takes a cell without a count for one not run.
        assert bool(cell["outputs"]) == ("keep_output" in cell["metadata"].get("tags", ())), _source(cell)
        assert not cell["outputs"] or cell["execution_count"]


def test_tables_of_the_datas_names_are_text():
    """What pandas styles is markup unless it is told to escape; plain frames escape by themselves."""
    styled = [_source(cell) for stage in STAGES for cell in _cells(stage) if ".style" in _source(cell)]
    assert len(styled) == 5 and all('escape="html"' in source for source in styled)


def test_whatever_the_notebooks_import_is_there():
    """A name that moves within the package is noticed in seconds, not in the middle of a run."""
    for stage, notebook in read_notebooks(ROOT).items():
        nodes = [node for source in notebook.code for node in ast.walk(ast.parse(source))]
        ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("brats_helpers")]
        assert len(ours) > 3
        for node in ours:
            home = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(home, name) or find_spec(f"{node.module}.{name}"), f"{stage}: {node.module}.{name}"


def test_every_parameter_has_a_type_and_a_meaning():
    for stage, notebook in read_notebooks(ROOT).items():
        assert "run_dir" in notebook.parameters
        for parameter in notebook.parameters.values():
            assert len(parameter.meaning) > 5, f"{stage}: {parameter.name}"


def test_every_parameter_is_used_and_every_profile_sets_declared_ones():
    notebooks = read_notebooks(ROOT)
    for notebook in notebooks.values():
        names = {
            node.id for source in notebook.code for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)
        }
        assert set(notebook.parameters) <= names
    declared = {name for notebook in notebooks.values() for name in (*notebook.parameters, *notebook.further)}
    for name in profiles(ROOT):
        assert set(read_profile(ROOT / "profiles" / f"{name}.yaml")) <= declared


def test_every_setting_has_one_home():
    """A line of a parameters cell, or a default in the package; those of notebook 02 are the ones people change."""
    notebook = read_notebooks(ROOT)["02_train"]
    fields = {field.name for kind in (Settings, Execution) for field in dataclasses.fields(kind)}
    assert set(notebook.further) == set(defaults()) and not set(notebook.further) & set(notebook.parameters)
    assert fields - set(notebook.further) - set(notebook.parameters) == {"modalities", "seed"}  # those of notebook 00
    assert len(notebook.parameters) == 12


def test_papermill_shows_each_parameter_with_type_and_meaning():
    for stage, notebook in read_notebooks(ROOT).items():
        shown = CliRunner().invoke(papermill, ["--help-notebook", str(ROOT / "notebooks" / f"{stage}.ipynb")])
        assert shown.exit_code == 0, shown.output
        text = " ".join(shown.output.split())
        for parameter in notebook.parameters.values():
            assert f"{parameter.name}: {parameter.type} (default" in text
            assert " ".join(parameter.meaning.split()[:3]) in text


# --- as run


@pytest.fixture(scope="module")
def smoke():
    """The folder of a smoke run through the script, as anybody would start it."""
    shutil.rmtree(ROOT / "runs" / "test-smoke", ignore_errors=True)
    _run_all("--run", "test-smoke")
    return ROOT / "runs" / "test-smoke"


def test_a_run_leaves_every_file_that_is_promised(smoke):
    for stage in STAGES:
        assert (smoke / "notebooks" / f"{stage}.ipynb").is_file()
    promised = ["splits.json", "checkpoints/best.pt", "checkpoints/last.pt", "history.csv", "metrics.json", "cases.csv"]
    assert not [name for name in promised if not (smoke / name).is_file()]
    assert (smoke / "report" / "index.html").is_file() and len(list((smoke / "figures").glob("*.png"))) >= 10


def test_the_manifest_tells_what_was_done_with_what(smoke):
    manifest = json.loads((smoke / "manifest.json").read_text())
    assert manifest["simulated"] is True and manifest["profile"] == "smoke"
    assert manifest["device"]["device"] and manifest["versions"]["torch"] and len(manifest["fingerprint"]) == 16
    for stage in STAGES:
        assert manifest["stages"][stage]["status"] == "finished" and manifest["stages"][stage]["seconds"] > 0
    assert manifest["stages"]["02_train"]["parameters"]["batch_size"] == 4


def test_all_figures_are_there_and_say_that_their_patients_are_simulated(smoke):
    rows = [row.split(" | ") for row in (smoke / "validation.md").read_text("utf-8").splitlines()]
    marks = {row[-1].removesuffix(" |"): row[0].removeprefix("| ") for row in rows if len(row) == 4}
    assert marks["figures-present"] == marks["figures-honest"] == "✅"


def test_the_question_of_the_profile_is_answered_and_the_others_say_what_they_cost(smoke):
    answers = json.loads((smoke / "answers.json").read_text())
    assert list(answers) == ["04_start.png"] and (smoke / "figures" / "04_start.png").is_file()
    assert [text.split(":")[0] for text in answers["04_start.png"][:2]] == [
        "frozen against fine-tuned",
        "from scratch against fine-tuned",
    ]
    assert answers["04_start.png"][-1] == "Each network was trained once, for 0.6 s."
    notebook = (smoke / "notebooks" / "04_advanced.ipynb").read_text("utf-8")
    assert "Not part of this run: 2 trainings of 0.6 s" in notebook
    assert re.search(r"To run them: ./run_all.sh .*test-smoke .*--only 04 -p questions start,backbones", notebook)


def test_every_question_is_answered_on_real_patients(tiny_patients, tmp_path):
    """Tiny ones that nobody marked as simulated; test patients have no part in it."""
    shutil.rmtree(ROOT / "runs" / "test-few", ignore_errors=True)
    asked = {"questions": "start,backbones,dimensions,augmentation,few", "few": "1,9", "volumes": "monai-unet"}
    pairs = [word for key, value in (asked | {"cache_dir": tmp_path}).items() for word in ("-p", key, str(value))]
    said = _run_all("--run", "test-few", "--data", tiny_patients, "--only", "00,02,04", *pairs)
    assert "learning from 9: there are too few patients" in said
    run = ROOT / "runs" / "test-few"
    answers = json.loads((run / "answers.json").read_text())
    names = ("start", "backbones", "dimensions", "augmentation", "few_1")
    assert list(answers) == [f"04_{name}.png" for name in names]
    assert all((run / "figures" / name).is_file() for name in answers)
    assert [text.split(":")[0] for text in answers["04_dimensions.png"][:2]] == ["2.5D against 2D", "3D against 2D"]
    sentence, packaged, curves, _ = answers["04_few_1.png"]
    assert sentence.startswith("from scratch, 1 to learn from against ImageNet, 1 to learn from: ")
    assert packaged.startswith("simulated patients, 1 to learn from against ImageNet, 1 to learn from: ")
    assert ", 2 patients to compare on, p = " in sentence and "learnt from" in curves
    shutil.rmtree(run)


def test_splits_metrics_and_predictions_are_of_the_same_patients(smoke):
    splits = json.loads((smoke / "splits.json").read_text())
    metrics = json.loads((smoke / "metrics.json").read_text())
    assert [len(splits[part]) for part in ("train", "val", "test")] == [1, 1, 1]
    assert len({*splits["train"], *splits["val"], *splits["test"]}) == 3
    assert list(metrics["cases"]) == splits["test"] and metrics["simulated"] is True
    assert list(metrics["networks"]) == ["checkpoints/best.pt"] and not Run(smoke).outdated
    assert "373.12866" in metrics["convention"]
    for region in ("WT", "TC", "ET"):
        assert {"dice", "hd95_mm"} <= set(metrics["cases"][splits["test"][0]][region])
        assert {"mean", "median", "std", "n"} <= set(metrics["summary"][region]["dice"])
    rows = list(csv.DictReader((smoke / "cases.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == splits["test"]
    written = nib.load(smoke / "predictions" / f"{splits['test'][0]}_seg.nii.gz")
    assert written.shape == (240, 240, 155) and set(np.unique(written.dataobj)) <= {0, 1, 2, 4}


def test_the_score_verb_gives_the_figures_of_the_notebook(smoke, tmp_path):
    data = json.loads((smoke / "manifest.json").read_text())["data"]
    command = [
        sys.executable,
        "-m",
        "brats_helpers",
        "score",
        smoke / "predictions",
        data,
        "--json",
        tmp_path / "s.json",
    ]
    # The patients it was trained on have no predictions, which the exit code tells.
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 1
    again, metrics = (json.loads(path.read_text()) for path in (tmp_path / "s.json", smoke / "metrics.json"))
    assert again["cases"] == metrics["cases"] and again["summary"] == metrics["summary"]
    assert again["convention"] == metrics["convention"] and again["simulated"] is True


def test_a_second_run_repeats_nothing(smoke):
    before = {path: path.stat().st_mtime_ns for path in (smoke / "notebooks").iterdir()}
    assert _run_all("--run", "test-smoke").count("finished before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_nbval_compares_the_stored_outputs(smoke):
    """The notebooks as nbval runs them, then with one stored output changed, which must fail.

    04 compares none, and the smoke run has run it.
    """
    folder = ROOT / "runs" / "test-nbval"
    shutil.rmtree(folder, ignore_errors=True)
    _run_all("--run", "test-nbval", "--prepare-only")
    compared = sorted((folder / "notebooks").glob("0[0-3]_*.ipynb"))
    done = _nbval(*compared)
    assert done.returncode == 0, done.stdout[-3000:]

    setup = folder / "notebooks" / "00_setup.ipynb"
    spoilt = setup.read_text("utf-8").replace("class 3 is ET;", "class 2 is ET;")
    assert spoilt != setup.read_text("utf-8")
    setup.write_text(spoilt, "utf-8")
    done = _nbval(setup)
    assert done.returncode == 1 and "Cell outputs differ" in done.stdout and "class 2 is ET" in done.stdout


def _nbval(*notebooks):
    """Their cells as tests; once more where a kernel did not come up, as another test took one of its ports."""
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env", "-x", "-q", "-p"]
    for _ in range(2):
        done = subprocess.run([*command, "no:cacheprovider", *notebooks], capture_output=True, text=True, cwd=ROOT)
        if "Kernel died before replying" not in done.stdout:
            break
    return done
