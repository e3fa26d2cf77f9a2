"""nnU-Net v2 in 2D or 3D by its own command line, for one job of benchmarks/accuracy.py.

The data set is set up as nnU-Net's own conversion of BraTS does it: labels 1 ED, 2 NCR, 3 ET, trained as the three
regions. With `memory_gb` in the job its planner gets this memory target. With `smaller` the plans get a second
configuration with a smaller batch and thinner network, as its documentation of plans files offers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import read_image, read_mask, read_nifti, write_mask

DATASET = "Dataset501_Benchmark"
TO_THEIRS = np.array([0, 2, 1, 3], np.uint8)  # NCR and ED change places; the same table leads back


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    folder, parts = Path(job["folder"]), job["parts"]
    cases = {case.id: case for case in survey(job["data"], job["modalities"]).complete(skip_incomplete=True)}
    places = {name: folder / name.lower() for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    raw = places["nnUNet_raw"] / DATASET
    environ = os.environ | {name: str(path) for name, path in places.items()}
    environ |= {
        "nnUNet_extTrainer": str(Path(__file__).parent),
        "nnUNet_n_proc_DA": str(job["workers"]),
        "nnUNet_def_n_proc": str(job["workers"]),
        "nnUNet_compile": "f",
        "BENCHMARK_SECONDS": str(job["seconds"]),
    }

    for sub in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / sub).mkdir(parents=True, exist_ok=True)
    for case_id in [*parts["train"], *parts["val"]]:
        write_images(cases[case_id], raw / "imagesTr")
        image = read_nifti(cases[case_id].seg)
        labels = nib.Nifti1Image(TO_THEIRS[read_mask(cases[case_id].seg, cases[case_id].numbering)], image.affine)
        nib.save(labels, raw / "labelsTr" / f"{case_id}.nii.gz")
    for case_id in parts["test"]:
        write_images(cases[case_id], raw / "imagesTs")
    facts = {
        "channel_names": dict(enumerate(job["modalities"])),
        "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
        "regions_class_order": [1, 2, 3],
        "numTraining": len(parts["train"]) + len(parts["val"]),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(facts))

    def nnunet(name: str, *arguments: str) -> None:
        subprocess.run([Path(sys.executable).parent / f"nnUNetv2_{name}", *arguments], env=environ, check=True)

    planned = configuration = job["configuration"]
    memory = ["-gpu_memory_target", str(job["memory_gb"])] if job["memory_gb"] else []
    if memory:  # its planner asks for another name of plans with another target
        memory += ["-overwrite_plans_name", "nnUNetPlans"]
    nnunet("plan_and_preprocess", "-d", "501", "-c", planned, "-np", str(job["workers"]), *memory)
    prepared = places["nnUNet_preprocessed"] / DATASET
    (prepared / "splits_final.json").write_text(json.dumps([{name: parts[name] for name in ("train", "val")}]))
    plans = json.loads((prepared / "nnUNetPlans.json").read_text())
    if job["smaller"]:
        configuration = f"{planned}_small"
        architecture = plans["configurations"][planned]["architecture"]
        widths = architecture["arch_kwargs"]["features_per_stage"]
        architecture["arch_kwargs"]["features_per_stage"] = [width // job["smaller"]["thinner"] for width in widths]
        plans["configurations"][configuration] = {
            "inherits_from": planned,
            "batch_size": job["smaller"]["batch"],
            "architecture": architecture,
        }
        (prepared / "nnUNetPlans.json").write_text(json.dumps(plans, indent=1))
    how = ["-tr", "nnUNetTrainerSeconds", "-device", job["device"]]
    nnunet("train", "501", configuration, "0", *how)
    places_of = ["-i", str(raw / "imagesTs"), "-o", str(folder / "theirs")]
    nnunet("predict", *places_of, "-d", "501", "-c", configuration, "-f", "0", "-npp", "1", "-nps", "1", *how)

    for case_id in parts["test"]:
        theirs, _ = read_image(folder / "theirs" / f"{case_id}.nii.gz")
        like = read_nifti(next(iter(cases[case_id].images.values())))
        write_mask(Path(job["out"]) / f"{case_id}_seg.nii.gz", TO_THEIRS[theirs.astype(np.uint8)], like)


def write_images(case, folder: Path) -> None:
    for channel, path in enumerate(case.images.values()):
        image = read_nifti(path)
        nib.save(image, folder / f"{case.id}_{channel:04d}.nii.gz")


if __name__ == "__main__":
    main()
