"""Compare the speed of revisions: each trains on the same patients for the same time, then segments the others.

The revisions take turns, each through its own benchmarks/peers/suite.py, with its own defaults and in its own folder,
but with the Python that runs this file. The table gives slices per second of training, validation left out, and
seconds per patient of `predict` from scans on disk to label maps on disk, start-up included.

    git worktree add ../before REVISION
    python benchmarks/revisions.py ../before . --data ../shared/glioma16 --seconds 60 --repeats 2
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from brats_helpers.data.cases import survey
from brats_helpers.labels import MODALITIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", metavar="FOLDER", type=Path, nargs="+", help="clones, each at one revision")
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="labelled patients")
    parser.add_argument("--seconds", metavar="S", type=int, default=60, help="of each training; default: 60")
    parser.add_argument("--repeats", metavar="N", type=int, default=2, help="turns of each; default: 2")
    parser.add_argument("--predict", metavar="N", type=int, default=8, help="patients to segment; default: 8")
    options = parser.parse_args()
    cases = survey(options.data, MODALITIES).complete(skip_incomplete=True)
    ids = [case.id for case in cases]
    parts = {"train": ids[2:], "val": ids[:2], "test": []}
    patients = [str(case.images["flair"].parent.resolve()) for case in cases[: options.predict]]
    found: dict[Path, list[tuple[float, float]]] = {folder: [] for folder in options.revisions}
    for _ in range(options.repeats):
        for folder, figures in found.items():
            figures.append(measure(folder.resolve(), parts, patients, options))
            print(f"{folder}: {figures[-1][0]:.1f} slices per second, {figures[-1][1]:.2f} s per patient", flush=True)
    print(f"\n| | slices/s | s per patient |\n|{' --- |' * 3}")
    for folder, figures in found.items():
        slices, seconds = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {folder} | {slices:.1f} | {seconds:.2f} |")


def measure(root: Path, parts: dict, patients: list[str], options: argparse.Namespace) -> tuple[float, float]:
    """Slices per second in the training of one revision, and seconds per patient of its prediction."""
    with tempfile.TemporaryDirectory() as work:
        job = {"data": str(options.data.resolve()), "modalities": MODALITIES, "cache": str(root / "cache")}
        job |= {"workers": 2, "parts": parts, "seconds": options.seconds, "device": "cpu", "folder": work}
        job |= {"configuration": "imagenet"}
        (Path(work) / "job.json").write_text(json.dumps(job | {"out": f"{work}/out"}))
        how = {"cwd": root, "env": os.environ | {"PYTHONPATH": str(root)}, "check": True, "stdout": subprocess.DEVNULL}
        subprocess.run([sys.executable, "benchmarks/peers/suite.py", f"{work}/job.json"], **how)
        with open(f"{work}/history.csv") as file:
            slices = statistics.fmean(float(row["slices_per_s"]) for row in csv.DictReader(file))
        begun = time.perf_counter()
        predict = ["predict", *patients, "--checkpoint", f"{work}/checkpoints/best.pt", "--out", f"{work}/predicted"]
        predict += ["--allow-leakage"]  # only the speed counts
        subprocess.run([sys.executable, "-m", "brats_helpers", *predict], **how)
        return slices, (time.perf_counter() - begun) / len(patients)


if __name__ == "__main__":
    main()
