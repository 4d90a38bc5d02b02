// Gradients of splats, and what pictures lose without them: the lists walked once more, front to
// back, with what lies behind as the whole minus what was passed; see `cpu_backward.py`.
#include "project.cuh"

// Columns of a slot: weighted colour and depth gradients, moments of the gradient by q over the
// offsets from pixel to centre, and the absolute gradients of the centre
enum { G_RED, G_GREEN, G_BLUE, G_DEPTH, M, MX, MY, MXX, MXY, MYY, ABS_X, ABS_Y, SUMS };

// Sums of each splat of a batch over the tile, from those of the warps
template <int COLUMNS>
__device__ __forceinline__ void store_slots(
    float (*parts)[WARPS][BATCH], i64 first, int count, float *slots) {
    __syncthreads();
    for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
        int j = i / COLUMNS, column = i % COLUMNS;
        float total = 0;
        for (int warp = 0; warp < WARPS; warp++) total += parts[column][warp][j];
        slots[(first + j) * COLUMNS + column] = total;
    }
}

template <int COLUMNS>
__device__ __forceinline__ void store_warp(
    float (*parts)[WARPS][BATCH], int j, bool any, float *values) {
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        float total = any ? warp_sum(values[column]) : 0.0f;
        if (lane() == 0) parts[column][warp][j] = total;
    }
}

template <int COLUMNS>
__device__ __forceinline__ void pair_slopes(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *for_colors, const float *for_alphas,
    const float *for_depths, int width, int height, float *slots) {
    alignas(16) __shared__ float batch[BATCH][RECORD];
    __shared__ float parts[COLUMNS][WARPS][BATCH];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float gr = 0, gg = 0, gb = 0, gd = 0, rest = 0, left = p.inside ? 1.0f : 0.0f;
    bool done = !p.inside;
    if (p.inside) {
        gr = for_colors[3 * p.at], gg = for_colors[3 * p.at + 1], gb = for_colors[3 * p.at + 2];
        gd = for_depths[p.at];
        // the colours hold the background, times the transmittance that alpha hides
        rest = gr * colors[3 * p.at] + gg * colors[3 * p.at + 1] + gb * colors[3 * p.at + 2] +
               gd * depths[p.at] - for_alphas[p.at] * (1.0f - alphas[p.at]);
    }
    i64 end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += BATCH) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)BATCH, end - first);
        load_batch(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            const float *r = batch[j];
            float alpha = done ? 0.0f : alpha_at(r, p.px, p.py), reached, w = 0;
            if (alpha > 0) w = blend_one(alpha, left, done, reached);
            bool any = __any_sync(ALL_LANES, w > 0);
            float values[COLUMNS];
            if (any) {
                float share = w * (gr * r[RED] + gg * r[GREEN] + gb * r[BLUE] + gd * r[DEPTH]);
                rest -= share;
                // none where nothing was blended, nor where alpha is held at its limit
                bool moves = w > 0 && alpha < MAX_ALPHA;
                float s = moves ? alpha / (1.0f - alpha) * rest - share : 0.0f;
                float dx = r[X] - p.px, dy = r[Y] - p.py;
                values[G_RED] = w * gr, values[G_GREEN] = w * gg, values[G_BLUE] = w * gb;
                values[G_DEPTH] = w * gd, values[M] = s, values[MX] = s * dx, values[MY] = s * dy;
                values[MXX] = s * dx * dx, values[MXY] = s * dx * dy, values[MYY] = s * dy * dy;
                if (COLUMNS == SUMS) {
                    values[COLUMNS - 2] = fabsf(s * (r[A] * dx + r[B] * dy));
                    values[COLUMNS - 1] = fabsf(s * (r[B] * dx + r[C] * dy));
                }
            }
            store_warp<COLUMNS>(parts, j, any, values);
        }
        store_slots<COLUMNS>(parts, first, count, slots);
    }
}

extern "C" __global__ void __launch_bounds__(256) blend_slopes(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *for_colors, const float *for_alphas,
    const float *for_depths, int width, int height, float *slots) {
    pair_slopes<SUMS - 2>(
        records, offsets, pairs, colors, alphas, depths, for_colors, for_alphas, for_depths, width,
        height, slots);
}

extern "C" __global__ void __launch_bounds__(256) blend_slopes_absolute(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *for_colors, const float *for_alphas,
    const float *for_depths, int width, int height, float *slots) {
    pair_slopes<SUMS>(
        records, offsets, pairs, colors, alphas, depths, for_colors, for_alphas, for_depths, width,
        height, slots);
}

