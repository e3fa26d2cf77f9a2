"""A 3D U-Net out of a 2D one: the same weights, in three planes."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.layers import Conv2dSame, convert_sync_batchnorm
from torch import nn
from torch.nn import functional as F

from brats_helpers.training.checkpoint import FORMAT
from brats_helpers.training.model import build_model
from brats_helpers.training.settings import DECODER
from brats_helpers.training.volumetric import PlanarConvolution
from brats_helpers.training.weights import PACKAGED_ENCODER, WeightsError
from tests.tiny_training import SETTINGS

ENCODER = f"acs-{PACKAGED_ENCODER}"
MODALITIES = ("flair", "t1", "t1ce", "t2")


def _volume(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _by_slices(conv, volume, axis):
    """The 2D convolution of every slice perpendicular to an axis, for a stride of 2 every other slice from `first`."""
    first = int(isinstance(conv, Conv2dSame))
    slices = volume.movedim(2 + axis, 1)[:, first :: conv.stride[0]]
    return conv(slices.flatten(0, 1)).unflatten(0, slices.shape[:2]).movedim(1, 2 + axis)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 7, 3, padding=1),
        nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
        Conv2dSame(2, 6, 3, stride=2, bias=False),
        Conv2dSame(6, 6, 5, stride=2, groups=6, bias=False),
    ],
)
def test_each_third_of_the_channels_sees_the_slices_of_one_plane(conv):
    volume = _volume(2, conv.in_channels, 8, 12, 10)
    with torch.no_grad():
        out = PlanarConvolution(conv)(volume)
        thirds = [_by_slices(conv, volume, axis).tensor_split(3, dim=1)[axis] for axis in range(3)]
    torch.testing.assert_close(out, torch.cat(thirds, dim=1), rtol=1e-4, atol=1e-5)


def test_every_class_sees_all_planes():
    conv, volume = nn.Conv2d(3, 4, 3, padding=1), _volume(1, 3, 6, 6, 6)
    with torch.no_grad():
        planes = torch.stack([_by_slices(conv, volume, axis) for axis in range(3)])
        torch.testing.assert_close(
            PlanarConvolution(conv, shared=True)(volume), planes.mean(dim=0), rtol=1e-4, atol=1e-5
        )


def test_the_weights_are_those_of_the_slices_network_under_the_same_names():
    flat = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4)
    deep = build_model(encoder=ENCODER, weights="imagenet", in_channels=4, patch_size=64)
    state = {name.removeprefix("network."): weight for name, weight in deep.state_dict().items()}
    assert state.keys() == flat.state_dict().keys()
    for name, weight in flat.encoder.state_dict().items():
        assert torch.equal(state[f"encoder.{name}"], weight), name
    assert {*map(id, deep.encoder.parameters())} < {*map(id, deep.parameters())}


def test_norms_and_activations_are_those_of_the_slices_network():
    """Along a volume of equal slices the first layer's axial channels are those of a slice."""
    flat = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).encoder.eval()
    deep = build_model(encoder=ENCODER, weights="imagenet", in_channels=4, patch_size=64).encoder.eval()
    slice_ = _volume(1, 4, 64, 64)
    volume = slice_[:, :, None].expand(-1, -1, 64, -1, -1)
    with torch.no_grad():
        expected = F.relu6(flat.model.bn1(flat.model.conv_stem(slice_)))
        found = deep.model.bn1(deep.model.conv_stem(volume))
    axial = len(expected[0].tensor_split(3)[0])
    torch.testing.assert_close(found[:, :axial, 5], expected[:, :axial], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["simulated", "a slices network", "its own checkpoint"])
def test_it_starts_from_whole_networks_of_slices_and_of_its_own(weights, tmp_path):
    if weights != "simulated":
        encoder = PACKAGED_ENCODER if weights == "a slices network" else ENCODER
        size = 0 if weights == "a slices network" else 64
        donor = build_model(encoder=encoder, weights="imagenet", in_channels=2, patch_size=size)
        settings = replace(SETTINGS, modalities=("flair", "t1ce"), encoder=encoder, patch_size=size, decoder=DECODER)
        saved = {
            "model": donor.state_dict(),
            "settings": vars(settings),
            "in_channels": 2,
            "train_cases": [],
            "val_cases": [],
        }
        weights = str(tmp_path / "best.pt")
        torch.save({"format": FORMAT, **saved}, weights)
    network = build_model(encoder=ENCODER, weights=weights, in_channels=4, patch_size=64, modalities=MODALITIES)
    if weights != "simulated":
        first = network.network.encoder.model.conv_stem.weight
        torch.testing.assert_close(first[:, [0, 2]], donor.state_dict()[[*donor.state_dict()][0]])
        assert not first[:, [1, 3]].any()
    with torch.no_grad():
        assert network.eval()(_volume(1, 4, 64, 64, 64)).shape == (1, 4, 64, 64, 64)
    with pytest.raises(WeightsError, match="decoder"):
        build_model(encoder=ENCODER, weights=weights, in_channels=4, patch_size=64, decoder=(64, 32, 16, 16, 16))


def test_gpus_that_share_batchnorm_keep_the_activations():
    network = build_model(encoder=ENCODER, weights="imagenet", in_channels=4, patch_size=64)
    shared = convert_sync_batchnorm(copy.deepcopy(network))
    assert isinstance(shared.encoder.model.bn1, nn.SyncBatchNorm)
    assert isinstance(shared.encoder.model.bn1.act, nn.ReLU6)
