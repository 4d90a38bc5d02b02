"use strict";
// The page without WebGL: theme, picture sliders, choosing a view, sorting tables.
// Without this script every view is shown in full and tables keep their order.
(() => {
  const root = document.documentElement;
  root.classList.remove("no-js");

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = (value) => {
    try { // storage may be refused for a file opened from disk
      if (value) localStorage.setItem("gencompress-theme", value);
      return localStorage.getItem("gencompress-theme");
    } catch { return null; }
  };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const nameTheme = () => {
    theme.textContent = isDark() ? "light" : "dark";
    theme.setAttribute("aria-label", `switch to the ${theme.textContent} theme`);
  };
  if (["light", "dark"].includes(stored())) root.dataset.theme = stored();
  theme.hidden = false;
  theme.onclick = () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    stored(root.dataset.theme);
    nameTheme();
  };
  dark.addEventListener("change", nameTheme);
  nameTheme();

  for (const box of document.querySelectorAll(".compare")) {
    const input = box.querySelector("input");
    const move = () => {
      box.style.setProperty("--at", `${input.value}%`);
      input.setAttribute("aria-valuetext", `${Math.round(input.value)}% ${input.dataset.label}`);
    };
    input.addEventListener("input", move);
    move();
  }
  for (const image of document.querySelectorAll(".pictures img")) {
    const look = () => image.classList.toggle("coarse", image.naturalWidth <= 128);
    image.complete ? look() : image.addEventListener("load", look);
  }

  for (const cell of document.querySelectorAll(".peek")) { // the first view, small, of a sheet its first picture
    const view = document.querySelector(`#${cell.dataset.of} .view`);
    for (const image of view ? [...view.querySelectorAll("img")].slice(0, 2) : []) {
      const [frame, small] = ["span", "img"].map((name) => document.createElement(name));
      small.src = image.src;
      small.alt = small.title = image.alt;
      frame.style.setProperty("--columns", view.style.getPropertyValue("--columns") || 1);
      frame.append(small);
      cell.append(frame);
    }
  }

  for (const section of document.querySelectorAll("[data-views]")) {
    const views = [...section.querySelectorAll(".view")];
    if (views.length < 2) continue;
    const strip = document.createElement("div");
    strip.className = "thumbs";
    strip.setAttribute("role", "group");
    strip.setAttribute("aria-label", "choose a view");
    const show = (chosen) => views.forEach((view, i) => {
      view.hidden = i !== chosen;
      strip.children[i].setAttribute("aria-pressed", String(i === chosen));
    });
    views.forEach((view, i) => {
      const button = document.createElement("button");
      const source = view.querySelector("img.over") || view.querySelector("img");
      button.type = "button";
      button.title = view.dataset.name;
      if (source) {
        const small = document.createElement("img");
        small.src = source.src;
        small.alt = view.dataset.name;
        button.append(small);
      } else button.textContent = view.dataset.name;
      button.onclick = () => {
        const at = section.querySelector(".view:not([hidden]) input");
        show(i);
        const input = view.querySelector("input");
        if (at && input && at !== input) { // the divider stays where the reader put it
          input.value = at.value;
          input.dispatchEvent(new Event("input"));
        }
      };
      strip.append(button);
    });
    views[0].before(strip);
    show(0);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.onclick = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.key;
        const compare = (a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x !== undefined && y !== undefined) return Number(x) - Number(y) || 0;
          if (x !== undefined || y !== undefined) return (x === undefined ? 1 : -1) * (up ? 1 : -1);
          return a.cells[column].textContent.localeCompare(b.cells[column].textContent);
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? 1 : -1) * compare(a, b));
        table.tBodies[0].append(...rows);
      };
    });
  }
})();
