"""Random changes to a batch on its device: image and mask together, labels never mixed."""

import torch
from torch.nn import functional as F

STRENGTHS = ("none", "basic", "strong")


def augment(
    images: torch.Tensor, masks: torch.Tensor, *, strength: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change a batch at random.

    `basic` flips left and right, turns, scales and shifts, and changes each channel's brightness,
    contrast and gamma. `strong` goes further with each, and adds noise, blur and a bias field.

    Args:
        images: float32 (batch, channels, height, width), background 0.
        masks: integer (batch, height, width), class indices.
        strength: one of `STRENGTHS`.
        generator: on the CPU; the same state gives the same changes again on the same device.

    Returns:
        Images and masks of the same shapes and dtypes; masks hold no value they did not hold before,
        save background that moved in.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"augment {strength!r}: expected one of {', '.join(STRENGTHS)}.")
    if strength == "none":
        return images, masks
    strong = strength == "strong"
    images, masks = _move(images, masks, generator, turn=0.5 if strong else 0.25, scale=0.25 if strong else 0.12)
    inside = images != 0
    if strong:
        images = _blur(images, generator)
        images = images * _bias_field(images, generator)
    images = _intensity(images, generator, amount=0.3 if strong else 0.2)
    if strong:
        images = _noise(images, generator)
    return images * inside, masks


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: torch.Tensor):
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(like.device)


def _move(images, masks, generator, *, turn: float, scale: float):
    """Flip left and right, rotate by up to `turn` radians, scale by up to `scale`, shift by up to 5 %."""
    batch, _, height, width = images.shape
    angle = _uniform((batch,), -turn, turn, generator, images)
    zoom = torch.exp(_uniform((batch,), -scale, scale, generator, images))
    flip = torch.where(_uniform((batch,), 0, 1, generator, images) < 0.5, -1.0, 1.0)
    shift = _uniform((batch, 2), -0.1, 0.1, generator, images)
    aspect = height / width
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([flip * cos, -sin * aspect, shift[:, 0], flip * sin / aspect, cos, shift[:, 1]], dim=1).reshape(
        batch, 2, 3
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    moved = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    return images, moved.to(masks.dtype)


def _intensity(images, generator, *, amount: float):
    """Contrast, brightness and gamma, each channel of each slice by its own draw."""
    shape = (*images.shape[:2], 1, 1)
    contrast = torch.exp(_uniform(shape, -amount, amount, generator, images))
    brightness = _uniform(shape, -amount, amount, generator, images)
    gamma = torch.exp(_uniform(shape, -amount, amount, generator, images))
    low = images.amin(dim=(2, 3), keepdim=True)
    span = (images.amax(dim=(2, 3), keepdim=True) - low).clamp_min(1e-3)
    # Written with exp and log so that one fused power costs the least on the CPU.
    bent = torch.pow(((images - low) / span).clamp_min(1e-6), gamma) * span + low
    return bent * contrast + brightness


def _noise(images, generator):
    """Gaussian noise of up to 0.25 standard deviations, in half of the slices."""
    shape = (images.shape[0], 1, 1, 1)
    level = (_uniform(shape, -0.25, 0.25, generator, images)).clamp_min(0)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    local = torch.Generator(images.device).manual_seed(seed)
    return images + level * torch.randn(images.shape, generator=local, device=images.device)


def _blur(images, generator):
    """Mix with a 5 x 5 Gaussian blur (sigma 1 pixel), each channel by its own share, in half of them."""
    share = _uniform((*images.shape[:2], 1, 1), -1, 1, generator, images).clamp_min(0)
    taps = torch.exp(-(torch.arange(-2.0, 3.0, device=images.device) ** 2) / 2)
    taps = taps / taps.sum()
    channels = images.shape[1]
    blurred = F.conv2d(images, taps.view(1, 1, 5, 1).repeat(channels, 1, 1, 1), padding=(2, 0), groups=channels)
    blurred = F.conv2d(blurred, taps.view(1, 1, 1, 5).repeat(channels, 1, 1, 1), padding=(0, 2), groups=channels)
    return torch.lerp(images, blurred, share)


def _bias_field(images, generator):
    """A smooth factor over the slice of up to about e^0.3, a cubic surface through 4 x 4 random knots."""
    knots = _uniform((*images.shape[:2], 4, 4), -0.3, 0.3, generator, images)
    return torch.exp(F.interpolate(knots, images.shape[2:], mode="bicubic", align_corners=True))
