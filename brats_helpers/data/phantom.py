"""Simulated patients: BraTS folders for whoever has no data yet, made from nothing but the ICBM152 templates.

Each patient is built as nature and the scanner would: anatomy (the templates' tissue maps, posed, bent and
sharpened), disease (a tumour core that pushes tissue away, enhancement inside it, oedema that creeps along white
matter), contrast (one brightness per tissue and modality), acquisition (coil bias, slice profile, noise at the native
resolution, resampling to 1 mm) and the skull strip, which at times leaves eyes, fat and muscle. Every number of it is
drawn from wide ranges, so that a network trained here learns what a tumour looks like rather than what this module
looks like.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.special import expit, softmax
from threadpoolctl import threadpool_limits

from brats_helpers.data.layouts import walk
from brats_helpers.files import PART, part_folder, sweep, whole_file
from brats_helpers.labels import MODALITIES, DataError, classes_to_labels

SHAPE = (240, 240, 155)
"""Voxels of 1 mm along X, Y, Z, as in every BraTS release."""
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239.0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
"""BraTS' voxel-to-world matrix."""
MARKER = "SIMULATED.txt"
VERSION = 2  # of the simulation: raise it when the same seed gives other patients
_MARGIN = 6  # voxels around the brain that are simulated too, so that blur and strip have something to cut from
_COARSE = 4  # mm between the nodes that carry deformations and other smooth fields
# Brightness of tissues where white matter is 1: (lowest, highest) per modality, drawn once a patient.
_BRIGHTNESS = {
    "grey": {"flair": (1.02, 1.30), "t1": (0.68, 0.85), "t1ce": (0.72, 0.90), "t2": (1.25, 1.60)},
    "fluid": {"flair": (0.08, 0.45), "t1": (0.20, 0.42), "t1ce": (0.20, 0.42), "t2": (2.4, 4.0)},
    "vessel": {"flair": (0.3, 1.0), "t1": (0.4, 1.2), "t1ce": (1.5, 3.0), "t2": (0.4, 1.2)},
    "dura": {"flair": (0.6, 2.2), "t1": (0.6, 1.6), "t1ce": (1.2, 3.0), "t2": (0.5, 2.0)},
    "oedema": {"flair": (1.45, 2.3), "t1": (0.55, 0.82), "t1ce": (0.58, 0.85), "t2": (1.9, 3.0)},
    "solid": {"flair": (1.25, 2.0), "t1": (0.62, 0.85), "t1ce": (0.62, 0.95), "t2": (1.6, 2.6)},
    "necrosis": {"flair": (0.8, 2.0), "t1": (0.45, 0.80), "t1ce": (0.50, 0.90), "t2": (2.2, 3.8)},
    "enhancing": {"flair": (1.2, 2.0), "t1": (0.65, 0.95), "t1ce": (1.15, 2.1), "t2": (1.4, 2.5)},
    "vitreous": {"flair": (0.08, 0.7), "t1": (0.2, 0.5), "t1ce": (0.2, 0.5), "t2": (2.4, 4.0)},
    "muscle": {"flair": (0.3, 1.6), "t1": (0.5, 1.0), "t1ce": (0.6, 1.6), "t2": (0.4, 1.4)},
    "fat": {"flair": (0.8, 2.6), "t1": (1.2, 2.2), "t1ce": (1.2, 2.6), "t2": (1.0, 2.6)},
    "bone": {"flair": (0.02, 0.4), "t1": (0.02, 0.5), "t1ce": (0.02, 0.6), "t2": (0.02, 0.4)},
}
_FAILING = {"flair": 0.9, "t1": 0.2, "t1ce": 0.3, "t2": 0.3}  # how much brighter it gets at most near air
_EYE = np.array([32.0, 78.0, -44.0])  # mm from the brain's centre to the right, the front and above, or to the left


@dataclass(frozen=True)
class _Templates:
    """The ICBM152 maps at 1 mm, float32, shape (197, 233, 189), and the voxel at the brain's centre."""

    white: np.ndarray  # probability, deblurred: the templates are means of many brains, one brain has sharp folds
    grey: np.ndarray
    deep: np.ndarray  # T1 brightness that white, grey and fluid do not explain (deep grey matter, dura)
    depth: np.ndarray  # mm inside the brain's surface, negative outside; every second voxel
    ventricle: np.ndarray  # mm outside the ventricles' wall, negative inside; every second voxel
    centre: np.ndarray


