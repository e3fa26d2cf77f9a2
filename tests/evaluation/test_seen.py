"""From a training to predictions and scores: a patient that the network has seen is known under any name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.audit import examine
from brats_helpers.data.cases import survey
from brats_helpers.data.patients import facts_of, load_prepared
from brats_helpers.data.splits import write_splits
from brats_helpers.runs import Run
from tests.conftest import write_tiny_case
from tests.tiny_training import fit_tiny

SCRIPT = Path(__file__).parents[3] / "shared" / "cases" / "r06_renamed_training_patient.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a tiny run that learnt from `Old_001`, and a folder with that patient under both names."""
    if not SCRIPT.exists():
        pytest.skip(f"no script at {SCRIPT}")
    folder = tmp_path_factory.mktemp("seen")
    subprocess.run([sys.executable, SCRIPT, folder], check=True, capture_output=True)
    data, run = folder / "made_up", Run(folder / "run")
    for k in range(3):
        write_tiny_case(data, f"Tiny_{k}", seed=k)
    found = survey(data)
    known = examine(found, found.cases, workers=1, cache_dir=folder / "cache")
    contents = {case_id: facts["content"] for case_id, facts in known.items()}
    parts = {"train": ["Old_001", "Tiny_0"], "val": ["Tiny_1"], "test": ["Tiny_2"]}
    write_splits(run.splits, parts, unlabelled=[], contents=contents)
    run.record(data=str(data), modalities=list(found.modalities), cache_dir=str(folder / "cache"))
    prepared = load_prepared(run, "train") + load_prepared(run, "val")
    fit_tiny([*prepared[:2], prepared[1], *prepared[2:]], run.folder, {"facts": facts_of(run)}, epochs=1)
    return run.best, folder


@pytest.mark.parametrize(
    ("where", "case_id", "why"),
    [
        ("renamed", "BraTS2021_00001", "has a scan that is voxel for voxel one of Old_001"),
        ("original", "Old_001", "has the ID of a patient that it has seen"),
    ],
)
def test_a_training_patient_is_neither_predicted_nor_scored(trained, tmp_path, capsys, where, case_id, why):
    checkpoint, folder = trained
    out, scores = tmp_path / "out", tmp_path / "scores.json"
    predict = ["predict", str(folder / where), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    score = ["score", str(out), str(folder / where), "--json", str(scores)]
    assert main(predict) == 1
    assert f"{case_id} is skipped: leakage: the network has seen {case_id} in training ({case_id} {why})" in (
        capsys.readouterr().out
    )
    assert not list(out.glob("*.nii.gz"))

    assert main([*predict, "--allow-leakage"]) == 0
    assert main(score) == 1
    said = f"{case_id} is not scored: leakage: the network that made the prediction had seen the patient"
    assert said in capsys.readouterr().out
    assert main([*score, "--allow-leakage"]) == 0
    assert json.loads(scores.read_text())["leakage"] == [case_id]
