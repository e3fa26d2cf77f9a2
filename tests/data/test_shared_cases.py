"""Inputs as people bring them: each script of ../shared/cases, and what its "right" column asks for.

Helpers of every row: `made` runs a script, `checked` runs the verb `check`, `scored` runs `score`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.audit import audit
from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.nifti import read_mask, read_nifti, write_mask
from brats_helpers.data.numbering import number, resolve
from brats_helpers.evaluation import inference
from brats_helpers.labels import MODALITIES, DataError
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.parameters import read_notebooks
from tests.conftest import write_tiny_case
from tests.evaluation.echo import echo

SCRIPTS = Path(__file__).parents[3] / "shared" / "cases"


@pytest.fixture
def made(tmp_path):
    """Run the script whose name starts with a row's name, on what else it needs; return the folder it filled."""

    def run(row: str, *needs: Path) -> Path:
        found = sorted(SCRIPTS.glob(f"{row}_*.py"))
        if not found:
            pytest.skip(f"no script {row} in {SCRIPTS}")
        out = tmp_path / row
        subprocess.run([sys.executable, found[0], out, *needs], check=True, capture_output=True)
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
    truth = {case.id: read_mask(case.seg, case.numbering) for case in find_cases(out / "ref")}
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


# --- r03: other orientations


def test_r03_every_orientation_is_packed_alike_and_written_back_as_it_was(made, tmp_path):
    out = made("r03")
    cases = {codes: find_cases(out / codes)[0] for codes in ("LPS", "RAS", "PIR")}
    packed = {codes: pack(case) for codes, case in cases.items()}
    for codes, case in cases.items():
        np.testing.assert_array_equal(packed[codes].images, packed["LPS"].images)
        stored = nib.load(case.seg)
        written = tmp_path / f"{codes}_seg.nii.gz"
        write_mask(written, packed[codes].to_volume(packed[codes].labels), read_nifti(case.seg))
        np.testing.assert_array_equal(nib.load(written).dataobj, stored.dataobj)
        np.testing.assert_array_equal(nib.load(written).affine, stored.affine)
    assert checked(out / "mixed")[1]["Case_2"] == {"orientation"}


# --- r04: other voxel sizes


def test_r04_other_voxel_sizes_are_named(made):
    out = made("r04")
    code, codes, said = checked(out / "mixed")
    assert code == 0
    assert codes == {"Case_0": set(), "Case_1": set(), "Case_2": {"spacing"}, "Case_3": {"spacing"}, "": set()}
    assert "0.5 x 0.5 x 1 mm" in said and "1 x 1 x 5 mm" in said
    for name in ("half", "thick"):
        assert checked(out / name)[1][f"Case_{name}"] == {"spacing"}


# --- r09, r10, r11, r14: names and layouts


@pytest.mark.parametrize(("row", "n"), [("r09", 3), ("r10", 3), ("r11", 3), ("r14/msd", 3), ("r14/nnunet", 3)])
def test_patients_of_any_layout_are_whole_and_labelled(made, row, n):
    folder = made(row[:3]) / row[4:]
    cases = find_cases(folder)
    assert len(cases) == n and all(case.seg for case in cases)
    code, codes, _ = checked(folder)
    assert code == 0 and not any(codes.values())
    flair, t1 = (cases[0].read(name)[0] for name in ("flair", "t1"))
    assert flair.shape == t1.shape == (24, 24, 16) and (flair != t1).any()


def test_r11_masks_elsewhere_are_scored(made):
    out = made("r11")
    code, scores = scored(out.with_name(f"{out.name}_pred"), out)
    assert code == 0 and dice(scores, "WT") == [1, 1, 1]


# --- r13, r16, r18, r27: headers


