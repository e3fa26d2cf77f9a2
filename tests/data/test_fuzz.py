"""Random folders of patients, with names, layouts, orientations, numberings and faults drawn at random.

One rule: each patient is used with the right labels, or a finding names its file. TEST_FUZZ sets how many folders.
"""

import contextlib
import gzip
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brats_helpers.__main__ import main
from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import survey
from brats_helpers.suite.environment import ROOT
from brats_helpers.suite.parameters import read_notebooks

FOLDERS = int(os.environ.get("TEST_FUZZ", 12))
SHAPE = (28, 30, 20)
GREYS = {  # of brain, NCR, ED, ET, and a resection cavity
    "flair": (300, 250, 600, 450, 60),
    "t1": (400, 250, 350, 300, 150),
    "t1ce": (400, 200, 350, 900, 150),
    "t2": (350, 800, 650, 500, 900),
}
NAMES = {
    "BraTS20_Training_{:03}": ("_", ("flair", "t1", "t1ce", "t2"), ("brats2020",)),
    "BraTS2021_{:05}": ("_", ("flair", "t1", "t1ce", "t2"), ("brats2020",)),
    "BraTS-GLI-{:05}-000": ("-", ("t2f", "t1n", "t1c", "t2w"), ("brats2023",)),
    "BraTS-GLI-{:05}-101": ("-", ("t2f", "t1n", "t1c", "t2w"), ("gli2024",)),
    "BraTS-PED-{:05}-000": ("-", ("t2f", "t1n", "t1c", "t2w"), ("ped",)),
    "Site-{:03}": ("_", ("flair", "t1", "t1ce", "t2"), ("brats2020", "brats2023", "msd")),
}
"""By pattern of the ID: the separator, the endings of the modalities, the numberings such patients come in."""
NUMBERS = {"brats2020": (0, 1, 2, 4), "brats2023": (0, 1, 2, 3), "gli2024": (0, 1, 2, 3), "ped": (0, 2, 4, 1)}
NUMBERS["msd"] = (0, 2, 1, 3)
SEGS = ("seg", "seg", "Label", "tumor_segmentation", "OT")


@dataclass
class Drawn:
    """What was written: by case ID the class indices in LPS order, and by case ID the file that must be named."""

    root: Path
    right: dict[str, np.ndarray] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)
    unlabelled: set[str] = field(default_factory=set)
    kinds: list[str] = field(default_factory=list)


def draw_patient(random):
    """Scans as float arrays and class indices, in LPS order; class 4 is a cavity."""
    at = np.indices(SHAPE).astype(float)
    middle = (np.array(SHAPE) - 1) / 2
    radius = np.sqrt(sum(((a - m) / (s / 2 - 1)) ** 2 for a, m, s in zip(at, middle, SHAPE, strict=True)))
    centre = middle + random.uniform(-3, 3, 3)
    away = np.sqrt(sum((a - c) ** 2 for a, c in zip(at, centre, strict=True)))
    rough = random.random(SHAPE)
    classes = np.select([away < 2.5, away < 4, away < 6 + rough], [1, 3, 2], 0) * (radius < 0.9)
    scans = {}
    for name, greys in GREYS.items():
        voxels = np.array(greys)[classes] + random.integers(-25, 26, SHAPE)
        scans[name] = np.where(radius < 0.9, voxels, 0).astype(np.int16)
    return scans, classes.astype(np.uint8)


