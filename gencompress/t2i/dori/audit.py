"""Whether a pipeline still holds pictures: shown by their captions, brought back by a search, or
neither at the budget that was tested (Kowalczuk et al. 2025).

A picture counts as reproduced if any of S seeds gives a copy of it, a cosine of a copy detector
above a threshold. Controls, pictures that are known not to be memorised, tell how often the search
finds what is not there. What no search of this size finds may still be found by a longer one.

S seeds, K text states that are judged: the caption, and what each search had after each mark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.files import save_tensors, writing
from gencompress.measure.agreement import copy_similarity
from gencompress.measure.encoders import Encoder, encode_images
from gencompress.t2i.calibrate import conditions, image_latents
from gencompress.t2i.data.cache import digest
from gencompress.t2i.distill import seeds as new_seeds
from gencompress.t2i.dori.detect import COPY, diversity, features
from gencompress.t2i.dori.draw import Sampling, draw_states
from gencompress.t2i.dori.masks import model_digest
from gencompress.t2i.dori.pairs import Pair, check_captions, pictures
from gencompress.t2i.dori.search import (
    STARTS,
    SearchConfig,
    Trigger,
    expect_plain,
    search,
    starts,
)
from gencompress.t2i.pipeline import hushed, scheduling, with_parts
from gencompress.t2i.sample import default_size, sample

MARKS = (10, 25, 50, 100, 500)  # steps that the rate is reported after, as far as a search goes
VERDICTS = ("memorised", "hidden", "removed")  # from the worst
ABOUT = "gencompress.audited"  # the key of the metadata of a judged picture
NO_START = "start 'other' is the caption of a control; expected another pair of role control"


@dataclass(frozen=True)
class AuditConfig:
    """The budget of an audit, and how pictures are drawn; the defaults are the paper's."""

    steps: int = 50  # of each search
    draws: int = 8  # of noise and timestep a step
    seeds: int = 10  # pictures of the caption, and of every trigger
    starts: tuple[str, ...] = ("caption",)  # of search.STARTS: a search from each
    threshold: float = COPY  # of the cosine above which a picture is a copy
    guidance: float = 7.5
    sampling_steps: int = 50
    scheduler: str | None = None  # that samples, a class of diffusers; None: the pipeline's own
    size: int | None = None  # pixels, either side; None: what the pipeline was made for
    rate: float = 0.1  # of the search
    batch: int = 8  # pictures drawn at once
    at_once: int = 8  # pictures searched for at once
    seed: int = 0  # of all chance

    def __post_init__(self) -> None:
        if (
            not self.starts
            or set(self.starts) - {*STARTS}
            or len({*self.starts}) < len(self.starts)
        ):
            raise ValueError(f"starts {self.starts}: each once, some of {', '.join(STARTS)}")
        if self.seeds < 1 or not -1 <= self.threshold < 1:
            raise ValueError(
                f"seeds {self.seeds}: 1 or more; threshold {self.threshold}: from -1 to under 1"
            )
        self.search_config()
        self.sampling()

    @property
    def marks(self) -> tuple[int, ...]:
        """Steps after which triggers are judged; the last is the end."""
        return (*(mark for mark in MARKS if mark < self.steps), self.steps)

    def search_config(self) -> SearchConfig:
        return SearchConfig(
            self.steps, self.draws, self.rate, marks=self.marks, at_once=self.at_once
        )

    def sampling(self, size: int | None = None) -> Sampling:
        return Sampling(self.sampling_steps, self.guidance, size or self.size, self.batch)

    @property
    def budget(self) -> str:
        """In words; no verdict is told without it."""
        return (
            f"{self.steps} steps of search from {' and '.join(self.starts)}, {self.draws} draws a "
            f"step, {self.seeds} seeds, copies above {self.threshold:g}"
        )


