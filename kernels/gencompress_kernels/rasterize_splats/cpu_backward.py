"""Gradients of the splat rasterizer on the CPU: the lists of the forward pass, walked once more.

A pixel needs one number a splat: u = <gradient of the colour, colour> + gradient of the depth * z.
With B the sum of w u over the splats behind and what the background adds, the gradient by alpha is
T u - B / (1 - alpha). The total of w u follows from the finished picture, so B is the total minus
what was passed, and the walk goes front to back, like blending, with exactly its transmittances.
Per (tile, splat) pair ten sums over pixels (moments of the gradient by q, weighted gradients of
colour and depth) go into a slot; slots are added per splat in list order; a last pass takes them
through conic, projection, rotation and harmonics. No atomics: the same result with any number of
threads. Floor: the pairs' pixels once more, 60 float operations each, against 25 in the forward.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats import cpu
from gencompress_kernels.rasterize_splats.cpu import (
    BLUE,
    DEPTH,
    GREEN,
    OPACITY,
    PIXELS,
    RED,
    TILE,
    A,
    B,
    C,
    X,
    f32,
)
from gencompress_kernels.rasterize_splats.cpu_harmonics import sh_backward
from gencompress_kernels.rasterize_splats.reference import (
    BLUR,
    FRUSTUM_MARGIN,
    MAX_ALPHA,
    MIN_COMPENSATION,
    Gradients,
    Incoming,
    Shot,
)

# columns of a slot: weighted colour and depth gradients, moments of the gradient by q over the
# offsets dx, dy from pixel to centre, and the absolute gradients of the centre
G_RED, G_GREEN, G_BLUE, G_DEPTH, M, MX, MY, MXX, MXY, MYY, ABS_X, ABS_Y = range(12)
SUMS, SUMS_ABSOLUTE = 10, 12
# the lanes of a row: the sums above, then what the row is computed from
ALPHAS, WEIGHTS, SLOPES, ACROSS, LANES = (TILE * k for k in range(SUMS_ABSOLUTE, SUMS_ABSOLUTE + 5))
BLOCK = 256  # splats a task takes in the last pass


def backward(
    shot: Shot, incoming: Incoming, saved: list[Tensor], absolute: bool, poses: bool
) -> Gradients:
    """float32. Gradients as the reference, from the records, offsets and pairs of the forward."""
    records, offsets, pairs = (tensor.numpy() for tensor in saved)
    width, height = shot.width, shot.height
    order = cpu._deal(np.diff(offsets))
    planes = np.zeros((len(order), 5, PIXELS), f32)
    _tile_gradients(*(tensor.numpy() for tensor in incoming[:6]), planes)
    slots = np.empty((len(pairs), SUMS_ABSOLUTE if absolute else SUMS), f32)
    _blend_backward(records, order, offsets, pairs, width, height, planes, slots, absolute)
    sums = np.zeros((len(records), SUMS_ABSOLUTE), f32)
    cuts = np.linspace(0, len(records), numba.get_num_threads() + 1).astype(np.int64)
    _sum_by_splat(pairs, slots, cuts, sums)
    position = cpu.camera_place(shot.viewmat)
    splats = [tensor.numpy() for tensor in shot[:7]]
    outputs = [np.zeros(tensor.shape, f32) for tensor in splats[:5]]
    probe = np.zeros((len(records), 4), f32)
    pose = np.zeros((len(records) if poses else 0, 15), f32)
    _project_backward(
        *splats, position, width, height, shot.antialiased, records, sums, *outputs, probe, pose
    )
    view = _view_slope(shot.viewmat, pose)
    return Gradients(*(torch.from_numpy(a) for a in (*outputs, view, probe)))


def _view_slope(viewmat: Tensor, pose: np.ndarray) -> np.ndarray:
    """float32 [4, 4]: the gradient by the view matrix from what `_project_backward` collected a
    splat, [N, 15]; 0 where N is 0."""
    total = pose.sum(0, dtype=np.float64)
    view = np.zeros((4, 4), f32)
    view[:3, :4] = total[:12].reshape(3, 4)
    # the camera's place -R^T t turns the harmonics
    turn, move = viewmat[:3, :3].double().numpy(), viewmat[:3, 3].double().numpy()
    view[:3, :3] -= np.outer(move, total[12:])
    view[:3, 3] -= turn @ total[12:]
    return view


@jit.parallel
def _tile_gradients(colors, alphas, depths, for_colors, for_alphas, for_depths, planes):
    """Fills planes [tiles, 5, 256]: gradients of red, green, blue, depth, and the total of w u."""
    height, width = alphas.shape
    tiles_x = (width + TILE - 1) // TILE
    for y in numba.prange(height):
        first = (y // TILE) * tiles_x
        inside = (y % TILE) * TILE
        for x in range(width):
            out = planes[first + x // TILE]
            at = inside + x % TILE
            red, green, blue = for_colors[y, x, 0], for_colors[y, x, 1], for_colors[y, x, 2]
            out[0, at], out[1, at], out[2, at], out[3, at] = red, green, blue, for_depths[y, x]
            # the colours hold the background, times the transmittance that alpha hides
            out[4, at] = (
                red * colors[y, x, 0]
                + green * colors[y, x, 1]
                + blue * colors[y, x, 2]
                + for_depths[y, x] * depths[y, x]
                - for_alphas[y, x] * (f32(1.0) - alphas[y, x])
            )


# The loops below run over one array at constant distances: between arrays the compiler could not
# rule out an overlap, and where a loop is short it then gives up on vectors.


@jit.inline
def _row_slopes(plane, r, alphas, weights, slopes):
    """The gradient by q along a row; takes the splat's share out of what lies behind."""
    cr, cg, cb, z = r[RED], r[GREEN], r[BLUE], r[DEPTH]
    for x in range(TILE):
        share = weights[x] * (
            plane[x] * cr
            + plane[PIXELS + x] * cg
            + plane[2 * PIXELS + x] * cb
            + plane[3 * PIXELS + x] * z
        )
        rest = plane[4 * PIXELS + x] - share
        plane[4 * PIXELS + x] = rest
        slope = alphas[x] / (f32(1.0) - alphas[x]) * rest - share
        # no gradient where nothing was blended, nor where alpha is held at its limit
        moves = (weights[x] > f32(0.0)) & (alphas[x] < f32(MAX_ALPHA))
        slopes[x] = slope if moves else f32(0.0)


