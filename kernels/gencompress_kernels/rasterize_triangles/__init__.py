"""rasterize_triangles: soft silhouettes, how far each face covers a mask, and what is in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencompress_kernels import dispatch
from gencompress_kernels.rasterize_splats.inputs import check_cameras, check_tensor
from gencompress_kernels.rasterize_triangles.screen import Screen, project

OP = "rasterize_triangles"
SIGMA = 0.4  # px: softer would blur thin parts, sharper would alias (the choice of 0.3 to 0.5 px)
FARTHEST = 1e18  # of a coordinate: products of two are finite
MOST_POLYGONS = 4_000_000  # of the views that are worked on together: 64 MB


@dataclass(frozen=True, eq=False)
class Coverage:
    """Sums over the pixels of each view, for each face alone: [C, F] each."""

    area: Tensor  # sum of P, px
    outside: Tensor  # sum of P (1 - m), px
    peak: Tensor  # largest P (1 - m)
    extent: Tensor  # exact area of the face within the frame, px^2
    size: Tensor  # the same without the frame; of what lies before the near plane


@dataclass(frozen=True, eq=False)
class Hits:
    """What is in front at each pixel centre: [C, H, W] each."""

    faces: Tensor  # int32, -1: none; the lower of two at the same depth
    depths: Tensor  # along the camera's axis, world units; infinity: none
    weights: Tensor  # [C, H, W, 3] of the three vertices, in space (not on the screen); 0: none


def silhouettes(
    vertices: Tensor,
    faces: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    sigma: float = SIGMA,
    near: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft silhouettes: 1 - prod_j (1 - P_j) over all faces, however many lie on a pixel.

    P_j = sigmoid(+-d^2 / sigma^2) with d the distance to the nearest edge of the projected face,
    plus inside; 0 where that is below 1e-4 outside (SoftRas, Liu et al. 2019). In the units of
    those who write d in [-1, 1] across S px, their sigma is (2 sigma / S)^2.

    Args:
        vertices: float32 [V, 3], world. `reference` takes float64 everywhere too.
        faces: int64 [F, 3]. One that names a vertex twice is not there; any other without area
            blurs about its line.
        viewmats: [C, 4, 4] world to camera; axes x right, y down, z forward.
        intrinsics: [C, 3, 3], px, last row 0 0 1; pixel centres at +0.5.
        sigma: softness, px.
        near: depth, in world units, at which faces are cut; None: a thousandth of the median
            depth of the vertices before the camera.

    Returns:
        [C, H, W] in [0, 1]. Differentiable once in vertices, viewmats and intrinsics. The kernels
        give the same bits at any number of threads; torch's products with the cameras may not.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, where `dispatch.looks`, values are not
            finite or a face names a vertex that is not there.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(vertices, faces, viewmats, intrinsics, width, height, sigma, near)
    parts = []
    for some in _views(len(viewmats), max(len(faces), len(vertices))):
        screen = project(vertices, faces, viewmats[some], intrinsics[some], near)
        count = len(viewmats[some])
        parts.append(
            1 - _silhouettes(screen.points, screen.polygons, count, height, width, sigma, backend)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def face_coverage(
    vertices: Tensor,
    faces: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    masks: Tensor,
    *,
    sigma: float = SIGMA,
    near: float | None = None,
    cull: bool = True,
    backend: str | None = None,
) -> Coverage:
    """How much of each face's soft map lies where a mask does not, whatever is in front.

    Every face of a pixel counts, and no map is ever stored: memory is C F + C H W.

    Args:
        vertices, faces, viewmats, intrinsics, sigma, near: as `silhouettes`.
        masks: [C, H, W] in [0, 1], 1 inside; of the dtype of vertices.
        cull: skip what the box around its blur shows to lie wholly in ones of the mask. `outside`
            and `peak` are then 0 all the same, and `area` is `extent`, without gradient.

    Returns:
        Coverage. `area` and `outside` are differentiable once in vertices, viewmats and intrinsics,
        away from the pixels where P is cut off; the rest carries no gradient.

    Raises:
        ValueError, BackendUnavailable: as `silhouettes`; masks that leave [0, 1].
    """
    if masks.ndim != 3:
        raise ValueError(f"masks: got {tuple(masks.shape)}, expected [views, height, width]")
    height, width = masks.shape[1:]
    _check(vertices, faces, viewmats, intrinsics, width, height, sigma, near)
    check_tensor("masks", masks, (len(viewmats), height, width), vertices)
    if masks.numel() and dispatch.looks(masks):
        low, high = (float(end) for end in masks.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"masks from {low} to {high}, not in [0, 1]")
    parts = []
    for some in _views(len(viewmats), max(len(faces), len(vertices))):
        screen = project(vertices, faces, viewmats[some], intrinsics[some], near)
        sums, peak, extent = _coverage(
            screen.points, screen.polygons, masks[some].contiguous(), sigma, cull, backend
        )
        columns = [sums[:, 0], sums[:, 1], peak, extent[:, 0], extent[:, 1]]
        count = len(viewmats[some])
        parts.append([column.view(count, len(faces)) for column in columns])
    return Coverage(*(torch.cat(column) for column in zip(*parts, strict=True)))


def visible(
    vertices: Tensor,
    faces: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    *,
    near: float | None = None,
    backend: str | None = None,
) -> Hits:
    """The face in front at each pixel centre: a hard z-buffer, both sides of a face alike.

    Args, Raises: as `silhouettes`. Carries no gradient.
    """
    _check(vertices, faces, viewmats, intrinsics, width, height, SIGMA, near)
    parts = []
    with torch.no_grad():
        for some in _views(len(viewmats), max(len(faces), len(vertices))):
            screen = project(vertices, faces, viewmats[some], intrinsics[some], near)
            cameras, size = (viewmats[some], intrinsics[some]), (height, width)
            parts.append(_front(screen, vertices, faces, *cameras, size, backend))
    return Hits(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _check(
    vertices: Tensor,
    faces: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    sigma: float,
    near: float | None,
) -> None:
    if not 0.01 <= sigma <= 100:
        raise ValueError(f"sigma {sigma}: expected 0.01 to 100 px")
    if near is not None and not near > 0:
        raise ValueError(f"near {near}: expected a depth above 0")
    check_tensor("vertices", vertices, (vertices.shape[0], 3), vertices)
    check_cameras(viewmats, intrinsics, width, height, vertices)
    if vertices.numel() and dispatch.looks(vertices):
        reach = float(vertices.detach().abs().max())
        if reach > FARTHEST:
            raise ValueError(f"vertices reach {reach:.0e}, at most 1e18 fit")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype != torch.int64:
        raise ValueError(f"faces: got {faces.dtype} {tuple(faces.shape)}, expected int64 [F, 3]")
    if faces.device != vertices.device:
        raise ValueError(f"faces are on {faces.device}, vertices on {vertices.device}")
    if faces.numel() and dispatch.looks(faces):
        low, high = (int(end) for end in faces.aminmax())
        if low < 0 or high >= len(vertices):
            raise ValueError(f"faces name vertices {low} to {high} of {len(vertices)}")


def _views(count: int, rows: int) -> list[slice]:
    """Views to work on together, for so many faces, or vertices if more, each."""
    step = max(1, MOST_POLYGONS // max(rows, 1))
    return [slice(first, first + step) for first in range(0, count, step)]


@torch.library.custom_op("gencompress::triangle_silhouettes", mutates_args=())
def _silhouettes(
    points: Tensor,
    polygons: Tensor,
    views: int,
    height: int,
    width: int,
    sigma: float,
    backend: str | None,
) -> Tensor:
    """[C, H, W] what is left uncovered."""
    clear = points.new_empty(views, height, width)
    run = dispatch.pick(OP, points.device, backend).silhouettes
    run(points.contiguous(), polygons, sigma, clear)
    return clear


@_silhouettes.register_fake
def _(
    points: Tensor,
    polygons: Tensor,
    views: int,
    height: int,
    width: int,
    sigma: float,
    backend: str | None,
) -> Tensor:
    return points.new_empty(views, height, width)


@torch.library.custom_op("gencompress::triangle_silhouettes_backward", mutates_args=())
def _silhouettes_backward(
    slopes: Tensor,
    clear: Tensor,
    points: Tensor,
    polygons: Tensor,
    sigma: float,
    backend: str | None,
) -> Tensor:
    """[P, 2]: gradient of -sum(slopes * clear)."""
    corners = points.new_empty(len(polygons), 4, 2)
    run = dispatch.pick(OP, points.device, backend).silhouettes_backward
    run(slopes.contiguous(), clear, points.contiguous(), polygons, sigma, corners)
    return _gathered(corners, points, polygons)


@_silhouettes_backward.register_fake
def _(
    slopes: Tensor,
    clear: Tensor,
    points: Tensor,
    polygons: Tensor,
    sigma: float,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(points)


@torch.library.custom_op("gencompress::triangle_coverage", mutates_args=())
def _coverage(
    points: Tensor, polygons: Tensor, masks: Tensor, sigma: float, cull: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """[Q, 2] sums of P and P (1 - m), [Q] peaks, [Q, 2] areas within the frame and in all."""
    sums, extent = points.new_empty(len(polygons), 2), points.new_empty(len(polygons), 2)
    peak = points.new_empty(len(polygons))
    run = dispatch.pick(OP, points.device, backend).coverage
    run(points.contiguous(), polygons, masks, sigma, cull, sums, peak, extent)
    return sums, peak, extent


@_coverage.register_fake
def _(
    points: Tensor, polygons: Tensor, masks: Tensor, sigma: float, cull: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(polygons)
    return points.new_empty(count, 2), points.new_empty(count), points.new_empty(count, 2)


@torch.library.custom_op("gencompress::triangle_coverage_backward", mutates_args=())
def _coverage_backward(
    slopes: Tensor,
    points: Tensor,
    polygons: Tensor,
    masks: Tensor,
    sigma: float,
    cull: bool,
    backend: str | None,
) -> Tensor:
    """[P, 2]: gradient of sum(slopes * sums)."""
    corners = points.new_empty(len(polygons), 4, 2)
    run = dispatch.pick(OP, points.device, backend).coverage_backward
    run(slopes.contiguous(), points.contiguous(), polygons, masks, sigma, cull, corners)
    return _gathered(corners, points, polygons)


@_coverage_backward.register_fake
def _(
    slopes: Tensor,
    points: Tensor,
    polygons: Tensor,
    masks: Tensor,
    sigma: float,
    cull: bool,
    backend: str | None,
) -> Tensor:
    return torch.empty_like(points)


def _gathered(corners: Tensor, points: Tensor, polygons: Tensor) -> Tensor:
    """[P, 2]: each point's share, added in the order of the polygons."""
    # the fourth corner of a triangle is its third; rows of polygons that are not there hold 0
    index = polygons.clamp(min=0).flatten().long()  # torch adds by int32 14 times slower
    return torch.zeros_like(points).index_add_(0, index, corners.view(-1, 2))


