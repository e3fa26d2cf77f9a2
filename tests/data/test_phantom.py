"""Simulated patients: BraTS' files on disk, repeatable, restartable, and shaped like the disease."""

import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from brats_helpers.data import phantom
from brats_helpers.data.cases import find_cases
from brats_helpers.data.nifti import read_image, read_mask
from brats_helpers.labels import MODALITIES, DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("simulated")
    return root, phantom.make_cases(root, n_cases=2, seed=3, workers=1)


def load(folder):
    (case,) = find_cases(folder)
    return {name: read_image(path)[0] for name, path in case.images.items()}, read_mask(case.seg, case.numbering)


def test_files_are_brats_files(made):
    root, folders = made
    assert [folder.relative_to(root).as_posix() for folder in folders] == ["Sim_3_000", "Sim_3_001"]
    files = {f"Sim_3_000_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2", "seg")}
    assert {path.name for path in folders[0].iterdir()} == files
    for path in folders[0].iterdir():
        image = nib.load(path)
        assert image.shape == (240, 240, 155)
        assert image.header.get_zooms() == (1, 1, 1)
        # BraTS: X runs to the right-hand side's minus, Y to the front's minus, first voxel at (0, 239, 0).
        assert image.affine.tolist() == [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
        assert image.get_data_dtype() == (np.uint8 if "seg" in path.name else np.int16)
    stored = np.asanyarray(nib.load(folders[0] / "Sim_3_000_seg.nii.gz").dataobj)
    assert set(np.unique(stored)) <= {0, 1, 2, 4}


def test_patients_look_like_patients(made):
    for folder in made[1]:
        images, classes = load(folder)
        brain = np.any([volume > 0 for volume in images.values()], axis=0)
        for volume in images.values():
            assert (volume > 0).sum() > 0.5 * brain.sum() and volume.min() == 0  # background exactly 0
        assert 1.0e6 < brain.sum() < 2.5e6  # mm3; adult brains with their fluid, and what the strip left
        assert not classes[~brain].any()
        centre = ndimage.center_of_mass(brain)
        assert np.abs(np.subtract(centre, (119, 129, 77))).max() < 12  # where BraTS' atlas has it
        assert 5e3 < (classes > 0).sum() < 3e5 and (classes % 2 == 1).any()


def test_tumours_have_the_contrast_of_the_textbook():
    """In the median patient: single ones vary, as real ones do."""
    found = []
    for number in range(5):
        images, classes = phantom.simulate_case(np.random.default_rng([3, number]), variety=0.2)
        healthy = np.any([volume > 0 for volume in images.values()], axis=0) & (classes == 0)
        oedema, enhancing = ndimage.binary_erosion(classes == 2), classes == 3
        middle = {name: np.median(volume[healthy & (volume > 0)]) for name, volume in images.items()}
        bright = [np.median(images[name][oedema]) / middle[name] for name in ("flair", "t2")]
        white = np.percentile(images["t1"][healthy], 75)  # white matter is the brightest quarter
        enhanced = np.median(images["t1ce"][enhancing]) / middle["t1ce"] if enhancing.any() else np.nan
        found.append([*bright, np.median(images["t1"][oedema]) / white, enhanced])
    flair, t2, t1, t1ce = np.nanmedian(found, axis=0)
    assert flair > 1.2 and t2 > 1.1  # oedema is bright there
    assert t1 < 1  # and darker than white matter here
    assert t1ce > 1.1  # enhancing tumour takes up contrast medium


def test_a_patient_depends_on_seed_and_number_alone(made, tmp_path):
    _, folders = made
    again = phantom.make_cases(tmp_path / "two", n_cases=2, seed=3, workers=2)
    for old, new in zip(folders, again, strict=True):
        for path in old.iterdir():
            assert np.array_equal(nib.load(path).dataobj, nib.load(new / path.name).dataobj), path.name
    other = phantom.make_cases(tmp_path / "other", n_cases=1, seed=4, workers=1)
    assert not np.array_equal(load(folders[0])[1], load(other[0])[1])
    assert not np.array_equal(load(folders[0])[1], load(folders[1])[1])
    assert [folder.name for folder in (*folders, *other)] == ["Sim_3_000", "Sim_3_001", "Sim_4_000"]


def test_finished_folders_are_kept_and_incomplete_ones_never_appear(made, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(made[0], root)
    shutil.rmtree(root / "Sim_3_001")
    (root / "Sim_3_000" / "note").touch()

    blank = np.zeros((2, 2, 2), np.int16)
    monkeypatch.setattr(phantom, "simulate_case", lambda rng, variety: (dict.fromkeys(MODALITIES, blank), blank))
    write = phantom._write

    def full_disk(path, volume):
        if "_t2" in path.name:
            raise OSError("No space left on device")
        write(path, volume)

    monkeypatch.setattr(phantom, "_write", full_disk)
    with pytest.raises(OSError, match="No space"):
        phantom.make_cases(root, n_cases=2, seed=3, workers=1)
    assert sorted(path.name for path in root.iterdir()) == ["SIMULATED.txt", "Sim_3_000"]

    monkeypatch.setattr(phantom, "_write", write)
    phantom.make_cases(root, n_cases=2, seed=3, workers=1)
    assert (root / "Sim_3_000" / "note").exists()
    assert len(list((root / "Sim_3_001").iterdir())) == len(MODALITIES) + 1


def test_the_folder_says_that_it_is_simulated(made, tmp_path):
    root, folders = made
    assert phantom.is_simulated(root) and phantom.is_simulated(folders[0])
    assert not phantom.is_simulated(tmp_path)


def test_patients_below_or_behind_links_are_simulated_too(made, tmp_path):
    (tmp_path / "data" / "real" / "A").mkdir(parents=True)
    assert not phantom.is_simulated(tmp_path / "data")
    shutil.copytree(made[0], tmp_path / "data" / "simulated-3-2")  # real ones beside them: a mixture
    assert phantom.is_simulated(tmp_path / "data") and not phantom.is_simulated(tmp_path / "data" / "real")
    for name, target in {
        "folders/Sim_3_000": made[1][0],
        "files/Sim_3_000_t1.nii.gz": made[1][0] / "Sim_3_000_t1.nii.gz",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target)
        assert phantom.is_simulated((tmp_path / name).parent)


def test_two_runs_at_once_end_as_one(tmp_path, monkeypatch):
    blank = np.zeros((2, 2, 2), np.int16)
    patient = (dict.fromkeys(MODALITIES, blank), blank)
    made = []

    def overtaken(rng, variety):
        monkeypatch.setattr(phantom, "simulate_case", lambda rng, variety: patient)
        made.extend(phantom.make_cases(tmp_path, n_cases=1, seed=3, workers=1)[0].iterdir())
        return patient

    monkeypatch.setattr(phantom, "simulate_case", overtaken)
    assert sorted(phantom.make_cases(tmp_path, n_cases=1, seed=3, workers=1)[0].iterdir()) == sorted(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SIMULATED.txt", "Sim_3_000"]


def test_the_mark_is_written_once(tmp_path):
    (tmp_path / ".part-of-another-run").mkdir()  # which is about to write the mark, or was killed
    phantom.make_cases(tmp_path, n_cases=0, seed=3, workers=1)
    before = (tmp_path / "SIMULATED.txt").stat()
    phantom.make_cases(tmp_path, n_cases=0, seed=3, workers=1)
    after = (tmp_path / "SIMULATED.txt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_importing_loads_no_templates():
    code = "import sys, brats_helpers.data.phantom; sys.exit('nilearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_of_anything_else_is_not_written_into(tmp_path, monkeypatch):
    (tmp_path / "BraTS20_Training_001").mkdir()
    with pytest.raises(DataError, match="no simulated patients.*new folder"):
        phantom.make_cases(tmp_path, n_cases=1, seed=0, workers=1)
    assert not phantom.is_simulated(tmp_path)
    (tmp_path / "a").mkdir()
    phantom.make_cases(tmp_path / "a", n_cases=0, seed=0, workers=1)
    with pytest.raises(DataError, match="other simulated patients"):
        phantom.make_cases(tmp_path / "a", n_cases=0, seed=1, workers=1)
    with pytest.raises(DataError, match="other simulated patients.*broad patients of seed 0"):
        phantom.make_cases(tmp_path / "a", n_cases=0, seed=0, workers=1, variety="broad")
    with pytest.raises(ValueError, match="'wide': expected one of typical, broad"):
        phantom.make_cases(tmp_path / "b", n_cases=0, seed=0, workers=1, variety="wide")
    monkeypatch.setattr(phantom, "VERSION", phantom.VERSION + 1)
    with pytest.raises(DataError, match="other simulated patients"):
        phantom.make_cases(tmp_path / "a", n_cases=0, seed=0, workers=1)
