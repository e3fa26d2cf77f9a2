"""A training that takes seconds."""

import dataclasses

import torch

from brats_helpers.training.loop import fit
from brats_helpers.training.settings import Settings

SETTINGS = Settings(
    modalities=("flair", "t1", "t1ce", "t2"),
    encoder="tu-tf_mobilenetv3_small_minimal_100",
    encoder_weights="none",
    decoder=(256, 128, 64, 32, 16),
    context_slices=0,
    patch_size=0,
    epochs=3,
    minutes=0,
    batch_size=4,
    slices_per_epoch=16,
    foreground=0.7,
    augment="basic",
    class_weights=(1, 1, 1, 1),
    lr=2e-3,
    encoder_lr=1.0,
    weight_decay=0.01,
    warm_up=0.05,
    frozen_epochs=0,
    unfreeze_epochs=0,
    frozen_statistics=True,
    ema=0.9,
    patience=0,
    precision="float32",
    seed=0,
)
CUBES = dataclasses.replace(SETTINGS, encoder="monai-unet", patch_size=32, batch_size=2, slices_per_epoch=4, epochs=2)
"""Of a network of 3D patches."""

HOW = {
    "device": torch.device("cpu"),
    "workers": 0,
    "checkpoint_minutes": 0.0,
    "deterministic": False,
    "tracker": "none",
}


def fit_tiny(prepared, folder, how=None, settings=SETTINGS, **changes):
    """Train on all prepared cases but the fourth, which validates."""
    return fit(dataclasses.replace(settings, **changes), prepared[:3], prepared[3:], folder, **HOW | (how or {}))


def stop(history):
    """As `follow`: stop the training after its first epoch."""
    raise KeyboardInterrupt


def weights(folder, name="last.pt"):
    """The content of a checkpoint."""
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def same(a, b):
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
