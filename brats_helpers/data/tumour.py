"""The tumour of a simulated patient: core, enhancement, necrosis, oedema, and the reference segmentation."""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.special import expit

from brats_helpers.boxes import bounding_box
from brats_helpers.data.anatomy import Anatomy, dust_free, hats, rotation, spread, spread_at


@dataclass
class Tumour:
    """A tumour in the anatomy's box."""

    classes: np.ndarray  # uint8, shape of the box: the reference segmentation
    core: np.ndarray  # fractions at `anatomy.where`, as the scanner sees them; likewise below
    enhancing: np.ndarray
    necrosis: np.ndarray  # or cyst
    blood: np.ndarray  # of the solid core; empty in most patients
    oedema: np.ndarray


def draw_tumour(rng: np.random.Generator, anatomy: Anatomy) -> Tumour:
    """Draw the tumour whose place and size the anatomy has already yielded to."""
    mass = anatomy.mass
    voxels = _positions(anatomy)
    within = anatomy.inside.ravel()[anatomy.where]

    # Core: lobes of ellipsoids with a rough surface; `core` is about mm inside it.
    radius = float(np.cbrt(mass.core_ml * 1000 * 3 / (4 * np.pi)))
    core = np.full(anatomy.where.size, -np.inf, np.float32)
    multifocal = rng.random() < 0.15 * anatomy.variety
    for lobe in range(min(rng.geometric(0.55) + multifocal, 5)):
        size, seat = radius, mass.centre - anatomy.origin
        if lobe > 0:  # on the first one's flank, or a focus of its own
            size *= rng.uniform(0.3, 0.8)
            way = rng.normal(0, 1, 3)
            far = rng.random() < (0.7 if multifocal else 0.1)
            apart = radius * rng.uniform(0.6, 1.1) + (rng.uniform(8, 45) if far else 0)
            seat = seat + way / np.linalg.norm(way) * apart
        axes = rotation(rng.uniform(0, 2 * np.pi, 3)) * np.exp(rng.normal(0, 0.22, 3))[:, None]
        offset = axes.astype(np.float32) @ (voxels - seat[:, None].astype(np.float32))
        np.square(offset, out=offset)
        distance = np.sqrt(offset.sum(0))
        core = np.maximum(core, size - distance)
    core += anatomy.noise(rng, max(0.45 * radius, 3)) * radius * rng.uniform(0.06, 0.22)
    core += anatomy.noise(rng, 2.5) * rng.uniform(0.3, 0.9)
    core -= 0.35 * radius * anatomy.fluid
    core -= _threshold(core[within], mass.core_ml)
    in_core = dust_free(expit(core * 2))

    # Enhancement: a rim of uneven thickness, patches, or none; and what is left of the core.
    lumps = anatomy.noise(rng, max(0.35 * radius, 3))
    crumbs = anatomy.noise(rng, 2.2)
    ring = rng.uniform(0.2, 1.0) ** 0.5
    score = (1 - ring + 0.2) * lumps - 3 * ring * core / radius + rng.uniform(0.05, 0.25) * crumbs
    share = rng.beta(1, 3) / 4 if mass.low_grade else float(np.clip(rng.beta(2, 2), 0.06, 0.95))
    score -= _threshold(score[within & (core > 0)], share * mass.core_ml)
    hollow = rng.normal(-2.5, 2) if mass.low_grade else rng.normal(0, 1)  # necrosis or cyst: from none to all the rest
    holes = expit(4 * (lumps * 0.6 - score + hollow))
    score -= np.inf if rng.random() < (0.4 if mass.low_grade else 0.02) else 0
    enhancing = dust_free(in_core * expit(score * 14))
    necrosis = dust_free((in_core - enhancing) * holes)
    blood = np.zeros(0, np.float32)
    if rng.random() < 0.15 * anatomy.variety:
        blood = dust_free((in_core - enhancing) * expit(8 * (anatomy.noise(rng, 8) - rng.uniform(0, 1.5))))

    # Oedema creeps from the core along white matter, hardly into cortex, never through fluid.
    field = _creep(anatomy, core > 0, steps=rng.integers(18, 34))
    field += rng.uniform(2.5, 5) * anatomy.white + 0.5 * anatomy.noise(rng, 7) + 0.2 * crumbs
    field = np.where(core > 0, 1e3, field - 12 * anatomy.fluid)
    field -= _threshold(field[within], mass.core_ml + mass.oedema_ml)
    soak = anatomy.white + rng.uniform(0.3, 0.8) * anatomy.grey  # cortex takes up less water
    faint = 1 - rng.uniform(0, 0.6) * expit(3 * anatomy.noise(rng, 14))
    # Readers include what is hardly bright: at their border (`field` 0) white matter has a tenth to two fifths of it.
    oedema = dust_free((1 - in_core) * soak * faint * expit(field * 4 ** rng.uniform(-0.6, 1) - rng.uniform(0.5, 2.2)))

    # One reader draws a little wider than another.
    reader = rng.normal((0.2, 0.04, 0), (0.25, 0.08, 0.25)).astype(np.float32)
    classes = _reference(anatomy, core + reader[0], score + reader[1], field + reader[2])
    return Tumour(classes, in_core, enhancing, necrosis, blood, oedema)


