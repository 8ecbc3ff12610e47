// The data, elements and text. All that comes from files goes through el() as text, and is never parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

/** An element; attributes that are functions listen, those that are false or null are left out. */
function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const place = (id) => document.getElementById(id);

/** Whatever would not be seen as itself (control characters, marks that turn the writing direction) as \xNN or \uNNNN. */
const escapeText = (text) =>
  String(text).replace(/[\p{C}\p{Z}]/gu, (char) => {
    if (char === " ") return char;
    const code = char.codePointAt(0).toString(16);
    return code.length < 3 ? `\\x${code.padStart(2, "0")}` : code.length < 5 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
  });

function scaled(value, units) {
  let size = value;
  for (const unit of units) {
    const digits = unit === units[0] || size >= 99.95 ? 0 : size >= 9.995 ? 1 : 2;
    if (size < 999.5 || unit === units.at(-1)) return `${size.toFixed(digits)} ${unit}`.trim();
    size /= 1000;
  }
}

const humanBytes = (size) => scaled(size, ["B", "kB", "MB", "GB", "TB", "PB", "EB"]);
const humanCount = (count) => scaled(count, ["", "K", "M", "B", "T"]);
const number = (value) => value.toLocaleString("en-US");
const plural = (count, noun, nouns = `${noun}s`) => `${number(count)} ${count === 1 ? noun : nouns}`;
const shapeText = (shape) => (shape === null ? "unknown" : `[${shape.join(", ")}]`);
const percent = (share) => (share === 0 ? "0 %" : share < 0.0005 ? "< 0.1 %" : share < 1 && share > 0.9995 ? "> 99.9 %" : `${(share * 100).toFixed(share === 1 ? 0 : 1)} %`);
const product = (shape) => shape.reduce((all, size) => all * size, 1);

/** A measured number in four digits, three with an exponent, or in `digits`; "–" where there is none. */
function measure(value, digits = null) {
  if (value === null || value === undefined) return "–";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "Inf" : "-Inf";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return number(value);
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(digits ?? 4))) : value.toExponential((digits ?? 3) - 1);
}

/** What JSON could not say as a number comes as its name. */
const measured = (column) => column.map((value) => (typeof value === "string" ? Number(value) : value));

/** A group of radio buttons that looks like one control; change(value) is called when another is chosen. */
function choice(host, label, options, change) {
  const name = `choice-${document.querySelectorAll("fieldset").length}`;
  const group = el("fieldset", { class: "choice" }, el("legend", {}, label));
  options.forEach(([value, text, hint], at) => {
    const input = el("input", { type: "radio", name, value, checked: at === 0, change: () => change(value) });
    group.append(el("label", { title: hint }, input, el("span", {}, text)));
  });
  host.append(group);
}

function tick(host, text, change, hint = null) {
  const input = el("input", { type: "checkbox", change: () => change(input.checked) });
  host.append(el("label", { class: "tick", title: hint }, input, text));
}

/** Rows of label and value, for a description list; entries without a value are left out. */
function describe(host, entries) {
  for (const [label, value, note] of entries) {
    if (value === null || value === undefined || value === "") continue;
    const shown = value instanceof Node ? value : escapeText(value);
    host.append(el("div", {}, el("dt", {}, label), el("dd", {}, shown, note ? el("span", { class: "note" }, ` ${escapeText(note)}`) : null)));
  }
}

function notices(host, texts) {
  for (const text of texts) host.append(el("p", { class: "notice" }, el("b", {}, "Notice"), " ", escapeText(text)));
}

// Light or dark: as the system has it, until the button is used. Where nothing can be remembered, that is no error.
const THEME = "ckpt-convert theme";
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";

function themeButton() {
  const root = document.documentElement;
  try {
    const kept = localStorage.getItem(THEME);
    if (kept === "light" || kept === "dark") root.dataset.theme = kept;
  } catch {}
  const button = place("theme");
  const show = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    document.dispatchEvent(new Event("theme"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem(THEME, root.dataset.theme);
    } catch {}
    show();
  });
  system.addEventListener("change", show);
  show();
}
