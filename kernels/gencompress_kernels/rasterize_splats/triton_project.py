"""Projection of splats with Triton, and its gradient: a lane a splat."""

from __future__ import annotations

import triton
import triton.language as tl

from gencompress_kernels.rasterize_splats import reference
from gencompress_kernels.rasterize_splats.triton_screen import (
    BLUR,
    LOG_255,
    MAX_VARIANCE,
    MIN_ALPHA,
    NEAR,
    axis_of,
    color_slopes,
    colors_of,
    held,
    read3,
    screen_axis,
    seen,
    unit_quaternion,
    write3,
    write_mean_slopes,
    write_quaternion_slope,
)

# columns of a record: centre, conic, opacity, colour, depth, reach in x and y, limit of 2 q
RECORD = tl.constexpr(16)
CONIC, OPACITY, RED, DEPTH = (tl.constexpr(k) for k in (2, 5, 6, 9))
REACH, LIMIT = tl.constexpr(10), tl.constexpr(12)
MIN_DETERMINANT = tl.constexpr(reference.MIN_DETERMINANT)
LEAST_RATIO = tl.constexpr(reference.MIN_COMPENSATION**2)


@triton.jit
def _flattened(scales, view, i, some, w, x, y, z, jx0, jx2, jy1, jy2):
    """The projected covariance without blur: xx, xy, yy."""
    u0, v0 = screen_axis(view, 0, jx0, jx2, jy1, jy2)
    u1, v1 = screen_axis(view, 1, jx0, jx2, jy1, jy2)
    u2, v2 = screen_axis(view, 2, jx0, jx2, jy1, jy2)
    xx = tl.zeros(w.shape, tl.float32)
    xy, yy = xx, xx
    for k in tl.static_range(3):
        a, b, c = axis_of(k, w, x, y, z)
        size = tl.load(scales + 3 * i + k, mask=some, other=0.0)
        u, v = size * (u0 * a + u1 * b + u2 * c), size * (v0 * a + v1 * b + v2 * c)
        xx += u * u
        xy += u * v
        yy += v * v
    return xx, xy, yy


