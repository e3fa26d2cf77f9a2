"""The recipe of MONAI's tutorial brats_segmentation_3d, for one job of benchmarks/accuracy.py.

SegResNet (blocks 1, 2, 2, 4 and 1, 1, 1; dropout 0.2) on random crops of one patient, flips, intensities scaled and
shifted by up to 0.1, Dice loss of the three regions by sigmoid, Adam with weight decay 1e-5, a cosine down to 0,
sliding windows with overlap 0.5. The regions are made of the right tissues. The job may ask for smaller crops and fewer
filters than the tutorial's 224 x 224 x 144 and 16, and for another learning rate than its 1e-4. Of such smaller crops
every second one is taken about a voxel of tumour, much as MONAI's RandCropByPosNegLabel would: most of those at random
hold no enhancing tumour. Its normalisation over the voxels that are not 0 is that of the suite's prepared
patients, which it reads instead of NIfTI files, and of these no more than the crop. The last weights count: its own
choice among epochs, by whole validation patients, would take a good part of so short a time.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import SegResNet
from monai.transforms import (
    Compose,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)

from brats_helpers.data.cache import prepare
from brats_helpers.data.cases import survey
from brats_helpers.data.nifti import read_nifti, write_mask
from brats_helpers.labels import REGIONS
from brats_helpers.machine import choose_precision

TUTORIALS = [144, 224, 224]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    device, size = torch.device(job["device"]), job["crop"]
    torch.manual_seed(0)
    cases = {case.id: case for case in survey(job["data"], job["modalities"]).complete(skip_incomplete=True)}
    packed = {p.id: p for p in prepare(list(cases.values()), cache_dir=Path(job["cache"]), workers=job["workers"])}
    both = ["image", "label"]
    change = Compose(
        [
            SpatialPadd(both, size),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandScaleIntensityd("image", factors=0.1, prob=1.0),
            RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        ]
    ).set_random_state(seed=0)
    network = SegResNet(
        blocks_down=[1, 2, 2, 4],
        blocks_up=[1, 1, 1],
        init_filters=job["filters"],
        in_channels=len(job["modalities"]),
        out_channels=3,
        dropout_prob=0.2,
    ).to(device)
    loss_of = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True)
    optimizer = torch.optim.Adam(network.parameters(), job["lr"], weight_decay=1e-5)
    precision = choose_precision(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    random, steps, began = np.random.default_rng(0), 0, time.perf_counter()
    while (spent := (time.perf_counter() - began) / job["seconds"]) < 1:
        case = packed[str(random.choice(job["parts"]["train"]))]
        box = crop(case, size, random, about_tumour=size != TUTORIALS and steps % 2 == 0)
        sample = change({"image": volume(case, box), "label": regions(case, box)})
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * (1 + np.cos(np.pi * spent)) / 2
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            logits = network(sample["image"][None].to(device))
        loss = loss_of(logits.float(), sample["label"][None].to(device))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if torch.nn.utils.get_total_norm([p.grad for p in network.parameters()]).isfinite():  # in bf16 it may not be
            scaler.step(optimizer)
        scaler.update()
        steps += 1
    print(f"steps: {steps}", flush=True)

    network.eval()
    for case_id in job["parts"]["test"]:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=precision != "no"):
            image = volume(packed[case_id])[None].to(device)
            found = sliding_window_inference(image, size, 1, network, overlap=0.5)[0].float().cpu().numpy() > 0
        wt, tc, et = found
        classes = np.select([et, tc, wt], [3, 1, 2], 0).astype(np.uint8)
        like = read_nifti(next(iter(cases[case_id].images.values())))
        write_mask(Path(job["out"]) / f"{case_id}_seg.nii.gz", packed[case_id].to_volume(classes), like)


def crop(case, size: list[int], random: np.random.Generator, *, about_tumour: bool) -> tuple[slice, ...]:
    """A box of `size`, or of all of a side that is shorter, anywhere or about a voxel of tumour."""
    sides = np.array(case.labels.shape)
    free = np.maximum(sides - size, 0)
    low = random.integers(free + 1)
    per_slice = case.counts[:, 1:].sum(axis=1)
    if about_tumour and per_slice.any():
        z = random.choice(len(per_slice), p=per_slice / per_slice.sum())
        y, x = random.choice(np.argwhere(case.labels[z]))
        low = np.clip(np.array([z, y, x]) - np.array(size) // 2, 0, free)
    return tuple(slice(start, start + side) for start, side in zip(low, np.minimum(sides, size), strict=True))


def volume(case, box: tuple[slice, ...] = (slice(None),) * 3) -> torch.Tensor:
    depth, *plane = box
    return torch.from_numpy(np.asarray(case.images[depth, :, *plane], np.float32).transpose(1, 0, 2, 3).copy())


def regions(case, box: tuple[slice, ...]) -> torch.Tensor:
    labels = np.asarray(case.labels[box])
    return torch.from_numpy(np.stack([np.isin(labels, members) for members in REGIONS.values()]).astype(np.float32))


if __name__ == "__main__":
    main()
