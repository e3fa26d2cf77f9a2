"""What the scanner makes of a simulated patient: contrast, coil bias, slice profile, noise and skull strip."""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from brats_helpers.data.anatomy import Anatomy, dust_free, spread, spread_at
from brats_helpers.data.tumour import Tumour
from brats_helpers.labels import MODALITIES

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

    # White-matter lesions of age: bright on FLAIR and T2, but neither tumour nor labelled.
    lesions = np.zeros_like(grain)
    if rng.random() < 0.5:
        caps = np.exp(-np.maximum(anatomy.ventricle, 0) / rng.uniform(1, 4)) * rng.uniform(0.2, 0.8)
        spots = np.clip(3 * (anatomy.noise(rng, 4) - rng.uniform(1.8, 3)), 0, 1)
        lesions = np.clip(caps + spots, 0, 1) * anatomy.white

    # Near the air of sinuses and ears the field is uneven and suppression fails: bright patches, above all on FLAIR.
    patchy = np.clip(anatomy.noise(rng, rng.uniform(8, 16)) + rng.uniform(-0.5, 1), 0, 2)
    near_air = expit((anatomy.below - 18) / 6) * np.clip(1.2 - anatomy.depth / 30, 0, 1) * patchy

    scene = _Scene(anatomy, tumour, grain, clump, vessel, dura, lesions, near_air, t1_deep=rng.uniform(0.3, 1.2))
    images = {}
    for name in MODALITIES:
        level = {tissue: rng.uniform(*ranges[name]) for tissue, ranges in _BRIGHTNESS.items()}
        truth = scene.brightness(name, level, failing=rng.uniform(0, _FAILING[name]))
        images[name] = _scan(rng, anatomy, truth, thick=0.35 if name == "t1ce" else 0.75)
    return images


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
    near_air: np.ndarray
    t1_deep: float

    def brightness(self, name: str, level: dict[str, float], *, failing: float) -> np.ndarray:
        """The noiseless image of one modality at `anatomy.where`, where healthy white matter is 1."""
        truth = np.empty_like(self.grain)
        for start in range(0, truth.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            truth[block] = self._mixture(block, name, level)
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
        solid = np.maximum(core - enhancing - necrosis, 0)
        spotty = 0.16 if name == "t1ce" else 0.07
        healthy = anatomy.white[block] + level["grey"] * anatomy.grey[block] + level["fluid"] * anatomy.fluid[block]
        truth = well * healthy
        truth += _DEEP[name] * self.t1_deep * anatomy.deep[block] * well
        truth += oedema * wet * (1 + 0.06 * clump) + self.lesions[block] * well * (wet - 1) * 0.7
        truth += solid * level["solid"] * (1 + 0.10 * clump) + necrosis * level["necrosis"] * (1 + 0.08 * clump)
        truth += enhancing * level["enhancing"] * (1 + spotty * (grain + clump))
        truth += self.vessel[block] * (1 - 0.7 * sick) * (level["vessel"] - truth)
        truth += self.dura[block] * (1 - 0.7 * sick) * (level["dura"] - truth)
        return truth


def _scan(rng: np.random.Generator, anatomy: Anatomy, truth: np.ndarray, *, thick: float) -> np.ndarray:
    """What the scanner makes of the truth: bias, slice profile, Rician noise, resampling, the scale of its numbers."""
    shape = anatomy.inside.shape
    bias = anatomy.noise(rng, 50)
    bias *= rng.uniform(0.01, 0.15)
    volume = anatomy.fill(truth * np.exp(bias, out=bias))

    spacing = np.full(3, rng.uniform(0.9, 1.2))
    if rng.random() < thick:
        spacing[rng.choice(3, p=[0.15, 0.25, 0.6])] = rng.uniform(1.5, 5)
    axes = [_sampling(size, step, rng.normal(0, 0.25)) for size, step in zip(shape, spacing, strict=True)]
    native = spread(volume, [shrink for shrink, _ in axes])
    sigma = rng.uniform(0.01, 0.05)
    real, imaginary = (rng.standard_normal(native.shape, dtype=np.float32) for _ in range(2))
    real *= sigma
    real += native
    imaginary *= sigma
    seen = np.flatnonzero(anatomy.inside)
    counts = spread_at(seen, np.hypot(real, imaginary, out=real), [grow for _, grow in axes])
    counts *= 10 ** rng.uniform(2.3, 3.3)
    image = np.zeros(shape, np.int16)
    image.ravel()[seen] = np.clip(np.rint(counts, out=counts), 1, 32767, out=counts)
    return image


def _sampling(n: int, step: float, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrices along one axis: n voxels to slices `step` voxels apart, and back by linear interpolation."""
    at = np.arange(shift, n + step, step)
    offset = np.arange(n)[None, :] - at[:, None]
    profile = np.exp(-0.5 * (offset / (0.4 * step)) ** 2) + 1e-12
    shrink = profile / profile.sum(1, keepdims=True)
    grow = np.maximum(0, 1 - np.abs(offset.T) / step)
    grow /= grow.sum(1, keepdims=True)
    return shrink.astype(np.float32), grow.astype(np.float32)
