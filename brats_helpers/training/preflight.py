"""Before training: choose sizes that fit the device, pick the faster precision, and estimate the cost."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader

from brats_helpers import machine
from brats_helpers.log import duration, warn
from brats_helpers.training.batch import Draw
from brats_helpers.training.model import TRAINING_BYTES, patch_sizes
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.session import Session, frozen_share
from brats_helpers.training.settings import Execution, Settings, SettingsError, check_text, from_text, sees_patches
from brats_helpers.training.steps import autocast, fitted, gradients
from brats_helpers.training.weights import choose_encoder, choose_start

SLICES = {"cuda": 16, "cpu": 4}
"""Default number of slices per step. Small steps are as fast on a CPU, and more steps learn more."""
EDGES = (128, 96, 64, 32)
LARGEST = {"cuda": (128, 8), "cpu": (64, 2)}
"""Largest edge and number of patches per step. A CPU has memory for more, but would take minutes per step."""
LOOKED_AT = 64
"""Batches of the first epoch from which the timed ones are chosen."""
GAIN = 1.25
"""How many times faster half precision must be to be chosen. A busy machine hides smaller gains in noise."""
LONG_HOURS = 12
"""A session of Colab or Kaggle ends after this many hours."""


def settle(text: str, *, patients: int, device: torch.device, **values) -> tuple[Settings, Execution]:
    """Complete the settings of a training: what is given, then the defaults, and sizes that fit the device.

    Args:
        text: further settings, such as `"ema=0.9, warm_up=0.1"`, see `settings.from_text`.
        patients: number of patients to learn from.
        device: to train on.
        values: the settings that the notebook has parameters for. `encoder_weights` auto depends on `patients` (see
            `weights.choose_start`), `encoder` auto on the available weights (see `weights.choose_encoder`),
            `batch_size` 0 on the device (see `choose_sizes`).

    Returns:
        The settings of the network and its training, and how it is carried out.

    Raises:
        SettingsError: a setting is unknown, missing, given twice or has a value that is not allowed.
    """
    further = from_text(text)
    for name, value in further.items():
        check_text(name, value)
    if twice := [name for name in further if name in values]:
        raise SettingsError(f"settings: {twice[0]} is a parameter of the notebook. Set it there.")
    if values["encoder_weights"] == "auto":
        values["encoder_weights"] = choose_start(values["encoder"], patients, own_decoder="decoder" in further)
    encoder = choose_encoder(values["encoder"], values["encoder_weights"])
    sizes = {"patch_size": int(further.pop("patch_size", 0)), "batch_size": values["batch_size"]}
    sizes = choose_sizes(encoder, **sizes, in_channels=len(values["modalities"]), device=device)
    values |= {"encoder": encoder, "patch_size": sizes[0], "batch_size": sizes[1]}
    carried_out = {name: further.pop(name) for name in list(further) if name in Execution.__dataclass_fields__}
    return Settings.parse(**values | further), Execution.parse(**carried_out)


def choose_sizes(
    encoder: str, *, patch_size: int, batch_size: int, in_channels: int, device: torch.device
) -> tuple[int, int]:
    """Replace a patch or batch size of 0: the largest patches of which two fit into memory, then as many as fit.

    Args:
        encoder: see `model.build_model`.
        patch_size: edge in voxels; 0: chosen by memory.
        batch_size: slices or patches per step; 0: `SLICES`, or as many patches as fit.
        in_channels: modalities.
        device: to train on.

    Returns:
        Patch size (unchanged for a 2D network) and batch size.

    Raises:
        SettingsError: there is no such 3D network.
    """
    if not sees_patches(encoder):
        return patch_size, batch_size or SLICES[device.type]
    smallest_edge, _ = patch_sizes(encoder)
    largest_edge, largest_batch = LARGEST[device.type]
    facts = machine.describe(device)
    memory = facts.get("device_memory_gib", facts.get("memory_gib", 8)) * 2**30
    whole = facts["precision"] == "no" or device.type == "cpu"  # float32, see `window.Windows`
    # Half of the memory is for everything else.
    voxel = (TRAINING_BYTES[encoder] + 4 * in_channels) * (2 if whole else 1)
    edges = [patch_size] if patch_size else [edge for edge in EDGES if smallest_edge <= edge <= largest_edge]
    edge = next((edge for edge in edges if 2 * voxel * edge**3 <= memory), edges[-1])
    fitting = int(memory / (voxel * edge**3))
    return edge, batch_size or max(n for n in (1, 2, 4, 8) if n <= max(min(fitting, largest_batch), 1))


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The expected cost of a training.

    Attributes:
        facts: about device and precision, to be printed and recorded in the manifest.
        batch_size: slices per step, over all processes.
        steps: per epoch.
        epochs: planned, counted from the first.
        limit_s: seconds after which training stops.
        step_s: seconds of a step that trains the whole network.
        validation_s: seconds of a validation.
        memory_gib: peak memory, see `machine.used_memory_gib`.
    """

    facts: dict[str, str | int | bool]
    batch_size: int
    steps: int
    epochs: int
    limit_s: float
    step_s: float
    validation_s: float
    memory_gib: float

    @property
    def epoch_s(self) -> float:
        """Seconds of an epoch with its validation."""
        return self.steps * self.step_s + self.validation_s

    def left_s(self, history: list[dict[str, float]]) -> float:
        """Return the remaining seconds, if each epoch takes as long as the last one."""
        epoch, seconds = history[-1]["epoch"], history[-1]["seconds"]
        last_s = seconds - (history[-2]["seconds"] if len(history) > 1 else 0)
        return max(min((self.epochs - epoch) * last_s, self.limit_s - seconds), 0)

    def predicted(self) -> dict[str, float]:
        """Return the expected epochs, seconds, speed and memory."""
        epochs = self.epochs
        if self.limit_s < epochs * self.epoch_s:
            epochs = max(math.ceil(self.limit_s / self.epoch_s), 1)
        return {
            "epochs": epochs,
            "seconds_per_epoch": self.epoch_s,
            "seconds": min(epochs * self.epoch_s, self.limit_s),
            "slices_per_s": self.batch_size / self.step_s,
            "memory_gib": self.memory_gib,
        }

    def announce(self) -> None:
        """Print the expected cost, and warn if the training will take very long."""
        predicted = self.predicted()
        print(", ".join(f"{name} {value}" for name, value in self.facts.items()))
        print(
            f"expected: {predicted['epochs']} epochs of {self.steps} steps of {self.batch_size} slices,"
            f" {duration(predicted['seconds_per_epoch'])} each, {duration(predicted['seconds'])} in all,"
            f" {predicted['memory_gib']:.1f} GiB",
            flush=True,
        )
        if predicted["seconds"] > 3600 * LONG_HOURS:
            hosted = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & os.environ.keys()
            limit = f", where a session ends after {LONG_HOURS} hours" if hosted else ""
            warn(
                f"would take about {duration(predicted['seconds'])} on this machine{limit}. Use a GPU, or -p minutes"
                " 60, or fewer slices_per_epoch, or --profile small. You can stop it at any time and resume it later."
            )

    def report(self, history: list[dict[str, float]], micro_batch: int) -> dict:
        """Return expected and measured cost for the manifest; `micro_batch` slices at a time fitted into memory."""
        last = history[-1]
        whole = [row for row in history if row["seconds"] < self.limit_s]  # the clock may have cut the last one short
        measured = {
            "epochs": last["epoch"],
            **({"seconds_per_epoch": whole[-1]["seconds"] / len(whole)} if whole else {}),
            "seconds": last["seconds"],
            "slices_per_s": fmean(row["slices_per_s"] for row in history),
            "memory_gib": last["memory_gib"],
        }
        sizes = {"batch_size": self.batch_size, "slices_at_a_time": micro_batch, "steps_per_epoch": self.steps}
        return self.facts | sizes | {"predicted": self.predicted(), "measured": measured}


