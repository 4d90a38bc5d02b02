"""What the policies share: the log, the sums of a refinement, resets, and the length of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from gencompress.splat.state import State, forget

RUN = 30_000  # optimiser steps the settings are given for (3DGS)
# Floors for shorter runs, where neither the number of views nor the learning rates shrink.
# A refinement judges a splat by its mean gradient over the steps since the last one, a view each:
# over fewer than 50 the mean is noise. 3,000 steps still hold 28 refinements.
CADENCE = 50  # steps
# Adam moves a logit by at most its rate, 0.05, a step: from 0.01, where a reset leaves it, a splat
# needs 92 steps to reach opacity 0.5 and 136 to reach 0.9 if every view pulls the same way.
RECOVERY = 150  # steps
RESET = 500  # steps; three times that, as views do not pull the same way

Settings = TypeVar("Settings")


def log(state: State, event: str, count: int) -> None:
    """Appends to the log what has just been done to `count` splats."""
    state.events.append({"step": state.step, "event": event, "count": count, "splats": len(state)})


def clear_sums(state: State) -> None:
    """The notes that add up since a refinement start again."""
    for name in ("gradient", "seen"):
        state.notes[name] = torch.zeros_like(state.notes[name])


def is_reset(step: int, every: int, stop: int) -> bool:
    """Whether opacities are reset after this step: each multiple of `every` (0: never) < stop."""
    return every > 0 and step % every == 0 and 0 < step < stop


def since_reset(step: int, every: int, stop: int) -> int | None:
    """Steps since the last reset before this step; None if there was none."""
    last = (min(step, stop) - 1) // every * every if every else 0
    return step - last if last > 0 else None


def reset_opacities(state: State, limit: float) -> None:
    """No opacity stays above `limit`; the moments of all opacities become zero."""
    before = state.parameters["opacities"]
    highest = logit(limit)
    state.parameters["opacities"] = before.clamp(max=highest)
    forget(state, torch.ones(len(state), dtype=torch.bool), ["opacities"])
    log(state, "reset", int((before > highest).sum()))


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def shared_logits(logits: Tensor, copies: Tensor | int) -> Tensor:
    """float64: the opacity logit of each of n copies at one site that together are as opaque as
    one splat was, o' = 1 - (1 - o)^(1/n). Exact for opacities next to 0 and 1."""
    clear = torch.nn.functional.logsigmoid(-logits.double()) / copies  # log(1 - o')
    return torch.log(-torch.expm1(clear)) - clear


def rescaled(policy: Settings, steps: int, floors: Mapping[str, int]) -> Settings:
    """The settings with every field named in `floors` times steps / 30,000, but not below its
    floor (nor raised to it where it was lower already; 0 stays 0)."""
    if steps < 1:
        raise ValueError(f"a run of {steps} steps, expected at least 1")
    lengths: dict[str, Any] = {}
    for name, floor in floors.items():
        length = getattr(policy, name)
        lengths[name] = max(round(length * steps / RUN), min(length, floor))
    return replace(policy, **lengths)


def whole_cadences(length: int, every: int) -> int:
    """`length` rounded up to a multiple of `every`: a reset comes right after a refinement, so
    that splats have a full cadence to recover before the next one."""
    return -(-length // every) * every


def check(
    policy: object,
    *,
    steps: Sequence[str] = (),
    shares: Sequence[str] = (),
    opacities: Sequence[str] = (),
) -> None:
    """ValueError unless the named settings are at least 1, in [0, 1], or in (0, 1)."""
    for names, right, expected in (
        (steps, lambda x: x >= 1, "at least 1"),
        (shares, lambda x: 0 <= x <= 1, "0 to 1"),
        (opacities, lambda x: 0 < x < 1, "between 0 and 1"),
    ):
        for name in names:
            value = getattr(policy, name)
            if not right(value):
                raise ValueError(f"{name} is {value}, expected {expected}")
