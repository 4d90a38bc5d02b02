"""The loop that fits a model to views, whatever the model is: log, checkpoints, resuming.

A run that was killed and started again ends in the same bits as one that was not, if its steps
depend on nothing but the state, the step and the generator that they are given.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.files import FormatError, save_tensors, sweep, writing

Log = list[dict[str, Any]]
Advance = Callable[[int, torch.Generator, Log], dict[str, float]]
Window = dict[str, list[float]]  # name of a loss: [sum, count] since the last row of the log

STATE = "state/"  # before the names of the caller's tensors in the file
GENERATOR = "generator"
ABOUT = "fit"  # the key of the metadata: JSON of step, fingerprint, log, window


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept so that it can go on after it was killed."""

    path: Path  # .safetensors: the state, the generator; step, log and fingerprint as metadata
    fingerprint: str  # of what decides the run (settings, data, seed): only an equal one goes on
    every: int = 500  # steps


def fit(
    advance: Advance,
    steps: int,
    generator: torch.Generator,
    *,
    dump: Callable[[], dict[str, Tensor]],
    load: Callable[[dict[str, Tensor]], None],
    checkpoint: Checkpoint | None = None,
    log_every: int = 100,
    progress: Progress = quiet,
) -> Log:
    """Calls `advance` until `steps` steps are done, from the checkpoint on where there is one.

    Args:
        advance: `advance(step, generator, log)` makes one optimiser step and returns its losses,
            numbers or one-element tensors by name. `step` counts those done before, from 0; all
            chance comes from `generator`. Rows it appends to `log` (plain JSON values) stay there.
        generator: moved on by the steps; set to where it was when resuming.
        dump: the whole state as tensors of any shape, dtype and device; floats are finite.
        load: takes over such a state. Its tensors, on the CPU, belong to the callee.
        checkpoint: written every `checkpoint.every` steps and at the end, whole or not at all.
        log_every: steps averaged in one row of the log.

    Returns:
        The log: {"kind": "step", "step": steps done, each loss averaged since the last such row}
        every `log_every` steps and at the end, with the rows of `advance` between. Resumed, it
        starts at step 0 too.

    Raises:
        FormatError: the checkpoint is broken, of another run, or beyond `steps`.
        FileNotFoundError: there is no folder to hold it.
        RuntimeError: a loss or a number of the state is not finite; that state is not saved.
        OSError: the checkpoint cannot be written, say for a full disk; the last one stays.
    """
    if steps < 0 or log_every < 1 or (checkpoint is not None and checkpoint.every < 1):
        raise ValueError("steps is 0 or more, log_every and checkpoint.every are 1 or more")
    done, log, window = 0, [], {}
    if checkpoint is not None:
        done, log, window = _resume(checkpoint, steps, generator, load)
        if done:
            progress(f"resuming: step {done:,} of {steps:,}")
    kept = _kept(checkpoint, done)
    shown, clock = done, time.perf_counter()
    for step in range(done, steps):
        losses = {name: float(loss) for name, loss in advance(step, generator, log).items()}
        done = step + 1
        _add(window, losses, done, kept)
        if done % log_every == 0 or done == steps:
            means = {name: total / count for name, (total, count) in window.items()}
            log.append({"kind": "step", "step": done, **means})
            window = {}
            speed = (done - shown) / max(time.perf_counter() - clock, 1e-9)
            progress(_line(done, steps, means, speed))
            shown, clock = done, time.perf_counter()
        if checkpoint is not None and (done % checkpoint.every == 0 or done == steps):
            tensors = {GENERATOR: generator.get_state(), **_finite(dump(), done, kept)}
            about = {"step": done, "log": log, "window": window}
            _save(checkpoint, tensors, about, kept)
            kept = _kept(checkpoint, done)
    return log


