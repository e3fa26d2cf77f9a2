"""Time patients from their scans on disk to their label maps on disk: one network, no mirror images.

These ways take turns: as the suite does it; through onnxruntime, on a CPU; with whole slices rather than each slice's
own box; and with whole slices and one patient after the other, nothing read or written meanwhile. The weights are
random, which costs the same, unless a checkpoint is given. With one, the lowest Dice between the label maps of the
first way and of the others is printed too.

    OMP_NUM_THREADS=2 python benchmarks/prediction.py --cases ../shared/glioma16 --checkpoint best.pt
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
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation import networks
from brats_helpers.evaluation.export import write_onnx
from brats_helpers.evaluation.inference import Network, predict_files
from brats_helpers.evaluation.onnx import OnnxNetwork
from brats_helpers.machine import choose_device, describe
from brats_helpers.scoring.rules import region_dice
from brats_helpers.training.model import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="tu-tf_efficientnet_lite0", help="default: tu-tf_efficientnet_lite0")
    parser.add_argument("--modalities", default="flair,t1,t1ce,t2", help="default: all four")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--patients", metavar="N", type=int, default=6, help="default: 6")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--checkpoint", metavar="FILE", type=Path, help="of a network of slices; default: random weights"
    )
    parser.add_argument("--cases", metavar="FOLDER", type=Path, required=True, help="a folder of patients")
    options = parser.parse_args()
    device = choose_device(options.device)
    network = _network(options, device)
    cases = find_cases(options.cases, network.modalities)[: options.patients]
    ways = {"as it is": in_parallel}
    seconds: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if device.type == "cpu":
            ways["through onnxruntime"] = through_onnxruntime(network, Path(folder) / "network.onnx")
        ways |= {"whole slices": whole_slices, "whole slices, one by one": one_by_one}
        in_parallel(network, cases[:1], Path(folder))  # warm-up
        for _ in range(options.repeats):
            for name, way in ways.items():
                seconds.setdefault(name, []).append(timed(way, network, cases, Path(folder) / name))
        facts = describe(device)
        print(f"{facts['device']}, {torch.get_num_threads()} threads, precision {facts['precision']}")
        print(
            f"{network.settings['encoder']}; {len(cases)} patients of {options.cases.name}, {options.repeats} repeats"
        )
        print(f"{'seconds per patient':26}{'median':>10}{'fastest':>10}{'processor':>10}{'Dice':>10}")
        for name, found in seconds.items():
            wall, processor = zip(*found, strict=True)
            figures = statistics.median(wall), min(wall), statistics.median(processor)
            line = f"{name:26}" + "".join(f"{figure / len(cases):10.2f}" for figure in figures)
            print(f"{line}{lowest_dice(Path(folder), 'as it is', name):10.4f}" if options.checkpoint else line)


def _network(options: argparse.Namespace, device: torch.device) -> Network:
    if options.checkpoint:
        return networks.load_network(options.checkpoint, device=device)
    names = options.modalities.split(",")
    model = build_model(encoder=options.encoder, weights="none", in_channels=len(names)).to(device).eval()
    settings = {"encoder": options.encoder, "modalities": tuple(names), "context_slices": 0, "patch_size": 0}
    return Network(model, settings, frozenset(), frozenset(), 0)


def lowest_dice(folder: Path, one: str, other: str) -> float:
    """The lowest Dice of a region between two ways' label maps of the same patients."""

    def read(way: str, name: str) -> np.ndarray:
        return read_mask(folder / way / name, "brats2020")

    pairs = ((read(one, path.name), read(other, path.name)) for path in (folder / one).glob("*.nii.gz"))
    return min(min(region_dice(*pair, convention="brats2020").values()) for pair in pairs)


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


def through_onnxruntime(network: Network, path: Path) -> Callable:
    """A way that predicts with the network as ONNX, which it writes to `path` first."""
    write_onnx(network.model, len(network.modalities) * (2 * network.settings["context_slices"] + 1), path)
    exported = replace(network, model=OnnxNetwork(path).eval())
    return lambda network, cases, folder: in_parallel(exported, cases, folder)


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
