"""The packaged network: `predict` takes it where no checkpoint is given, and says what is known of it."""

import dataclasses
import json
import subprocess

import numpy as np
import pytest
import torch
import yaml

from brats_helpers.__main__ import main
from brats_helpers.data.cache import pack, prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation.inference import evaluate_packaged
from brats_helpers.evaluation.networks import in_order, load_network, predict
from brats_helpers.evaluation.packaged import subsets
from brats_helpers.labels import MODALITIES, REGIONS, DataError
from brats_helpers.runs import Run
from brats_helpers.scoring.scores import score_case
from brats_helpers.training import model_zip
from tests.conftest import ROOT, write_tiny_case
from tests.tiny_training import fit_tiny

CPU = torch.device("cpu")
REAL = {
    "patients": "glioma16",
    "n": 16,
    "convention": "the rule",
    "command": "python benchmarks/packaged.py",
    "date": "2026-11-30",
    "device": "a CPU",
    "dice": {
        "flair,t1,t1ce,t2": {"WT": 0.861, "TC": 0.762, "ET": 0.653},
        "flair,t1ce": {"WT": 0.849, "TC": 0.751, "ET": 0.642},
    },
}


@pytest.fixture(scope="module")
def run(tiny_patients, tmp_path_factory):
    """A network that has learnt to do without modalities."""
    root = tmp_path_factory.mktemp("packaged")
    prepared = prepare(find_cases(tiny_patients), cache_dir=root / "cache", workers=1)
    run = Run(root / "run")
    fit_tiny(prepared, run.folder, modality_dropout=0.5, augment="none", epochs=6, slices_per_epoch=64, batch_size=8)
    told = {"origin": "tiny patients, in /home/me/tiny", "command": "./run_all.sh --run x --data /home/me/tiny"}
    run.record(simulated=True, **told, device={"device": "two cores"})
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    scores, path = folder / "scores.json", folder / "simulated.safetensors"
    scores.write_text(json.dumps(REAL))
    assert main(["export", str(run.folder), "--out", str(path), "--half", "--real", str(scores)]) == 0
    return path


@pytest.fixture
def packaged(exported, monkeypatch):
    monkeypatch.setattr(model_zip, "PACKAGED", exported)
    return exported


def predicted(out, *patients):
    assert main(["predict", *map(str, patients), "--out", str(out), "--device", "cpu"]) == 0
    return {path.name.removesuffix("_seg.nii.gz"): read_mask(path, "brats2020") for path in out.glob("*_seg.nii.gz")}


def test_predict_without_a_checkpoint_says_which_network_it_takes_and_how_it_scored(packaged, tmp_path, capsys):
    patient = write_tiny_case(tmp_path / "in", "New", seed=9)
    assert (predicted(tmp_path / "out", patient)["New"] > 0).sum() > 100
    said = capsys.readouterr().out
    assert "the packaged network, tu-tf_mobilenetv3_small_minimal_100 trained on 3 simulated patients" in said
    assert "mean Dice WT 0.86, TC 0.76, ET 0.65 on 16 real patients (glioma16)\n" in said
    assert "alone" not in said


def test_a_run_is_compared_with_the_packaged_network_on_patients_that_it_has_not_seen(
    packaged, tiny_patients, tmp_path, monkeypatch
):
    patient = write_tiny_case(tmp_path / "in", "New", seed=9)
    how = {"device": "cpu", "convention": "brats2020", "simulated": True, "hashes": None}
    new, seen = find_cases(patient), find_cases(tiny_patients)[:1]
    found = evaluate_packaged(new, **how)
    pred = predicted(tmp_path / "out", patient)["New"]
    truth = read_mask(new[0].seg, "brats2020")
    assert found == {region: score["dice"] for region, score in scores_of(pred, truth).items() if region in REGIONS}
    assert evaluate_packaged(seen, **how) is None
    assert evaluate_packaged([dataclasses.replace(new[0], modalities=("flair", "t1ce"))], **how) is None
    monkeypatch.setattr(model_zip, "PACKAGED", tmp_path / "absent")
    assert evaluate_packaged(new, **how) is None


def scores_of(pred, truth):
    return score_case(pred, truth, spacing_mm=(1, 1, 1), convention="brats2020")


@pytest.mark.parametrize("has", [("flair", "t1ce"), ("t2",)])
def test_a_patient_without_some_modalities_is_predicted_as_if_they_were_background(packaged, tmp_path, capsys, has):
    whole = write_tiny_case(tmp_path / "whole", "New", seed=9)
    poor = write_tiny_case(tmp_path / "poor", "New", seed=9)
    for name in {*MODALITIES} - {*has}:
        (poor / f"New_{name}.nii.gz").unlink()
    found = predicted(tmp_path / "out", poor)["New"]
    said = capsys.readouterr().out
    lacks = ", ".join(name for name in MODALITIES if name not in has)
    assert f"New: No {lacks}: every voxel there counts as background." in said
    assert ("with only flair,t1ce: mean Dice WT 0.85, TC 0.75, ET 0.64" in said) == (has == ("flair", "t1ce"))

    packed = pack(find_cases(whole)[0])
    images = np.array(packed.images)
    images[:, [k for k, name in enumerate(MODALITIES) if name not in has]] = 0
    hidden = dataclasses.replace(packed, images=images, labels=None, boxes=None)
    soft = predict([load_network(packaged, device=CPU)], hidden, channels=MODALITIES, flips=False)
    assert np.array_equal(found, packed.to_volume(soft.argmax(axis=1).astype(np.uint8)))


