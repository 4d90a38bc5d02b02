// Splats: a thread projects one, a block of 16 x 16 threads blends a tile, nearest splat first.
#include "project.cuh"

extern "C" __global__ void __launch_bounds__(128) project(
    const float *means, const float *quats, const float *scales, const float *opacities,
    const float *sh, const float *view, const float *lens, const float *position, float *records,
    i64 count, int bands, int width, int height, int antialiased) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    float r[RECORD];
#pragma unroll
    for (int k = 0; k < RECORD; k++) r[k] = 0;
    float4 *out = (float4 *)(records + RECORD * n);
    out[0] = out[1] = out[2] = out[3] = make_float4(0, 0, 0, 0);
    Camera c = load_camera(view, lens, width, height);
    float mx = means[3 * n], my = means[3 * n + 1], mz = means[3 * n + 2];
    if (row_at(c, 2, mx, my, mz) < NEAR) return;
    Placed p;
    place(c, mx, my, mz, quats + 4 * n, p);
    float s[3];
    covariance(p, scales + 3 * n, s);
    if (!(fmaxf(s[0], s[2]) <= MAX_VARIANCE)) return;
    float sharp = s[0] * s[2] - s[1] * s[1], xx = s[0] + BLUR, yy = s[2] + BLUR;
    float det = fmaxf(xx * yy - s[1] * s[1], MIN_DETERMINANT), opacity = opacities[n];
    if (antialiased) opacity *= sqrtf(fmaxf(sharp / det, MIN_COMPENSATION * MIN_COMPENSATION));
    if (opacity < MIN_ALPHA) return;
    // rounding takes the logarithm of an opacity of 1/255 below zero
    float limit = fmaxf(2 * (logf(opacity) + 5.541263545158426f), 0.0f);
    float reach_x = sqrtf(limit * xx), reach_y = sqrtf(limit * yy);
    float px = c.fx * p.x * p.iz + c.cx, py = c.fy * p.y * p.iz + c.cy;
    if (px + reach_x < 0 || px - reach_x > width) return;
    if (py + reach_y < 0 || py - reach_y > height) return;
    float dx = mx - position[0], dy = my - position[1], dz = mz - position[2];
    float length = fmaxf(sqrtf(dx * dx + dy * dy + dz * dz), 1e-12f);
    float basis[16];
    sh_basis(dx / length, dy / length, dz / length, bands, basis);
    const float *coefficients = sh + 3 * bands * n;
#pragma unroll
    for (int j = 0; j < 16; j++)
        if (j < bands)
#pragma unroll
            for (int k = 0; k < 3; k++) r[RED + k] += basis[j] * coefficients[3 * j + k];
#pragma unroll
    for (int k = 0; k < 3; k++) r[RED + k] = fmaxf(r[RED + k] + 0.5f, 0.0f);
    r[X] = px, r[Y] = py, r[A] = yy / det, r[B] = -s[1] / det, r[C] = xx / det;
    r[OPACITY] = opacity, r[DEPTH] = p.z, r[SLANT] = r[B] / r[A];
    r[REACH_X] = reach_x, r[REACH_Y] = reach_y, r[LIMIT] = limit;
#pragma unroll
    for (int k = 0; k < 4; k++)
        out[k] = make_float4(r[4 * k], r[4 * k + 1], r[4 * k + 2], r[4 * k + 3]);
}

// Tiles of each splat
extern "C" __global__ void count_tiles(
    const float *records, i64 *counts, i64 count, int tiles_x, int tiles_y) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    const float *r = records + RECORD * n;
    i64 total = 0;
    if (r[OPACITY] > 0) {
        int low, high, first, last;
        rows_of_tiles(r, tiles_y, low, high);
        for (int row = low; row < high; row++) {
            tiles_in_row(r, row, tiles_x, first, last);
            total += max(last - first, 0);
        }
    }
    counts[n] = total;
}

// A pair for each tile of each splat, splats nearest first; `ends` adds up their counts.
extern "C" __global__ void list_tiles(
    const float *records, const i64 *nearest, const i64 *ends, int *tiles, int *splats, i64 count,
    int tiles_x, int tiles_y) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    i64 n = nearest[i], at = i ? ends[i - 1] : 0;
    if (at == ends[i]) return;
    const float *r = records + RECORD * n;
    int low, high, first, last;
    rows_of_tiles(r, tiles_y, low, high);
    for (int row = low; row < high; row++) {
        tiles_in_row(r, row, tiles_x, first, last);
        for (int x = first; x < last; x++, at++) {
            tiles[at] = row * tiles_x + x;
            splats[at] = (int)n;
        }
    }
}

// Pictures of a tile; with slots [pairs, 4] statistics, which come as zeros.
template <bool STATISTICS>
__device__ __forceinline__ void blend_tile(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *lefts, float *slots) {
    alignas(16) __shared__ float batch[BATCH][RECORD];
    __shared__ float parts[STATISTICS ? 3 : 1][WARPS][STATISTICS ? BATCH : 1];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float left = p.inside ? 1.0f : 0.0f, red = 0, green = 0, blue = 0, depth = 0, best = 0;
    bool done = !p.inside;
    i64 winner = -1, end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += BATCH) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)BATCH, end - first);
        load_batch(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            if (!STATISTICS && done) break;
            const float *r = batch[j];
            float alpha = done ? 0.0f : alpha_at(r, p.px, p.py), w = 0, reached = 0;
            if (alpha > 0) {
                w = blend_one(alpha, left, done, reached);
                red += w * r[RED], green += w * r[GREEN], blue += w * r[BLUE];
                depth += w * r[DEPTH];
            }
            if constexpr (STATISTICS) {
                if (w > best) best = w, winner = first + j;
                note_warp(parts, j, w, reached);
            }
        }
        if constexpr (STATISTICS) write_slots(parts, slots, first, count);
    }
    // whole numbers: their order does not matter
    if (STATISTICS && winner >= 0) atomicAdd(slots + 4 * winner + 3, 1.0f);
    if (!p.inside) return;
    colors[3 * p.at] = red + left * background[0];
    colors[3 * p.at + 1] = green + left * background[1];
    colors[3 * p.at + 2] = blue + left * background[2];
    alphas[p.at] = 1.0f - left;
    depths[p.at] = depth;
    if (lefts) lefts[p.at] = left;
}

extern "C" __global__ void __launch_bounds__(256) blend(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *lefts) {
    blend_tile<false>(
        records, offsets, pairs, background, width, height, colors, alphas, depths, lefts, nullptr);
}

extern "C" __global__ void __launch_bounds__(256) blend_counted(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *slots) {
    blend_tile<true>(
        records, offsets, pairs, background, width, height, colors, alphas, depths, nullptr, slots);
}

// Sums of slots [pairs, columns] by splat, in the order of the lists; the largest of one column.
extern "C" __global__ void add_slots(
    const float *slots, const i64 *order, const i64 *bounds, double *sums, i64 count, int columns,
    int largest) {
    i64 i = thread_of_grid();
    if (i >= count * columns) return;
    i64 n = i / columns;
    int column = (int)(i % columns);
    double total = 0;
    for (i64 p = bounds[n]; p < bounds[n + 1]; p++) {
        float value = slots[order[p] * columns + column];
        total = column == largest ? fmax(total, (double)value) : total + value;
    }
    sums[i] = total;
}
