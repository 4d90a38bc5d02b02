"""The loop that trains modules of text-to-image models, whatever the losses are: AdamW, precision,
moving average, log, checkpoints; one process or several under `accelerate launch`.

A run that was killed and started again ends in the same bits as one that was not (one process,
the same machine), if the steps depend on nothing but what they are given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencompress.files import sweep
from gencompress.t2i.checkpoint import MOMENT, Log, State, resume, save
from gencompress.t2i.distill import Draws, draws, seeds
from gencompress.t2i.weights import EMA, Masters, trained

Progress = Callable[[str], None]
Batch = dict[str, Tensor]
# samples by index, or an endless stream: called with the numbers of the samples of a batch
Data = Sequence[Batch] | Callable[[list[int]], Batch]
Step = Callable[[int, Batch, Draws], Mapping[str, Tensor]]
Weights = Mapping[str, nn.Parameter]  # as `trained` names them

FILE = "checkpoint.safetensors"
MODEL, AVERAGE = "model/", "average/"  # before names in it
PRECISIONS = ("no", "bf16", "pure-bf16")
SAVING = 0.05  # of the time, most that timed checkpoints take


def quiet(text: str) -> None:
    """Progress nobody reads."""


@dataclass(frozen=True)
class Training:
    """How to train."""

    steps: int
    batch: int  # samples of a step, over all processes
    rate: float = 1e-4  # of AdamW, after `warmup` steps of rising to it
    warmup: int = 0  # steps
    last_rate: float = 0.0  # of `rate` at the end; falls as half a cosine. 1: constant
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.01  # of the weights
    clip: float = 1.0  # largest norm of all gradients together; 0: any
    ema: float = 0.0  # decay of a moving average of the weights, as 0.999; 0: none is kept
    # no: float32; bf16: autocast; pure-bf16: bfloat16 weights with float32 masters, the fastest
    # where the processor multiplies bfloat16
    precision: str = "no"
    # samples a process passes forward and backward at once, to save memory; 0: all
    at_once: int = 0
    save_steps: int = 0  # between checkpoints; 0: not counted
    save_seconds: float = 60.0  # between checkpoints, or more where saving is slow; 0: not timed
    log_every: int = 50  # steps averaged in one row of the log
    trackers: tuple[str, ...] = ()  # of accelerate, each of whose packages is there: wandb, ...

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "warmup": 0, "at_once": 0, "save_steps": 0, "log_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: known are {', '.join(PRECISIONS)}")
        if self.rate <= 0 or not 0 <= self.last_rate <= 1 or not 0 <= self.ema < 1:
            raise ValueError("rate is above 0, last_rate 0 to 1, ema 0 or more and below 1")
        if min(self.decay, self.clip, self.save_seconds) < 0:
            raise ValueError("decay, clip and save_seconds are 0 or more")


# what does not change where a run goes: a checkpoint made with other values is taken up
FREE = {"at_once", "save_steps", "save_seconds", "log_every", "trackers"}


def rate_at(step: int, how: Training) -> float:
    """Of the step after `step` others: a straight warm-up, then half a cosine."""
    if step < how.warmup:
        return how.rate * (step + 1) / how.warmup
    part = (step - how.warmup) / max(how.steps - how.warmup, 1)
    return how.rate * (how.last_rate + (1 - how.last_rate) * (1 + math.cos(math.pi * part)) / 2)


def sample_order(first: int, count: int, size: int, seed: int) -> list[int]:
    """Which of `size` samples the numbers first, first + 1, ... of a run are, `count` of them.

    Epoch after epoch, each in a shuffled order of its own; a pure function, so a run can begin
    anywhere, also within an epoch.
    """
    found: list[int] = []
    while len(found) < count:
        epoch, place = divmod(first + len(found), size)
        found += _shuffled(size, seed, epoch)[place : place + count - len(found)].tolist()
    return found


@functools.lru_cache(maxsize=1)
def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def fit(
    models: Mapping[str, nn.Module],
    step: Step,
    data: Data,
    how: Training,
    workdir: Path | None,
    generator: torch.Generator,
    *,
    run: str = "",
    progress: Progress = quiet,
) -> tuple[Log, EMA | None]:
    """Trains the parameters of `models` that want gradients, in place, from the checkpoint in
    `workdir` on where there is one.

    Under `accelerate launch` or `torchrun` every process calls this with equal arguments and takes
    its share of each batch; gradients are averaged, so the result is that of one process up to
    rounding, if "loss" is a mean over samples. The same holds for `at_once`.

    Args:
        models: by name, on one device, float32 where trained, in the mode (`train`, `eval`) that
            they shall have. Left with the trained weights, not the average: see `EMA.copy_to`.
        step: `step(number, batch, chance)` returns losses, one-element tensors by name: that of
            "loss" is minimised, the mean over the samples of the batch; the others are logged.
            `number` counts the steps done before; all chance comes from `chance`. The global
            generators of torch, which dropout uses, start each step from a seed of their own.
        data: `len(data)` samples, shown in the order of `sample_order` and stacked; or a function
            that makes the samples of the numbers that it gets (0, 1, 2, ... over the run), as
            tensors [samples, ...]. Batches come to the device of the models.
        workdir: holds the checkpoint, written every `save_steps` or `save_seconds` and at the end,
            whole or not at all; None: none.
        generator: on the CPU; its first seed orders the data; moved on by the steps.
        run: names what else decides the run (data, teacher, losses); kept in the checkpoint.

    Returns:
        The log: {"kind": "step", "step": steps done, the mean since the last row of each loss and
        of "norm" (of the gradients, before clipping), "lr", "seconds" of training so far}, every
        `log_every` steps and at the end; and the average, if `how.ema`.

    Raises:
        ValueError: nothing to train, trained weights that are not float32, no samples, a batch
            that does not divide among the processes, or a tracker that is not installed.
        FormatError: the checkpoint is broken, or of another run.
        FileNotFoundError: there is no folder `workdir`.
        RuntimeError: a loss or gradient is not finite; that step is not saved.
        OSError: the checkpoint cannot be written; the last one stays.
    """
    from accelerate import Accelerator

    team = Accelerator(log_with=list(how.trackers) or None, project_dir=workdir)
    parameters = _checked(models, data, how, team)
    device = next(iter(parameters.values())).device
    share = how.batch // team.num_processes
    own = slice(team.process_index * share, (team.process_index + 1) * share)
    average = {name: one.detach().clone() for name, one in parameters.items()} if how.ema else {}
    ema = EMA(how.ema, average)
    seed, decides = generator.initial_seed(), _decides(how, data, run, generator)
    state, moments = State(), {}
    path = None if workdir is None else workdir / FILE
    if path is not None:
        if team.is_main_process:
            sweep(path)
        team.wait_for_everyone()
        state, moments = resume(path, decides, _kept(models, parameters, ema), generator)
        ema.count = state.step
    if not team.is_main_process:
        path, progress = None, quiet
    if state.step:
        progress(f"resuming: step {state.step:,} of {how.steps:,}")
    _track(team, how, decides)
    masters = Masters(models) if how.precision == "pure-bf16" else None
    weights: Weights = masters.high if masters else parameters
    optimizer = _optimizer(weights, how, moments)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=how.precision == "bf16")
    saved, cost = time.monotonic(), 0.0
    begin, shown = saved - state.seconds, (state.step, state.seconds)
    try:
        while state.step < how.steps:
            indices = _indices(state.step * how.batch, how.batch, data, seed)[own]
            *chances, common = seeds(generator, how.batch + 1)
            with _seeded(common + team.process_index, device):
                given = (indices, chances[own], data, how.at_once, device)
                found = _backward(functools.partial(step, state.step), autocast, *given)
            if masters:
                masters.take()
            if team.num_processes > 1:
                found = _agreed(found, weights, team)
            found["norm"] = _clipped(weights, how.clip)
            for name, value in found.items():
                if not math.isfinite(value):
                    raise RuntimeError(f"step {state.step + 1}: {name} is {value}; {_left(path)}")
                total = state.window.setdefault(name, [0.0, 0])
                total[:] = total[0] + value, total[1] + 1
            lr = optimizer.param_groups[0]["lr"] = rate_at(state.step, how)
            optimizer.step()
            optimizer.zero_grad()
            if masters:
                masters.give()
            if how.ema:
                ema.update(weights)
            state.step, state.seconds = state.step + 1, time.monotonic() - begin
            end = state.step == how.steps
            if end or state.step % how.log_every == 0:
                _add_row(state, lr)
                team.log({k: v for k, v in state.log[-1].items() if k != "kind"}, state.step)
                progress(_line(state, how.steps, *shown))
                shown = state.step, state.seconds
            due = how.save_steps and state.step % how.save_steps == 0
            now = time.monotonic()
            due = due or how.save_seconds and now - saved >= max(how.save_seconds, cost / SAVING)
            if path is not None and (end or due):
                kept = _kept(models, weights, ema) | _moments(weights, optimizer)
                save(path, decides, state, kept, generator)
                cost = (saved := time.monotonic()) - now
    finally:
        optimizer.zero_grad()
        if masters:
            masters.restore()
        for tracker in team.trackers:  # `team.end_training` would end the processes' group too
            tracker.finish()
    team.wait_for_everyone()
    return state.log, ema if how.ema else None


def _checked(
    models: Mapping[str, nn.Module], data: Data, how: Training, team: Any
) -> dict[str, nn.Parameter]:
    """What is trained, the same in every process."""
    parameters = trained(models)
    if not parameters:
        raise ValueError("no parameter of the models wants gradients: there is nothing to train")
    for name, one in parameters.items():
        if one.dtype != torch.float32:
            raise ValueError(f"{name} is {one.dtype}; what is trained comes as torch.float32")
        one.grad = None
    if not callable(data) and len(data) == 0:
        raise ValueError("the data has no samples")
    if team.num_processes > 1:
        if team.distributed_type.value not in ("MULTI_CPU", "MULTI_GPU"):
            raise ValueError(f"{team.distributed_type.value}: launch plain processes, no sharding")
        if how.batch % team.num_processes:
            raise ValueError(f"batch {how.batch} does not divide by {team.num_processes} processes")
        for one in parameters.values():
            first = one.data.contiguous()
            torch.distributed.broadcast(first, 0)
            one.data.copy_(first)
    return parameters


def _track(team: Any, how: Training, decides: dict[str, Any]) -> None:
    """Begins a run of each tracker; those that write files do so in the `workdir`."""
    missing = set(how.trackers) - set(map(str, team.log_with))
    if missing:
        raise ValueError(f"trackers {', '.join(sorted(missing))}: not installed")
    plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in decides.items()}
    if how.trackers:
        team.init_trackers("gencompress", plain)


def _decides(how: Training, data: Data, run: str, generator: torch.Generator) -> dict[str, Any]:
    """What a run depends on, as JSON values."""
    settings = {name: value for name, value in asdict(how).items() if name not in FREE}
    samples = "a stream" if callable(data) else len(data)
    more = {"run": run, "seed": generator.initial_seed(), "samples": samples}
    return json.loads(json.dumps(settings | more))


def _indices(first: int, count: int, data: Data, seed: int) -> list[int]:
    if callable(data):
        return list(range(first, first + count))
    return sample_order(first, count, len(data), seed)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators begin at `seed`, and are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _backward(
    step: Callable[[Batch, Draws], Mapping[str, Tensor]],
    autocast: contextlib.AbstractContextManager[Any],
    indices: list[int],
    chances: list[int],
    data: Data,
    at_once: int,
    device: torch.device,
) -> dict[str, float]:
    """Leaves the gradient of the mean loss in the weights; the losses as numbers."""
    size, means = at_once or len(indices), {}
    for first in range(0, len(indices), size):
        part = indices[first : first + size]
        batch = data(part) if callable(data) else _stacked([data[index] for index in part])
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast:
            found = step(batch, draws(chances[first : first + size], device))
        weight = len(part) / len(indices)
        (found["loss"] * weight).backward()
        for name, value in found.items():
            means[name] = means.get(name, 0.0) + float(value.detach()) * weight
    return means


def _stacked(rows: list[Batch]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _agreed(found: dict[str, float], weights: Weights, team: Any) -> dict[str, float]:
    """Averages gradients and losses over the processes. A weight that no process used stays without
    a gradient, as in one process; one that some used has zeros from the others."""
    device = next(iter(weights.values())).device
    used = torch.tensor([float(one.grad is not None) for one in weights.values()], device=device)
    used = team.reduce(used, "sum").tolist()
    ours = [one for one, count in zip(weights.values(), used, strict=True) if count]
    for one in ours:
        if one.grad is None:
            one.grad = torch.zeros_like(one)
    values = torch.tensor(list(found.values()), device=device)
    flat = torch.cat([values, *(one.grad.flatten() for one in ours)])
    losses, *gradients = team.reduce(flat, "mean").split([len(values), *map(Tensor.numel, ours)])
    for one, gradient in zip(ours, gradients, strict=True):
        one.grad.copy_(gradient.view(one.shape))
    return dict(zip(found, losses.tolist(), strict=True))


def _clipped(weights: Weights, most: float) -> float:
    """The norm of all gradients, which is at most `most` afterwards."""
    return float(nn.utils.clip_grad_norm_(weights.values(), most or math.inf))


def _optimizer(weights: Weights, how: Training, moments: dict[str, Tensor]) -> torch.optim.AdamW:
    """AdamW with the moments of a checkpoint, named "weight/moment", where there is one."""
    found = torch.optim.AdamW(
        weights.values(), how.rate, how.betas, weight_decay=how.decay, fused=True
    )
    slots: dict[int, dict[str, Tensor]] = {}
    order = {name: number for number, name in enumerate(weights)}
    for name, value in moments.items():
        weight, _, moment = name.rpartition("/")
        if value.ndim:
            # fused kernels go through memory: a moment lies in it as its weight does
            value = torch.empty_like(weights[weight], requires_grad=False).copy_(value)
        slots.setdefault(order[weight], {})[moment] = value
    if slots:
        groups = found.state_dict()["param_groups"]
        found.load_state_dict({"state": slots, "param_groups": groups})
    return found


def _moments(weights: Weights, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What `_optimizer` reads back."""
    return {
        f"{MOMENT}{name}/{moment}": value
        for name, one in weights.items()
        for moment, value in optimizer.state.get(one, {}).items()
    }


