"""The simulated scanner: contrasts that show every part of the tumour, and modalities that hold different views."""

from types import SimpleNamespace

import numpy as np
import pytest

from brats_helpers.data import scanner
from brats_helpers.data.phantom import VARIETIES
from brats_helpers.labels import MODALITIES


@pytest.fixture
def ball():
    """A brain of radius 20 mm instead of a simulated one, which takes a second."""
    depth = 20 - np.linalg.norm(np.indices((48, 48, 48)) - 23.5, axis=0)
    return SimpleNamespace(
        inside=depth > 0,
        margin=depth,
        fill=lambda values: values,
        noise=lambda rng, grain: rng.standard_normal(depth.shape),
    )


@pytest.mark.parametrize("variety", [0.0, *VARIETIES.values()])
@pytest.mark.parametrize("low_grade", [False, True])
def test_every_part_of_a_tumour_shows_in_some_modality(variety, low_grade):
    anatomy = SimpleNamespace(variety=variety, mass=SimpleNamespace(low_grade=low_grade))
    for seed in range(100):
        levels = scanner._draw_levels(np.random.default_rng(seed), anatomy)
        flair, t1, t1ce, _ = (levels[name] for name in MODALITIES)
        assert flair["oedema"] > flair["grey"] + 0.1
        assert t1ce["enhancing"] > max(t1ce["solid"], t1ce["necrosis"]) + 0.2
        if low_grade:
            assert t1["solid"] < t1["oedema"] and t1ce["solid"] < t1ce["oedema"]


def test_modalities_may_hold_less_of_the_brain_but_one_holds_all_of_it(ball):
    ball.variety = 1.0
    differ, cut = 0, 0
    for seed in range(200):
        views = scanner._draw_views(np.random.default_rng(seed), ball)
        shares = [views[name].sum() / ball.inside.sum() for name in MODALITIES]
        assert max(shares) == 1 and min(shares) > 0.4 and not any((views[name] & ~ball.inside).any() for name in views)
        differ += min(shares) < 1
        cut += min(shares) < 0.6
    # 1 - 0.7 * 0.93 = 35 % expected, with a standard error of 3.4 %.
    assert 45 < differ < 95 and cut < 20
    ball.variety = 0.0
    views = scanner._draw_views(np.random.default_rng(0), ball)
    assert all(np.array_equal(view, ball.inside) for view in views.values())


def test_slices_average_and_come_back_in_place():
    # A ramp survives slices of any thickness, away from the ends, wherever the way back is linear.
    shrink, grow = scanner._sampling(60, step=4.0, shift=0.3, steep=1.0, width=0.4)
    ramp = np.arange(60.0)
    assert np.allclose((grow @ shrink @ ramp)[8:-8], ramp[8:-8], atol=0.1)
    # With a steep way back most voxels repeat their nearest slice.
    steps = np.abs(np.diff(scanner._sampling(60, step=4.0, shift=0.3, steep=20.0, width=0.4)[1] @ shrink @ ramp))
    assert np.median(steps) < 0.1 and steps.max() > 1
