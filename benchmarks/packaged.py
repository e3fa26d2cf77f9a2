"""Score the packaged network, or another, on labelled real patients: with every choice of the modalities they have.

Modalities are hidden in memory, which gives what `predict` gives if their files are missing. Mean Dice by the rules of
BraTS up to 2022, without post-processing. `export --real FILE` puts what --json writes into a network and its card.

    python benchmarks/packaged.py --data ../shared/glioma16 --json glioma16.json
    python benchmarks/packaged.py --data ../shared/real --json real.json
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from brats_helpers.data.cache import Packed, pack
from brats_helpers.data.cases import Case, stored, survey
from brats_helpers.evaluation.networks import Network, in_order, leaked, load_network, predict, said_of
from brats_helpers.evaluation.packaged import real_lines, subsets
from brats_helpers.files import write_json
from brats_helpers.labels import REGIONS
from brats_helpers.machine import choose_device, describe
from brats_helpers.scoring.rules import get_rule, region_dice
from brats_helpers.training.model_zip import packaged_model

RULE = "brats2020"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FOLDER", type=Path, required=True, help="a folder of patients")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="default: the packaged network")
    parser.add_argument("--flips", action="store_true", help="average over mirror images when predicting")
    parser.add_argument("--whole", action="store_true", help="hide nothing: all the modalities alone")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every score there as well")
    options = parser.parse_args()
    device = choose_device(options.device)
    network = load_network(options.checkpoint or packaged_model(), device=device)
    cases = find_labelled(network, options.data)
    shown = subsets(set.intersection(*({*case.images} for case in cases)))[: 1 if options.whole else None]
    began = time.perf_counter()
    dice: dict[str, dict[str, dict[str, float]]] = {",".join(names): {} for names in shown}
    for case in cases:
        packed = pack(case)
        for names in shown:
            dice[",".join(names)][case.id] = score(network, case, packed, names, flips=options.flips)
        print(
            f"{case.id}: {', '.join(f'{r} {d:.3f}' for r, d in dice[','.join(shown[0])][case.id].items())}", flush=True
        )
    facts = describe(device)
    scores = {
        "patients": options.data.name,
        "n": len(cases),
        "convention": get_rule(RULE).line,
        "command": shlex.join(["python", *sys.argv]),
        "date": f"{date.today()}",
        "device": f"{facts['device']}, {facts['cores']} cores, {time.perf_counter() - began:.0f} s",
        "dice": {names: mean_of(by_case.values()) for names, by_case in dice.items()},
        "cases": dice,
    }
    print("\n".join(real_lines([scores])))
    if options.json:
        write_json(options.json, scores)


def find_labelled(network: Network, folder: Path) -> list[Case]:
    """The labelled patients below a folder, with those of the network's modalities that they have."""
    found = survey(folder, network.modalities, fill_missing=network.does_without)
    cases = in_order([network], [case for case in found.complete(skip_incomplete=True) if case.seg])
    if seen := leaked([network], cases):
        sys.exit(said_of(seen))
    if not cases:
        sys.exit(f"{folder} holds no labelled patient.")
    return cases


def score(network: Network, case: Case, packed: Packed, names: Sequence[str], *, flips: bool) -> dict[str, float]:
    """Dice by region of a patient who shows these modalities alone."""
    images = np.array(packed.images)
    images[:, [k for k, name in enumerate(case.modalities) if name not in names]] = 0
    hidden = replace(packed, images=images, labels=None, boxes=None)
    soft = predict([network], hidden, channels=case.modalities, flips=flips, spacing_mm=stored(case)[1])
    return region_dice(soft.argmax(axis=1).astype(np.uint8), np.asarray(packed.labels), convention=RULE)


def mean_of(scores) -> dict[str, float]:
    return {region: statistics.fmean(map(itemgetter(region), scores)) for region in REGIONS}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
