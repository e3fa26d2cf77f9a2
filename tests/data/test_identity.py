"""One person's cases are recognised as such, and different persons are not."""

import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data.audit import audit
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.content import content_hash, image_hash
from brats_helpers.data.identity import person_of, seen_before
from brats_helpers.labels import DataError
from tests.conftest import ROOT, write_tiny_case


def check(folder, **how):
    found = survey(folder)
    return audit(found, found.cases, workers=1, cache_dir=None, **how)["cases"]


def groups_of(ids, tmp_path, **how):
    """The groups of untouched files: nothing is read, names alone count."""
    for case_id in ids:
        for kind in ("flair", "t1", "t1ce", "t2"):
            path = tmp_path / case_id / f"{case_id}_{kind}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    entries = audit(survey(tmp_path), [], workers=1, cache_dir=None, **how)["cases"]
    return {case_id: entry["group"] for case_id, entry in entries.items()}, entries


@pytest.mark.parametrize(
    ("case_id", "person"),
    [
        ("BraTS-GLI-02062-100", "BraTS-GLI-02062"),
        ("BraTS-MEN-RT-0402-1", "BraTS-MEN-RT-0402"),
        ("UPENN-GBM-00001_11", "UPENN-GBM-00001"),
        ("UCSD-PTGBM-0002_01", "UCSD-PTGBM-0002"),
        ("AAAC_0_2008.03.30", "AAAC_0"),
        ("P01_2001-01-01", "P01"),
        ("P01_20010101", "P01"),
        ("Patient-007_week-012-1", "Patient-007"),
        ("sub-01_ses-02", "sub-01"),
        ("sub-A_ses-preop", "sub-A"),
        ("P01_T0", "P01"),
        ("case12-scan2", "case12"),
        ("PatientID_0003_Timepoint_1", "PatientID_0003"),
        ("UCSF-PDGM-0431_FU003d", "UCSF-PDGM-0431"),
        ("brats_tcia_pat117_0083", "brats_tcia_pat117"),
        ("Brats17_TCIA_201_1", "TCIA_201"),
        ("Brats18_TCIA01_201_1", "TCIA_201"),
        ("BraTS19_CBICA_AAB_1", "CBICA_AAB"),
        ("Brats18_2013_2_1", "2013_2"),
        ("Brats18_2013_20_1", "2013_20"),
    ],
)
def test_the_person_in_an_id(case_id, person):
    assert person_of(case_id) == person


@pytest.mark.parametrize(
    "case_id",
    ["BraTS20_Training_001", "BraTS2021_00001", "BRATS_001", "BraTS-GoAT-00012", "TCGA-02-0006", "UCSF-PDGM-0004"]
    + ["site_19990101", "Patient_20", "Site_T1", "Tiny_1", "A"],
)
def test_an_id_without_a_visit_is_a_person(case_id):
    assert person_of(case_id) == case_id


def test_a_pattern_names_the_person_by_its_group_or_its_match():
    assert person_of("S1-v2-X", r"^(S\d)-v\d") == person_of("S1-v3-Y", r"^S\d") == "S1"
    assert person_of("BraTS-GLI-02062-100", r"^(S\d)") == "BraTS-GLI-02062"


@pytest.mark.parametrize(
    ("pattern", "said"), [("(", "not a regular expression"), ("^Z", "found in no ID, such as A_1")]
)
def test_a_pattern_that_cannot_serve_is_refused(tmp_path, pattern, said):
    with pytest.raises(DataError, match=said):
        groups_of(["A_1", "A_2"], tmp_path, patient_pattern=pattern)


def test_a_pattern_keeps_visits_together(tmp_path):
    groups, _ = groups_of(["S1x", "S1y", "S2x"], tmp_path, patient_pattern=r"^S\d")
    assert groups == {"S1x": "S1", "S1y": "S1", "S2x": "S2"}


