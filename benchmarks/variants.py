"""Which settings help on real patients? Variants of the demo's settings, cross-validated on fixed folds.

Each variant trains on all folds but one, or on some of their patients, once per seed, on equally many slices in the
same order, and keeps its last averaged weights: nothing is chosen by the patients it is tested on. Finished trainings
are kept in --folder and not repeated. A table for each number of patients gives the mean Dice (brats2020, without
post-processing or flips) over all tested patients and seeds, and the difference from the first row with its paired 95 %
interval over patients. --figure draws the tables as curves. A variant may also have a `change` of the training that is
no setting of the suite, see changes.py.

    python benchmarks/variants.py --data ../shared/glioma16 --folds ../shared/glioma16/folds.json \
        --variant augment=strong --variant "sigmoids: change=sigmoid regions" --slices 1200 --seeds 2
    python benchmarks/variants.py --data ../shared/glioma16 --folds ../shared/glioma16/folds.json \
        --base ImageNet --variant "ImageNet, frozen: frozen_epochs=1" --variant "random: encoder_weights=none" \
        --variant "simulated: encoder_weights=simulated" \
        --variant "simulated, frozen: encoder_weights=simulated, frozen_epochs=1" \
        --slices 800 --seeds 1 --patients 1 4 8 12 --figure transfer.png
"""

import argparse
import math
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from changes import CHANGES, change, folder_of
from peers.suite import demo_settings

from brats_helpers.data.cache import Packed, prepare
from brats_helpers.data.cases import survey
from brats_helpers.data.phantom import is_simulated
from brats_helpers.evaluation.experiments import MEAN, Bench, merged
from brats_helpers.files import read_json
from brats_helpers.labels import MODALITIES, REGIONS
from brats_helpers.runs import Run
from brats_helpers.scoring.statistics import compare
from brats_helpers.suite.environment import ROOT
from brats_helpers.training.settings import Settings


def main() -> None:
    options = arguments()
    folds = read_json(options.folds)["folds"]
    work = partial(one_fold, options=options, folds=folds)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rounds = list(pool.map(work, range(len(folds))))
    found = {number: merged(list(map(itemgetter(number), rounds))) for number in rounds[0]}
    for number, metrics in found.items():
        show(metrics, options, f"learned from {number or 'all other patients'}")
    if options.figure:
        draw(dict(sorted(found.items(), key=lambda entry: entry[0] or math.inf)), options.figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="labelled patients")
    parser.add_argument("--folds", metavar="FILE", type=Path, required=True, help="JSON with lists of patient IDs")
    parser.add_argument("--base", metavar="NAME", default="the demo's settings", help="name of the first row")
    parser.add_argument("--variant", metavar="[NAME:]SETTINGS", action="append", default=[], help="augment=strong")
    parser.add_argument("--slices", metavar="N", type=int, default=2400, help="training slices; default: 2400")
    parser.add_argument("--seeds", metavar="N", type=int, default=2, help="trainings of each; default: 2")
    parser.add_argument("--patients", metavar="N", type=int, nargs="+", default=[0], help="to learn from; default: all")
    parser.add_argument("--processes", metavar="N", type=int, default=os.cpu_count(), help="folds at once")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=ROOT / "runs" / "variants", help="for results")
    parser.add_argument("--figure", metavar="FILE", type=Path, help="PNG of the mean Dice by number of patients")
    options = parser.parse_args()
    for variant in options.variant:
        if (asked := named(variant)[1]) and asked not in CHANGES:
            parser.error(f"{variant!r}: change {asked!r} is none of {', '.join(CHANGES)}; a variant has one at most.")
    return options


def settings_of(variant: str, slices: int) -> Settings:
    """The demo's settings with those of a variant, for one pass over `slices` slices."""
    once = {"epochs": 1, "minutes": 0.0, "patience": 0, "slices_per_epoch": slices}
    return demo_settings(variant, modalities=MODALITIES, precision="float32", **once)


def named(variant: str) -> tuple[str, str, str]:
    """The name, the change and the settings of `NAME: change=..., SETTINGS`; without a name, the text is the name."""
    name, colon, text = variant.partition(":")
    parts = [part.strip() for part in (text if colon else variant).split(",")]
    changes = [part.removeprefix("change=") for part in parts if part.startswith("change=")]
    settings = [part for part in parts if part and not part.startswith("change=")]
    return name.strip(), ", ".join(changes), ", ".join(settings)


def one_fold(number: int, options: argparse.Namespace, folds: list[list[str]]) -> dict[int, dict[str, dict]]:
    """Train every variant on patients of the other folds; return the scores of this one, by patients and variant."""
    torch.set_num_threads(max(1, os.cpu_count() // options.processes))
    cases = [case for case in survey(options.data, MODALITIES).complete(skip_incomplete=True) if case.seg]
    packed: list[Packed] = prepare(cases, cache_dir=ROOT / "cache", workers=1)
    scored = [case for case in packed if case.id in folds[number]]
    others = [case for case in packed if case.id not in folds[number]]
    drawn = [others[k] for k in np.random.default_rng(number).permutation(len(others))]
    by_change = {"": {options.base: settings_of("", options.slices)}}
    for name, its_change, text in map(named, options.variant):
        by_change.setdefault(its_change, {})[name] = settings_of(text, options.slices)
    found: dict[int, dict[str, dict]] = {n: {} for n in options.patients}
    for its_change, arms in by_change.items():
        bench = Bench(
            run=Run(options.folder / folder_of(its_change) / f"fold{number}"),
            questions=(),
            device=torch.device("cpu"),
            workers=0,
            simulated=is_simulated(options.data),
            seeds=options.seeds,
        )
        with change(its_change):
            for n in options.patients:
                # A training has one epoch, so its validation chooses nothing.
                found[n] |= bench.try_out(arms, drawn[:n] if n else drawn, scored[:1], scored)[1]
    names = [options.base, *(named(variant)[0] for variant in options.variant)]
    return {n: {name: metrics[name] for name in names} for n, metrics in found.items()}


def show(found: dict[str, dict], options: argparse.Namespace, title: str) -> None:
    """Print the table in Markdown."""
    patients = len(found[options.base]["cases"])
    print(f"\n{patients} patients, {title}, {options.slices} slices, {options.seeds} seed(s)\n")
    print(f"| | {' | '.join(REGIONS)} | mean | each seed | difference (95 % interval) |\n|{' --- |' * 7}")
    for name, metrics in found.items():
        means = [metrics["summary"][region]["dice"]["mean"] for region in (*REGIONS, MEAN)]
        seeds = ", ".join(f"{mean:.3f}" for mean in metrics["seeds"])
        against = compare(found[options.base], metrics)["differences"][MEAN]["dice"]
        low, high = against["ci95"]
        difference = "" if name == options.base else f"{against['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} | {seeds} | {difference} |")


def draw(found: dict[int, dict[str, dict]], path: Path) -> None:
    """Draw the mean Dice of each variant by the number of patients that it learned from, with 95 % intervals."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    places = np.arange(len(found))
    names = list(next(iter(found.values())))
    for k, name in enumerate(names):
        dice = [metrics[name]["summary"][MEAN]["dice"] for metrics in found.values()]
        means = np.array([each["mean"] for each in dice])
        reach = np.abs(np.array([each["ci95"] for each in dice]).T - means)
        shift = 0.06 * (k - (len(names) - 1) / 2)
        axes.errorbar(places + shift, means, reach, marker="o", markersize=4, capsize=2, label=name)
    axes.set_xticks(places, [str(number or "all") for number in found])
    axes.set(xlabel="patients to learn from", ylabel="mean Dice of WT, TC and ET", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
