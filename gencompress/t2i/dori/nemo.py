"""Neurons that hold a memory, found and thinned out by NeMo (Hintersdorf et al. 2024).

A neuron is an output of a value projection of cross-attention, a row of `attn2.to_v.weight`, in
the down and mid blocks of a U-Net. It gets the text alone, so its activation needs no call of the
U-Net. How strongly a prompt is remembered shows without its picture: the first noise predictions
from different seeds then resemble each other.

S seeds, d neurons of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.mask import Mask
from gencompress.core.score import Moments, add_tokens
from gencompress.t2i.calibrate import conditions, conditions_of
from gencompress.t2i.dori.draw import expect_unet
from gencompress.t2i.dori.ms_ssim import ms_ssim, scaled
from gencompress.t2i.hooks import replace
from gencompress.t2i.owned import expect_plain
from gencompress.t2i.sample import default_size

VALUES = ".attn2.to_v"
# what a U-Net is cached by: modules that are called once each, one after the other
STAGES = ("ResnetBlock2D", "Transformer2DModel", "Downsample2D")
PUBLIC_TAU = 0.428  # of Stable Diffusion 1.4, at the second timestep; better calibrated anew

Blocked = Mapping[str, Tensor]  # by layer, bool [d]: the neurons that give 0


@dataclass(frozen=True)
class NemoConfig:
    """The defaults are the public ones, but for `index`."""

    seeds: int = 10
    seed: int = 0  # of all the noise
    index: int = 0  # which of the sampling timesteps predicts; the public code takes 1
    steps: int = 50  # of sampling, which decide the timesteps
    theta: float = 5.0  # deviations from the mean at which a neuron is a candidate, to begin with
    fall: float = 0.25  # of theta after every trial; and one more of the highest of each layer
    last: float = 1.0  # the search ends when theta gets there
    most: int = 1280  # or so many of the highest

    def __post_init__(self) -> None:
        if self.seeds < 2 or not 0 <= self.index < self.steps or not self.fall > 0:
            raise ValueError(
                f"seeds {self.seeds}: 2 or more; index {self.index}: 0 to under {self.steps}; "
                f"fall {self.fall}: above 0"
            )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of activations of ordinary prompts, by layer: float32 [d]."""

    mean: dict[str, Tensor]
    deviation: dict[str, Tensor]  # unbiased
    count: int  # prompts


@dataclass(frozen=True, eq=False)
class Found:
    """What NeMo says of one prompt."""

    memorised: bool  # some seeds' predictions are more alike than tau
    neurons: dict[str, Tensor]  # by layer bool [d]; none if it is not memorised
    candidates: dict[str, Tensor]  # before refinement
    likeness: float  # the largest between seeds, nothing blocked
    left: float  # the largest of a seed to itself with the neurons blocked
    tau: float  # what refinement kept `left` at or below
    trials: list[dict[str, float]] = field(default_factory=list)


def layers(unet: nn.Module) -> list[str]:
    """The value projections in the order in which they run, however many a block has.

    Raises ValueError for none, or one with a bias or an adapter, whose rows are not its neurons.
    """
    found = []
    for path, layer in unet.named_modules():
        if path.endswith(VALUES) and path.startswith(("down_blocks", "mid_block")):
            expect_plain(path, layer)
            if layer.bias is not None:
                raise ValueError(f"{path} has a bias: zeroing its rows would not silence neurons")
            found.append(path)
    if not found:
        raise ValueError(f"a {type(unet).__name__} without {VALUES[1:]} on the way down")
    return found


@torch.no_grad()
def activations(unet: nn.Module, states: Tensor) -> dict[str, Tensor]:
    """float32 [N, d] by layer: the mean over tokens of |W y| for text states [N, T, C]."""
    weights = {path: unet.get_parameter(f"{path}.weight") for path in layers(unet)}
    return {
        path: (states.to(weight) @ weight.T).float().abs().mean(1)
        for path, weight in weights.items()
    }


