// A table of any length: only the rows that can be seen exist.

const ROW = 26;
const MOST_HEIGHT = 8e6; // browsers lose rows below about twice that; longer tables scroll in larger steps

/**
 * A table of the rows 0…count-1 in `host`. columns: {label, cell(i) → text or node, value(i) → what to sort by (text,
 * number or null; none: not sortable), number: flush right, width, grow, down: first click sorts descending}. With
 * `search` (i → text) it gets a box that filters; `summary(rows)` is said beside it. Gives {filter(test), find(text)}.
 */
function table(host, { label, columns, count, search = null, summary = null, order = null, tall = 520 }) {
  const all = Int32Array.from({ length: count }, (_, i) => i);
  let sorted = all;
  let rows = all;
  let extra = null;
  let sorting = order;
  const box = el("input", { type: "search", placeholder: "part of a key, or layers.*.q_proj", "aria-label": `Search ${label}`, spellcheck: "false", autocomplete: "off", input: refresh });
  const output = el("output", { "aria-live": "polite" });
  const heads = columns.map((column, at) => head(column, at));
  const width = columns.reduce((sum, column) => sum + column.width, 0);
  const body = el("tbody", {});
  const inner = el("table", { "aria-label": label }, el("colgroup", {}, ...columns.map(col)), el("thead", {}, el("tr", {}, ...heads)), body);
  inner.style.minWidth = `${width}px`;
  const scroller = el("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": label, scroll: show }, inner);
  const frame = el("div", { class: "frame" }, scroller, el("span", { class: "more", "aria-hidden": "true" }, "›"));
  host.classList.add("table");
  host.replaceChildren(search ? el("div", { class: "search" }, box, output) : "", frame);
  new ResizeObserver(hint).observe(scroller);

  function col(column) {
    const element = el("col", {});
    if (!column.grow) element.style.width = `${column.width}px`;
    return element;
  }

  function head(column, at) {
    const style = column.number ? "number" : null;
    if (!column.value) return el("th", { scope: "col", class: style, title: column.hint }, column.label);
    return el("th", { scope: "col", class: style, title: column.hint }, el("button", { type: "button", click: () => sort(at) }, column.label));
  }

  function sort(at) {
    const first = Boolean(columns[at].down);
    sorting = { at, descending: sorting?.at === at ? !sorting.descending : first };
    arrange();
    refresh();
  }

  function arrange() {
    heads.forEach((cell, at) => {
      if (sorting?.at === at) cell.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
    if (!sorting) return;
    const value = columns[sorting.at].value;
    const values = Array.from(all, (i) => value(i));
    const turn = sorting.descending ? -1 : 1;
    // What has no value comes last, whichever way the rest is sorted.
    sorted = all.slice().sort((a, b) => {
      const [x, y] = [values[a], values[b]];
      if (x === null || y === null) return (x === null) - (y === null) || a - b;
      if (x !== x || y !== y) return ((y !== y) - (x !== x)) * -turn || a - b; // NaN is the largest
      return (x < y ? -1 : x > y ? 1 : 0) * turn || a - b;
    });
  }

  function refresh() {
    const matches = search && box.value.trim() ? matcher(box.value) : null;
    rows = matches || extra ? sorted.filter((i) => (!extra || extra(i)) && (!matches || matches(search(i)))) : sorted;
    if (summary) output.textContent = summary(rows);
    scroller.scrollTop = 0;
    show();
  }

  function spacer(height) {
    const row = el("tr", { class: "space", "aria-hidden": "true" }, el("td", { colspan: columns.length }));
    row.style.height = `${height}px`;
    return row;
  }

  /** More columns to the right are hinted at: a phone shows no scroll bar. */
  function hint() {
    frame.classList.toggle("wider", scroller.scrollWidth - scroller.clientWidth - scroller.scrollLeft > 2);
  }

  function show() {
    hint();
    const view = Math.min(tall, rows.length * ROW + ROW + 2);
    const full = rows.length * ROW;
    const height = Math.min(full, MOST_HEIGHT);
    const reach = Math.max(1, height - view + ROW);
    const top = height === full ? scroller.scrollTop : (scroller.scrollTop / reach) * (full - view + ROW);
    const from = Math.max(0, Math.min(Math.floor(top / ROW) - 4, rows.length - Math.ceil(view / ROW) - 4));
    const to = Math.min(rows.length, from + Math.ceil(view / ROW) + 8);
    const above = height === full ? from * ROW : Math.min(Math.max(0, scroller.scrollTop - (top - from * ROW)), height - (to - from) * ROW);
    inner.setAttribute("aria-rowcount", rows.length + 1);
    const shown = [];
    for (let at = from; at < to; at++) shown.push(line(rows[at], at));
    if (!rows.length) shown.push(el("tr", {}, el("td", { class: "none", colspan: columns.length }, "Nothing matches.")));
    body.replaceChildren(spacer(above), ...shown, spacer(Math.max(0, height - above - (to - from) * ROW)));
    scroller.style.maxHeight = `${tall}px`;
  }

  function line(i, at) {
    const cells = columns.map((column) => {
      const content = column.cell(i);
      const text = typeof content === "string" ? escapeText(content) : content;
      const title = typeof text === "string" && text.length > 9 ? text : null;
      return el("td", { class: column.number ? "number" : column.code ? "code" : null, title }, column.grow && column.code && text.length > 24 ? ended(text) : text);
    });
    return el("tr", { "aria-rowindex": at + 2 }, ...cells);
  }

  arrange();
  refresh();
  return {
    filter(test) {
      extra = test;
      refresh();
    },
    find(text) {
      box.value = text;
      refresh();
    },
  };
}

/** A text whose end stays to be seen where its cell is too narrow: the ends of keys say more than their beginnings. */
function ended(text) {
  return el("div", { class: "ended" }, el("span", {}, text.slice(0, -20)), text.slice(-20));
}

/** A share as a number and as a bar, for a cell. */
function bar(share, colour = null) {
  const fill = el("i", {});
  fill.style.width = `${Math.max(share * 100, share > 0 ? 1 : 0)}%`;
  if (colour) fill.style.background = colour;
  return el("span", { class: "bar" }, el("span", {}, fill), el("b", {}, percent(share)));
}
