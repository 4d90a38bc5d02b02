"""Splat rasterisation in readable torch: the definition of correct, on any device and float dtype.

Legend: N splats, K spherical harmonics, P pixels of a chunk, M splats that survive culling.
Constants are those of gsplat and of the original 3D Gaussian splatting code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEAR = 0.01  # splats closer than this, in world units along z, are culled
BLUR = 0.3  # px^2 added to the projected covariance: a pixel is not a point
FRUSTUM_MARGIN = 0.3  # of tan(half field of view): limit of x/z and y/z inside the Jacobian
MIN_DETERMINANT = 1e-10
MAX_VARIANCE = 1e18  # px^2; a wider splat is culled, its determinant would leave float32
MIN_COMPENSATION = 0.005  # of opacity, when antialiased
MIN_ALPHA = 1.0 / 255.0  # below, a splat does not touch the pixel
MAX_ALPHA = 0.99
MIN_TRANSMITTANCE = 1e-4  # the splat that would pass it is not blended, nor any behind it
CHUNK_PAIRS = 1 << 22  # pixel-splat pairs held at once


class Shot(NamedTuple):
    """What one camera sees: the inputs of every pass of every backend, checked and contiguous."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3]
    opacities: Tensor  # [N]
    sh: Tensor  # [N, K, 3]
    viewmat: Tensor  # [4, 4]
    intrinsics: Tensor  # [3, 3]
    width: int
    height: int
    antialiased: bool


class Incoming(NamedTuple):
    """A picture, and the gradients that come into it."""

    colors: Tensor  # [H, W, 3] with the background
    alphas: Tensor  # [H, W]
    depths: Tensor  # [H, W]
    for_colors: Tensor  # [H, W, 3]
    for_alphas: Tensor  # [H, W]
    for_depths: Tensor  # [H, W]
    background: Tensor  # [3]


class Gradients(NamedTuple):
    """What goes out of one picture to each input."""

    means: Tensor  # [N, 3]
    quats: Tensor  # [N, 4]
    scales: Tensor  # [N, 3]
    opacities: Tensor  # [N]
    sh: Tensor  # [N, K, 3]
    viewmat: Tensor  # [4, 4]; 0 unless asked for
    probe: Tensor  # [N, 4] by the projected centre x, y; sums of absolute pixel terms if asked for


class Drawn(NamedTuple):
    """One picture; and what the gradient needs of the way there, empty where nothing."""

    colors: Tensor  # [H, W, 3]
    alphas: Tensor  # [H, W]
    depths: Tensor  # [H, W]
    statistics: Tensor  # [N, 4], or [0, 4] if not asked for
    records: Tensor  # [N, 16] float32: one projected splat each
    offsets: Tensor  # [tiles + 1] int64: tile t blends pairs[offsets[t]:offsets[t + 1]]
    pairs: Tensor  # [pairs] int32


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """One picture; keeps nothing, `backward` runs it again."""
    means, width, height = shot.means, shot.width, shot.height
    splats = project(shot)
    num = means.shape[0] if statistics else 0
    total = means.new_zeros(num)
    largest = means.new_zeros(num)
    count = means.new_zeros(num)
    first = means.new_zeros(num)
    colors, alphas, depths = [], [], []
    for pixels in _pixel_chunks(width, height, splats["index"].shape[0], means):
        weights, strengths, left = blend_weights(splats, pixels)
        colors.append(weights @ splats["colors"] + left[:, None] * background)
        alphas.append(1 - left)
        depths.append(weights @ splats["depths"])
        if statistics and weights.shape[1]:
            index = splats["index"]
            total.index_add_(0, index, weights.sum(0))
            count.index_add_(0, index, (weights > 0).to(weights.dtype).sum(0))
            before = torch.cumprod(1 - strengths, 1) / (1 - strengths)
            reached = torch.where(before > MIN_TRANSMITTANCE, strengths * before, 0)
            largest[index] = torch.maximum(largest[index], reached.amax(0))
            best, winner = weights.max(1)
            hits = torch.bincount(winner[best > 0], minlength=weights.shape[1])
            first.index_add_(0, index, hits.to(first.dtype))
    return Drawn(
        torch.cat(colors).reshape(height, width, 3),
        torch.cat(alphas).reshape(height, width),
        torch.cat(depths).reshape(height, width),
        torch.stack([total, largest, count, first], -1),
        means.new_empty(0, 16),
        torch.empty(0, dtype=torch.int64, device=means.device),
        torch.empty(0, dtype=torch.int32, device=means.device),
    )


