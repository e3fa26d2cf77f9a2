"""The recipe of the notebook that this suite replaces, for one job of benchmarks/accuracy.py.

Batch 4, every slice of every patient in random order, padded to sides of 32, Adam at 1e-3, no crop, no balance of
tumour and background, no augmentation, each slice read from its NIfTI files, plain ones as Kaggle has them. The
network, its encoder's weights and the loss are those of the suite; the last weights count.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from accelerate import Accelerator

from brats_helpers.data.cache import normalise
from brats_helpers.data.cases import Case, survey
from brats_helpers.data.nifti import read_nifti, write_mask
from brats_helpers.labels import labels_to_classes
from brats_helpers.machine import choose_precision
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import PACKAGED_ENCODER, build_model


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(job["device"])
    cases = {case.id: case for case in survey(job["data"], job["modalities"]).complete(skip_incomplete=True)}
    train = [plain(cases[case_id], Path(job["folder"])) for case_id in job["parts"]["train"]]
    places = [(case, z) for case in train for z in range(nib.load(case.seg).shape[2])]

    torch.manual_seed(0)
    network = build_model(encoder=PACKAGED_ENCODER, weights="imagenet", in_channels=len(job["modalities"]))
    criterion = CrossEntropyDice(class_weights=[1, 1, 1, 1]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=choose_precision(device))
    network, optimizer = accelerator.prepare(network, optimizer)
    network.train()
    random, order, steps, began = np.random.default_rng(0), [], 0, time.perf_counter()
    while time.perf_counter() - began < job["seconds"]:
        if len(order) < 4:
            order = list(random.permutation(len(places)))
        chosen = [places[order.pop()] for _ in range(4)]
        images = torch.stack([read_slice(case, z) for case, z in chosen]).to(device)
        masks = torch.stack([read_mask(case, z) for case, z in chosen]).to(device)
        loss = criterion(network(images), masks)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        steps += 1
    print(f"steps: {steps}", flush=True)

    network.eval()
    for case_id in job["parts"]["test"]:
        case = plain(cases[case_id], Path(job["folder"]))
        like = read_nifti(next(iter(case.images.values())))
        with torch.no_grad():
            found = [network(read_slice(case, z)[None].to(device)).argmax(1)[0].cpu() for z in range(like.shape[2])]
        x, y = like.shape[:2]
        classes = torch.stack(found, dim=-1).numpy().astype(np.uint8)[:x, :y]
        write_mask(Path(job["out"]) / f"{case_id}_seg.nii.gz", classes, like)


def plain(case: Case, folder: Path) -> Case:
    """The case with its files as .nii without compression."""

    def copy(path: Path) -> Path:
        target = folder / "plain" / f"{path.name.partition('.nii')[0]}.nii"
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            nib.save(read_nifti(path), target)
        return target

    return replace(case, images={name: copy(path) for name, path in case.images.items()}, seg=copy(case.seg))


def read_slice(case: Case, z: int) -> torch.Tensor:
    stack = [normalise(np.asarray(nib.load(path).dataobj[:, :, z])) for path in case.images.values()]
    return torch.from_numpy(np.pad(stack, ((0, 0), *map(to_32, stack[0].shape))))


def read_mask(case: Case, z: int) -> torch.Tensor:
    classes = labels_to_classes(np.asarray(nib.load(case.seg).dataobj[:, :, z]))
    return torch.from_numpy(np.pad(classes, [*map(to_32, classes.shape)])).long()


def to_32(side: int) -> tuple[int, int]:
    return 0, -side % 32


if __name__ == "__main__":
    main()
