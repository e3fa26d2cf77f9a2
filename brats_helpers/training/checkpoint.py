"""Checkpoint files: one format, written whole or not at all."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from brats_helpers.data.cache import Packed
from brats_helpers.files import whole_file
from brats_helpers.labels import DataError
from brats_helpers.training.model_zip import is_model, read_model

FORMAT = 3
"""Of the checkpoints; raised when their content changes. Checkpoints of another format are refused."""


class CheckpointError(DataError):
    """A file is not there, or is no checkpoint that this version of the suite reads; the message says which."""


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
            f"no checkpoint at {path}. A run leaves its best in runs/<name>/checkpoints/best.pt."
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
    """Of the patients' content, as far as it can be told without reading it: boxes, and voxels by slice and class."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.id} {case.origin} {case.shape} {case.images.shape}".encode() + case.counts.tobytes())
    return digest.hexdigest()[:16]


def learnt_from(weights: str) -> list[str]:
    """IDs of the patients that a network has seen when it starts from `weights`, see `model.build_model`."""
    if weights in ("imagenet", "none"):
        return []
    if is_model(Path(weights)):
        state = read_checkpoint(Path(weights))
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    if "model" not in state:
        return []
    check_format(weights, state)
    return state["train_cases"] + state["val_cases"]


def versions() -> dict[str, str]:
    packages = ("torch", "accelerate", "segmentation-models-pytorch", "timm", "brats-helpers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def save_file(path: Path, content: dict) -> None:
    """`torch.save` by `whole_file`: a kill at any moment leaves the old checkpoint or the new one."""
    with whole_file(path, "wb") as file:
        torch.save(content, file)
