"""Surfel rasterisation in readable torch: the definition of correct, on any device and float dtype.

Legend: N surfels, K spherical harmonics, P pixels of a chunk, M surfels that survive culling.
2D Gaussian splatting, Huang et al. 2024; constants are those of its code and of gsplat.

A surfel is a Gaussian of the plane point(u, v) = mean + s_u t_u u + s_v t_v v. With the screen's
origin moved to the projected mean and all divided by its z, the matrix M = K [s_u t_u | s_v t_v |
mean] has the rows (J_x, 0), (J_y, 0), (m, 1): J is the Jacobian of the projection along the scaled
tangents and m their slant in z, so the cancellation between pixel and mean is done once, exactly.
The paper's cross product of the two planes through a pixel at offset d then reads
u = (J_yv d_x - J_xv d_y) / D, v = (J_xu d_y - J_yu d_x) / D and depth = z det(J) / D, with
D = det(J) - d_x (m_u J_yv - m_v J_yu) - d_y (m_v J_xu - m_u J_xv).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gencompress_kernels.rasterize_splats.reference import (
    MAX_ALPHA,
    MAX_VARIANCE,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    NEAR,
    rotation_matrices,
    sh_colors,
)

LOW_PASS = 2.0  # of the squared pixel distance: a disc of standard deviation sqrt(1/2) px
MAX_SLANT = 1e12  # (s / z)^2; a surfel beyond is culled, its products would leave float32
FAR = 1e6  # the low-pass distance of a surfel that has no centre
MEDIAN = 0.5  # transmittance at which the median depth is taken
CHUNK_PAIRS = 1 << 21  # pixel-surfel pairs held at once


class Shot(NamedTuple):
    """What one camera sees: the inputs of every pass of every backend, checked and contiguous."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 2]
    opacities: Tensor  # [N]
    sh: Tensor  # [N, K, 3]
    viewmat: Tensor  # [4, 4]
    intrinsics: Tensor  # [3, 3]
    width: int
    height: int


class Pictures(NamedTuple):
    """What one camera gets; or the gradients that come into it."""

    colors: Tensor  # [H, W, 3] with the background
    alphas: Tensor  # [H, W]
    depths: Tensor  # [H, W]
    medians: Tensor  # [H, W]
    normals: Tensor  # [H, W, 3]
    distortions: Tensor  # [H, W]


