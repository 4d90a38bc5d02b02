"""Searching text states that bring a picture back, though its caption may not: an audit of whether
a memory was removed or only hidden (Kowalczuk et al. 2025, "Finding Dori").

Of every picture one embedding is optimised under the denoising loss; the U-Net is frozen. Noise and
timesteps are fresh in every step: fitted to one draw, an embedding would prove nothing. On pictures
that are not memorised, 50 steps find nothing: run them too.

N pictures, T tokens of width C.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.files import save_tensors, writing
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.data.cache import digest
from gencompress.t2i.distill import Draws, diffuse, draws, predict
from gencompress.t2i.dori.draw import expect_unet
from gencompress.t2i.dori.masks import model_digest
from gencompress.t2i.hooks import evaluated, replace
from gencompress.t2i.pipeline import scheduling

STARTS = ("caption", "normal", "other")
ABOUT = "gencompress.trigger"  # the key of the metadata of a file: JSON
CHECK = 2**31  # added to a picture's seed for the noise that losses are compared on
CROSS = (".attn2.to_k", ".attn2.to_v")


@dataclass(frozen=True)
class SearchConfig:
    """The defaults are the paper's; nothing stops early."""

    steps: int = 50
    draws: int = 8  # of noise and timestep a step
    rate: float = 0.1  # of Adam
    freeze_first: bool = False  # leave the state of the start token as it is
    marks: tuple[int, ...] = ()  # steps after which the states are kept too: what fewer would find
    every: int = 10  # steps between rows of the log
    at_once: int = 8  # pictures in a call of the U-Net

    def __post_init__(self) -> None:
        if min(self.steps, self.draws, self.every, self.at_once) < 1 or not self.rate > 0:
            raise ValueError(f"{self}: counts are 1 or more, the rate above 0")
        if any(not 0 < mark <= self.steps for mark in self.marks):
            raise ValueError(f"marks {self.marks}: steps from 1 to {self.steps}")


@dataclass(frozen=True, eq=False)
class Trigger:
    """What was found for a picture."""

    states: Tensor  # float32 [T, C]
    at: dict[int, Tensor]  # the same after each of the marks, and after all steps
    log: list[dict[str, float]]  # step, loss on noise that stays the same
    seconds: float  # its share of the search


def starts(
    pipe: Any, kind: str, captions: Sequence[str], seeds: Sequence[int], others: Sequence[str] = ()
) -> Tensor:
    """float32 [N, T, C] on the CPU: where to search from.

    Args:
        kind: "caption": the picture's own; "normal": N(0, 1) from its seed; "other": the caption
            in `others`, which is not memorised.

    Raises:
        ValueError: another kind, or not one seed (and for "other", one other caption) a picture.
    """
    if kind not in STARTS:
        raise ValueError(f"start {kind!r}; expected one of {', '.join(STARTS)}")
    texts = others if kind == "other" else captions
    if len(seeds) != len(captions) or len(texts) != len(captions):
        raise ValueError(
            f"{len(captions)} captions, {len(seeds)} seeds, {len(texts)} texts to start from; "
            "expected one each"
        )
    if kind != "normal":
        return conditions(pipe, texts)["encoder_hidden_states"].float()
    shape = conditions(pipe, [""])["encoder_hidden_states"].shape[1:]
    return draws(seeds).normal(*shape)


def search(
    pipe: Any,
    latents: Tensor,
    start: Tensor,
    seeds: Sequence[int],
    config: SearchConfig = SearchConfig(),  # noqa: B008 (frozen)
    *,
    workdir: Path | None = None,
    progress: Progress = quiet,
) -> list[Trigger]:
    """A trigger for each picture, independent of which others are searched for beside it, to the
    rounding of larger matrix products. No gradient of a weight is formed; the pipeline's models
    are left as they are. The embedding is float32 whatever the model is.

    Args:
        latents: float [N, C, h, w], from `calibrate.image_latents`.
        start: [N, T, C], from `starts`.
        seeds: one a picture; of all its noise.
        workdir: each found trigger is kept there, and taken from there by a search of the same
            picture, start, model and settings.

    Raises:
        ValueError: a pipeline other than Stable Diffusion 1 or 2, shapes that do not fit, or a
            search that leaves the numbers.
    """
    unet = expect_plain(pipe)
    if not len(latents) == len(start) == len(seeds) or start.ndim != 3:
        raise ValueError(
            f"{len(latents)} pictures, starts {tuple(start.shape)}, {len(seeds)} seeds; expected "
            "N, [N, T, C] and N"
        )
    found: dict[int, Trigger] = {}
    paths: dict[int, Path] = {}
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        about = [model_digest(pipe), scheduling(pipe.scheduler), _decides(config)]
        for i, seed in enumerate(seeds):
            own = digest([*about, seed], [("latents", latents[i]), ("start", start[i])])
            paths[i] = workdir / f"{own[:32]}.safetensors"
            kept = _read(paths[i])
            if kept is not None:
                found[i] = kept
    missing = [i for i in range(len(seeds)) if i not in found]
    for first in range(0, len(missing), config.at_once):
        part = missing[first : first + config.at_once]
        progress(f"searching: picture {len(found)} of {len(seeds)}")
        with frozen(unet):
            own = [seeds[i] for i in part]
            made = _search(unet, pipe.scheduler, latents[part], start[part], own, config, progress)
        for i, trigger in zip(part, made, strict=True):
            found[i] = trigger
            if i in paths:
                _write(paths[i], trigger)
    return [found[i] for i in range(len(seeds))]


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no weight takes a gradient, and every module is in evaluation mode."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        with evaluated(model):
            yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextlib.contextmanager
