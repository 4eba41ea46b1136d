"use strict";
// Draws the figures of the JSON in #data (fewstep.cli.gallery.figure): panels as SVG, redrawn when a control moves.

const WIDTH = 440, LEFT = 70, RIGHT = 12, TOP = 8, BOTTOM = 44;
const SVG = "http://www.w3.org/2000/svg";

function element(parent, name, attributes = {}, text = "") {
  const made = parent.namespaceURI === SVG || name === "svg" ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  parent.appendChild(made);
  return made;
}

const colour = (index) => (index < 0 || index === undefined ? "var(--grey)" : `var(--c${index % 8})`);

// The state that a layer, a row or a cell needs, against the state of the controls.
const matches = (thing, state, off) =>
  Object.entries(thing.at || {}).every(([name, index]) => state[name] === index) && !(thing.group && off.has(thing.group));

function scale(axis, from, to) {
  const f = axis.log ? Math.log : (v) => v;
  const [low, high] = axis.limits.map(f);
  // A value far outside, or of no logarithm, ends just beyond the edge.
  return (v) => {
    const place = axis.log && v <= 0 ? -1 : (f(v) - low) / (high - low);
    return from + (to - from) * Math.min(4, Math.max(-4, place));
  };
}

function star(x, y, r) {
  const corners = [];
  for (let k = 0; k < 10; k++) {
    const size = k % 2 ? 0.42 * r : r, angle = (Math.PI * k) / 5 - Math.PI / 2;
    corners.push(`${(x + size * Math.cos(angle)).toFixed(1)},${(y + size * Math.sin(angle)).toFixed(1)}`);
  }
  return corners.join(" ");
}

function mark(svg, layer, sx, sy, box) {
  const ink = colour(layer.colour), strong = layer.strong;
  const opacity = [0.45, 0.85, 1][strong];
  const places = ([x, y]) => x.map((v, i) => [sx(v), sy(y[i])]);
  if (layer.kind === "image") {
    element(svg, "image", { x: box.left, y: box.top, width: box.width, height: box.height, href: layer.image, preserveAspectRatio: "none", style: "image-rendering: pixelated" });
    return;
  }
  for (const path of layer.paths) {
    if (layer.kind === "band") {
      const [low, high] = path[0].map(sy);
      element(svg, "rect", { x: box.left, y: high, width: box.width, height: Math.max(low - high, 2), fill: "var(--band)" });
    } else if (layer.kind === "arrows") {
      const [x, y, u, v] = path;
      const d = x.map((_, i) => {
        const a = [sx(x[i]), sy(y[i])], b = [sx(x[i] + u[i]), sy(y[i] + v[i])];
        const angle = Math.atan2(b[1] - a[1], b[0] - a[0]), size = Math.min(4, 0.5 * Math.hypot(b[0] - a[0], b[1] - a[1]));
        const wing = (turn) => `M${b[0].toFixed(1)} ${b[1].toFixed(1)}L${(b[0] - size * Math.cos(angle + turn)).toFixed(1)} ${(b[1] - size * Math.sin(angle + turn)).toFixed(1)}`;
        return `M${a[0].toFixed(1)} ${a[1].toFixed(1)}L${b[0].toFixed(1)} ${b[1].toFixed(1)}${wing(0.5)}${wing(-0.5)}`;
      });
      element(svg, "path", { d: d.join(""), fill: "none", stroke: "var(--faint)", "stroke-width": 1 });
    } else if (layer.kind === "line") {
      const d = places(path).map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
      element(svg, "path", { d, fill: "none", stroke: ink, "stroke-width": [1, 1.6, 2.4][strong], opacity, "stroke-linejoin": "round",
        ...(layer.dashed ? { "stroke-dasharray": "6 4" } : {}) });
    } else if (layer.kind === "stars") {
      for (const [x, y] of places(path)) element(svg, "polygon", { points: star(x, y, 8), fill: ink, stroke: "var(--card)", "stroke-width": 1 });
    } else {
      const r = [1.7, 3, 6][strong];
      for (const [x, y] of places(path)) {
        element(svg, "circle", { cx: x.toFixed(1), cy: y.toFixed(1), r, fill: ink, opacity, ...(strong === 2 ? { stroke: "var(--card)", "stroke-width": 1.5 } : {}) });
      }
    }
  }
}

let clips = 0;
function draw(svg, panel, state, off) {
  svg.replaceChildren();
  const bare = !panel.x.label;
  const left = bare ? 4 : LEFT, bottom = bare ? 4 : BOTTOM, right = bare ? 4 : RIGHT;
  const inner = WIDTH - left - right, high = panel.square ? inner : 320;
  const box = { left, top: TOP, width: inner, height: high };
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${TOP + high + bottom}`);
  const sx = scale(panel.x, left, left + inner), sy = scale(panel.y, TOP + high, TOP);
  if (!bare) {
    for (const [v, text] of panel.x.ticks) {
      const x = sx(v);
      element(svg, "line", { x1: x, x2: x, y1: TOP, y2: TOP + high, stroke: "var(--grid)" });
      element(svg, "text", { x, y: TOP + high + 17, "text-anchor": "middle" }, text);
    }
    for (const [v, text] of panel.y.ticks) {
      const y = sy(v);
      element(svg, "line", { x1: left, x2: left + inner, y1: y, y2: y, stroke: "var(--grid)" });
      element(svg, "text", { x: left - 7, y: y + 4, "text-anchor": "end" }, text);
    }
    element(svg, "text", { x: left + inner / 2, y: TOP + high + 37, "text-anchor": "middle" }, panel.x.label);
    element(svg, "text", { x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${TOP + high / 2}) rotate(-90)` }, panel.y.label);
    element(svg, "path", { d: `M${left} ${TOP}V${TOP + high}H${left + inner}`, fill: "none", stroke: "var(--line)" });
  }
  const clip = `clip${clips++}`;
  const shape = element(element(svg, "clipPath", { id: clip }), "rect", { x: left - 1, y: TOP - 1, width: inner + 2, height: high + 2 });
  const marks = element(svg, "g", { "clip-path": `url(#${clip})`, class: "marks" });
  for (const layer of panel.layers) if (matches(layer, state, off)) mark(marks, layer, sx, sy, box);
}

