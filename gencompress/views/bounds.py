"""Where the scene of a capture is: the box that a model of it needs to fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gencompress.files import FormatError
from gencompress.views.camera import Camera, pixel_rays, project
from gencompress.views.rig import scene_sphere

GRID = 48  # cells along each axis of the cube that masks carve
ROUNDS = 5  # of carving, each in the box of what the last one left
SHRUNK = 0.7  # of the side; a round that leaves more has found the box, for the cells are as fine
TOLERATED = 20  # one mask in so many may be wrong about a place; taste, half of what meshes allow
SEEN = 0.5  # of the views of the best seen place left: before or behind the object there are fewer
LEAST = 0.1  # of all masks: fewer that agree on a place have met by chance
SHORT = 1.0  # px that a mask may end before the object; half of one is lost where it is cut at 0.5
OUTLINE = 0.5  # white share of the frame up to which a mask shows an object, not what to leave out


class Mask(NamedTuple):
    """What a camera saw of an object."""

    camera: Camera
    axis: Tensor  # [3] float64, world: unit, to the middle of what is white
    sums: Tensor  # [H + 1, W + 1] int32: white pixels above and left of a corner


def scene_box(
    cameras: Sequence[Camera],
    points: Tensor | None = None,  # [N, 3], world
    alphas: Sequence[Tensor | None] | None = None,  # one [H, W] uint8 a camera, 0 = outside
) -> tuple[Tensor, Tensor, str]:
    """A cube around the scene, by the best that is known of it.

    Masks that outline an object carve: the cube holds what they leave of the space between the
    cameras, and one cell around it. Else it is the cube about `scene_sphere` of the points; without
    points, the one about the place that cameras look at, half as wide each way as the nearest of
    them is far, so its corners lie before that camera too. Masks that are white along the frame
    (say, those that leave out the sky, or inverted ones) and a single one bound nothing, and `how`
    says so.

    Returns:
        low [3] and high [3], float64, world, and in words how it was found.

    Raises:
        FormatError: the masks agree on no place.
        ValueError: no cameras, no finite point, or alphas of other shapes than the cameras.
    """
    masks = _masks(cameras, alphas)
    unused = not masks and any(a is not None and bool((a == 0).any()) for a in alphas or ())
    start = "the masks do not bound it; " if unused else ""
    if masks:
        centre, half = _carved(masks)
        how = f"what the masks of {len(masks)} photos leave"
    elif points is not None and len(points):
        centre, half = scene_sphere(points)
        how = f"{start}around the bulk of {len(points)} points"
    else:
        centre, half = focus(cameras)
        how = f"{start}around the place that the cameras look at, half as far as the nearest is"
    return centre - half, centre + half, how


def inside(cameras: Sequence[Camera], low: Tensor, high: Tensor) -> list[str]:
    """The names of the cameras that stand in a box, its faces included."""
    return [c.name for c in cameras if bool(((c.position >= low) & (c.position <= high)).all())]


def focus(cameras: Sequence[Camera]) -> tuple[Tensor, float]:
    """Where cameras look: the point [3] nearest to all their axes (least squares, float64), and
    half the distance to the nearest camera as the radius of what may be there."""
    if not cameras:
        raise ValueError("no cameras: the place that they look at is unknown")
    places = torch.stack([camera.position for camera in cameras])
    centre = _meeting(places, torch.stack([c.world_to_camera[2, :3] for c in cameras]))
    nearest = float((places - centre).norm(dim=1).min())
    return centre, max(0.5 * nearest, 1e-3 * (1.0 + float(centre.norm())))


def _meeting(places: Tensor, axes: Tensor) -> Tensor:
    """The point [3] nearest to lines through places [N, 3] along unit axes [N, 3]."""
    eye = torch.eye(3, dtype=torch.float64)
    across = eye - axes[:, :, None] * axes[:, None, :]
    # parallel axes meet nowhere: a faint pull to the mean place decides
    pull = 1e-6 * len(places) * eye
    side = (across @ places[:, :, None]).sum(0)[:, 0] + pull @ places.mean(0)
    return torch.linalg.solve(across.sum(0) + pull, side)


def _masks(cameras: Sequence[Camera], alphas: Sequence[Tensor | None] | None) -> list[Mask]:
    """The masks that are not empty; none where they do not outline an object."""
    found, frames = [], []
    for camera, alpha in zip(cameras, alphas or [None] * len(cameras), strict=True):
        if alpha is None:
            continue
        if tuple(alpha.shape) != (camera.height, camera.width):
            raise ValueError(
                f"camera {camera.name!r}: alpha is {tuple(alpha.shape)}, "
                f"expected {(camera.height, camera.width)}"
            )
        white = alpha > 0
        frame = torch.cat([white[0], white[-1], white[:, 0], white[:, -1]])
        frames.append(float(frame.float().mean()))
        if bool(white.any()):
            sums = white.cumsum(0, dtype=torch.int32).cumsum(1, dtype=torch.int32)
            sums = functional.pad(sums, (1, 0, 1, 0))
            sides = [edge.diff().double() for edge in (sums[-1], sums[:, -1])]  # along x and y
            middle = torch.stack([_mean_place(side) for side in sides])
            found.append(Mask(camera, pixel_rays(camera, middle)[1], sums))
    if frames and not found:
        raise FormatError("masks", "all are empty, so there is nothing to fit")
    return found if len(found) > 1 and median(frames) <= OUTLINE else []


def _mean_place(weights: Tensor) -> Tensor:
    """Where the weights [L] of pixels balance, in px."""
    return weights @ (torch.arange(len(weights), dtype=torch.float64) + 0.5) / weights.sum()


def _carved(masks: list[Mask]) -> tuple[Tensor, float]:
    """Middle [3] and half the side of the cube about what masks leave of space, and one cell."""
    places = torch.stack([mask.camera.position for mask in masks])
    centre = _meeting(places, torch.stack([mask.axis for mask in masks]))
    half = float((places - centre).norm(dim=1).median())
    for _ in range(ROUNDS):
        cell = 2 * half / GRID
        steps = (torch.arange(GRID, dtype=torch.float64) + 0.5) * cell - half
        grid = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), -1)
        left = _left(centre + grid.reshape(-1, 3), math.sqrt(0.75) * cell, masks)
        if not len(left):
            raise FormatError(
                "masks",
                f"those of {len(masks)} photos agree on no place, so check that they are white "
                "inside and that the cameras have the axes which the file declares",
            )
        low, high = left.amin(0) - 1.5 * cell, left.amax(0) + 1.5 * cell
        before, centre, half = half, (low + high) / 2, float((high - low).max()) / 2
        if half > SHRUNK * before:
            break
    return centre, half


def _left(places: Tensor, radius: float, masks: list[Mask]) -> Tensor:
    """Those of places [N, 3] about which a ball may hold some of the object."""
    views = torch.zeros(len(places), dtype=torch.int32)
    against = torch.zeros_like(views)
    for mask in masks:
        seen, empty = _look(places, radius, mask)
        views += seen
        against += empty
        may = against <= len(masks) // TOLERATED
        places, views, against = places[may], views[may], against[may]
    may = against * TOLERATED <= views
    places, views = places[may], views[may]
    best = int(views.max()) if len(views) else 0
    return places[views >= max(1.0, SEEN * best, LEAST * len(masks))]


def _look(places: Tensor, radius: float, mask: Mask) -> tuple[Tensor, Tensor]:
    """Whether a camera sees the whole ball about each place, and if so, nothing in it: bool [N]."""
    camera, sums = mask.camera, mask.sums
    pixels, depth = project(camera, places)
    slant = ((places - camera.position).norm(dim=1) / depth).square()  # 1 + r^2 on the image plane
    k1, k2 = (*camera.distortion, 0.0, 0.0)[:2]
    stretch = (1 + (slant - 1) * (3 * k1 + 5 * k2 * (slant - 1))).clamp(min=1)
    # a bound on how far a ball shows from its middle: along the slant, at its nearest depth
    reach = max(camera.fx, camera.fy) * stretch * radius * slant / (depth - radius)
    reach = reach[:, None] + SHORT
    low, high = pixels - reach, pixels + reach
    size = pixels.new_tensor([camera.width, camera.height])
    seen = (depth > radius) & ((low >= 0) & (high <= size)).all(1)
    left, top = low[seen].long().unbind(1)
    right, bottom = high[seen].ceil().long().unbind(1)
    shown = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return seen, seen.masked_scatter(seen, shown == 0)
