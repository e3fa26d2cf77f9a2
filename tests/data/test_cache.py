"""The cache: nothing is lost, nothing is half there, nothing stale is used."""

import dataclasses
import errno
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import cache, nifti
from brats_helpers.data.cases import find_cases
from brats_helpers.labels import DataError
from tests.test_files import leave_part


def test_normalise_is_the_z_score_of_what_is_not_background():
    volume = np.array([0, 0, 2, 4, 6], np.int16)
    # mean 4, variance (4 + 0 + 4) / 3
    expected = np.array([0, 0, -2, 0, 2]) / np.sqrt(8 / 3)
    np.testing.assert_allclose(cache.normalise(volume), expected, rtol=1e-6)


@pytest.mark.parametrize("unit", [1e30, 1e-30, 1e200, 1e-200])
def test_normalise_does_not_depend_on_the_unit(unit):
    volume = np.array([0, 0, 2, 4, 6]) * unit
    np.testing.assert_allclose(cache.normalise(volume), cache.normalise(np.array([0, 0, 2, 4, 6])), atol=1e-6)


@pytest.mark.parametrize("volume", [np.zeros(4), np.array([0, 7, 7, 7]), np.full((30, 30, 30), 1234.567, np.float32)])
def test_normalise_survives_an_empty_and_a_constant_volume(volume):
    assert (cache.normalise(volume) == 0).all()


LPS = np.diag([-1.0, -1, 1, 1])


def _case(folder, volumes, labels=None, codes="LPS"):
    """A patient given in LPS order and stored along other axes."""
    wanted = nib.orientations.axcodes2ornt(codes)
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"), wanted)
    for name, volume in {**volumes, **({} if labels is None else {"seg": labels})}.items():
        nib.save(nib.Nifti1Image(volume, LPS).as_reoriented(turn), folder / f"P_{name}.nii.gz")
    return find_cases(folder, list(volumes))[0]


