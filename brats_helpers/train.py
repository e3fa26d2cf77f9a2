"""Training: one loop from top to bottom, checkpoints, resume.

Hugging Face accelerate places the work on the device and computes in mixed precision; everything
else is here.
"""

import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from brats_helpers.augment import augment
from brats_helpers.cache import Packed
from brats_helpers.cases import CLASSES, REGIONS
from brats_helpers.dataset import BalancedSampler, Batch, Slices, make_loader
from brats_helpers.files import whole_file
from brats_helpers.log import done, duration, warn
from brats_helpers.losses import CrossEntropyDice
from brats_helpers.machine import choose_precision
from brats_helpers.metrics import STRUCTURES, dice_scores
from brats_helpers.model import build_model, freeze_encoder, train_mode

WARM_UP = 0.05
"""Share of the training over which the learning rate rises from 0."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides how a network is built and trained. Every checkpoint carries them.

    Attributes:
        modalities: comma-separated, in the order of the input channels.
        encoder: an encoder of segmentation-models-pytorch.
        encoder_weights: `imagenet`, `none`, or a file.
        context_slices: neighbouring slices on each side fed as further channels.
        epochs: passes at most.
        minutes: stop after so many minutes of training and validation; 0 sets no limit.
        batch_size: slices a step, over all processes.
        slices_per_epoch: slices an epoch; 0 takes every slice with brain once.
        foreground: share of slices with tumour; negative keeps the data's own share.
        augment: `none`, `basic` or `strong`.
        class_weights: comma-separated, of background, NCR, ED and ET in the cross-entropy.
        lr: highest learning rate of AdamW.
        encoder_lr: the encoder's learning rate as a share of `lr`.
        weight_decay: of AdamW.
        frozen_epochs: epochs at the start in which the encoder is frozen, statistics included.
        frozen_statistics: the encoder's BatchNorm keeps the statistics of its pretraining while its weights are
            trained; without pretrained weights there are none to keep, and they are learned.
        ema: decay of the averaged weights that are validated and kept; 0 keeps the weights themselves.
        patience: stop after so many epochs without a better mean Dice of WT, TC and ET; 0 never stops.
        seed: of every random choice.
    """

    modalities: str
    encoder: str
    encoder_weights: str
    context_slices: int
    epochs: int
    minutes: float
    batch_size: int
    slices_per_epoch: int
    foreground: float
    augment: str
    class_weights: str
    lr: float
    encoder_lr: float
    weight_decay: float
    frozen_epochs: int
    frozen_statistics: bool
    ema: float
    patience: int
    seed: int


