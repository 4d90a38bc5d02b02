"""What the pictures of a text-to-image pipeline are worth, as rows of a report.

Two pipelines draw the same prompts from the same seeds, so every picture of one has a partner in
the other. Rows come in three sorts: how far partners are apart, how far the two sets are apart, and
how well each set shows what the prompts ask for, with the change as a row of its own.

In every row `repeats` is the number of pictures behind it, and `spread` half the width of the 95%
bootstrap interval (measure/estimate.py). Partners are always drawn together. The pictures are
compared as features of encoders whose names are part of the rows; numbers of other encoders, or of
another number of pictures, do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure import Measurement
from gencompress.measure.agreement import all_found, clip_scores, same_seed_distances, unit
from gencompress.measure.encoders import Encoder, encode_images, encode_texts
from gencompress.measure.estimate import Estimate, around, bootstrap, draw, paired_difference
from gencompress.measure.generative import (
    CMMD_SCALE,
    SET_RESAMPLES,
    cmmd_kernel,
    frechet,
    kid_kernel,
)
from gencompress.measure.image import WINDOW, psnr, ssim
from gencompress.t2i.sample import sample

IDENTICAL = 100.0  # dB; what identical pictures count as in a mean
SEED = 0  # of the resampling: the same pictures give the same rows
COUNTS = {1: "one subject", 2: "two subjects"}
WORD = re.compile(r"[^\W_]+")

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class EvaluationSet:
    """What a pipeline is asked to draw: one picture a prompt, from the seed beside it."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float | None = None  # None: the default of the pipeline
    size: int | None = None  # pixels, either side; None: what the pipeline was made for

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds) or len(self.prompts) < 2:
            raise ValueError(
                f"{len(self.prompts)} prompts and {len(self.seeds)} seeds, expected as many, "
                "2 or more"
            )


def make_images(
    pipe: Any, wanted: EvaluationSet, batch: int = 8, progress: Progress = quiet
) -> Tensor:
    """uint8 [N, size, size, 3], one picture a prompt. Raises ValueError as `sample` does."""
    return sample(
        pipe,
        wanted.prompts,
        seeds=wanted.seeds,
        steps=wanted.steps,
        guidance=wanted.guidance,
        size=wanted.size,
        batch=batch,
        progress=progress,
    )


def compare_images(
    before: Tensor,
    after: Tensor,
    prompts: Sequence[str],
    encoders: Sequence[Encoder],
    progress: Progress = quiet,
) -> list[Measurement]:
    """All that can be said with these encoders of two sets of pictures.

    PSNR and SSIM of partners; of a CLIP the distance of partners, CMMD between the sets, and the
    CLIP score; of a detector the share of prompts that name one of its labels, or two, and whose
    picture shows all it names; of any other encoder the distance of partners, FID and KID.

    Args:
        before, after: uint8 [N, H, W, 3], N at least 2, picture i of both from one prompt and seed.
        prompts: N texts.

    Raises:
        ValueError: pictures of other or different shapes, or another number of prompts.
    """
    if before.shape != after.shape or before.ndim != 4 or len(before) < 2:
        raise ValueError(
            f"pictures {tuple(before.shape)} and {tuple(after.shape)}, expected [N, H, W, 3] of "
            "the same N, 2 or more"
        )
    if len(prompts) != len(before):
        raise ValueError(f"{len(prompts)} prompts for {len(before)} pictures, expected one each")
    rows = _pixel_rows(before, after)
    for number, encoder in enumerate(encoders):
        progress(f"judging pictures: {number} of {len(encoders)} judges")
        if encoder.kind == "detector":
            rows += _subject_rows(before, after, prompts, encoder)
            continue
        old, new = (encode_images(encoder, images) for images in (before, after))
        distance = bootstrap(
            same_seed_distances(old, new), f"same-seed distance ({encoder.name})", _chance()
        )
        rows.append(_row(distance, "lower"))
        if encoder.kind == "clip":
            rows.append(_row(paired_cmmd(old, new, encoder.name), "lower"))
            texts = encode_texts(encoder, prompts)
            name = f"CLIP score ({encoder.name})"
            rows += _both_rows(clip_scores(old, texts), clip_scores(new, texts), name)
        else:
            rows.append(_row(paired_fid(old, new, encoder.name), "lower"))
            rows.append(_row(paired_kid(old, new, encoder.name), "lower"))
    return rows


def subjects(prompt: str, labels: Sequence[str]) -> list[str]:
    """The labels whose words stand together in the prompt, in its order, each once.

    Case does not matter, and the last word of a label may have a plural s or es. Where labels
    overlap the longer one counts: "red ball" is not also a "ball".
    """
    words = [word.lower() for word in WORD.findall(prompt)]
    names = [(tuple(w.lower() for w in WORD.findall(label)), label) for label in labels]
    found: list[str] = []
    place = 0
    while place < len(words):
        fits = [(len(n), label) for n, label in names if n and _stands(n, words[place:])]
        length, label = max(fits, key=lambda fit: fit[0], default=(1, None))
        if label is not None and label not in found:
            found.append(label)
        place += length
    return found


