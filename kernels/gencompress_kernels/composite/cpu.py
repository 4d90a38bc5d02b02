"""Compositing on the CPU with numba: one walk along each ray forward, one back.

A walk adds up in float64 registers, which costs nothing beside the exponential and makes
1 - exp(-x) exact to float32 for thin samples. Backward starts from the transmittance behind the ray
and adds the weights again on its way to the front, so that it needs neither the densities nor an
exponential. Rays are divided into one run per thread, of about as many samples each; a ray's result
does not depend on who computes it. Small calls stay in the thread that makes them: waking others
takes as long, and much longer where torch's threads still spin.

Floor for M samples that are walked: forward reads 24 M bytes, writes 4 M and fills 4 M with zeros;
backward reads 24 M, writes 16 M and fills as many: 88 M bytes, 23 MB for 2^18 samples; and 2^18
exponentials.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit

LARGEST = float(np.finfo(np.float32).max)
SMALL = 1 << 14  # samples, about 0.15 ms


def forward(
    densities: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    stop: float,
    out_colors: Tensor,
    opacity: Tensor,
    depth: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
) -> None:
    """float32. Fills the last six as the reference."""
    samples = _arrays(densities, colors, steps, distances)
    totals = _arrays(out_colors, opacity, depth, weights, left)
    arrays = packed.numpy(), *samples, stop, *totals, ends.numpy()
    if len(densities) <= SMALL:
        _forward_run(0, len(packed), *arrays)
    else:
        _forward(_runs(packed), *arrays)


def backward(
    slopes: Tensor,
    colors: Tensor,
    steps: Tensor,
    packed: Tensor,
    distances: Tensor,
    weights: Tensor,
    left: Tensor,
    ends: Tensor,
    by_density: Tensor,
    by_color: Tensor,
) -> None:
    """float32. Fills the last two as the reference."""
    samples = _arrays(slopes, colors, steps, distances, weights, left)
    gradients = _arrays(by_density, by_color)
    arrays = packed.numpy(), ends.numpy(), *samples, *gradients
    if len(weights) <= SMALL:
        _backward_run(0, len(packed), *arrays)
    else:
        _backward(_runs(packed), *arrays)


def transmittance(densities: Tensor, steps: Tensor, packed: Tensor, out: Tensor) -> None:
    """float32. Fills out as the reference."""
    _transmittance(_runs(packed), packed.numpy(), *_arrays(densities, steps, out))


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    if tensors[0].dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {tensors[0].dtype}")
    return [tensor.numpy() for tensor in tensors]


def _runs(packed: Tensor) -> np.ndarray:
    """[threads + 1]: where runs of rays begin and end, of about as many samples each."""
    work = np.cumsum(packed[:, 1].numpy() + 4)  # a ray costs about as much as four samples
    threads = numba.get_num_threads()
    return np.searchsorted(work, np.arange(threads + 1) * work[-1] // threads, side="right")


# The walks keep to IEEE arithmetic: densities may be infinite.
@jit.exact
def _walk(begin, end, densities, colors, steps, distances, stop, weights):
    """Colour, opacity, depth, transmittance behind, and where the walk ended."""
    red, green, blue, opacity, depth, left = 0.0, 0.0, 0.0, 0.0, 0.0, 1.0
    for i in range(begin, end):
        if left < stop:
            return red, green, blue, opacity, depth, left, i
        through = math.exp(-min(np.float64(densities[i]), LARGEST) * np.float64(steps[i]))
        weight = left * (1.0 - through)
        left *= through
        weights[i] = weight
        red += weight * colors[i, 0]
        green += weight * colors[i, 1]
        blue += weight * colors[i, 2]
        opacity += weight
        depth += weight * distances[i]
    return red, green, blue, opacity, depth, left, end


@jit.exact
def _forward_run(
    first, last, packed, densities, colors, steps, distances, stop,
    out_colors, opacity, depth, weights, left, ends,
):  # fmt: skip
    for ray in range(first, last):
        begin = packed[ray, 0]
        found = _walk(
            begin, begin + packed[ray, 1], densities, colors, steps, distances, stop, weights
        )
        out_colors[ray, 0], out_colors[ray, 1], out_colors[ray, 2] = found[:3]
        opacity[ray], depth[ray], left[ray], ends[ray] = found[3:]


@jit.parallel
def _forward(
    runs, packed, densities, colors, steps, distances, stop,
    out_colors, opacity, depth, weights, left, ends,
):  # fmt: skip
    for run in numba.prange(len(runs) - 1):
        _forward_run(
            runs[run], runs[run + 1], packed, densities, colors, steps, distances, stop,
            out_colors, opacity, depth, weights, left, ends,
        )  # fmt: skip


@jit.exact
def _walk_back(begin, end, slopes, colors, steps, distances, weights, left, by_density, by_color):
    red, green, blue = slopes[0], slopes[1], slopes[2]
    by_opacity, by_depth = np.float64(slopes[3]), slopes[4]
    after, behind, whole = np.float64(left), 0.0, by_opacity * left
    for i in range(end - 1, begin - 1, -1):
        weight = weights[i]
        value = np.float64(red * colors[i, 0] + green * colors[i, 1] + blue * colors[i, 2])
        value += by_depth * distances[i]
        by_density[i] = steps[i] * (after * value - behind + whole)
        by_color[i, 0] = weight * red
        by_color[i, 1] = weight * green
        by_color[i, 2] = weight * blue
        behind += weight * value
        after += weight


@jit.exact
def _backward_run(
    first, last, packed, ends, slopes, colors, steps, distances, weights, left,
    by_density, by_color,
):  # fmt: skip
    for ray in range(first, last):
        _walk_back(
            packed[ray, 0], ends[ray], slopes[ray], colors, steps, distances, weights, left[ray],
            by_density, by_color,
        )  # fmt: skip


@jit.parallel
def _backward(
    runs, packed, ends, slopes, colors, steps, distances, weights, left, by_density, by_color
):
    for run in numba.prange(len(runs) - 1):
        _backward_run(
            runs[run], runs[run + 1], packed, ends, slopes, colors, steps, distances, weights,
            left, by_density, by_color,
        )  # fmt: skip


@jit.exact
def _dim(begin, end, densities, steps, out):
    thickness = 0.0
    for i in range(begin, end):
        out[i] = math.exp(-thickness)
        thickness += min(np.float64(densities[i]), LARGEST) * np.float64(steps[i])


@jit.parallel
def _transmittance(runs, packed, densities, steps, out):
    for run in numba.prange(len(runs) - 1):
        for ray in range(runs[run], runs[run + 1]):
            _dim(packed[ray, 0], packed[ray, 0] + packed[ray, 1], densities, steps, out)
