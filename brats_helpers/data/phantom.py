"""Simulated patients on disk: BraTS folders for anyone who has no data yet, made from the ICBM152 templates alone.

Each patient is built the way nature and the scanner would: a head (`anatomy`), its tumour (`tumour`), then contrast,
acquisition and skull strip (`scanner`). All numbers are drawn from wide ranges, so that a network trained on these
patients learns what a tumour looks like rather than what this simulation looks like.
"""

import os
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import nibabel as nib
import numpy as np
from threadpoolctl import threadpool_limits

from brats_helpers.data.anatomy import SHAPE, draw_anatomy
from brats_helpers.data.scanner import draw_images
from brats_helpers.data.tumour import draw_tumour
from brats_helpers.data.walk import walk
from brats_helpers.files import PART, part_folder, sweep, whole_file
from brats_helpers.labels import MODALITIES, DataError, classes_to_labels
from brats_helpers.log import progress

AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239.0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
"""BraTS' voxel-to-world matrix."""
MARKER = "SIMULATED.txt"
VERSION = 6  # of the simulation: raise it when the same seed gives different patients
VARIETIES = {"typical": 0.2, "broad": 1.0}
"""How often patients have something unusual, and how far it goes; see `make_cases`."""

# Lets glibc keep freed memory: fetching it again from the system takes a tenth of a patient's time.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}


def make_cases(
    root: Path | str, *, n_cases: int, seed: int, workers: int | None, variety: str = "typical"
) -> list[Path]:
    """Write simulated patients in the layout of BraTS 2020 and mark `root` as simulated.

    A patient's folder appears only when all its files are written, and an existing one is kept, so an interrupted call
    can be repeated. Patient k of a seed is the same for every `n_cases` and `workers`.

    Args:
        root: where to write `Sim_000/Sim_000_{flair,t1,t1ce,t2,seg}.nii.gz` and so on; created if missing. The patients
            of another seed than 0 are called `Sim_7_000`.
        n_cases: number of patients.
        seed: random seed of all patients.
        workers: number of processes; None means one per CPU core.
        variety: `typical` patients suit a short training. `broad` ones are for pretraining: in 28 % of them the tumour
            looks low-grade and enhances hardly or not at all; modalities are more often blurred, noisy, saturated or
            incomplete; contrasts vary more.

    Returns:
        The patients' folders, in order.

    Raises:
        DataError: `root` holds anything but simulated patients of this seed, variety and version.
        ValueError: there is no such variety.
    """
    if variety not in VARIETIES:
        raise ValueError(f"variety {variety!r}: expected one of {', '.join(VARIETIES)}.")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    mark = f"These patients are simulated by brats_helpers.phantom, version {VERSION}, from seed {seed}, {variety}."
    held = any(not path.name.startswith(PART) for path in root.iterdir())
    found = (root / MARKER).read_text("utf-8") if (root / MARKER).exists() else ""  # written before the first patient
    if not found.startswith(mark) and (found or held):
        what = "other simulated patients" if found else "files that are no simulated patients"
        wanted = f"{variety} patients of seed {seed} and version {VERSION}"
        raise DataError(f"{root} holds {what}. Give a new folder, or the one of the {wanted}.")
    if not found:
        with whole_file(root / MARKER) as file:
            file.write(f"{mark}\n")
    sweep(root)
    name = f"Sim_{seed}_" if seed else "Sim_"
    folders = [root / f"{name}{index:03d}" for index in range(n_cases)]
    missing = [(folder, seed, index, VARIETIES[variety]) for index, folder in enumerate(folders) if not folder.exists()]
    workers, bar = min(workers or os.cpu_count() or 1, len(missing)), {"what": "simulating", "total": len(missing)}
    if workers > 1:
        keep = patch.dict(os.environ, _KEEP_MEMORY)
        with keep, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(progress(pool.map(_write_case, *zip(*missing, strict=True)), **bar))
    else:
        for job in progress(missing, **bar):
            _write_case(*job)
    return folders


def is_simulated(root: Path | str) -> bool:
    """Whether any patient in `root`, at any depth, above it or behind a link, was written by `make_cases`."""
    places = {Path(root).resolve(), *(path.resolve().parent for path in walk(Path(root)))}
    for place in list(places):
        places.update(place.parents)
    return any((place / MARKER).is_file() for place in places)


def _write_case(folder: Path, seed: int, index: int, variety: float) -> None:
    with threadpool_limits(1):  # another number of threads would round sums differently
        images, classes = simulate_case(np.random.default_rng([seed, index]), variety=variety)
    with part_folder(folder.parent) as part:
        for name, volume in [*images.items(), ("seg", classes_to_labels(classes))]:
            _write(part / f"{folder.name}_{name}.nii.gz", volume)
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another run was faster
                raise


def _write(path: Path, volume: np.ndarray) -> None:
    """Write a volume as .nii.gz. Run-length matching suits noise in a black frame: faster and smaller than level 1."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS, 8, zlib.Z_RLE)
    content = nib.Nifti1Image(volume, AFFINE).to_bytes()
    path.write_bytes(packer.compress(content) + packer.flush())


def simulate_case(rng: np.random.Generator, *, variety: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Simulate one patient; the higher `variety` (0 to 1), the more often something is unusual.

    Returns:
        The images by modality (int16, shape `SHAPE`, 0 outside the brain, above 0 inside; a modality may hold less of
        the brain than others) and the reference segmentation as class indices 0 to 3 (uint8, same shape). Whole tumour
        and core are never empty.
    """
    anatomy = draw_anatomy(rng, variety=variety)
    tumour = draw_tumour(rng, anatomy)
    images = draw_images(rng, anatomy, tumour)
    box = tuple(slice(low, low + size) for low, size in zip(anatomy.origin, anatomy.inside.shape, strict=True))
    classes = np.zeros(SHAPE, np.uint8, order="F")  # the order of NIfTI files
    classes[box] = tumour.classes
    volumes = {}
    for name in MODALITIES:
        volumes[name] = np.zeros(SHAPE, np.int16, order="F")
        volumes[name][box] = images[name]
    return volumes, classes
