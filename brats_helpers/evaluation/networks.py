"""Trained networks: rebuild them from their checkpoints, and predict prepared patients."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from brats_helpers.data.cache import Packed
from brats_helpers.data.cases import Case
from brats_helpers.data.identity import seen_before
from brats_helpers.evaluation.onnx import read_onnx
from brats_helpers.evaluation.resample import differs, resample_back, resample_images
from brats_helpers.labels import CLASSES, DataError
from brats_helpers.machine import choose_precision
from brats_helpers.training.checkpoint import CheckpointError, read_checkpoint
from brats_helpers.training.dataset import patients
from brats_helpers.training.model import rebuild

AT_ONCE = {"cpu": 8, "cuda": 64}
"""Slices predicted at once, by type of device. More would not fit the caches of a CPU."""


@dataclass(frozen=True)
class Network:
    """A trained network as its checkpoint describes it.

    Attributes:
        model: in `eval()`, on its device.
        settings: the settings of its training, see `training.settings.Settings`.
        trained_on: IDs of the patients that it was trained on.
        chosen_by: IDs of the patients that its epoch was chosen by.
        epoch: the epoch that was kept.
        facts: what its checkpoint says about its patients, see `data.patients.facts_of`.
    """

    model: nn.Module
    settings: dict
    trained_on: frozenset[str]
    chosen_by: frozenset[str]
    epoch: int
    facts: Mapping = field(default_factory=dict)

    @property
    def modalities(self) -> list[str]:
        """The modalities that it needs, in the order of its channels."""
        return list(self.settings["modalities"])

    @property
    def does_without(self) -> bool:
        """Whether its training hid modalities, so that it can segment patients who lack some."""
        return self.settings.get("modality_dropout", 0.0) > 0

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """The voxel size along X, Y, Z that it was trained at; None if its checkpoint does not say."""
        spacing = self.facts.get("spacing_mm")
        return tuple(spacing) if spacing else None

    def resamples(self, spacing_mm: Sequence[float] | None) -> bool:
        """Whether a patient with these voxels is resampled for this network."""
        return bool(spacing_mm and self.spacing_mm and differs(spacing_mm, self.spacing_mm))


def load_network(checkpoint: Path, *, device: torch.device) -> Network:
    """Rebuild a network from its checkpoint alone.

    Raises:
        DataError: there is no such file, or it is not a checkpoint of this suite.
    """
    model, saved = read_onnx(checkpoint) if checkpoint.suffix == ".onnx" else (None, read_checkpoint(checkpoint))
    if "epoch" not in saved:
        raise CheckpointError(f"{checkpoint} is for resuming a training, not for predicting: give best.pt beside it.")
    try:
        model = model or rebuild(saved)
        seen, epoch = (frozenset(saved["train_cases"]), frozenset(saved["val_cases"])), saved["epoch"]
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{checkpoint} is not a checkpoint to predict with ({what}).") from error
    return Network(model.to(device).eval(), saved["settings"], *seen, epoch, saved.get("facts") or {})


def load_networks(checkpoints: Sequence[Path], *, device: torch.device) -> list[Network]:
    """Rebuild networks whose probabilities are to be averaged: folds or seeds of one training, or other encoders.

    Their modalities may come in any order, as each network reads its channels by name.

    Raises:
        DataError: see `load_network`; or the networks need different modalities.
    """
    networks = [load_network(path, device=device) for path in checkpoints]
    for path, network in zip(checkpoints, networks, strict=True):
        if {*network.modalities} != {*networks[0].modalities}:
            raise DataError(
                f"{path} reads {', '.join(network.modalities)}, but {checkpoints[0]}"
                f" {', '.join(networks[0].modalities)}; only networks of the same modalities can be averaged."
            )
    return networks


def in_order(networks: Sequence[Network], cases: Iterable[Case]) -> list[Case]:
    """Return the cases with the networks' modalities alone, in the order of the first network's channels.

    A modality that a patient lacks counts as background if every network `does_without`.

    Raises:
        DataError: a patient lacks all of these modalities, or one that does not count as background.
    """
    wanted, ordered = networks[0].modalities, []
    for case in cases:
        lacking = [name for name in wanted if name not in case.modalities]
        if lacking and not all(network.does_without for network in networks):
            raise DataError(
                f"{case.id}: the network reads {', '.join(wanted)}, but there is no {', '.join(lacking)} (found:"
                f" {', '.join(case.modalities)}). Choose a network of these modalities, or run 00_setup with"
                f" -p modalities {','.join(wanted)}."
            )
        images = {name: case.images[name] for name in wanted if name in case.images}
        if not images:
            raise DataError(f"{case.id}: there is none of {', '.join(wanted)}, which the network reads.")
        ordered.append(replace(case, images=images, modalities=tuple(wanted)))
    return ordered


def leaked(
    networks: Sequence[Network], cases: Iterable[Case], *, hashes: Mapping[str, Collection[str]] | None = None
) -> dict[str, str]:
    """Find the patients that one of the networks was trained on or chosen by: by ID, by person, by the scans' content.

    Args:
        networks: one or more.
        cases: the patients to look up.
        hashes: see `identity.seen_before`.

    Returns:
        By ID the reason, in words that continue a sentence about the patient.
    """
    cases, seen = list(cases), {}
    for network in networks:
        by_id = dict.fromkeys(network.trained_on | network.chosen_by, {})
        facts = network.facts | {"patients": by_id | network.facts.get("patients", {})}
        seen = seen_before(facts, cases, hashes=hashes) | seen
    return dict(sorted(seen.items()))


def refuse_seen(cases: Iterable[Case], seen: Mapping[str, str]) -> None:
    """Raise `DataError` if a network has seen a patient who can be scored; the others get no score anyway."""
    scorable = {case.id: seen[case.id] for case in cases if case.seg and case.id in seen}
    if scorable:
        raise DataError(said_of(scorable))


def said_of(seen: Mapping[str, str]) -> str:
    """Say why patients that a network has seen are not predicted."""
    reasons = "; ".join(f"{case_id} {why}" for case_id, why in seen.items())
    return (
        f"leakage: the network has seen {', '.join(seen)} in training ({reasons}). Leave them out, or"
        " allow leakage, which every score then shows (--allow-leakage, -p allow_leakage true)."
    )


def predict(
    networks: Sequence[Network],
    case: Packed,
    *,
    channels: Sequence[str],
    flips: bool,
    spacing_mm: Sequence[float] | None = None,
) -> np.ndarray:
    """Probabilities of the four classes over the box of a prepared case, averaged over networks.

    Args:
        networks: see `load_networks`; each runs on its own device, on a GPU in half precision.
        case: a prepared case.
        channels: the modalities of its channels. Each network takes them in its own order.
        flips: average with the predictions of the slices mirrored left and right.
        spacing_mm: voxel size along X, Y, Z. A network trained at another one sees the case resampled; its
            probabilities are interpolated back, each class by itself. None resamples nothing.

    Returns:
        float32 (slices, 4, height, width); background 1 outside the bounding box of each slice's brain.
    """
    total = None
    for network in networks:
        shown = _as_trained(network, case, channels, spacing_mm)
        soft = _probabilities(network, shown, flips)
        if network.resamples(spacing_mm):
            shape = (len(case.images), *case.images.shape[2:])
            soft = resample_back(soft, shape, spacing_mm, network.spacing_mm)
        total = soft if total is None else total + soft
    return total if len(networks) == 1 else total / len(networks)


def _as_trained(network: Network, case: Packed, channels: Sequence[str], spacing_mm: Sequence[float] | None) -> Packed:
    """The case with channels and voxels as the network was trained on, without labels."""
    order = [list(channels).index(name) for name in network.modalities]
    images = case.images if order == [*range(case.images.shape[1])] else case.images[:, order]
    if not network.resamples(spacing_mm):
        return replace(case, images=images, labels=None)
    images = resample_images(images, spacing_mm, network.spacing_mm)
    counts = np.zeros((len(images), len(CLASSES)), np.int64)
    return replace(case, images=images, labels=None, counts=counts, boxes=None)


@torch.inference_mode()
def _probabilities(network: Network, case: Packed, flips: bool) -> np.ndarray:
    """Probabilities of one network over the box of a case with the channels and voxel size of its training."""
    device = next(network.model.parameters()).device
    # float32 on a CPU, so that every machine and onnxruntime give the same label map.
    precision = choose_precision(device) if device.type == "cuda" else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    depth, _, height, width = case.images.shape
    probabilities = np.zeros((depth, len(CLASSES), height, width), np.float32)
    probabilities[:, 0] = 1
    seen = {name: network.settings[name] for name in ("context_slices", "patch_size")}
    for batch in patients([case], **seen, batch_size=AT_ONCE[device.type], workers=0, device=device):
        images = batch.images.to(device)
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            soft = network.model(images).float().softmax(dim=1)
            if flips:
                soft = (soft + network.model(images.flip(-1)).float().softmax(dim=1).flip(-1)) / 2
        batch.write(soft, probabilities)
    return probabilities