def statistics(pipe: Any, prompts: Sequence[str], batch: int = 64) -> Statistics:
    """Of ordinary prompts; about 50,000 in the paper. Raises ValueError for fewer than two."""
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts; expected 2 or more for a deviation")
    unet = expect_unet(pipe)
    seen: dict[str, Moments] = {}
    for first in range(0, len(prompts), batch):
        states = conditions(pipe, prompts[first : first + batch])["encoder_hidden_states"]
        for path, rows in activations(unet, states.to(unet.device)).items():
            seen[path] = add_tokens(seen.get(path), rows)
    deviation = {p: (m.m2 / (m.count - 1)).sqrt().float() for p, m in seen.items()}
    return Statistics({p: m.mean.float() for p, m in seen.items()}, deviation, len(prompts))


def unusual(values: Mapping[str, Tensor], usual: Statistics) -> dict[str, Tensor]:
    """By layer |a - mean| / deviation, float32 [d] of activations [d]. Where ordinary prompts never
    differ, 0 for their value and infinity for any other."""
    found = {}
    for path, value in values.items():
        far = (value - usual.mean[path]).abs()
        found[path] = torch.where(far > 0, far / usual.deviation[path], torch.zeros_like(far))
    return found


@dataclass(frozen=True, eq=False)
class Probe:
    """One prompt at one timestep, from S starting noises."""

    unet: Any
    noise: Tensor  # float32 [S, C, h, w]
    entering: Tensor  # the same as the U-Net gets it
    timestep: Any
    told: dict[str, Any]
    velocity: tuple[float, float] | None  # sqrt(abar), sqrt(1 - abar) where it predicts v

    @torch.no_grad()
    def deltas(self, blocked: Blocked | None = None) -> Tensor:
        """float32 [S, C, h, w]: predicted noise less the noise, each plane from 0 to 1."""
        dtype = next(self.unet.parameters()).dtype
        with silenced(self.unet, blocked or {}):
            out = self.unet(self.entering.to(dtype), self.timestep, return_dict=False, **self.told)[
                0
            ].float()
        if self.velocity is not None:
            out = self.velocity[0] * out + self.velocity[1] * self.noise
        return scaled(out - self.noise)


def probe(pipe: Any, prompt: str, config: NemoConfig) -> Probe:
    """What predicts for a prompt, without guidance. Raises ValueError as `draw.expect_unet`."""
    unet = expect_unet(pipe)
    size = default_size(pipe)
    side = size // pipe.vae_scale_factor
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(config.steps)
    timestep = scheduler.timesteps[config.index]
    chance = torch.Generator().manual_seed(config.seed)
    noise = torch.randn(config.seeds, unet.config.in_channels, side, side, generator=chance)
    noise = noise.to(unet.device) * scheduler.init_noise_sigma
    entering = scheduler.scale_model_input(noise, timestep)
    told = conditions_of(
        pipe, conditions(pipe, [prompt]), torch.zeros(config.seeds, dtype=torch.int64), size
    )
    share = float(scheduler.alphas_cumprod[round(float(timestep))])
    plain = scheduler.config.prediction_type == "epsilon"
    velocity = None if plain else (share**0.5, (1 - share) ** 0.5)
    return Probe(unet, noise, entering, timestep.to(unet.device), told, velocity)


def likeness(deltas: Tensor) -> Tensor:
    """float32 [S, S]: the similarity of every pair, 0 of a seed with itself."""
    count = len(deltas)
    one, other = torch.triu_indices(count, count, 1, device=deltas.device).unbind()
    found = torch.zeros(count, count, device=deltas.device)
    found[one, other] = ms_ssim(deltas[one], deltas[other])
    return found + found.T


def calibrate_tau(pipe: Any, prompts: Sequence[str], config: NemoConfig) -> float:
    """Mean and one (unbiased) standard deviation of all pairs of seeds over ordinary prompts."""
    one, other = torch.triu_indices(config.seeds, config.seeds, 1).unbind()
    pairs = [likeness(probe(pipe, text, config).deltas()).cpu()[one, other] for text in prompts]
    values = torch.cat(pairs).double()
    return float(values.mean() + values.std())


