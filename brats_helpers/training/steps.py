"""One step of the training: a batch in pieces that the memory of the device holds."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from brats_helpers.log import warn

Result = TypeVar("Result")


def gradients(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    masks: torch.Tensor,
    accelerator: Accelerator,
    piece: int,
) -> torch.Tensor:
    """Set the model's gradients to those of a batch, `piece` slices at a time; return the loss.

    In pieces the loss is the mean of theirs. The cross-entropy is then the batch's own (with unequal class weights
    nearly so), but soft Dice is that of each piece, and BatchNorm sees the pieces one by one.

    Args:
        model: as `accelerator` prepared it; in several processes their gradients meet at the last piece.
        loss_of: the loss of logits and masks.
        images: (batch, channels, [depth,] height, width), on the device.
        masks: (batch, [depth,] height, width), class indices.
        accelerator: scales the loss where the precision needs it.
        piece: slices at a time.
    """
    model.zero_grad()
    total = torch.zeros((), device=images.device)
    pieces = list(zip(images.split(piece), masks.split(piece), strict=True))
    for k, (some, truth) in enumerate(pieces, 1):
        with accelerator.no_sync(model) if k < len(pieces) else nullcontext():
            with accelerator.autocast():
                logits = model(some)
            loss = loss_of(logits, truth) * (len(some) / len(images))
            accelerator.backward(loss)
        total += loss.detach()
    return total


def fitted(work: Callable[[int], Result], piece: int) -> tuple[Result, int]:
    """`work(piece)` and the piece; as long as memory runs out, once more with half of it, and one line that says so.

    Not for work in which several processes wait for each other.

    Raises:
        MemoryError: not even one slice fits.
    """
    while True:
        try:
            return work(piece), piece
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if piece == 1:
                raise MemoryError(
                    "one slice alone does not fit into the device's memory. Take a smaller encoder"
                    " (-p encoder tu-tf_efficientnet_lite0), fewer context_slices, or -p device cpu."
                ) from error
        piece = -(-piece // 2)
        warn(f"out of memory: going on with {piece} slices at a time, gradients added up to the same batch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
