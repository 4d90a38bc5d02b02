"""LatentMapper: the initial noise of a picture, moved a little until the attention at the first
step gives every subject of the prompt a place of its own.

OptiPrune (arXiv 2507.00789) names the two scores, the threshold and the Gaussian prior; its
settings are not public, so all numbers are those of InitNO's code (arXiv 2404.04650).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.optiprune.attention import Grid
from gencompress.t2i.optiprune.scores import Judge, Scores, judge
from gencompress.t2i.optiprune.subjects import Subject
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.sample import default_size
from gencompress.t2i.tiny import packed

BETAS = 0.9, 0.999


@dataclass(frozen=True)
class NoiseConfig:
    """How noise is optimised."""

    rounds: int = 5  # each from new noise
    steps: int = 10  # of a round
    last_steps: int = 50  # from the best start, if no round gave valid noise; 0: none
    tau_cross: float = 0.2  # noise is valid where S_cross and S_self are under these
    tau_self: float = 0.3
    lambda_cross: float = 1.0
    lambda_self: float = 1.0
    lambda_clean: float = 0.0  # InitNO's code has 1; on the CPU, and slow
    gate: float = 0.5  # S_self does not count while S_cross is over this
    peaks: str = "text"  # or place: what S_cross measures peaks against, see scores.PEAKS
    prior: Literal["project", "penalty"] = "project"
    kl_limit: float = 1e-3  # mean over elements; "project" stays under it
    kl_steps: int = 20  # most steps back under it; then the step is undone (a cap of ours)
    lambda_kl: float = 1.0  # of "penalty", which adds KL to the loss and has no limit
    lr: float = 1e-2
    eps: float = 1e-3  # so large that small gradients are damped
    batched: bool = False  # the rounds side by side: the same noise, more memory and work
    pictures: int = 1  # mapped side by side: the same noise, more memory
    sampling_steps: int = 50  # of the pictures; they decide the first timestep

    def __post_init__(self) -> None:
        counts = self.rounds, self.steps, self.sampling_steps, self.pictures
        if min(counts) < 1 or self.last_steps < 0 or self.kl_steps < 0:
            raise ValueError(
                f"rounds, steps, sampling steps and pictures {counts}: 1 or more; last_steps "
                f"{self.last_steps} and kl_steps {self.kl_steps}: 0 or more"
            )
        if self.prior not in ("project", "penalty"):
            raise ValueError(f'prior {self.prior!r}; expected "project" or "penalty"')
        if not (self.lr > 0 and self.eps > 0 and self.kl_limit > 0):
            raise ValueError(f"lr {self.lr}, eps {self.eps}, kl_limit {self.kl_limit}: more than 0")


@dataclass(frozen=True)
class Round:
    """What became of one start: its best noise, which is the first that is valid, else that of the
    lowest score."""

    start: float  # the score of the start: S_cross + S_self, see `Scores.total`
    score: float  # of the best
    cross: float
    own: float
    kl: float
    valid: bool
    losses: tuple[float, ...]  # S_cross + S_self as they count, at every noise that was scored

    @property
    def order(self) -> tuple[bool, float]:
        """Small is good."""
        return not self.valid, self.score


@dataclass(frozen=True, eq=False)
class Mapped:
    """Noise for N pictures."""

    latents: Tensor  # float32, on the device of the denoiser: what pipelines take as `latents`
    starts: Tensor  # the noise it came from, alike
    scores: tuple[Round, ...]  # of `latents`
    log: tuple[tuple[Round, ...], ...]  # of each picture, every start in order

    @property
    def passes(self) -> int:
        """How many noises were scored, of the rounds one by one; after each but the last of a round
        the denoiser was also run backwards."""
        return sum(len(one.losses) for rounds in self.log for one in rounds)


Found = list[tuple[Round, Tensor]]  # with the noise


def map_noise(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    config: NoiseConfig | None = None,
    *,
    generators: Sequence[torch.Generator],
    starts: Tensor | None = None,
    size: int | None = None,
    grid: Grid | None = None,
    progress: Progress = quiet,
) -> Mapped:
    """Noise whose attention is valid, or else scores no worse than the first that its generator
    draws, which is the noise that the pipeline itself would start from.

    All chance comes from the generators: a picture depends on neither the others nor `batched`, but
    for rounding. The pipeline is left as it is. With tokens pruned meanwhile, call it within
    `prune.pruned`.

    Args:
        subjects: of each prompt, from `subjects.find_subjects`.
        generators: on the CPU, one a prompt.
        starts: [N, ...] as `Mapped.latents`, in place of the first that the generators draw.
        size: of the pictures, in pixels, and `grid` of the maps: see `scores.judge`.

    Raises:
        ValueError: not one generator and one list of subjects a prompt, or as `scores.judge`.
    """
    config = config or NoiseConfig()

    def find(score: Judge, starts: Tensor) -> list[tuple[Found, int]]:
        found: list[Found] = [[] for _ in starts]

        def open_ones() -> list[int]:
            return [i for i, rounds in enumerate(found) if not any(one.valid for one, _ in rounds)]

        for part in torch.split(starts, config.rounds if config.batched else 1, 1):
            still, beside = open_ones(), part.shape[1]
            owners = [i for i in still for _ in range(beside)]
            if not still:
                break
            noise = part[still].flatten(0, 1)
            more = iter(_optimise(score, noise, config.steps, config, owners, progress))
            for i in still:
                for _ in range(beside):
                    found[i].append(next(more))
                    if found[i][-1][0].valid:
                        break
        still = open_ones()
        if still and config.last_steps:
            again = torch.stack([starts[i, _best(found[i])] for i in still])
            more = iter(_optimise(score, again, config.last_steps, config, still, progress))
            for i in still:
                found[i].append(next(more))
        return [(rounds, _best(rounds)) for rounds in found]

    return _each(
        pipe, prompts, subjects, config, config.rounds, generators, size, grid, progress, find,
        starts,
    )  # fmt: skip


def best_of(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    count: int,
    config: NoiseConfig | None = None,
    *,
    generators: Sequence[torch.Generator],
    size: int | None = None,
    grid: Grid | None = None,
    progress: Progress = quiet,
) -> Mapped:
    """The control: of `count` draws as they are, the one of the lowest S_cross + S_self, forward
    passes only. As `map_noise`; all draws are scored, valid or not."""
    config = config or NoiseConfig()
    if count < 1:
        raise ValueError(f"count {count}: 1 or more")

    def find(score: Judge, starts: Tensor) -> list[tuple[Found, int]]:
        owners = range(len(starts))
        draws = [_optimise(score, one, 0, config, owners) for one in starts.unbind(1)]
        found = [list(of_one) for of_one in zip(*draws, strict=True)]
        scores = [[one.score for one, _ in of_one] for of_one in found]
        return [(of_one, own.index(min(own))) for of_one, own in zip(found, scores, strict=True)]

    return _each(pipe, prompts, subjects, config, count, generators, size, grid, progress, find)


def noise_shape(pipe: Any, size: int) -> tuple[int, int, int]:
    """Channels, height and width of what a pipeline draws for a picture (and Flux then packs)."""
    model, _ = denoiser(pipe)
    channels = model.config.in_channels // (4 if _packs(pipe) else 1)
    side = size // pipe.vae_scale_factor
    return channels, side, side


def starting_noise(pipe: Any, generator: torch.Generator, count: int, size: int) -> Tensor:
    """float32 [count, ...]: what a pipeline draws from a generator for as many pictures, one after
    the other, as it takes them; on the device of the denoiser."""
    shape = noise_shape(pipe, size)
    drawn = torch.cat([torch.randn(1, *shape, generator=generator) for _ in range(count)])
    return (packed(drawn) if _packs(pipe) else drawn).to(denoiser(pipe)[0].device)


def side_by_side(subjects: Sequence[Sequence[Subject]], most: int) -> list[list[int]]:
    """Numbers of prompts, in order: at most so many in a list, and of as many subjects."""
    lists: list[list[int]] = []
    for number, ones in enumerate(subjects):
        fits = lists and len(lists[-1]) < most and len(subjects[lists[-1][0]]) == len(ones)
        if not fits:
            lists.append([])
        lists[-1].append(number)
    return lists


def opening(pipe: Any, steps: int) -> tuple[Tensor | float, Any]:
    """The first timestep of a pipeline, and a scheduler of its class that stands there."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if type(scheduler).__name__.startswith("FlowMatch"):
        return float(scheduler.config.num_train_timesteps), scheduler  # whatever the shift
    scheduler.set_timesteps(steps)
    return scheduler.timesteps[0], scheduler