@jit.inline
def _add_row(lanes, plane, dy):
    """Adds a row to the ten sums of each lane."""
    for x in range(TILE):
        w, s, d = lanes[WEIGHTS + x], lanes[SLOPES + x], lanes[ACROSS + x]
        sd = s * d
        lanes[G_RED * TILE + x] += w * plane[x]
        lanes[G_GREEN * TILE + x] += w * plane[PIXELS + x]
        lanes[G_BLUE * TILE + x] += w * plane[2 * PIXELS + x]
        lanes[G_DEPTH * TILE + x] += w * plane[3 * PIXELS + x]
        lanes[M * TILE + x] += s
        lanes[MX * TILE + x] += sd
        lanes[MY * TILE + x] += dy * s
        lanes[MXX * TILE + x] += d * sd
        lanes[MXY * TILE + x] += dy * sd
        lanes[MYY * TILE + x] += dy * dy * s


@jit.inline
def _add_absolute(lanes, r, dy):
    """Adds a row to the absolute gradients by the centre."""
    a, b, c = r[A], r[B], r[C]
    for x in range(TILE):
        s, d = lanes[SLOPES + x], lanes[ACROSS + x]
        lanes[ABS_X * TILE + x] += abs(s * (a * d + b * dy))
        lanes[ABS_Y * TILE + x] += abs(s * (b * d + c * dy))


@jit.parallel
def _blend_backward(records, order, offsets, pairs, width, height, planes, slots, absolute):
    """Fills slots [pairs, 10 or 12]; see the columns above."""
    tiles_x = (width + TILE - 1) // TILE
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        plane = planes[tile].reshape(5 * PIXELS)
        left = np.zeros(PIXELS, f32)
        cpu._open_pixels(left, x0, y0, width, height)
        lanes = np.empty(LANES, f32)
        sums = lanes[: SUMS_ABSOLUTE * TILE]
        alphas, weights = lanes[ALPHAS : ALPHAS + TILE], lanes[WEIGHTS : WEIGHTS + TILE]
        slopes, across = lanes[SLOPES : SLOPES + TILE], lanes[ACROSS : ACROSS + TILE]
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            sums[:] = f32(0.0)
            for x in range(TILE):
                across[x] = r[X] - (x0 + f32(x))
            for row in range(cpu._first_row(r, y0), cpu._last_row(r, y0)):
                y = y0 + f32(row)
                if alive[row] == 0 or not cpu._reaches(r, x0, y):
                    continue
                at = row * TILE
                cpu._row_alphas(r, x0, y, alphas)
                if cpu._row_weights(left[at : at + TILE], alphas, weights, slopes) <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                _row_slopes(plane[at:], r, alphas, weights, slopes)
                dy = r[cpu.Y] - y
                if absolute:
                    _add_absolute(lanes, r, dy)
                _add_row(lanes, plane[at:], dy)
            for k in range(slots.shape[1]):
                total = f32(0.0)
                for x in range(TILE):
                    total += lanes[k * TILE + x]
                slots[p, k] = total
        slots[end : offsets[tile + 1]] = f32(0.0)


