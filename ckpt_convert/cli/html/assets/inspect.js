// The page of one checkpoint.

const tensors = checkpointTensors();
const facts = data.facts;
const stats = data.stats && Object.fromEntries(Object.entries(data.stats).map(([name, column]) => [name, name === "checksum" ? column : measured(column)]));

function header() {
  place("name").textContent = escapeText(data.title);
  place("path").textContent = escapeText(facts.path);
  const dtypes = Object.entries(facts.dtypes).sort((a, b) => b[1].bytes - a[1].bytes);
  const figures = [
    ["parameters", facts.parameters === null ? "unknown" : humanCount(facts.parameters), facts.parameters === null ? null : number(facts.parameters)],
    ["size", humanBytes(facts.bytes), `${number(facts.bytes)} B`],
    ["tensors", number(tensors.count), tensors.count === countOf() ? null : `of ${number(countOf())}`],
    ["files", number(data.files.length), humanBytes(data.files.reduce((sum, file) => sum + file.bytes, 0))],
    [dtypes.length === 1 ? "dtype" : "dtypes", dtypes.slice(0, 2).map(([name]) => name).join(", ") || "none", dtypes.length > 2 ? `and ${dtypes.slice(2).map(([name]) => name).join(", ")}` : null],
  ];
  for (const [label, value, exact] of figures) place("figures").append(el("div", {}, el("dt", {}, label), el("dd", {}, escapeText(value), exact ? el("small", {}, escapeText(exact)) : null)));
  const dims = Object.entries(facts.dims ?? {}).filter(([, value]) => value > 1);
  const list = el("span", { class: "dims" }, ...dims.map(([name, value]) => el("span", {}, `${escapeText(name)} `, el("b", {}, typeof value === "number" ? number(value) : escapeText(value)))));
  describe(place("facts"), [
    ["format", facts.format ?? "unknown", facts.why ? `(${facts.why})` : null],
    ["family", facts.family ?? "unknown", facts.evidence ? `(${facts.evidence})` : facts.problem],
    ["sizes of", facts.release],
    ["config", facts.config_source],
    ["ranks", facts.model_parallel === null ? null : String(facts.model_parallel), "(tensor-parallel degree)"],
    ["tied", facts.tied === null ? (facts.family ? "unknown: the bytes of embedding and output decide" : null) : facts.tied ? "yes: the output is the embedding" : "no"],
    ["converted", facts.converted_from && `from ${facts.converted_from}`],
    ...(facts.facts ?? []).map(({ label, text }) => [escapeText(label), text]),
    ...data.stated,
    ["dims", dims.length ? list : null],
  ]);
  notices(place("notices"), facts.notices);
}

const countOf = () => Object.values(facts.dtypes).reduce((sum, dtype) => sum + dtype.tensors, 0);

function dtypeTable() {
  const rows = Object.entries(facts.dtypes);
  table(place("dtypes"), {
    label: "dtypes",
    count: rows.length,
    columns: [
      { label: "dtype", width: 84, grow: true, code: true, cell: (i) => rows[i][0] },
      { label: "tensors", width: 68, number: true, cell: (i) => number(rows[i][1].tensors) },
      { label: "size", width: 78, number: true, cell: (i) => humanBytes(rows[i][1].bytes) },
      { label: "share", width: 116, cell: (i) => bar(facts.bytes ? rows[i][1].bytes / facts.bytes : 0, CATEGORIES[Math.max(data.types.indexOf(rows[i][0]), 0) % CATEGORIES.length]) },
    ],
  });
}

