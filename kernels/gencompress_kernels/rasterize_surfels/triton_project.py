"""Projection of surfels with Triton, and its gradient: a lane a surfel, as `surfel.cuh`."""

from __future__ import annotations

import triton
import triton.language as tl

from gencompress_kernels.rasterize_splats.triton_screen import (
    LOG_255,
    MAX_VARIANCE,
    MIN_ALPHA,
    NEAR,
    axis_of,
    color_slopes,
    colors_of,
    read3,
    seen,
    unit_quaternion,
    write3,
    write_mean_slopes,
    write_quaternion_slope,
)
from gencompress_kernels.rasterize_surfels import reference

LOW_PASS, MAX_SLANT = tl.constexpr(reference.LOW_PASS), tl.constexpr(reference.MAX_SLANT)
FAR = tl.constexpr(reference.FAR)
UNBOUNDED = tl.constexpr(1e9)
# columns of a record: see `surfel.cuh`
RECORD = tl.constexpr(24)
LOW, D0, OPACITY, RED, DEPTH = (tl.constexpr(k) for k in (2, 4, 5, 6, 9))
U, V, D, NORMAL = (tl.constexpr(k) for k in (10, 12, 14, 16))
TOP, BOTTOM, FACTOR = (tl.constexpr(k) for k in (19, 20, 21))
# columns of a box, the ellipse that bounds a surfel
BOX = tl.constexpr(8)
REACH, LEAN, THICK, TIP, DISC = (tl.constexpr(k) for k in (3, 4, 5, 6, 7))


@triton.jit
def _axis_seen(view, k: tl.constexpr, w, x, y, z):
    """An axis of a surfel in camera axes."""
    a, b, c = axis_of(k, w, x, y, z)
    e0 = tl.load(view) * a + tl.load(view + 1) * b + tl.load(view + 2) * c
    e1 = tl.load(view + 4) * a + tl.load(view + 5) * b + tl.load(view + 6) * c
    return e0, e1, tl.load(view + 8) * a + tl.load(view + 9) * b + tl.load(view + 10) * c


@triton.jit
def _tangent(view, lens, k: tl.constexpr, w, x, y, z, size, slope_x, slope_y):
    """What a step along a scaled tangent does on the screen, and its slant in z."""
    e0, e1, e2 = _axis_seen(view, k, w, x, y, z)
    slant = size * e2
    along_x = tl.load(lens) * (size * e0 - slope_x * slant)
    return along_x, tl.load(lens + 4) * (size * e1 - slope_y * slant), slant


