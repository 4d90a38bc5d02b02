// Surfels: a thread projects one, a block of 16 x 16 threads blends a tile, nearest surfel first.
#include "surfel.cuh"

extern "C" __global__ void __launch_bounds__(128) project_surfels(
    const float *means, const float *quats, const float *scales, const float *opacities,
    const float *sh, const float *view, const float *lens, const float *position, float *records,
    float *boxes, i64 count, int bands, int width, int height) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    float4 *out = (float4 *)(records + SURFEL * n);
#pragma unroll
    for (int k = 0; k < SURFEL / 4; k++) out[k] = make_float4(0, 0, 0, 0);
    float *box = boxes + BOX * n;
    Camera c = load_camera(view, lens, width, height);
    float mx = means[3 * n], my = means[3 * n + 1], mz = means[3 * n + 2], opacity = opacities[n];
    if (row_at(c, 2, mx, my, mz) < NEAR || opacity < MIN_ALPHA) return;
    Plane p;
    lay(c, mx, my, mz, quats + 4 * n, scales + 2 * n, p);
    float size = p.mu * p.mu + p.mv * p.mv;
    float wide = fmaxf(p.xu * p.xu + p.xv * p.xv, p.yu * p.yu + p.yv * p.yv);
    if (wide > MAX_VARIANCE || size > MAX_SLANT) return;
    float px = c.fx * p.sx + c.cx, py = c.fy * p.sy + c.cy, det = p.xu * p.yv - p.xv * p.yu;
    // rounding takes the logarithm of an opacity of 1/255 below zero
    float limit = fmaxf(2 * (logf(opacity) + 5.541263545158426f), 0.0f);
    float disc = sqrtf(limit / LOW_PASS) + 0.01f, low_x = -FAR, low_y = -FAR;
    float cross_x = p.xu * p.mu + p.xv * p.mv, cross_y = p.yu * p.mu + p.yv * p.mv;
    if (size < 1) low_x = px - cross_x / (1 - size), low_y = py - cross_y / (1 - size);
    float middle_x = 0, middle_y = 0, reach_x = UNBOUNDED, reach_y = UNBOUNDED, lean = 0;
    float thick = UNBOUNDED, tip = 0, room = 1 - limit * size;
    if (room > 0.01f) {
        float h = limit / room, ox = -h * cross_x, oy = -h * cross_y;
        float xx = ox * ox + h * (p.xu * p.xu + p.xv * p.xv);
        float xy = ox * oy + h * (p.xu * p.yu + p.xv * p.yv);
        float yy = oy * oy + h * (p.yu * p.yu + p.yv * p.yv);
        middle_x = px + ox, middle_y = py + oy;
        // a hundredth of a pixel, and a ten thousandth, for the rounding
        reach_x = sqrtf(xx) * 1.0001f + 0.01f, reach_y = sqrtf(yy) * 1.0001f + 0.01f;
        lean = xy / fmaxf(yy, 1e-12f);
        // sqrt(det S / S_yy), and det S = h^2 det(J)^2 / room
        thick = h * fabsf(det) / sqrtf(room * fmaxf(yy, 1e-12f));
        thick = fminf(thick, sqrtf(xx)) * 1.0001f + 0.01f;
        tip = xy / sqrtf(fmaxf(xx, 1e-12f));
    }
    box[BOX_X] = middle_x, box[BOX_Y] = middle_y, box[BOX_REACH_X] = reach_x;
    box[BOX_REACH_Y] = reach_y, box[LEAN] = lean, box[THICK] = thick, box[TIP] = tip;
    box[DISC] = disc;
    float left = fminf(middle_x - reach_x, low_x - disc);
    float right = fmaxf(middle_x + reach_x, low_x + disc);
    float top = fminf(middle_y - reach_y, low_y - disc);
    float bottom = fmaxf(middle_y + reach_y, low_y + disc);
    if (right < 0 || left > width || bottom < 0 || top > height) return;
    // a common factor of the six leaves u, v and the depth as they are
    float largest = fmaxf(fmaxf(fabsf(p.xu), fabsf(p.xv)), fmaxf(fabsf(p.yu), fabsf(p.yv)));
    float factor = largest > 1e-18f ? 1 / largest : 0.0f;
    if (det < 0) factor = -factor;
    float r[SURFEL];
#pragma unroll
    for (int k = 0; k < SURFEL; k++) r[k] = 0;
    r[X] = px, r[Y] = py, r[LOW_X] = low_x, r[LOW_Y] = low_y;
    r[UX] = factor * p.yv, r[UY] = -factor * p.xv, r[VX] = -factor * p.yu, r[VY] = factor * p.xu;
    r[D0] = r[UX] * p.xu + r[UY] * p.yu;
    r[DX] = -(r[UX] * p.mu + r[VX] * p.mv), r[DY] = -(r[UY] * p.mu + r[VY] * p.mv);
    r[FACTOR] = factor, r[OPACITY] = opacity, r[DEPTH] = p.z, r[TOP] = top, r[BOTTOM] = bottom;
    float facing = p.seen[2] * p.x + p.seen[5] * p.y + p.seen[8] * p.z;
    float side = facing > 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int k = 0; k < 3; k++) r[NORMAL_X + k] = side * p.seen[3 * k + 2];
    float dx = mx - position[0], dy = my - position[1], dz = mz - position[2];
    float length = fmaxf(sqrtf(dx * dx + dy * dy + dz * dz), 1e-12f), basis[16];
    sh_basis(dx / length, dy / length, dz / length, bands, basis);
    const float *coefficients = sh + 3 * bands * n;