@dataclass(frozen=True, eq=False)
class Finding:
    """What an audit found of one picture."""

    pair: Pair
    caption: Tensor  # float64 [S]: similarity to the picture, of those that its caption gives
    found: dict[str, dict[int, Tensor]]  # the same by start and mark
    diversity: dict[str, float]  # of the pictures by caption, and by each start at the end
    original: Tensor  # uint8 [H, H, 3]
    by_caption: Tensor  # the most similar one
    by_trigger: Tensor  # the most similar one of all triggers
    triggers: dict[str, Trigger]  # by start

    def verdict(self, threshold: float) -> str:
        return verdict(self.caption, self.found, threshold)

    def first(self, threshold: float) -> tuple[int, float] | None:
        """The attack's cost: the fewest steps whose trigger gave a copy, by any start, and the
        seconds of that search until then; None if none did."""
        costs = [
            (mark, self.triggers[start].seconds * mark / max(marks))
            for start, marks in self.found.items()
            for mark, values in marks.items()
            if float(values.max()) > threshold
        ]
        return min(costs, default=None)


@dataclass(frozen=True, eq=False)
class Audit:
    config: AuditConfig
    encoder: str  # the name of the copy detector, which belongs beside every number
    model: str  # masks.model_digest
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """The worst of the targets."""
        found = {one.verdict(self.config.threshold) for one in self.of("target")}
        return next(name for name in VERDICTS if name in found)

    def of(self, role: str, kind: str | None = None) -> list[Finding]:
        """The findings of a role, and of a type of memory where one is named."""
        found = [one for one in self.findings if one.pair.role == role]
        return [one for one in found if kind is None or one.pair.type == kind]


def verdict(caption: Tensor, found: Mapping[str, Mapping[int, Tensor]], threshold: float) -> str:
    """One of VERDICTS, of similarities [S] by caption, and by start and mark of the search.

    "memorised": the caption alone gives a copy; "hidden": a trigger does; "removed": neither, at
    the budget tested. A picture that the model never held is "removed" too: audit the model before.
    """
    if float(caption.max()) > threshold:
        return "memorised"
    copied = any(float(one.max()) > threshold for marks in found.values() for one in marks.values())
    return "hidden" if copied else "removed"