def paired_fid(before: Tensor, after: Tensor, encoder: str) -> Estimate:
    """FID between the features [N, D] of partners: 0 for the same pictures."""

    def distance(rows: Tensor) -> float:
        return frechet(rows[:, 1], rows[:, 0])

    return bootstrap(
        torch.stack([before, after], 1),
        f"FID to the pictures before ({encoder})",
        _chance(),
        statistic=distance,
        resamples=SET_RESAMPLES,
    )


def paired_kid(before: Tensor, after: Tensor, encoder: str) -> Estimate:
    """Unbiased squared MMD with the kernel of KID, (x.y / D + 1)^3, between features [N, D] of
    partners: see `_paired_mmd2`."""

    name = f"KID distance to the pictures before ({encoder})"
    return _paired_mmd2(before.double(), after.double(), kid_kernel, name)


def paired_cmmd(before: Tensor, after: Tensor, encoder: str) -> Estimate:
    """The same with the kernel and the factor of CMMD, between CLIP features [N, D]."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return CMMD_SCALE * cmmd_kernel(a, b)

    old, new = unit(before.double()), unit(after.double())
    return _paired_mmd2(old, new, kernel, f"CMMD to the pictures before ({encoder})")


def _paired_mmd2(
    before: Tensor, after: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], name: str
) -> Estimate:
    """U-statistic over pairs of different prompts (Gretton et al. 2012, equation 4).

    Partners resemble each other, so their pairs have to stay out as those of a picture with itself
    do: the estimate is 0 on average for sets of one distribution, and exactly for the same
    pictures. Can be negative. Draws leave out pairs of a prompt with its own copies.
    """
    count = len(before)
    across = kernel(before, after)
    pairs = (kernel(before, before) + kernel(after, after) - across - across.T).fill_diagonal_(0)
    chance = _chance()
    drawn = torch.stack([draw(count, chance) for _ in range(SET_RESAMPLES)])
    times = torch.zeros(SET_RESAMPLES, count, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    draws = ((times @ pairs) * times).sum(1) / (count**2 - times.square().sum(1))
    draws = draws[draws.isfinite()]  # of two pictures, a draw may hold one of them only
    return around(float(pairs.sum()) / (count * (count - 1)), draws, name, count)


def _pixel_rows(before: Tensor, after: Tensor) -> list[Measurement]:
    metrics = {"PSNR": psnr, "SSIM": ssim} if min(before.shape[1:3]) >= WINDOW else {"PSNR": psnr}
    found: dict[str, list[float]] = {name: [] for name in metrics}
    for old, new in zip(before, after, strict=True):
        for name, metric in metrics.items():
            value = float(metric(new.float() / 255, old.float() / 255))
            found[name].append(min(value, IDENTICAL))
    return [
        _row(
            bootstrap(torch.tensor(values).double(), f"same-seed {name}", _chance()),
            "higher",
            "dB" if name == "PSNR" else "",
        )
        for name, values in found.items()
    ]


def _subject_rows(
    before: Tensor, after: Tensor, prompts: Sequence[str], detector: Encoder
) -> list[Measurement]:
    """As TIAM (Grimal et al. 2023): presence, which says nothing of number and place."""
    wanted = [subjects(prompt, detector.labels) for prompt in prompts]
    shown = [encode_images(detector, images) for images in (before, after)]
    rows = []
    for count, words in COUNTS.items():
        these = [i for i, names in enumerate(wanted) if len(names) == count]
        if len(these) < 2:
            continue
        named = [wanted[i] for i in these]
        old, new = (100 * all_found(one[these], detector.labels, named).double() for one in shown)
        name = f"detector accuracy, {words} ({detector.name})"
        rows += _both_rows(old, new, name, "%", "points")
    return rows


def _both_rows(
    before: Tensor, after: Tensor, name: str, unit_of_values: str = "", unit_of_change: str = ""
) -> list[Measurement]:
    """Means of numbers [N] before and after, and their paired difference."""
    value = bootstrap(after, name, _chance())
    change = paired_difference(before, after, f"change of {name}", _chance())
    return [
        _row(value, "higher", unit_of_values, float(before.mean())),
        _row(change, "higher", unit_of_change),
    ]


def _row(
    found: Estimate, better: Better, unit_of_value: str = "", before: float | None = None
) -> Measurement:
    half = (found.high - found.low) / 2
    return Measurement(found.name, before, found.value, unit_of_value, better, found.count, half)


def _stands(name: tuple[str, ...], words: list[str]) -> bool:
    here, last = tuple(words[: len(name)]), name[-1]
    return here[:-1] == name[:-1] and here[-1:] in ((last,), (f"{last}s",), (f"{last}es",))


def _chance() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)