def fit(
    settings: Settings,
    train: Sequence[Packed],
    val: Sequence[Packed],
    folder: Path,
    *,
    device: torch.device,
    workers: int,
) -> list[dict[str, float]]:
    """Train a network; pick up at `folder/checkpoints/last.pt` where that fits the settings and patients.

    Writes `checkpoints/best.pt` (highest mean validation Dice of WT, TC and ET), `checkpoints/last.pt`
    (all that is needed to go on) and `history.csv`, after every epoch.

    Args:
        settings: how to train.
        train: prepared cases to learn from.
        val: prepared cases to choose the epoch by, scored per patient over the whole volume.
        folder: where the checkpoints and the history go.
        device: the device to train on.
        workers: processes that load batches; 0 loads in this one. The result does not depend on it.

    Returns:
        One row an epoch: losses, validation Dice by region and class, learning rate, slices per second, seconds.
    """
    config = DataLoaderConfiguration(split_batches=True, even_batches=False)
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision=choose_precision(device), dataloader_config=config
    )
    torch.manual_seed(settings.seed)

    # The data: balanced random slices to learn from, every slice of the validation patients in order.
    train_slices = Slices(train, context_slices=settings.context_slices)
    val_slices = Slices(val, context_slices=settings.context_slices)
    sampler = BalancedSampler(
        train_slices, n=settings.slices_per_epoch, foreground=settings.foreground, seed=settings.seed
    )
    steps = sampler.n // settings.batch_size
    if not steps:
        raise ValueError(f"batch_size {settings.batch_size} is more than the {sampler.n} slices of an epoch.")
    loading = {"workers": workers, "pin_memory": device.type == "cuda"}
    train_loader = make_loader(train_slices, batch_size=settings.batch_size, sampler=sampler, **loading)
    val_loader = make_loader(val_slices, batch_size=2 * settings.batch_size, **loading)

    # The network, its averaged copy, the loss, the optimiser.
    network = build_model(
        encoder=settings.encoder, weights=settings.encoder_weights, in_channels=train_slices.channels
    ).to(accelerator.device, memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=_average(settings.ema), use_buffers=True)
    weights = [float(weight) for weight in settings.class_weights.split(",")]
    criterion = CrossEntropyDice(class_weights=weights).to(accelerator.device)
    groups = [
        {"params": network.encoder.parameters(), "share": settings.encoder_lr},
        {"params": [p for name, p in network.named_parameters() if not name.startswith("encoder.")], "share": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    model, optimizer, train_loader, val_loader = accelerator.prepare(network, optimizer, train_loader, val_loader)
    scaler = accelerator.scaler

    # Where an earlier training of the same settings and patients stopped, this one goes on.
    state = {"epoch": 0, "seconds": 0.0, "best": -1.0, "best_epoch": 0, "history": []}
    origin = {
        "settings": asdict(settings),
        "in_channels": train_slices.channels,
        "train_cases": [case.id for case in train],
        "val_cases": [case.id for case in val],
    }
    best, last = folder / "checkpoints" / "best.pt", folder / "checkpoints" / "last.pt"
    if saved := _resumable(last, origin):
        network.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        if scaler is not None and saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["rng"])
        state = saved["state"]
        done(f"going on after epoch {state['epoch']} of {settings.epochs}")

    for epoch in range(state["epoch"] + 1, settings.epochs + 1):
        if _finished(state, settings):
            break
        started = time.perf_counter()
        freeze_encoder(network, epoch <= settings.frozen_epochs)
        train_mode(network, frozen_statistics=settings.frozen_statistics and settings.encoder_weights != "none")
        sampler.epoch = epoch
        losses = []
        for step, batch in enumerate(train_loader):
            # How far the training is, by steps or by the clock, sets the learning rate.
            progress = ((epoch - 1) * steps + step) / (settings.epochs * steps)
            if settings.minutes:
                elapsed = state["seconds"] + time.perf_counter() - started
                progress = max(progress, elapsed / (60 * settings.minutes))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * group["share"] * lr_factor(progress)

            # Forward, backward, step.
            generator = _generator(settings.seed, epoch, step, accelerator.process_index)
            images, masks = augment(batch.images, batch.masks, strength=settings.augment, generator=generator)
            loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), masks)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(_what_was_in(batch, train, epoch, step, last))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(network)
        if not losses and state["history"]:
            break  # the time was up before the first step
        trained = time.perf_counter() - started

        # Score the averaged weights, note how it went, keep what is needed to go on.
        scores = validate(averaged.module, val_loader, len(val), criterion, accelerator)
        state["epoch"] = epoch
        state["seconds"] += time.perf_counter() - started
        row = {
            "epoch": epoch,
            "train_loss": sum(losses) / max(len(losses), 1),
            **scores,
            "lr": optimizer.param_groups[-1]["lr"],
            "slices_per_s": len(losses) * settings.batch_size / trained,
            "seconds": state["seconds"],
        }
        state["history"].append(row)
        mean = sum(row[f"dice_{region}"] for region in REGIONS) / len(REGIONS)
        improved = mean > state["best"]
        if improved:
            state["best"], state["best_epoch"] = mean, epoch
        if accelerator.is_main_process:
            if improved:
                save_file(best, origin | {"model": averaged.module.state_dict(), "epoch": epoch})
            resume = {
                "model": network.state_dict(),
                "averaged": averaged.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "rng": torch.get_rng_state(),
                "state": state,
            }
            save_file(last, origin | resume)
            _write_history(folder / "history.csv", state["history"])
            print(_line(row, settings, improved), flush=True)
    return state["history"]


