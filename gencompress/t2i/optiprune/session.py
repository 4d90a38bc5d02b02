"""One call of a pipeline with OptiPrune: noise is searched for, then tokens go while it samples."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gencompress.core.progress import Progress
from gencompress.t2i.optiprune.attention import default_grid
from gencompress.t2i.optiprune.excite import Updates, callback, excite
from gencompress.t2i.optiprune.noise import (
    Mapped,
    NoiseConfig,
    map_noise,
    noise_shape,
    opening,
)
from gencompress.t2i.optiprune.prune import PruneConfig, pruned
from gencompress.t2i.optiprune.sites import largest_grid
from gencompress.t2i.optiprune.subjects import Pieces, Subject, find_subjects
from gencompress.t2i.pipeline import denoiser, sequence_length
from gencompress.t2i.sample import default_size
from gencompress.t2i.tiny import packed

LOGGER = logging.getLogger(__name__)
NEEDED = ("prompt", "latents", "generator", "num_inference_steps", "height", "width")
# arguments of calls that change nothing in how noise is scored, or are heeded; others are refused
HEEDED = {
    *NEEDED, "self", "kwargs", "num_images_per_prompt", "guidance_scale", "true_cfg_scale", "eta",
    "guidance_rescale", "negative_prompt", "negative_prompt_2", "negative_prompt_3",
    "negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask",
    "output_type", "return_dict", "clean_caption", "use_resolution_binning",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip

Wanted = Literal["auto"] | Sequence[str] | Sequence[int]


@dataclass(eq=False)
class Session:
    """What goes on within `optiprune`.

    Attributes:
        rows: plain dicts, in order. Kind "noise": of each picture, its subjects and scores before
            and after; "tokens": of each shape of layers met, whether it is pruned, and what that
            saves by forecast; "pictures": of each call, seconds and passes of the denoiser, one
            sample forward being one and a backward two.
        noise: of each call.
    """

    prune: PruneConfig | None  # its min_tokens are those of each call where `least` is None
    least: int | None
    subjects: Wanted
    pieces: Pieces
    noise_config: NoiseConfig | None
    updates: Updates | None
    bypass: str
    progress: Progress
    on: bool = True
    rows: list[dict[str, Any]] = field(default_factory=list)
    noise: list[Mapped] = field(default_factory=list)


def words(row: dict[str, Any]) -> str:
    """A row of a session as a sentence."""
    if row["kind"] == "noise":
        verdict = "valid" if row["valid"] else "not valid"
        return (
            f"{row['prompt']!r}: noise for {row['subjects']} scores {row['score']:.3f}, "
            f"{row['start']:.3f} before; {verdict}"
        )
    if row["kind"] == "tokens":
        where = f"{row['layers']} layers of {row['grid']}, {row['phase']}"
        if "saved_ms" not in row:
            return f"{where}: {row['kept']} of {row['tokens']} tokens kept"
        saved = (row["attention_ms"] - row["pruned_ms"]) * row["layers"]
        why = f"saves {saved:.3g} ms of attention, matching costs {row['matching_ms']:.3g} ms"
        if row["pruned"]:
            return f"{where}: {row['kept']} of {row['tokens']} tokens kept; {why}"
        return f"{where}: not pruned, since it would not help here: {why}"
    many = f"{row['pictures']} pictures" if row["pictures"] > 1 else "a picture"
    return (
        f"{many}: {row['search_seconds']:.1f} s of search, "
        f"{row['sampling_seconds']:.1f} s of sampling, {row['passes']:.0f} passes each"
    )


def subjects_of(
    pipe: Any, prompts: Sequence[str], wanted: Wanted, pieces: Pieces
) -> list[tuple[Subject, ...]]:
    """Of each prompt; as `find_subjects`, whose error also tells how to go without."""
    try:
        return [find_subjects(pipe, prompt, wanted, pieces=pieces) for prompt in prompts]
    except ValueError as problem:
        raise ValueError(f"{problem}; without noise and updates none is needed") from None


def default_side(pipe: Any) -> int:
    """Of the pictures in pixels, where a call of the pipeline names no size."""
    side = getattr(pipe, "default_sample_size", None)
    return side * pipe.vae_scale_factor if isinstance(side, int) else default_size(pipe)


@dataclass
class _Call:
    """What a call asks for."""

    prompts: list[str]  # one a picture
    height: int
    width: int
    steps: int
    given: dict[str, Any]  # its arguments


def draw(
    session: Session, call: Callable[..., Any], pipe: Any, bound: inspect.BoundArguments
) -> Any:
    """One call: search, then sampling."""
    given = bound.arguments
    asked = _asked(pipe, given)
    tokens = None if session.prune is None else _tokens(session, pipe, asked)
    searching = session.noise_config is not None or session.updates is not None
    passes = Passes()
    began = time.perf_counter()
    with passes.counted(denoiser(pipe)[0]):
        found: list[tuple[Subject, ...]] = []
        if searching:
            _refuse_unheeded(call, pipe, given)
            found = subjects_of(pipe, asked.prompts, session.subjects, session.pieces)
            given["latents"] = _starts(pipe, asked)
        if session.noise_config is not None:
            given["latents"] = _searched(session, pipe, asked, found, tokens)
        searched = time.perf_counter()
        with _pruned(session, pipe, tokens, "sampling"), contextlib.ExitStack() as updating:
            if session.updates is not None:
                _update(session, pipe, asked, found, updating)
            if searching:
                given["latents"] = given["latents"].to(denoiser(pipe)[0].dtype)
            made = call(*bound.args, **bound.kwargs)
    count = max(1, len(asked.prompts))
    _note(
        session,
        {
            "kind": "pictures",
            "pictures": count,
            "search_seconds": searched - began,
            "sampling_seconds": time.perf_counter() - searched,
            "passes": passes.count / count,
        },
    )
    return made


def _asked(pipe: Any, given: dict[str, Any]) -> _Call:
    prompt = given["prompt"]
    texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    side = default_side(pipe)
    return _Call(
        [text for text in texts for _ in range(given.get("num_images_per_prompt") or 1)],
        given["height"] or side,
        given["width"] or side,
        given["num_inference_steps"],
        given,
    )


def _tokens(session: Session, pipe: Any, asked: _Call) -> PruneConfig:
    """The settings of pruning for one call."""
    assert session.prune is not None
    high, wide = largest_grid(pipe, asked.height, asked.width)
    least = high * wide if session.least is None else session.least
    config = replace(session.prune, min_tokens=least, steps=asked.steps)
    grid = default_grid(pipe, asked.height)
    if session.updates is not None and grid[0] * grid[1] >= least:
        raise ValueError(
            f"updates look at the attention on {grid[0]} x {grid[1]} tokens, which are pruned; "
            "expected ratio 0, more min_tokens, or no updates"
        )
    return config


def _refuse_unheeded(call: Callable[..., Any], pipe: Any, given: dict[str, Any]) -> None:
    """Raises ValueError for arguments that noise would be scored without."""
    usual = {name: one.default for name, one in inspect.signature(call).parameters.items()}
    told = sequence_length(pipe)
    for name, value in given.items():
        if name in HEEDED or value is None or value is usual[name]:
            continue
        if isinstance(value, Tensor) or value not in (usual[name], told.get(name)):
            raise ValueError(
                f"{name} is given, which noise is not scored with; expected a prompt alone, or "
                "neither noise nor updates"
            )
    if given.get("use_resolution_binning") and given["height"] not in (None, default_side(pipe)):
        raise ValueError(
            f"use_resolution_binning with pictures of {given['height']} x {given['width']}: their "
            "noise is of another size; expected False"
        )
    if given["prompt"] is None:
        raise ValueError("no prompt is given; noise is scored by the attention to its subjects")


def _starts(pipe: Any, asked: _Call) -> Tensor:
    """float32 [N, ...]: the noise that the plain pipeline would start from."""
    from diffusers.utils.torch_utils import randn_tensor

    model, _ = denoiser(pipe)
    if asked.height != asked.width or asked.height % pipe.vae_scale_factor:
        raise ValueError(
            f"pictures of {asked.height} x {asked.width}: noise is optimised for square ones, of a "
            f"multiple of {pipe.vae_scale_factor} pixels"
        )
    shape = (len(asked.prompts), *noise_shape(pipe, asked.height))
    given, generator = asked.given["latents"], asked.given["generator"]
    flux = "Flux" in type(model).__name__
    if given is not None:
        wanted = packed(torch.empty(shape)).shape if flux else shape
        if tuple(given.shape) != tuple(wanted):
            raise ValueError(f"latents {tuple(given.shape)}: expected {tuple(wanted)}")
        start: Tensor = given.to(model.device).float()
        return start
    if isinstance(generator, list | tuple):
        generator = list(generator)
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} pictures")
    drawn = randn_tensor(shape, generator=generator, device=model.device, dtype=model.dtype).float()
    return packed(drawn) if flux else drawn


def _searched(
    session: Session,
    pipe: Any,
    asked: _Call,
    found: list[tuple[Subject, ...]],
    tokens: PruneConfig | None,
) -> Tensor:
    """The starts of `asked`, moved. Tokens are pruned meanwhile unless the maps show all."""
    assert session.noise_config is not None
    grid = default_grid(pipe, asked.height)
    if tokens is not None:
        hidden = grid[0] * grid[1] >= tokens.min_tokens
        tokens = None if hidden else replace(tokens, seed=tokens.seeds[0])
    starts = asked.given["latents"]
    with _pruned(session, pipe, tokens, "search"), torch.enable_grad():
        mapped = map_noise(
            pipe,
            asked.prompts,
            found,
            replace(session.noise_config, sampling_steps=asked.steps),
            generators=[_others(start) for start in starts],
            starts=starts,
            size=asked.height,
            progress=session.progress,
        )
    session.noise.append(mapped)
    for prompt, named, last in zip(asked.prompts, found, mapped.scores, strict=True):
        row = {
            "kind": "noise",
            "prompt": prompt,
            "subjects": ", ".join(subject.word for subject in named),
            "start": last.start,
            "score": last.score,
            "cross": last.cross,
            "own": last.own,
            "kl": last.kl,
            "valid": last.valid,
        }
        _note(session, row)
    return mapped.latents


def _others(start: Tensor) -> torch.Generator:
    """Draws the starts of later rounds: a matter of the first alone, so that what the caller's
    generator gives later is what it gives the plain pipeline."""
    seed = hashlib.sha256(start.cpu().contiguous().numpy().tobytes()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(seed, "big"))


def _update(
    session: Session,
    pipe: Any,
    asked: _Call,
    found: list[tuple[Subject, ...]],
    updating: contextlib.ExitStack,
) -> None:
    """Updates the latents of a call before its first step, and sets up those between its steps,
    after the caller's own."""
    assert session.updates is not None
    given = asked.given
    update = updating.enter_context(
        excite(pipe, asked.prompts, found, session.updates, steps=asked.steps, size=asked.height)
    )
    timestep, scheduler = opening(pipe, asked.steps)
    spread = getattr(scheduler, "init_noise_sigma", 1.0)
    given["latents"] = update(given["latents"] * spread, 0, timestep, scheduler) / spread
    ours, theirs = callback(update), given["callback_on_step_end"]
    names = getattr(theirs, "tensor_inputs", given["callback_on_step_end_tensor_inputs"])
    given["callback_on_step_end_tensor_inputs"] = list(dict.fromkeys(["latents", *names]))

    def both(owner: Any, step: int, now: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if theirs is not None:
            told = {name: tensors[name] for name in names}
            tensors = tensors | theirs(owner, step, now, told)
        return ours(owner, step, now, tensors)

    given["callback_on_step_end"] = both


@contextlib.contextmanager
def _pruned(session: Session, pipe: Any, tokens: PruneConfig | None, phase: str) -> Iterator[None]:
    if tokens is None:
        yield
        return
    with pruned(pipe, tokens, bypass=session.bypass) as pruning:
        yield
    known = [
        {k: row.get(k) for k in ("phase", "grid", "tokens", "kept", "layers", "pruned")}
        for row in session.rows
        if row["kind"] == "tokens"
    ]
    for row in pruning.rows:
        row = {"kind": "tokens", "phase": phase} | row
        if {
            k: row[k] for k in ("phase", "grid", "tokens", "kept", "layers", "pruned")
        } not in known:
            _note(session, row)


def _note(session: Session, row: dict[str, Any]) -> None:
    session.rows.append(row)
    bypassed = row["kind"] == "tokens" and not row["pruned"]
    LOGGER.log(logging.WARNING if bypassed else logging.INFO, words(row))


class Passes:
    """How many samples went through a denoiser; there and back counts as three."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def counted(self, model: torch.nn.Module) -> Iterator[None]:
        def add(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = args[0] if args else named["sample" if "sample" in named else "hidden_states"]
            both_ways = torch.is_grad_enabled() and first.requires_grad
            self.count += len(first) * (3 if both_ways else 1)

        handle = model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
