"""The challenge's scoring rules by year and task.

A rule turns two boolean masks of one region into figures:

- `dice`, `hd95_mm`, and `nsd_0.5mm` and `nsd_1mm`, the surface Dice at these tolerances;
- `lesion_f1`, `lesion_precision` and `lesion_recall`, by the rule's own definition of a lesion.

`brats2026` has also `nsd`, whose tolerance is the smallest side of a voxel. A figure is None where the rule leaves the
patient out of the mean. No figure is NaN or infinite, because the rules define the scores of empty masks.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from brats_helpers.labels import REGIONS, DataError
from brats_helpers.scoring import lesions, surface
from brats_helpers.scoring.lesions import Detection
from brats_helpers.scoring.overlap import crop_tumour, dice, members

Figures = dict[str, float | None]
Spacing = tuple[float, float, float]

TASKS = ("GLI", "SSA", "PED", "MEN", "MET")
"""Tasks of the challenge by the abbreviation in its patients' names; the first one is the default."""
NSD_MM = (0.5, 1.0)
"""Tolerances of the surface Dice in mm."""
ONE_EMPTY_MM = 373.12866
"""HD95 of `brats2020` if one mask is empty: the diagonal of 240 x 240 x 155 mm, to the organisers' five decimals."""
LESION_ERROR_MM = 374.0
"""HD95 of a missed or false lesion under `brats2023`."""
NO_MATCH_MM = 373.0
"""HD95 without any match under `brats2026`."""
_NSD = tuple(f"nsd_{tolerance:g}mm" for tolerance in NSD_MM)