@torch.no_grad()
def validate(
    network: nn.Module, loader: DataLoader, n_cases: int, criterion: nn.Module, accelerator: Accelerator
) -> dict[str, float]:
    """Loss over the slices, and Dice per patient over the whole volume, averaged over the patients.

    What lies outside the slices that hold brain is background in reference and prediction alike, so
    one confusion table per patient, summed over batches and processes, is the whole volume's.
    """
    network.eval()
    n = len(CLASSES)
    tables = torch.zeros(n_cases * n * n, dtype=torch.int64, device=accelerator.device)
    loss_sum = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        with accelerator.autocast():
            logits = network(batch.images.contiguous(memory_format=torch.channels_last))
        loss_sum += torch.stack([criterion(logits, batch.masks) * len(logits), loss_sum.new_tensor(len(logits))])
        place = (batch.index[:, :1, None] * n + batch.masks) * n + logits.argmax(dim=1)
        tables += torch.bincount(place.flatten(), minlength=len(tables))
    tables = accelerator.reduce(tables, reduction="sum").reshape(n_cases, n, n).cpu().numpy()
    loss_sum = accelerator.reduce(loss_sum, reduction="sum")
    dice = [dice_scores(table) for table in tables]
    means = {f"dice_{name}": sum(case[name] for case in dice) / n_cases for name in STRUCTURES}
    return {"val_loss": (loss_sum[0] / loss_sum[1]).item(), **means}


def lr_factor(progress: float) -> float:
    """Learning rate as a share of the highest: a linear rise, then half a cosine down to 0.

    Args:
        progress: share of the training that is done, 0 to 1.
    """
    if progress < WARM_UP:
        return (progress + 0.001) / (WARM_UP + 0.001)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def _average(decay: float):
    """An exponential moving average whose memory grows to `decay` as steps are made; 0 keeps the weights themselves."""

    def update(averaged, current, n):
        get_ema_multi_avg_fn(min(decay, (1 + int(n)) / (10 + int(n))))(averaged, current, n)

    return update


def _generator(*key: int) -> torch.Generator:
    """Random numbers that depend on the key alone: seed, epoch, step, process."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


def _finished(state: dict, settings: Settings) -> bool:
    stale = settings.patience and state["epoch"] - state["best_epoch"] >= settings.patience
    return bool(stale or (settings.minutes and state["seconds"] >= 60 * settings.minutes))


def _resumable(path: Path, origin: dict) -> dict | None:
    """The checkpoint at `path` if it is of the same settings and patients; else a warning that says what differs."""
    if not path.exists():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    now, then = (origin["settings"] | origin, saved["settings"] | saved)
    differ = [name for name in now if name != "settings" and now[name] != then.get(name)]
    if not differ:
        return saved
    changes = ", ".join(
        name if name.endswith("_cases") else f"{name} {then.get(name)} then, {now[name]} now" for name in differ
    )
    warn(f"{path} is of another training ({changes}): starting afresh")
    return None


def _what_was_in(batch: Batch, cases: Sequence[Packed], epoch: int, step: int, last: Path) -> str:
    slices = ", ".join(f"{cases[k].id} slice {cases[k].origin[0] + z}" for k, z in batch.index.tolist())
    return (
        f"the loss is not finite in epoch {epoch}, step {step}, on {slices}. Look at these slices, or lower lr;"
        f" {last} holds the last epoch that went well."
    )


def save_file(path: Path, content: dict) -> None:
    """`torch.save` by `whole_file`: a kill at any moment leaves the old checkpoint or the new one."""
    with whole_file(path, "wb") as file:
        torch.save(content, file)


def _write_history(path: Path, history: list[dict]) -> None:
    with whole_file(path) as file:
        writer = csv.DictWriter(file, history[0])
        writer.writeheader()
        writer.writerows(history)


def _line(row: dict, settings: Settings, improved: bool) -> str:
    """The epoch in one line."""
    scores = "  ".join(f"{name} {row[f'dice_{name}']:.3f}" for name in STRUCTURES)
    left = row["seconds"] / row["epoch"] * (settings.epochs - row["epoch"])
    if settings.minutes:
        left = min(left, 60 * settings.minutes - row["seconds"])
    return (
        f"epoch {row['epoch']:>{len(str(settings.epochs))}}/{settings.epochs}"
        f"  loss {row['train_loss']:.3f}  val {row['val_loss']:.3f}  Dice {scores}"
        f"  lr {row['lr']:.1e}  {row['slices_per_s']:.0f} slices/s  left {duration(max(left, 0))}"
        f"{'  best so far' if improved else ''}"
    )
