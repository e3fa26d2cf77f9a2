"""Random changes to a batch on its device: image and mask together, labels never mixed.

Slices and patches go through the same lines: a smooth field over an image, and a blur of it, are small matrices along
each of its axes. Written here because MONAI and TorchIO change one sample at a time on the CPU, and are slower
(`benchmarks/augmentation.py`), and Kornia's random numbers are one stream for the whole batch.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from brats_helpers.training.settings import STRENGTHS


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """Random numbers for samples by their seeds, whichever batch, process or worker they are in."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def seed_of(*key: int) -> int:
    """A seed that depends on all of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def augment(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    strength: str,
    modalities: int,
    generators: Sequence[torch.Generator],
    modality_dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change a batch at random.

    `basic` flips left and right, turns, scales and shifts, and changes each modality's brightness, contrast and gamma,
    in all its slices alike. `strong` goes further with each, and adds an elastic change of shape, blur, low
    resolution, a bias field, noise, and now and then a modality that is missing. Whatever the strength,
    `modality_dropout` hides modalities, and then it alone decides which are missing.

    Args:
        images: float32 (batch, channels, [depth,] height, width), background 0.
        masks: integer (batch, [depth,] height, width), class indices.
        strength: one of `STRENGTHS`.
        modalities: their number; channel k belongs to modality k modulo this number.
        generators: one per sample, on the CPU. What happens to a sample depends on its own generator alone, not on
            its neighbours in the batch; the same state gives the same changes again on the same device.
        modality_dropout: share of the samples in which some modalities, but not all, become background in all their
            slices. Every such subset is equally likely.

    Returns:
        Images and masks of the same shapes and dtypes; masks hold no value they did not hold before,
        except background that moved in.
    """
    if strength not in STRENGTHS:
        raise ValueError(f"augment {strength!r}: expected one of {', '.join(STRENGTHS)}.")
    if strength == "basic":
        images, masks = _move(images, masks, generators, turn=0.25, scale=0.12, bend=0)
        images = _intensity(images, modalities, generators, amount=0.2) * (images != 0)
    elif strength == "strong":
        one_lost = 0.0 if modality_dropout else 0.1
        images, masks = _strongly(images, masks, modalities, generators, one_lost=one_lost)
    if modality_dropout:
        images = images * _kept(images, modalities, generators, share=modality_dropout)
    return images, masks


