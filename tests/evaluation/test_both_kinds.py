"""Networks of slices and of 3D patches predict through the same lines, alone and averaged."""

import dataclasses

import numpy as np
import pytest
import torch

from brats_helpers.__main__ import main
from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_mask
from brats_helpers.evaluation import inference
from brats_helpers.training.settings import DECODER
from tests.conftest import write_tiny_case
from tests.tiny_training import CUBES, SETTINGS, fit_tiny

PLANES = dataclasses.replace(
    CUBES,
    encoder="acs-tu-tf_efficientnet_lite0",
    encoder_weights="imagenet",
    decoder=DECODER,
    patch_size=64,
    batch_size=1,
)
CPU = torch.device("cpu")
MODALITIES = ("flair", "t1ce")


@pytest.mark.parametrize("cubes", [CUBES, PLANES], ids=["MONAI", "ACS"])
def test_the_verb_predicts_into_the_patients_geometry_with_either_kind_or_both(cubes, tiny_patients, tmp_path):
    packed = [pack(case) for case in find_cases(tiny_patients, MODALITIES)]
    files = []
    for name, settings in (("cubes", cubes), ("slices", SETTINGS)):
        fit_tiny(packed, tmp_path / name, settings=dataclasses.replace(settings, modalities=MODALITIES, epochs=1))
        files.append(tmp_path / name / "checkpoints" / "best.pt")
    source = write_tiny_case(tmp_path / "new", "New", seed=9)
    case = find_cases(source, MODALITIES)[0]
    one, other, both = (
        inference.predict(inference.load_networks(some, device=CPU), pack(case), channels=MODALITIES, flips=True)
        for some in (files[:1], files[1:], files)
    )
    np.testing.assert_allclose(both, (one + other) / 2, atol=1e-6)
    assert abs(one - other).max() > 0.01

    checkpoints = [word for file in files for word in ("--checkpoint", str(file))]
    assert main(["predict", *checkpoints, "--out", str(tmp_path / "out"), "--device", "cpu", str(source)]) == 0
    assert read_mask(tmp_path / "out" / "New_seg.nii.gz", "brats2020").shape == (48, 56, 20)
