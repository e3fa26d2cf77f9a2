"""Compare `brats2026` with BraTS-evaluation, the package of the challenge's organisers.

Patients with segmentations are perturbed in thirty ways. The package scores the pairs through its command line, in an
environment of its own, because it needs pandas below 3 and its licence is the AGPL:

    python -m venv PEER && PEER/bin/pip install BraTS-evaluation
    python benchmarks/scoring_2026.py PATIENTS --peer PEER

The exit code is 1 if Dice, surface Dice, F1, precision or recall differ by more than 1e-6, or HD95 by
more than 1e-3 mm.
"""

import argparse
import csv
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.numbering import number
from brats_helpers.scoring.rules import NO_MATCH_MM
from brats_helpers.scoring.scores import score_case

Pair = tuple[np.ndarray, np.ndarray]
MM = (1.0, 1.0, 1.0)
CONFIGS = {"seg": ("gli", "brats2026"), "mets": ("mets", "brats2026-MET")}
"""By command of `brats-parse-metrics`: the package's configuration and our rule."""
STRUCTURES = {"WT": "wt", "TC": "tc", "ET": "et", "NCR": "netc", "ED": "snfh"}
FIGURES = {
    "dice": "lesionwise_dsc_mean",
    "hd95_mm": "lesionwise_hd95_mean",
    "nsd": "lesionwise_nsd_mean",
    "lesion_f1": "all_instance_f1",
    "lesion_precision": "all_instance_prec",
    "lesion_recall": "all_instance_rec",
}


def shifted(*steps: int) -> Callable:
    return lambda truth, random: np.roll(truth, steps, axis=(0, 1, 2))


