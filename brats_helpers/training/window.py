"""Whole patients by a network that was made for patches."""

import torch
from torch import nn

OVERLAP = 0.25
"""Of neighbouring windows, as a share of their edge; where the box is hardly larger than the window it is more."""


class Windows(nn.Module):
    """A network of 3D patches that answers whole patients as well, by a window that slides over them.

    Args:
        network: maps (batch, channels, depth, height, width) to logits of the same sizes.
        edge: of its cubic patches, in voxels.
    """

    def __init__(self, network: nn.Module, edge: int):
        super().__init__()
        self.network = network
        self.edge = edge
        self.encoder = nn.Identity()  # pretrained weights, to be frozen or trained more slowly: it has none

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: (batch, channels, depth, height, width): in training patches, else volumes of any size. Or all
                slices of one volume in order, (slices, channels, height, width).

        Returns:
            Logits of the same sizes. In `eval()` they are those of overlapping windows, averaged with Gaussian weights
            that trust the middle of a window more than its border (as nnU-Net does).
        """
        if images.ndim == 4:
            return self(images.movedim(0, 1)[None])[0].movedim(1, 0)
        if self.training or images.shape[2:] == (self.edge,) * 3:
            return self._answer(images)
        from monai.inferers import sliding_window_inference  # takes a second to import

        return sliding_window_inference(
            images,
            roi_size=[self.edge] * 3,
            sw_batch_size=1,
            predictor=lambda patches: self._answer(patches).float(),
            overlap=OVERLAP,
            mode="gaussian",
        )

    def _answer(self, patches: torch.Tensor) -> torch.Tensor:
        """In float32 on a CPU: there, bf16 gradients of kernels over few voxels are not always finite (torch 2.14)."""
        with torch.autocast("cpu", enabled=False):
            return self.network(patches)
