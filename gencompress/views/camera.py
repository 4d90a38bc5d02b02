"""Cameras, and the conventions of every 3D room in one place.

- Camera axes: x right, y down, z forward (OpenCV, COLMAP). Files with OpenGL axes (x right, y up,
  looking along -z) are converted by their loader: camera-to-world times diag(1, -1, -1, 1).
- `world_to_camera` maps homogeneous world points to camera points.
- Pixel centres lie at +0.5: the top-left pixel covers [0, 1] x [0, 1], the middle of the image is
  (W/2, H/2).
- Quaternions are w, x, y, z. Colours are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gencompress.views.lens import distort, fold, undistort


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, with OpenCV lens distortion where the capture has it."""

    world_to_camera: Tensor  # [4, 4] float64
    fx: float  # pixels
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    distortion: tuple[float, ...] = ()  # (k1, k2, p1, p2); empty: none
    name: str = ""
    image: Path | None = None
    mask: Path | None = None

    @property
    def position(self) -> Tensor:
        """[3] float64, the camera centre in world coordinates."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]

    @property
    def intrinsics(self) -> Tensor:
        """[3, 3] float64."""
        return torch.tensor(
            [[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]],
            dtype=torch.float64,
        )


def look_at(
    eye: Tensor,  # [3] camera centre, world units
    target: Tensor,  # [3] the point at the image centre, not the eye
    up: Sequence[float] | Tensor,  # [3] the world direction that shall point up in the image
) -> Tensor:
    """world_to_camera [4, 4] float64. Where `up` lies along the view, another axis stands in."""
    eye = torch.as_tensor(eye, dtype=torch.float64)
    forward = torch.as_tensor(target, dtype=torch.float64) - eye
    if not forward.norm() > 0:
        raise ValueError(f"the camera at {eye.tolist()} cannot look at its own centre")
    forward = forward / forward.norm()
    up = torch.as_tensor(up, dtype=torch.float64)
    right = torch.linalg.cross(forward, up / up.norm().clamp(min=1e-300))
    if right.norm() < 1e-6:
        axis = torch.eye(3, dtype=torch.float64)[forward.abs().argmin()]
        right = torch.linalg.cross(forward, axis)
    right = right / right.norm()
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    world_to_camera = torch.eye(4, dtype=torch.float64)
    world_to_camera[:3, :3] = rotation
    world_to_camera[:3, 3] = -rotation @ eye
    return world_to_camera


def project(camera: Camera, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where world points appear in the image, lens distortion included.

    Args:
        points: [..., 3] world units.

    Returns:
        pixels [..., 2] float64, x then y, NaN for points that have none: at or behind the camera
        plane, or so far aside that the lens model would fold them back into the image. And the
        depth [...] along the camera's z axis, float64.
    """
    seen = points.to(torch.float64) @ camera.world_to_camera[:3, :3].T
    seen = seen + camera.world_to_camera[:3, 3]
    depth = seen[..., 2]
    plane = seen[..., :2] / depth[..., None]
    visible = (depth > 0) & (plane.norm(dim=-1) < fold(camera.distortion))
    lens = plane.new_tensor([[camera.fx, camera.fy], [camera.cx, camera.cy]])
    pixels = distort(plane, camera.distortion) * lens[0] + lens[1]
    return torch.where(visible[..., None], pixels, torch.nan), depth


