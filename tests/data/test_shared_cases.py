"""Inputs as people bring them: each script of ../shared/cases, and what its "right" column asks for.

Helpers of every row: `made` runs a script, `checked` runs the verb `check`, `scored` runs `score`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.numbering import number, resolve
from brats_helpers.labels import DataError

SCRIPTS = Path(__file__).parents[3] / "shared" / "cases"


@pytest.fixture
def made(tmp_path):
    """Run the script whose name starts with a row's name; return the folder it filled."""

    def run(row: str) -> Path:
        found = sorted(SCRIPTS.glob(f"{row}_*.py"))
        if not found:
            pytest.skip(f"no script {row} in {SCRIPTS}")
        out = tmp_path / row
        subprocess.run([sys.executable, found[0], out], check=True, capture_output=True)
        return out

    return run


def checked(folder: Path, *options: str) -> tuple[int, dict[str, set[str]], str]:
    """The exit code of `check`, the codes of the findings by patient ("" for none), and all messages."""
    report = folder.with_name(f"{folder.name}-check.json")
    code = main(["check", str(folder), "--json", str(report), *options])
    content = json.loads(report.read_text())
    findings = {case_id: entry["findings"] for case_id, entry in content["cases"].items()}
    findings[""] = content["summary"]["findings"]
    codes = {case_id: {finding["code"] for finding in listed} for case_id, listed in findings.items()}
    return code, codes, " ".join(finding["message"] for listed in findings.values() for finding in listed)


def scored(pred: Path, truth: Path, *options: str) -> tuple[int, dict]:
    """The exit code of `score`, and what it writes."""
    file = pred.with_name(f"{pred.name}-scores.json")
    code = main(["score", str(pred), str(truth), "--json", str(file), *options])
    return code, json.loads(file.read_text())


def dice(scores: dict, region: str) -> list[float]:
    """The Dice of every patient."""
    return [entry[region]["dice"] for entry in scores["cases"].values()]


# --- r01: label 4 is the resection cavity


def test_r01_cavities_are_background(made):
    out = made("r01")
    code, codes, said = checked(out / "mixed")
    assert code == 0
    assert {case_id for case_id, found in codes.items() if "label-without-class" in found} == {
        f"BraTS-GLI-{n:05}-100" for n in (3, 4, 5)
    }
    assert "label 4 (resection cavity in gli2024) are read as background" in said
    for case in number(survey(out / "a"))[0].cases:
        assert not (read_mask(case.seg, case.numbering) == 3).any()
    for pred, truth in (("pred", "ref"), ("pred_both", "ref_both"), ("pred", "a"), ("pred_both", "b")):
        code, scores = scored(out / pred, out / truth)
        assert code == 0
        assert dice(scores, "WT") == dice(scores, "TC") == dice(scores, "ET") == [1, 1, 1]
        assert scores["labels"]["references"] == {"gli2024": 3}


def test_r01_is_read_as_told_under_other_names(made):
    out = made("r01")
    for folder in sorted((out / "b").iterdir()):
        for path in folder.iterdir():
            path.rename(folder / path.name.replace("BraTS-GLI", "Site"))
        folder.rename(folder.with_name(folder.name.replace("BraTS-GLI", "Site")))
    with pytest.raises(DataError, match="numbering is not clear"):  # 3 and 4 look alike in these images
        resolve(find_cases(out / "b"))
    assert checked(out / "b", "--labels", "gli2024")[0] == 0


# --- r02: paediatric numbering


def test_r02_missed_enhancing_tumour_scores_0(made):
    out = made("r02")
    code, scores = scored(out / "pred", out / "ref")
    assert code == 0
    assert dice(scores, "ET") == [0, 0, 0, 0]
    assert scores["labels"] == {"predictions": {"ped": 4}, "references": {"ped": 4}, "without_class": {}, "hint": ""}
    assert checked(out / "ref")[0] == 0


# --- r05: another tool's numbering


def test_r05_exchanged_labels_are_named(made, capsys):
    out = made("r05")
    code, scores = scored(out / "pred", out / "ref")
    assert code == 0 and max(dice(scores, "TC")) < 0.5
    assert "in 4 of 4 patients" in scores["labels"]["hint"] and "--labels msd" in scores["labels"]["hint"]
    assert scores["labels"]["hint"] in capsys.readouterr().out
    code, scores = scored(out / "pred", out / "ref", "--labels", "msd")
    assert dice(scores, "TC") == dice(scores, "WT") == [1, 1, 1, 1] and not scores["labels"]["hint"]


def test_r05_masks_of_another_numbering_are_read_by_their_anatomy(made):
    out = made("r05")
    code, codes, said = checked(out / "swapped")
    assert code == 0 and "label-numbering" in codes[""]
    assert "read as msd (1 ED, 2 NCR, 3 ET), by the anatomy of 4 of 4 patients" in said
    truth = {case.id: read_mask(case.seg) for case in find_cases(out / "ref")}
    for case in number(survey(out / "swapped"))[0].cases:
        assert (read_mask(case.seg, case.numbering) == truth[case.id]).all()


# --- r08: labels through a slope


def test_r08_labels_through_a_slope_are_rounded(made, capsys):
    out = made("r08")
    for pred in ("pred_uint8", "pred_int16", "pred_0123"):
        code, scores = scored(out / pred, out / "ref")
        assert code == 0
        assert dice(scores, "WT") == dice(scores, "TC") == dice(scores, "ET") == [1, 1]
    assert "slope 0.0156863" in capsys.readouterr().out
    code, codes, said = checked(out / "masks_uint8")
    assert code == 0 and "slope 0.0156863" in said
    assert all("rounded-label" in codes[case.id] for case in find_cases(out / "masks_uint8"))


# --- r24: BRATS 2012 to 2016


def test_r24_masks_of_2012(made):
    out = made("r24")
    for options in ((), ("--labels", "brats2012")):
        code, codes, _ = checked(out, *options)
        assert code == 0
        code, scores = scored(out.with_name("r24_pred"), out, *options)
        assert code == 0 and dice(scores, "TC") == dice(scores, "ET") == [1, 1, 1]
    for case in number(survey(out), "brats2012")[0].cases:
        assert set(read_mask(case.seg, case.numbering).ravel()) == {0, 1, 2, 3}


# --- BraTS-MEN-RT: one label


def test_men_rt_masks_hold_one_region(made):
    out = made("r02")  # any patient will do
    source = find_cases(out / "ref")[0]
    import nibabel as nib
    import numpy as np

    image = nib.load(source.seg)
    target = nib.Nifti1Image((np.asanyarray(image.dataobj) > 0).astype(np.uint8), image.affine)
    for n in range(3):
        folder = out / "rt" / f"BraTS-MEN-RT-{n:04}-1"
        folder.mkdir(parents=True)
        nib.save(nib.load(source.images["t1ce"]), folder / f"{folder.name}-t1c.nii.gz")
        nib.save(target, folder / f"{folder.name}-seg.nii.gz")
    found, verdict = number(survey(out / "rt", ("t1ce",)))
    assert verdict.numbering == "menrt"
    assert {int(value) for value in np.unique(read_mask(found.cases[0].seg, found.cases[0].numbering))} == {0, 3}
    code, scores = scored(out / "rt", out / "rt")
    assert all(reason.startswith("itself") for reason in scores["not_scored"].values())
