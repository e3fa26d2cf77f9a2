"""Time the training: the loop's overhead, the time to a Dice against the recipe that this suite replaces, transfer.

overhead   slices per second of `fit` against a bare loop over the same network with its batches in memory, and the
           share of the time in which the loop waits for data
time       seconds of training until the validation Dice (mean of WT, TC and ET) first reaches 0.75: the defaults of
           notebook 02 against the recipe of the notebook that this suite replaces: batch 4, every slice of 240 x 240
           padded to 256, Adam at 1e-3, no crop, no balance, each slice read from its NIfTI files (plain ones, as
           Kaggle has them). The same patients, network, loss and encoder weights. Validations count for neither
transfer   the same defaults from ImageNet weights, from random ones, and with the encoder frozen

All on simulated patients, made once in data/. The curves are drawn beside the JSON file.
"""

import argparse
import dataclasses
import gzip
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
from accelerate import Accelerator

from brats_helpers.data.cache import Packed, normalise, prepare
from brats_helpers.data.cases import Case, find_cases
from brats_helpers.data.sources import find_data
from brats_helpers.labels import labels_to_classes
from brats_helpers.machine import choose_device, choose_precision, describe
from brats_helpers.scoring.overlap import mean_dice_of_epoch
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.plan import read_notebooks
from brats_helpers.training.batch import Batch
from brats_helpers.training.dataset import samples
from brats_helpers.training.loop import fit, validate
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import PACKAGED_ENCODER, build_model, train_mode
from brats_helpers.training.preflight import SLICES
from brats_helpers.training.sampler import BalancedBatches
from brats_helpers.training.session import forget_device
from brats_helpers.training.settings import Settings

