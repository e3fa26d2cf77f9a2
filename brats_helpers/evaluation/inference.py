"""From scans to a label map: checkpoints, whole volumes, files.

One flow for every network: `predict` gives probabilities over the box of a prepared case, and nothing after it
asks how they came about.
"""

import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import nn

from brats_helpers.data.cache import Packed, pack
from brats_helpers.data.cases import Case, find_cases
from brats_helpers.data.nifti import from_lps, placed_as, read_mask, read_nifti, write_mask
from brats_helpers.data.numbering import AUTO, count_numberings, written_as
from brats_helpers.evaluation import uncertainty
from brats_helpers.evaluation.folders import read_leakage, score_files
from brats_helpers.evaluation.onnx import read_onnx
from brats_helpers.evaluation.postprocess import NO_RULES, Rules, gain
from brats_helpers.files import write_json
from brats_helpers.labels import CLASSES, REGIONS, DataError
from brats_helpers.log import done
from brats_helpers.machine import choose_device, choose_precision
from brats_helpers.scoring.rules import region_dice, rule_for
from brats_helpers.scoring.scores import collect, crop_tumour
from brats_helpers.training.checkpoint import CheckpointError, read_checkpoint
from brats_helpers.training.model import rebuild
from brats_helpers.training.patches import patients

BATCH_SIZE = {"cpu": 8, "cuda": 32}
"""Slices predicted at once by a network of slices, by type of device: on a CPU, more no longer fit its caches."""
ENOUGH_TO_CHOOSE = 200
"""Validation patients that post-processing is chosen by, at most."""


@dataclass(frozen=True)
class Network:
    """A trained network as its checkpoint describes it.

    Attributes:
        model: in `eval()`, on its device.
        settings: the settings of its training, see `train.Settings`.
        trained_on: IDs of the patients that it learnt from.
        chosen_by: IDs of the patients that its epoch was chosen by.
        epoch: the epoch that it is of.
    """

    model: nn.Module
    settings: dict
    trained_on: frozenset[str]
    chosen_by: frozenset[str]
    epoch: int

    @property
    def modalities(self) -> list[str]:
        """What it needs of a patient, in the order of its channels."""
        return list(self.settings["modalities"])


def load_network(checkpoint: Path, *, device: torch.device) -> Network:
    """Rebuild a network from its checkpoint alone.

    Raises:
        DataError: there is no such file, or it is no checkpoint of this suite.
    """
    model, saved = read_onnx(checkpoint) if checkpoint.suffix == ".onnx" else (None, read_checkpoint(checkpoint))
    if "epoch" not in saved:
        raise CheckpointError(f"{checkpoint} is for resuming a training, not for predicting: give best.pt beside it.")
    try:
        model = model or rebuild(saved)
        seen, epoch = (frozenset(saved["train_cases"]), frozenset(saved["val_cases"])), saved["epoch"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} is no checkpoint to predict with ({what}).") from error
    model = model.to(device).eval()
    return Network(model, saved["settings"], *seen, epoch)


def load_networks(checkpoints: Sequence[Path], *, device: torch.device) -> list[Network]:
    """Networks to be averaged: folds or seeds of one training, or other encoders, of the same modalities.

    Raises:
        DataError: see `load_network`; or they need other modalities, or the same in another order.
    """
    networks = [load_network(path, device=device) for path in checkpoints]
    for path, network in zip(checkpoints, networks, strict=True):
        if network.modalities != networks[0].modalities:
            raise DataError(
                f"{path} reads {', '.join(network.modalities)}, but {checkpoints[0]}"
                f" {', '.join(networks[0].modalities)}; only networks of the same modalities can be averaged."
            )
    return networks


def leaked(networks: Sequence[Network], cases: Iterable[Case]) -> list[str]:
    """IDs of the patients that one of the networks was trained on or chosen by.

    A patient is known by its ID alone: one that comes back under another name is not found out.
    """
    seen = frozenset().union(*(network.trained_on | network.chosen_by for network in networks))
    return sorted(case.id for case in cases if case.id in seen)


def predict(networks: Sequence[Network], case: Packed, *, flips: bool) -> np.ndarray:
    """Probabilities of the four classes over the box of a prepared case, averaged over networks.

    Args:
        networks: see `load_networks`; each runs on its own device, in the precision the device gains from.
        case: prepared from the networks' modalities.
        flips: average with the predictions of the slices mirrored left and right.

    Returns:
        float32 (slices, 4, height, width); background 1 where a slice holds no brain.
    """
    mean = _predict_one(networks[0], case, flips)
    for network in networks[1:]:
        mean += _predict_one(network, case, flips)
    mean /= len(networks)
    return mean


