"""Training a field on the rays of photos, with the budget of its saliency held on the way.

A step draws random pixels, marches their rays through the occupied cells, drops samples that
nothing reaches, and makes one step of Adam on table, networks and saliency; then the multiplier of
the budget moves (Xie et al. 2023). As many rays are drawn as give about the same number of samples
each step, so steps cost the same and see more of the photos as the field empties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from gencompress_kernels.composite import composite, transmittance
from torch import Tensor

from gencompress.core import admm
from gencompress.core.progress import Progress, quiet
from gencompress.nerf import decode, occupancy
from gencompress.nerf.field import Field, encode, harmonics
from gencompress.nerf.render import MOST, STOP, density_of, march, repacked
from gencompress.nerf.storage import cells_above, covered, rounded
from gencompress.views.fit import Checkpoint, Log, fit
from gencompress.views.rays import Shots, over, shot_rays

BETAS, EPS = (0.9, 0.99), 1e-15
WEIGHT_DECAY = 1e-6  # of the networks
AVERAGE, AVERAGE_EVERY = 0.95, 8  # decay a step of the moving average of the weights; steps
MOST_RAYS, LEAST_RAYS = 1 << 14, 64
LOGITS_WAY = 50.0  # how far a logit may move in a short run, about; a rate of 0.01 at 5,000 steps
# of admm's rho, 0.1 of the loss: shown cells give their saliency away before it is known which are
# hidden if the multiplier rises as fast as that in runs of thousands of steps (the paper's have
# 300,000); two blocks need ten times as much, and leave hidden cells above 0 if moved every step
GENTLE, FIRM, BLOCKS_EVERY = 0.1, 10.0, 16
SHUT = -20.0  # a logit whose saliency is nothing
CLOSED = 0.1  # saliency up to which a cell takes no more samples then
SETTLED = 1.2  # times the budget, below which the saliency holds it
SHADED = 0.7  # share of the samples that light gets to, below which looking for them pays
BLOCK = 1 << 13  # samples that pass the networks at once
ALPHAS = (1e4, 1e5)  # of the gate: the second after a third of the steps
PRUNERS = ("none", "dual", "admm2", "l1")


@dataclass(frozen=True)
class Training:
    """How to train."""

    steps: int = 4000
    samples: int = 1 << 15  # of a step, about
    rate: float = 1e-2  # of Adam, for everything
    last_rate: float = 0.1  # of it at the end; falls exponentially
    background: str = "random"  # white, black, random: behind photos with alpha
    alphas: tuple[float, ...] = ALPHAS  # of the gate: in the first third, and after; (): no gate
    pruner: str = "dual"  # none, dual (the paper's), admm2 (two blocks), l1 (a fixed weight)
    keep: float = 0.04  # mean saliency that dual and admm2 hold
    prune_start: int = 200  # step from which they act; the loss until then sets their scale
    rho: float = 0.0  # their step; 0: a hundredth of that loss, with admm2 all of it
    weight: float = 0.0  # of the mean saliency with l1; 0: that loss
    fixed: bool = False  # the saliency stays as it is
    bits: int = 0  # of a number of the table, which is rounded on the way, straight through; 0: not

    def __post_init__(self) -> None:
        if self.pruner not in PRUNERS:
            raise ValueError(f"pruner {self.pruner!r}: known are {', '.join(PRUNERS)}")
        if self.background not in ("white", "black", "random"):
            raise ValueError(f"background {self.background!r}: white, black or random")
        if self.steps < 1 or self.prune_start < 1 or self.samples < 1024:
            raise ValueError("steps and prune_start are 1 or more, samples 1024 or more")
        if self.pruner != "none" and self.prune_start >= self.steps:
            raise ValueError(f"prune_start {self.prune_start}: pruning starts before {self.steps}")
        if not 0 < self.rate < 1 or not 0 < self.last_rate <= 1:
            raise ValueError("rate and last_rate are above 0, rate below 1, last_rate up to 1")
        if not 0 < self.keep <= 1 or self.rho < 0 or self.weight < 0:
            raise ValueError("keep is a share above 0 and up to 1, rho and weight not negative")


@dataclass(eq=False)
class State:
    """A run as it stands; `field.tensors` are the leaves that Adam moves."""

    field: Field
    values: Tensor  # [N, N, N], see occupancy.py
    allowed: Tensor | None  # bool [N, N, N]: where cells are left; None: everywhere
    moments: dict[str, tuple[Tensor, Tensor]]
    average: dict[str, Tensor]  # of the weights, without the saliency
    rays: int  # of the next step
    dual: admm.Dual
    settled: bool = False  # the saliency holds its budget: cells it closed take no more samples
    shaded: bool = False  # so much lies behind something that looking first pays
    decoder: decode.Decoder | None = None
    blocks: admm.Blocks | None = None
    warm: list[float] = field(default_factory=list)  # [sum, count] of the loss that sets the scale


def train(
    start: Field,
    shots: Shots,
    how: Training,
    generator: torch.Generator,
    *,
    checkpoint: Checkpoint | None = None,
    progress: Progress = quiet,
    log_every: int = 100,
) -> tuple[Field, Log]:
    """A trained copy of `start`, and the log of `views.fit`: loss, mean saliency, gamma, samples.

    Resumes from the checkpoint where there is one of an equal run. Raises as `views.fit.fit`.
    """
    state = begin(start, shots, how)

    def advance(step: int, generator: torch.Generator, log: Log) -> dict[str, float]:
        return _advance(state, shots, how, step, generator)

    log = fit(
        advance, how.steps, generator, dump=lambda: _dump(state), load=lambda s: _load(state, s),
        checkpoint=checkpoint, log_every=log_every, progress=progress,
    )  # fmt: skip
    # a run that was finished already made no step, and so set no alpha
    return replace(finished(state), alpha=_alpha(how, how.steps - 1)), log


def begin(start: Field, shots: Shots, how: Training) -> State:
    """The state before the first step."""
    if how.pruner != "none" and (start.logits is None or how.fixed):
        raise ValueError(f"pruner {how.pruner}: the field has no saliency grid to train")
    tensors = {name: t.detach().clone() for name, t in start.tensors.items()}
    values = occupancy.first_values(start, shots.cameras)
    return State(
        field=replace(_with(start, tensors), alpha=_alpha(how, 0)),
        values=values,
        allowed=None if start.cells is None else start.occupancy,
        moments={n: (torch.zeros_like(t), torch.zeros_like(t)) for n, t in tensors.items()},
        average={n: t.clone() for n, t in tensors.items() if n != "logits"},
        rays=LEAST_RAYS,
        dual=admm.Dual(budget=how.keep, rho=how.rho),
    )


def finished(state: State) -> Field:
    """The field of the averaged weights, with the occupancy it ended with."""
    tensors = dict(state.average)
    if state.field.logits is not None:
        tensors["logits"] = state.field.logits.detach()
    if state.blocks is not None:  # the copy that holds the budget says what goes
        tensors["logits"] = tensors["logits"].masked_fill(state.blocks.z == 0, SHUT)
    field = _with(state.field, {n: t.clone() for n, t in tensors.items()})
    return replace(field, occupancy=_occupied(state))


def _advance(
    state: State, shots: Shots, how: Training, step: int, generator: torch.Generator
) -> dict[str, float]:
    state.field = replace(state.field, alpha=_alpha(how, step))
    if step % occupancy.EVERY == 0:
        state.values = occupancy.updated(state.field, state.values, step, generator)
        state.field = replace(state.field, occupancy=_occupied(state))
    loss, samples, gradients = _rays_step(state, shots, how, step, generator)
    shown = {"loss": loss, "rays": float(state.rays), "samples": float(samples)}
    shown |= _saliency_step(state, how, step, loss, gradients)
    _adam(state, gradients, how, step)
    if (step + 1) % AVERAGE_EVERY == 0:
        for name, mean in state.average.items():
            mean.lerp_(state.field.tensors[name].detach(), 1 - AVERAGE**AVERAGE_EVERY)
    grown = state.rays * min(2.0, max(0.5, how.samples / max(samples, 1)))
    state.rays = int(min(MOST_RAYS, max(LEAST_RAYS, grown)))
    return shown


def _rays_step(
    state: State, shots: Shots, how: Training, step: int, generator: torch.Generator
) -> tuple[float, int, dict[str, Tensor]]:
    """Mean squared error of random pixels, the samples it took, and gradients by name."""
    field, count = state.field, state.rays
    index = torch.randint(len(shots.pixels), (count,), generator=generator)
    origins, directions, rgba = shot_rays(shots, index)
    wanted, behind = _targets(rgba, how.background, generator)
    jitter = torch.rand(count, generator=generator)
    packed, points, distances, steps = march(field, origins, directions, jitter)
    moved = [field.table] if field.logits is None or how.fixed else [field.table, field.logits]
    for tensor in moved:
        tensor.requires_grad_().grad = None
    table = rounded(field.table, field.levels, how.bits) if how.bits else field.table
    features, norms, _ = encode(replace(field, table=table), points)
    values, lengths, reached = features.detach(), norms.detach(), None
    if state.shaded or step % occupancy.EVERY == 0:
        reached = _reached(field, values, lengths, steps, packed)
        state.shaded = bool(reached.float().mean() < SHADED)
        packed, distances, steps = repacked(packed, reached), distances[reached], steps[reached]
        values, lengths = values[reached], lengths[reached]
    state.decoder = decode.decoder(field.layers, BLOCK + MOST, state.decoder)
    shapes = harmonics(directions)[torch.repeat_interleave(torch.arange(count), packed[:, 1])]
    by_features, by_norms = torch.zeros_like(values), torch.zeros_like(lengths)
    total = 0.0
    for first, last in _blocks(packed):
        here = slice(int(packed[first, 0]), int(packed[last - 1].sum()))
        passed = values[here], lengths[here], shapes[here], field.alpha
        density, color = (t.requires_grad_() for t in decode.forward(state.decoder, *passed))
        local = packed[first:last] - packed.new_tensor([here.start, 0])
        shown, opacity, _, _ = composite(
            density, color, steps[here], local, distances[here], stop=STOP
        )
        error = shown + (1 - opacity[:, None]) * behind[first:last] - wanted[first:last]
        loss = error.square().sum() / (3 * count)
        total += loss.item()
        if here.stop > here.start:
            loss.backward()
            decode.backward(
                state.decoder, values[here], lengths[here], field.alpha, color.detach(),
                density.grad, color.grad, by_features[here], by_norms[here],
            )  # fmt: skip
    if reached is not None:
        by_features = _spread(by_features, reached)
        by_norms = _spread(by_norms, reached)
    torch.autograd.backward([features, norms], [by_features, by_norms])
    gradients = {"table": field.table.grad} | decode.gradients(state.decoder)
    if field.logits is not None and not how.fixed:
        gradients["logits"] = field.logits.grad
    return total, len(values), gradients


def _blocks(packed: Tensor) -> list[tuple[int, int]]:
    """Runs of rays of about `BLOCK` samples, as first ray and last + 1."""
    ends = packed.sum(1)
    cuts = [0]
    while cuts[-1] < len(packed):
        aim = int(packed[cuts[-1], 0]) + BLOCK
        cuts.append(max(cuts[-1] + 1, int(torch.searchsorted(ends, aim, right=True))))
    return list(zip(cuts, cuts[1:], strict=False))


def _reached(
    field: Field, features: Tensor, norms: Tensor, steps: Tensor, packed: Tensor
) -> Tensor:
    """bool [M]: samples that some light still gets to."""
    return transmittance(density_of(field, features, norms), steps, packed) >= STOP


def _spread(rows: Tensor, where: Tensor) -> Tensor:
    """[M, ...]: the rows where `where` (bool [M]) is True, zeros elsewhere."""
    found = rows.new_zeros(len(where), *rows.shape[1:])
    found[where] = rows
    return found


def _targets(rgba: Tensor, background: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Wanted colours [R, 3] over backgrounds [R, 3], and these."""
    if background == "random":
        behind = torch.rand(len(rgba), 3, generator=generator)
    else:
        behind = torch.full((len(rgba), 3), float(background == "white"))
    return over(rgba, behind), behind