@cache
def _templates() -> _Templates:
    """Load the templates that nilearn carries; no network."""
    from nilearn import datasets

    t1, grey, white, brain = (
        load(resolution=1).get_fdata(dtype=np.float32)
        for load in (
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
            datasets.load_mni152_brain_mask,
        )
    )
    brain = brain > 0
    fluid = np.where(brain, 1 - grey - white, 0)
    tissues = np.stack([white[brain], grey[brain], fluid[brain]], 1)
    deep = np.zeros_like(t1)
    deep[brain] = t1[brain] - tissues @ np.linalg.lstsq(tissues, t1[brain], rcond=None)[0]
    depth = _distance_inside(brain[::2, ::2, ::2])
    pools, _ = ndimage.label((fluid[::2, ::2, ::2] > 0.5) & (depth > 25))
    ventricle = -_distance_inside(pools == np.argmax(np.bincount(pools.ravel())[1:]) + 1)
    box = np.argwhere(brain)
    white, grey = (tissue + 1.7 * (tissue - ndimage.gaussian_filter(tissue, 2.5)) for tissue in (white, grey))
    return _Templates(white, grey, deep, depth, ventricle, (box.min(0) + box.max(0)) / 2)


def _distance_inside(mask: np.ndarray) -> np.ndarray:
    """Signed distance to the mask's border in mm, on a grid of 2 mm."""
    inside, outside = (ndimage.distance_transform_edt(side, sampling=2) for side in (mask, ~mask))
    return (inside - outside).astype(np.float32)


def make_cases(root: Path | str, *, n_cases: int, seed: int, workers: int | None) -> list[Path]:
    """Write simulated patients in the layout of BraTS 2020 and mark `root` as simulated.

    A folder appears only when all its files are written; one that exists is kept, so a broken run can be
    started again. Patient k of a seed is the same whatever `n_cases` and `workers` are.

    Args:
        root: `root/Sim_000/Sim_000_{flair,t1,t1ce,t2,seg}.nii.gz` and so on; made where it does not exist. Of another
            seed than 0 it is `Sim_7_000`, as they are other patients.
        n_cases: how many patients.
        seed: what they are drawn from.
        workers: processes; None is one per CPU core.

    Returns:
        The patients' folders, in order.

    Raises:
        DataError: `root` holds anything else than simulated patients of this seed and version.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    by = f"brats_helpers.phantom, version {VERSION}, from seed {seed}"
    mark = f"These patients are simulated by {by}. They never lived.\n"
    held = any(not path.name.startswith(PART) for path in root.iterdir())
    found = (root / MARKER).read_text() if (root / MARKER).exists() else None  # another run writes it before the rest
    if found != mark and (found or held):
        what = "other simulated patients" if found else "files that are no simulated patients"
        raise DataError(f"{root} holds {what}. Give a new folder, or the one of seed {seed} and version {VERSION}.")
    if found is None:
        with whole_file(root / MARKER) as file:
            file.write(mark)
    sweep(root)
    name = f"Sim_{seed}_" if seed else "Sim_"
    folders = [root / f"{name}{index:03d}" for index in range(n_cases)]
    missing = [(folder, seed, index) for index, folder in enumerate(folders) if not folder.exists()]
    workers = min(workers or os.cpu_count() or 1, len(missing))
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(_write_case, *zip(*missing, strict=True)))
    else:
        for job in missing:
            _write_case(*job)
    return folders


def is_simulated(root: Path | str) -> bool:
    """Whether any patient in `root` was written by `make_cases`: there, further below, above, or behind a link."""
    folders = {Path(root).resolve(), *(path.resolve().parent for path in walk(Path(root)))}
    return any((place / MARKER).is_file() for place in {place for one in folders for place in (one, *one.parents)})


def _write_case(folder: Path, seed: int, index: int) -> None:
    with threadpool_limits(1):  # of another number of threads the sums, and so the patients, would differ a little
        images, classes = simulate_case(np.random.default_rng([seed, index]))
    with part_folder(folder.parent) as part:
        for name, volume in [*images.items(), ("seg", classes_to_labels(classes))]:
            nib.save(nib.Nifti1Image(volume, AFFINE), part / f"{folder.name}_{name}.nii.gz")
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another run was faster
                raise


def simulate_case(rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Simulate one patient.

    Returns:
        The images by modality (int16, shape `SHAPE`, 0 outside the brain, above 0 inside) and the reference
        segmentation as class indices 0 to 3 (uint8, same shape). Whole tumour and core are never empty.
    """
    anatomy = _draw_anatomy(rng)
    tumour = _draw_tumour(rng, anatomy)
    images = _draw_images(rng, anatomy, tumour)
    box = tuple(slice(low, low + size) for low, size in zip(anatomy.origin, anatomy.inside.shape, strict=True))
    classes = np.zeros(SHAPE, np.uint8)
    classes[box] = tumour.classes
    volumes = {}
    for name in MODALITIES:
        volumes[name] = np.zeros(SHAPE, np.int16)
        volumes[name][box] = images[name]
    return volumes, classes


