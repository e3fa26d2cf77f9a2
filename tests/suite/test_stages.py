"""What a run does with the results that it has: kept, replaced, outdated."""

import shutil

import pytest

from brats_helpers.runs import Run
from brats_helpers.suite import stages
from brats_helpers.suite.plan import make_plan
from tests.conftest import write_tiny_case
from tests.suite.checkout import contents, run, write_splitting_checkout

ONLY = ("--only", "00,02,03")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout whose notebooks split patients, train and score."""
    return write_splitting_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def finished(checkout):
    done = run(checkout, "--run", "finished", *ONLY)
    assert done.returncode == 0, done.stdout + done.stderr
    return checkout / "runs" / "finished"


@pytest.fixture
def again(finished, request):
    """A copy of a finished run, for a test to change."""
    return shutil.copytree(finished, finished.parent / request.node.name.partition("[")[0][:40], dirs_exist_ok=True)


def move_away(patients):
    patients.rename(patients.with_name("unmounted"))


def empty(patients):
    move_away(patients)
    patients.mkdir()


@pytest.mark.parametrize("lose", [move_away, empty])
def test_a_finished_run_stays_as_it_is_where_its_patients_cannot_be_reached(checkout, again, lose):
    patients = checkout / "patients"
    before = contents(again)
    lose(patients)
    try:
        same = run(checkout, "--run", again.name, *ONLY)
        kept = contents(again)
        other = run(checkout, "--run", again.name, *ONLY, "-p", "lr", "0.25")
    finally:
        shutil.rmtree(patients, ignore_errors=True)
        patients.with_name("unmounted").rename(patients)
    assert same.returncode == 0 and "so the results stay as they are" in same.stdout, same.stdout
    assert kept == before
    assert other.returncode == 1 and f"All results in {again} stay as they are" in other.stdout, other.stdout
    assert contents(again) == before


def test_patients_that_differ_make_every_notebook_run_again(checkout, again):
    new = write_tiny_case(checkout / "patients", "P9", seed=9, modalities=["t2"])
    try:
        done = run(checkout, "--run", again.name, *ONLY)
    finally:
        shutil.rmtree(new)
    assert done.returncode == 0 and "P9 is new" in done.stdout and done.stdout.count(": started") == 3, done.stdout


@pytest.fixture
def notebooks(monkeypatch):
    """What each notebook writes, instead of executing it; an exception is raised in the middle."""
    what = {}

    def papermill(plan, stage, output, **how):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text('{"cells": []}')
        for path, text in what[stage].items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if "fails" in plan.values["02_train"]["hold"]:
            raise RuntimeError("as asked")

    monkeypatch.setattr(stages, "papermill", papermill)
    return what


def test_results_stay_until_the_notebook_finishes_and_those_not_made_again_go_then(checkout, tmp_path, notebooks):
    own = Run(tmp_path)
    first, second = (make_plan(["--run", str(tmp_path), *ONLY, "-p", "lr", lr], checkout) for lr in ("0.1", "0.2"))
    fails = make_plan(["--run", str(tmp_path), *ONLY, "-p", "hold", "fails"], checkout)
    curves, extra = own.figures / "02_curves.png", own.figures / "02_extra.png"
    notebooks |= {"00_setup": {}, "02_train": {curves: "1", extra: "1"}, "03_evaluate": {own.metrics: "{}"}}
    assert stages.run_stages(first, own, first.stages)

    notebooks["02_train"] = {}
    assert not stages.run_stages(fails, own, fails.stages)
    executed = own.notebooks / "02_train.ipynb"
    assert curves.exists() and extra.exists() and own.metrics.exists() and executed.exists()
    assert (own.notebooks / "unfinished" / "02_train.ipynb").exists()  # the failed one, to look at
    status = {stage: entry["status"] for stage, entry in own.manifest["stages"].items()}
    assert status == {"00_setup": "finished", "02_train": "failed", "03_evaluate": "outdated"}

    notebooks["02_train"] = {curves: "2"}
    assert stages.run_stage(second, own, "02_train")
    assert curves.read_text() == "2" and not extra.exists()
    assert own.metrics.exists() and own.manifest["stages"]["03_evaluate"]["status"] == "outdated"
    assert stages.run_stage(second, own, "03_evaluate") and stages.is_finished(second, own, second.stages)
