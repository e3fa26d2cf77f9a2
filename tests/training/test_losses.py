"""The loss against values worked out by hand."""

import math

import pytest
import torch

from brats_helpers.training.losses import CrossEntropyDice


def test_uniform_prediction_of_a_mask_worked_out_by_hand():
    # 2 x 2 voxels, one each of background, 1, 2, 3; every probability 1/4.
    masks = torch.tensor([[[0, 1], [2, 3]]])
    logits = torch.zeros(1, 4, 2, 2)
    # Cross-entropy log 4. For each class: overlap 1/4, mass 4 * 1/4 + 1; Dice (1/2 + 1) / (2 + 1) = 1/2.
    assert CrossEntropyDice(class_weights=(1, 1, 1, 1))(logits, masks).item() == pytest.approx(math.log(4) + 0.5)


def test_a_perfect_prediction_costs_nothing():
    masks = torch.randint(0, 4, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    logits = 50 * torch.nn.functional.one_hot(masks, 4).movedim(-1, 1).float()
    assert CrossEntropyDice(class_weights=(1, 1, 1, 1))(logits, masks).item() == pytest.approx(0, abs=1e-5)


def test_an_absent_class_costs_its_false_positives_only():
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    sure = torch.zeros(1, 4, 4, 4)
    sure[:, 0] = 50
    assert CrossEntropyDice(class_weights=(1, 1, 1, 1))(sure, masks).item() == pytest.approx(0, abs=1e-5)
    wrong = sure.clone()
    wrong[0, :, 0, 0] = torch.tensor([0.0, 50, 0, 0])  # one voxel of class 1: Dice (0 + 1) / (1 + 1), the others 1
    assert CrossEntropyDice(class_weights=(1, 1, 1, 1))(wrong, masks).item() == pytest.approx(
        50 / 16 + 1 - (0.5 + 1 + 1) / 3, abs=1e-4
    )


def test_half_precision_does_not_overflow():
    masks = torch.ones(4, 256, 256, dtype=torch.uint8)  # 262,144 voxels are more than float16 can count
    logits = torch.zeros(4, 4, 256, 256, dtype=torch.float16)
    loss = CrossEntropyDice(class_weights=(1, 1, 1, 1))(logits, masks)
    # Overlap n/4, mass n/4 + n for class 1: Dice 0.4; for the absent ones 1 / (n/4 + 1), near 0.
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log(4) + 1 - 0.4 / 3, abs=1e-3)


def test_class_weights_weigh_the_cross_entropy():
    masks = torch.tensor([[[0, 1]]])
    logits = torch.zeros(1, 4, 1, 2)
    logits[0, 0, 0, 1] = 2.0  # voxel of class 1 taken for background
    plain = CrossEntropyDice(class_weights=(1, 1, 1, 1))(logits, masks)
    heavy = CrossEntropyDice(class_weights=(1, 3, 1, 1))(logits, masks)
    right, wrong = math.log(4), math.log(3 + math.exp(2))
    assert (heavy - plain).item() == pytest.approx((right + 3 * wrong) / 4 - (right + wrong) / 2, abs=1e-5)


def test_sums_of_parts_give_the_loss_of_all_their_voxels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 8, 8, generator=generator)
    masks = torch.randint(0, 4, (5, 8, 8), generator=generator)
    criterion = CrossEntropyDice(class_weights=(1, 2, 3, 4))
    parts = criterion.sums(logits[:2], masks[:2]) + criterion.sums(logits[2:], masks[2:])
    torch.testing.assert_close(criterion.value(parts), criterion(logits, masks))
    # The cross-entropy in it is torch's own.
    weights = torch.tensor([1.0, 2, 3, 4])
    cross_entropy, overlap, predicted, true = criterion.sums(logits, masks)
    expected = torch.nn.functional.cross_entropy(logits, masks, weights)
    torch.testing.assert_close((weights * cross_entropy).sum() / (weights * true).sum(), expected)


def test_a_patch_has_the_loss_of_its_slices():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, 6, generator=generator)
    masks = torch.randint(0, 4, (2, 3, 5, 6), generator=generator)
    criterion = CrossEntropyDice(class_weights=(1, 2, 3, 4))
    slices = criterion(logits.movedim(2, 1).flatten(0, 1), masks.flatten(0, 1))
    torch.testing.assert_close(criterion(logits, masks), slices)
