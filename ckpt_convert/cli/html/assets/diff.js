// The page of the difference of two checkpoints.

const facts = data.facts;
const { a: sideA, b: sideB } = data.sides;
const column = (side, name) => side[name] ?? sideA[name];
const keysA = keyColumn(data.templates, sideA.template, sideA.numbers);
const keysB = keyColumn(data.templates, column(sideB, "template"), column(sideB, "numbers"));
const delta = Object.fromEntries(Object.entries(data.delta).map(([name, values]) => [name, name === "where" || name === "first" ? values : measured(values)]));
const count = data.status.length;

const status = (i) => data.statuses[data.status[i]];
const keyA = (i) => keysA.text(i);
const keyB = (i) => keysB.text(i);
const keys = (i) => (keysA.has(i) ? keysA : keysB);
const hasTwoNames = Array.from({ length: count }, (_, i) => i).some((i) => keyA(i) !== null && keyB(i) !== null && keyA(i) !== keyB(i));
const shapeOf = (side, i) => data.shapes[column(side, "shape")[i]];
const dtypeOf = (side, i) => data.types[column(side, "type")[i]];
const share = (i) => (delta.count[i] === null ? null : delta.count[i] ? delta.differing[i] / delta.count[i] : 0);
const both = (one, other) => (one === null ? other : other === null || one === other ? one : `${one} → ${other}`);
const shapes = (i) => both(shapeOf(sideA, i) && shapeText(shapeOf(sideA, i)), shapeOf(sideB, i) && shapeText(shapeOf(sideB, i))) ?? "unknown";
const dtypes = (i) => both(dtypeOf(sideA, i), dtypeOf(sideB, i));

const WORDS = { same: "same", differs: "values differ", shape: "shape differs", dtype: "dtype differs", only_a: "only in A", only_b: "only in B" };
const RANKS = { only_a: 5, only_b: 4, shape: 3, dtype: 1, differs: 1, same: 0 };

function verdict() {
  const { same, differs, shape, dtype, only_a: onlyA, only_b: onlyB } = facts.counts;
  const found = [
    [differs, plural(differs, "tensor"), " with other values"],
    [shape, plural(shape, "tensor"), " of another shape"],
    [dtype, plural(dtype, "tensor"), " of another dtype"],
    [onlyA, plural(onlyA, "tensor"), " only in A"],
    [onlyB, plural(onlyB, "tensor"), " only in B"],
    [data.config.length, plural(data.config.length, "entry", "entries"), " of the config"],
  ].filter(([some]) => some);
  const how = facts.through === "mapping" ? "through the mapping of the model family, whatever the keys are called" : "key by key";
  const what = facts.values ? "Keys, shapes, dtypes and every value were compared" : "Keys, shapes and dtypes were compared, values were not";
  const host = place("verdict");
  host.classList.add(facts.same ? "good" : "bad");
  const equal = facts.values ? `All ${plural(same, "tensor")} are the same, bit for bit.` : `All ${plural(same, "tensor")} agree in shape and dtype.`;
  const lines = found.map(([, number, text], at) => el("span", {}, at ? ", " : "", el("b", {}, number), text));
  host.append(
    el("strong", {}, facts.same ? "✓ Same" : "≠ Different"),
    el("div", {}, el("p", {}, ...(facts.same ? [equal] : lines), !facts.same && same ? `; ${plural(same, "tensor")} ${same === 1 ? "is" : "are"} the same.` : ""), facts.same && found.length ? el("p", {}, ...lines, " besides.") : "", !facts.same && facts.verdict ? el("p", {}, el("b", {}, "Verdict"), ` ${escapeText(facts.verdict.text)}`) : "", el("p", { class: "note" }, `${what}, ${how}.`)),
  );
}

function sides() {
  const one = (letter, side, other) => {
    const list = el("dl", { class: "facts" });
    const value = (name, text) => (side[name] === other[name] ? text : el("b", {}, escapeText(text)));
    describe(list, [
      ["format", value("format", side.format ?? "unknown")],
      ["family", value("family", side.family ?? "unknown")],
      ["ranks", side.model_parallel === null ? null : value("model_parallel", String(side.model_parallel))],
      ["tensors", value("tensors", number(side.tensors))],
      ["parameters", side.parameters === null ? "unknown" : value("parameters", humanCount(side.parameters)), side.parameters === null ? null : `(${number(side.parameters)})`],
      ["size", value("bytes", humanBytes(side.bytes)), `(${number(side.bytes)} B)`],
    ]);
    return el("div", {}, el("h2", {}, el("i", { class: "letter" }, letter), escapeText(data.names[letter === "A" ? 0 : 1])), el("p", { class: "path" }, escapeText(side.path)), list);
  };
  place("sides").append(one("A", facts.a, facts.b), one("B", facts.b, facts.a));
}

