"""Time patients from their scans on disk to their label maps on disk: one network, no mirror images.

Three ways take turns: as the suite does it; with whole slices rather than each slice's own box; and with whole slices
and one patient after the other, nothing read or written meanwhile. The weights are random, which costs the same.

    OMP_NUM_THREADS=2 python benchmarks/prediction.py --cases ../shared/glioma16
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case, find_cases
from brats_helpers.evaluation import networks
from brats_helpers.evaluation.inference import Network, predict_files
from brats_helpers.machine import choose_device, describe
from brats_helpers.training.model import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0", help="default: tu-tf_efficientnet_lite0")
    parser.add_argument("--modalities", default="flair,t1,t1ce,t2", help="default: all four")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--patients", metavar="N", type=int, default=6, help="default: 6")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="default: 3")
    parser.add_argument("--cases", metavar="FOLDER", type=Path, required=True, help="a folder of patients")
    options = parser.parse_args()
    device, names = choose_device(options.device), options.modalities.split(",")
    model = build_model(encoder=options.encoder, weights="none", in_channels=len(names))
    settings = {"modalities": tuple(names), "context_slices": 0, "patch_size": 0}
    network = Network(model.to(device).eval(), settings, frozenset(), frozenset(), 0)
    cases = find_cases(options.cases, names)[: options.patients]
    ways = {"as it is": in_parallel, "whole slices": whole_slices, "whole slices, one by one": one_by_one}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        in_parallel(network, cases[:1], Path(folder))  # warm-up
        for _ in range(options.repeats):
            for name, way in ways.items():
                seconds[name].append(timed(way, network, cases, Path(folder)))
    facts = describe(device)
    print(f"{facts['device']}, {torch.get_num_threads()} threads, precision {facts['precision']}; {options.encoder}")
    print(f"{len(cases)} patients of {options.cases.name}, {options.repeats} repeats; seconds per patient")
    print(f"{'':26}{'median':>10}{'fastest':>10}{'processor':>10}")
    for name, found in seconds.items():
        wall, processor = zip(*found, strict=True)
        figures = statistics.median(wall), min(wall), statistics.median(processor)
        print(f"{name:26}" + "".join(f"{figure / len(cases):10.2f}" for figure in figures))


def timed(way: Callable, *arguments) -> tuple[float, float]:
    """Seconds by the clock, and of all processors, which other work on the machine hardly changes."""
    clocks = time.perf_counter, time.process_time
    started = [clock() for clock in clocks]
    with contextlib.redirect_stdout(io.StringIO()):
        way(*arguments)
    wall, processor = (clock() - begun for clock, begun in zip(clocks, started, strict=True))
    return wall, processor


def in_parallel(network: Network, cases: Sequence[Case], folder: Path) -> None:
    list(predict_files([network], cases, folder, flips=False))


def whole_slices(network: Network, cases: Sequence[Case], folder: Path) -> None:
    with padded():
        in_parallel(network, cases, folder)


def one_by_one(network: Network, cases: Sequence[Case], folder: Path) -> None:
    with padded():
        for case in cases:
            in_parallel(network, [case], folder)


@contextlib.contextmanager
def padded() -> Iterator[None]:
    """Let every slice with brain have the box of all of them."""
    as_trained = networks._as_trained

    def whole(network: Network, case: Packed, *how) -> Packed:
        case = as_trained(network, case, *how)
        everything = [0, case.images.shape[2], 0, case.images.shape[3]]
        return replace(case, boxes=np.where(case.boxes[:, 1:2] > 0, everything, 0))

    with mock.patch.object(networks, "_as_trained", whole):
        yield


if __name__ == "__main__":
    main()
