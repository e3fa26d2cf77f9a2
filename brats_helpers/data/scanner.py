"""The scan of a simulated patient: contrast, bias field, slice profile, noise and skull strip."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from brats_helpers.data.anatomy import Anatomy, dust_free, spread, spread_at
from brats_helpers.data.tumour import Tumour
from brats_helpers.labels import MODALITIES

# Brightness of tissues where white matter is 1: (lowest, highest) per modality, drawn once a patient.
_BRIGHTNESS = {
    "grey": {"flair": (0.95, 1.28), "t1": (0.68, 0.93), "t1ce": (0.70, 0.95), "t2": (1.10, 1.55)},
    "fluid": {"flair": (0.08, 0.55), "t1": (0.12, 0.55), "t1ce": (0.12, 0.55), "t2": (1.6, 3.4)},
    "vessel": {"flair": (0.2, 1.2), "t1": (0.3, 2.0), "t1ce": (1.5, 4.0), "t2": (0.2, 1.2)},
    "dura": {"flair": (0.4, 2.6), "t1": (0.4, 2.2), "t1ce": (1.2, 4.0), "t2": (0.3, 2.5)},
    "oedema": {"flair": (1.2, 3.2), "t1": (0.60, 0.97), "t1ce": (0.58, 0.95), "t2": (1.4, 3.4)},
    "solid": {"flair": (1.1, 2.6), "t1": (0.50, 1.00), "t1ce": (0.50, 1.00), "t2": (1.4, 3.2)},
    "necrosis": {"flair": (0.3, 2.4), "t1": (0.30, 0.95), "t1ce": (0.30, 0.95), "t2": (1.7, 3.6)},
    "blood": {"flair": (0.5, 2.2), "t1": (0.9, 1.7), "t1ce": (0.9, 1.7), "t2": (0.4, 2.6)},
    "enhancing": {"flair": (1.1, 2.3), "t1": (0.60, 1.05), "t1ce": (1.0, 2.2), "t2": (1.2, 2.5)},
    "vitreous": {"flair": (0.08, 0.7), "t1": (0.2, 0.5), "t1ce": (0.2, 0.5), "t2": (2.4, 4.0)},
    "muscle": {"flair": (0.3, 1.6), "t1": (0.5, 1.0), "t1ce": (0.6, 1.6), "t2": (0.4, 1.4)},
    "fat": {"flair": (0.8, 2.6), "t1": (1.2, 2.2), "t1ce": (1.2, 2.6), "t2": (1.0, 2.6)},
    "bone": {"flair": (0.02, 0.4), "t1": (0.02, 0.5), "t1ce": (0.02, 0.6), "t2": (0.02, 0.4)},
}
_FAILING = {"flair": 0.9, "t1": 0.2, "t1ce": 0.3, "t2": 0.3}  # the most that an image brightens near air, as a fraction
_DEEP = {"flair": -0.3, "t1": 1, "t1ce": 1, "t2": -0.5}  # how the templates' deep T1 brightness shows
_BLOCK = 1 << 15  # voxels whose arrays fit into the processor's cache


def draw_images(rng: np.random.Generator, anatomy: Anatomy, tumour: Tumour) -> dict[str, np.ndarray]:
    """Render the modalities: int16 volumes of the box's shape, 0 where the strip cut."""
    grain = anatomy.noise(rng, 3)
    clump = anatomy.noise(rng, 6)

    # Vessels are where two fields cross zero, in and around the sulci; dura and sinuses hug the strip.
    lines = np.exp(-(anatomy.noise(rng, 6) ** 2 + anatomy.noise(rng, 6) ** 2) * rng.uniform(15, 50))
    dust_free(lines)
    vessel = np.clip(lines * (anatomy.fluid + 0.3 * anatomy.grey) * 1.5, 0, 1) * rng.uniform(0.3, 1)
    plexus = np.clip(grain - 0.6, 0, 1) * (anatomy.ventricle < 1) * anatomy.fluid * rng.uniform(0, 1)
    vessel = np.maximum(vessel, plexus)
    patch = expit(6 * (anatomy.noise(rng, 9) - rng.uniform(0.5, 2.0)))
    sinus = np.exp(-((anatomy.midline / 3) ** 2)) * np.clip(1.5 - anatomy.depth / 4, 0, 1)
    dura = np.maximum(patch * np.clip(1.5 - anatomy.depth / 2, 0, 1), sinus * np.clip(clump + 0.7, 0, 1))
    dura *= rng.uniform(0, 1)
    dust_free(dura)

    specks = np.clip(3 * (grain - rng.uniform(1.4, 3.2)), 0, 1) * (anatomy.margin < 4)  # of fat, under the strip

    # White-matter lesions of age: bright on FLAIR and T2, but neither tumour nor labelled.
    lesions = np.zeros_like(grain)
    if rng.random() < 0.5:
        caps = np.exp(-np.maximum(anatomy.ventricle, 0) / rng.uniform(1, 4)) * rng.uniform(0.2, 0.8)
        spots = np.clip(3 * (anatomy.noise(rng, 4) - rng.uniform(1.8, 3)), 0, 1)
        lesions = np.clip(caps + spots, 0, 1) * anatomy.white

    # Near the air of sinuses and ears the field is uneven and suppression fails: bright patches, above all on FLAIR.
    patchy = np.clip(anatomy.noise(rng, rng.uniform(8, 16)) + rng.uniform(-0.5, 1), 0, 2)
    near_air = expit((anatomy.below - 18) / 6) * np.clip(1.2 - anatomy.depth / 30, 0, 1) * patchy
    edge = expit((anatomy.margin + rng.uniform(-1, 1)) * rng.uniform(1.5, 4))

    levels = _draw_levels(rng, anatomy)
    views = _draw_views(rng, anatomy)
    scene = _Scene(
        anatomy, tumour, grain, clump, vessel, dura, lesions, specks, near_air, edge, t1_deep=rng.uniform(0.3, 1.2)
    )
    images = {}
    for name in MODALITIES:
        truth = scene.brightness(name, levels[name], failing=rng.uniform(0, _FAILING[name]))
        images[name] = _scan(rng, anatomy, truth, views[name], thick=0.35 if name == "t1ce" else 0.75)
    return images


