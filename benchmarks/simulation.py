"""How lifelike is the simulation: networks trained on simulated patients alone, scored on real ones.

For each budget of training minutes, kind of weights and seed (of patients, split and training alike), the verbs `run`
(notebooks 00 and 02), `predict` and `score` one after the other, as anybody would type them. Started again, it goes
on where it was. The fingerprint of the simulation's four modules is part of the names of patients and runs.

    python benchmarks/simulation.py --minutes 4 15 --seeds 0 1 2 --weights imagenet none --json simulation.json
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).parents[1]
REGIONS = ("WT", "TC", "ET")
SOURCES = [ROOT / "brats_helpers" / "data" / f"{name}.py" for name in ("phantom", "anatomy", "tumour", "scanner")]
SIMULATION = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:6]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", metavar="M", type=float, nargs="+", default=[4, 15], help="default: 4 15")
    parser.add_argument("--seeds", metavar="S", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument(
        "--weights", metavar="W", nargs="+", default=["imagenet", "none"], help="default: imagenet none"
    )
    parser.add_argument("--cases", metavar="N", type=int, default=50, help="simulated patients; default: 50")
    parser.add_argument("--variety", default="broad", help="typical or broad patients, see make_cases; default: broad")
    parser.add_argument(
        "-p",
        nargs=2,
        metavar=("KEY", "VALUE"),
        action="append",
        default=[],
        help="a parameter of notebooks 00 and 02, in place of this benchmark's",
    )
    parser.add_argument("--flips", action="store_true", help="average over mirror images when predicting")
    parser.add_argument("--name", default="simulation", help="what its runs are called in runs/; default: simulation")
    parser.add_argument(
        "--real",
        metavar="FOLDER",
        type=Path,
        default=ROOT.parent / "shared" / "real",
        help="real patients with FLAIR and T1ce; default: ../shared/real",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every score there as well")
    options = parser.parse_args()

    results = []
    print(
        f"{'weights':10}{'minutes':>8}{'seed':>6}" + "".join(f"{region:>8}" for region in REGIONS) + "   patients: mean"
    )
    for weights in options.weights:
        for minutes in options.minutes:
            rows = [measure(options, weights, minutes, seed) for seed in options.seeds]
            results += rows
            for row in rows:
                show(weights, minutes, row["seed"], row["dice"], row["patients"])
            if len(rows) > 1:
                seeds = [row["dice"] for row in rows]
                for name, statistic in (("mean", statistics.fmean), ("std", statistics.stdev)):
                    dice = {region: statistic(map(itemgetter(region), seeds)) for region in REGIONS}
                    show(weights, minutes, name, dice)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def show(weights: str, minutes: float, seed, dice: dict[str, float], patients: dict[str, float] | None = None) -> None:
    figures = "".join(f"{dice[region]:8.3f}" for region in REGIONS)
    each = "   " + ", ".join(f"{case} {mean:.3f}" for case, mean in (patients or {}).items())
    print(f"{weights:10}{minutes:8g}{seed:>6}{figures}{each}".rstrip(), flush=True)


def measure(options: argparse.Namespace, weights: str, minutes: float, seed: int) -> dict:
    """Train, predict and score once; what the real patients got."""
    name = f"{options.name}-{SIMULATION}-{options.variety}-{weights}-{minutes:g}min-seed{seed}"
    patients = ROOT / "data" / f"simulation-{SIMULATION}-{options.variety}-{seed}-{options.cases}"
    verb("phantom", patients, "--cases", options.cases, "--seed", seed, "--variety", options.variety)
    parameters = {
        "data": patients,
        "split": f"{options.cases - 3},2,1",
        "modalities": "flair,t1ce",
        "encoder_weights": weights,
        "minutes": minutes,
        "seed": seed,
        "epochs": 1000,  # the clock stops it, and sets the learning rate
        "frozen_epochs": 0,
        "patience": 0,
    } | dict(options.p)
    folder = ROOT / "runs" / name
    pairs = [word for key, value in parameters.items() for word in ("-p", key, value)]
    verb("run", "--profile", "demo", "--run", name, "--only", "00,02", *pairs)
    predict = ["predict", "--checkpoint", folder / "checkpoints" / "best.pt", "--out", folder / "real"]
    verb(*predict, *["--flips"] * options.flips, options.real)
    verb("score", folder / "real", options.real, "--json", folder / "real.json")
    scores = json.loads((folder / "real.json").read_text())
    return {
        "weights": weights,
        "minutes": minutes,
        "seed": seed,
        "dice": {region: scores["summary"][region]["dice"]["mean"] for region in REGIONS},
        "patients": {case: mean_dice(figures) for case, figures in scores["cases"].items()},
        "parameters": {key: str(value) for key, value in parameters.items()},
        "revision": json.loads((folder / "manifest.json").read_text())["stages"]["02_train"]["revision"],
    }


def mean_dice(figures: dict[str, dict]) -> float:
    return statistics.fmean(figures[region]["dice"] for region in REGIONS)


def verb(*words) -> None:
    """Run a verb of the package; its output is shown only where it fails."""
    command = [sys.executable, "-m", "brats_helpers", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{' '.join(command)} failed with exit code {done.returncode}")


if __name__ == "__main__":
    main()
