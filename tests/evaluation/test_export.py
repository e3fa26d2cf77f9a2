"""Exported models predict what the run's own checkpoint predicts."""

import json
import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from brats_helpers.__main__ import main
from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation.card import model_card
from brats_helpers.evaluation.export import export_model
from brats_helpers.evaluation.onnx import read_onnx
from brats_helpers.files import write_json
from brats_helpers.labels import DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.scores import collect, score_case
from brats_helpers.suite.environment import ROOT
from brats_helpers.training.model_zip import read_facts
from tests.conftest import write_tiny_case
from tests.tiny_training import fit_tiny

pytest.importorskip("onnxruntime")


MODALITIES = ["flair", "t1ce"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network that has learnt three tiny patients, and the scores of a fourth."""
    root = tmp_path_factory.mktemp("export")
    for k, name in enumerate(["Train_0", "Train_1", "Train_2", "Val_0", "New_0"]):
        write_tiny_case(root / "data", name, seed=k, modalities=MODALITIES)
    cases = find_cases(root / "data", MODALITIES)
    prepared = prepare(cases[1:], cache_dir=root / "cache", workers=1)
    run = Run(root / "runs" / "tiny")
    fit_tiny(prepared, run.folder, modalities=tuple(MODALITIES), epochs=8, slices_per_epoch=64, batch_size=8)
    run.record(data=str(root / "data"), simulated=True, origin="five tiny patients")
    truth = read_mask(cases[0].seg, cases[0].numbering)
    scores = {"New_0": score_case(truth, truth, spacing_mm=(1.0, 1.0, 1.0), convention="brats2020")}
    write_json(run.metrics, collect(scores, convention="brats2020", simulated=True, not_scored={}, leakage=[]))
    return run


@pytest.fixture(scope="module")
def models(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    assert main(["export", str(run.folder), "--out", str(folder / "model.zip")]) == 0
    assert main(["export", str(run.folder), "--onnx", "--out", str(folder / "model.onnx")]) == 0
    return {"checkpoint": run.best, "zip": folder / "model.zip", "onnx": folder / "model.onnx"}


@pytest.fixture(scope="module")
def predictions(run, models, tmp_path_factory):
    """Class indices of one unlabelled patient, by the kind of the model's file."""
    patient = f"{run.manifest['data']}/New_0"
    found = {}
    for kind, path in models.items():
        out = tmp_path_factory.mktemp(kind)
        assert main(["predict", "--checkpoint", str(path), "--out", str(out), patient]) == 0
        found[kind] = read_mask(out / "New_0_seg.nii.gz", "brats2020")
    return found


def agreement(a, b):
    """Dice of two label maps, over all voxels that either calls tumour."""
    return 2 * ((a == b) & (a > 0)).sum() / ((a > 0).sum() + (b > 0).sum())


def test_a_zip_predicts_the_same(predictions):
    assert (predictions["checkpoint"] > 0).sum() > 100
    assert np.array_equal(predictions["zip"], predictions["checkpoint"])


def test_onnx_predicts_the_same(predictions):
    assert agreement(predictions["onnx"], predictions["checkpoint"]) > 0.999


def test_the_example_of_the_docs_segments_a_patient_without_this_suite(run, models, predictions, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(example, "utf-8")
    folder = f"{run.manifest['data']}/New_0"
    scans = [f"{folder}/New_0_{name}.nii.gz" for name in ("flair", "t1ce")]
    out = tmp_path / "seg.nii.gz"
    subprocess.run([sys.executable, "example.py", models["onnx"], out, *scans], cwd=tmp_path, check=True)
    assert "brats_helpers" not in example and "torch" not in example
    assert agreement(read_mask(out, "brats2020"), predictions["onnx"]) > 0.999
    assert np.allclose(nib.load(out).affine, nib.load(scans[0]).affine)


def test_what_a_zip_knows_of_its_patients_still_counts(run, models, tmp_path, capsys):
    patient = f"{run.manifest['data']}/Train_0"
    assert main(["predict", "--checkpoint", str(models["zip"]), "--out", str(tmp_path), patient]) == 1
    assert "Train_0" in capsys.readouterr().out


def test_the_card_has_the_front_matter_of_model_hubs(run, models):
    import zipfile

    card = zipfile.ZipFile(models["zip"]).read("model_card.md").decode()
    front = yaml.safe_load(card.split("---")[1])
    metrics = json.loads(run.metrics.read_text())
    values = {entry["name"]: entry["value"] for entry in front["model-index"][0]["results"][0]["metrics"]}
    assert values["Dice WT"] == pytest.approx(metrics["summary"]["WT"]["dice"]["mean"], abs=5e-5)
    assert front["license"] == "mit" and "simulated" in card


def test_a_network_with_weights_from_elsewhere_says_so_and_claims_no_licence(run, tmp_path):
    other = Run(shutil.copytree(run.folder, tmp_path / "other"))
    saved = torch.load(other.best, weights_only=True)
    saved["settings"]["encoder_weights"] = "/home/alice/nnssl/checkpoint_final.pth"
    torch.save(saved | {"facts": {"unrecorded": "checkpoint_final.pth"}}, other.best)
    path = export_model(other, tmp_path / "model.safetensors")
    card = path.with_suffix(".md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "other"
    assert "starting from checkpoint_final.pth," in card and "Which scans checkpoint_final.pth has seen" in card
    assert "alice" not in card and "alice" not in json.dumps(read_facts(path))


def test_a_region_that_the_rule_leaves_out_has_no_score_on_the_card(run, tmp_path):
    other = Run(shutil.copytree(run.folder, tmp_path / "other"))
    classes = np.ones((4, 4, 4), np.uint8)  # no enhancing tumour, and none predicted: brats2026 leaves the patient out
    scores = {"New_0": score_case(classes, classes, spacing_mm=(1.0, 1.0, 1.0), convention="brats2026")}
    write_json(other.metrics, collect(scores, convention="brats2026", simulated=True, not_scored={}, leakage=[]))
    card = model_card(other)
    results = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]
    assert [entry["name"] for entry in results["metrics"]] == ["Dice WT", "Dice TC"]
    assert "| ET | - | - | - |" in card


def test_scores_of_patients_that_the_network_had_seen_are_not_in_the_front_matter(run, tmp_path):
    other = Run(shutil.copytree(run.folder, tmp_path / "other"))
    write_json(other.metrics, json.loads(run.metrics.read_text()) | {"leakage": ["New_0"]})
    card = model_card(other)
    assert "model-index" in model_card(run) and "model-index" not in card
    assert "These scores are not valid: the network had seen New_0." in card


def test_names_that_do_not_fit_are_refused(run, models, tmp_path, capsys):
    assert main(["export", str(run.folder), "--out", str(tmp_path / "model.pt")]) == 1
    assert "expected a name that ends in .zip or .safetensors" in capsys.readouterr().out
    (tmp_path / "alone.onnx").write_bytes(models["onnx"].read_bytes())
    assert main(["predict", "--checkpoint", str(tmp_path / "alone.onnx"), "--out", str(tmp_path), "x"]) == 1
    assert "alone.json is missing" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["[]", "{}", '{"kind": "brats_helpers ONNX", "version": 1}'])
def test_a_description_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "model.onnx").touch()
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(DataError, match="model.json does not describe an ONNX file of this suite"):
        read_onnx(tmp_path / "model.onnx")