const METRICS = {
  relative_norm: { text: "‖Δ‖ / ‖A‖", kind: "log", hint: "the norm of the difference, against that of the tensor in A" },
  max_abs: { text: "max |Δ|", kind: "log", hint: "the largest difference" },
  mean_abs: { text: "mean |Δ|", kind: "log", hint: "the mean difference" },
  max_ulp: { text: "max ULP", kind: "log", hint: "the largest difference, in steps of the dtype" },
  share: { text: "elements", kind: "log", share: true, hint: "the share of elements that differ" },
};

/** How much a tensor changed: 0 where nothing did, Infinity where a number against nothing cannot say. */
function change(i, metric) {
  if (!delta.differing[i]) return delta.differing[i];
  return metric === "share" ? share(i) : delta[metric][i] ?? Infinity;
}

function evaluate(cell, metric) {
  const marked = cell.tensors.map(status).filter((found) => found in SIGNS).sort((x, y) => RANKS[y] - RANKS[x])[0];
  const values = cell.tensors.map((i) => change(i, metric)).filter((value) => value !== null);
  const most = values.length ? values.reduce((one, other) => Math.max(one, other)) : null;
  if (cell.tensors.some((i) => delta.nan_mismatch[i])) return { value: most, mark: BAD };
  if (marked && (marked !== "dtype" || !most)) return { value: null, mark: marked };
  return { value: most ?? 0, mark: null };
}

function changeMap(list) {
  const groups = gridOf(keys, Array.from({ length: count }, (_, i) => i));
  const map = heatmap(place("heat"), {
    groups,
    label: "Change of each module in each layer. Arrow keys move, Enter lists the tensors.",
    metric: "relative_norm",
    metrics: METRICS,
    evaluate,
    legendHost: place("heat-legend"),
    marks: {
      zero: facts.values ? "same, bit for bit" : "same shape and dtype",
      [BAD]: "NaN on one side only",
      only_a: "only in A",
      only_b: "only in B",
      shape: "shapes differ",
      dtype: facts.values ? "only dtypes differ" : "dtypes differ",
    },
    activate: (cell) => {
      const [first] = cell.tensors;
      list.find(cell.tensors.length === 1 ? keys(first).text(first) : keys(first).inLayer(first));
      place("tensors").scrollIntoView({ block: "nearest" });
    },
    describe: (cell) => {
      const worst = cell.tensors.reduce((most, i) => (severity(i, most) < 0 ? i : most));
      const several = cell.tensors.length > 1;
      return tipContent(names(worst), [["tensors", several ? number(cell.tensors.length) : null, several ? "in this cell; this one changed most" : null], ...changeRows(worst)]);
    },
  });
  place("heat-note").textContent = facts.values ? "layers from left to right; the largest where a cell has several tensors" : "layers from left to right";
  place("heat-title").textContent = facts.values ? "Change" : "Structure";
  if (facts.values) choice(place("heat-controls"), "Measure", Object.entries(METRICS).map(([name, { text, hint }]) => [name, text, hint]), (name) => map.show(name));
}

const names = (i) => (keyA(i) === keyB(i) ? keyA(i) : [`A  ${keyA(i) ?? "–"}`, `B  ${keyB(i) ?? "–"}`]);

function changeRows(i) {
  const rows = [["status", WORDS[status(i)]], ["shape", shapes(i)], ["dtype", dtypes(i)], ["note", data.notes[i]]];
  if (delta.count[i] === null) return rows;
  rows.push(["differing", `${number(delta.differing[i])} of ${number(delta.count[i])}`, `(${percent(share(i))})`]);
  if (!delta.differing[i]) return rows;
  const where = delta.where[i] ?? delta.first[i];
  return [
    ...rows,
    ...["relative_norm", "max_abs", "mean_abs", "max_ulp"].map((name) => [METRICS[name].text, measure(delta[name][i])]),
    ["NaN", delta.nan_mismatch[i] ? number(delta.nan_mismatch[i]) : null, "on one side only"],
    [delta.where[i] ? "largest at" : "first at", where && shapeText(where)],
  ];
}

/** Which of two is worse comes first: what has no partner, NaN against a number, then the larger change. */
function severity(i, j) {
  const rank = (at) => RANKS[status(at)] + (delta.nan_mismatch[at] ? 1 : 0);
  const size = (name, at) => (delta.differing[at] ? delta[name][at] ?? Infinity : -1);
  const larger = (name) => (size(name, j) > size(name, i) ? 1 : size(name, j) < size(name, i) ? -1 : 0);
  return rank(j) - rank(i) || larger("relative_norm") || larger("max_abs");
}

const badge = (i) => el("span", { class: `status ${status(i)}` }, WORDS[status(i)]);
const nameColumns = () => (hasTwoNames ? [nameColumn("key in A", keyA), nameColumn("key in B", keyB)] : [nameColumn("key", (i) => keyA(i) ?? keyB(i))]);
const nameColumn = (label, text) => ({ label, width: Math.min(keyWidth(), hasTwoNames ? 330 : 380), grow: true, code: true, cell: (i) => text(i) ?? "–", value: (i) => (text(i) === null ? null : i) });