def pixel_rays(camera: Camera, pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rays that end in pixels: the inverse of `project`.

    Args:
        pixels: [..., 2] x and y; None takes the centre of every pixel, [height, width, 2].

    Returns:
        origins [..., 3] (one camera centre, expanded) and unit directions [..., 3] in the world,
        both float64.

    Raises:
        ValueError: a pixel lies beyond the fold of the lens model, so no direction leads there.
    """
    if pixels is None:
        y, x = torch.meshgrid(
            torch.arange(camera.height, dtype=torch.float64) + 0.5,
            torch.arange(camera.width, dtype=torch.float64) + 0.5,
            indexing="ij",
        )
        pixels = torch.stack([x, y], dim=-1)
    pixels = pixels.to(torch.float64)
    lens = pixels.new_tensor([[camera.fx, camera.fy], [camera.cx, camera.cy]])
    plane = undistort((pixels - lens[1]) / lens[0], camera.distortion)
    lost = int(plane.isnan().any(-1).sum())
    if lost:
        raise ValueError(
            f"camera {camera.name!r}: its distortion {camera.distortion} cannot be inverted at "
            f"{lost} of {plane[..., 0].numel()} pixels"
        )
    directions = torch.cat([plane, torch.ones_like(plane[..., :1])], dim=-1)
    directions = directions @ camera.world_to_camera[:3, :3]
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return camera.position.expand_as(directions), directions


def twisted(viewmats: Tensor, twist: Tensor) -> Tensor:
    """World-to-camera matrices moved by small rigid motions of camera space: exp(twist) @ viewmats.

    For optimising poses: differentiable in both, as often as wanted, with the exact gradient at
    twist = 0 too, where the result is `viewmats`.

    Args:
        viewmats: [..., 4, 4] float32 or float64.
        twist: [..., 6] = (rho, phi) of se(3), translation before rotation: phi is axis times angle
            in radians, rho the velocity, in world units, that the motion starts with. Leading
            axes broadcast.

    Returns:
        [..., 4, 4] of the dtype of `viewmats`: [[R, V rho], [0, 1]] @ viewmats with
        R = I + a K + b K^2, V = I + b K + c K^2, K the cross product with phi and
        a = sin t / t, b = (1 - cos t) / t^2, c = (t - sin t) / t^3 of the angle t = |phi|
        (Rodrigues' formula; Murray, Li and Sastry, "A Mathematical Introduction to Robotic
        Manipulation", exponential coordinates).
    """
    if viewmats.shape[-2:] != (4, 4) or twist.shape[-1:] != (6,):
        raise ValueError(
            f"viewmats {tuple(viewmats.shape)} and twist {tuple(twist.shape)}, "
            "expected [..., 4, 4] and [..., 6]"
        )
    rho, phi = twist.to(viewmats.dtype).split(3, dim=-1)
    x, y, z = phi.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    square = cross @ cross
    a, b, c = (f[..., None, None] for f in _rotation_factors((phi * phi).sum(-1)))
    eye = torch.eye(3, dtype=viewmats.dtype, device=viewmats.device)
    rotation = eye + a * cross + b * square
    shift = (eye + b * cross + c * square) @ rho[..., None]
    moved = torch.cat([rotation, shift], dim=-1) @ viewmats
    return torch.cat([moved, viewmats[..., 3:, :].expand(*moved.shape[:-2], 1, 4)], dim=-2)


def _rotation_factors(square: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sin t / t, (1 - cos t) / t^2 and (t - sin t) / t^3 of t^2, smooth at zero.

    Below t = 1 by series in t^2, nine terms of which leave 1e-18; above, the closed form loses less
    than a digit.
    """
    near = square < 1.0
    angle = torch.where(near, 1.0, square).sqrt()  # 1 keeps the gradient of the other branch finite
    small = torch.where(near, square, 0.0)
    far = (
        angle.sin() / angle,
        2 * ((angle / 2).sin() / angle) ** 2,
        (angle - angle.sin()) / angle**3,
    )
    return tuple(
        torch.where(near, _series(small, k), f) for k, f in zip((1, 2, 3), far, strict=True)
    )


def _series(square: Tensor, first: int) -> Tensor:
    """1/first! - square/(first + 2)! + square^2/(first + 4)! - ..., nine terms, by Horner."""
    total = torch.zeros_like(square)
    for power in reversed(range(9)):
        total = 1 / math.factorial(first + 2 * power) - square * total
    return total
