"""Time one full-size patient from its scans on disk to its label map on disk: one network, no mirror images.

The weights are random, which costs the same. Wall clock and processor time, as other work on the machine stretches
the first.

    OMP_NUM_THREADS=2 python benchmarks/prediction.py
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from brats_helpers.data.cases import find_cases
from brats_helpers.evaluation.inference import Network, predict_files
from brats_helpers.machine import choose_device, describe
from brats_helpers.training.model import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="efficientnet-b0", help="default: efficientnet-b0")
    parser.add_argument("--modalities", default="flair,t1ce", help="default: flair,t1ce")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--cases",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "real",
        help="patients; the first is taken; default: ../shared/real",
    )
    options = parser.parse_args()
    device, names = choose_device(options.device), options.modalities.split(",")
    model = build_model(encoder=options.encoder, weights="none", in_channels=len(names))
    model = model.to(device).eval()
    settings = {"modalities": options.modalities.split(","), "context_slices": 0, "patch_size": 0}
    network = Network(model, settings, frozenset(), frozenset(), 0)
    case = find_cases(options.cases, names)[0]
    wall, processor = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats + 1):
            started, used = time.perf_counter(), processor_seconds()
            list(predict_files([network], [case], Path(folder), flips=False))
            wall.append(time.perf_counter() - started)
            processor.append(processor_seconds() - used)
    facts = describe(device)
    print(f"{facts['device']}, {torch.get_num_threads()} threads, precision {facts['precision']}; {options.encoder}")
    print(
        f"{case.id}: median of {options.repeats} {statistics.median(wall[1:]):.2f} s, fastest {min(wall[1:]):.2f} s,"
        f" processor {statistics.median(processor[1:]):.2f} s (the first, with warming up, took {wall[0]:.2f} s)"
    )


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
