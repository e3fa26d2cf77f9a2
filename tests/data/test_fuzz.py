"""Random folders of patients, with names, layouts, orientations, numberings and faults drawn at random.

One rule, for `check`, notebook 00 and `predict`: each patient is used with the right labels, or a message names its
file. TEST_FUZZ sets how many folders are drawn.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brats_helpers.__main__ import main
from brats_helpers.data.cache import prepare
from brats_helpers.evaluation import inference
from brats_helpers.evaluation.networks import Network
from brats_helpers.labels import MODALITIES
from brats_helpers.scoring.overlap import dice
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
LAYOUTS = ("nested", "deep", "flat", "masks apart", "Decathlon", "nnU-Net")
DATASET = {
    "channel_names": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
    "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
}


@dataclass
class Patient:
    """One patient as written.

    `classes` are in LPS order; `expected` is the label map that `predict` is to write. `files` holds a file for each
    modality and the segmentation, or the same file for all modalities if they share a fourth axis.
    """

    id: str
    classes: np.ndarray
    expected: nib.Nifti1Image
    files: dict[str, Path]
    labelled: bool = True

    @property
    def shared(self):
        return self.files["t1"] == self.files["t2"]


@dataclass
class Drawn:
    """What was written: `faulty` names by case ID what a message must hold, `unread` those that `predict` skips."""

    root: Path
    patients: dict[str, Patient] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    spacing: tuple[float, ...] = (1, 1, 1)
    kinds: list[str] = field(default_factory=list)


def draw_scans(random):
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
    elif variant == "fourth axis" and data.ndim == 3:
        image = nib.Nifti1Image(data[..., None], image.affine)
    elif variant == "float":
        image = nib.Nifti1Image(data.astype(np.float32) * np.float32(1.00002), image.affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def rewrite(path, change, dtype=None):
    """Save a file again with what `change` returns for its voxels."""
    image = nib.load(path, mmap=False)
    nib.save(nib.Nifti1Image(change(np.array(image.dataobj, dtype)), image.affine), path)


def fault(kind, random, patient):
    """Spoil one file of a patient; returns the file, and whether `predict` can still read the scans."""
    files = patient.files
    path = files[str(random.choice(sorted(files)))]
    if patient.shared and kind in ("other shape", "other place"):
        path = files["seg"]  # the scans share one file, so that nothing else can differ from it
    part = {name: (..., k) if patient.shared else (...,) for k, name in enumerate(GREYS)}
    match kind:
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "text":
            path.write_text("not an image")
        case "empty file":
            path.write_bytes(b"")
        case "flat slice":
            rewrite(path, lambda data: data.reshape(*data.shape[:3], -1)[:, :, 5, 0])
        case "other shape":
            rewrite(path, lambda data: data[:-2])
        case "other place":
            image = nib.load(path, mmap=False)
            moved = image.affine.copy()
            moved[:3, 3] += 7
            nib.save(nib.Nifti1Image(np.array(image.dataobj), moved), path)
        case "blank":
            path = files["t1"]
            rewrite(path, lambda data: with_value(data, part["t1"], 0))
        case "infinite":
            path = files["t2"]
            rewrite(path, lambda data: with_value(data, inner(part["t2"]), np.inf), np.float32)
        case "NaN in the brain":
            path = files["t2"]
            rewrite(path, lambda data: with_value(data, inner(part["t2"]), np.nan), np.float32)
        case "missing":
            path = files["t1ce"]
            path.unlink()
        case "halves":
            path = files["seg"]
            rewrite(path, lambda data: data * np.float32(0.37), np.float32)
        case "label 9":
            path = files["seg"]
            rewrite(path, lambda data: with_value(data, data > 0, 9))
        case "singular":
            without_affine(path)
    return path, path == files["seg"]


def with_value(data, where, value):
    data[where] = value
    return data


def inner(part):
    """The middle of the brain, in any orientation; of one modality where a file holds several."""
    return (slice(10, 14), slice(10, 14), slice(8, 12), *part)


def without_affine(path):
    rewrite(path, lambda data: data)
    packed = path.suffix == ".gz"
    raw = bytearray(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
    raw[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform_code 0, sform_code 1
    raw[280:328] = bytes(48)
    path.write_bytes(gzip.compress(bytes(raw)) if packed else bytes(raw))


def copy(patient, root):
    """Put a copy of a patient's files below another folder, with what describes them; returns the copies."""
    copies = {path: root / "again" / path.relative_to(root) for path in patient.files.values() if path.exists()}
    for path, other in copies.items():
        other.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other)
    if (root / "dataset.json").exists():
        shutil.copy(root / "dataset.json", root / "again")
    return list(copies.values())