def shared(unet: nn.Module, count: int) -> Iterator[None]:
    """Within the block keys and values of cross-attention are computed once for every `count` rows
    of text, which are equal."""
    with contextlib.ExitStack() as stack:
        for path, _ in unet.named_modules():
            if path.endswith(CROSS):
                stack.enter_context(
                    replace(
                        unet,
                        path,
                        lambda forward, x, *more: forward(x[::count], *more).repeat_interleave(
                            count, 0
                        ),
                    )
                )
        yield


def loss_of(
    unet: nn.Module, scheduler: Any, latents: Tensor, states: Tensor, chance: Draws, count: int
) -> Tensor:
    """float32 [N]: the denoising loss of each picture under its states, over `count` draws.

    Args:
        latents, states: [N, ...].
        chance: each picture's generator `count` times, one after the other.
    """
    noised = diffuse(latents.repeat_interleave(count, 0), scheduler, chance)
    told = {"encoder_hidden_states": states.repeat_interleave(count, 0)}
    errors = (predict(unet, noised, told) - noised.target).square().flatten(1).mean(1)
    return errors.view(-1, count).mean(1)


def _search(
    unet: Any,
    scheduler: Any,
    latents: Tensor,
    start: Tensor,
    seeds: Sequence[int],
    config: SearchConfig,
    progress: Progress,
) -> list[Trigger]:
    device, began = unet.device, time.perf_counter()
    latents = latents.to(device).float()
    states = start.to(device).float().clone().requires_grad_()
    optimizer = torch.optim.Adam([states], config.rate)
    fresh = _each(seeds, config.draws, device)
    at: dict[int, Tensor] = {}
    log: list[tuple[int, list[float]]] = []

    def check(step: int) -> None:
        """On the same noise every time."""
        progress(f"steps of searching: {step} of {config.steps}")
        same = _each([seed + CHECK for seed in seeds], config.draws, device)
        with torch.no_grad():
            losses = loss_of(unet, scheduler, latents, states, same, config.draws)
        log.append((step, losses.tolist()))

    with shared(unet, config.draws), torch.enable_grad():
        check(0)
        for step in range(1, config.steps + 1):
            optimizer.zero_grad()
            # summed, so that the gradient of a picture does not know of its neighbours
            loss_of(unet, scheduler, latents, states, fresh, config.draws).sum().backward()
            assert states.grad is not None
            if config.freeze_first:
                states.grad[:, 0] = 0
            optimizer.step()
            if step % config.every == 0 or step == config.steps:
                check(step)
            if step in config.marks or step == config.steps:
                at[step] = states.detach().cpu().clone()
    if not bool(states.isfinite().all()):
        raise ValueError("the search left the numbers: NaN or infinity among the states")
    seconds = (time.perf_counter() - began) / len(seeds)
    return [
        Trigger(
            at[config.steps][i],
            {step: one[i] for step, one in at.items()},
            [{"step": step, "loss": losses[i]} for step, losses in log],
            seconds,
        )
        for i in range(len(seeds))
    ]


def _each(seeds: Sequence[int], count: int, device: torch.device) -> Draws:
    """A generator for each seed, from which `count` samples draw in turn."""
    own = draws(seeds, device)
    return Draws(tuple(one for one in own.generators for _ in range(count)), device)


def expect_plain(pipe: Any) -> Any:
    """The U-Net, if all it is told are the states that are searched for. Raises ValueError for a
    pipeline other than Stable Diffusion 1 or 2."""
    unet = expect_unet(pipe)
    config = unet.config
    if config.addition_embed_type is not None or config.encoder_hid_dim_type is not None:
        raise ValueError(
            f"a {type(pipe).__name__} whose U-Net is told more than text states: the search is for "
            "Stable Diffusion 1 and 2"
        )
    return unet


def _decides(config: SearchConfig) -> dict[str, Any]:
    """Of the settings what a result depends on."""
    return {name: value for name, value in asdict(config).items() if name != "at_once"}


def _write(path: Path, trigger: Trigger) -> None:
    tensors = {str(step): one.contiguous() for step, one in trigger.at.items()}
    about = json.dumps({"log": trigger.log, "seconds": trigger.seconds})
    with writing(path, overwrite=True) as part:
        save_tensors(part, tensors, {ABOUT: about})


def _read(path: Path) -> Trigger | None:
    """What was kept; None if nothing, or a broken file, which is made anew."""
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, Any] = json.loads((file.metadata() or {})[ABOUT])
            names = file.keys()
            at = {int(name): file.get_tensor(name).clone() for name in names}
        return Trigger(at[max(at)], at, about["log"], about["seconds"])
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
