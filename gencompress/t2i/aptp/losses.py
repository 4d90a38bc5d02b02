"""The losses of APTP's pruning stage beside those after a teacher (t2i/distill.py).

B prompts or samples of this process. Where a loss is of all processes together, each of them finds
the same number, and the mean of their gradients is that of one process with the whole batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gencompress.t2i.distill import Noised

Distance = Literal["log", "absolute", "square"]
Contrast = Literal["bce", "kl"]


def prunable_target(target: float, total: float, prunable: float) -> float:
    """The share of the prunable MACs that may stay so that `target` of all stay: 1 - (1 - target)
    total / prunable.

    Args:
        target: of the whole model, above 0 and at most 1.
        total, prunable: MACs, counted alike; modules with a depth gate are prunable as a whole.

    Raises:
        ValueError: no such share, or a target that no architecture meets.
    """
    if not 0 < target <= 1 or not 0 < prunable <= total:
        raise ValueError(f"target {target} with {prunable:g} of {total:g} MACs prunable")
    found = 1 - (1 - target) * total / prunable
    if not found > 0:
        fixed = 1 - prunable / total
        raise ValueError(
            f"target {target:g}: {fixed:.1%} of the MACs are never pruned, so more must stay"
        )
    return found


def resource_loss(ratios: Tensor, target: float, distance: Distance = "log") -> Tensor:
    """How far the mean share of MACs is from the target: |log(mean / target)|, which is the paper's
    log(max / min), or |mean - target|, or its square.

    Args:
        ratios: [B], of the MACs that can be pruned, as `target` (`prunable_target`).
    """
    mean = gathered(ratios).mean()
    if distance == "log":
        return (mean / target).log().abs()
    if distance == "absolute":
        return (mean - target).abs()
    if distance == "square":
        return (mean - target).square()
    raise ValueError(f"distance {distance!r}: known are {', '.join(get_args(Distance))}")


def contrastive_loss(
    embeddings: Tensor,
    architectures: Tensor,
    temperature: float = 0.03,
    contrast: Contrast = "bce",
) -> Tensor:
    """Similar prompts get similar architectures: the rows of softmax(cosines / temperature) of the
    architectures against those of the prompts, whose gradient stops.

    Args:
        embeddings: of the prompts, [B, any width]; not normalised.
        architectures: comparison vectors, [B, E].
        contrast: "bce", the mean binary cross-entropy of all pairs (the official code); "kl", the
            mean divergence of the rows.

    Returns:
        A number; 0 for a single prompt.
    """
    if contrast not in get_args(Contrast):
        raise ValueError(f"contrast {contrast!r}: known are {', '.join(get_args(Contrast))}")
    prompts = gathered(embeddings.detach())
    ours = gathered(architectures)
    if len(ours) == 1:
        return ours.sum() * 0
    wanted = torch.log_softmax(_cosines(prompts) / temperature, 1)
    logits = _cosines(ours) / temperature
    found = torch.log_softmax(logits, 1)
    if contrast == "kl":
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    share = wanted.exp()
    return -(share * found + (1 - share) * _log_rest(logits)).mean()


def spread(ratios: Tensor) -> Tensor:
    """The standard deviation of the shares of MACs [B], which the total rewards (-0.1); 0 for a
    single sample."""
    every = gathered(ratios)
    return every.std() if len(every) > 1 else every.sum() * 0


def shortfall(ratios: Tensor) -> Tensor:
    """1 - the largest share of MACs of [B], which the total punishes (0.1): one expert stays near
    to the whole model."""
    return 1 - gathered(ratios).max()


def snr_weights_as_coded(noised: Noised, gamma: float = 5.0) -> Tensor:
    """float32 [B]: min(SNR + 1, gamma) / (SNR + 1), for v_prediction. The official code has this in
    place of min(SNR, gamma) / (SNR + 1) (`distill.snr_weights`): it counts pure noise fully."""
    if noised.kind != "v_prediction":
        raise ValueError(f"weights of v_prediction for {noised.kind}")
    return (noised.snr + 1).clamp(max=gamma) / (noised.snr + 1)


def gathered(own: Tensor) -> Tensor:
    """[B, ...] of all processes, one after another; equally many of each. Only this process' part
    has a gradient, times the number of processes, because their mean is taken afterwards."""
    if not (dist.is_available() and dist.is_initialized()):
        return own
    num = dist.get_world_size()
    parts = [torch.zeros_like(own) for _ in range(num)]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own.detach() + (own - own.detach()) * num
    return torch.cat(parts)


def _cosines(rows: Tensor) -> Tensor:
    unit = F.normalize(rows.float(), dim=1)
    return unit @ unit.T


def _log_rest(logits: Tensor) -> Tensor:
    """log(1 - softmax) of rows, exact also where a softmax rounds to 1."""
    log_share = torch.log_softmax(logits, 1)
    best = logits.argmax(1, keepdim=True)
    others = logits.scatter(1, best, float("-inf")).logsumexp(1, keepdim=True)
    rest = others - logits.logsumexp(1, keepdim=True)
    small = log_share.scatter(1, best, -1.0)  # its own place is filled by `rest`
    return torch.log1p(-small.exp()).scatter(1, best, rest)
