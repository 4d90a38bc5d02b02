"""How long something takes, with the spread that says how far to trust it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call."""

    median: float
    spread: float | None  # standard deviation over the repeats; None after a single one
    fastest: float
    repeats: int


def time_call(fn: Callable[[], object], *, repeats: int = 5, warmup: int = 1) -> Timing:
    """Calls `fn` `warmup` times untimed (compilers, caches), then `repeats` times timed.

    Work that `fn` leaves running on a CUDA device is waited for, and belongs to its time.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats is {repeats}, warmup {warmup}; expected at least 1 and 0")
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        fn()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return Timing(
        median=statistics.median(seconds),
        spread=statistics.stdev(seconds) if repeats > 1 else None,
        fastest=min(seconds),
        repeats=repeats,
    )


def _synchronize() -> None:
    if torch.cuda.is_initialized():  # no device is woken for a measurement on the CPU
        torch.cuda.synchronize()