@pytest.mark.parametrize(
    ("row", "expected", "exit_code"),
    [
        ("r13/seg", {"fourth-axis"}, 0),
        ("r13/t1", {"fourth-axis"}, 0),
        ("r13/five", {"fourth-axis"}, 0),
        ("r16/data", {"singular-affine"}, 0),
        ("r18/seg", {"qform-sform"}, 0),
        ("r18/all", {"qform-sform"}, 0),
        ("r18/t1", {"affine-mismatch"}, 1),
        ("r27/nifti2", set(), 0),
        ("r27/pair", {"unreadable"}, 1),
    ],
)
def test_headers(made, row, expected, exit_code):
    code, codes, _ = checked(made(row[:3]) / row[4:])
    assert code == exit_code
    assert [found for case_id, found in codes.items() if case_id] == [expected] * 3


@pytest.mark.parametrize(("pred", "truth"), [("r13/pred", "r13/ref"), ("r27/pred", "r27/ref")])
def test_perfect_predictions_stored_otherwise_are_perfect(made, pred, truth):
    out = made(pred[:3])
    code, scores = scored(out / "pred", out / "ref")
    assert code == 0 and dice(scores, "ET") == [1, 1, 1]


def test_r16_distances_come_from_the_qform(made):
    out = made("r16")
    code, scores = scored(out / "pred", out / "data")
    assert code == 0
    for entry in scores["cases"].values():
        assert entry["WT"]["hd95_mm"] == pytest.approx(5, abs=1) and entry["WT"]["volume_ml_truth"] > 0


def test_r18_a_scan_whose_sform_was_moved_is_refused_once_with_both_forms_named(made):
    out = made("r18") / "t1"
    said = checked(out)[2]
    assert said.count("qform and sform disagree: voxels lie up to 10 mm apart") == said.count("into both") == 3
    with pytest.raises(DataError, match=r"_t1\.nii\.gz does not lie where flair does.*sform disagree.*into both"):
        pack(find_cases(out)[0])


def test_r18_a_prediction_carries_one_place(made, tmp_path):
    case = find_cases(made("r18") / "all")[0]
    packed = pack(case)
    write_mask(tmp_path / "a.nii.gz", packed.to_volume(packed.labels), read_nifti(case.images["flair"]))
    header = nib.load(tmp_path / "a.nii.gz").header
    np.testing.assert_allclose(header.get_qform(), header.get_sform())
    np.testing.assert_allclose(header.get_sform(), nib.load(case.seg).affine)


# --- r17: air that is not 0


@pytest.mark.parametrize("name", ["noisy_air", "almost_zero", "defaced", "no_zero", "stripped"])
def test_r17_air_that_is_not_0_is_named(made, name):
    codes, said = checked(made("r17") / name)[1:]
    expected = set() if name == "stripped" else {"no-background"}
    assert [found for case_id, found in codes.items() if case_id] == [expected] * 3
    assert ("of the field is not 0" in said) == bool(expected)


def test_r17b_noisy_air_around_a_patient_is_named_by_check_and_by_predict(made, tmp_path, monkeypatch, capsys):
    out = made("r17b", write_tiny_case(tmp_path, "Quiet_001", seed=1))
    code, codes, _ = checked(out)
    assert code == 0 and codes["Noisy_001"] == {"no-background"}
    capsys.readouterr()
    monkeypatch.setattr(inference, "load_networks", lambda checkpoints, device: [echo()])
    for folder, warnings in ((out, 4), (tmp_path / "Quiet_001", 0)):
        assert (
            main(["predict", str(folder), "--checkpoint", "x.pt", "--out", str(tmp_path / "pred"), "--device", "cpu"])
            == 0
        )
        said = capsys.readouterr().out
        assert len(re.findall(r"⚠️ Noisy_001: Noisy_001_\w+\.nii\.gz: \d+% of the field is not 0", said)) == warnings
    assert "⚠️" not in said


# --- r28: modalities missing at random


