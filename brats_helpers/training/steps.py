"""One training step: gradient accumulation over micro-batches that fit into memory, and checks for finite values."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from brats_helpers.log import warn

Result = TypeVar("Result")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_SKIPPED = 20
"""Consecutive steps that fp16 may skip. Each halves the loss scale from 65,536; after 20 it is below 1."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context of a forward pass in one of `DTYPES`."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32")


def gradients(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
    precision: str,
    micro_batch: int,
) -> torch.Tensor:
    """Accumulate the model's gradients over a batch, `micro_batch` samples at a time; return the loss.

    The loss is the mean of the micro-batches' losses. Its cross-entropy equals that of the whole batch (approximately,
    with unequal class weights), but soft Dice and BatchNorm work on each micro-batch separately.

    Args:
        model: as `accelerator` prepared it; processes exchange their gradients after the last micro-batch.
        loss_of: the loss of logits and masks.
        images: (batch, channels, [depth,] height, width), on the device.
        masks: (batch, [depth,] height, width), class indices.
        accelerator: of the training.
        scaler: scales the loss, if it is enabled.
        precision: see `autocast`.
        micro_batch: samples at a time.
    """
    model.zero_grad()
    total = torch.zeros((), device=images.device)
    parts = list(zip(images.split(micro_batch), masks.split(micro_batch), strict=True))
    for k, (some, truth) in enumerate(parts, 1):
        with accelerator.no_sync(model) if k < len(parts) else nullcontext():
            with autocast(images.device, precision):
                logits = model(some)
            loss = loss_of(logits, truth) * (len(some) / len(images))
            scaler.scale(loss).backward()
        total += loss.detach()
    return total


def fitted(work: Callable[[int], Result], micro_batch: int) -> tuple[Result, int]:
    """Return `work(micro_batch)` and the micro-batch, which is halved, with a warning, as often as memory runs out.

    Not for work in which several processes wait for each other.

    Raises:
        MemoryError: not even one sample fits.
    """
    while True:
        try:
            return work(micro_batch), micro_batch
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if micro_batch == 1:
                raise MemoryError(
                    "one slice alone does not fit into the device's memory. Take a smaller encoder"
                    " (-p encoder tu-tf_efficientnet_lite0), fewer context_slices, a smaller patch_size in 3D, or"
                    " -p device cpu."
                ) from error
        micro_batch = -(-micro_batch // 2)
        warn(f"out of memory: continuing with {micro_batch} slices at a time and the same batch size")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class NotFiniteError(FloatingPointError):
    """A loss or a gradient is not finite.

    Attributes:
        step: of the epoch.
        index: the samples of that step, see `dataset.Batch`.
    """

    def __init__(self, step: int, index: torch.Tensor):
        super().__init__(f"step {step}")
        self.step, self.index = step, index


class FiniteCheck:
    """Checks that losses and gradients are finite; only every few steps, because each check waits for the GPU.

    Args:
        every: steps between two checks.
        scaled: whether a loss scale is used. It skips steps whose gradients are not finite, so these are an error only
            after more than `MOST_SKIPPED` in a row.
    """

    def __init__(self, *, every: int, scaled: bool):
        self.every, self.scaled = every, scaled
        self.skipped = 0
        self._waiting: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, index: torch.Tensor) -> None:
        """Record a step's loss and gradient norm, before the optimiser takes the step."""
        self._waiting.append((step, torch.stack([loss.isfinite(), norm.isfinite()]), index))
        if len(self._waiting) >= self.every:
            self.look()

    def look(self) -> None:
        """Check all steps since the last check. Call this before anything is saved.

        Raises:
            NotFiniteError: names the first faulty step.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        found = torch.stack([finite for _, finite, _ in waiting]).tolist()
        for (step, _, index), (loss, norm) in zip(waiting, found, strict=True):
            self.skipped = 0 if norm else self.skipped + 1
            if not loss or self.skipped > (MOST_SKIPPED if self.scaled else 0):
                raise NotFiniteError(step, index)
