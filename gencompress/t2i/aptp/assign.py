"""Which code trains on which prompt: entropic optimal transport, so that no code goes without.

B prompts, K codes, Q peers. Under torch.distributed every process gives its part of the
batch, and gets what one process would find for the whole.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


def nearest(similarity: Tensor) -> Tensor:
    """int64 [B]: the most similar code of [B, K], of equal ones the first. That is how prompts are
    routed once trained, and training without transport."""
    return similarity.argmax(1)


@torch.no_grad()
def assign(
    similarity: Tensor,
    peers: Tensor | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    relative: bool = False,
) -> Tensor:
    """int64 [B]: the code that gets most of each prompt in `sinkhorn`. Loads come near to equal,
    not equal. Without gradient.

    Args:
        similarity: [B, K], of any floating type.
        peers: [Q, K], of other prompts with the codes as they are now: transported together, then
            left out. Worth it where B is not several times K.
        relative: as in `sinkhorn`; balances codes that hardly differ yet.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or an epsilon or number of
            iterations that is not above 0.
    """
    both = similarity
    if peers is not None:
        if peers.ndim != 2 or peers.shape[1:] != similarity.shape[1:]:
            raise ValueError(
                f"similarities of peers {tuple(peers.shape)} to go with {tuple(similarity.shape)}"
            )
        both = torch.cat([similarity, peers.to(similarity)])
    return sinkhorn(both, epsilon, iterations, relative)[: len(similarity)].argmax(1)


@torch.no_grad()
def sinkhorn(
    similarity: Tensor, epsilon: float = 0.05, iterations: int = 3, relative: bool = False
) -> Tensor:
    """The plan Q, float64 [B, K], that maximises <Q, S> + epsilon H(Q) with 1/B for each prompt and
    1/K for each code (Cuturi 2013), after some iterations: prompts have theirs to rounding, codes
    nearly. In logarithms, so no similarity is too large and no epsilon too small.

    Far above the spread of S, epsilon makes a plan that is nearly even, and its largest entries
    balance nothing: a prompt's similarities to fresh codes differ by 1e-4 or less. `relative`
    takes epsilon times the standard deviation of S without its row and column means.

    Under torch.distributed, this process' rows of the plan of all.
    """
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(f"similarities {tuple(similarity.shape)}, expected [prompts, codes]")
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon {epsilon} and {iterations} iterations, expected more than 0")
    if not bool(similarity.isfinite().all()):
        raise ValueError("similarities that are not finite")
    plan = similarity.double()
    count = _over_all(plan.new_tensor(float(len(plan))))
    if relative:
        plan = plan - plan.mean(1, keepdim=True)
        plan = plan - _over_all(plan.sum(0)) / count
        size = (_over_all(plan.square().sum()) / count / plan.shape[1]).sqrt()
        plan = plan / size.clamp(min=torch.finfo(plan.dtype).tiny)
    plan = plan / epsilon
    for _ in range(iterations):
        plan = plan - _log_sums(plan) - math.log(plan.shape[1])
        plan = plan - plan.logsumexp(1, keepdim=True) - count.log()
    return plan.exp()


def _over_all(values: Tensor, how: str = "SUM") -> Tensor:
    """The sum, or other reduction, over all processes; in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, getattr(dist.ReduceOp, how))
    return values


def _log_sums(plan: Tensor) -> Tensor:
    """[K]: the logarithm of what each code gets, over all processes."""
    most = _over_all(plan.amax(0), "MAX")
    return _over_all((plan - most).exp().sum(0)).log() + most
