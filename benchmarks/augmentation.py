"""What augmentation costs a training: slices a second of whole steps with and without it, and what MONAI would cost.

Slices of 192 x 160 of one patient, whose flair and t1ce stand for four modalities; U-Net on EfficientNet-Lite0:
augmentation, forward, backward, AdamW.
The strengths take turns. On a CPU it is processor time, which other work on the machine does not stretch.

    OMP_NUM_THREADS=1 python benchmarks/augmentation.py
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from monai import transforms

from brats_helpers.augment import STRENGTHS, augment, generators
from brats_helpers.cache import pack
from brats_helpers.cases import find_cases
from brats_helpers.dataset import BalancedSampler, Slices, make_loader
from brats_helpers.losses import CrossEntropyDice
from brats_helpers.machine import choose_device, choose_precision, describe
from brats_helpers.model import PACKAGED_ENCODER, build_model
from brats_helpers.steps import gradients

BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--repeats", metavar="N", type=int, default=5, help="batches of each; default: 5")
    parser.add_argument(
        "--cases",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "real",
        help="patients; the first is taken; default: ../shared/real",
    )
    options = parser.parse_args()
    device = choose_device(options.device)
    slices = Slices([pack(find_cases(options.cases, ["flair", "t1ce"])[0])], context_slices=0, size=(192, 160))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=choose_precision(device))
    network = build_model(encoder=PACKAGED_ENCODER, weights="none", in_channels=4)
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1)).to(device)
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    sampler = BalancedSampler(slices, n=BATCH * (options.repeats + 1), foreground=0.7, seed=0)

    clock = time.process_time if device.type == "cpu" else time.perf_counter
    whole, alone = ({strength: [] for strength in STRENGTHS} for _ in range(2))
    peer, alone["basic by MONAI"] = monai_basic(), []
    for batch in make_loader(slices, batch_size=BATCH, workers=0, sampler=sampler):
        four, one = batch.images.repeat(1, 2, 1, 1), batch.masks[:, None].float()
        started = clock()
        for image, mask in zip(four, one, strict=True):
            peer({"image": image, "mask": mask})
        alone["basic by MONAI"].append(clock() - started)
        for strength in STRENGTHS:
            how = {"strength": strength, "modalities": 4, "generators": generators(0, 0, range(BATCH))}
            started = clock()
            images, masks = augment(four.to(device), batch.masks.to(device), **how)
            images.sum().item()  # waits for a GPU
            alone[strength].append(clock() - started)
            gradients(model, criterion, images, masks, accelerator, BATCH).item()
            optimizer.step()
            whole[strength].append(clock() - started)

    facts = describe(device)
    print(f"{facts['device']}, {torch.get_num_threads()} threads, precision {facts['precision']}, batch {BATCH}")
    without = statistics.median(whole["none"][1:])
    for strength, seconds in whole.items():
        step = statistics.median(seconds[1:])
        print(f"{strength}: {BATCH / step:.2f} slices/s, {without / step:.3f} of without")
    for name, seconds in alone.items():
        print(f"{name} alone: {1000 * statistics.median(seconds[1:]) / BATCH:.2f} ms a slice")


def monai_basic() -> transforms.Compose:
    """What `basic` does, out of MONAI, on a slice and its mask."""
    keys = ["image", "mask"]
    affine = {"rotate_range": 0.25, "scale_range": 0.12, "translate_range": (10, 8), "padding_mode": "zeros"}
    return transforms.Compose(
        [
            transforms.RandFlipd(keys, prob=0.5, spatial_axis=1),
            transforms.RandAffined(keys, prob=1, mode=("bilinear", "nearest"), **affine),
            transforms.RandScaleIntensityd("image", factors=0.2, prob=1, channel_wise=True),
            transforms.RandShiftIntensityd("image", offsets=0.2, prob=1, channel_wise=True),
            transforms.RandAdjustContrastd("image", gamma=(0.82, 1.22), prob=1),
        ]
    )


if __name__ == "__main__":
    main()
