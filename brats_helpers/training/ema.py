"""The exponential moving average (EMA) of a network's weights, which is validated and kept."""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MovingAverage:
    """The EMA of a network's weights and BatchNorm statistics.

    The first updates count more: after n updates the decay is at most (1 + n) / (10 + n).

    Args:
        network: on its device.
        decay: 0 to below 1; 0 keeps the weights themselves.

    Attributes:
        network: the averaged copy.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = decay
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.updates = 0  # counted on the CPU: reading a count from a GPU would wait for it

    @torch.no_grad()
    def update(self, network: nn.Module, made: torch.Tensor | None = None) -> None:
        """Move the average towards `network`.

        Args:
            network: after a step; always the same one.
            made: 0-dimensional; false if the optimiser skipped the step, which leaves the average as it is. None: true.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        self.updates += 1
        if not self._pairs:  # valid for all updates, which change the tensors in place
            own, other = (list(each.state_dict().values()) for each in (self.network, network))
            self._pairs = list(zip(own, other, strict=True))
        floats = [pair for pair in self._pairs if pair[0].is_floating_point()]
        if made is None:
            get_ema_multi_avg_fn(decay)(*map(list, zip(*floats, strict=True)), None)
        else:
            weight = (1 - decay) * made.float()
            for one, other in floats:
                one.lerp_(other, weight.to(one.device))
        for one, other in self._pairs:
            if not one.is_floating_point():
                one.copy_(other if made is None else torch.where(made, other, one))

    def state_dict(self) -> dict:
        """Return the state that `load_state_dict` restores."""
        return {"updates": self.updates, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.network.load_state_dict(state["network"])
