// Corners of cells: the arithmetic of `cpu_corners.py`, for one point. PRIME_Y and PRIME_Z are
// those of `reference.py`, as 32 bits with a sign.
#include "../common.cuh"

struct Spot {
    u32 x, y, z;  // cell
    float fx, fy, fz;  // place within
};

// A coordinate within [0, 1]; what is no number becomes 0.
__device__ __forceinline__ float inside(float x) {
    x = x > 0 ? x : 0.0f;
    return x < 1 ? x : 1.0f;
}

__device__ __forceinline__ Spot in_level(float x, float y, float z, float scale) {
    float qx = x * scale + 0.5f, qy = y * scale + 0.5f, qz = z * scale + 0.5f;
    Spot s = {(u32)qx, (u32)qy, (u32)qz, 0, 0, 0};
    s.fx = qx - (float)s.x, s.fy = qy - (float)s.y, s.fz = qz - (float)s.z;
    return s;
}

// In the grid of logits, of `side` corners an axis.
__device__ __forceinline__ Spot in_grid(float x, float y, float z, int side) {
    float qx = x * (side - 1), qy = y * (side - 1), qz = z * (side - 1);
    Spot s = {(u32)min((int)qx, side - 2), (u32)min((int)qy, side - 2),
              (u32)min((int)qz, side - 2), 0, 0, 0};
    s.fx = qx - (float)s.x, s.fy = qy - (float)s.y, s.fz = qz - (float)s.z;
    return s;
}

// Row of corner k, x fastest, of a level with `rows` rows; stride 0: hashed.
__device__ __forceinline__ i64 row_of(const Spot &s, int k, i64 stride, i64 rows) {
    u32 x = s.x + (k & 1), y = s.y + (k >> 1 & 1), z = s.z + (k >> 2);
    if (stride == 0) return (x ^ y * (u32)PRIME_Y ^ z * (u32)PRIME_Z) & (u32)(rows - 1);
    i64 row = x + stride * (y + stride * z);
    return row >= rows ? row - rows : row;  // past the last once at most
}

// Place of corner k in the flat grid of logits, where x is slowest.
__device__ __forceinline__ i64 place_of(const Spot &s, int k, int side) {
    return ((i64)(s.x + (k & 1)) * side + s.y + (k >> 1 & 1)) * side + s.z + (k >> 2);
}

__device__ __forceinline__ float share(const Spot &s, int k) {
    return (k & 1 ? s.fx : 1 - s.fx) * (k >> 1 & 1 ? s.fy : 1 - s.fy) * (k >> 2 ? s.fz : 1 - s.fz);
}

// Adds what the height of corner k gives to the slopes by x, y and z.
__device__ __forceinline__ void lean(const Spot &s, int k, float height, float *slopes) {
    float sx = k & 1 ? s.fx : 1 - s.fx, sy = k >> 1 & 1 ? s.fy : 1 - s.fy;
    float sz = k >> 2 ? s.fz : 1 - s.fz;
    slopes[0] += (k & 1 ? height : -height) * sy * sz;
    slopes[1] += (k >> 1 & 1 ? height : -height) * sx * sz;
    slopes[2] += (k >> 2 ? height : -height) * sx * sy;
}
