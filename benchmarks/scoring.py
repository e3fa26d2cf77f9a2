"""Time the scoring of one full-size patient on one core, beside medpy, MONAI and surface-distance.

Each tool gets a prediction and a reference of 240 x 240 x 155 voxels and computes Dice and HD95 of WT, TC and ET. The
peers get ready-made masks of the regions, whose making is not timed. brats_helpers starts from the label maps, and its
time is that of everything it scores: five structures with a dozen figures each, surface Dice and lesion F1 among them.

Needs the peers: pip install '.[test]'
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch start their threads

import numpy as np
from scipy import ndimage

from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import read_mask
from brats_helpers.data.numbering import number
from brats_helpers.labels import REGIONS
from brats_helpers.scoring.rules import YEARS
from brats_helpers.scoring.scores import score_case

MM = (1.0, 1.0, 1.0)
SHAPE = (240, 240, 155)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there as well")
    parser.add_argument("--repeats", metavar="N", type=int, default=7, help="timings per tool, at least 5 (default 7)")
    parser.add_argument(
        "--real",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "real",
        help="patients with segmentations, scored as well where the folder exists (default: ../shared/real)",
    )
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error("--repeats: at least 5")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")  # the peers use names that scipy and MONAI deprecate

    pairs = {"simulated tumour": simulated_tumour()}
    if options.real.is_dir():
        found = number(survey(options.real))[0].cases
        pairs |= {case.id: read_mask(case.seg, case.numbering) for case in found if case.seg}
    results = {"machine": machine(), "repeats": options.repeats, "pairs": {}}
    print(f"{results['machine']}\nmedians of {options.repeats}, in ms: wall clock (processor time); HD95 in mm")
    for name, truth in pairs.items():
        rows = measure(perturbed(truth), truth, repeats=options.repeats)
        results["pairs"][name] = rows
        print(f"\n{name}, {int((truth > 0).sum()):,} voxels of tumour, against a warped copy")
        print(f"{'':38}{'Dice':>16}{'HD95':>16}{'together':>16}   WT, TC, ET: Dice | HD95")
        for tool, row in rows.items():
            times = "".join(f"{clocks(row[step]):>16}" for step in ("dice", "hd95", "together"))
            dice = " ".join(map("{:.4f}".format, row["dice_values"]))
            hd95 = " ".join(map("{:.3f}".format, row["hd95_mm_values"]))
            print(f"{tool:38}{times}   {dice} | {hd95}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def clocks(step: dict[str, float] | None) -> str:
    return f"{step['wall_ms']:.0f} ({step['cpu_ms']:.0f})" if step else "-"


def machine() -> str:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    versions = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "MedPy", "monai", "surface-distance"))
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{processor}, one of {os.cpu_count()} cores{load}; Python {platform.python_version()}, {versions}"


def simulated_tumour() -> np.ndarray:
    """A ragged ball of oedema, enhancing rim and necrotic core of a common size, class indices."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32), 4)
    grid = np.ogrid[tuple(slice(side) for side in SHAPE)]
    radius = np.sqrt(sum((axis - centre) ** 2 for axis, centre in zip(grid, (90, 140, 80), strict=True)))
    depth = radius + 5 * noise / noise.std()
    return np.select([depth < 12, depth < 18, depth < 30], [1, 3, 2], 0).astype(np.uint8)


def perturbed(truth: np.ndarray) -> np.ndarray:
    """A copy warped by a smooth random displacement of a few voxels: a good but imperfect prediction."""
    random = np.random.default_rng(1)
    places = np.indices(truth.shape, dtype=np.float32)
    for axis in range(3):
        coarse = random.normal(scale=3, size=[side // 25 for side in truth.shape])
        places[axis] += ndimage.zoom(coarse, np.array(truth.shape) / coarse.shape, order=1)
    return ndimage.map_coordinates(truth, places, order=0)


def measure(pred: np.ndarray, truth: np.ndarray, *, repeats: int) -> dict[str, dict]:
    """Milliseconds and figures of each tool. The tools take turns, so that a busy moment of the machine affects all."""
    import torch
    from medpy.metric.binary import dc, hd95
    from monai.metrics import compute_dice, compute_hausdorff_distance

    np.Inf = np.inf  # surface-distance 0.1 asks for a name that numpy 2 dropped
    import surface_distance

    torch.set_num_threads(1)
    masks = {name: (np.isin(pred, classes), np.isin(truth, classes)) for name, classes in REGIONS.items()}
    stacks = [torch.tensor(np.stack(pair))[None] for pair in zip(*masks.values(), strict=True)]

    def ours(convention):
        scores = score_case(pred, truth, spacing_mm=MM, convention=convention)
        return [scores[region]["dice"] for region in REGIONS], [scores[region]["hd95_mm"] for region in REGIONS]

    def surface_hd95(p, t):
        return surface_distance.compute_robust_hausdorff(surface_distance.compute_surface_distances(t, p, MM), 95)

    tools = {
        **{f"brats_helpers {name}, everything": {"together": lambda name=name: ours(name)} for name in YEARS},
        "medpy": {
            "dice": lambda: [dc(p, t) for p, t in masks.values()],
            "hd95": lambda: [hd95(p, t, voxelspacing=MM) for p, t in masks.values()],
        },
        "MONAI": {
            "dice": lambda: compute_dice(*stacks)[0].tolist(),
            "hd95": lambda: compute_hausdorff_distance(*stacks, include_background=True, percentile=95)[0].tolist(),
        },
        "surface-distance (no Dice)": {"hd95": lambda: [surface_hd95(p, t) for p, t in masks.values()]},
    }
    values, times = {}, {(tool, step): [] for tool, steps in tools.items() for step in steps}
    for _ in range(repeats + 1):  # the first round warms up
        for tool, step in times:
            wall, cpu = time.perf_counter(), time.process_time()
            values[tool, step] = tools[tool][step]()
            times[tool, step].append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    rows = {}
    for tool in tools:
        row = {
            step: dict(zip(("wall_ms", "cpu_ms"), map(statistics.median, zip(*spent[1:], strict=True)), strict=True))
            for (owner, step), spent in times.items()
            if owner == tool
        }
        if "together" in row:
            dice, distances = values[tool, "together"]
        else:
            dice, distances = values.get((tool, "dice"), []), values[tool, "hd95"]
            row["together"] = {clock: sum(map(itemgetter(clock), row.values())) for clock in ("wall_ms", "cpu_ms")}
        rows[tool] = {"dice": None, "hd95": None} | row
        rows[tool] |= {"dice_values": list(map(float, dice)), "hd95_mm_values": list(map(float, distances))}
    return rows


if __name__ == "__main__":
    sys.exit(main())
