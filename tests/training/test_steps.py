"""One step: micro-batches add up to the batch, faults are found on time, the average follows."""

import pytest
import torch
from accelerate import Accelerator

from brats_helpers.training.ema import MovingAverage
from brats_helpers.training.steps import FiniteCheck, NotFiniteError, gradients


def test_gradients_in_micro_batches_are_those_of_the_batch():
    """For a loss that is a mean over slices, to rounding."""
    model = torch.nn.Conv2d(2, 4, 3, padding=1)
    images, masks = torch.randn(6, 2, 8, 8), torch.randint(0, 4, (6, 8, 8))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    how = {"accelerator": Accelerator(cpu=True), "scaler": scaler, "precision": "float32"}
    found = []
    for micro_batch in (6, 4, 1):
        loss = gradients(model, torch.nn.functional.cross_entropy, images, masks, **how, micro_batch=micro_batch)
        found.append((loss, model.weight.grad.clone()))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


def _add(check, step, loss=1.0, norm=1.0):
    check.add(step, torch.tensor(loss), torch.tensor(norm), torch.tensor([[step, 0]]))


def test_a_fault_is_found_at_the_next_check_with_its_step():
    check = FiniteCheck(every=4, scaled=False)
    for step, norm in enumerate([1.0, torch.inf, 1.0]):
        _add(check, step, norm=norm)
    with pytest.raises(NotFiniteError) as error:
        _add(check, 3)
    assert error.value.step == 1 and error.value.index.tolist() == [[1, 0]]
    check.look()  # nothing waits any more


def test_with_a_loss_scale_gradients_may_overflow_now_and_then_but_losses_may_not():
    check = FiniteCheck(every=1, scaled=True)
    for step in range(50):
        _add(check, step, norm=torch.nan if step % 20 else 1.0)
    with pytest.raises(NotFiniteError):
        _add(check, 50, loss=torch.nan)


def test_the_average_is_the_exponential_one_with_a_memory_that_grows():
    """With decay 0.5 the first three updates keep 0, min(0.5, 2/11) and min(0.5, 3/12) of the average."""
    network = torch.nn.BatchNorm1d(1)
    average = MovingAverage(network, 0.5)
    expected = None
    for value, kept in ((8.0, 0.0), (2.0, 2 / 11), (4.0, 3 / 12)):
        for tensor in (network.weight.data, network.running_mean):
            tensor.fill_(value)
        network.num_batches_tracked += 1
        average.update(network)
        expected = value if expected is None else kept * expected + (1 - kept) * value
    assert average.network.weight.item() == pytest.approx(expected)
    assert average.network.running_mean.item() == pytest.approx(expected)
    assert average.network.num_batches_tracked == 3 and not average.network.weight.requires_grad

    before = {name: tensor.clone() for name, tensor in average.network.state_dict().items()}
    network.weight.data.fill_(100)
    average.update(network, made=torch.tensor(False))  # a skipped step
    assert all(torch.equal(tensor, before[name]) for name, tensor in average.network.state_dict().items())
    again = MovingAverage(network, 0.5)
    again.load_state_dict(average.state_dict())
    assert again.updates == 4 and torch.equal(again.network.weight, average.network.weight)
