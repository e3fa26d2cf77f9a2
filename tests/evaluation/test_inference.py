"""From a checkpoint and scans to files: geometry, labels, whole volumes."""

import dataclasses
import shutil
import zipfile

import nibabel as nib
import numpy as np
import pytest
import torch

from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation import inference
from brats_helpers.evaluation.folders import score_folders
from brats_helpers.evaluation.postprocess import NO_RULES
from brats_helpers.labels import DataError
from brats_helpers.scoring.scores import score_case
from brats_helpers.training.dataset import Slices
from brats_helpers.training.loop import fit
from tests.conftest import write_tiny_case
from tests.tiny_training import HOW, SETTINGS, fit_tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tiny_patients, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    packed = [pack(case) for case in find_cases(tiny_patients)]
    fit(SETTINGS, packed[:3], packed[3:], folder, **HOW)
    return folder / "checkpoints" / "best.pt"


def test_a_checkpoint_alone_rebuilds_the_network(checkpoint):
    network = inference.load_network(checkpoint, device=CPU)
    assert network.modalities == ["flair", "t1", "t1ce", "t2"]
    assert network.trained_on == {"Tiny_0", "Tiny_1", "Tiny_2"} and network.chosen_by == {"Tiny_3"}
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in network.model.state_dict().items())
    assert not network.model.training


def test_predictions_lie_in_the_patients_own_geometry(checkpoint, tmp_path):
    source = write_tiny_case(tmp_path, "New", seed=9, labelled=False)
    inference.predict_folders([checkpoint], [source], tmp_path / "out", device="cpu", flips=False)
    written = nib.load(tmp_path / "out" / "New_seg.nii.gz")
    image = nib.load(source / "New_flair.nii.gz")
    assert written.shape == image.shape and (written.affine == image.affine).all()
    assert written.get_data_dtype() == image.get_data_dtype()
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    assert read_mask(tmp_path / "out" / "New_seg.nii.gz").any()


class _Echo(torch.nn.Module):
    """Answers, for every voxel, the class that its first channel says, with a probability that grows with `logit`."""

    def __init__(self, logit=30.0):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(logit))

    def forward(self, images):
        says = images[:, 0].round().long().clamp(0, 3)
        return self.logit * torch.nn.functional.one_hot(says, 4).movedim(-1, 1).float()


def echo(logit=30.0, trained_on=()):
    settings = {"modalities": ("flair", "t1", "t1ce", "t2"), "context_slices": 0, "patch_size": 0}
    return inference.Network(_Echo(logit), settings, frozenset(trained_on), frozenset(), 1)


def with_classes_as_images(case):
    packed = pack(case)
    return dataclasses.replace(packed, images=np.repeat(packed.labels[:, None].astype(np.float16), 4, axis=1))


@pytest.mark.parametrize("flips", [False, True])
def test_every_voxel_comes_back_where_it_was(tiny_patients, flips):
    """Image values that are class numbers, through a network that echoes them, give the very mask."""
    packed = with_classes_as_images(find_cases(tiny_patients)[0])
    classes = packed.to_volume(inference.predict([echo()], packed, flips=flips).argmax(axis=1))
    np.testing.assert_array_equal(classes, packed.to_volume(packed.labels))
    assert classes.shape == (48, 56, 20)


class _OnGpu(torch.Tensor):
    """As a tensor of a GPU: numpy cannot have it."""

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_batches_may_be_made_on_a_gpu(tiny_patients, monkeypatch):
    """As those of slices that it keeps are, their index included."""
    packed = with_classes_as_images(find_cases(tiny_patients)[0])
    before = inference.predict([echo()], packed, flips=False)
    gather = Slices.__getitems__

    def on_gpu(slices, items):
        batch = gather(slices, items)
        return batch._replace(index=batch.index.as_subclass(_OnGpu))

    monkeypatch.setattr(Slices, "__getitems__", on_gpu)
    np.testing.assert_array_equal(inference.predict([echo()], packed, flips=False), before)


def test_probabilities_are_averaged_over_networks(tiny_patients):
    packed = with_classes_as_images(find_cases(tiny_patients)[0])
    # A logit of log 9 against three of 0 is a probability of 9/12, one of 0 a quarter each; half-way is 1/2.
    networks = [echo(float(np.log(9))), echo(0.0)]
    soft = inference.predict(networks, packed, flips=False)
    on_brain = packed.counts.sum(axis=1) > 0
    said = np.take_along_axis(soft, packed.labels[:, None].astype(np.int64), axis=1)[on_brain]
    np.testing.assert_allclose(said, (9 / 12 + 1 / 4) / 2, atol=2e-3)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-3)


