"""Weights that matter for memorised captions and less for the empty one, by |W_ij| ||x_j|| (Chavhan
et al. 2024, after Wanda).

Of every layer in a scope, O outputs and I inputs, the norms of its input's columns are summed while
the pipeline samples, in each call of the denoiser: rows are brought to length 1 first, which is
part of the method. Selected are the highest in each row, exactly, if higher than for the empty
prompt.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gencompress_kernels.rownorm_colsq import rownorm_colsq
from gencompress_kernels.wanda_mask import wanda_mask
from torch import Tensor, nn

from gencompress.core.mask import Mask
from gencompress.core.progress import Progress, quiet
from gencompress.t2i.calibrate import conditions
from gencompress.t2i.dori.draw import Clock, Sampling, expect_unet, walk
from gencompress.t2i.dori.masks import union
from gencompress.t2i.owned import expect_plain
from gencompress.t2i.pipeline import denoiser, encode_prompts

# how the paths of their layers end; the last is in the text encoders, which run once
SCOPES = ("ff.net.2", "ff.net.0.proj", "attn2.to_k", "attn2.to_v", "mlp.fc2")
TEXT = "mlp.fc2"
ROUNDING = 1e-9  # 0.29 * 100 = 28.999999999999996 counts as 29


@dataclass(frozen=True)
class WandaConfig:
    """The defaults are the public settings against memorisation."""

    scope: str = "ff.net.2"
    rho: float = 0.01  # of each row, before the comparison with the empty prompt
    steps: int = 10  # the first calls of the denoiser
    select_ratio: float = 0.0  # a weight goes if selected in more than this share of the steps
    group_size: int | None = None  # captions that share statistics; None: all. Masks are united

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r}; expected one of {', '.join(SCOPES)}")
        if not 0 <= self.rho <= 1 or not 0 <= self.select_ratio < 1:
            raise ValueError(
                f"rho {self.rho}: 0 to 1; select_ratio {self.select_ratio}: 0 to under 1"
            )
        if self.steps < 1 or (self.group_size is not None and self.group_size < 1):
            raise ValueError(f"steps {self.steps}, group_size {self.group_size}: 1 or more")


@dataclass(frozen=True, eq=False)
class Norms:
    """Squared norms of the columns of inputs: by layer float32 [K, I], of K calls."""

    squares: dict[str, Tensor]

    def __add__(self, other: Norms) -> Norms:
        """Of both groups of prompts together."""
        return Norms({name: one + other.squares[name] for name, one in self.squares.items()})


def layers(pipe: Any, scope: str) -> dict[str, nn.Linear]:
    """The layers of a scope by "part.path", in the order of the model, whatever its depth.

    Raises ValueError for another scope, none of it, or one that an adapter has wrapped.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope {scope!r}; expected one of {', '.join(SCOPES)}")
    own = denoiser(pipe)[1]
    found = {}
    for part, model in pipe.components.items():
        fits = part.startswith("text_encoder") if scope == TEXT else part == own
        if fits and isinstance(model, nn.Module):
            for path, layer in model.named_modules():
                if path.endswith(f".{scope}"):
                    expect_plain(path, layer)
                    found[f"{part}.{path}"] = layer
    if not found:
        raise ValueError(f"a {type(pipe).__name__} has no layer {scope!r}")
    return found


def gather_norms(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    config: WandaConfig = WandaConfig(),  # noqa: B008 (frozen)
    how: Sampling = Sampling(),  # noqa: B008 (frozen)
    progress: Progress = quiet,
) -> Norms:
    """Of the first `config.steps` calls while every prompt is sampled, guidance included: both
    halves of a batch count. Sums stay on the model's device, [K, I] for each layer. Sampling stops
    after these calls; `how.steps` still decides at what noise they are.

    Raises:
        ValueError: not one seed a prompt, no prompts, fewer calls than asked for, or a pipeline
            without such layers.
    """
    if not prompts or len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds; expected one each")
    clock, found = Clock(0), layers(pipe, config.scope)
    if config.scope == TEXT:
        with _summing(found, 1, clock) as squares:
            encode_prompts(pipe, prompts)
        return Norms(squares)
    expect_unet(pipe)
    rows = conditions(pipe, prompts)
    with _summing(found, config.steps, clock) as squares:
        for _ in walk(pipe, rows, seeds, how, clock=clock, calls=config.steps, progress=progress):
            if clock.call + 1 < config.steps:
                raise ValueError(
                    f"{how.steps} sampling steps call the denoiser {clock.call + 1} times; "
                    f"{config.steps} are asked for"
                )
    return Norms(squares)


def norms_of_state(pipe: Any, state: Tensor, config: WandaConfig, how: Sampling) -> Norms:
    """Of one text state [T, C] in place of prompts, from the noise of seed 0; not for TEXT, which
    no state passes."""
    clock, rows = Clock(), {"encoder_hidden_states": state[None]}
    with _summing(layers(pipe, config.scope), config.steps, clock) as squares:
        for _ in walk(pipe, rows, [0], how, clock=clock, calls=config.steps):
            pass
    return Norms(squares)


def select(pipe: Any, target: Norms, base: Norms, config: WandaConfig) -> Mask:
    """The mask, on the CPU: a weight is removed if it is among the first floor(rho I) of its row
    for the target prompts, and higher than for the base prompts, in more than `select_ratio` of
    the steps.

    Raises ValueError for norms of other layers than the scope's.
    """
    keep = {}
    found = layers(pipe, config.scope)
    if not target.squares.keys() == base.squares.keys() == found.keys():
        names = ", ".join([*target.squares, *base.squares][:2])
        raise ValueError(f"norms of other layers than those of {config.scope}, such as {names}")
    for name, layer in found.items():
        count = math.floor(config.rho * layer.in_features + ROUNDING)
        of_target, of_base = (norms.squares[name][: config.steps] for norms in (target, base))
        least = math.floor(config.select_ratio * len(of_target) + ROUNDING) + 1
        gone = wanda_mask(layer.weight, of_target.sqrt(), of_base.sqrt(), count, least=least)
        keep[f"{name}.weight"] = ~gone.cpu()
    return Mask(keep)


def find(
    pipe: Any,
    captions: Sequence[str],
    config: WandaConfig = WandaConfig(),  # noqa: B008 (frozen)
    how: Sampling = Sampling(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
    progress: Progress = quiet,
) -> Mask:
    """The weights to remove for memorised captions: caption i and the empty prompt beside it are
    sampled from the noise of seed + i. One mask, united over groups of `config.group_size`."""
    size = config.group_size or len(captions)
    masks = []
    for first in range(0, len(captions), max(size, 1)):
        part = captions[first : first + size]
        seeds = range(seed + first, seed + first + len(part))
        target, base = (
            gather_norms(pipe, texts, seeds, config, how, progress)
            for texts in (part, [""] * len(part))
        )
        masks.append(select(pipe, target, base, config))
    return union(masks)


def settings(config: WandaConfig, how: Sampling) -> dict[str, Any]:
    """For `masks.provenance`."""
    return {**asdict(config), "sampling": asdict(how)}


@contextlib.contextmanager
def _summing(
    found: Mapping[str, nn.Linear], steps: int, clock: Clock
) -> Iterator[dict[str, Tensor]]:
    """Adds up, by layer, the rows that enter it in each of the first calls."""
    squares = {
        name: torch.zeros(steps, layer.in_features, device=layer.weight.device)
        for name, layer in found.items()
    }

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if 0 <= clock.call < steps:
                squares[name][clock.call] += rownorm_colsq(args[0])

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in found.items()]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
