"""The definition: every expert sees every token, and counts with a gate of 0 where not chosen.

E / k times the work of the tokens that count. The linear layers have no plainer form than a product
for each group, so those of `cpu` are these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(z: Tensor, activation: str) -> Tensor:
    """[n, h] of pre-activations [n, h], or of [n, 2 h] with the gates second."""
    if activation in ("geglu", "swiglu"):
        values, gates = z.chunk(2, 1)
        return values * (F.gelu(gates) if activation == "geglu" else F.silu(gates))
    return F.gelu(z, approximate="tanh" if activation == "gelu-approximate" else "none")


def activate_backward(da: Tensor, z: Tensor, activation: str) -> Tensor:
    """The gradient by z, like z, where da [n, h] is that by the activations."""
    aten = torch.ops.aten
    if activation in ("geglu", "swiglu"):
        values, gates = z.chunk(2, 1)
        if activation == "geglu":
            act, dgates = F.gelu(gates), aten.gelu_backward(da * values, gates)
        else:
            act, dgates = F.silu(gates), aten.silu_backward(da * values, gates)
        return torch.cat([da * act, dgates], 1)
    form = "tanh" if activation == "gelu-approximate" else "none"
    found: Tensor = aten.gelu_backward(da, z, approximate=form)
    return found


def forward(
    x: Tensor,
    expert: Tensor,
    gates: Tensor,
    order: Tensor,
    starts: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Sequence[int],
    activation: str,
    z: Tensor | None,
    y: Tensor,
) -> None:
    """Fills y [T, D] and, unless it is None, z with the pre-activations of the sorted slots."""
    ends, sums = starts.tolist(), wide(y)
    sums.zero_()
    for e, rows in enumerate(rows_of(offsets, activation)):
        inner = F.linear(x, w1[rows], None if b1 is None else b1[rows])
        found = activate(inner, activation) @ w2[offsets[e] : offsets[e + 1]]
        found = found if b2 is None else found + b2[e]
        sums += _gate(gates, expert == e, sums.dtype) * found
        if z is not None:
            mine, count = slice(ends[e], ends[e + 1]), rows.stop - rows.start
            z[mine, :count] = inner[order[mine] // gates.shape[1]]
            z[mine, count:] = 0
    y.copy_(sums)


def backward(
    slopes: Tensor,
    x: Tensor,
    expert: Tensor,
    gates: Tensor,
    order: Tensor,
    starts: Tensor,
    z: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Sequence[int],
    activation: str,
    out: Sequence[Tensor | None],
) -> None:
    """Fills those of `out` that are not None: gradients by x, gates, w1, w2, b1 and b2; z is not
    needed."""
    dx, dgates, dw1, dw2, db1, db2 = out
    sums = wide(x)
    sums.zero_()
    if dgates is not None:
        dgates.zero_()
    for e, rows in enumerate(rows_of(offsets, activation)):
        neurons, chosen = slice(offsets[e], offsets[e + 1]), expert == e
        inner = F.linear(x, w1[rows], None if b1 is None else b1[rows])
        a, scale = activate(inner, activation), _gate(gates, chosen, sums.dtype)
        dy = (scale * slopes).to(x.dtype)
        dz = activate_backward(dy @ w2[neurons].T, inner, activation)
        sums += dz @ w1[rows]
        if dgates is not None:
            found = a @ w2[neurons] if b2 is None else a @ w2[neurons] + b2[e]
            dgates += chosen * (found.to(sums.dtype) * slopes).sum(1, keepdim=True)
        if dw1 is not None:
            dw1[rows] = dz.T @ x
        if dw2 is not None:
            dw2[neurons] = a.T @ dy
        if db1 is not None:
            db1[rows] = dz.sum(0)
        if db2 is not None:
            db2[e] = dy.sum(0)
    if dx is not None:
        dx.copy_(sums)


def _gate(gates: Tensor, chosen: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, 1]: what each token gives an expert that it chose where `chosen` [T, k] is True."""
    return (gates * chosen).sum(1, keepdim=True).to(dtype)


def wide(like: Tensor) -> Tensor:
    """To add up in: unwritten memory of the shape of `like`; of half precisions, in float32."""
    return torch.empty_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def rows_of(offsets: Sequence[int], activation: str) -> list[slice]:
    """Each expert's rows of w1."""
    rows = 2 if activation in ("geglu", "swiglu") else 1
    return [slice(rows * low, rows * high) for low, high in pairwise(offsets)]


def linear(
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    y: Tensor,
) -> None:
    """Fills y [P, widest]; `sizes` are N_0, K_0, N_1, K_1, ..."""
    for mine, w, place in groups(starts, weight, sizes):
        n, k = w.shape
        b = None if bias is None else bias[place : place + n]
        y[mine, :n] = F.linear(x[mine, :k], w, b)
        y[mine, n:] = 0


def linear_backward(
    slopes: Tensor,
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    out: Sequence[Tensor | None],
) -> None:
    """Fills those of `out` that are not None: gradients by x, weight and bias."""
    dx, dw, db = out
    first = 0
    for mine, w, place in groups(starts, weight, sizes):
        n, k = w.shape
        dy = slopes[mine, :n]
        if dx is not None:
            dx[mine, :k] = dy @ w
            dx[mine, k:] = 0
        if dw is not None:
            dw[first : first + n * k] = (dy.T @ x[mine, :k]).flatten()
        if db is not None:
            db[place : place + n] = dy.sum(0)
        first += n * k


def groups(
    starts: Tensor, weight: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[slice, Tensor, int]]:
    """Of each group its rows, its weight [N, K], and where its biases start."""
    first = place = 0
    ends = starts.tolist()
    for e, (n, k) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        yield slice(ends[e], ends[e + 1]), weight[first : first + n * k].view(n, k), place
        first, place = first + n * k, place + n
