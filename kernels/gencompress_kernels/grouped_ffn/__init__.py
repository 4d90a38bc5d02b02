"""grouped_ffn: feed-forwards of a mixture, each over the tokens that are routed to it; and a linear
layer with other weights, of other sizes, for every group of rows.

T tokens of C channels, k experts a token, E experts of H neurons in all, D channels out, P = T k
slots: slot t k + j is the j-th expert of token t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gencompress_kernels import dispatch
from gencompress_kernels.grouped_ffn.layout import (
    ACTIVATIONS,
    Experts,
    Linears,
    pack_experts,
    pack_linears,
    route_topk,
    sort_slots,
)

__all__ = [
    "ACTIVATIONS", "Experts", "Linears", "grouped_ffn", "grouped_linear", "pack_experts",
    "pack_linears", "route_topk", "sort_slots",
]  # fmt: skip


def grouped_ffn(
    x: Tensor, expert: Tensor, gates: Tensor, experts: Experts, *, backend: str | None = None
) -> Tensor:
    """[T, D]: y_t = sum over j of gates[t, j] FFN_e(x_t), e = expert[t, j], where
    FFN_e(x) = act(x W1_e^T + b1_e) W2_e^T + b2_e. No slot is dropped, none is padded.

    Args:
        x: [T, C], of the dtype of the weights; within torch.autocast both are cast to its dtype.
        expert: int64 [T, k], each in 0..E-1, one may come twice. k may be 0: y is 0.
        gates: floating [T, k]; float32 ones are welcome with x in half precision.

    Returns:
        y in the dtype of x; of half precisions, products are rounded to it and slots are added up
        in float32. Differentiable once in x, gates and all weights; an expert without tokens gets
        gradients of exactly 0. Slots are added in the order of experts, so that the same arguments
        give the same bits on the CPU. A token's own bits may depend on how many others its expert
        has, since products of matrices of other sizes round otherwise.

    For a backward the pre-activations are kept, [P, the most rows of w1 an expert has].

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, where `dispatch.looks`, an expert that
            is not there.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    x, *weights = _as_autocast(x, experts.w1, experts.w2, experts.b1, experts.b2)
    _check(x, expert, gates, experts, weights)
    traced = (x, gates, *weights)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in traced)
    y: Tensor
    y, *_ = _ffn(
        x.contiguous(), expert.contiguous(), gates.contiguous(),
        *(tensor if tensor is None else tensor.contiguous() for tensor in weights),
        experts.offsets, experts.activation, keep, backend,
    )  # fmt: skip
    return y


