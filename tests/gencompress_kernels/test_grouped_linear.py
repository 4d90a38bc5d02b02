"""grouped_linear: ragged in rows and columns, against a loop; and the order of slots."""

import pytest
import torch
import torch.nn.functional as F
from gencompress_kernels.grouped_ffn import (
    Linears,
    _linear,
    _linear_backward,
    grouped_linear,
    pack_linears,
    sort_slots,
)

OP = "grouped_ffn"
SIZES = ((7, 5), (3, 9), (4, 0), (0, 4), (12, 9))  # N, K
COUNTS = (4, 0, 2, 3, 1)


def case(dtype=torch.float64, bias=True, device="cpu"):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, k, generator=g, dtype=torch.float64) for n, k in SIZES]
    biases = [torch.randn(n, generator=g, dtype=torch.float64) for n, _ in SIZES] if bias else ()
    x = torch.randn(sum(COUNTS), 10, generator=g, dtype=torch.float64)
    starts = torch.tensor([0, *COUNTS]).cumsum(0)
    packed = pack_linears(
        [w.to(device, dtype) for w in weights], [b.to(device, dtype) for b in biases]
    )
    return x.to(device, dtype), starts.to(device), packed, weights, biases


def looped(x, weights, biases):
    rows = x.split(COUNTS)
    found = []
    for e, (mine, w) in enumerate(zip(rows, weights, strict=True)):
        y = F.linear(mine[:, : w.shape[1]], w, biases[e] if biases else None)
        found.append(F.pad(y, (0, 12 - len(w))))
    return torch.cat(found)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_a_loop(backend, device, dtype, bias):
    if device != "cpu" and dtype == torch.float64:
        pytest.skip("float64 on the CPU only")
    x, starts, packed, weights, biases = case(dtype, bias, device)
    y = grouped_linear(x, starts, packed, backend=backend)
    wanted = looped(x.cpu().double(), weights, biases)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert y.dtype == dtype and torch.allclose(y.cpu().double(), wanted, rtol=0, atol=tolerance)


def test_gradients(backend, device):
    if device != "cpu":
        pytest.skip("float64 on the CPU only")
    x, starts, packed, _, _ = case()

    def run(x, weight, bias):
        return grouped_linear(x, starts, Linears(weight, packed.sizes, bias), backend=backend)

    leaves = [t.clone().requires_grad_() for t in (x, packed.weight, packed.bias)]
    assert torch.autograd.gradcheck(run, leaves)


def test_what_lies_beyond_the_columns_is_not_read(backend, device):
    x, starts, packed, _, _ = case(torch.float32, True, device)
    y = grouped_linear(x, starts, packed, backend=backend)
    ends = starts.tolist()
    for e, (_, k) in enumerate(SIZES):
        x[ends[e] : ends[e + 1], k:] = torch.nan
    assert torch.equal(y, grouped_linear(x, starts, packed, backend=backend))
    x.requires_grad_()
    grouped_linear(x, starts, packed, backend=backend).sum().backward()
    assert x.grad.isfinite().all() and not x.grad[:4, 5:].any() and x.grad[:4, :5].all()


def test_sorted_slots(backend, device):
    """Stable, also of experts that nobody chose."""
    expert = torch.tensor([[3, 0], [1, 3], [3, 1]], device=device)
    order, starts = sort_slots(expert, 5)
    assert order.tolist() == [1, 2, 5, 0, 3, 4] and starts.tolist() == [0, 1, 3, 3, 6, 6]
    order, starts = sort_slots(expert[:0], 2)
    assert order.tolist() == [] and starts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(10, 8)), r"expected \[P, 9 or more\]"),
        (dict(x=torch.zeros(10, 10).double()), "weight is torch.float32, expected torch.float64"),
        (dict(starts=torch.tensor([0, 10])), r"starts are torch.int64 \(2,\), expected int64 \(6,"),
        (dict(starts=torch.tensor([0, 1, 2, 3, 4, 9])), "expected rising from 0 to the 10 rows"),
        (dict(starts=torch.tensor([0, 5, 4, 6, 8, 10])), "expected rising"),
        (dict(starts=torch.tensor([1, 5, 5, 6, 8, 10])), "expected rising"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    x, starts, packed, _, _ = case(torch.float32)
    with pytest.raises(ValueError, match=message):
        grouped_linear(**dict(x=x, starts=starts) | changes, linears=packed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sizes=()), r"sizes \(\), expected at least one pair"),
        (dict(sizes=((-2, -3),)), "of 0 or more"),
        (dict(weight=torch.zeros(5)), r"weight of shape \(5,\), expected \(6,\)"),
        (dict(bias=torch.zeros(3)), r"bias of shape \(3,\), expected \(2,\)"),
    ],
)
def test_linears_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        Linears(**dict(weight=torch.zeros(6), sizes=((2, 3),)) | changes)


def test_packing_refuses():
    with pytest.raises(ValueError, match="0 weights, expected at least one"):
        pack_linears([])
    with pytest.raises(ValueError, match="biases of 1 of 2 layers, expected all or none"):
        pack_linears([torch.zeros(2, 3)] * 2, [torch.zeros(2), None])


def test_registered_op(backend, device):
    x, starts, packed, _, _ = case(torch.float32, True, device)
    sizes = [side for size in SIZES for side in size]
    for bias in (None, packed.bias):
        leaves = [t if t is None else t.clone().requires_grad_() for t in (packed.weight, bias)]
        given = (x.clone().requires_grad_(), starts, *leaves, sizes, backend)
        torch.library.opcheck(_linear, given)
    slopes, wanted = x.new_ones(len(x), 12), [True, False, True]
    given = (slopes, x, starts, packed.weight, packed.bias, sizes, wanted, backend)
    torch.library.opcheck(_linear_backward, given)
