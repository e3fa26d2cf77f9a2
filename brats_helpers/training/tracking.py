"""The trackers of Hugging Face accelerate (TensorBoard, MLflow, wandb, ...): parameters, epochs, final scores.

A training and its final scores are one run of the tracker, also if the training was interrupted in between.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from brats_helpers.files import read_json, write_json
from brats_helpers.labels import REGIONS
from brats_helpers.log import warn
from brats_helpers.training.session import make_accelerator
from brats_helpers.training.settings import Settings

PROJECT = "brats"
"""The name under which a tracker collects the runs."""
_FILE = "tracker.json"
_RESUME = {
    "mlflow": (lambda run: run.info.run_id, lambda run_id: {"run_id": run_id}),
    "trackio": (lambda run: run.name, lambda name: {"name": name, "resume": "must"}),
    "wandb": (lambda run: run.id, lambda run_id: {"id": run_id, "resume": "allow"}),
}
"""By tracker: how to get a run's ID, and the arguments that resume the run with that ID.

TensorBoard needs neither, because its run is a folder. The other trackers start a new run instead.
"""


def check_tracker(tracker: str) -> None:
    """Raise `ValueError` unless `tracker` is `none` or a tracker of accelerate that is installed."""
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise ValueError(f"tracker {tracker!r} is not installed: pip install {tracker}, or -p tracker none.")


@contextmanager
def tracked(
    accelerator: Accelerator, tracker: str, settings: Settings, folder: Path, *, resumed: bool
) -> Iterator[None]:
    """Open the tracker's run for a training, and close it even if the training fails.

    Args:
        accelerator: see `session.make_accelerator`.
        tracker: see `loop.fit`.
        settings: the parameters that a new run gets.
        folder: of the training; `tracker.json` there names the run.
        resumed: whether the training is resumed, and with it the run.
    """
    known = _known(folder) if resumed else {}
    if known.get("tracker") == tracker:
        _resume(accelerator, tracker, known.get("run"))
    if tracker != "none" and not accelerator.trackers:
        accelerator.init_trackers(PROJECT, config={name: str(value) for name, value in asdict(settings).items()})
    if accelerator.is_main_process:
        _note(accelerator, tracker, folder)
    try:
        yield
    finally:
        _close(accelerator)


def log_scores(folder: Path, metrics: Mapping) -> None:
    """Add the mean test scores of WT, TC and ET to the tracker's run of a training; without a tracker, do nothing.

    The names contain the rule, and say if the patients are simulated or were seen in training:
    `test_brats2020_WT_dice`, `simulated_test_brats2020_WT_dice`. A tracker that fails is a warning.

    Args:
        folder: of the training.
        metrics: see `scoring.scores.collect`.
    """
    known = _known(folder)
    tracker = known.get("tracker", "none")
    if tracker == "none":
        return
    kind = "simulated_" * metrics["simulated"] + "seen_" * bool(metrics["leakage"]) + "test"
    scores = {
        f"{kind}_{metrics['rule']}_{region}_{name}": found["mean"]
        for region in REGIONS
        for name, found in metrics["summary"].get(region, {}).items()
        if found["mean"] is not None
    }
    try:
        check_tracker(tracker)
        accelerator = make_accelerator(torch.device("cpu"), tracker=tracker, folder=folder)
        _resume(accelerator, tracker, known.get("run"))
        if not accelerator.trackers:
            accelerator.init_trackers(PROJECT)
        accelerator.log(scores)
        _close(accelerator)
    except Exception as error:  # each tracker has errors of its own
        warn(f"the scores are not in {tracker}: {error}")


def _known(folder: Path) -> dict:
    """The tracker of a training and its run; empty if the training had none."""
    return read_json(folder / _FILE, {})


def _note(accelerator: Accelerator, tracker: str, folder: Path) -> None:
    """Keep the tracker's run in the training's folder, or nothing without a tracker."""
    if tracker == "none":
        (folder / _FILE).unlink(missing_ok=True)
        return
    identity = _RESUME[tracker][0](accelerator.get_tracker(tracker, unwrap=True)) if tracker in _RESUME else None
    write_json(folder / _FILE, {"tracker": tracker, "run": identity})


def _resume(accelerator: Accelerator, tracker: str, identity: str | None) -> None:
    """Resume the run with this ID; if that fails, warn and open none."""
    if tracker not in _RESUME or identity is None:
        return
    try:
        accelerator.init_trackers(PROJECT, init_kwargs={tracker: _RESUME[tracker][1](identity)})
    except Exception as error:  # each tracker has errors of its own
        warn(f"{tracker} cannot resume its run {identity} and starts another: {error}")
        accelerator.trackers.clear()


def _close(accelerator: Accelerator) -> None:
    """Let every tracker finish, so that the next training in this process can open its own."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()
