// How far a pixel lies from the edges of a polygon: the arithmetic of `cpu_soft.py`, for one pixel.
// BLUR and STEEP are those of `reference.py`, TILE_COLUMNS, TILE_ROWS and SHARE those of `walk.py`.
#include "../common.cuh"

// An edge as seen from the first pixel centre of a tile. It starts where it passes the middle of
// the tile, so that a corner far outside of the picture costs no precision.
struct Edge {
    float x, y, ux, uy;  // start, direction
    float start, end;    // of the edge along its direction
    float place, inverse;  // share of the edge before the start; 1 / length
};

struct Polygon {
    double corners[8];     // x0 y0 x1 y1 ...; of a triangle the third stands twice
    double ax, ay, ux, uy;  // the edge of this lane, first corner and way to the second; 4 repeat
    int number;            // of corners; 0: not there
    float orient;          // sign of the area
    int x0, x1, y0, y1;  // pixels of the box around the blur, the second ones past the end
};

__device__ __forceinline__ int pixel_of(float value, int most) {
    return (int)clampf(value, 0.0f, (float)most);
}

__device__ __forceinline__ Polygon load_polygon(
    const float *points, const int *polygons, i64 q, int width, int height, float reach) {
    Polygon p;
    p.number = 0;
    p.orient = 0;
    p.x0 = p.x1 = p.y0 = p.y1 = 0;
    const int *corner = polygons + 4 * q;
    if (corner[0] < 0) return p;
    float low_x = 1e30f, low_y = 1e30f, high_x = -1e30f, high_y = -1e30f;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        float x = points[2 * (i64)corner[k]], y = points[2 * (i64)corner[k] + 1];
        p.corners[2 * k] = x;
        p.corners[2 * k + 1] = y;
        low_x = fminf(low_x, x), high_x = fmaxf(high_x, x);
        low_y = fminf(low_y, y), high_y = fmaxf(high_y, y);
    }
    p.number = corner[2] == corner[3] ? 3 : 4;
    int k = lane() & 3;
    i64 own = corner[k], next = corner[k >= p.number - 1 ? 0 : k + 1];
    p.ax = points[2 * own], p.ay = points[2 * own + 1];
    p.ux = points[2 * next] - p.ax, p.uy = points[2 * next + 1] - p.ay;
    double area = (p.corners[4] - p.corners[0]) * (p.corners[7] - p.corners[3]) -
                  (p.corners[5] - p.corners[1]) * (p.corners[6] - p.corners[2]);
    p.orient = area > 0 ? 1.0f : area < 0 ? -1.0f : 0.0f;
    // centres c + 0.5 with low - reach <= c + 0.5 <= high + reach
    p.x0 = pixel_of(ceilf(low_x - reach - 0.5f), width);
    p.x1 = pixel_of(floorf(high_x + reach + 0.5f), width);
    p.y0 = pixel_of(ceilf(low_y - reach - 0.5f), height);
    p.y1 = pixel_of(floorf(high_y + reach + 0.5f), height);
    if (p.x0 >= p.x1 || p.y0 >= p.y1) p.x0 = p.x1 = p.y0 = p.y1 = 0;
    return p;
}

__device__ __forceinline__ double clampd(double value, double low, double high) {
    return fmin(fmax(value, low), high);
}

// The edge of this lane for a tile; returns the signed distance from the tile's middle to its line.
__device__ __forceinline__ float prepare(
    const Polygon &p, int left, int top, int columns, int rows, Edge &edge) {
    double middle_x = 0.5 * (columns - 1), middle_y = 0.5 * (rows - 1);
    double ax = p.ax - left - 0.5, ay = p.ay - top - 0.5, ux = p.ux, uy = p.uy;
    double length = sqrt(ux * ux + uy * uy);
    double inverse = length > 1e-30 ? 1 / length : 0.0;
    ux *= inverse, uy *= inverse;
    double start = clampd((middle_x - ax) * ux + (middle_y - ay) * uy, 0.0, length);
    ax += start * ux, ay += start * uy;
    edge = {(float)ax, (float)ay, (float)ux, (float)uy, (float)-start, (float)(length - start),
            (float)(start * inverse), (float)inverse};
    return (float)(p.orient * (ux * (middle_y - ay) - uy * (middle_x - ax)));
}

// x of a pixel at (dx, dy) from the tile's first, and its nearest edge.
__device__ __forceinline__ float exponent(
    const Edge *edges, int number, float orient, float px, float py, float inverse, int &own) {
    float best = 3e38f, margin = orient != 0 ? 3e38f : -1.0f;  // no area, no inside
    for (int k = 0; k < number; k++) {
        const Edge &e = edges[k];
        float dx = px - e.x, dy = py - e.y;
        float along = clampf(dx * e.ux + dy * e.uy, e.start, e.end);
        float qx = dx - along * e.ux, qy = dy - along * e.uy;
        float d = qx * qx + qy * qy;
        if (d < best) best = d, own = k;
        margin = fminf(margin, orient * (e.ux * dy - e.uy * dx));
    }
    if (orient == 0) margin = -1.0f;
    float value = fminf(best * inverse, STEEP);
    return margin >= 0 ? value : -value;
}

__device__ __forceinline__ float covered(float x) {
    if (x < -BLUR) return 0.0f;
    float e = expf(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

// A warp takes the pixels of a polygon's box, tile by tile: body(x, y, exponent, edge, px, py) for
// each with column x and row y, px and py counted from the tile's first; flush() after each tile.
// `edges` are four in shared memory, one set a warp.
template <class Body, class Flush>
__device__ __forceinline__ void walk(
    const Polygon &p, float inverse, Edge *edges, Body body, Flush flush) {
    float reach = sqrtf(BLUR / inverse);
    for (int top = p.y0; top < p.y1; top += TILE_ROWS) {
        for (int left = p.x0; left < p.x1; left += TILE_COLUMNS) {
            int columns = min(TILE_COLUMNS, p.x1 - left), rows = min(TILE_ROWS, p.y1 - top);
            __syncwarp();
            float least = 3e38f;
            if (lane() < p.number) least = prepare(p, left, top, columns, rows, edges[lane()]);
            __syncwarp();
            least = -warp_max(-least);
            float around = 0.5f * sqrtf((float)(columns * columns + rows * rows));
            if (p.orient != 0 && least < -around - reach) continue;  // beyond the blur
            for (int i = lane(); i < rows * columns; i += 32) {
                int row = i / columns, column = i - row * columns, own = 0;
                float px = (float)column, py = (float)row;
                float x = exponent(edges, p.number, p.orient, px, py, inverse, own);
                if (x >= -BLUR) body(left + column, top + row, x, own, px, py);
            }
            flush();
        }
    }
}

// Adds the gradient by the two corners of the nearest edge of a pixel, times -1 / 2.
__device__ __forceinline__ void pull(const Edge &e, float slope, float px, float py, float *sums) {
    float dx = px - e.x, dy = py - e.y;
    float along = clampf(dx * e.ux + dy * e.uy, e.start, e.end);
    float wx = slope * (dx - along * e.ux), wy = slope * (dy - along * e.uy);
    float t = e.place + along * e.inverse;
    sums[0] += wx - t * wx;
    sums[1] += wy - t * wy;
    sums[2] += t * wx;
    sums[3] += t * wy;
}
