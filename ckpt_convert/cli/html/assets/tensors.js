// Keys out of their columns, and what keys say: the layer is the first number in a key, the module what comes behind it.

/** The dot-separated parts of a template, null in place of each number: what stands around the numbers has the dots. */
function partsOf(template) {
  const last = template.length - 1;
  return template.flatMap((text, at) => {
    const bare = text.slice(at > 0 ? 1 : 0, at < last ? text.length - 1 : undefined);
    const isNone = at > 0 && at < last ? text.length === 1 : last > 0 && text === "";
    return [...(isNone ? [] : bare.split(".")), ...(at < last ? [null] : [])];
  });
}

/**
 * A column of keys. text(i) is the key; layer(i) its first number, or null; stack(i) what comes before that number;
 * module(i) what comes behind it, with * for further numbers (experts), or the whole key where there is no number.
 */
function keyColumn(templates, template, numbers) {
  const starts = new Int32Array(template.length);
  const lengths = templates.map((template) => template.length - 1);
  for (let i = 1; i < template.length; i++) starts[i] = starts[i - 1] + (lengths[template[i - 1]] ?? 0);
  const texts = new Array(template.length);
  const known = templates.map((texts) => {
    const parts = partsOf(texts);
    const at = parts.indexOf(null);
    const joined = (some) => some.map((part) => part ?? "*").join(".");
    return at < 0
      ? { at, stack: null, module: parts.join("."), pattern: parts.join("."), parts }
      : { at, stack: parts.slice(0, at).join("."), module: joined(parts.slice(at + 1)), pattern: joined(parts), parts };
  });
  return {
    count: template.length,
    has: (i) => template[i] >= 0,
    known: (i) => known[template[i]],
    layer: (i) => (known[template[i]].at < 0 ? null : numbers[starts[i]]),
    filled: (i) => {
      let next = starts[i];
      return known[template[i]].parts.map((part) => (part === null ? String(numbers[next++]) : part));
    },
    text(i) {
      return (texts[i] ??= template[i] < 0 ? null : this.filled(i).join("."));
    },
    /** The key with * for each number but that of the layer. */
    inLayer(i) {
      const { at, parts } = known[template[i]];
      return parts.map((part, place) => part ?? (place === at ? numbers[starts[i]] : "*")).join(".");
    },
  };
}

/** Tensors of one checkpoint, by number. */
function checkpointTensors() {
  const { kinds, kind, shapes, types } = data;
  const keys = keyColumn(data.templates, kind.map((at) => kinds[at][0]), data.numbers);
  const kindKinds = kinds.map(([template]) => kindOf(data.templates[template].join("0")));
  const sizes = shapes.map((shape) => (shape === null ? null : product(shape)));
  return {
    count: kind.length,
    keys,
    key: (i) => keys.text(i),
    kind: (i) => kindKinds[kind[i]],
    kindNumber: (i) => kind[i],
    shape: (i) => shapes[kinds[kind[i]][1]],
    parameters: (i) => sizes[kinds[kind[i]][1]],
    type: (i) => kinds[kind[i]][2],
    dtype: (i) => types[kinds[kind[i]][2]],
    bytes: (i) => kinds[kind[i]][3],
  };
}

/** For each piece of each file: whose it is, and where. */
function filePieces(tensors) {
  const { counts, tensor, gap, nbytes } = data.pieces;
  let at = 0;
  return data.files.map((file, number) => {
    const pieces = [];
    let end = 0;
    for (const last = at + counts[number]; at < last; at++) {
      const size = nbytes === null ? tensors.bytes(tensor[at]) : nbytes[at];
      const known = gap[at] !== null;
      const offset = end + (gap[at] ?? 0);
      pieces.push({ tensor: tensor[at], offset, known, size });
      end = offset + size;
    }
    return { ...file, pieces };
  });
}

/** Those of `count` things by what `name` says of them, in the order in which each name comes first. */
function groupBy(count, name) {
  const groups = new Map();
  for (let i = 0; i < count; i++) {
    const found = name(i);
    if (found === null) continue;
    if (!groups.has(found)) groups.set(found, []);
    groups.get(found).push(i);
  }
  return groups;
}

/** How wide a column of keys has to be for most of them. */
const keyWidth = () => Math.min(410, Math.max(200, 24 + 6.75 * data.templates.reduce((most, texts) => Math.max(most, texts.join("00").length), 0)));

/** What is searched for: words that all have to be in a key, each as it is or as a glob with * and ?. */
function matcher(query) {
  const tests = query.trim().split(/\s+/).filter(Boolean).map((word) => {
    const source = word.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*+/g, ".*").replace(/\?/g, ".");
    return new RegExp(source, "is");
  });
  return (text) => tests.every((test) => test.test(text));
}
