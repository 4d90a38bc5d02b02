// Moments of each splat's offsets from the pixels it shows in: see `cpu_squares.py`, `moments.py`.
#include "splat.cuh"

constexpr int GROUP = 16;  // splats in shared memory: 35 sums of 8 warps each

// One channel: takes a splat's share out of what lies behind, and gives dC/d log alpha.
__device__ __forceinline__ float slope_of(
    float &behind, float weight, float gain, bool free, float color) {
    float share = weight * color;
    behind -= share;
    return free ? share - gain * behind : 0.0f;
}

template <int COLUMNS>
__device__ __forceinline__ void pair_moments(
    const float *records, const i64 *offsets, const int *pairs, const float *colors, int width,
    int height, float *slots) {
    alignas(16) __shared__ float batch[GROUP][RECORD];
    __shared__ float parts[COLUMNS][WARPS][GROUP];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float left = p.inside ? 1.0f : 0.0f, behind[3] = {0, 0, 0};
    bool done = !p.inside;
    if (p.inside)
        for (int k = 0; k < 3; k++) behind[k] = colors[3 * p.at + k];
    i64 end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += GROUP) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)GROUP, end - first);
        load_batch(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            const float *r = batch[j];
            float alpha = done ? 0.0f : alpha_at(r, p.px, p.py), reached, w = 0;
            if (alpha > 0) w = blend_one(alpha, left, done, reached);
            bool any = __any_sync(ALL_LANES, w > 0);
            float values[COLUMNS];
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) values[k] = 0;
            if (w > 0) {
                // alpha follows the splat where it is not held at its maximum
                bool free = alpha < MAX_ALPHA;
                float gain = alpha / (1.0f - alpha), slope[3], square = 0;
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    slope[k] = slope_of(behind[k], w, gain, free, r[RED + k]);
                    square += slope[k] * slope[k];
                }
                float ratio = r[OPACITY] / alpha;  // 1 / g
                values[0] = square * ratio * ratio;
                if (COLUMNS == 2) {
                    values[1] = square;
                } else {
                    // beyond 4 nothing is blended, and powers could leave float32
                    float dy = r[Y] - p.py;
                    float s = clampf(
                        sqrtf(r[A]) * (r[X] + r[B] / r[A] * dy - p.px), -4.0f, 4.0f);
                    float t = dy / fmaxf(r[REACH_Y], 1.0f), lift = square;
                    int at = 1;
#pragma unroll
                    for (int b = 0; b < 5; b++) {
                        float power = lift;
#pragma unroll
                        for (int a = 0; a < 5 - b; a++) {
                            if (at < COLUMNS) values[at++] = power;
                            power *= s;
                        }
                        lift *= t;
                    }
#pragma unroll
                    for (int k = 0; k < 3; k++) {
                        lift = w * slope[k];
#pragma unroll
                        for (int b = 0; b < 3; b++) {
                            float power = lift;
#pragma unroll
                            for (int a = 0; a < 3 - b; a++) {
                                if (at < COLUMNS) values[at++] = power;
                                power *= s;
                            }
                            lift *= t;
                        }
                    }
                    values[COLUMNS - 1] = w * w;
                }
            }
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) {
                float total = any ? warp_sum(values[k]) : 0.0f;
                if (lane() == 0) parts[k][threadIdx.x / 32][j] = total;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count * COLUMNS; i += THREADS) {
            int j = i / COLUMNS, column = i % COLUMNS;
            float total = 0;
            for (int warp = 0; warp < WARPS; warp++) total += parts[column][warp][j];
            slots[(first + j) * COLUMNS + column] = total;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) squares(
    const float *records, const i64 *offsets, const int *pairs, const float *colors, int width,
    int height, float *slots) {
    pair_moments<2>(records, offsets, pairs, colors, width, height, slots);
}

extern "C" __global__ void __launch_bounds__(256, 2) moments(
    const float *records, const i64 *offsets, const int *pairs, const float *colors, int width,
    int height, float *slots) {
    pair_moments<35>(records, offsets, pairs, colors, width, height, slots);
}