// One channel: takes a splat's share out of what lies behind; how much the pixel would change
// without the splat.
__device__ __forceinline__ float change_of(float &behind, float weight, float gain, float color) {
    float share = weight * color;
    behind -= share;
    return gain * behind - share;
}

// Squared change of colour if the splat alone were missing; with wanted pictures five sums more.
template <int COLUMNS>
__device__ __forceinline__ void pair_changes(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *lefts, const float *wanted, const float *wanted_alphas, int width, int height,
    float *slots) {
    alignas(16) __shared__ float batch[BATCH][RECORD];
    __shared__ float parts[COLUMNS][WARPS][BATCH];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float red = 0, green = 0, blue = 0, last = 0, mr = 0, mg = 0, mb = 0, half = 0;
    float left = p.inside ? 1.0f : 0.0f;
    bool done = !p.inside;
    if (p.inside) {
        red = colors[3 * p.at], green = colors[3 * p.at + 1], blue = colors[3 * p.at + 2];
        last = lefts[p.at];
        if (COLUMNS > 1) {
            mr = wanted[3 * p.at] - red, mg = wanted[3 * p.at + 1] - green;
            mb = wanted[3 * p.at + 2] - blue;
            half = 0.5f * (1.0f - wanted_alphas[p.at] - last);
        }
    }
    i64 end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += BATCH) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)BATCH, end - first);
        load_batch(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            const float *r = batch[j];
            float alpha = done ? 0.0f : alpha_at(r, p.px, p.py), reached, w = 0;
            if (alpha > 0) w = blend_one(alpha, left, done, reached);
            bool any = __any_sync(ALL_LANES, w > 0);
            float values[COLUMNS];
            if (any) {
                float gain = w > 0 ? alpha / (1.0f - alpha) : 0.0f, leak = gain * last;
                float dr = change_of(red, w, gain, r[RED]);
                float dg = change_of(green, w, gain, r[GREEN]);
                float db = change_of(blue, w, gain, r[BLUE]);
                // the mean over black and white of the squared change
                values[0] = dr * dr + dg * dg + db * db + leak * (dr + dg + db + 1.5f * leak);
                if (COLUMNS > 1) {
                    values[COLUMNS - 5] = dr * (mr + half) + dg * (mg + half) + db * (mb + half) +
                                          leak * (0.5f * (mr + mg + mb) + 3.0f * half);
                    values[COLUMNS - 4] = w;
                    values[COLUMNS - 3] = w * (mr + half);
                    values[COLUMNS - 2] = w * (mg + half);
                    values[COLUMNS - 1] = w * (mb + half);
                }
            }
            store_warp<COLUMNS>(parts, j, any, values);
        }
        store_slots<COLUMNS>(parts, first, count, slots);
    }
}

extern "C" __global__ void __launch_bounds__(256) removals(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *lefts, int width, int height, float *slots) {
    pair_changes<1>(
        records, offsets, pairs, colors, lefts, nullptr, nullptr, width, height, slots);
}

extern "C" __global__ void __launch_bounds__(256) corrections(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *lefts, const float *wanted, const float *wanted_alphas, int width, int height,
    float *slots) {
    pair_changes<6>(
        records, offsets, pairs, colors, lefts, wanted, wanted_alphas, width, height, slots);
}