def _saliency_step(
    state: State, how: Training, step: int, loss: float, gradients: dict[str, Tensor]
) -> dict[str, float]:
    """Adds the budget's gradient by the logits; moves the multiplier. Returns what to log."""
    logits = state.field.logits
    if logits is None or how.fixed:
        return {}
    logits = logits.detach().requires_grad_()
    saliency = torch.sigmoid(logits)
    mean = float(saliency.detach().mean())
    shown = {"saliency": mean}
    if step < how.prune_start:  # nothing to learn yet, and noise would only wear it out
        del gradients["logits"]
        if step >= how.prune_start // 2:
            total, count = state.warm or [0.0, 0.0]
            state.warm = [total + loss, count + 1]
        return shown
    if how.pruner == "none":
        return shown
    scale = state.warm[0] / state.warm[1] if state.warm else loss
    if how.pruner == "l1":
        _push(gradients, logits, (how.weight or scale) * saliency.mean())
        return shown
    if not state.dual.rho:
        state.dual = admm.measured(state.dual, scale, GENTLE if how.pruner == "dual" else FIRM)
    if how.pruner == "dual":
        _push(gradients, logits, admm.penalty(state.dual, saliency.mean()))
        state.settled |= 3 * step >= how.steps and mean <= SETTLED * how.keep
        state.dual = admm.ascend(state.dual, mean)
        return shown | {"gamma": state.dual.gamma}
    state.blocks = state.blocks or admm.admm_start(saliency, how.keep)
    _push(gradients, logits, admm.admm_penalty(state.blocks, saliency, state.dual.rho))
    if step % BLOCKS_EVERY == 0:
        state.blocks = admm.admm_update(state.blocks, saliency, how.keep)
    return shown | {"kept": float((state.blocks.z > 0).float().mean())}


