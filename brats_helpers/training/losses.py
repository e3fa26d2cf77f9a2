"""Cross-entropy plus soft Dice."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class CrossEntropyDice(nn.Module):
    """Mean of cross-entropy over voxels plus 1 - mean soft Dice over the tumour classes, in float32.

    Soft Dice (Milletari et al. 2016, with the sum of both masses in the denominator as in Drozdzal et al. 2016) is
    computed over the whole batch, so that a slice without a class does not count as a miss. A class that the whole
    batch lacks still costs its false positives.

    The loss follows from a few sums over voxels (`sums`, `value`). Sums added up over batches, or over the processes
    that share a batch, give the loss of all their voxels.

    Args:
        class_weights: weight of each of the four classes (`labels.CLASSES`) in the cross-entropy.
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
        """Return the loss of `sums`, which may be added up over several batches."""
        cross_entropy, overlap, predicted, true = sums
        weights = self.class_weights.to(sums.dtype)
        dice = (2 * overlap + 1) / (predicted + true + 1)  # 1 is added so that an absent class costs nothing
        weight = (weights * true).sum().clamp(min=1e-6)  # 0 if every class that is present has weight 0
        return (weights * cross_entropy).sum() / weight + 1 - dice[1:].mean()
