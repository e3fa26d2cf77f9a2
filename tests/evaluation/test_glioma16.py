"""Sixteen real patients: no error is found, and orientation and voxel size do not change what is predicted."""

from pathlib import Path

import nibabel as nib
import nibabel.processing
import numpy as np
import pytest
import torch

from brats_helpers.__main__ import main
from brats_helpers.evaluation import inference
from brats_helpers.evaluation.networks import Network
from brats_helpers.scoring.overlap import dice

FOLDER = Path(__file__).parents[3] / "shared" / "glioma16"
PATIENT = "Brats18_TCIA02_370_1"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no patients at {FOLDER}")


class Bright(torch.nn.Module):
    """Calls oedema what is two standard deviations brighter than the brain on FLAIR, enhancing what is so on T1ce."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(9.0))

    def forward(self, images):
        flair, t1ce = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2).unbind(dim=1)
        zero = torch.zeros_like(flair)
        return self.slope * torch.stack([zero, zero - 9, flair - 2, (t1ce - 2) * (flair > 0) + flair - 2], dim=1)


@pytest.fixture(autouse=True)
def network(monkeypatch):
    settings = {"modalities": ("flair", "t1ce"), "context_slices": 0, "patch_size": 0}
    one = Network(Bright(), settings, frozenset(), frozenset(), 1, {"spacing_mm": [1.0, 1.0, 1.0]})
    monkeypatch.setattr(inference, "load_networks", lambda checkpoints, device: [one])


def predicted(folder, change):
    """The label map that `predict` writes for the patient, whose images are stored as `change` returns them."""
    scans = folder / "scans" / PATIENT
    scans.mkdir(parents=True)
    for name in ("flair", "t1ce"):
        image = change(nib.load(FOLDER / PATIENT / f"{PATIENT}_{name}.nii.gz"))
        nib.save(image, scans / f"{PATIENT}_{name}.nii")
    argv = ["predict", str(scans), "--checkpoint", "x.pt", "--out", str(folder / "out"), "--device", "cpu"]
    assert main(argv) == 0
    return nib.load(folder / "out" / f"{PATIENT}_seg.nii.gz")


def reoriented(image, codes):
    ends = (nib.orientations.axcodes2ornt("".join(axes)) for axes in (nib.aff2axcodes(image.affine), codes))
    return image.as_reoriented(nib.orientations.ornt_transform(*ends))


def test_the_label_map_depends_neither_on_orientation_nor_much_on_voxel_size(tmp_path):
    original = predicted(tmp_path / "original", lambda image: image)
    classes = np.asarray(original.dataobj)
    assert {*np.unique(classes)} == {0, 2, 4}
    for codes in ("RAS", "PIR"):
        turned = predicted(tmp_path / codes, lambda image, codes=codes: reoriented(image, codes))
        assert nib.aff2axcodes(turned.affine) == tuple(codes)
        np.testing.assert_array_equal(reoriented(turned, "LPS").dataobj, classes)
    spacing = (0.8, 0.8, 2.0)
    other = predicted(tmp_path / "other", lambda image: nibabel.processing.resample_to_output(image, spacing, order=1))
    assert other.header.get_zooms() == pytest.approx(spacing)
    back = np.asarray(nibabel.processing.resample_from_to(other, original, order=0).dataobj)
    assert dice(classes > 0, back > 0) > 0.9


def test_check_finds_no_error(capsys):
    assert main(["check", str(FOLDER), "--workers", "2"]) == 0
    assert "16 patients: 0 with errors" in capsys.readouterr().out
