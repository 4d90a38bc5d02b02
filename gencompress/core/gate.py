"""Gates: numbers in [0, 1] made of logits, soft while they are learnt and then kept or not.

D entries of a vector of logits. `noise` is a torch.Generator to draw from, a tensor of uniform
numbers in [0, 1) that broadcasts to the logits, or None: every gate as at the median of its noise.
All is differentiable in the logits where it gives floats. Concrete Ticket Search's rule that
balances two gradients is not here: it is published without its formula.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["gumbel", "logistic"]
Noise = torch.Generator | Tensor | None

# of -log(-log U) and of log U - log(1 - U)
MEDIAN = {"gumbel": -math.log(math.log(2)), "logistic": 0.0}
SHARE_EPS = 1e-6  # APTP's, in the logits of depth shares


def gumbel_sigmoid(
    logits: Tensor,
    noise: Noise,
    temperature: float = 0.4,
    offset: float = 3.0,
    kind: Kind = "gumbel",
) -> Tensor:
    """sigmoid((logits + G + offset) / temperature), like the logits; G is a single Gumbel draw, or
    logistic (the difference of two). The defaults are APTP's (arXiv 2406.12042)."""
    drawn = _draw(noise, logits, kind)
    return torch.sigmoid((logits + drawn + offset) / temperature)


def keep_probability(logits: Tensor, offset: float = 3.0, kind: Kind = "gumbel") -> Tensor:
    """How likely `gumbel_sigmoid` is at least 1/2, at any temperature: 1 - exp(-exp(logit +
    offset)), or sigmoid(logit + offset)."""
    shifted = logits + offset
    if _checked(kind) == "logistic":
        return torch.sigmoid(shifted)
    return -torch.expm1(-shifted.clamp(max=20).exp())  # 1 from there on, also in float64


def keeps(logits: Tensor, offset: float = 3.0, kind: Kind = "gumbel") -> Tensor:
    """bool: a keep-probability of at least 1/2, which no noise decides."""
    return logits + offset + MEDIAN[_checked(kind)] >= 0


def straight_through(soft: Tensor) -> Tensor:
    """1 where a gate is at least 1/2, else 0; the gradient is that of the soft gate (Bengio et al.
    2013)."""
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


def at_least_one(soft: Tensor, lengths: Sequence[int], *, best: bool = False) -> Tensor:
    """Where no gate of a slice is at least 1/2, its first is raised by 1/2 (APTP's non-zero width),
    or its highest.

    Args:
        soft: [..., D] in [0, 1].
        lengths: of the slices, which begin at entry 0; what follows the last stays as it is.
        best: raise the highest; of equal ones the first.
    """
    where = _entries(tuple(lengths), soft.shape[-1]).to(soft.device)
    gates = soft[..., where]
    lost = (gates.amax(-1) < 0.5).to(soft.dtype)
    chosen = where[:, 0] + (gates.argmax(-1) if best else torch.zeros_like(lost, dtype=where.dtype))
    return soft + torch.zeros_like(soft).scatter(-1, chosen, lost / 2)


