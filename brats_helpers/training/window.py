"""Sliding windows: whole patients, segmented by a network for patches."""

import torch
from torch import nn

OVERLAP = 0.25
"""Smallest overlap of neighbouring windows, as a share of their edge."""


class Windows(nn.Module):
    """A network for 3D patches that also segments whole patients, with a sliding window.

    Args:
        network: maps (batch, channels, depth, height, width) to logits of the same sizes.
        edge: of its cubic patches, in voxels.
    """

    def __init__(self, network: nn.Module, edge: int):
        super().__init__()
        self.network = network
        self.edge = edge

    @property
    def encoder(self) -> nn.Module:
        """The network's encoder, or an empty module if it has none that could be pretrained and frozen."""
        return getattr(self.network, "encoder", nn.Identity())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images: (batch, channels, depth, height, width): in training patches, else volumes of any size. Or all
                slices of one volume in order, (slices, channels, height, width).

        Returns:
            Logits of the same sizes. In `eval()` they are averages over overlapping windows, with Gaussian weights that
            favour the centre of each window (as in nnU-Net).
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
        """Use float32 on a CPU: its bf16 gradients of kernels over few voxels are not always finite (torch 2.14)."""
        with torch.autocast("cpu", enabled=False):
            return self.network(patches)