def oddity(kind, root, patient, unlabelled):
    """Something about or beside the patients that must change nothing."""
    files = patient.files
    match kind:
        case "hidden":
            (files["t1"].parent / "._junk_t1.nii.gz").write_bytes(b"junk")
            (root / ".DS_Store").write_bytes(b"junk")
        case "derived":
            for source in (files["t1"], unlabelled.files["t1"]):
                nib.save(nib.load(source, mmap=False), source.parent / f"{source.name.split('.')[0]}_N4.nii.gz")
        case "ADC of an unlabelled patient":
            source = unlabelled.files["t1"]
            nib.save(nib.load(source, mmap=False), source.parent / f"{unlabelled.id}_adc.nii.gz")
        case "table":
            (root / "name_mapping.csv").write_text("Grade,Nothing\nHGG\n")
        case "picture":
            nib.save(nib.Nifti1Image(np.ones((5, 5), np.int16), np.eye(4)), root / "scout.nii.gz")
        case "mha":
            (root / "VSD.Brain.XX.O.MR_T1.mha").write_bytes(b"ObjectType = Image\n")
        case "equal copy":
            copy(patient, root)
        case "qform and sform":
            for path in set(files.values()):
                image = nib.load(path, mmap=False)
                turned = image.affine.copy()
                turned[:3, 3] += 5
                image.set_sform(image.affine, 1)
                image.set_qform(turned, 1)
                nib.save(type(image)(np.array(image.dataobj), None, image.header), path)
        case "NaN around the brain":
            around = (..., 3) if patient.shared else ...
            rewrite(files["t2"], lambda data: with_value(data, around, blanked(data[around])), np.float32)
        case "folders called as files":
            for name, path in files.items():
                content = path.read_bytes()
                path.unlink()
                path.mkdir()
                files[name] = path / f"0000057_brain_{name}.nii{'.gz' if path.suffix == '.gz' else ''}"
                files[name].write_bytes(content)


def blanked(data):
    return np.where(data == 0, np.nan, data)


FAULTS = ("truncated", "text", "empty file", "flat slice", "other shape", "other place", "blank", "infinite", "missing")
FAULTS += ("halves", "label 9", "singular", "NaN in the brain", "differing copy")
ODDITIES = ("hidden", "derived", "table", "picture", "mha", "equal copy", "qform and sform", "NaN around the brain")
ODDITIES += ("folders called as files", "ADC of an unlabelled patient")
BY_DATASET = ("hidden", "table", "picture", "mha", "equal copy", "qform and sform", "NaN around the brain")
"""What may happen beside a `dataset.json`, where every other file would be a patient's."""


def file_names(layout, root, case_id, *, labelled, separator, endings, word, seg_name, ending):
    """The file of each modality and of the segmentation."""
    if layout in ("Decathlon", "nnU-Net"):
        images = root / ("imagesTr" if labelled else "imagesTs")
        marks = ("", "", "", "") if layout == "Decathlon" else ("_0000", "_0001", "_0002", "_0003")
        files = {name: images / f"{case_id}{mark}{ending}" for name, mark in zip(GREYS, marks, strict=True)}
        return files | {"seg": root / "labelsTr" / f"{case_id}{ending}"}
    folders = {"nested": root / case_id, "deep": root / "HGG" / "batch 1" / case_id, "masks apart": root / "images"}
    folder = folders.get(layout, root)
    files = {
        name: folder / f"{case_id}{word}{separator}{end}{ending}" for name, end in zip(GREYS, endings, strict=True)
    }
    masks = root / "labels" if layout == "masks apart" else folder
    return files | {"seg": masks / f"{case_id}{separator}{seg_name}{ending}"}


