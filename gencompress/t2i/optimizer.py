"""What moves the weights of a training: AdamW, or Muon for matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gencompress.t2i.checkpoint import MOMENT
from gencompress.t2i.shard import kinds, local

OPTIMIZERS = ("adamw", "muon")
Weights = Mapping[str, nn.Parameter]  # as `trained` names them


def optimizers(
    weights: Weights,
    name: str,
    rate: float,
    betas: tuple[float, float],
    decay: float,
    tables: Sequence[str] = (),
    moments: Mapping[str, Tensor] | None = None,
    faster: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """Of all weights, each in one; those of a parameter group learn at "factor" times the rate.

    Args:
        name: adamw; or muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"), whose
            steps have the size of AdamW's, so that `rate` and `decay` mean the same (Liu et al.
            2025, "Muon is scalable for LLM training"). It takes whole matrices, not shards.
        betas: of AdamW.
        tables: names of matrices that AdamW takes all the same.
        moments: of a checkpoint, by "weight/moment".
        faster: factors by how names end.
    """
    by_muon: dict[float, list[nn.Parameter]] = {}
    others: dict[float, list[nn.Parameter]] = {}
    for key, one in weights.items():
        whole = name == "muon" and one.ndim == 2 and key not in tables
        found = (times for end, times in (faster or {}).items() if key.endswith(end))
        (by_muon if whole else others).setdefault(next(found, 1.0), []).append(one)
    made: list[torch.optim.Optimizer] = []
    if others:
        groups = [
            {"params": kind, "factor": factor}
            for factor, alike in others.items()
            for kind in kinds(alike)
        ]
        made.append(torch.optim.AdamW(groups, rate, betas, weight_decay=decay, fused=True))
    if by_muon:
        groups = [{"params": alike, "factor": factor} for factor, alike in by_muon.items()]
        made.append(torch.optim.Muon(groups, rate, decay, adjust_lr_fn="match_rms_adamw"))
    slots = _slots(weights, moments or {})
    for optimizer in made:
        order = [one for group in optimizer.param_groups for one in group["params"]]
        state = {number: slots[one] for number, one in enumerate(order) if one in slots}
        if state:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return made


def kept_moments(weights: Weights, given: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What `optimizers` takes, each name after MOMENT."""
    return {
        f"{MOMENT}{name}/{moment}": value
        for optimizer in given
        for name, one in weights.items()
        for moment, value in optimizer.state.get(one, {}).items()
    }


def tables_of(models: Mapping[str, nn.Module]) -> list[str]:
    """Names of embeddings: matrices whose rows are looked up, of which a step moves few."""
    return [
        f"{key}.{name}.weight"
        for key, model in models.items()
        for name, one in model.named_modules()
        if isinstance(one, nn.Embedding)
    ]


def _slots(weights: Weights, moments: Mapping[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
    """Moments of a checkpoint by weight."""
    found: dict[Tensor, dict[str, Tensor]] = {}
    for name, value in moments.items():
        key, _, moment = name.rpartition("/")
        weight = weights[key]
        if value.ndim:
            # fused kernels go through memory: a moment lies in it as its weight does
            held = torch.empty_like(weight, requires_grad=False)
            local(held).copy_(value)
            value = held
        found.setdefault(weight, {})[moment] = value
    return found
