"""Rounds of pruning: score, remove the worst, mend, and put back what cost silhouette."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gencompress_kernels.rasterize_triangles import visible
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.mesh.cleanup import Rules, clean
from gencompress.mesh.config import Config
from gencompress.mesh.masks import placed, seen_at
from gencompress.mesh.score import Work, badness, iou, limit, shown
from gencompress.mesh.subdivide import subdivide
from gencompress.mesh.surface import TriMesh, face_areas, take
from gencompress.mesh.topology import components

HALVINGS = 5  # of the faces to remove, before a round is given up
RESTORES = 4  # times that faces which open the masks are looked for among those to remove
PARTLY = (0.2, 0.8)  # errors of faces that lie across the silhouette
FILL = 0.1  # largest error of a triangle that closes a pinhole
GAIN = 1e-4  # IoU; a whole round that brings less ends its tau
SPARE_PIXELS, SPARE_VIEWS = 4, 2  # that only a small part covers, to keep it


@dataclass(frozen=True, eq=False)
class State:
    """A mesh on the way, and where its faces come from."""

    mesh: TriMesh
    origin: Tensor  # int64 [F'], faces of the input


def prune(
    mesh: TriMesh, work: Work, config: Config, progress: Progress = quiet
) -> tuple[State, list[dict[str, Any]]]:
    """Removes the faces that the masks speak against, tau after tau.

    A round removes the worst faces, at most `config.cap` of all, and is kept if the mean IoU stays
    within `config.slack` of the best so far; else half of them, five times at most. Before the last
    tau, faces across the silhouette are split in four where that frees a part. Then all taus once
    more and so on, until nothing goes: what was put back at first may go later, and a second run
    with the result finds no more.

    Returns the mesh, and a row of the log for each round.
    """
    state = State(mesh, torch.arange(len(mesh)))
    log: list[dict[str, Any]] = []
    best = _iou(state, work)
    said = -1
    while len(log) > said:
        first, said = said < 0, len(log)
        most = max(1, int(config.cap * len(state.mesh)))
        for number, tau in enumerate(config.taus):
            if first and config.subdivide and number == len(config.taus) - 1 and log:
                state = _split(state, work, config, tau)
            state, best = _rounds(state, work, config, tau, best, most, log, progress)
    return state, log


def _rounds(
    state: State,
    work: Work,
    config: Config,
    tau: float,
    best: float,
    most: int,
    log: list[dict[str, Any]],
    progress: Progress,
) -> tuple[State, float]:
    """Rounds of one tau, each added to the log: the mesh after them and the best IoU."""
    while len(log) < config.rounds:
        errors = badness(state.mesh.vertices, state.mesh.faces, work, config.judge, tau)
        wrong = (errors >= limit(config.judge, tau)).nonzero().squeeze(1)
        wrong = wrong[errors[wrong].argsort(descending=True, stable=True)]
        if not len(wrong):
            break
        attempt = _attempt(state, wrong[:most], work, config, best - config.slack)
        if attempt is None:
            break
        after, found = attempt
        log.append(_row(len(log) + 1, tau, state, after, found))
        progress(f"pruning: round {len(log)}, {len(after.mesh):,} faces, IoU {found:.4f}")
        ended = len(wrong) <= most and found - best < GAIN
        state, best = after, max(best, found)
        if ended:
            break
    return state, best


def _attempt(
    state: State, wrong: Tensor, work: Work, config: Config, least: float
) -> tuple[State, float] | None:
    """Without these faces, but for those that would open the masks; or without the worse half of
    them and so on; and the IoU. None if even few cost too much."""
    wrong = _harmless(state.mesh, wrong, work)
    for _ in range(HALVINGS + 1):
        if not len(wrong):
            break
        after = without(state, wrong, work, config)
        if len(after.mesh) and (found := _iou(after, work)) >= least:
            return after, found
        wrong = wrong[: len(wrong) // 2]
    return None


def _harmless(mesh: TriMesh, wrong: Tensor, work: Work) -> Tensor:
    """Those of the faces that do not uncover more pixels inside the masks than outside.

    A pixel that nothing covers once they are gone counts for the face in front there, summed over
    the views. What is put back covers for others, hence the repetition.
    """
    views = work.views
    height, width = views.masks.shape[1:]
    local, viewmats, intrinsics = placed(mesh.vertices, views)
    for _ in range(RESTORES):
        if not len(wrong):
            break
        keep = torch.ones(len(mesh), dtype=torch.bool)
        keep[wrong] = False
        bare = ~shown(mesh.vertices, mesh.faces[keep], views)
        front = visible(local, mesh.faces[wrong], viewmats, intrinsics, width, height).faces
        view, row, column = (bare & (front >= 0)).nonzero(as_tuple=True)
        change = 1 - 2 * views.masks[view, row, column].double()
        patch = components(mesh.faces[wrong])
        net = torch.zeros(len(wrong), dtype=torch.float64)
        net.index_add_(0, patch[front[view, row, column].long()], change)
        if not bool((net < 0).any()):
            break
        wrong = wrong[net[patch] >= 0]
    return wrong


def without(state: State, wrong: Tensor, work: Work, config: Config) -> State:
    """The mesh without some faces, mended."""
    keep = torch.ones(len(state.mesh), dtype=torch.bool)
    keep[wrong] = False
    rules = Rules(repair=config.repair, pinhole=config.pinhole)

    def fits(vertices: Tensor, faces: Tensor) -> Tensor:
        return badness(vertices, faces, work, config.judge, config.taus[-1]) < FILL

    spare = _spared(state.mesh, keep, work, rules)
    cleaned = clean(state.mesh, rules, keep=keep, spare=spare, holes=fits)
    return State(cleaned.mesh, state.origin[cleaned.origin])


def _spared(mesh: TriMesh, keep: Tensor, work: Work, rules: Rules) -> Tensor | None:
    """bool [F]: faces of small parts that alone cover some pixels of the masks."""
    index = keep.nonzero().squeeze(1)
    if not len(index):
        return None
    label = components(mesh.faces[index])
    sizes = torch.bincount(label)
    small = sizes < max(rules.min_faces, rules.min_share * len(index))
    small[sizes.argmax()] = False
    if not bool(small.any()):
        return None
    little = small[label]
    covered = shown(mesh.vertices, mesh.faces[index[~little]], work.views)
    height, width = covered.shape[1:]
    local, viewmats, intrinsics = placed(mesh.vertices, work.views)
    hits = visible(local, mesh.faces[index[little]], viewmats, intrinsics, width, height).faces
    alone = (hits >= 0) & (work.views.masks > 0.5) & ~covered
    view, row, column = alone.nonzero(as_tuple=True)
    part = label[little][hits[view, row, column].long()]
    counts = torch.zeros(len(covered), len(sizes), dtype=torch.int64)
    counts.index_put_((view, part), torch.ones_like(part), accumulate=True)
    needed = (counts >= SPARE_PIXELS).sum(0) >= min(SPARE_VIEWS, len(covered))
    result = torch.zeros(len(mesh), dtype=torch.bool)
    result[index] = needed[label]
    return result


def _split(state: State, work: Work, config: Config, tau: float) -> State:
    """Faces across the silhouette split in four, where a piece of them is to go."""
    mesh = state.mesh
    errors = badness(mesh.vertices, mesh.faces, work, config.judge, tau)
    partly = (errors > PARTLY[0]) & (errors < PARTLY[1])
    if not bool(partly.any()):
        return state
    finer, origin = subdivide(mesh, partly)
    wrong = badness(finer.vertices, finer.faces, work, config.judge, tau)
    wrong = wrong >= limit(config.judge, tau)
    useful = torch.zeros_like(partly)
    useful[origin[wrong]] = True
    useful &= partly
    if not bool(useful.any()):
        return state
    finer, origin = subdivide(mesh, useful)
    return State(finer, state.origin[origin])


def hidden(mesh: TriMesh, work: Work) -> Tensor:
    """bool [F]: faces that no view sees, in front at no pixel and behind the surface everywhere.

    Pixels may miss a face, so its corners and centre are looked up too: it is behind only where
    each of them is farther than all that the 3 x 3 pixels around show, or out of the frame.
    """
    views = work.views
    height, width = views.masks.shape[1:]
    local, viewmats, intrinsics = placed(mesh.vertices, views)
    unseen = torch.ones(len(mesh), dtype=torch.bool)
    corners = local[mesh.faces]
    points = torch.cat([corners, corners.mean(1, keepdim=True)], 1)  # [F, 4, 3]
    for view in range(len(views)):
        only = slice(view, view + 1)
        hits = visible(local, mesh.faces, viewmats[only], intrinsics[only], width, height)
        front = hits.faces[hits.faces >= 0].long().unique()
        unseen[front] = False
        around = torch.nn.functional.max_pool2d(
            hits.depths.clamp(max=torch.finfo(torch.float32).max)[None], 3, 1, 1
        )[0, 0]
        index = unseen.nonzero().squeeze(1)
        row, column, depth, inside = seen_at(
            points[index], viewmats[view], intrinsics[view], height, width
        )
        reaches = inside & (depth <= around[row, column])
        unseen[index[reaches.any(1)]] = False
    return unseen


def without_hidden(
    state: State, work: Work, fits: Callable[[TriMesh], bool] | None = None
) -> State:
    """Without the faces that no view sees: all of them, or as few as `fits` asks for, the smallest
    first (all, too, where even that does not fit)."""
    mesh = state.mesh
    index = hidden(mesh, work).nonzero().squeeze(1)
    index = index[face_areas(mesh.vertices, mesh.faces)[index].argsort(stable=True)]
    if not len(index):
        return state

    def cut(count: int) -> State:
        keep = torch.ones(len(mesh), dtype=torch.bool)
        keep[index[:count]] = False
        return State(take(mesh, keep.nonzero().squeeze(1)), state.origin[keep])

    few, many = 0, len(index)
    if fits is None or not fits(cut(many).mesh):
        return cut(many)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if fits(cut(middle).mesh) else (middle, many)
    return cut(many)


def _iou(state: State, work: Work) -> float:
    return float(iou(state.mesh.vertices, state.mesh.faces, work.views).mean())


def _row(number: int, tau: float, before: State, after: State, found: float) -> dict[str, Any]:
    return {
        "kind": "event",
        "event": "round",
        "round": number,
        "tau": tau,
        "faces_before": len(before.mesh),
        "faces_after": len(after.mesh),
        "iou": found,
    }
