// Runs CUDA kernels on the CPU, block after block, with a fiber for each thread: what they compute
// can be checked without a GPU. Barriers and the collectives of a warp are waited for by all who
// are alive; threads and blocks run first to last or last to first, so that a result that depends
// on their order shows.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csetjmp>
#include <memory>
#include <ucontext.h>
#include <vector>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulated {
enum Wait { RUNS, BLOCK, WARP, DONE };
struct Fiber {
    ucontext_t context;
    jmp_buf place;  // once it runs: jumps need no calls of the system
    bool begun;
    Wait wait;
    // what it shows at collectives of the warp, and how many it has joined; two values in turn, so
    // that nobody writes the next before all have read the last
    uint64_t values[2];
    int joined, joined_at[2];
    int votes[2], voted, voted_at[2];  // the same of the block
};
static std::vector<Fiber> fibers;
static ucontext_t home;
static jmp_buf scheduler;
static int current;
static void (*body)(void **);
static void **arguments;

inline void pause(Wait why) {
    Fiber &me = fibers[current];
    me.wait = why;
    if (_setjmp(me.place) == 0) _longjmp(scheduler, 1);
}
inline void enter() {
    body(arguments);
    fibers[current].wait = DONE;
    _longjmp(scheduler, 1);
}
inline void release(int first, int last, Wait what) {
    bool any = false;
    for (int i = first; i < last; i++) {
        if (fibers[i].wait == DONE) continue;
        if (fibers[i].wait != what) return;
        any = true;
    }
    for (int i = first; any && i < last; i++)
        if (fibers[i].wait == what) fibers[i].wait = RUNS;
}
inline void resume(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}
inline bool run_block(int threads, bool reversed, std::vector<std::unique_ptr<char[]>> &stacks) {
    constexpr size_t STACK = 128 << 10;
    for (int i = 0; i < threads; i++) {
        if ((int)stacks.size() <= i) stacks.emplace_back(new char[STACK]);
        Fiber &f = fibers[i];
        f.wait = RUNS;
        f.begun = false;
        f.joined = f.joined_at[0] = f.joined_at[1] = 0;
        f.voted = f.voted_at[0] = f.voted_at[1] = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = stacks[i].get();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &home;
        makecontext(&f.context, enter, 0);
    }
    for (;;) {
        bool ran = false, alive = false;
        for (int k = 0; k < threads; k++) {
            int i = reversed ? threads - 1 - k : k;
            if (fibers[i].wait != DONE) alive = true;
            if (fibers[i].wait != RUNS) continue;
            ran = true;
            current = i;
            threadIdx = {(unsigned)i, 0, 0};
            resume(fibers[i]);
        }
        if (!alive) return true;
        if (!ran) return false;  // some wait at a barrier that others never reach
        for (int warp = 0; warp < threads; warp += 32)
            release(warp, std::min(warp + 32, threads), WARP);
        release(0, threads, BLOCK);
    }
}
inline int run(void (*kernel)(void **), void **a, const int *grid, int threads, int reversed) {
    body = kernel;
    arguments = a;
    fibers.resize(threads);
    std::vector<std::unique_ptr<char[]>> stacks;
    gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
    blockDim = {(unsigned)threads, 1, 1};
    long long blocks = (long long)grid[0] * grid[1] * grid[2];
    for (long long k = 0; k < blocks; k++) {
        long long at = reversed ? blocks - 1 - k : k;
        blockIdx = {(unsigned)(at % grid[0]), (unsigned)(at / grid[0] % grid[1]),
                    (unsigned)(at / grid[0] / grid[1])};
        if (!run_block(threads, reversed, stacks)) return 1;
    }
    return 0;
}
// Shows a value to the warp and waits until all lanes have
template <class T> inline void put(T value) {
    Fiber &me = fibers[current];
    int turn = ++me.joined & 1;
    me.joined_at[turn] = me.joined;
    me.values[turn] = 0;
    memcpy(&me.values[turn], &value, sizeof(T));
    pause(WARP);
}
template <class T> inline T get(int lane) {
    int at = current / 32 * 32 + lane, turn = fibers[current].joined & 1;
    T value;
    memcpy(&value, &fibers[at < (int)fibers.size() ? at : current].values[turn], sizeof(T));
    return value;
}
template <class T> inline T exchange(T value, int from) {
    put(value);
    return get<T>(from);
}
}  // namespace emulated

inline void __syncthreads() { emulated::pause(emulated::BLOCK); }
inline void __syncwarp(unsigned = ~0u) { emulated::pause(emulated::WARP); }
inline unsigned __ballot_sync(unsigned, int vote) {
    emulated::put(vote);
    unsigned bits = 0;
    int first = emulated::current / 32 * 32, joined = emulated::fibers[emulated::current].joined;
    for (int lane = 0; lane < 32 && first + lane < (int)emulated::fibers.size(); lane++)
        if (emulated::fibers[first + lane].joined_at[joined & 1] == joined)
            bits |= (unsigned)(emulated::get<int>(lane) != 0) << lane;
    return bits;
}
inline int __any_sync(unsigned m, int vote) { return __ballot_sync(m, vote) != 0; }
inline int __syncthreads_count(int vote) {
    auto &me = emulated::fibers[emulated::current];
    int voted = ++me.voted, count = 0;
    me.voted_at[voted & 1] = voted;
    me.votes[voted & 1] = vote != 0;
    __syncthreads();
    for (auto &f : emulated::fibers) count += f.voted_at[voted & 1] == voted && f.votes[voted & 1];
    return count;
}
inline int lane_of() { return emulated::current % 32; }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
    return emulated::exchange(v, lane_of() ^ mask);
}
template <class T> inline T exchanged(T *at, T value) {
    T old = *at;
    *at = value;
    return old;
}
template <class T> inline T atomicAdd(T *at, T v) { return exchanged(at, (T)(*at + v)); }
template <class T> inline T atomicMin(T *at, T v) { return exchanged(at, std::min(*at, v)); }
inline unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(unsigned v) { float u; memcpy(&u, &v, 4); return u; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
using std::max;
using std::min;