def draw_patient(random, case_id, files, *, labelled, numbering, written_as, codes, spacing, variant):
    """Write one patient."""
    scans, classes = draw_scans(random)
    labels = np.array(NUMBERS[numbering], np.uint8)[classes]
    if numbering == "gli2024":
        cavity = (classes == 1) & (random.random(SHAPE) < 0.5)
        labels[cavity], classes[cavity] = 4, 0
        for name, greys in GREYS.items():
            scans[name][cavity] = greys[4]
    expected = stored(np.array(NUMBERS[written_as], np.uint8)[classes], codes, spacing)
    patient = Patient(case_id, classes, expected, files, labelled)
    if patient.shared:
        write(files["t1"], stored(np.stack([*scans.values()], axis=-1), codes, spacing), variant)
    else:
        for name, voxels in scans.items():
            write(files[name], stored(voxels, codes, spacing), variant)
    if labelled:
        write(files["seg"], stored(labels, codes, spacing), variant)
    else:
        del files["seg"]
    return patient


def draw_folder(root, seed):
    """Seven patients in one layout, two faults and two oddities."""
    random = np.random.default_rng(seed)
    drawn = Drawn(root / "Daten für Köln's set")
    layout = str(random.choice(LAYOUTS))
    by_dataset = layout in ("Decathlon", "nnU-Net")
    pattern = "BRATS_{:03}" if by_dataset else str(random.choice(sorted(NAMES)))
    separator, endings, numberings = NAMES.get(pattern, ("_", (), ("msd",)))
    how = {"numbering": str(random.choice(numberings))}
    how["written_as"] = numberings[0]  # what the name tells, as `predict` looks at no mask
    drawn.spacing = [(1, 1, 1), (1, 1, 1), (0.9, 0.9, 1.2), (1, 1, 2), (3, 1, 1)][random.integers(5)]
    variant = str(random.choice(["as BraTS", "NIfTI-2", "fourth axis", "float", "plain"]))
    how |= {"spacing": drawn.spacing, "variant": variant}
    named = {"separator": separator, "endings": endings, "ending": ".nii" if variant == "plain" else ".nii.gz"}
    named["seg_name"] = "seg" if separator == "-" else str(random.choice(SEGS))
    named["word"] = str(random.choice(["", "", "_brain"])) if separator == "_" else ""
    orientations = ["LPS", "RAS", "PIR", "LAS", "ASL"]
    one = str(random.choice([*orientations, "each its own"]))
    drawn.kinds = [pattern, layout, one, *map(str, how.values()), named["seg_name"], named["word"]]
    for k in range(7):
        case_id, labelled = pattern.format(k + 1), k < 6
        codes = str(random.choice(orientations)) if one == "each its own" else one
        files = file_names(layout, drawn.root, case_id, labelled=labelled, **named)
        drawn.patients[case_id] = draw_patient(random, case_id, files, labelled=labelled, codes=codes, **how)
    if by_dataset:
        (drawn.root / "dataset.json").write_text(json.dumps(DATASET))
    spoil(drawn, random, ODDITIES if not by_dataset else BY_DATASET)
    return drawn


def spoil(drawn, random, oddities):
    """Two patients with one fault each, then two oddities, of different patients."""
    patients = list(drawn.patients.values())
    for patient, kind in zip(patients[:2], map(str, random.choice(FAULTS, 2, replace=False)), strict=True):
        if kind == "differing copy":
            path = next(path for path in copy(patient, drawn.root) if path.name == patient.files["t1"].name)
            rewrite(path, lambda data: data[::-1])
            readable = False
        else:
            path, readable = fault(kind, random, patient)
        by_dataset = (drawn.root / "dataset.json").exists()
        drawn.faulty[patient.id] = patient.id if kind == "missing" and by_dataset else path.name
        drawn.unread |= set() if readable else {patient.id}
        drawn.kinds.append(f"{patient.id} {kind} {path.name}")
    for patient, kind in zip(patients[3:5], map(str, random.choice(oddities, 2, replace=False)), strict=True):
        oddity(kind, drawn.root, patient, patients[6])
        drawn.kinds.append(f"{patient.id} {kind}")


