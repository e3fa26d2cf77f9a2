"""Post-processing of label maps: remove small components, fill holes, relabel too little ET as NCR.

The thresholds are chosen on validation patients, saved with the run, and then applied to all other patients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
from scipy import ndimage

from brats_helpers.files import read_json
from brats_helpers.labels import CLASSES, REGIONS, DataError
from brats_helpers.scoring.overlap import mean_dice
from brats_helpers.scoring.rules import Spacing, region_dice
from brats_helpers.scoring.statistics import mean_known
from brats_helpers.training.model_zip import is_model, read_facts

NCR, ED, ET = (CLASSES.index(name) for name in ("NCR", "ED", "ET"))
TRIED = {
    "component_voxels": (10, 30, 100, 300, 1000),
    "fill_holes": (True,),
    "et_voxels": (30, 100, 200, 500, 1000),
}
"""The values that `choose` tries, mildest first, by rule, in the order in which the rules are applied."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Rules for a label map; 0 and False leave it as it is.

    Attributes:
        component_voxels: connected parts of the tumour (26 neighbours) of fewer voxels become background.
        fill_holes: holes in the tumour core become NCR, then holes in the whole tumour become ED.
        et_voxels: a patient's enhancing tumour of fewer voxels becomes NCR, which leaves the tumour core as it is.
            A patient without enhancing tumour scores 0 for a single voxel of it and 1 for none.
    """

    component_voxels: int
    fill_holes: bool
    et_voxels: int

    def __call__(self, classes: np.ndarray) -> np.ndarray:
        """Apply the rules to one patient's class indices, uint8, three axes in any order; returns a new array."""
        classes = classes.copy()
        if not classes.any():  # the box may be empty
            return classes
        for box in ndimage.find_objects((classes > 0).view(np.uint8)):
            tumour = classes[box]  # a view into `classes`
            if self.component_voxels:
                parts, _ = ndimage.label(tumour, np.ones((3, 3, 3)))
                tumour[(np.bincount(parts.ravel()) < self.component_voxels)[parts]] = 0
            if self.fill_holes:
                for region, filling in (("TC", NCR), ("WT", ED)):
                    solid = np.isin(tumour, REGIONS[region])
                    tumour[ndimage.binary_fill_holes(solid) & ~solid] = filling
            enhancing = tumour == ET
            if np.count_nonzero(enhancing) < self.et_voxels:
                tumour[enhancing] = NCR
        return classes

    def for_voxels(self, volume: float) -> "Rules":
        """The same rules for voxels `volume` times as large as those the thresholds were chosen on."""
        sizes = {name: round(getattr(self, name) / volume) for name in ("component_voxels", "et_voxels")}
        return replace(self, **sizes)


NO_RULES = Rules(component_voxels=0, fill_holes=False, et_voxels=0)


def choose(predicted: Sequence[tuple[np.ndarray, np.ndarray, Spacing]], *, convention: str) -> tuple[Rules, dict]:
    """Choose the rules with the highest mean Dice of WT, TC and ET of validation patients.

    The rules are chosen one after another, each on top of those before it. A threshold is taken only if the mean gain
    stays positive whichever patient is left out, because a gain in one patient may be chance. Ties go to the milder
    threshold, or to none.

    Args:
        predicted: per validation patient (prediction, reference, voxel size in mm); prediction and reference are class
            indices, uint8, three axes, and the voxel size is along the same axes.
        convention: see `rules.CONVENTIONS`.

    Returns:
        The rules, and their effect on these patients, see `gain`.
    """
    rules = NO_RULES
    before = dice = _dice(predicted, rules, convention)
    for name, values in TRIED.items():
        best, best_dice, best_gain = rules, dice, 0.0
        for value in values:
            candidate = replace(rules, **{name: value})
            after = _dice(predicted, candidate, convention)
            gains = np.array([mean_dice(a) - mean_dice(d) for a, d in zip(after, dice, strict=True)])
            if gains.sum() > best_gain and gains.sum() - gains.max() > 0:
                best, best_dice, best_gain = candidate, after, gains.sum()
        rules, dice = best, best_dice
    return rules, gain(before, dice)


def gain(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Return the effect of rules: `n` patients, and their mean Dice of WT, TC and ET `before` and `after`.

    Args:
        before, after: per patient, what `rules.region_dice` returns.
    """
    return {"n": len(before), "before": _means(before), "after": _means(after)}


def _means(dice: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean Dice of each region over the patients that the rule counts; regions without any are left out."""
    means = {region: mean_known(map(itemgetter(region), dice)) for region in REGIONS}
    return {region: mean for region, mean in means.items() if mean is not None}


def read_rules(path: Path) -> Rules:
    """Read the rules that a run chose from its `postprocess.json` or its model zip.

    Raises:
        DataError: there is no such file, or it holds no rules.
    """
    try:
        content = read_facts(path)["postprocess"] if is_model(path) else read_json(path)
        return Rules(**content.get("rules", content))
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no rules of 03_evaluate ({type(error).__name__}: {error}).") from error


def _dice(
    predicted: Sequence[tuple[np.ndarray, np.ndarray, Spacing]], rules: Rules, convention: str
) -> list[dict[str, float | None]]:
    return [
        region_dice(rules(pred), truth, convention=convention, spacing_mm=spacing_mm)
        for pred, truth, spacing_mm in predicted
    ]
