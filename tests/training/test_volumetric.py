"""A 3D U-Net made from a 2D one: the same weights, in three planes."""

import copy
from dataclasses import replace

import pytest
import torch
from timm.layers import Conv2dSame, convert_sync_batchnorm
from torch import nn

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


def test_the_layers_are_joined_as_in_the_slices_network():
    """With kernels that see their middle alone, a volume of equal slices gives what the slices network gives."""
    flat = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).eval()
    deep = build_model(encoder=ENCODER, weights="imagenet", in_channels=4, patch_size=64).eval()
    state = {name: _collapsed(weight) for name, weight in flat.state_dict().items()}
    flat.load_state_dict(state)
    deep.network.load_state_dict(state)
    slice_ = _volume(1, 4, 64, 64)
    with torch.no_grad():
        expected = flat(slice_)
        found = deep(slice_[:, :, None].expand(-1, -1, 64, -1, -1))
    assert expected.std() > 0.5
    for z in range(64):
        torch.testing.assert_close(found[:, :, z], expected, rtol=1e-3, atol=1e-3)


def _collapsed(weight):
    """The weights of a convolution, all moved to the middle of its kernel."""
    if weight.ndim != 4:
        return weight
    middle = torch.zeros_like(weight)
    middle[..., weight.shape[2] // 2, weight.shape[3] // 2] = weight.sum(dim=(2, 3))
    return middle


def _saved(path, encoder, **changes):
    """A checkpoint of a network of flair and t1ce with random weights; returns its state."""
    size = 64 if encoder == ENCODER else 0
    settings = replace(SETTINGS, **{"encoder": encoder, "patch_size": size, "decoder": DECODER} | changes)
    channels = 2 * (2 * settings.context_slices + 1)
    donor = build_model(encoder=encoder, weights="none", in_channels=channels, patch_size=size)
    checkpoint = {"format": FORMAT, "settings": vars(settings), "in_channels": channels, "model": donor.state_dict()}
    torch.save(checkpoint, path)
    return donor.state_dict()


@pytest.mark.parametrize("encoder", [PACKAGED_ENCODER, ENCODER])
def test_it_starts_from_whole_networks_of_slices_and_of_its_own(encoder, tmp_path):
    given = _saved(tmp_path / "best.pt", encoder, modalities=("flair", "t1ce"))
    how = {"encoder": ENCODER, "weights": str(tmp_path / "best.pt"), "patch_size": 64}
    network = build_model(**how, in_channels=4, modalities=MODALITIES)
    first, *rest = zip(network.state_dict().values(), given.values(), strict=True)
    assert torch.equal(first[0][:, [0, 2]], first[1]) and not first[0][:, [1, 3]].any()
    assert all(torch.equal(own, its) for own, its in rest)
    with pytest.raises(WeightsError, match=f"with encoder {encoder} .*Take -p encoder {ENCODER} -p decoder 128"):
        build_model(**how, in_channels=4, decoder=(64, 32, 16, 16, 16))


def test_the_packaged_network_fits():
    how = {"encoder": ENCODER, "weights": "simulated", "patch_size": 64}
    network = build_model(**how, in_channels=4, modalities=MODALITIES)
    flat = build_model(encoder=PACKAGED_ENCODER, weights="simulated", in_channels=4, modalities=MODALITIES)
    assert all(map(torch.equal, network.state_dict().values(), flat.state_dict().values()))


def test_networks_that_do_not_fit_are_refused_with_what_to_take(tmp_path):
    how = {"encoder": ENCODER, "weights": str(tmp_path / "best.pt"), "in_channels": 2, "patch_size": 64}
    _saved(tmp_path / "best.pt", PACKAGED_ENCODER, modalities=("flair", "t1ce"), context_slices=1)
    with pytest.raises(WeightsError, match="sees neighbouring slices. A 3D network starts from a network of single"):
        build_model(**how, modalities=("flair", "t1ce"))
    for other, take in (("resnet18", "resnet18"), ("tu-tf_efficientnet_lite1", "acs-tu-tf_efficientnet_lite1")):
        _saved(tmp_path / "best.pt", other, modalities=("flair", "t1ce"))
        with pytest.raises(WeightsError, match=f"a network with encoder {other} .*Take -p encoder {take} "):
            build_model(**how, modalities=("flair", "t1ce"))


def test_gpus_that_share_batchnorm_get_the_same_answers():
    network = build_model(encoder=ENCODER, weights="imagenet", in_channels=4, patch_size=64).eval()
    shared = convert_sync_batchnorm(copy.deepcopy(network)).eval()
    assert isinstance(shared.encoder.model.bn1, nn.SyncBatchNorm)
    patch = _volume(1, 4, 64, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(shared(patch), network(patch))