@pytest.mark.parametrize("shape", [(7, 5, 3), (40, 33, 18), (1, 9, 4), (12, 9, 1), (211, 230, 4)])
@pytest.mark.parametrize("at_the_border", [False, True])
@pytest.mark.parametrize("codes", ["LPS", "PIR"])
def test_the_crop_maps_back_to_the_volume_exactly(tmp_path, shape, codes, at_the_border):
    draw = np.random.default_rng(0)
    images = {name: np.zeros(shape, np.int16) for name in ("flair", "t1ce")}
    labels = np.zeros(shape, np.uint8)
    inner = tuple(slice(0 if at_the_border else n // 4, n if at_the_border else n - n // 5) for n in shape)
    for volume in images.values():
        volume[inner] = draw.integers(1, 500, volume[inner].shape)
    labels[inner] = draw.choice([0, 1, 2, 4], labels[inner].shape)
    labels[-1, -1, -1] = 2  # a tumour voxel outside the brain is kept
    case = _case(tmp_path, images, labels, codes)
    (packed,) = cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)
    classes = np.array([0, 1, 2, 0, 3])[labels]
    np.testing.assert_array_equal(packed.to_volume(packed.labels), classes)
    for channel, volume in enumerate(images.values()):
        brain = volume[volume != 0].astype(np.float64)
        expected = np.where(volume != 0, (volume - brain.mean()) / brain.std(), 0)
        np.testing.assert_allclose(packed.to_volume(packed.images[:, channel]), expected, rtol=1e-3, atol=1e-3)
    planes = classes.T[packed.origin[0] :][: len(packed.counts)]
    assert packed.counts[:, 1:].tolist() == [[(plane == k).sum() for k in (1, 2, 3)] for plane in planes]


def test_counts_are_voxels_of_each_class_per_slice(tmp_path):
    image = np.ones((4, 4, 2), np.int16)
    labels = np.zeros((4, 4, 2), np.uint8)
    labels[0, :3, 1] = (1, 2, 4)
    packed = cache.pack(_case(tmp_path, {"t2": image}, labels))
    assert packed.counts.tolist() == [[16, 0, 0, 0], [13, 1, 1, 1]]


def _contents(folder):
    return {path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def prepared(place):
    """The prepared cases in a cache, without the small files that say which files they are made from."""
    return sorted(path for path in place.iterdir() if path.is_dir())


@pytest.fixture
def data(tiny_patients, tmp_path):
    return shutil.copytree(tiny_patients, tmp_path / "data")


def test_each_slice_has_its_own_box_of_brain(tmp_path):
    """Two voxels in slice 0 span 2 columns and 3 rows of the patient's box; slice 1 holds tumour outside the brain."""
    flair, labels = np.zeros((9, 8, 3), np.int16), np.zeros((9, 8, 3), np.uint8)
    flair[3, 2, 0] = flair[4, 4, 0] = 7
    flair[:, :, 2] = 5  # the patient's box is the whole plane
    labels[1, 1, 1] = 2
    case = _case(tmp_path, {"flair": flair, "t1ce": flair}, labels)
    (packed,) = cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)
    assert packed.boxes.tolist() == [[2, 5, 3, 5], [0, 0, 0, 0], [0, 8, 0, 9]]


def test_a_prepared_case_is_used_again_until_a_file_changes(data, tmp_path):
    cases = find_cases(data)
    place = tmp_path / "cache"
    cache.prepare(cases, cache_dir=place, workers=1)
    made = {path: path.stat().st_mtime_ns for path in place.rglob("*.npy")}
    assert len(made) == 8
    cache.prepare(cases, cache_dir=place, workers=1)
    assert {path: path.stat().st_mtime_ns for path in made} == made

    seg = nib.load(cases[0].seg)
    emptied = np.zeros(seg.shape, np.uint8)
    emptied[24, 28, 10] = 1
    nib.save(nib.Nifti1Image(emptied, seg.affine), cases[0].seg)
    again = cache.prepare(cases, cache_dir=place, workers=2)
    assert again[0].counts[:, 1:].sum() == 1
    assert sum(path.exists() and path.stat().st_mtime_ns == made[path] for path in made) == 6
    assert len(prepared(place)) == 4  # what was made from the old file is gone


def count_packed(monkeypatch):
    """The IDs that are packed and the files that are read from here on."""
    packed, read = [], []
    pack, stored = cache._pack, nifti.read_bytes
    monkeypatch.setattr(cache, "_pack", lambda case, source: packed.append(case.id) or pack(case, source))
    monkeypatch.setattr(nifti, "read_bytes", lambda path: read.append(path) or stored(path))
    return packed, read


def test_moving_and_chmod_neither_read_nor_pack_again(data, tmp_path, monkeypatch):
    cache.prepare(find_cases(data), cache_dir=tmp_path / "cache", workers=1)
    before = prepared(tmp_path / "cache")
    packed, read = count_packed(monkeypatch)
    other = tmp_path / "Dä ta's"
    data.rename(other)
    for path in other.rglob("*.gz"):
        path.chmod(0o600)
    for _ in range(2):
        cache.prepare(find_cases(other), cache_dir=tmp_path / "cache", workers=1)
    assert packed == read == [] and prepared(tmp_path / "cache") == before


def test_files_that_only_look_changed_are_read_once_and_not_packed_again(data, tmp_path, monkeypatch):
    cache.prepare(find_cases(data), cache_dir=tmp_path / "cache", workers=1)
    before = prepared(tmp_path / "cache")
    packed, read = count_packed(monkeypatch)
    for path in data.rglob("*.gz"):
        path.touch()
    for _ in range(2):
        cache.prepare(find_cases(data), cache_dir=tmp_path / "cache", workers=1)
        assert packed == [] and len(read) == 20
    assert prepared(tmp_path / "cache") == before


def test_one_content_under_two_folders_is_kept_until_neither_has_it(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for folder in (data, copy):
        cache.prepare(find_cases(folder)[:1], cache_dir=tmp_path / "cache", workers=1)
    (shared,) = prepared(tmp_path / "cache")
    for folder, kept in ((data, True), (copy, False)):
        case = find_cases(folder)[0]
        shutil.copy(find_cases(folder)[1].images["t1"], case.images["t1"])
        cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)
        assert shared.exists() == kept


def test_without_memory_maps_arrays_are_read_and_it_is_said_once(data, tmp_path, monkeypatch, capsys):
    cases, real = find_cases(data), np.load

    def load(path, mmap_mode=None):
        if mmap_mode:
            raise OSError(errno.ENODEV, "No such device")
        return real(path)

    expected = [packed.images.copy() for packed in cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)]
    monkeypatch.setattr(cache.np, "load", load)
    opened = cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)
    for packed, images in zip(opened, expected, strict=True):
        np.testing.assert_array_equal(packed.images, images)
    assert capsys.readouterr().out.count("without memory maps") == 1


