// A value for each layer and module, as colours; what lies outside of layers has rows of its own.

const MOST_ROWS = 400;
const BAD = "bad";
const SIGNS = { only_a: "A", only_b: "B", shape: "≠", dtype: "T" }; // what is written on cells that are marked otherwise

/**
 * The grid of a column of keys: stacks of layers (a model has one; an encoder and a decoder are two), each with its
 * layers, its modules and the tensors of each cell (several where there are experts); and the tensors without a layer.
 */
function gridOf(keys, members) {
  const stacks = new Map();
  const loose = [];
  for (const i of members) {
    const { at, stack, module } = keys(i).known(i);
    if (at < 0) {
      loose.push({ label: keys(i).text(i), cells: new Map([[null, { tensors: [i] }]]) });
      continue;
    }
    if (!stacks.has(stack)) stacks.set(stack, { name: stack, layers: new Set(), rows: new Map() });
    const { layers, rows } = stacks.get(stack);
    const layer = keys(i).layer(i);
    layers.add(layer);
    if (!rows.has(module)) rows.set(module, { label: module || "(whole)", cells: new Map() });
    const { cells } = rows.get(module);
    if (!cells.has(layer)) cells.set(layer, { tensors: [] });
    cells.get(layer).tensors.push(i);
  }
  const groups = [...stacks.values()].map(({ name, layers, rows }) => ({ name, layers: [...layers].sort((a, b) => a - b), rows: [...rows.values()] }));
  if (loose.length) groups.push({ name: null, layers: [null], rows: loose });
  return groups;
}

/**
 * A scale from the values that there are: {colour(value), stops, ticks}. kind: "log", "linear" or "diverging"; values
 * that are exactly `zero` (a log scale has no place for them) get a colour of their own.
 */
function scaleOf(values, kind) {
  const finite = values.filter((value) => Number.isFinite(value) && (kind !== "log" || value > 0));
  let low = finite.reduce((least, value) => Math.min(least, value), Infinity);
  let high = finite.reduce((most, value) => Math.max(most, value), -Infinity);
  if (!finite.length) return { colour: () => styled("zero"), stops: [], ticks: [] };
  if (kind === "diverging") {
    const reach = Math.max(Math.abs(low), Math.abs(high)) || 1;
    const stops = diverging();
    return { colour: (value) => along(stops, (value / reach + 1) / 2), stops, ticks: [-reach, 0, reach] };
  }
  const place = kind === "log" ? Math.log : (value) => value;
  const back = kind === "log" ? Math.exp : (value) => value;
  const [from, to] = [place(low), place(high)];
  const share = (value) => (to > from ? (place(value) - from) / (to - from) : 0.5);
  const ticks = to > from ? [low, back((from + to) / 2), high] : [low];
  return { colour: (value) => (kind === "log" && value <= 0 ? styled("zero") : along(sequential(), share(value))), stops: to > from ? sequential() : [along(sequential(), 0.5), along(sequential(), 0.5)], ticks };
}

