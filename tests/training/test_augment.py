"""Augmentation: image and mask move together, labels stay labels, the generator decides all."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from brats_helpers.training.augment import STRENGTHS, _field, _gaussian, _resampling, augment, generators, seed_of


def _batch(n=8, channels=2, height=64, width=96, depth=0):
    """Slices, or patches of `depth`, that hold a brain and in it, brighter, a tumour of class 3."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    brain = ((y - 32) ** 2 / 28**2 + (x - 48) ** 2 / 44**2) < 1
    masks = torch.where(((y - 30) ** 2 + (x - 60) ** 2) < 81, 3, 0).expand(n, -1, -1).to(torch.uint8)
    images = (torch.where(masks > 0, 2.0, -1.0) * brain)[:, None].repeat(1, channels, 1, 1)
    if depth:  # the middle half of it is filled
        filled = torch.zeros(depth, 1, 1)
        filled[depth // 4 : -depth // 4] = 1
        images, masks = images[:, :, None] * filled, (masks[:, None] * filled).to(torch.uint8)
    return images, masks.clone()


def _seeded(seed, positions):
    return generators(seed_of(seed, 0, position) for position in positions)


def _run(strength, seed=0, batch=None, **how):
    images, masks = batch or _batch()
    how = {"strength": strength, "modalities": 2, "generators": _seeded(seed, range(len(images)))} | how
    return augment(images, masks, **how)


def test_none_changes_nothing():
    images, masks = _batch()
    new_images, new_masks = _run("none")
    assert torch.equal(new_images, images) and torch.equal(new_masks, masks)


@pytest.mark.parametrize("depth", [0, 16])
@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_image_and_mask_move_together(strength, depth):
    images, masks = _run(strength, batch=_batch(depth=depth))
    for image, mask in zip(images, masks, strict=True):
        image = image[image.flatten(1).any(dim=1)]  # a modality may be missing
        # The bright disc and the mask are the same voxels before, so they overlap after.
        brain = image[0] != 0
        bright = image[0] > (image[0][mask == 3].median() + image[0][brain & (mask == 0)].median()) / 2
        bright &= brain
        overlap = 2 * (bright & (mask == 3)).sum() / (bright.sum() + (mask == 3).sum())
        assert overlap > 0.85


@pytest.mark.parametrize("shape", [(64, 64), (16, 24, 24)])
@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_labels_are_never_mixed_into_new_ones(strength, shape):
    masks = torch.randint(0, 2, (16, *shape), generator=torch.Generator().manual_seed(0)) * 3  # 1 or 2 would be a mix
    _, moved = _run(strength, batch=(torch.randn(16, 2, *shape), masks.to(torch.uint8)))
    assert set(moved.unique().tolist()) == {0, 3} and moved.dtype == torch.uint8


@pytest.mark.parametrize("depth", [0, 12])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_shapes_dtypes_background_and_finiteness_are_kept(strength, depth):
    before = _batch(depth=depth)
    images, masks = _run(strength, batch=before)
    assert images.shape == before[0].shape and images.dtype == torch.float32 and images.isfinite().all()
    assert masks.shape == before[1].shape and masks.dtype == torch.uint8
    assert (images[..., 0, 0] == 0).all()


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_the_generator_decides_all(strength):
    first, again, other = _run(strength, 5), _run(strength, 5), _run(strength, 6)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    state = torch.get_rng_state()
    _run(strength)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("depth", [0, 12])
@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_a_sample_changes_alike_whatever_is_in_its_batch(strength, depth):
    images, masks = _batch(depth=depth)
    how = {"strength": strength, "modalities": 2}
    whole = augment(images, masks, **how, generators=_seeded(0, range(8)))
    part = augment(images[5:], masks[5:], **how, generators=_seeded(0, range(5, 8)))
    torch.testing.assert_close(part[0], whole[0][5:])
    assert torch.equal(part[1], whole[1][5:]) and not torch.equal(whole[0][5], whole[0][6])


def test_about_half_of_the_slices_are_flipped():
    images, masks = _batch(n=200)
    images[:, :, :, :48], images[:, :, :, 48:] = 1, 2
    moved, _ = _run("basic", batch=(images, masks))
    flipped = moved[:, 0, 20:44, 16:32].mean(dim=(1, 2)) > moved[:, 0, 20:44, 64:80].mean(dim=(1, 2))
    assert 70 < flipped.sum() < 130


def test_now_and_then_a_modality_is_missing_in_all_its_slices():
    images, masks = _batch(n=300, channels=6)  # two modalities, each with the slices below and above
    moved, _ = _run("strong", batch=(images, masks))
    there = moved.flatten(2).any(dim=2)
    assert torch.equal(there[:, :2], there[:, 2:4]) and torch.equal(there[:, :2], there[:, 4:])
    assert there[:, :2].any(dim=1).all()
    lost = (~there[:, :2]).sum(dim=0)
    assert (lost > 5).all() and lost.sum() < 60  # a tenth of 300
    kept = augment(images, masks, strength="strong", modalities=1, generators=_seeded(0, range(300)))[0]
    assert kept.flatten(2).any(dim=2).all()


@pytest.mark.parametrize("depth", [0, 4])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_dropout_hides_every_subset_of_modalities_alike_but_never_all(strength, depth):
    images, masks = _batch(n=300, channels=9, height=16, width=16)  # three modalities, each with two neighbours
    images = torch.ones_like(images)
    if depth:
        images, masks = images[:, :, None].repeat(1, 1, depth, 1, 1), masks[:, None].repeat(1, depth, 1, 1)
    how = {"batch": (images, masks), "modalities": 3}
    dropped, moved = _run(strength, **how, modality_dropout=0.8)
    there = dropped.flatten(2).any(dim=2).unflatten(1, (3, 3))  # slices, modalities
    assert torch.equal(there[:, 0], there[:, 1]) and torch.equal(there[:, 0], there[:, 2])
    subsets = (there[:, 0] * torch.tensor([1, 2, 4])).sum(dim=1).bincount(minlength=8).tolist()
    assert subsets[0] == 0 and 40 < subsets[7] < 80  # a fifth of 300 keep all
    assert all(20 < n < 60 for n in subsets[1:7])  # 300 * 0.8 / 6 = 40 each

    # What is kept, and the masks, are as they would be without.
    plain, expected = _run(strength, **how) if strength != "strong" else _run(strength, **how, modality_dropout=1e-9)
    kept = there.flatten(1)
    assert torch.equal(dropped[kept], plain[kept]) and torch.equal(moved, expected)


def test_dropout_follows_from_the_generator_of_each_sample_alone():
    images, masks = _batch(n=16, channels=4)
    how = {"strength": "none", "modalities": 4, "modality_dropout": 0.5}
    whole = augment(images, masks, **how, generators=_seeded(3, range(16)))[0]
    part = augment(images[9:], masks[9:], **how, generators=_seeded(3, range(9, 16)))[0]
    assert torch.equal(part, whole[9:]) and not torch.equal(whole, images)
    other = augment(images, masks, **how, generators=_seeded(4, range(16)))[0]
    assert not torch.equal(whole, other)


def test_a_single_modality_is_never_hidden():
    images, masks = _batch(channels=3)
    assert torch.equal(_run("none", batch=(images, masks), modalities=1, modality_dropout=1.0)[0], images)


def test_a_blur_is_the_gaussian_of_another_library_and_none_is_none():
    line = torch.randn(1, 41, generator=torch.Generator().manual_seed(0))
    none, some = _gaussian(41, torch.tensor([0.0, 1.3]))
    torch.testing.assert_close(none, torch.eye(41))
    expected = gaussian_filter1d(line[0].numpy(), 1.3, truncate=10, mode="constant")
    np.testing.assert_allclose((some @ line[0])[8:-8], expected[8:-8], atol=1e-5)
    torch.testing.assert_close(some.sum(dim=1), torch.ones(41))


def test_low_resolution_keeps_every_second_pixel_and_draws_straight_lines_between():
    none, half = _resampling(7, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(none, torch.eye(7))
    coarse = half @ torch.tensor([0.0, 9.0, 4.0, 9.0, 0.0, 9.0, 2.0])
    torch.testing.assert_close(coarse, torch.tensor([0.0, 2.0, 4.0, 2.0, 0.0, 1.0, 2.0]))


def test_a_field_is_the_cubic_surface_through_its_knots():
    def drawn():
        return _seeded(0, range(3))

    knots = torch.stack([torch.rand(2, 4, 4, generator=generator) for generator in drawn()]) * 0.6 - 0.3
    expected = torch.nn.functional.interpolate(knots, (20, 30), mode="bicubic", align_corners=True)
    torch.testing.assert_close(_field(2, 4, 0.3, torch.zeros(3, 2, 20, 30), drawn()), expected)
    volume = _field(2, 4, 0.3, torch.zeros(3, 2, 10, 7, 4), drawn())
    knots = torch.stack([torch.rand(2, 4, 4, 4, generator=generator) for generator in drawn()]) * 0.6 - 0.3
    torch.testing.assert_close(volume[:, :, ::3, ::2], knots)  # corners lie on knots, which are 3, 2 and 1 voxels apart


def test_only_strong_bends_what_is_straight():
    """Through a straight edge: turned, scaled and shifted it stays straight."""
    for strength, straight in (("basic", True), ("strong", False)):
        masks = torch.zeros(8, 96, 96, dtype=torch.uint8)
        masks[:, :, 48:] = 1
        _, moved = _run(strength, batch=(torch.ones(8, 2, 96, 96), masks))
        seen = 0
        for mask in moved:
            edge = (mask[24:72].diff(dim=1) != 0).float()
            if (edge.sum(dim=1) == 1).all():
                seen += 1
                place = edge.argmax(dim=1).double().numpy()
                off = place - np.polyval(np.polyfit(np.arange(48), place, 1), np.arange(48))
                assert (abs(off).max() < 1.1) == straight
        assert seen


@pytest.mark.parametrize("strength", ["basic", "strong"])
def test_the_slices_of_a_modality_change_alike(strength, monkeypatch):
    """In 2.5D channel k is of modality k modulo their number: one scan. Noise alone is each slice's own."""
    monkeypatch.setattr("brats_helpers.training.augment._noise", lambda images, generators: images)
    images, masks = _batch()
    images[:, 1] *= 0.5
    new_images, _ = _run(strength, batch=(images.repeat(1, 3, 1, 1), masks))
    slices = new_images.unflatten(1, (3, 2))
    assert torch.allclose(slices, slices[:, :1], atol=1e-5)
    assert not torch.allclose(new_images[:, 0], 2 * new_images[:, 1], atol=0.1)
    plain, _ = _run(strength, batch=(images, masks))
    assert torch.allclose(slices[:, 0], plain, atol=1e-5)  # and one slice changes as it does without its neighbours


def test_an_unknown_strength_is_refused():
    with pytest.raises(ValueError, match="'wild'.*none, basic, strong"):
        _run("wild")