def _spread(volume: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Apply one matrix (out, in) along each axis of a volume: interpolation, blur, resampling."""
    x, y, z = matrices
    volume = (x @ volume.reshape(len(volume), -1)).reshape(len(x), *volume.shape[1:])
    return (y @ volume) @ z.T


@cache
def _hats(n_fine: int, n_coarse: int, spacing: float) -> np.ndarray:
    """Linear interpolation from nodes `spacing` voxels apart, first node at voxel 0; shape (n_fine, n_coarse)."""
    return np.maximum(0, 1 - np.abs(np.arange(n_fine)[:, None] / spacing - np.arange(n_coarse))).astype(np.float32)


def _bells(n_fine: int, n_coarse: int, spacing: float, shift: float) -> np.ndarray:
    """Cubic B-splines on nodes `spacing` voxels apart; shape (n_fine, n_coarse)."""
    t = np.abs((np.arange(n_fine)[:, None] + shift) / spacing + 1 - np.arange(n_coarse))
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(0, 2 - t) ** 3 / 6).astype(np.float32)


def _noise(rng: np.random.Generator, shape: Sequence[int], spacing: float) -> np.ndarray:
    """Smooth random field of about zero mean and unit variance; `spacing` is its grain in voxels."""
    sizes = [int(size / spacing) + 4 for size in shape]
    shifts = rng.uniform(0, spacing, 3)
    nodes = rng.standard_normal(sizes, dtype=np.float32)
    bells = [_bells(*axis) for axis in zip(shape, sizes, [spacing] * 3, shifts, strict=True)]
    return _spread(nodes, bells) * 3.0  # a cubic B-spline keeps 0.479 of the variance an axis: 0.479 ** -1.5 = 3.0


@dataclass
class _Mass:
    """What is decided about the tumour before the brain is built, because the brain yields to it."""

    centre: np.ndarray  # voxel in BraTS space
    core_ml: float
    oedema_ml: float


@dataclass
class _Anatomy:
    """One brain in its box of BraTS space. `where` indexes the simulated voxels of the flattened box."""

    origin: np.ndarray  # first voxel of the box
    inside: np.ndarray  # bool, what the skull strip left
    remnants: dict[str, np.ndarray]  # fractions at `where` of tissues that lie outside the brain, by name
    where: np.ndarray
    white: np.ndarray  # fractions at `where`, before disease
    grey: np.ndarray
    fluid: np.ndarray
    deep: np.ndarray
    depth: np.ndarray  # mm below the brain's surface at `where`
    ventricle: np.ndarray  # mm from the ventricles at `where`
    midline: np.ndarray  # mm from the plane between the hemispheres at `where`
    below: np.ndarray  # mm below the brain's centre at `where`
    mass: _Mass

    def fill(self, values: np.ndarray) -> np.ndarray:
        """A volume with `values` at `where` and 0 elsewhere."""
        volume = np.zeros(self.inside.size, np.float32)
        volume[self.where] = values
        return volume.reshape(self.inside.shape)

    def noise(self, rng: np.random.Generator, grain: float) -> np.ndarray:
        """`_noise` at `where`."""
        return _noise(rng, self.inside.shape, grain).ravel()[self.where]


def _draw_anatomy(rng: np.random.Generator) -> _Anatomy:
    templates = _templates()
    sizes = [n // _COARSE + 2 for n in SHAPE]
    nodes = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) * _COARSE for n in sizes], indexing="ij"))

    # Pose: where each node lies in the template.
    centre = np.array([119, 129, 76]) + rng.normal(0, (1.0, 2.0, 1.5))
    scale = 0.955 * np.exp(rng.normal(0, 0.02) + rng.normal(0, 0.02, 3))
    turn = _rotation(np.deg2rad(rng.normal(0, (4.0, 2.0, 3.0))))
    mirror = np.array([-1.0 * rng.choice([-1, 1]), -1.0, 1.0])  # BraTS counts X and Y backwards; either side may lead
    offset = np.einsum("ij,jxyz->ixyz", turn, nodes - centre[:, None, None, None])
    source = (mirror / scale)[:, None, None, None] * offset + templates.centre[:, None, None, None]
    for grain, size in ((16, 2.5), (6, 1.8), (3, 1.3)):
        source += np.stack([_noise(rng, sizes, grain) for _ in range(3)]) * size

    # Age: ventricles grow into the brain, sulci widen.
    age = rng.beta(1.6, 1.4)
    wall = ndimage.map_coordinates(templates.ventricle, source / 2, order=1, mode="nearest")
    slope = np.stack(np.gradient(ndimage.gaussian_filter(wall, 0.7), _COARSE))
    growth = (6.5 * age - 1.5 + rng.normal(0, 0.8)) * np.exp(-np.maximum(wall, 0) / 14) * np.clip(1 + wall / 8, 0, 1)
    source -= mirror[:, None, None, None] * growth * slope

    depth = ndimage.map_coordinates(templates.depth, source / 2, order=1, mode="nearest")
    mass = _draw_mass(rng, nodes, source, depth)
    left, eye = _draw_remnants(rng, source, depth)
    source += mirror[:, None, None, None] * _pull(nodes, mass, depth, rng.uniform(0.15, 0.75))

    # From here on at 1 mm, in the brain's box, at voxels within reach of the brain.
    near = np.argwhere((depth > -_MARGIN) | (left > 0)) * _COARSE
    low = np.maximum(near.min(0), 0)
    shape = np.minimum(near.max(0) + _COARSE, SHAPE) - low
    finer = [_hats(full, n, _COARSE) for full, n in zip(SHAPE, sizes, strict=True)]
    finer = [hats[first : first + size] for hats, first, size in zip(finer, low, shape, strict=True)]
    deep_in = _spread(depth, finer)
    left, eye = _spread(left, finer), _spread(eye, finer)
    where = np.flatnonzero((deep_in > -_MARGIN) | (left > 0))
    at = np.stack([_spread(axis.astype(np.float32), finer).ravel()[where] for axis in source])
    at += np.stack([_noise(rng, shape, 5).ravel()[where] for _ in range(3)]) * rng.uniform(0.4, 0.9)
    white, grey, deep = (
        ndimage.map_coordinates(volume, at, order=1, mode="nearest")
        for volume in (templates.white, templates.grey, templates.deep)
    )

    rough = _noise(rng, shape, 2.6).ravel()[where] * rng.uniform(0.05, 0.15)
    folds = _noise(rng, shape, 5).ravel()[where] * rng.uniform(0.05, 0.20)
    fluid = 1 - white - grey
    wide = 1.3 * fluid + 0.3 * (age - 0.1) + folds + rough
    logits = np.stack([white + 0.5 * rough, grey - 0.5 * rough, wide]) * rng.uniform(9, 14)
    white, grey, fluid = softmax(logits, axis=0)

    strip = deep_in + _noise(rng, shape, 12) * rng.uniform(0.3, 1.2) + _noise(rng, shape, 3) * 0.4
    outside = (left > 0) & (deep_in < 0)
    inside = (strip > rng.normal(-0.8, 0.8)) | outside
    if rng.random() < 0.15:  # the scanner's field of view ended inside the head
        axis, cut = rng.integers(1, 3), rng.integers(6, 18)
        edge = np.moveaxis(inside, axis, 0)  # in front, behind or below
        edge[slice(cut) if axis == 2 or rng.random() < 0.5 else slice(-cut, None)] = False
    kind, grain = _noise(rng, shape, 7).ravel()[where], rng.uniform(2, 8)
    shares = softmax(grain * np.stack([0.6 - np.abs(kind), kind - 0.2, -kind - 0.4]), axis=0)
    ball = expit(2 * eye.ravel()[where])
    shares = {name: share * (1 - ball) for name, share in zip(("muscle", "fat", "bone"), shares, strict=True)}
    outside &= inside
    remnants = {name: share * outside.ravel()[where] for name, share in (shares | {"vitreous": ball}).items()}
    wall = _spread(ndimage.map_coordinates(templates.ventricle, source / 2, order=1, mode="nearest"), finer)
    return _Anatomy(
        origin=low,
        inside=inside,
        remnants=remnants,
        where=where,
        white=white,
        grey=grey,
        fluid=fluid,
        deep=deep,
        depth=deep_in.ravel()[where],
        ventricle=wall.ravel()[where],
        midline=np.abs(at[0] - float(templates.centre[0])),
        below=float(templates.centre[2]) - at[2],
        mass=mass,
    )


def _rotation(angles: np.ndarray) -> np.ndarray:
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    return (
        np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    )


def _draw_mass(rng: np.random.Generator, nodes: np.ndarray, source: np.ndarray, depth: np.ndarray) -> _Mass:
    """Choose size and place: the cerebrum, mostly its white matter, at times close to the surface."""
    whole_ml = float(np.clip(75 * np.exp(rng.normal(0, 0.7)), 10, 200))
    core_ml = max(whole_ml * rng.beta(2.2, 3.2), 1.0)
    white = ndimage.map_coordinates(_templates().white, source, order=1)
    centre = _templates().centre
    cerebellum = (source[1] < centre[1] - 20) & (source[2] < centre[2] - 12)
    cerebrum = (depth > 8) & (source[2] > centre[2] - 25) & ~cerebellum
    lobes = np.clip((np.abs(source[0] - centre[0]) - 6) / 20, 0.06, 1) * np.clip(1.6 - depth / 40, 0.1, 1)
    weight = np.where(cerebrum, np.clip(white, 0.1, 1) * lobes, 0).ravel()
    node = rng.choice(weight.size, p=weight / weight.sum())
    return _Mass(nodes.reshape(3, -1)[:, node] + rng.uniform(-2, 2, 3), core_ml, whole_ml - core_ml)


def _draw_remnants(rng: np.random.Generator, source: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the strip left of the head, in one patient of four: above 0 where it did; and mm inside an eyeball.

    Eyes with what lies around and behind them, and tissue below the brain: what networks that saw nothing but clean
    strips take for tumour.
    """
    place = source - _templates().centre[:, None, None, None]
    left, eye = (np.full(depth.shape, -9, np.float32) for _ in range(2))
    rough = _noise(rng, depth.shape, 4) * rng.uniform(1, 4)
    eyes, base = rng.random(2) < 0.15
    if eyes:
        at = _EYE + rng.normal(0, 2.5, 3)
        offset = np.stack([np.abs(place[0]) - at[0], place[1] - at[1], place[2] - at[2]])
        eye = rng.uniform(11, 13) - np.sqrt((offset**2).sum(0))
        behind = np.sqrt(offset[0] ** 2 + offset[2] ** 2 + (0.6 * (offset[1] + 8)) ** 2)
        left = np.maximum(left, rng.uniform(6, 20) - behind + rough)
        left = np.maximum(left, eye) if rng.random() < 0.7 else left
    if base:
        below = rng.uniform(-50, -20) - place[2] + rng.uniform(-0.5, 0.5) * place[1]
        left = np.maximum(left, np.minimum(below, rng.uniform(2, 22) + depth) + rough)
    return left, np.maximum(eye, -9)


def _pull(nodes: np.ndarray, mass: _Mass, depth: np.ndarray, strength: float) -> np.ndarray:
    """Mass effect: how far towards the tumour's centre each node finds its tissue, mm.

    Tissue that lay in a ball of part of the tumour's volume gave way; volume is kept nearby and the push fades with
    distance and towards the skull.
    """
    offset = nodes - mass.centre[:, None, None, None]
    distance = np.sqrt((offset**2).sum(0)) + 1e-3
    swollen = (mass.core_ml + 0.25 * mass.oedema_ml) * 1000 * 3 / (4 * np.pi)
    before = np.cbrt(np.maximum(distance**3 - swollen * strength, (0.3 * distance) ** 3))
    push = (distance - before) * np.exp(-distance / 60) * np.clip(depth / 18, 0, 1)
    return -offset / distance * push


@dataclass
class _Tumour:
    classes: np.ndarray  # uint8, shape of the box: the reference segmentation
    core: np.ndarray  # fractions at `where`, as the scanner sees them
    enhancing: np.ndarray
    necrosis: np.ndarray
    oedema: np.ndarray


def _draw_tumour(rng: np.random.Generator, anatomy: _Anatomy) -> _Tumour:
    mass = anatomy.mass
    voxels = np.stack(np.unravel_index(anatomy.where, anatomy.inside.shape)).astype(np.float32)
    within = anatomy.inside.ravel()[anatomy.where]

    # Core: lobes of ellipsoids with a rough surface; `core` is about mm inside it.
    radius = float(np.cbrt(mass.core_ml * 1000 * 3 / (4 * np.pi)))
    core = np.full(anatomy.where.size, -np.inf, np.float32)
    for lobe in range(min(rng.geometric(0.55), 5)):
        size, seat = radius, mass.centre - anatomy.origin
        if lobe > 0:  # on the first one's flank, or a focus of its own
            size *= rng.uniform(0.4, 0.8)
            way = rng.normal(0, 1, 3)
            apart = radius * rng.uniform(0.6, 1.1) + (rng.uniform(8, 25) if rng.random() < 0.2 else 0)
            seat = seat + way / np.linalg.norm(way) * apart
        axes = _rotation(rng.uniform(0, 2 * np.pi, 3)) * np.exp(rng.normal(0, 0.22, 3))[:, None]
        offset = axes.astype(np.float32) @ (voxels - seat[:, None].astype(np.float32))
        core = np.maximum(core, size - np.sqrt((offset**2).sum(0)))
    core += anatomy.noise(rng, max(0.45 * radius, 3)) * radius * rng.uniform(0.06, 0.22)
    core += anatomy.noise(rng, 2.5) * rng.uniform(0.3, 0.9)
    core -= 0.35 * radius * anatomy.fluid
    core -= _threshold(core[within], mass.core_ml)
    in_core = expit(core * 2)

    # Enhancement: a rim of uneven thickness, patches, or none; and what is left of the core.
    low_grade = rng.random() < 0.1
    lumps = anatomy.noise(rng, max(0.35 * radius, 3))
    crumbs = anatomy.noise(rng, 2.2)
    ring = rng.uniform(0.2, 1.0) ** 0.5
    score = (1 - ring + 0.2) * lumps - 3 * ring * core / radius + rng.uniform(0.05, 0.25) * crumbs
    share = float(np.clip(rng.beta(2.5, 1.9), 0.08, 0.97))
    score -= np.inf if low_grade else _threshold(score[within & (core > 0)], share * mass.core_ml)
    enhancing = in_core * expit(score * 14)
    holes = expit(4 * (lumps * 0.6 - score + rng.normal(0, 1)))
    necrosis = (in_core - enhancing) * (0.25 * holes if low_grade else holes)

    # Oedema creeps from the core along white matter, hardly into cortex, never through fluid.
    field = _creep(anatomy, core > 0, steps=rng.integers(18, 34))
    field += rng.uniform(2.5, 5) * anatomy.white + 0.5 * anatomy.noise(rng, 7) + 0.2 * crumbs
    field = np.where(core > 0, 1e3, field - 12 * anatomy.fluid)
    field -= _threshold(field[within], mass.core_ml + mass.oedema_ml)
    soak = anatomy.white + rng.uniform(0.3, 0.8) * anatomy.grey  # cortex takes up less water
    faint = 1 - rng.uniform(0, 0.6) * expit(3 * anatomy.noise(rng, 14))
    oedema = (1 - in_core) * soak * faint * expit(field * rng.uniform(1.0, 4.0))

    reader = rng.normal((0.2, 0.1, 0.25), (0.25, 0.08, 0.25)).astype(
        np.float32
    )  # one draws a little wider than another
    classes = _reference(anatomy, core + reader[0], score + reader[1], field + reader[2])
    return _Tumour(classes, in_core, enhancing, necrosis, oedema)


def _threshold(values: np.ndarray, ml: float) -> float:
    """The value that `ml` millilitres of 1 mm voxels exceed."""
    n = int(np.clip(ml * 1000, 50, values.size - 1))
    return float(np.partition(values, values.size - n)[values.size - n])


def _creep(anatomy: _Anatomy, core: np.ndarray, steps: int) -> np.ndarray:
    """Logarithm of what diffuses out of the core through tissue, at `where`; computed at 3 mm."""
    shape, cell = anatomy.inside.shape, 3
    sizes = [n // cell + 2 for n in shape]
    back = [_hats(fine, n, cell) for fine, n in zip(shape, sizes, strict=True)]
    pool = [m.T / np.maximum(m.sum(0)[:, None], 1e-6) for m in back]
    speed = _spread(anatomy.fill(anatomy.white + 0.12 * anatomy.grey), pool)
    start = _spread(anatomy.fill(core), pool)
    amount = start
    for _ in range(steps):
        amount = np.maximum(ndimage.uniform_filter(amount, 3) * speed, start)
    return np.log(_spread(amount, back).ravel()[anatomy.where] + 1e-12)


def _reference(anatomy: _Anatomy, core: np.ndarray, score: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The segmentation a reader would draw: the true borders, a little smoothed, without specks."""

    def drawn(inside, sigma):
        return ndimage.gaussian_filter(anatomy.fill(inside), sigma) > 0.5

    in_core = drawn(core > 0, 0.6) & anatomy.inside
    whole = (drawn(field > 0, 0.9) & anatomy.inside) | in_core
    parts, _ = ndimage.label(whole)
    large = np.bincount(parts.ravel()) >= 150
    large[0] = False
    whole = large[parts] | in_core
    whole = ndimage.binary_fill_holes(whole) & anatomy.inside
    classes = np.where(whole, 2, 0).astype(np.uint8)
    classes[in_core] = 1
    classes[in_core & drawn((score > 0) & (core > 0), 0.5)] = 3
    return classes


def _draw_images(rng: np.random.Generator, anatomy: _Anatomy, tumour: _Tumour) -> dict[str, np.ndarray]:
    """Render the modalities: int16 volumes of the box's shape, 0 where the strip cut."""
    sick = tumour.core + (1 - tumour.core) * tumour.oedema
    well = 1 - sick
    solid = np.maximum(tumour.core - tumour.enhancing - tumour.necrosis, 0)
    grain = anatomy.noise(rng, 3)
    clump = anatomy.noise(rng, 6)

    # Vessels are where two fields cross zero, in and around the sulci; dura and sinuses hug the strip.
    lines = np.exp(-(anatomy.noise(rng, 6) ** 2 + anatomy.noise(rng, 6) ** 2) * rng.uniform(15, 50))
    vessel = np.clip(lines * (anatomy.fluid + 0.3 * anatomy.grey) * 1.5, 0, 1) * rng.uniform(0.3, 1)
    plexus = np.clip(grain - 0.6, 0, 1) * (anatomy.ventricle < 1) * anatomy.fluid * rng.uniform(0, 1)
    vessel = np.maximum(vessel, plexus)
    patch = expit(6 * (anatomy.noise(rng, 9) - rng.uniform(0.5, 2.0)))
    sinus = np.exp(-((anatomy.midline / 3) ** 2)) * np.clip(1.5 - anatomy.depth / 4, 0, 1)
    dura = np.maximum(patch * np.clip(1.5 - anatomy.depth / 2, 0, 1), sinus * np.clip(clump + 0.7, 0, 1))
    dura *= rng.uniform(0, 1)

    # White-matter lesions of age: bright on FLAIR and T2, no tumour, no label.
    lesions = np.zeros_like(grain)
    if rng.random() < 0.5:
        caps = np.exp(-np.maximum(anatomy.ventricle, 0) / rng.uniform(1, 4)) * rng.uniform(0.2, 0.8)
        spots = np.clip(3 * (anatomy.noise(rng, 4) - rng.uniform(1.8, 3)), 0, 1)
        lesions = np.clip(caps + spots, 0, 1) * anatomy.white

    # Near the air of sinuses and ears the field is uneven, and suppression fails: bright patches, above all on FLAIR.
    patchy = np.clip(anatomy.noise(rng, rng.uniform(8, 16)) + rng.uniform(-0.5, 1), 0, 2)
    near_air = expit((anatomy.below - 18) / 6) * np.clip(1.2 - anatomy.depth / 30, 0, 1) * patchy

    oedema = (1 - tumour.core) * tumour.oedema
    images = {}
    t1_deep = rng.uniform(0.3, 1.2)
    for name in MODALITIES:
        level = {tissue: rng.uniform(*ranges[name]) for tissue, ranges in _BRIGHTNESS.items()}
        wet = level["oedema"]
        truth = well * (anatomy.white + level["grey"] * anatomy.grey + level["fluid"] * anatomy.fluid)
        truth += {"t1": 1, "t1ce": 1, "t2": -0.5, "flair": -0.3}[name] * t1_deep * anatomy.deep * well
        truth += oedema * wet * (1 + 0.06 * clump) + lesions * well * (wet - 1) * 0.7
        truth += solid * level["solid"] * (1 + 0.10 * clump) + tumour.necrosis * level["necrosis"] * (1 + 0.08 * clump)
        truth += tumour.enhancing * level["enhancing"] * (1 + (0.16 if name == "t1ce" else 0.07) * (grain + clump))
        truth += vessel * (1 - 0.7 * sick) * (level["vessel"] - truth)
        truth += dura * (1 - 0.7 * sick) * (level["dura"] - truth)
        rest = sum(share * level[tissue] for tissue, share in anatomy.remnants.items()) * (1 + 0.15 * clump)
        truth += rest - sum(anatomy.remnants.values()) * truth
        truth *= 1 + 0.02 * grain + 0.02 * clump + rng.uniform(0, _FAILING[name]) * near_air
        images[name] = _scan(rng, anatomy, np.maximum(truth, 0), thick=0.35 if name == "t1ce" else 0.75)
    return images


def _scan(rng: np.random.Generator, anatomy: _Anatomy, truth: np.ndarray, *, thick: float) -> np.ndarray:
    """What the scanner makes of the truth: bias, slice profile, Rician noise, resampling, the scale of its numbers."""
    shape = anatomy.inside.shape
    volume = anatomy.fill(truth) * np.exp(_noise(rng, shape, 50) * rng.uniform(0.01, 0.15))

    spacing = np.full(3, rng.uniform(0.9, 1.2))
    if rng.random() < thick:
        spacing[rng.choice(3, p=[0.15, 0.25, 0.6])] = rng.uniform(1.5, 5)
    axes = [_sampling(size, step, rng.normal(0, 0.25)) for size, step in zip(shape, spacing, strict=True)]
    native = _spread(volume, [shrink for shrink, _ in axes])
    sigma = rng.uniform(0.01, 0.05)
    native = np.hypot(
        native + sigma * rng.standard_normal(native.shape, dtype=np.float32),
        sigma * rng.standard_normal(native.shape, dtype=np.float32),
    )
    counts = _spread(native, [grow for _, grow in axes]) * 10 ** rng.uniform(2.3, 3.3)
    return np.where(anatomy.inside, np.clip(np.rint(counts), 1, 32767), 0).astype(np.int16)


def _sampling(n: int, step: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrices along one axis: n voxels to slices `step` voxels apart, and back by linear interpolation."""
    at = np.arange(shift, n + step, step)
    offset = np.arange(n)[None, :] - at[:, None]
    profile = np.exp(-0.5 * (offset / (0.4 * step)) ** 2) + 1e-12
    shrink = profile / profile.sum(1, keepdims=True)
    grow = np.maximum(0, 1 - np.abs(offset.T) / step)
    grow /= grow.sum(1, keepdims=True)
    return shrink.astype(np.float32), grow.astype(np.float32)
