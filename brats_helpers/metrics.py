"""How good is a segmentation, by the rules of the BraTS challenge.

Every patient is scored in 3D over the whole volume, then patients are averaged. Two rule books
are known by name (`CONVENTIONS`); whoever shows a figure shows the convention beside it.

Masks are class indices (see `cases.CLASSES`), uint8, shape (X, Y, Z); distances are in mm,
volumes in ml. No function here returns NaN or infinity: the rule books say what an empty mask gets.
"""

import csv
import functools
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage, special
from scipy.spatial import cKDTree

from brats_helpers.cases import REGIONS, DataError, find_segs, read_seg, same_affine
from brats_helpers.cases import spacing_mm as spacing_of

CONVENTIONS = {
    "brats2020": "brats2020: BraTS up to 2022, per patient in 3D over the whole volume; both masks empty: Dice 1 and"
    " HD95 0 mm, one of them empty: Dice 0 and HD95 373.13 mm; HD95 pools both directions' edge distances (medpy)",
    "brats2023": "brats2023: BraTS 2023, lesion-wise; reference dilated 3 times and split with 26-connectivity,"
    " reference lesions of 50 voxels or fewer dropped; each missed or false lesion: Dice 0 and HD95 374 mm; no lesion"
    " at all: 1 and 0 mm; HD95 weighted by surface area (surface-distance)",
}
"""The rule books by name, each with the line that stands beside its figures."""

STRUCTURES = REGIONS | {"NCR": (1,), "ED": (2,)}
"""What is scored, as sets of class indices: the regions, and the labels that are no region (the label ET is one)."""

ENOUGH = 10
"""Patients; of fewer, a mean and its interval are an indication."""
ENOUGH_PAIRS = 6
"""Patients that two runs are compared by; of fewer even full agreement may be chance: five coins fall alike once in 16
times."""

_ONE_EMPTY_MM = 373.13  # about the diagonal of 240 x 240 x 155 mm
_LESION_ERROR_MM = 374.0
_DILATIONS = 3
_SMALLEST_LESION = 51  # voxels
_REACH = 3  # voxels searched one by one around a surface point before the k-d tree takes over; 2 to 6 are equally fast
_BOOTSTRAPS = 10_000
_RESAMPLE = "; write the prediction in the grid of the patient's scans."


def score_case(
    pred: np.ndarray, truth: np.ndarray, *, spacing_mm: tuple[float, float, float], convention: str
) -> dict[str, dict[str, float]]:
    """Score one patient.

    Sensitivity, specificity and volumes are those of the whole volume in either convention; with
    nothing to find, sensitivity is 1 if nothing was found and else 0, as the challenge has it.

    Args:
        pred, truth: class indices 0 to 3, uint8, shape (X, Y, Z).
        spacing_mm: voxel size along X, Y, Z.
        convention: a key of `CONVENTIONS`.

    Returns:
        For each of `STRUCTURES`: `dice`, `hd95_mm`, `sensitivity`, `specificity`, `volume_ml`,
        `volume_ml_truth` and `volume_difference_ml` (predicted minus reference).

    Raises:
        ValueError: an unknown convention, or masks of other dtype, shape or classes.
    """
    rule = _RULES[_known(convention)]
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    total = truth.size
    pred, truth = crop_tumour(pred, truth)
    scores = {}
    for name, classes in STRUCTURES.items():
        p, t = _member(pred, classes), _member(truth, classes)
        found, true, hit = (int(np.count_nonzero(mask)) for mask in (p, t, p & t))
        dice, hd95 = rule(p, t, spacing_mm)
        scores[name] = {
            "dice": dice,
            "hd95_mm": hd95,
            "sensitivity": hit / true if true else float(found == 0),
            "specificity": (total - found - true + hit) / (total - true) if true < total else float(found == total),
            "volume_ml": found * voxel_ml,
            "volume_ml_truth": true * voxel_ml,
            "volume_difference_ml": (found - true) * voxel_ml,
        }
    return scores


