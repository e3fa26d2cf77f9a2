"""A network whose answers are known: it says the class that the value of its first channel names."""

import dataclasses

import numpy as np
import torch

from brats_helpers.data.cache import pack
from brats_helpers.evaluation.networks import Network
from brats_helpers.labels import MODALITIES


class Echo(torch.nn.Module):
    def __init__(self, logit=30.0):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(logit))

    def forward(self, images):
        says = images[:, 0].round().long().clamp(0, 3)
        return self.logit * torch.nn.functional.one_hot(says, 4).movedim(-1, 1).float()


def echo(logit=30.0, trained_on=(), modalities=MODALITIES, **facts):
    settings = {"modalities": tuple(modalities), "context_slices": 0, "patch_size": 0}
    return Network(Echo(logit), settings, frozenset(trained_on), frozenset(), 1, facts)


def with_classes_as_images(case):
    """A prepared case whose first image is its class indices, in a brain of exactly these voxels."""
    packed = pack(case)
    images = np.stack([packed.labels * np.float16(k + 1) for k in range(len(case.images))], axis=1)  # no two are equal
    return dataclasses.replace(packed, images=images, boxes=None)
