"use strict";
// A small 3D viewer on WebGL 2: the stage, its controls, and an eye that orbits a model.
//
// A model is { extent(), up, from, draw(camera) }: its middle and size, and where to look at it from,
// in units of that size. `splatModel` makes one of .splat records, `meshModel` of a GLB: each has a
// file of its own, which a page holds where it needs it.
// Axes are those of the files: camera x right, y down, z forward; pixel centres at +0.5.
(() => {
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

  // A camera that sees the whole model, for a scene that names none.
  function overview({ extent, up, from }) {
    const { middle, reach } = extent();
    return { eye: add(middle, from, reach), target: middle, up, fov_deg: 45 };
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
    const settings = JSON.parse(find('script[type="application/json"]').textContent);
    const meshes = settings.kind === "faces";
    const gl = canvas.getContext("webgl2", { antialias: meshes, alpha: false, powerPreference: "high-performance" });
    if (!gl) throw new Error("this browser offers no WebGL 2");
    const models = {};
    for (const script of figure.querySelectorAll("[data-model]")) {
      const raw = atob(script.textContent.trim());
      const bytes = Uint8Array.from(raw, (c) => c.charCodeAt(0));
      models[script.dataset.model] = (meshes ? meshModel : splatModel)(gl, bytes, program);
    }
    const view = orbit(settings.camera || overview(Object.values(models)[0]));
    let mode = models.before && models.after ? "split" : Object.keys(models)[0];
    let share = 0.5, light = settings.background === "white", edges = false;
    let waiting = false, coarse = false, asked = 0, settle = 0;

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
      gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      const camera = { ...view.camera(width, height), edges };
      const cut = Math.round(share * width);
      gl.enable(gl.SCISSOR_TEST);
      const parts = mode === "split" ? [["before", 0, cut], ["after", cut, width]] : [[mode, 0, width]];
      for (const [name, from, to] of parts) {
        gl.scissor(from, 0, to - from, height);
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
      right.hidden = mode !== "after" && mode !== "split";
      left.textContent = settings.labels[mode === "split" ? "before" : mode];
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
    const outlines = find('[data-do="edges"]');
    if (outlines) outlines.onclick = () => {
      edges = !edges;
      outlines.setAttribute("aria-pressed", String(edges));
      changed();
    };
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
