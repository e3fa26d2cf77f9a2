"""A window that slides over a patient: every voxel gets an answer, the middle of a window weighs most."""

import numpy as np
import torch

from brats_helpers.training.window import OVERLAP, Windows


class _Echo(torch.nn.Module):
    def forward(self, patches):
        assert patches.shape[2:] == (8, 8, 8)
        return patches.repeat(1, 4, 1, 1, 1)


class _Place(torch.nn.Module):
    """Answers how far from the patch's low end a voxel lies along the last axis."""

    def forward(self, patches):
        return torch.arange(8.0).repeat(len(patches), 4, 8, 8, 1)


def test_a_network_that_echoes_gives_the_patient_back_whatever_its_sides():
    images = torch.randn(1, 1, 13, 30, 5, generator=torch.Generator().manual_seed(0))
    logits = Windows(_Echo(), 8).eval()(images)
    assert logits.shape == (1, 4, 13, 30, 5)
    torch.testing.assert_close(logits, images.expand(-1, 4, -1, -1, -1))
    assert torch.equal(Windows(_Echo(), 8).eval()(images[0].movedim(0, 1)), logits[0].movedim(0, 1))


def test_patches_need_no_window():
    patches = torch.randn(2, 1, 8, 8, 8)
    assert torch.equal(Windows(_Echo(), 8).train()(patches), patches.expand(-1, 4, -1, -1, -1))


def test_overlapping_windows_are_weighted_by_distance_from_their_centres():
    """Two windows on 14 columns, from 0 and from 6: sigma is an eighth of the edge, one column, about 3.5."""
    assert OVERLAP == 0.25  # the second begins at 6
    row = Windows(_Place(), 8).eval()(torch.ones(1, 1, 8, 8, 14))[0, 0, 4, 4].double().numpy()
    weight = np.exp(-((np.arange(8) - 3.5) ** 2) / 2)
    expected = np.concatenate([np.arange(6), [0, 0], np.arange(2, 8)]).astype(float)
    for k, column in enumerate((6, 7)):
        first, second = weight[column], weight[k]
        expected[column] = (first * column + second * k) / (first + second)
    np.testing.assert_allclose(row, expected, rtol=1e-3)