class Gradients(NamedTuple):
    """What goes out of one shot to each input."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 2]
    opacities: Tensor  # [N]
    sh: Tensor  # [N, K, 3]
    viewmat: Tensor  # [4, 4]; 0 unless asked for
    probe: Tensor  # [N, 4] by a shift on the screen; sums of absolute pixel terms if asked for


class Drawn(NamedTuple):
    """One shot; and what the gradient needs of the way there, empty where nothing."""

    pictures: Pictures
    statistics: Tensor  # [N, 4], or [0, 4] if not asked for
    records: Tensor  # [N, 24] float32: one projected surfel each
    offsets: Tensor  # [tiles + 1] int64: tile t blends pairs[offsets[t]:offsets[t + 1]]
    pairs: Tensor  # [pairs] int32


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """One shot; keeps nothing, `backward` runs it again."""
    means, width, height = shot.means, shot.width, shot.height
    surfels = project(shot)
    index = surfels["index"]
    num = means.shape[0] if statistics else 0
    total, largest, count, first = (means.new_zeros(num) for _ in range(4))
    parts = []
    for pixels in pixel_chunks(shot, len(index)):
        strengths, depths = hits(surfels, pixels)
        weights, before, _ = blend(strengths)
        parts.append(pictures(surfels, background, strengths, depths))
        if statistics and len(index):
            total.index_add_(0, index, weights.sum(0))
            count.index_add_(0, index, (weights > 0).to(weights.dtype).sum(0))
            reached = torch.where(before > MIN_TRANSMITTANCE, strengths * before, 0)
            largest[index] = torch.maximum(largest[index], reached.amax(0))
            best, winner = weights.max(1)
            wins = torch.bincount(winner[best > 0], minlength=len(index))
            first.index_add_(0, index, wins.to(first.dtype))
    flat = (torch.cat(many) for many in zip(*parts, strict=True))
    return Drawn(
        Pictures(*(image.reshape(height, width, *image.shape[1:]) for image in flat)),
        torch.stack([total, largest, count, first], -1),
        means.new_empty(0, 24),
        torch.empty(0, dtype=torch.int64, device=means.device),
        torch.empty(0, dtype=torch.int32, device=means.device),
    )


def backward(
    shot: Shot,
    background: Tensor,
    drawn: Pictures,
    incoming: Pictures,
    saved: list[Tensor],
    absolute: bool,
    poses: bool,
) -> Gradients:
    """By torch's autograd through the same formulas; neither `drawn` nor `saved` is needed."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in shot[:6]]
        shot = shot._replace(**dict(zip(Shot._fields[:6], inputs, strict=True)))
        surfels = project(shot)
        points = surfels["points"]
        chunks = pixel_chunks(shot, len(points))
        sizes = [len(chunk) for chunk in chunks]
        flat = (slopes.flatten(0, 1).split(sizes) for slopes in incoming)
        total, spread = shot.means.sum() * 0, []
        for pixels, *slopes in zip(chunks, *flat, strict=True):
            here = surfels
            if absolute:  # a copy of the points a pixel, so that each keeps its own gradient
                spread.append(points.expand(len(pixels), -1, -1).clone())
                here = surfels | {"points": spread[-1]}
            images = pictures(here, background, *hits(here, pixels))
            total = total + sum((a * b).sum() for a, b in zip(images, slopes, strict=True))
        wanted = [*inputs, *(spread or [points])]
        outgoing = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    probe = shot.means.new_zeros(len(shot.means), 4)
    by_pixel = torch.cat(outgoing[6:]) if absolute else outgoing[6][None]
    probe[surfels["index"], :2] = by_pixel.sum(0)
    if absolute:
        probe[surfels["index"], 2:] = by_pixel.abs().sum(0)
    gradients = Gradients(*outgoing[:6], probe)
    return gradients if poses else gradients._replace(viewmat=torch.zeros_like(shot.viewmat))


def project(shot: Shot) -> dict[str, Tensor]:
    """Surfels in front of the camera, nearest first (equal depths: lower index first).

    Returns index [M]; points [M, 2], the projected means in px; jacobians [M, 2, 2] px, screen
    axis by tangent; slants [M, 2]; lows [M, 2] px, from the projected mean to the middle of the
    projected ellipse of one sigma, and has_low [M]; opacities, depths [M]; colors, normals [M, 3].
    """
    means, quats, scales, opacities, sh, viewmat, intrinsics, _, _ = shot
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    camera_points = means @ rotation.T + translation
    index = torch.nonzero(camera_points[:, 2] >= NEAR).squeeze(1)
    index = index[torch.argsort(camera_points[index, 2], stable=True)]
    camera_points = camera_points[index]
    z = camera_points[:, 2]
    slopes = camera_points[:, :2] / z[:, None]
    focal, middle = intrinsics.diagonal()[:2], intrinsics[:2, 2]

    axes = rotation @ rotation_matrices(quats[index])
    tangents = axes[:, :, :2] * scales[index, None, :] / z[:, None, None]
    slants = tangents[:, 2]
    jacobians = focal[:, None] * (tangents[:, :2] - slopes[:, :, None] * slants[:, None, :])
    size = slants.square().sum(-1)
    fits = (jacobians.square().sum(-1).amax(-1) <= MAX_VARIANCE) & (size <= MAX_SLANT)
    has_low = size < 1
    room = torch.where(has_low, 1 - size, 1)

    away = (axes[:, :, 2] * camera_points).sum(-1, keepdim=True) > 0
    directions = means[index] + rotation.T @ translation
    return {
        "index": index,
        "points": focal * slopes + middle,
        "jacobians": jacobians,
        "slants": slants,
        "lows": -(jacobians @ slants[:, :, None]).squeeze(-1) / room[:, None],
        "has_low": has_low,
        "opacities": torch.where(fits, opacities[index], 0),
        "depths": z,
        "colors": sh_colors(sh[index], torch.nn.functional.normalize(directions, dim=-1)),
        "normals": torch.where(away, -axes[:, :, 2], axes[:, :, 2]),
    }


