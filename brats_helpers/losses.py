"""Cross-entropy plus soft Dice."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class CrossEntropyDice(nn.Module):
    """Mean of cross-entropy over voxels plus 1 - mean soft Dice over the tumour classes, in float32.

    Soft Dice (Milletari et al. 2016, with the sum of both masses in the denominator as in
    Drozdzal et al. 2016) is taken over the whole batch, so that a slice without a class does not
    count as a miss; a class that the batch lacks altogether still costs its false positives.

    Args:
        class_weights: weight of each of the four classes (`cases.CLASSES`) in the cross-entropy.
    """

    def __init__(self, *, class_weights: Sequence[float]):
        super().__init__()
        self.register_buffer("class_weights", torch.tensor(class_weights, dtype=torch.float32))

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (batch, 4, height, width), any float dtype.
            masks: (batch, height, width), class indices, any integer dtype.
        """
        logits, masks = logits.float(), masks.long()
        cross_entropy = F.cross_entropy(logits, masks, self.class_weights)
        prob = logits.softmax(dim=1)[:, 1:]
        truth = F.one_hot(masks, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
        axes = (0, 2, 3)
        overlap = (prob * truth).sum(axes)
        mass = prob.sum(axes) + truth.sum(axes)
        dice = (2 * overlap + 1) / (mass + 1)  # one voxel more, so that an absent class costs nothing
        return cross_entropy + 1 - dice.mean()