def grouped_linear(
    x: Tensor, starts: Tensor, linears: Linears, *, backend: str | None = None
) -> Tensor:
    """[P, largest N]: rows starts[e] to starts[e + 1] are x[rows, :K_e] W_e^T + b_e, their columns
    from N_e on 0.

    Args:
        x: [P, K], K >= every K_e, of the dtype of the weights (as `grouped_ffn`, also in
            torch.autocast). Columns from K_e on are not read, and their gradient is 0.
        starts: int64 [E + 1], rising from 0 to P, as `sort_slots` gives it.

    Differentiable once in x, weights and biases.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, where `dispatch.looks`, `starts` is no
            such thing.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    x, weight, bias = _as_autocast(x, linears.weight, linears.bias)
    widest = max(k for _, k in linears.sizes)
    if x.ndim != 2 or x.shape[1] < widest:
        raise ValueError(f"x of shape {tuple(x.shape)}, expected [P, {widest} or more]")
    if starts.dtype != torch.int64 or starts.shape != (len(linears.sizes) + 1,):
        raise ValueError(
            f"starts are {starts.dtype} {tuple(starts.shape)}, expected int64 "
            f"({len(linears.sizes) + 1},)"
        )
    _check_like(x, {"starts": starts}, {"weight": weight, "bias": bias})
    sizes = [side for size in linears.sizes for side in size]
    bias = bias if bias is None else bias.contiguous()
    y: Tensor = _linear(
        x.contiguous(), starts.contiguous(), weight.contiguous(), bias, sizes, backend
    )
    return y


def _as_autocast(x: Tensor, *weights: Tensor | None) -> list[Any]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *weights]
    dtype = torch.get_autocast_dtype(kind)
    return [tensor if tensor is None else tensor.to(dtype) for tensor in (x, *weights)]


def _check(
    x: Tensor, expert: Tensor, gates: Tensor, experts: Experts, weights: list[Tensor | None]
) -> None:
    channels = experts.w1.shape[1]
    if x.ndim != 2 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floats [T, {channels}]")
    if expert.ndim != 2 or len(expert) != len(x) or expert.dtype != torch.int64:
        raise ValueError(
            f"expert is {expert.dtype} {tuple(expert.shape)}, expected int64 [{len(x)}, k]"
        )
    if gates.shape != expert.shape or not gates.is_floating_point():
        raise ValueError(
            f"gates are {gates.dtype} {tuple(gates.shape)}, expected floats {tuple(expert.shape)}"
        )
    named = dict(zip(("w1", "w2", "b1", "b2"), weights, strict=True))
    _check_like(x, {"expert": expert, "gates": gates}, named)


def _check_like(x: Tensor, others: dict[str, Tensor], weights: dict[str, Tensor | None]) -> None:
    for name, tensor in (others | weights).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} on {tensor.device}, expected {x.device} like x")
    for name, tensor in weights.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {x.dtype} like x")


@torch.library.custom_op("gencompress::grouped_ffn", mutates_args=())
def _ffn(
    x: Tensor,
    expert: Tensor,
    gates: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Sequence[int],
    activation: str,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D], pre-activations of the sorted slots [P, most rows] (without `keep` [0]), order [P]
    and starts [E + 1]."""
    run = dispatch.pick("grouped_ffn", x.device, backend).forward
    num = len(offsets) - 1
    if expert.numel() and dispatch.looks(expert):
        low, high = (int(end) for end in expert.aminmax())
        if low < 0 or high >= num:
            raise ValueError(f"experts from {low} to {high}, expected 0 to {num - 1}")
    order, starts = sort_slots(expert, num)
    z, y = _room(x, expert, w2, offsets, activation, keep)
    weights = (w1, w2, b1, b2)
    run(x, expert, gates, order, starts, *weights, offsets, activation, z if keep else None, y)
    return y, z, order, starts


