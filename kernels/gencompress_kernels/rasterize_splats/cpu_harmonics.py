"""Spherical harmonics up to degree 3 for numba: colour, basis, and slope along the direction."""

from __future__ import annotations

import math

import numpy as np

from gencompress_kernels import jit

f32 = np.float32


@jit.inline
def sh_color(sh, i, bands, x, y, z):
    """Channel `i` of the colour along a unit direction, not yet held at 0."""
    color = f32(0.5) + f32(0.28209479177387814) * sh[0, i]
    if bands > 1:
        color += f32(0.4886025119029199) * (z * sh[2, i] - y * sh[1, i] - x * sh[3, i])
    if bands > 4:
        xx, yy, zz = x * x, y * y, z * z
        color += (
            f32(1.0925484305920792) * (x * y * sh[4, i] - y * z * sh[5, i] - x * z * sh[7, i])
            + f32(0.31539156525252005) * (f32(2.0) * zz - xx - yy) * sh[6, i]
            + f32(0.5462742152960396) * (xx - yy) * sh[8, i]
        )
    if bands > 9:
        xx, yy, zz = x * x, y * y, z * z
        ring = f32(0.4570457994644658) * (f32(4.0) * zz - xx - yy)
        color += (
            f32(0.3731763325901154) * z * (f32(2.0) * zz - f32(3.0) * (xx + yy)) * sh[12, i]
            - ring * (y * sh[11, i] + x * sh[13, i])
            + f32(2.890611442640554) * x * y * z * sh[10, i]
            + f32(1.445305721320277) * z * (xx - yy) * sh[14, i]
            - f32(0.5900435899266435)
            * (y * (f32(3.0) * xx - yy) * sh[9, i] + x * (xx - f32(3.0) * yy) * sh[15, i])
        )
    return color


@jit.inline
def sh_basis(x, y, z, bands, out):
    """Spherical harmonics at a unit direction, as `reference.sh_basis`."""
    out[0] = f32(0.28209479177387814)
    if bands > 1:
        k = f32(0.4886025119029199)
        out[1], out[2], out[3] = -k * y, k * z, -k * x
    if bands > 4:
        xx, yy, zz = x * x, y * y, z * z
        k = f32(1.0925484305920792)
        out[4], out[5], out[7] = k * x * y, -k * y * z, -k * x * z
        out[6] = f32(0.31539156525252005) * (f32(2.0) * zz - xx - yy)
        out[8] = f32(0.5462742152960396) * (xx - yy)
    if bands > 9:
        xx, yy, zz = x * x, y * y, z * z
        ring = f32(-0.4570457994644658) * (f32(4.0) * zz - xx - yy)
        out[9] = f32(-0.5900435899266435) * y * (f32(3.0) * xx - yy)
        out[10] = f32(2.890611442640554) * x * y * z
        out[11] = ring * y
        out[12] = f32(0.3731763325901154) * z * (f32(2.0) * zz - f32(3.0) * (xx + yy))
        out[13] = ring * x
        out[14] = f32(1.445305721320277) * z * (xx - yy)
        out[15] = f32(-0.5900435899266435) * x * (xx - f32(3.0) * yy)


@jit.inline
def direction_slope(x, y, z, bands, v):
    """Gradient by the direction (not yet projected onto the sphere) of sum_j v_j Y_j."""
    gx, gy, gz = f32(0.0), f32(0.0), f32(0.0)
    if bands > 1:
        k = f32(0.4886025119029199)
        gx, gy, gz = -k * v[3], -k * v[1], k * v[2]
    if bands > 4:
        k, m, h = f32(1.0925484305920792), f32(0.6307831305050401), f32(1.0925484305920792)
        gx += k * (y * v[4] - z * v[7]) - m * x * v[6] + h * x * v[8]
        gy += k * (x * v[4] - z * v[5]) - m * y * v[6] - h * y * v[8]
        gz += f32(2.0) * m * z * v[6] - k * (y * v[5] + x * v[7])
    if bands > 9:
        two, three, six, eight = f32(2.0), f32(3.0), f32(6.0), f32(8.0)
        xx, yy, zz = x * x, y * y, z * z
        a, b = f32(0.5900435899266435), f32(2.890611442640554)
        c, d, e = f32(0.4570457994644658), f32(0.3731763325901154), f32(1.445305721320277)
        ring = f32(4.0) * zz - xx - yy
        gx += (
            -a * six * x * y * v[9]
            + b * y * z * v[10]
            + c * two * x * y * v[11]
            - d * six * x * z * v[12]
            - c * (ring - two * xx) * v[13]
            + e * two * x * z * v[14]
            - a * three * (xx - yy) * v[15]
        )
        gy += (
            -a * three * (xx - yy) * v[9]
            + b * x * z * v[10]
            - c * (ring - two * yy) * v[11]
            - d * six * y * z * v[12]
            + c * two * x * y * v[13]
            - e * two * y * z * v[14]
            + a * six * x * y * v[15]
        )
        gz += (
            b * x * y * v[10]
            - c * eight * y * z * v[11]
            + d * (six * zz - three * (xx + yy)) * v[12]
            - c * eight * x * z * v[13]
            + e * (xx - yy) * v[14]
        )
    return gx, gy, gz


@jit.inline
def sh_backward(sh, color, x, y, z, bands, basis, slope, d_sh):
    """Takes the gradient by a colour, [3], to the coefficients, `d_sh`, and to (x, y, z), the way
    from the camera to the splat, which is returned. `basis` and `slope` [16] are scratch."""
    length = max(math.sqrt(x * x + y * y + z * z), f32(1e-12))
    x, y, z = x / length, y / length, z / length
    sh_basis(x, y, z, bands, basis)
    for j in range(bands):
        slope[j] = f32(0.0)
        for k in range(3):
            d_sh[j, k] = basis[j] * color[k]
            slope[j] += sh[j, k] * color[k]
    w_x, w_y, w_z = direction_slope(x, y, z, bands, slope)
    inward = w_x * x + w_y * y + w_z * z
    return (w_x - inward * x) / length, (w_y - inward * y) / length, (w_z - inward * z) / length
