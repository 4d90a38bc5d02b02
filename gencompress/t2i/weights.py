"""Weights while they are trained: which they are, their average, and masters of bfloat16 ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gencompress.t2i.shard import is_sharded, whole


@dataclass
class EMA:
    """Moving average of named weights, in float32."""

    decay: float
    values: dict[str, Tensor]
    count: int = 0  # updates made

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Moves towards `values`, faster at first: decay min(decay, (1 + n) / (10 + n)) after n
        updates (the warm-up of TensorFlow's ExponentialMovingAverage)."""
        share = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        self.count += 1
        with torch.no_grad():
            for name, value in self.values.items():
                value.lerp_(values[name].detach().float(), share)

    def copy_to(self, models: Mapping[str, nn.Module]) -> None:
        """Writes the average into the models that `fit` trained, by the same names; of a sharded
        one every process calls this."""
        with torch.no_grad():
            for name, parameter in trained(models).items():
                parameter.copy_(whole(self.values[name]))


class Masters:
    """Float32 copies of weights that are bfloat16 from now on until `restore`: the optimiser moves
    the copies, so steps smaller than a bfloat16 resolves add up (Micikevicius et al. 2018).
    Frozen float32 weights are bfloat16 meanwhile, too. Buffers stay as they are, so a BatchNorm
    does not run that way. Sharded weights are left alone: they are gathered as bfloat16."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.low = {name: one for name, one in trained(models).items() if not is_sharded(one)}
        self.high = {name: nn.Parameter(low.detach()) for name, low in self.low.items()}
        every = [one for model in models.values() for one in model.parameters()]
        wide = [one for one in every if one.dtype == torch.float32 and not is_sharded(one)]
        self.before = [(one, one.data) for one in wide]
        for one, data in self.before:
            one.data = data.to(torch.bfloat16)

    def take(self) -> None:
        """Moves the gradients to the copies."""
        for name, low in self.low.items():
            self.high[name].grad = None if low.grad is None else low.grad.float()
            low.grad = None

    def give(self) -> None:
        """Rounds the copies into the weights."""
        for name, low in self.low.items():
            low.data.copy_(self.high[name].data)

    def restore(self) -> None:
        """Every weight in float32 again; the trained ones are the copies."""
        for one, data in self.before:  # the copies live in the memory that the weights came in
            one.grad, one.data = None, data


def trained(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that want gradients, as "model.path.of.parameter"."""
    return {
        f"{key}.{name}": parameter
        for key, model in models.items()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
