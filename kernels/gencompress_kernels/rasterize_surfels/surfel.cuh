// A projected surfel, and what it does to a pixel: the arithmetic of `cpu.py` and `cpu_project.py`,
// for one pixel. The constants are those of `reference.py`.
#include "../rasterize_splats/project.cuh"

constexpr int SURFEL = 24, BOX = 8;  // floats of a record and of a box
// Columns of a record, beside OPACITY to DEPTH (5 to 9), as of a splat. At offset d from the
// projected mean X, Y: u = (UX dx + UY dy) / below, v = (VX dx + VY dy) / below,
// below = D0 + DX dx + DY dy > 0.
enum { LOW_X = 2, LOW_Y, D0, UX = 10, UY, VX, VY, DX, DY, NORMAL_X, NORMAL_Y, NORMAL_Z, TOP, BOTTOM,
       FACTOR };
// Columns of a box, the ellipse that bounds a surfel; see `cpu_project.py`
enum { BOX_X, BOX_Y, BOX_REACH_X, BOX_REACH_Y, LEAN, THICK, TIP, DISC };
constexpr float UNBOUNDED = 1e9f;
constexpr float CUT = 11.2f;  // of u^2 + v^2: beyond, alpha is under 1/255 whatever the opacity

struct Hit {
    float alpha, depth, inverse, u, v;
    bool hit;  // the plane, not the low-pass
};

__device__ __forceinline__ Hit hit_at(const float *r, float px, float py) {
    float dx = px - r[X], dy = py - r[Y], lx = px - r[LOW_X], ly = py - r[LOW_Y];
    float low = fminf(LOW_PASS * (lx * lx + ly * ly), CUT);
    float u = r[UX] * dx + r[UY] * dy, v = r[VX] * dx + r[VY] * dy;
    float below = r[D0] + r[DX] * dx + r[DY] * dy, squared = u * u + v * v;
    float plane = r[DEPTH] * r[D0];
    Hit h;
    h.hit = squared <= low * (below * below) && below > 1e-30f && plane >= NEAR * below;
    h.inverse = 1.0f / (h.hit ? below : 1.0f);
    h.depth = (h.hit ? plane : r[DEPTH]) * h.inverse;
    h.u = u * h.inverse, h.v = v * h.inverse;
    float q = (h.hit ? squared : low) * h.inverse * h.inverse;
    h.alpha = q < CUT ? fminf(r[OPACITY] * expf(-0.5f * q), MAX_ALPHA) : 0.0f;
    if (!(h.alpha >= MIN_ALPHA)) h.alpha = 0.0f;
    return h;
}

// Six words of 16 bytes a surfel
__device__ __forceinline__ void load_surfels(
    const float *records, const int *pairs, i64 first, int count, float (*batch)[SURFEL]) {
    for (int i = threadIdx.x; i < count * 6; i += THREADS) {
        int j = i / 6, part = i % 6;
        const float4 *source = (const float4 *)(records + SURFEL * (i64)pairs[first + j]);
        ((float4 *)batch[j])[part] = source[part];
    }
}

__device__ __forceinline__ void surfel_rows(const float *r, int tiles_y, int &low, int &high) {
    low = (int)fmaxf(floorf(fmaxf(r[TOP], (float)-TILE) / TILE), 0.0f);
    high = (int)fminf(floorf(fminf(r[BOTTOM], UNBOUNDED) / TILE) + 1, (float)tiles_y);
}

// First and last + 1 tile of a row of tiles that a surfel's ellipse or disc may enter.
__device__ __forceinline__ void surfel_tiles(
    const float *r, const float *b, int row, int tiles_x, int &first, int &last) {
    float reach = b[BOX_REACH_Y];
    float top = clampf(row * (float)TILE - b[BOX_Y], -reach, reach);
    float bottom = clampf((row + 1) * (float)TILE - b[BOX_Y], -reach, reach);
    float at = fminf(fmaxf(b[TIP], top), bottom);
    float share = fmaxf(1.0f - (at / reach) * (at / reach), 0.0f);
    float right = b[BOX_X] + b[LEAN] * at + b[THICK] * sqrtf(share) + 0.01f;
    at = fminf(fmaxf(-b[TIP], top), bottom);
    share = fmaxf(1.0f - (at / reach) * (at / reach), 0.0f);
    float left = b[BOX_X] + b[LEAN] * at - b[THICK] * sqrtf(share) - 0.01f;
    // the disc is mostly inside; where it is not, it widens every row a little
    right = fminf(fmaxf(right, r[LOW_X] + b[DISC]), UNBOUNDED);
    left = fmaxf(fminf(left, r[LOW_X] - b[DISC]), (float)-TILE);
    first = (int)fmaxf(floorf(left / TILE), 0.0f);
    last = (int)fminf(floorf(right / TILE) + 1, (float)tiles_x);
}

// The Jacobian of the projection along the scaled tangents, and their slant in z
struct Plane {
    float x, y, z, iz, sx, sy;
    float su, sv, mu, mv, xu, xv, yu, yv;
    float turn[9], seen[9];  // axes in the world and in the camera's, by rows
    float qw, qx, qy, qz, norm;
};

__device__ __forceinline__ void lay(
    const Camera &c, float mx, float my, float mz, const float *quat, const float *scales,
    Plane &p) {
    Placed placed;
    place(c, mx, my, mz, quat, placed);
    p.x = placed.x, p.y = placed.y, p.z = placed.z, p.iz = placed.iz;
    p.qw = placed.qw, p.qx = placed.qx, p.qy = placed.qy, p.qz = placed.qz, p.norm = placed.norm;
    p.sx = p.x * p.iz, p.sy = p.y * p.iz;
#pragma unroll
    for (int i = 0; i < 3; i++)
#pragma unroll
        for (int k = 0; k < 3; k++) {
            p.turn[3 * i + k] = placed.turn[3 * i + k];
            p.seen[3 * i + k] = c.view[4 * i] * placed.turn[k] +
                                c.view[4 * i + 1] * placed.turn[3 + k] +
                                c.view[4 * i + 2] * placed.turn[6 + k];
        }
    p.su = scales[0] * p.iz, p.sv = scales[1] * p.iz;
    p.mu = p.su * p.seen[6], p.mv = p.sv * p.seen[7];
    p.xu = c.fx * (p.su * p.seen[0] - p.sx * p.mu), p.xv = c.fx * (p.sv * p.seen[1] - p.sx * p.mv);
    p.yu = c.fy * (p.su * p.seen[3] - p.sy * p.mu), p.yv = c.fy * (p.sv * p.seen[4] - p.sy * p.mv);
}
