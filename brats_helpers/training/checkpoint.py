"""Checkpoints: written whole, resumed only where they fit."""

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from brats_helpers.data.cache import Packed
from brats_helpers.files import whole_file
from brats_helpers.log import warn
from brats_helpers.training.model import EARLIER_SETTINGS

FORMAT = 2
"""Of the checkpoints; raised when a training can no longer go on from older ones."""


def fingerprint(cases: Sequence[Packed]) -> str:
    """Of the patients' content, as far as it can be told without reading it: boxes, and voxels by slice and class."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(f"{case.id} {case.origin} {case.shape} {case.images.shape}".encode() + case.counts.tobytes())
    return digest.hexdigest()[:16]


def resumable(path: Path, origin: dict) -> dict | None:
    """The checkpoint at `path` if it is of the same settings and patients; else a warning that says what differs."""
    if not path.exists():
        return None
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved.get("format") != FORMAT:
        warn(f"{path} is of another version of this suite, from which a training cannot go on: starting afresh")
        return None
    now, then = (origin["settings"] | origin, EARLIER_SETTINGS | saved["settings"] | saved)
    may_differ = ("settings", "minutes")
    differ = [name for name in now if name not in may_differ and now[name] != then.get(name)]
    if not differ:
        return saved
    changes = ", ".join(
        name if name.endswith("_cases") else f"{name} {then.get(name)} then, {now[name]} now" for name in differ
    )
    warn(f"{path} is of another training ({changes}): starting afresh")
    return None


def versions() -> dict[str, str]:
    packages = ("torch", "accelerate", "segmentation-models-pytorch", "timm", "brats-helpers")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def save_file(path: Path, content: dict) -> None:
    """`torch.save` by `whole_file`: a kill at any moment leaves the old checkpoint or the new one."""
    with whole_file(path, "wb") as file:
        torch.save(content, file)