def region_dice(pred: np.ndarray, truth: np.ndarray, *, convention: str) -> dict[str, float]:
    """Dice of WT, TC and ET of one patient: that of `score_case`, without the distances, which take longer."""
    dice = {"brats2020": _dice, "brats2023": lambda p, t: _lesion_dice(*_lesions(p, t))}[_known(convention)]
    pred, truth = crop_tumour(pred, truth)
    return {region: dice(_member(pred, classes), _member(truth, classes)) for region, classes in REGIONS.items()}


def dice_scores(table: np.ndarray) -> dict[str, float]:
    """Dice of each of `STRUCTURES` from one patient's confusion table, both empty: 1 (convention brats2020).

    Args:
        table: voxels, integer (4, 4), by class of the reference and class predicted.
    """
    scores = {}
    for name, classes in STRUCTURES.items():
        both = table[np.ix_(classes, classes)].sum()
        masses = table[list(classes)].sum() + table[:, list(classes)].sum()
        scores[name] = float(2 * both / masses) if masses else 1.0
    return scores


def brats2020(pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    """Dice and HD95 in mm of two boolean masks, shape (X, Y, Z), by the rules of BraTS up to 2022.

    HD95 is the 95th percentile, linearly interpolated, of the distances of both directions
    together, between the voxels that erosion by the 6-neighbourhood removes (medpy's `hd95`).
    """
    if not pred.any() or not truth.any():
        both = not pred.any() and not truth.any()
        return (1.0, 0.0) if both else (0.0, _ONE_EMPTY_MM)
    distances = np.concatenate(edge_distances(pred, truth, spacing_mm))
    return _dice(pred, truth), float(np.percentile(distances, 95))


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
    lesions, false = _lesions(pred, truth)
    hd95 = [hd95_by_area(p, t, spacing_mm) if p.any() else _LESION_ERROR_MM for p, t in lesions]
    hd95 += [_LESION_ERROR_MM] * false
    return _lesion_dice(lesions, false), statistics.fmean(hd95) if hd95 else 0.0


_RULES = {"brats2020": brats2020, "brats2023": brats2023}


def _known(convention: str) -> str:
    if convention not in _RULES:
        raise ValueError(f"convention {convention!r}: expected one of {', '.join(_RULES)}.")
    return convention


def crop_tumour(pred: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check two maps of classes, uint8, the same three axes, and cut both to the box that holds all tumour of either.

    Raises:
        ValueError: the shapes differ, or there is anything but class indices.
    """
    if pred.shape != truth.shape or truth.ndim != 3:
        raise ValueError(f"prediction of shape {pred.shape}, reference of {truth.shape}; expected the same three axes.")
    if pred.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"prediction is {pred.dtype}, reference {truth.dtype}; expected class indices as uint8.")
    box = _box(pred, truth)
    pred, truth = np.ascontiguousarray(pred[box]), np.ascontiguousarray(truth[box])
    highest = max(pred.max(initial=0), truth.max(initial=0))
    if highest > 3:
        raise ValueError(f"class {highest} in a mask; expected 0 to 3. Map labels with cases.labels_to_classes.")
    return pred, truth


def _box(*masks: np.ndarray) -> tuple[slice, ...]:
    """The smallest box that holds every non-zero voxel of `masks`; an empty one where there is none."""
    boxes = []
    for mask in masks:
        box = [slice(None)] * 3
        for axis in np.argsort(mask.strides)[::-1]:  # memory in order first, then only what is left
            used = np.flatnonzero(mask[tuple(box)].max(axis=tuple({0, 1, 2} - {axis}), initial=0))
            if not used.size:
                break
            box[axis] = slice(used[0], used[-1] + 1)
        else:
            boxes.append(box)
    if not boxes:
        return (slice(0),) * 3
    return tuple(
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*boxes, strict=True)
    )


def _member(classes: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
    """Where `classes` is one of `wanted`, as booleans."""
    return np.isin(np.arange(4), tuple(wanted)).take(classes)


def _dice(pred: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two boolean masks; both empty: 1."""
    both = np.count_nonzero(pred) + np.count_nonzero(truth)
    return float(2 * np.count_nonzero(pred & truth) / both) if both else 1.0


# ---- Distances between surfaces


def edge_distances(
    pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Distances in mm from each edge voxel of one mask to the nearest edge voxel of the other.

    Edge voxels are those that erosion by the 6-neighbourhood removes; what lies outside the array
    is background.

    Args:
        pred, truth: boolean masks, shape (X, Y, Z), neither empty.
        spacing_mm: voxel size along X, Y, Z.

    Returns:
        Prediction to reference and reference to prediction, float64, in the order of the voxels.
    """
    box = _box(pred, truth)
    pred, truth = _edges(_padded(pred[box], _REACH)), _edges(_padded(truth[box], _REACH))
    return _nearest(pred, truth, spacing_mm), _nearest(truth, pred, spacing_mm)


def _padded(mask: np.ndarray, margin: int) -> np.ndarray:
    """`mask` with `margin` voxels of background on every side, in C order."""
    out = np.zeros([side + 2 * margin for side in mask.shape], bool)
    out[(slice(margin, -margin),) * 3] = mask
    return out


def _edges(mask: np.ndarray) -> np.ndarray:
    """The voxels of `mask` with a face neighbour outside it; its outermost voxels must be background."""
    inner = mask.copy()
    for axis in range(3):
        for shift in (-1, 1):
            inner &= np.roll(mask, shift, axis)
    return mask & ~inner


def _nearest(points: np.ndarray, targets: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Distance in mm from each voxel of `points` to the nearest of `targets`.

    Both are boolean, C-ordered, with at least `_REACH` voxels of background around them. Surfaces
    mostly run close together, so shells of growing distance up to `_REACH` voxels are tried first,
    on all points at once; a k-d tree answers for the few points that remain.
    """
    flat = targets.ravel()
    place = np.flatnonzero(points)
    distances = np.empty(place.size)
    left = np.arange(place.size)
    for length, steps in _shells(tuple(spacing_mm), targets.strides):
        hit = flat.take(place + steps[0])
        for step in steps[1:]:
            hit |= flat.take(place + step)
        distances[left[hit]] = length
        missed = np.flatnonzero(~hit)
        left, place = left.take(missed), place.take(missed)
        if not left.size:
            return distances
    tree = cKDTree(np.argwhere(targets) * spacing_mm, leafsize=32, balanced_tree=False, compact_nodes=False)
    distances[left] = tree.query(np.stack(np.unravel_index(place, targets.shape), axis=1) * spacing_mm)[0]
    return distances


@functools.lru_cache(maxsize=64)
def _shells(spacing_mm: tuple[float, float, float], strides: tuple[int, int, int]) -> list[tuple[float, np.ndarray]]:
    """Steps in a flat array to the neighbours at each distance in mm, nearest first.

    They end before the first neighbour more than `_REACH` voxels away along an axis.
    """
    cube = np.array(list(itertools.product(range(-_REACH, _REACH + 1), repeat=3)))
    lengths = np.sqrt(((cube * spacing_mm) ** 2).sum(axis=1))
    inside = lengths < (_REACH + 1) * min(spacing_mm)
    steps = cube @ strides
    return [(float(length), steps[lengths == length]) for length in np.unique(lengths[inside])]


def hd95_by_area(pred: np.ndarray, truth: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """HD95 in mm as google-deepmind/surface-distance defines it, which BraTS 2023 uses.

    The surface passes between voxels: its points are the corners where the eight voxels around
    are not all alike, each weighted by the area of the marching-cubes surface there. The 95th
    percentile by area is taken per direction; the larger one counts.

    Args:
        pred, truth: boolean masks, shape (X, Y, Z), neither empty.
        spacing_mm: voxel size along X, Y, Z.
    """
    box = _box(pred, truth)
    pred, truth = _corner_codes(pred[box]), _corner_codes(truth[box])
    area = _surface_areas(tuple(spacing_mm))
    on_pred, on_truth = (pred > 0) & (pred < 255), (truth > 0) & (truth < 255)
    return max(
        _percentile_by_area(_nearest(on_pred, on_truth, spacing_mm), area[pred[on_pred]]),
        _percentile_by_area(_nearest(on_truth, on_pred, spacing_mm), area[truth[on_truth]]),
    )


def _percentile_by_area(distances: np.ndarray, areas: np.ndarray) -> float:
    order = np.argsort(distances)
    reached = np.searchsorted(np.cumsum(areas[order]) / areas.sum(), 0.95)
    return float(distances[order[min(reached, order.size - 1)]])


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """For each corner between voxels, the eight around it: bit 4x + 2y + z is set where (x, y, z) is."""
    voxels = _padded(mask, _REACH + 1).view(np.uint8)
    codes = np.zeros([side - 1 for side in voxels.shape], np.uint8)
    for bit, corner in enumerate(itertools.product((0, 1), repeat=3)):
        codes |= voxels[tuple(slice(i, i + side) for i, side in zip(corner, codes.shape, strict=True))] << bit
    return codes


# The marching-cubes surface, cutting edges half-way, around each face-connected group of set corners of a unit cube:
# eight times the absolute area vectors of its flat pieces. Other groups are these turned or mirrored.
_SURFACES = {
    ((0, 0, 0),): [(1, 1, 1)],
    ((0, 0, 0), (0, 0, 1)): [(4, 4, 0)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0)): [(3, 3, 3), (0, 0, 4)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)): [(0, 0, 8)],
    ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)): [(6, 6, 6)],
    ((1, 0, 0), (0, 0, 0), (0, 0, 1), (0, 1, 1)): [(3, 3, 3), (1, 1, 1), (0, 2, 2), (2, 0, 2)],
}