@triton.jit
def project_surfels(
    means, quats, scales, opacities, sh, view, lens, place, records, boxes, count, width, height,
    BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    mx, my, mz = read3(means, i, some)
    x, y, z = seen(view, 0, mx, my, mz), seen(view, 1, mx, my, mz), seen(view, 2, mx, my, mz)
    opacity = tl.load(opacities + i, mask=some, other=0.0)
    shown = some & (z >= NEAR) & (opacity >= MIN_ALPHA)
    iz = 1 / tl.where(shown, z, 1.0)
    sx, sy = x * iz, y * iz
    w, qx, qy, qz, _ = unit_quaternion(quats, i, shown)
    su = tl.load(scales + 2 * i, mask=shown, other=0.0) * iz
    sv = tl.load(scales + 2 * i + 1, mask=shown, other=0.0) * iz
    xu, yu, mu = _tangent(view, lens, 0, w, qx, qy, qz, su, sx, sy)
    xv, yv, mv = _tangent(view, lens, 1, w, qx, qy, qz, sv, sx, sy)
    size = mu * mu + mv * mv
    wide = tl.maximum(xu * xu + xv * xv, yu * yu + yv * yv)
    shown = shown & (wide <= MAX_VARIANCE) & (size <= MAX_SLANT)
    xu, xv = tl.where(shown, xu, 0.0), tl.where(shown, xv, 0.0)
    yu, yv = tl.where(shown, yu, 0.0), tl.where(shown, yv, 0.0)
    mu, mv = tl.where(shown, mu, 0.0), tl.where(shown, mv, 0.0)
    size = mu * mu + mv * mv
    px, py = tl.load(lens) * sx + tl.load(lens + 2), tl.load(lens + 4) * sy + tl.load(lens + 5)
    determinant = xu * yv - xv * yu
    # rounding takes the logarithm of an opacity of 1/255 below zero
    limit = tl.maximum(2 * (tl.log(tl.where(shown, opacity, 1.0)) + LOG_255), 0.0)
    disc = tl.sqrt(limit / LOW_PASS) + 0.01
    cross_x, cross_y = xu * mu + xv * mv, yu * mu + yv * mv
    centred = size < 1
    rest = tl.where(centred, 1 - size, 1.0)
    low_x = tl.where(centred, px - cross_x / rest, -FAR)
    low_y = tl.where(centred, py - cross_y / rest, -FAR)
    room = 1 - limit * size
    bounded = room > 0.01
    room = tl.where(bounded, room, 1.0)
    h = limit / room
    ox, oy = -h * cross_x, -h * cross_y
    xx, xy = ox * ox + h * (xu * xu + xv * xv), ox * oy + h * (xu * yu + xv * yv)
    yy = oy * oy + h * (yu * yu + yv * yv)
    # a hundredth of a pixel, and a ten thousandth, for the rounding
    reach_x = tl.where(bounded, tl.sqrt(xx) * 1.0001 + 0.01, UNBOUNDED)
    reach_y = tl.where(bounded, tl.sqrt(yy) * 1.0001 + 0.01, UNBOUNDED)
    # sqrt(det S / S_yy), and det S = h^2 det(J)^2 / room
    thick = h * tl.abs(determinant) / tl.sqrt(room * tl.maximum(yy, 1e-12))
    thick = tl.minimum(thick, tl.sqrt(xx)) * 1.0001 + 0.01
    middle_x, middle_y = tl.where(bounded, px + ox, 0.0), tl.where(bounded, py + oy, 0.0)
    box = boxes + BOX * i
    tl.store(box, middle_x, mask=some)
    tl.store(box + 1, middle_y, mask=some)
    tl.store(box + 2, reach_x, mask=some)
    tl.store(box + REACH, reach_y, mask=some)
    tl.store(box + LEAN, tl.where(bounded, xy / tl.maximum(yy, 1e-12), 0.0), mask=some)
    tl.store(box + THICK, tl.where(bounded, thick, UNBOUNDED), mask=some)
    tl.store(box + TIP, tl.where(bounded, xy / tl.sqrt(tl.maximum(xx, 1e-12)), 0.0), mask=some)
    tl.store(box + DISC, disc, mask=some)
    top = tl.minimum(middle_y - reach_y, low_y - disc)
    bottom = tl.maximum(middle_y + reach_y, low_y + disc)
    shown = shown & (tl.maximum(middle_x + reach_x, low_x + disc) >= 0) & (bottom >= 0)
    shown = shown & (tl.minimum(middle_x - reach_x, low_x - disc) <= width) & (top <= height)
    # a common factor of the six leaves u, v and the depth as they are
    largest = tl.maximum(
        tl.maximum(tl.abs(xu), tl.abs(xv)), tl.maximum(tl.abs(yu), tl.abs(yv))
    )  # fmt: skip
    factor = tl.where(largest > 1e-18, 1 / tl.maximum(largest, 1e-18), 0.0)
    factor = tl.where(determinant < 0, -factor, factor)
    ux, uy, vx, vy = factor * yv, -factor * xv, -factor * yu, factor * xu
    n0, n1, n2 = _axis_seen(view, 2, w, qx, qy, qz)
    side = tl.where(n0 * x + n1 * y + n2 * z > 0, -1.0, 1.0)
    red, green, blue = colors_of(sh, place, i, shown, mx, my, mz, BANDS)
    r = records + RECORD * i
    tl.store(r, tl.where(shown, px, 0.0), mask=some)
    tl.store(r + 1, tl.where(shown, py, 0.0), mask=some)
    tl.store(r + LOW, tl.where(shown, low_x, 0.0), mask=some)
    tl.store(r + LOW + 1, tl.where(shown, low_y, 0.0), mask=some)
    tl.store(r + D0, tl.where(shown, ux * xu + uy * yu, 0.0), mask=some)
    tl.store(r + OPACITY, tl.where(shown, opacity, 0.0), mask=some)
    write3(
        r + RED, 0, some, tl.where(shown, red, 0.0), tl.where(shown, green, 0.0),
        tl.where(shown, blue, 0.0),
    )  # fmt: skip
    tl.store(r + DEPTH, tl.where(shown, z, 0.0), mask=some)
    tl.store(r + U, tl.where(shown, ux, 0.0), mask=some)
    tl.store(r + U + 1, tl.where(shown, uy, 0.0), mask=some)
    tl.store(r + V, tl.where(shown, vx, 0.0), mask=some)
    tl.store(r + V + 1, tl.where(shown, vy, 0.0), mask=some)
    tl.store(r + D, tl.where(shown, -(ux * mu + vx * mv), 0.0), mask=some)
    tl.store(r + D + 1, tl.where(shown, -(uy * mu + vy * mv), 0.0), mask=some)
    write3(
        r + NORMAL, 0, some, tl.where(shown, side * n0, 0.0), tl.where(shown, side * n1, 0.0),
        tl.where(shown, side * n2, 0.0),
    )  # fmt: skip
    tl.store(r + TOP, tl.where(shown, top, 0.0), mask=some)
    tl.store(r + BOTTOM, tl.where(shown, bottom, 0.0), mask=some)
    tl.store(r + FACTOR, tl.where(shown, factor, 0.0), mask=some)
    for k in tl.static_range(FACTOR + 1, RECORD):
        tl.store(r + k, tl.zeros([BLOCK], tl.float32), mask=some)


@triton.jit
def _read(s, k: tl.constexpr, some):
    return tl.load(s + k, mask=some, other=0.0)


@triton.jit
def project_surfel_slopes(
    means, quats, scales, sh, view, lens, place, records, sums, d_means, d_quats, d_scales,
    d_opacities, d_sh, probe, pose, count, BANDS: tl.constexpr, ABSOLUTE: tl.constexpr,
    POSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes the sums [N, 21 or 23] of `_slopes` through intersection, projection and harmonics.

    `pose` [N, 15] as of the splats.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    r, s = records + RECORD * i, sums + (23 if ABSOLUTE else 21) * i
    opacity = tl.load(r + OPACITY, mask=some, other=0.0)
    some = some & (opacity > 0)
    tl.store(d_opacities + i, _read(s, 6, some) / tl.where(some, opacity, 1.0), mask=some)
    by_p, p_dy, by_q, q_dy = (
        _read(s, 7, some), _read(s, 8, some), _read(s, 9, some), _read(s, 10, some)
    )  # fmt: skip
    by_d, d_dy, plane = _read(s, 11, some), _read(s, 12, some), _read(s, 13, some)
    g_low_x, g_low_y = -2 * _read(s, 20, some), -2 * _read(s, 16, some)
    g_x = g_low_x - (_read(r, U, some) * by_p + _read(r, V, some) * by_q + _read(r, D, some) * by_d)
    g_y = g_low_y - (
        _read(r, U + 1, some) * by_p + _read(r, V + 1, some) * by_q + _read(r, D + 1, some) * by_d
    )
    tl.store(probe + 4 * i, g_x, mask=some)
    tl.store(probe + 4 * i + 1, g_y, mask=some)
    if ABSOLUTE:
        tl.store(probe + 4 * i + 2, _read(s, 21, some), mask=some)
        tl.store(probe + 4 * i + 3, _read(s, 22, some), mask=some)

    mx, my, mz = read3(means, i, some)
    x, y, z = seen(view, 0, mx, my, mz), seen(view, 1, mx, my, mz), seen(view, 2, mx, my, mz)
    iz = 1 / tl.where(some, z, 1.0)
    sx, sy = x * iz, y * iz
    w, qx, qy, qz, norm = unit_quaternion(quats, i, some)
    su = tl.load(scales + 2 * i, mask=some, other=0.0) * iz
    sv = tl.load(scales + 2 * i + 1, mask=some, other=0.0) * iz
    xu, yu, mu = _tangent(view, lens, 0, w, qx, qy, qz, su, sx, sy)
    xv, yv, mv = _tangent(view, lens, 1, w, qx, qy, qz, sv, sx, sy)
    # Jacobian, slant and z: from the six coefficients, whose common factor is constant
    factor = _read(r, FACTOR, some)
    g_det = factor * (by_d + z * plane)
    g_dx, g_dy = -factor * _read(s, 19, some), -factor * d_dy
    g_xu = factor * q_dy + g_det * yv + g_dy * mv
    g_xv = -factor * p_dy - g_det * yu - g_dy * mu
    g_yu = -factor * _read(s, 18, some) - g_det * xv - g_dx * mv
    g_yv = factor * _read(s, 17, some) + g_det * xu + g_dx * mu
    g_mu, g_mv = g_dx * yv - g_dy * xv, g_dy * xu - g_dx * yu
    t_z = _read(r, D0, some) * plane + _read(s, 14, some)
    # the middle of the low-pass: the projected mean - J m / (1 - m^2)
    size = mu * mu + mv * mv
    h = tl.where(size < 1, 1 / tl.where(size < 1, 1 - size, 1.0), 0.0)
    bend = 2 * h * h * (g_low_x * (xu * mu + xv * mv) + g_low_y * (yu * mu + yv * mv))
    g_xu -= g_low_x * mu * h
    g_xv -= g_low_x * mv * h
    g_yu -= g_low_y * mu * h
    g_yv -= g_low_y * mv * h
    g_mu -= h * (g_low_x * xu + g_low_y * yu) + bend * mu
    g_mv -= h * (g_low_x * xv + g_low_y * yv) + bend * mv
    # J = f (tangent_xy - slope m), slope = xy / z, all of them over z
    fx, fy = tl.load(lens), tl.load(lens + 4)
    a_u, a_v, b_u, b_v = fx * g_xu, fx * g_xv, fy * g_yu, fy * g_yv
    g_sx, g_sy = fx * g_x - (a_u * mu + a_v * mv), fy * g_y - (b_u * mu + b_v * mv)
    g_mu -= a_u * sx + b_u * sy
    g_mv -= a_v * sx + b_v * sy
    u0, u1, u2 = _axis_seen(view, 0, w, qx, qy, qz)
    v0, v1, v2 = _axis_seen(view, 1, w, qx, qy, qz)
    n0, n1, n2 = _axis_seen(view, 2, w, qx, qy, qz)
    along_u, along_v = a_u * u0 + b_u * u1 + g_mu * u2, a_v * v0 + b_v * v1 + g_mv * v2
    tl.store(d_scales + 2 * i, along_u * iz, mask=some)
    tl.store(d_scales + 2 * i + 1, along_v * iz, mask=some)
    r0, r1, r2 = read3(r + NORMAL, 0, some)
    side = tl.where(r0 * n0 + r1 * n1 + r2 * n2 > 0, 1.0, -1.0)
    n0, n1, n2 = read3(s + 3, 0, some)
    s00, s01, s02 = su * a_u, sv * a_v, side * n0
    s10, s11, s12 = su * b_u, sv * b_v, side * n1
    s20, s21, s22 = su * g_mu, sv * g_mv, side * n2
    inward = g_sx * sx + g_sy * sy + su * along_u + sv * along_v
    tx, ty, tz = g_sx * iz, g_sy * iz, t_z - inward * iz
    t00, t01, t02 = _turned(view, 0, s00, s10, s20, s01, s11, s21, s02, s12, s22)
    t10, t11, t12 = _turned(view, 1, s00, s10, s20, s01, s11, s21, s02, s12, s22)
    t20, t21, t22 = _turned(view, 2, s00, s10, s20, s01, s11, s21, s02, s12, s22)
    write_quaternion_slope(
        d_quats, i, some, w, qx, qy, qz, norm, t00, t01, t02, t10, t11, t12, t20, t21, t22
    )
    r0, r1, r2 = read3(r + RED, 0, some)
    red, green, blue = read3(s, 0, some)
    red, green = tl.where(r0 > 0, red, 0.0), tl.where(r1 > 0, green, 0.0)
    blue = tl.where(r2 > 0, blue, 0.0)
    wx, wy, wz = color_slopes(sh, place, d_sh, i, some, mx, my, mz, red, green, blue, BANDS)
    write_mean_slopes(d_means, view, i, some, tx, ty, tz, wx, wy, wz)
    if POSE:
        own = pose + 15 * i
        a0, a1, a2 = axis_of(0, w, qx, qy, qz)
        b0, b1, b2 = axis_of(1, w, qx, qy, qz)
        c0, c1, c2 = axis_of(2, w, qx, qy, qz)
        _write_pose_row(
            own, some, tx, mx, my, mz, s00, s01, s02, a0, a1, a2, b0, b1, b2, c0, c1, c2
        )
        _write_pose_row(
            own + 4, some, ty, mx, my, mz, s10, s11, s12, a0, a1, a2, b0, b1, b2, c0, c1, c2
        )
        _write_pose_row(
            own + 8, some, tz, mx, my, mz, s20, s21, s22, a0, a1, a2, b0, b1, b2, c0, c1, c2
        )
        write3(own + 12, 0, some, -wx, -wy, -wz)


@triton.jit
def _turned(view, k: tl.constexpr, a0, a1, a2, b0, b1, b2, c0, c1, c2):
    """Component k in the world of three vectors in camera axes."""
    x, y, z = tl.load(view + k), tl.load(view + 4 + k), tl.load(view + 8 + k)
    return x * a0 + y * a1 + z * a2, x * b0 + y * b1 + z * b2, x * c0 + y * c1 + z * c2


@triton.jit
def _write_pose_row(
    own, some, t, mx, my, mz, a, b, c, a0, a1, a2, b0, b1, b2, c0, c1, c2
):  # fmt: skip
    """A row of the gradient by [R | t]: from the mean, and from the three axes."""
    write3(
        own, 0, some, t * mx + a * a0 + b * b0 + c * c0, t * my + a * a1 + b * b1 + c * c1,
        t * mz + a * a2 + b * b2 + c * c2,
    )  # fmt: skip
    tl.store(own + 3, t, mask=some)
