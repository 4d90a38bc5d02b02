"""token_merge: rows that leave and come back, attention among them, and gradients."""

import dataclasses

import pytest
import torch
from gencompress_kernels.token_merge import compact_tokens, match_tokens, recover_tokens

OP = "token_merge"


def draw(batch, num, channels, seed=0):
    return torch.randn(batch, num, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(2, 6144), (3, 101)])
def test_compact_then_recover_copies_bits(backend, device, shape):
    height, width = {6144: (64, 96), 101: (1, 101)}[shape[1]]
    x = draw(*shape, 6).to(device)
    match = match_tokens(x, height, width, 0.45, patch=(1, 2), backend=backend)
    compact = compact_tokens(x, match, backend=backend)
    back = recover_tokens(compact, match, backend=backend)
    for sample in range(shape[0]):
        kept = match.kept[sample]
        assert torch.equal(compact[sample], x[sample][kept])
        assert torch.equal(back[sample][kept], x[sample][kept])
        assert torch.equal(back[sample], x[sample][kept[match.source[sample]]])


def attention(query, key, value, bias=None):
    weights = query @ key.mT / query.shape[-1] ** 0.5
    return torch.softmax(weights if bias is None else weights + bias, -1) @ value


def weighted(x, match, backend):
    """Attention among the kept tokens with the logarithm of their counts, then recovery."""
    few = compact_tokens(x, match, backend=backend)
    bias = match.counts.log()[:, None].to(x.dtype)
    return recover_tokens(attention(few, few, few, bias), match, backend=backend)


@pytest.mark.parametrize("recover_from", ["base", "kept"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.7])
def test_counts_make_it_attention_over_copies(backend, device, ratio, recover_from):
    x = draw(2, 17 * 23, 12).to(device)
    match = match_tokens(x, 17, 23, ratio, recover_from=recover_from, backend=backend)
    copies = recover_tokens(compact_tokens(x, match, backend=backend), match, backend=backend)
    expected = attention(copies, copies, copies)
    assert torch.allclose(weighted(x, match, backend), expected, rtol=0, atol=1e-5)


def test_constant_patches_lose_nothing(backend, device):
    """2 x 2 equal tokens: three of four leave, and the result is full self-attention's."""
    cells = draw(2, 8 * 11, 24).view(2, 8, 11, 24)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2).to(device)
    match = match_tokens(x, 16, 22, 0.75, backend=backend)
    assert (match.counts == 4).all()
    assert torch.allclose(weighted(x, match, backend), attention(x, x, x), rtol=0, atol=1e-5)


def test_gradcheck_and_sum_over_copies(backend, device):
    x = draw(2, 5 * 4, 2).double().to(device).requires_grad_()
    weight = draw(1, 2, 2, seed=1)[0].double().to(device)
    match = match_tokens(x, 5, 4, 0.5, backend=backend)
    assert not match.counts.requires_grad

    def run(tokens):
        few = compact_tokens(tokens, match, backend=backend)
        return recover_tokens(few @ weight, match, backend=backend)

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(lambda t: run(t) ** 2, x)
    (slope,) = torch.autograd.grad(run(x).sum(), x)
    expected = torch.zeros_like(slope)
    for sample in range(2):
        expected[sample, match.kept[sample]] = match.counts[sample, :, None].double() * weight.sum(
            1
        )
    assert torch.allclose(slope, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_add_up_in_float32(backend, device, dtype):
    """1,200 copies of one token: sums of bfloat16 would stop growing at 256."""
    x = torch.ones(1, 1200, 2, device=device, dtype=dtype)
    match = match_tokens(x, 30, 40, 0.5, backend=backend)
    source = torch.zeros_like(match.source)
    y = compact_tokens(x, match, backend=backend).requires_grad_()
    piece = dataclasses.replace(match, source=source)
    slopes = torch.full_like(x, 1.0078125)
    recover_tokens(y, piece, backend=backend).backward(slopes)
    assert y.grad.dtype == dtype
    assert torch.equal(y.grad[0, 0], torch.tensor([1.0078125 * 1200] * 2).to(device, dtype))
    assert not y.grad[0, 1:].any()


def test_rows_of_any_shape(backend, device):
    x = draw(2, 24, 5).to(device)
    match = match_tokens(x, 4, 6, 0.5, backend=backend)
    for tokens in (
        torch.arange(48, device=device).view(2, 24),
        x.view(2, 24, 1, 5).expand(-1, -1, 3, -1),
        x[..., :0],
        x[..., 0] > 0,
    ):
        few = compact_tokens(tokens, match, backend=backend)
        back = recover_tokens(few, match, backend=backend)
        assert few.dtype == back.dtype == tokens.dtype and back.shape == tokens.shape
        for sample in range(2):
            kept = match.kept[sample]
            assert torch.equal(few[sample], tokens[sample][kept])
            assert torch.equal(back[sample], tokens[sample][kept[match.source[sample]]])


def test_rows_that_do_not_fit_the_match():
    match = match_tokens(torch.ones(1, 12, 4), 3, 4, 0.5)
    with pytest.raises(ValueError, match=r"x is \(1, 6, 4\) on cpu, expected \(1, 12, ...\)"):
        compact_tokens(torch.zeros(1, 6, 4), match)
    with pytest.raises(ValueError, match=r"y is \(1, 12, 4\) on cpu, expected \(1, 6, ...\)"):
        recover_tokens(torch.zeros(1, 12, 4), match)
    with pytest.raises(ValueError, match=r"y is \(6,\)"):
        recover_tokens(torch.zeros(6), match)
