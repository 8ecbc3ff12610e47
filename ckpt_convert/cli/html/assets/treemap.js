// Parameters as areas: layers with their modules in them, or modules with their layers.

const MOST_LOOSE = 24; // tensors outside of layers that stand for themselves; more are grouped by their keys' parts
const DEEPEST = 16; // parts of a key that make groups in groups; some files have keys that are all dots

/** The tree of all tensors, as nodes {name, value, bytes, count, kind, type, children, tensor}. */
function tensorTree(tensors, by) {
  const { keys } = tensors;
  const stacks = groupBy(tensors.count, (i) => keys.known(i).stack);
  const loose = tensors.count - [...stacks.values()].reduce((sum, some) => sum + some.length, 0);
  const root = { name: "all", full: "all tensors", branches: new Map() };
  const isWhole = Array.from({ length: tensors.count }, (_, i) => tensors.parameters(i) !== null).every(Boolean);
  for (let i = 0; i < tensors.count; i++) {
    let node = root;
    const path = pathOf(tensors, i, by, stacks.size > 1, loose > MOST_LOOSE);
    if (path.length > DEEPEST) path.push(path.splice(DEEPEST - 1).join("."));
    for (const name of path) {
      if (!node.branches) node.branches = new Map(); // a key may be the beginning of another
      if (!node.branches.has(name)) node.branches.set(name, { name, branches: null, tensor: null });
      node = node.branches.get(name);
    }
    node.tensor = i;
  }
  return summed(root, tensors, isWhole);
}

function pathOf(tensors, i, by, manyStacks, manyLoose) {
  const { at, stack, parts } = tensors.keys.known(i);
  const filled = tensors.keys.filled(i);
  if (at < 0) return manyLoose ? parts : [parts.join(".")];
  const prefix = manyStacks ? [stack || "(no name)"] : [];
  const counted = stack.slice(stack.lastIndexOf(".") + 1);
  const layer = `${manyStacks || counted === "layers" || counted === "" ? "layer" : counted} ${filled[at]}`;
  if (by === "layer") return [...prefix, layer, ...filled.slice(at + 1)];
  const rest = parts.slice(at + 1);
  const numbers = filled.slice(at + 1).filter((_, place) => rest[place] === null);
  return [...prefix, ...(rest.length ? rest.map((part) => part ?? "*") : ["(whole)"]), layer, ...numbers];
}

/** A node with its sums, largest children first; a node with a single child is one with it. */
function summed(node, tensors, isWhole, parent = null) {
  const children = [...(node.branches?.values() ?? [])].map((child) => summed(child, tensors, isWhole, node));
  if (node.tensor !== null && node.tensor !== undefined) children.push(leaf(children.length ? "(itself)" : node.name, node.tensor, tensors, isWhole));
  if (children.length === 1 && parent !== null) {
    const [only] = children;
    return { ...only, name: only.name === node.name ? node.name : `${node.name}.${only.name}` };
  }
  const out = { name: node.name, children, tensor: null, value: 0, bytes: 0, count: 0, parameters: 0, kind: 5, type: 0, example: -1 };
  let largest = -1;
  for (const child of children) {
    out.value += child.value;
    out.bytes += child.bytes;
    out.count += child.count;
    out.parameters = out.parameters === null || child.parameters === null ? null : out.parameters + child.parameters;
    if (child.value > largest) [largest, out.kind, out.type] = [child.value, child.kind, child.type];
  }
  children.forEach((child) => (child.parent = out));
  for (const child of children) child.children?.forEach((inner) => (inner.parent = child));
  children.sort((a, b) => b.value - a.value);
  return out;
}

function leaf(name, tensor, tensors, isWhole) {
  const [bytes, parameters] = [tensors.bytes(tensor), tensors.parameters(tensor)];
  return { name, tensor, children: null, value: isWhole ? parameters : bytes, bytes, parameters, count: 1, kind: tensors.kind(tensor), type: tensors.type(tensor) };
}

