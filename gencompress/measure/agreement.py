"""How far each generated image agrees with its own counterpart: a prompt, the same seed, a training
image.

Everything here compares features, float [N, D], that an encoder made of images and texts
(`measure/encoders.py`); it is computed in float64. Whoever calls names the encoder, and the name is
part of every result: numbers of a small encoder say nothing about numbers in papers.

Larger is better: CLIP score, TIAM. Smaller is better: distance at the same seed, copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gencompress.measure.estimate import RESAMPLES, Estimate, bootstrap


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """float64 [N], 0 to 100: 100 max(cosine, 0) of every image with its own text (Hessel et al.
    2021, whose own factor is 2.5).

    Args:
        images, texts: [N, D] each, features of one CLIP model.
    """
    return 100 * _cosines(images, texts).clamp(min=0)


def clip_score(
    images: Tensor,
    texts: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `clip_scores`."""
    scores = clip_scores(images, texts)
    return bootstrap(scores, f"CLIP score ({encoder})", generator, resamples=resamples)


def same_seed_distances(before: Tensor, after: Tensor) -> Tensor:
    """float64 [N], 0 to 2: one minus the cosine between images of one prompt and seed, [N, D]."""
    return 1 - _cosines(before, after)


def same_seed_distance(
    before: Tensor,
    after: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of `same_seed_distances`: how much a compressed model changes the same image."""
    distances = same_seed_distances(before, after)
    return bootstrap(distances, f"same-seed distance ({encoder})", generator, resamples=resamples)


def all_found(
    probabilities: Tensor,
    labels: Sequence[str],
    wanted: Sequence[Sequence[str]],
    *,
    threshold: float = 0.5,
) -> Tensor:
    """bool [N]: whether every label that the prompt of an image names reaches the threshold.

    Presence only: without boxes nothing says which of two found objects has which colour, or how
    many there are. A detector whose labels name both ("red ball") does bind them.

    Args:
        probabilities: [N, L] in [0, 1], one row per image, one column per label.
        wanted: N lists of labels, none of them empty.

    Raises:
        ValueError: other shapes or ranges, an unknown label, or an image with nothing wanted.
    """
    if probabilities.shape != (len(wanted), len(labels)) or len(wanted) == 0:
        raise ValueError(
            f"probabilities of shape {tuple(probabilities.shape)} for {len(wanted)} prompts and "
            f"{len(labels)} labels, expected [N, L] with N > 0"
        )
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities leave [0, 1]; are they logits?")
    column = {label: index for index, label in enumerate(labels)}
    named = torch.zeros(probabilities.shape, dtype=torch.bool)
    for row, names in enumerate(wanted):
        unknown = [name for name in names if name not in column]
        if unknown or not names:
            raise ValueError(
                f"prompt {row} names {list(names)}, expected one or more of {list(labels)}"
            )
        named[row, [column[name] for name in names]] = True
    return ((probabilities.cpu() >= threshold) | ~named).all(1)


def tiam(
    probabilities: Tensor,
    labels: Sequence[str],
    wanted: Sequence[Sequence[str]],
    encoder: str,
    generator: torch.Generator,
    *,
    threshold: float = 0.5,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Share of images that show every object named by their prompt (Grimal et al. 2023, TIAM).

    Args, errors: as `all_found`.
    """
    found = all_found(probabilities, labels, wanted, threshold=threshold)
    name = f"TIAM over {threshold:g} ({encoder})"
    return bootstrap(found, name, generator, resamples=resamples)


def copy_similarity(generated: Tensor, originals: Tensor) -> Tensor:
    """Cosines, float64 [P, S], between images of P prompts at S seeds and what they may copy.

    Args:
        generated: [P, S, D], features of a copy detector.
        originals: [P, D], one training image per prompt; or [P, S, D], another model's image of the
            same prompt and seed.
    """
    if generated.ndim != 3 or originals.ndim not in (2, 3):
        raise ValueError(
            f"features of shape {tuple(generated.shape)} and {tuple(originals.shape)}, "
            "expected [P, S, D] and [P, D] or [P, S, D]"
        )
    if originals.ndim == 2:
        originals = originals[:, None].expand(-1, generated.shape[1], -1)
    if generated.shape != originals.shape:
        raise ValueError(
            f"generated features {tuple(generated.shape)}, originals {tuple(originals.shape)}: "
            "expected as many prompts, seeds and columns"
        )
    return _cosines(generated.flatten(0, 1), originals.flatten(0, 1)).unflatten(
        0, generated.shape[:2]
    )


def copy_rate(
    similarity: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    threshold: float = 0.7,
    over: Literal["max", "median"] = "max",
    resamples: int = RESAMPLES,
) -> Estimate:
    """Share of prompts whose image is a copy: the similarity [P, S], by its maximum or median over
    the seeds, is above the threshold.

    0.7 with the maximum is what the captions of NeMo (Hintersdorf et al. 2024) are sorted into
    verbatim copies by; 0.5 is that of Somepalli et al. 2023. State both with the number, and the
    preprocessing (`preparation.SSCD_320` or `SSCD_224`).
    """
    copies = _over_seeds(similarity, over) > threshold
    name = f"copies over {threshold:g}, {over} of {similarity.shape[1]} seeds ({encoder})"
    return bootstrap(copies, name, generator, resamples=resamples)


def copy_level(
    similarity: Tensor,
    encoder: str,
    generator: torch.Generator,
    *,
    over: Literal["max", "median"] = "max",
    resamples: int = RESAMPLES,
) -> Estimate:
    """Median over prompts of the similarity [P, S], by its maximum or median over the seeds."""
    levels = _over_seeds(similarity, over)
    name = f"copy similarity, {over} of {similarity.shape[1]} seeds ({encoder})"
    return bootstrap(levels, name, generator, statistic=_median, resamples=resamples)


def _over_seeds(similarity: Tensor, over: str) -> Tensor:
    if similarity.ndim != 2 or 0 in similarity.shape:
        raise ValueError(
            f"similarity of shape {tuple(similarity.shape)}, expected [P, S], P, S > 0"
        )
    if over not in ("max", "median"):
        raise ValueError(f"over is {over!r}, expected 'max' or 'median'")
    return similarity.amax(1) if over == "max" else similarity.double().quantile(0.5, dim=1)


def _median(values: Tensor) -> Tensor:
    return values.double().quantile(0.5)  # of an even number: halfway between the middle two


def features_of(rows: Tensor, least: int) -> Tensor:
    """The rows as float64, apart from any graph.

    Raises:
        ValueError: not [N, D], not floats, fewer than `least` rows, or not finite.
    """
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"features of shape {tuple(rows.shape)}, expected [N, D]")
    if not rows.is_floating_point():
        raise ValueError(f"features of type {rows.dtype}, expected floats")
    if len(rows) < least:
        raise ValueError(f"features of {len(rows)} images, expected at least {least}")
    rows = rows.detach().double()
    if not bool(rows.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    return rows


def unit(rows: Tensor) -> Tensor:
    """The rows at length 1; ValueError where one has length zero."""
    length = rows.norm(dim=1, keepdim=True)
    if not bool((length > 0).all()):
        raise ValueError("a feature has length zero, and so no direction")
    return rows / length


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    a, b = features_of(a, 1), features_of(b, 1)
    if a.shape != b.shape:
        raise ValueError(f"features of shape {tuple(a.shape)} and {tuple(b.shape)}, expected pairs")
    return (unit(a) * unit(b.to(a.device))).sum(1)