@functools.lru_cache(maxsize=16)
def _surface_areas(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Area in mm^2 of the marching-cubes surface for each of the 256 codes of `_corner_codes`.

    Each face-connected group of set corners, of unset ones where these are fewer, is wrapped separately.
    """
    side_areas = np.prod(spacing_mm) / np.asarray(spacing_mm)
    group_areas = {}
    for (shape, vectors), axes, mirror in itertools.product(
        _SURFACES.items(), itertools.permutations(range(3)), itertools.product((0, 1), repeat=3)
    ):
        corners = np.array(shape)[:, axes] ^ mirror
        turned = np.array(vectors)[:, axes] / 8 * side_areas
        group_areas[frozenset(map(tuple, corners.tolist()))] = np.linalg.norm(turned, axis=1).sum()
    areas = np.zeros(256)
    for code in range(256):
        cube = (code >> np.arange(8) & 1).reshape(2, 2, 2)
        groups, count = ndimage.label(cube if cube.sum() <= 4 else 1 - cube)
        for group in range(1, count + 1):
            areas[code] += group_areas[frozenset(map(tuple, np.argwhere(groups == group).tolist()))]
    return areas


# ---- Lesions


def _lesions(pred: np.ndarray, truth: np.ndarray) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Split by lesion: (prediction, reference) of each reference lesion that counts; how many lesions are false."""
    near = ndimage.binary_dilation(truth, ndimage.generate_binary_structure(3, 2), iterations=_DILATIONS)
    zones, count = ndimage.label(near, np.ones((3, 3, 3)))
    parts, found = ndimage.label(pred, np.ones((3, 3, 3)))
    touching = np.zeros((count + 1, found + 1), bool)
    touching[zones[pred], parts[pred]] = True
    touching[0] = False
    sizes = np.bincount(zones[truth], minlength=count + 1)
    counting = np.flatnonzero(sizes[1:] >= _SMALLEST_LESION) + 1
    lesions = [(touching[zone].take(parts), truth & (zones == zone)) for zone in counting]
    return lesions, found - int(touching.any(axis=0).sum())


def _lesion_dice(lesions: list[tuple[np.ndarray, np.ndarray]], false: int) -> float:
    """Mean Dice of what `_lesions` gives; no lesion at all: 1."""
    dice = [_dice(p, t) for p, t in lesions] + [0.0] * false
    return statistics.fmean(dice) if dice else 1.0


# ---- Over patients


def summarise(cases: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, dict]]:
    """Statistics over patients of every metric of every structure.

    Args:
        cases: by ID, what `score_case` returns.

    Returns:
        Per structure and metric: `mean`, `median`, `std` (of the sample; 0 for one patient), the
        quartiles `q1` and `q3`, `ci95` (95 % interval of the mean: percentiles of 10,000 bootstrap
        samples of patients, always the same ones, further out where patients are few) and `n`. Empty without patients.
    """
    if not cases:
        return {}
    columns = _columns(cases)
    values = _values(cases, columns)
    summary: dict[str, dict[str, dict]] = {}
    for (structure, metric), column, interval in zip(columns, values.T, _mean_intervals(values), strict=True):
        q1, median, q3 = np.percentile(column, (25, 50, 75))
        summary.setdefault(structure, {})[metric] = {
            "mean": float(column.mean()),
            "median": float(median),
            "std": float(column.std(ddof=1)) if column.size > 1 else 0.0,
            "q1": float(q1),
            "q3": float(q3),
            "ci95": interval,
            "n": column.size,
        }
    return summary


