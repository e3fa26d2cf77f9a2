"""The simulated tumour: what grade does to core and enhancement."""

import numpy as np

from brats_helpers.data import anatomy, tumour


def test_low_grade_tumours_hardly_enhance_and_the_others_do():
    head = anatomy.draw_anatomy(np.random.default_rng([0, 1]), variety=1.0)
    shares = {}
    for head.mass.low_grade in (False, True):
        drawn = [tumour.draw_tumour(np.random.default_rng(seed), head) for seed in range(3)]
        counts = [np.bincount(one.classes.ravel(), minlength=4) for one in drawn]
        assert all(
            count[1] + count[3] > 0.6 * head.mass.core_ml * 1000 for count in counts
        )  # one reader draws narrower
        shares[head.mass.low_grade] = [count[3] / (count[1] + count[3]) for count in counts]
        for one in drawn:  # fractions of a voxel
            assert one.enhancing.min() >= 0 and (one.enhancing + one.necrosis <= one.core + 1e-5).all()
    assert max(shares[True]) < 0.4 and np.mean(shares[True]) < 0.5 * np.mean(shares[False])
