"""The progress of a training, its files, and how an interrupted training resumes.

`last.pt` is written first, and `best.pt` and `history.csv` follow from it. After a kill at any moment, `publish` makes
them agree again.
"""

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from brats_helpers.files import whole_file
from brats_helpers.log import done, warn
from brats_helpers.scoring.overlap import mean_dice_of_epoch
from brats_helpers.training.checkpoint import CheckpointError, read_checkpoint, save_file
from brats_helpers.training.settings import Settings, shown

MAY_DIFFER = ("epochs", "minutes", "patience")
"""Settings that only decide when a training stops. It can resume with other values of these."""


@dataclass
class Progress:
    """The progress of a training.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the present epoch.
        loss_sum: the sum of these steps' losses.
        seconds: of training and validation.
        best: highest mean Dice of WT, TC and ET so far.
        best_epoch: the epoch that reached it; 0 before the first.
        start: finished epochs when the learning rate schedule began; 0 unless a finished training was extended.
        start_s: seconds at that moment.
        micro_batch: by device, samples at a time that fitted into memory; no entry if whole batches did.
        precision: of `steps.DTYPES`, by device.
        history: one row per epoch, see `loop.fit`.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0
    start: int = 0
    start_s: float = 0.0
    micro_batch: dict[str, int] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def finished(self, settings: Settings) -> bool:
        """Whether the training is over: all epochs are done, its time is up, or it no longer improves."""
        stale = settings.patience and self.epoch - max(self.best_epoch, self.start) >= settings.patience
        late = settings.minutes and self.seconds >= 60 * settings.minutes
        return bool(self.epoch >= settings.epochs or stale or late)

    def share(self, settings: Settings, steps: int, seconds: float) -> float:
        """Return the elapsed share of the learning rate schedule, from 0 to 1 or more, by steps or by the clock.

        Args:
            settings: of the training.
            steps: per epoch.
            seconds: of training and validation so far.
        """
        share = ((self.epoch - self.start) * steps + self.step) / ((settings.epochs - self.start) * steps)
        if settings.minutes:
            share = max(share, (seconds - self.start_s) / (60 * settings.minutes - self.start_s))
        return share

    def add(self, row: dict[str, float]) -> bool:
        """Record the row of a finished epoch; return whether it is the best so far."""
        self.history.append(row)
        self.epoch, self.step, self.loss_sum = row["epoch"], 0, 0.0
        dice = mean_dice_of_epoch(row)
        improved = dice > self.best
        if improved:
            self.best, self.best_epoch = dice, row["epoch"]
        return improved

    def extend(self) -> None:
        """Begin a new learning rate schedule for the epochs added to a finished training."""
        self.start, self.start_s = self.epoch, self.seconds


def resume(folder: Path, origin: dict, settings: Settings) -> tuple[Progress, dict | None]:
    """Decide where a training resumes.

    A training with the same settings and patients resumes. If it had finished and `epochs` is now higher, the added
    epochs get a learning rate schedule of their own. Otherwise the reason for starting afresh is printed.

    Args:
        folder: of the training.
        origin: the entries that all checkpoints of the new training share.
        settings: of the new training.

    Returns:
        The progress and the content of `last.pt`; a new progress and None if the training starts afresh.
    """
    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    if not last.exists():
        return Progress(), None
    try:
        saved = read_checkpoint(last)
        progress = Progress(**saved["progress"])
        if progress.best_epoch < progress.epoch and not best.exists():
            raise CheckpointError(f"{best}, which belongs to {last}, is missing.")
    except CheckpointError as error:
        warn(f"{error} The training starts afresh.")
        return Progress(), None
    if changes := _changes(origin, saved):
        warn(f"{last} belongs to another training ({', '.join(changes)}): starting afresh")
        return Progress(), None
    before = Settings(**saved["settings"])
    if settings.epochs > before.epochs and progress.finished(before):
        if settings.minutes and progress.seconds >= 60 * settings.minutes:
            warn(f"epochs {before.epochs} then, {settings.epochs} now, but its time is up: raise minutes as well")
            return progress, saved
        progress.extend()
        done(f"finished after epoch {progress.epoch}: continuing to epoch {settings.epochs} on a new schedule")
    elif progress.finished(settings):
        done(f"already trained: epoch {progress.epoch} was the last, {progress.best_epoch} the best")
    else:
        within = f" and {progress.step} steps" if progress.step else ""
        done(f"resuming after epoch {progress.epoch} of {settings.epochs}{within}")
    return progress, saved


def _changes(origin: dict, saved: dict) -> list[str]:
    """List the differences between a training and the one that a checkpoint belongs to."""
    now, then = origin["settings"] | origin, asdict(Settings(**saved["settings"])) | saved
    ignored = ("settings", "facts", *MAY_DIFFER)
    return [
        name if name.endswith("_cases") else f"{name} {shown(then.get(name))} then, {shown(now[name])} now"
        for name in now
        if name not in ignored and now[name] != then.get(name)
    ]


def set_aside(folder: Path) -> None:
    """Move the files of an earlier training into a folder of their own, and print its path."""
    names = ("checkpoints/best.pt", "checkpoints/last.pt", "history.csv")
    left = [folder / name for name in names if (folder / name).exists()]
    if not any(path.suffix == ".pt" for path in left):
        return
    number = 1
    while (place := folder / "checkpoints" / f"earlier-{number}").exists():
        number += 1
    place.mkdir()
    for path in left:
        path.rename(place / path.name)
    warn(f"the files of an earlier training are kept in {place}")


def publish(folder: Path, progress: Progress, origin: dict, averaged: dict) -> None:
    """Update `best.pt` and `history.csv` to agree with `last.pt`.

    Args:
        folder: of the training.
        progress: as in `last.pt`.
        origin: the entries that all its checkpoints share.
        averaged: EMA weights after the last whole epoch.
    """
    best = folder / "checkpoints" / "best.pt"
    if progress.best_epoch == progress.epoch and progress.step == 0 and not _holds(best, averaged):
        save_file(best, origin | {"model": averaged, "epoch": progress.epoch})
    with whole_file(folder / "history.csv") as file:
        writer = csv.DictWriter(file, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)


def _holds(best: Path, averaged: dict) -> bool:
    """Whether `best.pt` already has these weights, so that repeating a finished stage leaves it untouched."""
    try:
        weights = read_checkpoint(best)["model"]
    except CheckpointError:
        return False
    same_names = weights.keys() == averaged.keys()
    return same_names and all(torch.equal(weights[name], averaged[name].cpu()) for name in weights)
