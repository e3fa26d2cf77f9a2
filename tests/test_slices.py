"""Slices in HDF5 put together to patients again: channels and masks in any order, faults, the ways in."""

import errno
import sys
from itertools import permutations
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from brats_helpers import slices, sources
from brats_helpers.cases import MODALITIES, DataError, find_cases, labels_to_classes, read_image, read_mask
from brats_helpers.slices import assemble, channel_order, mask_order, to_labels
from tests.test_sources import pack_zip


def brain(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid with fluid in the middle and a tumour beside it: images (X, Y, Z, 4) as MODALITIES, and labels."""
    random = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 44, 16)), indexing="ij")
    inside = (x / 0.8) ** 2 + (y / 0.85) ** 2 + (z / 0.9) ** 2 < 1
    fluid = (x / 0.1) ** 2 + (y / 0.4) ** 2 + (z / 0.5) ** 2 < 1
    distance = ((x - 0.42) ** 2 + (y - random.uniform(-0.2, 0.2)) ** 2 + (z / 1.5) ** 2) ** 0.5
    labels = np.select([~inside, distance < 0.12, distance < 0.2, distance < 0.32], [0, 1, 4, 2], 0).astype(np.uint8)
    tissue = np.select([labels > 0, fluid], [np.where(labels == 4, 3, labels).astype(int), 4], 0)
    greys = {  # of healthy brain, NCR, ED, ET, fluid
        "flair": (300, 500, 800, 700, 100),
        "t1": (400, 250, 300, 350, 150),
        "t1ce": (400, 250, 330, 900, 150),
        "t2": (300, 900, 600, 550, 950),
    }
    images = [np.array(greys[name])[tissue] + random.normal(0, 20, x.shape) for name in MODALITIES]
    return (np.stack(images, axis=-1) * inside[..., None]).astype(np.float32), labels


@pytest.fixture(scope="module")
def brains() -> list[tuple[np.ndarray, np.ndarray]]:
    return [brain(0), brain(1)]


def tissues(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels == 1, labels == 2, labels == 4], axis=-1)


def regions(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels > 0, (labels == 1) | (labels == 4), labels == 4], axis=-1)


def write(folder: Path, number: int, images: np.ndarray, masks: np.ndarray) -> None:
    """As Kaggle's set: a file a slice, z-scores, so that the background is no 0."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = (images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))
    for z in range(images.shape[2]):
        with h5py.File(folder / f"volume_{number}_slice_{z}.h5", "w") as file:
            file["image"], file["mask"] = scores[:, :, z], masks[:, :, z].astype(np.uint8)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_masks_in_any_order_are_told_by_where_they_lie(order, brains):
    for _, labels in brains:
        for kind, masks in (("tissues", tissues(labels)), ("regions", regions(labels))):
            told = mask_order(masks[..., list(order)])
            assert told == (kind, tuple(order.index(place) for place in range(3)))
            np.testing.assert_array_equal(to_labels(masks[..., list(order)], *told), labels)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_channels_in_any_order_are_told_by_their_tissues(order, brains):
    for images, labels in brains:
        assert channel_order(images[..., list(order)], labels) == tuple(order.index(place) for place in range(4))


def test_the_rules_hold_on_real_patients(real_patients):
    for case in find_cases(real_patients, ("flair", "t1ce")):
        if case.seg is None:
            continue
        classes = read_mask(case.seg)
        assert mask_order(np.stack([classes == k for k in (1, 2, 3)], axis=-1)) == ("tissues", (0, 1, 2))
        flair, t1ce = (read_image(path)[0].astype(np.float32) for path in case.images.values())
        healthy = (flair != 0) & (classes == 0)
        ahead = [
            (image[classes == 3].mean() - image[classes == 2].mean()) / image[healthy].std() for image in (flair, t1ce)
        ]
        assert ahead[1] > 1 > ahead[0]  # T1ce is where ET is brightest above ED


def test_patients_come_back_whole(brains, tmp_path, capsys):
    for number, (images, labels) in enumerate(brains, 1):
        write(tmp_path / "set" / "content", number, images[..., [2, 0, 3, 1]], tissues(labels)[..., [1, 2, 0]])
    says = assemble(tmp_path / "set", tmp_path / "out")
    assert "masks are ED, ET, NCR, as 2 of 2 patients show" in says and "channels are t1ce, flair, t2, t1" in says
    assert "geometry" in says
    cases = find_cases(tmp_path / "out")
    assert [case.id for case in cases] == ["volume_001", "volume_002"]
    for case, (images, labels) in zip(cases, brains, strict=True):
        np.testing.assert_array_equal(read_mask(case.seg), labels_to_classes(labels))
        for place, name in enumerate(MODALITIES):
            volume, file = read_image(case.images[name])
            truth = images[..., place]
            np.testing.assert_array_equal(volume == 0, truth == 0)
            np.testing.assert_allclose(volume * truth.std(), truth, atol=0.01)
            assert nib.aff2axcodes(file.affine) == ("L", "P", "S")

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}
    assemble(tmp_path / "set", tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.nii.gz")}


def test_patients_with_faults_are_left_out_by_name(brains, tmp_path, capsys):
    (images, labels), folder = brains[0], tmp_path / "set"
    for number in range(1, 5):
        write(folder, number, images, tissues(labels))
    (folder / "volume_2_slice_5.h5").unlink()
    torn = folder / "volume_3_slice_7.h5"
    torn.write_bytes(torn.read_bytes()[:-100])
    with h5py.File(folder / "volume_4_slice_9.h5", "w") as file:
        file["image"], file["mask"] = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    assemble(folder, tmp_path / "out")
    assert [case.id for case in find_cases(tmp_path / "out")] == ["volume_001"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "volume 2: slice 5 is missing" in lines[0]
    assert "volume 3" in lines[1] and torn.name in lines[1] and "cannot be read" in lines[1]
    assert "volume 4" in lines[2] and "(8, 8, 3)" in lines[2]


def test_what_the_content_does_not_settle_is_refused(brains, tmp_path):
    images, labels = brains[0]
    write(tmp_path / "split", 1, images, tissues(labels))
    write(tmp_path / "split", 2, images, tissues(labels)[..., [1, 0, 2]])
    with pytest.raises(DataError, match="patients disagree on the order of the masks.*--data brats2020"):
        assemble(tmp_path / "split", tmp_path / "out")
    write(tmp_path / "bare", 1, images, tissues(labels) & False)
    with pytest.raises(DataError, match="nothing tells what is which"):
        assemble(tmp_path / "bare", tmp_path / "out")
    overlapping = tissues(labels)
    overlapping[..., 0] |= labels == 2
    write(tmp_path / "overlap", 1, images, overlapping)
    with pytest.raises(DataError, match="overlap and do not lie in each other"):
        assemble(tmp_path / "overlap", tmp_path / "out")
    assert not list((tmp_path / "out").glob("volume_*"))


def test_without_h5py_or_room_it_says_so(brains, tmp_path, monkeypatch):
    images, labels = brains[0]
    write(tmp_path / "set", 1, images, tissues(labels))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slices.nib, "save", full)
    with pytest.raises(DataError, match="disk of .* is full. Make room"):
        assemble(tmp_path / "set", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        assemble(tmp_path / "set", tmp_path / "out")


@pytest.mark.parametrize("where", ["mounted", "by hand", "a folder"])
def test_from_its_short_name_to_volumes(where, brains, machine, tmp_path):
    images, labels = brains[0]
    name, folder = "brats2020-training-data", tmp_path / "made"
    write(folder, 1, images, tissues(labels))
    files = {f"data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    if where == "mounted":
        sources.MOUNT.mkdir()
        folder.rename(sources.MOUNT / name)
    if where == "by hand":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / f"{name}.zip").write_bytes(pack_zip(files))
    data = str(folder) if where == "a folder" else "brats2020-slices"
    source = sources.find_data(data, data_dir=tmp_path / "data", phantom_cases=1, seed=0)
    assert source.root.is_relative_to(tmp_path / "data") and not source.simulated
    assert "as 1 of 1 patients show" in source.origin and "geometry" in source.origin
    assert [case.id for case in find_cases(source.root)] == ["volume_001"]
