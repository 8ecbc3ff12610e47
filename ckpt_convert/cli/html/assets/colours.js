// Colours of the pictures. Categories are Paul Tol's light scheme, which colour-blind people can tell apart and which is
// made to have dark text on it; the sequential scale is viridis, whose lightness grows evenly.

const CATEGORIES = ["#77aadd", "#44bb99", "#ee8866", "#eedd88", "#ffaabb", "#99ddff", "#bbcc33", "#dddddd"];
const INK = "#16191d"; // on any of the categories

const VIRIDIS = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
const DIVERGING = {
  light: ["#2166ac", "#67a9cf", "#d1e5f0", "#f4f4f2", "#fddbc7", "#ef8a62", "#b2182b"],
  dark: ["#9eb0ff", "#5aa3da", "#2d7597", "#232a30", "#6b2d14", "#b9604a", "#ffacac"],
};

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

function along(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(at), stops.length - 2);
  const [from, to] = [rgb(stops[low]), rgb(stops[low + 1])];
  return `rgb(${from.map((value, part) => Math.round(value + (to[part] - value) * (at - low))).join(" ")})`;
}

/** Black or white, whichever is read better on a colour (given as a canvas gives it back, #rrggbb). */
function inkOn(colour) {
  const [red, green, blue] = rgb(colour).map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 ? "#000000" : "#ffffff";
}

const sequential = () => VIRIDIS;
const diverging = () => DIVERGING[isDark() ? "dark" : "light"];

/** What the style sheet says under a name, as a colour that a canvas takes. */
function styled(name) {
  const probe = place("tip");
  probe.style.outlineColor = `var(--${name})`;
  const found = getComputedStyle(probe).outlineColor;
  probe.style.outlineColor = "";
  return found;
}

const KINDS = ["attention", "feed-forward", "experts", "embedding, output", "norm", "other"];
const KIND_COLOURS = [CATEGORIES[0], CATEGORIES[1], CATEGORIES[2], CATEGORIES[3], CATEGORIES[4], CATEGORIES[7]];
const KIND_WORDS = [
  [4, /norm|(^|[._])ln(_|\d|\.|$)/],
  [2, /expert|moe|router|(^|\.)gate\.(weight|bias|e_score)/],
  [0, /attn|attention|qkv|(^|\.)(w[qkvo]|[qkvo]_proj)(\.|$)/],
  [1, /mlp|feed_forward|ffn|(^|\.)(w[123]|fc\d|(up|down|gate)_proj)(\.|$)/],
  [3, /embed|lm_head|(^|\.)(wte|wpe|output|unembed)(\.|$)/],
];

/** The kind of module that a key names, judged by its words: for colour only. */
function kindOf(key) {
  const text = key.toLowerCase();
  return KIND_WORDS.find(([, words]) => words.test(text))?.[0] ?? 5;
}

function legend(host, entries) {
  host.replaceChildren(
    ...entries.map(([colour, text]) => {
      const swatch = el("i", { class: "swatch" });
      swatch.style.background = colour;
      return el("span", {}, swatch, escapeText(text));
    }),
  );
}
