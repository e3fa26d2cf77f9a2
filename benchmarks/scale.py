"""How cost grows with the patients: audit, index, preparation, one epoch, evaluation, and the memory of each.

Simulated patients, 6 to 48 of them; each step in a process of its own, so that its memory is its own. From the cost of
one patient more, a table on paper says what larger sets need on larger machines, and what would break first.

    python benchmarks/scale.py --json scale.json
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
STEPS = ("audit", "index", "preparation", "epoch", "evaluation")
SETS = {"BraTS 2020": 369, "BraTS 2021": 1_251, "a hundred thousand": 100_000}
EPOCHS = 20
RAW_MB = 80  # a patient as Kaggle has it, .nii without compression
# Cores, slices a second in training, memory in GB. The V100 and A100 are NVIDIA's published figures for its 2D nnU-Net,
# 707 and 1345; a T4 is taken as 0.36 of a V100, by their memory bandwidth (320 and 900 GB/s). None of the three was
# measured here. One T4 is Colab's machine, two are Kaggle's.
MACHINES = {
    "two cores": (2, None, 16),
    "one T4": (2, 250, 12),
    "two T4s": (4, 500, 30),
    "eight A100s": (96, 8 * 1345, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--patients", metavar="N", type=int, nargs="+", default=[6, 12, 24, 48], help="default: 6 12 24 48"
    )
    parser.add_argument("--steps", metavar="STEP", nargs="+", choices=STEPS, default=STEPS, help="default: all")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="where simulated patients lie or are made and kept")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--one", nargs=2, metavar=("STEP", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.patients) < 3:
        parser.error("--patients: three or more, or they cannot be shared out")
    if options.one:
        print(json.dumps(measured(options.one[0], Path(options.one[1]))))
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "patients"
        everyone = simulated(folder, max(options.patients))
        results = {"machine": machine(), "patients": options.patients, "steps": {step: [] for step in options.steps}}
        print(results["machine"], flush=True)
        for n in options.patients:
            place = Path(temporary) / str(n)
            for patient in everyone[:n]:
                shutil.copytree(patient, place / "data" / patient.name)
            for step in options.steps:
                results["steps"][step].append(apart(step, place))
                found = results["steps"][step][-1]
                print(f"{n:>4} {step:12}{found['seconds']:8.2f} s {found['memory_mb']:8.0f} MB", flush=True)
        cache_mb = sum(path.stat().st_size for path in place.glob("cache/**/*.npy")) / n / 1e6
    show(results)
    if set(options.steps) == set(STEPS) and len(options.patients) > 1:
        results["per_patient"] = {step: growth(results, step)[1] for step in STEPS} | {"cache_mb": cache_mb}
        on_paper(results["per_patient"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{processor}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}"


def simulated(folder: Path, n: int) -> list[Path]:
    from brats_helpers.data.phantom import make_cases

    return sorted(make_cases(folder, n_cases=n, seed=0, workers=os.cpu_count()))[:n]


def apart(step: str, place: Path) -> dict:
    """`measured` in a process of its own."""
    command = [sys.executable, __file__, "--one", step, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(step: str, place: Path) -> dict:
    """Seconds of one step, and the peak in MB of the memory that it took itself; mapped files do not count."""
    work = {"audit": audit, "index": index, "preparation": preparation, "epoch": epoch, "evaluation": evaluation}[step]
    job = work(place)
    base, peak, over = own_memory(), [0], threading.Event()

    def watch():
        while not over.wait(0.02):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    job()
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    return {"seconds": seconds, "memory_mb": max(peak[0] - base, 0) / 1e6}


def own_memory() -> int:
    """Bytes of this process that no file backs (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


# --- the steps: what is not to be measured first, then a function for what is ---------------------------------------


def audit(place: Path):
    from brats_helpers.data.audit import audit
    from brats_helpers.data.cases import survey

    def job():
        found = survey(place / "data")
        audit(found, found.cases, workers=1, cache_dir=None)

    return job


def index(place: Path):
    """Find the patients, open what was prepared, share them out, list their slices."""
    from brats_helpers.data.cache import prepare
    from brats_helpers.data.cases import survey
    from brats_helpers.data.splits import split_cases
    from brats_helpers.training.dataset import samples

    prepare(survey(place / "data").cases, cache_dir=place / "cache", workers=os.cpu_count())

    def job():
        packed = prepare(survey(place / "data").cases, cache_dir=place / "cache", workers=1)
        split_cases(packed, split="0.8,0.1,0.1", seed=0)
        samples(packed, context_slices=0, patch_size=0)

    return job


def preparation(place: Path):
    import torch  # noqa: F401 (the libraries do not count)

    from brats_helpers.data.cache import prepare
    from brats_helpers.data.cases import survey

    shutil.rmtree(place / "cache", ignore_errors=True)
    return lambda: prepare(survey(place / "data").cases, cache_dir=place / "cache", workers=1)


def epoch(place: Path):
    """One epoch over every slice of the patients; always one patient to validate."""
    import torch

    from brats_helpers.data.cache import prepare
    from brats_helpers.data.cases import survey
    from brats_helpers.training.loop import fit

    packed = prepare(survey(place / "data").cases, cache_dir=place / "cache", workers=1)
    how = {"device": torch.device("cpu"), "workers": 0, "checkpoint_minutes": 0, "deterministic": False}
    return lambda: fit(settings(), packed, packed[:1], place / "run", tracker="none", **how)


def evaluation(place: Path):
    """As notebook 03: rules chosen by every patient, then every patient predicted, written and scored."""
    from dataclasses import replace

    import torch

    from brats_helpers.data.cache import prepare
    from brats_helpers.data.cases import survey
    from brats_helpers.evaluation.inference import evaluate, load_networks, predict_validation
    from brats_helpers.evaluation.postprocess import choose

    cases = survey(place / "data").cases
    packed = prepare(cases, cache_dir=place / "cache", workers=1)
    (network,) = load_networks([place / "run" / "checkpoints" / "best.pt"], device=torch.device("cpu"))
    nobody = frozenset()  # as if it had seen none of them
    networks = [replace(network, trained_on=nobody, chosen_by=nobody, facts={})]

    def job():
        rules, _ = choose(predict_validation(networks, cases, packed, flips=False), convention="brats2020")
        how = {"flips": False, "convention": "brats2020", "simulated": True, "rules": rules}
        evaluate(networks, cases, place / "predictions", **how)

    return job


def settings():
    """Those of notebook 02, with the encoder whose weights are in a package, for one epoch."""
    from brats_helpers.suite.plan import read_notebooks
    from brats_helpers.training.preflight import SLICES
    from brats_helpers.training.settings import Settings

    own = {name: p.default for name, p in read_notebooks(ROOT)["02_train"].parameters.items()}
    values = {name: own[name] for name in Settings.__dataclass_fields__ if name in own}
    values |= {
        "encoder": "tu-tf_efficientnet_lite0",
        "encoder_weights": "imagenet",
        "epochs": 1,
        "batch_size": SLICES["cpu"],
    }
    return Settings.parse(modalities="flair,t1,t1ce,t2", seed=0, **values)


# --- what came out ------------------------------------------------------------------------------------------------


def growth(results: dict, step: str) -> tuple[float, float]:
    """The exponent by which seconds grow with the patients, and the seconds of one patient more, by least squares."""
    n, seconds = results["patients"], [row["seconds"] for row in results["steps"][step]]
    return np.polyfit(np.log(n), np.log(seconds), 1)[0], np.polyfit(n, seconds, 1)[0]


def show(results: dict) -> None:
    print("\nseconds (MB of memory beyond the libraries) by patients; growth: 1 is linear")
    print(f"{'':12}" + "".join(f"{n:>16}" for n in results["patients"]) + "   growth, one patient more")
    for step, rows in results["steps"].items():
        cells = (f"{row['seconds']:.2f} ({row['memory_mb']:.0f})" for row in rows)
        line = f"{step:12}" + "".join(f"{cell:>16}" for cell in cells)
        if len(rows) > 1:
            line += "   {:.2f}, {:.3f} s".format(*growth(results, step))
        print(line)


def on_paper(one: dict[str, float]) -> None:
    """What sets of other sizes need, by the cost of one patient; machines that were not measured by their speed."""
    slices = 138  # with brain, a patient
    print(f"\non paper: {RAW_MB} MB on disk and {one['cache_mb']:.0f} MB prepared a patient; {EPOCHS} epochs")
    print("evaluate: a tenth for validation and one for test, by the cores alone as if there were no GPU")
    print(f"{'':38}{'disk':>9}{'prepare':>10}{'train':>12}{'evaluate':>10}")
    for name, n in SETS.items():
        for machine, (cores, speed, _) in MACHINES.items():
            prepare_s = n * (one["audit"] + one["preparation"]) / cores
            train_s = EPOCHS * n * (slices / speed if speed else one["epoch"] * os.cpu_count() / cores)
            evaluate_s = n / 10 * one["evaluation"] * os.cpu_count() / cores  # as if the cores did it without a GPU
            disk = n * (RAW_MB + one["cache_mb"]) / 1e6
            hours = "".join(f"{s / 3600:>8.1f} h" for s in (prepare_s, train_s, evaluate_s))
            print(f"{f'{name}, {n:,}':24}{machine:>14}{disk:>6.2f} TB{hours}")
    for machine, (cores, speed, memory) in MACHINES.items():
        speed = speed or slices / (one["epoch"] * os.cpu_count() / cores)
        need = speed * one["cache_mb"] / slices
        held = f"{memory} GB hold {1000 * memory / one['cache_mb']:,.0f} prepared patients"
        print(f"{machine}: {held}; of more the disk has to read {need:,.0f} MB/s while it trains")
    print(f"on this machine: {first_to_break(one)}")


def first_to_break(one: dict[str, float]) -> str:
    """The first of three limits that a growing set meets on this machine: each patient maps two files."""
    import resource

    limits = {"disk that is free here": shutil.disk_usage(ROOT).free / 1e6 / (RAW_MB + one["cache_mb"])}
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits["open files (ulimit -Hn)"] = hard / 2 if hard != resource.RLIM_INFINITY else np.inf
    maps = Path("/proc/sys/vm/max_map_count")
    if maps.exists():
        limits["memory maps (vm.max_map_count)"] = int(maps.read_text()) / 2
    order = sorted(limits.items(), key=lambda item: item[1])
    return "breaks first, at so many patients: " + "; ".join(f"{name}, {n:,.0f}" for name, n in order)


if __name__ == "__main__":
    sys.exit(main())
