"""What augmentation costs a training: slices a second of whole steps with and without it, and what others would cost.

Slices of 192 x 160 of one patient, whose flair and t1ce stand for four modalities; U-Net on EfficientNet-Lite0, as many
slices a step as notebook 02 takes on the device: augmentation, forward, backward, AdamW. The strengths take turns,
timed by the clock on the wall with all cores: nothing else should run. Peers: pip install '.[benchmarks]'

    python benchmarks/augmentation.py
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from monai import transforms

from brats_helpers.data.cache import pack
from brats_helpers.data.cases import find_cases
from brats_helpers.machine import choose_device, choose_precision, describe
from brats_helpers.training.augment import STRENGTHS, augment, generators
from brats_helpers.training.batch import Draw
from brats_helpers.training.losses import CrossEntropyDice
from brats_helpers.training.model import PACKAGED_ENCODER, build_model
from brats_helpers.training.preflight import SLICES
from brats_helpers.training.slices import Slices
from brats_helpers.training.steps import gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default: auto")
    parser.add_argument("--repeats", metavar="N", type=int, default=30, help="batches of each; default: 30")
    parser.add_argument(
        "--cases",
        metavar="FOLDER",
        type=Path,
        default=Path(__file__).parents[2] / "shared" / "real",
        help="patients; the first is taken; default: ../shared/real",
    )
    options = parser.parse_args()
    device = choose_device(options.device)
    batch_size = SLICES[device.type]
    slices = Slices([pack(find_cases(options.cases, ["flair", "t1ce"])[0])], context_slices=0, window=(192, 160))
    accelerator = Accelerator(cpu=device.type == "cpu")
    precision = {"no": "float32"}.get(choose_precision(device), choose_precision(device))
    scaled = {"precision": precision, "scaler": torch.amp.GradScaler(device.type, enabled=precision == "fp16")}
    network = build_model(encoder=PACKAGED_ENCODER, weights="none", in_channels=4)
    criterion = CrossEntropyDice(class_weights=(1, 1, 1, 1)).to(device)
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    spread = range(0, len(slices), len(slices) // batch_size)[:batch_size]
    batch = slices.__getitems__([Draw(item, (192, 160), item) for item in spread])

    whole = {strength: [] for strength in STRENGTHS}
    alone = {strength: [] for strength in STRENGTHS}
    peers = {"MONAI": by_monai(), "TorchIO": by_torchio(), "Kornia": by_kornia()}  # on the CPU
    alone |= {f"basic by {name}": [] for name in peers}
    for turn in range(options.repeats + 1):
        four, one = batch.images.repeat(1, 2, 1, 1), batch.masks[:, None].float()
        for name, change in peers.items():
            started = time.perf_counter()
            change(four, one)
            alone[f"basic by {name}"].append(time.perf_counter() - started)
        first = turn % len(STRENGTHS)  # whoever comes after the others finds the caches cold
        for strength in STRENGTHS[first:] + STRENGTHS[:first]:
            how = {
                "strength": strength,
                "modalities": 4,
                "generators": generators(range(turn * batch_size, (turn + 1) * batch_size)),
            }
            started = time.perf_counter()
            images, masks = augment(four.to(device), batch.masks.to(device), **how)
            images.sum().item()  # waits for a GPU
            alone[strength].append(time.perf_counter() - started)
            gradients(model, criterion, images, masks, accelerator=accelerator, micro_batch=batch_size, **scaled).item()
            optimizer.step()
            whole[strength].append(time.perf_counter() - started)

    facts = describe(device)
    print(f"{facts['device']}, {torch.get_num_threads()} threads, precision {facts['precision']}, batch {batch_size}")
    without = statistics.median(whole["none"][1:])
    for strength, seconds in whole.items():
        step = statistics.median(seconds[1:])
        print(f"{strength}: {batch_size / step:.2f} slices/s, {without / step:.3f} of without")
    for name, seconds in alone.items():
        print(f"{name} alone: {1000 * statistics.median(seconds[1:]) / batch_size:.2f} ms a slice")


# What `basic` does, as nearly as the libraries have it; each of these takes images and masks of a batch.


def by_monai() -> Callable:
    keys = ["image", "mask"]
    affine = {"rotate_range": 0.25, "scale_range": 0.12, "translate_range": (10, 8), "padding_mode": "zeros"}
    change = transforms.Compose(
        [
            transforms.RandFlipd(keys, prob=0.5, spatial_axis=1),
            transforms.RandAffined(keys, prob=1, mode=("bilinear", "nearest"), **affine),
            transforms.RandScaleIntensityd("image", factors=0.2, prob=1, channel_wise=True),
            transforms.RandShiftIntensityd("image", offsets=0.2, prob=1, channel_wise=True),
            transforms.RandAdjustContrastd("image", gamma=(0.82, 1.22), prob=1),
        ]
    )
    return lambda images, masks: [change({"image": i, "mask": m}) for i, m in zip(images, masks, strict=True)]


def by_torchio() -> Callable:
    """Without contrast and brightness, which it does not have."""
    import torchio

    change = torchio.Compose(
        [
            torchio.RandomFlip(axes=(1,), flip_probability=0.5),
            torchio.RandomAffine(0.12, degrees=(0, 0, 0, 0, -14.3, 14.3), translation=(-10, 10, -8, 8, 0, 0)),
            torchio.RandomGamma((-0.2, 0.2)),
        ]
    )

    def subject(image, mask):
        return torchio.Subject(
            image=torchio.ScalarImage(tensor=image[..., None]), mask=torchio.LabelMap(tensor=mask[..., None])
        )

    return lambda images, masks: [change(subject(i, m)) for i, m in zip(images, masks, strict=True)]


def by_kornia() -> Callable:
    """One contrast, brightness and gamma for all modalities of a slice."""
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(degrees=14.3, translate=(0.05, 0.05), scale=(0.887, 1.127), p=1.0),
        K.RandomContrast((0.8, 1.2), clip_output=False, p=1.0),
        K.RandomBrightness((0.8, 1.2), clip_output=False, p=1.0),
        K.RandomGamma((0.82, 1.22), p=1.0),
        data_keys=["input", "mask"],
    )


if __name__ == "__main__":
    main()
