"""token_merge: tokens that look like others are left out, and get the others' results back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gencompress_kernels import dispatch

SOURCES = ("base", "kept")


@dataclass(frozen=True)
class Match:
    """Which K of N tokens are kept, and which of them stands for each token; per sample."""

    kept: Tensor  # int64 [B, K], ascending
    source: Tensor  # int64 [B, N], positions in 0..K-1; a kept token's is its own
    counts: Tensor  # float32 [B, K], tokens that each kept one stands for, itself among them


def match_tokens(
    x: Tensor,
    height: int,
    width: int,
    ratio: float,
    *,
    patch: tuple[int, int] = (2, 2),
    noise: Tensor | None = None,
    alpha: float = 0.1,
    relative: bool = True,
    recover_from: str = "base",
    backend: str | None = None,
) -> Match:
    """The floor(ratio * N) tokens most similar to others, and the one each of them copies (SiTo,
    AAAI 2025; the three steps of OptiPrune, arXiv 2507.00789).

    Similarity is the cosine. In every full patch of the grid, the token that is on average the most
    similar to all is the base; rows and columns that fill no patch have none. Of the other tokens,
    those whose most similar base is the closest are left out.

    Equal values go to the lower token. Samples do not depend on each other.

    Args:
        x: floating [B, N, C], N = height * width in rows. Half precisions are computed in float32;
            float64 in float32 too, except by `reference`. A token of zeros resembles none. Not
            checked: with values that are not finite the choice is arbitrary, the indices valid.
        ratio: 0 <= ratio < 1. At most all tokens but the bases are left out: 0.75 for 2 x 2.
        patch: rows and columns of a patch.
        noise: [B, N], standard normal: without it, the same tokens are left out at every step.
        alpha: `alpha * noise` is added before the bases are chosen, in units of the standard
            deviation within a patch (root mean square over the patches of the sample).
        relative: False for the numbers of SiTo's code: sums instead of averages of similarity, and
            noise in the units of those sums.
        recover_from: a token copies its most similar "base", or of all that are "kept".

    Returns:
        A `Match` with K = N - floor(ratio * N), known from the arguments. No gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the ratio is beyond the maximum.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(x, noise, height, width, patch, recover_from)
    removed = _num_removed(ratio, height, width, patch)
    x = x.detach()
    if x.dtype != torch.float64:
        x = x.float()
    if noise is not None:
        noise = noise.detach().to(x.dtype).contiguous()
    any_kept = recover_from == "kept"
    sizes = (height, width, *patch, removed)
    kept, source, counts = _match(
        x.contiguous(), noise, *sizes, float(alpha), relative, any_kept, backend
    )
    return Match(kept, source, counts)


def compact_tokens(x: Tensor, match: Match, *, backend: str | None = None) -> Tensor:
    """[B, K, ...]: the kept tokens of x [B, N, ...], in order; any dtype. Differentiable.

    Raises ValueError where shapes or devices do not fit.
    """
    _check_rows("x", x, match.source)
    rows: Tensor = _rows(x, match.kept, backend)
    return rows


def recover_tokens(y: Tensor, match: Match, *, backend: str | None = None) -> Tensor:
    """[B, N, ...]: each token's row of y [B, K, ...], its own or the one it copies; any dtype.

    Differentiable: a kept token's gradient is the sum over its copies, of half precisions added up
    in float32; always the same bits. Raises ValueError where shapes or devices do not fit.
    """
    _check_rows("y", y, match.kept)
    rows: Tensor = _rows(y, match.source, backend)
    return rows


def _check(
    x: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    patch: tuple[int, int],
    recover_from: str,
) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected floating [B, N, C]")
    if min(height, width) < 1 or height * width != x.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens for a grid of {height} x {width}")
    if min(patch) < 1:
        raise ValueError(f"patch of {patch[0]} x {patch[1]}, expected 1 or more")
    if recover_from not in SOURCES:
        raise ValueError(f"recover_from {recover_from!r}, expected one of {', '.join(SOURCES)}")
    if noise is None:
        return
    fits = noise.is_floating_point() and noise.device == x.device
    if noise.shape != x.shape[:2] or not fits:
        raise ValueError(
            f"noise is {noise.dtype} {tuple(noise.shape)} on {noise.device}, expected floating "
            f"{tuple(x.shape[:2])} on {x.device} like x"
        )