def _kept(models: Mapping[str, nn.Module], weights: Weights, ema: EMA) -> dict[str, Tensor]:
    """What training changes: the weights, buffers that are part of the state, the average."""
    buffers = {
        f"{key}.{name}": value
        for key, model in models.items()
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter)
    }
    kept = {MODEL + name: value for name, value in {**weights, **buffers}.items()}
    return kept | {AVERAGE + name: value for name, value in ema.values.items()}


def _left(path: Path | None) -> str:
    """What the user still has when a run stops."""
    return f"{path} is as before" if path is not None and path.exists() else "nothing was saved"


def _add_row(state: State, lr: float) -> None:
    means = {name: total / count for name, (total, count) in state.window.items()}
    row = {"kind": "step", "step": state.step, **means, "lr": lr, "seconds": state.seconds}
    state.log.append(row)
    state.window = {}


def _line(state: State, steps: int, since: int, second: float) -> str:
    row = state.log[-1]
    speed = (state.step - since) / max(state.seconds - second, 1e-9)
    shown = [f"{k} {v:.4g}" for k, v in row.items() if k not in ("kind", "step", "lr", "seconds")]
    left = (steps - state.step) / speed / 60
    parts = [f"training: step {state.step:,} of {steps:,}", *shown, f"{speed:.3g} steps/s"]
    return ", ".join([*parts, f"{left:.1f} min left"] if state.step < steps else parts)
