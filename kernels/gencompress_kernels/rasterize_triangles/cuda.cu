// Soft and hard triangles: a warp takes a polygon and walks the pixels of its box.
//
// What many polygons bring to one pixel is added, or compared, as whole numbers of 64 bits, whose
// order does not matter: the same bits at every run.
#include "soft.cuh"

constexpr int WARPS = 4;

// log(1 - P) of all polygons into a picture of sums
extern "C" __global__ void __launch_bounds__(128) cover(
    const float *points, const int *polygons, u64 *sums, i64 count, i64 each, int width, int height,
    float reach, float inverse) {
    __shared__ Edge edges[WARPS][4];
    i64 q = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (q >= count) return;
    Polygon p = load_polygon(points, polygons, q, width, height, reach);
    u64 *picture = sums + q / each * width * height;
    walk(
        p, inverse, edges[threadIdx.x / 32],
        [&](int x, int y, float value, int, float, float) {
            // -log(1 - sigmoid(value))
            float lost = fmaxf(value, 0.0f) + log1pf(expf(-fabsf(value)));
            atomicAdd(picture + (i64)y * width + x, (u64)((double)lost * SHARE));
        },
        [] {});
}

extern "C" __global__ void uncover(const u64 *sums, float *clear, i64 count) {
    i64 i = thread_of_grid();
    if (i < count) clear[i] = expf((float)(-(double)sums[i] / SHARE));
}

__device__ __forceinline__ double primitive(double y, double height) {
    double inner = clampd(y, 0, height);
    return 0.5 * inner * inner + height * fmax(y - inner, 0.0);
}

// Areas within the frame and in all, px^2: see the reference for the first. A thread a polygon.
extern "C" __global__ void extents(
    const float *points, const int *polygons, float *extent, i64 count, int columns, int rows) {
    i64 q = thread_of_grid();
    if (q >= count) return;
    Polygon p = load_polygon(points, polygons, q, columns, rows, 0.0f);
    double within = 0, total = 0, width = columns, height = rows;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        if (!p.number) break;
        int after = (k + 1) % 4;
        double ax = p.corners[2 * k], ay = p.corners[2 * k + 1];
        double bx = p.corners[2 * after], by = p.corners[2 * after + 1];
        total += (ax - p.corners[0]) * (by - p.corners[1]) -
                 (ay - p.corners[1]) * (bx - p.corners[0]);
        double x0 = clampd(ax, 0, width), x1 = clampd(bx, 0, width);
        if (x0 == x1) continue;
        double rise = (by - ay) / (bx - ax);
        double y0 = ay + rise * (x0 - ax), y1 = ay + rise * (x1 - ax);
        if (fabs(y1 - y0) < 1e-6)
            within += clampd(0.5 * (y0 + y1), 0, height) * (x1 - x0);
        else
            within += (primitive(y1, height) - primitive(y0, height)) / rise;
    }
    extent[2 * q] = (float)fabs(within);
    extent[2 * q + 1] = (float)(0.5 * fabs(total));
}

// Whether a box shows ones of the mask and nothing else; holes are counted above and left.
__device__ __forceinline__ bool full(
    const int *holes, const Polygon &p, i64 view, int width, int height) {
    if (!holes) return false;
    i64 line = width + 1;
    const int *table = holes + view * line * (height + 1);
    return table[p.y1 * line + p.x1] - table[p.y0 * line + p.x1] - table[p.y1 * line + p.x0] +
               table[p.y0 * line + p.x0] == 0;
}

extern "C" __global__ void __launch_bounds__(128) measure(
    const float *points, const int *polygons, const float *masks, const int *holes,
    const float *extent, float *sums, float *peak, i64 count, i64 each, int width, int height,
    float reach, float inverse) {
    __shared__ Edge edges[WARPS][4];
    i64 q = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (q >= count) return;
    Polygon p = load_polygon(points, polygons, q, width, height, reach);
    i64 view = q / each;
    double area = 0, outside = 0;
    float highest = 0, one = 0, two = 0;
    bool whole = p.x1 > p.x0 && full(holes, p, view, width, height);
    if (!whole) {
        const float *mask = masks + view * width * height;
        walk(
            p, inverse, edges[threadIdx.x / 32],
            [&](int x, int y, float value, int, float, float) {
                float cover = covered(value);
                float out = cover * (1.0f - mask[(i64)y * width + x]);
                one += cover;
                two += out;
                highest = fmaxf(highest, out);
            },
            [&] {
                area += one, outside += two;
                one = two = 0;
            });
    }
    area = warp_sum(area), outside = warp_sum(outside), highest = warp_max(highest);
    if (lane()) return;
    sums[2 * q] = whole ? extent[2 * q] : (float)area, sums[2 * q + 1] = (float)outside;
    peak[q] = highest;
}

