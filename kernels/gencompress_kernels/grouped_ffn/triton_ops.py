"""Mixtures with Triton: slots sorted by expert, products of matrices over ragged groups of rows.

A program takes a tile of the rows of one group, which it finds from `starts` on the device: the
host knows nothing about the routing and waits for nothing. There are as many programs as any
routing could need; those without rows do nothing. Rows of x and of slopes are gathered while they
are read. Results come back a slot each, [P, D], and a token's slots are added up in their order: no
atomics, the same bits at every run, and the same whoever else is in the batch.

Sums are in float32, of float64 in that. float32 is multiplied without shortcuts (not in TF32).
Floors: that of `cpu`, plus P (2 H' + 2 D) numbers written and read in between; backward twice the
operations of a forward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.grouped_ffn.layout import ACTIVATIONS
from gencompress_kernels.grouped_ffn.triton_products import (
    _back,
    _down_again,
    _linear,
    _outer,
    _up,
)
from gencompress_kernels.triton_launch import launch

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of a tile, and of a step of its sums
WARPS = 8  # with 4, the backward's tile does not fit in registers


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
    """As the reference."""
    slots, sizes, groups = len(order), _kinds(x), len(offsets) - 1
    first, second = _tables(offsets, activation, x.shape[1], y.shape[1], x.device)
    per, most = ACTIVATIONS[activation], max(high - low for low, high in pairwise(offsets))
    a, parts = x.new_empty(slots, most), x.new_empty(slots, y.shape[1])
    launch(
        _up, (_tiles(slots, groups), triton.cdiv(most, COLUMNS)), x, x, order, starts, first.rows,
        w1, x if b1 is None else b1, gates, x if z is None else z, a, expert.shape[1], groups,
        x.shape[1], per * most, **_form(activation), BIAS=b1 is not None, KEEP=z is not None,
        EVEN=first.even, GROUPS=triton.next_power_of_2(groups), **sizes,
    )  # fmt: skip
    _to_slots(a, order, starts, second, w2, b2, gates, parts)
    torch.sum(parts.view(*expert.shape, y.shape[1]), 1, out=y)


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
    """As the reference, from z."""
    dx, dgates, dw1, dw2, db1, db2 = out
    slots, sizes, groups = len(order), _kinds(x), len(offsets) - 1
    first, second = _tables(offsets, activation, x.shape[1], slopes.shape[1], x.device)
    most = z.shape[1] // ACTIVATIONS[activation]
    blocks = max(triton.cdiv(most, COLUMNS), 1)  # a gate has a gradient by biases alone, too
    a, dz = x.new_empty(slots, most), torch.empty_like(z)
    by_gate = x.new_empty(blocks, slots, dtype=torch.promote_types(x.dtype, torch.float32))
    inner = any(grad is not None for grad in (dx, dw1, db1))
    launch(
        _down_again, (_tiles(slots, groups), blocks), x, slopes, order, starts, second.rows, w2,
        x if b2 is None else b2, gates, z, a, dz, by_gate, expert.shape[1], groups,
        slopes.shape[1], z.shape[1], slots, **_form(activation), BIAS=b2 is not None,
        GATES=dgates is not None, WEIGHTS=dw2 is not None, INNER=inner,
        EVEN=second.even, GROUPS=triton.next_power_of_2(groups), **sizes,
    )  # fmt: skip
    if dgates is not None:
        dgates.copy_(by_gate.sum(0).view_as(dgates))
    given = order, starts
    _weights(dz, x, *given, first, gates, dw1, db1, None)
    _weights(a, slopes, *given, second, gates, dw2, None, db2)
    if dx is not None:
        parts = x.new_empty(slots, x.shape[1])
        _to_slots(dz, *given, first, w1, None, gates, parts)
        torch.sum(parts.view(*expert.shape, dx.shape[1]), 1, out=dx)


def linear(
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    y: Tensor,
) -> None:
    """As the reference."""
    groups, width, table = len(starts) - 1, y.shape[1], _table(tuple(sizes), x.device)
    launch(
        _linear, (_tiles(len(x), groups), triton.cdiv(width, COLUMNS)), x, x, starts, table.rows,
        weight, x if bias is None else bias, y, groups, x.shape[1], width, BIAS=bias is not None,
        EVEN=table.even, GROUPS=triton.next_power_of_2(groups), **_kinds(x),
    )  # fmt: skip


def linear_backward(
    slopes: Tensor,
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    out: Sequence[Tensor | None],
) -> None:
    """As the reference."""
    dx, dw, db = out
    table = _table(tuple(sizes), x.device)
    if dx is not None:
        _to_slots(slopes, None, starts, table, weight, None, slopes, dx)
    _weights(slopes, x, None, starts, table, slopes, dw, db, None)


def _to_slots(
    left: Tensor,
    order: Tensor | None,
    starts: Tensor,
    table: _Table,
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor,
    out: Tensor,
) -> None:
    """Rows without an order stay where they are."""
    groups, width = len(table.rows), out.shape[1]
    launch(
        _back, (_tiles(len(out), groups), triton.cdiv(width, COLUMNS)), left, left,
        starts if order is None else order, starts, table.rows, weight,
        left if bias is None else bias,
        gates, out, groups, left.shape[1], width, BIAS=bias is not None, SLOTS=order is not None,
        EVEN=table.even, GROUPS=triton.next_power_of_2(groups), **_kinds(left),
    )  # fmt: skip


def _weights(
    left: Tensor,
    right: Tensor,
    order: Tensor | None,
    starts: Tensor,
    table: _Table,
    gates: Tensor,
    product: Tensor | None,
    by_left: Tensor | None,
    by_right: Tensor | None,
) -> None:
    """Fills what is not None."""
    if product is None and by_left is None and by_right is None:
        return
    tiles = max(triton.cdiv(table.most, ROWS), 1)
    chosen = 1 if order is None else max(len(order) // max(len(right), 1), 1)
    blocks = max(triton.cdiv(right.shape[1], COLUMNS), 1)
    launch(
        _outer, (len(table.rows) * tiles, blocks), left, left, right,
        starts if order is None else order, starts, table.rows, gates,
        *(left if t is None else t for t in (product, by_left, by_right)),
        chosen, tiles, left.shape[1], right.shape[1], PRODUCT=product is not None,
        LEFT=by_left is not None, RIGHT=by_right is not None, SLOTS=order is not None,
        EVEN=table.even, **_kinds(left),
    )  # fmt: skip


def _kinds(like: Tensor) -> dict[str, object]:
    """Types and tiles for tensors of a type."""
    double = like.dtype == torch.float64
    # the interpreter knows no products of bfloat16; those in float32 are the same, they are exact
    half = like.dtype in (torch.float16, torch.bfloat16) and not dispatch.interpreting()
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    wide = tl.float64 if double else tl.float32
    part = names[like.dtype] if half else wide
    # without tensor cores a step lies in registers
    tiles = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH if half else DEPTH // 2}
    return tiles | {"WIDE": wide, "PART": part, "num_warps": WARPS}


def _form(activation: str) -> dict[str, object]:
    form = {"gelu-approximate": "tanh", "swiglu": "silu"}.get(activation, "erf")
    return {"FORM": form, "GATED": ACTIVATIONS[activation] == 2}


def _tiles(rows: int, groups: int) -> int:
    """As many tiles as any way to deal rows out to groups may need."""
    return (rows + min(rows, groups) * (ROWS - 1)) // ROWS


def _tables(
    offsets: Sequence[int], activation: str, channels: int, out: int, device: torch.device
) -> tuple[_Table, _Table]:
    """Of w1 [R, C] and w2 [H, D]."""
    sizes = [high - low for low, high in pairwise(offsets)]
    per = ACTIVATIONS[activation]
    first = tuple(side for size in sizes for side in (per * size, channels))
    return _table(first, device), _table(tuple(s for h in sizes for s in (h, out)), device)


@dataclass(frozen=True, eq=False)
class _Table:
    """Where the weights of groups lie."""

    rows: Tensor  # int64 [E, 4]: rows and columns of a weight, its first number, its first bias
    most: int  # rows of the largest
    even: bool  # whether all sides are multiples of 16, so that loads may be wide


@functools.lru_cache(maxsize=256)
def _table(sizes: tuple[int, ...], device: torch.device) -> _Table:
    """Made once a device."""
    rows, columns = sizes[::2], sizes[1::2]
    firsts = accumulate((n * k for n, k in zip(rows, columns, strict=True)), initial=0)
    places = accumulate(rows, initial=0)
    found = torch.tensor(list(zip(rows, columns, firsts, places, strict=False)))
    return _Table(found.to(device), max(rows), all(side % 16 == 0 for side in sizes))