def test_visits_of_five_data_sets_and_of_folders(tmp_path):
    """The two visits of each of ten persons; see the script for how they are named."""
    script = ROOT.parent / "shared" / "cases" / "r07_time_points.py"
    if not script.exists():
        pytest.skip(f"no {script}")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    for part, persons in (("ids", 5), ("folders", 3)):
        found = survey(tmp_path / part)
        entries = audit(found, [], workers=1, cache_dir=None)["cases"]
        members = [entry["group"] for entry in entries.values()]
        assert len(members) == 2 * persons
        assert sorted(map(members.count, members)) == [2] * 2 * persons


@pytest.mark.parametrize(
    ("folders", "persons"),
    [
        (["P1/baseline/a", "P1/visit2/b", "P2/baseline/c", "P2/visit2/d"], 2),
        (["P1/2001-02-03/scan/a", "P1/2002-03-04/scan/b", "P2/2001-02-03/scan/c"], 2),
        (["P1/T0/a", "P1/T1/b", "P2/pre/c", "P2/post/d"], 2),
        (["SiteA_0/2001.02.03/a", "SiteA_0/2002.03.04/b", "Participant1/2001.02.03/c"], 2),
        (["RHUH-0001/0/a", "RHUH-0001/1/b", "RHUH-0002/0/c"], 2),
        (["x/P1/P1_1/a", "x/P1/P1_2/b", "x/P2/P2_1/c"], 2),
        (["HGG/one/a", "HGG/two/b", "LGG/three/c"], 3),
        (["training/1/a", "training/2/b", "validation/1/c"], 3),
        (["fold0/001/a", "fold0/002/b", "fold1/001/c"], 3),
        (["BraTS20/BraTS20_001/a", "BraTS20/BraTS20_002/b"], 2),
        (["all/2001-02-03/a", "all/2002-02-03/b", "all/2003-02-03/c"], 3),
    ],
)
def test_a_folder_of_visits_is_one_person_and_a_folder_of_persons_is_not(tmp_path, folders, persons):
    for folder in folders:
        for kind in ("flair", "t1", "t1ce", "t2"):
            path = tmp_path / folder
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(f"{path.name}_{kind}.nii.gz").touch()
    entries = audit(survey(tmp_path), [], workers=1, cache_dir=None)["cases"]
    assert len(entries) == len(folders)
    assert len({entry["group"] for entry in entries.values()}) == persons


def test_ids_that_differ_in_their_last_part_alone_are_noted(tmp_path):
    _, entries = groups_of(["P7-a", "P7-b", "P8-a"], tmp_path)
    noted = {case_id: [finding["code"] for finding in entry["findings"]] for case_id, entry in entries.items()}
    assert [case_id for case_id, codes in noted.items() if "similar-id" in codes] == ["P7-b"]


def test_numbered_patients_are_not_noted_as_similar(tmp_path):
    ids = [f"BraTS20_Training_{k:03}" for k in range(12)] + ["BraTS20_Validation_001", "Brats18_2013_2_1"]
    groups, entries = groups_of([*ids, "Brats18_2013_20_1"], tmp_path)
    assert len(set(groups.values())) == len(ids) + 1
    assert "similar-id" not in str(entries)


# --- content


def test_the_hash_is_of_values_and_place():
    volume = np.zeros((5, 6, 7), np.int16)
    volume[1:3, 2:4, 3:5] = np.arange(8).reshape(2, 2, 2) + 1
    hashes = {content_hash(volume.astype(dtype)) for dtype in ("u1", "<i2", ">i2", "i4", "u8", "f4", "f8")}
    assert len(hashes) == 1
    assert content_hash(np.asfortranarray(volume)) in hashes
    others = [np.roll(volume, 1, axis=0), volume + (volume > 0), np.pad(volume, ((0, 1), (0, 0), (0, 0))), volume * 0.5]
    assert len(hashes | set(map(content_hash, others))) == 5
    assert content_hash(volume * 0.5) == content_hash((volume * 0.5).astype(np.float32))
    assert content_hash(np.where(volume > 0, np.nan, 0)) == content_hash(np.where(volume > 0, np.nan, 0))
    assert len({content_hash(np.zeros((2, 2, 2))), content_hash(np.zeros((2, 2, 3)))}) == 2


