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


def test_a_run_is_asked_for_by_its_name_or_by_its_path(tmp_path):
    assert Run(tmp_path / "runs" / "first").asked == "first"
    assert Run(tmp_path / "Drive" / "first").asked == str((tmp_path / "Drive" / "first").resolve())