def _setup_silhouettes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    points, polygons, _, _, _, ctx.sigma, ctx.backend = inputs
    ctx.save_for_backward(points, polygons, output)


def _pull_silhouettes(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
    points, polygons, clear = ctx.saved_tensors
    pulled = _silhouettes_backward(-slopes, clear, points, polygons, ctx.sigma, ctx.backend)
    return pulled, None, None, None, None, None, None


def _setup_coverage(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, polygons, masks, ctx.sigma, ctx.cull, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(points, polygons, masks)


def _pull_coverage(ctx: Any, slopes: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if slopes is None:
        return None, None, None, None, None, None
    points, polygons, masks = ctx.saved_tensors
    pulled = _coverage_backward(slopes, points, polygons, masks, ctx.sigma, ctx.cull, ctx.backend)
    return pulled, None, None, None, None, None


_silhouettes.register_autograd(_pull_silhouettes, setup_context=_setup_silhouettes)
_coverage.register_autograd(_pull_coverage, setup_context=_setup_coverage)


def _front(
    screen: Screen,
    vertices: Tensor,
    faces: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Faces, depths and weights as `Hits`."""
    shape = len(viewmats), *size
    winner = torch.empty(shape, dtype=torch.int32, device=vertices.device)
    depths, weights = vertices.new_empty(shape), vertices.new_empty(*shape, 3)
    run = dispatch.pick(OP, winner.device, backend)
    run.visible(screen.points.contiguous(), screen.depths.contiguous(), screen.polygons, winner)
    seen = vertices @ viewmats[:, :3, :3].mT + viewmats[:, None, :3, 3]
    inverse = torch.linalg.inv(intrinsics)
    run.weigh(winner, seen, faces.contiguous(), inverse.contiguous(), depths, weights)
    return winner, depths, weights
