"""Changes to training and prediction that are no setting of the suite's experiments, for benchmarks/variants.py.

Each is a context in which the suite's own code runs with one part replaced.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from brats_helpers.evaluation import experiments
from brats_helpers.labels import CLASSES, REGIONS
from brats_helpers.training import model
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.session import Session

START = 4.0
"""Subtracted from the sigmoids' logits, so that they, too, begin at background nearly everywhere, see `build_model`."""
MEMBERS = torch.tensor([[float(k in classes) for classes in REGIONS.values()] for k in range(len(CLASSES))])
"""Which class (row) belongs to which of WT, TC and ET (column)."""


def change(name: str) -> AbstractContextManager:
    """The context of a change by its name; an empty name changes nothing."""
    return CHANGES[name]() if name else nullcontext()


def folder_of(name: str) -> str:
    """A folder for results of a change, which also depends on this file's content."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:6]
    return f"{name.replace(' ', '-')}-{digest}" if name else ""


@contextmanager
def region_dice() -> Iterator[None]:
    """The soft Dice of WT, TC and ET in place of that of NCR, ED and ET; cross-entropy and outputs stay.

    All classes have the weight 1, whatever `class_weights` says.
    """
    of_classes = CrossEntropyDice.sums

    def sums(self, logits, masks):
        cross_entropy = of_classes(self, logits, masks)[0]
        probable = logits.float().softmax(dim=1).movedim(1, -1) @ MEMBERS.to(logits.device)
        return _stacked(cross_entropy, probable.movedim(-1, 1), masks)

    def value(self, sums):
        return sums[0].sum() / sums[3, 0] + 1 - _dice(sums)

    with patch.object(CrossEntropyDice, "sums", sums), patch.object(CrossEntropyDice, "value", value):
        yield


@contextmanager
def sigmoid_regions() -> Iterator[None]:
    """Three sigmoids for WT, TC and ET, as in nnU-Net's training on regions: binary cross-entropy plus their Dice.

    The network keeps its four outputs; the first one is not used. In `eval()` a voxel gets the class that follows from
    the regions with more than half of the probability, ET first, in logits that are certain of it. `class_weights` has
    no effect.
    """

    def sums(self, logits, masks):
        answers = logits[:, 1:].float()
        truth = _regions(masks, answers)
        entropy = F.binary_cross_entropy_with_logits(answers, truth, reduction="none")
        return _stacked(_padded(entropy), answers.sigmoid(), masks)

    def value(self, sums):
        return sums[0].sum() / (len(REGIONS) * sums[3, 0]) + 1 - _dice(sums)

    class Sigmoid(model.SlicesUnet):
        def forward(self, images):
            logits = super().forward(images) - START
            if self.training:
                return logits
            whole, core, enhancing = (logits[:, 1:].float() > 0).unbind(dim=1)
            classes = torch.where(enhancing, 3, torch.where(core, 1, torch.where(whole, 2, 0)))
            return 20 * F.one_hot(classes, len(CLASSES)).movedim(-1, 1).float()

    with (
        patch.object(CrossEntropyDice, "sums", sums),
        patch.object(CrossEntropyDice, "value", value),
        patch.object(model, "SlicesUnet", Sigmoid),
    ):
        yield


@contextmanager
def deep_supervision() -> Iterator[None]:
    """The decoder's blocks at a half and a quarter of the resolution answer, too; their losses count 1/2 and 1/4.

    The further layers start from random weights, so a training cannot start from a whole network.
    """

    class Deep(model.SlicesUnet):
        def __init__(self, *args, decoder_channels, **kwargs):
            super().__init__(*args, decoder_channels=decoder_channels, **kwargs)
            quarter, half = decoder_channels[2:4]
            self.heads = nn.ModuleList([nn.Conv2d(half, len(CLASSES), 1), nn.Conv2d(quarter, len(CLASSES), 1)])

        def forward(self, images):
            if not self.training:
                return super().forward(images)
            within = []
            blocks = self.decoder.blocks[2:4]
            hooks = [block.register_forward_hook(lambda _, __, out: within.append(out)) for block in blocks]
            logits = super().forward(images)
            for hook in hooks:
                hook.remove()
            quarter, half = within
            logits.within = [self.heads[0](half), self.heads[1](quarter)]
            return logits

    plain = Session.loss

    def loss(self, logits, masks):
        half, quarter = logits.within
        parts = [plain(self, logits, masks), plain(self, half, masks[..., ::2, ::2])]
        parts.append(plain(self, quarter, masks[..., ::4, ::4]))
        return (parts[0] + parts[1] / 2 + parts[2] / 4) / 1.75

    with patch.object(model, "SlicesUnet", Deep), patch.object(Session, "loss", loss):
        yield


@contextmanager
def by_patient() -> Iterator[None]:
    """Draw equally many slices of each patient, so that large tumours do not make up more of an epoch."""

    def draw(self, random: np.random.Generator) -> np.ndarray:
        owner = self.samples.index[:, 0]
        return random.permutation(np.concatenate([_in_turns(pool, owner, n, random) for pool, n in self.pools]))

    with patch.object(BalancedBatches, "_draw", draw):
        yield


@contextmanager
def flips() -> Iterator[None]:
    """Predict each slice and its mirror image, and average."""
    plain = experiments.predict

    def predict(*args, **how):
        return plain(*args, **how | {"flips": True})

    with patch.object(experiments, "predict", predict):
        yield


def _in_turns(pool: np.ndarray, owner: np.ndarray, n: int, random: np.random.Generator) -> np.ndarray:
    """`n` items of `pool`, as many of each owner as of any other; none twice before all of its owner's were drawn."""
    owners = np.unique(owner[pool])
    if not n or not len(owners):
        return pool[:0]
    each = -(-n // len(owners))
    drawn = []
    for one in owners:
        own = pool[owner[pool] == one]
        rounds = [random.permutation(own) for _ in range(-(-each // len(own)))]
        drawn.append(np.concatenate(rounds)[:each])
    return np.stack(drawn, axis=1).reshape(-1)[:n]


def _regions(masks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Whether each voxel belongs to WT, TC and ET, float32 (batch, 3, ...)."""
    return (F.one_hot(masks.long(), len(CLASSES)).float() @ MEMBERS.to(like.device)).movedim(-1, 1)


def _stacked(entropy: torch.Tensor, probable: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Rows of entropy, overlap, predicted and true mass, (4, 4); in the column before the regions, voxels last."""
    truth = _regions(masks, probable)
    rows = torch.stack([entropy, *map(_padded, (probable * truth, probable, truth))])
    voxels = torch.zeros_like(rows)
    voxels[3, 0] = masks.numel()
    return rows + voxels


def _padded(parts: torch.Tensor) -> torch.Tensor:
    """Sums over voxels of (batch, 3, ...), with a 0 before those of the regions."""
    return F.pad(parts.sum(dim=(0, *range(2, parts.ndim))), (1, 0))


def _dice(sums: torch.Tensor) -> torch.Tensor:
    overlap, predicted, true = sums[1:, 1:]
    return ((2 * overlap + 1) / (predicted + true + 1)).mean()


CHANGES: dict[str, Callable[[], AbstractContextManager]] = {
    "region dice": region_dice,
    "sigmoid regions": sigmoid_regions,
    "deep supervision": deep_supervision,
    "by patient": by_patient,
    "flips": flips,
}
"""By name, as --variant "NAME: change=..." gives them."""
