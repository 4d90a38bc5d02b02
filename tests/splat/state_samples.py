"""Small training states whose every number tells the splat it belongs to."""

import math

import torch

from gencompress.splat.cloud import SplatCloud, tensors
from gencompress.splat.density import after_step
from gencompress.splat.state import State, start

MOMENTS = ("first", "second")


def cloud(num: int, axes: int = 3, seed: int = 0) -> SplatCloud:
    """Splats of opacity 0.02 to 0.5 and size 0.005 to 0.05, in a unit cube."""
    g = torch.Generator().manual_seed(seed)
    return SplatCloud(
        torch.rand(num, 3, generator=g),
        torch.randn(num, 4, generator=g),
        torch.rand(num, axes, generator=g) * math.log(10) + math.log(0.005),
        torch.logit(torch.rand(num, generator=g) * 0.48 + 0.02),
        torch.randn(num, 4, 3, generator=g),
    )


def tagged(num: int, axes: int = 3, step: int = 1000, seed: int = 0) -> State:
    """Splat i has i + 1 as tag: in the last harmonic, both moments of every field, and its notes.
    No policy changes a harmonic, so the tag says from whom a row descends."""
    state = start(cloud(num, axes, seed), 1.0)
    state.step = step
    tags = torch.arange(1.0, num + 1)
    state.parameters["sh"][:, -1] = tags[:, None]
    for group in MOMENTS:
        for value in getattr(state, group).values():
            value += tags.view(-1, *[1] * (value.ndim - 1))
    state.notes["seen"] += 1
    return state


def tags(state: State) -> torch.Tensor:
    return state.parameters["sh"][:, -1, 0]


def snapshot(state: State) -> dict[str, torch.Tensor]:
    groups = ("parameters", *MOMENTS, "notes")
    return {f"{g}.{n}": v.clone() for g in groups for n, v in getattr(state, g).items()}


def check_rows(state: State, forgotten: dict[str, torch.Tensor]) -> None:
    """Row i of every tensor is one splat: its moments are the tag, or 0 where `forgotten` (bool
    mask a field, `default` for fields not named) says so."""
    num = len(state)
    groups = [getattr(state, group) for group in ("parameters", *MOMENTS, "notes")]
    assert {len(value) for group in groups for value in group.values()} == {num}
    for group in MOMENTS:
        for name, value in getattr(state, group).items():
            wanted = tags(state).clone()
            wanted[forgotten.get(name, forgotten["default"])] = 0
            rows = value.reshape(num, -1)
            assert torch.equal(rows, wanted[:, None].expand_as(rows)), (group, name)
            assert rows.shape[1:] == state.parameters[name].reshape(num, -1).shape[1:]


def no_weights() -> torch.Tensor:
    raise AssertionError("nobody needs the blend weights here")


def act(policy, state: State, seed: int = 0, weights=no_weights) -> list[dict]:
    """One call of the policy; the events it added."""
    before = len(state.events)
    after_step(policy, state, torch.Generator().manual_seed(seed), weights)
    return state.events[before:]


def same(one: State, other: State) -> bool:
    mine, theirs = snapshot(one), snapshot(other)
    assert tensors(cloud(1)).keys() == one.parameters.keys()
    return one.events == other.events and all(
        mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])
        for name in mine
    )
