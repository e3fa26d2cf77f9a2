"""Predict scans on disk and write label maps; patients are read, predicted and written in parallel."""

import shutil
import zipfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

import nibabel as nib
import numpy as np

from brats_helpers.data.cache import Packed, pack
from brats_helpers.data.cases import Case, stored
from brats_helpers.data.checks import check_packed
from brats_helpers.data.identity import survey_folders
from brats_helpers.data.nifti import from_lps, placed_as, read_mask, write_mask
from brats_helpers.data.numbering import AUTO, count_numberings, written_as
from brats_helpers.evaluation import uncertainty
from brats_helpers.evaluation.colours import write_colour_tables
from brats_helpers.evaluation.folders import note_leakage, score_files
from brats_helpers.evaluation.networks import (
    Network,
    in_order,
    leaked,
    load_network,
    load_networks,
    predict,
    refuse_seen,
    said_of,
)
from brats_helpers.evaluation.packaged import introduction, without_lines
from brats_helpers.evaluation.postprocess import NO_RULES, Rules, gain
from brats_helpers.labels import CLASSES, REGIONS, DataError
from brats_helpers.log import done, progress, warn
from brats_helpers.machine import choose_device
from brats_helpers.scoring.overlap import crop_tumour, dice_by_region
from brats_helpers.scoring.rules import Spacing, region_dice, rule_for
from brats_helpers.scoring.scores import collect
from brats_helpers.training import model_zip
from brats_helpers.training.model_zip import packaged_model, read_facts

__all__ = ["Network", "leaked", "load_network", "load_networks", "predict"]  # and what is defined here

ENOUGH_TO_CHOOSE = 200
"""Largest number of validation patients on which post-processing is chosen."""
_READ_AHEAD = 2  # patients that are read while one is predicted


class Prediction(NamedTuple):
    """One patient's prediction.

    Attributes:
        case: the patient.
        packed: the patient prepared from the networks' modalities.
        soft: probabilities over the box of `packed`, see `networks.predict`.
        path: the label map written.
    """

    case: Case
    packed: Packed
    soft: np.ndarray
    path: Path


@dataclass(frozen=True)
class _Scans:
    """A patient as read.

    Attributes:
        case: with its images in the order of the first network's channels.
        packed: the patient prepared.
        like: the stored image whose grid the label map gets.
        spacing_mm: voxel size along X, Y, Z in LPS order.
        seen: whether a network has seen the patient.
    """

    case: Case
    packed: Packed
    like: nib.Nifti1Image
    spacing_mm: tuple[float, ...]
    seen: bool


def predict_validation(
    networks: Sequence[Network], cases: Sequence[Case], prepared: Sequence[Packed], *, flips: bool
) -> list[tuple[np.ndarray, np.ndarray, Spacing]]:
    """Predict the patients on which thresholds may be chosen: those that none of the networks was trained on.

    Args:
        networks, flips: see `networks.predict`.
        cases: validation patients.
        prepared: the same patients, prepared from the modalities of `cases`, with their labels.

    Returns:
        Per patient (prediction, reference, voxel size in mm): class indices, uint8 (slices, height, width), of the
        part of the box that either calls tumour; nothing else counts for rules and Dice. The voxel size is along the
        same axes. All are kept in memory, so these are the first `ENOUGH_TO_CHOOSE` patients at most.
    """
    trained_on = frozenset().union(*(network.trained_on for network in networks))
    predicted = []
    for case, packed in progress(zip(cases, prepared, strict=True), what="predicting", total=len(cases)):
        if case.id in trained_on or len(predicted) == ENOUGH_TO_CHOOSE:
            continue
        spacing = stored(case)[1]
        soft = predict(networks, packed, channels=case.modalities, flips=flips, spacing_mm=spacing)
        predicted.append((*crop_tumour(_classes(soft), np.asarray(packed.labels)), spacing[::-1]))
    return predicted


