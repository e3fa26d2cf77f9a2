"""From scans on disk to label maps on disk."""

import dataclasses
import shutil
import zipfile

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import torch

from brats_helpers.__main__ import main
from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases, survey
from brats_helpers.data.content import image_hash
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation import inference
from brats_helpers.evaluation.folders import read_leakage, score_folders
from brats_helpers.evaluation.networks import Network
from brats_helpers.evaluation.postprocess import NO_RULES
from brats_helpers.labels import MODALITIES, DataError
from brats_helpers.scoring.overlap import dice
from brats_helpers.scoring.scores import score_case
from tests.conftest import write_tiny_case
from tests.evaluation.echo import echo, with_classes_as_images

CPU = torch.device("cpu")


def test_predictions_lie_in_the_patients_own_geometry(checkpoint, tmp_path):
    source = write_tiny_case(tmp_path, "New", seed=9, labelled=False)
    inference.predict_folders([checkpoint], [source], tmp_path / "out", device="cpu", flips=False)
    written = nib.load(tmp_path / "out" / "New_seg.nii.gz")
    image = nib.load(source / "New_flair.nii.gz")
    assert written.shape == image.shape and (written.affine == image.affine).all()
    assert written.get_data_dtype() == image.get_data_dtype()
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    assert read_mask(tmp_path / "out" / "New_seg.nii.gz", "brats2020").any()


@pytest.mark.parametrize("codes", ["RAS", "PIR", "ASL"])
def test_the_label_map_does_not_depend_on_the_stored_orientation(checkpoint, tmp_path, codes):
    source = write_tiny_case(tmp_path / "lps", "New", seed=9, labelled=False)
    turned = tmp_path / codes / "New"
    turned.mkdir(parents=True)
    for path in source.iterdir():
        nib.save(reoriented(nib.load(path), codes), turned / path.name)
    for folder, out in ((source, "a"), (turned, "b")):
        inference.predict_folders([checkpoint], [folder], tmp_path / out, device="cpu", flips=True)
    one, other = (nib.load(tmp_path / out / "New_seg.nii.gz") for out in "ab")
    assert nib.aff2axcodes(other.affine) == tuple(codes)
    np.testing.assert_array_equal(reoriented(other, "LPS").dataobj, one.dataobj)


def reoriented(image, codes):
    ends = (nib.orientations.axcodes2ornt("".join(axes)) for axes in (nib.aff2axcodes(image.affine), codes))
    return image.as_reoriented(nib.orientations.ornt_transform(*ends))


