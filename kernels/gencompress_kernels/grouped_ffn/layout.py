"""How the weights of a mixture lie, and which tokens go where.

E experts of H neurons in all, C channels in, D out; T tokens, k experts a token, P = T k slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# names of diffusers' FeedForward -> rows of w1 a neuron; gated ones multiply values by activated
# gates: "geglu" by gelu, "swiglu" by silu. "gelu-approximate" is the tanh form
ACTIVATIONS = {"gelu": 1, "gelu-approximate": 1, "geglu": 2, "swiglu": 2}


@dataclass(frozen=True, eq=False)
class Experts:
    """E feed-forwards in one piece; neurons `offsets[e]` to `offsets[e + 1]` are those of expert e,
    which may have any number of them, or none.

    Raises ValueError where sizes do not fit.
    """

    # [R, C], R = H: a neuron's incoming weights. Gated: R = 2 H, and rows 2 offsets[e] to
    # 2 offsets[e + 1] are expert e's values followed by its gates, as in the Linear of diffusers
    w1: Tensor
    w2: Tensor  # [H, D]: a neuron's outgoing weights, a column of the second Linear
    offsets: tuple[int, ...]  # E + 1, from 0 to H
    activation: str  # one of ACTIVATIONS
    b1: Tensor | None = None  # [R]
    b2: Tensor | None = None  # [E, D]

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"unknown activation {self.activation!r}; known: {known}")
        if self.w1.ndim != 2 or self.w2.ndim != 2:
            shapes = f"{tuple(self.w1.shape)} and {tuple(self.w2.shape)}"
            raise ValueError(f"weights of shapes {shapes}, expected [R, C] and [H, D]")
        neurons, steps = len(self.w2), pairwise(self.offsets)
        ends = self.offsets[0] == 0 and self.offsets[-1] == neurons if self.offsets else False
        if len(self.offsets) < 2 or not ends or any(low > high for low, high in steps):
            raise ValueError(
                f"offsets {self.offsets}, expected one more than experts, rising from 0 to the "
                f"{neurons} rows of w2"
            )
        rows = neurons * ACTIVATIONS[self.activation]
        wanted = {"w1": (rows, self.w1.shape[1]), "b1": (rows,)}
        wanted["b2"] = (len(self), self.w2.shape[1])
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} of shape {tuple(tensor.shape)}, expected {shape}: {len(self)} experts "
                    f"of {neurons} neurons with {self.activation}"
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, eq=False)
class Linears:
    """E weights [N_e, K_e] of torch's Linear, row after row, one after the other.

    Raises ValueError where sizes do not fit.
    """

    weight: Tensor  # [sum of N_e K_e]
    sizes: tuple[tuple[int, int], ...]  # (N_e, K_e)
    bias: Tensor | None = None  # [sum of N_e]

    def __post_init__(self) -> None:
        if not self.sizes or any(min(size) < 0 for size in self.sizes):
            raise ValueError(f"sizes {self.sizes}, expected at least one pair of 0 or more")
        numbers = sum(n * k for n, k in self.sizes), sum(n for n, _ in self.sizes)
        for name, tensor, count in zip(
            ("weight", "bias"), (self.weight, self.bias), numbers, strict=True
        ):
            if tensor is not None and tensor.shape != (count,):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)}, expected ({count},)")


def pack_experts(
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor | None]], activation: str
) -> Experts:
    """`Experts` of copies of w1 [R_e, C], b1 [R_e], w2 [D, H_e] and b2 [D] as two torch Linears
    have them. Differentiable. Biases: of all experts, or None of all.

    Raises ValueError where sizes do not fit.
    """
    if not layers:
        raise ValueError("no experts to pack; expected at least one")
    first, bias, second, shift = zip(*layers, strict=True)
    ends = torch.tensor([0, *(w.shape[1] for w in second)]).cumsum(0).tolist()
    rows = ACTIVATIONS.get(activation, 1)
    if [len(w) for w in first] != [rows * w.shape[1] for w in second]:
        raise ValueError(
            f"{[len(w) for w in first]} rows of first for {[w.shape[1] for w in second]} columns "
            f"of second weights, expected {rows} a column with {activation}"
        )
    b1, b2 = _joined("b1", bias), _joined("b2", shift)
    w2 = torch.cat([w.T for w in second])
    b2 = b2 if b2 is None else b2.view(len(layers), -1)
    return Experts(torch.cat(first), w2, tuple(ends), activation, b1, b2)


def pack_linears(weights: Sequence[Tensor], biases: Sequence[Tensor | None] = ()) -> Linears:
    """`Linears` of copies of weights [N_e, K_e] and, for all or none of them, biases [N_e].
    Differentiable. Raises ValueError where sizes do not fit."""
    if not weights or any(weight.ndim != 2 for weight in weights):
        raise ValueError(f"{len(weights)} weights, expected at least one, each [N, K]")
    sizes = tuple((len(weight), weight.shape[1]) for weight in weights)
    bias = _joined("biases", biases) if biases else None
    return Linears(torch.cat([weight.flatten() for weight in weights]), sizes, bias)


def _joined(name: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    if given and len(given) != len(parts):
        raise ValueError(f"{name} of {len(given)} of {len(parts)} layers, expected all or none")
    return torch.cat(given) if given else None


def route_topk(scores: Tensor, k: int) -> Tensor:
    """int64 [T, k]: the k highest of scores [T, n], highest first, equal ones by the lower index.
    Does not depend on other rows. No gradient. A score that is not a number counts as the highest.

    Raises ValueError for another shape or dtype, or k out of 0 to n.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores are {scores.dtype} {tuple(scores.shape)}, expected floats [T, n]")
    if not 0 <= k <= scores.shape[1]:
        raise ValueError(f"k {k} of {scores.shape[1]} scores, expected 0 to {scores.shape[1]}")
    return scores.detach().argsort(dim=1, descending=True, stable=True)[:, :k]


def sort_slots(expert: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """int64 order [P] and starts [E + 1]: `order[starts[e] : starts[e + 1]]` are the places of
    expert e among the int64 `expert` (any shape, flattened), ascending. Nothing waits for a GPU."""
    flat = expert.flatten()
    order = flat.argsort(stable=True)
    wanted = torch.arange(num_experts + 1, device=flat.device)
    return order, torch.searchsorted(flat[order], wanted)