def backward(
    shot: Shot, incoming: Incoming, saved: list[Tensor], absolute: bool, poses: bool
) -> Gradients:
    """By torch's autograd through the same formulas; `saved` is not needed."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in shot[:6]]
        shot = shot._replace(**dict(zip(Shot._fields[:6], inputs, strict=True)))
        splats = project(shot)
        centers = splats["centers"]
        chunks = _pixel_chunks(shot.width, shot.height, len(centers), shot.means)
        sizes = [len(chunk) for chunk in chunks]
        for_colors, for_depths = incoming.for_colors.reshape(-1, 3), incoming.for_depths.flatten()
        for_left = for_colors @ incoming.background - incoming.for_alphas.flatten()
        total = shot.means.sum() * 0
        spread = []
        incomes = (part.split(sizes) for part in (for_colors, for_depths, for_left))
        for pixels, color, depth, left in zip(chunks, *incomes, strict=True):
            here = splats
            if absolute:  # a copy of the centres a pixel, so that each keeps its own gradient
                spread.append(centers.expand(len(pixels), -1, -1).clone())
                here = splats | {"centers": spread[-1]}
            weights, _, behind = blend_weights(here, pixels)
            total = total + (weights @ splats["colors"] * color).sum()
            total = total + (weights @ splats["depths"] * depth).sum() + (behind * left).sum()
        wanted = [*inputs, *(spread or [centers])]
        outgoing = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    probe = shot.means.new_zeros(len(shot.means), 4)
    by_pixel = torch.cat(outgoing[6:]) if absolute else outgoing[6][None]
    probe[splats["index"], :2] = by_pixel.sum(0)
    if absolute:
        probe[splats["index"], 2:] = by_pixel.abs().sum(0)
    gradients = Gradients(*outgoing[:6], probe)
    return gradients if poses else gradients._replace(viewmat=torch.zeros_like(shot.viewmat))


def removal_errors(shot: Shot) -> Tensor:
    """Returns [N]: see the public function for the derivation."""
    colors = shot.means.new_zeros(shot.height, shot.width, 3)
    return corrections(shot, colors, colors[..., 0])[:, 0]


def corrections(shot: Shot, colors: Tensor, alphas: Tensor) -> Tensor:
    """Returns [N, 6]: see the public function for the derivation."""
    means, width, height = shot.means, shot.width, shot.height
    splats = project(shot)
    sums = means.new_zeros(means.shape[0], 6)
    chunks = _pixel_chunks(width, height, splats["index"].shape[0], means)
    sizes = [len(chunk) for chunk in chunks]
    wanted = zip(colors.reshape(-1, 3).split(sizes), alphas.flatten().split(sizes), strict=True)
    for pixels, (color, alpha) in zip(chunks, wanted, strict=True):
        weights, strengths, left = blend_weights(splats, pixels)
        shares = weights[..., None] * splats["colors"]
        behind = shares.flip(1).cumsum(1).flip(1) - shares
        gain = (strengths / (1 - strengths))[..., None]
        touched = (weights > 0)[..., None]
        on_black = (gain * behind - shares) * touched
        on_white = on_black + gain * left[:, None, None] * touched
        miss_black = (color - shares.sum(1))[:, None, :]
        miss_white = miss_black + (1 - alpha - left)[:, None, None]
        mean_miss = 0.5 * (miss_black + miss_white)
        values = [
            0.5 * (on_black.square() + on_white.square()).sum(-1),
            0.5 * (on_black * miss_black + on_white * miss_white).sum(-1),
            weights,
            *(weights[..., None] * mean_miss).unbind(-1),
        ]
        sums.index_add_(0, splats["index"], torch.stack(values, -1).sum(0))
    return sums


def project(shot: Shot) -> dict[str, Tensor]:
    """Splats in front of the camera, nearest first (equal depths: lower index first).

    Returns index [M], centers [M, 2] px, conics [M, 3], opacities [M], depths [M], colors [M, 3].
    """
    means, quats, scales, opacities, sh, viewmat, intrinsics, width, height, antialiased = shot
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    camera_points = means @ rotation.T + translation
    index = torch.nonzero(camera_points[:, 2] >= NEAR).squeeze(1)
    index = index[torch.argsort(camera_points[index, 2], stable=True)]
    x, y, z = camera_points[index].unbind(-1)

    axes = rotation @ rotation_matrices(quats[index])
    half = axes * scales[index, None, :]
    covariance = half @ half.transpose(1, 2)

    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    tx = z * (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = z * (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [
            torch.stack([fx / z, zero, -fx * tx / z**2], -1),
            torch.stack([zero, fy / z, -fy * ty / z**2], -1),
        ],
        -2,
    )
    flat = jacobian @ covariance @ jacobian.transpose(1, 2)
    sxx, sxy, syy = flat[:, 0, 0], flat[:, 0, 1], flat[:, 1, 1]
    fits = torch.maximum(sxx, syy) <= MAX_VARIANCE
    sharp = sxx * syy - sxy * sxy
    sxx, syy = sxx + BLUR, syy + BLUR
    determinant = (sxx * syy - sxy * sxy).clamp_min(MIN_DETERMINANT)
    opacity = opacities[index]
    if antialiased:
        opacity = opacity * (sharp / determinant).clamp_min(MIN_COMPENSATION**2).sqrt()

    conics = torch.stack([syy, -sxy, sxx], -1) / determinant[:, None]
    position = -rotation.T @ translation
    directions = torch.nn.functional.normalize(means[index] - position, dim=-1)
    return {
        "index": index,
        "centers": torch.stack([fx * x / z + cx, fy * y / z + cy], -1),
        "conics": torch.where(fits[:, None], conics, 0),
        "opacities": torch.where(fits, opacity, 0),
        "depths": z,
        "colors": sh_colors(sh[index], directions),
    }


def blend_weights(splats: dict[str, Tensor], pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Front-to-back compositing at pixel centres [P, 2].

    Returns weights [P, M] = alpha * transmittance (0 where not blended), alphas [P, M], and the
    transmittance left behind all splats [P].
    """
    offset = splats["centers"] - pixels[:, None, :]  # centres [M, 2], or [P, M, 2] to tell apart
    dx, dy = offset.unbind(-1)
    a, b, c = splats["conics"].unbind(-1)
    q = (0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy).clamp_min(0)
    alphas = (splats["opacities"] * torch.exp(-q)).clamp_max(MAX_ALPHA)
    alphas = torch.where(alphas < MIN_ALPHA, 0, alphas)
    after = torch.cumprod(1 - alphas, 1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    alive = after > MIN_TRANSMITTANCE
    left = torch.where(alive, after, 1).amin(1) if after.shape[1] else after.new_ones(len(after))
    return torch.where(alive, alphas * before, 0), alphas, left


def rotation_matrices(quats: Tensor) -> Tensor:
    """[..., 4] w, x, y, z (any length) -> [..., 3, 3]."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    return torch.stack(
        [
            torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], -1),
            torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], -1),
            torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1),
        ],
        -2,
    )


def sh_basis(directions: Tensor, degree: int) -> Tensor:
    """Real spherical harmonics at unit directions [M, 3] -> [M, (degree + 1)^2].

    Order and signs of the 3DGS file format: (y, z, x) in the first band, Condon-Shortley phase.
    """
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, 0.28209479177387814)]
    if degree > 0:
        basis += [-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x]
    if degree > 1:
        basis += [
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.31539156525252005 * (2 * z * z - x * x - y * y),
            -1.0925484305920792 * x * z,
            0.5462742152960396 * (x * x - y * y),
        ]
    if degree > 2:
        basis += [
            -0.5900435899266435 * y * (3 * x * x - y * y),
            2.890611442640554 * x * y * z,
            -0.4570457994644658 * y * (4 * z * z - x * x - y * y),
            0.3731763325901154 * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -0.4570457994644658 * x * (4 * z * z - x * x - y * y),
            1.445305721320277 * z * (x * x - y * y),
            -0.5900435899266435 * x * (x * x - 3 * y * y),
        ]
    return torch.stack(basis, -1)


def sh_colors(sh: Tensor, directions: Tensor) -> Tensor:
    """Colours [M, 3] of coefficients [M, K, 3] seen along unit directions [M, 3]."""
    degree = {1: 0, 4: 1, 9: 2, 16: 3}[sh.shape[1]]
    basis = sh_basis(directions, degree)
    return (0.5 + (basis[:, :, None] * sh).sum(1)).clamp_min(0)


def _pixel_chunks(width: int, height: int, num: int, like: Tensor) -> list[Tensor]:
    ys, xs = torch.meshgrid(
        torch.arange(height, device=like.device),
        torch.arange(width, device=like.device),
        indexing="ij",
    )
    centers = torch.stack([xs, ys], -1).reshape(-1, 2).to(like.dtype) + 0.5
    return list(centers.split(max(1, CHUNK_PAIRS // max(1, num))))