@dataclass(frozen=True)
class Rule(ABC):
    """How one region of one patient is scored.

    Attributes:
        name: such as `brats2023-MET`.
        convention: the rules of its year, such as `brats2023`.
        tasks: those of `TASKS` that it applies to.
    """

    name: str
    convention: str
    tasks: tuple[str, ...]

    @property
    def line(self) -> str:
        """The name and a description, shown beside every figure."""
        return f"{self.name}: {self._description()}"

    @abstractmethod
    def _description(self) -> str: ...

    @abstractmethod
    def dice(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> float | None:
        """Return the Dice that `score` returns, without the distances, which take longer."""

    @abstractmethod
    def score(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> Figures:
        """Score two boolean masks of shape (X, Y, Z); voxel size along X, Y, Z."""


@dataclass(frozen=True)
class WholeRegion(Rule):
    """BraTS up to 2022: the region as a whole.

    HD95 is the 95th percentile, linearly interpolated, of the distances of both directions together, between the
    voxels that erosion by the 6-neighbourhood removes (`hd95` of medpy). Surface Dice counts the same voxels. Lesions
    are 26-connected components, matched as in BraTS 2026.
    """

    def _description(self) -> str:
        return (
            "BraTS up to 2022, per patient in 3D over the whole volume; both masks empty: Dice 1 and HD95 0 mm, one of"
            f" them empty: Dice 0 and HD95 {ONE_EMPTY_MM} mm; HD95 pools the edge distances of both directions (medpy);"
            " surface Dice counts edge voxels; lesion F1 matches 26-connected components by overlap"
        )

    def dice(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> float:
        return dice(pred, truth)

    def score(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> Figures:
        if pred.any() and truth.any():
            there, back = surface.edge_distances(pred, truth, spacing_mm)
            hd95 = float(np.percentile(np.concatenate((there, back)), 95))
            nsd = [surface.surface_dice(there, back, tolerance) for tolerance in NSD_MM]
        else:
            hd95 = ONE_EMPTY_MM if pred.any() or truth.any() else 0.0
            nsd = [float(hd95 == 0)] * len(NSD_MM)
        figures = {"dice": dice(pred, truth), "hd95_mm": hd95}
        return figures | dict(zip(_NSD, nsd, strict=True)) | _of_lesions(lesions.match(pred, truth).detection)


@dataclass(frozen=True)
class DilatedLesions(Rule):
    """BraTS 2023: lesion by lesion, where the dilated reference defines the lesions (`lesions.by_dilation`).

    Every figure is the mean over reference and false lesions. Follows the organisers' description (Synapse
    syn51156910, thread 10357) and their program (rachitsaluja/BraTS-2023-Metrics), which counts in mm^3 what the
    description counts in voxels. HD95 and surface Dice weight the surface by area (google-deepmind/surface-distance).

    Attributes:
        dilations: how many times the reference is dilated.
        dropped_voxels: reference lesions of this many voxels or fewer are dropped.
    """

    dilations: int
    dropped_voxels: int

    def _description(self) -> str:
        times = "once" if self.dilations == 1 else f"{self.dilations} times"
        return (
            f"BraTS 2023, lesion-wise, for {_listed(self.tasks)}; the reference is dilated {times} and split with"
            f" 26-connectivity, and reference lesions of {self.dropped_voxels} voxels or fewer are dropped; each missed"
            f" or false lesion: Dice 0, surface Dice 0 and HD95 {LESION_ERROR_MM:g} mm; no lesion at all: 1, 1 and"
            " 0 mm; HD95 and surface Dice are weighted by surface area (surface-distance)"
        )

    def _lesions(self, pred: np.ndarray, truth: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], Detection]:
        return lesions.by_dilation(pred, truth, dilations=self.dilations, dropped_voxels=self.dropped_voxels)

    def dice(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> float:
        found, detection = self._lesions(pred, truth)
        values = [dice(p, t) for p, t in found] + [0.0] * detection.false
        return fmean(values) if values else 1.0

    def score(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> Figures:
        found, detection = self._lesions(pred, truth)
        rows = [self._lesion(p, t, spacing_mm) for p, t in found]
        rows += [(0.0, LESION_ERROR_MM, 0.0, 0.0)] * detection.false
        means = map(fmean, zip(*rows, strict=True)) if rows else (1.0, 0.0, 1.0, 1.0)
        return dict(zip(("dice", "hd95_mm", *_NSD), means, strict=True)) | _of_lesions(detection)

    def _lesion(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> tuple[float, ...]:
        """Dice, HD95 in mm and surface Dice by tolerance of one lesion of the reference."""
        if not pred.any():
            return 0.0, LESION_ERROR_MM, 0.0, 0.0
        sides = surface.area_distances(pred, truth, spacing_mm)
        nsd = (surface.surface_dice_by_area(*sides, tolerance) for tolerance in NSD_MM)
        return dice(pred, truth), surface.hd95_by_area(*sides), *nsd


@dataclass(frozen=True)
class MatchedLesions(Rule):
    """BraTS 2026: 26-connected components, matched one to one by overlap (`lesions.match`).

    Dice, HD95 and surface Dice are means over matched lesions; missed and false lesions affect only F1, precision and
    recall. HD95 is that of `WholeRegion`; surface Dice is the mean of the two masks' shares of edge voxels. For
    metastases the mean is over large reference lesions, matched or missed, and over false lesions.

    Follows the package BraTS-evaluation 0.0.10 (benchmarks/scoring_2026.py compares with it), which uses panoptica
    2.1.7. Where that package writes an infinite HD95, the rule gives `NO_MATCH_MM`, as the package's own means for
    metastases do.

    Attributes:
        large_mm3: reference lesions of at least this volume count, matched or missed; None: only matched lesions do.
    """

    large_mm3: float | None

    def _description(self) -> str:
        mean = (
            "mean over matched lesions, so that missed and false ones show in F1, precision and recall alone; no match"
        )
        left_out = "patients with both masks empty have no part in the mean"
        if self.large_mm3 is not None:
            mean = (
                f"mean over reference lesions of {self.large_mm3:g} mm³ or more and false lesions; each missed or false"
                " one"
            )
            left_out = "patients without such a reference lesion have no part in the mean"
        return (
            f"BraTS 2026 (BraTS-evaluation 0.0.10), lesion-wise, for {_listed(self.tasks)}; 26-connected components are"
            f" matched one to one by overlap; {mean}: Dice 0, surface Dice 0 and HD95 {NO_MATCH_MM:g} mm; {left_out}"
        )

    def dice(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> float | None:
        matching = lesions.match(pred, truth)
        weights = self._counted(matching, spacing_mm)
        return None if weights is None else float(matching.dice[weights[0]].sum() / max(weights[1], 1))

    def score(self, pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> Figures:
        names = ("dice", "hd95_mm", *_NSD, "nsd")
        matching = lesions.match(pred, truth)
        detection = matching.detection
        figures: Figures = {
            "lesion_f1": detection.f1,
            "lesion_precision": detection.precision,
            "lesion_recall": detection.recall,
        }
        counted = self._counted(matching, spacing_mm)
        if counted is None:
            return dict.fromkeys(names) | figures
        chosen, total = counted
        masks = matching.masks()
        rows = [(matching.dice[k], *_matched_surfaces(*masks[k], spacing_mm)) for k in chosen]
        rows += [(0.0, NO_MATCH_MM, 0.0, 0.0, 0.0)] * max(total - len(rows), not rows)
        return {name: fmean(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)} | figures

    def _counted(self, matching: lesions.Matching, spacing_mm: Spacing) -> tuple[np.ndarray, int] | None:
        """The matches that count, and the number of lesions to average over; None if the patient is left out."""
        detection = matching.detection
        if self.large_mm3 is None:
            empty = not (detection.found or detection.false or detection.missed)
            return None if empty else (np.arange(len(matching.pairs)), len(matching.pairs))
        mm3 = matching.truth.voxels * float(np.prod(spacing_mm))
        large = mm3 >= self.large_mm3
        if not large.any():
            return None
        return np.flatnonzero(large[matching.pairs[:, 1]]), int(large.sum()) + detection.false


def _matched_surfaces(pred: np.ndarray, truth: np.ndarray, spacing_mm: Spacing) -> tuple[float, ...]:
    """HD95 in mm of a matched pair, then its surface Dice at `NSD_MM` and at the smallest side of a voxel."""
    there, back = surface.edge_distances(pred, truth, spacing_mm)
    hd95 = float(np.percentile(np.concatenate((there, back)), 95))
    return hd95, *(surface.mean_surface_dice(there, back, tolerance) for tolerance in (*NSD_MM, min(spacing_mm)))


def _of_lesions(detection: Detection) -> Figures:
    """F1, precision and recall. Where one is undefined, it is 1 if both masks are empty, else 0."""
    return {
        "lesion_f1": 1.0 if detection.f1 is None else detection.f1,
        "lesion_precision": float(not detection.missed) if detection.precision is None else detection.precision,
        "lesion_recall": float(not detection.false) if detection.recall is None else detection.recall,
    }


def _listed(tasks: tuple[str, ...]) -> str:
    return " and ".join(filter(None, (", ".join(tasks[:-1]), tasks[-1])))


_GLIOMA = ("GLI", "SSA", "PED")
RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        WholeRegion("brats2020", "brats2020", TASKS),
        DilatedLesions("brats2023", "brats2023", _GLIOMA, dilations=3, dropped_voxels=50),
        DilatedLesions("brats2023-MEN", "brats2023", ("MEN",), dilations=1, dropped_voxels=50),
        DilatedLesions("brats2023-MET", "brats2023", ("MET",), dilations=1, dropped_voxels=2),
        MatchedLesions("brats2026", "brats2026", (*_GLIOMA, "MEN"), large_mm3=None),
        MatchedLesions("brats2026-MET", "brats2026", ("MET",), large_mm3=20),
    )
}
"""The rules by name."""
CONVENTIONS = {name: rule.line for name, rule in RULES.items()}
"""By name of a rule, the line shown beside its figures."""
YEARS = tuple(dict.fromkeys(rule.convention for rule in RULES.values()))
"""What `--convention` accepts; the task then decides among the year's rules."""


def get_rule(name: str) -> Rule:
    """Return the rule of a name, or raise `ValueError`."""
    if name not in RULES:
        raise ValueError(f"convention {name!r}: expected one of {', '.join(RULES)}.")
    return RULES[name]


def rule_for(convention: str, *, task: str | None = None, cases: Iterable[str] = ()) -> Rule:
    """Choose the rule for a task or, without one, for the task in the patients' names, such as BraTS-MET-00217-000.

    Args:
        convention: one of `YEARS`, or the name of a rule, which is returned if `task` is None.
        task: one of `TASKS`; None: the task that the names state, else GLI.
        cases: IDs of the patients.

    Raises:
        ValueError: an unknown convention or task.
        DataError: the names state tasks that are scored by different rules.
    """
    year = get_rule(convention).convention
    if task is None and convention not in YEARS:
        return RULES[convention]
    if task is not None and task not in TASKS:
        raise ValueError(f"task {task!r}: expected one of {', '.join(TASKS)}.")
    of_task = {name: rule for rule in RULES.values() if rule.convention == year for name in rule.tasks}
    named = {found for case in cases if (found := task_of(case))}
    tasks = [task] if task else sorted(named) or [TASKS[0]]
    chosen = {of_task[name].name for name in tasks}
    if len(chosen) > 1:
        raise DataError(
            f"The patients belong to {_listed(tuple(tasks))}, which {year} scores by different rules,"
            f" {_listed(tuple(sorted(chosen)))}. Score each task on its own, or choose one for all (--task)."
        )
    return RULES[chosen.pop()]


def task_of(case_id: str) -> str | None:
    """The task that a patient's name states, as in `BraTS-MET-00217-000`; None if it states none."""
    found = re.match(rf"BraTS[-_]({'|'.join(TASKS)})(?=[-_]|$)", case_id, re.IGNORECASE)
    return found[1].upper() if found else None


def region_dice(
    pred: np.ndarray, truth: np.ndarray, *, convention: str, spacing_mm: Spacing = (1.0, 1.0, 1.0)
) -> dict[str, float | None]:
    """Dice of WT, TC and ET of one patient as `score_case` returns it, without the distances, which take longer.

    The voxel size matters to `brats2026-MET` alone.
    """
    rule = get_rule(convention)
    pred, truth = crop_tumour(pred, truth)
    return {
        region: rule.dice(members(pred, classes), members(truth, classes), spacing_mm)
        for region, classes in REGIONS.items()
    }
