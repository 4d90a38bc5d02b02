"""Matching, gathering and adding tokens in readable torch: the definition of correct.

All shapes follow from the arguments, so nothing waits for a GPU. The similarities of at most
`BLOCK` tokens to all candidates exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 1024


def match(
    x: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    rows: int,
    columns: int,
    alpha: float,
    relative: bool,
    any_kept: bool,
    kept: Tensor,
    source: Tensor,
    counts: Tensor,
    most_similar: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Fills the last three from x [B, N, C] in float32 or float64; at least one is left out.

    Another backend may bring its own `most_similar`.
    """
    nearest_of = most_similar or _most_similar
    unit = x / x.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    scores = similarity(unit)
    if relative:
        scores = scores / x.shape[1]
    chosen = bases(scores, noise, height, width, rows, columns, alpha, relative)
    is_base = _flags(chosen, scores)
    # both ascending, as a stable sort keeps them
    base, others = _first(is_base, chosen.shape[1]), _first(~is_base, x.shape[1] - chosen.shape[1])

    values, nearest = nearest_of(unit, others, base)
    removed = x.shape[1] - kept.shape[1]
    ranks = values.argsort(dim=1, descending=True, stable=True)[:, :removed]
    gone, wanted = others.gather(1, ranks), nearest.gather(1, ranks)
    stays = ~_flags(gone, scores)
    kept.copy_(_first(stays, kept.shape[1]))
    if any_kept:
        _, wanted = nearest_of(unit, gone, kept)
    place = stays.cumsum(1) - 1
    source.copy_(place.scatter(1, gone, place.gather(1, wanted)))
    counts.zero_().scatter_add_(1, source, torch.ones_like(source, dtype=counts.dtype))


def gather(tokens: Tensor, index: Tensor, out: Tensor) -> None:
    """Fills out [B, R, ...] with the rows of tokens [B, M, ...] at index [B, R]."""
    places = _across(index, tokens.shape[1])
    torch.index_select(tokens.flatten(0, 1), 0, places, out=out.flatten(0, 1))


def add(copies: Tensor, index: Tensor, out: Tensor) -> None:
    """Adds the rows of copies [B, R, ...] to out [B, M, ...] at index [B, R], in order."""
    places, sums = _across(index, out.shape[1]), out.flatten(0, 1)
    if out.is_cuda:  # sorts; there, index_add_ is atomic, its order a matter of luck
        sums.index_put_((places,), copies.flatten(0, 1), accumulate=True)
    else:
        sums.index_add_(0, places, copies.flatten(0, 1))


def similarity(unit: Tensor) -> Tensor:
    """[B, N]: of each row of unit [B, N, C] to all N added up, itself among them."""
    return (unit * unit.sum(1, keepdim=True)).sum(2)


def bases(
    scores: Tensor,
    noise: Tensor | None,
    height: int,
    width: int,
    rows: int,
    columns: int,
    alpha: float,
    relative: bool,
) -> Tensor:
    """[B, patches]: the token of each full patch with the highest score after noise."""
    tokens = torch.arange(height * width, device=scores.device)[None]
    sizes = height, width, rows, columns
    patches = _patches(scores, *sizes)
    if noise is not None:
        scale = alpha
        if relative:
            spread = patches.var(2, correction=0).mean(1).sqrt()
            scale = alpha * spread[:, None, None]
        patches = patches + scale * _patches(noise, *sizes)
    best = patches.argmax(2, keepdim=True)
    places = _patches(tokens, *sizes).expand(len(scores), -1, -1)
    return places.gather(2, best).squeeze(2)


def _most_similar(unit: Tensor, tokens: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens [B, R], the highest cosine to one of candidates [B, M] and which token that is;
    the first of equal ones."""
    targets = unit.take_along_dim(candidates[:, :, None], 1).mT
    values, places = [], []
    for block in tokens.split(BLOCK, 1):
        value, place = (unit.take_along_dim(block[:, :, None], 1) @ targets).max(2)
        values.append(value)
        places.append(place)
    return torch.cat(values, 1), candidates.gather(1, torch.cat(places, 1))


def _patches(values: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """[B, N] -> [B, full patches, rows * columns], both row by row."""
    down, across = height // rows, width // columns
    grid = values.view(len(values), height, width)[:, : down * rows, : across * columns]
    cut = grid.reshape(len(values), down, rows, across, columns)
    return cut.transpose(2, 3).reshape(len(values), down * across, rows * columns)


def _flags(tokens: Tensor, like: Tensor) -> Tensor:
    """bool [B, N]: True at tokens [B, M]."""
    return torch.zeros_like(like, dtype=torch.bool).scatter(1, tokens, True)


def _first(flags: Tensor, count: int) -> Tensor:
    """[B, count]: where flags [B, N] are True, `count` times a row; ascending."""
    return flags.byte().argsort(dim=1, descending=True, stable=True)[:, :count]


def _across(index: Tensor, num: int) -> Tensor:
    """[B * R]: rows of the samples one after the other, `num` each."""
    return (index + num * torch.arange(len(index), device=index.device)[:, None]).flatten()