def stored(volume, codes, spacing):
    """A NIfTI image of an LPS volume, turned to other axes."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:2, 3] = 100
    image = nib.Nifti1Image(volume, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    return image.as_reoriented(turn)


def write(path, image, variant):
    """Save an image as some tools do: in NIfTI-2, with a fourth axis of one, as float, or not packed."""
    data = np.array(image.dataobj)
    if variant == "NIfTI-2":
        image = nib.Nifti2Image(data, image.affine)
    elif variant == "fourth axis":
        image = nib.Nifti1Image(data[..., None], image.affine)
    elif variant == "float":
        image = nib.Nifti1Image(data.astype(np.float32) * np.float32(1.00002), image.affine)
    nib.save(image, path)


def fault(kind, random, folder, files, others):
    """Spoil one file of a patient; returns the name that a finding must hold."""
    path = files[str(random.choice(sorted(files)))]
    image = nib.load(path, mmap=False)
    data = np.array(image.dataobj)
    match kind:
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "text":
            path.write_text("not an image")
        case "empty file":
            path.write_bytes(b"")
        case "flat slice":
            nib.save(nib.Nifti1Image(data[:, :, 5].reshape(data.shape[:2]), image.affine), path)
        case "other shape":
            nib.save(nib.Nifti1Image(data[:-2], image.affine), path)
        case "other place":
            moved = image.affine.copy()
            moved[:3, 3] += 7
            nib.save(nib.Nifti1Image(data, moved), path)
        case "blank":
            path = files["t1"]
            nib.save(nib.Nifti1Image(data * 0, image.affine), path)
        case "infinite":
            path = files["t2"]
            spoilt = np.asarray(nib.load(path, mmap=False).dataobj, np.float32)
            spoilt[10:14, 10:14, 8:12] = np.inf
            nib.save(nib.Nifti1Image(spoilt, image.affine), path)
        case "missing":
            path = files["t1ce"]
            path.unlink()
        case "halves":
            path = files["seg"]
            nib.save(
                nib.Nifti1Image(np.asarray(nib.load(path, mmap=False).dataobj, np.float32) * 0.37, image.affine), path
            )
        case "label 9":
            path = files["seg"]
            labels = np.array(nib.load(path, mmap=False).dataobj)
            labels[labels > 0] = 9
            nib.save(nib.Nifti1Image(labels, image.affine), path)
        case "singular":
            nib.save(nib.Nifti1Image(data, None), path)
            packed = path.suffix == ".gz"
            raw = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
            raw[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform_code 0, sform_code 1
            raw[280:328] = bytes(48)
            path.write_bytes(gzip.compress(bytes(raw)) if packed else bytes(raw))
    return path.name


def clutter(kind, random, root, files):
    """Something beside the patients that must change nothing."""
    folder = files["t1"].parent
    stem = files["t1"].name.split(".")[0]
    match kind:
        case "hidden":
            (folder / "._junk_t1.nii.gz").write_bytes(b"junk")
            (root / ".DS_Store").write_bytes(b"junk")
        case "derived":
            image = nib.load(files["t1"], mmap=False)
            nib.save(image, folder / f"{stem}_N4.nii.gz")
        case "table":
            (root / "name_mapping.csv").write_text("Grade,Nothing\nHGG\n")
        case "picture":
            nib.save(nib.Nifti1Image(np.ones((5, 5), np.int16), np.eye(4)), root / "scout.nii.gz")
        case "mha":
            (root / "VSD.Brain.XX.O.MR_T1.mha").write_bytes(b"ObjectType = Image\n")


FAULTS = ("truncated", "text", "empty file", "flat slice", "other shape", "other place", "blank", "infinite", "missing")
FAULTS += ("halves", "label 9", "singular")
CLUTTER = ("hidden", "derived", "table", "picture", "mha")


def draw_folder(root, seed):
    """Seven patients in one layout, two faults and one piece of clutter."""
    random = np.random.default_rng(seed)
    drawn = Drawn(root / "Daten für Köln's set")
    pattern = str(random.choice(sorted(NAMES)))
    separator, endings, numberings = NAMES[pattern]
    numbering = str(random.choice(numberings))
    layout = str(random.choice(["nested", "deep", "flat", "masks apart"]))
    seg_name = "seg" if separator == "-" else str(random.choice(SEGS))
    codes = str(random.choice(["LPS", "RAS", "PIR", "LAS"]))
    spacing = [(1, 1, 1), (0.9, 0.9, 1.2), (1, 1, 2)][random.integers(3)]
    variant = str(random.choice(["as BraTS", "NIfTI-2", "fourth axis", "float", "plain"]))
    ending = ".nii" if variant == "plain" else ".nii.gz"
    word = str(random.choice(["", "", "_brain"])) if separator == "_" else ""
    drawn.kinds = [pattern, numbering, layout, seg_name, codes, str(spacing), variant, word]
    written = {}
    for k in range(7):
        case_id = pattern.format(k + 1)
        scans, classes = draw_patient(random)
        labels = np.array(NUMBERS[numbering], np.uint8)[classes]
        if numbering == "gli2024":
            cavity = (classes == 1) & (random.random(SHAPE) < 0.5)
            labels[cavity], classes[cavity] = 4, 0
            for name, greys in GREYS.items():
                scans[name][cavity] = greys[4]
        folders = {"nested": drawn.root / case_id, "deep": drawn.root / "HGG" / "batch 1" / case_id}
        folder = folders.get(layout, drawn.root / "images" if layout == "masks apart" else drawn.root)
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            name: folder / f"{case_id}{word}{separator}{end}{ending}" for name, end in zip(GREYS, endings, strict=True)
        }
        masks = drawn.root / "labels" if layout == "masks apart" else folder
        masks.mkdir(exist_ok=True)
        files["seg"] = masks / f"{case_id}{separator}{seg_name}{ending}"
        for name, path in files.items():
            write(path, stored(labels if name == "seg" else scans[name], codes, spacing), variant)
        if k == 6:
            files.pop("seg").unlink()
            drawn.unlabelled.add(case_id)
        else:
            drawn.right[case_id] = classes
        written[case_id] = files
    for case_id, kind in zip(list(written)[:2], random.choice(FAULTS, 2, replace=False), strict=True):
        drawn.faulty[case_id] = fault(kind, random, drawn.root, written[case_id], written)
        del drawn.right[case_id]
        drawn.kinds.append(f"{case_id} {kind}")
    kind = str(random.choice(CLUTTER))
    clutter(kind, random, drawn.root, written[list(written)[4]])
    drawn.kinds.append(kind)
    return drawn


def run_setup(drawn, folder):
    """The cells of notebook 00 in this process; returns their names."""
    notebook = read_notebooks(ROOT)["00_setup"]
    names = {name: parameter.default for name, parameter in notebook.parameters.items()}
    names |= {"run_dir": str(folder / "run"), "data": str(drawn.root), "cache_dir": str(folder / "cache")}
    names |= {"data_dir": str(folder / "data"), "split": "0.5,0.25,0.25", "workers": 1, "skip_incomplete": True}
    for code in notebook.code[1:]:  # without the bootstrap
        exec(code, names)
    return names


@pytest.mark.parametrize("seed", range(FOLDERS))
def test_every_patient_is_used_rightly_or_named(tmp_path, seed, capsys):
    drawn = draw_folder(tmp_path, seed)
    print(drawn.kinds)

    code = main(["check", str(drawn.root), "--workers", "1"])
    said = capsys.readouterr().out
    assert code == 1 and "Traceback" not in said
    for name in drawn.faulty.values():
        assert name.split(".")[0] in said, (drawn.kinds, name, said)

    with contextlib.redirect_stdout(io.StringIO()):
        names = run_setup(drawn, tmp_path)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    used = {case_id for part in ("train", "val", "test") for case_id in splits[part]}
    assert used == drawn.right.keys(), drawn.kinds
    assert set(splits["unlabelled"]) == drawn.unlabelled, drawn.kinds
    assert drawn.faulty.keys() <= {*names["excluded"](names["report"]), *names["found"].faulty()}, drawn.kinds
    for packed in prepare(names["cases"], cache_dir=tmp_path / "cache", workers=1):
        if packed.labels is not None:
            classes = packed.to_volume(packed.labels)
            assert np.array_equal(classes, drawn.right[packed.id]), (drawn.kinds, packed.id)


def test_survey_reads_a_drawn_folder(tmp_path):
    """The generator itself: without faults every patient is found."""
    drawn = draw_folder(tmp_path, 1)
    assert {case.id for case in survey(drawn.root).cases} >= drawn.right.keys() | drawn.unlabelled
