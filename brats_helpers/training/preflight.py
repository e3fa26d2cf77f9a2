"""Before a training: how long it will take and how much memory, from a few steps that are measured."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from brats_helpers.log import duration, warn
from brats_helpers.machine import used_memory_gib
from brats_helpers.training.augment import augment, generators
from brats_helpers.training.dataset import Batch, Slices
from brats_helpers.training.patches import Patches
from brats_helpers.training.steps import fitted, gradients

STEPS = 3
"""Steps that are measured, after one that warms up."""
HOPELESS_HOURS = 12
"""A session of Colab or Kaggle ends before a training that takes longer."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What a training is expected to cost.

    Attributes:
        facts: what it runs on and how, for a person and for the manifest.
        batch_size: slices a step, over all processes.
        piece: slices at a time that fit into the memory of each process.
        steps: steps an epoch.
        shares: for each epoch the share of the encoder that is frozen in it.
        limit_s: seconds after which it stops in any case.
        step_s: seconds of a step in which the whole network trains.
        frozen_step_s: seconds of a step in which the encoder is frozen.
        validation_s: seconds of a validation.
        memory_gib: peak memory, see `machine.used_memory_gib`.
    """

    facts: dict[str, str | int | bool]
    batch_size: int
    piece: int
    steps: int
    shares: list[float]
    limit_s: float
    step_s: float
    frozen_step_s: float
    validation_s: float
    memory_gib: float

    def epochs_s(self, first: int, last: int) -> float:
        """Seconds of the epochs `first` to `last`, counted from 1, validations included."""
        frozen = sum(self.shares[first - 1 : last])
        count = max(last - first + 1, 0)
        return self.steps * (frozen * self.frozen_step_s + (count - frozen) * self.step_s) + count * self.validation_s

    def left_s(self, history: list[dict[str, float]]) -> float:
        """Seconds that are left: those of the epochs to come, by how much the last one took of what was expected."""
        epoch, seconds = history[-1]["epoch"], history[-1]["seconds"]
        last_s = seconds - (history[-2]["seconds"] if epoch > 1 else 0)
        left = self.epochs_s(epoch + 1, len(self.shares)) * last_s / self.epochs_s(epoch, epoch)
        return max(min(left, self.limit_s - seconds), 0)

    def predicted(self) -> dict[str, float]:
        """Epochs, seconds, speed and memory to expect."""
        total = len(self.shares)
        epochs = next((n for n in range(1, total) if self.epochs_s(1, n) >= self.limit_s), total)
        seconds = self.epochs_s(1, epochs)
        return {
            "epochs": epochs,
            "seconds_per_epoch": seconds / epochs,
            "seconds": min(seconds, self.limit_s),
            "slices_per_s": epochs * self.steps * self.batch_size / (seconds - epochs * self.validation_s),
            "memory_gib": self.memory_gib,
        }

    def announce(self) -> None:
        """Say what is expected, and whether that is hopeless."""
        predicted = self.predicted()
        facts = self.facts | ({"precision": "float32"} if self.facts.get("precision") == "no" else {})
        print(", ".join(f"{name} {value}" for name, value in facts.items()))
        print(
            f"expected: {predicted['epochs']} epochs of {self.steps} steps of {self.batch_size} slices,"
            f" {duration(predicted['seconds_per_epoch'])} each, {duration(predicted['seconds'])} in all,"
            f" {predicted['memory_gib']:.1f} GiB",
            flush=True,
        )
        if predicted["seconds"] > 3600 * HOPELESS_HOURS:
            warn(
                f"{duration(predicted['seconds'])} is longer than a session lasts: hopeless here. Take a GPU, or"
                " -p minutes 60, or fewer slices_per_epoch, or --profile small. Stopped at any time, it goes on later."
            )

    def report(self, history: list[dict[str, float]], piece: int) -> dict:
        """For the manifest: what was expected, and what `history` measured; `piece` slices at a time did fit."""
        last = history[-1]
        whole = [row for row in history if row["seconds"] < self.limit_s]  # the clock may have cut the last one short
        measured = {
            "epochs": last["epoch"],
            **({"seconds_per_epoch": whole[-1]["seconds"] / len(whole)} if whole else {}),
            "seconds": last["seconds"],
            "slices_per_s": sum(row["slices_per_s"] for row in history) / len(history),
            "memory_gib": last["memory_gib"],
        }
        facts = {"batch_size": self.batch_size, "slices_at_a_time": piece, "steps_per_epoch": self.steps}
        return self.facts | facts | {"predicted": self.predicted(), "measured": measured}


def measure(
    network: nn.Module,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    train: Slices | Patches,
    val: DataLoader,
    accelerator: Accelerator,
    *,
    ready: Callable[[nn.Module, float], None],
    augmentation: dict[str, str | int],
    workers: int,
    batch_size: int,
    piece: int,
    shares: list[float],
    **plan,
) -> Preflight:
    """Measure a few steps on copies of a network, and find how many slices fit into the memory at once.

    Args:
        network: on the device, before `accelerator` prepared it; stays as it is.
        loss_of: the loss of logits and masks, of this process alone.
        train: slices or patches to learn from.
        val: batches to validate on.
        accelerator: of the training.
        ready: makes a network train with a share of its encoder frozen.
        augmentation: `strength` and `modalities`, see `augment.augment`.
        workers: processes that load batches.
        batch_size: slices a step, over all processes.
        piece: slices at a time to begin with.
        shares: for each epoch the share of the encoder that is frozen in it.
        plan: `facts`, `steps` and `limit_s` of the `Preflight`.

    Raises:
        MemoryError: not even one slice fits.
    """
    device, rows = accelerator.device, batch_size // accelerator.num_processes

    def step_s(piece: int) -> float:
        """Seconds of one step of `own`."""
        seconds = []
        for k in range(STEPS + 1):
            began = time.perf_counter()
            batch = _some(train, k * rows, rows)
            loaded = time.perf_counter()
            masks = batch.masks.to(device)
            images, masks = augment(
                batch.images.to(device), masks, **augmentation, generators=generators(0, 0, range(rows))
            )
            gradients(own, loss_of, images, masks, accelerator, piece).item()
            optimizer.step()
            loading, computing = loaded - began, time.perf_counter() - loaded
            seconds.append(max(computing, loading / workers) if workers else loading + computing)
        return sorted(seconds[1:])[STEPS // 2]

    took = {}
    for frozen in [kind for kind, occurs in ((False, min(shares) < 1), (True, max(shares) > 0)) if occurs]:
        own = copy.deepcopy(network)
        ready(own, float(frozen))
        optimizer = torch.optim.AdamW(own.parameters())
        took[frozen], piece = fitted(step_s, piece)

    items = next(iter(val.batch_sampler))
    items = items[: max(len(items) // accelerator.num_processes, 1)]

    def batch_s(piece: int) -> float:
        """Seconds of one batch of the validation."""
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            batch = val.dataset.__getitems__(items)
            at_once = len(batch.images) if isinstance(train, Patches) else 2 * piece
            with torch.no_grad(), accelerator.autocast():
                for images, masks in zip(batch.images.split(at_once), batch.masks.split(at_once), strict=True):
                    loss_of(own.eval()(images.to(device)), masks.to(device)).item()
        return time.perf_counter() - began

    validation_s, piece = fitted(batch_s, piece)
    validation_s *= len(val)

    # The slowest process and the smallest piece count for all.
    each = gather_object([(piece, took.get(False, 0.0), took.get(True, 0.0), validation_s)])
    pieces, whole, frozen, validation = zip(*each, strict=True)
    return Preflight(
        piece=min(pieces),
        batch_size=batch_size,
        shares=shares,
        step_s=max(whole),
        frozen_step_s=max(frozen),
        validation_s=max(validation),
        memory_gib=used_memory_gib(device),
        **plan,
    )


def _some(slices: Slices | Patches, first: int, count: int) -> Batch:
    """Slices or patches from all over the patients, as a training would read them."""
    return slices.__getitems__([k * 7919 % len(slices) for k in range(first, first + count)])
