"""hashgrid_encode: features of a multi-resolution hash grid, gated by a grid of saliency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gencompress_kernels import dispatch

CONVENTIONS = ("torch-ngp", "tcnn")
ROW_MULTIPLE = 8  # both conventions round the rows of a level up to it
MOST_CELLS = 1 << 22  # along an axis: positions in cells stay exact to half a cell in float32


@dataclass(frozen=True)
class Levels:
    """The levels of a hash grid, coarsest first; rows `offsets[l]` to `offsets[l + 1]` of the table
    belong to level l."""

    scales: tuple[float, ...]  # L: a point x of [0, 1] lies at x * scale + 0.5 in cells
    resolutions: tuple[int, ...]  # L
    offsets: tuple[int, ...]  # L + 1
    strides: tuple[int, ...]  # L: rows from a vertex to the next in y; z: its square; 0: hashed
    features: int  # per row
    convention: str  # "torch-ngp" or "tcnn"

    def __post_init__(self) -> None:
        count = len(self.scales)
        lengths = len(self.resolutions), len(self.offsets), len(self.strides)
        if not count or lengths != (count, count + 1, count) or self.offsets[0]:
            raise ValueError(
                f"levels of {count} scales, {lengths[0]} resolutions, {lengths[1]} offsets and "
                f"{lengths[2]} strides, expected L, L, L + 1 that start at 0, and L"
            )
        for level, (scale, stride) in enumerate(zip(self.scales, self.strides, strict=True)):
            rows = self.offsets[level + 1] - self.offsets[level]
            if not 0 < rows * self.features < 1 << 32:
                raise ValueError(
                    f"{rows} rows of {self.features} features in level {level}, expected at least "
                    f"one of each and less than 2^32 numbers"
                )
            if not 0 <= scale < MOST_CELLS:
                raise ValueError(f"scale {scale} of level {level}, expected 0 to {MOST_CELLS}")
            if stride == 0 and rows & (rows - 1):
                raise ValueError(f"{rows} rows of hashed level {level}, expected a power of two")
            # the outermost corners may lie past the last row, but less than once around
            last = stride * (1 + stride + stride**2)
            if stride and not (scale + 0.5 < stride and stride**3 <= rows and last < 2 * rows):
                raise ValueError(
                    f"stride {stride} of dense level {level} does not fit its scale {scale} and "
                    f"{rows} rows"
                )


def hashgrid_levels(
    count: int = 16,
    features: int = 2,
    coarsest: int = 16,
    finest: int = 1024,
    log2_rows: int = 19,
    convention: str = "torch-ngp",
) -> Levels:
    """Levels whose resolution grows by equal factors from `coarsest` to `finest` cells.

    A level has at most 2^log2_rows rows. One with as many rows as vertices is dense, the others are
    hashed. The two conventions count vertices differently, so their tables do not fit each other:
    "torch-ngp" has resolution + 1 along an axis, "tcnn" (tiny-cuda-nn, instant-ngp) only
    resolution, and the outermost vertices share rows with others.

    Raises:
        ValueError: a number out of its range, or a convention nobody knows.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"unknown convention {convention!r}; known: {', '.join(CONVENTIONS)}")
    if min(count, features) < 1 or not 1 <= coarsest <= finest <= MOST_CELLS:
        raise ValueError(
            f"{count} levels of {features} features, {coarsest} to {finest} cells; expected at "
            f"least one of each and at most {MOST_CELLS} cells, coarsest first"
        )
    if not 0 <= log2_rows <= 28:
        raise ValueError(f"log2_rows {log2_rows}, expected 0 to 28")
    most = 1 << log2_rows
    scales, resolutions, offsets, strides = [], [], [0], []
    for level in range(count):
        growth = math.log2(finest / coarsest) * level / max(count - 1, 1)
        scale = coarsest * 2**growth - 1
        resolution = math.ceil(scale) + 1
        side = resolution + 1 if convention == "torch-ngp" else resolution
        rows = -(-min(most, side**3) // ROW_MULTIPLE) * ROW_MULTIPLE
        scales.append(scale)
        resolutions.append(resolution)
        offsets.append(offsets[-1] + rows)
        strides.append(side if side**3 <= rows else 0)
    return Levels(
        tuple(scales), tuple(resolutions), tuple(offsets), tuple(strides), features, convention
    )


def hashgrid_encode(
    points: Tensor,
    table: Tensor,
    levels: Levels,
    *,
    logits: Tensor | None = None,
    cells: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features p f at points: f interpolated in each level of a hash grid (Mueller et al. 2022),
    p = sigmoid of the logits interpolated in a coarse grid (Xie et al. 2023, HollowNeRF).

    Grids are indexed [x, y, z], x slowest; logits lie at the corners of the cells, the outermost on
    the faces of the unit cube. Where p is exactly 0, no level is read and nothing gets a gradient.

    Args:
        points: float32 [M, 3]; clamped to [0, 1]. `reference` takes float64 everywhere too.
        table: [E, F], the rows of `levels`; finite.
        logits: [T, T, T], T >= 2; taken as within +-128, so an infinite one gives p of exactly 0 or
            1 (in float32), and the gradient does not see that bound. None: p is 1.
        cells: bool [T - 1, T - 1, T - 1]; p is 0 in a cell that is False. None: all True.

    Returns:
        features [M, levels * F], coarsest level first, norms [M] of their rows, and p [M].
        Differentiable once in table, logits and points; the norm has no gradient below 1e-12. The
        same bits at any number of threads. Values are not checked: results at a point, row or logit
        that is not a number are not to be used.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        BackendUnavailable: the backend that was asked for cannot run here.
    """
    _check(points, table, levels, logits, cells)
    features, norms, saliency = _encode(
        points.contiguous(),
        table.contiguous(),
        None if logits is None else logits.contiguous(),
        None if cells is None else cells.contiguous(),
        levels.scales,
        levels.offsets,
        levels.strides,
        backend,
    )
    return features, norms, saliency


def _check(
    points: Tensor, table: Tensor, levels: Levels, logits: Tensor | None, cells: Tensor | None
) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points of shape {tuple(points.shape)}, expected [M, 3]")
    if points.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"points are {points.dtype}, expected float32")
    expected = (levels.offsets[-1], levels.features)
    if table.shape != expected:
        raise ValueError(f"table of shape {tuple(table.shape)}, expected {expected} of the levels")
    if logits is not None:
        _check_cube("logits", logits, 2)
    if cells is not None:
        _check_cube("cells", cells, 1)
        if cells.dtype != torch.bool:
            raise ValueError(f"cells are {cells.dtype}, expected torch.bool")
    if logits is not None and cells is not None and len(logits) != len(cells) + 1:
        raise ValueError(
            f"{len(cells)} cells along an axis for {len(logits)} logits, expected one less"
        )
    for name, tensor in (("table", table), ("logits", logits)):
        if tensor is not None and tensor.dtype != points.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected {points.dtype} like the points")
    for name, tensor in (("table", table), ("logits", logits), ("cells", cells)):
        if tensor is not None and tensor.device != points.device:
            raise ValueError(f"{name} on {tensor.device}, expected {points.device} like the points")


def _check_cube(name: str, grid: Tensor, least: int) -> None:
    if grid.ndim != 3 or len(set(grid.shape)) != 1 or len(grid) < least:
        raise ValueError(
            f"{name} of shape {tuple(grid.shape)}, expected a cube of side {least} or more"
        )


@torch.library.custom_op("gencompress::hashgrid_encode", mutates_args=())
def _encode(
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    cells: Tensor | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [M, L F], norms [M], saliency [M]."""
    run = dispatch.pick("hashgrid_encode", points.device, backend).forward
    count = len(points)
    features = points.new_empty(count, len(scales) * table.shape[1])
    norms, saliency = points.new_empty(count), points.new_empty(count)
    if count:
        grid = _bounded(logits)
        run(points, table, grid, cells, scales, offsets, strides, features, norms, saliency)
    return features, norms, saliency


@_encode.register_fake
def _(
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    cells: Tensor | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    count = len(points)
    features = points.new_empty(count, len(scales) * table.shape[1])
    return features, points.new_empty(count), points.new_empty(count)


@torch.library.custom_op("gencompress::hashgrid_encode_backward", mutates_args=())
def _encode_backward(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    wanted: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(slopes * features) + sum(norm_slopes * norms) + sum(saliency_slopes *
    saliency) by table [E, F], logits [T, T, T] and points [M, 3]; [0] for one not wanted."""
    run = dispatch.pick("hashgrid_encode", points.device, backend).backward
    out = [
        torch.empty_like(source) if want and source is not None else points.new_empty(0)
        for source, want in zip((table, logits, points), wanted, strict=True)
    ]
    if len(points):
        run(
            slopes.contiguous(), norm_slopes.contiguous(), saliency_slopes.contiguous(),
            points, table, _bounded(logits), features, norms, saliency, scales, offsets, strides,
            *(tensor if want else None for tensor, want in zip(out, wanted, strict=True)),
        )  # fmt: skip
    else:
        for tensor in out:
            tensor.zero_()
    return out[0], out[1], out[2]


@_encode_backward.register_fake
def _(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    wanted: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out = [
        torch.empty_like(source) if want and source is not None else points.new_empty(0)
        for source, want in zip((table, logits, points), wanted, strict=True)
    ]
    return out[0], out[1], out[2]


def _bounded(logits: Tensor | None) -> Tensor | None:
    """Infinity times a weight of zero would be no number; sigmoid is 0 and 1 at +-128."""
    return None if logits is None else logits.clamp(-128, 128)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    points, table, logits, _, ctx.scales, ctx.offsets, ctx.strides, ctx.backend = inputs
    ctx.save_for_backward(points, table, logits, *output)


def _backward(
    ctx: Any, slopes: Tensor, norm_slopes: Tensor, saliency_slopes: Tensor
) -> tuple[Tensor | None, ...]:
    by_points, by_table, by_logits = ctx.needs_input_grad[:3]
    wanted = [by_table, by_logits, by_points]
    table, logits, points = _encode_backward(
        slopes, norm_slopes, saliency_slopes, *ctx.saved_tensors,
        ctx.scales, ctx.offsets, ctx.strides, wanted, ctx.backend,
    )  # fmt: skip
    return (
        points if by_points else None,
        table if by_table else None,
        logits if by_logits else None,
        *(None,) * 5,
    )


_encode.register_autograd(_backward, setup_context=_setup)
