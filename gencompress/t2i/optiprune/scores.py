"""How well an image's attention keeps the subjects of its prompt: the scores of InitNO (arXiv
2404.04650), which OptiPrune's LatentMapper uses too. Low is good.

Shapes: B samples, m subjects, h and w of the maps, T text tokens. All is differentiable but the
choices: which subject is worst, where a peak is, which component is kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gencompress.t2i.calibrate import conditions, conditions_of
from gencompress.t2i.distill import Noised, predict
from gencompress.t2i.optiprune.attention import Grid, default_grid, watch
from gencompress.t2i.optiprune.subjects import Subject, text_columns
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.sample import default_size

SHARPEN = 100.0  # before the softmax over text tokens (Attend-and-Excite)
SIGMA = math.sqrt(0.5)  # what the reference calls 0.5: its exponent is -(x / (2 sigma))^2
# what a peak is measured against: the other tokens of the text at its place (InitNO), or the other
# places of its own token. Where an article or an end mark gets most of the attention, as in small
# models, no subject has a peak of the first kind: S_cross is 1 whatever the noise
PEAKS = ("text", "place")
DEGENERATE = 1e-6  # S_self of maps that lie nowhere: no overlap, for the wrong reason


@dataclass(frozen=True, eq=False)
class Scores:
    """Of B samples."""

    cross: Tensor  # [B] in [0, 1]: 1 - the peak of the subject that has the lowest; see PEAKS
    own: Tensor  # [B] in [0, 0.5]: the overlap of the subjects' regions; 0 of a single subject
    clean: Tensor | None  # [B]: what lies outside the regions; None if not asked for
    maps: Tensor  # [B, m, h, w], of the subjects

    @property
    def total(self) -> Tensor:
        """[B]: S_cross + S_self, and 1 more where several subjects overlap nowhere at all."""
        nowhere = (self.own <= DEGENERATE) & (self.maps.shape[1] > 1)
        return self.cross + self.own + nowhere

    def valid(self, cross: float, own: float) -> Tensor:
        """bool [B]: both scores are under these."""
        return (self.cross < cross) & (self.own < own)


Judge = Callable[..., Scores]


@contextlib.contextmanager
def judge(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    *,
    size: int | None = None,
    grid: Grid | None = None,
    clean: bool = False,
    peaks: str = "text",
) -> Iterator[Judge]:
    """Yields `score(latents, timestep, number)`: the scores of latents [B, ...], as the denoiser
    takes them, for the prompt of that number, without guidance; or for prompts of as many subjects,
    a number for each sample. See `attention.watch`.

    Args:
        subjects: of each prompt, from `subjects.find_subjects`.
        size: of the pictures, in pixels; None: what the pipeline was made for.
        grid: of the maps; None: `attention.default_grid`.
        clean: compute that score as well.
        peaks: one of PEAKS.

    Raises:
        ValueError: not as many lists of subjects as prompts, an empty one, unknown peaks, or as
            `watch`.
    """
    if peaks not in PEAKS:
        raise ValueError(f"peaks {peaks!r}: expected {' or '.join(PEAKS)}")
    if len(prompts) != len(subjects) or not all(subjects):
        raise ValueError(
            f"{len(subjects)} lists of subjects for {len(prompts)} prompts; expected one each, "
            "none of them empty"
        )
    size = default_size(pipe) if size is None else size
    model, _ = denoiser(pipe)
    rows = conditions(pipe, prompts)
    columns = text_columns(pipe)
    with watch(model, default_grid(pipe, size) if grid is None else grid) as look:

        def score(latents: Tensor, timestep: Tensor | float, number: int | Sequence[int]) -> Scores:
            count = len(latents)
            numbers = [number] * count if isinstance(number, int) else list(number)
            told = conditions_of(pipe, rows, torch.tensor(numbers), size)
            times = torch.as_tensor(timestep, device=latents.device).expand(count)
            # of what makes a training sample only latents and times count here
            noised = Noised(latents, times, latents, times, "epsilon")
            maps = look(lambda: predict(model, noised, told))
            text = torch.split(maps.cross[..., : columns.stop], 1)
            found = torch.cat(
                [
                    subject_maps(one, subjects[i], columns.start, peaks)
                    for one, i in zip(text, numbers, strict=True)
                ]
            )
            return Scores(
                cross_score(found, peaks),
                self_score(maps.own, found),
                clean_score(found) if clean else None,
                found,
            )

        yield score


def subject_maps(
    cross: Tensor, subjects: Sequence[Subject], first: int = 1, peaks: str = "text"
) -> Tensor:
    """[B, m, h, w] in [0, 1]: cross maps [B, h, w, T], for peaks against the text sharpened by a
    softmax over the tokens, and blurred; a subject of several tokens is their mean.

    Args:
        first: the token at which the text starts; those before it, and the last, do not count.
    """
    sharp = cross[..., first:-1]
    if peaks == "text":
        sharp = (SHARPEN * sharp).softmax(-1)
    places = [torch.tensor(subject.tokens, device=cross.device) - first for subject in subjects]
    return blur(torch.stack([sharp[..., place].mean(-1) for place in places], 1))


def blur(maps: Tensor) -> Tensor:
    """[..., h, w] -> the same: a 3 x 3 Gaussian of sum 1, reflected at the edges; h and w of 2 or
    more."""
    side = torch.tensor([1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device)
    line = (-side / (2 * SIGMA**2)).exp()
    kernel = torch.outer(line, line) / line.sum() ** 2
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), "reflect"), kernel[None, None]).view_as(maps)


def cross_score(maps: Tensor, peaks: str = "text") -> Tensor:
    """S_cross [B] of maps [B, m, h, w]: 1 - the lowest peak; against places, the highest share of a
    mean in its peak, which is 1 of a map that is flat."""
    highest = maps.amax((2, 3))
    if peaks == "place":
        return (maps.mean((2, 3)) / highest).amax(1)
    return 1 - highest.amin(1)


def self_score(own: Tensor, maps: Tensor) -> Tensor:
    """S_self [B]: the mean overlap of pairs of subjects, each the region that its peak attends to.

    Args:
        own: self maps [B, h, w, h * w].
        maps: of the subjects [B, m, h, w]; they give the peaks, without a gradient.
    """
    batch, count, high, wide = maps.shape
    if count == 1:
        return own.new_zeros(batch)
    peaks = maps.detach().flatten(2).argmax(-1)
    rows = own.flatten(1, 2).gather(1, peaks[..., None].expand(-1, -1, own.shape[-1]))
    regions = blur(rows.view(batch, count, high, wide))
    overlaps = []
    for i, j in combinations(range(count), 2):
        one, other = regions[:, i], regions[:, j]
        shared = torch.minimum(one, other).sum((1, 2))
        overlaps.append(shared / ((one + other).sum((1, 2)) + 1e-6))
    return torch.stack(overlaps).mean(0)


def clean_score(maps: Tensor) -> Tensor:
    """[B], 0 or more: by how much the highest value outside a subject's region exceeds the lowest
    inside, mean over subjects. The region is what Otsu's threshold keeps and what of it is
    connected to the peak (InitNO's code, there by OpenCV)."""
    keep = torch.stack([torch.stack([_region(one) for one in sample]) for sample in maps.detach()])
    outside = maps.masked_fill(keep, -torch.inf).amax((2, 3))
    inside = maps.masked_fill(~keep, torch.inf).amin((2, 3))
    return (outside - inside).relu().mean(1)


def _region(values: Tensor) -> Tensor:
    """bool [h, w], of a map [h, w]; all of a constant one."""
    from scipy import ndimage

    order = values.flatten().double().sort().values
    total, count = order.cumsum(0), len(order)
    low = torch.arange(1, count, device=values.device)  # how many are under the threshold
    means = total[:-1] / low, (total[-1] - total[:-1]) / (count - low)
    between = low * (count - low) * (means[1] - means[0]) ** 2
    between = between.masked_fill(order[1:] == order[:-1], -1.0)  # equal values stay together
    if between.max() < 0:
        return torch.ones_like(values, dtype=torch.bool)
    above = values.double() > order[between.argmax()]
    parts, _ = ndimage.label(above.cpu().numpy())
    parts = torch.from_numpy(parts).to(values.device)
    return parts == parts.flatten()[values.argmax()]