def test_only_networks_of_the_same_modalities_are_averaged(checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["settings"]["modalities"] = ("t1", "flair", "t1ce", "t2")
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(DataError, match="other.pt reads t1, flair, t1ce, t2, but .*best.pt flair, t1, t1ce, t2"):
        inference.load_networks([checkpoint, tmp_path / "other.pt"], device=CPU)


def test_another_architecture_may_be_averaged(checkpoint, tiny_patients, tmp_path):
    packed = [pack(case) for case in find_cases(tiny_patients)]
    fit_tiny(packed, tmp_path, encoder="tu-mobilenetv3_small_050", context_slices=1, epochs=1)
    networks = inference.load_networks([checkpoint, tmp_path / "checkpoints" / "best.pt"], device=CPU)
    both, one, other = (inference.predict(each, packed[0], flips=False) for each in (networks, *zip(networks)))
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert abs(one - other).max() > 0.01


def test_probabilities_sum_to_one_and_empty_slices_are_background(checkpoint, tiny_patients):
    packed = pack(find_cases(tiny_patients)[0])
    packed.counts[0] = 0
    soft = inference.predict([inference.load_network(checkpoint, device=CPU)], packed, flips=True)
    np.testing.assert_allclose(soft.sum(axis=1), 1, atol=1e-3)
    assert (soft[0, 0] == 1).all()


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(DataError, match="no checkpoint at"):
        inference.load_network(tmp_path / "best.pt", device=CPU)
    (tmp_path / "text.pt").write_text('{"a": 1}')
    with pytest.raises(DataError, match="text.pt is no checkpoint"):
        inference.load_network(tmp_path / "text.pt", device=CPU)
    torch.save({"model": {}}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="other.pt is no checkpoint"):
        inference.load_network(tmp_path / "other.pt", device=CPU)


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
    truth, pred = read_mask(unseen[0].seg) > 0, read_mask(tmp_path / "out" / "New_0_seg.nii.gz") > 0
    expected = 2 * (truth & pred).sum() / (truth.sum() + pred.sum())
    assert metrics["cases"]["New_0"]["WT"]["dice"] == pytest.approx(expected)
    assert (tmp_path / "out" / "New_1_seg.nii.gz").exists()


def test_post_processing_is_applied_and_what_it_costs_is_told(checkpoint, tmp_path):
    networks = [inference.load_network(checkpoint, device=CPU)]
    case = find_cases(write_tiny_case(tmp_path, "New", seed=9))[0]
    plain = inference.evaluate(networks, [case], tmp_path / "plain", **RULES)
    no_et = dataclasses.replace(NO_RULES, et_voxels=10**6)  # whatever is found is too little
    ruled = inference.evaluate(networks, [case], tmp_path / "ruled", **RULES, rules=no_et)
    found, left = (read_mask(tmp_path / name / "New_seg.nii.gz") for name in ("plain", "ruled"))
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
    np.testing.assert_array_equal(read_mask(tmp_path / "Tiny_0_seg.nii.gz"), read_mask(case.seg))


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
        with pytest.raises(DataError, match=f"has seen {name} in training: .*allow_leakage"):
            inference.evaluate([network], new + seen, tmp_path / "out", **RULES)
    assert not (tmp_path / "out").exists()
    # Of several networks it is enough that one has seen the patient.
    assert inference.leaked([echo(trained_on=["New"]), network], new) == ["New"]
    assert inference.leaked([echo(), network], new) == []


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
    cases = [with_classes_as_images(case) for case in find_cases(tiny_patients)[:2]]
    networks = [echo(), echo(trained_on=["Tiny_0"])]
    ((pred, truth),) = inference.predict_validation(networks, cases, flips=False)
    np.testing.assert_array_equal(pred, truth)
    assert list(np.bincount(truth.ravel())[1:]) == list(np.bincount(cases[1].labels.ravel())[1:])
    assert truth.size < cases[1].labels.size  # all patients are in memory at once: only the part with tumour
    assert len(inference.predict_validation([echo()], cases, flips=False)) == 2
    monkeypatch.setattr(inference, "ENOUGH_TO_CHOOSE", 1)
    assert len(inference.predict_validation([echo()], cases, flips=False)) == 1


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


def test_the_same_name_twice_is_refused(checkpoint, tmp_path):
    folders = [write_tiny_case(tmp_path / place, "P", seed=1) for place in "ab"]
    with pytest.raises(DataError, match="P lies in .*a.* and in .*b"):
        inference.predict_folders([checkpoint], folders, tmp_path / "out", device="cpu", flips=False)