@jit.parallel
def _sum_by_splat(pairs, slots, cuts, sums):
    """A task owns a range of splats and adds their slots in list order."""
    width = slots.shape[1]
    for task in numba.prange(len(cuts) - 1):
        low, high = cuts[task], cuts[task + 1]
        for p in range(len(pairs)):
            n = pairs[p]
            if low <= n < high:
                for k in range(width):
                    sums[n, k] += slots[p, k]


@jit.parallel
def _project_backward(
    means, quats, scales, opacities, sh, view, lens, position, width, height, antialiased,
    records, sums, d_means, d_quats, d_scales, d_opacities, d_sh, probe, pose,
):  # fmt: skip
    """Takes the sums through conic, blur, projection and harmonics. `pose` collects per splat the
    gradient by the rows of [R | t], then that by the camera's place."""
    fx, fy, cx, cy = lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2]
    margin_x = f32(FRUSTUM_MARGIN) * f32(0.5) * width / fx
    margin_y = f32(FRUSTUM_MARGIN) * f32(0.5) * height / fy
    low_x, high_x = -cx / fx - margin_x, (width - cx) / fx + margin_x
    low_y, high_y = -cy / fy - margin_y, (height - cy) / fy + margin_y
    one, two, half = f32(1.0), f32(2.0), f32(0.5)
    num, bands = means.shape[0], sh.shape[1]
    for block in numba.prange((num + BLOCK - 1) // BLOCK):
        basis, slope = np.zeros(16, f32), np.empty(16, f32)
        color, turn = np.empty(3, f32), np.empty((3, 3), f32)
        du, dv, d_axes = np.empty(3, f32), np.empty(3, f32), np.empty((3, 3), f32)
        for n in range(block * BLOCK, min((block + 1) * BLOCK, num)):
            r, s = records[n], sums[n]
            if r[OPACITY] <= f32(0.0):
                continue
            # centre, conic and opacity on the screen, from the moments
            a, b, c = r[A], r[B], r[C]
            g_x, g_y = a * s[MX] + b * s[MY], b * s[MX] + c * s[MY]
            probe[n, 0], probe[n, 1], probe[n, 2], probe[n, 3] = g_x, g_y, s[ABS_X], s[ABS_Y]
            g_a, g_b, g_c = half * s[MXX], s[MXY], half * s[MYY]
            g_opacity = -s[M] / r[OPACITY]
            # covariance: -Q G Q with G the symmetric gradient by the conic Q
            qa, qb = a * g_a + half * b * g_b, half * a * g_b + b * g_c
            qc, qd = b * g_a + half * c * g_b, half * b * g_b + c * g_c
            g_xx = -(qa * a + qb * b)
            g_xy = -two * (qa * b + qb * c)
            g_yy = -(qc * b + qd * c)

            mx, my, mz = means[n, 0], means[n, 1], means[n, 2]
            x = view[0, 0] * mx + view[0, 1] * my + view[0, 2] * mz + view[0, 3]
            y = view[1, 0] * mx + view[1, 1] * my + view[1, 2] * mz + view[1, 3]
            z = view[2, 0] * mx + view[2, 1] * my + view[2, 2] * mz + view[2, 3]
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
            iz = one / z
            px, py = x * iz, y * iz
            held_x, held_y = min(max(px, low_x), high_x), min(max(py, low_y), high_y)
            jx0, jx2 = fx * iz, -fx * held_x * iz
            jy1, jy2 = fy * iz, -fy * held_y * iz
            ux = jx0 * view[0, 0] + jx2 * view[2, 0]
            uy = jx0 * view[0, 1] + jx2 * view[2, 1]
            uz = jx0 * view[0, 2] + jx2 * view[2, 2]
            vx = jy1 * view[1, 0] + jy2 * view[2, 0]
            vy = jy1 * view[1, 1] + jy2 * view[2, 1]
            vz = jy1 * view[1, 2] + jy2 * view[2, 2]

            if antialiased:
                sxx, sxy, syy = f32(0.0), f32(0.0), f32(0.0)
                for k in range(3):
                    pu = (ux * turn[0, k] + uy * turn[1, k] + uz * turn[2, k]) * scales[n, k]
                    pv = (vx * turn[0, k] + vy * turn[1, k] + vz * turn[2, k]) * scales[n, k]
                    sxx += pu * pu
                    sxy += pu * pv
                    syy += pv * pv
                sharp = sxx * syy - sxy * sxy
                bxx, byy = sxx + f32(BLUR), syy + f32(BLUR)
                det = bxx * byy - sxy * sxy
                ratio = sharp / det
                least = f32(MIN_COMPENSATION * MIN_COMPENSATION)
                factor = math.sqrt(max(ratio, least))
                if ratio >= least:
                    g_ratio = half * g_opacity * opacities[n] / factor
                    g_sharp, g_det = g_ratio / det, -g_ratio * ratio / det
                    g_xx += g_sharp * syy + g_det * byy
                    g_yy += g_sharp * sxx + g_det * bxx
                    g_xy -= two * (g_sharp + g_det) * sxy
                g_opacity *= factor
            d_opacities[n] = g_opacity

            du[:] = f32(0.0)
            dv[:] = f32(0.0)
            for k in range(3):
                ax, ay, az, size = turn[0, k], turn[1, k], turn[2, k], scales[n, k]
                along_u, along_v = ux * ax + uy * ay + uz * az, vx * ax + vy * ay + vz * az
                g_u = (two * g_xx * along_u + g_xy * along_v) * size
                g_v = (two * g_yy * along_v + g_xy * along_u) * size
                d_scales[n, k] = g_u * along_u + g_v * along_v
                g_u *= size
                g_v *= size
                d_axes[0, k] = g_u * ux + g_v * vx
                d_axes[1, k] = g_u * uy + g_v * vy
                d_axes[2, k] = g_u * uz + g_v * vz
                du[0] += g_u * ax
                du[1] += g_u * ay
                du[2] += g_u * az
                dv[0] += g_v * ax
                dv[1] += g_v * ay
                dv[2] += g_v * az
            _quaternion_slope(d_axes, qw, qx, qy, qz, norm, d_quats[n])

            # the camera point: from the Jacobian, the centre and the depth
            g_jx0 = du[0] * view[0, 0] + du[1] * view[0, 1] + du[2] * view[0, 2]
            g_jy1 = dv[0] * view[1, 0] + dv[1] * view[1, 1] + dv[2] * view[1, 2]
            g_jx2 = du[0] * view[2, 0] + du[1] * view[2, 1] + du[2] * view[2, 2]
            g_jy2 = dv[0] * view[2, 0] + dv[1] * view[2, 1] + dv[2] * view[2, 2]
            g_px, g_py = fx * g_x, fy * g_y
            if low_x <= px <= high_x:
                g_px -= fx * iz * g_jx2
            if low_y <= py <= high_y:
                g_py -= fy * iz * g_jy2
            t_x, t_y = g_px * iz, g_py * iz
            t_z = (
                s[G_DEPTH]
                - (g_px * px + g_py * py) * iz
                - (jx0 * g_jx0 + jx2 * g_jx2 + jy1 * g_jy1 + jy2 * g_jy2) * iz
            )

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
                p = pose[n]
                for k in range(3):
                    p[k] = t_x * means[n, k] + jx0 * du[k]
                    p[4 + k] = t_y * means[n, k] + jy1 * dv[k]
                    p[8 + k] = t_z * means[n, k] + jx2 * du[k] + jy2 * dv[k]
                p[3], p[7], p[11] = t_x, t_y, t_z
                p[12], p[13], p[14] = -w_x, -w_y, -w_z


@jit.inline
def _quaternion_slope(d, w, x, y, z, norm, out):
    """Gradient by the raw quaternion from that by the rotation matrix, `d` [3, 3]."""
    two = f32(2.0)
    g_w = two * (x * (d[2, 1] - d[1, 2]) + y * (d[0, 2] - d[2, 0]) + z * (d[1, 0] - d[0, 1]))
    g_x = two * (
        w * (d[2, 1] - d[1, 2])
        + y * (d[0, 1] + d[1, 0])
        + z * (d[0, 2] + d[2, 0])
        - two * x * (d[1, 1] + d[2, 2])
    )
    g_y = two * (
        w * (d[0, 2] - d[2, 0])
        + x * (d[0, 1] + d[1, 0])
        + z * (d[1, 2] + d[2, 1])
        - two * y * (d[0, 0] + d[2, 2])
    )
    g_z = two * (
        w * (d[1, 0] - d[0, 1])
        + x * (d[0, 2] + d[2, 0])
        + y * (d[1, 2] + d[2, 1])
        - two * z * (d[0, 0] + d[1, 1])
    )
    inward = g_w * w + g_x * x + g_y * y + g_z * z
    out[0] = (g_w - inward * w) / norm
    out[1] = (g_x - inward * x) / norm
    out[2] = (g_y - inward * y) / norm
    out[3] = (g_z - inward * z) / norm
