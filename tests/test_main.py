"""The command line as a caller sees it: what the verbs print and how they exit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.scoring import statistics
from brats_helpers.scoring.rules import CONVENTIONS, YEARS
from brats_helpers.scoring.scores import collect, score_case
from tests.conftest import ROOT, write_tiny_case
from tests.tiny_training import fit_tiny


@pytest.fixture
def folders(tmp_path):
    """Perfect predictions of two tiny patients, flat, beside the patients' folders."""
    for k in range(2):
        place = write_tiny_case(tmp_path / "truth", f"P{k}", seed=k)
        (tmp_path / "pred").mkdir(exist_ok=True)
        shutil.copy(place / f"P{k}_seg.nii.gz", tmp_path / "pred")
    return tmp_path / "pred", tmp_path / "truth"


def score(folders, *more):
    return main(["score", *map(str, folders), *more])


def rewrite(path, change=lambda labels: labels, affine=lambda affine: affine):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), affine(image.affine)), path)


def test_all_patients_scored_is_exit_0(folders, capsys):
    assert score(folders) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["1.000"] * 3  # P0, P1, mean
    (folders[1] / "P1" / "P1_seg.nii.gz").unlink()  # a patient without a reference is no error
    assert score(folders) == 0
    assert "P1 is not scored: unlabelled" in capsys.readouterr().out


def test_a_patient_that_cannot_be_scored_is_named_and_exit_1(folders, capsys):
    pred_dir, truth_dir = folders
    (pred_dir / "P1_seg.nii.gz").rename(pred_dir / "P2_seg.nii.gz")
    assert main(["score", str(truth_dir), str(truth_dir)]) == 1
    assert "P0 is not scored: itself: " in capsys.readouterr().out
    assert score(folders) == 1
    printed = capsys.readouterr().out
    assert "P1 is not scored: missing" in printed and "P2 is not scored: extra" in printed
    assert "P0 1.000" in " ".join(printed.split())  # the others are scored
    assert "only 1 of 2 patients are scored" in printed and "95 %" not in printed


def test_swapped_labels_in_the_reference_lower_the_scores(folders, capsys, tmp_path):
    """NCR and ED swapped: WT and ET cannot show it, TC, NCR and ED do."""
    path = folders[1] / "P0" / "P0_seg.nii.gz"
    truth = read_mask(path, "brats2020")
    rewrite(path, change=lambda labels: np.array([0, 2, 1, 3, 4], np.uint8)[labels])
    file = tmp_path / "scores.json"
    assert score(folders, "--json", str(file)) == 0
    case = json.loads(file.read_text())["cases"]["P0"]
    # What is predicted as core is NCR and ET; the reference now has ED and ET: ET alone is in both.
    ncr, ed, et = (int((truth == index).sum()) for index in (1, 2, 3))
    assert case["TC"]["dice"] == pytest.approx(2 * et / (ncr + et + ed + et))
    assert case["TC"]["dice"] < 0.7 and case["NCR"]["dice"] == case["ED"]["dice"] == 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"affine": lambda affine: affine * [[-1], [1], [1], [1]]}, "voxels lie up to 47 mm apart"),
        # Half the resolution, which covers the same space:
        ({"change": lambda x: x[::2, ::2, ::2], "affine": lambda affine: affine @ np.diag([2, 2, 2, 1])}, "has shape"),
    ],
)
def test_a_reference_on_another_grid_is_refused(folders, capsys, changes, said):
    rewrite(folders[1] / "P0" / "P0_seg.nii.gz", **changes)
    assert score(folders) == 1
    printed = capsys.readouterr().out
    assert "P0 is not scored: misaligned: " in printed and said in printed


def test_a_reference_shifted_by_one_slice_lowers_the_scores(folders, tmp_path):
    path = folders[1] / "P0" / "P0_seg.nii.gz"
    truth = read_mask(path, "brats2020")
    rewrite(path, change=lambda labels: np.roll(labels, 1, axis=2))
    file = tmp_path / "scores.json"
    assert score(folders, "--json", str(file)) == 0
    case = json.loads(file.read_text())["cases"]["P0"]
    expected = score_case(truth, np.roll(truth, 1, axis=2), spacing_mm=(1, 1, 1), convention="brats2020")
    assert case["WT"]["dice"] == pytest.approx(expected["WT"]["dice"]) and case["WT"]["dice"] < 0.97
    assert case["WT"]["hd95_mm"] >= 1


def test_predict_by_several_checkpoints_with_rules_and_labels(tiny_patients, tmp_path, capsys):
    fit_tiny([pack(case) for case in find_cases(tiny_patients)], tmp_path)
    checkpoint = str(tmp_path / "checkpoints" / "best.pt")
    new = write_tiny_case(tmp_path / "new", "New", seed=9)
    rules = tmp_path / "postprocess.json"
    rules.write_text(json.dumps({"rules": {"component_voxels": 0, "fill_holes": False, "et_voxels": 10**6}}))
    command = ["predict", "--checkpoint", checkpoint, "--checkpoint", checkpoint, "--device", "cpu"]
    out = tmp_path / "out"

    assert main([*command, "--out", str(out), "--labels", "2023", "--soft", str(tmp_path / "soft"), str(new)]) == 0
    assert 3 in np.unique(nib.load(out / "New_seg.nii.gz").dataobj)
    assert (tmp_path / "soft" / "New_soft.nii.gz").exists()
    assert main([*command, "--out", str(out), "--postprocess", str(rules), str(new)]) == 0
    assert set(np.unique(nib.load(out / "New_seg.nii.gz").dataobj)) == {0, 1, 2}
    assert score((out, tmp_path / "new")) == 0

    assert main([*command, "--out", str(out), str(tiny_patients)]) == 1
    assert "4 skipped: Tiny_0, Tiny_1, Tiny_2, Tiny_3" in capsys.readouterr().out
    assert main([*command, "--out", str(out), "--allow-leakage", str(tiny_patients)]) == 0
    assert score((out, tiny_patients)) == 1  # New is extra, and nobody else is scored
    assert "Tiny_0 is not scored: leakage" in capsys.readouterr().out
    score((out, tiny_patients), "--allow-leakage")
    assert "the network had seen Tiny_0, Tiny_1, Tiny_2, Tiny_3" in capsys.readouterr().out


