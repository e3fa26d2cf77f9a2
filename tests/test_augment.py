"""Augmentation: image and mask move together, labels stay labels, the generator decides all."""

import pytest
import torch

from brats_helpers.augment import STRENGTHS, augment, generators


def _batch(n=8, channels=2, height=64, width=96):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    brain = ((y - 32) ** 2 / 28**2 + (x - 48) ** 2 / 44**2) < 1
    masks = torch.where(((y - 30) ** 2 + (x - 60) ** 2) < 81, 3, 0).expand(n, -1, -1).to(torch.uint8)
    images = (torch.where(masks > 0, 2.0, -1.0) * brain)[:, None].repeat(1, channels, 1, 1)
    return images, masks.clone()


def _run(strength, seed=0, batch=None):
    images, masks = batch or _batch()
    return augment(images, masks, strength=strength, modalities=2, generators=generators(seed, 0, range(len(images))))


def test_none_changes_nothing():
    images, masks = _batch()
    new_images, new_masks = _run("none")
    assert torch.equal(new_images, images) and torch.equal(new_masks, masks)


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_image_and_mask_move_together(strength):
    images, masks = _run(strength)
    for image, mask in zip(images, masks, strict=True):
        # The bright disc and the mask are the same voxels before, so they overlap after.
        brain = image[0] != 0
        bright = image[0] > (image[0][mask == 3].median() + image[0][brain & (mask == 0)].median()) / 2
        bright &= brain
        overlap = 2 * (bright & (mask == 3)).sum() / (bright.sum() + (mask == 3).sum())
        assert overlap > 0.85


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_labels_are_never_mixed_into_new_ones(strength):
    masks = (
        torch.randint(0, 2, (16, 64, 64), generator=torch.Generator().manual_seed(0)) * 3
    )  # 0 and 3: 1 or 2 would be a mix
    _, moved = _run(strength, batch=(torch.randn(16, 2, 64, 64), masks.to(torch.uint8)))
    assert set(moved.unique().tolist()) == {0, 3} and moved.dtype == torch.uint8


@pytest.mark.parametrize("strength", STRENGTHS)
def test_shapes_dtypes_background_and_finiteness_are_kept(strength):
    images, masks = _run(strength)
    assert images.shape == (8, 2, 64, 96) and images.dtype == torch.float32 and images.isfinite().all()
    assert masks.shape == (8, 64, 96)
    assert (images[:, :, 0, 0] == 0).all()


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_the_generator_decides_all(strength):
    first, again, other = _run(strength, 5), _run(strength, 5), _run(strength, 6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    _run(strength)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_a_slice_changes_alike_whatever_is_in_its_batch(strength):
    images, masks = _batch()
    whole = augment(images, masks, strength=strength, generators=generators(0, 3, range(8)))
    part = augment(images[5:], masks[5:], strength=strength, generators=generators(0, 3, range(5, 8)))
    torch.testing.assert_close(part[0], whole[0][5:])
    assert torch.equal(part[1], whole[1][5:]) and not torch.equal(whole[0][5], whole[0][6])


def test_about_half_of_the_slices_are_flipped():
    images, masks = _batch(n=200)
    images[:, :, :, :48], images[:, :, :, 48:] = 1, 2
    moved, _ = _run("basic", batch=(images, masks))
    flipped = moved[:, 0, 20:44, 16:32].mean(dim=(1, 2)) > moved[:, 0, 20:44, 64:80].mean(dim=(1, 2))
    assert 70 < flipped.sum() < 130


def test_an_unknown_strength_is_refused():
    with pytest.raises(ValueError, match="'wild'.*none, basic, strong"):
        _run("wild")