def _push(gradients: dict[str, Tensor], logits: Tensor, penalty: Tensor) -> None:
    """Adds the gradient of a penalty by the logits."""
    gradients["logits"] += torch.autograd.grad(penalty, logits)[0]


def _adam(state: State, gradients: dict[str, Tensor], how: Training, step: int) -> None:
    decay = how.last_rate ** (step / how.steps)
    rates = {"logits": max(how.rate, LOGITS_WAY / how.steps)}
    for name, slope in gradients.items():
        tensor, (first, second) = state.field.tensors[name], state.moments[name]
        torch._fused_adam_(
            [tensor.detach()], [slope], [first], [second], [], [torch.tensor(step + 1.0)],
            lr=rates.get(name, how.rate) * decay, eps=EPS,
            beta1=BETAS[0], beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY if name.startswith("layer") else 0.0,
            amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
        )  # fmt: skip


def _occupied(state: State) -> Tensor:
    found = occupancy.occupied(state.values)
    if state.settled:
        found &= covered(cells_above(state.field.logits.detach(), CLOSED), found)
    return found if state.allowed is None else found & state.allowed


def _alpha(how: Training, step: int) -> float:
    # table entries are still tiny before: through the gate, Adam's first steps would fill the table
    # with noise of the size of its rate
    if not how.alphas or (step < how.prune_start and not how.fixed):
        return 0.0
    return how.alphas[0] if 3 * step < how.steps else how.alphas[-1]


