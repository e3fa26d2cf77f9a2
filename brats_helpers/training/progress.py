"""How far a training is, what it leaves in its folder, and whether an interrupted one can be resumed.

`last.pt` is the truth: it is written first, and `best.pt` and `history.csv` follow from it. Whenever the training is
killed, `resume` brings them in line again.
"""

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from brats_helpers.files import whole_file
from brats_helpers.labels import REGIONS
from brats_helpers.log import done, warn
from brats_helpers.training.checkpoint import CheckpointError, read_checkpoint, save_file
from brats_helpers.training.settings import Settings, shown

MAY_DIFFER = ("epochs", "minutes", "patience")
"""Settings that only decide when a training stops: it can be resumed with other values."""


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: whole epochs done.
        step: steps done of the epoch begun.
        loss_sum: the sum of these steps' losses.
        seconds: of training and validation.
        best: highest mean Dice of WT, TC and ET so far.
        best_epoch: the epoch that reached it; 0 before the first.
        start: epochs done when the learning rate schedule began, 0 unless a finished training was continued.
        start_s: seconds at that moment.
        micro_batch: samples at a time that fitted into the memory, by device; none where whole batches do.
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
        """How much of the learning rate schedule is over, 0 to 1 or more, by steps or by the clock.

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
        """Note the row of an epoch that is over; return whether it is the best so far."""
        self.history.append(row)
        self.epoch, self.step, self.loss_sum = row["epoch"], 0, 0.0
        improved = mean_dice(row) > self.best
        if improved:
            self.best, self.best_epoch = mean_dice(row), row["epoch"]
        return improved

    def extend(self) -> None:
        """Begin another learning rate schedule, for the epochs that are added to a finished training."""
        self.start, self.start_s = self.epoch, self.seconds


def mean_dice(row: dict[str, float]) -> float:
    """What the best epoch is chosen by: the mean of the Dice of WT, TC and ET in a row of the history."""
    return sum(row[f"dice_{region}"] for region in REGIONS) / len(REGIONS)


def resume(folder: Path, origin: dict, settings: Settings) -> tuple[Progress, dict | None]:
    """Find out where to go on.

    A training of the same settings and patients is resumed, also if it had finished and `epochs` is now higher: the
    added epochs get a learning rate schedule of their own. Of anything else the reason is said.

    Args:
        folder: of the training.
        origin: what a checkpoint of the training now begun carries.
        settings: of the training now begun.

    Returns:
        The progress and the content of `last.pt`; None with a new progress where the training starts afresh.
    """
    last, best = folder / "checkpoints" / "last.pt", folder / "checkpoints" / "best.pt"
    if not last.exists():
        return Progress(), None
    try:
        saved = read_checkpoint(last)
        progress = Progress(**saved["progress"])
        if progress.best_epoch < progress.epoch and not best.exists():
            raise CheckpointError(f"{best} is gone, which {last} goes with.")
    except CheckpointError as error:
        warn(f"{error} The training starts afresh.")
        return Progress(), None
    if changes := _changes(origin, saved):
        warn(f"{last} is of another training ({', '.join(changes)}): starting afresh")
        return Progress(), None
    before = Settings(**saved["settings"])
    if settings.epochs > before.epochs and progress.finished(before):
        if settings.minutes and progress.seconds >= 60 * settings.minutes:
            warn(f"epochs {before.epochs} then, {settings.epochs} now, but its time is up: raise minutes as well")
            return progress, saved
        progress.extend()
        done(f"finished after epoch {progress.epoch}: going on to epoch {settings.epochs}, on a new schedule")
    elif progress.finished(settings):
        done(f"trained before: epoch {progress.epoch} was the last, {progress.best_epoch} the best")
    else:
        within = f" and {progress.step} steps" if progress.step else ""
        done(f"going on after epoch {progress.epoch} of {settings.epochs}{within}")
    return progress, saved


def _changes(origin: dict, saved: dict) -> list[str]:
    """What differs between a training and the one that a checkpoint is of."""
    now, then = origin["settings"] | origin, asdict(Settings(**saved["settings"])) | saved
    ignored = ("settings", "facts", *MAY_DIFFER)
    return [
        name if name.endswith("_cases") else f"{name} {shown(then.get(name))} then, {shown(now[name])} now"
        for name in now
        if name not in ignored and now[name] != then.get(name)
    ]


def set_aside(folder: Path) -> None:
    """Move what an earlier training left out of the way of one that starts afresh, and say where to."""
    names = ("checkpoints/best.pt", "checkpoints/last.pt", "history.csv")
    left = [path for path in (folder / name for name in names) if path.exists()]
    if not any(path.suffix == ".pt" for path in left):
        return
    number = 1
    while (place := folder / "checkpoints" / f"earlier-{number}").exists():
        number += 1
    place.mkdir()
    for path in left:
        path.rename(place / path.name)
    warn(f"what an earlier training left is kept in {place}")


def publish(folder: Path, progress: Progress, origin: dict, averaged: dict) -> None:
    """Bring `best.pt` and `history.csv` in line with `last.pt`.

    Args:
        folder: of the training.
        progress: as in `last.pt`.
        origin: what a checkpoint of the training carries.
        averaged: weights of the averaged network after the last whole epoch.
    """
    best = folder / "checkpoints" / "best.pt"
    if progress.best_epoch == progress.epoch and progress.step == 0 and not _holds(best, averaged):
        save_file(best, origin | {"model": averaged, "epoch": progress.epoch})
    with whole_file(folder / "history.csv") as file:
        writer = csv.DictWriter(file, progress.history[0])
        writer.writeheader()
        writer.writerows(progress.history)


def _holds(best: Path, averaged: dict) -> bool:
    """Whether `best.pt` has these weights already, so that repeating a finished stage leaves it untouched."""
    try:
        weights = read_checkpoint(best)["model"]
    except CheckpointError:
        return False
    same_names = weights.keys() == averaged.keys()
    return same_names and all(torch.equal(weights[name], averaged[name].cpu()) for name in weights)
