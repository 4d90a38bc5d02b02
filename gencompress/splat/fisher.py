"""PUP-3DGS (Hanson et al. 2025): how firmly the pictures pin down where a splat is and how large.

A splat whose mean and scales the pictures hardly determine can be moved, and so taken away, without
anyone noticing. The measure is the determinant of its block of the Fisher matrix of all rendered
colours, in which every pixel and channel is one observation of the same variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from gencompress_kernels.rasterize_splats.reference import (
    BLUR,
    FRUSTUM_MARGIN,
    MIN_COMPENSATION,
    NEAR,
    rotation_matrices,
    sh_basis,
)
from gencompress_kernels.rasterize_splats.squares import screen_moments, splat_squared_gradients
from torch import Tensor

from gencompress.splat.cloud import SplatCloud, rows
from gencompress.splat.render import FLAT, activate, lens
from gencompress.views.camera import Camera

REDUCE = 4  # the paper's pictures are a quarter as wide and high
CHUNK = 1 << 13  # splats whose Jacobians are held at once
SINGULAR = 1e-6  # of a matrix with unit diagonal: what sums in float32 cannot tell from 0
SMALLEST = 1e-300  # diagonal entries below count as this


def pup(cloud: SplatCloud, cameras: Sequence[Camera], reduce: int = REDUCE) -> Tensor:
    """log |det F| of each splat's Fisher matrix in mean and log scale: float64 [N], finite.

    Only order and differences mean anything: the least of the splats that show is moved to 1, and
    a splat that no camera sees, whose determinant is 0, scores 0. Pictures are `reduce` times
    smaller each way. Memory: one view's sums (42 numbers a splat) and the matrices (36).
    """
    matrices = information(cloud, cameras, reduce)
    logs = log_determinants(matrices)
    shows = matrices.diagonal(dim1=1, dim2=2).amax(1) > 0
    lowest = logs[shows].min() if bool(shows.any()) else logs.new_zeros(())
    return torch.where(shows, logs - lowest + 1, 0)


def information(cloud: SplatCloud, cameras: Sequence[Camera], reduce: int = REDUCE) -> Tensor:
    """Fisher matrices [N, D, D] float64, symmetric: sum over views, pixels and channels of g g^T, g
    being the derivatives of the colour over black by mean x, y, z and the D - 3 log scales.

    D is 6, or 5 for 2DGS surfels. Order, culling and alphas held at 0.99 count as constant, colours
    are not clamped at 1. Raises ValueError if `reduce` is below 1.
    """
    if reduce < 1:
        raise ValueError(f"reduce = {reduce}: expected 1 or more")
    size = 3 + cloud.scales.shape[1]
    total = torch.zeros(len(cloud), size, size, dtype=torch.float64)
    for camera in (_smaller(camera, reduce) for camera in cameras):
        sums = splat_squared_gradients(
            **activate(cloud),
            **lens(cloud.means, camera),
            fisher=True,
            antialiased=cloud.antialiased,
        )[0]
        shown = (sums[:, -1] > 0).nonzero().squeeze(1)  # blended into a pixel
        for part in shown.split(CHUNK):
            slopes = screen_jacobian(rows(cloud, part), camera)
            moments = screen_moments(sums[part].double())
            found = slopes.transpose(1, 2) @ moments @ slopes
            total[part.cpu()] += 0.5 * (found + found.transpose(1, 2)).cpu()
    return total


def screen_jacobian(cloud: SplatCloud, camera: Camera) -> Tensor:
    """float64 [N, 9, D]: derivatives of centre x, y (px), conic a, b, c, effective opacity, red,
    green and blue by mean and log scales; 0 for a splat that is not in front of the camera."""
    depths = cloud.means.double() @ camera.world_to_camera[2, :3].to(cloud.means.device)
    front = depths + camera.world_to_camera[2, 3] >= NEAR
    seen = rows(cloud, front)
    view = lens(seen.means.double(), camera)
    world_to_camera, intrinsics = view["viewmats"][0], view["intrinsics"][0]
    size = torch.tensor([camera.width, camera.height]).to(intrinsics)
    result = cloud.means.new_zeros(len(cloud), 9, 3 + cloud.scales.shape[1], dtype=torch.float64)
    part = torch.zeros_like(result[front])
    centers, covariances, slopes = _projection(seen, world_to_camera, intrinsics, size)
    part[:, :2, :3] = centers
    part[:, 2:5], part[:, 5] = _shape(seen, covariances, slopes)
    if seen.sh.shape[1] > 1:
        part[:, 6:, :3] = _colors(seen, world_to_camera)
    result[front] = part
    return result


def _projection(
    cloud: SplatCloud, world_to_camera: Tensor, intrinsics: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """d centre / d mean [M, 2, 3]; covariances before the blur [M, 2, 2]; and their derivatives by
    mean and log scales [M, D, 2, 2]."""
    rotation = world_to_camera[:3, :3]
    points = cloud.means.double() @ rotation.T + world_to_camera[:3, 3]
    z, focal = points[:, 2], intrinsics.diagonal()[:2]
    low, high = -intrinsics[:2, 2] / focal, (size - intrinsics[:2, 2]) / focal
    margin = FRUSTUM_MARGIN * 0.5 * size / focal
    ratio = points[:, :2] / z[:, None]
    held = torch.minimum(torch.maximum(ratio, low - margin), high + margin)
    free = (held == ratio).double()

    scales = cloud.scales.double().exp()
    if scales.shape[1] == 2:
        scales = torch.cat([scales, FLAT * scales.amin(1, keepdim=True)], 1)
    half = rotation @ rotation_matrices(cloud.quats.double()) * scales[:, None, :]
    axes = _pinhole(held, z, focal) @ half
    # the thickness of a surfel follows its axes, but its square is 1e-12 of theirs
    in_plane = axes[:, :, : cloud.scales.shape[1]]
    by_scale = 2 * torch.einsum("mik,mjk->mkij", in_plane, in_plane)

    # how the Jacobian [2, 3] of the pinhole changes with the camera point x, y, z
    bend = points.new_zeros(len(points), 3, 2, 3)
    for axis in range(2):
        bend[:, axis, axis, 2] = -focal[axis] * free[:, axis] / z**2
        bend[:, 2, axis, axis] = -focal[axis] / z**2
        bend[:, 2, axis, 2] = focal[axis] * (held + free * ratio)[:, axis] / z**2
    by_point = (bend.flatten(1, 2) @ half @ axes.transpose(1, 2)).unflatten(1, (3, 2))
    by_mean = torch.einsum("mpij,pq->mqij", by_point + by_point.transpose(2, 3), rotation)
    slopes = torch.cat([by_mean, by_scale], 1)
    return _pinhole(ratio, z, focal) @ rotation, axes @ axes.transpose(1, 2), slopes


def _pinhole(ratio: Tensor, z: Tensor, focal: Tensor) -> Tensor:
    """[M, 2, 3]: derivatives of the pixel position by the camera point at x / z, y / z = ratio."""
    result = ratio.new_zeros(len(ratio), 2, 3)
    result[:, 0, 0], result[:, 1, 1] = focal[0] / z, focal[1] / z
    result[:, :, 2] = -focal * ratio / z[:, None]
    return result


def _shape(cloud: SplatCloud, covariances: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the conic [M, 3, D] and of the effective opacity [M, D], given those of the
    covariances before the blur."""
    conics = torch.linalg.inv(covariances + BLUR * torch.eye(2).to(covariances))
    turned = conics[:, None] @ slopes
    by_conic = -turned @ conics[:, None]
    by_conic = torch.stack([by_conic[..., 0, 0], by_conic[..., 0, 1], by_conic[..., 1, 1]], 1)
    if not cloud.antialiased:
        return by_conic, torch.zeros_like(by_conic[:, 0])
    # opacity is scaled by the root of this ratio of determinants
    ratio = torch.linalg.det(covariances) * torch.linalg.det(conics)
    root = ratio.clamp_min(MIN_COMPENSATION**2).sqrt()
    mirrored = covariances.flip(1, 2) * covariances.new_tensor([[1.0, -1.0], [-1.0, 1.0]])
    by_sharp = (mirrored[:, None] * slopes).sum((2, 3)) * torch.linalg.det(conics)[:, None]
    by_ratio = by_sharp - ratio[:, None] * (turned[..., 0, 0] + turned[..., 1, 1])
    free = (root > MIN_COMPENSATION).double() * cloud.opacities.double().sigmoid()
    return by_conic, (free / (2 * root))[:, None] * by_ratio