def test_r28_missing_modalities_are_background_on_request(made):
    out = made("r28")
    with pytest.raises(DataError, match="-p fill_missing true"):
        find_cases(out)
    found = survey(out, fill_missing=True)
    cases = found.complete(skip_incomplete=False)
    assert [case.missing for case in cases] == [("flair",), ("t1",), ("t1ce",), ("t2",)]
    for channel, case in enumerate(cases):
        assert [bool(pack(case).images[:, k].any()) for k in range(4)] == [k != channel for k in range(4)]
    report = audit(found, cases, workers=1, cache_dir=None)
    assert report["summary"]["codes"] == {"filled-modality": 4}
    code, codes, said = checked(out, "--fill-missing")
    assert code == 0 and [*codes.values()].count({"filled-modality"}) == 4
    assert all(f"No {name}: every voxel there counts as background" in said for name in MODALITIES)


# --- r29: one patient twice


def test_r29_equal_copies_count_once_and_others_stop_one_patient(made):
    out = made("r29")
    code, codes, _ = checked(out / "same")
    assert code == 0 and codes["BraTS-MEN-RT-0002-1"] == {"same-copy"}
    assert scored(out / "pred", out / "same")[1]["not_scored"] == {}
    code, codes, said = checked(out / "other_seg")
    assert code == 1 and codes["BraTS-MEN-RT-0002-1"] == {"two-folders"}
    assert "patch/BraTS-MEN-RT-0002-1/BraTS-MEN-RT-0002-1-seg.nii.gz and training/" in said
    code, scores = scored(out / "pred", out / "other_seg")
    assert code == 1 and list(scores["not_scored"]) == ["BraTS-MEN-RT-0002-1"] and dice(scores, "WT") == [1] * 4


# --- x22, x23: other files


@pytest.mark.parametrize("name", ["scan", "mask"])
def test_x22_a_slice_among_volumes_is_a_finding(made, name):
    code, codes, said = checked(made("x22") / name)
    assert code == 1
    assert {case_id for case_id, found in codes.items() if "not-3d" in found} == {"BraTS20_Training_003"}
    assert "shape (40, 48)" in said


def test_x22_a_prediction_that_is_a_slice_stops_one_patient(made):
    out = made("x22")
    code, scores = scored(out / "pred", out / "ref")
    assert code == 1 and list(scores["not_scored"]) == ["BraTS20_Training_003"] and dice(scores, "WT") == [1] * 3


def test_x23_unread_formats_are_named(made, capsys):
    assert main(["check", str(made("x23"))]) == 2
    printed = capsys.readouterr().out
    assert "10 .mha files found but not read" in printed and "SimpleITK" in printed


# --- a409: thick slices


def test_a409_notebook_01_shows_volumes_in_ml_by_the_spacing(made, tmp_path):
    notebooks, run = read_notebooks(ROOT), {"run_dir": str(tmp_path / "run")}
    places = {f"{name}_dir": str(tmp_path / name) for name in ("data", "cache")}
    run_cells(notebooks["00_setup"], run | places | {"data": str(made("a409")), "split": "1,1,1", "workers": 1})
    names = run_cells(notebooks["01_explore"], run, until="tumour_ml")
    cases = find_cases(tmp_path / "a409")
    truth = {case.id: np.count_nonzero(nib.load(case.seg).dataobj) * 5 / 1000 for case in cases}
    assert names["patients"]["tumour_ml"].to_dict() == pytest.approx(truth)


def run_cells(notebook, parameters: dict, until: str = "") -> dict:
    """Run the cells of a notebook up to the first that holds `until`, or all; return its names."""
    names = {name: parameter.default for name, parameter in notebook.parameters.items()} | parameters
    for code in notebook.code[1:]:  # without the bootstrap
        exec(code, names)
        if until and until in code:
            break
    return names


# --- a410: derived images


@pytest.mark.parametrize("name", ["n4", "adc", "swi", "two"])
def test_a410_a_derived_image_is_no_segmentation(made, name):
    folder = made("a410") / name
    assert [bool(case.seg) for case in find_cases(folder)] == [True, True, True, False]
    code, codes, _ = checked(folder)
    assert code == 0 and codes["BraTS20_Validation_003"] == {"no-segmentation"} and codes[""] == {"unused-file"}