def _num_removed(ratio: float, height: int, width: int, patch: tuple[int, int]) -> int:
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio {ratio}, expected 0 <= ratio < 1")
    num = height * width
    bases = (height // patch[0]) * (width // patch[1])
    removed, most = math.floor(ratio * num), num - bases if bases else 0
    if removed > most:
        raise ValueError(
            f"ratio {ratio} leaves out {removed} of {num} tokens, expected at most {most}: one "
            f"stays in each of {bases} patches of {patch[0]} x {patch[1]}"
        )
    return removed


def _check_rows(name: str, tokens: Tensor, like: Tensor) -> None:
    if tokens.ndim < 2 or tokens.shape[:2] != like.shape or tokens.device != like.device:
        raise ValueError(
            f"{name} is {tuple(tokens.shape)} on {tokens.device}, expected "
            f"({like.shape[0]}, {like.shape[1]}, ...) on {like.device} like the match"
        )


@torch.library.custom_op("gencompress::match_tokens", mutates_args=())
def _match(
    x: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    rows: int,
    columns: int,
    removed: int,
    alpha: float,
    relative: bool,
    any_kept: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """kept, source and counts."""
    run = dispatch.pick("token_merge", x.device, backend).match
    batch, num = x.shape[:2]
    everyone = torch.arange(num, device=x.device).repeat(batch, 1)
    if not removed or not batch:
        kept = everyone[:, : num - removed].clone()
        return kept, everyone, torch.ones_like(kept, dtype=torch.float32)
    kept, source = everyone.new_empty(batch, num - removed), torch.empty_like(everyone)
    counts = torch.empty_like(kept, dtype=torch.float32)
    options = (height, width, rows, columns, alpha, relative, any_kept)
    run(x, noise, *options, kept, source, counts)
    return kept, source, counts


@_match.register_fake
def _(
    x: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    rows: int,
    columns: int,
    removed: int,
    alpha: float,
    relative: bool,
    any_kept: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num = x.shape[:2]
    kept = x.new_empty((batch, num - removed), dtype=torch.int64)
    source = x.new_empty((batch, num), dtype=torch.int64)
    return kept, source, torch.empty_like(kept, dtype=torch.float32)


# The two are each other's gradient.
@torch.library.custom_op("gencompress::token_rows", mutates_args=())
def _rows(tokens: Tensor, index: Tensor, backend: str | None) -> Tensor:
    """tokens [B, M, ...] at index [B, R], within 0..M-1."""
    run = dispatch.pick("token_merge", tokens.device, backend).gather
    out = tokens.new_empty((*index.shape, *tokens.shape[2:]))
    run(tokens.contiguous(), index.contiguous(), out)
    return out


@_rows.register_fake
def _(tokens: Tensor, index: Tensor, backend: str | None) -> Tensor:
    return tokens.new_empty((*index.shape, *tokens.shape[2:]))


@torch.library.custom_op("gencompress::token_sums", mutates_args=())
def _sums(copies: Tensor, index: Tensor, num: int, backend: str | None) -> Tensor:
    """[B, num, ...]: sums of the rows of copies [B, R, ...] that share an index [B, R]."""
    run = dispatch.pick("token_merge", copies.device, backend).add
    wide = copies.float() if copies.dtype in (torch.float16, torch.bfloat16) else copies
    out = wide.new_zeros((copies.shape[0], num, *copies.shape[2:]))
    run(wide.contiguous(), index.contiguous(), out)
    return out.to(copies.dtype)


@_sums.register_fake
def _(copies: Tensor, index: Tensor, num: int, backend: str | None) -> Tensor:
    return copies.new_empty((copies.shape[0], num, *copies.shape[2:]))


def _setup_rows(ctx: Any, inputs: tuple[Tensor, Tensor, str | None], output: Tensor) -> None:
    tokens, index, ctx.backend = inputs
    ctx.num = tokens.shape[1]
    ctx.save_for_backward(index)


def _backward_rows(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None]:
    return _sums(slopes, ctx.saved_tensors[0], ctx.num, ctx.backend), None, None


def _setup_sums(ctx: Any, inputs: tuple[Tensor, Tensor, int, str | None], output: Tensor) -> None:
    _, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _backward_sums(ctx: Any, slopes: Tensor) -> tuple[Tensor, None, None, None]:
    return _rows(slopes, ctx.saved_tensors[0], ctx.backend), None, None, None


_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
_sums.register_autograd(_backward_sums, setup_context=_setup_sums)


@register_flop_formula(torch.ops.gencompress.match_tokens)
def _matching(
    x: Sequence[int], noise: Any, height: int, width: int, rows: int, columns: int, removed: int,
    alpha: float, relative: bool, any_kept: bool, *_: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """Twice the products: each token with the mean and with every base, or with all kept."""
    batch, tokens, channels = x
    bases = (height // rows) * (width // columns)
    pairs = tokens + (tokens - bases) * bases
    pairs += removed * (tokens - removed) if any_kept else 0
    return 2 * batch * channels * pairs if removed else 0


@register_flop_formula(torch.ops.gencompress.token_rows)
def _gathering(*_: Any, out_shape: Any = None) -> int:
    return 0
