"use strict";
// Zoom and details for the timeline. The page says the same without it.
(() => {
  const source = document.getElementById("timeline-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const UNIT = 10000; // Times are in tenths of a millisecond.
  const ROW = 16;

  for (const row of data.rows) {
    row.end = row.phases.reduce((sum, length) => sum + length, row.start);
    row.sent = row.start + (data.phases[0][1] === "client_queue" ? row.phases[0] : 0);
    row.stalls ??= [];
  }

  const span = (units) => {
    const milliseconds = units / 10;
    const digits = (value) => value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0);
    return milliseconds >= 1000 ? digits(milliseconds / 1000) + " s" : digits(milliseconds) + " ms";
  };
  const element = (name, attributes, parent) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (parent) parent.append(made);
    return made;
  };

  const figure = document.querySelector("figure.timeline");
  const tip = figure.querySelector(".tip");
  const views = [...figure.querySelectorAll("svg.rows")].map(makeView);
  let shown = [0, data.length];

  function show(from, to) {
    const length = Math.min(Math.max(to - from, 10), data.length);
    from = Math.min(Math.max(from, 0), data.length - length);
    shown = [from, from + length];
    // The other one is not displayed: it is drawn when it is.
    for (const view of views) if (view.svg.getBoundingClientRect().width > 0) view.draw();
  }
  window.addEventListener("resize", () => { if (shown[1] - shown[0] < data.length) show(...shown); });

  const tools = figure.querySelector(".tools");
  tools.hidden = false;
  tools.addEventListener("click", (event) => {
    const [from, to] = shown, length = to - from, middle = (from + to) / 2;
    const action = event.target.dataset.action;
    if (action === "in") show(middle - length / 4, middle + length / 4);
    if (action === "out") show(middle - length, middle + length);
    if (action === "left") show(from - length / 2, to - length / 2);
    if (action === "right") show(from + length / 2, to + length / 2);
    if (action === "reset") show(0, data.length);
  });

  function makeView(svg) {
    const plot = svg.querySelector(".plot"), axis = svg.querySelector(".axis"), labels = svg.querySelector(".labels");
    const [left, right, top, bottom] = ["left", "right", "top", "bottom"].map((name) => Number(plot.dataset[name]));
    const paths = data.phases.map(([, name]) => plot.querySelector("." + name));
    const stalls = plot.querySelector(".stall"), crosses = plot.querySelector(".crosses");
    const lit = element("rect", { class: "lit", x: left, width: right - left, visibility: "hidden" });
    const brush = element("rect", { class: "brush", y: top, height: bottom - top, visibility: "hidden" });
    plot.prepend(lit);
    plot.append(brush);
    let rows = [], lanes = [], pitch = 1;

    const x = (time) => left + (Math.min(Math.max(time, shown[0]), shown[1]) - shown[0]) / (shown[1] - shown[0]) * (right - left);
    const time = (pixel) => shown[0] + (pixel - left) / (right - left) * (shown[1] - shown[0]);

    function draw() {
      const [from, to] = shown;
      rows = data.rows.filter((row) => row.end >= from && row.start <= to);
      lanes = [...new Set(rows.map((row) => row.lane))].sort((one, other) => one - other);
      const places = new Map(lanes.map((lane, place) => [lane, place]));
      pitch = Math.min((bottom - top) / Math.max(lanes.length, 1), ROW);
      const thickness = pitch > 8 ? pitch - 3 : pitch > 4 ? pitch - 1.5 : pitch;
      const drawn = paths.map(() => []), stalled = [], crossed = [];
      const bar = (path, y, start, end) => {
        if (end < from || start > to) return;
        const x0 = x(start), width = Math.max(x(end) - x0, 0.1);
        path.push(`M${x0.toFixed(1)} ${y.toFixed(1)}h${width.toFixed(1)}v${thickness.toFixed(1)}h-${width.toFixed(1)}z`);
      };
      for (const row of rows) {
        const y = top + places.get(row.lane) * pitch;
        let start = row.start;
        row.phases.forEach((length, phase) => {
          if (length > 0) bar(drawn[phase], y, start, start += length);
        });
        for (let i = 0; i < row.stalls.length; i += 2) bar(stalled, y, row.stalls[i], row.stalls[i] + row.stalls[i + 1]);
        if (row.error != null) {
          const arm = Math.min(Math.max(thickness / 2, 2), 4), cx = x(row.sent) - arm, cy = y + thickness / 2 - arm;
          crossed.push(`M${cx.toFixed(1)} ${cy.toFixed(1)}l${2 * arm} ${2 * arm}m-${2 * arm} 0l${2 * arm} -${2 * arm}`);
        }
      }
      paths.forEach((path, phase) => path.setAttribute("d", drawn[phase].join("")));
      stalls.setAttribute("d", stalled.join(""));
      crosses.setAttribute("d", crossed.join(""));
      drawAxis();
      drawLabels();
    }

    function drawAxis() {
      axis.replaceChildren();
      const about = right - left > 500 ? 10 : 4, raw = (shown[1] - shown[0]) / about;
      const power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
      const inMilliseconds = shown[1] < UNIT, scale = inMilliseconds ? 10 : UNIT;
      const decimals = Math.max(0, -Math.floor(Math.log10(step / scale) + 1e-9));
      let last;
      for (let value = Math.ceil(shown[0] / step) * step; value <= shown[1] + 1e-6; value += step) {
        element("path", { class: "grid", d: `M${x(value).toFixed(1)} ${top}V${bottom}` }, axis);
        last = element("text", { class: "number", x: x(value).toFixed(1), y: bottom + 17, "text-anchor": "middle" }, axis);
        last.textContent = (value / scale).toFixed(decimals);
      }
      if (last) last.textContent += inMilliseconds ? " ms" : " s";
    }

    function drawLabels() {
      labels.replaceChildren();
      const stride = data.ownRows ? Math.max(Math.ceil(22 / pitch), 1) : Math.max(Math.ceil(lanes.length / 8), 1);
      for (let place = data.ownRows ? 0 : stride; place < lanes.length + (data.ownRows ? 0 : 1); place += stride) {
        const y = top + (place + (data.ownRows ? 0.5 : 0)) * pitch + 4;
        const text = element("text", { class: "number", x: left - 7, y: y.toFixed(1), "text-anchor": "end" }, labels);
        text.textContent = data.ownRows ? rows[place].request : place;
      }
    }

    // The request under the pointer, or the one that ended last before it where nothing runs.
    function find(px, py) {
      const lane = lanes[Math.floor((py - top) / pitch)], at = time(px), slack = 4 / (right - left) * (shown[1] - shown[0]);
      if (lane === undefined || px < left || px > right) return undefined;
      const inLane = rows.filter((row) => row.lane === lane);
      return data.ownRows ? inLane[0] : inLane.find((row) => at >= row.start - slack && at <= row.end + slack);
    }

    const pixels = (event) => {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    };
    let anchor = null;
    svg.addEventListener("pointerdown", (event) => {
      const [px, py] = pixels(event);
      if (event.button !== 0 || px < left || px > right || py < top || py > bottom) return;
      anchor = px;
      svg.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    svg.addEventListener("pointermove", (event) => {
      const [px, py] = pixels(event);
      if (anchor !== null) {
        const end = Math.min(Math.max(px, left), right);
        brush.setAttribute("x", Math.min(anchor, end));
        brush.setAttribute("width", Math.abs(end - anchor));
        brush.setAttribute("visibility", "visible");
      }
      hover(px, py, event);
    });
    const release = (event) => {
      brush.setAttribute("visibility", "hidden");
      if (anchor === null) return;
      const [px] = pixels(event), end = Math.min(Math.max(px, left), right), start = anchor;
      anchor = null;
      if (event.type === "pointerup" && Math.abs(end - start) > 6) show(Math.min(time(start), time(end)), Math.max(time(start), time(end)));
    };
    svg.addEventListener("pointerup", release);
    svg.addEventListener("pointercancel", release);
    svg.addEventListener("dblclick", () => show(0, data.length));
    svg.addEventListener("pointerleave", () => { tip.hidden = true; lit.setAttribute("visibility", "hidden"); });
    svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const [px] = pixels(event), middle = time(px), factor = event.deltaY < 0 ? 0.7 : 1 / 0.7;
      show(middle - (middle - shown[0]) * factor, middle + (shown[1] - middle) * factor);
    }, { passive: false });

    function hover(px, py, event) {
      const row = find(px, py);
      tip.hidden = !row;
      lit.setAttribute("visibility", row ? "visible" : "hidden");
      if (!row) return;
      lit.setAttribute("y", top + lanes.indexOf(row.lane) * pitch);
      lit.setAttribute("height", pitch);
      describe(row);
      const box = figure.getBoundingClientRect(), inside = event.clientX - box.left;
      const isRight = inside > box.width / 2;
      tip.style.left = isRight ? "auto" : inside + 16 + "px";
      tip.style.right = isRight ? box.width - inside + 16 + "px" : "auto";
      tip.style.top = event.clientY - box.top + 14 + "px";
    }
    return { svg, draw };
  }

  function describe(row) {
    const title = document.createElement("b"), list = document.createElement("dl");
    title.textContent = "Request " + row.request + (row.pair ? ", " + row.pair : "");
    const add = (name, value) => {
      const term = document.createElement("dt"), text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      list.append(term, text);
    };
    add("sent at", span(row.sent));
    if (row.input != null) add("tokens in, out", row.input + ", " + row.output);
    row.phases.forEach((length, phase) => { if (length > 0) add(data.phases[phase][0], span(length)); });
    if (row.stalls.length) add("stalls", row.stalls.length / 2);
    const parts = [title, list];
    if (row.error != null) {
      const error = document.createElement("div");
      error.textContent = "Failed: " + row.error;
      parts.push(error);
    }
    tip.replaceChildren(...parts);
  }
})();
