"""nnU-Net's residual encoder U-Net in its size L (Isensee et al., nnU-Net Revisited, 2024), which nnssl pretrains."""

from collections.abc import Mapping

import torch
from torch import nn

from brats_helpers.training.checkpoint import WeightsError
from brats_helpers.training.weights import load_encoder

PLAN = "nnssl_adaptation_plan"
"""Key of an nnssl checkpoint, under which it says where its encoder is."""
_WIDTHS = (32, 64, 128, 256, 320, 320)
_BLOCKS = (1, 3, 4, 6, 6, 6)


class ResidualUnet(nn.Module):
    """A 3D U-Net with 102 million parameters whose encoder has residual blocks.

    Args:
        in_channels: number of input channels.
        classes: number of output channels.
    """

    def __init__(self, in_channels: int, classes: int):
        super().__init__()
        self.encoder = _Encoder(in_channels)
        steps = list(zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True))
        self.upsamplings = nn.ModuleList(nn.ConvTranspose3d(low, high, 2, stride=2) for low, high in steps)
        self.blocks = nn.ModuleList(_Unit(2 * high, high) for _, high in steps)
        self.head = nn.Conv3d(_WIDTHS[0], classes, 1)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Map (batch, channels, depth, height, width), sides multiples of 32, to logits of the same sizes."""
        features, *skips = self.encoder(patches)[::-1]
        for upsampling, block, skip in zip(self.upsamplings, self.blocks, skips, strict=True):
            features = block(torch.cat([upsampling(features), skip], dim=1))
        return self.head(features)


def load_nnssl(network: ResidualUnet, checkpoint: Mapping, path: str) -> None:
    """Load the encoder that nnssl pretrained; the decoder keeps its random weights, as in nnU-Net's fine-tuning.

    Args:
        network: with any number of input channels, see `weights.adapt_channels`.
        checkpoint: the content of nnssl's `checkpoint_final.pth`, with `network_weights` and the plan that names the
            encoder in them.
        path: of the checkpoint, for messages.

    Raises:
        WeightsError: the encoder is not a ResEnc L.
    """
    plan, state = checkpoint[PLAN], {}
    for own, key in (("stem", "key_to_stem"), ("stages", "key_to_encoder")):
        theirs = f"{plan.get(key)}."
        for name, weight in checkpoint["network_weights"].items():
            if name.startswith(theirs):
                state[f"{own}.{name.removeprefix(theirs)}"] = weight
    try:
        load_encoder(network.encoder, state)
    except WeightsError as error:
        raise WeightsError(
            f"encoder_weights {path!r} is a checkpoint of nnssl, but not of a ResEnc L network: {error}"
        ) from error


class _Encoder(nn.Module):
    """Six stages; its weights have the names that they have in nnU-Net's ResidualEncoder."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.stem = nn.ModuleDict({"convs": nn.Sequential(_Unit(in_channels, _WIDTHS[0]))})
        self.stages = nn.ModuleList()
        before = _WIDTHS[0]
        for number, (width, blocks) in enumerate(zip(_WIDTHS, _BLOCKS, strict=True)):
            first = _Block(before, width, stride=2 if number else 1)
            rest = [_Block(width, width) for _ in range(blocks - 1)]
            self.stages.append(nn.ModuleDict({"blocks": nn.Sequential(first, *rest)}))
            before = width

    def forward(self, patches: torch.Tensor) -> list[torch.Tensor]:
        features = self.stem["convs"](patches)
        levels = []
        for stage in self.stages:
            features = stage["blocks"](features)
            levels.append(features)
        return levels


class _Block(nn.Module):
    """A residual block as in ResNet-D: a step down pools the shortcut."""

    def __init__(self, before: int, width: int, *, stride: int = 1):
        super().__init__()
        self.conv1 = _Unit(before, width, stride=stride)
        self.conv2 = _Unit(width, width, activated=False)
        self.skip = nn.Sequential()
        if stride > 1:
            self.skip.append(_Halving())
        if before != width:
            self.skip.append(_Unit(before, width, kernel=1, bias=False, activated=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        changed = self.conv2(self.conv1(features))
        changed += self.skip(features)
        return nn.functional.leaky_relu(changed, inplace=True)


class _Halving(nn.Module):
    """Means of 2 x 2 x 2 voxels. Unlike `nn.AvgPool3d`, it has deterministic gradients on a GPU."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        *_, depth, height, width = features.shape
        split = features.unflatten(4, (width // 2, 2)).unflatten(3, (height // 2, 2)).unflatten(2, (depth // 2, 2))
        return split.mean(dim=(3, 5, 7))


class _Unit(nn.Module):
    """A convolution, instance normalisation, and mostly a leaky ReLU."""

    def __init__(
        self, before: int, width: int, *, kernel: int = 3, stride: int = 1, bias: bool = True, activated: bool = True
    ):
        super().__init__()
        self.conv = nn.Conv3d(before, width, kernel, stride, kernel // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(width, affine=True)
        self.activated = activated

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(features))
        return nn.functional.leaky_relu(features, inplace=True) if self.activated else features