function legend(parent, panel, state, off) {
  parent.replaceChildren();
  for (const layer of panel.layers) {
    if (!layer.label || !matches(layer, state, off)) continue;
    const item = element(parent, "span");
    const svg = element(item, "svg", { viewBox: "0 0 22 12", "aria-hidden": "true" });
    const ink = colour(layer.colour);
    if (layer.kind === "line") element(svg, "line", { x1: 1, x2: 21, y1: 6, y2: 6, stroke: ink, "stroke-width": 2, ...(layer.dashed ? { "stroke-dasharray": "6 4" } : {}) });
    else if (layer.kind === "arrows") element(svg, "path", { d: "M1 6H20M16 3L20 6L16 9", fill: "none", stroke: "var(--faint)", "stroke-width": 1.5 });
    else if (layer.kind === "band") element(svg, "rect", { x: 1, y: 2, width: 20, height: 8, fill: "var(--band)" });
    else if (layer.kind === "stars") element(svg, "polygon", { points: star(11, 6, 6), fill: ink });
    else element(svg, "circle", { cx: 11, cy: 6, r: [2, 3.5, 5][layer.strong], fill: ink });
    item.append(layer.label);
  }
}

function build(figure) {
  const root = document.querySelector(`#${figure.name} .figure`);
  const state = {}, off = new Set();
  const refresh = [];
  const update = () => refresh.forEach((f) => f());

  if (figure.controls.length) {
    const row = element(root, "div", { class: "controls" });
    for (const control of figure.controls) {
      state[control.name] = control.start;
      const label = element(row, "label", { class: "control" });
      element(label, "span", {}, control.label);
      if (control.choose) {
        const select = element(label, "select", { "data-control": control.name });
        control.values.forEach((value, i) => element(select, "option", { value: i }, value));
        select.value = control.start;
        select.addEventListener("change", () => { state[control.name] = Number(select.value); update(); });
        continue;
      }
      const input = element(label, "input", { type: "range", min: 0, max: control.values.length - 1, step: 1, value: control.start, "data-control": control.name });
      const output = element(label, "output");
      const tell = () => {
        output.textContent = control.values[state[control.name]];
        input.setAttribute("aria-valuetext", `${control.label} ${output.textContent}`);
      };
      input.addEventListener("input", () => { state[control.name] = Number(input.value); tell(); update(); });
      tell();
    }
  }
  if (figure.toggles.length) {
    const row = element(root, "fieldset", { class: "toggles", "aria-label": "shown" });
    for (const toggle of figure.toggles) {
      const label = element(row, "label");
      const input = element(label, "input", { type: "checkbox", "data-toggle": toggle.name });
      input.checked = toggle.on;
      if (!toggle.on) off.add(toggle.name);
      element(label, "i", { style: `background: ${colour(toggle.colour)}` });
      label.append(toggle.name);
      input.addEventListener("change", () => { input.checked ? off.delete(toggle.name) : off.add(toggle.name); update(); });
    }
  }
  const grid = element(root, "div", { class: "panels" });
  for (const panel of figure.panels) {
    const place = element(grid, "div", { class: "panel" });
    element(place, "h3", {}, panel.title);
    const axes = panel.x.label ? `${panel.y.label} against ${panel.x.label}` : "points of the plane";
    const svg = element(place, "svg", { role: "img", "aria-label": `${panel.title}: ${axes}` });
    const key = element(place, "div", { class: "legend" });
    refresh.push(() => { draw(svg, panel, state, off); legend(key, panel, state, off); });
  }
  if (figure.rows.length) {
    const table = element(element(grid, "div", { class: figure.panels.length > 2 ? "scroll wide" : "scroll" }), "table");
    const head = element(element(table, "thead"), "tr");
    for (const name of figure.heads) element(head, "th", { scope: "col" }, name);
    const body = element(table, "tbody", { "aria-live": "polite" });
    const inks = Object.fromEntries(figure.toggles.map((t) => [t.name, colour(t.colour)]));
    refresh.push(() => {
      body.replaceChildren();
      for (const row of figure.rows) {
        if (!matches(row, state, off)) continue;
        const line = element(body, "tr");
        row.cells.forEach((text, i) => {
          const cell = element(line, "td");
          if (!i && inks[row.group]) element(cell, "i", { style: `background: ${inks[row.group]}` });
          cell.append(text);
        });
      }
    });
  }
  if (Object.keys(figure.cards).length) {
    const card = element(root, "div", { class: "card", "aria-live": "polite" });
    refresh.push(() => {
      card.replaceChildren();
      const lines = figure.cards[figure.controls.map((c) => state[c.name]).join(",")] || [];
      for (const index of lines) {
        const text = figure.texts[index];
        // A line that starts with $ is a command.
        if (text.startsWith("$ ")) element(element(card, "p"), "code", {}, text.slice(2));
        else element(card, "p", {}, text);
      }
    });
  }
  update();
}

JSON.parse(document.getElementById("data").textContent).forEach(build);
