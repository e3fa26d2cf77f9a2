"""A run's folder knows whose results it holds."""

import os
import shutil

from brats_helpers.files import write_json
from brats_helpers.runs import Run


def test_scores_of_a_network_that_was_trained_again_are_out_of_date(tmp_path):
    run, other = Run(tmp_path / "run"), tmp_path / "other.pt"
    run.checkpoints.mkdir()
    run.best.write_bytes(b"first network")
    other.write_bytes(b"of another run")
    assert not run.outdated  # no scores yet
    networks = run.identify([run.best, other])
    assert list(networks) == [os.path.join("checkpoints", "best.pt"), os.path.join("..", "other.pt")]
    write_json(run.metrics, {"networks": networks})
    assert not run.outdated
    other.write_bytes(b"trained again, elsewhere")
    assert not run.outdated
    assert not Run(shutil.copytree(run.folder, tmp_path / "moved")).outdated  # times do not count
    run.best.write_bytes(b"trained again")
    assert run.outdated
    run.best.unlink()
    assert not run.outdated


def test_a_notebook_is_run_again_with_the_run_s_own_command(tmp_path):
    run = Run(tmp_path / "runs" / "first")
    assert run.command("04") == "./run_all.sh --run first --only 04"
    elsewhere = Run(tmp_path / "Drive" / "first")
    assert elsewhere.command("04") == f"./run_all.sh --run {elsewhere.folder} --only 04"
    run.record(command="./run_all.sh --data '/a b' --profile small --only 03 -p lr 1e-3 -p questions none")
    expected = "./run_all.sh --data '/a b' --profile small -p lr 1e-3 --only 04 -p questions start"
    assert run.command("04", questions="start") == expected