class Tissues(torch.nn.Module):
    """Tells the tissues of `GREYS` by their grey, between a patient's brain (0) and the brightest voxel (1)."""

    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(30.0))

    def forward(self, images):
        brain = images.ne(0).any(dim=1)
        flair, _, t1ce, t2 = (self.relative(images[:, k], brain) for k in range(4))
        says = torch.where((t2 > 0.6) & (flair > -0.45), 1, 0)  # a cavity is as bright on T2, and darker on FLAIR
        says = torch.where(flair > 0.5, 2, says)
        says = torch.where(t1ce > 0.5, 3, says) * brain
        return self.logit * torch.nn.functional.one_hot(says, 4).movedim(-1, 1).float()

    @staticmethod
    def relative(image, brain):
        usual = image[brain].median()
        return (image - usual) / (image[brain].max() - usual)


def network():
    settings = {"modalities": MODALITIES, "context_slices": 0, "patch_size": 1}  # not 0: it gets whole patients
    return Network(Tissues(), settings, frozenset(), frozenset(), 1, {"spacing_mm": [1.0, 1.0, 1.0]})


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
def test_every_patient_is_used_rightly_or_named(tmp_path, seed, capsys, monkeypatch):
    drawn = draw_folder(tmp_path, seed)
    print(drawn.kinds)
    check_finds_the_faults(drawn, capsys)
    setup_uses_the_others(drawn, tmp_path)
    monkeypatch.setattr(inference, "load_networks", lambda checkpoints, device: [network()])
    predict_writes_the_right_maps(drawn, tmp_path / "out", capsys)


def check_finds_the_faults(drawn, capsys):
    code = main(["check", str(drawn.root), "--workers", "1"])
    said = capsys.readouterr().out
    assert code == 1 and "Traceback" not in said
    for name in drawn.faulty.values():
        assert name.split(".")[0] in said, (drawn.kinds, name, said)


def setup_uses_the_others(drawn, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        names = run_setup(drawn, tmp_path)
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    used = {case_id for part in ("train", "val", "test") for case_id in splits[part]}
    right = {case_id for case_id, patient in drawn.patients.items() if patient.labelled} - drawn.faulty.keys()
    assert used == right, drawn.kinds
    assert splits["unlabelled"] == [patient.id for patient in drawn.patients.values() if not patient.labelled]
    assert drawn.faulty.keys() <= {*names["excluded"](names["report"]), *names["found"].faulty()}, drawn.kinds
    for packed in prepare(names["cases"], cache_dir=tmp_path / "cache", workers=1):
        if packed.labels is not None:
            classes = packed.to_volume(packed.labels)
            assert np.array_equal(classes, drawn.patients[packed.id].classes), (drawn.kinds, packed.id)


def predict_writes_the_right_maps(drawn, out, capsys):
    code = main(["predict", str(drawn.root), "--checkpoint", "x.pt", "--out", str(out), "--device", "cpu"])
    said = capsys.readouterr().out
    assert code == bool(drawn.unread) and "Traceback" not in said, (drawn.kinds, said)
    written = {path.name.removesuffix("_seg.nii.gz"): nib.load(path) for path in out.glob("*.nii.gz")}
    assert written.keys() == drawn.patients.keys() - drawn.unread, (drawn.kinds, said)
    for case_id in drawn.unread:
        (line,) = (line for line in said.splitlines() if line.startswith(f"⚠️ {case_id} is skipped: "))
        assert drawn.faulty[case_id].split(".")[0] in line, (drawn.kinds, line)
    for case_id, image in written.items():
        expected = drawn.patients[case_id].expected
        assert image.shape == expected.shape and np.allclose(image.affine, expected.affine), (drawn.kinds, case_id)
        got, right = np.asarray(image.dataobj), np.asarray(expected.dataobj)
        if drawn.spacing == (1, 1, 1):
            assert np.array_equal(got, right), (drawn.kinds, case_id)
        else:
            assert set(np.unique(got)) <= set(np.unique(right))
            assert dice(got > 0, right > 0) > 0.8, (drawn.kinds, case_id, dice(got > 0, right > 0))
