"use strict";
// Gaussian splats for the viewer: sorted on the CPU, blended back to front.
const splatModel = (() => {
  const VERTEX = `#version 300 es
  precision highp float;
  precision highp usampler2D;
  uniform usampler2D records;  // two texels a splat: x y z sx | sy sz rgba wxyz
  uniform mat3 turn;           // world to camera
  uniform vec3 shift;
  uniform vec3 lens;           // focal length, width, height in pixels
  uniform float near;
  layout(location = 0) in uint index;
  out vec2 along;              // offset from the centre, in standard deviations
  out vec4 colour;

  void main() {
    gl_Position = vec4(0, 0, 2, 1);  // outside the picture, until shown to be in it
    ivec2 at = ivec2(int(index % 1024u) * 2, int(index / 1024u));
    uvec4 head = texelFetch(records, at, 0);
    uvec4 tail = texelFetch(records, at + ivec2(1, 0), 0);
    uvec4 bytes = (uvec4(tail.w) >> uvec4(0u, 8u, 16u, 24u)) & 255u;
    vec3 scale = vec3(uintBitsToFloat(head.w), uintBitsToFloat(tail.x), uintBitsToFloat(tail.y));
    vec3 c = turn * uintBitsToFloat(head.xyz) + shift;
    uvec4 shade = (uvec4(tail.z) >> uvec4(0u, 8u, 16u, 24u)) & 255u;
    colour = vec4(shade) / 255.0;
    if (c.z < near || colour.a < 1.0 / 255.0) return;

    vec4 q = normalize((vec4(bytes) - 128.0) / 128.0 + vec4(1e-6, 0, 0, 0));
    float w = q.x, x = q.y, y = q.z, z = q.w;
    mat3 rotation = mat3(
      1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y),
      2.0 * (x * y - w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z + w * x),
      2.0 * (x * z + w * y), 2.0 * (y * z - w * x), 1.0 - 2.0 * (x * x + y * y));
    mat3 axes = turn * rotation * mat3(scale.x, 0, 0, 0, scale.y, 0, 0, 0, scale.z);

    // The local affine projection of Zwicker et al. (EWA splatting); directions far outside the
    // picture are clamped, where it would blow up. 0.3 px^2 is the usual low-pass filter.
    vec2 limit = 0.65 * lens.yz / lens.x;
    vec2 t = clamp(c.xy / c.z, -limit, limit);
    vec3 row0 = vec3(axes[0].x, axes[1].x, axes[2].x);
    vec3 row1 = vec3(axes[0].y, axes[1].y, axes[2].y);
    vec3 row2 = vec3(axes[0].z, axes[1].z, axes[2].z);
    vec3 u = lens.x / c.z * (row0 - t.x * row2);
    vec3 v = lens.x / c.z * (row1 - t.y * row2);
    float xx = dot(u, u) + 0.3, xy = dot(u, v), yy = dot(v, v) + 0.3;

    float middle = 0.5 * (xx + yy);
    float spread = length(vec2(0.5 * (xx - yy), xy));
    float large = middle + spread, small = max(middle - spread, 0.1);
    vec2 major = abs(xy) < 1e-6 * large ? (xx >= yy ? vec2(1, 0) : vec2(0, 1))
                                        : normalize(vec2(xy, large - xx));
    float extent = min(3.33, sqrt(2.0 * log(255.0 * colour.a)));  // where alpha falls below 1/255
    vec2 corner = vec2(gl_VertexID & 1, gl_VertexID >> 1) * 2.0 - 1.0;
    along = extent * corner;
    vec2 minor = vec2(-major.y, major.x);
    vec2 offset = sqrt(large) * along.x * major + sqrt(small) * along.y * minor;
    vec2 place = (lens.x * c.xy / c.z + offset) * 2.0 / lens.yz;
    gl_Position = vec4(place.x, -place.y, 0, 1);
  }`;
  const FRAGMENT = `#version 300 es
  precision highp float;
  in vec2 along;
  in vec4 colour;
  out vec4 result;
  void main() {
    float alpha = min(0.99, colour.a * exp(-0.5 * dot(along, along)));
    if (alpha < 1.0 / 255.0) discard;
    result = vec4(colour.rgb * alpha, alpha);
  }`;

  // A model from 32-byte .splat records.
  return (gl, bytes, program) => {
    const count = bytes.length >> 5;
    const rows = Math.max(1, Math.ceil(count / 1024));
    const records = new Uint32Array(rows * 8192);
    new Uint8Array(records.buffer).set(bytes.subarray(0, count * 32));
    const floats = new Float32Array(records.buffer);
    const positions = new Float32Array(count * 3);
    for (let i = 0; i < count; i++) positions.set(floats.subarray(i * 8, i * 8 + 3), i * 3);

    const shader = program(gl, VERTEX, FRAGMENT);
    const place = (name) => gl.getUniformLocation(shader, name);
    const places = { turn: place("turn"), shift: place("shift"), lens: place("lens"), near: place("near") };
    const texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32UI, 2048, rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT, records);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    const buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, count * 4, gl.DYNAMIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribIPointer(0, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(0, 1);

    const depths = new Float32Array(count), keys = new Uint16Array(count);
    const starts = new Uint32Array(65537), order = new Uint32Array(count);
    let sorted = null;

    function sort(forward) { // far to near: a counting sort on 16 bits of depth
      const [fx, fy, fz] = forward;
      if (sorted && sorted[0] * fx + sorted[1] * fy + sorted[2] * fz > 0.99999) return;
      sorted = forward;
      let low = Infinity, high = -Infinity;
      for (let i = 0, j = 0; i < count; i++, j += 3) {
        const d = fx * positions[j] + fy * positions[j + 1] + fz * positions[j + 2];
        depths[i] = d;
        if (d < low) low = d;
        if (d > high) high = d;
      }
      const scale = 65535 / (high - low || 1);
      starts.fill(0);
      for (let i = 0; i < count; i++) {
        keys[i] = (high - depths[i]) * scale;
        starts[keys[i] + 1]++;
      }
      for (let k = 0; k < 65536; k++) starts[k + 1] += starts[k];
      for (let i = 0; i < count; i++) order[starts[keys[i]]++] = i;
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, order);
    }

    function draw(camera) {
      if (!count) return;
      sort(camera.forward);
      gl.useProgram(shader);
      gl.bindVertexArray(array);
      gl.bindTexture(gl.TEXTURE_2D, texture);
      gl.uniformMatrix3fv(places.turn, false, camera.turn);
      gl.uniform3fv(places.shift, camera.shift);
      gl.uniform3f(places.lens, camera.focal, camera.width, camera.height);
      gl.uniform1f(places.near, camera.near);
      gl.disable(gl.DEPTH_TEST);
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
    }
    function extent() { // of the bulk, from a sample: clouds have stray splats
      const every = Math.max(1, Math.floor(count / 5000)) * 3;
      const lists = [[], [], []];
      for (let i = 0; i < positions.length; i += every)
        for (let k = 0; k < 3; k++) lists[k].push(positions[i + k]);
      lists.forEach((l) => l.sort((a, b) => a - b));
      const at = (share) => lists.map((l) => l[Math.floor(share * (l.length - 1))] || 0);
      const low = at(0.05);
      return { middle: at(0.5), reach: Math.hypot(...at(0.95).map((v, k) => v - low[k])) || 1 };
    }

    return { extent, up: [0, -1, 0], from: [0.3, -0.3, -1.2], draw };
  };
})();
