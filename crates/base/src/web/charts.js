"use strict";
// Draws the charts of a page with uPlot. Every number, tick and text comes from Rust; this script only places them.
// A page has its charts as a list in `#chart-data`; the element with a `data-chart` of 3 shows the fourth.
// `xpydCharts.draw(element, chart)` draws a chart, also again with other data or at another width.
const xpydCharts = (() => {
  const NARROW = 640;
  const FONT = '12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif';
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name.replaceAll("_", "-")).trim();
  const make = (name, className, ...children) => {
    const made = document.createElement(name);
    made.className = className;
    made.append(...children);
    return made;
  };
  const short = (value) => Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));

  // The box beside the pointer: a title, pairs of name and value, and further lines.
  const tips = new Map();
  function tip(host, event, content) {
    const figure = host.closest("figure") ?? host;
    let box = tips.get(figure);
    if (!box) {
      box = make("div", "tip");
      figure.append(box);
      tips.set(figure, box);
    }
    box.hidden = !content;
    if (!content) return;
    const list = make("dl", "");
    for (const [name, value] of content.pairs) list.append(make("dt", "", name), make("dd", "", value));
    box.replaceChildren(make("b", "", content.title), list, ...(content.more ?? []).map((line) => make("div", "", line)));
    const frame = figure.getBoundingClientRect(), inside = event.clientX - frame.left, isRight = inside > frame.width / 2;
    box.style.left = isRight ? "auto" : inside + 16 + "px";
    box.style.right = isRight ? frame.width - inside + 16 + "px" : "auto";
    box.style.top = event.clientY - frame.top + 14 + "px";
  }

  // An axis whose ticks are given: the first list for a wide chart, the last for a narrow one.
  function axis(scale, spec, isNarrow, options) {
    const ticks = isNarrow ? spec.ticks.at(-1) : spec.ticks[0];
    return {
      // uPlot hides an axis for which it finds no step; with ticks of our own, one of any length does.
      scale, font: FONT, stroke: color("soft"), gap: 7, space: 1, incrs: () => [Math.max(spec.max - spec.min, 5)],
      splits: () => ticks.map(([value]) => value),
      values: () => ticks.map(([, text]) => options.isBlank ? "" : fitted(text, options.room)),
      filter: (_, splits) => splits,
      grid: { stroke: color("faint"), width: 1, show: !options.noGrid }, ticks: { show: false }, ...options.own,
    };
  }
  const pen = document.createElement("canvas").getContext("2d");
  const lengthOf = (words) => {
    pen.font = FONT;
    return pen.measureText(words).width;
  };
  // A text cut to a number of pixels.
  function fitted(words, room = Infinity) {
    let cut = words;
    while (cut.length > 1 && lengthOf(cut) > room) cut = cut.slice(0, cut.endsWith("…") ? -2 : -1) + "…";
    return cut;
  }
  const scale = (spec) => ({
    time: false, distr: spec.log ? 3 : 1, dir: spec.flip ? -1 : 1, range: () => [spec.min, spec.max],
  });

  // Canvas pixels of values, which stay within the plot.
  function places(u, chart, panel) {
    const { left, top, width, height } = u.bbox;
    const x = (value) => clamp(u.valToPos(clamp(value, chart.x.min, chart.x.max), "x", true), left, left + width);
    const y = (value) => clamp(u.valToPos(clamp(value, panel.y.min, panel.y.max), "y", true), top, top + height);
    return { x, y, left, top, right: left + width, bottom: top + height };
  }

  function cross(path, x, y, arm) {
    path.moveTo(x - arm, y - arm);
    path.lineTo(x + arm, y + arm);
    path.moveTo(x - arm, y + arm);
    path.lineTo(x + arm, y - arm);
  }

  function text(ctx, ratio, words, x, y, fill, align = "left") {
    Object.assign(ctx, { font: FONT.replace("12px", 12 * ratio + "px"), textAlign: align, textBaseline: "alphabetic", fillStyle: fill,
      strokeStyle: color("paper"), lineWidth: 3 * ratio, lineJoin: "round" });
    ctx.strokeText(words, x, y);
    ctx.fillText(words, x, y);
  }

  // What uPlot has no paths for: bars from edge to edge, dots, crosses, intervals and short lines at the axis.
  const shapes = {
    bars(ctx, ratio, at, series) {
      ctx.fillStyle = color(series.class);
      series.x.forEach((from, i) => {
        const x0 = at.x(from), wide = at.x(series.to[i]) - x0, width = Math.max(wide > 3 * ratio ? wide - ratio : wide, 0.5);
        const base = at.y(series.base?.[i] ?? 0), height = base - at.y(series.y[i]);
        // The smallest bar of a histogram is visible, so that one slow request among thousands is seen.
        const shown = series.base ? height : Math.max(height, 1.5 * ratio);
        ctx.fillRect(x0, base - shown, width, shown);
      });
    },
    dots(ctx, ratio, at, series) {
      const radius = (series.class === "few" ? 2.75 : 1.7) * ratio;
      ctx.globalAlpha = 0.7;
      ctx.fillStyle = color("accent");
      ctx.beginPath();
      series.x.forEach((value, i) => {
        const x = at.x(value), y = at.y(series.y[i]);
        ctx.moveTo(x + radius, y);
        ctx.arc(x, y, radius, 0, 2 * Math.PI);
      });
      ctx.fill();
      ctx.globalAlpha = 1;
    },
    crosses(ctx, ratio, at, series) {
      const path = new Path2D(), arm = 3.5 * ratio;
      series.x.forEach((value, i) => cross(path, at.x(value), Math.min(at.y(series.y[i]), at.bottom - 5 * ratio), arm));
      Object.assign(ctx, { strokeStyle: color(series.class), lineWidth: 1.6 * ratio });
      ctx.stroke(path);
    },
    intervals(ctx, ratio, at, series) {
      Object.assign(ctx, { strokeStyle: color("accent"), lineWidth: 2 * ratio });
      ctx.beginPath();
      series.x.forEach((low, i) => {
        ctx.moveTo(at.x(low), at.y(series.y[i]));
        ctx.lineTo(at.x(series.to[i]), at.y(series.y[i]));
      });
      ctx.stroke();
    },
    rug(ctx, ratio, at, series) {
      Object.assign(ctx, { strokeStyle: color("accent"), lineWidth: ratio, globalAlpha: 0.55 });
      ctx.beginPath();
      for (const value of series.x) {
        ctx.moveTo(at.x(value), at.bottom + 2 * ratio);
        ctx.lineTo(at.x(value), at.bottom + 7 * ratio);
      }
      ctx.stroke();
      ctx.globalAlpha = 1;
    },
  };

  // Marked values: lines first, so that no line crosses a label.
  function marks(u, ratio, at, panel, top) {
    const { ctx } = u, ink = (mark) => color(mark.class === "limit" ? "bad" : "ink");
    const rowOf = (mark) => panel.marks.filter((other) => other.text && other.on === "x").indexOf(mark);
    const start = (mark) => top > 0 && mark.text ? at.top - (top - rowOf(mark) * 17 - 2) * ratio : at.top;
    for (const mark of panel.marks) {
      const dash = { tail: [5, 3], limit: [2, 3] }[mark.class] ?? [];
      Object.assign(ctx, { strokeStyle: ink(mark), lineWidth: (mark.class === "limit" ? 1.6 : 1) * ratio });
      ctx.setLineDash(dash.map((length) => length * ratio));
      ctx.beginPath();
      if (mark.on === "x") {
        ctx.moveTo(at.x(mark.value), start(mark));
        ctx.lineTo(at.x(mark.value), at.bottom);
      } else {
        ctx.moveTo(at.left, at.y(mark.value));
        ctx.lineTo(at.right, at.y(mark.value));
      }
      ctx.stroke();
    }
    ctx.setLineDash([]);
    for (const mark of panel.marks.filter((mark) => mark.text)) {
      if (mark.on === "y") {
        const y = at.y(mark.value), isHigh = y - 16 * ratio < at.top;
        text(ctx, ratio, mark.text, at.left + 4 * ratio, y + (isHigh ? 14 : -4) * ratio, ink(mark));
        continue;
      }
      // Right of its line, else left of it, else at the right end.
      ctx.font = FONT.replace("12px", 12 * ratio + "px");
      const x = at.x(mark.value), width = ctx.measureText(mark.text).width, gap = 6 * ratio, y = start(mark) + 11 * ratio;
      if (x + gap + width <= at.right) text(ctx, ratio, mark.text, x + gap, y, ink(mark));
      else text(ctx, ratio, mark.text, x - gap - width >= at.left ? x - gap : at.right, y, ink(mark), "right");
    }
  }

  // The names of lines at their ends: the lowest below its end, the others above, because lines can end together.
  function names(ctx, ratio, at, panel) {
    const ends = panel.series.filter((series) => series.end && series.x.length > 0)
      .map((series) => ({ name: series.name, x: at.x(series.x.at(-1)), y: at.y(series.y.at(-1)) }))
      .sort((one, other) => other.y - one.y);
    ends.forEach(({ name, x, y }, place) => text(ctx, ratio, name, x + 8 * ratio, y + (place === 0 ? 11 : -3) * ratio, color("ink")));
  }

  // What the box says at a place: of each named series its value there.
  function values(u, chart, panel, px, py) {
    const x = u.posToVal(px, "x"), pairs = [];
    let title = chart.x.name + " " + short(x) + " " + chart.x.unit;
    for (const series of panel.series.filter((series) => series.name)) {
      let found = -1;
      if (series.kind === "bars") found = series.x.findIndex((from, i) => x >= from && x < series.to[i]);
      else if (series.kind === "steps" || series.kind === "area") found = series.x.findLastIndex((from) => from <= x);
      else {
        let nearest = series.kind === "line" ? Infinity : 14;
        series.x.forEach((value, i) => {
          const across = Math.abs(u.valToPos(value, "x") - px), down = Math.abs(u.valToPos(series.y[i], "y") - py);
          const far = series.kind === "line" ? across : panel.y.flip ? down : Math.hypot(across, down);
          if (far < nearest) [found, nearest] = [i, far];
        });
      }
      if (found < 0) continue;
      if (series.kind === "line" || series.kind === "dots") title = chart.x.name + " " + short(series.x[found]) + " " + chart.x.unit;
      if (chart.columns && series.kind === "bars") title = chart.columns[Math.floor(x)] ?? title;
      pairs.push([series.name, series.text?.[found] ?? short(series.y[found]) + " " + panel.y.unit]);
    }
    if (panel.y.flip) title = panel.y.ticks[0][Math.floor(u.posToVal(py, "y"))]?.[1] ?? "";
    return pairs.length ? { title, pairs } : undefined;
  }

  function drawPanel(host, chart, panel, isLast, key) {
    const ratio = uPlot.pxRatio;
    const width = host.clientWidth, isNarrow = width < NARROW, pick = (pair) => pair[isNarrow ? 1 : 0];
    const top = Math.max(panel.marks.filter((mark) => mark.on === "x" && mark.text).length * 17, 6), bottom = isLast ? 26 : 12;
    // Names of rows take what they need, up to half of the chart.
    const widest = panel.y.flip ? Math.max(...panel.y.ticks[0].map(([, name]) => lengthOf(name)), 0) + 16 : 0;
    const left = Math.max(Math.min(widest, width / 2), isNarrow ? 46 : 56), right = pick(chart.right ?? [20, 14]);
    let shownX = chart.x;
    // Columns have a greatest width.
    if (chart.pitch) shownX = { ...shownX, max: Math.max(shownX.max, (width - left - right) / chart.pitch) };
    const shown = { ...chart, x: shownX };
    const lines = panel.series.filter((series) => ["line", "steps", "area"].includes(series.kind));
    const xs = [...new Set([shownX.min, shownX.max, ...lines.flatMap((series) => series.x)])].sort((one, other) => one - other);
    const row = new Map(xs.map((x, i) => [x, i])), data = [xs, xs.map(() => null)];
    for (const series of lines) {
      const column = xs.map(() => null);
      series.x.forEach((x, i) => { column[row.get(x)] = clamp(series.y[i], panel.y.min, panel.y.max); });
      data.push(column);
    }
    const drawn = (when) => (u) => {
      const at = places(u, shown, panel);
      u.ctx.save();
      if (when === "under") for (const series of panel.series) if (series.kind === "bars") shapes.bars(u.ctx, ratio, at, series);
      if (when === "over") {
        for (const series of panel.series) if (series.kind !== "bars") shapes[series.kind]?.(u.ctx, ratio, at, series);
        marks(u, ratio, at, panel, top);
        names(u.ctx, ratio, at, panel);
      }
      u.ctx.restore();
    };
    host.append(make("div", "panel", panel.title));
    const none = { scale: "y", paths: () => null, points: { show: false } };
    const u = new uPlot({
      width, height: pick(panel.height) + top + bottom, padding: [top, right, 0, 0], legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false }, sync: { key } },
      scales: { x: scale(shownX), y: scale(panel.y) },
      axes: [
        axis("x", shownX, isNarrow, { isBlank: !isLast, noGrid: chart.columns, own: { size: bottom } }),
        axis("y", panel.y, isNarrow, { noGrid: panel.y.flip, room: panel.y.flip ? left - 8 : undefined, own: { size: left } }),
      ],
      series: [{}, none, ...lines.map((series) => ({
        scale: "y", spanGaps: true, points: { show: false }, width: series.kind === "area" ? 0 : 1.6,
        stroke: color("accent"), dash: series.class === "tail" ? [5, 3] : [], fill: series.kind === "area" ? color("area") : undefined,
        paths: series.kind === "line" ? uPlot.paths.linear() : uPlot.paths.stepped({ align: 1 }),
      }))],
      hooks: { drawAxes: [drawn("under")], draw: [drawn("over")] },
    }, data, host);
    u.over.addEventListener("pointermove", (event) => {
      const box = u.over.getBoundingClientRect();
      tip(host, event, values(u, shown, panel, event.clientX - box.left, event.clientY - box.top));
    });
    u.over.addEventListener("pointerleave", (event) => tip(host, event));
    return u;
  }

  // Requests over time by phase. Zooming in gives the lanes that are left more room.
  function drawTimeline(host, data) {
    const ratio = uPlot.pxRatio;
    const UNIT = 10000, ROW = 16, HEIGHT = 560; // Times are in tenths of a millisecond.
    const width = host.clientWidth, isNarrow = width < NARROW, height = Math.min(HEIGHT, data.lanes * ROW);
    for (const row of data.rows) {
      row.end = row.phases.reduce((sum, length) => sum + length, row.start);
      row.sent = row.start + (data.phases[0]?.[1] === "client_queue" ? row.phases[0] : 0);
      row.stalls ??= [];
    }
    const span = (units) => {
      const milliseconds = units / 10, digits = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
      return milliseconds >= 1000 ? digits(milliseconds / 1000) + " s" : digits(milliseconds) + " ms";
    };
    data.shown ??= [0, data.length];
    let rows = [], lanes = [], pitch = ROW;
    function select() {
      const [from, to] = data.shown;
      rows = data.rows.filter((row) => row.end >= from && row.start <= to);
      lanes = [...new Set(rows.map((row) => row.lane))].sort((one, other) => one - other);
      pitch = Math.min(height / Math.max(lanes.length, 1), ROW);
    }
    select();
    function show(from, to) {
      const length = clamp(to - from, Math.min(10, data.length), data.length);
      const start = clamp(from, 0, data.length - length);
      data.shown = [start, start + length];
      select();
      u.setScale("x", { min: start, max: start + length });
    }
    function timeTicks() {
      const [from, to] = data.shown, raw = (to - from) / (isNarrow ? 4 : 10), power = 10 ** Math.floor(Math.log10(raw));
      const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999) ?? raw, ticks = [];
      for (let tick = Math.ceil(from / step - 1e-9); tick * step <= to + 1e-6; tick++) ticks.push(tick * step);
      return ticks;
    }
    function timeTexts(_, ticks) {
      const inMilliseconds = data.shown[1] < UNIT, scale = inMilliseconds ? 10 : UNIT;
      const decimals = ticks.length > 1 ? Math.max(0, -Math.floor(Math.log10((ticks[1] - ticks[0]) / scale) + 1e-9)) : 1;
      return ticks.map((tick, i) => (tick / scale).toFixed(decimals) + (i + 1 < ticks.length ? "" : inMilliseconds ? " ms" : " s"));
    }
    // Labels at the left: request numbers, or the number of lanes.
    function laneTicks() {
      const stride = data.ownRows ? Math.max(Math.ceil(22 / pitch), 1) : Math.max(Math.ceil(lanes.length / 8), 1), ticks = [];
      for (let place = data.ownRows ? 0 : stride; place < lanes.length + (data.ownRows ? 0 : 1); place += stride) ticks.push(place);
      return ticks;
    }
    function draw(u) {
      const { ctx, bbox } = u, [from, to] = data.shown, place = new Map(lanes.map((lane, i) => [lane, i]));
      const thick = (pitch > 8 ? pitch - 3 : pitch > 4 ? pitch - 1.5 : pitch) * ratio;
      const x = (time) => bbox.left + (clamp(time, from, to) - from) / (to - from) * bbox.width;
      const y = (row) => bbox.top + place.get(row.lane) * pitch * ratio;
      const bar = (row, start, end) => {
        if (end >= from && start <= to) ctx.fillRect(x(start), y(row), Math.max(x(end) - x(start), 0.1 * ratio), thick);
      };
      ctx.save();
      data.phases.forEach(([, name], phase) => {
        ctx.fillStyle = color(name);
        for (const row of rows) if (row.phases[phase] > 0) {
          const start = row.phases.slice(0, phase).reduce((sum, length) => sum + length, row.start);
          bar(row, start, start + row.phases[phase]);
        }
      });
      ctx.fillStyle = color("stall");
      for (const row of rows) for (let i = 0; i < row.stalls.length; i += 2) bar(row, row.stalls[i], row.stalls[i] + row.stalls[i + 1]);
      const path = new Path2D(), arm = clamp(thick / 2, 2 * ratio, 4 * ratio);
      for (const row of rows) if (row.error != null) cross(path, x(row.sent), y(row) + thick / 2, arm);
      Object.assign(ctx, { strokeStyle: color("bad"), lineWidth: 1.6 * ratio });
      ctx.stroke(path);
      ctx.restore();
    }
    const u = new uPlot({
      width, height: height + 36, padding: [10, isNarrow ? 14 : 20, 0, 0], legend: { show: false },
      cursor: { show: false }, scales: {
        x: { time: false, range: () => data.shown }, y: { dir: -1, range: () => [0, height / pitch] },
      },
      axes: [
        { font: FONT, stroke: color("soft"), gap: 7, size: 26, space: 1, incrs: () => [data.length], splits: timeTicks, values: timeTexts,
          grid: { stroke: color("faint"), width: 1 }, ticks: { show: false } },
        { scale: "y", font: FONT, stroke: color("soft"), gap: 7, size: isNarrow ? 46 : 56, space: 1, incrs: () => [height],
          splits: () => laneTicks().map((place) => place + (data.ownRows ? 0.5 : 0)),
          values: () => laneTicks().map((place) => data.ownRows ? String(rows[place].request) : String(place)),
          grid: { show: false }, ticks: { show: false } },
      ],
      series: [{}, { scale: "y", paths: () => null, points: { show: false } }],
      hooks: { draw: [draw] },
    }, [[0, data.length], [null, null]], host);
    operate(host, u, data, show, () => ({ rows, lanes, pitch }), span);
    return u;
  }

  // The buttons, the pointer and the wheel of a timeline.
  function operate(host, u, data, show, view, span) {
    const over = u.over, lit = make("div", "lit"), brush = make("div", "brush");
    over.append(lit, brush);
    lit.hidden = brush.hidden = true;
    const time = (px) => data.shown[0] + px / over.clientWidth * (data.shown[1] - data.shown[0]);
    const pixels = (event) => {
      const box = over.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const inside = (px) => clamp(px, 0, over.clientWidth);
    // The request under the pointer.
    function find(px, py) {
      const { rows, lanes, pitch } = view(), lane = lanes[Math.floor(py / pitch)], at = time(px);
      const slack = 4 / over.clientWidth * (data.shown[1] - data.shown[0]), inLane = rows.filter((row) => row.lane === lane);
      return data.ownRows ? inLane[0] : inLane.find((row) => at >= row.start - slack && at <= row.end + slack);
    }
    function describe(row) {
      const pairs = [["sent at", span(row.sent)]];
      if (row.input != null) pairs.push(["tokens in, out", row.input + ", " + row.output]);
      row.phases.forEach((length, phase) => { if (length > 0) pairs.push([data.phases[phase][0], span(length)]); });
      if (row.stalls.length) pairs.push(["stalls", row.stalls.length / 2]);
      return { title: "Request " + row.request + (row.pair ? ", " + row.pair : ""), pairs, more: row.error != null ? ["Failed: " + row.error] : [] };
    }
    let anchor = null;
    over.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      anchor = pixels(event)[0];
      over.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    over.addEventListener("pointermove", (event) => {
      const [px, py] = pixels(event);
      if (anchor !== null) {
        brush.hidden = false;
        Object.assign(brush.style, { left: Math.min(anchor, inside(px)) + "px", width: Math.abs(inside(px) - anchor) + "px" });
      }
      const row = find(px, py), { lanes, pitch } = view();
      lit.hidden = !row;
      tip(host, event, row && describe(row));
      if (row) Object.assign(lit.style, { top: lanes.indexOf(row.lane) * pitch + "px", height: pitch + "px" });
    });
    const release = (event) => {
      brush.hidden = true;
      if (anchor === null) return;
      const start = anchor, end = inside(pixels(event)[0]);
      anchor = null;
      if (event.type === "pointerup" && Math.abs(end - start) > 6) show(Math.min(time(start), time(end)), Math.max(time(start), time(end)));
    };
    over.addEventListener("pointerup", release);
    over.addEventListener("pointercancel", release);
    over.addEventListener("dblclick", () => show(0, data.length));
    over.addEventListener("pointerleave", (event) => { lit.hidden = true; tip(host, event); });
    over.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const [from, to] = data.shown, middle = time(pixels(event)[0]), factor = event.deltaY < 0 ? 0.7 : 1 / 0.7;
      show(middle - (middle - from) * factor, middle + (to - middle) * factor);
    }, { passive: false });
    const tools = host.closest("figure")?.querySelector(".tools");
    if (!tools) return;
    tools.hidden = false;
    tools.onclick = (event) => {
      const [from, to] = data.shown, length = to - from, middle = (from + to) / 2, { action } = event.target.dataset;
      if (action === "in") show(middle - length / 4, middle + length / 4);
      if (action === "out") show(middle - length, middle + length);
      if (action === "left") show(from - length / 2, to - length / 2);
      if (action === "right") show(from + length / 2, to + length / 2);
      if (action === "reset") show(0, data.length);
    };
  }

  const drawn = new Map();
  function draw(host, chart) {
    for (const plot of drawn.get(host)?.plots ?? []) plot.destroy();
    host.replaceChildren();
    const key = "chart-" + (host.dataset.chart ?? "live");
    const plots = chart.rows
      ? [drawTimeline(host, chart)]
      : chart.panels.map((panel, place) => drawPanel(host, chart, panel, place + 1 === chart.panels.length, key));
    drawn.set(host, { chart, plots, width: host.clientWidth });
  }
  const again = () => { for (const [host, { chart }] of drawn) draw(host, chart); };

  const source = document.getElementById("chart-data");
  if (source) {
    const charts = JSON.parse(source.textContent);
    for (const host of document.querySelectorAll("[data-chart]")) draw(host, charts[host.dataset.chart]);
  }
  new ResizeObserver(() => {
    for (const [host, { chart, width }] of drawn) if (host.clientWidth > 0 && host.clientWidth !== width) draw(host, chart);
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  window.addEventListener("dppxchange", again);
  // Paper is light and narrower than most windows: the style of the page sets a width for it.
  window.addEventListener("beforeprint", () => { document.documentElement.classList.add("paper"); again(); });
  window.addEventListener("afterprint", () => { document.documentElement.classList.remove("paper"); again(); });
  return { draw };
})();