def _with(field: Field, tensors: dict[str, Tensor]) -> Field:
    layers = tuple(tensors[f"layer{number}"] for number in range(len(field.layers)))
    return replace(field, table=tensors["table"], layers=layers, logits=tensors.get("logits"))


def _dump(state: State) -> dict[str, Tensor]:
    dual = state.dual
    capped = dual.cap if math.isfinite(dual.cap) else -1.0
    found = {
        "values": state.values,
        "rays": torch.tensor([state.rays, int(state.shaded), int(state.settled)]),
        "dual": torch.tensor(
            [dual.rho, dual.gamma, capped, dual.capped, *state.warm], dtype=torch.float64
        ),
    }
    for name, tensor in state.field.tensors.items():
        found[name] = tensor
        found[f"{name}.first"], found[f"{name}.second"] = state.moments[name]
    found |= {f"{name}.average": tensor for name, tensor in state.average.items()}
    if state.blocks is not None:
        found |= {"blocks.z": state.blocks.z, "blocks.u": state.blocks.u}
    return found


def _load(state: State, tensors: dict[str, Tensor]) -> None:
    names = list(state.field.tensors)
    state.values = tensors["values"]
    rays, shaded, settled = tensors["rays"].tolist()
    state.rays, state.shaded, state.settled = rays, bool(shaded), bool(settled)
    rho, gamma, cap, capped, *state.warm = tensors["dual"].tolist()
    cap = cap if cap >= 0 else math.inf
    state.dual = replace(state.dual, rho=rho, gamma=gamma, cap=cap, capped=int(capped))
    state.field = _with(state.field, {name: tensors[name] for name in names})
    state.field = replace(state.field, occupancy=_occupied(state))
    state.moments = {n: (tensors[f"{n}.first"], tensors[f"{n}.second"]) for n in names}
    state.average = {n: tensors[f"{n}.average"] for n in state.average}
    if "blocks.z" in tensors:
        state.blocks = admm.Blocks(tensors["blocks.z"], tensors["blocks.u"])
