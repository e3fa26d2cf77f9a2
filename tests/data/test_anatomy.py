"""The simulated head: its fields, its mass effect, and what the skull strip leaves."""

import numpy as np
import pytest
from scipy import ndimage

from brats_helpers.data import anatomy


def test_values_at_chosen_voxels_equal_those_of_the_whole_volume():
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((4, 5, 6), dtype=np.float32)
    matrices = [rng.standard_normal((out, n), dtype=np.float32) for out, n in ((13, 4), (9, 5), (11, 6))]
    whole = np.einsum("ijk,xi,yj,zk->xyz", volume.astype(float), *matrices)
    assert np.allclose(anatomy.spread(volume, matrices), whole, atol=1e-4)
    where = np.sort(rng.choice(whole.size, 300, replace=False))
    assert np.allclose(anatomy.spread_at(where, volume, matrices), whole.ravel()[where], atol=1e-4)
    assert anatomy.spread_at(where[:0], volume, matrices).size == 0


def test_interpolation_equals_scipy():
    rng = np.random.default_rng(1)
    volume = rng.random((7, 8, 9, 4), dtype=np.float32)
    at = rng.uniform(-2, 11, (3, 40_000)).astype(np.float32)  # outside as well, and more than one block
    at[:, :2] = 0, 6
    for channel, values in enumerate(anatomy._interpolate(volume, at)):
        assert np.array_equal(values, ndimage.map_coordinates(volume[..., channel], at, order=1, mode="nearest"))


def test_noise_has_zero_mean_and_unit_variance():
    fields = [anatomy.noise_field(np.random.default_rng(k), (64, 64, 64), 4) for k in range(4)]
    # A field has about 16 ** 3 independent grains, so the mean of four has a standard error near 0.01.
    assert abs(np.mean(fields)) < 0.04 and np.std(fields) == pytest.approx(1, abs=0.04)


def test_mass_effect_pulls_no_tissue_across_the_centre():
    # Ball of 4/3 pi 20^3 mm3 = 33.51 ml that took no room before (strength 1), far from the skull.
    nodes = np.zeros((3, 3, 1, 1), np.float32)
    nodes[0, :, 0, 0] = (20, 40, 80)
    mass = anatomy.Mass(low_grade=False, centre=np.zeros(3), core_ml=33.5103, oedema_ml=0)
    pull = anatomy._pull(nodes, mass, depth=np.full((3, 1, 1), 100.0), strength=1.0)
    # At 40 mm: 40 - cbrt(40^3 - 20^3) = 1.741 mm inward, faded by exp(-40 / 60).
    assert pull[0, 1, 0, 0] == pytest.approx(-1.741 * np.exp(-40 / 60), abs=2e-3)
    assert (nodes[0] + pull[0] > 0).all() and (np.abs(np.diff(np.abs(pull[0]).ravel())) > 0).all()
    at_skull = anatomy._pull(nodes, mass, depth=np.zeros((3, 1, 1)), strength=1.0)
    assert not at_skull.any()


def test_the_strip_leaves_part_of_the_head_in_some_patients():
    heads = [anatomy.draw_anatomy(np.random.default_rng([0, k]), variety=0.4) for k in (5, 1)]  # 5 does, 1 does not
    assert heads[0].outside.size > 20_000 and heads[1].outside.size == 0  # mm3
    head, left = heads[0], heads[0].outside
    assert np.allclose(sum(head.remnants.values()), 1, atol=1e-3)
    assert head.inside.ravel()[head.where[left]].all()
    assert (head.depth[left] < 0).all() and (head.white + head.grey)[left].mean() < 0.3
