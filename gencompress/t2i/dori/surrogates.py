"""Harmless pictures that take the place of memorised ones: what a pruned model draws for their
captions, if it is no copy (Kowalczuk et al. 2025, "Finding Dori")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure.encoders import Encoder
from gencompress.t2i.calibrate import conditions, image_latents
from gencompress.t2i.dori.detect import similarities
from gencompress.t2i.dori.draw import Sampling, draw_states


@dataclass(frozen=True, eq=False)
class Surrogates:
    """S pictures for each of N captions."""

    latents: Tensor  # float32 [N, S, C, h, w]
    images: Tensor  # uint8 [N, S, H, W, 3]
    similarity: Tensor  # float64 [N, S], to the memorised picture
    accepted: Tensor  # int64 [N]: how many different ones were found; 0: all S are too similar


def make_surrogates(
    pruned_pipe: Any,
    captions: Sequence[str],
    originals: Tensor,
    encoder: Encoder,
    count: int,
    seeds: Sequence[int],
    how: Sampling = Sampling(),  # noqa: B008 (frozen)
    most: float = 0.5,
    progress: Progress = quiet,
) -> Surrogates:
    """`count` samples for each caption whose copy similarity to its original is below `most`, the
    first that the seeds give. Where fewer are found, those come again; where none is, the least
    similar ones stand in, and `accepted` says so.

    Args:
        originals: uint8 [N, H, W, 3].
        encoder: a copy detector.
        seeds: tried in order for each caption until it has enough.

    Raises:
        ValueError: no captions, not one original each, a count below 1 or no seeds.
    """
    if not captions or len(originals) != len(captions) or count < 1 or not seeds:
        raise ValueError(
            f"{len(captions)} captions, {len(originals)} originals, {len(seeds)} seeds, count "
            f"{count}; expected one original a caption, and one or more of everything"
        )
    states = conditions(pruned_pipe, captions)
    tried: list[list[tuple[float, Tensor]]] = [[] for _ in captions]
    for number, seed in enumerate(seeds):
        lacking = [i for i, row in enumerate(tried) if _num_accepted(row, most) < count]
        if not lacking:
            break
        progress(f"surrogates: seed {number} of {len(seeds)}, {len(lacking)} captions lack some")
        rows = {name: row[lacking] for name, row in states.items()}
        drawn = draw_states(pruned_pipe, rows, [seed] * len(lacking), how)
        near = similarities(encoder, drawn[:, None], originals[lacking])[:, 0].tolist()
        for i, value, image in zip(lacking, near, drawn, strict=True):
            tried[i].append((value, image))
    chosen = [_chosen(row, count, most) for row in tried]
    images = torch.stack([torch.stack([image for _, image in row]) for row in chosen])
    return Surrogates(
        image_latents(pruned_pipe, images.flatten(0, 1)).unflatten(0, (len(captions), count)),
        images,
        torch.tensor([[value for value, _ in row] for row in chosen], dtype=torch.float64),
        torch.tensor([min(_num_accepted(row, most), count) for row in tried]),
    )


def _num_accepted(tried: list[tuple[float, Tensor]], most: float) -> int:
    return sum(value < most for value, _ in tried)


def _chosen(
    tried: list[tuple[float, Tensor]], count: int, most: float
) -> list[tuple[float, Tensor]]:
    found = [one for one in tried if one[0] < most] or sorted(tried, key=lambda one: one[0])
    return [found[i % min(len(found), count)] for i in range(count)]
