"""Whether a picture is memorised: by how hard its caption pulls while sampling, and by how like the
pictures it gives are to it.

P prompts, S seeds, K calls of the denoiser, D features. Larger noise magnitudes and similarities
mean memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.measure.agreement import clip_scores, copy_similarity, unit
from gencompress.measure.encoders import Encoder, encode_images, encode_texts
from gencompress.measure.preparation import SSCD_224, SSCD_320
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.dori.draw import Clock, Sampling, expect_unet, walk

COPY = 0.7  # of the largest cosine over seeds; sorts NeMo's list of captions into VM and TM
CONVENTIONS = {"sscd-320": SSCD_320, "sscd-224": SSCD_224}


def noise_magnitudes(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2, 3),
    how: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    calls: int | None = None,
    progress: Progress = quiet,
) -> Tensor:
    """float32 [P, S, K]: || eps(x, t, prompt) - eps(x, t, "") ||_2 over all entries of a latent,
    before guidance, in each call of the denoiser (Wen et al. 2024). Its mean over S and K is the
    score of a prompt. Of a v-prediction, the difference of the epsilons it stands for.

    Every sample has a norm of its own; the public code takes one over all pictures of a prompt,
    and its thresholds are sqrt(S) times larger.

    Args:
        seeds: the same for every prompt.
        calls: only the first so many; 1 is the cheapest score.

    Raises:
        ValueError: no prompts or seeds, or a pipeline without such a U-Net.
    """
    if not prompts or not seeds:
        raise ValueError("no prompts, or no seeds; expected one or more of each")
    model, scheduler = expect_unet(pipe), pipe.scheduler
    plain = scheduler.config.prediction_type == "epsilon"
    kept = scheduler.alphas_cumprod
    met: list[Tensor] = []

    def look(_: Any, args: tuple[Any, ...], out: tuple[Tensor, ...]) -> None:
        without, told = out[0].float().chunk(2)
        norms = (told - without).flatten(1).norm(dim=1).cpu()
        # eps = sqrt(abar) v + sqrt(1 - abar) x_t, and x_t is the same in both
        met.append(norms if plain else norms * float(kept[round(float(args[1]))]) ** 0.5)

    rows = {
        name: row.repeat_interleave(len(seeds), 0)
        for name, row in conditions(pipe, prompts).items()
    }
    found = []
    hook = model.register_forward_hook(look)
    try:
        each = list(seeds) * len(prompts)
        for _ in walk(pipe, rows, each, how, clock=Clock(), calls=calls, progress=progress):
            found.append(torch.stack(met, 1))
            met.clear()
    finally:
        hook.remove()
    return torch.cat(found).unflatten(0, (len(prompts), len(seeds)))


@dataclass(frozen=True)
class Separation:
    """How well a score tells memorised prompts from others."""

    auc: float  # chance that a memorised one scores higher, ties counting half
    accuracy: float  # 1 - (FPR + 1 - TPR) / 2 at the best threshold
    tpr: float  # at the false-positive rate that was allowed
    threshold: float  # above which a score then counts as memorised; may be infinite


def separation(memorised: Tensor, others: Tensor, most_false: float = 0.01) -> Separation:
    """Of scores [M] of memorised prompts and [N] of others; a score above the threshold counts.

    Args:
        most_false: the share of others that may count as memorised.

    Raises ValueError for no scores, or scores that are not finite.
    """
    yes, no = memorised.double().flatten().cpu(), others.double().flatten().cpu()
    if not len(yes) or not len(no) or not bool(torch.cat([yes, no]).isfinite().all()):
        raise ValueError(f"{len(yes)} and {len(no)} scores; expected one or more of each, finite")
    order = no.sort().values
    below = torch.searchsorted(order, yes)
    upto = torch.searchsorted(order, yes, right=True)
    auc = float((below + upto).double().mean()) / (2 * len(no))
    cuts = torch.cat([torch.cat([yes, no]).unique(), torch.tensor([-torch.inf]).double()])
    true = (yes > cuts[:, None]).double().mean(1)
    false = (no > cuts[:, None]).double().mean(1)
    allowed = false <= most_false
    tpr = float(true[allowed].max())
    best = allowed & (true == tpr)
    accuracy = float((1 - (false + 1 - true) / 2).max())
    return Separation(auc, accuracy, tpr, float(cuts[best].max()))


def under_convention(encoder: Encoder, convention: str) -> Encoder:
    """The encoder behind the preparation of pictures that SSCD numbers are reported with:
    "sscd-320" (NeMo and Dori: stretched to 320 x 320, ImageNet's mean and deviation) or "sscd-224"
    (Wen, Chavhan: short side 256, centre of 224, 0.5 and 0.5). Its name says which.

    Numbers of the two do not compare. Raises ValueError for another convention.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r}; expected {' or '.join(CONVENTIONS)}")
    named = f"{encoder.name}, {convention}"
    return replace(encoder, name=named, preparation=CONVENTIONS[convention])


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """float32 [P, S, D] of pictures uint8 [P, S, H, W, 3]."""
    return encode_images(encoder, images.flatten(0, 1)).unflatten(0, images.shape[:2])