function structureTable() {
  const found = Array.from({ length: count }, (_, i) => i).filter((i) => status(i) in SIGNS);
  if (!found.length) return;
  place("structure-section").hidden = false;
  const inner = [{ label: "status", width: 124, cell: badge, value: (i) => -RANKS[status(i)] }, ...nameColumns(), { label: "shape", width: 220, cell: shapes }, { label: "dtype", width: 120, cell: dtypes }, { label: "size", width: 84, number: true, cell: (i) => humanBytes(data.nbytes[i]), value: (i) => data.nbytes[i], down: true }];
  table(place("structure"), {
    label: "structure",
    count: found.length,
    tall: 320,
    order: { at: 0, descending: false },
    columns: inner.map(({ cell, value, ...rest }) => ({ ...rest, cell: (at) => cell(found[at]), value: value && ((at) => value(found[at])) })),
  });
}

/** The entries of the config that differ; of what is nested, the entries in it. */
function configEntries() {
  const inside = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const opened = (name, a, b) => {
    if (!inside(a) && !inside(b)) return JSON.stringify(a) === JSON.stringify(b) ? [] : [{ name, a, b }];
    const [one, other] = [inside(a) ? a : {}, inside(b) ? b : {}];
    const found = [...new Set([...Object.keys(one), ...Object.keys(other)])].flatMap((inner) => opened(`${name}.${inner}`, one[inner], other[inner]));
    return inside(a) === inside(b) || (a ?? b) === null ? found : [{ name, a, b }];
  };
  return data.config.flatMap(({ name, a, b }) => opened(name, a, b));
}

function configTable() {
  const entries = configEntries();
  if (!entries.length) return;
  place("config-section").hidden = false;
  const text = (value) => (value === null || value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  table(place("config"), {
    label: "config",
    count: entries.length,
    tall: 320,
    columns: [
      { label: "entry", width: 300, code: true, cell: (i) => entries[i].name },
      { label: "A", width: 260, grow: true, code: true, cell: (i) => text(entries[i].a) },
      { label: "B", width: 260, grow: true, code: true, cell: (i) => text(entries[i].b) },
    ],
  });
}

function tensorTable() {
  const order = Array.from({ length: count }, (_, i) => i).sort((i, j) => severity(i, j) || i - j);
  const rank = new Int32Array(count);
  order.forEach((i, at) => (rank[i] = at));
  const measures = facts.values
    ? [
        { label: "elements", width: 80, number: true, cell: (i) => (share(i) === null ? "–" : percent(share(i))), value: share, down: true, hint: METRICS.share.hint },
        ...["relative_norm", "max_abs", "mean_abs", "max_ulp"].map((name) => ({ label: METRICS[name].text, hint: METRICS[name].hint, width: 86, number: true, cell: (i) => (delta.differing[i] === 0 ? "0" : measure(delta[name][i])), value: (i) => (delta.differing[i] === 0 ? 0 : delta[name][i]), down: true })),
        ...(delta.nan_mismatch.some(Boolean) ? [{ label: "NaN", hint: "elements that are NaN on one side only", width: 70, number: true, cell: (i) => measure(delta.nan_mismatch[i]), value: (i) => delta.nan_mismatch[i], down: true }] : []),
        { label: "largest at", width: 100, cell: (i) => (delta.where[i] ? shapeText(delta.where[i]) : "–") },
      ]
    : [];
  const list = table(place("tensors"), {
    label: "tensors",
    count,
    search: (i) => `${keyA(i) ?? ""}${hasTwoNames || keyA(i) === null ? ` ${keyB(i) ?? ""}` : ""}`,
    summary: (rows) => (rows.length === count ? plural(count, "tensor") : `${number(rows.length)} of ${plural(count, "tensor")}`),
    order: { at: 0, descending: false },
    columns: [
      { label: "status", width: 112, cell: badge, value: (i) => rank[i], hint: "worst first" },
      ...nameColumns(),
      ...measures,
      { label: "shape", width: 132, number: true, cell: shapes },
      { label: "dtype", width: 94, cell: dtypes, value: dtypes },
      { label: "size", width: 78, number: true, cell: (i) => humanBytes(data.nbytes[i]), value: (i) => data.nbytes[i], down: true },
    ],
  });
  const there = Object.entries(facts.counts).filter(([, some]) => some);
  if (there.length > 1) choice(place("tensors-controls"), "Show", [[null, `all ${number(count)}`], ...there.map(([name, some]) => [name, `${WORDS[name]} ${number(some)}`])], (name) => list.filter(name === null ? null : (i) => status(i) === name));
  return list;
}

themeButton();
verdict();
sides();
notices(place("notices"), facts.notices);
const list = tensorTable();
changeMap(list);
structureTable();
configTable();