function moduleTable() {
  const groups = [...groupBy(tensors.count, (i) => tensors.kindNumber(i)).values()];
  const bytes = groups.map((some) => some.length * tensors.bytes(some[0]));
  table(place("modules"), {
    label: "modules",
    count: groups.length,
    tall: 300,
    order: { at: 4, descending: true },
    columns: [
      { label: "keys", width: 230, grow: true, code: true, cell: (i) => tensors.keys.known(groups[i][0]).pattern, value: (i) => tensors.keys.known(groups[i][0]).pattern },
      { label: "shape", width: 132, number: true, cell: (i) => shapeText(tensors.shape(groups[i][0])), value: (i) => tensors.parameters(groups[i][0]), down: true },
      { label: "dtype", width: 84, cell: (i) => tensors.dtype(groups[i][0]), value: (i) => tensors.dtype(groups[i][0]) },
      { label: "count", width: 72, number: true, cell: (i) => number(groups[i].length), value: (i) => groups[i].length, down: true },
      { label: "size", width: 84, number: true, cell: (i) => humanBytes(bytes[i]), value: (i) => bytes[i], down: true },
      { label: "share", width: 124, cell: (i) => bar(facts.bytes ? bytes[i] / facts.bytes : 0, KIND_COLOURS[tensors.kind(groups[i][0])]) },
    ],
  });
}

function tensorTable() {
  const measures = stats ? [["std", 88], ["mean", 88], ["min", 88], ["max", 88], ["nan", 64, "NaN"], ["inf", 64, "Inf"], ["zero_fraction", 74, "zeros"]] : [];
  const shown = (name, value) => (name === "zero_fraction" && value !== null ? percent(value) : measure(value));
  const files = fileNames();
  return table(place("tensors"), {
    label: "tensors",
    count: tensors.count,
    search: (i) => tensors.key(i),
    summary: (rows) => `${rows.length === tensors.count ? plural(rows.length, "tensor") : `${number(rows.length)} of ${plural(tensors.count, "tensor")}`}, ${humanBytes(rows.reduce((sum, i) => sum + tensors.bytes(i), 0))}`,
    order: { at: 0, descending: false },
    columns: [
      { label: "key", width: keyWidth(), grow: true, code: true, cell: (i) => tensors.key(i), value: (i) => i },
      { label: "shape", width: 132, number: true, cell: (i) => shapeText(tensors.shape(i)), value: (i) => tensors.parameters(i), down: true },
      { label: "dtype", width: 92, cell: (i) => tensors.dtype(i), value: (i) => tensors.dtype(i) },
      { label: "size", width: 84, number: true, cell: (i) => humanBytes(tensors.bytes(i)), value: (i) => tensors.bytes(i), down: true },
      ...measures.map(([name, width, label = name]) => ({ label, width, number: true, cell: (i) => shown(name, stats[name][i]), value: (i) => stats[name][i], down: true })),
      ...(stats ? [{ label: "xxh3_64", width: 150, code: true, cell: (i) => stats.checksum[i] ?? "–", value: (i) => stats.checksum[i] }] : []),
      ...(data.files.length > 1 ? [{ label: "file", width: stats ? 150 : 250, code: true, cell: (i) => files[i], value: (i) => files[i] }] : []),
    ],
  });
}

/** For each tensor, the file it is in, or how many. */
function fileNames() {
  const first = new Int32Array(tensors.count).fill(-1);
  const counts = new Int32Array(tensors.count);
  let at = 0;
  data.pieces.counts.forEach((count, file) => {
    for (const last = at + count; at < last; at++) {
      const tensor = data.pieces.tensor[at];
      if (first[tensor] < 0) first[tensor] = file;
      counts[tensor]++;
    }
  });
  return Array.from(first, (file, i) => (file < 0 ? "" : counts[i] > 1 ? `${counts[i]} pieces` : data.files[file].name));
}

const STATISTICS = {
  std: { text: "std", kind: "log" },
  mean: { text: "mean", kind: "diverging" },
  min: { text: "min", kind: "diverging" },
  max: { text: "max", kind: "diverging" },
  largest: { text: "max |x|", kind: "log" },
  zeros: { text: "zeros", kind: "linear", share: true },
};

