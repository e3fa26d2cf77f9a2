"""What a command asks for: arguments, profiles and parameters, checked before anything runs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from brats_helpers.suite import parameters
from brats_helpers.suite import run as suite
from brats_helpers.suite.parameters import UsageError, profiles, read_notebooks, read_profile
from brats_helpers.suite.plan import help_text, make_plan
from brats_helpers.suite.run import with_time_left
from brats_helpers.training.settings import from_text
from tests.suite.checkout import HERE, run


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
        (["--time-limit", "nan"], "--time-limit nan: expected minutes, more than 0"),
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
        (["--time-limit", "-3"], "expected minutes, more than 0"),
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
    pairs = ["-p", "lr", "1e-3", "-p", "skip", "yes", "-p", "epochs", "5", "-p", "data_dir", "d"]
    plan = make_plan(["--data", str(checkout), "--run", "x", *pairs], checkout)
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


@pytest.mark.parametrize("name", profiles(HERE))
def test_every_profile_begins_with_its_purpose(name):
    assert (HERE / "profiles" / f"{name}.yaml").read_text("utf-8").startswith("# ")


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: [1, 2]\n", "lr has several values"),
        ("- lr\n", "expected lines of the form `key: value`"),
        ("lr: 'open\n", "is not YAML"),
        (b"lr: \xff\n", "is not YAML"),
    ],
)
def test_a_profile_that_is_no_flat_yaml_is_refused_by_name(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as refusal:
        read_profile(path)
    assert str(path) in str(refusal.value)


def test_a_profile_keeps_every_value_as_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# mine\nlr: 1e-3  # slow\nsplit: 10,2,2\nmodalities: 'flair,t1ce'\nskip: no\n")
    expected = {"lr": "1e-3", "split": "10,2,2", "modalities": "flair,t1ce", "skip": "no"}
    assert read_profile(path) == expected
    path.write_text("# nothing\n")
    assert read_profile(path) == {}


def test_profiles_fit_the_notebooks_and_repeat_none_of_their_defaults():
    assert profiles(HERE) == ["demo", "optimal", "production", "quick", "small", "smoke"]
    notebooks = read_notebooks(HERE)
    for name in profiles(HERE):
        plan = make_plan(["--profile", name, "--run", "no-such-run"])
        asked = read_profile(HERE / "profiles" / f"{name}.yaml")
        further = notebooks["02_train"].further
        assert all(text != further[key].text for key, text in asked.items() if key in further), name
        expected = {key: text for key, text in asked.items() if key in further}
        assert from_text(plan.given["02_train"].get("settings", "")) == expected
        for key in set(asked) - set(further):
            defaults = [
                (given[key], notebooks[stage].parameters[key].default)
                for stage, given in plan.given.items()
                if key in given
            ]
            assert any(value != default for value, default in defaults), f"{name}: {key} is {defaults[0][1]} anyway"


def test_settings_come_one_by_one_or_together():
    """Whatever the order, so that a finished training is recognised; the last value wins."""
    how = ["--run", "no-such-run", "--profile", "smoke"]
    plans = [
        make_plan([*how, "-p", "warm_up", "0.1", "-p", "ema", "0.9"]),
        make_plan([*how, "-p", "ema", "0.5", "-p", "settings", "ema=0.9, warm_up=0.1"]),
    ]
    expected = "ema=0.9, slices_per_epoch=16, warm_up=0.1"  # the profile's own among them
    assert [plan.given["02_train"]["settings"] for plan in plans] == [expected] * 2
    assert plans[0].keys == plans[1].keys != make_plan(how).keys
    plan = make_plan([*how, "-p", "settings", "epochs=7, class_weights=1,1,2,1"])
    assert plan.given["02_train"]["epochs"] == 7  # it has a line of its own in the parameters cell
    assert plan.given["02_train"]["settings"] == "class_weights=1,1,2,1, slices_per_epoch=16"


@pytest.mark.parametrize(
    "pair, message",
    [
        (("emma", "0.9"), "no notebook has that parameter; did you mean ema"),
        (("ema", "1.5"), "ema 1.5: expected a number of at least 0 and below 1"),
        (("ema", ""), "expected name=value"),
        (("settings", "emma=0.9"), "there is no setting 'emma': did you mean ema"),
        (("settings", "ema=0.9, ema=0.8"), "ema is given twice"),
        (("settings", "ema"), "expected name=value"),
    ],
)
def test_a_setting_that_cannot_be_used_stops_before_anything_runs(pair, message):
    with pytest.raises(UsageError, match=message):
        make_plan(["--run", "no-such-run", "-p", *pair])


def test_settings_can_be_swept():
    sweep = ["--sweep", "ema", "0.9", "0.99", "--sweep", "lr", "0.1", "--sweep", "warm_up", "0.2"]
    plan = make_plan(["--profile", "smoke", "--run", "no-such-run", *sweep])
    name = "ema=0.9;lr=0.1;warm_up=0.2"
    assert list(plan.sweep) == [name, "ema=0.99;lr=0.1;warm_up=0.2"]
    member = plan.with_values(plan.sweep[name], stages=["02_train"])
    assert member.values["02_train"]["settings"] == "ema=0.9, slices_per_epoch=16, warm_up=0.2"
    assert member.given["02_train"]["lr"] == 0.1
    with pytest.raises(UsageError, match="ema 2.0: expected a number of at least 0 and below 1"):
        make_plan(["--run", "no-such-run", "--sweep", "ema", "2"])
    with pytest.raises(UsageError, match="--sweep settings: no parameter of 02_train"):
        make_plan(["--run", "no-such-run", "--sweep", "settings", "ema=0.9"])


def test_help_lists_the_settings_that_have_no_line_in_a_notebook():
    text = " ".join(help_text().split())
    assert "settings (-p KEY VALUE, or several together: -p settings 'ema=0.9, warm_up=0.1')" in text
    assert all(f" {name} {d.text} {d.meaning}" in text for name, d in read_notebooks(HERE)["02_train"].further.items())


def test_a_parameters_cell_that_computes_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="line 2"):
        parameters._declared("epochs: int = 3\nsteps = epochs * 2", tmp_path)


def test_an_attached_suite_that_is_read_only_writes_elsewhere(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != checkout)  # a root user may write to any folder
    monkeypatch.chdir(tmp_path)
    plan = make_plan([], checkout)
    assert plan.folder == tmp_path / "runs" / "demo"
    assert plan.values["00_setup"]["cache_dir"] == str(Path(tempfile.gettempdir()) / "cache")


def test_a_time_limit_shortens_the_training(checkout):
    plan = make_plan(["--time-limit", "100", "--run", "limited", "-p", "minutes", "5"], checkout)
    assert plan.given["02_train"]["minutes"] == 5  # shorter as it is
    plan = make_plan(["--time-limit", "100", "--run", "limited"], checkout)
    assert plan.given["02_train"]["minutes"] == 70  # 0.7 of the whole
    # 100 less 10 for the set-up, less 20 for the scores
    assert with_time_left(plan, elapsed_s=10 * 60).given["02_train"]["minutes"] == 70
    assert with_time_left(plan, elapsed_s=30 * 60).given["02_train"]["minutes"] == 50
    assert plan.given["02_train"]["minutes"] == plan.values["02_train"]["minutes"] == 70
