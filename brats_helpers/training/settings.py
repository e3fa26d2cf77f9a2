"""Settings: what decides how a network is built and trained, checked when they are made."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import NamedTuple

from brats_helpers.labels import CLASSES, MODALITIES
from brats_helpers.training.augment import STRENGTHS
from brats_helpers.training.model import DECODER, sees_patches

PRECISIONS = ("auto", "float32", "bf16", "fp16")
_ELEMENTS = {tuple[str, ...]: str, tuple[int, ...]: int, tuple[float, ...]: float}
"""The types of fields that hold several values, and of one value."""


class SettingsError(ValueError):
    """A setting has a value that is not allowed; the message names the field, the value and what is allowed."""


class _Rule(NamedTuple):
    """What a field holds, in words for the error message, and a test of one value (or of the whole tuple)."""

    allowed: str
    holds: Callable[[object], bool]


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
_COUNT = _Rule("a whole number from 0 on", lambda value: _whole(value, 0))
_POSITIVE_COUNT = _Rule("a whole number from 1 on", lambda value: _whole(value, 1))
_NUMBER = _Rule("a number from 0 on", lambda value: _real(value, 0, math.inf))
_SHARE = _Rule("a share from 0 to 1", lambda value: _real(value, 0, 1))
_RULES = {
    "modalities": _Rule(f"one or more of {', '.join(MODALITIES)}, each once", _modalities),
    "encoder": _TEXT,
    "encoder_weights": _TEXT,
    "decoder": _Rule(f"{len(DECODER)} whole numbers from 1 on", _decoder),
    "context_slices": _COUNT,
    "patch_size": _COUNT,
    "epochs": _POSITIVE_COUNT,
    "minutes": _NUMBER,
    "batch_size": _POSITIVE_COUNT,
    "slices_per_epoch": _COUNT,
    "foreground": _Rule("a share up to 1, or a negative number", lambda value: _real(value, -math.inf, 1)),
    "augment": _Rule(f"one of {', '.join(STRENGTHS)}", lambda value: value in STRENGTHS),
    "modality_dropout": _SHARE,
    "class_weights": _Rule(f"{len(CLASSES)} numbers from 0 on, not all 0", _weights),
    "lr": _Rule("a number above 0", lambda value: _real(value, 0, math.inf) and value > 0),
    "encoder_lr": _SHARE,
    "weight_decay": _NUMBER,
    "warm_up": _SHARE,
    "frozen_epochs": _COUNT,
    "unfreeze_epochs": _COUNT,
    "frozen_statistics": _Rule("true or false", lambda value: isinstance(value, bool)),
    "ema": _Rule("a number from 0 to below 1", lambda value: _real(value, 0, 1) and value < 1),
    "patience": _COUNT,
    "precision": _Rule(f"one of {', '.join(PRECISIONS)}", lambda value: value in PRECISIONS),
    "seed": _COUNT,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides how a network is built and trained. Every checkpoint carries its settings.

    Attributes:
        modalities: in the order of the input channels.
        encoder: an encoder of segmentation-models-pytorch, or one of `model.PATCH_NETWORKS`.
        encoder_weights: `imagenet`, `simulated` (the packaged network, encoder and decoder), `none`, a file with an
            encoder's weights, or a checkpoint to fine-tune.
        decoder: channels of the five decoder blocks of a U-Net, from the deepest; no effect on a 3D network.
        context_slices: neighbouring slices on each side, fed as further channels.
        patch_size: edge in voxels of a 3D network's patches; 0 for a network of slices.
        epochs: maximum number of passes. If it is raised after a training has finished, the training continues.
        minutes: stop after so many minutes of training and validation; 0 sets no limit. A resumed training follows
            the limit given on resuming.
        batch_size: slices, or patches, per step, over all processes.
        slices_per_epoch: slices, or patches, per epoch; 0 takes as many as cover every voxel once.
        foreground: share of slices with tumour, or of patches centred on tumour; a negative number keeps the data's
            own share.
        augment: one of `augment.STRENGTHS`.
        modality_dropout: share of the samples in which some modalities, but not all, become background, so that the
            network learns to do without any of them. `predict` then takes patients who lack modalities.
        class_weights: of background, NCR, ED and ET in the cross-entropy.
        lr: highest learning rate of AdamW.
        encoder_lr: the encoder's learning rate as a share of `lr`.
        weight_decay: of AdamW.
        warm_up: share of the training over which the learning rate rises; a half cosine follows.
        frozen_epochs: epochs at the start in which the encoder is frozen, BatchNorm statistics included.
        unfreeze_epochs: epochs after these in which the encoder is unfrozen step by step, deepest layers first.
        frozen_statistics: keep the BatchNorm statistics of a pretrained encoder while its weights are trained.
            Without pretrained weights the statistics are learned.
        ema: decay of the exponential moving average of the weights, which is validated and kept; 0 turns it off.
        patience: stop after so many epochs without a better mean Dice of WT, TC and ET; 0 never stops.
        precision: of the forward and backward pass, one of `PRECISIONS`; `auto` times a step of each.
        seed: of every random choice.

    Raises:
        SettingsError: a value is not allowed, or two contradict each other.
    """

    modalities: tuple[str, ...]
    encoder: str
    encoder_weights: str
    decoder: tuple[int, ...]
    context_slices: int
    patch_size: int
    epochs: int
    minutes: float
    batch_size: int
    slices_per_epoch: int
    foreground: float
    augment: str
    modality_dropout: float = 0.0
    class_weights: tuple[float, ...]
    lr: float
    encoder_lr: float
    weight_decay: float
    warm_up: float
    frozen_epochs: int
    unfreeze_epochs: int
    frozen_statistics: bool
    ema: float
    patience: int
    precision: str
    seed: int

    def __post_init__(self):
        for field in fields(self):
            value = _checked(field.name, field.type, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if sees_patches(self.encoder) != bool(self.patch_size):
            kind = "patches: expected their edge" if sees_patches(self.encoder) else "slices: expected 0"
            raise SettingsError(f"patch_size {self.patch_size}: {self.encoder} sees {kind}.")
        if self.modality_dropout and len(self.modalities) == 1:
            (only,) = self.modalities
            raise SettingsError(
                f"modality_dropout {self.modality_dropout}: expected 0.0, as {only} is the only modality."
            )

    @classmethod
    def parse(cls, text: str = "", /, **values) -> "Settings":
        """Make settings from values as a notebook or the command line has them.

        Args:
            text: values that take precedence, such as `"ema=0.9, warm_up=0.1"`; see `from_text`.
            values: by field, typed or as text; lists are comma-separated (`"1,1,2,1"`).

        Raises:
            SettingsError: a field is unknown, missing or has a value that is not allowed.
        """
        values |= from_text(text)
        for name in values:
            _check_name(name)
        needed = [field.name for field in fields(cls) if field.default is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise SettingsError(f"settings without {', '.join(missing)}.")
        types = {field.name: field.type for field in fields(cls)}
        return cls(**{name: _parsed(name, types[name], value) for name, value in values.items()})


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


def _check_name(name: str) -> None:
    if name in _RULES:
        return
    near = difflib.get_close_matches(name, _RULES, 1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_RULES)}."
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
    """A setting's value as a person writes it: `flair,t1` rather than a tuple."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else repr(value)
