"""Settings: what decides how a network is built and trained, checked when they are made.

Needs the standard library alone, so that the command line lists and checks them before anything is installed.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple, Self

from brats_helpers.labels import CLASSES, MODALITIES

DECODER = (128, 64, 32, 16, 16)
"""Channels of the blocks of the U-Net's decoder, from the deepest, by default; the packaged network has the same."""
NAMED_WEIGHTS = {"imagenet": "ImageNet's weights", "simulated": "the packaged network", "none": "random weights"}
"""Weights to start from that are no file, see `Settings.encoder_weights`, and what they are in a sentence."""
MONAI = "monai-"
"""Prefix of the names of MONAI's 3D networks."""
RESENC = "nnunet-resenc-l"
"""nnU-Net's large 3D network with residual blocks."""
ACS = "acs-"
"""Prefix of an encoder's name: the same U-Net in 3D, see `volumetric`."""
STRENGTHS = ("none", "basic", "strong")
"""Levels of augmentation, see `augment.augment`."""
PRECISIONS = ("auto", "float32", "bf16", "fp16")
_ELEMENTS = {tuple[str, ...]: str, tuple[int, ...]: int, tuple[float, ...]: float}
"""The types of fields that hold several values, each with the type of one value."""


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the message names the field, the value and what is allowed."""


class _Rule(NamedTuple):
    """What a field holds, in words for the error message, and a test of one value (or of the whole tuple)."""

    allowed: str
    holds: Callable[[object], bool]


def sees_patches(encoder: str) -> bool:
    """Whether a network of that name sees 3D patches rather than slices."""
    return encoder.startswith(ACS) or only_volumes(encoder)


def only_volumes(encoder: str) -> bool:
    """Whether a network of that name sees 3D patches and cannot take the weights of a network of slices."""
    return encoder.startswith(MONAI) or encoder == RESENC


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _real(value: object, low: float, high: float) -> bool:
    return isinstance(value, float) and low <= value <= high and math.isfinite(value)


def _modalities(value: tuple) -> bool:
    return bool(value) and set(value) <= set(MODALITIES) and len(set(value)) == len(value)


def _weights(value: tuple) -> bool:
    return len(value) == len(CLASSES) and all(_real(weight, 0, math.inf) for weight in value) and sum(value) > 0


def _decoder(value: tuple) -> bool:
    return len(value) == len(DECODER) and all(_whole(width, 1) for width in value)


_TEXT = _Rule("a name", lambda value: isinstance(value, str) and bool(value))
_COUNT = _Rule("a whole number of at least 0", lambda value: _whole(value, 0))
_POSITIVE_COUNT = _Rule("a whole number of at least 1", lambda value: _whole(value, 1))
_NUMBER = _Rule("a number of at least 0", lambda value: _real(value, 0, math.inf))
_SHARE = _Rule("a share from 0 to 1", lambda value: _real(value, 0, 1))
_RULES = {
    "modalities": _Rule(f"one or more of {', '.join(MODALITIES)}, each once", _modalities),
    "encoder": _TEXT,
    "encoder_weights": _Rule(
        f"one of {', '.join(NAMED_WEIGHTS)}, or a file", lambda value: _TEXT.holds(value) and value != "auto"
    ),
    "decoder": _Rule(f"{len(DECODER)} whole numbers of at least 1", _decoder),
    "context_slices": _COUNT,
    "patch_size": _COUNT,
    "epochs": _POSITIVE_COUNT,
    "minutes": _NUMBER,
    "batch_size": _POSITIVE_COUNT,
    "slices_per_epoch": _COUNT,
    "foreground": _Rule("a share up to 1, or a negative number", lambda value: _real(value, -math.inf, 1)),
    "augment": _Rule(f"one of {', '.join(STRENGTHS)}", lambda value: value in STRENGTHS),
    "modality_dropout": _SHARE,
    "class_weights": _Rule(f"{len(CLASSES)} numbers of at least 0, not all 0", _weights),
    "lr": _Rule("a number above 0", lambda value: _real(value, 0, math.inf) and value > 0),
    "encoder_lr": _SHARE,
    "weight_decay": _NUMBER,
    "warm_up": _SHARE,
    "frozen_epochs": _COUNT,
    "unfreeze_epochs": _COUNT,
    "frozen_statistics": _Rule("true or false", lambda value: isinstance(value, bool)),
    "ema": _Rule("a number of at least 0 and below 1", lambda value: _real(value, 0, 1) and value < 1),
    "patience": _COUNT,
    "precision": _Rule(f"one of {', '.join(PRECISIONS)}", lambda value: value in PRECISIONS),
    "seed": _COUNT,
    "loader_workers": _COUNT,
    "processes": _COUNT,
    "checkpoint_minutes": _NUMBER,
    "deterministic": _Rule("true or false", lambda value: isinstance(value, bool)),
}


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """Fields that are checked by their rules when they are set."""

    def __post_init__(self):
        for field in fields(self):
            value = _checked(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def parse(cls, text: str = "", /, **values) -> Self:
        """Make settings from values as a notebook or the command line has them.

        Args:
            text: values that take precedence, such as `"ema=0.9, warm_up=0.1"`; see `from_text`.
            values: by field, typed or as text; lists are comma-separated (`"1,1,2,1"`).

        Raises:
            SettingsError: a field is unknown, missing or has a value that is not allowed.
        """
        values |= from_text(text)
        for name in values:
            _check_name(name, [field.name for field in fields(cls)])
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise SettingsError(f"settings without {', '.join(missing)}.")
        types = {field.name: field.type for field in fields(cls)}
        return cls(**{name: _parsed(name, types[name], value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Settings(_Checked):
    """What decides how a network is built and trained. Every checkpoint carries its settings.

    Attributes:
        modalities: in the order of the input channels.
        encoder: an encoder of segmentation-models-pytorch, or a 3D network, see docs/3d.md.
        encoder_weights: `imagenet`, `simulated` (the packaged network, encoder and decoder), `none`, a file with an
            encoder's weights, a checkpoint to fine-tune, or an nnssl checkpoint. The notebooks replace `auto`.
        decoder: channels of the five decoder blocks of a U-Net, from the deepest; no effect on 3D networks without ACS.
        context_slices: neighbouring slices on each side, fed as further channels.
        patch_size: edge in voxels of a 3D network's patches; 0 for a network of slices. The
            notebooks take 0 for a 3D network too, and choose the edge by the memory.
        epochs: maximum number of passes. If it is raised after a training has finished, the training continues.
        minutes: stop after so many minutes of training and validation; 0 sets no limit. A resumed training follows
            the limit given on resuming.
        batch_size: slices, or patches, per step, over all processes.
        slices_per_epoch: slices, or patches, per epoch; 0 takes as many as cover every voxel once.
        foreground: share of slices with tumour, or of patches centred on tumour; a negative number keeps the data's
            own share.
        augment: how much augmentation: none, basic or strong.
        modality_dropout: share of the samples in which some modalities, but not all, become background, so that the
            network learns to do without any of them. `predict` then takes patients who lack modalities.
        class_weights: weights of background, NCR, ED and ET in the cross-entropy.
        lr: highest learning rate of AdamW.
        encoder_lr: the encoder's learning rate as a share of `lr`.
        weight_decay: weight decay of AdamW.
        warm_up: share of the training over which the learning rate rises; a half cosine follows.
        frozen_epochs: epochs at the start in which the encoder is frozen, BatchNorm statistics included.
        unfreeze_epochs: epochs after these in which the encoder is unfrozen step by step, deepest layers first.
        frozen_statistics: keep the BatchNorm statistics of a pretrained encoder while its weights are trained.
            Without pretrained weights the statistics are learned.
        ema: decay of the exponential moving average of the weights, which is validated and kept; 0 turns it off.
        patience: stop after so many epochs without a better mean Dice of WT, TC and ET; 0 never stops.
        precision: number format of the forward and backward pass: float32, bf16, fp16, or auto, which times a step of
            each.
        seed: seed of every random choice.

    Raises:
        SettingsError: a value is not allowed, or two contradict each other.
    """

    modalities: tuple[str, ...]
    encoder: str
    encoder_weights: str
    decoder: tuple[int, ...] = DECODER
    context_slices: int
    patch_size: int = 0
    epochs: int
    minutes: float
    batch_size: int
    slices_per_epoch: int = 0
    foreground: float = 0.7
    augment: str
    modality_dropout: float = 0.0
    class_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    lr: float
    encoder_lr: float = 1.0
    weight_decay: float = 1e-2
    warm_up: float = 0.05
    frozen_epochs: int = 0
    unfreeze_epochs: int = 0
    frozen_statistics: bool = True
    ema: float = 0.99
    patience: int = 5
    precision: str = "auto"
    seed: int

    def __post_init__(self):
        super().__post_init__()
        if sees_patches(self.encoder) != bool(self.patch_size):
            kind = "patches: expected their edge" if sees_patches(self.encoder) else "slices: expected 0"
            raise SettingsError(f"patch_size {self.patch_size}: {self.encoder} sees {kind}.")
        if self.modality_dropout and len(self.modalities) == 1:
            (only,) = self.modalities
            raise SettingsError(
                f"modality_dropout {self.modality_dropout}: expected 0.0, as {only} is the only modality."
            )


@dataclass(frozen=True, kw_only=True)
class Execution(_Checked):
    """How a training is carried out on this machine. Checkpoints do not carry it.

    Attributes:
        loader_workers: processes that load batches; 0 loads in the training process.
        processes: processes that divide each batch among them; 0 takes one for each GPU.
        checkpoint_minutes: minutes between two checkpoints within an epoch; 0 writes one after every epoch only.
        deterministic: repeat the same weights on a GPU, at the price of some speed; a CPU always does.

    Raises:
        SettingsError: a value is not allowed.
    """

    loader_workers: int = 0
    processes: int = 0
    checkpoint_minutes: float = 10.0
    deterministic: bool = False


class Default(NamedTuple):
    """A setting that has a default: its value as text, and its meaning."""

    text: str
    meaning: str


def defaults() -> dict[str, Default]:
    """Return every setting that has a default, by its name: those that no notebook has a parameter for."""
    return {
        field.name: Default(_written(field.default), meanings(kind)[field.name])
        for kind in (Settings, Execution)
        for field in fields(kind)
        if field.default is not MISSING
    }


def explained(*records: "Settings | Execution") -> list[dict[str, str]]:
    """Return a row for each setting of `records`: its name, its value as text, and its meaning."""
    return [
        {"setting": name, "value": _written(getattr(record, name)), "meaning": meaning}
        for record in records
        for name, meaning in meanings(type(record)).items()
    ]


def meanings(kind: type) -> dict[str, str]:
    """Return what the docstring of `Settings` or `Execution` says about each field."""
    section = kind.__doc__.partition("Attributes:\n")[2].partition("Raises:")[0]
    entries = re.findall(r"^ {4,8}(\w+): (.+(?:\n {9,}\S.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def check_text(name: str, text: str) -> None:
    """Raise `SettingsError` unless `text` is an allowed value of the setting `name`."""
    _check_name(name)
    kind = next(field.type for kind in (Settings, Execution) for field in fields(kind) if field.name == name)
    _checked(name, kind, _parsed(name, kind, text))


def from_text(text: str) -> dict[str, str]:
    """Split `"ema=0.9, class_weights=1,1,2,1"` into values by field, as text.

    Raises:
        SettingsError: a field is unknown, with the nearest match; or a part is not of the form `name=value`.
    """
    values: dict[str, str] = {}
    for part in re.split(r",(?=[^,=]*=)", text) if text.strip() else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise SettingsError(f"settings {part.strip()!r}: expected name=value, such as ema=0.9.")
        _check_name(name)
        if name in values:
            raise SettingsError(f"settings: {name} is given twice.")
        values[name] = value
    return values


def _check_name(name: str, known: Collection[str] = _RULES) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}."
    raise SettingsError(f"there is no setting {name!r}: {hint}")


def _parsed(name: str, kind: object, value: object) -> object:
    """A value that may be text, as its field's type."""
    if not isinstance(value, str) or kind is str:
        return value
    parts = [part.strip() for part in value.split(",")]
    try:
        if kind in _ELEMENTS:
            return tuple(_ELEMENTS[kind](part) for part in parts)
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise _refusal(name, value) from None


def _checked(name: str, kind: object, value: object) -> object:
    """A value that its field's rule allows; lists become tuples, whole numbers in fields of numbers floats."""
    try:
        if kind in _ELEMENTS and not isinstance(value, str):
            value = tuple(_as_float(part) if _ELEMENTS[kind] is float else part for part in value)
        elif kind is float:
            value = _as_float(value)
        allowed = isinstance(value, str) == (kind is str) and _RULES[name].holds(value)
    except TypeError:
        allowed = False
    if not allowed:
        raise _refusal(name, value)
    return value


def _as_float(value: object) -> object:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _refusal(name: str, value: object) -> SettingsError:
    return SettingsError(f"{name} {shown(value)}: expected {_RULES[name].allowed}.")


def shown(value: object) -> str:
    """A setting's value in a message: `flair,t1` rather than a tuple, and text in quotes."""
    return repr(value) if isinstance(value, str) else _written(value)


def _written(value: object) -> str:
    """A setting's value as a person writes it in `settings`."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(_written, value)) if isinstance(value, tuple | list) else str(value)