// Gradients by the corners, out [Q, 4, 2]. With slopes [Q, 2] those of the sums, the picture a
// mask; without those of the silhouettes, the picture their slopes times what is left uncovered.
extern "C" __global__ void __launch_bounds__(128) corners(
    const float *points, const int *polygons, const float *pictures, const int *holes,
    const float *slopes, float *out, i64 count, i64 each, int width, int height, float reach,
    float inverse) {
    __shared__ Edge edges[WARPS][4];
    i64 q = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (q >= count) return;
    Polygon p = load_polygon(points, polygons, q, width, height, reach);
    i64 view = q / each;
    bool skip = p.x1 > p.x0 && full(holes, p, view, width, height);
    if (skip) p.x1 = p.x0;
    const float *picture = pictures + view * width * height;
    float by_area = slopes ? slopes[2 * q] : 0.0f, by_outside = slopes ? slopes[2 * q + 1] : 0.0f;
    Edge *mine = edges[threadIdx.x / 32];
    float sums[16] = {0};  // of each edge: its first corner and its second
    walk(
        p, inverse, mine,
        [&](int x, int y, float value, int own, float px, float py) {
            float cover = covered(value), here = picture[(i64)y * width + x];
            float slope = slopes ? (by_area + by_outside * (1.0f - here)) * cover * (1.0f - cover)
                                 : here * cover;
            float pulled[4] = {0, 0, 0, 0};
            pull(mine[own], value >= 0 ? slope : -slope, px, py, pulled);
#pragma unroll
            for (int k = 0; k < 4; k++)  // written out, so that the sums stay in registers
#pragma unroll
                for (int j = 0; j < 4; j++) sums[4 * k + j] += own == k ? pulled[j] : 0.0f;
        },
        [] {});
#pragma unroll
    for (int k = 0; k < 16; k++) sums[k] = warp_sum(sums[k]);
    if (lane()) return;
    float factor = -2.0f * inverse;
    float *place = out + 8 * q;
    // what leads to a corner is its own edge and the one before; a triangle has no fourth edge
    bool three = p.number == 3;
#pragma unroll
    for (int axis = 0; axis < 2; axis++) {
        float last = three ? sums[10 + axis] : sums[14 + axis];
        place[axis] = factor * (sums[axis] + last);
        place[2 + axis] = factor * (sums[4 + axis] + sums[2 + axis]);
        place[4 + axis] = factor * (sums[8 + axis] + sums[6 + axis]);
        place[6 + axis] = three ? 0.0f : factor * (sums[12 + axis] + sums[10 + axis]);
    }
}

// Twice the area of three points
__device__ __forceinline__ double twice(const float *points, i64 a, i64 b, i64 c) {
    double ax = points[2 * a], ay = points[2 * a + 1];
    return (points[2 * b] - ax) * (points[2 * c + 1] - ay) -
           (points[2 * b + 1] - ay) * (points[2 * c] - ax);
}