def evaluate(
    networks: Sequence[Network],
    cases: Sequence[Case],
    folder: Path,
    *,
    convention: str,
    simulated: bool,
    allow_leakage: bool = False,
    hashes: Mapping[str, Collection[str]] | None = None,
    **how,
) -> dict[str, object]:
    """Predict patients, write the label maps, and score them as written, so that anybody can reproduce the scores.

    Args:
        networks, cases, folder, how: see `predict_files`.
        convention: see `scoring.rules.CONVENTIONS`.
        simulated: whether these are simulated patients.
        allow_leakage: score patients that a network has seen.
        hashes: see `networks.leaked`.

    Returns:
        See `scoring.scores.collect`; patients without a reference or with a fault are named under `not_scored`.
        Also `filled`: by ID, the modalities taken as background; `postprocess`: what the rules changed in `test`, see
        `postprocess.gain`; and `uncertainty`: see `uncertainty.collect`, with the number of `checkpoints` and whether
        there were `flips`.

    Raises:
        DataError: a network has seen a labelled patient, or a patient lacks a modality; nothing is predicted then.
    """
    cases = in_order(networks, cases)
    seen = leaked(networks, cases, hashes=hashes)
    if not allow_leakage:
        refuse_seen(cases, seen)
    convention = rule_for(convention, cases=[case.id for case in cases]).name
    asked = how.get("numbering", AUTO)
    scores, raw, doubts, faults = {}, [], {}, {}
    for case, packed, soft, path in predict_files(networks, cases, folder, seen=seen, skipped=faults, **how):
        if case.seg:
            try:
                numberings = written_as(case, asked), case.numbering
                scores[case.id] = score_files(path, case.seg, convention=convention, numberings=numberings)
            except DataError as error:
                faults[case.id] = str(error)
                continue
            truth = read_mask(case.seg, case.numbering)
            before = packed.to_volume(_classes(soft))
            raw.append(region_dice(before, truth, convention=convention, spacing_mm=stored(case)[1]))
            doubts[case.id] = uncertainty.examine(soft, packed.to_box(truth), packed.brain)
    not_scored = {case.id: "unlabelled" for case in cases if not case.seg} | faults
    leakage = [case_id for case_id in seen if case_id in scores]
    metrics = collect(scores, convention=convention, simulated=simulated, not_scored=not_scored, leakage=leakage)
    after = list(map(dice_by_region, scores.values()))
    averaged = {"checkpoints": len(networks), "flips": how["flips"]}
    return metrics | {
        "labels": {"predictions": asked, "references": count_numberings(case for case in cases if case.seg)},
        "filled": {case.id: list(case.missing) for case in cases if case.missing},
        "postprocess": {"test": gain(raw, after)},
        "uncertainty": averaged | uncertainty.collect(doubts),
    }


def evaluate_packaged(cases: Sequence[Case], *, device: str, **how) -> dict[str, float | None] | None:
    """Score the packaged network on the same patients, without post-processing or flips.

    Args:
        cases: the test patients of a run.
        device: `auto`, `cpu` or `cuda`.
        how: `convention`, `simulated` and `hashes`, see `evaluate`.

    Returns:
        Mean Dice of WT, TC and ET; None if the network is not there, lacks a modality or has seen one of the patients.
    """
    if not model_zip.PACKAGED.is_file():
        return None
    network = load_network(packaged_model(), device=choose_device(device))
    labelled = [case for case in cases if case.seg]
    readable = all({*network.modalities} <= {*case.modalities} for case in labelled)
    if not labelled or not readable or leaked([network], labelled, hashes=how["hashes"]):
        return None
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):  # a line per file that is gone at once
        summary = evaluate([network], labelled, Path(folder), flips=False, **how)["summary"]
    return {region: summary[region]["dice"]["mean"] for region in REGIONS}


