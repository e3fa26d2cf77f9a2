"""Networks of 3D patches: what they are fed, and that all the rest treats them like networks of slices."""

import dataclasses

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from brats_helpers.__main__ import main
from brats_helpers.data.cache import Packed, count_classes, pack, prepare
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation import inference
from brats_helpers.scoring.rules import region_dice
from brats_helpers.training import loop as train
from brats_helpers.training import patches
from brats_helpers.training.dataset import BalancedSampler, make_loader
from brats_helpers.training.loop import fit
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import PATCH_NETWORKS, WeightsError, build_model, sees_patches, summary
from brats_helpers.training.patches import Patches, choose_patches, middle_slices, patients, samples
from tests.conftest import write_tiny_case
from tests.tiny_training import HOW, SETTINGS

CPU = torch.device("cpu")
CUBES = dataclasses.replace(
    SETTINGS,
    encoder="monai-unet",
    patch_size=32,
    batch_size=2,
    slices_per_epoch=4,
    epochs=2,
    modalities=("flair", "t1ce"),
)


@pytest.fixture(scope="module")
def prepared(tiny_patients, tmp_path_factory):
    cases = find_cases(tiny_patients, ["flair", "t1ce"])
    return prepare(cases, cache_dir=tmp_path_factory.mktemp("cache"), workers=1)


def _numbered(depth, height, width, tumour=()):
    """A patient whose voxels are numbered by their place; tumour (class 2) at the voxels listed."""
    images = 1 + np.arange(depth * height * width, dtype=np.float16).reshape(depth, 1, height, width)
    labels = np.zeros((depth, height, width), np.uint8)
    for voxel in tumour:
        labels[voxel] = 2
    counts = count_classes(labels, np.ones_like(labels, bool))
    return Packed("P", images, labels, (0, 0, 0), (width, height, depth), counts)


def test_a_patch_is_a_cube_of_the_box_about_its_voxel():
    case = _numbered(12, 10, 8, tumour=[(5, 7, 1)])
    data = Patches([case], 4)
    assert len(data) == 12 + 1 and data.has_tumour.tolist() == [False] * 12 + [True]
    images, masks, index = data.__getitems__([12])
    # Two voxels before the centre in each axis, moved into the box: 3 to 6, 5 to 8, and 0 to 3 instead of -1 to 2.
    np.testing.assert_array_equal(images[0, 0], case.images[3:7, 0, 5:9, 0:4])
    assert masks[0].nonzero().tolist() == [[2, 2, 1]] and masks[0, 2, 2, 1] == 2
    assert index.tolist() == [[0, 5]] and images.dtype == torch.float32 and masks.dtype == torch.uint8


def test_a_box_smaller_than_the_patch_lies_in_its_middle():
    case = _numbered(4, 16, 16)
    images, masks, _ = Patches([case], 8)[3]
    filled = images[0, 0].numpy() != 0
    assert filled[2:6].all() and not filled[:2].any() and not filled[6:].any()


