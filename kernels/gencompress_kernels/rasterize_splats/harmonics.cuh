// Spherical harmonics up to degree 3, as `cpu_harmonics.py`.

__device__ __forceinline__ void sh_basis(float x, float y, float z, int bands, float *out) {
    out[0] = 0.28209479177387814f;
    if (bands > 1) {
        float k = 0.4886025119029199f;
        out[1] = -k * y, out[2] = k * z, out[3] = -k * x;
    }
    float xx = x * x, yy = y * y, zz = z * z;
    if (bands > 4) {
        float k = 1.0925484305920792f;
        out[4] = k * x * y, out[5] = -k * y * z, out[7] = -k * x * z;
        out[6] = 0.31539156525252005f * (2.0f * zz - xx - yy);
        out[8] = 0.5462742152960396f * (xx - yy);
    }
    if (bands > 9) {
        float ring = -0.4570457994644658f * (4.0f * zz - xx - yy);
        out[9] = -0.5900435899266435f * y * (3.0f * xx - yy);
        out[10] = 2.890611442640554f * x * y * z;
        out[11] = ring * y;
        out[12] = 0.3731763325901154f * z * (2.0f * zz - 3.0f * (xx + yy));
        out[13] = ring * x;
        out[14] = 1.445305721320277f * z * (xx - yy);
        out[15] = -0.5900435899266435f * x * (xx - 3.0f * yy);
    }
}

// Gradient by the direction (not yet projected onto the sphere) of sum_j v_j Y_j
__device__ __forceinline__ void direction_slope(
    float x, float y, float z, int bands, const float *v, float *g) {
    g[0] = g[1] = g[2] = 0.0f;
    if (bands > 1) {
        float k = 0.4886025119029199f;
        g[0] = -k * v[3], g[1] = -k * v[1], g[2] = k * v[2];
    }
    if (bands > 4) {
        float k = 1.0925484305920792f, m = 0.6307831305050401f;
        g[0] += k * (y * v[4] - z * v[7]) - m * x * v[6] + k * x * v[8];
        g[1] += k * (x * v[4] - z * v[5]) - m * y * v[6] - k * y * v[8];
        g[2] += 2.0f * m * z * v[6] - k * (y * v[5] + x * v[7]);
    }
    if (bands > 9) {
        float xx = x * x, yy = y * y, zz = z * z, ring = 4.0f * zz - xx - yy;
        float a = 0.5900435899266435f, b = 2.890611442640554f, c = 0.4570457994644658f;
        float d = 0.3731763325901154f, e = 1.445305721320277f;
        g[0] += -a * 6.0f * x * y * v[9] + b * y * z * v[10] + c * 2.0f * x * y * v[11] -
                d * 6.0f * x * z * v[12] - c * (ring - 2.0f * xx) * v[13] +
                e * 2.0f * x * z * v[14] - a * 3.0f * (xx - yy) * v[15];
        g[1] += -a * 3.0f * (xx - yy) * v[9] + b * x * z * v[10] -
                c * (ring - 2.0f * yy) * v[11] - d * 6.0f * y * z * v[12] +
                c * 2.0f * x * y * v[13] - e * 2.0f * y * z * v[14] + a * 6.0f * x * y * v[15];
        g[2] += b * x * y * v[10] - c * 8.0f * y * z * v[11] +
                d * (6.0f * zz - 3.0f * (xx + yy)) * v[12] - c * 8.0f * x * z * v[13] +
                e * (xx - yy) * v[14];
    }
}

// Takes the gradient by a colour to the coefficients, and to (x, y, z), the way from the camera to
// the splat.
__device__ __forceinline__ void sh_slopes(
    const float *sh, const float *color, float x, float y, float z, int bands, float *d_sh,
    float *by_way) {
    float basis[16], slope[16];
    float length = fmaxf(sqrtf(x * x + y * y + z * z), 1e-12f);
    x /= length, y /= length, z /= length;
    sh_basis(x, y, z, bands, basis);
#pragma unroll
    for (int j = 0; j < 16; j++) {
        slope[j] = 0;
        if (j < bands)
#pragma unroll
            for (int k = 0; k < 3; k++) {
                d_sh[3 * j + k] = basis[j] * color[k];
                slope[j] += sh[3 * j + k] * color[k];
            }
    }
    direction_slope(x, y, z, bands, slope, by_way);
    float inward = by_way[0] * x + by_way[1] * y + by_way[2] * z;
    by_way[0] = (by_way[0] - inward * x) / length, by_way[1] = (by_way[1] - inward * y) / length;
    by_way[2] = (by_way[2] - inward * z) / length;
}