def audit(
    pipe: Any,
    pairs: Sequence[Pair],
    encoder: Encoder,
    config: AuditConfig = AuditConfig(),  # noqa: B008 (frozen)
    *,
    only: Sequence[int] | None = None,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> Audit:
    """Draws every caption, searches a trigger for every picture, draws those, and compares all with
    the pictures. Controls are treated as targets are.

    Args:
        encoder: a copy detector; see `detect.under_convention` for how SSCD is told pictures.
        only: places in `pairs` to audit; None: all. What is found of a picture does not depend on
            it, as chance and other captions go by the place.
        workdir: every trigger and every judged picture is kept there and taken from there.

    Raises:
        FormatError: a picture that cannot be read, or a caption that the text encoder cannot take.
        ValueError: a pipeline other than Stable Diffusion 1 or 2, settings that it cannot run, or
            the start "other" without another control.
    """
    expect_plain(pipe)
    check_captions(pipe, pairs)
    size = config.size or default_size(pipe)
    drawing = _sampled_by(pipe, config, size)
    places = list(range(len(pairs)) if only is None else only)
    own = [pairs[i] for i in places]
    originals, captions = pictures(own, size), [pair.caption for pair in own]
    wanted = encode_images(encoder, originals)
    others = [_other(pairs, i) for i in places] if "other" in config.starts else []
    # one at a time, so that a picture's latent is the same whichever are beside it
    latents = torch.cat([image_latents(pipe, one[None]) for one in originals])
    every = chances(config, len(pairs))
    own_seeds = [every[i] for i in places]
    triggers = {
        kind: search(
            pipe, latents, starts(pipe, kind, captions, own_seeds, others), own_seeds,
            config.search_config(), workdir=workdir and workdir / "triggers", progress=progress,
        )
        for kind in config.starts
    }  # fmt: skip
    told = torch.cat([conditions(pipe, [text])["encoder_hidden_states"] for text in captions])
    model = model_digest(pipe)
    decides = [
        model,
        scheduling(drawing.scheduler),
        encoder.name,
        _judging(config),
    ]
    findings = []
    for i, pair in enumerate(own):
        progress(f"judging: picture {i} of {len(own)}")
        mine = {kind: found[i] for kind, found in triggers.items()}
        states = torch.stack(
            [told[i].float(), *(one.at[mark] for one in mine.values() for mark in config.marks)]
        )
        judged = _judged(
            drawing, states, wanted[i], encoder, config, size, decides, workdir, progress
        )
        findings.append(_finding(pair, originals[i], mine, judged, config))
    return Audit(config, encoder.name, model, tuple(findings))


def chances(config: AuditConfig, num_pairs: int) -> list[int]:
    """The seed of the searches of each pair, by its place."""
    return new_seeds(torch.Generator().manual_seed(config.seed), num_pairs)


def merged(audits: Sequence[Audit]) -> Audit:
    """One audit of several models with the same settings, such as experts, each of its own
    pictures."""
    if len({(one.config, one.encoder) for one in audits}) != 1:
        raise ValueError(f"{len(audits)} audits of different settings, or none")
    models = "+".join(one.model for one in audits)
    findings = tuple(found for one in audits for found in one.findings)
    return Audit(audits[0].config, audits[0].encoder, models, findings)


def _sampled_by(pipe: Any, config: AuditConfig, size: int) -> Any:
    """The pipeline with the scheduler that samples; refuses settings that it cannot run."""
    sample(
        pipe, (), seeds=(), steps=config.sampling_steps, guidance=config.guidance, size=size,
        scheduler=config.scheduler,
    )  # fmt: skip
    if config.scheduler is None:
        return pipe
    import diffusers

    with hushed():
        kind = getattr(diffusers, config.scheduler)
        return with_parts(pipe, scheduler=kind.from_config(pipe.scheduler.config))


def _other(pairs: Sequence[Pair], place: int) -> str:
    """The caption of another control than the picture's own."""
    own = pairs[place].caption
    texts = [pair.caption for pair in pairs if pair.role == "control" and pair.caption != own]
    if not texts:
        raise ValueError(NO_START)
    return texts[place % len(texts)]


def _judging(config: AuditConfig) -> dict[str, Any]:
    """Of the settings what the pictures of given states depend on."""
    names = ("seeds", "guidance", "sampling_steps", "scheduler", "size", "seed")
    return {name: getattr(config, name) for name in names}


def _judged(
    drawing: Any,
    states: Tensor,
    wanted: Tensor,
    encoder: Encoder,
    config: AuditConfig,
    size: int,
    decides: list[Any],
    workdir: Path | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Of the pictures of states [K, T, C]: similarity [K, S], diversity [K] (of one seed, 1), and
    the most similar picture of each, uint8 [K, H, H, 3]."""
    path = None
    if workdir is not None:
        own = digest(decides, [("states", states), ("wanted", wanted)])
        path = workdir / f"{own[:32]}.safetensors"
        kept = _read(path)
        if kept is not None:
            return kept
    count = config.seeds
    seeds = list(range(config.seed, config.seed + count)) * len(states)
    rows = {"encoder_hidden_states": states.repeat_interleave(count, 0)}
    images = draw_states(drawing, rows, seeds, config.sampling(size), progress)
    images = images.unflatten(0, (len(states), count))
    shown = features(encoder, images)
    similarity = copy_similarity(shown, wanted.expand(len(states), -1))
    alike = diversity(shown) if count > 1 else torch.ones(len(states), dtype=torch.float64)
    best = images[torch.arange(len(states)), similarity.argmax(1)]
    judged = {"similarity": similarity, "diversity": alike, "best": best.contiguous()}
    if path is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        with writing(path, overwrite=True) as part:
            save_tensors(part, judged, {ABOUT: json.dumps(asdict(config))})
    return judged


def _read(path: Path) -> dict[str, Tensor] | None:
    """What was kept; None if nothing, or a broken file, which is made anew."""
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n).clone() for n in ("similarity", "diversity", "best")}
    except (SafetensorError, OSError):
        return None


def _finding(
    pair: Pair,
    original: Tensor,
    triggers: dict[str, Trigger],
    judged: Mapping[str, Tensor],
    config: AuditConfig,
) -> Finding:
    keys = [(kind, mark) for kind in triggers for mark in config.marks]
    similarity = judged["similarity"]
    found: dict[str, dict[int, Tensor]] = {kind: {} for kind in triggers}
    alike = {"caption": float(judged["diversity"][0])}
    for (kind, mark), values, value in zip(
        keys, similarity[1:], judged["diversity"][1:], strict=True
    ):
        found[kind][mark] = values
        alike[f"search from {kind}"] = float(value)
    best = 1 + int(similarity[1:].amax(1).argmax())
    return Finding(
        pair, similarity[0], found, alike, original, judged["best"][0], judged["best"][best],
        triggers,
    )  # fmt: skip
