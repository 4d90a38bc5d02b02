"""grouped_ffn: against token by token loops in float64, and the corners of routing."""

import pytest
import torch
import torch.nn.functional as F
from gencompress_kernels import dispatch
from gencompress_kernels.grouped_ffn import (
    ACTIVATIONS,
    Experts,
    _ffn,
    _ffn_backward,
    grouped_ffn,
    pack_experts,
    route_topk,
)
from numerics import assert_as_accurate

CHANNELS, OUT = 20, 12
NAMES = ("x", "gates", "w1", "w2", "b1", "b2")


def layers(widths, activation, seed=0, bias=True):
    """(w1, b1, w2, b2) of torch's Linears in float64, entries of the size training starts with."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = ACTIVATIONS[activation]
    return [
        (
            draw(rows * width, CHANNELS) / CHANNELS**0.5,
            draw(rows * width) if bias else None,
            draw(OUT, width) / max(width, 1) ** 0.5,
            draw(OUT) if bias else None,
        )
        for width in widths
    ]


def tokens(count, num, k, seed=0):
    """x, different experts a token and gates, in float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, generator=g, dtype=torch.float64)
    expert = torch.rand(count, num, generator=g).argsort(1)[:, :k]
    return x, expert, torch.rand(count, k, generator=g, dtype=torch.float64) + 0.2


def slopes_of(count):
    """float64 [count, OUT]: the gradient that comes in."""
    made = torch.Generator().manual_seed(2)
    return torch.randn(count, OUT, generator=made, dtype=torch.float64)


def feed_forward(activation, x, w1, b1, w2, b2):
    """One token through one expert, as diffusers' FeedForward computes it."""
    inner = F.linear(x, w1, b1)
    if activation == "gelu":
        inner = F.gelu(inner)
    elif activation == "gelu-approximate":
        inner = F.gelu(inner, approximate="tanh")
    else:
        values, gates = inner.chunk(2)
        inner = values * (F.gelu(gates) if activation == "geglu" else F.silu(gates))
    return F.linear(inner, w2, b2)


def brute(x, expert, gates, weights, activation):
    rows = []
    for token, chosen, scale in zip(x, expert.tolist(), gates, strict=True):
        pairs = zip(chosen, scale, strict=True)
        found = [s * feed_forward(activation, token, *weights[e]) for e, s in pairs]
        rows.append(sum(found, x.new_zeros(OUT)))
    return torch.stack(rows) if rows else x.new_zeros(0, OUT)


def brute_gradients(x, expert, gates, weights, activation, slopes):
    """By `NAMES`, weights packed."""
    leaves = [x, gates, *(t for layer in weights for t in layer if t is not None)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    rest = iter(leaves[2:])
    again = [tuple(t if t is None else next(rest) for t in layer) for layer in weights]
    packed = pack_experts(again, activation)
    loss = (brute(leaves[0], expert, leaves[1], again, activation) * slopes).sum()
    loss = loss + 0 * leaves[0].sum()  # has a gradient where there are no tokens too
    found = torch.autograd.grad(loss, leaves, materialize_grads=True)
    rest = iter(found[2:])
    split = [tuple(t if t is None else next(rest) for t in layer) for layer in weights]
    split = pack_experts(split, activation)
    assert packed.offsets == split.offsets
    return found[0], found[1], split.w1, split.w2, split.b1, split.b2


def run(x, expert, gates, experts, slopes, backend, dtype=torch.float64, device="cpu"):
    """y and gradients by `NAMES`; gates stay in float32 for half precisions."""
    wide = torch.promote_types(dtype, torch.float32)
    sources = (x, gates, experts.w1, experts.w2, experts.b1, experts.b2)
    types = (dtype, wide, dtype, dtype, dtype, dtype)
    leaves = [
        None if t is None else t.detach().to(device, kind).requires_grad_()
        for t, kind in zip(sources, types, strict=True)
    ]
    x, gates, w1, w2, b1, b2 = leaves
    own = Experts(w1, w2, experts.offsets, experts.activation, b1, b2)
    y = grouped_ffn(x, expert.to(device), gates, own, backend=backend)
    asked = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, asked, slopes.to(device, dtype), materialize_grads=True))
    return y.detach(), *(None if leaf is None else next(grads) for leaf in leaves)


