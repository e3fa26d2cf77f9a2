"""From a checkpoint and scans to files: geometry, labels, whole volumes."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch

from brats_helpers import inference
from brats_helpers.cache import pack
from brats_helpers.cases import DataError, find_cases, read_mask
from brats_helpers.train import fit

from .conftest import write_tiny_case
from .test_train import HOW, SETTINGS

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
    assert network.seen == {"Tiny_0", "Tiny_1", "Tiny_2", "Tiny_3"}
    saved = torch.load(checkpoint, weights_only=True)["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in network.model.state_dict().items())
    assert not network.model.training


def test_predictions_lie_in_the_patients_own_geometry(checkpoint, tmp_path):
    source = write_tiny_case(tmp_path, "New", seed=9, labelled=False)
    inference.predict_folders(checkpoint, [source], tmp_path / "out", device="cpu", flips=False)
    written = nib.load(tmp_path / "out" / "New_seg.nii.gz")
    image = nib.load(source / "New_flair.nii.gz")
    assert written.shape == image.shape and (written.affine == image.affine).all()
    assert written.get_data_dtype() == image.get_data_dtype()
    assert set(np.unique(written.dataobj)) <= {0, 1, 2, 4}
    case = find_cases(source)[0]
    classes = inference.predict_case(inference.load_network(checkpoint, device=CPU), case, flips=False)
    np.testing.assert_array_equal(read_mask(tmp_path / "out" / "New_seg.nii.gz"), classes)


class _Echo(torch.nn.Module):
    """Answers, for every voxel, the class that its first channel says."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return 30 * torch.nn.functional.one_hot(images[:, 0].round().long().clamp(0, 3), 4).movedim(-1, 1).float()


@pytest.mark.parametrize("flips", [False, True])
def test_every_voxel_comes_back_where_it_was(tiny_patients, flips):
    """Image values that are class numbers, through a network that echoes them, give the very mask."""
    packed = pack(find_cases(tiny_patients)[0])
    image = np.repeat(packed.labels[:, None].astype(np.float16), 4, axis=1)
    network = inference.Network(_Echo(), {"modalities": "flair,t1,t1ce,t2", "context_slices": 0}, frozenset(), 1)
    classes = inference.predict_case(network, dataclasses.replace(packed, images=image), flips=flips)
    np.testing.assert_array_equal(classes, packed.to_volume(packed.labels))
    assert classes.shape == (48, 56, 20)


def test_probabilities_sum_to_one_and_empty_slices_are_background(checkpoint, tiny_patients):
    packed = pack(find_cases(tiny_patients)[0])
    packed.counts[0] = 0
    soft = inference.predict(inference.load_network(checkpoint, device=CPU), packed, flips=True)
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
    with pytest.raises(DataError, match="Two: no Two_t1.nii.*missing: t1, t2"):
        inference.predict_folders(checkpoint, [tmp_path / "Two"], tmp_path / "out", device="cpu", flips=False)


def test_a_network_is_not_scored_on_patients_it_has_seen(checkpoint, tiny_patients, tmp_path):
    network = inference.load_network(checkpoint, device=CPU)
    rules = {"flips": False, "convention": "brats2020", "simulated": True}
    with pytest.raises(DataError, match="has seen Tiny_0, Tiny_1"):
        inference.evaluate(network, find_cases(tiny_patients), tmp_path, **rules)
    unseen = [find_cases(write_tiny_case(tmp_path, f"New_{k}", seed=9 + k, labelled=k == 0))[0] for k in range(2)]
    metrics = inference.evaluate(network, unseen, tmp_path / "out", **rules)
    assert list(metrics["cases"]) == ["New_0"] and metrics["not_scored"] == {"New_1": "unlabelled"}
    truth, pred = read_mask(unseen[0].seg) > 0, read_mask(tmp_path / "out" / "New_0_seg.nii.gz") > 0
    expected = 2 * (truth & pred).sum() / (truth.sum() + pred.sum())
    assert metrics["cases"]["New_0"]["WT"]["dice"] == pytest.approx(expected)
    assert (tmp_path / "out" / "New_1_seg.nii.gz").exists()


def test_the_segmentation_is_not_looked_at(checkpoint, tiny_patients):
    network = inference.load_network(checkpoint, device=CPU)
    case = find_cases(tiny_patients)[0]
    without = dataclasses.replace(case, seg=None)
    spoilt = dataclasses.replace(case, seg=next(iter(case.images.values())))  # not even a mask
    expected = inference.predict_case(network, without, flips=False)
    np.testing.assert_array_equal(inference.predict_case(network, spoilt, flips=False), expected)


def test_the_same_name_twice_is_refused(checkpoint, tmp_path):
    folders = [write_tiny_case(tmp_path / place, "P", seed=1) for place in "ab"]
    with pytest.raises(DataError, match="P lies in .*a.* and in .*b"):
        inference.predict_folders(checkpoint, folders, tmp_path / "out", device="cpu", flips=False)