def entering(scheduler: Any, latents: Tensor, timestep: Tensor | float) -> Tensor:
    """Latents of a step as the denoiser takes them."""
    scale = getattr(scheduler, "scale_model_input", None)
    return latents if scale is None else scale(latents, timestep)


def joint_loss(scores: Scores, config: Any) -> Tensor:
    """[B]: S_cross + S_self with the weights of `config`, S_self only where S_cross is no higher
    than its `gate`."""
    counts = scores.cross.detach() <= config.gate
    loss: Tensor = config.lambda_cross * scores.cross + config.lambda_self * scores.own * counts
    return loss if scores.clean is None else loss + config.lambda_clean * scores.clean


def divergence(shift: Tensor, log_var: Tensor) -> Tensor:
    """KL [R] of N(shift, exp(log_var)) from N(0, 1), mean over elements; both are [R, ...]."""
    return 0.5 * (shift**2 + log_var.expm1() - log_var).flatten(1).mean(1)


def _each(
    pipe: Any,
    prompts: Sequence[str],
    subjects: Sequence[Sequence[Subject]],
    config: NoiseConfig,
    draws: int,
    generators: Sequence[torch.Generator],
    size: int | None,
    grid: Grid | None,
    progress: Progress,
    find: Callable[[Judge, Tensor], list[tuple[Found, int]]],
    given: Tensor | None = None,
) -> Mapped:
    if len(generators) != len(prompts) or not prompts:
        raise ValueError(
            f"{len(generators)} generators for {len(prompts)} prompts; expected one each"
        )
    size = default_size(pipe) if size is None else size
    clean = config.lambda_clean > 0
    latents, starts, scores, log = [], [], [], []
    timestep, scheduler = opening(pipe, config.sampling_steps)
    with judge(
        pipe, prompts, subjects, size=size, grid=grid, clean=clean, peaks=config.peaks
    ) as score:
        for group in side_by_side(subjects, config.pictures):
            progress(f"mapping noise: {group[0]} of {len(prompts)}")
            drawn = torch.stack([starting_noise(pipe, generators[i], draws, size) for i in group])
            if given is not None:
                drawn[:, 0] = given[group]

            def scored(
                noise: Tensor, owners: Sequence[int], group: Sequence[int] = group
            ) -> Scores:
                first = noise * getattr(scheduler, "init_noise_sigma", 1.0)
                return score(
                    entering(scheduler, first, timestep), timestep, [group[i] for i in owners]
                )

            for own_starts, (found, best) in zip(drawn, find(scored, drawn), strict=True):
                log.append(tuple(one for one, _ in found))
                scores.append(found[best][0])
                latents.append(found[best][1])
                # a start that was taken up again is that of the lowest score
                origin = best if best < draws else _best(found[:draws])
                starts.append(own_starts[origin])
    return Mapped(torch.stack(latents), torch.stack(starts), tuple(scores), tuple(log))


