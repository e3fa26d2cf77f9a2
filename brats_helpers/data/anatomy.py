"""The healthy head of a simulated patient: the ICBM152 tissue maps, posed, bent, aged and sharpened.

Also the smooth random fields that every step of the simulation is drawn with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage
from scipy.special import expit

SHAPE = (240, 240, 155)
"""Voxels of 1 mm along X, Y, Z, as in every BraTS release."""
_MARGIN = 6  # voxels around the brain that are simulated too, so that blur and strip have something to cut from
_COARSE = 4  # mm between the nodes that carry deformations and other smooth fields
_SLAB = 4  # planes along X whose arrays fit into the processor's cache
_BLOCK = 1 << 14  # voxels, likewise
_EYE = np.array([32.0, 78.0, -44.0])  # mm from the brain's centre to the right, the front and above, or to the left


@dataclass(frozen=True)
class _Templates:
    """The ICBM152 maps at 1 mm, float32, shape (197, 233, 189), and the voxel at the brain's centre."""

    white: np.ndarray  # probability, deblurred: the templates are means of many brains, one brain has sharp folds
    tissues: np.ndarray  # white; grey, likewise; T1 brightness that white, grey and fluid do not explain; 0: (..., 4)
    depth: np.ndarray  # mm inside the brain's surface, negative outside; every second voxel
    ventricle: np.ndarray  # mm outside the ventricles' wall, negative inside; every second voxel
    centre: np.ndarray


@cache
def _templates() -> _Templates:
    """Load the templates that nilearn ships; this needs no network."""
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
    packed = np.stack([white, grey, deep, np.zeros_like(deep)], axis=-1)  # rows of 16 bytes are the fastest to gather
    return _Templates(white, packed, depth, ventricle, (box.min(0) + box.max(0)) / 2)


def _distance_inside(mask: np.ndarray) -> np.ndarray:
    """Signed distance to the mask's border in mm, on a grid of 2 mm."""
    inside, outside = (ndimage.distance_transform_edt(side, sampling=2) for side in (mask, ~mask))
    return (inside - outside).astype(np.float32)


