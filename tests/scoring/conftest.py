"""Peers to compare with."""

import numpy as np
import pytest


@pytest.fixture
def surface_distance(monkeypatch):
    """google-deepmind/surface-distance 0.1, which needs a name that numpy 2 dropped."""
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    return pytest.importorskip("surface_distance", reason="surface-distance is not installed: no second opinion")


@pytest.fixture
def medpy():
    return pytest.importorskip("medpy.metric.binary", reason="medpy is not installed: no second opinion")


@pytest.fixture
def monai():
    return pytest.importorskip("monai.metrics", reason="monai is not installed: no second opinion")
