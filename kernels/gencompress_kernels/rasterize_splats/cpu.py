"""Splat rasterisation on the CPU with numba: tiles are the tasks, rows of 16 pixels the vectors.

A picture costs three passes. `_project` computes one 64-byte record a splat. `_count_pairs` and
`_fill_pairs` list, tile by tile and nearest first, the splats whose ellipse alpha >= 1/255 enters
the tile; a worker owns whole rows of tiles, so nothing is shared. `_blend` walks each tile's list
with the splat as the outer and a row of 16 pixels as the inner loop, which compiles to vector
instructions; statistics get one slot per (tile, splat) pair and are summed afterwards in a fixed
order. No atomics: the same result with any number of threads. Memory is O(splats + pairs).
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats.cpu_harmonics import sh_color
from gencompress_kernels.rasterize_splats.reference import (
    BLUR,
    FRUSTUM_MARGIN,
    MAX_ALPHA,
    MAX_VARIANCE,
    MIN_ALPHA,
    MIN_COMPENSATION,
    MIN_DETERMINANT,
    MIN_TRANSMITTANCE,
    NEAR,
    Drawn,
    Gradients,
    Incoming,
    Shot,
)

TILE = 16
PIXELS = TILE * TILE
# columns of a splat's record
X, Y, A, B, C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y, LIMIT, SLANT = range(14)
RECORD = 16  # floats: a cache line

f32 = np.float32
_LN_255 = math.log(255.0)
# Minimax polynomial of exp on [-0.7, 0] (relative error 2e-9): exp(x) = p(x / 8)^8, and no splat
# reaches a pixel with q above ln 255 = 5.54. In float32 the eighth power leaves 1.7e-6.
E1, E2, E3, E4, E5, E6 = (
    f32(0.999999822270412),
    f32(0.49999532975875227),
    f32(0.1666250388964751),
    f32(0.04149321691603158),
    f32(0.007960481187908486),
    f32(0.000979642150293579),
)


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    width, height = shot.width, shot.height
    records = project(shot)
    order, offsets, pairs = tile_lists(records, width, height)
    planes = np.empty((len(order), 5, PIXELS), f32)
    slots = np.empty((len(pairs) if statistics else 0, 4), f32)
    _blend(records, order, offsets, pairs, width, height, planes, slots, statistics)
    totals = np.zeros((len(records) if statistics else 0, 4), f32)
    _sum_slots(pairs, slots, totals)
    colors = np.empty((height, width, 3), f32)
    alphas = np.empty((height, width), f32)
    depths = np.empty((height, width), f32)
    _untile(planes, background.numpy(), colors, alphas, depths)
    arrays = (colors, alphas, depths, totals, records, offsets, pairs)
    return Drawn(*(torch.from_numpy(array) for array in arrays))


def backward(
    shot: Shot, incoming: Incoming, saved: list[Tensor], absolute: bool, poses: bool
) -> Gradients:
    """float32. As the reference."""
    from gencompress_kernels.rasterize_splats.cpu_backward import backward

    return backward(shot, incoming, saved, absolute, poses)


def removal_errors(shot: Shot) -> Tensor:
    """float32. Returns [N] as the reference."""
    return _changes(shot, None)[:, 0]


def corrections(shot: Shot, colors: Tensor, alphas: Tensor) -> Tensor:
    """float32. Returns [N, 6] as the reference."""
    return _changes(shot, (colors, alphas))


def _changes(shot: Shot, wanted: tuple[Tensor, Tensor] | None) -> Tensor:
    """[N, 6] with the wanted colours and alphas, [N, 1] without."""
    width, height = shot.width, shot.height
    records = project(shot)
    order, offsets, pairs = tile_lists(records, width, height)
    planes = np.empty((len(order), 5, PIXELS), f32)
    _blend(records, order, offsets, pairs, width, height, planes, np.empty((0, 4), f32), False)
    residuals = np.zeros((len(order) if wanted else 0, 4, PIXELS), f32)
    if wanted:
        _residuals(planes, *(tensor.numpy() for tensor in wanted), residuals)
    slots = np.empty((len(pairs), 6 if wanted else 1), f32)
    _pair_changes(records, order, offsets, pairs, width, height, planes, residuals, slots)
    totals = np.zeros((len(records), slots.shape[1]))
    _sum_changes(pairs, slots, totals)
    return torch.from_numpy(totals.astype(f32))


def project(shot: Shot) -> np.ndarray:
    """One record a splat, float32 [N, 16]; opacity 0 where it is culled."""
    if shot.means.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {shot.means.dtype}")
    records = np.zeros((shot.means.shape[0], RECORD), f32)
    splats = (tensor.numpy() for tensor in shot[:7])
    _project(
        *splats, camera_place(shot.viewmat), shot.width, shot.height, shot.antialiased, records
    )
    return records


def camera_place(viewmat: Tensor) -> np.ndarray:
    """float32 [3]: the centre of the camera in the world, -R^T t."""
    rotation, translation = viewmat[:3, :3].double(), viewmat[:3, 3].double()
    return (-rotation.T @ translation).float().numpy()


def tile_lists(
    records: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which splats each tile blends, nearest first.

    Returns the order in which workers take the tiles, int32 [tiles]; offsets, int64 [tiles + 1];
    and pairs, int32: tile t blends pairs[offsets[t]:offsets[t + 1]].
    """
    tiles_x, tiles_y = -(-width // TILE), -(-height // TILE)
    workers = min(numba.get_num_threads() * 4, tiles_y)
    bands = np.linspace(0, tiles_y, workers + 1).astype(np.int64)
    nearest = _sort_by_depth(records)
    counts = np.zeros(tiles_x * tiles_y + 1, np.int64)
    _count_pairs(records, nearest, bands, tiles_x, counts)
    offsets = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=offsets[1:])
    pairs = np.empty(offsets[-1], np.int32)
    _fill_pairs(records, nearest, bands, tiles_x, offsets[:-1].copy(), pairs)
    return _deal(counts[:-1]), offsets, pairs


