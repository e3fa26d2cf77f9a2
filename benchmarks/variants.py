"""Which settings help on real patients? Variants of the demo's settings, cross-validated on fixed folds.

Each variant trains on all folds but one, once per seed, on equally many slices in the same order, and keeps its last
averaged weights: nothing is chosen by the patients it is tested on. Finished trainings are kept in --folder and not
repeated. The table gives the mean Dice (brats2020, without post-processing or flips) over all patients and seeds, and
the difference from the first row with its paired 95 % interval over patients.

    python benchmarks/variants.py --data ../shared/glioma16 --folds ../shared/glioma16/folds.json \
        --variant decoder=128,64,32,16,16 --variant augment=strong --slices 2400 --seeds 2
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
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

BASE = "the demo's settings"


def main() -> None:
    options = arguments()
    folds = read_json(options.folds)["folds"]
    work = partial(one_fold, options=options, folds=folds)
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rounds = list(pool.map(work, range(len(folds))))
    show(merged(rounds), options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="labelled patients")
    parser.add_argument("--folds", metavar="FILE", type=Path, required=True, help="JSON with lists of patient IDs")
    parser.add_argument("--variant", metavar="SETTINGS", action="append", default=[], help="such as augment=strong")
    parser.add_argument("--slices", metavar="N", type=int, default=2400, help="training slices; default: 2400")
    parser.add_argument("--seeds", metavar="N", type=int, default=2, help="trainings of each; default: 2")
    parser.add_argument("--processes", metavar="N", type=int, default=os.cpu_count(), help="folds at once")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=ROOT / "runs" / "variants", help="for results")
    return parser.parse_args()


def settings_of(variant: str, slices: int) -> Settings:
    """The demo's settings with those of a variant, for one pass over `slices` slices."""
    once = {"epochs": 1, "minutes": 0.0, "patience": 0, "slices_per_epoch": slices}
    return demo_settings(variant, modalities=MODALITIES, precision="float32", **once)


def one_fold(number: int, options: argparse.Namespace, folds: list[list[str]]) -> dict[str, dict]:
    """Train every variant on the other folds; return the scores of this one, by variant."""
    torch.set_num_threads(max(1, os.cpu_count() // options.processes))
    cases = [case for case in survey(options.data, MODALITIES).complete(skip_incomplete=True) if case.seg]
    packed: list[Packed] = prepare(cases, cache_dir=ROOT / "cache", workers=1)
    scored = [case for case in packed if case.id in folds[number]]
    train = [case for case in packed if case.id not in folds[number]]
    arms = {BASE: settings_of("", options.slices)}
    arms |= {variant: settings_of(variant, options.slices) for variant in options.variant}
    bench = Bench(
        run=Run(options.folder / f"fold{number}"),
        questions=(),
        device=torch.device("cpu"),
        workers=0,
        simulated=is_simulated(options.data),
        seeds=options.seeds,
    )
    return bench.try_out(arms, train, scored, scored)[1]


def show(found: dict[str, dict], options: argparse.Namespace) -> None:
    """Print the table in Markdown."""
    patients = len(found[BASE]["cases"])
    print(f"\n{patients} patients, {options.slices} slices, {options.seeds} seed(s)\n")
    print(f"| | {' | '.join(REGIONS)} | mean | each seed | difference (95 % interval) |\n|{' --- |' * 7}")
    for name, metrics in found.items():
        means = [metrics["summary"][region]["dice"]["mean"] for region in (*REGIONS, MEAN)]
        seeds = ", ".join(f"{mean:.3f}" for mean in metrics["seeds"])
        change = compare(found[BASE], metrics)["differences"][MEAN]["dice"]
        low, high = change["ci95"]
        difference = "" if name == BASE else f"{change['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} | {seeds} | {difference} |")


if __name__ == "__main__":
    main()
