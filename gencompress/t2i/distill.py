"""Noising, and the losses of training a denoiser on data and after a teacher.

Teacher and student see the same noisy latents: `noised = diffuse(...)` or `flow(...)` once, then
`targets(teacher, noised, ...)` and `losses(student, noised, ...)`.

B samples, C channels. A latent is [B, C, height, width], or [B, tokens, C] for Flux.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gencompress.t2i.hooks import Streams, record

FLOOR = 1e-8  # of a mean square that is divided by
KINDS = ("epsilon", "v_prediction", "flow")


@dataclass(frozen=True)
class Draws:
    """The chance of a batch: each sample has a generator of its own, so what it draws does not
    depend on which process or which part of the batch it is in. Made on the CPU, then moved."""

    generators: tuple[torch.Generator, ...]
    device: torch.device | str = "cpu"

    def normal(self, *shape: int) -> Tensor:
        """float32 [B, *shape]."""
        rows = [torch.randn(shape, generator=one, device="cpu") for one in self.generators]
        return torch.stack(rows).to(self.device)

    def uniform(self, *shape: int) -> Tensor:
        """float32 [B, *shape] in [0, 1)."""
        rows = [torch.rand(shape, generator=one, device="cpu") for one in self.generators]
        return torch.stack(rows).to(self.device)

    def below(self, end: int) -> Tensor:
        """int64 [B] in [0, end)."""
        rows = [torch.randint(end, (), generator=one, device="cpu") for one in self.generators]
        return torch.stack(rows).to(self.device)


def seeds(generator: torch.Generator, count: int) -> list[int]:
    """As many seeds of `draws`; moves the generator on."""
    return torch.randint(2**32, (count,), generator=generator).tolist()  # the CPU's use 32 bits


def again(generator: torch.Generator) -> torch.Generator:
    """A new generator at the seed of this one, wherever it is now: the same chance for each arm."""
    return torch.Generator().manual_seed(generator.initial_seed())


def draws(of: Sequence[int], device: torch.device | str = "cpu") -> Draws:
    """A generator for each seed, one a sample."""
    return Draws(tuple(torch.Generator().manual_seed(seed) for seed in of), device)


@dataclass(frozen=True)
class Noised:
    """A batch as a denoiser meets it."""

    latents: Tensor  # float32, like the clean ones
    timesteps: Tensor  # [B], of the scheduler: int64 for diffusion, float32 for flow
    target: Tensor  # what a perfect model answers, like the latents
    snr: Tensor  # float32 [B]: power of the signal over that of the noise
    kind: str  # what is predicted: one of KINDS


def diffuse(latents: Tensor, scheduler: Any, chance: Draws) -> Noised:
    """Noise at uniform timesteps (Ho et al. 2020), for a scheduler of diffusers with
    `alphas_cumprod`, whichever: its `add_noise` is not used, since those that step in sigmas
    (Euler) scale their latents otherwise.

    Args:
        latents: clean, as the denoiser knows them (scaled).

    Raises:
        ValueError: the scheduler predicts neither epsilon nor v_prediction.
    """
    kind = scheduler.config.prediction_type
    if kind not in KINDS[:2] or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} with prediction_type {kind!r}: expected alphas_cumprod "
            f"and one of {', '.join(KINDS[:2])}"
        )
    clean = latents.float()
    kept = scheduler.alphas_cumprod.to(clean.device, torch.float32)
    timesteps = chance.below(len(kept))
    share = kept[timesteps]
    signal, spread = (_along(part.sqrt(), clean) for part in (share, 1 - share))
    noise = chance.normal(*clean.shape[1:])
    target = noise if kind == "epsilon" else signal * noise - spread * clean
    snr = share / (1 - share)
    return Noised(signal * clean + spread * noise, timesteps, target, snr, kind)


def flow(
    latents: Tensor,
    scheduler: Any,
    chance: Draws,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
) -> Noised:
    """Rectified flow at logit-normal times (Esser et al. 2024, "SD3", sections 2 and 3.1).

    With s = sigmoid(mean + std n), shifted: x_s = (1 - s) x + s noise; the model predicts
    noise - x and is told s times `num_train_timesteps` (1000).

    Args:
        shift: towards noise for large images, see `shift_of`; s becomes
            shift s / (1 + (shift - 1) s), which adds log(shift) to the logit.
    """
    clean = latents.float()
    sigma = torch.sigmoid(mean + math.log(shift) + std * chance.normal())
    noise = chance.normal(*clean.shape[1:])
    wide = _along(sigma, clean)
    timesteps = sigma * scheduler.config.num_train_timesteps
    snr = ((1 - sigma) / sigma).square()
    return Noised((1 - wide) * clean + wide * noise, timesteps, noise - clean, snr, "flow")


def shift_of(scheduler: Any, tokens: int) -> float:
    """The shift at which a FlowMatchEulerDiscreteScheduler samples images of `tokens` tokens."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return math.exp(mu) if config.time_shift_type == "exponential" else mu