def _columns(cases: Mapping[str, Mapping]) -> list[tuple[str, str]]:
    """The (structure, metric) pairs that every patient has."""
    return [(structure, metric) for structure, metrics in next(iter(cases.values())).items() for metric in metrics]


def _values(cases: Mapping[str, Mapping], columns: list[tuple[str, str]]) -> np.ndarray:
    """Figures of shape (patients sorted by ID, columns)."""
    return np.array([[cases[case][structure][metric] for structure, metric in columns] for case in sorted(cases)])


def _mean_intervals(values: np.ndarray) -> list[list[float]]:
    """95 % bootstrap intervals of the mean over the first axis, one for each column of (patients, columns).

    Plain percentiles of few patients are too close: of six, they hold the true mean 87 times in 100. So they are taken
    further out, as far as Student's interval is from the normal one (the expanded percentile interval of Hesterberg,
    What Teachers Should Know About the Bootstrap, 2015); of many patients they are the plain ones.
    """
    patients, random = len(values), np.random.default_rng(0)
    if patients == 1:
        return values.T.repeat(2, axis=1).tolist()
    at_once = min(_BOOTSTRAPS, max(1, 10**7 // patients))  # in memory, however many patients there are
    means = []
    for done in range(0, _BOOTSTRAPS, at_once):
        draws = random.multinomial(patients, np.full(patients, 1 / patients), size=min(at_once, _BOOTSTRAPS - done))
        means.append(draws @ values / patients)
    tail = special.ndtr(special.stdtrit(patients - 1, 0.025) * math.sqrt(patients / (patients - 1)))
    return np.quantile(np.concatenate(means), (tail, 1 - tail), axis=0).T.tolist()


def interval_text(ci95: Sequence[float], n: int, figure: str = ".3f") -> str:
    """A 95 % interval over `n` patients in words, as "0.612 to 0.745"; of one patient there is none."""
    low, high = ci95
    return f"{low:{figure}} to {high:{figure}}" if n > 1 else "no interval"


def collect(
    cases: Mapping[str, Mapping],
    *,
    convention: str,
    simulated: bool,
    not_scored: Mapping[str, str],
    leakage: Iterable[str],
) -> dict[str, object]:
    """What `metrics.json` holds.

    Args:
        cases: by ID, what `score_case` returns.
        convention: a key of `CONVENTIONS`; the file holds its line.
        simulated: whether these are simulated patients.
        not_scored: by ID, why a patient has no figures.
        leakage: IDs of the patients that the network had seen.
    """
    return {
        "convention": CONVENTIONS[_known(convention)],
        "simulated": simulated,
        "cases": {case: cases[case] for case in sorted(cases)},
        "summary": summarise(cases),
        "not_scored": dict(not_scored),
        "leakage": sorted(leakage),
    }


def score_folders(
    pred_dir: Path | str, truth_dir: Path | str, *, convention: str, simulated: bool, allow_leakage: bool
) -> dict[str, object]:
    """Score a folder of label maps against a folder of patients, or of label maps, by case ID.

    Either folder is read by `cases.find_segs`, in either label numbering. Nothing is resampled,
    moved or relabelled: a pair whose shapes or affines differ is refused. So are predictions of a
    network that had seen the patient, which `predict` notes in `leakage.json` beside them, unless
    `allow_leakage` is set.

    Returns:
        What `collect` returns, with a reason in `not_scored` for every patient of either folder
        that could not be scored: missing, extra, unlabelled, leakage, misaligned or unreadable.

    Raises:
        DataError: a folder that holds no label map, or an ID twice.
    """
    preds, truths, seen = find_segs(pred_dir), find_segs(truth_dir), read_leakage(pred_dir)
    cases, reasons = {}, {}
    for case in sorted({case for case, path in preds.items() if path} | truths.keys()):
        if case not in truths:
            reasons[case] = f"extra: {preds[case]} has no patient in {truth_dir}"
        elif truths[case] is None:
            reasons[case] = f"unlabelled: the patient has no segmentation in {truth_dir}"
        elif preds.get(case) is None:
            reasons[case] = f"missing: no prediction in {pred_dir}"
        elif case in seen and not allow_leakage:
            reasons[case] = "leakage: the network that made the prediction had seen the patient"
        else:
            try:
                cases[case] = score_files(preds[case], truths[case], convention=convention)
            except DataError as error:
                reasons[case] = str(error)
    leakage = seen & cases.keys()
    return collect(cases, convention=convention, simulated=simulated, not_scored=reasons, leakage=leakage)


def read_leakage(pred_dir: Path | str) -> set[str]:
    """IDs of the patients that the network that predicted this folder had seen, as `leakage.json` there names them."""
    path = Path(pred_dir) / "leakage.json"
    return set(json.loads(path.read_text())) if path.exists() else set()


def score_files(pred_path: Path, truth_path: Path, *, convention: str) -> dict[str, dict[str, float]]:
    """Score one label map on disk against another, see `score_case`.

    Raises:
        DataError: both are one file, one cannot be read, or their shapes or affines differ; nothing is resampled.
    """
    if pred_path.resolve() == truth_path.resolve():
        raise DataError(f"itself: {pred_path} would be scored against itself; give a folder of predictions.")
    (pred, pred_image), (truth, truth_image) = read_seg(pred_path), read_seg(truth_path)
    if pred.shape != truth.shape:
        raise DataError(f"misaligned: {pred_path} has shape {pred.shape}, {truth_path} {truth.shape}{_RESAMPLE}")
    if not same_affine(pred_image, truth_image):
        raise DataError(
            f"misaligned: {pred_path} has affine {pred_image.affine[:3].round(3).tolist()},"
            f" {truth_path} {truth_image.affine[:3].round(3).tolist()}{_RESAMPLE}"
        )
    return score_case(pred, truth, spacing_mm=spacing_of(truth_image), convention=convention)


def compare(metrics_a: Mapping, metrics_b: Mapping) -> dict[str, object]:
    """Compare two runs patient by patient.

    Args:
        metrics_a, metrics_b: what `collect` returns, of one convention and the same references.

    Returns:
        `convention`; `simulated`; `leakage`, those compared whom a network had seen; `n`, the
        patients that both scored; `only_a` and `only_b`, the
        IDs of the others; `differences`: per structure and metric the mean over patients of b minus
        a, `mean_difference`, and its 95 % bootstrap interval over patients, `ci95`.

    Raises:
        DataError: the conventions differ, no patient is in both, or one has another reference in the other run.
    """
    if metrics_a["convention"] != metrics_b["convention"]:
        raise DataError(
            f"Scored by different rules, {metrics_a['convention']} and {metrics_b['convention']}. Score both by one."
        )
    a, b = metrics_a["cases"], metrics_b["cases"]
    shared = a.keys() & b.keys()
    if not shared:
        raise DataError("The two runs have no scored patient in common, so there is nothing to compare.")
    for case, name in itertools.product(sorted(shared), STRUCTURES):
        ml_a, ml_b = (found[case].get(name, {}).get("volume_ml_truth") for found in (a, b))
        if None not in (ml_a, ml_b) and not np.isclose(ml_a, ml_b, rtol=1e-4):
            raise DataError(
                f"{case}: its reference has {ml_a:.3f} ml of {name} in one run and {ml_b:.3f} ml in the other: other"
                " patients of one name, or references that were changed. Score both runs by the same references."
            )
    in_b = set(_columns(b))
    columns = [column for column in _columns(a) if column in in_b]
    gains = _values({case: b[case] for case in shared}, columns) - _values({case: a[case] for case in shared}, columns)
    differences: dict[str, dict[str, dict]] = {}
    for (structure, metric), gain, interval in zip(columns, gains.T, _mean_intervals(gains), strict=True):
        differences.setdefault(structure, {})[metric] = {"mean_difference": float(gain.mean()), "ci95": interval}
    return {
        "convention": metrics_a["convention"],
        "simulated": metrics_a["simulated"] or metrics_b["simulated"],
        "leakage": sorted({*metrics_a.get("leakage", ()), *metrics_b.get("leakage", ())} & shared),
        "n": len(shared),
        "only_a": sorted(a.keys() - shared),
        "only_b": sorted(b.keys() - shared),
        "differences": differences,
    }


def conventions_table(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, dict[str, float | None]]:
    """Mean Dice of the same predictions under five conventions.

    Args:
        pairs: per patient (prediction, reference), class indices 0 to 3, uint8, shape (X, Y, Z);
            slices are those along Z.

    Returns:
        For each convention, by a line that says what it is: Dice of WT, TC and ET; None where the
        convention leaves nothing to average.
    """
    dice: dict[str, dict[str, list[float]]] = {}
    for pred, truth in pairs:
        slices = truth.shape[2]
        pred, truth = crop_tumour(pred, truth)
        for region, classes in REGIONS.items():
            p, t = _member(pred, classes), _member(truth, classes)
            hit, true, both = (mask.sum(axis=(0, 1)) for mask in (p & t, t, p.astype(np.uint8) + t))
            slice_dice = 2 * hit[both > 0] / both[both > 0]
            whole = _dice(p, t)
            for line, values in {
                "mean over slices, both empty = 1": [*slice_dice, *[1.0] * (slices - slice_dice.size)],
                "mean over slices whose reference is not empty": 2 * hit[true > 0] / both[true > 0],
                "mean over patients, those with an empty reference dropped": [whole] if true.any() else [],
                "brats2020: mean over patients, both empty = 1, one empty = 0": [whole],
                "brats2023: mean over patients of the lesion-wise Dice": [_lesion_dice(*_lesions(p, t))],
            }.items():
                dice.setdefault(line, {name: [] for name in REGIONS})[region].extend(values)
    return {
        line: {region: float(np.mean(values)) if values else None for region, values in regions.items()}
        for line, regions in dice.items()
    }


def write_cases_csv(path: Path, metrics: Mapping) -> None:
    """Write one row per patient: `case`, `WT_dice`, `WT_hd95_mm`, ..., then `convention` (by name) and `simulated`."""
    rows = [
        {"case": case}
        | {f"{structure}_{metric}": value for structure, values in scores.items() for metric, value in values.items()}
        | {"convention": metrics["convention"].split(":")[0], "simulated": metrics["simulated"]}
        for case, scores in metrics["cases"].items()
    ]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["case"])
        writer.writeheader()
        writer.writerows(rows)