def _draw_levels(rng: np.random.Generator, anatomy: Anatomy) -> dict[str, dict[str, float]]:
    """Draw the brightness of each tissue by modality, such that every part of the tumour shows in one of them."""
    reach = 0.25 + 0.25 * anatomy.variety  # of the range, to either side of its middle

    def draw(low: float, high: float) -> float:
        return low + (high - low) * rng.uniform(0.5 - reach, 0.5 + reach)

    levels: dict[str, dict[str, float]] = {}
    for name in MODALITIES:
        levels[name] = {tissue: draw(*ranges[name]) for tissue, ranges in _BRIGHTNESS.items()}
    flair, t1, t1ce = levels["flair"], levels["t1"], levels["t1ce"]
    flair["oedema"] = max(flair["oedema"], flair["grey"] + 0.12)
    if anatomy.mass.low_grade:  # a core that is darker than its surroundings on T1, and enhances faintly
        for level in (t1, t1ce):
            level["solid"] = max(level["oedema"] - rng.uniform(0.08, 0.35), 0.35)
        t1ce["enhancing"] = t1ce["solid"] + rng.uniform(0.3, 1.2)
    t1ce["enhancing"] = max(t1ce["enhancing"], max(t1ce["solid"], t1ce["necrosis"]) + 0.25)
    return levels


def _draw_views(rng: np.random.Generator, anatomy: Anatomy) -> dict[str, np.ndarray]:
    """Draw what each modality holds of the brain, bool; at least one always holds all of it.

    At full variety, one to three are stripped closer in 30 % of the patients, and one ends inside the brain in 7 %.
    """
    views = dict.fromkeys(MODALITIES, anatomy.inside)
    names = [str(name) for name in rng.permutation(MODALITIES)]
    if rng.random() < 0.3 * anatomy.variety:
        margin = anatomy.fill(anatomy.margin + 0.5 * anatomy.noise(rng, 5))
        for name in names[: rng.integers(1, 4)]:
            views[name] = anatomy.inside & (margin > rng.uniform(-0.5, 2))
    if rng.random() < 0.07 * anatomy.variety:
        tilt = rng.normal(0, 0.2, 3)
        tilt[rng.choice(3, p=[0.1, 0.45, 0.45])] = rng.choice([-1, 1])
        x, y, z = (np.arange(n) * slope for n, slope in zip(anatomy.inside.shape, tilt, strict=True))
        height = (x[:, None, None] + y[:, None] + z).astype(np.float32)
        cut = np.quantile(height[anatomy.inside][::50], rng.uniform(0.02, 0.35))
        views[names[0]] = views[names[0]] & (height > cut)
    return views