def predict(model: nn.Module, noised: Noised, conditions: Mapping[str, Any]) -> Tensor:
    """One forward of a U-Net or transformer of diffusers; float32, like the latents.

    Latents and conditions come in the dtype of the model's weights. Of a model that also predicts
    a variance (PixArt), the first half of the channels.

    Args:
        conditions: keyword arguments beside latents and timestep, batched alike; names that end in
            `ids` are positions and sizes, and stay in float32.
    """
    dtype = next(model.parameters()).dtype
    taken = inspect.signature(type(model).forward).parameters
    name = "sample" if "sample" in taken else "hidden_states"
    # FluxTransformer2DModel multiplies by 1000 itself
    inside = any("FluxTransformer2D" in kind.__name__ for kind in type(model).__mro__)
    found = model(
        **{name: noised.latents.to(dtype)},
        timestep=noised.timesteps / 1000 if inside else noised.timesteps,
        return_dict=False,
        **{key: _cast(key, value, dtype) for key, value in conditions.items()},
    )[0].float()
    channels = noised.latents.shape[1]
    return found[:, :channels] if found.shape[1] == 2 * channels else found


@dataclass(frozen=True)
class Targets:
    """What a teacher answered."""

    prediction: Tensor
    features: dict[str, Streams] = field(default_factory=dict)  # by path of the block


def targets(
    teacher: nn.Module, noised: Noised, conditions: Mapping[str, Any], paths: Collection[str] = ()
) -> Targets:
    """The teacher on the noisy latents, without gradients; `paths` are the blocks to record."""
    with torch.no_grad(), record(teacher, paths) as features:
        prediction = predict(teacher, noised, conditions)
    return Targets(prediction, features)


@dataclass(frozen=True)
class Weights:
    """What each loss counts; 0 leaves it out. The defaults are APTP's for CC3M (its official
    code), where the blocks are not normalised."""

    denoise: float = 0.01
    output: float = 0.5
    blocks: float = 0.5
    min_snr: float = 0.0  # gamma of the denoising loss, 5 in the paper; 0: every timestep alike
    raw: bool = False  # blocks by plain MSE instead of relative to the teacher's mean square

    def __post_init__(self) -> None:
        parts = (self.denoise, self.output, self.blocks, self.min_snr)
        if min(parts) < 0 or not any(parts[:3]):
            raise ValueError(
                f"weights {parts}: none is negative, and one of the first three is > 0"
            )