def _strongly(images, masks, modalities: int, generators, *, one_lost: float):
    """What `strong` does; in a share `one_lost` of the samples one modality is missing."""
    images, masks = _move(images, masks, generators, turn=0.5, scale=0.25, bend=0.04)
    inside = (images != 0) & _present(images, modalities, generators, share=one_lost)
    images = _coarsen(images, modalities, generators)
    bias = torch.exp(_field(modalities, 4, 0.3, images, generators))  # of a receiving coil
    images = images * bias.repeat(1, images.shape[1] // modalities, *[1] * (images.ndim - 2))
    images = _intensity(images, modalities, generators, amount=0.3)
    return _noise(images, generators) * inside, masks


def _uniform(shape: tuple[int, ...], low: float, high: float, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Uniform numbers of `shape` for each sample, by its own generator; on the CPU."""
    return torch.stack([torch.rand(shape, generator=generator) for generator in generators]) * (high - low) + low


def _move(images, masks, generators, *, turn: float, scale: float, bend: float):
    """Flip left and right, rotate by up to `turn` radians in each plane, scale, shift by up to 5 %, bend.

    `bend` is the most that a knot of the elastic change moves, as a share of half the image.
    """
    sizes = torch.tensor(images.shape[:1:-1])  # x, y(, z), as grid_sample counts them
    n = len(sizes)
    angles = _uniform((n * (n - 1) // 2,), -turn, turn, generators)
    zoom = torch.exp(_uniform((1, 1), -scale, scale, generators))
    flip = torch.where(_uniform((1,), 0, 1, generators) < 0.5, -1.0, 1.0)
    shift = _uniform((n, 1), -0.1, 0.1, generators)
    skew = torch.zeros(len(images), n, n)
    skew[:, *torch.tril_indices(n, n, -1)] = angles
    matrix = torch.linalg.matrix_exp(skew - skew.mT) * zoom * sizes / sizes[:, None]
    matrix[:, :, 0] *= flip
    theta = torch.cat([matrix, shift], dim=2).to(images.device, non_blocking=True)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if bend:
        grid = grid + _field(n, 6, bend, images, generators).movedim(1, -1)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    moved = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0]
    return images, moved.to(masks.dtype)


def _field(channels: int, knots: int, amount: float, images, generators):
    """Smooth fields over each sample, of up to `amount`: cubic surfaces through random knots."""
    sizes = images.shape[2:]
    field = _uniform((channels, *[knots] * len(sizes)), -amount, amount, generators)
    field = field.to(images.device, non_blocking=True)
    eye = torch.eye(knots)[None, None]
    for axis, size in enumerate(sizes, 2):
        spread = F.interpolate(eye, (size, knots), mode="bicubic", align_corners=True)[0, 0]
        field = _along(field, spread.to(images.device, non_blocking=True), axis)
    return field


def _along(images: torch.Tensor, matrices: torch.Tensor, axis: int) -> torch.Tensor:
    """Multiply every line of the images along an axis by a matrix (new, old), one for all samples or one for each."""
    lines = images.movedim(axis, -1)
    return (lines.flatten(1, -2) @ matrices.mT).unflatten(1, lines.shape[1:-1]).movedim(-1, axis)


def _intensity(images, modalities: int, generators, *, amount: float):
    """Change contrast, brightness and gamma, drawn for each modality of each sample."""
    images = images.unflatten(1, (-1, modalities))  # slices
    space = (1, *range(3, images.ndim))
    shape = (1, modalities, *[1] * (images.ndim - 3))
    contrast = torch.exp(_uniform(shape, -amount, amount, generators)).to(images.device, non_blocking=True)
    brightness = _uniform(shape, -amount, amount, generators).to(images.device, non_blocking=True)
    gamma = torch.exp(_uniform(shape, -amount, amount, generators)).to(images.device, non_blocking=True)
    low = images.amin(dim=space, keepdim=True)
    span = (images.amax(dim=space, keepdim=True) - low).clamp_min(1e-3)
    bent = torch.pow(((images - low) / span).clamp_min(1e-6), gamma) * span + low
    return (bent * contrast + brightness).flatten(1, 2)


def _coarsen(images, modalities: int, generators):
    """Blur half of the modalities by up to 1.5 pixels, and give half of them pixels up to twice as wide."""
    slices = images.shape[1] // modalities
    sigma = _uniform((modalities,), -1.5, 1.5, generators).clamp_min(0).repeat(1, slices).flatten()
    pitch = _uniform((modalities,), -2, 2, generators).clamp_min(1).repeat(1, slices).flatten()
    chosen = ((sigma > 0) | (pitch > 1)).nonzero()[:, 0]
    channels = images.flatten(0, 1)
    coarse = channels[chosen.to(images.device, non_blocking=True)]
    for axis, size in enumerate(images.shape[2:], 1):
        matrices = _resampling(size, pitch[chosen]) @ _gaussian(size, sigma[chosen])
        coarse = _along(coarse, matrices.to(images.device, non_blocking=True), axis)
    return channels.index_copy(0, chosen.to(images.device, non_blocking=True), coarse).view_as(images)


def _gaussian(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """Matrices (n, size, size) that blur a line by each of n `sigma`; 0 changes nothing."""
    place = torch.arange(float(size))
    weights = torch.exp(-(((place - place[:, None]) / sigma.clamp_min(0.1)[:, None, None]) ** 2) / 2)
    return weights / weights.sum(dim=-1, keepdim=True)


def _resampling(size: int, pitch: torch.Tensor) -> torch.Tensor:
    """Matrices (n, size, size) that keep every `pitch`-th pixel of a line and fill in linearly; 1 changes nothing."""
    place, pitch = torch.arange(float(size)), pitch[:, None, None]
    nth = (place / pitch).round()
    kept = (nth * pitch).round() == place
    weights = (1 - (place[:, None] / pitch - nth).abs()).clamp_min(0) * kept
    return weights / weights.sum(dim=-1, keepdim=True)


def _noise(images, generators):
    """Gaussian noise of up to 0.25 standard deviations, in half of the samples."""
    levels = _uniform((), -0.25, 0.25, generators).clamp_min(0).tolist()
    local = torch.Generator(images.device)
    noisy = images.clone()
    for sample, level, generator in zip(noisy, levels, generators, strict=True):
        seed = int(torch.randint(2**31, (), generator=generator))
        if level:
            sample += level * torch.randn(sample.shape, generator=local.manual_seed(seed), device=sample.device)
    return noisy


def _present(images, modalities: int, generators, *, share: float):
    """Which channels are present, (batch, channels, 1, ...): in a share of the samples one modality is missing."""
    lost = _uniform((), 0, 1, generators) < (share if modalities > 1 else 0)
    which = _uniform((), 0, modalities, generators).long()
    return _channels(images, ~(lost[:, None] & (torch.arange(modalities) == which[:, None])))


def _kept(images, modalities: int, generators, *, share: float):
    """Which channels are kept, (batch, channels, 1, ...): in a share of the samples not all, but at least one."""
    drops = _uniform((), 0, 1, generators) < (share if modalities > 1 else 0)
    subset = _uniform((), 1, max(2**modalities - 1, 2), generators).long()  # bit k: modality k is hidden
    hidden = (subset[:, None] >> torch.arange(modalities)) & 1 == 1
    return _channels(images, ~(drops[:, None] & hidden))


def _channels(images, by_modality: torch.Tensor) -> torch.Tensor:
    """Bool (batch, modalities) for each channel of the images, in a shape that multiplies them, on their device."""
    by_channel = by_modality.repeat(1, images.shape[1] // by_modality.shape[1])
    return by_channel.to(images.device, non_blocking=True)[(...,) + (None,) * (images.ndim - 2)]
