"""Gradients of the surfel rasterizer on the CPU: the lists of the forward pass, walked once more.

A pixel needs one number a surfel, u = the gradient of the loss by its weight as if weights were
free; with B the sum of w u over the surfels behind and what the background adds, the gradient by
alpha is T u - B / (1 - alpha). The total of w u follows from the finished pictures, so B is the
total minus what was passed, and the walk goes front to back like blending.

The distortion of a pixel is 2 sum_{j<i} w_i w_j (z_i - z_j). With A, D the totals of w and w z, and
a, d their sums before i, its gradients by w_i and z_i are 2 (z_i (2 a - A) + D - 2 d) and
2 w_i (2 a + w_i - A); it is of second degree in the weights, so its share of the total is twice it.

Per (tile, surfel) pair 21 sums over pixels go into a slot (23 with absolute values); slots are
added per surfel in list order; a last pass takes them through the planes' intersection, projection,
rotation and harmonics. No atomics: the same result with any number of threads. Floor: the pairs'
rows once more, 140 float operations a pixel against 80 in the forward.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats.cpu import _deal
from gencompress_kernels.rasterize_splats.cpu_backward import (
    _quaternion_slope,
    _sum_by_splat,
    _view_slope,
)
from gencompress_kernels.rasterize_splats.cpu_harmonics import sh_backward
from gencompress_kernels.rasterize_surfels.cpu import (
    ALPHAS,
    DEPTHS,
    HIT,
    INVERSE,
    LEFT,
    SCRATCH,
    _open_rows,
    _row_hits,
    _row_range,
)
from gencompress_kernels.rasterize_surfels.cpu_project import (
    D0,
    DX,
    DY,
    FACTOR,
    LOW_X,
    LOW_Y,
    NORMAL_X,
    NORMAL_Y,
    NORMAL_Z,
    OPACITY,
    RED,
    TILE,
    UX,
    UY,
    VX,
    VY,
    X,
    Y,
    camera_place,
    f32,
)
from gencompress_kernels.rasterize_surfels.reference import (
    MAX_ALPHA,
    MEDIAN,
    MIN_TRANSMITTANCE,
    Gradients,
    Pictures,
    Shot,
)

# Columns of a slot. The first 17 and the absolute ones are summed over rows a lane at a time; the
# products with the lane's dx follow from the lanes. P, Q, D stand for the gradients by u * below,
# v * below and below; MASS for alpha times that by alpha; LOW for that by q where the low-pass won.
G_RED, G_GREEN, G_BLUE, G_NORMAL, MASS = 0, 1, 2, 3, 6
P, P_DY, Q, Q_DY, D, D_DY, G_PLANE, G_DEPTH, LOW, LOW_DY = range(7, 17)
P_DX, Q_DX, D_DX, LOW_DX, ABS_X, ABS_Y = range(17, 23)
SUMS, SUMS_ABSOLUTE = 21, 23
# Where in a row of a tile its parts start, after the gradients of colour and LEFT: the total of
# w u, then what only surfaces need; and in the scratch, after the parts of the forward.
BEHIND, BY_DEPTH, BY_MEDIAN, BY_NORMAL, BY_SPREAD, PASSED, PASSED_FAR = (
    TILE * k for k in (4, 5, 6, 7, 10, 11, 12)
)
PLANES = 13
SPAN = PLANES * TILE
MASSES, BY_Z, P_ROW, Q_ROW, D_ROW, LOW_ROW = (TILE * k for k in range(6, 12))
BLOCK = 256  # surfels a task takes in the last pass


def backward(
    shot: Shot,
    background: Tensor,
    drawn: Pictures,
    incoming: Pictures,
    saved: list[Tensor],
    absolute: bool,
    poses: bool,
) -> Gradients:
    """float32. Gradients as the reference, from the records, offsets and pairs of the forward.
    An empty tensor in `incoming` is a gradient of 0."""
    records, offsets, pairs = (tensor.numpy() for tensor in saved)
    width, height = shot.width, shot.height
    surface = any(slopes.numel() for slopes in incoming[2:])
    order = _deal(np.diff(offsets))
    planes = np.zeros((len(order), TILE, PLANES, TILE), f32)
    slopes = [s if s.numel() else torch.zeros_like(d) for s, d in zip(incoming, drawn, strict=True)]
    arrays = [tensor.numpy() for tensor in (*drawn, *slopes)]
    _tile_gradients(*arrays[:3], *arrays[4:], planes)
    slots = np.empty((len(pairs), SUMS_ABSOLUTE if absolute else SUMS), f32)
    _blend_backward(records, order, offsets, pairs, width, height, planes, slots, surface, absolute)
    sums = np.zeros((len(records), SUMS_ABSOLUTE), f32)
    cuts = np.linspace(0, len(records), numba.get_num_threads() + 1).astype(np.int64)
    _sum_by_splat(pairs, slots, cuts, sums)
    surfels = [tensor.numpy() for tensor in shot[:7]]
    outputs = [np.zeros(tensor.shape, f32) for tensor in surfels[:5]]
    probe = np.zeros((len(records), 4), f32)
    pose = np.zeros((len(records) if poses else 0, 15), f32)
    _project_backward(*surfels, camera_place(shot.viewmat), records, sums, *outputs, probe, pose)
    view = _view_slope(shot.viewmat, pose)
    return Gradients(*(torch.from_numpy(a) for a in (*outputs, view, probe)))


@jit.parallel
def _tile_gradients(
    colors, alphas, depths, normals, distortions, by_color, by_alpha, by_depth, by_median,
    by_normal, by_spread, planes,
):  # fmt: skip
    """Fills planes [tiles, 16 rows, 13, 16], but for the transmittance."""
    height, width = alphas.shape
    tiles_x = (width + TILE - 1) // TILE
    two = f32(2.0)
    for y in numba.prange(height):
        first = (y // TILE) * tiles_x
        for x in range(width):
            out = planes[first + x // TILE, y % TILE].reshape(SPAN)
            at = x % TILE
            # the colours hold the background, times the transmittance that alpha hides
            total = by_depth[y, x] * depths[y, x] - by_alpha[y, x] * (f32(1.0) - alphas[y, x])
            for k in range(3):
                out[k * TILE + at] = by_color[y, x, k]
                out[BY_NORMAL + k * TILE + at] = by_normal[y, x, k]
                total += by_color[y, x, k] * colors[y, x, k]
                total += by_normal[y, x, k] * normals[y, x, k]
            out[BEHIND + at] = total + two * by_spread[y, x] * distortions[y, x]
            out[BY_DEPTH + at] = by_depth[y, x]
            out[BY_MEDIAN + at] = by_median[y, x]
            out[BY_SPREAD + at] = two * by_spread[y, x]
            out[PASSED + at] = -alphas[y, x]
            out[PASSED_FAR + at] = -depths[y, x]


@jit.inline
def _row_mass(row, s, lanes, r, surface):
    """Alpha times the gradient by alpha, and the gradient by the depth of the hit, along a row;
    adds up the weighted gradients of colour and normal. Returns the sum of
    transmittances."""
    red, green, blue = r[RED], r[RED + 1], r[RED + 2]
    nx, ny, nz = r[NORMAL_X], r[NORMAL_Y], r[NORMAL_Z]
    open_sum = f32(0.0)
    for x in range(TILE):
        left, alpha = row[LEFT + x], s[ALPHAS + x]
        before = max(left, f32(0.0))
        after = before * (f32(1.0) - alpha)
        stop = after <= f32(MIN_TRANSMITTANCE)
        w = f32(0.0) if stop else alpha * before
        left = -abs(left) if stop else after
        row[LEFT + x] = left
        by_red, by_green, by_blue = row[x], row[TILE + x], row[2 * TILE + x]
        lanes[G_RED * TILE + x] += w * by_red
        lanes[(G_RED + 1) * TILE + x] += w * by_green
        lanes[(G_RED + 2) * TILE + x] += w * by_blue
        u = by_red * red + by_green * green + by_blue * blue
        if surface:
            z, by_depth, by_spread = s[DEPTHS + x], row[BY_DEPTH + x], row[BY_SPREAD + x]
            passed, far = row[PASSED + x], row[PASSED_FAR + x]
            by_x, by_y = row[BY_NORMAL + x], row[BY_NORMAL + TILE + x]
            by_z = row[BY_NORMAL + 2 * TILE + x]
            u += by_x * nx + by_y * ny + by_z * nz + by_depth * z
            u += by_spread * (z * passed - far)
            lanes[G_NORMAL * TILE + x] += w * by_x
            lanes[(G_NORMAL + 1) * TILE + x] += w * by_y
            lanes[(G_NORMAL + 2) * TILE + x] += w * by_z
            crosses = (before > f32(MEDIAN)) & (after <= f32(MEDIAN)) & (w > f32(0.0))
            median = row[BY_MEDIAN + x] if crosses else f32(0.0)
            s[BY_Z + x] = w * (by_depth + by_spread * (passed + w)) + median
            row[PASSED + x] = passed + f32(2.0) * w
            row[PASSED_FAR + x] = far + f32(2.0) * w * z
        share = w * u
        behind = row[BEHIND + x] - share
        row[BEHIND + x] = behind
        mass = share - alpha / (f32(1.0) - alpha) * behind
        # no gradient where nothing was blended, nor where alpha is held at its limit
        moves = (w > f32(0.0)) & (alpha < f32(MAX_ALPHA))
        s[MASSES + x] = mass if moves else f32(0.0)
        open_sum += f32(0.0) if stop else after
    return open_sum


@jit.inline
def _row_plane(s, lanes, r, dx0, dy, ly, surface):
    """Adds up the gradients by u * below, v * below, below and z * det(J) where the plane is hit,
    and by q and the z of the mean elsewhere."""
    ux, vx, u0, v0 = r[UX], r[VX], r[UY] * dy, r[VY] * dy
    for x in range(TILE):
        dx = dx0 + f32(x)
        mass, hit, inverse = s[MASSES + x], s[HIT + x], s[INVERSE + x]
        u, v = (ux * dx + u0) * inverse, (vx * dx + v0) * inverse
        k = mass * hit * inverse
        p, q, low = -k * u, -k * v, mass * (hit - f32(1.0))
        d = k * (u * u + v * v)
        if surface:
            by_z = s[BY_Z + x]
            by_plane = by_z * hit * inverse
            d -= by_plane * s[DEPTHS + x]
            lanes[G_PLANE * TILE + x] += by_plane
            lanes[G_DEPTH * TILE + x] += by_z * (f32(1.0) - hit)
        s[P_ROW + x], s[Q_ROW + x], s[D_ROW + x], s[LOW_ROW + x] = p, q, d, low
        lanes[MASS * TILE + x] += mass
        lanes[P * TILE + x] += p
        lanes[P_DY * TILE + x] += p * dy
        lanes[Q * TILE + x] += q
        lanes[Q_DY * TILE + x] += q * dy
        lanes[D * TILE + x] += d
        lanes[D_DY * TILE + x] += d * dy
        lanes[LOW * TILE + x] += low
        lanes[LOW_DY * TILE + x] += low * ly


@jit.inline
def _row_absolute(s, lanes, r, lx0, ly):
    """Adds up the absolute gradients by a shift of the footprint."""
    ax, bx, cx, ay, by, cy = r[UX], r[VX], r[DX], r[UY], r[VY], r[DY]
    for x in range(TILE):
        p, q, d, low = s[P_ROW + x], s[Q_ROW + x], s[D_ROW + x], f32(2.0) * s[LOW_ROW + x]
        lanes[ABS_X * TILE + x] += abs(ax * p + bx * q + cx * d + low * (lx0 + f32(x)))
        lanes[ABS_Y * TILE + x] += abs(ay * p + by * q + cy * d + low * ly)


@jit.inline
def _moments(lanes, dx0, lx0):
    """The sums that have a factor dx, which is one number a lane."""
    for x in range(TILE):
        dx = dx0 + f32(x)
        lanes[P_DX * TILE + x] = lanes[P * TILE + x] * dx
        lanes[Q_DX * TILE + x] = lanes[Q * TILE + x] * dx
        lanes[D_DX * TILE + x] = lanes[D * TILE + x] * dx
        lanes[LOW_DX * TILE + x] = lanes[LOW * TILE + x] * (lx0 + f32(x))


@jit.parallel
def _blend_backward(
    records, order, offsets, pairs, width, height, planes, slots, surface, absolute
):
    """Fills slots [pairs, 21 or 23]; see the columns above."""
    tiles_x = (width + TILE - 1) // TILE
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        plane = planes[tile].reshape(TILE * SPAN)
        _open_rows(plane, x0, y0, width, height, SPAN)
        s = np.zeros(SCRATCH, f32)
        lanes = np.empty(SUMS_ABSOLUTE * TILE, f32)
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            lanes[:] = f32(0.0)
            dx0, lx0 = x0 - r[X], x0 - r[LOW_X]
            first, last = _row_range(r, y0)
            for row in range(first, last):
                if alive[row] == 0:
                    continue
                y = y0 + f32(row)
                dy, ly = y - r[Y], y - r[LOW_Y]
                if _row_hits(r, x0, y, s) == f32(0.0):
                    continue
                part = plane[row * SPAN : (row + 1) * SPAN]
                if surface:
                    most = _row_mass(part, s, lanes, r, True)
                    _row_plane(s, lanes, r, dx0, dy, ly, True)
                else:
                    most = _row_mass(part, s, lanes, r, False)
                    _row_plane(s, lanes, r, dx0, dy, ly, False)
                if most <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                if absolute:
                    _row_absolute(s, lanes, r, lx0, ly)
            _moments(lanes, dx0, lx0)
            for k in range(slots.shape[1]):
                total = f32(0.0)
                for x in range(TILE):
                    total += lanes[k * TILE + x]
                slots[p, k] = total
        slots[end : offsets[tile + 1]] = f32(0.0)


@jit.parallel
def _project_backward(
    means, quats, scales, opacities, sh, view, lens, position, records, sums, d_means, d_quats,
    d_scales, d_opacities, d_sh, probe, pose,
):  # fmt: skip
    """Takes the sums through the intersection, projection, rotation and harmonics. `pose` collects
    per surfel the gradient by the rows of [R | t], then that by the camera's place."""
    fx, fy = lens[0, 0], lens[1, 1]
    one, two = f32(1.0), f32(2.0)
    num, bands = means.shape[0], sh.shape[1]
    for block in numba.prange((num + BLOCK - 1) // BLOCK):
        basis, slope, color = np.zeros(16, f32), np.empty(16, f32), np.empty(3, f32)
        # axes in the world and seen by the camera, gradients of both: [coordinate, axis]
        turn, seen = np.empty((3, 3), f32), np.empty((3, 3), f32)
        d_turn, d_seen = np.empty((3, 3), f32), np.empty((3, 3), f32)
        for n in range(block * BLOCK, min((block + 1) * BLOCK, num)):
            r, s = records[n], sums[n]
            if r[OPACITY] <= f32(0.0):
                continue
            mx, my, mz = means[n, 0], means[n, 1], means[n, 2]
            x = view[0, 0] * mx + view[0, 1] * my + view[0, 2] * mz + view[0, 3]
            y = view[1, 0] * mx + view[1, 1] * my + view[1, 2] * mz + view[1, 3]
            z = view[2, 0] * mx + view[2, 1] * my + view[2, 2] * mz + view[2, 3]
            iz = one / z
            sx, sy = x * iz, y * iz
            qw, qx, qy, qz = quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3]
            norm = max(math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz), f32(1e-12))
            qw, qx, qy, qz = qw / norm, qx / norm, qy / norm, qz / norm
            turn[0, 0] = one - two * (qy * qy + qz * qz)
            turn[1, 0] = two * (qx * qy + qw * qz)
            turn[2, 0] = two * (qx * qz - qw * qy)
            turn[0, 1] = two * (qx * qy - qw * qz)
            turn[1, 1] = one - two * (qx * qx + qz * qz)
            turn[2, 1] = two * (qy * qz + qw * qx)
            turn[0, 2] = two * (qx * qz + qw * qy)
            turn[1, 2] = two * (qy * qz - qw * qx)
            turn[2, 2] = one - two * (qx * qx + qy * qy)
            for i in range(3):
                for k in range(3):
                    seen[i, k] = (
                        view[i, 0] * turn[0, k] + view[i, 1] * turn[1, k] + view[i, 2] * turn[2, k]
                    )
            su, sv = scales[n, 0] * iz, scales[n, 1] * iz
            mu, mv = su * seen[2, 0], sv * seen[2, 1]
            xu, xv = fx * (su * seen[0, 0] - sx * mu), fx * (sv * seen[0, 1] - sx * mv)
            yu, yv = fy * (su * seen[1, 0] - sy * mu), fy * (sv * seen[1, 1] - sy * mv)

            d_opacities[n] = s[MASS] / r[OPACITY]
            g_low_x, g_low_y = -two * s[LOW_DX], -two * s[LOW_DY]
            g_x = g_low_x - (r[UX] * s[P] + r[VX] * s[Q] + r[DX] * s[D])
            g_y = g_low_y - (r[UY] * s[P] + r[VY] * s[Q] + r[DY] * s[D])
            probe[n, 0], probe[n, 1], probe[n, 2], probe[n, 3] = g_x, g_y, s[ABS_X], s[ABS_Y]

            # Jacobian, slant and z: from the six coefficients, whose common factor is constant
            factor = r[FACTOR]
            g_det = factor * (s[D] + z * s[G_PLANE])
            g_dx, g_dy = -factor * s[D_DX], -factor * s[D_DY]
            g_xu = factor * s[Q_DY] + g_det * yv + g_dy * mv
            g_xv = -factor * s[P_DY] - g_det * yu - g_dy * mu
            g_yu = -factor * s[Q_DX] - g_det * xv - g_dx * mv
            g_yv = factor * s[P_DX] + g_det * xu + g_dx * mu
            g_mu = g_dx * yv - g_dy * xv
            g_mv = g_dy * xu - g_dx * yu
            t_z = r[D0] * s[G_PLANE] + s[G_DEPTH]

            # the middle of the low-pass: the projected mean - J m / (1 - m^2)
            size = mu * mu + mv * mv
            if size < one:
                h = one / (one - size)
                bend = two * h * h * (
                    g_low_x * (xu * mu + xv * mv) + g_low_y * (yu * mu + yv * mv)
                )  # fmt: skip
                g_xu -= g_low_x * mu * h
                g_xv -= g_low_x * mv * h
                g_yu -= g_low_y * mu * h
                g_yv -= g_low_y * mv * h
                g_mu -= h * (g_low_x * xu + g_low_y * yu) + bend * mu
                g_mv -= h * (g_low_x * xv + g_low_y * yv) + bend * mv

            # J = f (tangent_xy - slope m), slope = xy / z, all of them over z
            a_u, a_v, b_u, b_v = fx * g_xu, fx * g_xv, fy * g_yu, fy * g_yv
            g_sx = fx * g_x - (a_u * mu + a_v * mv)
            g_sy = fy * g_y - (b_u * mu + b_v * mv)
            g_mu -= a_u * sx + b_u * sy
            g_mv -= a_v * sx + b_v * sy
            along_u = a_u * seen[0, 0] + b_u * seen[1, 0] + g_mu * seen[2, 0]
            along_v = a_v * seen[0, 1] + b_v * seen[1, 1] + g_mv * seen[2, 1]
            d_scales[n, 0], d_scales[n, 1] = along_u * iz, along_v * iz
            d_seen[0, 0], d_seen[1, 0], d_seen[2, 0] = su * a_u, su * b_u, su * g_mu
            d_seen[0, 1], d_seen[1, 1], d_seen[2, 1] = sv * a_v, sv * b_v, sv * g_mv
            facing = r[NORMAL_X] * seen[0, 2] + r[NORMAL_Y] * seen[1, 2] + r[NORMAL_Z] * seen[2, 2]
            side = one if facing > f32(0.0) else -one
            for k in range(3):
                d_seen[k, 2] = side * s[G_NORMAL + k]
            t_x, t_y = g_sx * iz, g_sy * iz
            t_z -= (g_sx * sx + g_sy * sy + su * along_u + sv * along_v) * iz
            for j in range(3):
                for k in range(3):
                    d_turn[j, k] = (
                        view[0, j] * d_seen[0, k]
                        + view[1, j] * d_seen[1, k]
                        + view[2, j] * d_seen[2, k]
                    )
            _quaternion_slope(d_turn, qw, qx, qy, qz, norm, d_quats[n])

            # colour: harmonics, and the direction they are seen along
            for k in range(3):
                color[k] = s[G_RED + k] if r[RED + k] > f32(0.0) else f32(0.0)
            w_x, w_y, w_z = sh_backward(
                sh[n], color, mx - position[0], my - position[1], mz - position[2], bands, basis,
                slope, d_sh[n],
            )  # fmt: skip
            d_means[n, 0] = view[0, 0] * t_x + view[1, 0] * t_y + view[2, 0] * t_z + w_x
            d_means[n, 1] = view[0, 1] * t_x + view[1, 1] * t_y + view[2, 1] * t_z + w_y
            d_means[n, 2] = view[0, 2] * t_x + view[1, 2] * t_y + view[2, 2] * t_z + w_z
            if len(pose):
                g = pose[n]
                for k in range(3):
                    g[k], g[4 + k], g[8 + k] = (
                        t_x * means[n, k],
                        t_y * means[n, k],
                        t_z * means[n, k],
                    )
                    for j in range(3):
                        g[k] += d_seen[0, j] * turn[k, j]
                        g[4 + k] += d_seen[1, j] * turn[k, j]
                        g[8 + k] += d_seen[2, j] * turn[k, j]
                g[3], g[7], g[11] = t_x, t_y, t_z
                g[12], g[13], g[14] = -w_x, -w_y, -w_z