CASES = {
    "ragged": ((40, 7, 0, 33, 1), 2, 50),
    "one token": ((9, 16), 1, 1),
    "all experts": ((8, 24, 5), 3, 33),
    "one expert": ((31,), 1, 40),
    "none chosen": ((8, 8), 0, 6),
    "no tokens": ((8, 3), 2, 0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("case", "bias"), [*((case, True) for case in CASES), ("ragged", False)])
def test_equals_a_loop_over_tokens(backend, device, case, activation, bias):
    """float64 where the backend has it, else at most twice the error of float32's loop."""
    widths, k, count = CASES[case]
    weights = layers(widths, activation, bias=bias)
    x, expert, gates = tokens(count, len(widths), k)
    slopes = slopes_of(count)
    exact = brute(x, expert, gates, weights, activation)
    exact = exact, *brute_gradients(x, expert, gates, weights, activation, slopes)
    packed = pack_experts(weights, activation)
    if device == "cpu":
        found = run(x, expert, gates, packed, slopes, backend)
        for name, got, wanted in zip(("y", *NAMES), found, exact, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or torch.allclose(got, wanted, rtol=1e-11, atol=1e-11), name
    single = [tuple(t if t is None else t.float() for t in layer) for layer in weights]
    plain = brute(x.float(), expert, gates.float(), single, activation)
    plain = (
        plain,
        *brute_gradients(x.float(), expert, gates.float(), single, activation, slopes.float()),
    )
    found = run(x, expert, gates, packed, slopes, backend, torch.float32, device)
    for name, got, loop, wanted in zip(("y", *NAMES), found, plain, exact, strict=True):
        if got is not None:
            size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
            assert_as_accurate(got, loop, wanted, floor=2e-6 * size, name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_half_precision(backend, device, activation):
    """Rounded to bfloat16 at each product: 2% of the largest value."""
    weights = [
        tuple(t.bfloat16().double() for t in layer) for layer in layers((64, 33, 80), activation)
    ]
    x, expert, gates = tokens(70, 3, 2)
    x, slopes = x.bfloat16().double(), slopes_of(70).bfloat16().double()
    exact = brute(x, expert, gates, weights, activation)
    exact = exact, *brute_gradients(x, expert, gates, weights, activation, slopes)
    packed = pack_experts(weights, activation)
    found = run(x, expert, gates, packed, slopes, backend, torch.bfloat16, device)
    assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
    for name, got, wanted in zip(("y", *NAMES), found, exact, strict=True):
        error = (got.cpu().double() - wanted).abs().max() / wanted.abs().max()
        assert error < 0.02, f"{name}: {error}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, device, activation):
    if device != "cpu":
        pytest.skip("float64 on the CPU only")
    packed = pack_experts(layers((3, 0, 2), activation), activation)
    x, expert, gates = tokens(4, 3, 2)

    def run_all(x, gates, w1, w2, b1, b2):
        own = Experts(w1, w2, packed.offsets, activation, b1, b2)
        return grouped_ffn(x, expert, gates, own, backend=backend)

    leaves = (x, gates, packed.w1, packed.w2, packed.b1, packed.b2)
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(run_all, leaves, fast_mode=True)


def test_the_same_expert_twice(backend, device):
    """Its result counts with the sum of both gates."""
    packed = on(pack_experts(layers((5, 6), "gelu"), "gelu"), device)
    x, _, gates = tokens(7, 2, 2)
    x, gates = x.float().to(device), gates.float().to(device)
    twice = torch.ones(7, 2, dtype=torch.int64, device=device)
    found = grouped_ffn(x, twice, gates, packed, backend=backend)
    once = grouped_ffn(x, twice[:, :1], gates.sum(1, keepdim=True), packed, backend=backend)
    assert torch.allclose(found, once, rtol=1e-5, atol=1e-6)


def on(packed, device, dtype=torch.float32):
    moved = [
        t if t is None else t.to(device, dtype)
        for t in (packed.w1, packed.w2, packed.b1, packed.b2)
    ]
    return Experts(*moved[:2], packed.offsets, packed.activation, *moved[2:])


def test_unused_experts_get_exactly_nothing(backend, device):
    """Their weights may be anything, infinities included, where only chosen ones are read."""
    packed = pack_experts(layers((6, 9, 4), "geglu"), "geglu")
    x, _, gates = tokens(11, 3, 1)
    expert = torch.tensor([0, 2] * 5 + [2])[:, None]
    slopes = slopes_of(11)
    found = run(x, expert, gates, packed, slopes, backend, torch.float32, device)
    low, high = packed.offsets[1:3]
    assert not found[3][2 * low : 2 * high].any() and not found[4][low:high].any()
    assert not found[5][2 * low : 2 * high].any() and not found[6][1].any()
    assert found[3][: 2 * low].any() and found[4][high:].any()
    if backend != "reference":
        broken = on(packed, device)
        broken.w1[2 * low : 2 * high] = torch.inf
        y = grouped_ffn(
            x.float().to(device), expert.to(device), gates.float().to(device), broken,
            backend=backend,
        )  # fmt: skip
        assert y.isfinite().all()


def test_dense_is_all_experts(backend, device):
    """Neurons dealt out to experts in any order, all chosen with gates of 1: the dense layer."""
    ((w1, b1, w2, _),) = layers((48,), "gelu-approximate")
    dealt = torch.randperm(48, generator=torch.Generator().manual_seed(1)).split([20, 4, 24])
    split = [(w1[own], b1[own], w2[:, own], None) for own in dealt]
    packed = pack_experts(split, "gelu-approximate")
    x = tokens(37, 1, 1)[0]
    expert = torch.arange(3).expand(37, 3)
    dtype = torch.float64 if device == "cpu" else torch.float32
    y = grouped_ffn(
        x.to(device, dtype), expert.to(device), torch.ones(37, 3, dtype=dtype, device=device),
        on(packed, device, dtype), backend=backend,
    )  # fmt: skip
    dense = F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2)
    assert torch.allclose(y.cpu().double(), dense, rtol=0, atol=1e-12 if device == "cpu" else 1e-5)


def test_the_same_bits_again_and_batch_mates(backend, device):
    """The same call gives the same bits; other tokens change at most the rounding."""
    packed = on(pack_experts(layers((64, 40, 90, 10), "swiglu"), "swiglu"), device)
    x, expert, gates = tokens(300, 4, 2)
    x, expert, gates = x.float().to(device), expert.to(device), gates.float().to(device)
    y = grouped_ffn(x, expert, gates, packed, backend=backend)
    assert torch.equal(y, grouped_ffn(x, expert, gates, packed, backend=backend))
    for few in (slice(0, 1), slice(17, 60)):
        alone = grouped_ffn(x[few], expert[few], gates[few], packed, backend=backend)
        assert torch.allclose(alone, y[few], rtol=0, atol=2e-6)
    slopes = slopes_of(300)
    given = (x, expert, gates, packed, slopes, backend, torch.float32, device)
    assert all(torch.equal(a, b) for a, b in zip(run(*given), run(*given), strict=True))


def test_strided_inputs_are_only_read(backend, device):
    packed = on(pack_experts(layers((5, 8), "gelu"), "gelu"), device)
    x, expert, gates = tokens(9, 2, 2)
    odd = [t.to(device).T.contiguous().T for t in (x.float(), expert, gates.float())]
    before = [t.clone() for t in odd]
    turned = Experts(
        packed.w1.T.contiguous().T, packed.w2.T.contiguous().T, packed.offsets, "gelu",
        packed.b1, packed.b2,
    )  # fmt: skip
    assert not odd[0].is_contiguous() and not turned.w1.is_contiguous()
    y = grouped_ffn(*odd, turned, backend=backend)
    plain = [t.contiguous() for t in odd]
    assert torch.equal(y, grouped_ffn(*plain, packed, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(odd, before, strict=True))


def test_only_what_is_asked_for(backend, device):
    """Gradients by gates alone, as with frozen experts; none kept without."""
    packed = on(pack_experts(layers((5, 8), "gelu"), "gelu"), device)
    x, expert, gates = tokens(9, 2, 2)
    x, expert, gates = x.float().to(device), expert.to(device), gates.float().to(device)
    wanted = run(x, expert, gates, packed, torch.ones(9, OUT), backend, torch.float32, device)[2]
    gates.requires_grad_()
    grouped_ffn(x, expert, gates, packed, backend=backend).sum().backward()
    assert torch.allclose(gates.grad, wanted, rtol=1e-5, atol=1e-6)
    assert packed.w1.grad is None and x.grad is None


def test_autocast(backend, device):
    """Weights in float32 compute in the half precision of torch.autocast, gates do not."""
    packed = on(pack_experts(layers((5, 8), "gelu"), "gelu"), device)
    x, expert, gates = tokens(9, 2, 2)
    x, expert, gates = x.float().to(device), expert.to(device), gates.float().to(device)
    packed.w1.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = grouped_ffn(x, expert, gates, packed, backend=backend)
    half = on(packed, device, torch.bfloat16)
    assert torch.equal(y, grouped_ffn(x.bfloat16(), expert, gates, half, backend=backend))
    y.sum().backward()
    assert packed.w1.grad.dtype == torch.float32 and packed.w1.grad.any()


def test_topk_by_brute_force_with_ties():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (200, 12), generator=g) / 2
    scores[0], scores[1] = 0, -torch.inf
    for k in (0, 1, 2, 5, 12):
        found = route_topk(scores, k)
        for row, got in zip(scores.tolist(), found.tolist(), strict=True):
            assert got == sorted(range(12), key=lambda i, row=row: (-row[i], i))[:k]
        assert torch.equal(found[50:51], route_topk(scores[50:51], k))
    assert route_topk(torch.zeros(0, 3), 2).shape == (0, 2)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (torch.zeros(3), 1, "expected floats"),
        (torch.zeros(2, 3).long(), 1, "scores are torch.int64"),
        (torch.zeros(2, 3), 4, "k 4 of 3 scores, expected 0 to 3"),
        (torch.zeros(2, 3), -1, "k -1"),
    ],
)
def test_topk_refuses(scores, k, message):
    with pytest.raises(ValueError, match=message):
        route_topk(scores, k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.zeros(3, 4)), r"expected floats \[T, 20\]"),
        (dict(x=torch.zeros(3, 20).double()), "w1 is torch.float32, expected torch.float64 like x"),
        (dict(expert=torch.zeros(2, 2).long()), r"expected int64 \[3, k\]"),
        (dict(expert=torch.zeros(3, 2)), "expert is torch.float32"),
        (dict(expert=torch.full((3, 2), 5)), "experts from 5 to 5, expected 0 to 1"),
        (dict(expert=torch.full((3, 2), -1)), "experts from -1 to -1"),
        (dict(gates=torch.zeros(3, 1)), r"gates are torch.float32 \(3, 1\), expected floats"),
        (dict(gates=torch.zeros(3, 2).long()), "gates are torch.int64"),
    ],
)
def test_bad_input_is_one_clear_error(changes, message):
    arguments = dict(x=torch.zeros(3, 20), expert=torch.zeros(3, 2).long(), gates=torch.ones(3, 2))
    experts = on(pack_experts(layers((4, 5), "gelu"), "gelu"), "cpu")
    with pytest.raises(ValueError, match=message):
        grouped_ffn(**arguments | changes, experts=experts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(activation="relu"),
            "unknown activation 'relu'; known: gelu, gelu-approximate, geglu",
        ),
        (dict(w1=torch.zeros(9)), r"weights of shapes \(9,\) and \(9, 6\)"),
        (dict(offsets=(0, 4)), "rising from 0 to the 9 rows of w2"),
        (dict(offsets=(1, 4, 9)), "rising from 0"),
        (dict(offsets=(0, 10, 9)), "rising from 0"),
        (dict(offsets=(0,)), "one more than experts"),
        (dict(offsets=()), "one more than experts"),
        (dict(activation="geglu"), r"w1 of shape \(9, 5\), expected \(18, 5\): 2 experts of 9"),
        (dict(b1=torch.zeros(8)), r"b1 of shape \(8,\), expected \(9,\)"),
        (dict(b2=torch.zeros(6)), r"b2 of shape \(6,\), expected \(2, 6\)"),
    ],
)
def test_experts_that_do_not_fit(changes, message):
    arguments = dict(
        w1=torch.zeros(9, 5), w2=torch.zeros(9, 6), offsets=(0, 4, 9), activation="gelu"
    )
    assert len(Experts(**arguments)) == 2
    with pytest.raises(ValueError, match=message):
        Experts(**arguments | changes)


