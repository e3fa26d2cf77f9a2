"""Training: one loop from top to bottom, checkpoints, resume.

Hugging Face accelerate places the work on the device, or on several in as many processes, computes in mixed precision
and keeps trackers; everything else is here.
"""

import csv
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, broadcast
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from brats_helpers import machine
from brats_helpers.data.cache import Packed
from brats_helpers.files import whole_file, write_json
from brats_helpers.labels import CLASSES, REGIONS, STRUCTURES
from brats_helpers.log import done, duration
from brats_helpers.scoring.overlap import dice_scores
from brats_helpers.training.augment import augment, generators, seed_of
from brats_helpers.training.checkpoint import FORMAT, fingerprint, learnt_from, save_file, versions
from brats_helpers.training.dataset import BalancedSampler, Batch, make_loader
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import build_model, freeze_encoder, train_mode
from brats_helpers.training.patches import patients, samples
from brats_helpers.training.preflight import Preflight, measure
from brats_helpers.training.progress import resumable
from brats_helpers.training.settings import Settings
from brats_helpers.training.steps import fitted, gradients


class Stopped(KeyboardInterrupt):
    """Somebody stopped the training. A notebook shows the message alone."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn an interrupt, of the keyboard or of a notebook's stop button, into a plain sentence."""
    try:
        yield
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the error, and with it all that was on the GPU
        raise Stopped("stopped; run this again, and it goes on from where it was last saved") from None


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
    follow: Callable[[list[dict]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a network; pick up at `folder/checkpoints/last.pt` where that fits the settings and patients.

    Writes `checkpoints/best.pt` (highest mean validation Dice of WT, TC and ET), `checkpoints/last.pt` (all that is
    needed to go on), `history.csv` and `preflight.json` (cost as predicted and as measured). One of several processes
    where torchrun or `accelerate launch` started it: `batch_size` is then shared out, and nothing else changes; the
    loss, and on GPUs BatchNorm, are those of the whole batch.

    Args:
        settings: how to train.
        train: prepared cases to learn from.
        val: prepared cases to choose the epoch by, scored per patient over the whole volume.
        folder: where the checkpoints and the history go.
        device: the device to train on.
        workers: processes that load batches; 0 loads in this one. The result does not depend on it.
        checkpoint_minutes: write `last.pt` within an epoch too, every so many minutes; 0 only after every epoch.
        deterministic: see `machine.set_deterministic`.
        tracker: `none`, or a tracker of accelerate such as `tensorboard`.
        follow: called with the rows so far after every epoch.

    Returns:
        One row an epoch: losses, validation Dice by region and class, learning rate, slices per second, share of the
        time spent waiting for data, peak memory, seconds.

    Raises:
        FloatingPointError: the loss is not finite; the message names the slices.
        MemoryError: not even one slice fits into the memory.
        Stopped: by the keyboard or a notebook's stop button.
    """
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise ValueError(f"tracker {tracker!r} is not installed: pip install {tracker}, or -p tracker none.")
    machine.set_deterministic(deterministic)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if "WORLD_SIZE" not in os.environ:  # the device and the precision of an earlier training in this process
        AcceleratorState._reset_state(reset_partial_state=True)
    shares = [frozen_share(epoch, settings) for epoch in range(1, settings.epochs + 1)]
    precision = {"auto": machine.choose_precision(device), "float32": "no"}.get(settings.precision, settings.precision)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False, non_blocking=True),
        # Frozen layers, and the last ones of some encoders, which a U-Net does not use.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=None if tracker == "none" else tracker,
        project_dir=folder,
    )
    processes = accelerator.num_processes
    rows = settings.batch_size // processes
    if settings.batch_size % processes:
        raise ValueError(f"batch_size {settings.batch_size} cannot be shared out evenly among {processes} processes.")

    # The data: balanced random slices or patches to learn from, every slice of the validation patients in order.
    seen = {"context_slices": settings.context_slices, "patch_size": settings.patch_size}
    train_slices = samples(train, **seen)
    sampler = BalancedSampler(
        train_slices, n=settings.slices_per_epoch, foreground=settings.foreground, seed=settings.seed
    )
    steps = sampler.n // settings.batch_size
    if not steps:
        raise ValueError(f"batch_size {settings.batch_size} is more than the {sampler.n} slices of an epoch.")

    # Where an earlier training of the same settings and patients stopped, this one goes on.
    best, last = folder / "checkpoints" / "best.pt", folder / "checkpoints" / "last.pt"
    origin = {
        "format": FORMAT,
        "settings": asdict(settings),
        "in_channels": train_slices.channels,
        "train_cases": [*learnt_from(settings.encoder_weights), *(case.id for case in train)],
        "val_cases": [case.id for case in val],
        "fingerprint": fingerprint([*train, *val]),
    }
    state = {"epoch": 0, "step": 0, "losses": [], "seconds": 0.0, "best": -1.0, "best_epoch": 0, "history": []}
    state["pieces"] = {}  # slices at a time, by device
    if saved := resumable(last, origin):
        state = saved["state"]
        within = f" and {state['step']} of {steps} steps" if state["step"] else ""
        done(f"going on after epoch {state['epoch']} of {settings.epochs}{within}")
    if _finished(state, settings):
        return state["history"]

    train_slices.keep_on(accelerator.device)
    train_loader = make_loader(
        train_slices,
        batch_size=settings.batch_size,
        workers=workers,
        sampler=sampler,
        pin_memory=device.type == "cuda",
    )
    val_loader = patients(
        val,
        **seen,
        batch_size=2 * settings.batch_size,
        workers=workers,
        device=accelerator.device,
        processes=processes,
    )

    # The network, its averaged copy, the loss, the optimiser.
    torch.manual_seed(settings.seed)
    network = build_model(
        encoder=settings.encoder,
        weights=settings.encoder_weights,
        in_channels=train_slices.channels,
        patch_size=settings.patch_size,
        decoder=settings.decoder,
    ).to(accelerator.device)
    averaged = AveragedModel(network, multi_avg_fn=_average(settings.ema), use_buffers=True)
    criterion = CrossEntropyDice(class_weights=settings.class_weights).to(accelerator.device)
    groups = [
        {"params": network.encoder.parameters(), "share": settings.encoder_lr},
        {"params": [p for name, p in network.named_parameters() if not name.startswith("encoder.")], "share": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)

    def ready(network: nn.Module, share: float) -> None:
        """Make `network` train, `share` of its encoder frozen."""
        freeze_encoder(network, share)
        train_mode(network, frozen_statistics=settings.frozen_statistics and settings.encoder_weights != "none")

    augmentation = {"strength": settings.augment, "modalities": len(settings.modalities)}

    # What it will cost, and how many slices fit into the memory at once, which a kind of device is asked once.
    hardware = machine.describe(accelerator.device)
    facts = {
        "device": hardware["device"],
        # Patches are computed in float32 on a CPU, see `window.Windows`.
        "precision": "no" if device.type == "cpu" and settings.patch_size else hardware["precision"],
        "processes": processes,
        "deterministic": deterministic or device.type == "cpu",
    }
    plan = measure(
        network,
        criterion,
        train_slices,
        val_loader,
        accelerator,
        ready=ready,
        augmentation=augmentation,
        workers=workers,
        batch_size=settings.batch_size,
        piece=min(state["pieces"].get(facts["device"], rows), rows),
        shares=shares,
        steps=steps,
        limit_s=60 * settings.minutes or math.inf,
        facts=facts,
    )
    plan.announce()
    piece = plan.piece

    # From here on in the precision, and the processes, that accelerate has.
    if processes > 1 and device.type == "cuda":
        network = convert_sync_batchnorm(network)
    model, optimizer, train_loader, val_loader = accelerator.prepare(network, optimizer, train_loader, val_loader)
    accelerator.init_trackers("brats", config=asdict(settings))
    scaler = accelerator.scaler
    if saved:
        network.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    start = time.perf_counter() - state["seconds"]
    memory_gib = plan.memory_gib

    def loss_of(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """The loss of the whole batch; its gradients reach this process's slices, and are averaged over processes."""
        own = criterion.sums(logits, masks)
        whole = accelerator.reduce(own.detach(), reduction="sum")
        return criterion.value(whole + processes * (own - own.detach()))

    def clock() -> float:
        """Seconds of training so far: the main process's, for all of them, so that they agree when to stop."""
        seconds = time.perf_counter() - start
        return broadcast(torch.tensor(seconds, dtype=torch.float64, device=device)).item() if processes > 1 else seconds

    def save() -> None:
        state["seconds"] = clock()
        if piece < rows:
            state["pieces"][facts["device"]] = piece
        if accelerator.is_main_process:
            resume = {
                "model": network.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "state": state,
            }
            save_file(last, origin | {"versions": versions()} | resume)

    while not _finished(state, settings):
        epoch, first = state["epoch"] + 1, state["step"]
        ready(network, shares[epoch - 1])
        sampler.epoch = epoch
        waited, saved_at = 0.0, clock()
        began = asked = time.perf_counter()
        batches = accelerator.skip_first_batches(train_loader, first)
        for step, batch in enumerate(_bar(batches, epoch, first, steps), first):
            waited += time.perf_counter() - asked

            # How far the training is, by steps or by the clock, sets the learning rate.
            progress = ((epoch - 1) * steps + step) / (settings.epochs * steps)
            if settings.minutes:
                progress = max(progress, clock() / (60 * settings.minutes))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * group["share"] * lr_factor(progress, settings.warm_up)

            # All that is random follows from the seed and the place in the training.
            torch.manual_seed(seed_of(settings.seed, epoch, step, accelerator.process_index))
            place = step * settings.batch_size + accelerator.process_index * rows
            images, masks = augment(
                batch.images,
                batch.masks,
                **augmentation,
                generators=generators(settings.seed, epoch, range(place, place + rows)),
            )

            # Forward, backward, step.
            work = partial(gradients, model, loss_of, images, masks, accelerator)
            loss, piece = fitted(work, piece) if processes == 1 else (work(piece), piece)
            state["losses"].append(loss.item())
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            # Where a scaler is, it leaves out a step whose gradients are not finite, and scales less from then on.
            if not (math.isfinite(state["losses"][-1]) and (scaler is not None or norm.isfinite())):
                raise FloatingPointError(_what_was_in(accelerator.gather(batch.index), train, epoch, step, last))
            optimizer.step()
            averaged.update_parameters(network)

            state["step"] = step + 1
            if checkpoint_minutes and clock() - saved_at >= 60 * checkpoint_minutes:
                save()
                saved_at = clock()
            asked = time.perf_counter()
        if not state["losses"] and state["history"]:
            break  # the time was up before the first step
        trained = time.perf_counter() - began

        # Score the averaged weights, note how it went, keep what is needed to go on.
        memory_gib = max(memory_gib, machine.used_memory_gib(accelerator.device))
        at_once = None if settings.patch_size else 2 * piece
        scores = validate(averaged.module, val_loader, len(val), criterion, accelerator, at_once)
        memory_gib = max(memory_gib, machine.used_memory_gib(accelerator.device))
        seconds = clock()
        row = {
            "epoch": epoch,
            "train_loss": sum(state["losses"]) / max(len(state["losses"]), 1),
            **scores,
            "lr": optimizer.param_groups[-1]["lr"],
            "slices_per_s": (state["step"] - first) * settings.batch_size / trained,
            "waiting": waited / trained,
            "memory_gib": memory_gib,
            "seconds": seconds,
        }
        improved = mean_dice(row) > state["best"]
        if improved:
            state |= {"best": mean_dice(row), "best_epoch": epoch}
        state["history"].append(row)
        state |= {"epoch": epoch, "step": 0, "losses": []}
        if improved and accelerator.is_main_process:
            save_file(best, origin | {"model": averaged.module.state_dict(), "epoch": epoch})
        if accelerator.is_main_process:
            _write_history(folder / "history.csv", state["history"])
            write_json(folder / "preflight.json", plan.report(state["history"], piece))
        save()  # last: killed before it, the epoch is repeated, and with it the files above
        accelerator.log(row, step=epoch)
        print(_line(state["history"], plan, settings, improved), flush=True)
        if follow:
            follow(state["history"])
    accelerator.end_training()
    return state["history"]


@torch.no_grad()
def validate(
    network: nn.Module,
    loader: DataLoader,
    n_cases: int,
    criterion: CrossEntropyDice,
    accelerator: Accelerator,
    at_once: int | None,
) -> dict[str, float]:
    """Loss over all voxels of the slices, and Dice per patient over the whole volume, averaged over the patients.

    `at_once` slices go through the network together; None takes whole batches, as patients must be for 3D.

    What lies outside the slices that hold brain is background in reference and prediction alike, so
    one confusion table per patient, summed over batches and processes, is the whole volume's.
    """
    network.eval()
    n = len(CLASSES)
    tables = torch.zeros(n_cases * n * n, dtype=torch.int64, device=accelerator.device)
    sums = torch.zeros(4, n, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        parts = (tensor.split(at_once or len(tensor)) for tensor in batch)
        for images, masks, index in zip(*parts, strict=True):
            with accelerator.autocast():
                logits = network(images)
            sums += criterion.sums(logits, masks)
            place = (index[:, :1, None] * n + masks) * n + logits.argmax(dim=1)
            tables += torch.bincount(place.flatten(), minlength=len(tables))
    tables = accelerator.reduce(tables, reduction="sum").reshape(n_cases, n, n).cpu().numpy()
    loss = criterion.value(accelerator.reduce(sums, reduction="sum")).item()
    dice = [dice_scores(table) for table in tables]
    return {"val_loss": loss} | {f"dice_{name}": sum(case[name] for case in dice) / n_cases for name in STRUCTURES}


def mean_dice(row: dict[str, float]) -> float:
    """What the best epoch is chosen by: the mean of the Dice of WT, TC and ET in a row of the history."""
    return sum(row[f"dice_{region}"] for region in REGIONS) / len(REGIONS)


def lr_factor(progress: float, warm_up: float) -> float:
    """Learning rate as a share of the highest: a linear rise, then half a cosine down to 0.

    Args:
        progress: share of the training that is done, 0 to 1.
        warm_up: share of the training in which it rises.
    """
    if progress < warm_up:
        return (progress + 0.001) / (warm_up + 0.001)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - warm_up) / (1 - warm_up))


def frozen_share(epoch: int, settings: Settings) -> float:
    """Share of the encoder's layers that are frozen in `epoch` (from 1): all, then fewer each epoch, then none."""
    thawed = (epoch - settings.frozen_epochs) / (settings.unfreeze_epochs + 1)
    return 1 - min(max(thawed, 0.0), 1.0)


def _average(decay: float):
    """An exponential moving average whose memory grows to `decay` as steps are made; 0 keeps the weights themselves."""

    def update(averaged, current, n):
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(averaged, current, n)

    return update


def _finished(state: dict, settings: Settings) -> bool:
    stale = settings.patience and state["epoch"] - state["best_epoch"] >= settings.patience
    late = settings.minutes and state["seconds"] >= 60 * settings.minutes
    return bool(state["epoch"] >= settings.epochs or stale or late)


def _what_was_in(index: torch.Tensor, cases: Sequence[Packed], epoch: int, step: int, last: Path) -> str:
    slices = ", ".join(f"{cases[k].id} slice {cases[k].origin[0] + z}" for k, z in index.tolist())
    return (
        f"the loss or its gradient is not finite in epoch {epoch}, step {step}, on {slices}. Look at these slices, or"
        f" lower lr{f'; {last} holds all that went well before' if last.exists() else ''}."
    )


def _write_history(path: Path, history: list[dict]) -> None:
    with whole_file(path) as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def _bar(batches: Iterable[Batch], epoch: int, first: int, steps: int) -> Iterable[Batch]:
    """A bar over the steps of an epoch where a person watches."""
    return tqdm(
        batches,
        desc=f"epoch {epoch}",
        initial=first,
        total=steps,
        unit="step",
        leave=False,
        disable=not machine.watched(),
    )


def _line(history: list[dict], plan: Preflight, settings: Settings, improved: bool) -> str:
    """The epoch in one line."""
    row = history[-1]
    scores = "  ".join(f"{name} {row[f'dice_{name}']:.3f}" for name in STRUCTURES)
    return (
        f"epoch {row['epoch']:>{len(str(settings.epochs))}}/{settings.epochs}"
        f"  loss {row['train_loss']:.3f}  val {row['val_loss']:.3f}  Dice {scores}"
        f"  lr {row['lr']:.1e}  {row['slices_per_s']:.0f} slices/s  left {duration(plan.left_s(history))}"
        f"{'  best so far' if improved else ''}"
    )
