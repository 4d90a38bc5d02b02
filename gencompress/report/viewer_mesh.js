"use strict";
// Triangle meshes for the viewer: flat faces under a light at the eye, both sides drawn.
const meshModel = (() => {
  const VERTEX = `#version 300 es
  precision highp float;
  uniform mat3 turn;           // world to camera
  uniform vec3 shift;
  uniform vec3 lens;           // focal length, width, height in pixels
  uniform vec2 range;          // nearest and farthest depth
  layout(location = 0) in vec3 position;
  layout(location = 1) in vec4 tint;
  out vec3 place;
  out vec3 colour;
  out vec3 corner;             // barycentric, for the edges

  void main() {
    place = turn * position + shift;
    colour = tint.rgb;
    int own = gl_VertexID % 3;
    corner = vec3(own == 0, own == 1, own == 2);
    vec2 at = 2.0 * lens.x * place.xy / lens.yz;
    float depth = (place.z * (range.y + range.x) - 2.0 * range.y * range.x) / (range.y - range.x);
    gl_Position = vec4(at.x, -at.y, depth, place.z);
  }`;
  const FRAGMENT = `#version 300 es
  precision highp float;
  uniform bool edges;
  in vec3 place;
  in vec3 colour;
  in vec3 corner;
  out vec4 result;
  void main() {
    vec3 across = cross(dFdx(place), dFdy(place));
    float facing = abs(dot(across, place)) / max(length(across) * length(place), 1e-30);
    vec3 shade = colour * (0.3 + 0.7 * facing);
    if (!gl_FrontFacing) shade *= vec3(0.72, 0.58, 0.44);  // what should be inside: darker, warmer
    vec3 wide = fwidth(corner);                            // of a pixel, in barycentric units
    if (edges) {
      vec3 far = corner / max(wide, vec3(1e-6));
      float line = 1.0 - smoothstep(0.4, 1.3, min(far.x, min(far.y, far.z)));
      float dense = smoothstep(0.12, 0.5, max(wide.x, max(wide.y, wide.z)));  // no moire of lines
      shade *= 1.0 - 0.65 * line * (1.0 - dense);
    }
    result = vec4(shade, 1);
  }`;
  const LAYOUT = [ // of the primitive: property, component type, type, numbers and bytes of an item
    ["POSITION", 5126, "VEC3", 3, 4], ["COLOR_0", 5121, "VEC4", 4, 1], ["indices", 5125, "SCALAR", 1, 4]];

  // The three arrays of a GLB of one primitive. Anything else than this least glTF is refused.
  function read(bytes) {
    const need = (fine, what) => { if (!fine) throw new Error(`a model that is not the GLB this page reads: ${what}`); };
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const word = (at) => (at + 4 <= bytes.length ? view.getUint32(at, true) : -1);
    need(word(0) === 0x46546c67 && word(4) === 2 && word(8) === bytes.length, "no glTF 2.0 header");
    const chunk = (at, kind, what) => {
      need(word(at + 4) === kind && at + 8 + word(at) <= bytes.length, what);
      return bytes.subarray(at + 8, at + 8 + word(at));
    };
    const text = chunk(12, 0x4e4f534a, "no JSON chunk");
    const json = JSON.parse(new TextDecoder().decode(text));
    const data = chunk(20 + text.length, 0x004e4942, "no binary chunk");
    need(!(json.extensionsRequired || []).length, `it needs ${json.extensionsRequired}`);
    const shapes = (json.meshes || []).flatMap((m) => m.primitives || []);
    need(shapes.length === 1 && (shapes[0].mode ?? 4) === 4, "not one primitive of triangles");
    const moved = ["matrix", "translation", "rotation", "scale"];
    need(!(json.nodes || []).some((n) => moved.some((key) => key in n)), "its node is transformed");
    const places = { ...shapes[0].attributes, indices: shapes[0].indices };
    return LAYOUT.map(([name, component, type, width, size]) => {
      const accessor = (json.accessors || [])[places[name]];
      const fits = accessor && accessor.componentType === component && accessor.type === type && !accessor.sparse;
      need(fits && (name !== "COLOR_0" || accessor.normalized), `${name} is not ${type} of type ${component}`);
      const slice = (json.bufferViews || [])[accessor.bufferView];
      const whole = slice && !slice.buffer && (slice.byteStride ?? width * size) === width * size;
      need(whole, `${name} is not in the binary chunk, packed`);
      const start = (slice.byteOffset || 0) + (accessor.byteOffset || 0), length = accessor.count * width * size;
      need(Number.isInteger(accessor.count) && start >= 0 && start + length <= data.length, `${name} ends outside`);
      const copy = data.slice(start, start + length).buffer; // aligned
      return size === 1 ? new Uint8Array(copy) : component === 5125 ? new Uint32Array(copy) : new Float32Array(copy);
    });
  }

  // A model from the bytes of a GLB.
  return (gl, bytes, program) => {
    const [positions, colours, indices] = read(bytes);
    const count = indices.length - (indices.length % 3), vertices = positions.length / 3;
    // Every corner on its own, so that its number tells where in its face it is.
    const corners = new Float32Array(count * 3), tints = new Uint8Array(count * 4);
    const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
    for (let i = 0; i < count; i++) {
      const v = indices[i];
      if (v >= vertices || 4 * v >= colours.length) throw new Error(`a model with an index ${v} of ${vertices} vertices`);
      for (let k = 0; k < 3; k++) {
        const x = positions[3 * v + k];
        corners[3 * i + k] = x;
        low[k] = Math.min(low[k], x); // NaN where one is
        high[k] = Math.max(high[k], x);
      }
      for (let k = 0; k < 4; k++) tints[4 * i + k] = colours[4 * v + k];
    }
    const middle = low.map((x, k) => (x + high[k]) / 2), radius = Math.hypot(...high.map((x, k) => x - low[k])) / 2;
    if (count && !Number.isFinite(radius)) throw new Error("a model with a vertex that is not finite");

    const shader = program(gl, VERTEX, FRAGMENT);
    const places = {};
    for (const name of ["turn", "shift", "lens", "range", "edges"]) places[name] = gl.getUniformLocation(shader, name);
    const array = gl.createVertexArray();
    gl.bindVertexArray(array);
    for (const [place, data, width, type] of [[0, corners, 3, gl.FLOAT], [1, tints, 4, gl.UNSIGNED_BYTE]]) {
      gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
      gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
      gl.enableVertexAttribArray(place);
      gl.vertexAttribPointer(place, width, type, type !== gl.FLOAT, 0, 0);
    }

    function draw(camera) {
      if (!count) return;
      let depth = camera.shift[2]; // of the middle; columns of `turn` hold the forward axis last
      for (let k = 0; k < 3; k++) depth += camera.turn[3 * k + 2] * middle[k];
      const near = Math.max(camera.near, depth - 1.01 * radius);
      gl.useProgram(shader);
      gl.bindVertexArray(array);
      gl.uniformMatrix3fv(places.turn, false, camera.turn);
      gl.uniform3fv(places.shift, camera.shift);
      gl.uniform3f(places.lens, camera.focal, camera.width, camera.height);
      gl.uniform2f(places.range, near, Math.max(depth + 1.01 * radius, 2 * near));
      gl.uniform1i(places.edges, camera.edges);
      gl.disable(gl.BLEND);
      gl.enable(gl.DEPTH_TEST);
      gl.drawArrays(gl.TRIANGLES, 0, count);
    }
    return { extent: () => ({ middle: count ? middle : [0, 0, 0], reach: count && radius ? 2 * radius : 1 }), up: [0, 1, 0], from: [0.6, 0.5, 1.1], draw };
  };
})();
