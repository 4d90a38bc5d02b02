"""How far one triangle surface is from another: Chamfer, F-score, normals, on sampled points.

Surfaces are vertices [V, 3] of any float type and faces [F, 3] int64. Everything is computed in
float64 on the CPU and is the same for the same generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TMN_POINTS = 2048  # Pan et al., "Deep Mesh Reconstruction ... Topology Modification", 2019
F_SHARE = 0.01  # of the diagonal: Tatarchenko et al., "What Do Single-view 3D ...", 2019


@dataclass(frozen=True)
class Distances:
    """Of a surface from the true one. Lengths are shares of the diagonal of the truth's box.

    Two samples of one surface do not coincide: even of equal surfaces the Chamfer distances are
    not zero but about half the spacing of the points, and fall with `count`.
    """

    chamfer_tmn: float  # 1000 x (mean SQUARED distance to the truth + mean squared from it)
    chamfer_l1: float  # mean of the mean distance to the truth and the mean distance from it
    precision: float  # share of our points within F_SHARE of the truth, 0 to 1
    recall: float  # share of the truth's points within F_SHARE of ours
    f_score: float  # their harmonic mean
    normal_consistency: float  # mean |cos| between normals of nearest points, mean of both ways
    count: int  # points on each surface, for all but chamfer_tmn


def compare_surfaces(
    vertices: Tensor,
    faces: Tensor,
    true_vertices: Tensor,
    true_faces: Tensor,
    generator: torch.Generator,
    *,
    count: int = 100_000,
    tmn_count: int = TMN_POINTS,
) -> Distances:
    """Distances of a surface from the truth, both sampled by area.

    Both surfaces are scaled so that the bounding box of the truth's faces has a diagonal of 1;
    nothing is moved or fitted. `chamfer_tmn` uses samples of its own, `tmn_count` points each.

    Args:
        generator: on the CPU; advanced.
        count: points on each surface; 10,000 is usual for `chamfer_l1` too, but there the spacing
            of the points alone takes a fifth off the F-score of equal surfaces.

    Raises:
        ValueError: as `sample_surface`, or all of the truth lies in one point.
    """
    corners = true_vertices.detach().to("cpu", torch.float64)[true_faces.cpu()].reshape(-1, 3)
    if len(corners) == 0:
        raise ValueError("the true surface has no faces")
    diagonal = float((corners.amax(0) - corners.amin(0)).norm())
    if not diagonal > 0:
        raise ValueError(f"the true surface has a diagonal of {diagonal}, expected more than zero")

    def sample(num: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ours = sample_surface(vertices, faces, num, generator)
        truth = sample_surface(true_vertices, true_faces, num, generator)
        return ours[0] / diagonal, ours[1], truth[0] / diagonal, truth[1]

    ours, _, truth, _ = sample(tmn_count)
    squares = [nearest(a, b)[0].square().mean() for a, b in ((ours, truth), (truth, ours))]

    ours, normals, truth, true_normals = sample(count)
    forth, there = nearest(ours, truth)
    back, here = nearest(truth, ours)
    precision, recall = (float((d <= F_SHARE).double().mean()) for d in (forth, back))
    cosines = [
        (normals * true_normals[there]).sum(1).abs().mean(),
        (true_normals * normals[here]).sum(1).abs().mean(),
    ]
    return Distances(
        chamfer_tmn=1000 * float(squares[0] + squares[1]),
        chamfer_l1=float(forth.mean() + back.mean()) / 2,
        precision=precision,
        recall=recall,
        f_score=2 * precision * recall / max(precision + recall, 1e-300),
        normal_consistency=float(cosines[0] + cosines[1]) / 2,
        count=count,
    )


def sample_surface(
    vertices: Tensor, faces: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points evenly spread by area, and the unit normals of their faces (counter-clockwise: out).

    A face is drawn by its area, one without area never; the place in it by the corner weights
    1 - sqrt(r1), sqrt(r1) (1 - r2), sqrt(r1) r2 (Osada et al., "Shape Distributions", 2002).

    Returns:
        points [count, 3] and normals [count, 3], float64 on the CPU.

    Raises:
        ValueError: no count, wrong shapes, an index out of range, or an area that is zero or not
            finite.
    """
    if count < 1:
        raise ValueError(f"count is {count}, expected at least 1")
    if vertices.ndim != 2 or faces.ndim != 2 or vertices.shape[1] != 3 or faces.shape[1] != 3:
        raise ValueError(
            f"vertices {tuple(vertices.shape)} and faces {tuple(faces.shape)}, "
            "expected [V, 3] and [F, 3]"
        )
    faces = faces.detach().to("cpu", torch.int64)
    if len(faces) and not 0 <= int(faces.min()) <= int(faces.max()) < len(vertices):
        raise ValueError(f"faces name a vertex outside 0 to {len(vertices) - 1}")
    corners = vertices.detach().to("cpu", torch.float64)[faces]
    edges = corners[:, 1:] - corners[:, :1]
    cross = torch.linalg.cross(edges[:, 0], edges[:, 1])
    length = cross.norm(dim=1)
    below = length.cumsum(0)
    total = float(below[-1]) if len(below) else 0.0
    if not torch.finfo(torch.float64).tiny <= total < float("inf"):
        raise ValueError(f"the area of {len(faces)} faces is {total / 2}, expected more than zero")
    draws = torch.rand(3, count, dtype=torch.float64, generator=generator)
    # The first face whose sum of areas is above the draw has an area, and there is one: a normal
    # number times at most 1 - 2^-53 rounds to less.
    chosen = torch.searchsorted(below, draws[0] * total, right=True)
    root = draws[1].sqrt()
    weights = torch.stack([1 - root, root * (1 - draws[2]), root * draws[2]], 1)
    points = (weights[:, :, None] * corners[chosen]).sum(1)
    return points, cross[chosen] / length[chosen, None]


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance [N] float64 to, and index [N] int64 of, the nearest of `others` [M, 3], M > 0."""
    from scipy.spatial import cKDTree

    # The default tree takes ten times as long for points far off a plane that no axis lies in.
    tree = cKDTree(others.numpy(), balanced_tree=False, compact_nodes=False)
    distance, index = tree.query(points.numpy())
    return torch.from_numpy(distance), torch.from_numpy(index)