def test_patches_lie_about_tumour_and_about_the_brain(prepared):
    data = Patches(prepared, 16)
    for item in range(0, len(data), 7):
        k, z = data.index[item]
        centre = data._centre(item)
        assert centre[0] == z
        brain, label = (prepared[k].images[z] != 0).any(axis=0)[centre[1:]], prepared[k].labels[centre]
        assert label > 0 if data.has_tumour[item] else brain
    slices = sum(int(case.counts[:, 1:].any(axis=1).sum()) for case in prepared)
    assert data.has_tumour.sum() == slices
    assert data.once == -(-sum(case.images[:, 0].size for case in prepared) // 16**3)


@pytest.mark.parametrize("foreground", [0.25, 1.0])
def test_the_share_about_tumour_and_the_order_are_the_samplers_whatever_the_workers(prepared, foreground):
    data = Patches(prepared, 16)
    sampler = BalancedSampler(data, n=8, foreground=foreground, seed=3)
    assert data.has_tumour[list(sampler)].mean() == foreground
    alone, helped = (list(make_loader(data, batch_size=4, workers=workers, sampler=sampler)) for workers in (0, 2))
    assert len(alone) == 2
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("encoder, patch_size", [("resnet18", 64), ("monai-unet", 0)])
def test_a_network_and_what_it_is_fed_must_fit(encoder, patch_size):
    with pytest.raises(ValueError, match=f"patch_size {patch_size}: {encoder} sees"):
        dataclasses.replace(CUBES, encoder=encoder, patch_size=patch_size)


def test_of_patches_the_middle_slice_is_shown():
    patches, masks = torch.rand(2, 3, 8, 5, 6), torch.randint(0, 4, (2, 8, 5, 6))
    shown = middle_slices(patches, masks)
    assert torch.equal(shown[0], patches[:, :, 4]) and torch.equal(shown[1], masks[:, 4])
    assert all(map(torch.equal, middle_slices(*shown), shown))


def test_patches_have_no_neighbouring_slices(prepared):
    with pytest.raises(ValueError, match="context_slices 1: .*must be 0"):
        samples(prepared, context_slices=1, patch_size=32)


def test_patch_and_batch_follow_the_memory(monkeypatch):
    """MONAI's U-Net keeps about 203 bytes a voxel. With as much again for all else, float32 patches take 0.79 GiB
    at 128 cubed, 0.33 at 96, 0.012 at 32, and half of that in half precision."""
    of = {"encoder": "monai-unet", "in_channels": 4, "device": torch.device("cuda")}

    def chosen(gib, precision, patch_size=0, batch_size=0):
        facts = {"device_memory_gib": gib, "memory_gib": 100, "precision": precision}
        monkeypatch.setattr(patches.machine, "describe", lambda device: facts)
        return choose_patches(**of, patch_size=patch_size, batch_size=batch_size)

    assert 195 < patches._training_bytes("monai-unet", 4) < 210
    assert chosen(15, "fp16") == (128, 8)
    assert chosen(5, "no") == (128, 4)
    assert chosen(1, "no") == (96, 2)
    assert chosen(0.01, "no") == (32, 1)
    assert chosen(1, "no", patch_size=32) == (32, 8)
    assert chosen(1, "no", batch_size=3) == (96, 3)
    of["device"] = CPU
    assert chosen(15, "no") == (64, 2)
    of["encoder"] = "resnet18"
    assert chosen(15, "no") == (0, 4) and chosen(15, "no", batch_size=8) == (0, 8)
    of["device"] = torch.device("cuda")
    assert chosen(15, "fp16") == (0, 16)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubes")
    return folder, fit(CUBES, prepared[:3], prepared[3:], folder, **HOW)


def test_a_network_of_patches_trains_and_resumes_to_the_bit(prepared, trained, tmp_path, monkeypatch):
    folder, history = trained
    assert [row["epoch"] for row in history] == [1, 2] and all(np.isfinite(row["train_loss"]) for row in history)
    original, saved = train.save_file, []

    def stop(path, content):
        original(path, content)
        saved.append(path.name)
        if path.name == "last.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(CUBES, prepared[:3], prepared[3:], tmp_path, **HOW)
    monkeypatch.setattr(train, "save_file", original)
    fit(CUBES, prepared[:3], prepared[3:], tmp_path, **HOW)
    one, other = (torch.load(each / "checkpoints" / "last.pt", weights_only=True) for each in (folder, tmp_path))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def test_validation_gives_the_score_of_the_whole_predicted_volume(prepared):
    torch.manual_seed(0)
    network = build_model(encoder="monai-unet", weights="none", in_channels=2, patch_size=32)
    with torch.no_grad():
        network.network.model[-1][-1].conv.unit0.conv.bias.zero_()  # else it answers background and every Dice is 0
    loader = patients(prepared, context_slices=0, patch_size=32, batch_size=7, workers=0, device=CPU)
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1))
    row = train.validate(network, loader, len(prepared), criterion, Accelerator(cpu=True), None)
    whole = inference.Network(network.eval(), dataclasses.asdict(CUBES), frozenset(), frozenset(), 1)
    expected = []
    for case in prepared:
        soft = inference.predict([whole], case, channels=whole.modalities, flips=False)
        pred, truth = (case.to_volume(box) for box in (soft.argmax(axis=1).astype(np.uint8), np.asarray(case.labels)))
        expected.append(region_dice(pred, truth, convention="brats2020"))
    for region in ("WT", "TC", "ET"):
        mean = np.mean([scores[region] for scores in expected])
        assert row[f"dice_{region}"] == pytest.approx(mean, abs=1e-12) and 0 < mean < 1