def _deal(counts: np.ndarray) -> np.ndarray:
    """Tiles in the order workers take them: numba hands each thread one contiguous part, so the
    long tiles are dealt out like cards."""
    threads = numba.get_num_threads()
    longest = np.argsort(-counts, kind="stable").astype(np.int32)
    return np.concatenate([longest[start::threads] for start in range(threads)])


@jit.parallel
def _project(
    means, quats, scales, opacities, sh, view, lens, position, width, height, antialiased, records
):
    fx, fy, cx, cy = lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2]
    margin_x = f32(FRUSTUM_MARGIN) * f32(0.5) * width / fx
    margin_y = f32(FRUSTUM_MARGIN) * f32(0.5) * height / fy
    low_x, high_x = -cx / fx - margin_x, (width - cx) / fx + margin_x
    low_y, high_y = -cy / fy - margin_y, (height - cy) / fy + margin_y
    bands = sh.shape[1]
    for n in numba.prange(means.shape[0]):
        r = records[n]
        r[OPACITY] = f32(0.0)
        mx, my, mz = means[n, 0], means[n, 1], means[n, 2]
        z = view[2, 0] * mx + view[2, 1] * my + view[2, 2] * mz + view[2, 3]
        if z < f32(NEAR):
            continue
        x = view[0, 0] * mx + view[0, 1] * my + view[0, 2] * mz + view[0, 3]
        y = view[1, 0] * mx + view[1, 1] * my + view[1, 2] * mz + view[1, 3]

        qw, qx, qy, qz = quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3]
        norm = math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        if norm < f32(1e-12):
            norm = f32(1e-12)
        qw, qx, qy, qz = qw / norm, qx / norm, qy / norm, qz / norm
        one, two = f32(1.0), f32(2.0)
        iz = one / z
        tx = z * min(max(x * iz, low_x), high_x)
        ty = z * min(max(y * iz, low_y), high_y)
        jx0, jx2 = fx * iz, -fx * tx * iz * iz
        jy1, jy2 = fy * iz, -fy * ty * iz * iz
        # rows of J R: screen axes seen in the world
        ux = jx0 * view[0, 0] + jx2 * view[2, 0]
        uy = jx0 * view[0, 1] + jx2 * view[2, 1]
        uz = jx0 * view[0, 2] + jx2 * view[2, 2]
        vx = jy1 * view[1, 0] + jy2 * view[2, 0]
        vy = jy1 * view[1, 1] + jy2 * view[2, 1]
        vz = jy1 * view[1, 2] + jy2 * view[2, 2]
        sxx, sxy, syy = f32(0.0), f32(0.0), f32(0.0)
        for axis in range(3):
            if axis == 0:
                ax = one - two * (qy * qy + qz * qz)
                ay = two * (qx * qy + qw * qz)
                az = two * (qx * qz - qw * qy)
            elif axis == 1:
                ax = two * (qx * qy - qw * qz)
                ay = one - two * (qx * qx + qz * qz)
                az = two * (qy * qz + qw * qx)
            else:
                ax = two * (qx * qz + qw * qy)
                ay = two * (qy * qz - qw * qx)
                az = one - two * (qx * qx + qy * qy)
            s = scales[n, axis]
            pu = (ux * ax + uy * ay + uz * az) * s
            pv = (vx * ax + vy * ay + vz * az) * s
            sxx += pu * pu
            sxy += pu * pv
            syy += pv * pv
        if max(sxx, syy) > f32(MAX_VARIANCE):
            continue
        sharp = sxx * syy - sxy * sxy
        sxx += f32(BLUR)
        syy += f32(BLUR)
        det = max(sxx * syy - sxy * sxy, f32(MIN_DETERMINANT))
        opacity = opacities[n]
        if antialiased:
            opacity *= math.sqrt(max(sharp / det, f32(MIN_COMPENSATION * MIN_COMPENSATION)))
        if opacity < f32(MIN_ALPHA):
            continue
        # rounding takes the logarithm of an opacity of 1/255 below zero
        limit = max(f32(2.0) * (math.log(opacity) + f32(_LN_255)), f32(0.0))
        reach_x = math.sqrt(limit * sxx)
        reach_y = math.sqrt(limit * syy)
        px, py = fx * x * iz + cx, fy * y * iz + cy
        if px + reach_x < 0 or px - reach_x > width or py + reach_y < 0 or py - reach_y > height:
            continue

        dx, dy, dz = mx - position[0], my - position[1], mz - position[2]
        length = max(math.sqrt(dx * dx + dy * dy + dz * dz), f32(1e-12))
        dx, dy, dz = dx / length, dy / length, dz / length
        r[X], r[Y] = px, py
        r[A], r[B], r[C] = syy / det, -sxy / det, sxx / det
        r[OPACITY] = opacity
        r[DEPTH] = z
        r[SLANT] = r[B] / r[A]
        r[REACH_X], r[REACH_Y], r[LIMIT] = reach_x, reach_y, limit
        for channel in range(3):
            r[RED + channel] = max(sh_color(sh[n], channel, bands, dx, dy, dz), f32(0.0))