def spread(volume: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Apply one matrix (out, in) along each axis of a volume: interpolation, blur, resampling."""
    x, y, z = matrices
    volume = (x @ volume.reshape(len(volume), -1)).reshape(len(x), *volume.shape[1:])
    return (y @ volume) @ z.T


def spread_at(where: np.ndarray, volume: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """`spread`, but only at `where`: sorted positions in the flattened result. Works through slabs that fit a cache."""
    x, y, z = matrices
    volume = (x @ volume.reshape(len(volume), -1)).reshape(len(x), *volume.shape[1:])
    values = np.empty(where.size, volume.dtype)
    firsts = np.arange(0, len(x), _SLAB)
    begins = np.searchsorted(where, firsts * len(y) * len(z))
    for first, begin, end in zip(firsts, begins, [*begins[1:], where.size], strict=True):
        slab = (y @ volume[first : first + _SLAB]) @ z.T
        values[begin:end] = slab.ravel()[where[begin:end] - first * len(y) * len(z)]
    return values


@cache
def hats(n_fine: int, n_coarse: int, spacing: float) -> np.ndarray:
    """Linear interpolation from nodes `spacing` voxels apart, first node at voxel 0; shape (n_fine, n_coarse)."""
    return np.maximum(0, 1 - np.abs(np.arange(n_fine)[:, None] / spacing - np.arange(n_coarse))).astype(np.float32)


def _bells(n_fine: int, n_coarse: int, spacing: float, shift: float) -> np.ndarray:
    """Cubic B-splines on nodes `spacing` voxels apart; shape (n_fine, n_coarse)."""
    t = np.abs((np.arange(n_fine)[:, None] + shift) / spacing + 1 - np.arange(n_coarse))
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.maximum(0, 2 - t) ** 3 / 6).astype(np.float32)


def noise_field(
    rng: np.random.Generator, shape: Sequence[int], spacing: float, where: np.ndarray | None = None
) -> np.ndarray:
    """A smooth random field of about zero mean and unit variance, float32; at the positions `where`, if given.

    `spacing` is its grain in voxels.
    """
    sizes = [int(size / spacing) + 4 for size in shape]
    shifts = rng.uniform(0, spacing, 3)
    nodes = rng.standard_normal(sizes, dtype=np.float32)
    bells = [_bells(*axis) for axis in zip(shape, sizes, [spacing] * 3, shifts, strict=True)]
    field = spread(nodes, bells) if where is None else spread_at(where, nodes, bells)
    field *= 3.0  # a cubic B-spline keeps 0.479 of the variance along each axis: 0.479 ** -1.5 = 3.0
    return field


@dataclass
class Mass:
    """The tumour's kind, place and size. Decided before the brain is built, because the brain yields to it."""

    low_grade: bool  # hardly enhances, if at all, and most of it is core
    centre: np.ndarray  # voxel in BraTS space
    core_ml: float
    oedema_ml: float


@dataclass
class Anatomy:
    """One brain in its box of BraTS space. `where` indexes the simulated voxels of the flattened box."""

    variety: float  # 0 to 1: how often the unusual happens, and how far it goes
    origin: np.ndarray  # first voxel of the box
    inside: np.ndarray  # bool, what the skull strip left
    outside: np.ndarray  # positions in `where` of what the strip left of the rest of the head; empty in most patients
    remnants: dict[str, np.ndarray]  # fractions at `outside` of tissues that are not brain, by name
    where: np.ndarray
    white: np.ndarray  # fractions at `where`, before disease
    grey: np.ndarray
    fluid: np.ndarray
    deep: np.ndarray
    depth: np.ndarray  # mm below the brain's surface at `where`
    margin: np.ndarray  # mm inside the border of the skull strip at `where`
    ventricle: np.ndarray  # mm from the ventricles at `where`
    midline: np.ndarray  # mm from the plane between the hemispheres at `where`
    below: np.ndarray  # mm below the brain's centre at `where`
    mass: Mass

    def fill(self, values: np.ndarray) -> np.ndarray:
        """A volume with `values` at `where` and 0 elsewhere."""
        volume = np.zeros(self.inside.size, np.float32)
        volume[self.where] = values
        return volume.reshape(self.inside.shape)

    def noise(self, rng: np.random.Generator, grain: float) -> np.ndarray:
        """`noise_field` at `where`."""
        return noise_field(rng, self.inside.shape, grain, self.where)


def dust_free(fractions: np.ndarray) -> np.ndarray:
    """Set what is far too small to see to exactly 0, in place: arithmetic on denormal numbers is slow."""
    fractions[fractions < 1e-30] = 0
    return fractions


def _softmax(*rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Softmax across `rows`, in place."""
    top = np.maximum.reduce(rows)
    total = np.zeros_like(top)
    for row in rows:
        row -= top
        total += np.exp(row, out=row)
    for row in rows:
        row /= total
    return rows


def _interpolate(volume: np.ndarray, at: np.ndarray) -> list[np.ndarray]:
    """Interpolate the channels of `volume`, shape (X, Y, Z, 4), linearly at voxels `at`, shape (3, n).

    Equal to `scipy.ndimage.map_coordinates(..., order=1, mode="nearest")` of each of the first three channels, in less
    than half the time: corners and weights are found once, and blocks fit into the processor's cache.
    """
    _, ny, nz, n_channels = volume.shape
    values = np.empty((3, at.shape[1]), np.float32)
    rows = volume.reshape(-1, n_channels)
    for start in range(0, at.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        first, weights = 0, []
        for axis, size in enumerate(volume.shape[:3]):
            place = np.clip(at[axis, block].astype(np.float64), 0, size - 1)
            corner = np.minimum(place.astype(np.int64), size - 2)
            first = first * size + corner
            weights.append((1 - (place - corner), place - corner))
        total = np.zeros((3, first.size))
        for x, y, z in np.ndindex(2, 2, 2):
            corners = np.take(rows, first + (x * ny * nz + y * nz + z), axis=0)
            for channel in range(3):
                part = corners[:, channel] * weights[0][x]
                part *= weights[1][y]
                part *= weights[2][z]
                total[channel] += part
        values[:, block] = total
    return list(values)


def _draw_pose(rng: np.random.Generator, nodes: np.ndarray, middle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a head's pose and shape.

    Args:
        nodes: places in the volume, float32 (3, ...), in voxels.
        middle: the centre of the template.

    Returns:
        Where each node lies in the template; and by axis 1 or -1, the template's direction.
    """
    centre = np.array([119, 129, 76]) + rng.normal(0, (1.0, 2.0, 1.5))
    scale = 0.945 * np.exp(rng.normal(0, 0.025) + rng.normal(0, 0.025, 3))
    turn = rotation(np.deg2rad(rng.normal(0, (4.0, 2.0, 3.0))))
    mirror = np.array([-1.0 * rng.choice([-1, 1]), -1.0, 1.0])  # BraTS counts X and Y backwards; either side may lead
    offset = np.einsum("ij,jxyz->ixyz", turn, nodes - centre[:, None, None, None])
    source = (mirror / scale)[:, None, None, None] * offset + middle[:, None, None, None]
    for grain, size in ((16, 2.5), (6, 1.8), (3, 1.3)):
        source += np.stack([noise_field(rng, nodes.shape[1:], grain) for _ in range(3)]) * size
    return source, mirror


def draw_anatomy(rng: np.random.Generator, *, variety: float) -> Anatomy:
    """Draw a head: pose, shape, age, tissue, and what the skull strip leaves of it.

    The higher `variety` (0 to 1), the more often something unusual happens, here and in all that follows.
    """
    templates = _templates()
    sizes = [n // _COARSE + 2 for n in SHAPE]
    nodes = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) * _COARSE for n in sizes], indexing="ij"))

    source, mirror = _draw_pose(rng, nodes, templates.centre)

    # Age: ventricles grow into the brain, sulci widen.
    age = rng.beta(1.6, 1.4)
    wall = ndimage.map_coordinates(templates.ventricle, source / 2, order=1, mode="nearest")
    slope = np.stack(np.gradient(ndimage.gaussian_filter(wall, 0.7), _COARSE))
    growth = (6.5 * age - 1.5 + rng.normal(0, 0.8)) * np.exp(-np.maximum(wall, 0) / 14) * np.clip(1 + wall / 8, 0, 1)
    source -= mirror[:, None, None, None] * growth * slope

    depth = ndimage.map_coordinates(templates.depth, source / 2, order=1, mode="nearest")
    mass = _draw_mass(rng, nodes, source, depth, variety)
    left, eye = _draw_remnants(rng, source, depth)
    source += mirror[:, None, None, None] * _pull(nodes, mass, depth, rng.uniform(0.15, 0.75))

    # From here on at 1 mm, in the brain's box, at voxels within reach of the brain.
    near = np.argwhere((depth > -_MARGIN) | (left > 0)) * _COARSE
    low = np.maximum(near.min(0), 0)
    shape = np.minimum(near.max(0) + _COARSE, SHAPE) - low
    finer = [hats(full, n, _COARSE) for full, n in zip(SHAPE, sizes, strict=True)]
    finer = [matrix[first : first + size] for matrix, first, size in zip(finer, low, shape, strict=True)]
    deep_in, off_brain = spread(depth, finer), None
    reached = deep_in > -_MARGIN
    if (left > 0).any():
        off_brain = spread(left, finer)
        reached |= off_brain > 0
    where = np.flatnonzero(reached)
    at = np.stack([spread_at(where, axis.astype(np.float32), finer) for axis in source])
    bends = [noise_field(rng, shape, 5, where) for _ in range(3)]
    amount = rng.uniform(0.4, 0.9)
    for axis, bend in zip(at, bends, strict=True):
        axis += bend * amount
    white, grey, deep = _interpolate(templates.tissues, at)

    rough = noise_field(rng, shape, 2.6, where) * rng.uniform(0.05, 0.15)
    folds = noise_field(rng, shape, 5, where) * rng.uniform(0.05, 0.20)
    fluid = 1 - white - grey
    wide = 1.3 * fluid + 0.3 * (age - 0.1) + folds + rough
    sharp = rng.uniform(9, 14)
    white, grey, fluid = _softmax((white + 0.5 * rough) * sharp, (grey - 0.5 * rough) * sharp, wide * sharp)

    strip = deep_in + noise_field(rng, shape, 12) * rng.uniform(0.3, 1.2) + noise_field(rng, shape, 3) * 0.4
    strip -= rng.normal(0.9, 1.2)
    outside = (deep_in < 0) & (off_brain > 0) if off_brain is not None else np.zeros(shape, bool)
    inside = (strip > 0) | outside
    _cut_view(rng, inside)
    outside = np.flatnonzero((outside & inside).ravel()[where])
    kind, grain = noise_field(rng, shape, 7, where[outside]), rng.uniform(2, 8)
    ball = expit(2 * spread_at(where[outside], eye, finer))
    shares = _softmax(grain * (0.6 - np.abs(kind)), grain * (kind - 0.2), grain * (-kind - 0.4))
    remnants = {name: share * (1 - ball) for name, share in zip(("muscle", "fat", "bone"), shares, strict=True)}
    wall = ndimage.map_coordinates(templates.ventricle, source / 2, order=1, mode="nearest")
    return Anatomy(
        variety=variety,
        origin=low,
        inside=inside,
        outside=outside,
        remnants=remnants | {"vitreous": ball},
        where=where,
        white=white,
        grey=grey,
        fluid=fluid,
        deep=deep,
        depth=deep_in.ravel()[where],
        margin=strip.ravel()[where],
        ventricle=spread_at(where, wall, finer),
        midline=np.abs(at[0] - float(templates.centre[0])),
        below=float(templates.centre[2]) - at[2],
        mass=mass,
    )


