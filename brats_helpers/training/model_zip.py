"""A trained network as one zip file to hand on: weights, settings and provenance, without pickle.

The zip holds `weights.safetensors`, `model.json` (the rest of the checkpoint, and how the network scored) and
`model_card.md`. Whatever reads a checkpoint reads this file as well.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

from brats_helpers.files import whole_file
from brats_helpers.labels import DataError

KIND, VERSION = "brats_helpers model", 1
WEIGHTS, FACTS, CARD = "weights.safetensors", "model.json", "model_card.md"
_LIMITS = {WEIGHTS: 2 << 30, FACTS: 64 << 20, CARD: 1 << 20}
"""The only members, with the largest size in bytes that is read of each."""


class ModelZipError(DataError):
    """A zip file is no model of this suite, or cannot be trusted; the message says why."""


def write_model(path: Path, checkpoint: Mapping, *, facts: Mapping, card: str) -> None:
    """Write a checkpoint as a model zip; an existing file is replaced once the new one is complete.

    Args:
        path: of the zip.
        checkpoint: what `checkpoint.read_checkpoint` returns.
        facts: entries that `model.json` holds besides those of the checkpoint, such as `postprocess` and `scores`.
        card: the model card, in Markdown.
    """
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint["model"].items()}
    rest = {name: value for name, value in checkpoint.items() if name != "model"}
    content = {"kind": KIND, "version": VERSION, "checkpoint": rest, **facts}
    with whole_file(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(WEIGHTS, safetensors.torch.save(tensors))
        archive.writestr(FACTS, json.dumps(content, indent=1, ensure_ascii=False))
        archive.writestr(CARD, card)


def is_model(path: Path) -> bool:
    """Whether a file is to be read as a model zip, by its name."""
    return path.suffix == ".zip"


def read_facts(path: Path) -> dict:
    """Read `model.json` of a model zip.

    Raises:
        ModelZipError: the file is not there, torn, hostile, or no model zip of this version.
    """
    facts, _ = _read(path, weights=False)
    return facts


def read_model(path: Path) -> dict:
    """Read a model zip as a checkpoint, its tensors on the CPU under `model`.

    Raises:
        ModelZipError: see `read_facts`.
    """
    facts, weights = _read(path, weights=True)
    try:
        model = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ModelZipError(f"{path}: {WEIGHTS} is damaged ({error}). Export the model again.") from error
    return facts["checkpoint"] | {"model": model}


def _read(path: Path, *, weights: bool) -> tuple[dict, bytes]:
    """`model.json`, and the bytes of the weights if they are asked for."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            facts = json.loads(archive.read(FACTS))
            content = archive.read(WEIGHTS) if weights else b""
    except FileNotFoundError as error:
        raise ModelZipError(
            f"no model at {path}. `python -m brats_helpers export RUN --out {path.name}` makes one."
        ) from error
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelZipError(f"{path} is no zip file, or is damaged ({error}). Copy or export it again.") from error
    if not isinstance(facts, dict) or facts.get("kind") != KIND or not isinstance(facts.get("checkpoint"), dict):
        raise ModelZipError(f"{path} is no model of this suite: its {FACTS} does not say so.")
    if facts.get("version") != VERSION:
        raise ModelZipError(
            f"{path} has version {facts.get('version')} of the model format, expected {VERSION}. Export it again."
        )
    return facts, content


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a zip with other members than the three, or with sizes that no model has."""
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    if unknown := sorted(sizes.keys() - _LIMITS.keys()):
        raise ModelZipError(f"{path} holds {unknown[0]!r}; a model holds only {', '.join(_LIMITS)}. Nothing was read.")
    if missing := [name for name in (FACTS, WEIGHTS) if name not in sizes]:
        raise ModelZipError(f"{path} is no model of this suite: it has no {missing[0]}.")
    if len(archive.infolist()) > len(sizes):
        raise ModelZipError(f"{path} holds a member twice. Nothing was read.")
    for name, size in sizes.items():
        if size > _LIMITS[name]:
            raise ModelZipError(f"{path}: {name} claims {size:,} bytes, more than a model has. Nothing was read.")