def similarities(encoder: Encoder, images: Tensor, originals: Tensor) -> Tensor:
    """float64 [P, S]: cosines of pictures uint8 [P, S, H, W, 3] to the training picture [P, H, W,
    3] of their prompt, or to other pictures [P, S, H, W, 3] of the same prompts and seeds."""
    encode = encode_images if originals.ndim == 4 else features
    return copy_similarity(features(encoder, images), encode(encoder, originals))


def memory_types(similarity: Tensor, flagged: Tensor) -> list[str | None]:
    """For each prompt "VM", a verbatim copy: the largest of its similarities [P, S] is above COPY;
    else "TM", a template, where another detector flags it (bool [P]), such as the noise magnitude;
    else None."""
    copies = over_seeds(similarity, "max") > COPY
    if flagged.shape != copies.shape:
        raise ValueError(f"{tuple(flagged.shape)} flags for {len(copies)} prompts")
    pairs = zip(copies.tolist(), flagged.tolist(), strict=True)
    return ["VM" if copied else "TM" if other else None for copied, other in pairs]


def over_seeds(values: Tensor, how: str) -> Tensor:
    """float64 [P]: the largest ("max") or the "median" of values [P, S]; of an even number of seeds
    halfway between the middle two."""
    if values.ndim != 2 or 0 in values.shape or how not in ("max", "median"):
        raise ValueError(f"{how!r} of {tuple(values.shape)}; expected max or median of [P, S]")
    return values.double().amax(1) if how == "max" else values.double().quantile(0.5, dim=1)


def memorisation_rate(similarity: Tensor, threshold: float = COPY) -> float:
    """The share of prompts whose largest similarity [P, S] over seeds is above the threshold."""
    return float((over_seeds(similarity, "max") > threshold).double().mean())


def median_and_mad(values: Tensor) -> tuple[float, float]:
    """Median of values [P] and the median absolute deviation from it, without a factor."""
    if not values.numel():
        raise ValueError("the median of no values")
    flat = values.double().flatten()
    middle = flat.quantile(0.5)
    return float(middle), float((flat - middle).abs().quantile(0.5))


def diversity(rows: Tensor) -> Tensor:
    """float64 [P]: the median cosine of the S (S - 1) / 2 pairs of pictures of a prompt, from their
    features [P, S, D], S at least 2. 1: all alike; lower means more diverse."""
    if rows.ndim != 3 or rows.shape[1] < 2:
        raise ValueError(f"features {tuple(rows.shape)}; expected [P, S, D] with 2 seeds or more")
    near = torch.stack([unit(one.double()) @ unit(one.double()).T for one in rows])
    one, other = torch.triu_indices(rows.shape[1], rows.shape[1], 1).unbind()
    return near[:, one, other].quantile(0.5, dim=1)


def alignment(clip: Encoder, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """float64 [P]: the median over seeds of 100 max(cosine, 0) between pictures uint8 [P, S, H, W,
    3] and the prompt they were made for."""
    shown = features(clip, images)
    texts = encode_texts(clip, prompts)
    scores = clip_scores(shown.flatten(0, 1), texts.repeat_interleave(shown.shape[1], 0))
    return over_seeds(scores.unflatten(0, shown.shape[:2]), "median")
