"""Volumes between voxel sizes."""

import numpy as np
import pytest
import torch

from brats_helpers.evaluation.resample import differs, resample, resample_back, resample_images


def test_a_few_percent_are_no_difference():
    assert not differs((1.0, 1.04, 0.96), (1, 1, 1))
    assert differs((1, 1, 1.1), (1, 1, 1)) and differs((0.94, 1, 1), (1, 1, 1))


@pytest.mark.parametrize("step", [0.5, 0.8, 1.0, 2.0])
def test_a_slope_stays_a_slope_in_its_place(step):
    """Old voxel k lies at k + 1/2 and holds that; so must each new voxel, away from the ends."""
    old, new = 40, int(40 / step)
    line = (torch.arange(old) + 0.5)[:, None, None]
    found = resample(line, (new, 1, 1), (step, 1, 1))[:, 0, 0]
    expected = (torch.arange(new) + 0.5) * step
    inside = (expected > 2 * step) & (expected < old - 2 * step)
    torch.testing.assert_close(found[inside], expected[inside].float(), atol=1e-3, rtol=0)


def test_larger_voxels_count_every_voxel_that_they_cover():
    line = torch.zeros(20, 1, 1)
    line[7] = 1
    assert resample(line, (5, 1, 1), (4, 1, 1)).sum() == pytest.approx(1 / 4, abs=0.02)


def test_background_does_not_darken_the_brains_edge():
    images = np.zeros((6, 2, 12, 12), np.float16)
    images[1:5, 0, 3:9, 3:9] = 2
    images[1:5, 1, 3:9, 3:9] = -1
    finer = resample_images(images, (1, 1, 2), (0.7, 0.7, 1))
    assert finer.shape == (12, 2, 18, 18)
    assert set(np.unique(finer[:, 0])) == {0, 2} and set(np.unique(finer[:, 1])) == {-1, 0}
    share = (finer[:, 0] > 0).mean() / (images[:, 0] > 0).mean()
    assert 0.8 < share < 1.2


def test_probabilities_come_back_to_the_patients_grid_and_sum_to_one():
    random = np.random.default_rng(0)
    images = random.normal(3, 1, (10, 1, 30, 20)).astype(np.float16)
    spacing, network = (0.8, 0.8, 2.0), (1.0, 1.0, 1.0)
    seen = resample_images(images, spacing, network)
    soft = random.dirichlet(np.ones(4), (seen.shape[0], *seen.shape[2:])).astype(np.float32)
    back = resample_back(np.moveaxis(soft, -1, 1), (10, 30, 20), spacing, network)
    assert back.shape == (10, 4, 30, 20)
    np.testing.assert_allclose(back.sum(axis=1), 1, atol=1e-5)