def measure(
    session: Session, batches: BalancedBatches, val: DataLoader, *, workers: int, deterministic: bool
) -> Preflight:
    """Choose the precision and micro-batch of a session, and time a few steps and a batch of the validation.

    The trial steps use a copy of the network, in the epoch in which most of its encoder is trained.

    Args:
        session: before `Session.start`; its `precision` and `micro_batch` are set.
        batches: of the training.
        val: see `dataset.patients`.
        workers: processes that load batches.
        deterministic: use the precision that the device supports best, rather than the one measured as faster.

    Raises:
        MemoryError: not even one slice fits.
    """
    settings, progress, device = session.settings, session.progress, session.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    name = machine.describe(device)["device"]
    trial = _Trial(session, batches)
    rows = settings.batch_size // session.accelerator.num_processes
    micro_batch = min(progress.micro_batch.get(name, rows), rows)
    precision = progress.precision.get(name) or settings.precision
    if precision == "auto":
        candidates = _candidates(device)
        if len(candidates) > 1 and not deterministic:
            micro_batch = fitted(lambda n: trial.step_s(trial.typical, "float32", n), micro_batch)[1]
            candidates = [_faster(candidates, lambda one: trial.step_s(trial.typical, one, micro_batch))]
        precision = broadcast_object_list([candidates[-1]])[0]
    _, micro_batch = fitted(lambda n: trial.step_s(trial.largest, precision, n), micro_batch)
    step_s = fmean(trial.step_s(draws, precision, micro_batch, workers) for draws in trial.spread)
    validation_s, micro_batch = fitted(lambda n: trial.validation_s(val, precision, n), micro_batch)

    # All processes take the smallest micro-batch; the slowest one sets the estimate.
    steps, validations, micro_batches = zip(*gather_object([(step_s, validation_s, micro_batch)]), strict=True)
    session.micro_batch, session.precision = min(micro_batches), precision
    progress.precision[name] = precision
    facts = {
        "device": name,
        "precision": precision,
        "processes": session.accelerator.num_processes,
        "deterministic": deterministic or device.type == "cpu",
    }
    return Preflight(
        facts=facts,
        batch_size=settings.batch_size,
        steps=len(batches),
        epochs=settings.epochs,
        limit_s=60 * settings.minutes or math.inf,
        step_s=max(steps),
        validation_s=max(validations),
        memory_gib=machine.used_memory_gib(device),
    )


