"""Pictures of a field, and what it holds at points; nothing here carries gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gencompress_kernels.composite import composite, transmittance
from gencompress_kernels.march_rays import march_rays
from torch import Tensor

from gencompress.nerf.field import Field, decode_color, decode_density, encode, harmonics
from gencompress.views.camera import Camera, pixel_rays

STOP = 1e-4  # transmittance below which a ray ends
CHUNK = 1 << 11  # samples decoded at once: larger buffers cost more to get than to fill
RAYS = 1 << 13  # marched at once
MOST = 1024  # samples of a ray


@dataclass(frozen=True)
class Rendered:
    """A picture."""

    colors: Tensor  # [H, W, 3] float32 in [0, 1], over the background
    alphas: Tensor  # [H, W]
    depths: Tensor  # [H, W] world units along the ray, mean over what is seen; 0 where nothing is


@torch.no_grad()
def render(field: Field, camera: Camera, background: Sequence[float] | None = None) -> Rendered:
    """What a camera sees, its lens distortion included; over the field's own background if None."""
    origins, directions = (rays.reshape(-1, 3).float() for rays in pixel_rays(camera))
    over = torch.tensor(field.background if background is None else background)
    parts = [
        render_rays(field, o, d)
        for o, d in zip(origins.split(RAYS), directions.split(RAYS), strict=True)
    ]
    colors, alphas, depths = (torch.cat(part) for part in zip(*parts, strict=True))
    size = (camera.height, camera.width)
    colors = (colors + (1 - alphas[:, None]) * over).clamp(0, 1)
    depths = depths / alphas.clamp(min=1e-6)
    return Rendered(colors.view(*size, 3), alphas.view(size), depths.view(size))


@torch.no_grad()
def render_rays(field: Field, origins: Tensor, directions: Tensor) -> tuple[Tensor, ...]:
    """Colours [R, 3] without background, opacities [R] and summed depths [R] of rays."""
    packed, points, distances, steps = march(field, origins, directions, None)
    density, outputs = _density(field, points)
    seen = transmittance(density, steps, packed) >= STOP
    packed = repacked(packed, seen)
    ray = torch.repeat_interleave(torch.arange(len(packed)), packed[:, 1])
    shapes, outputs = harmonics(directions), outputs[seen]
    colors = [
        decode_color(field, part, shapes[rays])
        for part, rays in zip(outputs.split(CHUNK), ray.split(CHUNK), strict=True)
    ]
    color = torch.cat(colors) if colors else outputs[:, :3]
    return composite(density[seen], color, steps[seen], packed, distances[seen], stop=STOP)[:3]


def march(
    field: Field, origins: Tensor, directions: Tensor, jitter: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`march_rays` through the field's space; samples in the middle of their steps if no jitter."""
    space = field.space
    if jitter is None:
        jitter = origins.new_full((len(origins),), 0.5)
    return march_rays(
        origins, directions, jitter, field.occupancy, space.box(origins), step=space.step,
        cone=space.cone, near=space.near, far=space.far, contracted=space.contracted, most=MOST,
    )  # fmt: skip


def repacked(packed: Tensor, keep: Tensor) -> Tensor:
    """Start and count of each ray [R, 2] once only the samples with `keep` (bool [M]) are left, for
    rays that lie one after the other."""
    below = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    start = below[packed[:, 0]]
    return torch.stack([start, below[packed.sum(1)] - start], dim=1)


@torch.no_grad()
def densities(field: Field, points: Tensor) -> Tensor:
    """[M] 1 / world unit, at points [M, 3] of the unit cube."""
    return _density(field, points)[0]


@torch.no_grad()
def colors_at(field: Field, points: Tensor, directions: Tensor) -> Tensor:
    """[M, 3] in (0, 1), at points of the unit cube seen along unit directions [M, 3]."""
    outputs = _density(field, points)[1]
    colors = [
        decode_color(field, part, harmonics(along))
        for part, along in zip(outputs.split(CHUNK), directions.split(CHUNK), strict=True)
    ]
    return torch.cat(colors) if colors else points


def density_of(field: Field, features: Tensor, norms: Tensor) -> Tensor:
    """[M] densities of features that `field.encode` gave."""
    return _decoded(field, features, norms)[0]


def _density(field: Field, points: Tensor) -> tuple[Tensor, Tensor]:
    return _decoded(field, *encode(field, points)[:2])


@torch.no_grad()
def _decoded(field: Field, features: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    density, outputs = norms.new_empty(len(norms)), norms.new_empty(len(norms), 16)
    for at in range(0, len(norms), CHUNK):
        here = slice(at, at + CHUNK)
        density[here], outputs[here] = decode_density(field, features[here], norms[here])
    return density, outputs


def psnr(error: float) -> float:
    """dB of a mean squared error."""
    return -10 * math.log10(max(error, 1e-12))
