"""The loop that trains modules of text-to-image models, whatever the losses are: optimizer,
precision, moving average, log, checkpoints; one process or several under `accelerate launch`, with
whole weights in each or sharded ones.

A run that was killed and started again ends in the same bits as one that was not (one process,
the same machine), if the steps depend on nothing but what they are given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.files import sweep
from gencompress.t2i.checkpoint import AVERAGE, MODEL, Log, State, resume, save
from gencompress.t2i.distill import Draws, draws, seeds
from gencompress.t2i.optimizer import OPTIMIZERS, Weights, kept_moments, optimizers, tables_of
from gencompress.t2i.shard import asked, clipped, gathered, is_sharded, sharded
from gencompress.t2i.weights import EMA, Masters, trained

Batch = dict[str, Tensor]
# samples by index, or an endless stream: called with the numbers of the samples of a batch
Data = Sequence[Batch] | Callable[[list[int]], Batch]
Step = Callable[[int, Batch, Draws], Mapping[str, Tensor]]

FILE = "checkpoint.safetensors"
PRECISIONS = ("no", "bf16", "pure-bf16")
SAVING = 0.05  # of the time, most that timed checkpoints take
RUNS = "runs"  # in the current folder, where TensorBoard looks first


@dataclass(frozen=True)
class Training:
    """How to train."""

    steps: int
    batch: int  # samples of a step, over all processes
    rate: float = 1e-4  # of the optimizer, after `warmup` steps of rising to it
    warmup: int = 0  # steps
    last_rate: float = 0.0  # of `rate` at the end; falls as half a cosine. 1: constant
    betas: tuple[float, float] = (0.9, 0.999)
    decay: float = 0.01  # of the weights
    faster: Mapping[str, float] = field(default_factory=dict)  # times the rate, by ends of names
    optimizer: str = "adamw"  # or muon, faster by steps: matrices by Muon, the rest by AdamW
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
    # of accelerate, each of whose packages is there: tensorboard, wandb, ...; files go to RUNS
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        least = {"steps": 0, "batch": 1, "warmup": 0, "at_once": 0, "save_steps": 0, "log_every": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} {getattr(self, name)}: {bound} or more")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: known are {', '.join(PRECISIONS)}")
        if self.trackers:
            _expect_installed(self.trackers)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer {self.optimizer!r}: known are {', '.join(OPTIMIZERS)}")
        if min(self.faster.values(), default=1) <= 0:
            raise ValueError(f"faster {dict(self.faster)}: factors are above 0")
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
    frozen: Sequence[nn.Module] = (),
    run: str = "",
    progress: Progress = quiet,
) -> tuple[Log, EMA | None]:
    """Trains the parameters of `models` that want gradients, in place, from the checkpoint in
    `workdir` on where there is one.

    Under `accelerate launch` or `torchrun` every process calls this with equal arguments and takes
    its share of each batch; gradients are averaged, so the result is that of one process up to
    rounding, if "loss" is a mean over samples. The same holds for `at_once`. With `--use_fsdp
    --fsdp_version 2` weights, gradients, moments and average are sharded (`shard.sharded`).

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
        frozen: what else the steps call, say a teacher: sharded, too, where the models are.
        run: names what else decides the run (data, teacher, losses); kept in the checkpoint.

    Returns:
        The log: {"kind": "step", "step": steps done, the mean since the last row of each loss and
        of "norm" (of the gradients, before clipping), "lr", "seconds" of training so far}, every
        `log_every` steps and at the end; and the average, if `how.ema`.

    Raises:
        ValueError: nothing to train, trained weights that are not float32, no samples, a batch
            that does not divide among the processes, or sharding of another kind.
        FormatError: the checkpoint is broken, or of another run.
        FileNotFoundError: there is no folder `workdir`.
        RuntimeError: a loss or gradient is not finite; that step is not saved.
        OSError: the checkpoint cannot be written; the last one stays.
    """
    from accelerate import Accelerator

    team = Accelerator(log_with=list(how.trackers) or None, project_dir=RUNS)
    _check(models, data, how, team)
    low = how.precision == "pure-bf16"
    with sharded(list(models.values()), frozen, team, low) as used, warnings.catch_warnings():
        # norms with float32 weights take a slower way under autocast, as they shall
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        log, ema = _fit(
            models, step, data, how, workdir, generator, run, progress, team, used
        )  # fmt: skip
    team.wait_for_everyone()
    return log, ema if how.ema else None


def _fit(
    models: Mapping[str, nn.Module],
    step: Step,
    data: Data,
    how: Training,
    workdir: Path | None,
    generator: torch.Generator,
    run: str,
    progress: Progress,
    team: Any,
    used: set[Tensor],
) -> tuple[Log, EMA]:
    """`fit`, of models that are sharded or whole; `used` as from `sharded`."""
    parameters = trained(models)
    apart = any(is_sharded(one) for one in parameters.values())
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
    weights: Weights = {**parameters, **masters.high} if masters else parameters
    movers = optimizers(
        weights, how.optimizer, how.rate, how.betas, how.decay, tables_of(models), moments,
        how.faster,
    )  # fmt: skip
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
                found = _agreed(found, weights, used, team)
            found["norm"] = float(clipped(weights.values(), how.clip or math.inf))
            for name, value in found.items():
                if not math.isfinite(value):
                    raise RuntimeError(f"step {state.step + 1}: {name} is {value}; {_left(path)}")
                total = state.window.setdefault(name, [0.0, 0])
                total[:] = total[0] + value, total[1] + 1
            lr = rate_at(state.step, how)
            for mover in movers:
                for group in mover.param_groups:
                    group["lr"] = lr * group["factor"]
                mover.step()
                mover.zero_grad()
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
            now = time.monotonic()
            late = how.save_seconds and now - saved >= max(how.save_seconds, cost / SAVING)
            counted = how.save_steps and state.step % how.save_steps == 0
            due = path is not None and bool(end or counted or late)
            if apart:  # all gather what the main process writes, when it says so
                due = bool(team.reduce(torch.tensor(float(due), device=device)) > 0)
            if due:
                kept = _kept(models, weights, ema) | kept_moments(weights, movers)
                kept = gathered(kept, team.is_main_process)
                if path is not None:
                    save(path, decides, state, kept, generator)
                cost = (saved := time.monotonic()) - now
    finally:
        for mover in movers:
            mover.zero_grad()
        if masters:
            masters.restore()
        for tracker in team.trackers:  # `team.end_training` would end the processes' group too
            tracker.finish()
    return state.log, ema


def _check(models: Mapping[str, nn.Module], data: Data, how: Training, team: Any) -> None:
    """Makes the models the same in every process. Raises as `fit`."""
    parameters = trained(models)
    if not parameters:
        raise ValueError("no parameter of the models wants gradients: there is nothing to train")
    for name, one in parameters.items():
        if one.dtype != torch.float32:
            raise ValueError(f"{name} is {one.dtype}; what is trained comes as torch.float32")
        one.grad = None
    if not callable(data) and len(data) == 0:
        raise ValueError("the data has no samples")
    if how.optimizer == "muon" and asked():
        raise ValueError("optimizer muon: takes whole matrices; train shards by adamw")
    if team.num_processes > 1:
        if team.distributed_type.value not in ("MULTI_CPU", "MULTI_GPU", "FSDP"):
            raise ValueError(f"{team.distributed_type.value}: expected plain processes, or FSDP")
        if how.batch % team.num_processes:
            raise ValueError(f"batch {how.batch} does not divide by {team.num_processes} processes")
        for model in models.values():
            for one in (*model.parameters(), *model.buffers()):
                first = one.data.to(team.device).contiguous()
                torch.distributed.broadcast(first, 0)
                one.data.copy_(first)


def _track(team: Any, how: Training, decides: dict[str, Any]) -> None:
    """Begins a run of each tracker."""
    plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in decides.items()}
    if how.trackers:
        team.init_trackers("gencompress", plain)


def _expect_installed(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, LoggerType, get_available_trackers

    own = {*map(str, LoggerType.list())}
    known = {*own, *LOGGER_TYPE_TO_CLASS} - {"all"}
    if unknown := {*trackers} - known:
        told = ", ".join(sorted(known))
        raise ValueError(f"trackers {', '.join(sorted(unknown))}: known are {told}")
    if missing := {*trackers} & own - {*map(str, get_available_trackers())}:
        raise ValueError(f"trackers {', '.join(sorted(missing))}: not installed")


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


def _agreed(
    found: dict[str, float], weights: Weights, used: set[Tensor], team: Any
) -> dict[str, float]:
    """Averages gradients and losses over the processes; of sharded weights it has been done. One
    that no process used stays without a gradient, as in one process; one that some used has zeros
    from the others."""
    device = next(iter(weights.values())).device
    ours = [one in used if is_sharded(one) else one.grad is not None for one in weights.values()]
    used.clear()
    counts = team.reduce(torch.tensor(ours, dtype=torch.float32, device=device), "sum").tolist()
    for one, count in zip(weights.values(), counts, strict=True):
        if count and one.grad is None:
            one.grad = torch.zeros_like(one)
        elif not count:
            one.grad = None
    whole_ones = [one for one in weights.values() if one.grad is not None and not is_sharded(one)]
    values = torch.tensor(list(found.values()), device=device)
    flat = torch.cat([values, *(one.grad.flatten() for one in whole_ones)])
    sizes = [len(values), *map(Tensor.numel, whole_ones)]
    losses, *gradients = team.reduce(flat, "mean").split(sizes)
    for one, gradient in zip(whole_ones, gradients, strict=True):
        one.grad.copy_(gradient.view(one.shape))
    return dict(zip(found, losses.tolist(), strict=True))


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
