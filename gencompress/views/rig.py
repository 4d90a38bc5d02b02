"""Cameras made from the scene itself, for files that come without any."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gencompress.views.camera import Camera, look_at

UP = (0.0, -1.0, 0.0)  # trained splats keep COLMAP's axes: y points down
GOLDEN = (3.0 - math.sqrt(5.0)) / 2.0  # turns between neighbours on a Fibonacci spiral
INLIER_RADII = 5.0  # a uniform ball ends at 1.26 median radii, a long thin object near 4
EDGE_SHARE = 0.01  # weight ignored at each end of an axis when the box is centred
CONTAINED_SHARE = 0.98  # weight of the inliers the sphere holds
MARGIN = 1.05  # free border around the sphere in the image, as a factor on the distance


def scene_sphere(points: Tensor, weights: Tensor | None = None) -> tuple[Tensor, float]:
    """Where the bulk of a scene is: the ball to look at, blind to haze and far floaters.

    The weighted median and the median distance from it mark the bulk; points beyond
    `INLIER_RADII` median distances are dropped, twice. The centre is the middle of the box that
    holds the rest (a median would sink into a densely sampled floor), the radius holds
    `CONTAINED_SHARE` of their weight.

    Args:
        points: [N, 3], any float dtype; rows with NaN or infinity are ignored.
        weights: [N] not negative, say opacity times area; None counts every point once.

    Returns:
        centre [3] float64 on the CPU, and the radius, never zero.

    Raises:
        ValueError: wrong shapes, or no finite point with positive weight.
    """
    points, weights = _usable(points, weights)
    for _ in range(2):
        middle = torch.stack([_quantile(points[:, axis], weights, 0.5) for axis in range(3)])
        distance = (points - middle).norm(dim=1)
        inside = distance <= INLIER_RADII * _quantile(distance, weights, 0.5)
        # More than half of the weight on one spot: the spot is the median, keep what surrounds it.
        if weights[inside].sum() < 0.5 * weights.sum() or not (distance[inside] > 0).any():
            break
        points, weights = points[inside], weights[inside]
    low, high = (
        torch.stack([_quantile(points[:, axis], weights, share) for axis in range(3)])
        for share in (EDGE_SHARE, 1.0 - EDGE_SHARE)
    )
    centre = (low + high) / 2
    radius = float(_quantile((points - centre).norm(dim=1), weights, CONTAINED_SHARE))
    smallest = 1e-6 * max(1.0, float(centre.abs().max()))  # one point is a scene too
    return centre, max(radius, smallest)


def fibonacci_rig(
    centre: Tensor | Sequence[float],
    radius: float,
    num: int,
    *,
    width: int = 512,
    height: int = 512,
    fov_deg: float = 45.0,
    up: Sequence[float] = UP,
    min_elevation: float = -30.0,
    max_elevation: float = 80.0,
    turn: float = 0.0,
    name: str = "rig",
) -> list[Camera]:
    """Cameras spread evenly (by area) over a band of the sphere of viewing directions.

    All look at the centre from where the ball of `radius` just fits the shorter image side.

    Args:
        centre: [3], world units.
        fov_deg: full angle across the shorter image side, degrees.
        up: world direction that shall point up in the images.
        min_elevation, max_elevation: degrees above the plane orthogonal to `up`, -90 to 90.
        turn: turns (1 is a full circle) the whole rig is rotated about `up`.
        name: cameras are called `name-000`, `name-001`, ...
    """
    low, high = _sine_band(min_elevation, max_elevation)
    order = torch.arange(num, dtype=torch.float64)
    sines = high - (order + 0.5) / max(num, 1) * (high - low)
    directions = _directions(sines, order * GOLDEN + turn, up)
    return _looking_in(centre, radius, directions, width, height, fov_deg, up, name)


def orbit_rig(
    centre: Tensor | Sequence[float],
    radius: float,
    num: int,
    *,
    width: int = 512,
    height: int = 512,
    fov_deg: float = 45.0,
    up: Sequence[float] = UP,
    elevation: float = 20.0,
    turn: float = 0.0,
    name: str = "orbit",
) -> list[Camera]:
    """Cameras on one circle at `elevation` degrees, one equal step apart; else `fibonacci_rig`."""
    low, _ = _sine_band(elevation, elevation)
    azimuths = torch.arange(num, dtype=torch.float64) / max(num, 1) + turn
    directions = _directions(torch.full_like(azimuths, low), azimuths, up)
    return _looking_in(centre, radius, directions, width, height, fov_deg, up, name)


def scene_rig(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    num_score: int = 24,
    num_test: int = 24,
    width: int = 512,
    height: int = 512,
    fov_deg: float = 45.0,
    up: Sequence[float] = UP,
    min_elevation: float = -30.0,
    max_elevation: float = 80.0,
) -> tuple[list[Camera], list[Camera]]:
    """Two Fibonacci rigs around `scene_sphere`: one to score with, one to measure with.

    The second is turned about `up` to where its nearest scoring view is farthest away, so what is
    measured was never scored. Same input, same cameras.
    """
    centre, radius = scene_sphere(points, weights)
    band = {"up": up, "min_elevation": min_elevation, "max_elevation": max_elevation}
    lens = {"width": width, "height": height, "fov_deg": fov_deg}
    score = fibonacci_rig(centre, radius, num_score, **band, **lens, name="score")
    turns = [(step + 0.5) / 64 for step in range(64)]
    tests = [
        fibonacci_rig(centre, radius, num_test, **band, **lens, turn=turn, name="test")
        for turn in turns
    ]
    return score, max(tests, key=lambda test: nearest_angle(score, test))


def rig_apart(
    points: Tensor,
    weights: Tensor | None = None,
    *,
    num: int,
    apart: Sequence[Camera],
    width: int = 512,
    height: int = 512,
    fov_deg: float = 45.0,
    up: Sequence[float] = UP,
    min_elevation: float = -30.0,
    max_elevation: float = 80.0,
) -> list[Camera]:
    """A Fibonacci rig of `num` as in `scene_rig`, turned about `up` to where its nearest view is
    farthest from those of `apart`: more views to learn from, none of them among the others."""
    centre, radius = scene_sphere(points, weights)
    tries = [
        fibonacci_rig(
            centre, radius, num, up=up, min_elevation=min_elevation, max_elevation=max_elevation,
            width=width, height=height, fov_deg=fov_deg, turn=(step + 0.5) / 64, name="tune",
        )
        for step in range(64)
    ]  # fmt: skip
    return max(tries, key=lambda rig: nearest_angle(rig, apart))


def split_rig(cameras: Sequence[Camera], every: int = 8) -> tuple[list[Camera], list[Camera]]:
    """Every `every`-th camera, the first included, is held out: (others, held out)."""
    if every < 2:
        raise ValueError(f"every is {every}, expected 2 or more (1 would hold out every view)")
    others = [camera for i, camera in enumerate(cameras) if i % every]
    return others, list(cameras[::every])


def nearest_angle(first: Sequence[Camera], second: Sequence[Camera]) -> float:
    """The smallest angle in degrees between a viewing direction of one rig and one of the other."""
    if not first or not second:
        return 180.0
    a, b = (torch.stack([c.world_to_camera[2, :3] for c in rig]) for rig in (first, second))
    return float(torch.rad2deg(2 * torch.asin((torch.cdist(a, b).min() / 2).clamp(max=1.0))))


def _usable(points: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Finite points of positive weight, float64 on the CPU."""
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points has shape {tuple(points.shape)}, expected [N, 3]")
    points = points.detach().to("cpu", torch.float64)
    if weights is None:
        weights = torch.ones(len(points), dtype=torch.float64)
    if tuple(weights.shape) != (len(points),):
        raise ValueError(f"weights has shape {tuple(weights.shape)}, expected ({len(points)},)")
    weights = weights.detach().to("cpu", torch.float64)
    usable = points.isfinite().all(dim=1) & weights.isfinite() & (weights > 0)
    if not usable.any():
        raise ValueError(f"none of {len(points)} points is finite and of positive weight")
    return points[usable], weights[usable]


