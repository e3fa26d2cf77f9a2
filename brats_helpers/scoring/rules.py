"""The challenge's scoring rules by year."""

import statistics

import numpy as np

from brats_helpers.labels import REGIONS
from brats_helpers.scoring.lesions import lesion_dice, lesions
from brats_helpers.scoring.overlap import crop_tumour, dice, members
from brats_helpers.scoring.surface import edge_distances, hd95_by_area

CONVENTIONS = {
    "brats2020": "brats2020: BraTS up to 2022, per patient in 3D over the whole volume; both masks empty: Dice 1 and"
    " HD95 0 mm, one of them empty: Dice 0 and HD95 373.13 mm; HD95 pools both directions' edge distances (medpy)",
    "brats2023": "brats2023: BraTS 2023, lesion-wise; reference dilated 3 times and split with 26-connectivity,"
    " reference lesions of 50 voxels or fewer dropped; each missed or false lesion: Dice 0 and HD95 374 mm; no lesion"
    " at all: 1 and 0 mm; HD95 weighted by surface area (surface-distance)",
}
"""The rule books by name, each with the line that stands beside its figures."""
ONE_EMPTY_MM = 373.13  # about the diagonal of 240 x 240 x 155 mm
LESION_ERROR_MM = 374.0


def region_dice(pred: np.ndarray, truth: np.ndarray, *, convention: str) -> dict[str, float]:
    """Dice of WT, TC and ET of one patient: that of `score_case`, without the distances, which take longer."""
    of_region = {"brats2020": dice, "brats2023": lambda p, t: lesion_dice(*lesions(p, t))}[check_convention(convention)]
    pred, truth = crop_tumour(pred, truth)
    return {region: of_region(members(pred, classes), members(truth, classes)) for region, classes in REGIONS.items()}


def brats2020(pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    """Dice and HD95 in mm of two boolean masks, shape (X, Y, Z), by the rules of BraTS up to 2022.

    HD95 is the 95th percentile, linearly interpolated, of the distances of both directions
    together, between the voxels that erosion by the 6-neighbourhood removes (medpy's `hd95`).
    """
    if not pred.any() or not truth.any():
        both = not pred.any() and not truth.any()
        return (1.0, 0.0) if both else (0.0, ONE_EMPTY_MM)
    distances = np.concatenate(edge_distances(pred, truth, spacing_mm))
    return dice(pred, truth), float(np.percentile(distances, 95))


def brats2023(pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    """Lesion-wise Dice and HD95 in mm of two boolean masks, shape (X, Y, Z), by the rules of BraTS 2023 (glioma).

    The reference is dilated three times by the 18-neighbourhood; what then hangs together (26
    neighbours) is one lesion. Predicted components (26 neighbours) that touch a dilated lesion
    are its prediction; those that touch none are false lesions. Reference lesions of 50 voxels or
    fewer are dropped, with no penalty for what touches them. Both figures are means over the
    remaining reference lesions and the false ones.

    After the organisers' description (Synapse syn51156910, thread 10357) and their program
    (rachitsaluja/BraTS-2023-Metrics), which counts in mm^3 what the description counts in voxels.
    """
    found, false = lesions(pred, truth)
    hd95 = [hd95_by_area(p, t, spacing_mm) if p.any() else LESION_ERROR_MM for p, t in found]
    hd95 += [LESION_ERROR_MM] * false
    return lesion_dice(found, false), statistics.fmean(hd95) if hd95 else 0.0


RULES = {"brats2020": brats2020, "brats2023": brats2023}


def check_convention(convention: str) -> str:
    if convention not in RULES:
        raise ValueError(f"convention {convention!r}: expected one of {', '.join(RULES)}.")
    return convention