def losses(
    student: nn.Module,
    noised: Noised,
    conditions: Mapping[str, Any],
    weights: Weights,
    taught: Targets | None = None,
    pairs: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """One forward of the student: "loss", the weighted sum to take the gradient of, and its parts
    "denoise", "output" and "blocks", those that have a weight.

    Args:
        taught: from `targets` on the same `noised`; not needed for `denoise` alone.
        pairs: student path to teacher path, for `blocks`; None: every recorded block to itself.

    Raises:
        ValueError: a loss after the teacher without its targets, or without blocks.
    """
    if taught is None and (weights.output or weights.blocks):
        raise ValueError("output and blocks are losses after a teacher: its targets are missing")
    if pairs is None:
        pairs = {path: path for path in taught.features} if taught else {}
    with record(student, pairs if weights.blocks else ()) as features:
        prediction = predict(student, noised, conditions)
    found = {}
    if weights.denoise:
        found["denoise"] = denoise_loss(prediction, noised, weights.min_snr)
    if weights.output:
        found["output"] = F.mse_loss(prediction, taught.prediction)
    if weights.blocks:
        found["blocks"] = block_loss(features, taught.features, pairs, raw=weights.raw)
    return {"loss": sum(getattr(weights, name) * part for name, part in found.items()), **found}


def denoise_loss(prediction: Tensor, noised: Noised, min_snr: float = 0.0) -> Tensor:
    """Mean squared error to the target; `min_snr` above 0 weighs each sample (`snr_weights`)."""
    errors = (prediction.float() - noised.target).square().flatten(1).mean(1)
    return (errors * snr_weights(noised, min_snr)).mean() if min_snr else errors.mean()


def snr_weights(noised: Noised, gamma: float = 5.0) -> Tensor:
    """float32 [B]: min(SNR, gamma) on the error of the clean latents, told as a weight on what
    is predicted (Hang et al. 2023, "Min-SNR", section 3.4; for flow the same derivation: the
    clean latents err by s times the velocity, s = 1 / (1 + sqrt(SNR)))."""
    snr = noised.snr
    if noised.kind == "epsilon":
        return (gamma / snr).clamp(max=1)
    if noised.kind == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma) / (1 + snr.sqrt()).square()


def block_loss(
    student: Mapping[str, Streams],
    teacher: Mapping[str, Streams],
    pairs: Mapping[str, str],
    *,
    raw: bool = False,
) -> Tensor:
    """Mean over the pairs of the error of a student block against a teacher block.

    The mean squared error, over the mean square of the teacher's features unless `raw`: depths
    then weigh alike, however their sizes differ. Streams of a block count alike, too.

    Args:
        student, teacher: as `record` yields them; shapes match within a pair.
        pairs: student path to teacher path.

    Raises:
        ValueError: no pairs, a path that was not recorded, or shapes that differ.
    """
    if not pairs:
        raise ValueError("a loss on blocks needs the paths of blocks; there are none")
    errors = []
    for path, other in pairs.items():
        if path not in student or other not in teacher:
            who, lost = ("teacher", other) if path in student else ("student", path)
            raise ValueError(f"block {lost!r} of the {who} was not recorded, or did not run")
        ours, theirs = _streams(student[path]), _streams(teacher[other])
        if [one.shape for one in ours] != [one.shape for one in theirs]:
            raise ValueError(
                f"block {path!r} has shapes {[tuple(one.shape) for one in ours]}, "
                f"the teacher's {other!r} {[tuple(one.shape) for one in theirs]}"
            )
        for one, wanted in zip(ours, theirs, strict=True):
            wanted = wanted.detach().float()
            size = 1.0 if raw else wanted.square().mean().clamp(min=FLOOR)
            errors.append(F.mse_loss(one.float(), wanted) / size / len(ours))
    return torch.stack(errors).sum() / len(pairs)


def last_of_groups(groups: Sequence[Sequence[str]], runs: Collection[str]) -> dict[str, str]:
    """Pairs for the loss on groups of blocks (Dense2MoE, stage 3): the last block of each group
    that runs in the student, to the last block of the group in the teacher.

    Raises:
        ValueError: no block of a group runs.
    """
    pairs = {}
    for group in groups:
        running = [path for path in group if path in runs]
        if not running:
            raise ValueError(f"no block of the group {', '.join(group)} runs in the student")
        pairs[running[-1]] = group[-1]
    return pairs


def _streams(features: Streams) -> tuple[Tensor, ...]:
    return (features,) if isinstance(features, Tensor) else features


def _along(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to multiply `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _cast(name: str, value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {key: _cast(key, one, dtype) for key, one in value.items()}
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating and not name.endswith("ids") else value
