"""HDF5 slices are reassembled into patients: channels and masks in any order, faulty files, where slices come from."""

import errno
import shutil
from itertools import permutations
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from brats_helpers.data import hdf5 as slices
from brats_helpers.data import sources
from brats_helpers.data.cases import find_cases
from brats_helpers.data.hdf5 import assemble, brightness, channel_order, mask_order, to_labels
from brats_helpers.data.nifti import read_image, read_mask
from brats_helpers.labels import MODALITIES, DataError, labels_to_classes
from tests.data.test_sources import pack_zip


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


def write(folder: Path, number: int, images: np.ndarray, masks: np.ndarray, first: int = 0) -> None:
    """As Kaggle's set: a file a slice, z-scores, so that the background is no 0."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = (images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))
    for z in range(images.shape[2]):
        with h5py.File(folder / f"volume_{number}_slice_{z + first}.h5", "w") as file:
            file["image"], file["mask"] = scores[:, :, z], masks[:, :, z].astype(np.uint8)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_masks_in_any_order_are_recognised_by_position(order, brains):
    for _, labels in brains:
        for kind, masks in (("tissues", tissues(labels)), ("regions", regions(labels))):
            told = mask_order(masks[..., list(order)])
            assert told == (kind, tuple(order.index(place) for place in range(3)))
            np.testing.assert_array_equal(to_labels(masks[..., list(order)], *told), labels)


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_channels_in_any_order_are_recognised_by_tissue_brightness(order, brains):
    for images, labels in brains:
        parts, alike = brightness(images[..., list(order)], tissues(labels))
        assert channel_order(parts[1], parts[2], alike) == tuple(order.index(place) for place in range(4))
        parts, alike = brightness(images[..., list(order)], regions(labels))
        assert channel_order(parts[0], parts[2], alike) == tuple(order.index(place) for place in range(4))


def test_masks_and_t1ce_are_recognised_on_real_patients(real_patients):
    """With two modalities; FLAIR in place of the two that are not there keeps T1ce where it is."""
    labelled = [case for case in find_cases(real_patients, ("flair", "t1ce")) if case.seg]
    assert labelled
    for case in labelled:
        classes = read_mask(case.seg, case.numbering)
        masks = np.stack([classes == k for k in (2, 3, 1)], axis=-1)
        assert mask_order(masks) == ("tissues", (2, 0, 1))
        flair, t1ce = (read_image(path)[0].astype(np.float32) for path in case.images.values())
        parts, alike = brightness(np.stack([flair, flair, t1ce, flair], axis=-1), masks)
        assert channel_order(parts[0], parts[1], alike)[2] == 2


@pytest.mark.parametrize("kind", [tissues, regions])
@pytest.mark.parametrize("first", [0, 1])
def test_patients_come_back_whole(first, kind, brains, tmp_path):
    places = {tissues: [1, 2, 0], regions: [2, 0, 1]}[kind]
    for number, (images, labels) in enumerate(brains, 1):
        shuffled = images[..., [2, 0, 3, 1]]
        write(tmp_path / "set" / "content", number, shuffled, kind(labels)[..., places] * np.uint8(255), first)
    out, says = assemble(tmp_path / "set", tmp_path)
    names = {tissues: "ED, ET, NCR", regions: "ET, WT, TC"}[kind]
    assert f"masks are {names}, as 2 of 2 patients show; channels are t1ce, flair, t2, t1" in says
    assert "assumed: axes and voxels" in says
    cases = find_cases(out)
    assert [case.id for case in cases] == ["volume_001", "volume_002"]
    for case, (images, labels) in zip(cases, brains, strict=True):
        np.testing.assert_array_equal(read_mask(case.seg, case.numbering), labels_to_classes(labels))
        for place, name in enumerate(MODALITIES):
            volume, file = read_image(case.images[name])
            truth = images[..., place]
            np.testing.assert_array_equal(volume == 0, truth == 0)
            np.testing.assert_allclose(volume * truth.std(), truth, atol=0.01)
            assert nib.aff2axcodes(file.affine) == ("L", "P", "S")

    def made() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}

    before = made()
    shutil.rmtree(out / "volume_002")  # as a kill leaves it
    assert assemble(tmp_path / "set", tmp_path) == (out, says)
    assert {path: at for path, at in before.items() if "volume_001" in str(path)}.items() <= made().items()
    assert before.keys() == made().keys()
    write(tmp_path / "set" / "content", 2, brains[0][0], kind(brains[0][1])[..., places], first)
    with pytest.raises(DataError, match="disagree on the order of the channels"):
        assemble(tmp_path / "set", tmp_path)  # another set, so another vote


def test_an_empty_slice_divided_by_zero_becomes_background(brains, tmp_path):
    images, labels = brains[0]
    write(tmp_path / "set", 1, images, tissues(labels))
    with h5py.File(tmp_path / "set" / "volume_1_slice_0.h5", "a") as file:
        file["image"][:] = np.nan
    out, _ = assemble(tmp_path / "set", tmp_path)
    (case,) = find_cases(out)
    volume = read_image(case.images["t2"])[0]
    assert np.isfinite(volume).all() and not volume[:, :, 0].any()


def test_patients_with_faults_are_left_out_by_name(brains, tmp_path, capsys):
    (images, labels), folder = brains[0], tmp_path / "set"
    for number in (*range(1, 9), 11):
        write(folder, number, images, tissues(labels))
    (folder / "volume_2_slice_5.h5").unlink()
    (folder / "volume_3_slice_15.h5").unlink()
    torn = folder / "volume_4_slice_7.h5"
    torn.write_bytes(torn.read_bytes()[:-100])
    with h5py.File(folder / "volume_5_slice_9.h5", "w") as file:
        file["image"], file["mask"] = np.zeros((8, 8, 3)), np.zeros((8, 8, 3))
    with h5py.File(folder / "volume_6_slice_9.h5", "w") as file:
        file.create_group("image")
    with h5py.File(folder / "volume_7_slice_9.h5", "a") as file:
        file["image"][5, 5] = np.nan
    with h5py.File(folder / "volume_8_slice_8.h5", "a") as file:
        file["mask"][:] = 1
    write(folder, 9, images, regions(labels))
    write(folder, 10, images, tissues(labels) & False)
    out, _ = assemble(folder, tmp_path)
    assert [case.id for case in find_cases(out)] == ["volume_001", "volume_010", "volume_011"]
    said = {line.split(":")[1]: line for line in capsys.readouterr().out.splitlines() if "left out" in line}
    assert [*said] == [f" volume {number}" for number in range(2, 10)]
    for number, what in {
        2: "does not have the same slices",
        3: "does not have the same slices",
        4: torn.name,
        5: "(8, 8, 3)",
        6: "cannot be read",
        7: "NaN",
        8: "overlap",
        9: "not tissues",
    }.items():
        assert what in said[f" volume {number}"]


def test_ambiguous_content_is_refused(brains, tmp_path):
    images, labels = brains[0]
    write(tmp_path / "split", 1, images, tissues(labels))
    write(tmp_path / "split", 2, images, tissues(labels)[..., [1, 0, 2]])
    with pytest.raises(DataError, match="patients disagree on the order of the masks.*--data brats2020"):
        assemble(tmp_path / "split", tmp_path)
    write(tmp_path / "split", 3, images, tissues(labels))
    assert "as 2 of 3 patients show" in assemble(tmp_path / "split", tmp_path)[1]
    write(tmp_path / "bare", 1, images, tissues(np.where(labels == 2, 1, labels)))
    with pytest.raises(DataError, match="shows which channel is which. volume 1: not all three tissues"):
        assemble(tmp_path / "bare", tmp_path)
    write(tmp_path / "twice" / "a", 1, images, tissues(labels))
    write(tmp_path / "twice" / "b", 1, images, tissues(labels))
    with pytest.raises(DataError, match="a/volume_1_slice_0.h5 and .*b/volume_1_slice_0.h5 hold the same slice"):
        assemble(tmp_path / "twice", tmp_path)


def test_missing_h5py_and_a_full_disk_are_named(brains, machine, tmp_path, monkeypatch):
    images, labels = brains[0]
    write(tmp_path / "set", 1, images, tissues(labels))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slices.nib, "save", full)
    with pytest.raises(DataError, match="No space left.*Make room"):
        assemble(tmp_path / "set", tmp_path)
    monkeypatch.setattr(slices, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install h5py"):
        assemble(tmp_path / "set", tmp_path)
    with pytest.raises(DataError, match="pip install h5py"):  # before anything is fetched
        sources.find_data("brats2020-slices", data_dir=tmp_path, phantom_cases=1, seed=0)


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
    data_dir = folder / "data" if where == "a folder" else tmp_path / "data"
    for _ in range(2):  # volumes made inside the folder do not count as data of the user
        source = sources.find_data(data, data_dir=data_dir, phantom_cases=1, seed=0)
        assert source.root.parent == data_dir and not source.simulated
        assert "as 1 of 1 patients show" in source.origin and "assumed" in source.origin
        assert [case.id for case in find_cases(source.root)] == ["volume_001"]


def test_folders_without_slices_are_left_unchanged(brains, machine, tmp_path):
    """HDF5 that is no slice, and patients beside slices."""
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "model.h5").write_bytes(b"weights")
    assert sources.find_data(str(folder), data_dir=tmp_path, phantom_cases=1, seed=0).root == folder
    write(folder, 1, brains[0][0], tissues(brains[0][1]))
    (folder / "Tiny_t1.NII.GZ").write_bytes(b"scan")
    assert sources.find_data(str(folder), data_dir=tmp_path, phantom_cases=1, seed=0).root == folder