@jit.serial
def _sort_by_depth(records):
    """Indices of the splats that survived culling, nearest first, equal depths in index order:
    a radix sort of the bits of the depth, which is positive."""
    num = 0
    for n in range(records.shape[0]):
        if records[n, OPACITY] > f32(0.0):
            num += 1
    depth = np.empty(num, f32)
    index = np.empty(num, np.int32)
    at = 0
    for n in range(records.shape[0]):
        if records[n, OPACITY] > f32(0.0):
            depth[at] = records[n, DEPTH]
            index[at] = n
            at += 1
    keys = depth.view(np.uint32)
    other_keys = np.empty(num, np.uint32)
    other = np.empty(num, np.int32)
    for shift in (0, 11, 22):
        starts = np.zeros(2049, np.int64)
        for i in range(num):
            starts[((keys[i] >> np.uint32(shift)) & np.uint32(2047)) + 1] += 1
        for digit in range(2048):
            starts[digit + 1] += starts[digit]
        for i in range(num):
            digit = (keys[i] >> np.uint32(shift)) & np.uint32(2047)
            to = starts[digit]
            starts[digit] = to + 1
            other_keys[to] = keys[i]
            other[to] = index[i]
        keys, other_keys = other_keys, keys
        index, other = other, index
    return index


@jit.inline
def _tiles_in_row(r, row, tiles_x):
    """First and last + 1 tile of a row of tiles that the ellipse q = LIMIT / 2 enters.

    The right edge of the ellipse is a concave function of y, so over the row's band it is largest
    at the y nearest to that of the rightmost point; the left edge mirrors it.
    """
    top = f32(row * TILE) - r[Y]
    bottom = top + f32(TILE)
    a, b, c, limit = r[A], r[B], r[C], r[LIMIT]
    # y of the rightmost point, relative to the centre: reach_x * sxy / sxx, and sxy / sxx = -b / c
    tip = -b / c * r[REACH_X]
    at = min(max(tip, top), bottom)
    right = (-b * at + math.sqrt(max(b * b * at * at - a * (c * at * at - limit), f32(0.0)))) / a
    at = min(max(-tip, top), bottom)
    left = (-b * at - math.sqrt(max(b * b * at * at - a * (c * at * at - limit), f32(0.0)))) / a
    # a hundredth of a pixel for the rounding of centre and conic
    first = int(math.floor((r[X] + left - f32(0.01)) / f32(TILE)))
    last = int(math.floor((r[X] + right + f32(0.01)) / f32(TILE))) + 1
    return max(first, 0), min(last, tiles_x)


