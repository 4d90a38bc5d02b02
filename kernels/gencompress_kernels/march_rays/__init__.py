"""march_rays: samples along rays where an occupancy grid says that something may be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def march_rays(
    origins: Tensor,
    directions: Tensor,
    jitter: Tensor,
    occupancy: Tensor,
    box: Tensor,
    *,
    step: float,
    cone: float = 0.0,
    near: float = 0.0,
    far: float = math.inf,
    contracted: bool = False,
    most: int = 1024,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Regular samples of each ray, those kept whose own cell of the grid is True.

    A ray is walked from `enter`, where it enters the box but not before `near`, until it leaves
    the box or reaches `far`. Its samples lie at

        t_0 = enter + jitter * length(enter),  t_{k+1} = t_k + length(t_k),
        length(t) = max(step, cone * t),

    so at enter + (k + jitter) * step without a cone, and each stands for length(t_k). A jitter of
    0.5 puts them in the middle of what they stand for.

    Contracted, the box is what maps to the middle half of the grid and all of space around it to
    the rest: with x from -1 to 1 in the box and |x| its largest coordinate, x -> (2 - 1/|x|) x/|x|
    where |x| > 1, then x / 4 + 0.5 (Barron et al. 2022, who take the Euclidean norm). Rays are
    walked from `near` to `far`.

    Args:
        origins: float32 [R, 3], world. `reference` also takes float64, then of all four.
        directions: [R, 3], unit vectors; a ray of direction 0 has no samples.
        jitter: [R] in [0, 1).
        occupancy: bool [N, N, N], indexed [x, y, z], N <= 1024.
        box: [2, 3], low and high corner in world.
        step: > 0, world, and long enough to change a float32 distance.
        cone: >= 0.
        near, far: 0 <= near < far, world; far finite if contracted.
        most: samples a ray keeps, the first ones; >= 1.

    Returns:
        packed int64 [R, 2], first sample and number of samples of each ray, in the order of rays;
        points [M, 3] of the grid's unit cube, in [0, 1); distances [M] and steps [M], world. A
        point p lies in cell floor(p * N). No gradients; deterministic at any number of threads.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit. Rays are not checked: one with
            values that are not finite may have any samples.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(origins, directions, jitter, occupancy, box)
    if not (0 < step < math.inf and 0 <= cone < math.inf and 0 <= near < far):
        raise ValueError(
            f"step {step}, cone {cone}, near {near}, far {far}: expected a finite step > 0, "
            "cone >= 0 and 0 <= near < far"
        )
    if contracted and far == math.inf:
        raise ValueError("far is infinite, expected a finite one: contracted rays never leave")
    if most < 1:
        raise ValueError(f"most {most}, expected at least 1")
    run = dispatch.pick("march_rays", origins.device, backend).forward
    tensors = (t.detach().contiguous() for t in (origins, directions, jitter, occupancy, box))
    packed, points, distances, steps = run(*tensors, step, cone, near, far, contracted, most)
    return packed, points, distances, steps


def _check(
    origins: Tensor, directions: Tensor, jitter: Tensor, occupancy: Tensor, box: Tensor
) -> None:
    if origins.ndim != 2 or origins.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"origins are {origins.dtype} {tuple(origins.shape)}, expected float32 [R, 3]"
        )
    rays = len(origins)
    for name, tensor, shape in (
        ("origins", origins, (rays, 3)),
        ("directions", directions, (rays, 3)),
        ("jitter", jitter, (rays,)),
        ("box", box, (2, 3)),
    ):
        same = tensor.dtype == origins.dtype and tensor.device == origins.device
        if tuple(tensor.shape) != shape or not same:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{origins.dtype} {shape} on {origins.device}"
            )
    cube = occupancy.ndim == 3 and len(set(occupancy.shape)) == 1 and 0 < len(occupancy) <= 1024
    if not cube or occupancy.dtype != torch.bool or occupancy.device != origins.device:
        raise ValueError(
            f"occupancy is {occupancy.dtype} {tuple(occupancy.shape)} on {occupancy.device}, "
            f"expected bool [N, N, N] on {origins.device}, N from 1 to 1024"
        )
    if dispatch.looks(box) and not bool((box[0] < box[1]).all()):
        raise ValueError(f"box from {box[0].tolist()} to {box[1].tolist()}, expected low < high")