/** Rectangles for nodes in the order of their sizes, as square as can be (Bruls, Huizing, van Wijk 2000). */
function squarified(nodes, x, y, w, h, put) {
  let left = nodes.reduce((sum, node) => sum + node.value, 0);
  if (left <= 0 || w <= 0 || h <= 0) return;
  const scale = (w * h) / left;
  for (let from = 0; from < nodes.length; ) {
    const side = Math.min(w, h);
    let [to, sum, worst] = [from, 0, Infinity];
    for (; to < nodes.length; to++) {
      const area = sum + nodes[to].value * scale;
      if (area <= 0 || nodes[to].value <= 0) break;
      const thick = area / side;
      const least = nodes[to].value * scale;
      const ratio = Math.max((nodes[from].value * scale) / thick ** 2, thick ** 2 / least);
      if (ratio > worst) break;
      [sum, worst] = [area, ratio];
    }
    if (to === from) return; // only empty tensors are left
    const thick = sum / side;
    for (let at = 0, along = 0; from < to; from++, at++) {
      const long = (nodes[from].value * scale) / thick;
      if (w >= h) put(nodes[from], x, y + along, thick, long);
      else put(nodes[from], x + along, y, long, thick);
      along += long;
    }
    if (w >= h) [x, w] = [x + thick, w - thick];
    else [y, h] = [y + thick, h - thick];
  }
}