@jit.parallel
def _count_pairs(records, nearest, bands, tiles_x, counts):
    for worker in numba.prange(len(bands) - 1):
        first_row, last_row = bands[worker], bands[worker + 1]
        for i in range(len(nearest)):
            r = records[nearest[i]]
            low = int(math.floor((r[Y] - r[REACH_Y] - f32(0.01)) / f32(TILE)))
            high = int(math.floor((r[Y] + r[REACH_Y] + f32(0.01)) / f32(TILE))) + 1
            for row in range(max(low, first_row), min(high, last_row)):
                first, last = _tiles_in_row(r, row, tiles_x)
                for tile in range(row * tiles_x + first, row * tiles_x + last):
                    counts[tile] += 1


@jit.parallel
def _fill_pairs(records, nearest, bands, tiles_x, cursor, pairs):
    for worker in numba.prange(len(bands) - 1):
        first_row, last_row = bands[worker], bands[worker + 1]
        for i in range(len(nearest)):
            n = nearest[i]
            r = records[n]
            low = int(math.floor((r[Y] - r[REACH_Y] - f32(0.01)) / f32(TILE)))
            high = int(math.floor((r[Y] + r[REACH_Y] + f32(0.01)) / f32(TILE))) + 1
            for row in range(max(low, first_row), min(high, last_row)):
                first, last = _tiles_in_row(r, row, tiles_x)
                for tile in range(row * tiles_x + first, row * tiles_x + last):
                    pairs[cursor[tile]] = n
                    cursor[tile] += 1


