"""From splats to the screen and back, in Triton: what kernels that give a lane to a splat share.

The arithmetic of `project.cuh` and `harmonics.cuh`, with the constants of `reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gencompress_kernels.rasterize_splats import reference
from gencompress_kernels.rasterize_splats.lists import TILE

NEAR, BLUR = tl.constexpr(reference.NEAR), tl.constexpr(reference.BLUR)
MAX_VARIANCE = tl.constexpr(reference.MAX_VARIANCE)
MIN_ALPHA, MAX_ALPHA = tl.constexpr(reference.MIN_ALPHA), tl.constexpr(reference.MAX_ALPHA)
MIN_TRANSMITTANCE = tl.constexpr(reference.MIN_TRANSMITTANCE)
SIDE = tl.constexpr(TILE)
PIXELS = tl.constexpr(TILE * TILE)
HALF_MARGIN = tl.constexpr(0.5 * reference.FRUSTUM_MARGIN)
LOG_255 = tl.constexpr(5.541263545158426)
# of the harmonics, band by band
K0, K1, K2 = (
    tl.constexpr(k) for k in (0.28209479177387814, 0.4886025119029199, 1.0925484305920792)
)
K2_ZZ, K2_XX = tl.constexpr(0.31539156525252005), tl.constexpr(0.5462742152960396)
K3_A, K3_B, K3_C = (
    tl.constexpr(k) for k in (0.5900435899266435, 2.890611442640554, 0.4570457994644658)
)
K3_D, K3_E = tl.constexpr(0.3731763325901154), tl.constexpr(1.445305721320277)


@triton.jit
def read3(source, i, some):
    x = tl.load(source + 3 * i, mask=some, other=0.0)
    y = tl.load(source + 3 * i + 1, mask=some, other=0.0)
    return x, y, tl.load(source + 3 * i + 2, mask=some, other=0.0)


@triton.jit
def write3(out, i, some, x, y, z):
    tl.store(out + 3 * i, x, mask=some)
    tl.store(out + 3 * i + 1, y, mask=some)
    tl.store(out + 3 * i + 2, z, mask=some)


@triton.jit
def seen(view, row: tl.constexpr, x, y, z):
    """A coordinate in camera axes."""
    place = view + 4 * row
    turned = tl.load(place) * x + tl.load(place + 1) * y + tl.load(place + 2) * z
    return turned + tl.load(place + 3)


@triton.jit
def held(slope, focal, middle, size):
    """x / z or y / z within the limits of the Jacobian, and whether it was."""
    margin = HALF_MARGIN * size / focal
    low, high = -middle / focal - margin, (size - middle) / focal + margin
    return tl.minimum(tl.maximum(slope, low), high), (slope >= low) & (slope <= high)


@triton.jit
def screen_axis(view, k: tl.constexpr, jx0, jx2, jy1, jy2):
    """Column k of J R: what a step along a world axis does on the screen."""
    depth = tl.load(view + 8 + k)
    return jx0 * tl.load(view + k) + jx2 * depth, jy1 * tl.load(view + 4 + k) + jy2 * depth


@triton.jit
def unit_quaternion(quats, i, some):
    """w, x, y, z of length 1, and the length of the raw one."""
    w = tl.load(quats + 4 * i, mask=some, other=1.0)
    x = tl.load(quats + 4 * i + 1, mask=some, other=0.0)
    y = tl.load(quats + 4 * i + 2, mask=some, other=0.0)
    z = tl.load(quats + 4 * i + 3, mask=some, other=0.0)
    norm = tl.maximum(tl.sqrt(w * w + x * x + y * y + z * z), 1e-12)
    return w / norm, x / norm, y / norm, z / norm, norm


@triton.jit
def axis_of(k: tl.constexpr, w, x, y, z):
    """Column k of the rotation: an axis of the splat in the world."""
    if k == 0:
        a, b, c = 1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)
    elif k == 1:
        a, b, c = 2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)
    else:
        a, b, c = 2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)
    return a, b, c


@triton.jit
def write_quaternion_slope(
    out, i, some, w, x, y, z, norm, d0, d1, d2, d3, d4, d5, d6, d7, d8
):  # fmt: skip
    """Gradient by the raw quaternion from that by the rotation matrix, d by rows."""
    gw = 2 * (x * (d7 - d5) + y * (d2 - d6) + z * (d3 - d1))
    gx = 2 * (w * (d7 - d5) + y * (d1 + d3) + z * (d2 + d6) - 2 * x * (d4 + d8))
    gy = 2 * (w * (d2 - d6) + x * (d1 + d3) + z * (d5 + d7) - 2 * y * (d0 + d8))
    gz = 2 * (w * (d3 - d1) + x * (d2 + d6) + y * (d5 + d7) - 2 * z * (d0 + d4))
    inward = gw * w + gx * x + gy * y + gz * z
    tl.store(out + 4 * i, (gw - inward * w) / norm, mask=some)
    tl.store(out + 4 * i + 1, (gx - inward * x) / norm, mask=some)
    tl.store(out + 4 * i + 2, (gy - inward * y) / norm, mask=some)
    tl.store(out + 4 * i + 3, (gz - inward * z) / norm, mask=some)


@triton.jit
def way(place, mx, my, mz):
    """Unit direction from the camera to a splat, and how far that is."""
    x, y, z = mx - tl.load(place), my - tl.load(place + 1), mz - tl.load(place + 2)
    length = tl.maximum(tl.sqrt(x * x + y * y + z * z), 1e-12)
    return x / length, y / length, z / length, length


@triton.jit
def harmonic(j: tl.constexpr, x, y, z):
    """Y_j at a unit direction."""
    xx, yy, zz = x * x, y * y, z * z
    ring = 4 * zz - xx - yy
    if j == 0:
        value = tl.full(x.shape, K0, tl.float32)
    elif j == 1:
        value = -K1 * y
    elif j == 2:
        value = K1 * z
    elif j == 3:
        value = -K1 * x
    elif j == 4:
        value = K2 * x * y
    elif j == 5:
        value = -K2 * y * z
    elif j == 6:
        value = K2_ZZ * (2 * zz - xx - yy)
    elif j == 7:
        value = -K2 * x * z
    elif j == 8:
        value = K2_XX * (xx - yy)
    elif j == 9:
        value = -K3_A * y * (3 * xx - yy)
    elif j == 10:
        value = K3_B * x * y * z
    elif j == 11:
        value = -K3_C * y * ring
    elif j == 12:
        value = K3_D * z * (2 * zz - 3 * (xx + yy))
    elif j == 13:
        value = -K3_C * x * ring
    elif j == 14:
        value = K3_E * z * (xx - yy)
    else:
        value = -K3_A * x * (xx - 3 * yy)
    return value


@triton.jit
def harmonic_slope(j: tl.constexpr, x, y, z):
    """Derivatives of Y_j by x, y and z, as if they were free."""
    xx, yy, zz = x * x, y * y, z * z
    none = tl.zeros(x.shape, tl.float32)
    a, b, c = none, none, none
    if j == 1:
        b = none - K1
    elif j == 2:
        c = none + K1
    elif j == 3:
        a = none - K1
    elif j == 4:
        a, b = K2 * y, K2 * x
    elif j == 5:
        b, c = -K2 * z, -K2 * y
    elif j == 6:
        a, b, c = -2 * K2_ZZ * x, -2 * K2_ZZ * y, 4 * K2_ZZ * z
    elif j == 7:
        a, c = -K2 * z, -K2 * x
    elif j == 8:
        a, b = 2 * K2_XX * x, -2 * K2_XX * y
    elif j == 9:
        a, b = -6 * K3_A * x * y, -3 * K3_A * (xx - yy)
    elif j == 10:
        a, b, c = K3_B * y * z, K3_B * x * z, K3_B * x * y
    elif j == 11:
        a, b, c = 2 * K3_C * x * y, -K3_C * (4 * zz - xx - 3 * yy), -8 * K3_C * y * z
    elif j == 12:
        a, b, c = -6 * K3_D * x * z, -6 * K3_D * y * z, K3_D * (6 * zz - 3 * (xx + yy))
    elif j == 13:
        a, b, c = -K3_C * (4 * zz - 3 * xx - yy), 2 * K3_C * x * y, -8 * K3_C * x * z
    elif j == 14:
        a, b, c = 2 * K3_E * x * z, -2 * K3_E * y * z, K3_E * (xx - yy)
    elif j == 15:
        a, b = -3 * K3_A * (xx - yy), 6 * K3_A * x * y
    return a, b, c


@triton.jit
def colors_of(sh, place, i, some, mx, my, mz, BANDS: tl.constexpr):
    """Red, green and blue of splats seen from `place`."""
    x, y, z, _ = way(place, mx, my, mz)
    red = tl.full(x.shape, 0.5, tl.float32)
    green, blue = red, red
    for j in tl.static_range(BANDS):
        value = harmonic(j, x, y, z)
        r, g, b = read3(sh, BANDS * i + j, some)
        red += value * r
        green += value * g
        blue += value * b
    return tl.maximum(red, 0.0), tl.maximum(green, 0.0), tl.maximum(blue, 0.0)


@triton.jit
def color_slopes(
    sh, place, d_sh, i, some, mx, my, mz, red, green, blue, BANDS: tl.constexpr
):  # fmt: skip
    """Fills the gradients by the harmonics; gives those by the place of the splat."""
    x, y, z, length = way(place, mx, my, mz)
    gx = tl.zeros(x.shape, tl.float32)
    gy, gz = gx, gx
    for j in tl.static_range(BANDS):
        value = harmonic(j, x, y, z)
        write3(d_sh, BANDS * i + j, some, value * red, value * green, value * blue)
        r, g, b = read3(sh, BANDS * i + j, some)
        slope = r * red + g * green + b * blue
        dx, dy, dz = harmonic_slope(j, x, y, z)
        gx += slope * dx
        gy += slope * dy
        gz += slope * dz
    inward = gx * x + gy * y + gz * z
    return (gx - inward * x) / length, (gy - inward * y) / length, (gz - inward * z) / length


@triton.jit
def write_mean_slopes(out, view, i, some, tx, ty, tz, wx, wy, wz):
    """From gradients by the camera point and, by the harmonics, by the place in the world."""
    for k in tl.static_range(3):
        turned = tl.load(view + k) * tx + tl.load(view + 4 + k) * ty + tl.load(view + 8 + k) * tz
        tl.store(out + 3 * i + k, turned + (wx if k == 0 else wy if k == 1 else wz), mask=some)


@triton.jit
def pixel_of(width, height):
    """Centres of a tile's pixels, which of the picture each is (32 bits), whether it is in it."""
    lane = tl.arange(0, PIXELS)
    x = tl.program_id(0) * SIDE + lane % SIDE
    y = tl.program_id(1) * SIDE + lane // SIDE
    inside = (x < width) & (y < height)
    return x + 0.5, y + 0.5, y * width + x, inside