/** The statistics of several tensors (the experts of a layer) as if they were one. */
function together(some) {
  const out = { count: 0, sum: 0, squares: 0, zeros: 0, min: null, max: null, nan: 0, inf: 0 };
  for (const i of some) {
    const size = tensors.parameters(i) ?? 0;
    const [mean, std, min, max] = [stats.mean[i], stats.std[i], stats.min[i], stats.max[i]];
    out.nan += stats.nan[i] ?? 0;
    out.inf += stats.inf[i] ?? 0;
    out.zeros += (stats.zero_fraction[i] ?? 0) * size;
    out.all = (out.all ?? 0) + size;
    if (mean === null || min === null) continue;
    const finite = Math.max(size - (stats.nan[i] ?? 0) - (stats.inf[i] ?? 0), 1);
    out.count += finite;
    out.sum += mean * finite;
    out.squares += ((std ?? 0) ** 2 + mean ** 2) * finite;
    out.min = out.min === null ? min : Math.min(out.min, min);
    out.max = out.max === null ? max : Math.max(out.max, max);
  }
  const mean = out.count ? out.sum / out.count : null;
  const single = some.length === 1;
  return {
    std: single ? stats.std[some[0]] : out.count ? Math.sqrt(Math.max(out.squares / out.count - mean ** 2, 0)) : null,
    mean: single ? stats.mean[some[0]] : mean,
    min: out.min,
    max: out.max,
    largest: out.min === null ? null : Math.max(Math.abs(out.min), Math.abs(out.max)),
    zeros: single ? stats.zero_fraction[some[0]] : out.all ? out.zeros / out.all : null,
    nan: out.nan,
    inf: out.inf,
  };
}

function statistics(list) {
  place("heat-section").hidden = false;
  const members = Array.from({ length: tensors.count }, (_, i) => i).filter((i) => stats.nan[i] !== null);
  const groups = gridOf(() => tensors.keys, members);
  const evaluate = (cell, metric) => {
    cell.values ??= together(cell.tensors);
    return { value: cell.values[metric], mark: cell.values.nan || cell.values.inf ? BAD : null };
  };
  const map = heatmap(place("heat"), {
    groups,
    label: "Statistics of each module in each layer. Arrow keys move, Enter lists the tensors.",
    metric: "std",
    metrics: STATISTICS,
    evaluate,
    marks: { zero: "exactly 0", [BAD]: "has NaN or Inf" },
    legendHost: place("heat-legend"),
    activate: (cell) => {
      list.find(cell.tensors.length === 1 ? tensors.key(cell.tensors[0]) : tensors.keys.inLayer(cell.tensors[0]));
      place("tensors").scrollIntoView({ block: "nearest" });
    },
    describe: (cell) => {
      const { tensors: some } = cell;
      const values = together(some);
      const title = some.length === 1 ? tensors.key(some[0]) : tensors.keys.inLayer(some[0]);
      return tipContent(title, [
        ["tensors", some.length > 1 ? number(some.length) : null],
        ...["std", "mean", "min", "max"].map((name) => [name, measure(values[name])]),
        ["zeros", values.zeros === null ? "–" : percent(values.zeros)],
        ["NaN", values.nan ? number(values.nan) : null],
        ["Inf", values.inf ? number(values.inf) : null],
        ["shape", shapeText(tensors.shape(some[0]))],
        ["dtype", tensors.dtype(some[0])],
      ]);
    },
  });
  const controls = place("heat-controls");
  choice(controls, "Statistic", Object.entries(STATISTICS).map(([name, { text }]) => [name, text]), (name) => map.show(name));
  tick(controls, "each row by itself", (on) => map.each(on), "Colours from the least to the greatest value of each row: what stands out is another layer");
  const bad = members.filter((i) => stats.nan[i] || stats.inf[i]);
  if (bad.length) badTensors(bad);
}

function badTensors(bad) {
  const host = place("heat-bad");
  host.hidden = false;
  const told = bad.slice(0, 5).map((i) => el("li", {}, el("code", {}, escapeText(tensors.key(i))), ` ${[stats.nan[i] ? `${number(stats.nan[i])} NaN` : null, stats.inf[i] ? `${number(stats.inf[i])} Inf` : null].filter(Boolean).join(", ")}`));
  host.append(el("b", {}, `✕ ${plural(bad.length, "tensor")} with NaN or Inf`), el("ul", {}, ...told, bad.length > 5 ? el("li", {}, `and ${number(bad.length - 5)} more: sort the table by NaN or Inf`) : null));
}

themeButton();
header();
treemap(tensors);
strip(tensors);
dtypeTable();
moduleTable();
const list = tensorTable();
if (stats) statistics(list);