class Bright(torch.nn.Module):
    """Calls oedema what is brighter on FLAIR than the mean of the brain by one standard deviation."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        logits = torch.zeros(len(images), 4, *images.shape[2:])
        logits[:, 2] = self.slope * (images[:, 0] - 1)
        return logits


@pytest.mark.parametrize("spacing", [(0.8, 0.8, 2.0), (0.5, 0.5, 0.5)])
def test_other_voxel_sizes_are_resampled_to_the_networks_and_back(tmp_path, spacing, capsys):
    source = write_tiny_case(tmp_path / "original", "New", seed=9, labelled=False)
    finer = tmp_path / "finer" / "New"
    finer.mkdir(parents=True)
    for path in source.iterdir():
        image = nibabel.processing.resample_to_output(nib.load(path), spacing, order=1)
        image.set_data_dtype(np.int16)
        nib.save(image, finer / path.name)
    settings = {"modalities": ("flair",), "context_slices": 0, "patch_size": 0}
    network = Network(Bright(), settings, frozenset(), frozenset(), 1, {"spacing_mm": [1.0, 1.0, 1.0]})
    maps = []
    for folder in (source, finer):
        (one,) = inference.predict_files(
            [network], find_cases(folder, ["flair"]), tmp_path / folder.parent.name, flips=False
        )
        maps.append(nib.load(one.path))
        assert maps[-1].shape == nib.load(folder / "New_flair.nii.gz").shape
    sizes = " x ".join(f"{mm:g}" for mm in spacing)
    said = f"New: voxels of {sizes} mm, resampled to the network's 1 x 1 x 1 mm and back"
    assert [line[3:] for line in capsys.readouterr().out.splitlines() if "resampled" in line] == [said]
    back = nibabel.processing.resample_from_to(maps[1], maps[0], order=0)
    assert set(np.unique(maps[1].dataobj)) == {0, 2}
    # The tumour is about 14 voxels wide, and slices of 2 mm blur its ends.
    assert dice(np.asarray(maps[0].dataobj) > 0, np.asarray(back.dataobj) > 0) > 0.85


def test_channels_follow_the_networks_order(checkpoint, tmp_path):
    source = write_tiny_case(tmp_path, "New", seed=9)
    (case,), (turned,) = find_cases(source), find_cases(source, MODALITIES[::-1])
    networks = [inference.load_network(checkpoint, device=CPU)]
    for name, each in (("a", case), ("b", turned)):
        inference.evaluate(networks, [each], tmp_path / name, **RULES)
    one, other = (read_mask(tmp_path / name / "New_seg.nii.gz", "brats2020") for name in "ab")
    np.testing.assert_array_equal(one, other)
    (pair,) = inference.predict_validation(networks, [case], [pack(case)], flips=False)
    (again,) = inference.predict_validation(networks, [turned], [pack(turned)], flips=False)
    np.testing.assert_array_equal(pair[0], again[0])


def test_a_run_that_lacks_a_modality_is_refused_before_anything_is_predicted(checkpoint, tmp_path):
    (whole,) = find_cases(write_tiny_case(tmp_path, "New_0", seed=0))
    (lacking,) = find_cases(write_tiny_case(tmp_path, "New_1", seed=1), ["flair"])
    networks = [inference.load_network(checkpoint, device=CPU)]
    with pytest.raises(DataError, match="New_1: the network reads flair, t1, t1ce, t2, but there is no t1, t1ce, t2"):
        inference.evaluate(networks, [whole, lacking], tmp_path / "out", **RULES)
    assert not (tmp_path / "out").exists()


def test_a_faulty_patient_is_skipped_with_its_reason_and_the_rest_predicted(checkpoint, tmp_path, capsys):
    for k, name in enumerate(["A", "Blank", "Broken", "Flat", "Lacking", "Twice", "Z"]):
        write_tiny_case(tmp_path / "in", name, seed=k)
    shutil.copy(tmp_path / "in" / "Twice" / "Twice_t1.nii.gz", tmp_path / "in" / "Twice" / "Twice_t1ce.nii.gz")
    (tmp_path / "in" / "Broken" / "Broken_t1.nii.gz").write_bytes(b"no gzip")
    (tmp_path / "in" / "Lacking" / "Lacking_t2.nii.gz").unlink()
    blank = tmp_path / "in" / "Blank" / "Blank_t1.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((48, 56, 20), np.int16), nib.load(blank).affine), blank)
    flat = tmp_path / "in" / "Flat" / "Flat_t2.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((5, 5), np.int16), np.eye(4)), flat)
    argv = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    assert main([*argv, "--device", "cpu"]) == 1
    tables = ["labels.itksnap.txt", "labels.slicer.ctbl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["A_seg.nii.gz", "Z_seg.nii.gz", *tables]
    said = capsys.readouterr().out
    named = {"Blank": "Blank_t1.nii.gz", "Broken": "Broken_t1.nii.gz", "Flat": "Flat_t2.nii.gz"}
    for name, word in (named | {"Lacking": "Lacking_t2.nii", "Twice": "Twice_t1ce.nii.gz"}).items():
        assert any(line.startswith(f"⚠️ {name} is skipped") and word in line for line in said.splitlines()), said
    assert "5 skipped: " in said


def test_a_patient_that_cannot_be_scored_does_not_stop_the_others(checkpoint, tmp_path):
    cases = [find_cases(write_tiny_case(tmp_path, f"New_{k}", seed=k))[0] for k in range(3)]
    cases[0].images["t1"].write_bytes(b"no gzip")
    cases[1].seg.write_bytes(b"no gzip")
    metrics = inference.evaluate([inference.load_network(checkpoint, device=CPU)], cases, tmp_path / "out", **RULES)
    assert list(metrics["cases"]) == ["New_2"] and list(metrics["not_scored"]) == ["New_0", "New_1"]
    assert "New_0_t1.nii.gz" in metrics["not_scored"]["New_0"]


def test_patients_that_the_network_has_seen_are_skipped_under_any_name(checkpoint, tiny_patients, tmp_path, capsys):
    out = tmp_path / "out"
    write_tiny_case(tmp_path / "in", "New", seed=9)
    shutil.copytree(tiny_patients / "Tiny_0", tmp_path / "in" / "Tiny_0")
    written, skipped = inference.predict_folders([checkpoint], [tmp_path / "in"], out, device="cpu", flips=False)
    assert [path.name for path in written] == ["New_seg.nii.gz"]
    assert list(skipped) == ["Tiny_0"] and skipped["Tiny_0"].startswith("leakage: ")
    renamed = find_cases(write_tiny_case(tmp_path / "again", "Other", seed=0))
    known = {"Tiny_0": {"group": "Tiny_0", "images": [image_hash(renamed[0].read("t1")[0])]}}
    with pytest.raises(DataError, match="Other has a scan that is voxel for voxel one of Tiny_0"):
        list(inference.predict_files([echo(patients=known)], renamed, out, flips=False))


def test_a_patient_without_the_networks_modalities_is_refused(checkpoint, tmp_path):
    write_tiny_case(tmp_path, "Two", seed=1, modalities=("flair", "t1ce"))
    with pytest.raises(DataError, match="Two: No Two_t1.nii.*missing: t1, t2"):
        inference.predict_folders([checkpoint], [tmp_path / "Two"], tmp_path / "out", device="cpu", flips=False)


RULES = {"flips": False, "convention": "brats2020", "simulated": True}


def test_predictions_are_scored_as_written(checkpoint, tmp_path):
    networks = [inference.load_network(checkpoint, device=CPU)]
    unseen = [find_cases(write_tiny_case(tmp_path, f"New_{k}", seed=9 + k, labelled=k == 0))[0] for k in range(2)]
    metrics = inference.evaluate(networks, unseen, tmp_path / "out", **RULES)
    assert list(metrics["cases"]) == ["New_0"] and metrics["not_scored"] == {"New_1": "unlabelled"}
    assert metrics["leakage"] == [] and not (tmp_path / "out" / "leakage.json").exists()
    assert metrics["uncertainty"]["checkpoints"] == 1 and not metrics["uncertainty"]["flips"]
    assert list(metrics["uncertainty"]["cases"]) == ["New_0"] and 0.5 < metrics["uncertainty"]["auc"] <= 1
    truth, pred = (
        read_mask(unseen[0].seg, unseen[0].numbering) > 0,
        read_mask(tmp_path / "out" / "New_0_seg.nii.gz", "brats2020") > 0,
    )
    expected = 2 * (truth & pred).sum() / (truth.sum() + pred.sum())
    assert metrics["cases"]["New_0"]["WT"]["dice"] == pytest.approx(expected)
    assert (tmp_path / "out" / "New_1_seg.nii.gz").exists()


def test_post_processing_is_applied_and_what_it_costs_is_told(checkpoint, tmp_path):
    networks = [inference.load_network(checkpoint, device=CPU)]
    case = find_cases(write_tiny_case(tmp_path, "New", seed=9))[0]
    plain = inference.evaluate(networks, [case], tmp_path / "plain", **RULES)
    no_et = dataclasses.replace(NO_RULES, et_voxels=10**6)  # whatever is found is too little
    ruled = inference.evaluate(networks, [case], tmp_path / "ruled", **RULES, rules=no_et)
    found, left = (read_mask(tmp_path / name / "New_seg.nii.gz", "brats2020") for name in ("plain", "ruled"))
    np.testing.assert_array_equal(left, np.where(found == 3, 1, found))
    assert (found == 3).any() and plain["cases"]["New"]["ET"]["dice"] > 0
    means = {region: plain["summary"][region]["dice"]["mean"] for region in ("WT", "TC", "ET")}
    assert plain["postprocess"]["test"] == {"n": 1, "before": means, "after": means}
    assert ruled["postprocess"]["test"] == {"n": 1, "before": means, "after": means | {"ET": 0}}


@pytest.mark.parametrize("numbering", ["2020", "2023"])
def test_labels_are_numbered_as_asked(tiny_patients, tmp_path, numbering, monkeypatch):
    monkeypatch.setattr(inference, "pack", lambda case: with_classes_as_images(find_cases(tiny_patients)[0]))
    case = find_cases(tiny_patients)[0]
    list(inference.predict_files([echo()], [case], tmp_path, flips=False, numbering=numbering))
    written = np.unique(nib.load(tmp_path / "Tiny_0_seg.nii.gz").dataobj)
    assert written.tolist() == [0, 1, 2, {"2020": 4, "2023": 3}[numbering]]
    np.testing.assert_array_equal(
        read_mask(tmp_path / "Tiny_0_seg.nii.gz", "brats2020"), read_mask(case.seg, case.numbering)
    )


def test_soft_outputs_are_the_probabilities_in_the_patients_geometry(checkpoint, tmp_path):
    network = inference.load_network(checkpoint, device=CPU)
    case = find_cases(write_tiny_case(tmp_path, "New", seed=9, labelled=False))[0]
    ((_, packed, soft, path),) = inference.predict_files(
        [network], [case], tmp_path / "out", flips=False, soft_dir=tmp_path / "soft"
    )
    image = nib.load(tmp_path / "soft" / "New_soft.nii.gz")
    assert image.shape == (48, 56, 20, 4) and (image.affine == nib.load(path).affine).all()
    volumes = image.get_fdata()
    assert abs(packed.to_box(volumes[..., 2]) - soft[:, 2]).max() < 0.003
    np.testing.assert_allclose(volumes.sum(axis=-1), 1, atol=0.006)
    np.testing.assert_allclose(volumes[0, 0, 0], (1, 0, 0, 0), atol=1e-6)  # outside the box


def test_a_network_is_not_scored_on_patients_it_has_seen(checkpoint, tiny_patients, tmp_path):
    network = inference.load_network(checkpoint, device=CPU)
    new = find_cases(write_tiny_case(tmp_path, "New", seed=9))
    for seen, name in ((find_cases(tiny_patients)[:1], "Tiny_0"), (find_cases(tiny_patients)[3:], "Tiny_3")):
        with pytest.raises(DataError, match=f"has seen {name} in training .*allow_leakage"):
            inference.evaluate([network], new + seen, tmp_path / "out", **RULES)
    assert not (tmp_path / "out").exists()


def test_an_unlabelled_visit_of_somebody_seen_in_training_stops_nobody(tmp_path):
    (new,) = find_cases(write_tiny_case(tmp_path, "P02_2002.02.02", seed=1))
    (visit,) = find_cases(write_tiny_case(tmp_path, "P01_2002.02.02", seed=2, labelled=False))
    (network, out) = echo(trained_on=["P01_2001.01.01"]), tmp_path / "out"
    metrics = inference.evaluate([network], [new, visit], out, **RULES)
    assert list(metrics["cases"]) == [new.id] and metrics["leakage"] == []
    assert list(inference.predict_files([network], [visit], tmp_path / "again", flips=False))
    for folder in (out, tmp_path / "again"):  # `score` refuses it should a segmentation turn up
        assert read_leakage(folder) == {visit.id}


def test_modalities_taken_as_background_are_named_in_every_output(checkpoint, tmp_path, capsys):
    folder = write_tiny_case(tmp_path / "in", "New", seed=9, modalities=["flair", "t1", "t1ce"])
    cases = survey(folder, fill_missing=True).cases
    metrics = inference.evaluate([inference.load_network(checkpoint, device=CPU)], cases, tmp_path / "a", **RULES)
    assert metrics["filled"] == {"New": ["t2"]}
    argv = ["predict", str(folder), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b"), "--fill-missing"]
    capsys.readouterr()
    assert main([*argv, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "New: No t2: every voxel there counts as background." in said
    assert "New_seg.nii.gz (t2 taken as background)" in said


def test_allowed_leakage_is_named_wherever_the_predictions_go(checkpoint, tiny_patients, tmp_path):
    network = inference.load_network(checkpoint, device=CPU)
    cases = find_cases(tiny_patients)[:1] + find_cases(write_tiny_case(tmp_path / "new", "New", seed=9))
    out, truth = tmp_path / "out", tmp_path / "truth"
    metrics = inference.evaluate([network], cases, out, **RULES, allow_leakage=True)
    assert metrics["leakage"] == ["Tiny_0"] and set(metrics["cases"]) == {"Tiny_0", "New"}

    for case in cases:
        shutil.copytree(case.folder, truth / case.id)
    rules = {"convention": "brats2020", "simulated": True}
    refused = score_folders(out, truth, **rules, allow_leakage=False)
    assert list(refused["cases"]) == ["New"] and refused["not_scored"]["Tiny_0"].startswith("leakage: ")
    assert refused["leakage"] == []
    allowed = score_folders(out, truth, **rules, allow_leakage=True)
    assert allowed["leakage"] == ["Tiny_0"] and allowed["cases"] == metrics["cases"]

    # A network that has not seen the patient predicts into the same folder: the mark goes.
    list(inference.predict_files([echo()], cases[:1], out, flips=False))
    assert score_folders(out, truth, **rules, allow_leakage=False)["not_scored"] == {}


def test_predictions_never_take_the_place_of_a_reference(checkpoint, tmp_path):
    source = write_tiny_case(tmp_path, "New", seed=9)
    before = {path: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(DataError, match="New: the predictions would go to .*own files"):
        inference.predict_folders([checkpoint], [source], source, device="cpu", flips=False)
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_thresholds_are_not_chosen_by_patients_that_one_of_the_networks_learnt_from(tiny_patients, monkeypatch):
    listed = find_cases(tiny_patients)[:2]
    cases = [with_classes_as_images(case) for case in listed]
    networks = [echo(), echo(trained_on=["Tiny_0"])]
    ((pred, truth, spacing_mm),) = inference.predict_validation(networks, listed, cases, flips=False)
    np.testing.assert_array_equal(pred, truth)
    assert list(np.bincount(truth.ravel())[1:]) == list(np.bincount(cases[1].labels.ravel())[1:])
    assert spacing_mm == nib.load(listed[1].images["flair"]).header.get_zooms()[::-1]
    assert truth.size < cases[1].labels.size  # all patients are in memory at once: only the part with tumour
    assert len(inference.predict_validation([echo()], listed, cases, flips=False)) == 2
    monkeypatch.setattr(inference, "ENOUGH_TO_CHOOSE", 1)
    assert len(inference.predict_validation([echo()], listed, cases, flips=False)) == 1


def test_a_submission_is_one_flat_archive_of_files_called_after_the_patients(tmp_path):
    files = {name: tmp_path / "predictions" / f"{name}_seg.nii.gz" for name in ("Val_002", "Val_001")}
    for name, path in files.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    archive = inference.write_submission(tmp_path / "submission", files)
    assert archive == tmp_path / "submission.zip"
    with zipfile.ZipFile(archive) as content:
        assert content.namelist() == ["Val_001.nii.gz", "Val_002.nii.gz"]
        assert content.read("Val_002.nii.gz") == b"Val_002"
    assert (tmp_path / "submission" / "Val_001.nii.gz").read_bytes() == b"Val_001"


def test_another_reader_finds_the_same_figures(checkpoint, tmp_path):
    """Written, read again by SimpleITK, scored from its arrays: identical to what the run reports."""
    sitk = pytest.importorskip("SimpleITK", reason="SimpleITK is not installed: no second reader")
    case = find_cases(write_tiny_case(tmp_path, "New", seed=9))[0]
    networks = [inference.load_network(checkpoint, device=CPU)]
    expected = inference.evaluate(networks, [case], tmp_path / "out", **RULES)["cases"]["New"]
    pred, truth, scan = (
        sitk.ReadImage(str(path)) for path in (tmp_path / "out" / "New_seg.nii.gz", case.seg, case.images["flair"])
    )
    for facts in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(pred, facts)() == getattr(scan, facts)()
    masks = [np.array([0, 1, 2, 9, 3], np.uint8)[sitk.GetArrayFromImage(image).T] for image in (pred, truth)]
    assert score_case(*masks, spacing_mm=pred.GetSpacing(), convention="brats2020") == expected


def test_the_segmentation_is_not_looked_at(checkpoint, tiny_patients, tmp_path):
    network = inference.load_network(checkpoint, device=CPU)
    case = find_cases(write_tiny_case(tmp_path, "New", seed=9))[0]
    without = dataclasses.replace(case, seg=None)
    spoilt = dataclasses.replace(case, seg=next(iter(case.images.values())))  # not even a mask
    expected, got = (
        next(inference.predict_files([network], [each], tmp_path / "out", flips=False))[2] for each in (without, spoilt)
    )
    np.testing.assert_array_equal(got, expected)


def test_two_patients_of_one_name_are_left_out_and_copies_count_once(checkpoint, tmp_path):
    folders = [write_tiny_case(tmp_path / place, "P", seed=seed) for place, seed in (("a", 1), ("b", 1), ("c", 2))]
    new = write_tiny_case(tmp_path, "New", seed=9)
    how = {"device": "cpu", "flips": False}
    written, skipped = inference.predict_folders([checkpoint], [*folders[:2], new], tmp_path / "out", **how)
    assert [path.name for path in written] == ["P_seg.nii.gz", "New_seg.nii.gz"] and not skipped
    written, skipped = inference.predict_folders([checkpoint], [*folders, new], tmp_path / "other", **how)
    assert [path.name for path in written] == ["New_seg.nii.gz"]
    assert f"{folders[0]} and in {folders[2]}" in skipped["P"]