def _packs(pipe: Any) -> bool:
    return "Flux" in type(denoiser(pipe)[0]).__name__


def _best(found: Found) -> int:
    return min(range(len(found)), key=lambda i: found[i][0].order)


def _optimise(
    score: Judge,
    starts: Tensor,
    steps: int,
    config: NoiseConfig,
    owners: Sequence[int] | None = None,
    progress: Progress = quiet,
) -> Found:
    """One round from each of the starts [R, ...], side by side, each as if it were alone; of each
    owner, up to the first that gives valid noise.

    Every noise is scored, also that after the last step. A start is done when its noise is valid,
    and so are those after it of the same owner.

    Args:
        score: is called with noise and the owner of each row.
        owners: which picture each start is for, those of one together; None: all for one.
    """
    count = len(starts)
    owners = [0] * count if owners is None else owners
    moves = _Moves(starts, config)
    best: list[tuple[Round, Tensor]] = []
    losses: list[list[float]] = [[] for _ in range(count)]
    ends = dict.fromkeys(owners, count)  # of the starts that still matter
    for step in range(steps + 1):
        rows = [i for i in range(count) if i < ends[owners[i]] and not (best and best[i][0].valid)]
        if not rows:
            break
        if steps:
            progress(f"steps of mapping: {step} of {steps}")
        shift, log_var = moves.leaves(rows)
        with torch.set_grad_enabled(step < steps):
            noise = starts[rows] * (log_var / 2).exp() + shift
            scores = score(noise, [owners[i] for i in rows])
            loss, kl = joint_loss(scores, config), divergence(shift, log_var)
        seen = _rounds(scores, kl, config)
        if not best:
            best = list(zip(seen, noise.detach().clone(), strict=True))
        for i, one, own_loss, own_noise in zip(
            rows, seen, loss.tolist(), noise.detach(), strict=True
        ):
            losses[i].append(own_loss)
            if one.order < best[i][0].order:
                best[i] = replace(one, start=best[i][0].start), own_noise.clone()
            if one.valid:
                ends[owners[i]] = min(ends[owners[i]], i + 1)
        if step < steps:
            if config.prior == "penalty":
                loss = loss + config.lambda_kl * kl
            moves.step(rows, torch.autograd.grad(loss.sum(), (shift, log_var)))
    return [
        (replace(one, losses=tuple(losses[i])), noise)
        for i, (one, noise) in enumerate(best)
        if i < ends[owners[i]]
    ]