/** A cell that is marked: a cross on a strong colour, or a sign in words, so that it is seen without colours too. */
function drawMark(context, mark, x, y, w, h) {
  const strong = styled("bad");
  context.fillStyle = mark === BAD ? strong : styled("tile");
  context.fillRect(x, y, w, h);
  context.strokeStyle = mark === BAD ? styled("panel") : styled("muted");
  if (mark === BAD) {
    const [size, cx, cy] = [Math.min(w, h) * 0.3, x + w / 2, y + h / 2];
    context.lineWidth = Math.max(1, Math.min(2, w / 5));
    context.beginPath();
    context.moveTo(cx - size, cy - size);
    context.lineTo(cx + size, cy + size);
    context.moveTo(cx + size, cy - size);
    context.lineTo(cx - size, cy + size);
    context.stroke();
    return;
  }
  if (w < 9) {
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(x, y + h);
    context.lineTo(x + w, y);
    context.stroke();
    return;
  }
  context.font = `600 11px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillStyle = styled("text");
  context.fillText(SIGNS[mark] ?? "?", x + w / 2, y + h / 2 + 0.5);
  context.textAlign = "left";
}

/**
 * A heatmap in `host`. groups as of gridOf; metrics: {name: {kind, text}}; evaluate(cell, metric) → {value, mark}, where
 * mark is BAD, another word, or null; describe(cell, layer, row) → the content of a tip. `marks` says what stands in the
 * legend: [mark, text].
 */
function heatmap(host, { groups, label, metric, metrics, evaluate, describe: told, marks, legendHost, activate }) {
  const state = { metric, each: false, cells: [], most: 0 };
  const rowCount = groups.reduce((sum, group) => sum + group.rows.length, 0);
  const rowHeight = rowCount > 60 ? 14 : 19;

  let room = MOST_ROWS;
  const shown = groups.map((group) => {
    const rows = group.rows.slice(0, room);
    room -= rows.length;
    return { group, rows };
  }).filter(({ rows }) => rows.length);
  const probe = document.createElement("canvas").getContext("2d");
  probe.font = `12px ${FONT}`;
  const labels = shown.flatMap(({ rows }) => rows.map((row) => escapeText(row.label).slice(0, 400)));
  const longest = labels.reduce((wide, text) => Math.max(wide, probe.measureText(text).width), 0);

  function layout(width) {
    const gutter = Math.min(longest + 14, width * 0.42);
    let y = 0;
    const blocks = shown.map(({ group, rows }, at) => {
      const layers = group.layers.slice(0, Math.max(1, Math.floor((width - gutter) / 2)));
      const pitch = group.name === null ? 26 : Math.max(2, Math.min(64, (width - gutter) / layers.length));
      const block = { group, rows, layers, pitch, top: y, y: y + 24, left: gutter };
      const note = rows.length < group.rows.length || layers.length < group.layers.length || (at === shown.length - 1 && at < groups.length - 1);
      y = block.y + rows.length * rowHeight + (note ? 34 : 16);
      return { ...block, note };
    });
    return { blocks, height: y };
  }

  function draw(context, width) {
    const { kind } = metrics[state.metric];
    const { blocks } = layout(width);
    const [text, muted, empty] = [styled("text"), styled("muted"), styled("line")];
    const values = new Map();
    for (const { rows, layers } of blocks) for (const row of rows) for (const layer of layers) if (row.cells.has(layer)) values.set(row.cells.get(layer), evaluate(row.cells.get(layer), state.metric));
    const shared = scaleOf([...values.values()].filter(({ mark }) => mark === null || mark === BAD).map(({ value }) => value ?? NaN), kind);
    state.cells = [];
    context.textBaseline = "middle";
    for (const block of blocks) {
      const { group, rows, layers, pitch, left } = block;
      context.font = `600 11px ${FONT}`;
      context.fillStyle = muted;
      context.fillText(fitted(context, group.name === null ? "outside of layers" : escapeText(group.name), left - 12), 0, block.top + 13);
      context.font = `11px ${FONT}`;
      if (group.name !== null) numbersOf(context, layers, left, pitch, block.top + 13);
      rows.forEach((row, at) => {
        const y = block.y + at * rowHeight;
        context.font = `12px ${FONT}`;
        context.fillStyle = text;
        context.fillText(fitted(context, escapeText(row.label), left - 12), 0, y + rowHeight / 2);
        const own = state.each && layers.length > 1 ? scaleOf(layers.map((layer) => values.get(row.cells.get(layer))?.value ?? NaN), kind) : shared;
        layers.forEach((layer, column) => {
          const cell = row.cells.get(layer);
          const [x, w, h] = [left + column * pitch, Math.max(pitch - (pitch > 6 ? 1 : 0.25), 1), rowHeight - 1];
          if (!cell) {
            context.fillStyle = empty;
            context.fillRect(x + w / 2 - 1, y + h / 2 - 1, 2, 2);
            return;
          }
          const { value, mark } = values.get(cell);
          if (mark !== null) drawMark(context, mark, x, y, w, h);
          else {
            context.fillStyle = value === null ? empty : own.colour(value);
            context.fillRect(x, y, w, h);
            if (w > 44 && value !== null && group.name !== null) written(context, value, x, y, w, h);
          }
          state.cells.push({ id: state.cells.length, cell, layer, row, x, y, w, h, opens: Boolean(activate) });
          if (group.name === null) {
            context.fillStyle = muted;
            context.fillText(measure(value), x + pitch + 8, y + rowHeight / 2);
          }
        });
      });
      if (block.note) {
        context.fillStyle = muted;
        context.fillText("There is more than can be drawn: the table below has all.", 0, block.y + rows.length * rowHeight + 13);
      }
    }
    key(shared, values);
  }

  /** A value in its cell, dark or light as the colour below it needs: as the legend says it, or in two digits. */
  function written(context, value, x, y, w, h) {
    context.font = `10.5px ${FONT}`;
    const text = texts(value).find((some) => context.measureText(some).width <= w - 5);
    if (text === undefined) return;
    context.textAlign = "center";
    context.fillStyle = inkOn(context.fillStyle);
    context.fillText(text, x + w / 2, y + h / 2 + 0.5);
    context.textAlign = "left";
  }

  const texts = (value) => (metrics[state.metric].share ? [percent(value)] : [measure(value), measure(value, 2)]);

  function numbersOf(context, layers, left, pitch, y) {
    context.textAlign = "center";
    const wide = context.measureText(String(layers.at(-1))).width + 8;
    const every = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((step) => step * pitch >= wide) ?? 1000;
    layers.forEach((layer, at) => at % every === 0 && context.fillText(String(layer), left + at * pitch + pitch / 2, y));
    context.textAlign = "left";
  }

  function key(scale, values) {
    const found = [...values.values()];
    const entries = [];
    if (state.each) entries.push(el("span", {}, "low"), ramp(scale.stops), el("span", {}, "high, in each row"));
    else if (scale.ticks.length) {
      const ticks = el("span", { class: "ticks" }, ...scale.ticks.map((value) => el("b", {}, measure(value))));
      entries.push(el("span", { class: "ramp" }, ramp(scale.stops), ticks), el("span", {}, `${metrics[state.metric].kind === "log" ? "logarithmic" : "linear"}`));
    }
    if (metrics[state.metric].kind === "log" && found.some(({ value, mark }) => mark === null && value === 0)) entries.push(swatch("zero", marks.zero ?? "exactly 0"));
    for (const [mark, text] of Object.entries(marks)) if (mark !== "zero" && found.some((one) => one.mark === mark)) entries.push(swatch(mark, text));
    legendHost.replaceChildren(...entries);
  }

  function swatch(mark, text) {
    const sample = el("canvas", { width: 28, height: 28, class: "swatch" });
    const context = sample.getContext("2d");
    context.scale(2, 2);
    if (mark === "zero") {
      context.fillStyle = styled("zero");
      context.fillRect(0, 0, 14, 14);
    } else drawMark(context, mark, 0, 0, 14, 14);
    return el("span", {}, sample, text);
  }

  function ramp(stops) {
    const element = el("i", { class: "gradient" });
    element.style.background = stops.length ? `linear-gradient(90deg, ${stops.join(", ")})` : "none";
    return element;
  }

  const render = picture(host, {
    label,
    height: (width) => layout(width).height,
    draw,
    at: (x, y) => state.cells.find((cell) => x >= cell.x && y >= cell.y && x < cell.x + cell.w + 1 && y < cell.y + cell.h + 1) ?? null,
    describe: ({ cell, layer, row }) => told(cell, layer, row),
    activate: activate ? ({ cell }) => activate(cell) : null,
  });
  return {
    show(name) {
      state.metric = name;
      render();
    },
    each(on) {
      state.each = on;
      render();
    },
  };
}