def test_two_files_of_one_size_and_time_that_swap_names_are_noticed(tmp_path):
    images = {name: np.full((4, 4, 2), 7, np.int16) for name in ("t1", "t2")}
    images["t1"][0] = 9
    case = _case(tmp_path, images)
    for path in case.images.values():  # as unpacking leaves them: an archive knows full seconds
        path.write_bytes(nib.Nifti1Image(images[path.name[2:4]], LPS).to_bytes())
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before = cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)[0].images.copy()
    t1, t2 = case.images.values()
    t1.rename(tmp_path / "t")
    t2.rename(t1)
    (tmp_path / "t").rename(t2)
    after = cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)[0].images
    np.testing.assert_array_equal(after, before[:, ::-1])
    assert (after != before).any()


def test_other_modalities_and_no_segmentation_are_kept_apart(data, tmp_path):
    kinds = [find_cases(data)[:1], find_cases(data, ["t1"])[:1]]
    kinds.append([dataclasses.replace(kinds[0][0], seg=None)])
    for _ in range(2):
        opened = [cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)[0] for cases in kinds]
        assert [packed.images.shape[1] for packed in opened] == [4, 1, 4]
        assert [packed.labels is None for packed in opened] == [False, False, True]
        assert len(prepared(tmp_path / "cache")) == 3


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "case.json"])
@pytest.mark.parametrize("torn", ["gone", "empty", "short"])
def test_a_file_torn_by_a_crash_is_never_read_but_made_again(data, tmp_path, name, torn):
    cases = find_cases(data)[:2]
    cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)
    whole = _contents(tmp_path / "cache")
    file = next((tmp_path / "cache").rglob(name))
    content = file.read_bytes()
    file.unlink()
    if torn != "gone":
        file.write_bytes(content[: 0 if torn == "empty" else len(content) - 10])
    cache.prepare(cases, cache_dir=tmp_path / "cache", workers=1)
    assert _contents(tmp_path / "cache") == whole


def test_a_worker_is_sent_no_voxels(data, tmp_path):
    case = find_cases(data)[0]
    opened = cache.prepare([case], cache_dir=tmp_path / "cache", workers=1)[0]
    assert len(pickle.dumps(opened)) < 1000 < opened.images.nbytes
    for packed in (opened, cache.pack(case)):
        received = pickle.loads(pickle.dumps(packed))
        np.testing.assert_array_equal(received.images, packed.images)
        assert received.counts.tolist() == packed.counts.tolist() and received.origin == packed.origin


@pytest.fixture(scope="module")
def many(tiny_patients, tmp_path_factory):
    """Twelve patients, the cache that an undisturbed preparation makes of them, and the seconds that it takes."""
    root = tmp_path_factory.mktemp("many")
    for k in range(3):
        shutil.copytree(tiny_patients, root / "data" / str(k))
    _prepare_all(root / "data", root / "whole")
    started = time.perf_counter()
    _prepare_all(root / "data", root / "again")
    seconds = time.perf_counter() - started
    assert _contents(root / "again") == _contents(root / "whole")
    return root / "data", root / "whole", seconds


def _prepare_all(data, place, ready=None):
    cases = [case for folder in sorted(data.iterdir()) for case in find_cases(folder)]
    if ready:
        ready.wait()
    cache.prepare(cases, cache_dir=place, workers=2)