def _cut_view(rng: np.random.Generator, inside: np.ndarray) -> None:
    """End the scanner's field of view inside the head, in front, behind or below, in 15 % of the patients; in place."""
    if rng.random() < 0.15:
        axis, cut = rng.integers(1, 3), rng.integers(6, 18)
        edge = np.moveaxis(inside, axis, 0)
        edge[slice(cut) if axis == 2 or rng.random() < 0.5 else slice(-cut, None)] = False


def rotation(angles: np.ndarray) -> np.ndarray:
    """The 3 x 3 matrix of turns about X, Y and Z, in radians."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    return (
        np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    )


def _draw_mass(
    rng: np.random.Generator, nodes: np.ndarray, source: np.ndarray, depth: np.ndarray, variety: float
) -> Mass:
    """Choose kind, size and place: the cerebrum, mostly its white matter, at times close to the surface or midline."""
    low_grade = rng.random() < 0.28 * variety
    whole_ml = float(np.clip(95 * np.exp(rng.normal(0, 0.7)), 8, 250))
    core_ml = max(whole_ml * (rng.beta(4, 2.5) if low_grade else rng.beta(1.9, 2.5)), 1.0)
    white = ndimage.map_coordinates(_templates().white, source, order=1)
    centre = _templates().centre
    cerebellum = (source[1] < centre[1] - 20) & (source[2] < centre[2] - 12)
    cerebrum = (depth > 8) & (source[2] > centre[2] - 25) & ~cerebellum
    aside = np.abs(source[0] - centre[0])
    lobes = np.clip((aside - 6) / 20, 0.06, 1) * np.clip(1.6 - depth / 40, 0.1, 1)
    if rng.random() < 0.12 * variety:  # across the corpus callosum
        lobes = np.exp(-((aside / 8) ** 2))
    weight = np.where(cerebrum, np.clip(white, 0.1, 1) * lobes, 0).ravel()
    node = rng.choice(weight.size, p=weight / weight.sum())
    return Mass(low_grade, nodes.reshape(3, -1)[:, node] + rng.uniform(-2, 2, 3), core_ml, whole_ml - core_ml)


def _draw_remnants(rng: np.random.Generator, source: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw what the skull strip leaves of the head in one patient of four: eyes with surroundings, or tissue below.

    Networks that have seen only clean strips take these for tumour.

    Returns:
        At the nodes: a value above 0 where something is left, and mm inside an eyeball.
    """
    place = source - _templates().centre[:, None, None, None]
    left, eye = (np.full(depth.shape, -9, np.float32) for _ in range(2))
    rough = noise_field(rng, depth.shape, 4) * rng.uniform(1, 4)
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


def _pull(nodes: np.ndarray, mass: Mass, depth: np.ndarray, strength: float) -> np.ndarray:
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
