"""Density control: when splats are added, moved and removed while a scene is trained.

One file a policy, each a frozen dataclass of settings and functions over `State`. Steps count from
1; every setting that counts steps is meant for a run of 30,000 and `scaled` fits it to another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gencompress.splat.density import default, mcmc, percentile
from gencompress.splat.density.default import Default
from gencompress.splat.density.mcmc import Mcmc
from gencompress.splat.density.percentile import Percentile
from gencompress.splat.state import State

__all__ = ["POLICIES", "Default", "Mcmc", "Percentile", "Policy", "after_step", "scaled"]

Policy = Default | Mcmc | Percentile
POLICIES: dict[str, type] = {"default": Default, "mcmc": Mcmc, "percentile": Percentile}
MODULES = {Default: default, Mcmc: mcmc, Percentile: percentile}


@torch.no_grad()
def after_step(
    policy: Policy,
    state: State,
    generator: torch.Generator,
    weights: Callable[[], Tensor],
) -> None:
    """What the policy does to `state` after an optimiser step that made `state.step` what it is.

    Tensors of the state are replaced: whoever holds one fetches it again. What was done is appended
    to `state.events`, a dict of step, event, count and splats (the number there are afterwards).

    Args:
        generator: all randomness; on the CPU.
        weights: blend weights [N] over all training views, called only where a statistic needs it.
    """
    MODULES[type(policy)].after_step(policy, state, generator, weights)


def scaled(policy: Policy, steps: int) -> Policy:
    """The same policy for a run of `steps`: its step counts times steps / 30,000, floors kept."""
    return MODULES[type(policy)].scaled(policy, steps)
