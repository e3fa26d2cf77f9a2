"""A 3D U-Net made from a 2D one: each convolution keeps its weights and looks along three planes.

In an axial-coronal-sagittal (ACS) convolution (Yang et al., Reinventing 2D convolutions for 3D images, 2021) a third
of the output channels sees axial slices, a third coronal and a third sagittal ones. It has the parameters of the 2D
convolution, so pretrained weights keep their meaning in 3D, and it costs no more per voxel.
"""

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn
from torch.nn import functional as F


class VolumetricUnet(nn.Module):
    """The U-Net of `model.SlicesUnet` with ACS convolutions. Its weights have the names of the 2D network's.

    Args:
        unet: a U-Net of segmentation-models-pytorch with an EfficientNet-Lite as encoder; its layers are taken over.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.encoder, self.decoder = _to_volumes(unet.encoder), _to_volumes(unet.decoder)
        self.segmentation_head = unet.segmentation_head
        self.segmentation_head[0] = PlanarConvolution(unet.segmentation_head[0], shared=True)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """
        Args:
            patches: float (batch, channels, depth, height, width), sides multiples of 32.

        Returns:
            Logits of the same sizes.
        """
        features, *skips = self.encoder(patches)[:0:-1]
        for block, skip in zip(self.decoder.blocks, [*skips, None], strict=True):
            features = F.interpolate(features, scale_factor=2)
            if skip is not None:
                features = torch.cat([features, skip], dim=1)
            features = block.conv2(block.conv1(features))
        return self.segmentation_head(features)


class PlanarConvolution(nn.Conv2d):
    """An ACS convolution with the weights of a 2D one.

    Args:
        conv: with a square kernel, over all channels together or over each by itself (depthwise).
        shared: give every output channel the mean over the three planes, for a network's last layer, in which a
            channel is a class.
    """

    def __init__(self, conv: nn.Conv2d, *, shared: bool = False):
        sizes = {name: getattr(conv, name)[0] for name in ("kernel_size", "stride", "padding")}
        super().__init__(conv.in_channels, conv.out_channels, **sizes, groups=conv.groups, bias=conv.bias is not None)
        self.load_state_dict(conv.state_dict())
        self.same, self.shared = isinstance(conv, Conv2dSame), shared

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Map (batch, in_channels, depth, height, width) to as many output channels."""
        if self.kernel_size == (1, 1):
            return F.conv3d(volumes, self.weight[..., None], self.bias, self.stride[0], groups=self.groups)
        if self.shared:
            return torch.stack([self._along(axis, volumes, self.weight, self.bias) for axis in range(3)]).mean(dim=0)
        weights = self.weight.tensor_split(3)
        biases = [None] * 3 if self.bias is None else self.bias.tensor_split(3)
        inputs = [volumes] * 3 if self.groups == 1 else volumes.tensor_split(3, dim=1)
        planes = zip(range(3), inputs, weights, biases, strict=True)
        return torch.cat([self._along(*plane) for plane in planes], dim=1)

    def _along(self, axis: int, volumes: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve the planes perpendicular to an axis."""
        pads = [self._pads(side) for side in volumes.shape[2:]]
        half = self.kernel_size[0] // 2
        # Along the axis, the kernel is its middle alone; a negative pad crops.
        pads[axis] = (pads[axis][0] - half, pads[axis][1] - half)
        if self.same:
            volumes = F.pad(volumes, [pad for pair in reversed(pads) for pad in pair])
            pads = [(0, 0)] * 3
        groups = 1 if self.groups == 1 else len(weight)
        padding = [before for before, _ in pads]
        return F.conv3d(volumes, weight.unsqueeze(2 + axis), bias, self.stride[0], padding, groups=groups)

    def _pads(self, side: int) -> tuple[int, int]:
        """Zeros before and after an axis: the convolution's own, or as many as TensorFlow's `SAME` puts there."""
        if not self.same:
            return self.padding[0], self.padding[0]
        stride, kernel = self.stride[0], self.kernel_size[0]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        return total // 2, total - total // 2


class _NormAct(BatchNormAct2d):
    """BatchNorm with an activation, as timm has it, over volumes."""

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        return super().forward(volumes.flatten(2, 3)).view_as(volumes)


def _to_volumes(module: nn.Module) -> nn.Module:
    """Replace the 2D layers in a module by 3D ones with their weights."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(module, name, PlanarConvolution(layer))
        elif isinstance(layer, nn.BatchNorm2d):
            setattr(module, name, _norm(layer))
        else:
            _to_volumes(layer)
    return module


def _norm(layer: nn.BatchNorm2d) -> nn.Module:
    sizes = (layer.num_features, layer.eps, layer.momentum)
    if isinstance(layer, BatchNormAct2d):
        norm = _NormAct(*sizes)
        norm.act = layer.act
    else:
        norm = nn.BatchNorm3d(*sizes)
    norm.load_state_dict(layer.state_dict())
    return norm
