"""Checkpoint files: one format, written whole or not at all."""

import hashlib
import pickle
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from brats_helpers.data.cache import Packed
from brats_helpers.files import whole_file
from brats_helpers.labels import DataError
from brats_helpers.training.model_zip import is_model, packaged_model, read_model

FORMAT = 3
"""Version of the checkpoint format; raised when its content changes. Other formats are refused."""


SIMULATED = "simulated"
"""As weights to start from: the packaged network."""
FROM_ELSEWHERE = ("imagenet", "none")
"""Weights to start from that are neither the packaged network nor a file."""


class WeightsError(Exception):
    """The initial weights are not available; the message says why and names the alternatives."""


class CheckpointError(DataError):
    """A file is missing, or is not a checkpoint that this version of the suite reads; the message says which."""


def read_checkpoint(path: Path) -> dict:
    """Load a checkpoint, or a model zip, onto the CPU.

    Raises:
        CheckpointError: there is no such file, it is no checkpoint, or one of another format.
        ModelZipError: see `model_zip.read_model`.
    """
    if is_model(path):
        saved = read_model(path)
        check_format(path, saved)
        return saved
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"no checkpoint at {path}. A run saves its best one as runs/<name>/checkpoints/best.pt."
        ) from error
    except Exception as error:  # damaged bytes make torch raise anything, such as an IndexError
        raise CheckpointError(f"{path} is no checkpoint, or is damaged ({type(error).__name__}: {error}).") from error
    check_format(path, saved)
    return saved


def check_format(path: Path | str, saved: object) -> None:
    """Raise `CheckpointError` unless the content of the file at `path` is a checkpoint of this format."""
    if not isinstance(saved, dict) or "settings" not in saved:
        raise CheckpointError(f"{path} is no checkpoint of this suite.")
    if saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written by another version of the suite (format {saved.get('format')}; this one reads"
            f" {FORMAT}): train again, or use that version."
        )


def fingerprint(cases: Sequence[Packed]) -> str:
    """Digest of the patients' content without reading their voxels: boxes, and voxel counts by slice and class."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.id} {case.origin} {case.shape} {case.images.shape}".encode() + case.counts.tobytes())
    return digest.hexdigest()[:16]


def seen_by(weights: str) -> dict[str, list[str]]:
    """IDs of the patients that the initial weights have seen; `weights` as in `model.build_model`.

    Returns:
        `train_cases`, those they were trained on, and `val_cases`, those they were chosen by.
    """
    start = _start(weights)
    return {part: list(start[part]) if start else [] for part in ("train_cases", "val_cases")}


def with_start(facts: Mapping, weights: str) -> dict:
    """Add to the facts of a training what is known about the patients that its initial weights have seen.

    Args:
        facts: see `loop.fit`.
        weights: see `model.build_model`.

    Returns:
        The facts, with the earlier `patients`, and with `unrecorded`, the name of a file without a list of patients,
        if this training or an earlier one started from such a file.
    """
    start = _start(weights)
    before = start["facts"] if start else {}
    if not start and weights not in FROM_ELSEWHERE:
        before = {"unrecorded": Path(weights).name}
    kept = {name: before[name] for name in ("patients", "unrecorded") if before.get(name)}
    if "patients" in kept:
        kept["patients"] = {**kept["patients"], **facts.get("patients", {})}
    return {**facts, **kept}


def _start(weights: str) -> dict | None:
    """The checkpoint with the initial weights; None if they are from elsewhere."""
    if weights in FROM_ELSEWHERE:
        return None
    state = read_weights(weights)
    return state if "model" in state else None


def weights_file(weights: str) -> Path:
    """The file that weights to start from come from; `ModelZipError` if the packaged network is not there."""
    return packaged_model() if weights == SIMULATED else Path(weights)


def read_weights(path: str) -> dict:
    """Load a file with an encoder's weights, or a checkpoint, onto the CPU; `simulated` is the packaged network.

    Raises:
        WeightsError: there is no such file, or torch cannot read it.
        CheckpointError: it is a checkpoint of another format.
        ModelZipError: see `model_zip.read_facts`.
    """
    if is_model(weights_file(path)):
        return read_checkpoint(weights_file(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(
            f"encoder_weights {path!r}: expected imagenet, simulated, none, or a file that exists."
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(f"encoder_weights {path!r} is no state dict of torch ({error}).") from error
    if "model" in state:
        check_format(path, state)
    return state


def versions() -> dict[str, str]:
    packages = ("torch", "accelerate", "segmentation-models-pytorch", "timm", "brats-helpers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def save_file(path: Path, content: dict) -> None:
    """`torch.save` by `whole_file`: a kill at any moment leaves the old checkpoint or the new one."""
    with whole_file(path, "wb") as file:
        torch.save(content, file)