def _positions(anatomy: Anatomy) -> np.ndarray:
    """X, Y and Z of the simulated voxels in the anatomy's box, shape (3, n)."""
    _, ny, nz = anatomy.inside.shape
    rest = anatomy.where.astype(np.int32)
    positions = np.empty((3, rest.size), np.float32)
    positions[0], rest = np.divmod(rest, ny * nz)
    positions[1], positions[2] = np.divmod(rest, nz)
    return positions


def _threshold(values: np.ndarray, ml: float) -> float:
    """The value that `ml` millilitres of 1 mm voxels exceed."""
    n = int(np.clip(ml * 1000, 50, values.size - 1))
    return float(np.partition(values, values.size - n)[values.size - n])


def _creep(anatomy: Anatomy, core: np.ndarray, steps: int) -> np.ndarray:
    """Logarithm of what diffuses out of the core through tissue, at `where`; computed at 3 mm."""
    shape, cell = anatomy.inside.shape, 3
    sizes = [n // cell + 2 for n in shape]
    back = [hats(fine, n, cell) for fine, n in zip(shape, sizes, strict=True)]
    pool = [m.T / np.maximum(m.sum(0)[:, None], 1e-6) for m in back]
    speed = spread(anatomy.fill(anatomy.white + 0.12 * anatomy.grey), pool)
    start = spread(anatomy.fill(core), pool)
    amount = start
    for _ in range(steps):
        amount = dust_free(np.maximum(ndimage.uniform_filter(amount, 3) * speed, start))
    return np.log(spread_at(anatomy.where, amount, back) + 1e-12)


def _reference(anatomy: Anatomy, core: np.ndarray, score: np.ndarray, field: np.ndarray) -> np.ndarray:
    """The segmentation a reader would draw: the true borders, a little smoothed, without specks."""
    seen = np.zeros(anatomy.inside.size, np.uint8)  # bit 0: core, bit 1: whole tumour, bit 2: enhancing tumour
    seen[anatomy.where] = (core > 0) + 2 * (field > 0).view(np.uint8) + 4 * ((score > 0) & (core > 0)).view(np.uint8)
    seen = seen.reshape(anatomy.inside.shape)
    box = tuple(
        slice(max(side.start - 6, 0), min(side.stop + 6, size))  # 6 voxels are beyond the reach of the filters
        for side, size in zip(bounding_box(seen), seen.shape, strict=True)
    )
    seen, inside = seen[box], anatomy.inside[box]

    def drawn(bit: int, sigma: float) -> np.ndarray:
        return ndimage.gaussian_filter((seen & bit > 0).astype(np.float32), sigma) > 0.5

    in_core = drawn(1, 0.6) & inside
    whole = (drawn(2, 0.9) & inside) | in_core
    parts, _ = ndimage.label(whole)
    large = np.bincount(parts.ravel()) >= 150
    large[0] = False
    whole = large[parts] | in_core
    whole = ndimage.binary_fill_holes(whole) & inside
    classes = np.zeros(anatomy.inside.shape, np.uint8)
    classes[box][whole] = 2
    classes[box][in_core] = 1
    classes[box][in_core & drawn(4, 0.5)] = 3
    return classes