// Takes the sums [N, columns] through conic, blur, projection and harmonics. `pose` [N, 15], unless
// null, collects the gradient by the rows of [R | t], then that by the camera's place.
extern "C" __global__ void __launch_bounds__(128) project_slopes(
    const float *means, const float *quats, const float *scales, const float *opacities,
    const float *sh, const float *view, const float *lens, const float *position,
    const float *records, const float *sums, float *d_means, float *d_quats, float *d_scales,
    float *d_opacities, float *d_sh, float *probe, float *pose, i64 count, int bands, int columns,
    int width, int height, int antialiased) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    const float *r = records + RECORD * n, *s = sums + columns * n;
    if (r[OPACITY] <= 0) return;
    Camera cam = load_camera(view, lens, width, height);
    // centre, conic and opacity on the screen, from the moments
    float a = r[A], b = r[B], c = r[C];
    float g_x = a * s[MX] + b * s[MY], g_y = b * s[MX] + c * s[MY];
    probe[4 * n] = g_x, probe[4 * n + 1] = g_y;
    probe[4 * n + 2] = columns == SUMS ? s[ABS_X] : 0.0f;
    probe[4 * n + 3] = columns == SUMS ? s[ABS_Y] : 0.0f;
    float g_a = 0.5f * s[MXX], g_b = s[MXY], g_c = 0.5f * s[MYY], g_opacity = -s[M] / r[OPACITY];
    // covariance: -Q G Q with G the symmetric gradient by the conic Q
    float qa = a * g_a + 0.5f * b * g_b, qb = 0.5f * a * g_b + b * g_c;
    float qc = b * g_a + 0.5f * c * g_b, qd = 0.5f * b * g_b + c * g_c;
    float g_xx = -(qa * a + qb * b), g_xy = -2 * (qa * b + qb * c), g_yy = -(qc * b + qd * c);
    float mx = means[3 * n], my = means[3 * n + 1], mz = means[3 * n + 2];
    Placed p;
    place(cam, mx, my, mz, quats + 4 * n, p);
    if (antialiased) {
        float k[3];
        covariance(p, scales + 3 * n, k);
        float sharp = k[0] * k[2] - k[1] * k[1], xx = k[0] + BLUR, yy = k[2] + BLUR;
        float det = xx * yy - k[1] * k[1], ratio = sharp / det;
        float least = MIN_COMPENSATION * MIN_COMPENSATION, factor = sqrtf(fmaxf(ratio, least));
        if (ratio >= least) {
            float g_ratio = 0.5f * g_opacity * opacities[n] / factor;
            float g_sharp = g_ratio / det, g_det = -g_ratio * ratio / det;
            g_xx += g_sharp * k[2] + g_det * yy;
            g_yy += g_sharp * k[0] + g_det * xx;
            g_xy -= 2 * (g_sharp + g_det) * k[1];
        }
        g_opacity *= factor;
    }
    d_opacities[n] = g_opacity;
    float du[3] = {0, 0, 0}, dv[3] = {0, 0, 0}, turned[9];
#pragma unroll
    for (int k = 0; k < 3; k++) {
        float u, v, size = scales[3 * n + k];
        along(p, k, u, v);
        float g_u = (2 * g_xx * u + g_xy * v) * size, g_v = (2 * g_yy * v + g_xy * u) * size;
        d_scales[3 * n + k] = g_u * u + g_v * v;
        g_u *= size, g_v *= size;
#pragma unroll
        for (int j = 0; j < 3; j++) {
            turned[3 * j + k] = g_u * p.u[j] + g_v * p.v[j];
            du[j] += g_u * p.turn[3 * j + k];
            dv[j] += g_v * p.turn[3 * j + k];
        }
    }
    quaternion_slope(p, turned, d_quats + 4 * n);
    // the camera point: from the Jacobian, the centre and the depth
    float g_jx0 = 0, g_jy1 = 0, g_jx2 = 0, g_jy2 = 0;
#pragma unroll
    for (int k = 0; k < 3; k++) {
        g_jx0 += du[k] * cam.view[k], g_jy1 += dv[k] * cam.view[4 + k];
        g_jx2 += du[k] * cam.view[8 + k], g_jy2 += dv[k] * cam.view[8 + k];
    }
    float px = p.x * p.iz, py = p.y * p.iz, g_px = cam.fx * g_x, g_py = cam.fy * g_y;
    if (cam.low_x <= px && px <= cam.high_x) g_px -= cam.fx * p.iz * g_jx2;
    if (cam.low_y <= py && py <= cam.high_y) g_py -= cam.fy * p.iz * g_jy2;
    float t[3] = {g_px * p.iz, g_py * p.iz,
                  s[G_DEPTH] - (g_px * px + g_py * py) * p.iz -
                      (p.jx0 * g_jx0 + p.jx2 * g_jx2 + p.jy1 * g_jy1 + p.jy2 * g_jy2) * p.iz};
    // colour: harmonics, and the direction they are seen along
    float color[3], w[3];
#pragma unroll
    for (int k = 0; k < 3; k++) color[k] = r[RED + k] > 0 ? s[G_RED + k] : 0.0f;
    sh_slopes(
        sh + 3 * bands * n, color, mx - position[0], my - position[1], mz - position[2], bands,
        d_sh + 3 * bands * n, w);
#pragma unroll
    for (int k = 0; k < 3; k++)
        d_means[3 * n + k] =
            cam.view[k] * t[0] + cam.view[4 + k] * t[1] + cam.view[8 + k] * t[2] + w[k];
    if (!pose) return;
    float *own = pose + 15 * n, mean[3] = {mx, my, mz};
#pragma unroll
    for (int k = 0; k < 3; k++) {
        own[k] = t[0] * mean[k] + p.jx0 * du[k];
        own[4 + k] = t[1] * mean[k] + p.jy1 * dv[k];
        own[8 + k] = t[2] * mean[k] + p.jx2 * du[k] + p.jy2 * dv[k];
        own[3 + 4 * k] = t[k];
        own[12 + k] = -w[k];
    }
}
