"""Structural similarity on the CPU with numba: one pass forward, one backward.

A task is a block of rows of a strip of the image; channels lie side by side, so a row is a vector
of W * C floats. The four moments of a row (image, wanted, sum of squares, product) are blurred
across into a buffer that stays in the cache, then each row of the block is blurred down from it,
and similarity and partial derivatives follow at once. Backward does the same with the three saved
maps. Blocks and strips have a fixed size and their sums are added in order: the same result with
any number of threads.

Floor for F = H * W * C floats: forward reads 2 F and writes 3 F floats, backward reads 5 F and
writes F, 44 F bytes in all; 4 and 3 blurs of 2 * 11 multiply-adds are 308 F operations, about 350 F
with the rest. For 512x512x3: 35 MB, 0.28 GFLOP. The block's rim costs 10 more rows across.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.ssim import reference
from gencompress_kernels.ssim.reference import REACH

# Best of rows 16 to 128 and strips 256 to 1024 at 512x512x3; the buffer is then 0.6 MB
ROWS, STRIP = 64, 512
f32 = np.float32
W0, W1, W2, W3, W4, W5 = (f32(weight) for weight in reference.WEIGHTS[REACH:])
C1, C2 = f32(reference.C1), f32(reference.C2)
ONE, TWO = f32(1), f32(2)


def forward(images: Tensor, wanted: Tensor, values: Tensor, partials: Tensor | None) -> None:
    """float32. Fills values [B], and partials [3 B, H, W, C] unless None, as the reference."""
    x, y = _rows(images), _rows(wanted)
    batch, height, width = x.shape
    sums = np.empty((batch, height, -(-width // STRIP)))
    maps = np.empty((3, 0, 0, 0), f32) if partials is None else _rows(partials).reshape(3, *x.shape)
    _forward(x, y, images.shape[-1], numba.get_num_threads(), maps, sums)
    values.copy_(torch.from_numpy(sums.sum((1, 2)) / (height * width)))


def backward(slopes: Tensor, images: Tensor, wanted: Tensor, partials: Tensor, out: Tensor) -> None:
    """float32. Fills out [B, H, W, C] as the reference."""
    x, y = _rows(images), _rows(wanted)
    maps = _rows(partials).reshape(3, *x.shape)
    factors = (slopes.double().numpy() / (x.shape[1] * x.shape[2])).astype(f32)
    threads = numba.get_num_threads()
    _backward(factors, x, y, maps, images.shape[-1], threads, _rows(out))


def _rows(images: Tensor) -> np.ndarray:
    """[B, H, W, C] -> [B, H, W * C]"""
    if images.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {images.dtype}")
    return images.flatten(2).numpy()


# Two loops, because LLVM gives up on one with more than eight pairs of pointers to tell apart.
@jit.serial
def _blur(source, step, out):
    """out[i] = sum over k of weight k * source[i + k * step], k = 0..10."""
    n = len(out)
    c = source[5 * step : 5 * step + n]
    a1, b1 = source[4 * step : 4 * step + n], source[6 * step : 6 * step + n]
    a2, b2 = source[3 * step : 3 * step + n], source[7 * step : 7 * step + n]
    for i in range(n):
        out[i] = W0 * c[i] + W1 * (a1[i] + b1[i]) + W2 * (a2[i] + b2[i])
    a3, b3 = source[2 * step : 2 * step + n], source[8 * step : 8 * step + n]
    a4, b4 = source[step : step + n], source[9 * step : 9 * step + n]
    a5, b5 = source[0:n], source[10 * step : 10 * step + n]
    for i in range(n):
        out[i] += W3 * (a3[i] + b3[i]) + W4 * (a4[i] + b4[i]) + W5 * (a5[i] + b5[i])


@jit.serial
def _multiply(x, y, squares, products):
    for i in range(len(x)):
        squares[i] = x[i] * x[i] + y[i] * y[i]
    for i in range(len(x)):
        products[i] = x[i] * y[i]


@jit.serial
def _similarity(moments, partials, n):
    """From moments (m, n, e, p) to partials (by m, by e, by p, similarity), each [STRIP]."""
    for i in range(n):
        m, o = moments[i], moments[i + STRIP]
        e, p = moments[i + 2 * STRIP], moments[i + 3 * STRIP]
        both, squares = m * o, m * m + o * o
        a, b = TWO * both + C1, TWO * (p - both) + C2
        d, e = squares + C1, e - squares + C2
        inverse = ONE / (d * e)
        s = a * b * inverse
        partials[i] = TWO * inverse * (o * (b - a) - s * m * (e - d))
        partials[i + STRIP] = -s * d * inverse
        partials[i + 2 * STRIP] = TWO * a * inverse
        partials[i + 3 * STRIP] = s
    total = 0.0
    for i in range(3 * STRIP, 3 * STRIP + n):
        total += partials[i]
    return total


@jit.serial
def _combine(blurred, x, y, factor, out):
    n = len(out)
    by_m, by_e = blurred[0:n], blurred[STRIP : STRIP + n]
    by_p = blurred[2 * STRIP : 2 * STRIP + n]
    for i in range(n):
        out[i] = factor * (by_m[i] + TWO * x[i] * by_e[i] + y[i] * by_p[i])


@jit.inline
def _task(task, height, width):
    """Image, first row, row past the last, strip, first float, floats."""
    blocks, strips = (height + ROWS - 1) // ROWS, (width + STRIP - 1) // STRIP
    image, place = task // (blocks * strips), task % (blocks * strips)
    top, strip = place // strips * ROWS, place % strips
    left = strip * STRIP
    return image, top, min(top + ROWS, height), strip, left, min(STRIP, width - left)


@jit.inline
def _tasks(batch, height, width):
    return batch * ((height + ROWS - 1) // ROWS) * ((width + STRIP - 1) // STRIP)


@jit.parallel
def _forward(x, y, channels, workers, maps, sums):
    """x, y [B, H, W * C]; maps [3, B, H, W * C] or [3, 0, 0, 0]; sums [B, H, strips]."""
    batch, height, width = x.shape
    margin = REACH * channels
    tasks = _tasks(batch, height, width)
    for worker in numba.prange(workers):
        lines = np.zeros((4, STRIP + 2 * margin), f32)
        rows = np.empty((4, (ROWS + 2 * REACH) * STRIP), f32)
        moments, partials = np.empty(4 * STRIP, f32), np.empty(4 * STRIP, f32)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            image, top, bottom, strip, left, n = _task(task, height, width)
            low, high = max(left - margin, 0), min(left + n + margin, width)
            begin, end = low - left + margin, high - left + margin
            lines[:, :begin] = 0
            lines[:, end:] = 0
            for row in range(top - REACH, bottom + REACH):
                at = (row - top + REACH) * STRIP
                if row < 0 or row >= height:
                    rows[:, at : at + n] = 0
                    continue
                lines[0, begin:end] = x[image, row, low:high]
                lines[1, begin:end] = y[image, row, low:high]
                a, b = lines[0, begin:end], lines[1, begin:end]
                _multiply(a, b, lines[2, begin:end], lines[3, begin:end])
                for k in range(4):
                    _blur(lines[k], channels, rows[k, at : at + n])
            for row in range(top, bottom):
                at = (row - top) * STRIP
                for k in range(4):
                    _blur(rows[k, at:], STRIP, moments[k * STRIP : k * STRIP + n])
                sums[image, row, strip] = _similarity(moments, partials, n)
                if maps.size:
                    for k in range(3):
                        maps[k, image, row, left : left + n] = partials[k * STRIP : k * STRIP + n]


@jit.parallel
def _backward(factors, x, y, maps, channels, workers, out):
    """factors [B]; x, y, out [B, H, W * C]; maps [3, B, H, W * C]."""
    batch, height, width = x.shape
    margin = REACH * channels
    tasks = _tasks(batch, height, width)
    for worker in numba.prange(workers):
        line = np.zeros(STRIP + 2 * margin, f32)
        rows = np.empty((3, (ROWS + 2 * REACH) * STRIP), f32)
        blurred = np.empty(3 * STRIP, f32)
        for task in range(worker * tasks // workers, (worker + 1) * tasks // workers):
            image, top, bottom, _, left, n = _task(task, height, width)
            low, high = max(left - margin, 0), min(left + n + margin, width)
            begin, end = low - left + margin, high - left + margin
            line[:begin] = 0
            line[end:] = 0
            for row in range(top - REACH, bottom + REACH):
                at = (row - top + REACH) * STRIP
                if row < 0 or row >= height:
                    rows[:, at : at + n] = 0
                    continue
                for k in range(3):
                    line[begin:end] = maps[k, image, row, low:high]
                    _blur(line, channels, rows[k, at : at + n])
            for row in range(top, bottom):
                at = (row - top) * STRIP
                for k in range(3):
                    _blur(rows[k, at:], STRIP, blurred[k * STRIP : k * STRIP + n])
                here = out[image, row, left : left + n]
                a, b = x[image, row, left : left + n], y[image, row, left : left + n]
                _combine(blurred, a, b, factors[image], here)
