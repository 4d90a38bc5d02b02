"""composite: colour, opacity and depth of rays from the samples along them, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gencompress_kernels import dispatch


def composite(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    *,
    stop: float = 1e-4,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples blended front to back: emission and absorption, constant within a sample (Max 1995).

    Sample i of a ray lets exp(-density * step) of the light through. With T_i what all before it
    let through, its weight is w_i = T_i (1 - exp(-density_i * step_i)).

    The walk ends before the first sample with T_i < `stop`: that one and all behind it have weight
    0 and gradient 0, and count for nothing. 0 walks to the end.

    Args:
        densities: float32 [M], >= 0, inverse world units; inf is opaque. Other values are not
            checked. `reference` also takes float64, then of all floating tensors.
        colors: [M, 3].
        steps: [M], the length each sample stands for, >= 0 and finite. A sample of length 0 has
            weight 0 whatever its density.
        packed: int64 [R, 2], first sample and number of samples of each ray, front to back. Rows
            may be in any order and empty; two that share a sample give an undefined result.
        distances: [M], of the samples from the start of the ray, finite.
        stop: 0 <= stop < 1; 1e-4 is instant-ngp's.

    Returns:
        Colours [R, 3] = sum of w c over nothing: add (1 - opacity) * background for the picture.
        Opacity [R] = sum of w, depth [R] = sum of w t, and the weights [M], 0 for samples of no
        ray. The first three are differentiable once, by densities and colors; weights are not.
        Deterministic at any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, where `dispatch.looks`, packed reaches
            outside the samples.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(densities, steps, packed, colors=colors, distances=distances)
    if not 0 <= stop < 1:
        raise ValueError(f"stop {stop}, expected 0 <= stop < 1")
    constants = (t.detach().contiguous() for t in (steps, packed, distances))
    found = _composite(densities.contiguous(), colors.contiguous(), *constants, stop, backend)
    return found[0], found[1], found[2], found[3]


def transmittance(
    densities: Tensor, steps: Tensor, packed: Tensor, *, backend: str | None = None
) -> Tensor:
    """[M]: the share of light that arrives at each sample, 1 at the first of a ray.

    Arguments and errors as `composite`, without an early stop; 0 for samples of no ray. Not
    differentiable.
    """
    _check(densities, steps, packed)
    densities, steps, packed = (t.detach().contiguous() for t in (densities, steps, packed))
    _check_range(packed, len(densities))
    out = torch.zeros_like(densities)
    run = dispatch.pick("composite", densities.device, backend).transmittance
    if out.numel() and packed.numel():
        run(densities, steps, packed, out)
    return out


def _check(densities: Tensor, steps: Tensor, packed: Tensor, **others: Tensor) -> None:
    if densities.ndim != 1 or densities.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"densities are {densities.dtype} {tuple(densities.shape)}, expected float32 [M]"
        )
    num = len(densities)
    for name, tensor in ({"steps": steps} | others).items():
        shape = (num, 3) if name == "colors" else (num,)
        same = tensor.dtype == densities.dtype and tensor.device == densities.device
        if tuple(tensor.shape) != shape or not same:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, expected "
                f"{densities.dtype} {shape} on {densities.device} like the densities"
            )
    fits = packed.dtype == torch.int64 and packed.device == densities.device
    if packed.ndim != 2 or packed.shape[1] != 2 or not fits:
        raise ValueError(
            f"packed is {packed.dtype} {tuple(packed.shape)} on {packed.device}, expected int64 "
            f"[R, 2] on {densities.device}"
        )


def _check_range(packed: Tensor, num: int) -> None:
    """Kernels read and write where `packed` points."""
    if not packed.numel() or not dispatch.looks(packed):
        return
    if not (int(packed.min()) >= 0 and int(packed.sum(1).max()) <= num):
        raise ValueError(f"packed: a ray reaches outside the {num} samples, or has fewer than none")


@torch.library.custom_op("gencompress::composite", mutates_args=())
def _composite(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    stop: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Colours, opacity, depth, weights, and for the gradient the transmittance [R] behind each ray
    and the sample [R] at which its walk ended."""
    run = dispatch.pick("composite", densities.device, backend).forward
    _check_range(packed, len(densities))
    rays = len(packed)
    totals = [densities.new_zeros(shape) for shape in ((rays, 3), (rays,), (rays,))]
    weights, left, ends = (
        torch.zeros_like(densities),
        densities.new_ones(rays),
        packed[:, 0].clone(),
    )
    if weights.numel() and rays:
        run(densities, colors, steps, packed, distances, stop, *totals, weights, left, ends)
    return (*totals, weights, left, ends)


@_composite.register_fake
def _(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    stop: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rays = packed.shape[0]
    return (
        densities.new_empty((rays, 3)),
        densities.new_empty(rays),
        densities.new_empty(rays),
        torch.empty_like(densities),
        densities.new_empty(rays),
        packed.new_empty(rays),
    )


@torch.library.custom_op("gencompress::composite_backward", mutates_args=())
def _composite_backward(
    slopes: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of densities and colors; slopes [R, 5] of colours, opacity and depth."""
    run = dispatch.pick("composite", colors.device, backend).backward
    by_density, by_color = torch.zeros_like(weights), torch.zeros_like(colors)
    if weights.numel() and len(packed):
        saved = (colors, steps, packed, distances, weights, left, ends)
        run(slopes, *saved, by_density, by_color)
    return by_density, by_color


@_composite_backward.register_fake
def _(
    slopes: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(colors)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, colors, steps, packed, distances, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])
    ctx.save_for_backward(colors, steps, packed, distances, *output[3:])


def _backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
    by_colors, by_opacity, by_depth = slopes[:3]
    if by_colors is None and by_opacity is None and by_depth is None:
        return (None,) * 7
    left = ctx.saved_tensors[5]
    joined = left.new_zeros(len(left), 5)
    for columns, slope in ((slice(0, 3), by_colors), (3, by_opacity), (4, by_depth)):
        if slope is not None:
            joined[:, columns] = slope
    return (*_composite_backward(joined, *ctx.saved_tensors, ctx.backend), *(None,) * 5)


_composite.register_autograd(_backward, setup_context=_setup)
