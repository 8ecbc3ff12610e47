// The files: a bar for each, as long as the file, with every tensor where it lies.

/** The parts of file names that differ, and the name with … in their place: "1" … of "model-…-of-00004.safetensors". */
function shortNames(names) {
  if (names.length < 2) return { short: names, common: null };
  let head = 0;
  let tail = 0;
  const [least] = [...names].sort((a, b) => a.length - b.length);
  while (head < least.length && names.every((name) => name[head] === least[head])) head++;
  while (tail < least.length - head && names.every((name) => name.at(-1 - tail) === least.at(-1 - tail))) tail++;
  if (head + tail < 6) return { short: names, common: null };
  // Digits belong together: not "model-0000" and "1", but "model-" and "00001".
  while (head > 0 && /\d/.test(least[head - 1])) head--;
  while (tail > 0 && /\d/.test(least[least.length - tail])) tail--;
  return { short: names.map((name) => name.slice(head, name.length - tail)), common: `${least.slice(0, head)}…${least.slice(least.length - tail)}` };
}

const MOST_FILES = 1200;

function strip(tensors) {
  const files = filePieces(tensors).slice(0, MOST_FILES);
  const most = files.reduce((size, file) => Math.max(size, file.bytes), 1);
  const { short, common } = shortNames(files.map((file) => file.name));
  let last = 0;
  for (let i = 0; i < tensors.count; i++) last = Math.max(last, tensors.keys.layer(i) ?? 0);
  const state = { colour: "kind", bars: [] };

  function colourOf(tensor) {
    if (state.colour === "kind") return KIND_COLOURS[tensors.kind(tensor)];
    if (state.colour === "type") return CATEGORIES[tensors.type(tensor) % CATEGORIES.length];
    const layer = tensors.keys.layer(tensor);
    return layer === null ? CATEGORIES[7] : along(VIRIDIS, last ? layer / last : 0);
  }

  /** Bars in as many columns as keep the picture on a screen and the bars legible. */
  function shape(width) {
    const columns = Math.max(1, Math.min(Math.ceil(files.length / 42), Math.floor(width / 250)));
    const rows = Math.ceil(files.length / columns);
    return { columns, rows, pitch: rows <= 8 ? 30 : rows <= 24 ? 20 : 12 };
  }

  function draw(context, width) {
    const { columns, rows, pitch } = shape(width);
    const [text, muted, ground] = [styled("text"), styled("muted"), styled("line")];
    const font = pitch > 14 ? 12 : 10;
    context.font = `${font}px ${FONT}`;
    context.textBaseline = "middle";
    const span = (width - (columns - 1) * 24) / columns;
    const gutter = Math.min(span * 0.38, short.reduce((wide, name) => Math.max(wide, context.measureText(escapeText(name).slice(0, 400)).width), 0) + 10);
    const sizes = span > 300 ? 62 : 0;
    state.bars = files.map((file, at) => {
      const x = Math.floor(at / rows) * (span + 24);
      const y = (at % rows) * pitch;
      const long = Math.max(1, ((span - gutter - sizes) * file.bytes) / most);
      const bar = { file, x: x + gutter, y: y + 1, w: long, h: pitch - (pitch > 14 ? 6 : 3) };
      context.fillStyle = text;
      context.fillText(fitted(context, escapeText(short[at]), gutter - 8), x, bar.y + bar.h / 2 + 0.5);
      context.fillStyle = ground;
      context.fillRect(bar.x, bar.y, bar.w, bar.h);
      for (const piece of file.pieces) {
        const [from, size] = extent(bar, piece);
        context.fillStyle = colourOf(piece.tensor);
        context.fillRect(from, bar.y, Math.max(size - (size > 4 ? 1 : 0), 0.15), bar.h);
      }
      if (sizes) {
        context.fillStyle = muted;
        context.fillText(humanBytes(file.bytes), bar.x + bar.w + 7, bar.y + bar.h / 2 + 0.5);
      }
      return bar;
    });
  }

  const extent = (bar, piece) => [bar.x + (bar.w * piece.offset) / (bar.file.bytes || 1), (bar.w * piece.size) / (bar.file.bytes || 1)];

  function at(x, y) {
    const bar = state.bars.find((found) => x >= found.x && x <= found.x + found.w + 1 && y >= found.y - 1 && y < found.y + found.h + 2);
    if (!bar) return null;
    // Small tensors are thinner than a pointer: the first that reaches the pixel is taken, the smallest before others.
    let best = null;
    let [start, end] = [bar.x, bar.x + bar.w]; // of what lies between two tensors
    for (const piece of bar.file.pieces) {
      const [from, size] = extent(bar, piece);
      if (from + size <= x) start = Math.max(start, from + size);
      else if (from > x) end = Math.min(end, from);
      if (x < from - 1 || x > from + Math.max(size, 1) + (size < 3 ? 1 : 0)) continue;
      if (best === null || size < best[1]) best = [from, size, piece];
    }
    if (!best) return { id: `${bar.file.name} ${start}`, bar, piece: null, x: start, y: bar.y, w: end - start, h: bar.h };
    const [from, size, piece] = best;
    return { id: `${piece.tensor} ${bar.file.name} ${piece.offset}`, bar, piece, x: from, y: bar.y, w: Math.max(size, 2), h: bar.h };
  }

  function told({ bar: { file }, piece }) {
    const rank = files.some((other) => other.rank) ? [["rank", String(file.rank)]] : [];
    if (!piece) return tipContent(file.name, [["size", humanBytes(file.bytes)], ["tensors", number(file.tensors)], ...rank, ["here", "no tensor: header or padding"]]);
    const cut = piece.size !== tensors.bytes(piece.tensor);
    return tipContent(tensors.key(piece.tensor), [
      ["file", file.name],
      ["offset", piece.known ? number(piece.offset) : "unknown"],
      ...rank,
      ...tensorRows(tensors, piece.tensor),
      ["here", cut ? humanBytes(piece.size) : null, cut ? `(${percent(piece.size / tensors.bytes(piece.tensor))} of it)` : null],
    ]);
  }

  function colours() {
    const host = place("strip-legend");
    if (state.colour === "layer") {
      return legend(host, [...[0, 0.25, 0.5, 0.75, 1].map((share) => [along(VIRIDIS, share), `layer ${Math.round(share * last)}`]), [CATEGORIES[7], "outside of layers"]].filter(([, text], at, all) => all.findIndex((other) => other[1] === text) === at));
    }
    const used = new Set(Array.from({ length: tensors.count }, (_, i) => (state.colour === "kind" ? tensors.kind(i) : tensors.type(i))));
    return legend(host, [...used].sort((a, b) => a - b).map((found) => (state.colour === "kind" ? [KIND_COLOURS[found], KINDS[found]] : [CATEGORIES[found % CATEGORIES.length], data.types[found]])));
  }

  const total = data.files.reduce((sum, file) => sum + file.bytes, 0);
  const shown = files.length < data.files.length ? ` (the first ${number(files.length)} are shown)` : "";
  place("strip-note").textContent = `${plural(data.files.length, "file")}${shown}, ${humanBytes(total)}${common ? `, named ${escapeText(common)}` : ""}`;
  choice(place("strip-controls"), "Colour", [["kind", "module"], ["layer", "layer"], ["type", "dtype"]], (colour) => {
    state.colour = colour;
    colours();
    render();
  });
  const render = picture(place("strip"), {
    label: `${plural(files.length, "file")}, and the tensors in each. Arrow keys move.`,
    height: (width) => shape(width).rows * shape(width).pitch,
    draw,
    at,
    describe: told,
  });
  colours();
}
