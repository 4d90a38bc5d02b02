// The gated hash grid: a thread takes a point, or a point in a level (the second axis of the grid).
#include "corners.cuh"

extern "C" __global__ void gate(
    const float *points, const float *logits, const signed char *cells, float *saliency, i64 count,
    int side) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    float x = inside(points[3 * i]), y = inside(points[3 * i + 1]), z = inside(points[3 * i + 2]);
    Spot s = in_grid(x, y, z, side);
    float p = 1;
    if (logits) {
        float value = 0;
        for (int k = 0; k < 8; k++) value += share(s, k) * logits[place_of(s, k, side)];
        float t = expf(-fabsf(value));
        p = (value >= 0 ? 1.0f : t) / (1 + t);
    }
    if (cells && !cells[((i64)s.x * (side - 1) + s.y) * (side - 1) + s.z]) p = 0;
    saliency[i] = p;
}

extern "C" __global__ void encode(
    const float *points, const float *table, const float *saliency, const float *scales,
    const i64 *offsets, const i64 *strides, float *features, i64 count, int levels, int width) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    int level = blockIdx.y;
    float p = saliency[i];
    float *out = features + (i * levels + level) * width;
    if (p == 0) {
        for (int c = 0; c < width; c++) out[c] = 0;
        return;
    }
    float x = inside(points[3 * i]), y = inside(points[3 * i + 1]), z = inside(points[3 * i + 2]);
    Spot s = in_level(x, y, z, scales[level]);
    i64 first = offsets[level], rows = offsets[level + 1] - first, stride = strides[level];
    if (width == 2) {  // as most tables are: a row is one word of 8 bytes
        const float2 *pairs = (const float2 *)table + first;
        float a = 0, b = 0;
        for (int k = 0; k < 8; k++) {
            float2 pair = pairs[row_of(s, k, stride, rows)];
            float w = share(s, k);
            a += w * pair.x, b += w * pair.y;
        }
        out[0] = p * a, out[1] = p * b;
        return;
    }
    for (int c = 0; c < width; c++) {
        float total = 0;
        for (int k = 0; k < 8; k++)
            total += share(s, k) * table[(first + row_of(s, k, stride, rows)) * width + c];
        out[c] = p * total;
    }
}

__device__ void add(i64 *sums, i64 at, double value) {
    atomicAdd((u64 *)sums + at, (u64)(i64)value);
}

// by_f [M, L F] into the rows of the table, in parts of 1 / unit
extern "C" __global__ void scatter(
    const float *points, const float *by_f, const float *saliency, const float *scales,
    const i64 *offsets, const i64 *strides, const double *unit, i64 *sums, i64 count, int levels,
    int width) {
    i64 i = thread_of_grid();
    if (i >= count || saliency[i] == 0) return;
    int level = blockIdx.y;
    float x = inside(points[3 * i]), y = inside(points[3 * i + 1]), z = inside(points[3 * i + 2]);
    Spot s = in_level(x, y, z, scales[level]);
    i64 first = offsets[level], rows = offsets[level + 1] - first, stride = strides[level];
    const float *slopes = by_f + (i * levels + level) * width;
    for (int k = 0; k < 8; k++) {
        i64 at = (first + row_of(s, k, stride, rows)) * width;
        double w = share(s, k) * *unit;
        for (int c = 0; c < width; c++) add(sums, at + c, w * slopes[c]);
    }
}

extern "C" __global__ void scatter_logits(
    const float *points, const float *by_z, const float *saliency, const double *unit, i64 *sums,
    i64 count, int side) {
    i64 i = thread_of_grid();
    if (i >= count || saliency[i] == 0) return;
    float x = inside(points[3 * i]), y = inside(points[3 * i + 1]), z = inside(points[3 * i + 2]);
    Spot s = in_grid(x, y, z, side);
    double slope = by_z[i] * *unit;
    for (int k = 0; k < 8; k++) add(sums, place_of(s, k, side), share(s, k) * slope);
}

extern "C" __global__ void unfix(const i64 *sums, const double *unit, float *out, i64 count) {
    i64 i = thread_of_grid();
    if (i < count) out[i] = (float)((double)sums[i] / *unit);
}

// Gradients of the points [M, 3]; a coordinate that was clamped has none.
extern "C" __global__ void move(
    const float *points, const float *table, const float *logits, const float *by_f,
    const float *by_z, const float *saliency, const float *scales, const i64 *offsets,
    const i64 *strides, float *out, i64 count, int levels, int width, int side) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    float raw[3] = {points[3 * i], points[3 * i + 1], points[3 * i + 2]}, sums[3] = {0, 0, 0};
    float x = inside(raw[0]), y = inside(raw[1]), z = inside(raw[2]);
    bool alive = saliency[i] != 0;
    for (int level = 0; alive && level < levels; level++) {
        Spot s = in_level(x, y, z, scales[level]);
        i64 first = offsets[level], rows = offsets[level + 1] - first, stride = strides[level];
        const float *slopes = by_f + (i * levels + level) * width;
        float slope[3] = {0, 0, 0};
        for (int k = 0; k < 8; k++) {
            const float *row = table + (first + row_of(s, k, stride, rows)) * width;
            float height = 0;
            for (int c = 0; c < width; c++) height += row[c] * slopes[c];
            lean(s, k, height, slope);
        }
        for (int axis = 0; axis < 3; axis++) sums[axis] += scales[level] * slope[axis];
    }
    if (alive && logits) {
        Spot s = in_grid(x, y, z, side);
        float slope[3] = {0, 0, 0};
        for (int k = 0; k < 8; k++) lean(s, k, logits[place_of(s, k, side)] * by_z[i], slope);
        for (int axis = 0; axis < 3; axis++) sums[axis] += (side - 1) * slope[axis];
    }
    out[3 * i] = raw[0] == x ? sums[0] : 0;
    out[3 * i + 1] = raw[1] == y ? sums[1] : 0;
    out[3 * i + 2] = raw[2] == z ? sums[2] : 0;
}