def _candidates(device: torch.device) -> list[str]:
    """The precisions worth trying on a device, float32 first."""
    half = machine.choose_precision(device)
    return ["float32"] if half == "no" else ["float32", half]


def _faster(candidates: Iterable[str], seconds: Callable[[str], float]) -> str:
    """Return the second candidate if it is `GAIN` times faster, else the first; the best of three runs counts."""
    first, second = candidates
    took = [(seconds(first), seconds(second)) for _ in range(3)]
    fastest = [min(turns) for turns in zip(*took, strict=True)]
    return second if fastest[0] > GAIN * fastest[1] else first


class _Trial:
    """Trial steps on a copy of a session's network.

    Attributes:
        spread: batches of the first epoch whose mean cost is about that of all batches.
        typical: the middle one of `spread`.
        largest: a batch padded to the largest possible size.
    """

    def __init__(self, session: Session, batches: BalancedBatches):
        self.session, self.data = session, batches.samples
        epochs = range(1, session.settings.epochs + 1)
        epoch = min(epochs, key=lambda epoch: frozen_share(epoch, session.settings))
        self.network = copy.deepcopy(session.network)
        session.ready(self.network, epoch)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        by_size = sorted(islice(batches, LOOKED_AT), key=lambda draws: math.prod(draws[0].size))
        self.spread = [by_size[len(by_size) * k // 6] for k in (1, 3, 5)]
        self.typical = self.spread[1]
        self.largest = [draw._replace(size=self.data.size) for draw in by_size[-1]]

    def step_s(self, draws: list[Draw], precision: str, micro_batch: int, workers: int = 0) -> float:
        """Return the seconds of a step on the samples of `draws`, while `workers` processes load the next batches."""
        began = time.perf_counter()
        batch = self.data.__getitems__(draws)
        loading_s = time.perf_counter() - began
        images, masks = self.session.augmented(batch)
        loss = gradients(
            self.network,
            self.session.criterion,
            images,
            masks,
            accelerator=self.session.accelerator,
            scaler=torch.amp.GradScaler(images.device.type, enabled=False),
            precision=precision,
            micro_batch=micro_batch,
        )
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        loss.item()  # waits for a GPU
        computing_s = time.perf_counter() - began - loading_s
        return max(computing_s, loading_s / workers) if workers else loading_s + computing_s

    @torch.no_grad()
    def validation_s(self, val: DataLoader, precision: str, micro_batch: int) -> float:
        """Estimate the seconds of a whole validation from its largest batch."""
        area = [len(draws) * math.prod(draws[0].size) for draws in val.batch_sampler]
        if not area:
            return 0.0
        largest = max(val.batch_sampler, key=lambda draws: len(draws) * math.prod(draws[0].size))
        network = self.network.eval()
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            batch = val.dataset.__getitems__(largest).to(self.session.device)
            for images in batch.images.split(2 * micro_batch):
                with autocast(images.device, precision):
                    network(images).argmax(dim=1).max().item()
        return (time.perf_counter() - began) * sum(area) / max(area)
