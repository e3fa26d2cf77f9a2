"""Random changes to a batch on its device: image and mask together, labels never mixed."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

STRENGTHS = ("none", "basic", "strong")


def generators(seed: int, epoch: int, positions: Iterable[int]) -> list[torch.Generator]:
    """Random numbers for slices by their positions in an epoch, whichever batch, process or worker they are in."""
    return [torch.Generator().manual_seed(seed_of(seed, epoch, position)) for position in positions]


def seed_of(*key: int) -> int:
    """A seed that depends on all of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def augment(
    images: torch.Tensor, masks: torch.Tensor, *, strength: str, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change a batch at random.

    `basic` flips left and right, turns, scales and shifts, and changes each channel's brightness,
    contrast and gamma. `strong` goes further with each, and adds noise, blur and a bias field.

    Args:
        images: float32 (batch, channels, height, width), background 0.
        masks: integer (batch, height, width), class indices.
        strength: one of `STRENGTHS`.
        generators: one a slice, on the CPU. What happens to a slice depends on its own generator alone, not on
            its neighbours in the batch; the same state gives the same changes again on the same device.

    Returns:
        Images and masks of the same shapes and dtypes; masks hold no value they did not hold before,
        save background that moved in.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"augment {strength!r}: expected one of {', '.join(STRENGTHS)}.")
    if strength == "none":
        return images, masks
    strong = strength == "strong"
    images, masks = _move(images, masks, generators, turn=0.5 if strong else 0.25, scale=0.25 if strong else 0.12)
    inside = images != 0
    if strong:
        images = _blur(images, generators)
        images = images * _bias_field(images, generators)
    images = _intensity(images, generators, amount=0.3 if strong else 0.2)
    if strong:
        images = _noise(images, generators)
    return images * inside, masks


def _uniform(shape: tuple[int, ...], low: float, high: float, generators: Sequence[torch.Generator], like):
    """Uniform numbers of `shape` for each slice, by its own generator."""
    drawn = torch.stack([torch.rand(shape, generator=generator) for generator in generators])
    return (drawn * (high - low) + low).to(like.device)


def _move(images, masks, generators, *, turn: float, scale: float):
    """Flip left and right, rotate by up to `turn` radians, scale by up to `scale`, shift by up to 5 %."""
    batch, _, height, width = images.shape
    angle = _uniform((), -turn, turn, generators, images)
    zoom = torch.exp(_uniform((), -scale, scale, generators, images))
    flip = torch.where(_uniform((), 0, 1, generators, images) < 0.5, -1.0, 1.0)
    shift = _uniform((2,), -0.1, 0.1, generators, images)
    aspect = height / width
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([flip * cos, -sin * aspect, shift[:, 0], flip * sin / aspect, cos, shift[:, 1]], dim=1).reshape(
        batch, 2, 3
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    moved = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    return images, moved.to(masks.dtype)


def _intensity(images, generators, *, amount: float):
    """Contrast, brightness and gamma, each channel of each slice by its own draw."""
    shape = (images.shape[1], 1, 1)
    contrast = torch.exp(_uniform(shape, -amount, amount, generators, images))
    brightness = _uniform(shape, -amount, amount, generators, images)
    gamma = torch.exp(_uniform(shape, -amount, amount, generators, images))
    low = images.amin(dim=(2, 3), keepdim=True)
    span = (images.amax(dim=(2, 3), keepdim=True) - low).clamp_min(1e-3)
    # Written with exp and log so that one fused power costs the least on the CPU.
    bent = torch.pow(((images - low) / span).clamp_min(1e-6), gamma) * span + low
    return bent * contrast + brightness


def _noise(images, generators):
    """Gaussian noise of up to 0.25 standard deviations, in half of the slices."""
    level = _uniform((1, 1, 1), -0.25, 0.25, generators, images).clamp_min(0)
    local = torch.Generator(images.device)
    noise = torch.empty_like(images)
    for slice_noise, generator in zip(noise, generators, strict=True):
        slice_noise.normal_(generator=local.manual_seed(int(torch.randint(2**31, (), generator=generator))))
    return images + level * noise


def _blur(images, generators):
    """Mix with a 5 x 5 Gaussian blur (sigma 1 pixel), each channel by its own share, in half of them."""
    share = _uniform((images.shape[1], 1, 1), -1, 1, generators, images).clamp_min(0)
    taps = torch.exp(-(torch.arange(-2.0, 3.0, device=images.device) ** 2) / 2)
    taps = taps / taps.sum()
    channels = images.shape[1]
    blurred = F.conv2d(images, taps.view(1, 1, 5, 1).repeat(channels, 1, 1, 1), padding=(2, 0), groups=channels)
    blurred = F.conv2d(blurred, taps.view(1, 1, 1, 5).repeat(channels, 1, 1, 1), padding=(0, 2), groups=channels)
    return torch.lerp(images, blurred, share)


def _bias_field(images, generators):
    """A smooth factor over the slice of up to about e^0.3, a cubic surface through 4 x 4 random knots."""
    knots = _uniform((images.shape[1], 4, 4), -0.3, 0.3, generators, images)
    return torch.exp(F.interpolate(knots, images.shape[2:], mode="bicubic", align_corners=True))
