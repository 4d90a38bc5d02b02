// Gradients of surfels: the lists walked once more, front to back; see `cpu_backward.py`.
#include "surfel.cuh"

// Columns of a slot. P, Q, D stand for the gradients by u * below, v * below and below; MASS for
// alpha times that by alpha; LOW for that by q where the low-pass won.
enum { G_RED, G_GREEN, G_BLUE, G_NORMAL, MASS = 6, P, P_DY, Q, Q_DY, D, D_DY, G_PLANE, G_DEPTH, LOW,
       LOW_DY, P_DX, Q_DX, D_DX, LOW_DX, ABS_X, ABS_Y, SUMS };
constexpr int GROUP = 16;  // surfels in shared memory: 23 sums of 8 warps each

template <int COLUMNS>
__device__ __forceinline__ void surfel_slopes(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *normals, const float *distortions,
    const float *by_color, const float *by_alpha, const float *by_depth, const float *by_median,
    const float *by_normal, const float *by_spread, int width, int height, float *slots) {
    alignas(16) __shared__ float batch[GROUP][SURFEL];
    __shared__ float parts[COLUMNS][WARPS][GROUP];
    Pixel p = pixel_of_thread(width, height);
    i64 tile = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float left = p.inside ? 1.0f : 0.0f, gc[3] = {0, 0, 0}, gn[3] = {0, 0, 0};
    float behind = 0, gd = 0, gm = 0, gs = 0, passed = 0, far = 0;
    bool done = !p.inside;
    if (p.inside) {
        gd = by_depth ? by_depth[p.at] : 0.0f, gm = by_median ? by_median[p.at] : 0.0f;
        float spread = by_spread ? by_spread[p.at] : 0.0f;
        gs = 2 * spread;
        // the colours hold the background, times the transmittance that alpha hides
        behind = gd * depths[p.at] + gs * distortions[p.at];
        if (by_alpha) behind -= by_alpha[p.at] * (1.0f - alphas[p.at]);
#pragma unroll
        for (int k = 0; k < 3; k++) {
            gc[k] = by_color ? by_color[3 * p.at + k] : 0.0f;
            gn[k] = by_normal ? by_normal[3 * p.at + k] : 0.0f;
            behind += gc[k] * colors[3 * p.at + k] + gn[k] * normals[3 * p.at + k];
        }
        passed = -alphas[p.at], far = -depths[p.at];
    }
    i64 end = offsets[tile + 1];
    for (i64 first = offsets[tile]; first < end; first += GROUP) {
        if (__syncthreads_count(!done) == 0) break;
        int count = (int)min((i64)GROUP, end - first);
        load_surfels(records, pairs, first, count, batch);
        __syncthreads();
        for (int j = 0; j < count; j++) {
            const float *r = batch[j];
            Hit h;
            h.alpha = 0;
            float w = 0, reached, before = left;
            if (!done) {
                h = hit_at(r, p.px, p.py);
                if (h.alpha > 0) w = blend_one(h.alpha, left, done, reached);
            }
            float values[COLUMNS];
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) values[k] = 0;
            bool any = __any_sync(ALL_LANES, w > 0);
            if (w > 0) {
                float z = h.depth, u = gd * z + gs * (z * passed - far);
#pragma unroll
                for (int k = 0; k < 3; k++) {
                    values[G_RED + k] = w * gc[k], values[G_NORMAL + k] = w * gn[k];
                    u += gc[k] * r[RED + k] + gn[k] * r[NORMAL_X + k];
                }
                float by_z = w * (gd + gs * (passed + w));
                if (before > MEDIAN && left <= MEDIAN) by_z += gm;
                passed += 2 * w, far += 2 * w * z;
                float share = w * u;
                behind -= share;
                // none where alpha is held at its limit
                float mass = share - h.alpha / (1.0f - h.alpha) * behind;
                if (!(h.alpha < MAX_ALPHA)) mass = 0;
                float dx = p.px - r[X], dy = p.py - r[Y];
                float lx = p.px - r[LOW_X], ly = p.py - r[LOW_Y];
                float hit = h.hit ? 1.0f : 0.0f, k = mass * hit * h.inverse;
                float pu = -k * h.u, pv = -k * h.v, low = mass * (hit - 1);
                float by_plane = by_z * hit * h.inverse;
                float d = k * (h.u * h.u + h.v * h.v) - by_plane * z;
                values[MASS] = mass, values[G_PLANE] = by_plane, values[G_DEPTH] = by_z * (1 - hit);
                values[P] = pu, values[P_DX] = pu * dx, values[P_DY] = pu * dy;
                values[Q] = pv, values[Q_DX] = pv * dx, values[Q_DY] = pv * dy;
                values[D] = d, values[D_DX] = d * dx, values[D_DY] = d * dy;
                values[LOW] = low, values[LOW_DX] = low * lx, values[LOW_DY] = low * ly;
                if (COLUMNS == SUMS) {
                    values[COLUMNS - 2] =
                        fabsf(r[UX] * pu + r[VX] * pv + r[DX] * d + 2 * low * lx);
                    values[COLUMNS - 1] =
                        fabsf(r[UY] * pu + r[VY] * pv + r[DY] * d + 2 * low * ly);
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

extern "C" __global__ void __launch_bounds__(256) blend_surfel_slopes(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *normals, const float *distortions,
    const float *by_color, const float *by_alpha, const float *by_depth, const float *by_median,
    const float *by_normal, const float *by_spread, int width, int height, float *slots) {
    surfel_slopes<SUMS - 2>(
        records, offsets, pairs, colors, alphas, depths, normals, distortions, by_color, by_alpha,
        by_depth, by_median, by_normal, by_spread, width, height, slots);
}

extern "C" __global__ void __launch_bounds__(256) blend_surfel_slopes_absolute(
    const float *records, const i64 *offsets, const int *pairs, const float *colors,
    const float *alphas, const float *depths, const float *normals, const float *distortions,
    const float *by_color, const float *by_alpha, const float *by_depth, const float *by_median,
    const float *by_normal, const float *by_spread, int width, int height, float *slots) {
    surfel_slopes<SUMS>(
        records, offsets, pairs, colors, alphas, depths, normals, distortions, by_color, by_alpha,
        by_depth, by_median, by_normal, by_spread, width, height, slots);
}

// Takes the sums [N, columns] through the intersection, projection, rotation and harmonics. `pose`
// as of the splats.
extern "C" __global__ void __launch_bounds__(128) project_surfel_slopes(
    const float *means, const float *quats, const float *scales, const float *opacities,
    const float *sh, const float *view, const float *lens, const float *position,
    const float *records, const float *sums, float *d_means, float *d_quats, float *d_scales,
    float *d_opacities, float *d_sh, float *probe, float *pose, i64 count, int bands, int columns,
    int width, int height) {
    i64 n = thread_of_grid();
    if (n >= count) return;
    const float *r = records + SURFEL * n, *s = sums + columns * n;
    if (r[OPACITY] <= 0) return;
    Camera c = load_camera(view, lens, width, height);
    float mx = means[3 * n], my = means[3 * n + 1], mz = means[3 * n + 2];
    Plane p;
    lay(c, mx, my, mz, quats + 4 * n, scales + 2 * n, p);
    d_opacities[n] = s[MASS] / r[OPACITY];
    float g_low_x = -2 * s[LOW_DX], g_low_y = -2 * s[LOW_DY];
    float g_x = g_low_x - (r[UX] * s[P] + r[VX] * s[Q] + r[DX] * s[D]);
    float g_y = g_low_y - (r[UY] * s[P] + r[VY] * s[Q] + r[DY] * s[D]);
    probe[4 * n] = g_x, probe[4 * n + 1] = g_y;
    probe[4 * n + 2] = columns == SUMS ? s[ABS_X] : 0.0f;
    probe[4 * n + 3] = columns == SUMS ? s[ABS_Y] : 0.0f;
    // Jacobian, slant and z: from the six coefficients, whose common factor is constant
    float factor = r[FACTOR], g_det = factor * (s[D] + p.z * s[G_PLANE]);
    float g_dx = -factor * s[D_DX], g_dy = -factor * s[D_DY];
    float g_xu = factor * s[Q_DY] + g_det * p.yv + g_dy * p.mv;
    float g_xv = -factor * s[P_DY] - g_det * p.yu - g_dy * p.mu;
    float g_yu = -factor * s[Q_DX] - g_det * p.xv - g_dx * p.mv;
    float g_yv = factor * s[P_DX] + g_det * p.xu + g_dx * p.mu;
    float g_mu = g_dx * p.yv - g_dy * p.xv, g_mv = g_dy * p.xu - g_dx * p.yu;
    float t_z = r[D0] * s[G_PLANE] + s[G_DEPTH];
    // the middle of the low-pass: the projected mean - J m / (1 - m^2)
    float size = p.mu * p.mu + p.mv * p.mv;
    if (size < 1) {
        float h = 1 / (1 - size);
        float bend = 2 * h * h * (g_low_x * (p.xu * p.mu + p.xv * p.mv) +
                                  g_low_y * (p.yu * p.mu + p.yv * p.mv));
        g_xu -= g_low_x * p.mu * h, g_xv -= g_low_x * p.mv * h;
        g_yu -= g_low_y * p.mu * h, g_yv -= g_low_y * p.mv * h;
        g_mu -= h * (g_low_x * p.xu + g_low_y * p.yu) + bend * p.mu;
        g_mv -= h * (g_low_x * p.xv + g_low_y * p.yv) + bend * p.mv;
    }
    // J = f (tangent_xy - slope m), slope = xy / z, all of them over z
    float a_u = c.fx * g_xu, a_v = c.fx * g_xv, b_u = c.fy * g_yu, b_v = c.fy * g_yv;
    float g_sx = c.fx * g_x - (a_u * p.mu + a_v * p.mv);
    float g_sy = c.fy * g_y - (b_u * p.mu + b_v * p.mv);
    g_mu -= a_u * p.sx + b_u * p.sy, g_mv -= a_v * p.sx + b_v * p.sy;
    float along_u = a_u * p.seen[0] + b_u * p.seen[3] + g_mu * p.seen[6];
    float along_v = a_v * p.seen[1] + b_v * p.seen[4] + g_mv * p.seen[7];
    d_scales[2 * n] = along_u * p.iz, d_scales[2 * n + 1] = along_v * p.iz;
    float facing = r[NORMAL_X] * p.seen[2] + r[NORMAL_Y] * p.seen[5] + r[NORMAL_Z] * p.seen[8];
    float side = facing > 0 ? 1.0f : -1.0f;
    float seen[9] = {p.su * a_u,  p.sv * a_v,  side * s[G_NORMAL],
                     p.su * b_u,  p.sv * b_v,  side * s[G_NORMAL + 1],
                     p.su * g_mu, p.sv * g_mv, side * s[G_NORMAL + 2]};
    float t[3] = {g_sx * p.iz, g_sy * p.iz,
                  t_z - (g_sx * p.sx + g_sy * p.sy + p.su * along_u + p.sv * along_v) * p.iz};
    float turned[9];
#pragma unroll
    for (int j = 0; j < 3; j++)
#pragma unroll
        for (int k = 0; k < 3; k++)
            turned[3 * j + k] = c.view[j] * seen[k] + c.view[4 + j] * seen[3 + k] +
                                c.view[8 + j] * seen[6 + k];
    Placed unit;
    unit.qw = p.qw, unit.qx = p.qx, unit.qy = p.qy, unit.qz = p.qz, unit.norm = p.norm;
    quaternion_slope(unit, turned, d_quats + 4 * n);
    float color[3], w[3];
#pragma unroll
    for (int k = 0; k < 3; k++) color[k] = r[RED + k] > 0 ? s[G_RED + k] : 0.0f;
    sh_slopes(
        sh + 3 * bands * n, color, mx - position[0], my - position[1], mz - position[2], bands,
        d_sh + 3 * bands * n, w);
#pragma unroll
    for (int k = 0; k < 3; k++)
        d_means[3 * n + k] = c.view[k] * t[0] + c.view[4 + k] * t[1] + c.view[8 + k] * t[2] + w[k];
    if (!pose) return;
    float *own = pose + 15 * n, mean[3] = {mx, my, mz};
#pragma unroll
    for (int i = 0; i < 3; i++) {
#pragma unroll
        for (int k = 0; k < 3; k++) {
            float total = t[i] * mean[k];
#pragma unroll
            for (int j = 0; j < 3; j++) total += seen[3 * i + j] * p.turn[3 * k + j];
            own[4 * i + k] = total;
        }
        own[4 * i + 3] = t[i];
        own[12 + i] = -w[i];
    }
}
