"""A training that takes seconds."""

import dataclasses

import torch

from brats_helpers.training.loop import fit
from brats_helpers.training.settings import Settings

SETTINGS = Settings(
    modalities=("flair", "t1", "t1ce", "t2"),
    encoder="tu-tf_mobilenetv3_small_minimal_100",
    encoder_weights="none",
    context_slices=0,
    decoder=(256, 128, 64, 32, 16),
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


HOW = {
    "device": torch.device("cpu"),
    "workers": 0,
    "checkpoint_minutes": 0.0,
    "deterministic": False,
    "tracker": "none",
}


def fit_tiny(prepared, folder, how=None, **changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return fit(settings, prepared[:3], prepared[3:], folder, **HOW | (how or {}))