def _rounds(scores: Scores, kl: Tensor, config: NoiseConfig) -> list[Round]:
    """Of each sample, as if it were its start."""
    columns = scores.total, scores.cross, scores.own, kl
    valid = scores.valid(config.tau_cross, config.tau_self).tolist()
    return [
        Round(total, total, cross, own, kl, is_valid, ())
        for total, cross, own, kl, is_valid in zip(
            *(column.tolist() for column in columns), valid, strict=True
        )
    ]


class _Moves:
    """The shift and log-variance of R starts, and Adam's state of each: one that rests while
    others move, or that moves alone, moves alike."""

    def __init__(self, starts: Tensor, config: NoiseConfig) -> None:
        self.config = config
        self.values = torch.zeros(2, *starts.shape, device=starts.device)
        self.mean, self.square = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.steps = torch.zeros(len(starts), *[1] * (starts.ndim - 1), device=starts.device)

    def leaves(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Copies that want gradients."""
        shift, log_var = self.values[:, rows].unbind()
        return shift.requires_grad_(), log_var.requires_grad_()

    def step(self, rows: list[int], grads: tuple[Tensor, ...]) -> None:
        """Downhill, and back to where KL is no more than its limit; undone where it stays over."""
        before = self.values[:, rows]
        self.adam(rows, torch.stack(grads))
        if self.config.prior != "project":
            return
        for _ in range(self.config.kl_steps):
            over = self.over(rows)
            if not over:
                return
            shift, log_var = self.values[:, over]
            slope = torch.stack([shift, log_var.expm1() / 2]) / shift[0].numel()
            self.adam(over, slope)
        over = self.over(rows)
        self.values[:, over] = before[:, [rows.index(i) for i in over]]

    def over(self, rows: list[int]) -> list[int]:
        kl = divergence(*self.values[:, rows])
        return [i for i, is_over in zip(rows, kl > self.config.kl_limit, strict=True) if is_over]

    def adam(self, rows: list[int], grads: Tensor) -> None:
        """torch.optim.Adam's step (Kingma and Ba 2015), of some rows."""
        fast, slow = BETAS
        self.steps[rows] += 1
        self.mean[:, rows] = self.mean[:, rows].lerp(grads, 1 - fast)
        self.square[:, rows] = self.square[:, rows].lerp(grads**2, 1 - slow)
        count = self.steps[rows]
        root = (self.square[:, rows] / (1 - slow**count)).sqrt()
        ahead = self.mean[:, rows] / (1 - fast**count)
        self.values[:, rows] -= self.config.lr * ahead / (root + self.config.eps)