def test_packing_refuses():
    one, two = layers((4, 5), "gelu")
    with pytest.raises(ValueError, match="no experts to pack"):
        pack_experts([], "gelu")
    with pytest.raises(ValueError, match="b1 of 1 of 2 layers, expected all or none"):
        pack_experts([one, (two[0], None, *two[2:])], "gelu")
    with pytest.raises(ValueError, match=r"\[4, 5\] rows of first for \[4, 5\] columns"):
        pack_experts([one, two], "geglu")


def test_registered_op(backend, device):
    packed = on(pack_experts(layers((5, 0, 3), "geglu"), "geglu"), device)
    x, expert, gates = tokens(6, 3, 2)
    x, expert, gates = x.float().to(device), expert.to(device), gates.float().to(device)
    weights = (packed.w1, packed.w2, packed.b1, packed.b2)
    options = (packed.offsets, "geglu", True, backend)
    traced = [t.clone().requires_grad_() for t in (x, gates, *weights)]
    torch.library.opcheck(_ffn, (traced[0], expert, *traced[1:], *options))
    torch.library.opcheck(_ffn, (x, expert, gates, packed.w1, packed.w2, None, None, *options))
    _, z, order, starts = _ffn(x, expert, gates, *weights, *options)
    wanted = [True, True, False, True, True, False]
    torch.library.opcheck(
        _ffn_backward,
        (x.new_ones(6, OUT), x, expert, gates, order, starts, z, *weights, *options[:2], wanted,
         backend),
    )  # fmt: skip
    assert dispatch.last()["grouped_ffn"] == backend


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    weights = pack_experts(layers((8, 8, 8), "geglu"), "geglu")
    x, expert, gates = tokens(10, 3, 2)
    with FlopCounterMode(display=False) as counter, dispatch.use_backend("reference"):
        grouped_ffn(x, expert, gates, weights)
    # 20 slots: two halves of 8 neurons from 20 channels, and 8 to 12
    assert counter.get_total_flops() == 2 * 20 * (2 * 8 * CHANNELS + 8 * OUT)