def hits(surfels: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Alphas [P, M], 0 where a surfel does not touch a pixel centre [P, 2], and depths [P, M]."""
    points = surfels["points"]  # [M, 2], or [P, M, 2] to tell pixels apart
    dx, dy = (pixels[:, None, :] - points).unbind(-1)
    (xu, xv), (yu, yv) = (row.unbind(-1) for row in surfels["jacobians"].unbind(1))
    (mu, mv), z = surfels["slants"].unbind(-1), surfels["depths"]
    determinant = xu * yv - xv * yu
    below = determinant - dx * (mu * yv - mv * yu) - dy * (mv * xu - mu * xv)
    across, along = yv * dx - xv * dy, xu * dy - yu * dx
    lx, ly = (pixels[:, None, :] - points - surfels["lows"]).unbind(-1)
    low = torch.where(surfels["has_low"], LOW_PASS * (lx * lx + ly * ly), FAR)

    # the ray meets the plane in front of the camera, and nearer to the mean than the low-pass
    side = determinant.sign()
    meets = (side * below > 0) & (z * side * determinant >= NEAR * side * below)
    hit = meets & (across * across + along * along <= low * below * below)
    below = torch.where(hit, below, 1)
    squared = torch.where(hit, (across / below) ** 2 + (along / below) ** 2, low)
    depths = torch.where(hit, z * determinant / below, z)
    alphas = (surfels["opacities"] * torch.exp(-0.5 * squared)).clamp_max(MAX_ALPHA)
    return torch.where(alphas < MIN_ALPHA, 0, alphas), depths


def blend(alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Front-to-back compositing of alphas [P, M].

    Returns weights [P, M] = alpha * transmittance (0 where not blended), the transmittance before
    each surfel [P, M], and what is left behind all [P].
    """
    after = torch.cumprod(1 - alphas, 1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    alive = after > MIN_TRANSMITTANCE
    left = torch.where(alive, after, 1).amin(1) if after.shape[1] else after.new_ones(len(after))
    return torch.where(alive, alphas * before, 0), before, left


def pictures(
    surfels: dict[str, Tensor], background: Tensor, alphas: Tensor, depths: Tensor
) -> Pictures:
    """The pictures at P pixels from alphas and depths [P, M]."""
    weights, before, left = blend(alphas)
    shares = weights * depths
    crosses = (weights > 0) & (before > MEDIAN) & (before * (1 - alphas) <= MEDIAN)
    passed, reached = weights.cumsum(1) - weights, shares.cumsum(1) - shares
    return Pictures(
        weights @ surfels["colors"] + left[:, None] * background,
        1 - left,
        shares.sum(1),
        (crosses * depths).sum(1),
        weights @ surfels["normals"],
        2 * (shares * passed - weights * reached).sum(1),
    )


def pixel_chunks(shot: Shot, num: int) -> list[Tensor]:
    """Pixel centres, row by row, in pieces [P, 2] that keep P * num bounded."""
    device, dtype = shot.means.device, shot.means.dtype
    ys, xs = torch.meshgrid(
        torch.arange(shot.height, device=device),
        torch.arange(shot.width, device=device),
        indexing="ij",
    )
    centers = torch.stack([xs, ys], -1).reshape(-1, 2).to(dtype) + 0.5
    return list(centers.split(max(1, CHUNK_PAIRS // max(1, num))))