def predict_files(
    networks: Sequence[Network],
    cases: Sequence[Case],
    folder: Path,
    *,
    flips: bool,
    rules: Rules = NO_RULES,
    numbering: str = AUTO,
    soft_dir: Path | None = None,
    seen: Mapping[str, str] | None = None,
    allow_leakage: bool = False,
    skipped: dict[str, str] | None = None,
) -> Iterator[Prediction]:
    """Predict patients and write `<case>_seg.nii.gz`. An existing segmentation is ignored.

    Args:
        networks, flips: see `networks.predict`.
        cases: patients, labelled or not.
        folder: where the label maps go, each in the grid of the patient's first modality as stored.
        rules: applied to the networks' label map.
        numbering: of the labels written, see `labels.NUMBERINGS`; `auto`: that of each patient.
        soft_dir: where to write the probabilities as well, see `write_soft`; None writes none.
        seen: patients that a network has seen and that are predicted nevertheless, as `networks.leaked` returns
            them; `leakage.json` in `folder` names them. None: find them here.
        allow_leakage: predict patients that a network has seen, if `seen` is None.
        skipped: filled with the reason for each patient that is not predicted. If None, a fault raises.

    Yields:
        Predictions in the order of `cases`.

    Raises:
        DataError: `folder` is a patient's own. If `skipped` is None also: a network has seen a labelled patient, a
            patient lacks a modality, or its files have a fault, see `cache.pack`.
    """
    for case in cases:
        if case.folder.resolve() == folder.resolve():
            raise DataError(
                f"{case.id}: the predictions would go to {folder}, where the patient's own files lie, and could take"
                " the place of its segmentation. Choose another folder."
            )
    if skipped is None and seen is None:
        seen = leaked(networks, in_order(networks, cases))
        if not allow_leakage:
            refuse_seen(cases, seen)
    folder.mkdir(parents=True, exist_ok=True)

    read = partial(_read, networks, seen=seen, allow_leakage=allow_leakage)
    write = partial(_write, networks, folder=folder, rules=rules, numbering=numbering, soft_dir=soft_dir)

    def skip(case: Case, error: Exception) -> None:
        if skipped is None:
            raise error
        skipped[case.id] = str(error)
        warn(f"{case.id} is skipped: {error}")

    def predicted(reader: Executor, writer: Executor) -> Iterator[tuple[_Scans, np.ndarray, Future]]:
        for case, reading in _behind(((case, reader.submit(read, case)) for case in cases), _READ_AHEAD):
            try:
                scans = reading.result()
            except (DataError, ValueError, OSError) as error:
                skip(case, error)
                continue
            how = {"channels": scans.case.modalities, "spacing_mm": scans.spacing_mm}
            soft = predict(networks, scans.packed, flips=flips, **how)
            yield scans, soft, writer.submit(write, scans, soft)

    with ThreadPoolExecutor(_READ_AHEAD) as reader, ThreadPoolExecutor(1) as writer:
        written = _behind(predicted(reader, writer), 1)
        for scans, soft, writing in progress(written, what="predicting", total=len(cases)):
            try:
                path = writing.result()
            except (DataError, ValueError) as error:
                skip(scans.case, error)
                continue
            done(f"{scans.case.id}: {path}{_remarks(scans.case)}")
            yield Prediction(scans.case, scans.packed, soft, path)


def _remarks(case: Case) -> str:
    """Remarks in brackets at the end of the line about a prediction."""
    remarks = [] if case.seg else ["unlabelled"]
    if case.missing:
        remarks.append(f"{', '.join(case.missing)} taken as background")
    return f" ({'; '.join(remarks)})" if remarks else ""


Item = TypeVar("Item")


def _behind(items: Iterable[Item], n: int) -> Iterator[Item]:
    """The same items, each yielded when `n` more have been fetched."""
    held: deque[Item] = deque()
    for item in items:
        held.append(item)
        if len(held) > n:
            yield held.popleft()
    yield from held


def _read(networks: Sequence[Network], case: Case, *, seen: Mapping[str, str] | None, allow_leakage: bool) -> _Scans:
    (case,) = in_order(networks, [case])
    why = (leaked(networks, [case]) if seen is None else seen).get(case.id)
    if why and seen is None and not allow_leakage:
        raise DataError(said_of({case.id: why}))
    packed = pack(replace(case, seg=None))
    check_packed(case, packed)
    return _Scans(case, packed, *stored(case), bool(why))


