"""How wrong a face is: its soft map against the masks, one view at a time, then over all.

Whatever the depth, a right face projects inside the silhouette of every view, so coverage outside
a mask is evidence against it ("Pruning-based Topology Refinement of 3D Mesh using a 2D Alpha Mask",
Landreau and Tamaazousti 2022, gives the idea; the formulas here are our own). A larger error is
worse; the scores that leave this room are its negation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from gencompress_kernels.rasterize_triangles import face_coverage, silhouettes, visible
from torch import Tensor

from gencompress.mesh.masks import MaskViews, dilated, placed, resized, seen_at

SCORES = ("ratio", "outside_mass", "max", "centroid")
RULES = ("kth", "any", "mean", "vote")
LEAST = 0.25  # px^2 of a face within the frame; less is no evidence
FACING = 0.05  # cosine to the line of sight; below, the map of a face is blur
IN_FRAME = 0.5  # share of a face that must lie within the frame
SMALLEST, LARGEST = 256, 1024  # px, of the masks when scoring
KTH_SHARE, KTH_LEAST, KTH_FROM = 0.05, 2, 4  # two views must agree where there are four or more


@dataclass(frozen=True)
class Judge:
    """Which error, and how it comes together over the views."""

    score: str = "ratio"
    across: str = "kth"
    k: int = 0
    vote: float = 0.1
    sigma: float = 0.4


@dataclass(frozen=True, eq=False)
class Work:
    """Views at the size that scores, and their masks dilated."""

    views: MaskViews
    wide: Tensor  # [C, H, W]


def workplace(views: MaskViews, size: int, dilate: int) -> Work:
    """The views at `size` px (0: their own, between 256 and 1024), and masks wider by `dilate`
    px. A right face on the silhouette leaks blur beyond an undilated mask and would be flagged."""
    longer = max(views.masks.shape[1:])
    views = resized(views, size or min(max(longer, SMALLEST), LARGEST))
    return Work(views, dilated(views.masks, dilate))


def view_errors(
    vertices: Tensor, faces: Tensor, work: Work, judge: Judge, cull: bool = True
) -> tuple[Tensor, Tensor]:
    """Error of each face in each view, and whether the view may speak about it.

    - ratio: share of the face's map outside the mask, in [0, 1];
    - outside_mass: px of it;
    - max: its largest value outside;
    - centroid: 1 - mask at the face's centre.

    A view says nothing about a face behind the camera, smaller than `LEAST`, seen edge-on, or
    outside the frame by more than half.

    Returns:
        float32 [C, F], 0 where the view says nothing, and bool [C, F].
    """
    local, viewmats, intrinsics = placed(vertices, work.views)
    found = face_coverage(
        local, faces, viewmats, intrinsics, work.wide, sigma=judge.sigma, cull=cull
    )
    valid = found.extent >= LEAST
    valid &= found.extent >= IN_FRAME * found.size
    valid &= _facing(local, faces, viewmats) >= FACING
    if judge.score == "ratio":
        # what is missing from area is missing from outside too, where that is not 0
        errors = found.outside / found.area.clamp(min=1e-12)
    elif judge.score == "centroid":
        errors = _at_centroids(local, faces, viewmats, intrinsics, work.wide)
    else:
        errors = found.outside if judge.score == "outside_mass" else found.peak
    return torch.where(valid, errors, 0.0), valid


def across(errors: Tensor, valid: Tensor, judge: Judge, tau: float) -> Tensor:
    """[F] from [C, F]: a face goes where this reaches `limit(judge, tau)`.

    - any: the largest error; kth: the k-th largest, 0 with fewer than k views that may speak;
    - mean: over the views that may speak; vote: the share of those with an error of tau or more.

    A face of which no view may speak has 0.
    """
    count = valid.sum(0)
    if judge.across == "any":
        return errors.amax(0)
    if judge.across == "kth":
        k = min(judge.k or least_views(len(errors)), len(errors))
        ranked = torch.where(valid, errors, -1.0).topk(k, dim=0).values
        return ranked[-1].clamp(min=0)
    if judge.across == "mean":
        return errors.sum(0) / count.clamp(min=1)
    return (valid & (errors >= tau)).sum(0) / count.clamp(min=1)


def least_views(views: int) -> int:
    """k of kth: how many views must agree."""
    share = math.ceil(KTH_SHARE * views)
    return max(KTH_LEAST, share) if views >= KTH_FROM else max(1, share)


def limit(judge: Judge, tau: float) -> float:
    """What `across` is compared with."""
    return judge.vote if judge.across == "vote" else tau


def badness(vertices: Tensor, faces: Tensor, work: Work, judge: Judge, tau: float) -> Tensor:
    """float32 [F]: the error of each face over all views."""
    if not len(faces):
        return torch.zeros(0)
    return across(*view_errors(vertices, faces, work, judge), judge, tau)


def cover(vertices: Tensor, faces: Tensor, views: MaskViews, sigma: float = 0.4) -> Tensor:
    """[C, H, W] soft silhouettes of a mesh in these views."""
    height, width = views.masks.shape[1:]
    return silhouettes(*_arranged(vertices, faces, views), width, height, sigma=sigma)


def shown(vertices: Tensor, faces: Tensor, views: MaskViews) -> Tensor:
    """bool [C, H, W]: pixels at whose middle there is a face."""
    height, width = views.masks.shape[1:]
    return visible(*_arranged(vertices, faces, views), width, height).faces >= 0


def iou(vertices: Tensor, faces: Tensor, views: MaskViews) -> Tensor:
    """[C] intersection over union of the mask cut at 0.5 and what a face covers at the middle of a
    pixel; 1 where both are empty. The soft silhouette is wider than that: two faces that meet on
    the outline cover 3/4 of a pixel there."""
    drawn, wanted = shown(vertices, faces, views), views.masks > 0.5
    both = (drawn & wanted).sum((1, 2)).double()
    either = (drawn | wanted).sum((1, 2)).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def soft_iou(vertices: Tensor, faces: Tensor, views: MaskViews) -> Tensor:
    """[C] sum of products over sum of unions, nothing cut (SoftRas, Liu et al. 2019)."""
    drawn, wanted = cover(vertices, faces, views).double(), views.masks.double()
    both = drawn * wanted
    return both.sum((1, 2)) / (drawn + wanted - both).sum((1, 2)).clamp(min=1e-12)


def _arranged(vertices: Tensor, faces: Tensor, views: MaskViews) -> tuple[Tensor, ...]:
    local, viewmats, intrinsics = placed(vertices, views)
    return local, faces, viewmats, intrinsics


def _facing(vertices: Tensor, faces: Tensor, viewmats: Tensor) -> Tensor:
    """[C, F] cosine between a face's normal and the line of sight to its centre, without sign."""
    a, b, c = vertices[faces].unbind(1)
    normals = torch.linalg.cross(b - a, c - a)
    normals = normals / normals.norm(dim=1, keepdim=True).clamp(min=1e-30)
    centres = (a + b + c) / 3
    eyes = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])[..., 0]
    rows = []
    for eye in eyes:
        sight = centres - eye
        rows.append((normals * sight).sum(1).abs() / sight.norm(dim=1).clamp(min=1e-30))
    return torch.stack(rows)


def _at_centroids(
    vertices: Tensor, faces: Tensor, viewmats: Tensor, intrinsics: Tensor, masks: Tensor
) -> Tensor:
    """[C, F] 1 - mask at the pixel of each face's centre; 0 outside the frame."""
    centres = vertices[faces].mean(1)
    rows = []
    for viewmat, lens, mask in zip(viewmats, intrinsics, masks, strict=True):
        row, column, _, inside = seen_at(centres, viewmat, lens, *mask.shape)
        rows.append(torch.where(inside, 1 - mask[row, column], 0.0))
    return torch.stack(rows)
