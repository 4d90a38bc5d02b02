// Radix select on the bits of float32, 11 of them at a time, highest first; see `cpu.py`.
//
// state: [0] bits of the key that are known, [1] how many of the scores with these bits are wanted.
#include "../common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int BINS = 2048, STEPS = 16;  // scores a thread of `tally` and `mark`

// Ranks as the float does; -0.0 as 0.0
__device__ __forceinline__ u32 key_of(float score) {
    u32 bits = __float_as_uint(score);
    u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return key == 0x7fffffffu ? 0x80000000u : key;
}

extern "C" __global__ void __launch_bounds__(256) histogram(
    const float *scores, i64 count, const u64 *state, u64 *bins, int shift, int known,
    int mask) {
    __shared__ u32 mine[BINS];
    for (int b = threadIdx.x; b < BINS; b += THREADS) mine[b] = 0;
    __syncthreads();
    u64 prefix = state[0];
    for (i64 i = thread_of_grid(); i < count; i += (i64)gridDim.x * THREADS) {
        u32 key = key_of(scores[i]);
        if ((u64)key >> known == prefix) atomicAdd(mine + (key >> shift & mask), 1u);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += THREADS)
        if (mine[b]) atomicAdd(bins + b, (u64)mine[b]);
}

// The bin that holds the wanted score from above; empties the bins. `bits` of them count.
extern "C" __global__ void __launch_bounds__(256) find(u64 *state, u64 *bins, int bits) {
    __shared__ u64 sums[THREADS];
    constexpr int EACH = BINS / THREADS;
    u64 total = 0;
    for (int k = 0; k < EACH; k++) total += bins[threadIdx.x * EACH + k];
    sums[threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 left = state[1];
        int part = THREADS - 1;
        for (; part > 0 && sums[part] < left; part--) left -= sums[part];
        int bin = part * EACH + EACH - 1;
        for (; bin > part * EACH && bins[bin] < left; bin--) left -= bins[bin];
        state[0] = state[0] << bits | (u64)bin;
        state[1] = left;
    }
    __syncthreads();
    for (int k = 0; k < EACH; k++) bins[threadIdx.x * EACH + k] = 0;
}

__device__ __forceinline__ i64 block_start() { return (i64)blockIdx.x * THREADS * STEPS; }

// How many scores of each block are equal to the one at the cut
extern "C" __global__ void __launch_bounds__(256) tally(
    const float *scores, i64 count, const u64 *state, i64 *equal) {
    u32 cut = (u32)state[0];
    int found = 0;
    for (int step = 0; step < STEPS; step++) {
        i64 i = block_start() + step * THREADS + threadIdx.x;
        found += __syncthreads_count(i < count && key_of(scores[i]) == cut);
    }
    if (threadIdx.x == 0) equal[blockIdx.x] = found;
}

// Keeps what ranks above the cut, and of those equal to it the first ones; `before` counts the
// equal ones up to the end of each block.
extern "C" __global__ void __launch_bounds__(256) mark(
    const float *scores, i64 count, const u64 *state, const i64 *before, bool *keep, float *value) {
    __shared__ int of_warp[WARPS];
    u32 cut = (u32)state[0];
    i64 wanted = (i64)state[1], seen = blockIdx.x ? before[blockIdx.x - 1] : 0;
    for (int step = 0; step < STEPS; step++) {
        i64 i = block_start() + step * THREADS + threadIdx.x;
        u32 key = i < count ? key_of(scores[i]) : 0;
        bool ties = i < count && key == cut;
        u32 ballot = __ballot_sync(ALL_LANES, ties);
        if (lane() == 0) of_warp[threadIdx.x / 32] = __popc(ballot);
        __syncthreads();
        i64 rank = seen + __popc(ballot & ((1u << lane()) - 1));
        for (int w = 0; w < WARPS; w++) {
            if (w < (int)threadIdx.x / 32) rank += of_warp[w];
            seen += of_warp[w];
        }
        if (i < count) keep[i] = key > cut || (ties && rank < wanted);
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0)
        *value = __uint_as_float(cut & 0x80000000u ? cut ^ 0x80000000u : ~cut);
}