def _quantile(values: Tensor, weights: Tensor, share: float) -> Tensor:
    """The smallest value with at least `share` of the weight at or below it."""
    order = values.argsort(stable=True)
    below = weights[order].cumsum(0)
    place = torch.searchsorted(below, share * below[-1])
    return values[order[place.clamp(max=len(values) - 1)]]


def _sine_band(low: float, high: float) -> tuple[float, float]:
    if not -90.0 <= low <= high <= 90.0:
        raise ValueError(f"elevations {low} to {high}, expected -90 <= min <= max <= 90 degrees")
    return math.sin(math.radians(low)), math.sin(math.radians(high))


def _directions(sines: Tensor, turns: Tensor, up: Sequence[float]) -> Tensor:
    """[num, 3] unit vectors at these sines of elevation above, and turns about, `up`."""
    axis = torch.as_tensor(up, dtype=torch.float64)
    if axis.shape != (3,) or not axis.isfinite().all() or axis.norm() == 0:
        raise ValueError(f"up is {up}, expected three numbers that are not all zero")
    axis = axis / axis.norm()
    # Azimuth zero: the world axis least aligned with up, the later one in a tie (z for y).
    start = torch.eye(3, dtype=torch.float64)[2 - int(axis.flip(0).abs().argmin())]
    start = start - (start @ axis) * axis
    start = start / start.norm()
    side = torch.linalg.cross(axis, start)
    angle = turns * (2 * math.pi)
    cosines = (1 - sines**2).clamp(min=0.0).sqrt()
    around = torch.outer(angle.cos(), start) + torch.outer(angle.sin(), side)
    return torch.outer(sines, axis) + cosines[:, None] * around


def _looking_in(
    centre: Tensor | Sequence[float],
    radius: float,
    directions: Tensor,
    width: int,
    height: int,
    fov_deg: float,
    up: Sequence[float],
    name: str,
) -> list[Camera]:
    """One camera per direction, as far out as the ball of `radius` needs."""
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius is {radius}, expected a positive number")
    if not 0.0 < fov_deg < 180.0:
        raise ValueError(f"fov_deg is {fov_deg}, expected more than 0 and less than 180")
    if width < 1 or height < 1:
        raise ValueError(f"images of {width} x {height} pixels, expected at least 1 x 1")
    centre = torch.as_tensor(centre, dtype=torch.float64).cpu()
    half = math.radians(fov_deg) / 2
    focal = min(width, height) / (2 * math.tan(half))
    distance = MARGIN * radius / math.sin(half)
    return [
        Camera(
            world_to_camera=look_at(centre + distance * direction, centre, up),
            fx=focal,
            fy=focal,
            cx=width / 2,
            cy=height / 2,
            width=width,
            height=height,
            name=f"{name}-{index:03d}",
        )
        for index, direction in enumerate(directions)
    ]