@triton.jit
def tile_bounds(offsets):
    """Where the pairs of this program's tile begin and end."""
    tile = offsets + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    return tl.load(tile), tl.load(tile + 1)


@triton.jit
def blend_one(alpha, left):
    """Blends a splat into pixels: its weight before the stop, its weight, and the new `left`.

    That is the transmittance, below 0 in a pixel that has ended.
    """
    before = tl.maximum(left, 0.0)
    reached, after = alpha * before, before * (1 - alpha)
    goes = after > MIN_TRANSMITTANCE
    return reached, tl.where(goes, reached, 0.0), tl.where(goes, after, -tl.abs(left))


@triton.jit
def note_one(slots, begin, at, reached, weight, best, winner):
    """Writes what a tile tells of the splat of pair `at` into its slot of 4: the sum of its
    weights, the largest before the stop, its pixels. Returns each pixel's largest weight so far,
    and whose that is, counted from `begin`."""
    slot = slots + 4 * at
    tl.store(slot, tl.sum(weight, 0))
    tl.store(slot + 1, tl.max(reached, 0))
    tl.store(slot + 2, tl.sum((weight > 0).to(tl.float32), 0))
    winner = tl.where(weight > best, (at - begin).to(tl.int32), winner)
    return tl.maximum(best, weight), winner


@triton.jit
def note_winners(slots, begin, winner):
    """Adds up, in the last of the 4, the pixels in which a splat weighs most."""
    # whole numbers: their order does not matter
    won = slots + 4 * (begin + winner) + 3
    tl.atomic_add(won, tl.full([PIXELS], 1.0, tl.float32), winner >= 0, sem="relaxed")
