"""A trained network as one file to hand on: weights, settings and provenance, without pickle.

`NAME.zip` holds `weights.safetensors`, `model.json` (the rest of the checkpoint, and how the network scored) and
`model_card.md`. `NAME.safetensors` holds the same weights, with `model.json` in its header; the card lies beside it as
`NAME.md`. Whatever reads a checkpoint reads both.
"""

import json
import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from brats_helpers.files import whole_file
from brats_helpers.labels import DataError

KIND, VERSION = "brats_helpers model", 1
WEIGHTS, FACTS, CARD = "weights.safetensors", "model.json", "model_card.md"
SUFFIXES = (".zip", ".safetensors")
_LIMITS = {WEIGHTS: 2 << 30, FACTS: 64 << 20, CARD: 1 << 20}
"""The only members, with the largest size in bytes that is read of each."""
_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, ValueError, RuntimeError)

PACKAGED = Path(__file__).with_name("simulated.safetensors")
"""The network that comes with the suite, trained on simulated patients alone."""


class ModelZipError(DataError):
    """A file is not a model of this suite, or cannot be trusted; the message says why."""


def write_model(path: Path, checkpoint: Mapping, *, facts: Mapping, card: str, half: bool = False) -> None:
    """Write a checkpoint as a model file; an existing file is replaced once the new one is complete.

    Args:
        path: of the file; its suffix, one of `SUFFIXES`, decides its kind.
        checkpoint: what `checkpoint.read_checkpoint` returns.
        facts: entries that `model.json` holds besides those of the checkpoint, such as `postprocess` and `scores`.
        card: the model card, in Markdown.
        half: store weights in half precision, see `halved`.

    Raises:
        ModelZipError: a weight does not fit into half precision.
    """
    tensors = halved(checkpoint["model"]) if half else checkpoint["model"]
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    rest = {name: value for name, value in checkpoint.items() if name != "model"}
    content = {"kind": KIND, "version": VERSION, "checkpoint": rest, **facts}
    if path.suffix == ".safetensors":
        with whole_file(path, "wb") as file:
            file.write(safetensors.torch.save(tensors, {FACTS: json.dumps(content, ensure_ascii=False)}))
        with whole_file(path.with_suffix(".md")) as file:
            file.write(card)
        return
    with whole_file(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(WEIGHTS, safetensors.torch.save(tensors))
        archive.writestr(FACTS, json.dumps(content, indent=1, ensure_ascii=False))
        archive.writestr(CARD, card)


def halved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round the weights of convolutions and matrices to float16.

    Vectors stay as they are: they take little space, and a variance of BatchNorm may be too small for float16.

    Raises:
        ModelZipError: a weight is larger than float16 can be.
    """
    rounded = {}
    for name, tensor in tensors.items():
        rounded[name] = tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        if not rounded[name].isfinite().all():
            raise ModelZipError(f"{name} holds a weight that does not fit into half precision. Export without --half.")
    return rounded


def is_model(path: Path) -> bool:
    """Whether a file is to be read as a model file, by its name."""
    return path.suffix in SUFFIXES


def packaged_model() -> Path:
    """Where the packaged network lies, or `ModelZipError` if this copy of the suite comes without it."""
    if not PACKAGED.is_file():
        raise ModelZipError(
            f"this copy of the suite comes without its network, {PACKAGED}. Fetch the suite again, or give a network of"
            " your own: --checkpoint runs/NAME/checkpoints/best.pt to predict, -p encoder_weights FILE to train."
        )
    return PACKAGED


def read_facts(path: Path) -> dict:
    """Read `model.json` of a model file.

    Raises:
        ModelZipError: the file is not there, torn, hostile, or no model of this version.
    """
    return _read(path, weights=False)[0]


def read_model(path: Path) -> dict:
    """Read a model file as a checkpoint, its tensors on the CPU under `model`, those in half precision as float32.

    Raises:
        ModelZipError: see `read_facts`.
    """
    facts, tensors = _read(path, weights=True)
    whole = {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}
    return facts["checkpoint"] | {"model": whole}


def _read(path: Path, *, weights: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """`model.json`, and the tensors if they are asked for."""
    if not path.is_file():
        raise ModelZipError(f"no model at {path}. `python -m brats_helpers export RUN --out {path.name}` makes one.")
    facts, tensors = (_read_zip if path.suffix == ".zip" else _read_safetensors)(path, weights)
    if not isinstance(facts, dict) or facts.get("kind") != KIND or not isinstance(facts.get("checkpoint"), dict):
        raise ModelZipError(f"{path} is not a model of this suite: its {FACTS} does not say so.")
    if facts.get("version") != VERSION:
        raise ModelZipError(
            f"{path} has version {facts.get('version')} of the model format, expected {VERSION}. Export it again."
        )
    return facts, tensors


def _read_safetensors(path: Path, weights: bool) -> tuple[object, dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(FACTS, "null"))
            return facts, {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except (SafetensorError, *_DAMAGED) as error:
        raise ModelZipError(f"{path} is not a safetensors file, or is damaged ({error}). Export it again.") from error


def _read_zip(path: Path, weights: bool) -> tuple[object, dict[str, torch.Tensor]]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            facts = json.loads(archive.read(FACTS))
            content = archive.read(WEIGHTS) if weights else b""
    except _DAMAGED as error:
        raise ModelZipError(f"{path} is no zip file, or is damaged ({error}). Copy or export it again.") from error
    try:
        return facts, safetensors.torch.load(content) if weights else {}
    except SafetensorError as error:
        raise ModelZipError(f"{path}: {WEIGHTS} is damaged ({error}). Export the model again.") from error


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse a zip with other members than the three, or with sizes that no model has."""
    sizes = {member.filename: member.file_size for member in archive.infolist()}
    if unknown := sorted(sizes.keys() - _LIMITS.keys()):
        raise ModelZipError(f"{path} holds {unknown[0]!r}; a model holds only {', '.join(_LIMITS)}. Nothing was read.")
    if missing := [name for name in (FACTS, WEIGHTS) if name not in sizes]:
        raise ModelZipError(f"{path} is not a model of this suite: it has no {missing[0]}.")
    if len(archive.infolist()) > len(sizes):
        raise ModelZipError(f"{path} holds a member twice. Nothing was read.")
    for name, size in sizes.items():
        if size > _LIMITS[name]:
            raise ModelZipError(f"{path}: {name} claims {size:,} bytes, more than a model has. Nothing was read.")