def warped(size: float) -> Callable:
    """Displace by a smooth random field of `size` voxels."""

    def warp(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
        places = np.indices(truth.shape, dtype=np.float32)
        for axis in range(3):
            coarse = random.normal(scale=size, size=[side // 20 for side in truth.shape])
            places[axis] += ndimage.zoom(coarse, np.array(truth.shape) / coarse.shape, order=1)
        return ndimage.map_coordinates(truth, places, order=0)

    return warp


def grown(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return np.maximum(truth, 2 * ndimage.binary_dilation(truth, iterations=2)).astype(np.uint8)


def shrunk(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return truth * ndimage.binary_erosion(truth, iterations=2)


def noisy(share: float) -> Callable:
    """Replace a share of the voxels around the tumour by random classes."""

    def change(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
        near = ndimage.binary_dilation(truth, iterations=4) & (random.random(truth.shape) < share)
        return np.where(near, random.integers(0, 4, truth.shape), truth).astype(np.uint8)

    return change


def with_blobs(count: int, radius: int) -> Callable:
    """Add false lesions, balls of enhancing tumour at random places."""

    def add(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
        seeds = np.zeros(truth.shape, bool)
        seeds[tuple(random.integers(radius, np.array(truth.shape) - radius, (count, 3)).T)] = True
        return np.where(ndimage.distance_transform_edt(~seeds) <= radius, 3, truth).astype(np.uint8)

    return add


def cut(width: int) -> Callable:
    """Cut the tumour apart at its centre, so that one lesion meets several predicted ones."""

    def remove(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
        pred = truth.copy()
        centre = round(ndimage.center_of_mass(truth > 0)[0])
        pred[centre : centre + width] = 0
        return pred

    return remove


def bridged(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Join what lies within ten voxels, so that several lesions meet one predicted one."""
    return np.maximum(truth, 3 * ndimage.binary_closing(truth == 3, iterations=5)).astype(np.uint8)


def relabelled(*new: int) -> Callable:
    return lambda truth, random: np.array(new, np.uint8)[truth]


def without_small(voxels: int) -> Callable:
    """Remove enhancing components below a size."""

    def remove(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
        parts, _ = ndimage.label(truth == 3, np.ones((3, 3, 3)))
        small = np.bincount(parts.ravel()) < voxels
        return np.where((parts > 0) & small[parts], 1, truth).astype(np.uint8)

    return remove


def smoothed(truth: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return ndimage.median_filter(truth, 5)


WAYS: dict[str, Callable] = {
    "unchanged": lambda truth, random: truth.copy(),
    "shifted by one voxel": shifted(1, 0, 0),
    "shifted by a diagonal": shifted(1, 1, 1),
    "shifted by five voxels": shifted(0, 5, 0),
    "shifted by twenty voxels": shifted(20, 0, 0),
    "shifted out of sight": shifted(100, 100, 70),
    "warped by one voxel": warped(1),
    "warped by three voxels": warped(3),
    "warped by six voxels": warped(6),
    "grown": grown,
    "shrunk": shrunk,
    "smoothed": smoothed,
    "noise of 1 %": noisy(0.01),
    "noise of 10 %": noisy(0.1),
    "noise of 50 %": noisy(0.5),
    "one false lesion": with_blobs(1, 6),
    "ten false lesions": with_blobs(10, 3),
    "a hundred specks": with_blobs(100, 1),
    "cut by one voxel": cut(1),
    "cut by ten voxels": cut(10),
    "bridged": bridged,
    "NCR and ED swapped": relabelled(0, 2, 1, 3),
    "NCR and ET swapped": relabelled(0, 3, 2, 1),
    "no enhancing tumour predicted": relabelled(0, 1, 2, 1),
    "oedema alone": relabelled(0, 0, 2, 0),
    "core alone": relabelled(0, 1, 0, 3),
    "all enhancing": relabelled(0, 3, 3, 3),
    "nothing predicted": relabelled(0, 0, 0, 0),
    "small enhancing parts removed": without_small(100),
    "mirrored": lambda truth, random: truth[::-1].copy(),
}
"""The thirty ways. Every third pair has the prediction and the reference exchanged, so references are perturbed too."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patients", metavar="PATIENTS", type=Path, help="patients with segmentations")
    parser.add_argument("--peer", metavar="VENV", type=Path, required=True, help="environment with BraTS-evaluation")
    parser.add_argument("--each", metavar="N", type=int, default=2, help="patients per way, in turn (default 2)")
    options = parser.parse_args()
    cases = [case for case in number(survey(options.patients))[0].cases if case.seg]
    chosen = [cases[(turn + way) % len(cases)] for turn in range(options.each) for way in range(len(WAYS))]
    worst = dict.fromkeys(FIGURES, 0.0)
    compared = dict.fromkeys(FIGURES, 0)
    with tempfile.TemporaryDirectory() as folder:
        pairs, seconds = {}, 0.0
        for k, (case, way) in enumerate(zip(chosen, list(WAYS) * options.each, strict=True)):
            name = f"BraTS-GLI-{k:05d}-000"
            pred, truth = perturbed(read_mask(case.seg, case.numbering), way, k)
            write(Path(folder), name, pred, truth)
            started = time.perf_counter()
            pairs[name] = {
                rule: score_case(pred, truth, spacing_mm=MM, convention=rule) for _, rule in CONFIGS.values()
            }
            seconds += time.perf_counter() - started
        print(f"{len(pairs)} pairs; brats_helpers {seconds / len(pairs) / len(CONFIGS):.2f} s a pair")
        for command, (config, rule) in CONFIGS.items():
            started = time.perf_counter()
            theirs = run_peer(options.peer, Path(folder), command, config)
            print(f"BraTS-evaluation, {config}: {(time.perf_counter() - started) / len(pairs):.2f} s a pair")
            for name, scores in pairs.items():
                for structure, figure, difference in differences(scores[rule], theirs[f"{name}.nii.gz"]):
                    compared[figure] += 1
                    worst[figure] = max(worst[figure], difference)
                    if difference > tolerance(figure):
                        print(f"{name}, {rule}, {structure} {figure}: {difference:.3g} apart")
    for figure, difference in worst.items():
        print(f"{figure:18}{compared[figure]:6} figures, at most {difference:.2g} apart")
    return int(any(difference > tolerance(figure) for figure, difference in worst.items()))


def perturbed(truth: np.ndarray, way: str, k: int) -> Pair:
    """Prediction and reference; of every third pair the two are exchanged."""
    pred = WAYS[way](truth, np.random.default_rng(k))
    return (truth, pred) if k % 3 == 2 else (pred, truth)


def write(folder: Path, name: str, pred: np.ndarray, truth: np.ndarray) -> None:
    for kind, classes in (("pred", pred), ("ref", truth)):
        (folder / kind).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.asfortranarray(classes), np.eye(4)), folder / kind / f"{name}.nii.gz")


def run_peer(peer: Path, folder: Path, command: str, config: str) -> dict[str, dict[str, str]]:
    """Rows of the package's own table by file name."""
    summary, table = folder / f"{command}.json", folder / f"{command}.csv"
    program = [peer / "bin" / "brats-evaluate", "--config", config, "--summary_json", summary]
    places = ["--ref_path", folder / "ref", "--pred_path", folder / "pred"]
    subprocess.run([*program, *places], check=True, capture_output=True)
    program = [peer / "bin" / "brats-parse-metrics", command, "--json_path", summary, "--output_csv_path", table]
    subprocess.run(program, check=True, capture_output=True)
    with open(table, newline="") as file:
        return {row["subject_id"]: row for row in csv.DictReader(file)}


def differences(scores: dict, row: dict[str, str]) -> list[tuple[str, str, float]]:
    """By how much each figure is apart; infinite where only one of the two leaves the patient out."""
    found = []
    for (structure, theirs), (figure, column) in ((s, f) for s in STRUCTURES.items() for f in FIGURES.items()):
        if f"{column}_{theirs}" not in row:
            continue
        expected, ours = float(row[f"{column}_{theirs}"] or "nan"), scores[structure][figure]
        if math.isinf(expected):
            expected = NO_MATCH_MM
        if ours is None or math.isnan(expected):
            found.append((structure, figure, 0.0 if ours is None and math.isnan(expected) else math.inf))
        else:
            found.append((structure, figure, abs(ours - expected)))
    return found


def tolerance(figure: str) -> float:
    return 1e-3 if figure == "hd95_mm" else 1e-6


if __name__ == "__main__":
    sys.exit(main())