@triton.jit
def project_splats(
    means, quats, scales, opacities, sh, view, lens, place, records, count, width, height,
    BANDS: tl.constexpr, ANTIALIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    mx, my, mz = read3(means, i, some)
    x, y, z = seen(view, 0, mx, my, mz), seen(view, 1, mx, my, mz), seen(view, 2, mx, my, mz)
    front = some & (z >= NEAR)
    iz = 1 / tl.where(front, z, 1.0)
    fx, cx = tl.load(lens), tl.load(lens + 2)
    fy, cy = tl.load(lens + 4), tl.load(lens + 5)
    across, _ = held(x * iz, fx, cx, width)
    down, _ = held(y * iz, fy, cy, height)
    qw, qx, qy, qz, _ = unit_quaternion(quats, i, front)
    xx, xy, yy = _flattened(
        scales, view, i, front, qw, qx, qy, qz, fx * iz, -fx * across * iz, fy * iz,
        -fy * down * iz,
    )  # fmt: skip
    fits = front & (tl.maximum(xx, yy) <= MAX_VARIANCE)
    xx, xy, yy = tl.where(fits, xx, 0.0), tl.where(fits, xy, 0.0), tl.where(fits, yy, 0.0)
    sharp = xx * yy - xy * xy
    xx += BLUR
    yy += BLUR
    determinant = tl.maximum(xx * yy - xy * xy, MIN_DETERMINANT)
    opacity = tl.load(opacities + i, mask=fits, other=0.0)
    if ANTIALIASED:
        opacity *= tl.sqrt(tl.maximum(sharp / determinant, LEAST_RATIO))
    shown = fits & (opacity >= MIN_ALPHA)
    # rounding takes the logarithm of an opacity of 1/255 below zero
    limit = tl.maximum(2 * (tl.log(tl.where(shown, opacity, 1.0)) + LOG_255), 0.0)
    reach_x, reach_y = tl.sqrt(limit * xx), tl.sqrt(limit * yy)
    px, py = fx * x * iz + cx, fy * y * iz + cy
    shown = shown & (px + reach_x >= 0) & (px - reach_x <= width)
    shown = shown & (py + reach_y >= 0) & (py - reach_y <= height)
    red, green, blue = colors_of(sh, place, i, shown, mx, my, mz, BANDS)
    r = records + RECORD * i
    tl.store(r, tl.where(shown, px, 0.0), mask=some)
    tl.store(r + 1, tl.where(shown, py, 0.0), mask=some)
    tl.store(r + CONIC, tl.where(shown, yy / determinant, 0.0), mask=some)
    tl.store(r + CONIC + 1, tl.where(shown, -xy / determinant, 0.0), mask=some)
    tl.store(r + CONIC + 2, tl.where(shown, xx / determinant, 0.0), mask=some)
    tl.store(r + OPACITY, tl.where(shown, opacity, 0.0), mask=some)
    tl.store(r + RED, tl.where(shown, red, 0.0), mask=some)
    tl.store(r + RED + 1, tl.where(shown, green, 0.0), mask=some)
    tl.store(r + RED + 2, tl.where(shown, blue, 0.0), mask=some)
    tl.store(r + DEPTH, tl.where(shown, z, 0.0), mask=some)
    tl.store(r + REACH, tl.where(shown, reach_x, 0.0), mask=some)
    tl.store(r + REACH + 1, tl.where(shown, reach_y, 0.0), mask=some)
    tl.store(r + LIMIT, tl.where(shown, limit, 0.0), mask=some)
    for k in tl.static_range(LIMIT + 1, RECORD):
        tl.store(r + k, tl.zeros([BLOCK], tl.float32), mask=some)


@triton.jit
def project_slopes(
    means, quats, scales, opacities, sh, view, lens, place, records, sums, d_means, d_quats,
    d_scales, d_opacities, d_sh, probe, pose, count, width, height, BANDS: tl.constexpr,
    ANTIALIASED: tl.constexpr, ABSOLUTE: tl.constexpr, POSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Takes the sums [N, 10 or 12] of `_slopes` through conic, blur, projection and harmonics.

    `pose` [N, 15] collects the gradient by the rows of [R | t], then that by the camera's place.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    r, s = records + RECORD * i, sums + (12 if ABSOLUTE else 10) * i
    strength = tl.load(r + OPACITY, mask=some, other=0.0)
    some = some & (strength > 0)
    # centre, conic and opacity on the screen, from the moments
    a = tl.load(r + CONIC, mask=some, other=1.0)
    b = tl.load(r + CONIC + 1, mask=some, other=0.0)
    c = tl.load(r + CONIC + 2, mask=some, other=1.0)
    moment_x, moment_y = tl.load(s + 5, mask=some, other=0.0), tl.load(s + 6, mask=some, other=0.0)
    g_x, g_y = a * moment_x + b * moment_y, b * moment_x + c * moment_y
    tl.store(probe + 4 * i, g_x, mask=some)
    tl.store(probe + 4 * i + 1, g_y, mask=some)
    if ABSOLUTE:
        tl.store(probe + 4 * i + 2, tl.load(s + 10, mask=some, other=0.0), mask=some)
        tl.store(probe + 4 * i + 3, tl.load(s + 11, mask=some, other=0.0), mask=some)
    g_a, g_b = 0.5 * tl.load(s + 7, mask=some, other=0.0), tl.load(s + 8, mask=some, other=0.0)
    g_c = 0.5 * tl.load(s + 9, mask=some, other=0.0)
    g_opacity = -tl.load(s + 4, mask=some, other=0.0) / tl.where(some, strength, 1.0)
    # covariance: -Q G Q with G the symmetric gradient by the conic Q
    qa, qb = a * g_a + 0.5 * b * g_b, 0.5 * a * g_b + b * g_c
    qc, qd = b * g_a + 0.5 * c * g_b, 0.5 * b * g_b + c * g_c
    g_xx, g_xy, g_yy = -(qa * a + qb * b), -2 * (qa * b + qb * c), -(qc * b + qd * c)

    mx, my, mz = read3(means, i, some)
    x, y, z = seen(view, 0, mx, my, mz), seen(view, 1, mx, my, mz), seen(view, 2, mx, my, mz)
    iz = 1 / tl.where(some, z, 1.0)
    px, py = x * iz, y * iz
    fx, cx = tl.load(lens), tl.load(lens + 2)
    fy, cy = tl.load(lens + 4), tl.load(lens + 5)
    across, free_x = held(px, fx, cx, width)
    down, free_y = held(py, fy, cy, height)
    jx0, jx2, jy1, jy2 = fx * iz, -fx * across * iz, fy * iz, -fy * down * iz
    qw, qx, qy, qz, norm = unit_quaternion(quats, i, some)
    if ANTIALIASED:
        xx, xy, yy = _flattened(scales, view, i, some, qw, qx, qy, qz, jx0, jx2, jy1, jy2)
        sharp = xx * yy - xy * xy
        xx += BLUR
        yy += BLUR
        determinant = xx * yy - xy * xy
        ratio = sharp / determinant
        factor = tl.sqrt(tl.maximum(ratio, LEAST_RATIO))
        g_ratio = 0.5 * g_opacity * tl.load(opacities + i, mask=some, other=0.0) / factor
        g_sharp = tl.where(ratio >= LEAST_RATIO, g_ratio / determinant, 0.0)
        g_determinant = -g_sharp * ratio
        g_xx += g_sharp * (yy - BLUR) + g_determinant * yy
        g_yy += g_sharp * (xx - BLUR) + g_determinant * xx
        g_xy -= 2 * (g_sharp + g_determinant) * xy
        g_opacity *= factor
    tl.store(d_opacities + i, g_opacity, mask=some)

    u0, v0 = screen_axis(view, 0, jx0, jx2, jy1, jy2)
    u1, v1 = screen_axis(view, 1, jx0, jx2, jy1, jy2)
    u2, v2 = screen_axis(view, 2, jx0, jx2, jy1, jy2)
    du0 = tl.zeros([BLOCK], tl.float32)
    du1, du2, dv0, dv1, dv2 = du0, du0, du0, du0, du0
    t00, t10, t20, t01, t11, t21, t02, t12, t22 = du0, du0, du0, du0, du0, du0, du0, du0, du0
    for k in tl.static_range(3):
        e0, e1, e2 = axis_of(k, qw, qx, qy, qz)
        size = tl.load(scales + 3 * i + k, mask=some, other=0.0)
        u, v = u0 * e0 + u1 * e1 + u2 * e2, v0 * e0 + v1 * e1 + v2 * e2
        g_u, g_v = (2 * g_xx * u + g_xy * v) * size, (2 * g_yy * v + g_xy * u) * size
        tl.store(d_scales + 3 * i + k, g_u * u + g_v * v, mask=some)
        g_u *= size
        g_v *= size
        d0, d1, d2 = g_u * u0 + g_v * v0, g_u * u1 + g_v * v1, g_u * u2 + g_v * v2
        if k == 0:
            t00, t10, t20 = d0, d1, d2
        elif k == 1:
            t01, t11, t21 = d0, d1, d2
        else:
            t02, t12, t22 = d0, d1, d2
        du0 += g_u * e0
        du1 += g_u * e1
        du2 += g_u * e2
        dv0 += g_v * e0
        dv1 += g_v * e1
        dv2 += g_v * e2
    write_quaternion_slope(
        d_quats, i, some, qw, qx, qy, qz, norm, t00, t01, t02, t10, t11, t12, t20, t21, t22
    )

    # the camera point: from the Jacobian, the centre and the depth
    g_jx0 = du0 * tl.load(view) + du1 * tl.load(view + 1) + du2 * tl.load(view + 2)
    g_jy1 = dv0 * tl.load(view + 4) + dv1 * tl.load(view + 5) + dv2 * tl.load(view + 6)
    g_jx2 = du0 * tl.load(view + 8) + du1 * tl.load(view + 9) + du2 * tl.load(view + 10)
    g_jy2 = dv0 * tl.load(view + 8) + dv1 * tl.load(view + 9) + dv2 * tl.load(view + 10)
    g_px = fx * g_x - tl.where(free_x, fx * iz * g_jx2, 0.0)
    g_py = fy * g_y - tl.where(free_y, fy * iz * g_jy2, 0.0)
    inward = g_px * px + g_py * py + jx0 * g_jx0 + jx2 * g_jx2 + jy1 * g_jy1 + jy2 * g_jy2
    tx, ty, tz = g_px * iz, g_py * iz, tl.load(s + 3, mask=some, other=0.0) - inward * iz
    # colour: harmonics, and the direction they are seen along
    red, green, blue = _color_sums(r, s, some)
    wx, wy, wz = color_slopes(sh, place, d_sh, i, some, mx, my, mz, red, green, blue, BANDS)
    write_mean_slopes(d_means, view, i, some, tx, ty, tz, wx, wy, wz)
    if POSE:
        own = pose + 15 * i
        write3(own, 0, some, tx * mx + jx0 * du0, tx * my + jx0 * du1, tx * mz + jx0 * du2)
        tl.store(own + 3, tx, mask=some)
        write3(own + 4, 0, some, ty * mx + jy1 * dv0, ty * my + jy1 * dv1, ty * mz + jy1 * dv2)
        tl.store(own + 7, ty, mask=some)
        write3(
            own + 8, 0, some, tz * mx + jx2 * du0 + jy2 * dv0, tz * my + jx2 * du1 + jy2 * dv1,
            tz * mz + jx2 * du2 + jy2 * dv2,
        )  # fmt: skip
        tl.store(own + 11, tz, mask=some)
        write3(own + 12, 0, some, -wx, -wy, -wz)


@triton.jit
def _color_sums(r, s, some):
    """Sums of gradients by the colour; none where it is held at 0."""
    red = tl.where(tl.load(r + RED, mask=some, other=0.0) > 0, 1.0, 0.0)
    green = tl.where(tl.load(r + RED + 1, mask=some, other=0.0) > 0, 1.0, 0.0)
    blue = tl.where(tl.load(r + RED + 2, mask=some, other=0.0) > 0, 1.0, 0.0)
    by_red, by_green, by_blue = read3(s, 0, some)
    return red * by_red, green * by_green, blue * by_blue