@dataclass
class _Scene:
    """What all modalities see: fractions and fields at `anatomy.where`."""

    anatomy: Anatomy
    tumour: Tumour
    grain: np.ndarray
    clump: np.ndarray
    vessel: np.ndarray
    dura: np.ndarray
    lesions: np.ndarray
    specks: np.ndarray
    near_air: np.ndarray
    edge: np.ndarray  # brightness of what the strip nearly cut: half air or bone
    t1_deep: float

    def brightness(self, name: str, level: dict[str, float], *, failing: float) -> np.ndarray:
        """The noiseless image of one modality at `anatomy.where`, where healthy white matter is 1."""
        truth = np.empty_like(self.grain)
        for start in range(0, truth.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            truth[block] = self._mixture(block, name, level) * self.edge[block]
        if self.anatomy.outside.size:
            at = self.anatomy.outside
            rest = sum(share * level[tissue] for tissue, share in self.anatomy.remnants.items())
            rest *= 1 + 0.15 * self.clump[at]
            truth[at] += rest - sum(self.anatomy.remnants.values()) * truth[at]
        for start in range(0, truth.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            truth[block] *= 1 + 0.02 * self.grain[block] + 0.02 * self.clump[block] + failing * self.near_air[block]
        return np.maximum(truth, 0, out=truth)

    def _mixture(self, block: slice, name: str, level: dict[str, float]) -> np.ndarray:
        """The brain without remnants of the head: tissues and tumour mixed by their fractions."""
        anatomy, tumour, wet = self.anatomy, self.tumour, level["oedema"]
        grain, clump, core = self.grain[block], self.clump[block], tumour.core[block]
        enhancing, necrosis = tumour.enhancing[block], tumour.necrosis[block]
        oedema = (1 - core) * tumour.oedema[block]
        sick = core + oedema
        well = 1 - sick
        blood = tumour.blood[block] if tumour.blood.size else 0
        necrosis = necrosis * (1 - blood)
        solid = np.maximum(core - enhancing - necrosis - blood, 0)
        spotty = 0.16 if name == "t1ce" else 0.07
        healthy = anatomy.white[block] + level["grey"] * anatomy.grey[block] + level["fluid"] * anatomy.fluid[block]
        truth = well * healthy
        truth += _DEEP[name] * self.t1_deep * anatomy.deep[block] * well
        truth += oedema * wet * (1 + 0.06 * clump) + self.lesions[block] * well * (wet - 1) * 0.7
        truth += solid * level["solid"] * (1 + 0.10 * clump) + necrosis * level["necrosis"] * (1 + 0.08 * clump)
        truth += blood * level["blood"] * (1 + 0.12 * grain)
        truth += enhancing * level["enhancing"] * (1 + spotty * (grain + clump))
        truth += self.vessel[block] * (1 - 0.7 * sick) * (level["vessel"] - truth)
        truth += self.specks[block] * (level["fat"] - truth)
        truth += self.dura[block] * (1 - 0.7 * sick) * (level["dura"] - truth)
        return truth


def _scan(
    rng: np.random.Generator, anatomy: Anatomy, truth: np.ndarray, view: np.ndarray, *, thick: float
) -> np.ndarray:
    """Scan the noiseless image: bias field, slice profile, Rician noise, resampling and intensity scale."""
    shape = anatomy.inside.shape
    bias = anatomy.noise(rng, rng.uniform(40, 80))
    bias *= rng.uniform(0.01, 0.08 + 0.1 * anatomy.variety)
    volume = anatomy.fill(truth * np.exp(bias, out=bias))

    spacing = np.full(3, rng.uniform(0.85, 1.3) if rng.random() > 0.15 * anatomy.variety else rng.uniform(1.3, 2.2))
    if rng.random() < thick:
        spacing[rng.choice(3, p=[0.15, 0.25, 0.6])] = rng.uniform(1.5, 3 + 3.5 * anatomy.variety)
    steep, width = rng.uniform(1, 4), rng.uniform(0.25, 0.42)
    axes = [_sampling(size, step, rng.normal(0, 0.25), steep, width) for size, step in zip(shape, spacing, strict=True)]
    native = spread(volume, [shrink for shrink, _ in axes])
    sigma = 10 ** rng.uniform(-1.9, -1.3 + 0.25 * anatomy.variety)
    real, imaginary = (rng.standard_normal(native.shape, dtype=np.float32) for _ in range(2))
    real *= sigma
    real += native
    imaginary *= sigma
    seen = np.flatnonzero(view)
    counts = spread_at(seen, np.hypot(real, imaginary, out=real), [grow for _, grow in axes])
    counts *= 10 ** rng.uniform(2.3, 3.3)
    if rng.random() < 0.15 * anatomy.variety:
        np.minimum(counts, np.quantile(counts[::97], rng.uniform(0.985, 0.9999)), out=counts)
    image = np.zeros(shape, np.int16)
    image.ravel()[seen] = np.clip(np.rint(counts, out=counts), 1, 32767, out=counts)
    return image


def _sampling(n: int, step: float, shift: float, steep: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrices along one axis: n voxels to slices `step` voxels apart, and back.

    A slice's profile is a Gaussian whose standard deviation is `width` times `step`. The way back interpolates linearly
    if `steep` is 1; the larger `steep`, the closer to the nearest slice.
    """
    at = np.arange(shift - step, n + step, step)
    offset = np.arange(n)[None, :] - at[:, None]
    profile = np.exp(-0.5 * (offset / (width * step)) ** 2) + 1e-12
    shrink = profile / profile.sum(1, keepdims=True)
    grow = np.maximum(0, 1 - np.abs(offset.T) / step) ** steep
    grow /= grow.sum(1, keepdims=True)
    return shrink.astype(np.float32), grow.astype(np.float32)