def best_of_none(keep: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    """bool [..., D]: `keep`, and in each slice of which nothing is kept its entry of highest value,
    of equal ones the first; `lengths` as in `at_least_one`."""
    where = _entries(tuple(lengths), keep.shape[-1]).to(keep.device)
    lost = ~keep[..., where].any(-1)
    best = where[:, 0] + values[..., where].argmax(-1)
    saved = torch.zeros_like(keep).scatter(-1, best, lost)
    return keep | saved


def shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of depth logits [..., D], by rank r = 0 ... D - 1: kappa_r, the sum of the first D - r
    softmax shares, falling from 1; and 1 - kappa_r without cancellation."""
    share = torch.softmax(logits, -1)
    lost = share.flip(-1).cumsum(-1)[..., :-1]
    return share.cumsum(-1).flip(-1), torch.cat([torch.zeros_like(share[..., :1]), lost], -1)


def ordered(logits: Tensor, order: Sequence[int]) -> Tensor:
    """Logits of gates that go in a fixed order (APTP, section 3): that of rank r, which is
    log(kappa_r / (1 - kappa_r)) of `shares`, is put in entry order[r].

    Rank 0 is 13.8 whatever the logits, so it stays; the last rank is the first to go. Finite, with
    finite gradients, for logits as far as +-50 and more.

    Args:
        logits: [..., D].
        order: every entry once, what stays longest first.

    Raises:
        ValueError: the order is not one of all entries.
    """
    if sorted(order) != list(range(logits.shape[-1])):
        raise ValueError(f"order {tuple(order)}: expected each of {logits.shape[-1]} entries once")
    kept, lost = shares(logits)
    ranked = (kept + SHARE_EPS).log() - (lost + SHARE_EPS).log()
    rank_of = sorted(range(len(order)), key=order.__getitem__)
    return ranked[..., rank_of]


def concrete(logits: Tensor, noise: Noise, temperature: float = 2 / 3) -> Tensor:
    """sigmoid((logit + log U - log(1 - U)) / temperature) (Maddison et al. 2017)."""
    return gumbel_sigmoid(logits, noise, temperature, 0.0, "logistic")


def hard_concrete(
    logits: Tensor,
    noise: Noise,
    temperature: float = 2 / 3,
    low: float = -0.1,
    high: float = 1.1,
) -> Tensor:
    """Concrete, stretched from (0, 1) to (low, high) and clamped, so exactly 0 and 1 have mass
    (Louizos et al. 2018, which also gives the defaults). Without noise their estimator at test
    time, which has no temperature."""
    soft = torch.sigmoid(logits) if noise is None else concrete(logits, noise, temperature)
    return (soft * (high - low) + low).clamp(0, 1)


def expected_l0(
    logits: Tensor, temperature: float = 2 / 3, low: float = -0.1, high: float = 1.1
) -> Tensor:
    """How likely each gate of `hard_concrete` is not 0; their sum is the expected count."""
    return torch.sigmoid(logits - temperature * math.log(-low / high))


def bi_mask(scores: Tensor, sizes: Sequence[int], size_logits: Tensor, omega: float) -> Tensor:
    """Once-for-Both's mask: omega sigmoid(score) + (1 - omega) times how likely the chosen size
    reaches the rank of the score. Its gradient reaches all scores, and the sizes.

    Args:
        scores: [D]; equal ones rank by index.
        sizes: how many entries each of N options keeps.
        size_logits: [N].
        omega: see `omega_at`.
    """
    if size_logits.shape != (len(sizes),):
        raise ValueError(f"{tuple(size_logits.shape)} logits of {len(sizes)} sizes")
    rank = scores.argsort(descending=True, stable=True).argsort()
    reached = rank < torch.tensor(list(sizes), device=scores.device).unsqueeze(1)  # [N, D]
    by_rank = torch.softmax(size_logits, 0) @ reached.to(size_logits.dtype)
    return omega * torch.sigmoid(scores) + (1 - omega) * by_rank


def omega_at(step: int, steps: int) -> float:
    """From 0.99 at step 0 straight to 0.1 at the last of `steps` (Once-for-Both's code)."""
    return 0.99 + (0.1 - 0.99) * min(step / max(steps - 1, 1), 1.0)


def one_hot_pressure(size_logits: Tensor) -> Tensor:
    """Falls as one of N >= 2 sizes is chosen: the entropy of their softmax p, and
    tan(pi/2 - pi r) / N with r = sum (p - 1/N)^2 / (1 - 1/N), clamped to [0.01, 0.99] where the
    tangent is finite."""
    num = size_logits.numel()
    if num < 2:
        raise ValueError(f"{num} sizes to choose from, expected at least 2")
    log_p = torch.log_softmax(size_logits, 0)
    p = log_p.exp()
    peak = ((p - 1 / num).square().sum() / (1 - 1 / num)).clamp(0.01, 0.99)
    return torch.tan(math.pi / 2 - math.pi * peak) / num - (p * log_p).sum()


def _checked(kind: Kind) -> Kind:
    if kind not in get_args(Kind):
        raise ValueError(f"noise {kind!r}: known are {', '.join(get_args(Kind))}")
    return kind


def _draw(noise: Noise, logits: Tensor, kind: Kind) -> Tensor | float:
    """What is added to the logits; finite, and made in float32 at least."""
    median = MEDIAN[_checked(kind)]
    if noise is None:
        return median
    if isinstance(noise, torch.Generator):
        drawn = torch.rand(logits.shape, generator=noise, device=noise.device)
    else:
        drawn = noise
    drawn = drawn.to(logits.device, torch.promote_types(drawn.dtype, torch.float32))
    number = torch.finfo(drawn.dtype)
    drawn = drawn.clamp(number.tiny, 1 - number.eps / 2)
    made = -(-drawn.log()).log() if kind == "gumbel" else drawn.log() - (-drawn).log1p()
    return made.to(logits.dtype)


@functools.lru_cache(maxsize=64)
def _entries(lengths: tuple[int, ...], size: int) -> Tensor:
    """int64 [slices, longest]: the entries of each slice; a shorter one's last places repeat its
    first entry."""
    if not lengths:
        return torch.zeros(0, 1, dtype=torch.int64)
    if min(lengths) < 1 or sum(lengths) > size:
        raise ValueError(f"slices of {lengths} entries in a vector of {size}")
    rows, start = [], 0
    for length in lengths:
        own = range(start, start + length)
        rows.append([*own, *[start] * (max(lengths) - length)])
        start += length
    return torch.tensor(rows)