def test_the_verb_predicts_into_the_patients_geometry_with_either_kind_or_both(trained, tiny_patients, tmp_path):
    flat = dataclasses.replace(SETTINGS, modalities=("flair", "t1ce"), epochs=1)
    packed = [pack(case) for case in find_cases(tiny_patients, ["flair", "t1ce"])]
    fit(flat, packed[:3], packed[3:], tmp_path, **HOW)
    cubes, slices = trained[0] / "checkpoints" / "best.pt", tmp_path / "checkpoints" / "best.pt"
    source = write_tiny_case(tmp_path / "new", "New", seed=9)
    case = find_cases(source, ["flair", "t1ce"])[0]
    one, other, both = (
        inference.predict(inference.load_networks(files, device=CPU), pack(case), channels=case.modalities, flips=True)
        for files in ([cubes], [slices], [cubes, slices])
    )
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert abs(one - other).max() > 0.01

    command = ["predict", "--checkpoint", str(cubes), "--checkpoint", str(slices), "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", str(source)]) == 0
    written = read_mask(tmp_path / "out" / "New_seg.nii.gz")
    assert written.shape == (48, 56, 20)
    networks = inference.load_networks([cubes, slices], device=CPU)
    how = {"flips": False, "convention": "brats2020", "simulated": True}
    metrics = inference.evaluate(networks, [case], tmp_path / "scored", **how)
    assert set(metrics["cases"]) == {"New"} and metrics["uncertainty"]["checkpoints"] == 2


@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_each_network_answers_patches_and_begins_at_background(name):
    assert sees_patches(name)
    torch.manual_seed(0)
    network = build_model(encoder=name, weights="none", in_channels=2, patch_size=32).eval()
    with torch.no_grad():
        soft = network(torch.randn(1, 2, 32, 32, 32)).softmax(dim=1)
    assert soft.shape == (1, 4, 32, 32, 32) and soft[:, 0].median() > 0.8


@pytest.mark.parametrize("size", [0, 16, 40])
def test_patches_that_cannot_be_halved_four_times_are_refused(size):
    with pytest.raises(ValueError, match=f"patch_size {size}: monai-unet .*32, 48, 64"):
        build_model(encoder="monai-unet", weights="none", in_channels=2, patch_size=size)


def test_a_network_of_patches_has_no_imagenet_weights():
    with pytest.raises(WeightsError, match="'imagenet': monai-unet is 3D .*-p encoder_weights none"):
        build_model(encoder="monai-unet", weights="imagenet", in_channels=2, patch_size=32)
    with pytest.raises(ValueError, match="'monai-net': expected one of monai-segresnet"):
        build_model(encoder="monai-net", weights="none", in_channels=2, patch_size=32)


def test_its_summary_counts_no_encoder():
    network = build_model(encoder="monai-unet", weights="none", in_channels=2, patch_size=32)
    facts = summary(network, (2, 32, 32, 32))
    assert facts["encoder_parameters"] == 0 and facts["parameters"] == facts["trainable_parameters"] > 4e6
    assert facts["multiply_adds"] > 1e8