function treemap(tensors) {
  const state = { by: "layer", colour: "kind", root: null, focus: null, tiles: [] };
  const crumbs = place("crumbs");
  const whole = { tensors: tensors.count };

  const colourOf = (node) => (state.colour === "kind" ? KIND_COLOURS[node.kind] : CATEGORIES[node.type % CATEGORIES.length]);

  function go(node) {
    state.focus = node;
    const trail = [];
    for (let at = node; at; at = at.parent) trail.unshift(at);
    crumbs.replaceChildren(
      ...trail.map((step) =>
        el("li", {}, step === node ? el("span", { "aria-current": "true" }, escapeText(step === state.root ? "all tensors" : step.name)) : el("button", { type: "button", click: () => go(step) }, escapeText(step === state.root ? "all tensors" : step.name))),
      ),
      el("li", { class: "note" }, `${sizeText(node)} in ${plural(node.count, "tensor")}`),
    );
    render();
  }

  const sizeText = (node) => (node.parameters === null ? humanBytes(node.bytes) : `${humanCount(node.parameters)} parameters`);

  function arrange(node, x, y, w, h, depth) {
    if (node.value <= 0 && depth > 0) return;
    // A group is opened where more than its largest part would be seen: not a weight with its few scales.
    const rest = node.children?.length && (w * h * (node.value - node.children[0].value)) / node.value;
    const inside = depth === 0 || (node.children !== null && w > 14 && h > 14 && depth < 5 && rest > 30);
    const tile = { id: state.tiles.length, node, x, y, w, h, depth, inside, head: 0, opens: depth > 0 };
    if (depth > 0) {
      if (w < 0.4 || h < 0.4) return;
      state.tiles.push(tile);
      if (!inside) return;
      tile.head = w > 44 && h > (depth === 1 ? 44 : 76) ? 17 : 0;
    }
    const edge = depth === 0 ? 0 : w > 40 && h > 40 ? 2 : 1;
    squarified(node.children ?? [], x + edge, y + edge + tile.head, w - 2 * edge, h - 2 * edge - tile.head, (...rect) => arrange(rect[0], ...rect.slice(1), depth + 1));
    if (node.children === null) state.tiles.push({ ...tile, depth: 1 });
  }

  function draw(context, width, height) {
    state.tiles = [];
    arrange(state.focus, 0, 0, width, height, 0);
    const [group, text, ground] = [styled("tile"), styled("text"), styled("panel")];
    context.textBaseline = "middle";
    for (const tile of state.tiles) {
      const { node, x, y, w, h, inside, head } = tile;
      const gap = Math.min(1, w * 0.12, h * 0.12);
      context.fillStyle = inside ? group : colourOf(node);
      context.fillRect(x, y, Math.max(w - gap, 0.3), Math.max(h - gap, 0.3));
      if (inside && head) {
        context.font = `600 11px ${FONT}`;
        context.fillStyle = text;
        context.fillText(fitted(context, escapeText(node.name), w - 10), x + 5, y + head / 2 + 2);
      } else if (!inside && w > 30 && h > 15) {
        context.font = `11px ${FONT}`;
        context.fillStyle = INK;
        const label = tileText(context, escapeText(node.name), w - 9);
        context.fillText(label, x + 4, y + Math.min(10, h / 2));
        const size = sizeText(node).replace(" parameters", "");
        if (label && h > 30 && context.measureText(size).width <= w - 9) context.fillText(size, x + 4, y + 24);
      }
    }
    if (!state.tiles.length) {
      context.fillStyle = ground;
      context.fillRect(0, 0, width, height);
    }
  }

  /** The name of a tile: without what most names end in, and where a layer's does not fit, its number. */
  function tileText(context, name, width) {
    const text = name.replace(/(?<=.)\.weight$/, "");
    const [, counted] = /^layer (\d+)$/.exec(text) ?? [];
    return fitted(context, counted && context.measureText(text).width > width ? counted : text, width, "end");
  }

  const at = (x, y) => state.tiles.findLast((tile) => x >= tile.x && y >= tile.y && x < tile.x + tile.w && y < tile.y + tile.h) ?? null;

  function told({ node }) {
    const share = [`${percent(node.value / state.root.value)} of all`];
    if (node.tensor !== null) return tipContent(tensors.key(node.tensor), [...tensorRows(tensors, node.tensor), ["share", ...share]]);
    const names = [];
    for (let step = node; step && step !== state.root; step = step.parent) names.unshift(step.name);
    return tipContent(names.join(" › "), [["tensors", number(node.count)], ["parameters", node.parameters === null ? null : number(node.parameters)], ["size", humanBytes(node.bytes)], ["share", ...share]]);
  }

  /** Opens the group that was clicked, one step below what is shown, or the next one if that is all there is. */
  function open({ node }) {
    let step = node;
    while (step.parent && step.parent !== state.focus) step = step.parent;
    if (step.children) go(step);
  }

  function colours() {
    const kinds = new Set(Array.from({ length: tensors.count }, (_, i) => (state.colour === "kind" ? tensors.kind(i) : tensors.type(i))));
    const names = state.colour === "kind" ? KINDS : data.types;
    legend(place("map-legend"), [...kinds].sort((a, b) => a - b).map((at) => [state.colour === "kind" ? KIND_COLOURS[at] : CATEGORIES[at % CATEGORIES.length], names[at]]));
  }

  function plant() {
    state.root = tensorTree(tensors, state.by);
    state.focus = state.root;
  }

  const controls = place("map-controls");
  choice(controls, "Group by", [["layer", "layer"], ["module", "module"]], (by) => {
    state.by = by;
    plant();
    go(state.root);
  });
  choice(controls, "Colour", [["kind", "module"], ["type", "dtype"]], (colour) => {
    state.colour = colour;
    colours();
    render();
  });
  plant();
  const render = picture(place("map"), {
    label: `Treemap of ${plural(whole.tensors, "tensor")}. Arrow keys move, Enter opens, Escape goes back.`,
    height: (width) => Math.min(540, Math.max(340, width * 0.42)),
    draw,
    at,
    describe: told,
    activate: open,
    back: () => state.focus.parent && go(state.focus.parent),
  });
  go(state.root);
  colours();
}

/** What a tip says of one tensor. */
function tensorRows(tensors, i) {
  const parameters = tensors.parameters(i);
  return [["shape", shapeText(tensors.shape(i))], ["dtype", tensors.dtype(i)], ["parameters", parameters === null ? null : number(parameters)], ["size", `${humanBytes(tensors.bytes(i))}`, tensors.bytes(i) > 999 ? `(${number(tensors.bytes(i))} B)` : null]];
}
