// A canvas that is sharp, fits its place, says what is under the pointer, and can be walked with the arrow keys.

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";

const tip = {
  show(content, x, y) {
    const box = place("tip");
    box.replaceChildren(...content);
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const right = document.documentElement.clientWidth - width - 8;
    box.style.left = `${Math.max(8, Math.min(x + 14, right))}px`;
    box.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
  },
  hide() {
    place("tip").hidden = true;
  },
};

/** What a tip says: a title (a key), and rows of label and value. */
function tipContent(title, rows) {
  const list = el("dl", {});
  describe(list, rows);
  return [...[title].flat().map((text) => el("div", { class: "key" }, escapeText(text))), list];
}

/**
 * A picture in `host`. height(width) → its height; draw(context, width, height); at(x, y) → the item there, which has
 * x, y, w, h, or null; describe(item) → the content of the tip; activate(item) and back() are for click, Enter, Escape.
 */
function picture(host, { label, height, draw, at, describe: told, activate = null, back = null }) {
  const canvas = el("canvas", { tabindex: "0", role: "application", "aria-label": label });
  const mark = el("div", { class: "mark", hidden: true });
  host.classList.add("picture");
  host.replaceChildren(canvas, mark);
  let current = null;
  let size = [0, 0];

  function render() {
    const width = Math.floor(host.clientWidth);
    if (!width) return;
    const tall = Math.max(1, Math.ceil(height(width)));
    const ratio = Math.min(devicePixelRatio || 1, 3, 32000 / tall); // browsers draw nothing on a canvas that is too tall
    size = [width, tall];
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
    canvas.style.height = `${tall}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, tall);
    draw(context, width, tall);
    select(null);
  }

  function select(item, x = null, y = null) {
    current = item;
    mark.hidden = item === null;
    canvas.style.cursor = item && activate && item.opens ? "pointer" : "default";
    if (item === null) return tip.hide();
    mark.style.transform = `translate(${item.x}px, ${item.y}px)`;
    mark.style.width = `${item.w}px`;
    mark.style.height = `${item.h}px`;
    const box = canvas.getBoundingClientRect();
    tip.show(told(item), x ?? box.left + item.x + item.w / 2, y ?? box.top + Math.min(item.y + item.h, item.y + 40));
  }

  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    return at(event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (event) => select(under(event), event.clientX, event.clientY));
  canvas.addEventListener("pointerleave", () => select(null));
  // Who comes by the keyboard is at the first item at once; who presses a button is where the pointer is.
  let isPressed = false;
  canvas.addEventListener("pointerdown", () => (isPressed = true));
  canvas.addEventListener("pointerup", () => (isPressed = false));
  canvas.addEventListener("focus", () => isPressed || select(first()));
  canvas.addEventListener("blur", () => {
    isPressed = false;
    select(null);
  });
  canvas.addEventListener("click", (event) => {
    const item = under(event);
    if (item && activate) activate(item);
  });

  /** The next item in a direction: the first that is met on the way from the middle of this one, or from its corner. */
  function beyond([right, down]) {
    if (!current) return first();
    const { x: left, y: top, w, h } = current;
    for (const part of [0.5, 0.1]) {
      let x = right ? left + (right > 0 ? w + 1 : -1) : left + w * part;
      let y = down ? top + (down > 0 ? h + 1 : -1) : top + h * part;
      for (; x >= 0 && y >= 0 && x < size[0] && y < size[1]; x += right * 2, y += down * 2) {
        const found = at(x, y);
        if (found && found.id !== current.id) return found;
      }
    }
    return current;
  }

  function first() {
    for (let y = 1; y < size[1]; y += 4) for (let x = 1; x < size[0]; x += 4) if (at(x, y)) return at(x, y);
    return null;
  }

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (STEPS[event.key]) select(beyond(STEPS[event.key]));
    else if ((event.key === "Enter" || event.key === " ") && current && activate) activate(current);
    else if (event.key === "Escape") back ? back() : select(null);
    else return;
    event.preventDefault();
  });

  new ResizeObserver(() => Math.floor(host.clientWidth) !== size[0] && render()).observe(host);
  document.addEventListener("theme", render);
  render();
  return render;
}

/** Text that fits into a width: shortened in the middle or at the end, nothing where not even a few characters fit. */
function fitted(context, text, width, where = "middle") {
  if (text.length > 400) text = `${text.slice(0, 200)}${text.slice(-200)}`; // far more than fits, and slow to measure
  if (context.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  const head = (length) => (where === "end" ? length : Math.floor(length * 0.4));
  const cut = (length) => `${text.slice(0, head(length))}…${text.slice(text.length - length + head(length))}`;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(cut(middle)).width <= width) low = middle;
    else high = middle - 1;
  }
  return low > (where === "end" ? 4 : 2) ? cut(low) : "";
}