def view_order(step: int, count: int, *, batch: int = 1, seed: int = 0) -> list[int]:
    """The views of a step: indices below `count`, as many as `batch`.

    Epochs of ceil(count / batch) steps, each a shuffled order of its own. The last batch of an
    epoch is filled up with views from its start, so no view is twice in a batch that is not larger
    than `count`, and every epoch shows every view.

    A pure function, so a run can begin anywhere; `seed` (0 or more) may be
    `generator.initial_seed()`, which draws leave as it is.
    """
    if count < 1 or batch < 1 or step < 0:
        raise ValueError(f"step {step} of {count} views in batches of {batch}: nothing to show")
    epoch, place = divmod(step, -(-count // batch))
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return [int(order[(place * batch + i) % count]) for i in range(batch)]


def _add(window: Window, losses: dict[str, float], step: int, kept: str) -> None:
    """Adds the losses of a step to the sums; RuntimeError where one is not finite."""
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise RuntimeError(f"step {step}: {name} is {loss}; {kept}")
        total = window.setdefault(name, [0.0, 0])
        total[0] += loss
        total[1] += 1


def _finite(state: dict[str, Tensor], step: int, kept: str) -> dict[str, Tensor]:
    """The state as the file holds it: on the CPU, contiguous, no two sharing memory.

    A finite loss may come with a gradient that is not; RuntimeError before that state is saved.
    """
    tensors, storages = {}, set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise RuntimeError(
                f"step {step}: {name} holds NaN or infinity, though the loss is finite; {kept}"
            )
        storage = value.untyped_storage().data_ptr()
        tensors[STATE + name] = value.clone() if storage in storages else value
        storages.add(storage)
    return tensors


def _save(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], about: dict[str, Any], kept: str
) -> None:
    text = json.dumps(about | {"fingerprint": checkpoint.fingerprint})
    try:
        with writing(checkpoint.path, overwrite=True) as part:
            save_tensors(part, tensors, {ABOUT: text})
    except OSError as problem:
        raise OSError(
            f"{checkpoint.path}: the checkpoint of step {about['step']} cannot be written "
            f"({problem.strerror or problem}); {kept}"
        ) from problem


def _resume(
    checkpoint: Checkpoint,
    steps: int,
    generator: torch.Generator,
    load: Callable[[dict[str, Tensor]], None],
) -> tuple[int, Log, Window]:
    """Steps done, log and window of the checkpoint, with state and generator set; else a start."""
    path = checkpoint.path
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    sweep(path)
    if not path.exists():
        return 0, [], {}
    tensors, about = _read(path)
    if about["fingerprint"] != checkpoint.fingerprint:
        raise FormatError(
            path,
            f"the checkpoint of another run ({about['fingerprint']}, expected "
            f"{checkpoint.fingerprint}); remove it or choose another file",
        )
    if about["step"] > steps:
        raise FormatError(path, f"holds step {about['step']} of a run that ends at {steps}")
    generator.set_state(tensors.pop(GENERATOR))
    load({name.removeprefix(STATE): value for name, value in tensors.items()})
    return about["step"], about["log"], about["window"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            # Clones: own memory, aligned as ever, not the mapped file that is soon replaced.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
            about = json.loads((file.metadata() or {})[ABOUT])
        torch.Generator().set_state(tensors[GENERATOR])
        kinds = {"step": int, "fingerprint": str, "log": list, "window": dict}
        if any(type(about[name]) is not kind for name, kind in kinds.items()):
            raise KeyError("step, log or window")
    except (SafetensorError, OSError) as problem:
        raise FormatError(path, f"not a checkpoint: {problem}") from problem
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:  # RecursionError among them
        raise FormatError(path, f"not a checkpoint of a fit: lacks {problem}") from problem
    return tensors, about


def _kept(checkpoint: Checkpoint | None, step: int) -> str:
    """What the user still has when a run stops; `step` is that of the checkpoint, 0 for none."""
    if checkpoint is None:
        return "no checkpoint was kept"
    if step == 0:
        return f"no checkpoint had been written to {checkpoint.path} yet"
    return f"the checkpoint {checkpoint.path} holds step {step}"


def _line(done: int, steps: int, means: dict[str, float], speed: float) -> str:
    parts = [f"fitting: step {done:,} of {steps:,}"]
    parts += [f"{name} {value:.4g}" for name, value in means.items()]
    parts.append(f"{speed:.3g} steps/s")
    if done < steps:
        parts.append(f"{_duration((steps - done) / speed)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