#pragma unroll
    for (int j = 0; j < 16; j++)
        if (j < bands)
#pragma unroll
            for (int k = 0; k < 3; k++) r[RED + k] += basis[j] * coefficients[3 * j + k];
#pragma unroll
    for (int k = 0; k < 3; k++) r[RED + k] = fmaxf(r[RED + k] + 0.5f, 0.0f);
#pragma unroll
    for (int k = 0; k < SURFEL / 4; k++)
        out[k] = make_float4(r[4 * k], r[4 * k + 1], r[4 * k + 2], r[4 * k + 3]);
}

extern "C" __global__ void count_surfel_tiles(
    const float *records, const float *boxes, i64 *counts, i64 count, int tiles_x, int tiles_y) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    const float *r = records + SURFEL * n, *b = boxes + BOX * n;
    i64 total = 0;
    if (r[OPACITY] > 0) {
        int low, high, first, last;
        surfel_rows(r, tiles_y, low, high);
        for (int row = low; row < high; row++) {
            surfel_tiles(r, b, row, tiles_x, first, last);
            total += max(last - first, 0);
        }
    }
    counts[n] = total;
}

extern "C" __global__ void list_surfel_tiles(
    const float *records, const float *boxes, const i64 *nearest, const i64 *ends, int *tiles,
    int *surfels, i64 count, int tiles_x, int tiles_y) {
    i64 i = thread_of_grid();
    if (i >= count) return;
    i64 n = nearest[i], at = i ? ends[i - 1] : 0;
    if (at == ends[i]) return;
    const float *r = records + SURFEL * n, *b = boxes + BOX * n;
    int low, high, first, last;
    surfel_rows(r, tiles_y, low, high);
    for (int row = low; row < high; row++) {
        surfel_tiles(r, b, row, tiles_x, first, last);
        for (int x = first; x < last; x++, at++) {
            tiles[at] = row * tiles_x + x;
            surfels[at] = (int)n;
        }
    }
}

// Pictures of a tile; with slots [pairs, 4] statistics, which come as zeros.
template <bool STATISTICS>
__device__ __forceinline__ void blend_surfel_tile(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *medians, float *normals,
    float *distortions, float *slots) {
    alignas(16) __shared__ float batch[BATCH][SURFEL];
    __shared__ float parts[STATISTICS ? 3 : 1][WARPS][STATISTICS ? BATCH : 1];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float left = p.inside ? 1.0f : 0.0f, color[3] = {0, 0, 0}, normal[3] = {0, 0, 0};
    float far = 0, median = 0, spread = 0, best = 0;
    bool done = !p.inside;
    i64 winner = -1, end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += BATCH) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)BATCH, end - first);
        load_surfels(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            if (!STATISTICS && done) break;
            const float *r = batch[j];
            float w = 0, reached = 0;
            if (!done) {
                Hit h = hit_at(r, p.px, p.py);
                if (h.alpha > 0) {
                    float before = left;
                    w = blend_one(h.alpha, left, done, reached);
                    if (w > 0 && before > MEDIAN && left <= MEDIAN) median += h.depth;
                    // 2 w (z A - D), with A = 1 - transmittance and D the sum of w z so far
                    spread += 2 * w * (h.depth * (1.0f - before) - far);
                    far += w * h.depth;
#pragma unroll
                    for (int k = 0; k < 3; k++)
                        color[k] += w * r[RED + k], normal[k] += w * r[NORMAL_X + k];
                }
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
#pragma unroll
    for (int k = 0; k < 3; k++) {
        colors[3 * p.at + k] = color[k] + left * background[k];
        normals[3 * p.at + k] = normal[k];
    }
    alphas[p.at] = 1.0f - left, depths[p.at] = far, medians[p.at] = median;
    distortions[p.at] = spread;
}

extern "C" __global__ void __launch_bounds__(256) blend_surfels(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *medians, float *normals,
    float *distortions, float *slots) {
    blend_surfel_tile<false>(
        records, offsets, pairs, background, width, height, colors, alphas, depths, medians,
        normals, distortions, slots);
}

extern "C" __global__ void __launch_bounds__(256) blend_surfels_counted(
    const float *records, const i64 *offsets, const int *pairs, const float *background, int width,
    int height, float *colors, float *alphas, float *depths, float *medians, float *normals,
    float *distortions, float *slots) {
    blend_surfel_tile<true>(
        records, offsets, pairs, background, width, height, colors, alphas, depths, medians,
        normals, distortions, slots);
}
