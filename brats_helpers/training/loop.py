"""Training: the loop from top to bottom, and the validation after each epoch.

Hugging Face accelerate places the work on one device, or on several with a process each, and runs trackers. Everything
else is here.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.files import write_json
from brats_helpers.labels import CLASSES, STRUCTURES
from brats_helpers.log import duration, progress
from brats_helpers.scoring.overlap import dice_scores
from brats_helpers.training.batch import OUTSIDE, Batch
from brats_helpers.training.checkpoint import FORMAT, fingerprint, seen_by, with_start
from brats_helpers.training.dataset import make_loader, patients, samples
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.preflight import Preflight, measure
from brats_helpers.training.progress import Progress, publish, resume, set_aside
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.session import Session, make_accelerator
from brats_helpers.training.settings import Settings
from brats_helpers.training.steps import NotFiniteError, autocast
from brats_helpers.training.tracking import check_tracker, tracked


class Stopped(KeyboardInterrupt):
    """The user stopped the training. A notebook shows only the message."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn an interrupt, from the keyboard or a notebook's stop button, into a plain sentence."""
    try:
        yield
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the error, which would keep the GPU's memory
        raise Stopped("stopped; run this again to resume from the last save") from None


@stoppable()
def fit(
    settings: Settings,
    train: Sequence[Packed],
    val: Sequence[Packed],
    folder: Path,
    *,
    device: torch.device,
    workers: int,
    checkpoint_minutes: float,
    deterministic: bool,
    tracker: str,
    facts: Mapping | None = None,
    follow: Callable[[list[dict]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a network, or resume from `folder/checkpoints/last.pt` if it has the same settings and patients.

    Writes `checkpoints/best.pt` (highest mean validation Dice of WT, TC and ET), `checkpoints/last.pt` (to resume
    from), `history.csv` and `preflight.json` (predicted and measured cost). Several processes share every batch. The
    loss and, on GPUs, BatchNorm are those of the whole batch.

    Args:
        settings: how to train.
        train: prepared cases for training.
        val: prepared cases that choose the best epoch, scored per patient over the whole volume.
        folder: for the checkpoints and the history.
        device: the device to train on.
        workers: processes that load batches; 0: this one does. The result does not depend on it.
        checkpoint_minutes: interval at which `last.pt` is written within an epoch; 0: only after every epoch.
        deterministic: see `machine.set_deterministic`.
        tracker: `none`, or a tracker of accelerate such as `mlflow`, see `tracking`.
        facts: about the patients, saved in every checkpoint; `patients` of an initial checkpoint are added.
        follow: called with the rows so far after every epoch.

    Returns:
        One row per epoch: losses, validation Dice by region and class, learning rate, slices per second, share of the
        time spent waiting for data, peak memory, seconds.

    Raises:
        FloatingPointError: the loss or its gradients are not finite; the message names the slices.
        MemoryError: not even one slice fits into the memory.
        Stopped: from the keyboard or by a notebook's stop button.
    """
    check_tracker(tracker)
    machine.set_deterministic(deterministic)
    accelerator = make_accelerator(device, tracker=tracker, folder=folder)

    # The data: balanced random slices or patches for training, and all validation patients.
    batches = _batches(settings, train, accelerator)
    loader = make_loader(batches.samples, batches, workers=workers, device=accelerator.device)
    val_loader = patients(
        val,
        context_slices=settings.context_slices,
        patch_size=settings.patch_size,
        batch_size=2 * settings.batch_size,
        workers=workers,
        device=accelerator.device,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )

    # Resume an earlier training with the same settings and patients.
    origin = _origin(settings, batches.samples.channels, train, val, facts or {})
    progress, saved = _resumed(folder, origin, settings, accelerator)
    if progress.finished(settings):
        return progress.history

    # The network, its EMA, the loss and the optimiser. A few trial steps choose precision and micro-batch.
    session = Session.build(settings, folder, origin, progress, accelerator)
    plan = measure(session, batches, val_loader, workers=workers, deterministic=deterministic)
    plan.announce()
    session.start(saved)
    how = {"checkpoint_minutes": checkpoint_minutes, "follow": follow or (lambda history: None)}
    try:
        with tracked(accelerator, tracker, settings, folder, resumed=saved is not None):
            _train(session, batches, loader, val, val_loader, plan, **how)
    except NotFiniteError as error:
        raise FloatingPointError(_not_finite_message(error, session, train)) from None
    accelerator.end_training()
    return progress.history


def _train(
    session: Session,
    batches: BalancedBatches,
    loader: DataLoader,
    val: Sequence[Packed],
    val_loader: DataLoader,
    plan: Preflight,
    *,
    checkpoint_minutes: float,
    follow: Callable[[list[dict]], None],
) -> None:
    """The loop: train for an epoch, validate, save; until the training is finished."""
    settings, progress, steps = session.settings, session.progress, len(batches)
    while not progress.finished(settings):
        epoch, first = progress.epoch + 1, progress.step
        session.ready(session.network, epoch)
        batches.epoch, batches.first = epoch, first
        waited, saved_at = 0.0, session.seconds(exact=True)
        began = asked = time.perf_counter()
        for batch in _bar(loader, epoch, first, steps):
            waited += time.perf_counter() - asked

            # The learning rate depends on the elapsed share of the training, by steps or by the clock.
            seconds = session.seconds()
            share = progress.share(settings, steps, seconds)
            if share >= 1:
                break
            session.set_lr(lr_factor(share, settings.warm_up))

            # Forward, backward, step.
            session.step(batch)
            if checkpoint_minutes and seconds - saved_at >= 60 * checkpoint_minutes:
                session.save()
                saved_at = seconds
            asked = time.perf_counter()
        if not progress.step and progress.history:
            break  # the time was up before the first step
        loss = session.loss_sum.item() / max(progress.step, 1)
        trained = time.perf_counter() - began

        # Validate the averaged weights.
        memory_gib = machine.used_memory_gib(session.device)
        how = {"precision": session.precision, "at_once": 2 * session.micro_batch}
        scores = validate(session.average.network, val_loader, val, session.criterion, session.accelerator, **how)
        memory_gib = max(plan.memory_gib, memory_gib, machine.used_memory_gib(session.device))
        row = {
            "epoch": epoch,
            "train_loss": loss,
            **scores,
            "lr": session.optimizer.param_groups[-1]["lr"],
            "slices_per_s": (progress.step - first) * settings.batch_size / trained,
            "waiting": waited / trained,
            "memory_gib": memory_gib,
            "seconds": session.seconds(exact=True),
        }
        _finish_epoch(session, row, plan)
        follow(progress.history)


def _finish_epoch(session: Session, row: dict[str, float], plan: Preflight) -> None:
    """Save an epoch: `last.pt` first, from which `best.pt` and `history.csv` can be rebuilt."""
    progress, settings = session.progress, session.settings
    session.check.look()
    improved = progress.add(row)
    session.loss_sum.zero_()
    if session.micro_batch < settings.batch_size // session.accelerator.num_processes:
        progress.micro_batch[plan.facts["device"]] = session.micro_batch
    if session.accelerator.is_main_process:
        write_json(session.folder / "preflight.json", plan.report(progress.history, session.micro_batch))
    session.save()
    session.publish()
    session.accelerator.log(row, step=row["epoch"])
    print(_line(progress.history, plan, settings, improved), flush=True)


def _batches(settings: Settings, train: Sequence[Packed], accelerator: Accelerator) -> BalancedBatches:
    """The training batches of this process."""
    processes = accelerator.num_processes
    if settings.batch_size % processes:
        raise ValueError(f"batch_size {settings.batch_size} cannot be shared evenly by {processes} processes.")
    data = samples(train, context_slices=settings.context_slices, patch_size=settings.patch_size)
    data.keep_on(accelerator.device)
    batches = BalancedBatches(
        data,
        n=settings.slices_per_epoch,
        batch_size=settings.batch_size,
        foreground=settings.foreground,
        seed=settings.seed,
        rank=accelerator.process_index,
        processes=processes,
    )
    if not len(batches):
        raise ValueError(f"batch_size {settings.batch_size} is more than the {batches.n} slices of an epoch.")
    return batches


def _resumed(folder: Path, origin: dict, settings: Settings, accelerator: Accelerator) -> tuple[Progress, dict | None]:
    """The progress and the content of `last.pt`, after the main process has made the folder agree with it."""
    progress, saved = resume(folder, origin, settings)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if saved is None:
            set_aside(folder)
        elif progress.history:  # a kill may have come between these files and last.pt
            publish(folder, progress, origin, saved["averaged"]["network"])
    return progress, saved


def _origin(settings: Settings, channels: int, train, val, facts: Mapping) -> dict:
    """The entries that all checkpoints of a training share."""
    seen = seen_by(settings.encoder_weights)
    return {
        "format": FORMAT,
        "settings": asdict(settings),
        "in_channels": channels,
        "train_cases": [*seen["train_cases"], *(case.id for case in train)],
        "val_cases": [*seen["val_cases"], *(case.id for case in val if case.id not in seen["val_cases"])],
        "fingerprint": fingerprint([*train, *val]),
        "facts": with_start(facts, settings.encoder_weights),
    }


@torch.no_grad()
def validate(
    network: nn.Module,
    loader: Iterable[Batch],
    cases: Sequence[Packed],
    criterion: CrossEntropyDice,
    accelerator: Accelerator,
    *,
    precision: str,
    at_once: int,
) -> dict[str, float]:
    """Return the loss over the voxels of the slices' boxes, and the mean over patients of the Dice of whole volumes.

    As in the test, padding is ignored, and everything outside the boxes counts as predicted background.

    Args:
        network: put into `eval()`.
        loader: see `dataset.patients`.
        cases: the patients of the loader, with their labels.
        criterion: the loss.
        accelerator: adds up the counts of several processes.
        precision: a key of `steps.DTYPES`.
        at_once: samples that go through the network together.
    """
    network.eval()
    n, device = len(CLASSES), accelerator.device
    tables = torch.zeros(len(cases) * n * n, dtype=torch.int64, device=device)
    sums = torch.zeros(4, n, dtype=torch.float64, device=device)
    for batch in loader:
        owner = batch.index[:, 0].view(-1, *[1] * (batch.masks.ndim - 1)).to(device, non_blocking=True)
        batch = batch.to(device)
        for images, masks, owners in zip(*(part.split(at_once) for part in (*batch[:2], owner)), strict=True):
            with autocast(device, precision):
                logits = network(images)
            inside = masks != OUTSIDE
            answers, truth = logits.movedim(1, -1)[inside], masks[inside].long()
            sums += criterion.sums(answers, truth)
            place = (owners.expand_as(masks)[inside] * n + truth) * n + answers.argmax(dim=1)
            tables += torch.bincount(place, minlength=len(tables))
    tables = accelerator.reduce(tables, reduction="sum").reshape(len(cases), n, n).cpu().numpy()
    for table, case in zip(tables, cases, strict=True):  # tumour outside the boxes counts as missed
        table[1:, 0] += case.counts[:, 1:].sum(axis=0) - table[1:].sum(axis=1)
    loss = criterion.value(accelerator.reduce(sums, reduction="sum")).item()
    means = pd.DataFrame(map(dice_scores, tables)).mean().add_prefix("dice_")
    return {"val_loss": loss} | means.to_dict()


def lr_factor(share: float, warm_up: float) -> float:
    """Learning rate as a share of the highest: a linear rise, then half a cosine down to 0.

    Args:
        share: elapsed share of the training, 0 to 1.
        warm_up: share of the training in which the learning rate rises.
    """
    if share < warm_up:
        return (share + 0.001) / (warm_up + 0.001)
    return 0.5 + 0.5 * math.cos(math.pi * (share - warm_up) / (1 - warm_up))


def _not_finite_message(error: NotFiniteError, session: Session, cases: Sequence[Packed]) -> str:
    last = session.folder / "checkpoints" / "last.pt"
    index = session.accelerator.gather(error.index.to(session.device)).tolist()
    slices = ", ".join(f"{cases[k].id} slice {cases[k].origin[0] + z}" for k, z in index)
    return (
        f"the loss or its gradient is not finite in epoch {session.progress.epoch + 1}, step {error.step}, on {slices}."
        f" Look at these slices, or lower lr{f'; {last} holds the state before' if last.exists() else ''}."
    )


def _bar(batches: Iterable[Batch], epoch: int, first: int, steps: int) -> Iterable[Batch]:
    """Show a progress bar over the steps of an epoch if a person is watching."""
    return progress(batches, what=f"epoch {epoch}", total=steps, unit="step", first=first, terminal=True)


def _line(history: list[dict], plan: Preflight, settings: Settings, improved: bool) -> str:
    """Summarise the last epoch in one line."""
    row = history[-1]
    scores = "  ".join(f"{name} {row[f'dice_{name}']:.3f}" for name in STRUCTURES)
    return (
        f"epoch {row['epoch']:>{len(str(settings.epochs))}}/{settings.epochs}"
        f"  loss {row['train_loss']:.3f}  val {row['val_loss']:.3f}  Dice {scores}"
        f"  lr {row['lr']:.1e}  {row['slices_per_s']:.0f} slices/s  left {duration(plan.left_s(history))}"
        f"{'  best so far' if improved else ''}"
    )