def test_the_audit_and_a_single_file_give_one_hash(tiny_patients):
    (case, *_) = find_cases(tiny_patients)
    files = check(tiny_patients)[case.id]["files"]
    for kind in case.images:
        assert image_hash(case.read(kind)[0]) == files[kind]["content"]


@pytest.mark.parametrize("axes", ["RAS", "PIR", "ILA"])
def test_a_scan_stored_in_another_orientation_has_the_same_hash(tiny_patients, tmp_path, axes):
    write_tiny_case(tmp_path, "Other", seed=0)
    for path in (tmp_path / "Other").iterdir():
        image = nib.load(path)
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
        nib.save(image.as_reoriented(turn), path)
    (case,) = find_cases(tmp_path)
    entries = check(tmp_path), check(tiny_patients)
    assert entries[0]["Other"]["content"] == entries[1]["Tiny_0"]["content"]
    assert image_hash(case.read("t1")[0]) == entries[1]["Tiny_0"]["files"]["t1"]["content"]


def test_a_constant_image_belongs_to_nobody():
    assert image_hash(np.ones((4, 4, 4), np.int16)) is None


# --- what a network has seen


@pytest.fixture
def facts(tiny_patients):
    """A network that has seen `Tiny_0` and `Tiny_1`."""
    entries = check(tiny_patients)
    patients = {
        case_id: {
            "content": entries[case_id]["content"],
            "group": entries[case_id]["group"],
            "images": [file["content"] for kind, file in entries[case_id]["files"].items() if kind != "seg"],
        }
        for case_id in ("Tiny_0", "Tiny_1")
    }
    return {"patients": patients}


def test_a_seen_patient_is_known_by_its_id_and_an_unseen_one_is_not(tiny_patients, facts):
    cases = find_cases(tiny_patients)
    assert seen_before(facts, cases).keys() == {"Tiny_0", "Tiny_1"}
    assert seen_before(None, cases) == seen_before({}, cases) == {}


def test_a_renamed_unlabelled_copy_is_known_by_one_of_its_scans(tiny_patients, tmp_path, facts):
    folder = tmp_path / "BraTS2021_00001"
    folder.mkdir()
    for kind, source in (("flair", 2), ("t1", 0), ("t1ce", 3), ("t2", 2)):
        shutil.copy(tiny_patients / f"Tiny_{source}" / f"Tiny_{source}_{kind}.nii.gz", folder / f"X_1_{kind}.nii.gz")
    (case,) = find_cases(tmp_path)
    assert case.seg is None
    assert seen_before(facts, [case]) == {"X_1": "has a scan that is voxel for voxel one of Tiny_0"}
    assert seen_before(facts, [case], hashes={"X_1": []}) == {}
    (folder / "X_1_t1.nii.gz").write_bytes(b"torn")
    assert seen_before(facts, [case]) == {}


def test_another_visit_of_a_seen_person_is_known(tmp_path):
    write_tiny_case(tmp_path, "BraTS-GLI-00007-101", seed=1)
    write_tiny_case(tmp_path / "P1", "visit2", seed=2)
    write_tiny_case(tmp_path, "S1-b", seed=3)
    write_tiny_case(tmp_path, "Brats18_X_Y_1", seed=4)
    cases = find_cases(tmp_path)
    patients = {"BraTS-GLI-00007-100": {"group": "BraTS-GLI-00007"}, "visit1": {"group": "P1"}}
    patients |= {"S1-a": {"group": "S1"}, "BraTS20_Training_009": {"group": "x", "names": ["Brats18_X_Y_1"]}}
    seen = seen_before({"patients": patients, "patient_pattern": r"^S\d"}, cases)
    assert seen.keys() == {case.id for case in cases}
    assert seen["visit2"] == "lies in the folder of P1, the same person as visit1"
