"""The photos of a capture as rays: every pixel in memory, its ray made when it is asked for.

Photos stay as the lens saw them: where it distorts, the ray bends and nothing is resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gencompress.core.progress import Progress, quiet
from gencompress.views.camera import Camera, pixel_rays
from gencompress.views.photos import read_masked, require_photos, split_views


@dataclass(frozen=True, eq=False)
class Shots:
    """All pixels of N photos, and what makes rays of them.

    A pixel is named by its place in `pixels`: photo after photo, row after row. Cameras of one
    lens and size share a table, so a capture taken with one lens has one; where no lens distorts,
    there is none.
    """

    cameras: list[Camera]  # with their distortion
    pixels: Tensor  # [P, 4] uint8: straight RGBA, alpha 255 where a photo has none
    starts: Tensor  # [N + 1] int64: where each photo begins in `pixels`; the last is P
    has_alpha: bool  # of any photo, or a mask
    rotations: Tensor  # [N, 3, 3] float32, camera to world
    positions: Tensor  # [N, 3] float32, world
    lenses: Tensor  # [N, 4] float32: fx, fy, cx, cy
    widths: Tensor  # [N] int64
    plane: Tensor  # [Q, 2] float32: x/z and y/z of all pixels of each different lens, or Q = 0
    places: Tensor  # [N] int64: where the lens of each photo begins in `plane`


def load_shots(cameras: Sequence[Camera], progress: Progress = quiet) -> Shots:
    """The photos of cameras, their alpha times their masks; sizes and lenses may differ.

    Photos of more than 8 bits are rounded to 8. A missing photo, and a lens that cannot be
    inverted, show before any is read.

    Raises:
        FormatError: as `photos.load_photo`.
        ValueError: no cameras, or no direction leads to some pixel through the distortion.
    """
    if not cameras:
        raise ValueError("no cameras, expected one or more")
    require_photos(cameras)
    plane, places = _tables(cameras)
    sizes = [camera.width * camera.height for camera in cameras]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    pixels = torch.empty(int(starts[-1]), 4, dtype=torch.uint8)
    has_alpha = False
    for number, (camera, part) in enumerate(
        zip(cameras, pixels.split(sizes), strict=True), start=1
    ):
        progress(f"reading photos: {number} of {len(cameras)}")
        found = (read_masked(camera)[0] * 255).round().to(torch.uint8).flatten(0, 1)
        channels = found.shape[1]
        part[:, :channels] = found
        part[:, channels:] = 255
        has_alpha |= channels == 4
    return Shots(
        cameras=list(cameras),
        pixels=pixels,
        starts=starts,
        has_alpha=has_alpha,
        rotations=torch.stack([c.world_to_camera[:3, :3].T for c in cameras]).float(),
        positions=torch.stack([c.position for c in cameras]).float(),
        lenses=torch.tensor([[c.fx, c.fy, c.cx, c.cy] for c in cameras]),
        widths=torch.tensor([c.width for c in cameras]),
        plane=plane,
        places=places,
    )


def load_shots_split(
    path: str | Path, *, images: str | None = None, every: int = 8, progress: Progress = quiet
) -> tuple[Shots, Shots]:
    """(photos to fit, photos held out) of a capture, split as `loaders.load_split` does.

    Raises:
        FormatError: as `load_split` and `load_shots`, and for a capture of fewer than two views.
        FileNotFoundError: `path` does not exist.
        ValueError: as `load_shots`.
    """
    training, held_out = split_views(path, images=images, every=every)
    require_photos([*training, *held_out])
    return load_shots(training, progress), load_shots(held_out, progress)


def shot_rays(
    shots: Shots,
    index: Tensor,  # [R] int64, places in `shots.pixels`
) -> tuple[Tensor, Tensor, Tensor]:
    """Rays through the middles of pixels, and what was seen there.

    Returns:
        origins [R, 3] and unit directions [R, 3], float32, world, those of `camera.pixel_rays` to
        rounding; and straight RGBA [R, 4], float32 in [0, 1].
    """
    photo = torch.searchsorted(shots.starts, index, right=True) - 1
    place = index - shots.starts[photo]
    if len(shots.plane):
        seen = shots.plane[shots.places[photo] + place]
    else:
        widths, lenses = shots.widths[photo], shots.lenses[photo]
        row = torch.div(place, widths, rounding_mode="floor")
        pixel = torch.stack([place - row * widths, row], dim=1) + 0.5
        seen = (pixel - lenses[:, 2:]) / lenses[:, :2]
    right, down, forward = shots.rotations[photo].unbind(2)
    directions = seen[:, :1] * right + seen[:, 1:] * down + forward
    directions = directions / directions.norm(dim=1, keepdim=True)
    return shots.positions[photo], directions, shots.pixels[index].float() / 255


def over(rgba: Tensor, background: Sequence[float] | Tensor) -> Tensor:
    """[..., 3] colours of straight RGBA [..., 4] in [0, 1] over a background, [..., 3] or three
    numbers."""
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + torch.as_tensor(background, dtype=rgba.dtype) * (1 - alpha)


def picture(shots: Shots, number: int) -> Tensor:
    """One photo, uint8 [H, W, 4], straight RGBA as the lens saw it; a view of `shots.pixels`."""
    camera = shots.cameras[number]
    start = int(shots.starts[number])
    found = shots.pixels[start : start + camera.width * camera.height]
    return found.view(camera.height, camera.width, 4)


def _tables(cameras: Sequence[Camera]) -> tuple[Tensor, Tensor]:
    """`plane` and `places` of `Shots`."""
    places = torch.zeros(len(cameras), dtype=torch.int64)
    if not any(any(camera.distortion) for camera in cameras):
        return torch.empty(0, 2), places
    tables: list[Tensor] = []
    known: dict[tuple[Any, ...], int] = {}
    total = 0
    for number, c in enumerate(cameras):
        lens = (c.fx, c.fy, c.cx, c.cy, c.width, c.height, c.distortion)
        if lens not in known:
            known[lens] = total
            _, rays = pixel_rays(replace(c, world_to_camera=torch.eye(4, dtype=torch.float64)))
            tables.append((rays[..., :2] / rays[..., 2:]).float().flatten(0, 1))
            total += c.width * c.height
        places[number] = known[lens]
    return torch.cat(tables), places
