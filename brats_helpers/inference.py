"""From scans to a label map: checkpoints, whole volumes, files."""

import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from brats_helpers.cache import Packed, pack
from brats_helpers.cases import CLASSES, Case, DataError, find_cases, read_nifti, write_mask
from brats_helpers.dataset import Slices, make_loader
from brats_helpers.log import done, warn
from brats_helpers.machine import choose_device, choose_precision
from brats_helpers.metrics import collect, score_files
from brats_helpers.model import build_model

BATCH_SIZE = 16
"""Slices predicted at once."""


@dataclass(frozen=True)
class Network:
    """A trained network as its checkpoint describes it.

    Attributes:
        model: in `eval()`, on its device.
        settings: the settings of its training, see `train.Settings`.
        seen: IDs of the patients that it was trained on or chosen by.
        epoch: the epoch that it is of.
    """

    model: nn.Module
    settings: dict
    seen: frozenset[str]
    epoch: int

    @property
    def modalities(self) -> list[str]:
        """What it needs of a patient, in the order of its channels."""
        return self.settings["modalities"].split(",")


def load_network(checkpoint: Path, *, device: torch.device) -> Network:
    """Rebuild a network from its checkpoint alone.

    Raises:
        DataError: there is no such file, or it is no checkpoint of this suite.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        settings = saved["settings"]
        model = build_model(encoder=settings["encoder"], weights="none", in_channels=saved["in_channels"])
        model.load_state_dict(saved["model"])
        seen, epoch = frozenset(saved["train_cases"] + saved["val_cases"]), saved["epoch"]
    except FileNotFoundError as error:
        raise DataError(
            f"no checkpoint at {checkpoint}. A run leaves its best in runs/<name>/checkpoints/best.pt."
        ) from error
    except (KeyError, TypeError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(f"{checkpoint} is no checkpoint of this suite ({type(error).__name__}: {error}).") from error
    model = model.to(device, memory_format=torch.channels_last).eval()
    return Network(model, settings, seen, epoch)


@torch.inference_mode()
def predict(network: Network, case: Packed, *, flips: bool) -> np.ndarray:
    """Probabilities of the four classes over the box of a prepared case.

    Args:
        network: see `load_network`; runs on its own device, in the precision the device gains from.
        case: prepared from the network's modalities.
        flips: average with the predictions of the slices mirrored left and right.

    Returns:
        float32 (slices, 4, height, width); background 1 where a slice holds no brain.
    """
    device = next(network.model.parameters()).device
    precision = choose_precision(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    slices = Slices([case], context_slices=network.settings["context_slices"])
    depth, _, height, width = case.images.shape
    y, x = (slices.size[0] - height) // 2, (slices.size[1] - width) // 2
    probabilities = np.zeros((depth, len(CLASSES), height, width), np.float32)
    probabilities[:, 0] = 1
    for batch in make_loader(slices, batch_size=BATCH_SIZE, workers=0):
        images = batch.images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            soft = network.model(images).float().softmax(dim=1)
            if flips:
                mirrored = network.model(images.flip(-1)).float().softmax(dim=1).flip(-1)
                soft = (soft + mirrored) / 2
        probabilities[batch.index[:, 1].numpy()] = soft[:, :, y : y + height, x : x + width].cpu().numpy()
    return probabilities


def predict_case(network: Network, case: Case | Packed, *, flips: bool) -> np.ndarray:
    """Class indices of a patient's whole volume, uint8 (X, Y, Z). A segmentation that is there is not looked at."""
    packed = pack(replace(case, seg=None)) if isinstance(case, Case) else case
    return packed.to_volume(predict(network, packed, flips=flips).argmax(axis=1).astype(np.uint8))


def write_prediction(folder: Path, case: Case, classes: np.ndarray) -> Path:
    """Write `<case>_seg.nii.gz` in the geometry of the patient's own first modality."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.id}_seg.nii.gz"
    write_mask(path, classes, read_nifti(next(iter(case.images.values()))))
    return path


def evaluate(
    network: Network, cases: Sequence[Case], folder: Path, *, flips: bool, convention: str, simulated: bool
) -> dict[str, object]:
    """Predict patients, write the files, and score them as written: what anybody would get from them.

    Args:
        network: see `load_network`.
        cases: patients, labelled or not, that the network has not seen.
        folder: where `<case>_seg.nii.gz` go.
        flips: see `predict`.
        convention: see `metrics.CONVENTIONS`.
        simulated: whether these are simulated patients.

    Returns:
        See `metrics.collect`; unlabelled patients are predicted and named under `not_scored`.

    Raises:
        DataError: the network was trained on one of the patients or chosen by it.
    """
    if seen := [case.id for case in cases if case.id in network.seen]:
        raise DataError(f"the network has seen {', '.join(seen)}: its scores there would mean nothing.")
    scores = {}
    for case in cases:
        path = write_prediction(folder, case, predict_case(network, case, flips=flips))
        if case.seg:
            scores[case.id] = score_files(path, case.seg, convention=convention)
        done(f"{case.id}: {path}{'' if case.seg else ' (unlabelled, so not scored)'}")
    not_scored = {case.id: "unlabelled" for case in cases if not case.seg}
    return collect(scores, convention=convention, simulated=simulated, not_scored=not_scored)


def predict_folders(checkpoint: Path, folders: Iterable[Path], out: Path, *, device: str, flips: bool) -> list[Path]:
    """Predict every patient below `folders` with one checkpoint, for the verb `predict`.

    Args:
        checkpoint: `best.pt` of a run.
        folders: patients' folders, or folders of patients; only the network's modalities are read.
        out: where `<case>_seg.nii.gz` go; made where it does not exist.
        device: `auto`, `cpu` or `cuda`.
        flips: see `predict`.

    Returns:
        The files written.
    """
    network = load_network(checkpoint, device=choose_device(device))
    cases: dict[str, Case] = {}
    for case in (case for folder in folders for case in find_cases(folder, network.modalities)):
        if case.id in cases:
            raise DataError(f"{case.id} lies in {cases[case.id].folder} and in {case.folder}; predict one at a time.")
        cases[case.id] = case
    if seen := sorted(cases.keys() & network.seen):
        warn(f"the network has seen patients of these names, so scores there would mean nothing: {', '.join(seen)}")
    written = []
    for case in cases.values():
        written.append(write_prediction(out, case, predict_case(network, case, flips=flips)))
        done(f"{case.id}: {written[-1]}")
    return written