def find(
    pipe: Any,
    prompt: str,
    usual: Statistics,
    tau: float,
    config: NemoConfig = NemoConfig(),  # noqa: B008
) -> Found:
    """The neurons of one prompt: candidates that are unusual or high, more of them until its
    memory is gone, then without those it stays gone without.

    Args:
        usual: of ordinary prompts.
        tau: above which two predictions are alike, from `calibrate_tau`.
    """
    search = probe(pipe, prompt, config)
    plain = search.deltas()
    alike = likeness(plain)
    kept = alike.amax(1) > tau
    values = activations(search.unet, _states(search)[:1])
    none = {path: torch.zeros_like(row[0], dtype=torch.bool) for path, row in values.items()}
    if not bool(kept.any()):
        return Found(False, none, none, float(alike.max()), 1.0, tau)

    def left(blocked: Blocked) -> float:
        """How alike the kept seeds' predictions stay to what they were."""
        return float(ms_ssim(plain[kept], search.deltas(blocked)[kept]).max())

    rows = {path: row[0] for path, row in values.items()}
    odd = unusual(rows, usual)
    theta, highest, trials = config.theta, 0, []
    while True:
        chosen = {p: (odd[p] > theta) | _highest(rows[p], highest) for p in rows}
        value = left(chosen)
        count = float(sum(int(one.sum()) for one in chosen.values()))
        trials.append({"theta": theta, "highest": highest, "neurons": count, "left": value})
        theta, highest = theta - config.fall, highest + 1
        if value <= tau or theta <= config.last or highest >= config.most:
            break
    limit = tau if value <= tau else value
    thin = _refined(search, chosen, left, limit)
    return Found(True, thin, chosen, float(alike.max()), left(thin), limit, trials)


def to_mask(found: Sequence[Found], part: str = "unet") -> Mask:
    """The rows of all that was found, over prompts, as `masks` applies them; True means keep."""
    if not found:
        raise ValueError("the neurons of no prompts")
    keep: dict[str, Tensor] = {}
    for one in found:
        for path, neurons in one.neurons.items():
            name = f"{part}.{path}.weight"
            keep[name] = keep.get(name, torch.ones_like(neurons).cpu()) & ~neurons.cpu()
    return Mask(keep)


@contextlib.contextmanager
def silenced(unet: nn.Module, blocked: Blocked) -> Iterator[None]:
    """Within the block these neurons give 0."""
    with contextlib.ExitStack() as hooks:
        for path, gone in blocked.items():
            if bool(gone.any()):
                keep = (~gone).to(unet.get_parameter(f"{path}.weight"))
                layer = unet.get_submodule(path)
                handle = layer.register_forward_hook(lambda *a, keep=keep: a[2] * keep)
                hooks.callback(handle.remove)
        yield


def _highest(values: Tensor, count: int) -> Tensor:
    """bool [d]: the highest, of equal ones the lower index."""
    best = values.sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(0, best, True)


def _refined(search: Probe, chosen: Blocked, left: Any, limit: float) -> dict[str, Tensor]:
    """Deepest first: without whole layers, then without single neurons, where memory does not come
    back. What comes before a layer that changes is not computed again."""
    kept = dict(chosen)
    for neurons in (False, True):
        stages = _recorded(search, kept)
        for path in reversed(list(kept)):
            parts = [int(i) for i in kept[path].nonzero()] if neurons else [slice(None)]
            if not bool(kept[path].any()):
                continue
            with _skipping(search.unet, stages, path):
                for part in parts:
                    fewer = kept[path].clone()
                    fewer[part] = False
                    if left({**kept, path: fewer}) < limit:
                        kept[path] = fewer
    return kept


def _recorded(search: Probe, blocked: Blocked) -> dict[str, Any]:
    """What each stage gives, in the order in which they end."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as hooks:
        for path, module in search.unet.named_modules():
            if type(module).__name__.removeprefix("Cut") in STAGES:
                handle = module.register_forward_hook(
                    lambda *a, path=path: found.__setitem__(path, a[2])
                )
                hooks.callback(handle.remove)
        search.deltas(blocked)
    return found


@contextlib.contextmanager
def _skipping(unet: nn.Module, stages: Mapping[str, Any], path: str) -> Iterator[None]:
    """Within the block the stages that end before that of the layer `path` give what they gave."""
    with contextlib.ExitStack() as stack:
        for stage, given in stages.items():
            if path.startswith(f"{stage}."):
                break
            stack.enter_context(replace(unet, stage, lambda *_, given=given, **__: given))
        yield


def _states(search: Probe) -> Tensor:
    states: Tensor = search.told["encoder_hidden_states"]
    return states