PARTS = ("overhead", "time", "transfer")
TARGET = 0.75
HOW = {"workers": 0, "checkpoint_minutes": 0.0, "deterministic": False, "tracker": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, and the curves beside it")
    parser.add_argument("--only", metavar="PART,...", default=",".join(PARTS), help="some of the parts (default: all)")
    parser.add_argument("--cases", metavar="N", type=int, default=24, help="simulated patients (default 24)")
    parser.add_argument("--val", metavar="N", type=int, default=4, help="of these for validation (default 4)")
    parser.add_argument("--minutes", metavar="M", type=float, default=4, help="of each training (default 4)")
    parser.add_argument("--limit", metavar="M", type=float, default=30, help="minutes of the recipe (default 30)")
    parser.add_argument("--epoch", metavar="N", type=int, default=320, help="slices between validations (default 320)")
    parser.add_argument("--seeds", metavar="N", type=int, default=3, help="trainings of each kind (default 3)")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="timings of each loop (default 5)")
    parser.add_argument("--encoder", default=PACKAGED_ENCODER, help=f"default {PACKAGED_ENCODER}")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: unknown {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = choose_device(options.device)

    source = find_data("phantom", data_dir=ROOT / "data", phantom_cases=options.cases, seed=0)
    cases = find_cases(source.root)
    packed = prepare(cases, cache_dir=ROOT / "cache", workers=os.cpu_count())
    results = {"machine": machine(device), "options": {k: str(v) for k, v in vars(options).items()}, "simulated": True}
    print(f"{results['machine']}\n{options.cases} simulated patients, {options.val} of them for validation\n")
    train, val = packed[options.val :], packed[: options.val]
    settings = defaults(options, device)
    curves = {}
    if "overhead" in parts:
        results["overhead"] = overhead(settings, train, val[:1], device, repeats=options.repeats)
    if "time" in parts:
        curves["time"] = compete(settings, train, val, cases, device, limit_s=60 * options.limit)
        results["time"] = report(curves["time"])
    if "transfer" in parts:
        curves["transfer"] = transfer(settings, train, val, device, seeds=options.seeds)
        results["transfer"] = report(curves["transfer"])
    if options.json:
        options.json.write_text(json.dumps(results | {"curves": curves}, indent=1) + "\n")
        for name, kinds in curves.items():
            draw(name, kinds, options.json.with_name(f"{options.json.stem}-{name}.png"))


def machine(device: torch.device) -> str:
    facts = describe(device)
    processor = facts["device"]
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    threads = f"{torch.get_num_threads()} threads on {facts['cores']} cores{load}"
    return (
        f"{processor}, {threads}, {facts['precision']}; Python {platform.python_version()}, torch {torch.__version__}"
    )


def defaults(options: argparse.Namespace, device: torch.device) -> Settings:
    """The settings of notebook 02 as it is stored, with short epochs and the encoder whose weights are in a package."""
    parameters = read_notebooks(ROOT)["02_train"].parameters
    values = {name: parameter.default for name, parameter in parameters.items()}
    values |= {"encoder": options.encoder, "minutes": options.minutes, "slices_per_epoch": options.epoch, "seed": 0}
    values |= {"encoder_weights": "imagenet"}
    values |= {"epochs": 1000, "patience": 0, "batch_size": SLICES[device.type], "modalities": "flair,t1,t1ce,t2"}
    return Settings.parse(**{name: values[name] for name in Settings.__dataclass_fields__ if name in values})


def run(settings: Settings, train: list[Packed], val: list[Packed], device: torch.device) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        return fit(settings, train, val, Path(folder), device=device, **HOW)


# --- overhead ----------------------------------------------------------------------------------------------------


def overhead(settings: Settings, train: list[Packed], val: list[Packed], device: torch.device, *, repeats: int) -> dict:
    """Slices per second of three loops that take turns, so that a busy moment of the machine hits all."""
    one = dataclasses.replace(settings, epochs=1, minutes=0)
    kinds = {
        "bare loop": lambda: bare(one, train, device),
        "fit, no augmentation": lambda: run(dataclasses.replace(one, augment="none"), train, val, device)[0],
        "fit, defaults": lambda: run(one, train, val, device)[0],
    }
    rows = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, work in kinds.items():
            rows[name].append(work())
    medians = {}
    for name, seen in rows.items():
        medians[name] = {key: statistics.median(map(itemgetter(key), seen)) for key in KEYS}
    bare_speed = medians["bare loop"]["slices_per_s"]
    for name, row in medians.items():
        row["share_of_bare"] = row["slices_per_s"] / bare_speed
        waiting = f"waiting for data {row['waiting']:.1%}"
        print(f"{name:24}{row['slices_per_s']:8.1f} slices/s {row['share_of_bare']:7.3f}  {waiting}")
    print()
    return medians


KEYS = ("slices_per_s", "waiting")


def bare(settings: Settings, train: list[Packed], device: torch.device) -> dict[str, float]:
    """Forward, backward and step over batches that are in memory already, and nothing else."""
    data = samples(train, context_slices=settings.context_slices, patch_size=0)
    size, steps = settings.batch_size, settings.slices_per_epoch // settings.batch_size
    how = {"n": settings.slices_per_epoch, "batch_size": size, "foreground": settings.foreground, "seed": 0}
    drawn = islice(BalancedBatches(data, **how), 8)
    batches = [data.__getitems__(draws).to(device)[:2] for draws in drawn]
    network, criterion = build(settings, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr)
    train_mode(network, frozen_statistics=settings.frozen_statistics)
    precision = choose_precision(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    began = None
    for step in range(-2, steps):
        if step == 0:  # two steps have warmed up
            began = time.perf_counter()
        images, masks = batches[step % len(batches)]
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            logits = network(images.contiguous(memory_format=torch.channels_last))
        loss = criterion(logits, masks)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    loss.item()  # waits for a GPU
    return {"slices_per_s": steps * size / (time.perf_counter() - began), "waiting": 0.0}


def build(settings: Settings, device: torch.device) -> tuple[torch.nn.Module, CrossEntropyDice]:
    torch.manual_seed(settings.seed)
    network = build_model(encoder=settings.encoder, weights=settings.encoder_weights, in_channels=4)
    return (
        network.to(device, memory_format=torch.channels_last),
        CrossEntropyDice(class_weights=settings.class_weights).to(device),
    )


# --- time to a Dice ----------------------------------------------------------------------------------------------


def compete(settings, train: list[Packed], val: list[Packed], cases: list[Case], device, *, limit_s: float) -> dict:
    """Curves of the suite's defaults and of the recipe that it replaces. Validation patients are the first cases."""
    ours = points(run(settings, train, val, device), settings)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:
        plain = [uncompressed(case, Path(folder)) for case in cases]
        recipe = replaced_recipe(settings, plain[len(val) :], plain[: len(val)], val, device, limit_s=limit_s)
    return {"this suite": [ours], "the recipe that it replaces": [recipe]}


def points(history: list[dict[str, float]], settings: Settings) -> list[tuple[float, float]]:
    """Seconds of training so far, and validation Dice, after each epoch."""
    steps = settings.slices_per_epoch // settings.batch_size
    seconds = np.cumsum([steps * settings.batch_size / row["slices_per_s"] for row in history])
    return list(zip(seconds.tolist(), map(mean_dice_of_epoch, history), strict=True))


def uncompressed(case: Case, folder: Path) -> Case:
    """The case with its files as plain NIfTI in `folder`."""

    def plain(path: Path) -> Path:
        with gzip.open(path) as packed, open(folder / path.name.removesuffix(".gz"), "wb") as file:
            shutil.copyfileobj(packed, file)
        return Path(file.name)

    images = {name: plain(path) for name, path in case.images.items()}
    return dataclasses.replace(case, images=images, seg=plain(case.seg))


def replaced_recipe(
    settings, train: list[Case], val: list[Case], packed: list[Packed], device, *, limit_s: float
) -> list:
    """Seconds of training, and validation Dice, thirty times until the target or `limit_s`."""
    network, criterion = build(settings, device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    precision = choose_precision(device)
    forget_device()  # of the suite's training before, which computes in a precision of its own
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    network, optimizer = accelerator.prepare(network, optimizer)
    curve, spent = [], 0.0
    network.train()
    began = time.perf_counter()
    for images, masks in recipe_batches(train, settings.seed):
        loss = criterion(network(images.to(device, memory_format=torch.channels_last)), masks.to(device))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        now = spent + time.perf_counter() - began
        if now < (len(curve) + 1) * limit_s / 30:
            continue
        how = {"precision": {"no": "float32"}.get(precision, precision), "at_once": 16}
        scores = validate(network, recipe_volumes(val), packed, criterion, accelerator, **how)
        curve.append((now, mean_dice_of_epoch(scores)))
        print(f"the recipe after {now:.0f} s: Dice {curve[-1][1]:.3f}", flush=True)
        if curve[-1][1] >= TARGET or now > limit_s:
            break
        network.train()
        spent, began = now, time.perf_counter()
    return curve


def recipe_batches(cases: list[Case], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every slice of every patient in random order, four at a time, again and again."""
    random = np.random.default_rng(seed)
    places = [(case, z) for case in cases for z in range(nib.load(case.seg).shape[2])]
    while True:
        order = random.permutation(len(places))
        for first in range(0, len(order) - 3, 4):
            yield read_slices([places[k] for k in order[first : first + 4]])


def recipe_volumes(cases: list[Case]) -> Iterator[Batch]:
    """Every slice of the validation patients in order, as the recipe reads them."""
    for k, case in enumerate(cases):
        depth = nib.load(case.seg).shape[2]
        for first in range(0, depth, 16):
            places = range(first, min(first + 16, depth))
            images, masks = read_slices([(case, z) for z in places])
            index = torch.tensor([(k, z) for z in places])
            yield Batch(images, masks, index, torch.zeros(len(places), 3, 3), (None,) * len(places))


def read_slices(places: list[tuple[Case, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices out of their files, each modality normalised by itself, padded from 240 to 256."""
    images, masks = [], []
    for case, z in places:
        stack = [normalise(np.asarray(nib.load(path).dataobj[:, :, z])) for path in case.images.values()]
        images.append(np.pad(stack, ((0, 0), (8, 8), (8, 8))))
        masks.append(np.pad(labels_to_classes(np.asarray(nib.load(case.seg).dataobj[:, :, z])), 8))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


# --- transfer ----------------------------------------------------------------------------------------------------


def transfer(settings: Settings, train: list[Packed], val: list[Packed], device: torch.device, *, seeds: int) -> dict:
    """Curves of each kind of start, one a seed."""
    kinds = {
        "ImageNet": settings,
        "random": dataclasses.replace(settings, encoder_weights="none"),
        "ImageNet, frozen": dataclasses.replace(settings, frozen_epochs=settings.epochs),
    }
    curves = {name: [] for name in kinds}
    for seed in range(seeds):
        for name, kind in kinds.items():
            seeded = dataclasses.replace(kind, seed=seed)
            curves[name].append(points(run(seeded, train, val, device), seeded))
    return curves


# --- what comes of it --------------------------------------------------------------------------------------------


def report(kinds: dict[str, list[list[tuple[float, float]]]]) -> dict[str, dict]:
    """For each kind the seconds to the target (None where it was missed) and the highest Dice, by seed."""
    rows = {}
    for name, curves in kinds.items():
        reached = list(map(seconds_to_target, curves))
        rows[name] = {"seconds_to_target": reached, "highest_dice": [max(map(itemgetter(1), c)) for c in curves]}
        times = ", ".join("never" if seconds is None else f"{seconds:.0f} s" for seconds in reached)
        highest = ", ".join(f"{dice:.3f}" for dice in rows[name]["highest_dice"])
        lasted = max(seconds for curve in curves for seconds, _ in curve)
        print(f"{name:30} Dice {TARGET} after {times}; highest {highest} in {lasted:.0f} s")
    print()
    return rows


def seconds_to_target(curve: list[tuple[float, float]]) -> float | None:
    return next((seconds for seconds, dice in curve if dice >= TARGET), None)


def draw(name: str, kinds: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """Dice over seconds of training, a line a training, a colour and a dash a kind."""
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    styles = zip(("#0072B2", "#E69F00", "#009E73"), ("-", "--", "-."), strict=True)
    for (kind, curves), (colour, dash) in zip(kinds.items(), styles, strict=False):
        for k, curve in enumerate(curves):
            ax.plot(*zip(*curve, strict=True), color=colour, linestyle=dash, label=kind if k == 0 else None)
    ax.axhline(TARGET, color="#8C8C8C", linewidth=0.8)
    ax.set(title=f"{name}: simulated patients", xlabel="seconds of training", ylim=(0, 1))
    ax.set_ylabel("validation Dice, mean of WT, TC and ET")
    ax.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
