"""Every kind of fault, made on purpose, and the code that names it."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data import audit as audit_module
from brats_helpers.data import checks
from brats_helpers.data.audit import audit, excluded, leave_out, patients_with, rows
from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import FileError
from brats_helpers.data.numbering import number
from brats_helpers.data.patients import load_prepared
from brats_helpers.labels import DataError, labels_to_classes
from brats_helpers.runs import Run
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.plan import read_notebooks
from brats_helpers.training.loop import fit
from tests.conftest import write_tiny_case
from tests.tiny_training import HOW, SETTINGS


@pytest.fixture
def patient(tmp_path):
    """The folder of one faultless patient, `A`, alone in its data folder."""
    return write_tiny_case(tmp_path / "data", "A", seed=0)


def check(folder, modalities=("flair", "t1", "t1ce", "t2"), **options):
    found = survey(folder, modalities)
    return audit(found, found.cases, **({"workers": 1, "cache_dir": None} | options))


def findings(report, case_id="A"):
    """`code: severity` of one patient, or of what belongs to none."""
    listed = report["cases"][case_id]["findings"] if case_id else report["summary"]["findings"]
    return {finding["code"]: finding["severity"] for finding in listed}


def change(path, how=lambda voxels: voxels, *, affine=None, dtype=None):
    """Write a file again with `how` applied to its voxels."""
    image = nib.load(path)
    voxels = how(np.asanyarray(image.dataobj))
    affine = image.affine if affine is None else affine
    nib.save(nib.Nifti1Image(voxels.astype(dtype or voxels.dtype), affine), path)


def turn(path, codes):
    """Store the same anatomy along other axes."""
    image = nib.load(path)
    wanted = nib.orientations.axcodes2ornt(codes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
    nib.save(nib.Nifti1Image(np.asanyarray(turned.dataobj), turned.affine), path)


def set_header(path, **fields):
    """Change fields of a packed NIfTI-1 header and nothing else."""
    raw = gzip.decompress(path.read_bytes())
    header = nib.Nifti1Header(raw[:348])
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(header.binaryblock + raw[348:], 1))


def set_voxel(value):
    def how(voxels):
        voxels = voxels.astype(np.result_type(voxels, np.min_scalar_type(value)))
        voxels[24, 28, 10] = value  # within brain and tumour
        return voxels

    return how


def test_a_faultless_patient_has_nothing_to_say(patient):
    report = check(patient.parent)
    assert findings(report) == findings(report, "") == excluded(report) == {}
    assert report["summary"]["worst"] == {"error": 0, "warning": 0, "note": 0, "clean": 1}
    assert rows(report, each=3) == []


def test_what_the_report_says_of_each_file(patient):
    (patient / "A_seg.nii.gz").rename(patient / "W39_1998.09.19_Segm.nii.gz")
    files = check(patient.parent)["cases"]["A"]["files"]
    assert list(files) == ["flair", "t1", "t1ce", "t2", "seg"]
    assert files["t1ce"]["file"] == "A/A_t1ce.nii.gz" and files["t1ce"]["recognised"] == "its name ends in t1ce"
    assert files["seg"]["recognised"] == "its name ends in segm"
    voxels = np.asanyarray(nib.load(patient / "A_t1ce.nii.gz").dataobj)
    assert (files["t1ce"]["shape"], files["t1ce"]["dtype"]) == ([48, 56, 20], "int16")
    assert files["t1ce"]["range"] == [voxels.min(), voxels.max()]
    assert files["t1ce"]["spacing_mm"] == [1, 1, 1] and files["t1ce"]["affine"][1] == [0, -1, 0, 55]
    labels = np.asanyarray(nib.load(patient / "W39_1998.09.19_Segm.nii.gz").dataobj)
    assert files["seg"]["labels"] == {str(k): np.count_nonzero(labels == k) for k in (1, 2, 4)}


# --- names


def test_faults_of_names(patient):
    data = patient.parent
    for case_id in "BCDE":
        shutil.copytree(patient, data / case_id)
        for path in (data / case_id).iterdir():
            path.rename(path.with_name(path.name.replace("A_", f"{case_id}_")))
    (data / "B" / "B_t1.nii.gz").unlink()
    shutil.copy(data / "C" / "C_t2.nii.gz", data / "C" / "C_t2.nii")
    change(data / "C" / "C_t2.nii.gz", set_voxel(np.int16(7)))
    (data / "D" / "D_seg.nii.gz").rename(data / "D" / "1_seg.nii.gz")
    shutil.copy(data / "A" / "A_seg.nii.gz", data / "D" / "2_seg.nii.gz")
    change(data / "D" / "2_seg.nii.gz", np.zeros_like)
    shutil.copytree(data / "E", data / "again" / "E")
    change(data / "again" / "E" / "E_t1.nii.gz", set_voxel(7))
    (data / "F").mkdir()
    shutil.copy(patient / "A_seg.nii.gz", data / "F" / "F_seg.nii.gz")
    (patient / "A_seg.nii.gz").unlink()
    (patient / "._A_t1.nii.gz").touch()
    (data / ".DS_Store").touch()
    (data / "atlas.nii.gz").touch()
    report = check(data)
    errors = excluded(report)
    assert errors == {
        "B": ["missing-modality"],
        "C": ["two-files"],
        "D": ["two-segmentations"],
        "E": ["two-folders"],
        "F": ["no-images"],
    }
    assert findings(report)["no-segmentation"] == "note"
    assert findings(report, "") == {"stray-file": "note", "unused-file": "note"}
    assert {f["file"] for f in report["summary"]["findings"]} >= {"A/._A_t1.nii.gz", ".DS_Store", "atlas.nii.gz"}


def test_the_segmentation_of_another_name_is_a_guess(patient):
    (patient / "A_seg.nii.gz").rename(patient / "W39_1998.09.19_Segm.nii.gz")
    assert findings(check(patient.parent)) == {"unusual-name": "warning"}


# --- files


@pytest.mark.parametrize("kind", ["flair", "seg"])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: gzip.decompress(raw)[:-100], "truncated"),
        (lambda raw: b"", "truncated"),
        (lambda raw: b"<html>Sign in to download</html>" * 99, "unreadable"),
        (lambda raw: raw[:200] + bytes(200) + raw[400:], "unreadable"),
    ],
)
def test_files_that_cannot_be_read(patient, kind, spoil, code):
    path = patient / f"A_{kind}.nii.gz"
    path.write_bytes(spoil(path.read_bytes()))
    report = check(patient.parent)
    assert excluded(report) == {"A": [code]}
    (finding,) = (f for f in report["cases"]["A"]["findings"] if f["code"] == code)
    assert finding["file"] == f"A/A_{kind}.nii.gz" and "again" in finding["message"]
    assert str(patient) not in finding["message"]
    assert report["cases"]["A"]["content"] == "unreadable"


def test_packing_that_the_name_denies(patient):
    raw = (patient / "A_t1.nii.gz").read_bytes()
    (patient / "A_t1.nii.gz").unlink()
    (patient / "A_t1.nii").write_bytes(raw)
    (patient / "A_t2.nii.gz").write_bytes(gzip.decompress((patient / "A_t2.nii.gz").read_bytes()))
    assert findings(check(patient.parent)) == {"gzip-as-nii": "warning", "nii-as-gzip": "warning"}


# --- geometry and voxels


def moved(path, how):
    return nib.load(path).affine @ how


@pytest.mark.parametrize("kind", ["t2", "seg"])
@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda path: change(path, lambda voxels: voxels[:, :, :-1]), "shape-mismatch"),
        (lambda path: change(path, affine=moved(path, np.diag([1, 1, 1.2, 1]))), "spacing-mismatch"),
        (lambda path: change(path, affine=moved(path, np.diag([1, -1, 1, 1]))), "affine-mismatch"),
        (lambda path: change(path, lambda voxels: voxels[..., None].repeat(2, 3)), "not-3d"),
        (lambda path: change(path, lambda voxels: voxels[:, :, 10]), "not-3d"),
        (lambda path: change(path, dtype=np.complex64), "dtype"),
    ],
)
def test_geometry_and_type(patient, kind, spoil, code):
    path = patient / f"A_{kind}.nii.gz"
    spoil(path)
    report = check(patient.parent)
    assert findings(report)[code] == "error"
    assert {f["file"] for f in report["cases"]["A"]["findings"] if f["severity"] == "error"} == {f"A/{path.name}"}


def test_the_file_that_differs_is_blamed_even_if_it_comes_first(patient):
    change(patient / "A_flair.nii.gz", lambda voxels: voxels[:, :, :-1])
    (finding,) = (f for f in check(patient.parent)["cases"]["A"]["findings"] if f["code"] == "shape-mismatch")
    assert finding["file"] == "A/A_flair.nii.gz"
    assert finding["message"].startswith("Shape 48 x 56 x 19 instead of the 48 x 56 x 20 of t1.")


def test_rounding_of_an_affine_is_no_difference(patient):
    path = patient / "A_t2.nii.gz"
    change(path, affine=nib.load(path).affine + 1e-4)
    assert findings(check(patient.parent)) == {}


@pytest.mark.parametrize(
    ("how", "code", "severity"),
    [
        (set_voxel(np.nan), "non-finite", "error"),
        (set_voxel(np.inf), "non-finite", "error"),
        (np.zeros_like, "empty-image", "error"),
        (lambda voxels: np.full_like(voxels, 7), "constant-image", "error"),
        (lambda voxels: (voxels != 0) * np.int16(7), "constant-image", "error"),
        (lambda voxels: voxels + np.int16(1000), "no-background", "warning"),
    ],
)
def test_images(patient, how, code, severity):
    change(patient / "A_t1ce.nii.gz", how)
    assert findings(check(patient.parent))[code] == severity


def test_nan_is_background_where_every_other_modality_is(patient):
    for kind in ("t1", "t2"):
        change(patient / f"A_{kind}.nii.gz", lambda voxels: np.where(voxels, voxels, np.nan))
    report = check(patient.parent)
    assert findings(report) == {"nan-background": "warning", "mixed-dtypes": "note"}
    before = nib.load(patient / "A_flair.nii.gz")
    facts = report["cases"]["A"]["files"]
    assert facts["t1"]["range"][0] == 0 and facts["t1"]["filled"] == facts["flair"]["filled"]
    assert facts["flair"]["filled"] == pytest.approx(np.mean(np.asanyarray(before.dataobj) != 0), abs=1e-4)


@pytest.mark.parametrize(("seed", "where"), [(0, np.s_[2:-2, 2:-2, 2:-2]), (1, np.s_[:, :, 5:]), (2, np.s_[:, 9:, :])])
def test_noise_in_the_air_is_noticed_whatever_part_of_the_field_is_0(patient, seed, where):
    def how(voxels):
        noise = np.zeros_like(voxels)
        noise[where] = np.random.default_rng(seed).integers(1, 40, voxels[where].shape)
        return np.where(voxels, voxels, noise)

    change(patient / "A_t1.nii.gz", how)
    report = check(patient.parent)
    assert findings(report) == {"no-background": "warning"}
    share = report["cases"]["A"]["files"]["t1"]["filled"]
    assert share > 0.6 and report["cases"]["A"]["findings"][0]["message"].startswith(f"{share:.0%} of the field")


def test_a_tightly_cropped_slab_of_a_stripped_brain_is_no_noise(patient):
    for path in patient.iterdir():
        change(path, lambda voxels: voxels[8:40, 6:50, 8:12])
    report = check(patient.parent)
    assert findings(report) == {} and report["cases"]["A"]["files"]["t1"]["filled"] > 0.7


# --- headers


@pytest.mark.parametrize(
    ("fields", "code", "severity"),
    [
        ({"qform_code": 1, "qoffset_x": 9}, "qform-sform", "warning"),
        ({"qform_code": 1, "srow_z": 0}, "singular-affine", "warning"),
        ({"qform_code": 0, "srow_z": 0}, "singular-affine", "error"),
        ({"qform_code": 0, "sform_code": 0}, "no-orientation", "warning"),
    ],
)
def test_headers_that_have_to_be_interpreted(patient, fields, code, severity):
    for path in patient.iterdir():
        image = nib.load(path)
        image.set_qform(image.affine, 1)
        nib.save(image, path)
        set_header(path, **fields)
    assert findings(check(patient.parent)) == {code: severity}


def test_files_of_one_patient_may_be_stored_along_other_axes(patient):
    turn(patient / "A_t2.nii.gz", "PIR")
    assert findings(check(patient.parent)) == {}


def test_two_affines_that_look_alike_are_told_apart(patient):
    change(patient / "A_t2.nii.gz", affine=moved(patient / "A_t2.nii.gz", np.diag([1, 1, 1.0005, 1])))
    change(patient / "A_seg.nii.gz", affine=nib.load(patient / "A_seg.nii.gz").affine + np.eye(4, k=3) * 0.06)
    (finding,) = check(patient.parent)["cases"]["A"]["findings"]
    assert finding["code"] == "affine-mismatch" and finding["file"] == "A/A_seg.nii.gz"
    assert "up to 0.06 mm apart; origins differ by (0.06, 0, 0) mm" in finding["message"]


# --- patients compared


@pytest.fixture
def five(tmp_path):
    """Five faultless patients, `A` to `E`."""
    for k, case_id in enumerate("ABCDE"):
        write_tiny_case(tmp_path / "data", case_id, seed=k)
    return tmp_path / "data"


def test_patients_that_differ_from_the_others_are_named(five):
    for path in (five / "B").iterdir():
        turn(path, "RAS")
    for path in (five / "C").iterdir():
        change(path, affine=np.diag([-1, -1, 5.0, 1]))
        turn(path, "PIR")
    for path in (five / "D").iterdir():
        change(path, lambda voxels: np.pad(voxels, 20))
    report = check(five)
    assert findings(report, "A") == findings(report, "E") == {}
    assert findings(report, "B") == {"orientation": "note"}
    assert findings(report, "C") == {"spacing": "warning", "orientation": "note"}
    assert findings(report, "D") == {"filled-share": "warning"}
    messages = {case_id: report["cases"][case_id]["findings"][0]["message"] for case_id in "BCD"}
    assert "RAS" in messages["B"] and "LPS" in messages["B"]
    assert messages["C"].startswith("Voxels of 1 x 1 x 5 mm, most patients have 1 x 1 x 1 mm")  # in LPS order
    inside = 48 * 56 * 20 / (88 * 96 * 60)  # the share of the padded field that was the field before
    filled = {case_id: report["cases"][case_id]["files"]["t1"]["filled"] for case_id in "ABCDE"}
    assert filled["D"] == pytest.approx(filled["A"] * inside, rel=0.1)
    usual = np.median([*filled.values()])
    assert messages["D"].startswith(
        f"{filled['D']:.0%} of the field is not 0, against {usual:.0%} in the median patient"
    )


def test_a_set_of_another_spacing_is_compared_with_brats(five):
    for path in five.glob("*/*.gz"):
        change(path, affine=np.diag([-0.5, -0.5, 1, 1]))
    for entry in check(five)["cases"].values():
        (finding,) = entry["findings"]
        assert finding["code"] == "spacing" and "0.5 x 0.5 x 1 mm, BraTS has 1 x 1 x 1 mm" in finding["message"]


def test_one_flat_slice_makes_no_constant_image(patient):
    def how(voxels):
        voxels[:, :, 8:12] = (voxels[:, :, 8:12] != 0) * voxels.max()
        return voxels

    change(patient / "A_t1.nii.gz", how)
    assert findings(check(patient.parent)) == {}


def test_modalities_of_different_types(patient):
    change(patient / "A_t1.nii.gz", dtype=np.float32)
    assert findings(check(patient.parent)) == {"mixed-dtypes": "note"}


def test_one_image_as_two_modalities(patient):
    shutil.copy(patient / "A_t1.nii.gz", patient / "A_t1ce.nii.gz")
    report = check(patient.parent)
    assert excluded(report) == {"A": ["same-image"]}
    assert report["cases"]["A"]["findings"][0]["file"] == "A/A_t1ce.nii.gz"


# --- labels

LABELS = [
    ([0, 1, 2, 4], None, None),
    ([0, 1, 2, 4.5], "fractional-label", "error"),
    ([0, 1, 2, np.nan], "fractional-label", "error"),
    ([0, 1, 2, 5], "unknown-label", "error"),
    ([0, 1, 2, -1], "unknown-label", "error"),
    ([0, 1, 2, 260], "unknown-label", "error"),
    ([0, 1, 3, 4], "labels-3-and-4", "error"),
    ([0, 1, 2, 3], "label-3", "warning"),
    ([0, 1, 2, 2], "no-enhancing", "note"),
    ([0, 0, 0, 0], "no-tumour", "warning"),
]


@pytest.mark.parametrize(("labels", "code", "severity"), LABELS)
def test_labels(patient, labels, code, severity):
    path = patient / "A_seg.nii.gz"
    change(path, lambda voxels: np.array(labels)[labels_to_classes(voxels)].astype(np.float32))
    assert findings(check(patient.parent)) == ({code: severity} if code else {})
    stored = np.asanyarray(nib.load(path).dataobj)
    if severity == "error":  # what the audit calls unusable is what reading refuses, and nothing else
        with pytest.raises(ValueError):
            labels_to_classes(stored)
    else:
        labels_to_classes(stored)


def test_a_patient_of_another_numbering_among_others_is_named(tmp_path):
    """Two of five patients come from a set in which 1 is oedema, 2 necrosis and 3 enhancing: too few to decide."""
    data = tmp_path / "data"
    for k in range(5):
        write_tiny_case(data, f"A_{k}", seed=k)
    for k in (1, 3):
        change(data / f"A_{k}" / f"A_{k}_seg.nii.gz", lambda labels: np.array([0, 2, 1, 0, 3], np.uint8)[labels])
    found = number(survey(data))[0]
    report = audit(found, found.cases, workers=1, cache_dir=None)
    assert patients_with(report, "other-numbering") == ["A_1", "A_3"]
    (told,) = (one for one in report["cases"]["A_1"]["findings"] if one["code"] == "other-numbering")
    assert (told["severity"], told["file"]) == ("warning", "A_1/A_1_seg.nii.gz")
    assert "speaks for msd (1 ED, 2 NCR, 3 ET), but the set is read as brats2020" in told["message"]


def test_label_3_is_expected_under_the_names_of_2023(patient):
    change(patient / "A_seg.nii.gz", lambda voxels: np.where(voxels == 4, 3, voxels))
    for old, new in {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}.items():
        (patient / f"A_{old}.nii.gz").rename(patient / f"A-{new}.nii.gz")
    (patient / "A_seg.nii.gz").rename(patient / "A-seg.nii.gz")
    assert findings(check(patient.parent)) == {}


def test_labels_outside_of_the_brain_are_counted(patient):
    def how(voxels):
        voxels[0, 0, :5] = 2
        return voxels

    path = patient / "A_seg.nii.gz"
    change(path, how)
    tumour = np.count_nonzero(nib.load(path).dataobj)
    (finding,) = check(patient.parent)["cases"]["A"]["findings"]
    assert (finding["code"], finding["severity"]) == ("outside-brain", "warning")
    assert finding["message"].startswith(f"5 labelled voxels ({5 / tumour:.1%})")


def test_a_stray_label_is_only_a_note():
    labelled = np.zeros((20, 20, 20), bool)
    labelled[5:15, 5:15, 4:15] = True
    labelled[0, 0, 0] = True
    voxels = np.zeros(labelled.shape)
    voxels[1:, 1:, 1:] = 1
    scan = SimpleNamespace(voxels=voxels, facts={"filled": 0.9})
    (problem,) = checks._place_problems(labelled, (slice(None),) * 3, {"flair": scan})
    assert problem == ("outside-brain", "note", "kept although every image is 0 there: 1 labelled voxel (below 0.1%).")


@pytest.mark.parametrize(
    ("share", "expected"), [(1, {"mostly-labelled": "error"}), (0.55, {"mostly-labelled": "error"}), (0.45, {})]
)
def test_a_mask_of_the_brain_is_no_tumour(patient, share, expected):
    brain = np.asanyarray(nib.load(patient / "A_t1.nii.gz").dataobj) != 0
    labels = np.where(brain & (brain.cumsum().reshape(brain.shape) <= share * brain.sum()), 4, 0)
    change(patient / "A_seg.nii.gz", lambda voxels: labels.astype(np.uint8))
    report = check(patient.parent)
    assert findings(report) == expected
    for finding in report["cases"]["A"]["findings"]:
        assert finding["message"].startswith(f"{share:.0%} of the brain is labelled")


def test_a_scaled_file_means_what_its_slope_says(patient):
    """Stored as 2 (label - 1) with slope 0.5 and intercept 1: background is stored as -2."""
    path = patient / "A_seg.nii.gz"
    image = nib.load(path)
    labels = np.asanyarray(image.dataobj).astype(np.int16)
    scaled = nib.Nifti1Image(2 * (labels - 1), image.affine, dtype=np.int16)
    raw = bytearray(scaled.to_bytes())
    raw[112:120] = np.array([0.5, 1.0], "<f4").tobytes()  # scl_slope, scl_inter
    path.write_bytes(gzip.compress(bytes(raw)))
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), labels)
    report = check(patient.parent)
    assert findings(report) == {}
    facts = report["cases"]["A"]["files"]["seg"]
    assert facts["labels"] == {str(k): np.count_nonzero(labels == k) for k in (1, 2, 4)} and facts["range"] == [0, 4]


# --- the same scan, the same patient


def test_the_same_scan_under_two_names(tmp_path):
    for k, case_id in enumerate("ABC"):
        write_tiny_case(tmp_path, case_id, seed=k)
    plain = gzip.decompress((tmp_path / "A" / "A_t2.nii.gz").read_bytes())  # packed otherwise,
    (tmp_path / "C" / "C_t2.nii.gz").unlink()
    (tmp_path / "C" / "C_t2.nii").write_bytes(plain)
    change(tmp_path / "C" / "C_t2.nii", dtype=np.float64)  # and of another type
    report = check(tmp_path)
    assert findings(report, "A") == {"same-scan": "warning"}
    assert findings(report, "C") == {"same-scan": "warning", "mixed-dtypes": "note"}
    finding = report["cases"]["C"]["findings"][0]
    assert finding["file"] == "C/C_t2.nii" and finding["message"].startswith(
        "t2: voxel for voxel the same as a file of A"
    )
    assert [entry["group"] for entry in report["cases"].values()] == ["A", "B", "A"]


def test_a_mask_of_another_patient_is_noticed(tmp_path):
    folders = [write_tiny_case(tmp_path, case_id, seed=k) for k, case_id in enumerate("AB")]
    shutil.copy(folders[0] / "A_seg.nii.gz", folders[1] / "B_seg.nii.gz")
    report = check(tmp_path)
    assert findings(report, "A") == findings(report, "B") == {"same-scan": "warning"}
    assert report["cases"]["B"]["findings"][0]["file"] == "B/B_seg.nii.gz"


def test_empty_images_and_masks_are_nobodys_scan(tmp_path):
    for k, case_id in enumerate("AB"):
        folder = write_tiny_case(tmp_path, case_id, seed=k)
        change(folder / f"{case_id}_t1.nii.gz", np.zeros_like)
        change(folder / f"{case_id}_seg.nii.gz", np.zeros_like)
    report = check(tmp_path)
    assert findings(report, "B") == {"empty-image": "error", "no-tumour": "warning"}
    assert [entry["group"] for entry in report["cases"].values()] == ["A", "B"]


def test_pairs_that_share_a_member_are_one_group(tmp_path):
    folders = {case_id: write_tiny_case(tmp_path, case_id, seed=k) for k, case_id in enumerate("ABCDE")}
    for one, kind, other in (("A", "t1", "B"), ("C", "t1", "D"), ("B", "t2", "D")):
        shutil.copy(folders[one] / f"{one}_{kind}.nii.gz", folders[other] / f"{other}_{kind}.nii.gz")
    report = check(tmp_path)
    assert [entry["group"] for entry in report["cases"].values()] == ["A", "A", "A", "A", "E"]


def test_one_patient_by_time_points_and_by_the_tables(tmp_path):
    ids = ["BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000", "Brats18_X_1", "BraTS20_Training_009"]
    for k, case_id in enumerate(ids):
        write_tiny_case(tmp_path, case_id, seed=k)
    (tmp_path / "name_mapping.csv").write_text(
        "Grade,BraTS_2018_subject_ID,BraTS_2020_subject_ID\nLGG,Brats18_X_1,BraTS20_Training_009\n"
    )
    report = check(tmp_path)
    groups = {case_id: report["cases"][case_id]["group"] for case_id in ids}
    assert groups[ids[0]] == groups[ids[1]] != groups[ids[2]]
    assert groups[ids[3]] == groups[ids[4]] != groups[ids[0]]
    assert [case_id for case_id in ids if "same-patient" in findings(report, case_id)] == [ids[1], ids[3]]
    assert report["cases"][ids[4]]["grade"] == "LGG" and report["cases"][ids[4]]["earlier_ids"] == ["Brats18_X_1"]


# --- tables


def test_tables(tmp_path):
    ids = [f"BraTS20_Training_00{k}" for k in range(1, 5)]
    for k, case_id in enumerate(ids):
        write_tiny_case(tmp_path, case_id, seed=k)
    (tmp_path / "name_mapping.csv").write_text(
        "\ufeffGrade,BraTS_2017_subject_ID,TCGA_TCIA_subject_ID,BraTS_2020_subject_ID\r\n"
        f"HGG,Brats17_CBICA_AAB_1,NA,{ids[0]}\r\nLGG,NA,TCGA-02-0006,{ids[1]}\r\n"
    )
    (tmp_path / "survival_info.csv").write_text(
        "Brats20ID,Age,Survival_days,Extent_of_Resection\n"
        f"{ids[0]},60.46,289,GTR\n{ids[1]},52.2,ALIVE (361 days later),NA\n{ids[2]},old,soon,STR\n{ids[3]},40\n"
    )
    (tmp_path / "survival_evaluation.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "name_mapping_other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "prices.csv").write_text("a,b\n1,2\n")
    report = check(tmp_path)
    known = [{key: entry.get(key) for key in KEYS} for entry in report["cases"].values()]
    assert [list(entry.values()) for entry in known] == [
        ["HGG", ["Brats17_CBICA_AAB_1"], 60.46, 289, False, "GTR"],
        ["LGG", ["TCGA-02-0006"], 52.2, 361, True, None],
        [None, None, None, None, None, "STR"],
        [None, None, 40, None, None, None],
    ]
    messages = sorted((f["file"], f["message"]) for f in report["summary"]["findings"] if f["code"] == "table")
    files = [file for file, _ in messages]
    assert files == ["name_mapping_other.csv", "survival_evaluation.csv", "survival_info.csv", "survival_info.csv"]
    assert messages[2][1] == f"{ids[2]}: age 'old' is not a number of years; it is not used."
    assert not any(f["severity"] == "error" for f in report["summary"]["findings"])


KEYS = ("grade", "earlier_ids", "age", "survival_days", "alive", "resection")


def test_grade_of_the_folders_of_2018_and_2019(tmp_path):
    write_tiny_case(tmp_path / "HGG", "A", seed=0)
    write_tiny_case(tmp_path / "lgg", "B", seed=1)
    write_tiny_case(tmp_path, "C", seed=2)
    assert [entry["grade"] for entry in check(tmp_path)["cases"].values()] == ["HGG", "LGG", None]
    assert check(tmp_path / "HGG")["cases"]["A"]["grade"] == "HGG"


# --- remembering, leaving out, showing


def test_what_was_read_is_remembered_until_a_file_changes(tiny_patients, tmp_path, monkeypatch):
    data = shutil.copytree(tiny_patients, tmp_path / "data")
    before = check(data, cache_dir=tmp_path / "cache")
    read = []
    really = audit_module.check_case
    monkeypatch.setattr(audit_module, "check_case", lambda case: read.append(case.id) or really(case))
    moved = tmp_path / "elsewhere" / "data"
    moved.parent.mkdir()
    data.rename(moved)
    for path in moved.rglob("*.gz"):
        path.chmod(0o600)
    after = check(moved, cache_dir=tmp_path / "cache")
    assert after["cases"] == before["cases"] and read == []
    change(moved / "Tiny_2" / "Tiny_2_t1.nii.gz", set_voxel(np.int16(77)))
    after = check(moved, cache_dir=tmp_path / "cache")
    assert read == ["Tiny_2"]
    differs = [k for k in before["cases"] if before["cases"][k]["content"] != after["cases"][k]["content"]]
    assert differs == ["Tiny_2"]
    check(moved)
    assert len(read) == 5


def test_a_file_that_could_not_be_read_is_read_again(patient, tmp_path, monkeypatch):
    def fail(path):
        raise FileError("unreadable", f"{path} cannot be read as NIfTI (Input/output error).")

    with monkeypatch.context() as patched:
        patched.setattr(checks, "read_bytes", fail)
        assert excluded(check(patient.parent, cache_dir=tmp_path / "cache")) == {"A": ["unreadable"]}
    assert excluded(check(patient.parent, cache_dir=tmp_path / "cache")) == {}


def test_a_torn_memory_is_forgotten(tiny_patients, tmp_path):
    before = check(tiny_patients, cache_dir=tmp_path)
    (memory,) = tmp_path.iterdir()
    whole = memory.read_bytes()
    for torn in (b"", whole[:99], bytes(99), b"\xff"):
        memory.write_bytes(torn)
        assert check(tiny_patients, cache_dir=tmp_path) == before
        assert memory.read_bytes() == whole


def test_workers_find_the_same(tiny_patients):
    assert check(tiny_patients, workers=2) == check(tiny_patients)


def test_patients_with_errors_are_left_out_aloud(tiny_patients, tmp_path, capsys):
    data = shutil.copytree(tiny_patients, tmp_path / "data")
    change(data / "Tiny_1" / "Tiny_1_t1.nii.gz", np.zeros_like)
    found = survey(data)
    report = audit(found, found.cases, workers=1, cache_dir=None)
    assert [case.id for case in leave_out(report, found.cases)] == ["Tiny_0", "Tiny_2", "Tiny_3"]
    assert capsys.readouterr().out == "⚠️ left out: Tiny_1: empty-image\n"
    with pytest.raises(DataError, match="none of the 1 patients below .* can be used"):
        leave_out(report, found.cases[1:2])


def test_many_findings_of_a_kind_are_cut_short_and_the_worst_come_first():
    def entry(*codes):
        return {"findings": [{"code": c, "severity": s, "file": "f", "message": "m"} for c, s in codes]}

    notes = {f"P{k:03d}": entry(("no-enhancing", "note")) for k in range(300)}
    report = {"cases": notes | {"Q": entry(("truncated", "error"))}, "summary": entry(("stray-file", "note"))}
    table = rows(report, each=3)
    assert [row["code"] for row in table] == ["truncated"] + ["no-enhancing"] * 4 + ["stray-file"]
    assert table[0] == {"severity": "error", "code": "truncated", "patient": "Q", "file": "f", "message": "m"}
    assert table[4]["message"] == "… and 297 more like these."


# --- the verb


def test_the_verb_check(tiny_patients, tmp_path, capsys):
    data = shutil.copytree(tiny_patients, tmp_path / "data")
    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    assert main(["check", str(data), "--workers", "1"]) == 0
    assert capsys.readouterr().out == (
        "✅ 4 patients: 0 with errors, 0 with warnings, 0 with notes, 4 without findings\n"
    )
    for case_id in ("Tiny_0", "Tiny_1"):
        (data / case_id / f"{case_id}_t1.nii.gz").unlink()
    (data / "Tiny_2" / "._x").touch()
    assert main(["check", str(data), "--workers", "1", "--json", str(tmp_path / "new" / "check.json")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "❌ error missing-modality: 2"
    assert printed[1].startswith("   Tiny_0/Tiny_0_t1.nii.gz: No Tiny_0_t1.nii.gz in Tiny_0 (missing: t1;")
    assert printed[3] == "note stray-file: 1"
    assert printed[-1].startswith("❌ 4 patients: 2 with errors, 0 with warnings, 0 with notes, 2 without findings")
    report = json.loads((tmp_path / "new" / "check.json").read_text(), parse_constant=pytest.fail)
    assert set(report) == {"cases", "summary"} and list(report["cases"]) == [f"Tiny_{k}" for k in range(4)]
    assert set(report["cases"]["Tiny_0"]["findings"][0]) == {"code", "severity", "file", "message"}
    assert main(["check", str(data), "--workers", "1", "--modalities", "flair,t2"]) == 0
    left = {path: path.stat().st_mtime_ns for path in before if path.is_file()}
    assert left == {path: before[path] for path in left}


@pytest.mark.parametrize("arguments", [["nowhere"], ["."], [".", "--modalities", "flair,pet"]])
def test_a_check_that_could_not_run(tmp_path, arguments, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", *arguments]) == 2
    assert capsys.readouterr().out.startswith("❌")


def test_json_holds_no_number_that_json_has_not(patient, tmp_path):
    change(patient / "A_t1ce.nii.gz", set_voxel(np.nan))
    main(["check", str(patient.parent), "--workers", "1", "--json", str(tmp_path / "check.json")])
    json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)


def test_the_verb_as_a_command(tiny_patients):
    command = [sys.executable, "-m", "brats_helpers", "check", tiny_patients, "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "4 patients" in done.stdout, done.stderr


# --- all of it at once

ERRORS = {
    "missing-modality": lambda p: (p / f"{p.name}_t1.nii.gz").unlink(),
    "two-files": lambda p: shutil.copy(p / f"{p.name}_t1.nii.gz", p / f"{p.name}_t2.nii"),
    "two-segmentations": lambda p: [
        shutil.move(p / f"{p.name}_seg.nii.gz", p / "1_seg.nii"),
        (p / "2_seg.nii").touch(),
    ],
    "two-folders": lambda p: [
        shutil.copytree(p, p.parent / "again" / p.name),
        change(p / f"{p.name}_t1.nii.gz", set_voxel(np.int16(7))),
    ],
    "no-images": lambda p: [path.unlink() for path in p.iterdir() if "seg" not in path.name],
    "truncated": lambda p: (p / f"{p.name}_t2.nii.gz").write_bytes((p / f"{p.name}_t2.nii.gz").read_bytes()[:-999]),
    "unreadable": lambda p: (p / f"{p.name}_t2.nii.gz").write_bytes(bytes(999)),
    "shape-mismatch": lambda p: change(p / f"{p.name}_t2.nii.gz", lambda voxels: voxels[:-1]),
    "spacing-mismatch": lambda p: change(p / f"{p.name}_t2.nii.gz", affine=np.diag([2, 2, 2, 1])),
    "affine-mismatch": lambda p: change(p / f"{p.name}_seg.nii.gz", affine=np.eye(4)),
    "not-3d": lambda p: change(p / f"{p.name}_t1.nii.gz", lambda voxels: voxels[:, :, 10]),
    "singular-affine": lambda p: set_header(p / f"{p.name}_t1.nii.gz", qform_code=0, srow_z=0),
    "dtype": lambda p: change(p / f"{p.name}_t1.nii.gz", dtype=np.complex64),
    "non-finite": lambda p: change(p / f"{p.name}_t1.nii.gz", set_voxel(np.nan)),
    "empty-image": lambda p: change(p / f"{p.name}_t1.nii.gz", np.zeros_like),
    "constant-image": lambda p: change(p / f"{p.name}_t1.nii.gz", np.ones_like),
    "same-image": lambda p: shutil.copy(p / f"{p.name}_t1.nii.gz", p / f"{p.name}_t1ce.nii.gz"),
    "fractional-label": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: voxels * 0.5),
    "unknown-label": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: voxels * 2),
    "mostly-labelled": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: np.maximum(voxels, 1)),
    "labels-3-and-4": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: np.where(voxels == 1, 3, voxels)),
}
OTHERS = {
    "fourth-axis": lambda p: change(p / f"{p.name}_t1.nii.gz", lambda voxels: voxels[..., None]),
    "qform-sform": lambda p: set_header(p / f"{p.name}_seg.nii.gz", qform_code=1, qoffset_x=9),
    "no-orientation": lambda p: [set_header(path, qform_code=0, sform_code=0) for path in p.iterdir()],
    "orientation": lambda p: [turn(path, "RAS") for path in p.iterdir()],
    "spacing": lambda p: [change(path, affine=np.diag([-1, -1, 5, 1])) for path in p.iterdir()],
    "filled-share": lambda p: [change(path, lambda voxels: voxels[6:-6, 6:-6, 3:-3]) for path in p.iterdir()],
    "nan-background": lambda p: change(p / f"{p.name}_t1.nii.gz", lambda voxels: np.where(voxels, voxels, np.nan)),
    "broken-link": lambda p: (p / "notes").symlink_to("gone"),
    "empty-folder": lambda p: (p / "more").mkdir(),
    "unread-format": lambda p: (p / f"{p.name}_pet.mha").touch(),
    "same-copy": lambda p: shutil.copytree(p, p.parent / "copy" / p.name),
    "mask-elsewhere": lambda p: shutil.move(p / f"{p.name}_seg.nii.gz", p.parent / "good" / f"{p.name}_seg.nii.gz"),
    "gzip-as-nii": lambda p: shutil.move(p / f"{p.name}_t1.nii.gz", p / f"{p.name}_t1.nii"),
    "nii-as-gzip": lambda p: (p / f"{p.name}_t1.nii.gz").write_bytes(nib.load(p / f"{p.name}_t1.nii.gz").to_bytes()),
    "no-background": lambda p: change(p / f"{p.name}_t1.nii.gz", lambda voxels: voxels + np.int16(500)),
    "label-3": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: np.where(voxels == 4, 3, voxels)),
    "no-tumour": lambda p: change(p / f"{p.name}_seg.nii.gz", np.zeros_like),
    "outside-brain": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: np.roll(voxels, 20, axis=0)),
    "same-scan": lambda p: shutil.copy(p.parent / "label-3" / "label-3_t2.nii.gz", p / f"{p.name}_t2.nii.gz"),
    "table": lambda p: (p.parent / "survival_info.csv").write_text(f"Brats20ID,Age\n{p.name},very old\n"),
    "stray-file": lambda p: (p / f"._{p.name}_t1.nii.gz").touch(),
    "unused-file": lambda p: (p / "brain_mask.nii.gz").touch(),
    "unusual-name": lambda p: shutil.move(p / f"{p.name}_seg.nii.gz", p / "W39_1998.09.19_Segm.nii.gz"),
    "no-segmentation": lambda p: (p / f"{p.name}_seg.nii.gz").unlink(),
    "no-enhancing": lambda p: change(p / f"{p.name}_seg.nii.gz", lambda voxels: np.where(voxels == 4, 1, voxels)),
    "mixed-dtypes": lambda p: change(p / f"{p.name}_t1.nii.gz", dtype=np.float32),
    "same-patient": lambda p: (p.parent / "name_mapping.csv").write_text(
        f"Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID\nHGG,no-enhancing,{p.name}\n"
    ),
}


def test_a_set_with_every_fault_at_once_trains_on_what_is_left(tmp_path, capsys):
    """Through the cells of notebook 00 as they stand, then a training."""
    data = tmp_path / "data"
    for k, code in enumerate([*ERRORS, *OTHERS, "good"]):
        write_tiny_case(data, code, seed=k)
    for code, spoil in (ERRORS | OTHERS).items():
        spoil(data / code)
    before = {path: path.lstat().st_mtime_ns for path in data.rglob("*")}

    notebook = read_notebooks(ROOT)["00_setup"]
    names = {name: parameter.default for name, parameter in notebook.parameters.items()}
    names |= {f"{name}_dir": str(tmp_path / name) for name in ("run", "data", "cache")}
    names |= {"data": str(data), "skip_incomplete": True, "folds": 3, "workers": 1, "device": "cpu"}
    for source in notebook.code:
        exec(source, names)

    run = Run(tmp_path / "run")
    report = json.loads(run.audit.read_text())
    assert set(report["summary"]["codes"]) == ERRORS.keys() | OTHERS.keys()
    for code in ERRORS:
        assert findings(report, code)[code] == "error"
    assert run.manifest["excluded"].keys() == ERRORS.keys() == excluded(report).keys()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in printed if "left out" in line] == sorted(ERRORS)

    splits = json.loads(run.splits.read_text())
    used = [*splits["train"], *splits["val"], *splits["test"], *splits["unlabelled"]]
    assert sorted(used) == sorted([*OTHERS, "good"]) and splits["unlabelled"] == ["no-segmentation"]
    for parts in (splits, *splits["folds"]):
        part_of = {case_id: name for name in ("train", "val", "test") for case_id in parts[name]}
        assert part_of["same-scan"] == part_of["label-3"] and part_of["same-patient"] == part_of["no-enhancing"]
    train, val = load_prepared(run, "train"), load_prepared(run, "val")
    settings = dataclasses.replace(SETTINGS, epochs=1)
    assert len(fit(settings, train, val, run.folder, **HOW)) == 1
    assert {path: path.lstat().st_mtime_ns for path in data.rglob("*")} == before