@jit.parallel
def _blend(records, order, offsets, pairs, width, height, planes, slots, statistics):
    """Fills planes [tiles, 5, 256] (red, green, blue, transmittance, depth) and, for statistics,
    slots [pairs, 4]. A finished pixel keeps its transmittance with the sign turned."""
    tiles_x = (width + TILE - 1) // TILE
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        plane = planes[tile].reshape(5 * PIXELS)
        plane[:] = f32(0.0)
        left_of_all = plane[3 * PIXELS : 4 * PIXELS]
        _open_pixels(left_of_all, x0, y0, width, height)
        alphas, weights = np.empty(TILE, f32), np.empty(TILE, f32)
        reached = np.empty(TILE, f32)
        best = np.zeros(PIXELS, f32)
        winner = np.full(PIXELS, -1, np.int32)
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            cr, cg, cb, z = r[RED], r[GREEN], r[BLUE], r[DEPTH]
            pair = np.int32(p - start)
            total, largest, touched = f32(0.0), f32(0.0), f32(0.0)
            for row in range(_first_row(r, y0), _last_row(r, y0)):
                if alive[row] == 0 or not _reaches(r, x0, y0 + f32(row)):
                    continue
                at = row * TILE
                _row_alphas(r, x0, y0 + f32(row), alphas)
                most = _row_weights(left_of_all[at : at + TILE], alphas, weights, reached)
                red = plane[at : at + TILE]
                green = plane[at + PIXELS : at + PIXELS + TILE]
                blue = plane[at + 2 * PIXELS : at + 2 * PIXELS + TILE]
                depth = plane[at + 4 * PIXELS : at + 4 * PIXELS + TILE]
                for x in range(TILE):
                    red[x] += weights[x] * cr
                    green[x] += weights[x] * cg
                    blue[x] += weights[x] * cb
                    depth[x] += weights[x] * z
                if most <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                if statistics:
                    best_row, winner_row = best[at : at + TILE], winner[at : at + TILE]
                    for x in range(TILE):
                        w = weights[x]
                        total += w
                        largest = max(largest, reached[x])
                        touched += f32(1.0) if w > f32(0.0) else f32(0.0)
                    for x in range(TILE):
                        wins = weights[x] > best_row[x]
                        winner_row[x] = pair if wins else winner_row[x]
                    for x in range(TILE):
                        best_row[x] = max(best_row[x], weights[x])
            if statistics:
                slots[p, 0], slots[p, 1], slots[p, 2] = total, largest, touched
                slots[p, 3] = f32(0.0)
        if statistics:
            slots[end : offsets[tile + 1]] = f32(0.0)
            for x in range(PIXELS):
                if winner[x] >= 0:
                    slots[start + winner[x], 3] += f32(1.0)
        for x in range(PIXELS):
            left_of_all[x] = abs(left_of_all[x])


# The loops over a row below are short, alone and free of branches, on slices that start at 0:
# written into one loop, the compiler sinks work behind a branch and gives up on vectors.


@jit.inline
def _row_alphas(r, x0, y, alphas):
    """Alphas of a splat along a row of pixel centres (x0, y), (x0 + 1, y) ...; 0 below 1/255."""
    center, half_a, opacity = r[X], f32(0.5) * r[A], r[OPACITY]
    dy = r[Y] - y
    bend = r[B] * dy
    lift = f32(0.5) * r[C] * dy * dy
    for x in range(TILE):
        dx = center - (x0 + f32(x))
        q = dx * (half_a * dx + bend) + lift
        # beyond q = 5.6 alpha is under 1/255 whatever the opacity, and the polynomial is not exp
        t = min(max(q, f32(0.0)), f32(5.6)) * f32(-0.125)
        e = f32(1.0) + t * (E1 + t * (E2 + t * (E3 + t * (E4 + t * (E5 + t * E6)))))
        e *= e
        e *= e
        e *= e
        alpha = min(opacity * e, f32(MAX_ALPHA))
        alphas[x] = alpha if alpha >= f32(MIN_ALPHA) else f32(0.0)


