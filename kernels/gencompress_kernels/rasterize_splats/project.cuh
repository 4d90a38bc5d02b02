// From a splat to its record on the screen and back: the arithmetic of `cpu.py` and
// `cpu_backward.py`. The constants are those of `reference.py`.
#include "splat.cuh"
#include "harmonics.cuh"

struct Camera {
    float view[12];  // rows of [R | t]
    float fx, fy, cx, cy;
    float low_x, high_x, low_y, high_y;  // limits of x / z and y / z within the Jacobian
};

__device__ __forceinline__ Camera load_camera(
    const float *view, const float *lens, int width, int height) {
    Camera c;
#pragma unroll
    for (int k = 0; k < 12; k++) c.view[k] = view[k];
    c.fx = lens[0], c.fy = lens[4], c.cx = lens[2], c.cy = lens[5];
    float margin_x = FRUSTUM_MARGIN * 0.5f * width / c.fx;
    float margin_y = FRUSTUM_MARGIN * 0.5f * height / c.fy;
    c.low_x = -c.cx / c.fx - margin_x, c.high_x = (width - c.cx) / c.fx + margin_x;
    c.low_y = -c.cy / c.fy - margin_y, c.high_y = (height - c.cy) / c.fy + margin_y;
    return c;
}

// What a splat's mean and rotation become on the way
struct Placed {
    float x, y, z, iz;  // in camera axes
    float jx0, jx2, jy1, jy2;  // Jacobian
    float u[3], v[3];  // rows of J R: screen axes seen in the world
    float turn[9];  // rotation of the splat, by rows
    float qw, qx, qy, qz, norm;  // unit quaternion, length of the raw one
};

__device__ __forceinline__ float row_at(const Camera &c, int row, float x, float y, float z) {
    return c.view[4 * row] * x + c.view[4 * row + 1] * y + c.view[4 * row + 2] * z +
           c.view[4 * row + 3];
}

__device__ __forceinline__ void place(
    const Camera &c, float mx, float my, float mz, const float *quat, Placed &p) {
    p.x = row_at(c, 0, mx, my, mz), p.y = row_at(c, 1, mx, my, mz);
    p.z = row_at(c, 2, mx, my, mz);
    float w = quat[0], x = quat[1], y = quat[2], z = quat[3];
    p.norm = fmaxf(sqrtf(w * w + x * x + y * y + z * z), 1e-12f);
    w /= p.norm, x /= p.norm, y /= p.norm, z /= p.norm;
    p.qw = w, p.qx = x, p.qy = y, p.qz = z;
    p.turn[0] = 1 - 2 * (y * y + z * z), p.turn[1] = 2 * (x * y - w * z);
    p.turn[2] = 2 * (x * z + w * y), p.turn[3] = 2 * (x * y + w * z);
    p.turn[4] = 1 - 2 * (x * x + z * z), p.turn[5] = 2 * (y * z - w * x);
    p.turn[6] = 2 * (x * z - w * y), p.turn[7] = 2 * (y * z + w * x);
    p.turn[8] = 1 - 2 * (x * x + y * y);
    p.iz = 1 / p.z;
    float held_x = clampf(p.x * p.iz, c.low_x, c.high_x);
    float held_y = clampf(p.y * p.iz, c.low_y, c.high_y);
    p.jx0 = c.fx * p.iz, p.jx2 = -c.fx * held_x * p.iz;
    p.jy1 = c.fy * p.iz, p.jy2 = -c.fy * held_y * p.iz;
#pragma unroll
    for (int k = 0; k < 3; k++) {
        p.u[k] = p.jx0 * c.view[k] + p.jx2 * c.view[8 + k];
        p.v[k] = p.jy1 * c.view[4 + k] + p.jy2 * c.view[8 + k];
    }
}

// u and v along an axis of the splat
__device__ __forceinline__ void along(const Placed &p, int axis, float &u, float &v) {
    u = p.u[0] * p.turn[axis] + p.u[1] * p.turn[3 + axis] + p.u[2] * p.turn[6 + axis];
    v = p.v[0] * p.turn[axis] + p.v[1] * p.turn[3 + axis] + p.v[2] * p.turn[6 + axis];
}

// The projected covariance without blur: xx, xy, yy
__device__ __forceinline__ void covariance(const Placed &p, const float *scales, float *s) {
    s[0] = s[1] = s[2] = 0;
#pragma unroll
    for (int axis = 0; axis < 3; axis++) {
        float u, v;
        along(p, axis, u, v);
        u *= scales[axis], v *= scales[axis];
        s[0] += u * u, s[1] += u * v, s[2] += v * v;
    }
}

// Gradient by the raw quaternion from that by the rotation matrix, d by rows
__device__ __forceinline__ void quaternion_slope(const Placed &p, const float *d, float *out) {
    float w = p.qw, x = p.qx, y = p.qy, z = p.qz;
    float gw = 2 * (x * (d[7] - d[5]) + y * (d[2] - d[6]) + z * (d[3] - d[1]));
    float gx = 2 * (w * (d[7] - d[5]) + y * (d[1] + d[3]) + z * (d[2] + d[6]) -
                    2 * x * (d[4] + d[8]));
    float gy = 2 * (w * (d[2] - d[6]) + x * (d[1] + d[3]) + z * (d[5] + d[7]) -
                    2 * y * (d[0] + d[8]));
    float gz = 2 * (w * (d[3] - d[1]) + x * (d[2] + d[6]) + y * (d[5] + d[7]) -
                    2 * z * (d[0] + d[4]));
    float inward = gw * w + gx * x + gy * y + gz * z;
    out[0] = (gw - inward * w) / p.norm, out[1] = (gx - inward * x) / p.norm;
    out[2] = (gy - inward * y) / p.norm, out[3] = (gz - inward * z) / p.norm;
}
