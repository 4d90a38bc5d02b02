"""Mixtures in Triton's interpreter: values and gradients of tiny inputs equal the reference's."""

import pytest
import torch
from gencompress_kernels.grouped_ffn import (
    ACTIVATIONS,
    Experts,
    Linears,
    grouped_ffn,
    grouped_linear,
    sort_slots,
)

pytestmark = pytest.mark.usefixtures("interpreted")
BOTH = ("triton", "reference")
ROUTES = {  # neurons of each expert, experts a token, tokens
    "ragged": ((20, 7, 0, 70), 2, 40),
    "one expert for all": ((9, 5), 1, 70),
    "all experts": ((8, 3), 2, 5),
    "no neurons": ((0, 0), 1, 3),
    "none chosen": ((8, 8), 0, 4),
    "no tokens": ((8, 3), 2, 0),
    "multiples of 16": ((16, 32), 1, 20),
}


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mixture(g, case, activation, dtype):
    """Leaves x, gates, w1, w2, b1, b2; experts; offsets; slopes."""
    (widths, k, count), rows = ROUTES[case], ACTIVATIONS[activation]
    channels, out = (48, 16) if case == "multiples of 16" else (37, 12)
    neurons = sum(widths)
    shapes = (
        (count, channels), (count, k), (rows * neurons, channels), (neurons, out),
        (rows * neurons,), (len(widths), out),
    )  # fmt: skip
    leaves = [torch.randn(shape, generator=g) for shape in shapes]
    leaves = [t.to(torch.float32 if i == 1 else dtype) for i, t in enumerate(leaves)]
    expert = torch.rand(count, len(widths), generator=g).argsort(1)[:, :k]
    if case == "one expert for all":
        expert = torch.ones_like(expert)
    offsets = tuple(torch.tensor([0, *widths]).cumsum(0).tolist())
    return leaves, expert, offsets, torch.randn(count, out, generator=g).to(dtype)


@pytest.mark.parametrize(
    ("case", "activation", "dtype", "bias"),
    [
        *(("ragged", activation, torch.float32, True) for activation in ACTIVATIONS),
        *((case, "geglu", torch.float32, True) for case in ROUTES if case != "ragged"),
        ("ragged", "swiglu", torch.float32, False),
        ("ragged", "geglu", torch.float64, True),
        ("ragged", "gelu-approximate", torch.bfloat16, True),
    ],
)
def test_grouped_ffn(g, case, activation, dtype, bias):
    made, expert, offsets, slopes = mixture(g, case, activation, dtype)

    def run(backend):
        x, gates, w1, w2, b1, b2 = (t.clone().requires_grad_() for t in made)
        shifts = (b1, b2) if bias else (None, None)
        experts = Experts(w1, w2, offsets, activation, *shifts)
        y = grouped_ffn(x, expert, gates, experts, backend=backend)
        leaves = [x, gates, w1, w2, *(shifts if bias else ())]
        return [y.detach(), *torch.autograd.grad(y, leaves, slopes, materialize_grads=True)]

    # of sums of up to 70 terms; in bfloat16 each product is rounded to 8 bits
    share = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]
    for found, expected in zip(*map(run, BOTH), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(found, expected, rtol=0, atol=share * size)


def test_alone_again_and_for_some_leaves(g):
    """A token's bits do not depend on the others; strides; gates alone have a gradient."""
    made, expert, offsets, slopes = mixture(g, "ragged", "swiglu", torch.float32)
    x, gates, *weights = made
    w1, w2 = weights[0].T.contiguous().T, weights[1].T.contiguous().T
    assert not w1.is_contiguous() and not w2.is_contiguous()
    experts = Experts(w1, w2, offsets, "swiglu", *weights[2:])
    y = grouped_ffn(x, expert, gates, experts, backend="triton")
    alone = grouped_ffn(x[7:9], expert[7:9], gates[7:9], experts, backend="triton")
    assert torch.equal(alone, y[7:9])
    leaf = gates.clone().requires_grad_()
    wanted, found, again = (
        torch.autograd.grad(grouped_ffn(x, expert, leaf, experts, backend=name), leaf, slopes)[0]
        for name in ("reference", "triton", "triton")
    )
    size = float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * size)
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_linear(g, dtype):
    sizes, counts = ((7, 5), (3, 9), (4, 0), (0, 4), (70, 39)), (4, 0, 2, 3, 70)
    weight, bias = sum(n * k for n, k in sizes), sum(n for n, _ in sizes)
    x, weight, bias = (
        torch.randn(shape, generator=g).to(dtype) for shape in ((sum(counts), 40), weight, bias)
    )
    starts = torch.tensor([0, *counts]).cumsum(0)
    for e, (_, k) in enumerate(sizes):
        x[starts[e] : starts[e + 1], k:] = torch.nan  # is not read
    slopes = torch.randn(sum(counts), 70, generator=g).to(dtype)

    def run(backend):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = grouped_linear(leaves[0], starts, Linears(leaves[1], sizes, leaves[2]), backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, slopes)]

    for found, expected in zip(*map(run, BOTH), strict=True):
        atol = (2e-6 if dtype == torch.float32 else 1e-13) * max(1, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_the_host_reads_nothing(g, monkeypatch):
    """With kernels left out: nothing that is read from a tensor decides what is launched."""
    from gencompress_kernels.grouped_ffn import triton_ops

    made, expert, offsets, slopes = mixture(g, "ragged", "geglu", torch.float32)
    x, gates, w1, w2, b1, b2 = made
    launched = []
    monkeypatch.setattr(triton_ops, "launch", lambda kernel, *_, **__: launched.append(kernel))
    order, starts = sort_slots(expert, 4)
    z, y = x.new_empty(len(order), 140), x.new_empty(len(x), 12)
    weights, kind = (w1, w2, b1, b2), (offsets, "geglu")
    sizes = [20, 37, 7, 37, 3, 37, 70, 37]
    weight, out = x.new_empty(100 * 37), x.new_empty(len(order), 70)
    left, bias = x.new_empty(len(order), 37), x.new_empty(100)

    def refuse(self, *_, **__):
        raise AssertionError("the host reads a tensor")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    triton_ops.forward(x, expert, gates, order, starts, *weights, *kind, z, y)
    triton_ops.backward(slopes, x, expert, gates, order, starts, z, *weights, *kind, made)
    triton_ops.linear(left, starts, weight, bias, sizes, out)
    triton_ops.linear_backward(out, left, starts, weight, sizes, (left, weight, bias))
    assert len(launched) == 9