@jit.inline
def _row_weights(left, alphas, weights, reached):
    """Blends a row: weights from alphas, and the transmittance `left` moved on. `reached` is the
    weight before the stop zeroes it. Returns the largest transmittance, which is not above 0 when
    every pixel is finished."""
    for x in range(TILE):
        t = left[x]
        present = max(t, f32(0.0))
        after = present * (f32(1.0) - alphas[x])
        w = alphas[x] * present
        stop = after <= f32(MIN_TRANSMITTANCE)
        reached[x] = w
        weights[x] = f32(0.0) if stop else w
        left[x] = -abs(t) if stop else after
    most = f32(-1.0)
    for x in range(TILE):
        most = max(most, left[x])
    return most


@jit.inline
def _open_pixels(left, x0, y0, width, height):
    """Transmittance 1 inside the picture; beyond it stays 0 and is never blended."""
    for row in range(TILE):
        for x in range(TILE):
            if x0 + f32(x) < width and y0 + f32(row) < height:
                left[row * TILE + x] = f32(1.0)


@jit.inline
def _first_row(r, y0):
    return max(int(math.ceil(r[Y] - r[REACH_Y] - y0 - f32(0.01))), 0)


@jit.inline
def _last_row(r, y0):
    return min(int(math.floor(r[Y] + r[REACH_Y] - y0 + f32(0.01))) + 1, TILE)


@jit.inline
def _reaches(r, x0, y):
    """Whether alpha may be 1/255 or more somewhere along the row that starts at (x0, y): q at the
    pixel nearest to where it is smallest, with room for rounding."""
    dy = r[Y] - y
    low = r[X] - x0 - f32(TILE - 1)
    dx = min(max(-r[SLANT] * dy, low), low + f32(TILE - 1))
    square = f32(0.5) * r[A] * dx * dx
    lift = f32(0.5) * r[C] * dy * dy
    q = square + r[B] * dx * dy + lift
    return q <= f32(0.5) * r[LIMIT] + f32(0.01) + f32(1e-6) * (square + lift)


@jit.inline
def _row_change(behind, weights, gains, color, change):
    """One channel: takes a splat's share out of what lies behind, and says how much the pixel
    would change without it."""
    for x in range(TILE):
        share = weights[x] * color
        rest = behind[x] - share
        behind[x] = rest
        change[x] = gains[x] * rest - share