@torch.inference_mode()
def _predict_one(network: Network, case: Packed, flips: bool) -> np.ndarray:
    """`predict` for one network: every slice with brain, in the batches that it takes, each padded about its middle."""
    device = next(network.model.parameters()).device
    precision = choose_precision(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    depth, _, height, width = case.images.shape
    probabilities = np.zeros((depth, len(CLASSES), height, width), np.float32)
    probabilities[:, 0] = 1
    seen = {name: network.settings[name] for name in ("context_slices", "patch_size")}
    for batch in patients([case], **seen, batch_size=BATCH_SIZE[device.type], workers=0, device=device):
        images = batch.images.to(device)
        y, x = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            soft = network.model(images).float().softmax(dim=1)
            if flips:
                mirrored = network.model(images.flip(-1)).float().softmax(dim=1).flip(-1)
                soft = (soft + mirrored) / 2
        probabilities[batch.index[:, 1].cpu().numpy()] = soft[:, :, y : y + height, x : x + width].cpu().numpy()
    return probabilities


def predict_validation(
    networks: Sequence[Network], cases: Sequence[Packed], *, flips: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predict the patients that thresholds may be chosen by: those that none of the networks was trained on.

    Args:
        networks, flips: see `predict`.
        cases: prepared validation patients, with their labels.

    Returns:
        Per patient (prediction, reference): class indices, uint8 (slices, height, width), of the part of the box that
        either calls tumour: nothing else counts for rules and Dice. All are kept in memory, so it is the first
        `ENOUGH_TO_CHOOSE` patients at most.
    """
    trained_on = frozenset().union(*(network.trained_on for network in networks))
    return [
        crop_tumour(_classes(predict(networks, case, flips=flips)), np.asarray(case.labels))
        for case in [case for case in cases if case.id not in trained_on][:ENOUGH_TO_CHOOSE]
    ]


def evaluate(
    networks: Sequence[Network], cases: Sequence[Case], folder: Path, *, convention: str, simulated: bool, **how
) -> dict[str, object]:
    """Predict patients, write the files, and score them as written: what anybody would get from them.

    Args:
        networks, cases, folder, how: see `predict_files`.
        convention: see `metrics.CONVENTIONS`.
        simulated: whether these are simulated patients.

    Returns:
        See `metrics.collect`; unlabelled patients are predicted and named under `not_scored`. Besides,
        `postprocess`: what the rules changed in `test`, see `postprocess.gain`; `uncertainty`: see
        `uncertainty.collect`, and over how many `checkpoints`, with `flips` or without.

    Raises:
        DataError: see `predict_files`.
    """
    convention = rule_for(convention, cases=[case.id for case in cases]).name
    scores, raw, doubts = {}, [], {}
    asked = how.get("numbering", AUTO)
    for case, packed, soft, path in predict_files(networks, cases, folder, **how):
        if case.seg:
            numberings = written_as(case, asked), case.numbering
            scores[case.id] = score_files(path, case.seg, convention=convention, numberings=numberings)
            truth = read_mask(case.seg, case.numbering)
            raw.append(region_dice(packed.to_volume(_classes(soft)), truth, convention=convention))
            doubts[case.id] = uncertainty.examine(soft, packed.to_box(truth), packed.brain)
    not_scored = {case.id: "unlabelled" for case in cases if not case.seg}
    leakage = [case_id for case_id in leaked(networks, cases) if case_id in scores]
    metrics = collect(scores, convention=convention, simulated=simulated, not_scored=not_scored, leakage=leakage)
    after = [{region: figures[region]["dice"] for region in REGIONS} for figures in scores.values()]
    averaged = {"checkpoints": len(networks), "flips": how["flips"]}
    return metrics | {
        "labels": {"predictions": asked, "references": count_numberings(case for case in cases if case.seg)},
        "postprocess": {"test": gain(raw, after)},
        "uncertainty": averaged | uncertainty.collect(doubts),
    }


def predict_files(
    networks: Sequence[Network],
    cases: Sequence[Case],
    folder: Path,
    *,
    flips: bool,
    rules: Rules = NO_RULES,
    numbering: str = AUTO,
    soft_dir: Path | None = None,
    allow_leakage: bool = False,
) -> Iterator[tuple[Case, Packed, np.ndarray, Path]]:
    """Predict patients one by one and write `<case>_seg.nii.gz`. A segmentation that is there is not looked at.

    Args:
        networks, flips: see `predict`.
        cases: patients, labelled or not, that none of the networks has seen.
        folder: where the label maps go, in the geometry of each patient's own first modality.
        rules: applied to what the networks answer.
        numbering: of the labels written, see `labels.NUMBERINGS`; `auto`: that of each patient.
        soft_dir: where the probabilities go as well, see `write_soft`; None writes none.
        allow_leakage: go on with patients that a network has seen, and name them in `leakage.json` of `folder`.

    Returns:
        One at a time: the case, the case prepared, its probabilities (see `predict`), the file written.

    Raises:
        DataError: a network has seen a patient, or `folder` is a patient's own; nothing is predicted then. Or a patient
            cannot be prepared, see `cache.pack`.
    """
    for case in cases:
        if case.folder.resolve() == folder.resolve():
            raise DataError(
                f"{case.id}: the predictions would go to {folder}, where the patient's own files lie, and could take"
                " the place of its segmentation. Choose another folder."
            )
    seen = leaked(networks, cases)
    if seen and not allow_leakage:
        raise DataError(
            f"the network has seen {', '.join(seen)} in training: scores there would mean nothing. Leave them out, or"
            " allow leakage, which every score then shows (--allow-leakage, -p allow_leakage true). Patients are told"
            " by their IDs: where these are others that have the same, rename them."
        )
    _note_leakage(folder, {case.id for case in cases}, set(seen))
    for case in cases:
        packed = pack(replace(case, seg=None))
        soft = predict(networks, packed, flips=flips)
        like = read_nifti(next(iter(case.images.values())))
        path = folder / f"{case.id}_seg.nii.gz"
        write_mask(path, packed.to_volume(rules(_classes(soft))), like, numbering=written_as(case, numbering))
        if soft_dir:
            write_soft(soft_dir / f"{case.id}_soft.nii.gz", packed, soft, like)
        done(f"{case.id}: {path}{'' if case.seg else ' (unlabelled)'}")
        yield case, packed, soft, path


def _classes(soft: np.ndarray) -> np.ndarray:
    return soft.argmax(axis=1).astype(np.uint8)


def _note_leakage(folder: Path, predicted: set[str], seen: set[str]) -> None:
    """Keep `leakage.json` of a folder of predictions true, for those that are about to be written."""
    folder.mkdir(parents=True, exist_ok=True)
    before = read_leakage(folder)
    if before or seen:
        write_json(folder / "leakage.json", sorted(before - predicted | seen))


def write_soft(path: Path, packed: Packed, soft: np.ndarray, like: nib.Nifti1Image) -> None:
    """Write probabilities as one NIfTI of four axes (X, Y, Z, class), in the patient's geometry.

    They are stored in 255 steps: NIfTI has no float16, and any viewer reads this; it is off by 0.002 at most.
    """
    volumes = [packed.to_volume(soft[:, index]) for index in range(len(CLASSES))]
    volumes[0] = 1 - sum(volumes[1:])  # also outside the box
    affine, header = placed_as(like, np.dtype(np.uint8))
    header.set_slope_inter(1 / 255, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(type(like)(from_lps(np.stack(volumes, axis=-1), like), affine, header), path)


def write_submission(folder: Path, predictions: Mapping[str, Path]) -> Path:
    """Copy label maps to `folder` as `<case>.nii.gz`, and pack them flat into `<folder>.zip`, as BraTS takes them.

    The upload of BraTS 2020 (CBICA's portal) and 2021 (Synapse) asked for this: one archive without folders, each
    file called after the patient's folder, in the geometry of the scans.

    Args:
        folder: made where it does not exist.
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
    checkpoints: Sequence[Path], folders: Iterable[Path], out: Path, *, device: str, **how
) -> list[Path]:
    """Predict every patient below `folders`, for the verb `predict`.

    Args:
        checkpoints: `best.pt` of one run, or of several to be averaged.
        folders: patients' folders, or folders of patients; only the networks' modalities are read.
        out: where `<case>_seg.nii.gz` go; made where it does not exist.
        device: `auto`, `cpu` or `cuda`.
        how: see `predict_files`.

    Returns:
        The files written.
    """
    networks = load_networks(checkpoints, device=choose_device(device))
    cases: dict[str, Case] = {}
    for case in (case for folder in folders for case in find_cases(folder, networks[0].modalities)):
        if case.id in cases:
            raise DataError(f"{case.id} lies in {cases[case.id].folder} and in {case.folder}; predict one at a time.")
        cases[case.id] = case
    return [path for *_, path in predict_files(networks, list(cases.values()), out, **how)]