def run_with(folder, dice, convention="brats2020", leakage=()):
    figures = {case: {r: {"dice": d, "hd95_mm": 10 * d} for r in ("WT", "TC", "ET")} for case, d in dice.items()}
    folder.mkdir()
    metrics = collect(figures, convention=convention, simulated=True, not_scored={}, leakage=leakage)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_compare_pairs_patients(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statistics, "FEWEST", 3)
    a = run_with(tmp_path / "a", {"p": 0.5, "q": 0.6, "r": 0.7, "s": 0.1})
    b = run_with(tmp_path / "b", {"p": 0.6, "q": 0.8, "r": 1.0, "t": 0.9}, leakage=["p"])
    assert main(["compare", a, b, "--json", str(tmp_path / "c.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # By patient 0.1, 0.2 and 0.3; of three, one draw in 27 gives the lowest three times, more than 2.5 %.
    assert "WT +0.200 (+0.100 to +0.300) +2.000 (+1.000 to +3.000)" in printed
    assert f"left out, because {b} has no score for them: s of {a}" in printed
    assert f"left out, because {a} has no score for them: t of {b}" in printed
    assert f"{b}: its network had seen p" in printed and "simulated patients; brats2020" in printed
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["n"] == 3 and found["leakage"] == ["p"]
    assert main(["compare", f"{a}/metrics.json", b]) == 0  # a file will do
    one = run_with(tmp_path / "one", {"q": 0.7})
    capsys.readouterr()
    assert main(["compare", a, one]) == 0
    assert "WT +0.100 (no interval)" in " ".join(capsys.readouterr().out.split())


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    a = run_with(tmp_path / "a", {"p": 0.5})
    assert main(["compare", a, run_with(tmp_path / "b", {"p": 0.5}, "brats2023")]) == 1
    assert "Scored by different rules" in capsys.readouterr().out
    assert main(["compare", a, run_with(tmp_path / "c", {"q": 0.5})]) == 1
    assert "no scored patient in common" in capsys.readouterr().out
    assert main(["compare", a, str(tmp_path)]) == 1
    assert "metrics.json holds no metrics" in capsys.readouterr().out
    for content in ("{}", "[]", '{"cases": {"p": {"WT": {"dice": 1}}}, "convention": "x", "simulated": true}'):
        (tmp_path / "theirs.json").write_text(content)
        assert main(["compare", a, str(tmp_path / "theirs.json")]) == 1
        assert "theirs.json is not in the form of metrics.json" in capsys.readouterr().out


def test_compare_refuses_other_references_of_the_same_names(tmp_path, capsys):
    a, b = (run_with(tmp_path / name, {"p": 0.5}) for name in "ab")
    for region in ("WT", "TC"):  # TC alone: where labels 1 and 2 were swapped, WT is the same
        for run, ml in ((a, 10.0), (b, 12.5)):
            path = Path(run) / "metrics.json"
            metrics = json.loads(path.read_text())
            metrics["cases"]["p"]["WT"].pop("volume_ml_truth", None)
            metrics["cases"]["p"][region]["volume_ml_truth"] = ml
            path.write_text(json.dumps(metrics))
        assert main(["compare", a, b]) == 1
        message = f"p: its reference has 10.000 ml of {region} in one run and 12.500 ml in the other"
        assert message in capsys.readouterr().out


# --- every verb


@pytest.mark.parametrize("verb", ["phantom", "predict", "score", "compare"])
def test_verbs_explain_themselves_without_loading_anything(verb):
    loaded = f"import sys; from brats_helpers.__main__ import main; main(['{verb}', '--help'])"
    answer = subprocess.run([sys.executable, "-S", "-c", loaded], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and "usage: python -m brats_helpers" in answer.stdout


def test_a_verb_without_its_arguments_is_a_usage_error():
    answer = subprocess.run([sys.executable, "-m", "brats_helpers", "phantom", "x"], cwd=ROOT, capture_output=True)
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
    for convention in YEARS:
        assert main(["score", str(tmp_path), str(tmp_path), "--convention", convention]) == 1  # nothing to score
    with pytest.raises(SystemExit, match="2"):
        main(["score", str(tmp_path), str(tmp_path), "--convention", "brats2032"])


@pytest.mark.parametrize("verb", ["train", "report"])
def test_a_run_that_does_not_exist_is_named_and_not_made(tmp_path, capsys, verb):
    assert main([verb, str(tmp_path / "typo")]) == 1
    assert f"❌ {tmp_path / 'typo'} is no" in capsys.readouterr().out and not (tmp_path / "typo").exists()