// The nearest polygon at each pixel centre, as its depth's bits above its number; float64, as two
// neighbours must agree on their edge: both compute it from the same end.
extern "C" __global__ void __launch_bounds__(128) front(
    const float *points, const float *depths, const int *polygons, u64 *nearest, i64 count,
    i64 each, int width, int height) {
    i64 q = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
    if (q >= count) return;
    Polygon p = load_polygon(points, polygons, q, width, height, 0.0f);
    if (p.x1 == p.x0 || p.orient == 0) return;
    const int *corner = polygons + 4 * q;
    double lines[4][3];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        int first = corner[k], second = corner[k >= p.number - 1 ? 0 : k + 1];
        if (k >= p.number) first = corner[p.number - 1], second = corner[0];
        double sign = p.orient;
        if (second < first) {
            int other = first;
            first = second, second = other, sign = -sign;
        }
        double ax = points[2 * (i64)first], ay = points[2 * (i64)first + 1];
        double ex = points[2 * (i64)second] - ax, ey = points[2 * (i64)second + 1] - ay;
        lines[k][0] = sign * (ey * ax - ex * ay);
        lines[k][1] = -sign * ey;
        lines[k][2] = sign * ex;
    }
    double least = 1e300, most = 0;
    for (int k = 0; k < 4; k++) {
        double depth = depths[corner[k]];
        least = fmin(least, depth), most = fmax(most, depth);
    }
    // 1 / depth is linear in the picture; the larger half of a polygon says how
    i64 a = corner[0], b = corner[1], c = corner[2], d = corner[3];
    if (fabs(twice(points, a, c, d)) > fabs(twice(points, a, b, c))) b = c, c = d;
    double area = twice(points, a, b, c), b0 = 0, bx = 0, by = 0;
    for (int k = 0; k < 3; k++) {
        double x = points[2 * b], y = points[2 * b + 1];
        double ex = points[2 * c] - x, ey = points[2 * c + 1] - y;
        double share = 1 / (depths[a] * area);
        b0 += share * (ey * x - ex * y);
        bx -= share * ey;
        by += share * ex;
        i64 first = a;
        a = b, b = c, c = first;
    }
    u64 *picture = nearest + q / each * width * height;
    u32 number = (u32)(q % each);
    int columns = p.x1 - p.x0;
    i64 pixels = (i64)columns * (p.y1 - p.y0);
    for (i64 i = lane(); i < pixels; i += 32) {
        int row = p.y0 + (int)(i / columns), column = p.x0 + (int)(i % columns);
        double x = column + 0.5, y = row + 0.5, inside = 1e300;
#pragma unroll
        for (int k = 0; k < 4; k++)
            inside = fmin(inside, lines[k][0] + lines[k][1] * x + lines[k][2] * y);
        if (inside < 0) continue;
        float depth = (float)fmin(fmax(1 / (b0 + bx * x + by * y), least), most);
        u64 key = (u64)__float_as_uint(depth) << 32 | number;
        atomicMin(picture + (i64)row * width + column, key);
    }
}

// ray . one x other
__device__ __forceinline__ double triple(
    double x, double y, double z, const float *one, const float *other) {
    double ax = one[0], ay = one[1], az = one[2], bx = other[0], by = other[1], bz = other[2];
    return x * (ay * bz - az * by) + y * (az * bx - ax * bz) + z * (ax * by - ay * bx);
}

extern "C" __global__ void weigh(
    const int *winner, const float *seen, const i64 *faces, const float *inverse, float *depths,
    float *weights, i64 count, i64 vertices, int width, int height) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    int face = winner[i];
    float *out = weights + 3 * i;
    if (face < 0) {
        depths[i] = __uint_as_float(0x7f800000u);
        out[0] = out[1] = out[2] = 0.0f;
        return;
    }
    i64 view = i / ((i64)width * height), place = i % ((i64)width * height);
    double x = place % width + 0.5, y = place / width + 0.5;
    const float *m = inverse + 9 * view;
    double rx = m[0] * x + m[1] * y + m[2], ry = m[3] * x + m[4] * y + m[5];
    double rz = m[6] * x + m[7] * y + m[8];
    const float *a = seen + 3 * (view * vertices + faces[3 * (i64)face]);
    const float *b = seen + 3 * (view * vertices + faces[3 * (i64)face + 1]);
    const float *c = seen + 3 * (view * vertices + faces[3 * (i64)face + 2]);
    double wa = triple(rx, ry, rz, b, c), wb = triple(rx, ry, rz, c, a);
    double wc = triple(rx, ry, rz, a, b), sign = wa + wb + wc > 0 ? 1.0 : -1.0;
    // on an edge rounding may leave a weight a little below 0
    wa = fmax(sign * wa, 0.0), wb = fmax(sign * wb, 0.0), wc = fmax(sign * wc, 0.0);
    double share = 1 / fmax(wa + wb + wc, 1e-300);
    wa *= share, wb *= share, wc *= share;
    out[0] = (float)wa, out[1] = (float)wb, out[2] = (float)wc;
    depths[i] = (float)(wa * a[2] + wb * b[2] + wc * c[2]);
}
