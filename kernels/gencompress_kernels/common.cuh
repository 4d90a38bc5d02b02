// What the kernels of all ops share: places in 64 bits, and sums over a warp and a block.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ i64 thread_of_grid() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int lane() { return threadIdx.x & 31; }

__device__ __forceinline__ float clampf(float value, float low, float high) {
    return fminf(fmaxf(value, low), high);
}

// The sum over the lanes of a warp, in every lane; always added in the same order.
template <class T> __device__ __forceinline__ T warp_sum(T value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int step = 16; step; step >>= 1)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
    return value;
}