def _colors(cloud: SplatCloud, world_to_camera: Tensor) -> Tensor:
    """[M, 3, 3]: derivatives of red, green and blue by the mean, through the view direction."""
    position = -world_to_camera[:3, :3].T @ world_to_camera[:3, 3]
    offsets = cloud.means.double() - position
    lengths = offsets.norm(dim=1)[:, None, None]
    directions = (offsets / lengths[:, 0]).requires_grad_()
    sh = cloud.sh.double()
    with torch.enable_grad():
        basis = sh_basis(directions, cloud.degree)
    # the polynomials of one splat know no other, so one gradient of all of them serves every splat
    by_direction = torch.stack(
        [torch.autograd.grad(basis, directions, one, retain_graph=True)[0] for one in sh.unbind(2)],
        1,
    )
    colors = 0.5 + (basis.detach()[:, None, :] @ sh)[:, 0]
    along = directions.detach()[:, :, None]
    by_mean = (by_direction - by_direction @ along @ along.transpose(1, 2)) / lengths
    return by_mean * (colors > 0)[:, :, None]


def log_determinants(matrices: Tensor) -> Tensor:
    """[..., D, D] symmetric positive semidefinite -> [...] sum of logs of the singular values.

    Taken after scaling to a unit diagonal, which leaves the determinant as it is and makes the
    eigenvalues free of units: those below `SINGULAR` are rounding errors and count as `SINGULAR`.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1).clamp_min(SMALLEST)
    unit = diagonal.rsqrt()
    values = torch.linalg.eigvalsh(unit[..., :, None] * matrices * unit[..., None, :])
    return values.clamp_min(SINGULAR).log().sum(-1) + diagonal.log().sum(-1)


def _smaller(camera: Camera, reduce: int) -> Camera:
    """The same view on fewer pixels."""
    width, height = max(1, camera.width // reduce), max(1, camera.height // reduce)
    x, y = width / camera.width, height / camera.height
    return replace(
        camera, width=width, height=height,
        fx=camera.fx * x, cx=camera.cx * x, fy=camera.fy * y, cy=camera.cy * y,
    )  # fmt: skip