def _start(data, place, ready):
    """A process of its own that begins when all who wait for `ready` are there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.data.test_cache"])
    process = context.Process(target=_prepare_all, args=(data, place, ready))
    process.start()
    return process


def _barrier(parties):
    return multiprocessing.get_context("forkserver").Barrier(parties)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_moment_and_started_again_it_ends_the_same(many, tmp_path, seed):
    data, whole, seconds = many
    ready = _barrier(2)
    process = _start(data, tmp_path / "cache", ready)
    ready.wait()
    time.sleep(random.Random(seed).uniform(0, seconds))
    process.kill()
    process.join()
    for place in (tmp_path / "cache").glob("Tiny*"):  # what is there under its own name is whole
        assert _contents(place) == _contents(whole / place.name)
    _prepare_all(data, tmp_path / "cache")
    assert _contents(tmp_path / "cache") == _contents(whole)


@pytest.mark.parametrize("before", ["nothing", "torn"])
def test_two_preparations_at_once_end_as_one(many, tmp_path, before):
    data, whole, _ = many
    place = tmp_path / "cache"
    if before == "torn":
        shutil.copytree(whole, place)
        for folder in prepared(place):
            (folder / "images.npy").unlink()
    ready = _barrier(2)
    processes = [_start(data, place, ready) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert _contents(place) == _contents(whole)


def test_a_case_that_another_run_made_meanwhile_is_not_replaced(data, tmp_path, monkeypatch):
    cases, place, pack, made = find_cases(data)[:1], tmp_path / "cache", cache._pack, []

    def overtaken(case, source):
        monkeypatch.setattr(cache, "_pack", pack)
        cache.prepare(cases, cache_dir=place, workers=1)
        made.extend(file.stat().st_ino for file in place.glob("Tiny*/*"))
        return pack(case, source)

    monkeypatch.setattr(cache, "_pack", overtaken)
    cache.prepare(cases, cache_dir=place, workers=1)
    assert len(made) == 3 and [file.stat().st_ino for file in place.glob("Tiny*/*")] == made


def test_what_a_dead_process_left_is_swept_away(many, tmp_path):
    data, whole, _ = many
    leave_part(tmp_path)
    _prepare_all(data, tmp_path)
    assert _contents(tmp_path) == _contents(whole)


def test_files_that_differ_in_shape_are_refused(tmp_path):
    case = _case(tmp_path, {"t1": np.ones((4, 4, 2), np.int16), "t2": np.ones((4, 4, 3), np.int16)})
    with pytest.raises(DataError, match=r"P: .*differ in shape.*\(4, 4, 2\).*\(4, 4, 3\)"):
        cache.pack(case)


def test_files_of_other_affines_are_refused(tmp_path):
    """As `predict` would meet them: nobody has audited what it is given."""
    case = _case(tmp_path, {"t1": np.ones((4, 4, 2), np.int16), "t2": np.ones((4, 4, 2), np.int16)})
    nib.save(nib.Nifti1Image(np.ones((4, 4, 2), np.int16), LPS + np.eye(4, k=3) * 0.06), case.images["t2"])
    with pytest.raises(DataError, match=r"P: .*P_t2.nii.gz does not lie where t1 does: .* differ by \(0.06, 0, 0\)"):
        cache.pack(case)


@pytest.mark.parametrize(
    ("value", "also_background", "refused"),
    [(np.nan, False, True), (np.inf, False, True), (np.nan, True, False), (np.inf, True, True)],
)
def test_nan_is_background_where_every_other_modality_is(tmp_path, value, also_background, refused):
    volumes = {name: np.ones((4, 4, 2), np.float32) for name in ("t1", "t2", "flair")}
    volumes["t2"][3, 2, 1] = value
    if also_background:
        volumes["t1"][3, 2, 1], volumes["flair"][3, 2, 1] = 0, np.nan
    case = _case(tmp_path, volumes)
    if refused:
        with pytest.raises(DataError, match=r"P: .*P_t2.nii.gz holds voxels that are not finite"):
            cache.pack(case)
    else:
        packed = cache.pack(case)
        assert np.isfinite(packed.images).all() and packed.counts.sum() == 31 and not packed.brain[1, 2, 3]


def test_a_modality_that_the_case_lacks_is_background_in_its_place(tmp_path):
    whole = _case(tmp_path, {name: np.random.default_rng(0).normal(size=(4, 4, 2)) for name in ("t1", "t2", "flair")})
    lacking = dataclasses.replace(whole, images={"flair": whole.images["flair"], "t1": whole.images["t1"]})
    assert lacking.missing == ("t2",)
    packed, expected = cache.pack(lacking), cache.pack(whole)
    assert not packed.images[:, 1].any()
    np.testing.assert_array_equal(packed.images[:, [0, 2]], expected.images[:, [0, 2]])
    voxels, image = lacking.read("t2")
    assert voxels.shape == image.shape == (4, 4, 2) and not voxels.any()


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
from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import find_cases
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
cases = find_cases(sys.argv[1]) * 20
held = prepare(cases, cache_dir=Path(sys.argv[2]), workers=1)
print(len(held))
"""
    command = [sys.executable, "-c", program, tiny_patients, tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "80\n"
