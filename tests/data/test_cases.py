"""Reading patients as people have them; every trap here has caught somebody."""

import gzip
import json
import os

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.cases import find_cases, survey, survey_segs
from brats_helpers.labels import DataError
from tests.volumes import AFFINE, grid, save

ALL = ("flair", "t1", "t1ce", "t2")


def touch(root, *names):
    """Empty files: finding reads names only."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def patient(root, folder, case, *, kinds=(*ALL, "seg"), ending=".nii.gz", dash="_"):
    touch(root, *(f"{folder}/{case}{dash}{kind}{ending}" for kind in kinds))


# ---- Finding


def test_every_modality_is_its_own_file(tmp_path):
    # `*t1*` takes t1 and t1ce; a `t1` in the folder's or the case's name must not matter either.
    patient(tmp_path, "t1_study/case_t1_001", "case_t1_001")
    (case,) = find_cases(tmp_path)
    assert case.id == "case_t1_001"
    assert {name: path.name for name, path in case.images.items()} == {
        "flair": "case_t1_001_flair.nii.gz",
        "t1": "case_t1_001_t1.nii.gz",
        "t1ce": "case_t1_001_t1ce.nii.gz",
        "t2": "case_t1_001_t2.nii.gz",
    }
    assert case.seg.name == "case_t1_001_seg.nii.gz"
    assert case.folder == tmp_path / "t1_study/case_t1_001"


def test_modalities_come_in_the_order_asked_for(tmp_path):
    patient(tmp_path, "A", "A")
    (case,) = find_cases(tmp_path, ("t2", "flair"))
    assert list(case.images) == ["t2", "flair"]


@pytest.mark.parametrize(
    ("folder", "case", "naming"),
    [
        ("MICCAI_BraTS_2018_Data_Training/HGG/Brats18_2013_10_1", "Brats18_2013_10_1", "_{}.nii.gz"),
        ("MICCAI_BraTS_2019_Data_Training/LGG/BraTS19_TCIA09_141_1", "BraTS19_TCIA09_141_1", "_{}.nii.gz"),
        (
            "BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData/BraTS20_Training_001",
            "BraTS20_Training_001",
            "_{}.nii",
        ),
        ("BraTS2021_00000", "BraTS2021_00000", "_{}.nii.gz"),
        ("PAT_7", "PAT_7", "_{}.NII.GZ"),
    ],
)
def test_releases_up_to_2021(tmp_path, folder, case, naming):
    touch(tmp_path, *(f"{folder}/{case}{naming.format(kind)}" for kind in (*ALL, "seg")))
    (found,) = find_cases(tmp_path)
    assert found.id == case
    assert [path.name for path in found.images.values()] == [case + naming.format(kind) for kind in ALL]
    assert found.seg.name == case + naming.format("seg")


def test_release_2023(tmp_path):
    name = "BraTS-GLI-00000-000"
    patient(tmp_path, f"x/{name}", name, kinds=("t1n", "t1c", "t2w", "t2f", "seg"), dash="-")
    (case,) = find_cases(tmp_path)
    assert case.id == name
    assert {name: path.name.split("-")[-1] for name, path in case.images.items()} == {
        "flair": "t2f.nii.gz",
        "t1": "t1n.nii.gz",
        "t1ce": "t1c.nii.gz",
        "t2": "t2w.nii.gz",
    }
    assert case.seg.name.endswith("-seg.nii.gz")


def test_files_named_by_modality_alone(tmp_path):
    touch(tmp_path, *(f"Smith/{kind}.nii.gz" for kind in (*ALL, "seg")))
    (case,) = find_cases(tmp_path)
    assert (case.id, case.seg.name) == ("Smith", "seg.nii.gz")


def test_both_grades_sorted_by_id(tmp_path):
    patient(tmp_path, "HGG/c", "c")
    patient(tmp_path, "LGG/a", "a")
    patient(tmp_path, "LGG/deep/er/b", "b", kinds=ALL)
    assert [case.id for case in find_cases(tmp_path)] == ["a", "b", "c"]
    assert [case.seg is None for case in find_cases(tmp_path)] == [False, True, False]


def test_one_patients_own_folder(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B")
    assert [case.id for case in find_cases(tmp_path / "B")] == ["B"]


def test_flat_folder_of_patients(tmp_path):
    patient(tmp_path, ".", "A")
    patient(tmp_path, ".", "B")
    assert [(case.id, case.seg.name) for case in find_cases(tmp_path)] == [("A", "A_seg.nii.gz"), ("B", "B_seg.nii.gz")]


def test_355_has_a_segmentation_of_another_name(tmp_path):
    patient(tmp_path, "BraTS20_Training_355", "BraTS20_Training_355", kinds=ALL, ending=".nii")
    touch(tmp_path, "BraTS20_Training_355/W39_1998.09.19_Segm.nii")
    (case,) = find_cases(tmp_path)
    assert case.id == "BraTS20_Training_355"
    assert case.seg.name == "W39_1998.09.19_Segm.nii"
    assert survey_segs(tmp_path)[0] == {case.id: case.seg}


@pytest.mark.parametrize(
    "name", ["A_brain_mask.nii.gz", "Brainmask.nii", "A_skull.nii", "A_seg_pred.nii", "A-prediction.nii"]
)
def test_a_brain_mask_or_a_prediction_is_no_reference(tmp_path, name):
    patient(tmp_path, "A", "A", kinds=ALL)
    touch(tmp_path, f"A/{name}")
    assert find_cases(tmp_path)[0].seg is None
    assert codes(survey(tmp_path)) == {"A": ["no-segmentation"], "": ["unused-file"]}
    touch(tmp_path, "A/tumour.nii")
    assert find_cases(tmp_path)[0].seg.name == "tumour.nii"


@pytest.mark.parametrize("name", ["OpenBrain_1", "outside-brain", "brain_7"])
def test_brain_in_an_id_stays(tmp_path, name):
    patient(tmp_path, name, name, kinds=ALL)
    touch(tmp_path, f"{name}/{name}_tumour.nii")
    (case,) = find_cases(tmp_path)
    assert (case.id, case.seg.name) == (name, f"{name}_tumour.nii")


def test_a_folder_of_links_is_a_subset(tmp_path):
    for case in "ABC":
        patient(tmp_path, f"all/{case}", case)
    subset = tmp_path / "subset"
    subset.mkdir()
    for case in "CA":
        (subset / case).symlink_to(tmp_path / "all" / case)
    found = find_cases(subset)
    assert [case.folder for case in found] == [subset / "A", subset / "C"]
    assert [case.id for case in find_cases(subset / "A")] == ["A"]


def test_links_neither_run_in_circles_nor_make_a_patient_two(tmp_path):
    patient(tmp_path, "data/all/A", "A")
    patient(tmp_path, "elsewhere/B", "B")
    patient(tmp_path, "Z", "Z")  # above the data
    data = tmp_path / "data"
    for link, target in {
        "again": "all", "A": "all/A", "all/up": "..", "all/A/self": ".", "above": "..", "there": "../elsewhere",
        "twice": "../elsewhere/B", "lost": "nowhere", ".hidden": "../Z",
    }.items():  # fmt: skip
        (data / link).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(data)
    found = survey(data)
    assert [(case.id, case.folder) for case in found.cases] == [("A", data / "all/A"), ("B", data / "there/B")]
    assert {(finding.code, finding.file) for finding in found.findings.pop("")} == {
        ("stray-file", ".hidden"),
        ("broken-link", "lost"),
    }
    assert found.findings == {}


def test_a_stranger_among_several_patients_is_nobodys_segmentation(tmp_path):
    patient(tmp_path, ".", "A", kinds=ALL)
    patient(tmp_path, ".", "B", kinds=ALL)
    touch(tmp_path, "template.nii")
    assert [case.seg for case in find_cases(tmp_path)] == [None, None]


@pytest.mark.parametrize(
    "names",
    [("FLAIR", "T1", "T1-Gd", "T2"), ("Flair", "t1w", "t1_ce", "t2w"), ("T2FLAIR", "T1w", "T1wCE", "T2w")],
)
def test_other_words_for_modalities(tmp_path, names):
    patient(tmp_path, "P_1", "P_1", kinds=(*names, "seg"))
    (case,) = find_cases(tmp_path)
    assert case.id == "P_1" and [path.name for path in case.images.values()] == [f"P_1_{name}.nii.gz" for name in names]
    case.images["t2"].unlink()
    with pytest.raises(DataError, match=r"P_1: No P_1_t2w?\.nii\.gz in P_1 \(missing: t2; found: flair, t1, t1ce\)"):
        find_cases(tmp_path)


@pytest.mark.parametrize("prefix", ["P_1_", "P-1-", ""])
def test_flair_may_be_called_t2_flair_and_t2_may_be_a_visit(tmp_path, prefix):
    touch(tmp_path, *(f"P_1/{prefix}{name}.nii.gz" for name in ("T1", "T1ce", "T2", "T2_FLAIR", "seg")))
    patient(tmp_path, "V", "V01_T1", kinds=ALL)
    patient(tmp_path, "V", "V01_T2", kinds=ALL)
    cases = {case.id: case for case in find_cases(tmp_path)}
    assert cases.keys() == {prefix[:-1] or "P_1", "V01_T1", "V01_T2"}
    assert cases[prefix[:-1] or "P_1"].images["flair"].name == f"{prefix}T2_FLAIR.nii.gz"
    assert cases["V01_T2"].images["flair"].name == "V01_T2_flair.nii.gz"


def test_capital_letters(tmp_path):
    touch(tmp_path, *(f"A/A_{kind.upper()}.NII" for kind in (*ALL, "seg")))
    (case,) = find_cases(tmp_path)
    assert (case.images["t1ce"].name, case.seg.name) == ("A_T1CE.NII", "A_SEG.NII")


def test_a_stranger_is_no_segmentation_where_there_is_one(tmp_path):
    patient(tmp_path, "A", "A")
    touch(tmp_path, "A/brain_mask.nii.gz")
    assert find_cases(tmp_path)[0].seg.name == "A_seg.nii.gz"


def differ(root, *names):
    """Files of which no two are alike."""
    touch(root, *names)
    for name in names:
        (root / name).write_text(name)


def codes(found):
    return {case_id: sorted(finding.code for finding in listed) for case_id, listed in found.findings.items()}


def left_out(root):
    """The one patient that is left out when segmentations are looked for, and the reason."""
    ((case_id, reason),) = survey_segs(root)[1].items()
    return f"{case_id}: {reason}"


def test_two_candidates_for_the_segmentation(tmp_path, capsys):
    patient(tmp_path, "A", "A", kinds=ALL)
    patient(tmp_path, "B", "B")
    differ(tmp_path, "A/W1_segm.nii", "A/W2_segm.nii")
    message = "A: Two segmentations that differ, A/W1_segm.nii and A/W2_segm.nii; keep one of them."
    assert [case.id for case in find_cases(tmp_path)] == ["B"]
    assert capsys.readouterr().out == f"⚠️ left out: {message}\n"
    assert left_out(tmp_path) == message
    (tmp_path / "A/W2_segm.nii").write_bytes((tmp_path / "A/W1_segm.nii").read_bytes())
    assert find_cases(tmp_path)[0].seg.name == "W1_segm.nii"
    assert codes(survey(tmp_path)) == {"A": ["same-copy", "unusual-name"]}


def test_files_that_do_not_say_segmentation_are_none(tmp_path):
    patient(tmp_path, "A", "A", kinds=ALL)
    names = ["A_t1_N4", "A_adc", "A_swi", "A_T1_bias", "A_wm_seg", "A_brain_parenchyma_segmentation", "one", "A_mask"]
    touch(tmp_path, *(f"A/{name}.nii.gz" for name in names))
    found = survey(tmp_path)
    assert [case.seg for case in found.cases] == [None]
    assert codes(found) == {"A": ["no-segmentation"], "": ["unused-file"] * len(names)}


@pytest.mark.parametrize(
    "name",
    ["A_seg", "A_segm", "A-seg", "A_Label", "A_tumor_segmentation", "A_OT", "A_gtv", "A-gtv", "A_final_seg", "A.seg"]
    + ["A_tumour_mask", "A_brain_tumor_seg", "A_manual_seg", "labelmap"],
)
def test_names_that_say_segmentation(tmp_path, name):
    patient(tmp_path, "A", "A", kinds=ALL)
    touch(tmp_path, f"A/{name}.nii.gz")
    (case,) = find_cases(tmp_path)
    assert (case.id, case.seg.name) == ("A", f"{name}.nii.gz")


@pytest.mark.parametrize(("scan", "used"), [("A_brain_{}", True), ("A_{}", False)])
def test_brain_seg_is_the_tumour_only_beside_scans_called_brain(tmp_path, scan, used):
    touch(tmp_path, *(f"A/{scan.format(kind)}.nii.gz" for kind in ALL), "A/A_brain_seg.nii.gz")
    (case,) = find_cases(tmp_path)
    assert (case.id, bool(case.seg)) == ("A", used)


def test_brain_and_final_are_no_part_of_the_id(tmp_path):
    name = "AAAC_0_2008.03.30"
    touch(tmp_path, *(f"{name}/{name}_brain_{kind}.nii.gz" for kind in ("t1n", "t1c", "t2w", "t2f")))
    touch(tmp_path, f"{name}/{name}_final_seg.nii.gz", f"{name}/{name}_t1n.nii.gz", f"{name}/{name}_brain_mask.nii.gz")
    (case,) = find_cases(tmp_path)
    assert (case.id, case.seg.name) == (name, f"{name}_final_seg.nii.gz")
    assert case.images["t1"].name == f"{name}_brain_t1n.nii.gz"  # the skull-stripped one
    assert codes(survey(tmp_path)) == {"": ["unused-file"] * 2}


def test_a_folder_named_as_a_file_says_what_is_in_it(tmp_path):
    case_id = "BraTS2021_00001"
    for kind in ALL:
        touch(tmp_path, f"{case_id}/{case_id}_{kind}.nii/00000057_brain_{kind}.nii")
    touch(tmp_path, f"{case_id}/{case_id}_seg.nii/{case_id}_seg_new.nii")
    patient(tmp_path, "BraTS2021_00002", "BraTS2021_00002", ending=".nii")
    first, second = find_cases(tmp_path)
    assert (first.id, second.id) == (case_id, "BraTS2021_00002")
    assert (first.seg.name, first.images["t1ce"].name) == (f"{case_id}_seg_new.nii", "00000057_brain_t1ce.nii")


@pytest.mark.parametrize(
    "mask",
    [
        "labels/{}_seg",
        "labelsTr/{}",
        "masks/{}",
        "ground_truth/{}",
        "x/labels/deep/{}_seg",
        "GT/{}/mask",
        "labels/{0}/{0}",
    ],
)
def test_masks_in_a_folder_of_their_own_are_joined_by_id(tmp_path, mask):
    for case_id in ("P_1", "P_2"):
        patient(tmp_path, f"images/{case_id}", case_id, kinds=ALL)
    touch(tmp_path, f"{mask.format('P_1')}.nii.gz")
    first, second = find_cases(tmp_path)
    assert first.seg == tmp_path / f"{mask.format('P_1')}.nii.gz" and second.seg is None
    assert survey_segs(tmp_path)[0] == {"P_1": first.seg, "P_2": None}


def test_a_mask_from_just_any_folder_is_used_with_a_warning_and_a_prediction_is_not(tmp_path):
    patient(tmp_path, "A", "A", kinds=ALL)
    touch(tmp_path, "predictions/A_seg.nii.gz")
    found = survey(tmp_path)
    assert [case.seg for case in found.cases] == [None]
    assert codes(found) == {"A": ["no-segmentation"], "": ["unused-file"]}
    touch(tmp_path, "other/A_seg.nii.gz")
    found = survey(tmp_path)
    assert [case.seg.parent.name for case in found.cases] == ["other"]
    assert codes(found) == {"A": ["mask-elsewhere"], "": ["unused-file"]}


def test_a_mask_that_lies_in_another_patients_folder_goes_by_its_id(tmp_path):
    for case_id, kinds in (("A", ALL), ("B", ALL)):
        patient(tmp_path, case_id, case_id, kinds=kinds)
    touch(tmp_path, "B/A_seg.nii.gz")
    assert {case.id: case.seg for case in find_cases(tmp_path)} == {"A": tmp_path / "B/A_seg.nii.gz", "B": None}
    assert codes(survey(tmp_path)) == {"A": ["mask-elsewhere"], "B": ["no-segmentation"]}


def test_two_masks_elsewhere_that_differ(tmp_path):
    patient(tmp_path, "A", "A", kinds=ALL)
    patient(tmp_path, "B", "B")
    differ(tmp_path, "labels/A.nii.gz", "masks/A_seg.nii.gz")
    assert left_out(tmp_path) == (
        "A: Two segmentations that differ, labels/A.nii.gz and masks/A_seg.nii.gz; keep one of them."
    )


def test_modalities_in_folders_of_their_own_are_joined(tmp_path):
    touch(tmp_path, *(f"{kind}/P_1_{kind}.nii.gz" for kind in ALL))
    (case,) = find_cases(tmp_path)
    assert list(case.images) == list(ALL)
    assert codes(survey(tmp_path))["P_1"] == ["joined"] * 3 + ["no-segmentation"]


def decathlon(root, files, *, channels=("FLAIR", "T1w", "t1gd", "T2w"), key="modality"):
    touch(root, *files)
    names = {str(number): name for number, name in enumerate(channels)}
    (root / "dataset.json").write_text(json.dumps({key: names}))


@pytest.mark.parametrize("inside", [".", "imagesTr"])
def test_the_decathlon_is_read_as_its_dataset_json_says(tmp_path, inside):
    decathlon(
        tmp_path, ["imagesTr/BRATS_001.nii.gz", "labelsTr/BRATS_001.nii.gz"], channels=("T2w", "FLAIR", "T1w", "ADC")
    )
    (case,) = find_cases(tmp_path / inside, ("flair", "t2"))
    assert (case.id, case.channels) == ("BRATS_001", {"flair": 1, "t2": 0})
    assert set(case.images.values()) == {tmp_path / "imagesTr/BRATS_001.nii.gz"}
    assert case.dataset == tmp_path / "dataset.json"
    assert case.seg == (tmp_path / "labelsTr/BRATS_001.nii.gz" if inside == "." else None)
    with pytest.raises(DataError, match=r"BRATS_001: No file or channel of dataset.json is t1ce"):
        find_cases(tmp_path / inside)


def test_nnunets_raw_folders_are_read_as_their_dataset_json_says(tmp_path):
    files = [f"imagesTr/BRATS_001_000{k}.nii.gz" for k in range(4)]
    decathlon(
        tmp_path, [*files, "labelsTr/BRATS_001.nii.gz"], channels=("T1", "T1CE", "T2", "FLAIR"), key="channel_names"
    )
    (case,) = find_cases(tmp_path)
    assert case.images == {name: tmp_path / files[k] for k, name in zip((3, 0, 1, 2), ALL, strict=True)}
    assert case.seg == tmp_path / "labelsTr/BRATS_001.nii.gz" and not case.channels


@pytest.mark.parametrize("name", ["BRATS_001.nii.gz", "BRATS_001_0000.nii.gz"])
def test_a_dataset_json_that_lacks_is_named(tmp_path, name):
    touch(tmp_path, f"imagesTr/{name}", "labelsTr/BRATS_001.nii.gz")
    found = survey(tmp_path)
    assert codes(found) == {"": ["dataset-json", "unused-file"], "BRATS_001": ["no-images"]}
    assert "of unknown modality: no dataset.json lies beside this folder" in found.findings[""][0].message


def test_a_dataset_json_may_begin_with_a_byte_order_mark(tmp_path):
    decathlon(tmp_path, ["imagesTr/BRATS_001.nii.gz"])
    about = json.loads((tmp_path / "dataset.json").read_text())
    about["labels"] = {"1": "edema", "2": "necrosis", "3": "enhancing"}
    (tmp_path / "dataset.json").write_text(json.dumps(about), "utf-8-sig")
    (case,) = find_cases(tmp_path)
    assert len(case.channels) == 4 and case.numbering == "msd"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"modality": ["FLAIR"]}'])
def test_a_dataset_json_without_channels_is_named(tmp_path, content):
    touch(tmp_path, "imagesTr/BRATS_001_0000.nii.gz", "labelsTr/BRATS_001.nii.gz")
    (tmp_path / "dataset.json").write_text(content)
    findings = survey(tmp_path).findings[""]
    assert {(finding.code, finding.file) for finding in findings} == {
        ("dataset-json", "dataset.json"),
        ("unused-file", "imagesTr/BRATS_001_0000.nii.gz"),
    }


def test_formats_that_are_not_read_are_named(tmp_path):
    touch(tmp_path, "A/A_t1.mha", "A/A_t2.mha", "B/B_t1.nrrd", "C/1.dcm")
    (tmp_path / "D").mkdir()
    (tmp_path / "D/IM0001").write_bytes(bytes(128) + b"DICM")
    findings = survey(tmp_path).findings[""]
    assert [(finding.code, finding.file) for finding in findings] == [
        ("unread-format", "A/A_t1.mha"),
        ("unread-format", "B/B_t1.nrrd"),
        ("unread-format", "C/1.dcm"),
    ]
    assert findings[0].message.startswith("2 .mha files") and findings[2].message.startswith("2 DICOM files")
    for find in (find_cases, survey_segs):
        with pytest.raises(DataError, match=r"2 \.mha files found but not read.*SimpleITK"):
            find(tmp_path)


@pytest.mark.parametrize("name", ["all.zip", "B/B.tar", "B/B_t1.nii.bz2"])
def test_packed_files_are_named(tmp_path, name):
    patient(tmp_path, "A", "A")
    touch(tmp_path, name)
    (finding,) = survey(tmp_path).findings[""]
    assert (finding.code, finding.severity, finding.file) == ("unread-format", "warning", name)


@pytest.mark.parametrize("name", ["A_seg.gz", "A_seg", "A_seg.nii.gz.part", "A_seg.nii (1).gz", "A_seg.img"])
@pytest.mark.parametrize("packed", [True, False])
def test_nifti_of_another_ending_is_named(tmp_path, name, packed):
    patient(tmp_path, "A", "A", kinds=ALL)
    touch(tmp_path, "A/A_seg.nii.gz.md5", "A/A_seg.txt", "README", "A/notes.gz")
    raw = bytes(nib.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).to_bytes())
    (tmp_path / "A" / name).write_bytes(gzip.compress(raw) if packed else raw)
    (finding,) = survey(tmp_path).findings[""]
    assert (finding.code, finding.severity, finding.file) == ("unread-format", "warning", f"A/{name}")


def test_what_holds_no_patient_any_more_is_named(tmp_path):
    patient(tmp_path, "A", "A", kinds=ALL)
    (tmp_path / "B").mkdir()
    (tmp_path / "C").symlink_to("gone")
    (tmp_path / "A/A_seg.nii.gz").symlink_to("../.git/annex/A_seg.nii.gz")
    found = survey(tmp_path)
    assert [(case.id, case.seg) for case in found.cases] == [("A", None)]
    assert {(finding.code, finding.severity, finding.file) for finding in found.findings[""]} == {
        ("empty-folder", "warning", "B"),
        ("broken-link", "warning", "C"),
        ("broken-link", "warning", "A/A_seg.nii.gz"),
    }


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    for case_id in "AB":
        patient(tmp_path, case_id, case_id)
    scandir = os.scandir

    def refused(path):
        if os.fspath(path) == str(tmp_path / "B"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # whoever is root may read everything
    found = survey(tmp_path)
    assert [case.id for case in found.cases] == ["A"]
    (finding,) = found.findings[""]
    assert (finding.code, finding.file) == ("unreadable-folder", "B") and "(Permission denied)" in finding.message


def test_names_that_are_not_utf_8_are_named_and_stop_nobody(tmp_path, capsys):
    patient(tmp_path, "A", "A")
    try:
        os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    (tmp_path / os.fsdecode(b"caf\xe9/B_t1.nii")).touch()
    (finding,) = survey(tmp_path).findings[""]
    assert (finding.code, finding.file) == ("unreadable-name", "caf\\udce9/B_t1.nii")
    assert main(["check", str(tmp_path), "--json", str(tmp_path / "a.json")]) == 1  # A's files are empty
    assert "caf\\udce9/B_t1.nii: Its name is not UTF-8" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"caf\\udce9'.* is not UTF-8"):
        survey(tmp_path / os.fsdecode(b"caf\xe9"))


def test_a_missing_modality_is_background_on_request(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B", kinds=("flair", "t2", "seg"))
    found = survey(tmp_path, fill_missing=True)
    assert [case.missing for case in found.complete(skip_incomplete=False)] == [(), ("t1", "t1ce")]
    assert [case.modalities for case in found.cases] == [ALL, ALL]
    (finding,) = found.findings["B"]
    assert (finding.code, finding.severity) == ("filled-modality", "warning") and "No t1, t1ce" in finding.message


def test_two_files_for_one_modality(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B")
    touch(tmp_path, "A/A_t1ce.nii")
    assert [case.id for case in find_cases(tmp_path)] == ["A", "B"]  # a copy counts once
    assert codes(survey(tmp_path)) == {"A": ["same-copy"]}
    differ(tmp_path, "A/A_t1ce.nii")
    assert left_out(tmp_path) == (
        "A: Two files for t1ce that differ, A/A_t1ce.nii and A/A_t1ce.nii.gz; keep one of them."
    )
    assert [case.id for case in find_cases(tmp_path)] == ["B"]


def test_one_patient_twice(tmp_path):
    for folder in ("copy1", "copy2"):
        patient(tmp_path, f"{folder}/A", "A")
        patient(tmp_path, f"{folder}/B", "B", kinds=ALL)
    touch(tmp_path, "copy2/B/B_seg.nii.gz")
    a, b = find_cases(tmp_path)
    assert (a.folder, b.seg) == (tmp_path / "copy1/A", tmp_path / "copy2/B/B_seg.nii.gz")
    assert codes(survey(tmp_path)) == {"A": ["same-copy"], "B": ["same-copy"]}
    differ(tmp_path, "copy2/A/A_seg.nii.gz")
    message = "A: Two files for seg that differ, copy1/A/A_seg.nii.gz and copy2/A/A_seg.nii.gz; keep one of them."
    assert left_out(tmp_path) == message
    assert [case.id for case in find_cases(tmp_path)] == ["B"]


def test_copies_may_be_packed_and_stored_otherwise(tmp_path):
    patient(tmp_path, "A", "A")
    save(tmp_path / "A/A_t1.nii.gz", grid())
    save(tmp_path / "copy/A/A_t1.nii", grid(), np.float32)
    assert codes(survey(tmp_path)) == {"A": ["same-copy"]}
    save(tmp_path / "copy/A/A_t1.nii", grid(), affine=AFFINE + np.eye(4, k=3))
    assert codes(survey(tmp_path)) == {"A": ["two-folders"]}


def test_files_that_are_no_scans(tmp_path):
    patient(tmp_path, "A", "A")
    touch(tmp_path, "name_mapping.csv", "A/._A_flair.nii.gz", "A/.A_t1.nii", "A/A_t1.nii.gz.part")
    touch(tmp_path, "__MACOSX/A/._A_seg.nii")  # what a Mac puts into a zip
    patient(tmp_path, ".part-1/A", "A")  # what a killed simulation leaves
    (tmp_path / "A/A_t2.nii").mkdir()
    assert [case.id for case in find_cases(tmp_path)] == ["A"]
    assert list(survey_segs(tmp_path)[0]) == ["A"]


def test_a_missing_modality_names_patient_and_file(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B", kinds=("flair", "t1ce", "seg"))
    patient(tmp_path, "C", "C", kinds=("flair",))
    with pytest.raises(DataError) as error:
        find_cases(tmp_path)
    message = str(error.value)
    assert "B: No B_t1.nii.gz in B (missing: t1, t2; found: flair, t1ce)" in message
    assert "C: No C_t1.nii.gz" in message and "A: No" not in message
    assert f"below {tmp_path}" in message
    assert "-p modalities flair,t1ce" in message and "-p skip_incomplete true" in message


def test_many_incomplete_patients_do_not_hide_what_to_do(tmp_path):
    for k in range(300):
        patient(tmp_path, f"P{k:03d}", f"P{k:03d}", kinds=("flair",))
    with pytest.raises(DataError) as error:
        find_cases(tmp_path)
    lines = str(error.value).splitlines()
    assert [line[:4] for line in lines[:3]] == ["P000", "P001", "P002"] and lines[3].startswith("… and 297 more")
    assert "-p skip_incomplete true" in lines[4] and len(lines) == 6


@pytest.mark.parametrize(
    ("has", "lacks"),
    [
        ("case_t1_001_t1.nii", "case_t1_001_t1ce.nii"),  # `t1` elsewhere in the name stays
        ("case_t1_001_T1.NII.GZ", "case_t1_001_t1ce.NII.GZ"),
        ("BraTS-GLI-00001-000-t1n.nii.gz", "BraTS-GLI-00001-000-t1c.nii.gz"),
        ("t1.nii.gz", "t1ce.nii.gz"),
    ],
)
def test_a_missing_file_is_named_as_its_neighbours_are(tmp_path, has, lacks):
    touch(tmp_path, has)
    with pytest.raises(DataError, match=f": No {lacks} in"):
        find_cases(tmp_path, ("t1", "t1ce"))


def test_incomplete_patients_can_be_left_out(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B", kinds=("flair", "seg"))
    found = survey(tmp_path)
    assert [case.id for case in found.complete(skip_incomplete=True)] == ["A"]
    with pytest.raises(DataError, match="B: No B_t1"):
        found.complete(skip_incomplete=False)
    assert [case.id for case in find_cases(tmp_path, ("flair",))] == ["A", "B"]


def test_a_survey_keeps_every_patient_and_says_what_is_wrong(tmp_path):
    patient(tmp_path, "A", "A")
    patient(tmp_path, "B", "B", kinds=("flair", "seg"))
    patient(tmp_path, "C", "C", kinds=ALL)
    differ(
        tmp_path, "C/1_seg.nii", "C/2_seg.nii", "A/A_t1.nii", "A/brain_mask.nii", "D/D_seg.nii", "copy/A/A_flair.nii"
    )
    touch(tmp_path, ".DS_Store", "A/._A_t1.nii.gz", ".hidden/E/E_flair.nii", "predictions/A_seg.nii.gz", "info.csv")
    found = survey(tmp_path)
    assert [case.id for case in found.cases] == ["A", "B", "C", "D"]
    assert list(found.cases[1].images) == ["flair"]
    assert codes(found) == {
        "A": ["two-files", "two-folders"],
        "B": ["missing-modality"],
        "C": ["no-segmentation", "two-segmentations"],
        "D": ["no-images"],
        "": ["stray-file"] * 3 + ["unused-file"] * 2,
    }
    files = {finding.file: finding.code for finding in found.findings[""]}
    assert {file for file, code in files.items() if code == "stray-file"} == {".DS_Store", ".hidden", "A/._A_t1.nii.gz"}
    assert files["predictions/A_seg.nii.gz"] == files["A/brain_mask.nii"] == "unused-file"
    assert found.tables == [tmp_path / "info.csv"]
    with pytest.raises(DataError, match="No patient with"):
        found.complete(skip_incomplete=True)


def test_nothing_found(tmp_path):
    with pytest.raises(DataError, match="No patient with flair, t1, t1ce, t2 below .*BraTS20_Training_001_t1.nii"):
        find_cases(tmp_path)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        find_cases(tmp_path / "nowhere")


@pytest.mark.parametrize("modalities", [(), ("flair", "pet"), ("flair", "flair"), "flair"])
def test_unknown_modalities(tmp_path, modalities):
    with pytest.raises(DataError, match="expected one or more of flair, t1, t1ce, t2, each once"):
        find_cases(tmp_path, modalities)


def test_label_maps_alone(tmp_path):
    touch(tmp_path, "B_seg.nii.gz", "A-seg.nii", "nested/C/C_seg.nii.gz", "bare/BraTS-GLI-00001-000.nii.gz")
    patient(tmp_path, "D", "D", kinds=("flair",))
    assert survey_segs(tmp_path)[0] == {
        "A": tmp_path / "A-seg.nii",
        "B": tmp_path / "B_seg.nii.gz",
        "BraTS-GLI-00001-000": tmp_path / "bare/BraTS-GLI-00001-000.nii.gz",
        "C": tmp_path / "nested/C/C_seg.nii.gz",
        "D": None,
    }
    assert [case.id for case in find_cases(tmp_path, ("flair",))] == ["D"]


# ---- Real patients


def test_real_patients_are_found(real_patients):
    found = find_cases(real_patients, ("flair", "t1ce"))
    assert {case.id: case.seg is not None for case in found} == {
        "BraTS-GLI-00001-000": False,
        "brats_2013_pat0001_1": True,
        "brats_2013_pat0002_1": True,
        "brats_2013_pat0003_1": True,
    }
    with pytest.raises(DataError, match="brats_2013_pat0001_1: No brats_2013_pat0001_1_t1.nii"):
        find_cases(real_patients)
    assert [path.name for path in found[0].images.values()] == [
        "BraTS-GLI-00001-000-t2f.nii.gz",
        "BraTS-GLI-00001-000-t1c.nii.gz",
    ]
