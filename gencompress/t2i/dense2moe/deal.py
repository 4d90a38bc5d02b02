"""Which neurons go to which expert, which experts a token goes to before a router has learnt, and
second matrices that make the best of it.

U neurons of a feed-forward on C channels, of which S form the shared expert and H each of E others;
T tokens that were watched on their way through the dense model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.progress import Progress, quiet
from gencompress.t2i.calibrate import Batch, counted
from gencompress.t2i.dense2moe.classes import route
from gencompress.t2i.distill import predict

TOKENS = 4096  # watched of a feed-forward
ROUNDS = 20  # of k-means
RIDGE = 1e-2  # of the mean square of a channel
SPREAD = 0.2  # standard deviation of the logits of a fitted router: gates stay near 1


@dataclass(frozen=True, eq=False)
class Watched:
    """Of one feed-forward, what went in and what its neurons made of it, in bfloat16."""

    inputs: Tensor  # [T, C]
    active: Tensor  # [T, U]: before the second matrix


def partition(scores: Tensor, shared: int, experts: int) -> Tensor:
    """int64 [U]: which neuron each place gets. The `shared` highest scores [U] come first, by rank;
    the rest are dealt out by rank, expert e taking ranks e, e + E, ..., so that all have the same
    share of importance. Ties go to the lower neuron.

    Raises ValueError where the rest cannot be dealt out evenly.
    """
    rest = len(scores) - shared
    if not 0 <= shared <= len(scores) or experts < 1 or rest % experts:
        raise ValueError(f"{rest} of {len(scores)} neurons for {experts} experts: not even")
    order = scores.argsort(descending=True, stable=True)
    return torch.cat([order[:shared], order[shared:].view(-1, experts).T.flatten()])


def watch(
    model: nn.Module, paths: Iterable[str], batches: Sequence[Batch], progress: Progress = quiet
) -> dict[str, Watched]:
    """Of each feed-forward of a dense model as many tokens of every batch, chosen at random, TOKENS
    in all; always the same ones."""
    each, chance = -(-TOKENS // len(batches)), torch.Generator().manual_seed(0)
    inputs: dict[str, list[Tensor]] = {}
    active: dict[str, list[Tensor]] = {}
    rows: dict[str, Tensor] = {}

    def enters(path: str, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2)
        rows[path] = torch.randint(len(x), (each,), generator=chance).to(x.device)
        inputs.setdefault(path, []).append(x[rows[path]].bfloat16().cpu())

    def leaves(path: str, out: Tensor) -> None:
        active.setdefault(path, []).append(out.flatten(0, -2)[rows[path]].bfloat16().cpu())

    with contextlib.ExitStack() as hooks:
        for path in paths:
            fused = path.endswith(".proj_mlp")  # of a single Flux block
            first = path if fused else f"{path}.net.0"
            last = f"{path.rpartition('.')[0]}.act_mlp" if fused else first
            for handle in (
                model.get_submodule(first).register_forward_pre_hook(
                    lambda _, args, path=path: enters(path, args)
                ),
                model.get_submodule(last).register_forward_hook(
                    lambda _, args, out, path=path: leaves(path, out)
                ),
            ):
                hooks.callback(handle.remove)
        with torch.no_grad():
            for met, told in counted(batches, "watching neurons", progress):
                predict(model, met, told)
    return {path: Watched(torch.cat(inputs[path]), torch.cat(active[path])) for path in inputs}


def by_activity(order: Tensor, shared: int, experts: int, active: Tensor) -> Tensor:
    """A `partition` int64 [U] whose routed experts hold neurons that are active on the same tokens:
    balanced k-means on the correlations of |active| [T, U]. A token that wants some neurons of such
    an expert wants most (as in MoEfication, Zhang et al. 2022)."""
    rest = order[shared:].sort().values
    rows = active[:, rest].float().abs().T
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    places = balanced_means(rows, experts)
    return torch.cat([order[:shared], *(rest[places == e] for e in range(experts))])


def balanced_means(rows: Tensor, clusters: int) -> Tensor:
    """int64 [N]: the cluster of each of rows [N, D] of norm 1; all clusters have as many. The
    nearest pairs of a row and a centre are joined first, while there is room."""
    chance = torch.Generator().manual_seed(0)
    centres = rows[torch.randperm(len(rows), generator=chance)[:clusters]]
    places = torch.full((len(rows),), -1)
    for _ in range(ROUNDS):
        before, places = places, _filled(rows @ centres.T, len(rows) // clusters)
        if torch.equal(before, places):
            break
        sums = torch.zeros_like(centres).index_add(0, places, rows)
        centres = sums / sums.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    return places


def _filled(near: Tensor, room: int) -> Tensor:
    """int64 [N]: a column for each row of near [N, M], the highest values first, `room` rows in
    each."""
    rows, columns = near.shape
    found, left, open_rows = [-1] * rows, [room] * columns, rows
    for place in near.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, columns)
        if found[row] < 0 and left[column]:
            found[row], left[column], open_rows = column, left[column] - 1, open_rows - 1
            if not open_rows:
                break
    return torch.tensor(found)


def fitted_router(
    seen: Watched, second: Tensor, order: Tensor, shared: int, experts: int
) -> Tensor:
    """float32 [E, C]: the linear router whose logits come nearest to how much more than usual each
    routed expert of a partition [U] adds to a token, with a second matrix [outputs, U]. Ridge
    regression, each expert scaled to one spread, so that all are wanted as often."""
    x, active, second = _beside(second, seen)
    parts = order[shared:].view(experts, -1)
    added = torch.stack([(active[:, own] @ second[:, own].T).norm(dim=1) for own in parts], 1)
    wanted = added - added.mean(0)
    wanted = wanted / wanted.norm(dim=0).clamp(min=torch.finfo(wanted.dtype).tiny)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp(min=1e-6))
    weights = torch.linalg.solve(gram, x.T @ wanted)
    spread = (x @ weights).std().clamp(min=torch.finfo(x.dtype).tiny)
    return (weights * (SPREAD / spread)).T.contiguous()


def refitted(
    seen: Watched,
    second: Tensor,
    order: Tensor,
    shared: int,
    router: Tensor,
    top_k: int,
    gate: str,
) -> tuple[Tensor, Tensor]:
    """A second matrix float32 [outputs, U], in the order of the dense one, and what to add to its
    bias [outputs], so that shared neurons and those of the experts that `router` [E, C] chooses
    come nearest to the dense layer's outputs on the tokens seen (`least_squares`)."""
    x, active, second = _beside(second, seen)
    chosen, gates = route(x @ router.T, top_k, gate)
    scale = x.new_zeros(len(x), len(router)).scatter(1, chosen, gates)
    scale = scale.repeat_interleave((len(order) - shared) // len(router), 1)
    features = torch.cat([active[:, order[:shared]], active[:, order[shared:]] * scale], 1)
    found, shift = least_squares(features, second[:, order].T, active @ second.T)
    made = torch.empty_like(second)
    made[:, order] = found.T
    return made, shift


def _beside(second: Tensor, seen: Watched) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, activity and the matrix in float32, where the matrix is."""
    inputs, active = (one.to(second.device).float() for one in (seen.inputs, seen.active))
    return inputs, active, second.float()


def least_squares(features: Tensor, start: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, D] and offsets [D] by which features [T, N] come nearest to `wanted` [T, D], with
    a ridge towards the weights `start` (as pruned convolutions are reconstructed in He et al. 2017,
    "Channel pruning for accelerating very deep neural networks"). Solved in N or T dimensions,
    whichever are fewer."""
    middle, goal = features.mean(0), wanted.mean(0)
    centred = features - middle
    missing = wanted - goal - centred @ start
    damping = RIDGE * centred.square().sum(0).mean().clamp(min=1e-6)
    if len(features) < features.shape[1]:
        inner = centred @ centred.T
        inner.diagonal().add_(damping)
        change = centred.T @ torch.linalg.solve(inner, missing)
    else:
        inner = centred.T @ centred
        inner.diagonal().add_(damping)
        change = torch.linalg.solve(inner, centred.T @ missing)
    weights = start + change
    return weights, goal - middle @ weights
