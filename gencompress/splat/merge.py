"""Fewer splats without training: merge or remove whatever changes the pictures least.

Each round measures by rendering what removing each splat would do (`splat_removal_errors`),
predicts what merging it with each of its neighbours would do, and carries out the cheapest of all
those, no splat twice, until a share of the cloud is gone. The prediction is the closed-form error
of the merger in the open (`splat_merge_costs`), scaled by how much of its own open-air error each
of the two splats really shows in the pictures: what is hidden, or lies over its own colour, is
cheap to merge. Pairwise merging by moment matching is known from the literature on splat
simplification; the measured scale, and removal as a competing move, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from gencompress_kernels.merge_splats import Blobs, energies, merge, splat_merge_costs
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from scipy.spatial import cKDTree
from torch import Tensor

from gencompress.splat.cloud import SplatCloud, rows, tensors, with_tensors
from gencompress.splat.render import activate, removal_errors
from gencompress.views.camera import Camera

# Tuned on three real captures at 50% and 25% of the splats (PSNR on views that did not score).
NEIGHBOURS = 10  # candidates for merging around each splat; 16 gave within 0.3 dB either way
ROUND = 0.25  # share of the splats that goes before errors are measured again; 0.08: no better
# What a removal costs against its measured error: removals next to each other add up to more than
# their sum. 1 loses 1 dB on foliage and wins 0.3 on opaque surfaces; 6 is as good as 3.
REMOVAL_PENALTY = 3.0
# a rotation with no entry near 0 or 1
FRAME = rotation_matrices(torch.tensor([0.7, 0.4, -0.3, 0.5], dtype=torch.float64))
LEAST_VISIBLE = 1e-3  # of the median scale: an unseen splat may be seen from elsewhere


class Simplified(NamedTuple):
    """A cloud on its way down; rows keep the order of the original."""

    cloud: SplatCloud
    blobs: Blobs  # the same splats by their moments, in a turned frame
    kept: Tensor  # int64 [n] which splat of the original each row descends from


def start(cloud: SplatCloud) -> Simplified:
    """The whole cloud, nothing merged yet."""
    return Simplified(cloud, to_blobs(cloud), torch.arange(len(cloud)))


def simplify(
    state: Simplified,
    target: int,
    cameras: Sequence[Camera],
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> Simplified:
    """Merges and removes splats until `target` are left.

    Args:
        target: at least 1; a state that is already as small is returned as it is.
        cameras: views to measure removal errors from.
        progress: told the number of splats left after each round.
    """
    if target < 1:
        raise ValueError(f"target is {target}, expected at least 1 splat")
    while len(state.kept) > target:
        num = len(state.kept)
        pairs = _cheapest_moves(state, cameras)
        limit = min(num - target, max(1, int(ROUND * num)))
        state = _apply(state, _disjoint(pairs, num, limit))
        progress(len(state.kept))
    return state


def _cheapest_moves(state: Simplified, cameras: Sequence[Camera]) -> Tensor:
    """Pairs [M, 2] of rows in order of picture error; a pair (i, i) stands for removing i."""
    blobs, num = state.blobs, len(state.kept)
    errors = torch.stack([removal_errors(state.cloud, c).double() for c in cameras]).sum(0)
    in_the_open = energies(blobs).clamp_min(1e-300)
    visible = errors / in_the_open
    seen = visible[errors > 0]
    if len(seen):
        visible = visible.clamp_min(LEAST_VISIBLE * float(seen.median()))
    pairs = _neighbours(blobs.means, min(NEIGHBOURS, num - 1))
    merging = splat_merge_costs(blobs, pairs) * visible[pairs].mean(1)
    removing = REMOVAL_PENALTY * visible * in_the_open
    alone = torch.arange(num)[:, None].expand(-1, 2)
    order = torch.cat([merging, removing]).argsort(stable=True)
    return torch.cat([pairs, alone])[order]


def _neighbours(means: Tensor, count: int) -> Tensor:
    """Each pair of a point and one of its `count` nearest once, lower index first."""
    num = len(means)
    if count < 1:
        return torch.empty(0, 2, dtype=torch.int64)
    _, near = cKDTree(means.numpy()).query(means.numpy(), k=count + 1, workers=-1)
    first = torch.arange(num).repeat_interleave(count + 1)
    second = torch.from_numpy(np.asarray(near, np.int64).reshape(-1))
    keys = torch.minimum(first, second) * num + torch.maximum(first, second)
    keys = torch.unique(keys[first != second])
    return torch.stack([keys // num, keys % num], 1)


def _disjoint(pairs: Tensor, num: int, limit: int) -> Tensor:
    """The first `limit` pairs of the list that share no row with an earlier one taken."""
    used = bytearray(num)
    taken = []
    for at, (i, j) in enumerate(pairs.tolist()):
        if not used[i] and not used[j]:
            used[i] = used[j] = 1
            taken.append(at)
            if len(taken) == limit:
                break
    return pairs[taken]


def _apply(state: Simplified, pairs: Tensor) -> Simplified:
    """The merger takes the row of the heavier of the two; removed rows go."""
    gone = torch.zeros(len(state.kept), dtype=torch.bool)
    gone[pairs[pairs[:, 0] == pairs[:, 1], 0]] = True
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    weight = energies(state.blobs)[pairs]
    heavier = torch.where(weight[:, 0] >= weight[:, 1], pairs[:, 0], pairs[:, 1])
    gone[pairs.sum(1) - heavier] = True
    merged = merge(state.blobs, pairs)
    blobs = Blobs(*(_put(old, heavier, new) for old, new in zip(state.blobs, merged, strict=True)))
    new = to_cloud(merged, state.cloud)
    cloud = with_tensors(
        state.cloud,
        {
            name: _put(old, heavier, tensors(new)[name])
            for name, old in tensors(state.cloud).items()
        },
    )
    keep = ~gone
    return Simplified(
        rows(cloud, keep),
        Blobs(*(field[keep] for field in blobs)),
        state.kept[keep],
    )


def _put(old: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return old.index_copy(0, index, values)


def to_blobs(cloud: SplatCloud) -> Blobs:
    """Moments of the splats, in a frame turned by `FRAME` so that nothing in a scene that is
    aligned with the axes meets the three viewing directions of the cost head on."""
    active = activate(cloud)
    axes = FRAME @ rotation_matrices(active["quats"].double())
    half = axes * active["scales"].double()[:, None, :]
    covariances = half @ half.transpose(1, 2)
    return Blobs(
        active["means"].double() @ FRAME.T,
        torch.stack([covariances[:, i, j] for i in range(3) for j in range(i, 3)], -1),
        active["opacities"].double(),
        active["sh"].double().flatten(1),
    )


def to_cloud(blobs: Blobs, like: SplatCloud) -> SplatCloud:
    """Splats of the same moments, with as many scales and harmonics as `like` has."""
    xx, xy, xz, yy, yz, zz = blobs.covariances.unbind(1)
    matrices = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).reshape(-1, 3, 3)
    variances, axes = torch.linalg.eigh(FRAME.T @ matrices @ FRAME)
    variances, axes = variances.flip(-1), axes.flip(-1)  # largest first: a surfel's normal is last
    axes = axes * torch.where(torch.linalg.det(axes) < 0, -1.0, 1.0)[:, None, None]
    scales = 0.5 * variances.clamp_min(1e-20).log()
    return SplatCloud(
        (blobs.means @ FRAME).float(),
        quaternions(axes).float(),
        scales[:, : like.scales.shape[1]].float().contiguous(),
        torch.logit(blobs.opacities.clamp(1e-6, 1 - 1e-6)).float(),
        blobs.colors.reshape(-1, *like.sh.shape[1:]).float(),
        like.antialiased,
    )


def quaternions(matrices: Tensor) -> Tensor:
    """Unit w, x, y, z [N, 4] of rotation matrices [N, 3, 3], by the largest of the four
    components, which is at least 1/2 (Shepperd 1978)."""
    m = matrices
    xx, yy, zz = m[:, 0, 0], m[:, 1, 1], m[:, 2, 2]
    squares = torch.stack([1 + xx + yy + zz, 1 + xx - yy - zz, 1 - xx + yy - zz, 1 - xx - yy + zz])
    wx, wy, wz = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    xy, xz, yz = m[:, 1, 0] + m[:, 0, 1], m[:, 2, 0] + m[:, 0, 2], m[:, 2, 1] + m[:, 1, 2]
    table = torch.stack(
        [
            torch.stack([squares[0], wx, wy, wz], -1),
            torch.stack([wx, squares[1], xy, xz], -1),
            torch.stack([wy, xy, squares[2], yz], -1),
            torch.stack([wz, xz, yz, squares[3]], -1),
        ],
        1,
    )
    best = table[torch.arange(len(m)), squares.argmax(0)]
    return torch.nn.functional.normalize(best, dim=-1)
