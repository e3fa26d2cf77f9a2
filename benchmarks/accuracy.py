"""The same patients, the same split, the same seconds of training: this suite, nnU-Net v2 in 2D and 3D, MONAI's BraTS
tutorial and the recipe of the notebook that this suite replaces, all scored by `score` and compared patient by patient.

The seconds are those of training, with its reading of data and its validations. What each tool does before (preparing
patients) and after (predicting) is not counted. All get the same cores, and none post-processes. This suite keeps its
best epoch by validation, the others their last weights. nnU-Net predicts with mirror images, as it does by default; the
others, this suite among them, without. A peer whose defaults do not finish an epoch in the budget gets the smaller
settings that its own documentation offers. --nnunet, --nnunet-memory and --monai set them, and the table shows them.
With --tune the validation patients are scored, so that settings can be chosen without the test patients.

With --json, finished trainings are kept in the file; the same command continues after an interruption.

Peers need an environment of their own, with this suite, nnunetv2 and monai: --python names its Python.

    python -m venv PEERS && PEERS/bin/pip install . nnunetv2 monai
    python benchmarks/accuracy.py --python PEERS/bin/python --seconds 120 --json accuracy.json
    python benchmarks/accuracy.py --python PEERS/bin/python --seconds 600 1800 --data ../shared/glioma16 \
        --folds ../shared/glioma16/folds.json --json folds.json
    python benchmarks/accuracy.py --python PEERS/bin/python --seconds 120 --data ../shared/real \
        --modalities flair,t1ce --leave-one-out --split 0.6,0.2,0.2
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import Case, survey
from brats_helpers.data.phantom import VERSION, is_simulated, make_cases
from brats_helpers.data.splits import fold_cases, split_cases
from brats_helpers.evaluation.experiments import MEAN, with_mean
from brats_helpers.evaluation.folders import score_folders
from brats_helpers.labels import REGIONS
from brats_helpers.scoring.overlap import dice_by_region
from brats_helpers.scoring.scores import collect
from brats_helpers.scoring.statistics import compare
from brats_helpers.suite.environment import ROOT

PEERS = {
    "this suite": "suite",
    "this suite, packaged start": "suite",
    "this suite, untrained": "suite",
    "nnU-Net v2, 2D": "nnunet",
    "nnU-Net v2, 3D": "nnunet",
    "MONAI's tutorial, 3D": "monai_tutorial",
    "the replaced notebook": "replaced_notebook",
}
"""By name in the table, the script in `peers` that runs it."""
CONFIGURATIONS = {
    "this suite": "imagenet",
    "this suite, packaged start": "simulated",
    "this suite, untrained": "untrained",
    "nnU-Net v2, 2D": "2d",
    "nnU-Net v2, 3D": "3d_fullres",
}
"""What this suite starts from, or `untrained` for the packaged network as it is, and which network nnU-Net trains."""
SEEN_SIMULATED = {"simulated", "untrained"}
"""Configurations of the packaged network: unfair on simulated patients, of which it has seen many."""


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        work = Path(temporary)
        data = options.data or ROOT / "data" / f"accuracy-{options.cases}-{options.seed}-v{VERSION}"
        if not options.data:
            make_cases(data, n_cases=options.cases, seed=options.seed, workers=os.cpu_count())
        fair = [name for name in PEERS if CONFIGURATIONS.get(name) not in SEEN_SIMULATED or not is_simulated(data)]
        modalities = options.modalities.split(",")
        cases = [case for case in survey(data, modalities).complete(skip_incomplete=True) if case.seg]
        packed = prepare(cases, cache_dir=ROOT / "cache", workers=os.cpu_count())
        if options.folds:
            rounds = rounds_of(json.loads(options.folds.read_text())["folds"])
        elif options.leave_one_out:
            rounds = fold_cases(packed, folds=len(packed), split=options.split, seed=options.seed)
        else:
            rounds = [split_cases(packed, split=options.split, seed=options.seed)]
        if options.tune:
            rounds = [parts | {"test": parts["val"]} for parts in rounds]
        job = {
            "data": str(data.resolve()),
            "modalities": modalities,
            "cache": str(ROOT / "cache"),
            "device": options.device,
            "workers": options.workers,
            "smaller": {"batch": options.nnunet[0], "thinner": options.nnunet[1]} if options.nnunet else None,
            "memory_gb": options.nnunet_memory,
        }
        crop, filters, lr = options.monai
        job |= {"crop": [int(side) for side in crop.split(",")], "filters": int(filters), "lr": float(lr)}
        print(f"{machine()}\n{describe(options, data, rounds)}", flush=True)
        results = {"machine": machine(), "rounds": rounds, "trainings": {}}
        if options.json and options.json.exists():
            results = json.loads(options.json.read_text())
            if results["rounds"] != rounds:
                sys.exit(f"{options.json} holds results of another split. Give another --json file.")
        results["command"] = sys.argv
        for seconds in options.seconds:
            own = job | {"seconds": seconds}
            found = {name: compete(name, own, results, cases, options, work) for name in options.tools or fair}
            show(seconds, found)


def rounds_of(folds: list[list[str]]) -> list[dict[str, list[str]]]:
    """A round per fold, which it tests; one patient of each of two other folds validates, and the rest train."""
    rounds = []
    for number, test in enumerate(folds):
        others = folds[number + 1 :] + folds[:number]
        val = [others[0][0], others[1][0]]
        train = [case_id for fold in others for case_id in fold if case_id not in val]
        rounds.append({"train": train, "val": val, "test": test})
    return rounds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", metavar="FILE", default=sys.executable, help="of the peers; default: this one")
    parser.add_argument("--seconds", metavar="S", type=int, nargs="+", default=[120], help="of training; default: 120")
    parser.add_argument("--tools", metavar="NAME", nargs="+", choices=PEERS, help="default: all that are fair")
    parser.add_argument("--data", metavar="DIR", type=Path, help="patients; default: simulated ones, made in data/")
    parser.add_argument("--cases", metavar="N", type=int, default=40, help="simulated patients; default: 40")
    parser.add_argument("--split", default="24,4,12", help="train, val, test; default: 24,4,12")
    parser.add_argument("--folds", metavar="FILE", type=Path, help="JSON with lists of patient IDs, each tested once")
    parser.add_argument(
        "--leave-one-out", action="store_true", help="each patient is tested by trainings on the others"
    )
    parser.add_argument("--tune", action="store_true", help="score the validation patients, to choose settings")
    parser.add_argument("--modalities", default="flair,t1,t1ce,t2", help="default: flair,t1,t1ce,t2")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of patients and split; default: 0")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="processes that read; default: 2")
    parser.add_argument(
        "--nnunet",
        metavar=("BATCH", "THINNER"),
        type=int,
        nargs=2,
        help="smaller plans: the batch, and by what the widths are divided; default: as planned",
    )
    parser.add_argument(
        "--nnunet-memory", metavar="GB", type=float, help="memory target of its planner; default: its own, for a GPU"
    )
    parser.add_argument(
        "--monai",
        metavar=("CROP", "FILTERS", "LR"),
        nargs=3,
        default=["144,224,224", "16", "1e-4"],
        help="default: the tutorial's, 144,224,224 16 1e-4",
    )
    parser.add_argument("--folder", metavar="DIR", help="for what they write meanwhile; default: the system's")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every score there as well")
    return parser.parse_args()


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor}, {cores} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}"


def describe(options: argparse.Namespace, data: Path, rounds: list[dict]) -> str:
    kind = "simulated patients" if is_simulated(data) else f"patients of {data.name}"
    sizes = ", ".join(f"{len(rounds[0][part])} {part}" for part in ("train", "val", "test"))
    nnunet = "batch {}, widths over {}".format(*options.nnunet) if options.nnunet else "as planned"
    monai = "crop {}, {} filters, learning rate {}".format(*options.monai)
    kind += ", tested on the validation patients" if options.tune else ""
    return f"{len(rounds)} round(s) of {sizes}, {kind}, seed {options.seed}; nnU-Net: {nnunet}; MONAI: {monai}"


def compete(name: str, job: dict, results: dict, cases: list[Case], options: argparse.Namespace, work: Path) -> dict:
    """The scores of one tool over all rounds, in the form of `metrics.json`, and what it said of its training."""
    scores, said = {}, []
    for number, parts in enumerate(results["rounds"]):
        key = f"{name}, {job['seconds']} s, round {number + 1} of {len(results['rounds'])}"
        if key not in results["trainings"]:
            print(key, flush=True)
            own = job | {"parts": parts, "configuration": CONFIGURATIONS.get(name)}
            results["trainings"][key] = train_and_score(name, own, cases, options, work / "round")
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        scores |= results["trainings"][key]["cases"]
        said.append(results["trainings"][key]["said"])
    how = {"convention": "brats2020", "simulated": is_simulated(job["data"]), "not_scored": {}, "leakage": []}
    return collect(scores, **how) | {"said": said}


def train_and_score(name: str, job: dict, cases: list[Case], options: argparse.Namespace, folder: Path) -> dict:
    """Run one tool on one round; return the Dice of its test patients, and what it said of its training."""
    (folder / "out").mkdir(parents=True)
    (folder / "truth").mkdir()
    for case in cases:
        if case.id in job["parts"]["test"]:
            shutil.copy(case.seg, folder / "truth" / f"{case.id}_seg.nii{case.seg.name.partition('.nii')[2]}")
    (folder / "job.json").write_text(json.dumps(job | {"folder": str(folder), "out": str(folder / "out")}))
    python = sys.executable if PEERS[name] in ("suite", "replaced_notebook") else options.python
    command = [python, Path(__file__).parent / "peers" / f"{PEERS[name]}.py", folder / "job.json"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    before, load = resource.getrusage(resource.RUSAGE_CHILDREN), os.getloadavg()[0]
    with open(folder / "log", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environ).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (folder / "log").read_text().splitlines()
    if code:
        sys.exit(f"{name} failed:\n" + "\n".join(lines[-30:]))
    made = [line for line in lines if line.startswith(("steps: ", "epochs: "))]
    how = {"convention": "brats2020", "simulated": is_simulated(job["data"]), "allow_leakage": False}
    scored = score_folders(folder / "out", folder / "truth", **how)
    if scored["cases"].keys() != set(job["parts"]["test"]):
        sys.exit(f"{name} left test patients without a score: {scored['not_scored']}")
    found = {}
    for case_id, figures in scored["cases"].items():
        found[case_id] = with_mean(dice_by_region(figures))
    shutil.rmtree(folder)  # plain and preprocessed copies, gigabytes a round
    said = ", ".join([*made, f"load before {load:.1f}", f"processor in all {used:.0f} s"])
    return {"cases": found, "said": said}


def show(seconds: int, found: dict[str, dict]) -> None:
    first, *_ = found
    print(f"\n{seconds} s of training; Dice; {first} minus the other, mean of WT, TC and ET, with its 95 % interval")
    print(f"{'':28}" + "".join(f"{name:>8}" for name in (*REGIONS, MEAN)))
    for name, metrics in found.items():
        figures = "".join(f"{metrics['summary'][region]['dice']['mean']:8.3f}" for region in (*REGIONS, MEAN))
        change = compare(metrics, found[first])["differences"][MEAN]["dice"]
        paired = "{:+.3f} ({:+.3f} to {:+.3f})".format(change["mean_difference"], *change["ci95"])
        print(f"{name:28}{figures}   {paired if name != first else '':28}{'; '.join(metrics['said'])}")


if __name__ == "__main__":
    sys.exit(main())
