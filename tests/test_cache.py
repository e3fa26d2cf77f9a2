"""The cache: nothing is lost, nothing is half there, nothing stale is used."""

import platform
import shutil
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from brats_helpers import cache
from brats_helpers.cases import DataError, find_cases, read_image, read_mask


def test_normalise_is_the_z_score_of_what_is_not_background():
    volume = np.array([0, 0, 2, 4, 6], np.int16)
    # mean 4, variance (4 + 0 + 4) / 3
    expected = np.array([0, 0, -2, 0, 2]) / np.sqrt(8 / 3)
    np.testing.assert_allclose(cache.normalise(volume), expected, rtol=1e-6)


@pytest.mark.parametrize("volume", [np.zeros(4), np.array([0, 7, 7, 7])])
def test_normalise_survives_an_empty_and_a_constant_volume(volume):
    assert (cache.normalise(volume) == 0).all()


def _case(folder, volumes, labels=None, affine=None):
    affine = np.eye(4) if affine is None else affine
    for name, volume in {**volumes, **({} if labels is None else {"seg": labels})}.items():
        nib.save(nib.Nifti1Image(volume, affine), folder / f"P_{name}.nii.gz")
    return find_cases(folder, list(volumes))[0]


@pytest.mark.parametrize("shape", [(7, 5, 3), (40, 33, 18), (1, 9, 4)])
@pytest.mark.parametrize("affine", [np.eye(4), np.diag([-1.0, -1, 1, 1]), np.diag([2.0, 0.5, 3, 1])])
def test_the_crop_maps_back_to_the_volume_exactly(tmp_path, shape, affine):
    random = np.random.default_rng(0)
    images = {name: np.zeros(shape, np.int16) for name in ("flair", "t1ce")}
    labels = np.zeros(shape, np.uint8)
    inner = tuple(slice(n // 4, n - n // 5) for n in shape)
    for volume in images.values():
        volume[inner] = random.integers(1, 500, volume[inner].shape)
    labels[inner] = random.choice([0, 1, 2, 4], labels[inner].shape)
    labels[-1, -1, -1] = 2  # a tumour voxel outside the brain is kept
    case = _case(tmp_path, images, labels, affine)
    packed = cache.pack(case)
    np.testing.assert_array_equal(packed.to_volume(packed.labels), read_mask(case.seg))
    for channel, name in enumerate(case.images):
        expected = cache.normalise(read_image(case.images[name])[0])
        np.testing.assert_allclose(packed.to_volume(packed.images[:, channel]), expected, rtol=1e-3, atol=1e-3)


def test_counts_are_voxels_of_each_class_per_slice(tmp_path):
    image = np.ones((4, 4, 2), np.int16)
    labels = np.zeros((4, 4, 2), np.uint8)
    labels[0, :3, 1] = (1, 2, 4)
    packed = cache.pack(_case(tmp_path, {"t2": image}, labels))
    assert packed.counts.tolist() == [[16, 0, 0, 0], [13, 1, 1, 1]]


def test_a_prepared_case_is_used_again_until_a_file_changes(tiny_patients, tmp_path):
    source = shutil.copytree(tiny_patients, tmp_path / "data")
    cases = find_cases(source)
    cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npy")}
    assert len(made) == 8
    cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)
    assert {path: path.stat().st_mtime_ns for path in made} == made

    seg = nib.load(cases[0].seg)
    emptied = np.zeros(seg.shape, np.uint8)
    emptied[24, 28, 10] = 1
    nib.save(nib.Nifti1Image(emptied, seg.affine), cases[0].seg)
    again = cache.prepare(cases, cache_dir=tmp_path / "cache", workers=2)
    assert again[0].counts[:, 1:].sum() == 1
    assert sum(path.stat().st_mtime_ns == made[path] for path in made) == 6
    assert not list((tmp_path / "cache").rglob("outdated"))


def test_the_same_id_in_two_data_sets_shares_a_cache(tiny_patients, tmp_path):
    copies = [shutil.copytree(tiny_patients, tmp_path / name) for name in "ab"]
    (first,), (second,) = ([find_cases(copy)[0]] for copy in copies)
    cache.prepare([first, second], cache_dir=tmp_path / "cache", workers=1)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_killed_at_any_moment_and_started_again_it_ends_the_same(tiny_patients, tmp_path):
    program = (
        "import sys; from pathlib import Path; from brats_helpers.cache import prepare;"
        "from brats_helpers.cases import find_cases;"
        "print('go', flush=True); prepare(find_cases(sys.argv[1]), cache_dir=Path(sys.argv[2]), workers=1)"
    )

    def contents(folder):
        return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}

    whole = tmp_path / "whole"
    started = time.perf_counter()
    cache.prepare(find_cases(tiny_patients), cache_dir=whole, workers=1)
    seconds = time.perf_counter() - started
    broken = tmp_path / "broken"
    for share in (0.2, 0.5, 0.8):
        process = subprocess.Popen([sys.executable, "-c", program, tiny_patients, broken], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(seconds * share)
        process.kill()
        process.wait()
        for place in broken.glob("Tiny*"):  # what is there under its own name is whole
            assert cache.load(place).images.shape == cache.load(whole / place.name).images.shape
    (broken / f".part-{platform.node()}-{process.pid}-x").mkdir()
    cache.prepare(find_cases(tiny_patients), cache_dir=broken, workers=1)
    assert contents(broken) == contents(whole)


def test_files_that_differ_in_shape_are_refused(tmp_path):
    case = _case(tmp_path, {"t1": np.ones((4, 4, 2), np.int16), "t2": np.ones((4, 4, 3), np.int16)})
    with pytest.raises(DataError, match=r"P: .*differ in shape.*\(4, 4, 2\).*\(4, 4, 3\)"):
        cache.pack(case)


def test_a_case_of_background_alone_is_refused(tmp_path):
    with pytest.raises(DataError, match="P: every voxel.*is 0"):
        cache.pack(_case(tmp_path, {"t1": np.zeros((4, 4, 2), np.int16)}))


def test_an_unlabelled_case_has_no_labels(tmp_path):
    packed = cache.prepare(
        [_case(tmp_path, {"t1": np.ones((4, 4, 2), np.int16)})], cache_dir=tmp_path / "c", workers=1
    )[0]
    assert packed.labels is None and packed.counts[:, 1:].sum() == 0


def test_more_cases_than_open_files_are_allowed_at_first(tiny_patients, tmp_path):
    program = """
import resource, sys
from pathlib import Path
from brats_helpers.cache import prepare
from brats_helpers.cases import find_cases
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
cases = find_cases(sys.argv[1]) * 20
held = prepare(cases, cache_dir=Path(sys.argv[2]), workers=1)
print(len(held))
"""
    command = [sys.executable, "-c", program, tiny_patients, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "80\n"
