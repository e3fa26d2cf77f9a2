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

    All of it follows from a few sums over voxels (`sums`, `value`), so that the loss over several
    batches, or over the parts of a batch in several processes, is that of all their voxels.

    Args:
        class_weights: weight of each of the four classes (`cases.CLASSES`) in the cross-entropy.
    """

    def __init__(self, *, class_weights: Sequence[float]):
        super().__init__()
        self.register_buffer("class_weights", torch.tensor(class_weights, dtype=torch.float32))

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """
        Args:
            logits: (batch, 4, [depth,] height, width), any float dtype.
            masks: (batch, [depth,] height, width), class indices, any integer dtype.
        """
        return self.value(self.sums(logits, masks))

    def sums(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Sums over voxels, float32 (4, 4): for each class cross-entropy, overlap, predicted mass, true mass."""
        log_prob = logits.float().log_softmax(dim=1)
        truth = F.one_hot(masks.long(), logits.shape[1]).movedim(-1, 1).float()
        prob = log_prob.exp()
        parts = (-log_prob * truth, prob * truth, prob, truth)
        return torch.stack([part.sum(dim=(0, *range(2, logits.ndim))) for part in parts])

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        """The loss that `sums`, of one batch or added up over several, amount to."""
        cross_entropy, overlap, predicted, true = sums
        weights = self.class_weights.to(sums.dtype)
        dice = (2 * overlap + 1) / (predicted + true + 1)  # one voxel more, so that an absent class costs nothing
        weight = (weights * true).sum().clamp(min=1e-6)  # 0 where every class that is present weighs nothing
        return (weights * cross_entropy).sum() / weight + 1 - dice[1:].mean()