@jit.parallel
def _pair_changes(records, order, offsets, pairs, width, height, planes, residuals, slots):
    """Fills slots [pairs, 1]: squared change of colour if the splat alone were missing from the
    tile; with residuals [tiles, 4, 256], slots [pairs, 6] (see `corrections`).

    Walks the lists again, now knowing the final picture, so what lies behind a splat is the
    picture minus what was blended so far.
    """
    tiles_x = (width + TILE - 1) // TILE
    correcting = len(residuals) > 0
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        behind = planes[tile].reshape(5 * PIXELS).copy()
        missing = residuals[tile if correcting else 0 : tile + 1 if correcting else 0]
        left = np.zeros(PIXELS, f32)
        _open_pixels(left, x0, y0, width, height)
        alphas, weights = np.empty(TILE, f32), np.empty(TILE, f32)
        gains, leaks = np.empty(TILE, f32), np.empty(TILE, f32)
        to_red, to_green, to_blue = np.empty(TILE, f32), np.empty(TILE, f32), np.empty(TILE, f32)
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            cr, cg, cb = r[RED], r[GREEN], r[BLUE]
            total, weight = f32(0.0), f32(0.0)
            sum_red, sum_green, sum_blue, along = f32(0.0), f32(0.0), f32(0.0), f32(0.0)
            for row in range(_first_row(r, y0), _last_row(r, y0)):
                if alive[row] == 0 or not _reaches(r, x0, y0 + f32(row)):
                    continue
                at = row * TILE
                _row_alphas(r, x0, y0 + f32(row), alphas)
                if _row_weights(left[at : at + TILE], alphas, weights, gains) <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                last = behind[at + 3 * PIXELS : at + 3 * PIXELS + TILE]
                for x in range(TILE):
                    # 0 where nothing was blended, so that nothing changes there
                    gain = alphas[x] / (f32(1.0) - alphas[x])
                    gains[x] = gain if weights[x] > f32(0.0) else f32(0.0)
                for x in range(TILE):
                    leaks[x] = gains[x] * last[x]
                _row_change(behind[at : at + TILE], weights, gains, cr, to_red)
                _row_change(behind[at + PIXELS : at + PIXELS + TILE], weights, gains, cg, to_green)
                _row_change(
                    behind[at + 2 * PIXELS : at + 2 * PIXELS + TILE], weights, gains, cb, to_blue
                )
                for x in range(TILE):
                    dr, dg, db, leak = to_red[x], to_green[x], to_blue[x], leaks[x]
                    # the mean over black and white of the squared change
                    total += dr * dr + dg * dg + db * db + leak * (dr + dg + db + f32(1.5) * leak)
                if correcting:
                    miss = missing[0].reshape(4 * PIXELS)
                    miss_red = miss[at : at + TILE]
                    miss_green = miss[at + PIXELS : at + PIXELS + TILE]
                    miss_blue = miss[at + 2 * PIXELS : at + 2 * PIXELS + TILE]
                    miss_left = miss[at + 3 * PIXELS : at + 3 * PIXELS + TILE]
                    for x in range(TILE):
                        half = f32(0.5) * miss_left[x]
                        mr, mg, mb = miss_red[x], miss_green[x], miss_blue[x]
                        weight += weights[x]
                        sum_red += weights[x] * (mr + half)
                        sum_green += weights[x] * (mg + half)
                        sum_blue += weights[x] * (mb + half)
                        along += to_red[x] * (mr + half) + to_green[x] * (mg + half)
                        along += to_blue[x] * (mb + half)
                        along += leaks[x] * (f32(0.5) * (mr + mg + mb) + f32(3.0) * half)
            slots[p, 0] = total
            if correcting:
                slots[p, 1], slots[p, 2] = along, weight
                slots[p, 3], slots[p, 4], slots[p, 5] = sum_red, sum_green, sum_blue
        slots[end : offsets[tile + 1]] = f32(0.0)


@jit.serial
def _sum_slots(pairs, slots, totals):
    for p in range(slots.shape[0]):
        n = pairs[p]
        totals[n, 0] += slots[p, 0]
        totals[n, 1] = max(totals[n, 1], slots[p, 1])
        totals[n, 2] += slots[p, 2]
        totals[n, 3] += slots[p, 3]


@jit.serial
def _sum_changes(pairs, slots, totals):
    for p in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            totals[pairs[p], k] += slots[p, k]


@jit.parallel
def _residuals(planes, colors, alphas, residuals):
    """Wanted minus present: colour over black, and transmittance."""
    height, width = alphas.shape
    tiles_x = (width + TILE - 1) // TILE
    for y in numba.prange(height):
        first = (y // TILE) * tiles_x
        inside = (y % TILE) * TILE
        for x in range(width):
            plane, out = planes[first + x // TILE], residuals[first + x // TILE]
            at = inside + x % TILE
            for k in range(3):
                out[k, at] = colors[y, x, k] - plane[k, at]
            out[3, at] = f32(1.0) - alphas[y, x] - plane[3, at]


@jit.parallel
def _untile(planes, background, colors, alphas, depths):
    height, width = alphas.shape
    tiles_x = (width + TILE - 1) // TILE
    for y in numba.prange(height):
        first = (y // TILE) * tiles_x
        inside = (y % TILE) * TILE
        for x in range(width):
            plane = planes[first + x // TILE]
            at = inside + x % TILE
            left = plane[3, at]
            colors[y, x, 0] = plane[0, at] + left * background[0]
            colors[y, x, 1] = plane[1, at] + left * background[1]
            colors[y, x, 2] = plane[2, at] + left * background[2]
            alphas[y, x] = f32(1.0) - left
            depths[y, x] = plane[4, at]