@_ffn.register_fake
def _(
    x: Tensor,
    expert: Tensor,
    gates: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    offsets: Sequence[int],
    activation: str,
    keep: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, y = _room(x, expert, w2, offsets, activation, keep)
    return y, z, expert.new_empty(expert.numel()), expert.new_empty(len(offsets))


def _room(
    x: Tensor, expert: Tensor, w2: Tensor, offsets: Sequence[int], activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    most = ACTIVATIONS[activation] * max(high - low for low, high in pairwise(offsets))
    z = x.new_empty((expert.numel(), most) if keep else (0,))
    return z, x.new_empty(len(x), w2.shape[1])


@torch.library.custom_op("gencompress::grouped_ffn_backward", mutates_args=())
def _ffn_backward(
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
    wanted: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    """Gradients by x, gates, w1, w2, b1 and b2; [0] for one not wanted."""
    run = dispatch.pick("grouped_ffn", x.device, backend).backward
    out = _places((x, gates, w1, w2, b1, b2), wanted)
    given = (x, expert, gates, order, starts, z, w1, w2, b1, b2)
    asked = [place if want else None for place, want in zip(out, wanted, strict=True)]
    run(slopes.contiguous(), *given, offsets, activation, asked)
    return out


@_ffn_backward.register_fake
def _(
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
    wanted: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    return _places((x, gates, w1, w2, b1, b2), wanted)


def _places(sources: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor]:
    """Memory for the gradients that are wanted, of tensors that are there."""
    like = next(tensor for tensor in sources if tensor is not None)
    return [
        like.new_empty(0) if source is None or not want else torch.empty_like(source)
        for source, want in zip(sources, wanted, strict=True)
    ]


def _setup_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, expert, gates, w1, w2, b1, b2, ctx.offsets, ctx.activation, _, ctx.backend = inputs
    _, z, order, starts = output
    ctx.set_materialize_grads(False)  # none of z, which nobody uses
    ctx.save_for_backward(x, expert, gates, order, starts, z, w1, w2, b1, b2)


def _backward_ffn(ctx: Any, slopes: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if slopes is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: checkpointing gives them no second time
    b1, b2 = saved[-2:]
    by_x, _, by_gates, by_w1, by_w2, by_b1, by_b2 = ctx.needs_input_grad[:7]
    wanted = [by_x, by_gates, by_w1, by_w2, by_b1 and b1 is not None, by_b2 and b2 is not None]
    found = _ffn_backward(slopes, *saved, ctx.offsets, ctx.activation, wanted, ctx.backend)
    x, *others = (grad if want else None for grad, want in zip(found, wanted, strict=True))
    return (x, None, *others, None, None, None, None)


_ffn.register_autograd(_backward_ffn, setup_context=_setup_ffn)


@register_flop_formula(torch.ops.gencompress.grouped_ffn)
def _flops(
    x: Sequence[int],
    expert: Sequence[int],
    gates: Sequence[int],
    w1: Sequence[int],
    w2: Sequence[int],
    b1: Sequence[int] | None,
    b2: Sequence[int] | None,
    offsets: Sequence[int],
    *_: Any,
    **__: Any,
) -> int:
    """Of slots that spread evenly over the experts; exact for experts of one size."""
    return 2 * math.prod(expert) * (math.prod(w1) + math.prod(w2)) // (len(offsets) - 1)


@torch.library.custom_op("gencompress::grouped_linear", mutates_args=())
def _linear(
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    backend: str | None,
) -> Tensor:
    """`sizes` are N_0, K_0, N_1, K_1, ..."""
    run = dispatch.pick("grouped_ffn", x.device, backend).linear
    if dispatch.looks(starts):
        ends = starts.tolist()
        if ends[0] != 0 or ends[-1] != len(x) or any(low > high for low, high in pairwise(ends)):
            raise ValueError(f"starts {ends}, expected rising from 0 to the {len(x)} rows of x")
    y = x.new_empty(len(x), max(sizes[::2]))
    run(x, starts, weight, bias, sizes, y)
    return y


@_linear.register_fake
def _(
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    backend: str | None,
) -> Tensor:
    return x.new_empty(len(x), max(sizes[::2]))


@torch.library.custom_op("gencompress::grouped_linear_backward", mutates_args=())
def _linear_backward(
    slopes: Tensor,
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    wanted: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    """Gradients by x, weight and bias; [0] for one not wanted."""
    run = dispatch.pick("grouped_ffn", x.device, backend).linear_backward
    out = _places((x, weight, bias), wanted)
    asked = [place if want else None for place, want in zip(out, wanted, strict=True)]
    run(slopes.contiguous(), x, starts, weight, sizes, asked)
    return out


@_linear_backward.register_fake
def _(
    slopes: Tensor,
    x: Tensor,
    starts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    wanted: Sequence[bool],
    backend: str | None,
) -> list[Tensor]:
    return _places((x, weight, bias), wanted)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_linear(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
    by_x, _, by_weight, by_bias = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors
    wanted = [by_x, by_weight, by_bias and saved[3] is not None]
    found = _linear_backward(slopes, *saved, ctx.sizes, wanted, ctx.backend)
    x, weight, bias = (grad if want else None for grad, want in zip(found, wanted, strict=True))
    return x, None, weight, bias, None, None


_linear.register_autograd(_backward_linear, setup_context=_setup_linear)
