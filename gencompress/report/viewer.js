"use strict";
// A small 3D viewer on WebGL 2: Gaussian splats, sorted on the CPU and blended back to front.
//
// A model is { positions, draw(camera) }; `splats` makes one from .splat records. A triangle mesh
// would be one more such function: the camera, the controls and the split know nothing of splats.
// Axes are those of the files: camera x right, y down, z forward; pixel centres at +0.5.
(() => {
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

  const add = (a, b, s = 1) => a.map((v, i) => v + s * b[i]);
  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
  const cross = (a, b) => [0, 1, 2].map((i) =>
    a[(i + 1) % 3] * b[(i + 2) % 3] - a[(i + 2) % 3] * b[(i + 1) % 3]);
  const unit = (a) => a.map((v) => v / (Math.hypot(...a) || 1));

  function program(gl, vertex, fragment) {
    const made = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(made, shader);
    }
    gl.linkProgram(made);
    if (!gl.getProgramParameter(made, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(made));
    return made;
  }

  // A model from 32-byte .splat records.
  function splats(gl, bytes) {
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
      if (sorted && dot(sorted, forward) > 0.99999) return;
      sorted = forward;
      const [fx, fy, fz] = forward;
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
      gl.enable(gl.BLEND);
      gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, count);
    }
    return { positions, draw };
  }

  // A camera that looks at the bulk of the model, for a scene that names none.
  function overview(positions) {
    const every = Math.max(1, Math.floor(positions.length / 3 / 5000)) * 3;
    const lists = [[], [], []];
    for (let i = 0; i < positions.length; i += every)
      for (let k = 0; k < 3; k++) lists[k].push(positions[i + k]);
    lists.forEach((l) => l.sort((a, b) => a - b));
    const at = (share) => lists.map((l) => l[Math.floor(share * (l.length - 1))] || 0);
    const reach = Math.hypot(...add(at(0.95), at(0.05), -1)) || 1;
    return { eye: add(at(0.5), [0.3 * reach, -0.3 * reach, -1.2 * reach]), target: at(0.5), up: [0, -1, 0], fov_deg: 45 };
  }

  // An eye on a sphere around a target; `up` stays up.
  function orbit(start) {
    const up = unit(start.up);
    const look = unit(add(start.target, start.eye, -1));
    const height = dot(look, up);
    let ahead = add(look, up, -height);
    if (Math.hypot(...ahead) < 1e-6) ahead = cross(up, Math.abs(up[0]) < 0.9 ? [1, 0, 0] : [0, 1, 0]);
    ahead = unit(ahead);
    const aside = cross(up, ahead);
    const home = { target: start.target, yaw: 0, pitch: Math.asin(Math.max(-1, Math.min(1, height))),
      distance: Math.hypot(...add(start.target, start.eye, -1)) || 1 };
    let now = { ...home };
    const axes = () => {
      const level = add(ahead.map((v) => v * Math.cos(now.yaw)), aside, Math.sin(now.yaw));
      const forward = add(level.map((v) => v * Math.cos(now.pitch)), up, Math.sin(now.pitch));
      const right = unit(cross(forward, up));
      return { forward, right, down: cross(forward, right) };
    };
    return {
      turn(dx, dy) {
        now.yaw -= dx;
        now.pitch = Math.max(-1.55, Math.min(1.55, now.pitch - dy));
      },
      pan(dx, dy) { // in units of the distance
        const { right, down } = axes();
        now.target = add(add(now.target, right, -dx * now.distance), down, -dy * now.distance);
      },
      zoom(factor) {
        now.distance = Math.max(home.distance / 50, Math.min(home.distance * 20, now.distance * factor));
      },
      reset() { now = { ...home }; },
      camera(width, height) {
        const { forward, right, down } = axes();
        const eye = add(now.target, forward, -now.distance);
        return { forward, width, height, near: 0.01 * now.distance,
          focal: 0.5 * Math.min(width, height) / Math.tan(start.fov_deg * Math.PI / 360),
          turn: [0, 1, 2].flatMap((i) => [right[i], down[i], forward[i]]), // by columns
          shift: [right, down, forward].map((axis) => -dot(axis, eye)) };
      },
    };
  }

  function listen(canvas, view, changed) {
    const held = new Map();
    const size = () => Math.min(canvas.clientWidth, canvas.clientHeight);
    canvas.addEventListener("contextmenu", (e) => e.preventDefault());
    canvas.addEventListener("click", () => canvas.focus({ preventScroll: true }));
    canvas.addEventListener("pointerdown", (e) => {
      held.set(e.pointerId, [e.clientX, e.clientY]);
      canvas.setPointerCapture(e.pointerId);
    });
    for (const kind of ["pointerup", "pointercancel"])
      canvas.addEventListener(kind, (e) => held.delete(e.pointerId));
    canvas.addEventListener("pointermove", (e) => {
      const old = held.get(e.pointerId);
      if (!old) return;
      const dx = (e.clientX - old[0]) / size(), dy = (e.clientY - old[1]) / size();
      const other = [...held].find(([id]) => id !== e.pointerId);
      if (other) { // two fingers: each carries half of the move; their distance is the zoom
        const gap = (p) => Math.hypot(p[0] - other[1][0], p[1] - other[1][1]) || 1;
        view.zoom(gap(old) / gap([e.clientX, e.clientY]));
        view.pan(dx / 2, dy / 2);
      } else if (e.buttons & 6 || e.shiftKey) view.pan(dx, dy);
      else view.turn(dx * 3.5, dy * 3.5);
      held.set(e.pointerId, [e.clientX, e.clientY]);
      changed();
    });
    canvas.addEventListener("wheel", (e) => { // an unselected picture lets the page scroll
      if (document.activeElement !== canvas) return;
      e.preventDefault();
      view.zoom(Math.exp(Math.max(-80, Math.min(80, e.deltaY * (e.deltaMode ? 16 : 1))) * 0.002));
      changed();
    }, { passive: false });
    canvas.addEventListener("keydown", (e) => {
      const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
      if (e.ctrlKey || e.metaKey || e.altKey) return;
      if (arrow && e.shiftKey) view.pan(arrow[0] * 0.04, arrow[1] * 0.04);
      else if (arrow) view.turn(arrow[0] * 0.1, arrow[1] * 0.1);
      else if (e.key === "+" || e.key === "=") view.zoom(0.9);
      else if (e.key === "-") view.zoom(1 / 0.9);
      else if (e.key === "Home") view.reset();
      else return;
      e.preventDefault();
      changed();
    });
  }

  function start(figure) {
    const find = (what) => figure.querySelector(what);
    const canvas = find("canvas"), stage = find(".stage"), message = find(".message");
    const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, powerPreference: "high-performance" });
    if (!gl) throw new Error("this browser offers no WebGL 2");
    const settings = JSON.parse(find('script[type="application/json"]').textContent);
    const models = {};
    for (const script of figure.querySelectorAll("[data-model]")) {
      const raw = atob(script.textContent.trim());
      models[script.dataset.model] = splats(gl, Uint8Array.from(raw, (c) => c.charCodeAt(0)));
    }
    const first = models.before || models.after;
    const view = orbit(settings.camera || overview(first.positions));
    let mode = models.before && models.after ? "split" : models.before ? "before" : "after";
    let share = 0.5, light = settings.background === "white", waiting = false, coarse = false, asked = 0, settle = 0;

    function draw() {
      waiting = false;
      if (settle && performance.now() - asked > 60) coarse = true; // frames come late: draw fewer pixels
      const ratio = Math.min(devicePixelRatio || 1, 2) * (coarse ? 0.5 : 1);
      const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
      const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      gl.viewport(0, 0, width, height);
      gl.disable(gl.SCISSOR_TEST);
      gl.clearColor(light, light, light, 1);
      gl.clear(gl.COLOR_BUFFER_BIT);
      const camera = view.camera(width, height);
      const cut = Math.round(share * width);
      gl.enable(gl.SCISSOR_TEST);
      for (const [name, from, to] of [["before", 0, cut], ["after", cut, width]]) {
        if (mode !== "split" && mode !== name) continue;
        if (mode === "split") gl.scissor(from, 0, to - from, height);
        else gl.scissor(0, 0, width, height);
        models[name].draw(camera);
      }
      canvas.dataset.drawn = Number(canvas.dataset.drawn || 0) + 1;
    }
    function changed() {
      request();
      clearTimeout(settle);
      settle = setTimeout(() => { // still again: draw at full resolution
        settle = 0;
        if (coarse) request();
        coarse = false;
      }, 250);
    }
    function request() {
      if (waiting) return;
      waiting = true;
      asked = performance.now();
      requestAnimationFrame(draw);
    }
    function show() {
      const [left, right] = stage.querySelectorAll(".tag");
      left.hidden = mode === "after";
      right.hidden = mode === "before";
      left.textContent = settings.labels.before;
      right.textContent = settings.labels.after;
      handle.hidden = find(".split").hidden = mode !== "split";
      stage.style.setProperty("--at", `${share * 100}%`);
      changed();
    }
    for (const input of figure.querySelectorAll(".choice input")) {
      const works = input.value === "split" ? models.before && models.after : models[input.value];
      input.disabled = !works;
      input.checked = input.value === mode;
      input.addEventListener("change", () => { mode = input.value; show(); });
    }
    const divide = find(".split input"), handle = find(".stage .handle");
    divide.addEventListener("input", () => { share = divide.value / 100; show(); });
    handle.addEventListener("pointerdown", (e) => handle.setPointerCapture(e.pointerId));
    handle.addEventListener("pointermove", (e) => {
      if (!handle.hasPointerCapture(e.pointerId)) return;
      const box = stage.getBoundingClientRect();
      divide.value = 100 * (e.clientX - box.left) / box.width;
      share = divide.value / 100;
      show();
    });
    find('[data-do="background"]').onclick = () => { light = !light; changed(); };
    find('[data-do="reset"]').onclick = () => { view.reset(); changed(); };
    canvas.addEventListener("webglcontextlost", () => {
      message.hidden = false;
      message.textContent = "The graphics card dropped this picture; reload the page to see it again.";
    });
    listen(canvas, view, changed);
    new ResizeObserver(changed).observe(canvas);
    message.hidden = true;
    find(".controls").hidden = false;
    show();
  }

  for (const figure of document.querySelectorAll("[data-scene]")) {
    const message = figure.querySelector(".message");
    message.textContent = "The 3D view starts when it is on screen.";
    const watch = new IntersectionObserver((entries) => {
      if (!entries.some((e) => e.isIntersecting)) return;
      watch.disconnect();
      try { start(figure); } catch (error) {
        message.textContent = `The 3D view cannot be drawn: ${error.message}. The other parts of this page do not need it.`;
      }
    });
    watch.observe(figure.querySelector(".stage"));
  }
})();
