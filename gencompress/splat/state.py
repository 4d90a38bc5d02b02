"""Splats while they are trained: raw parameters, Adam's moments, and notes a splat carries.

Rows never leave their order by themselves, and every tensor here has one row a splat: whatever
adds, moves or removes splats goes through `keep_rows` and `add_rows`, so row i is the same splat in
every parameter, both moments and every note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gencompress.splat.cloud import SplatCloud, tensors

NEW_NOTES = ("gradient", "seen")  # notes that start at 0; `born` starts at the step


@dataclass
class State:
    """N splats in training; tensors are float32 unless said, and are replaced, not resized."""

    parameters: dict[str, Tensor]  # the fields of SplatCloud, raw: [N, ...] each
    first: dict[str, Tensor]  # Adam's running mean of the gradient, shapes as the parameters
    second: dict[str, Tensor]  # and of its square
    notes: dict[str, Tensor]  # [N]: gradient, seen (sums since the last refinement), born (int64)
    step: int = 0  # optimiser steps taken
    extent: float = 1.0  # size of the scene in world units: 1.1 times the camera spread
    antialiased: bool = False
    # what density control did, for the log
    events: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.parameters["means"].shape[0]


def start(cloud: SplatCloud, extent: float) -> State:
    """A state whose moments and notes are zero. The parameters are copies."""
    parameters = {name: value.clone() for name, value in tensors(cloud).items()}
    zeros = [{n: torch.zeros_like(v) for n, v in parameters.items()} for _ in range(2)]
    return State(
        parameters, *zeros, _new_notes(len(cloud), 0), extent=extent, antialiased=cloud.antialiased
    )


def to_cloud(state: State) -> SplatCloud:
    """The splats as they are now; the tensors are copies."""
    return SplatCloud(
        **{name: value.detach().clone() for name, value in state.parameters.items()},
        antialiased=state.antialiased,
    )


def keep_rows(state: State, keep: Tensor) -> None:
    """Only the splats of a bool mask [N] or an index stay, in its order, with moments and notes."""
    for group in (state.parameters, state.first, state.second, state.notes):
        for name, value in group.items():
            group[name] = value[keep]


def add_rows(state: State, new: dict[str, Tensor]) -> None:
    """Appends splats [M, ...] with zero moments, born at this step."""
    count = len(new["means"])
    for name, value in new.items():
        state.parameters[name] = torch.cat([state.parameters[name], value])
        for moments in (state.first, state.second):
            moments[name] = torch.cat([moments[name], torch.zeros_like(value)])
    for name, value in _new_notes(count, state.step).items():
        state.notes[name] = torch.cat([state.notes[name], value])


def forget(state: State, rows: Tensor, names: Sequence[str] | None = None) -> None:
    """Zeroes Adam's moments of some splats, in all fields or those named."""
    for name in names or tuple(state.parameters):
        state.first[name][rows] = 0
        state.second[name][rows] = 0


def _new_notes(count: int, step: int) -> dict[str, Tensor]:
    notes = {name: torch.zeros(count) for name in NEW_NOTES}
    return notes | {"born": torch.full((count,), step, dtype=torch.int64)}