def test_a_runs_own_network_does_without_modalities_only_if_it_has_learnt_to(run, tmp_path, capsys):
    poor = write_tiny_case(tmp_path / "in", "New", seed=9, modalities=("flair", "t1ce"))
    argv = ["predict", str(poor), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*argv, "--checkpoint", str(run.best)]) == 0
    saved = torch.load(run.best, weights_only=True)
    saved["settings"]["modality_dropout"] = 0.0
    torch.save(saved, tmp_path / "plain.pt")
    assert main([*argv, "--checkpoint", str(tmp_path / "plain.pt")]) == 1
    assert "No New_t1.nii.gz in . (missing: t1, t2; found: flair, t1ce)" in capsys.readouterr().out

    case = find_cases(poor, ("flair", "t1ce"))
    dropout, plain = (load_network(path, device=CPU) for path in (run.best, tmp_path / "plain.pt"))
    assert in_order([dropout], case)[0].missing == ("t1", "t2")
    with pytest.raises(DataError, match="the network reads flair, t1, t1ce, t2, but there is no t1, t2"):
        in_order([dropout, plain], case)


def test_a_copy_without_the_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_zip, "PACKAGED", tmp_path / "simulated.safetensors")
    assert main(["predict", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "comes without its network" in capsys.readouterr().out


def test_half_precision_halves_the_file_and_hardly_changes_the_answers(run, exported, tmp_path):
    assert main(["export", str(run.folder), "--out", str(tmp_path / "whole.safetensors")]) == 0
    assert exported.stat().st_size < 0.55 * (tmp_path / "whole.safetensors").stat().st_size
    packed = pack(find_cases(write_tiny_case(tmp_path / "in", "New", seed=9))[0])
    networks = [load_network(path, device=CPU) for path in (run.best, exported, tmp_path / "whole.safetensors")]
    first, half, whole = (predict([network], packed, channels=MODALITIES, flips=False) for network in networks)
    assert np.array_equal(whole, first) and not np.array_equal(half, first)
    assert abs(half - first).max() < 0.05 and (half.argmax(axis=1) == first.argmax(axis=1)).mean() > 0.999
    assert {tensor.dtype for tensor in networks[1].model.state_dict().values()} == {torch.float32, torch.int64}


def test_the_card_beside_the_file_has_scores_by_modalities_and_the_way_to_repeat_it(exported):
    card = exported.with_suffix(".md").read_text("utf-8")
    assert "| flair, t1, t1ce, t2 | 0.861 | 0.762 | 0.653 | 0.759 |" in card
    assert "Measured with `python benchmarks/packaged.py` on 2026-11-30: a CPU." in card
    assert "Not scored yet" not in card
    (result,) = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"]
    assert result["dataset"]["name"] == "16 real patients, glioma16" and result["metrics"][0]["value"] == 0.861
    assert "- `./run_all.sh --run x --data tiny`, two cores" in card and "patients: tiny patients, in tiny." in card
    assert "/home" not in card and "in 50% of the training samples" in card
    assert "--checkpoint simulated.safetensors" in card


def test_scores_of_another_form_are_refused(run, tmp_path, capsys):
    (tmp_path / "scores.json").write_text('{"n": 3}')
    out = str(tmp_path / "x.safetensors")
    assert main(["export", str(run.folder), "--out", out, "--real", str(tmp_path / "scores.json")]) == 1
    assert "scores.json holds no patients; expected the scores that benchmarks/packaged.py" in capsys.readouterr().out


def test_subsets_are_all_choices_the_largest_first():
    found = subsets(["t2", "flair", "t1"])
    assert found == [
        ("flair", "t1", "t2"),
        ("flair", "t1"),
        ("flair", "t2"),
        ("t1", "t2"),
        ("flair",),
        ("t1",),
        ("t2",),
    ]
    assert len(subsets(MODALITIES)) == 2**4 - 1


needs_the_file = pytest.mark.skipif(not model_zip.PACKAGED.is_file(), reason=f"no network at {model_zip.PACKAGED}")


@needs_the_file
def test_the_packaged_file_is_small_and_complete_and_the_only_weights_in_the_repository():
    assert model_zip.PACKAGED.stat().st_size <= 10e6
    facts = model_zip.read_facts(model_zip.PACKAGED)
    assert facts["checkpoint"]["settings"]["modality_dropout"] > 0 and facts["real"]
    assert facts["checkpoint"]["facts"]["spacing_mm"] == [1, 1, 1]  # patients of other voxels are resampled
    assert model_zip.PACKAGED.with_suffix(".md").is_file()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    weights = (".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".h5", ".npz", ".zip")
    if listed.returncode == 0:
        assert [name for name in listed.stdout.split() if name.endswith(weights)] == [
            "brats_helpers/training/simulated.safetensors"
        ]


@needs_the_file
def test_the_packaged_network_segments_real_patients_with_four_and_with_two_modalities(real_patients, tmp_path):
    found = predicted(tmp_path, real_patients)
    assert len(found) == 4
    for case_id, classes in found.items():
        assert 1_000 < (classes > 0).sum() < 400_000, case_id