def _write(
    networks: Sequence[Network],
    scans: _Scans,
    soft: np.ndarray,
    *,
    folder: Path,
    rules: Rules,
    numbering: str,
    soft_dir: Path | None,
) -> Path:
    case_id, packed = scans.case.id, scans.packed
    if resampling := [network for network in networks if network.resamples(scans.spacing_mm)]:
        own, known = (" x ".join(map("{:.3g}".format, sizes)) for sizes in (scans.spacing_mm, resampling[0].spacing_mm))
        warn(f"{case_id}: voxels of {own} mm, resampled to the network's {known} mm and back")
        rules = rules.for_voxels(prod(scans.spacing_mm) / prod(resampling[0].spacing_mm))
    note_leakage(folder, case_id, scans.seen)
    path = folder / f"{case_id}_seg.nii.gz"
    write_mask(path, packed.to_volume(rules(_classes(soft))), scans.like, numbering=written_as(scans.case, numbering))
    if soft_dir:
        write_soft(soft_dir / f"{case_id}_soft.nii.gz", packed, soft, scans.like)
    return path


def _classes(soft: np.ndarray) -> np.ndarray:
    return soft.argmax(axis=1).astype(np.uint8)


def write_soft(path: Path, packed: Packed, soft: np.ndarray, like: nib.Nifti1Image) -> None:
    """Write probabilities as one NIfTI of four axes (X, Y, Z, class), in the patient's geometry.

    They are stored in 255 steps, which is off by 0.002 at most: NIfTI has no float16, and any viewer reads this.
    """
    volumes = [packed.to_volume(soft[:, index]) for index in range(len(CLASSES))]
    volumes[0] = 1 - sum(volumes[1:])  # also outside the box
    affine, header = placed_as(like, np.dtype(np.uint8))
    header.set_slope_inter(1 / 255, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(type(like)(from_lps(np.stack(volumes, axis=-1), like), affine, header), path)


def write_submission(folder: Path, predictions: Mapping[str, Path]) -> Path:
    """Copy label maps to `folder` as `<case>.nii.gz` and pack them into `<folder>.zip`, in the challenge's format.

    The uploads of BraTS 2020 (CBICA's portal) and 2021 (Synapse) asked for one archive without folders, each file
    named after the patient's folder, in the geometry of the scans.

    Args:
        folder: created if missing.
        predictions: by ID, the file written by `predict_files`.

    Returns:
        The archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as upload:
        for case_id, path in sorted(predictions.items()):
            upload.write(shutil.copyfile(path, folder / f"{case_id}.nii.gz"), f"{case_id}.nii.gz")
    return archive


def predict_folders(
    checkpoints: Sequence[Path], folders: Iterable[Path], out: Path, *, device: str, fill_missing: bool = False, **how
) -> tuple[list[Path], dict[str, str]]:
    """Predict every patient below `folders`, for the verb `predict`. A patient with a fault is skipped.

    The label colour tables of `colours` are written beside the label maps.

    Args:
        checkpoints: `best.pt` of one run, or of several to be averaged; the packaged network if empty.
        folders: patients' folders, or folders of patients; only the networks' modalities are read.
        out: where `<case>_seg.nii.gz` go; created if missing.
        device: `auto`, `cpu` or `cuda`.
        fill_missing: treat a modality that a patient lacks as background; always on if every network was trained with
            `modality_dropout`.
        how: see `predict_files`.

    Returns:
        The files written, and by ID or folder the reason why a patient was skipped.

    Raises:
        DataError: a checkpoint cannot be used, or there is no patient to predict.
    """
    packaged = {}
    if not checkpoints:
        checkpoints = [packaged_model()]
        packaged = read_facts(checkpoints[0])
        print(introduction(packaged), flush=True)
    networks = load_networks(checkpoints, device=choose_device(device))
    fill_missing |= all(network.does_without for network in networks)
    cases, skipped = survey_folders(folders, networks[0].modalities, fill_missing=fill_missing)
    for name, reason in skipped.items():
        warn(f"{name} is skipped: {reason}")
    if not cases:
        raise DataError("no patient to predict." + "".join(f"\n{name}: {text}" for name, text in skipped.items()))
    for line in without_lines(packaged, cases):
        print(line, flush=True)
    written = {one.path: one.case for one in predict_files(networks, cases, out, skipped=skipped, **how)}
    asked = how.get("numbering", AUTO)
    write_colour_tables(out, (written_as(case, asked) for case in written.values()))
    return list(written), skipped
