// A projected splat, and what it does to a pixel: the arithmetic of `cpu.py`, for one pixel.
// The constants are those of `reference.py`.
#include "../common.cuh"

constexpr int TILE = 16, THREADS = TILE * TILE, WARPS = THREADS / 32;
constexpr int BATCH = 64;  // splats in shared memory: four words of 16 bytes each, one a thread
constexpr int RECORD = 16;  // floats
enum { X, Y, A, B, C, OPACITY, RED, GREEN, BLUE, DEPTH, REACH_X, REACH_Y, LIMIT, SLANT };

// Where the picture of a tile begins, and this thread's pixel in it
struct Pixel {
    int x, y;
    float px, py;  // its centre
    bool inside;
    i64 at;
};

__device__ __forceinline__ Pixel pixel_of_thread(int width, int height) {
    Pixel p;
    p.x = blockIdx.x * TILE + threadIdx.x % TILE;
    p.y = blockIdx.y * TILE + threadIdx.x / TILE;
    p.px = p.x + 0.5f, p.py = p.y + 0.5f;
    p.inside = p.x < width && p.y < height;
    p.at = (i64)p.y * width + p.x;
    return p;
}

__device__ __forceinline__ void load_batch(
    const float *records, const int *pairs, i64 first, int count, float (*batch)[RECORD]) {
    int j = threadIdx.x / 4, part = threadIdx.x % 4;
    if (j >= count) return;
    const float4 *source = (const float4 *)(records + RECORD * (i64)pairs[first + j]);
    ((float4 *)batch[j])[part] = source[part];
}

// alpha at a pixel centre; 0 below 1/255
__device__ __forceinline__ float alpha_at(const float *r, float px, float py) {
    float dx = r[X] - px, dy = r[Y] - py;
    float q = dx * (0.5f * r[A] * dx + r[B] * dy) + 0.5f * r[C] * dy * dy;
    // beyond q = 5.6 alpha is under 1/255 whatever the opacity
    if (q > 5.6f) return 0.0f;
    float alpha = fminf(r[OPACITY] * expf(-fmaxf(q, 0.0f)), MAX_ALPHA);
    return alpha >= MIN_ALPHA ? alpha : 0.0f;
}

// Blends one splat into a pixel: its weight, 0 if it is not blended; `reached` is the weight before
// the stop, which ends the pixel.
__device__ __forceinline__ float blend_one(float alpha, float &left, bool &done, float &reached) {
    reached = alpha * left;
    float after = left * (1.0f - alpha);
    if (after <= MIN_TRANSMITTANCE) {
        done = true;
        return 0.0f;
    }
    left = after;
    return reached;
}

// What a warp's pixels take of splat j of a batch, for `write_slots`.
__device__ __forceinline__ void note_warp(
    float (*parts)[WARPS][BATCH], int j, float w, float reached) {
    float sum = 0, most = 0, hits = 0;
    if (__any_sync(ALL_LANES, reached > 0)) {
        sum = warp_sum(w), most = warp_max(reached);
        hits = __popc(__ballot_sync(ALL_LANES, w > 0));
    }
    if (lane() == 0) {
        int warp = threadIdx.x / 32;
        parts[0][warp][j] = sum, parts[1][warp][j] = most, parts[2][warp][j] = hits;
    }
}

// Sum, largest and number of weights of each splat of a batch, over the warps of the block.
__device__ __forceinline__ void write_slots(
    const float (*parts)[WARPS][BATCH], float *slots, i64 first, int count) {
    __syncthreads();
    if ((int)threadIdx.x >= count) return;
    float sum = 0, most = 0, hits = 0;
    for (int warp = 0; warp < WARPS; warp++) {
        sum += parts[0][warp][threadIdx.x];
        most = fmaxf(most, parts[1][warp][threadIdx.x]);
        hits += parts[2][warp][threadIdx.x];
    }
    float *slot = slots + 4 * (first + threadIdx.x);
    slot[0] = sum, slot[1] = most, slot[2] = hits;
}

// First and last + 1 tile of a row of tiles that the ellipse q = LIMIT / 2 enters; see `cpu.py`.
__device__ __forceinline__ void tiles_in_row(
    const float *r, int row, int tiles_x, int &first, int &last) {
    float top = row * (float)TILE - r[Y], bottom = top + TILE;
    float a = r[A], b = r[B], c = r[C], limit = r[LIMIT];
    float tip = -b / c * r[REACH_X];
    float at = fminf(fmaxf(tip, top), bottom);
    float right = (-b * at + sqrtf(fmaxf(b * b * at * at - a * (c * at * at - limit), 0.0f))) / a;
    at = fminf(fmaxf(-tip, top), bottom);
    float left = (-b * at - sqrtf(fmaxf(b * b * at * at - a * (c * at * at - limit), 0.0f))) / a;
    // a hundredth of a pixel for the rounding of centre and conic
    float low = floorf((r[X] + left - 0.01f) / TILE), high = floorf((r[X] + right + 0.01f) / TILE);
    first = (int)fmaxf(low, 0.0f);
    last = (int)fminf(high + 1, (float)tiles_x);
}

__device__ __forceinline__ void rows_of_tiles(const float *r, int tiles_y, int &low, int &high) {
    low = (int)fmaxf(floorf((r[Y] - r[REACH_Y] - 0.01f) / TILE), 0.0f);
    high = (int)fminf(floorf((r[Y] + r[REACH_Y] + 0.01f) / TILE) + 1, (float)tiles_y);
}
