"""Documents to make pages of, and what one sees of a page: tables, pictures, and what is said under the pointer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from playwright.sync_api import Page

MODULES = {"self_attn.q_proj": [8, 8], "self_attn.k_proj": [4, 8], "mlp.up_proj": [24, 8], "input_layernorm": [8]}
LAYERS = 4


def keys_of_a_model() -> dict[str, list[int]]:
    layers = {f"model.layers.{at}.{name}.weight": shape for at in range(LAYERS) for name, shape in MODULES.items()}
    return {"model.embed_tokens.weight": [32, 8], **layers, "model.norm.weight": [8], "lm_head.weight": [32, 8]}


def document(shapes: Mapping[str, list[int]], *, stats: bool = False, files: int = 2, **changes: Any) -> dict[str, Any]:
    """What ``inspect --json`` would say of these tensors, spread over some files in this order."""
    names = [f"model-{at + 1:05d}-of-{files:05d}.safetensors" for at in range(files)]
    ends = dict.fromkeys(names, 64)
    tensors = []
    for at, (key, shape) in enumerate(shapes.items()):
        name = names[at * files // len(shapes)]
        nbytes = 2 * prod(shape)
        tensors.append(
            {"key": key, "shape": shape, "dtype": "BF16", "nbytes": nbytes, "file": name, "offset": ends[name]}
        )
        ends[name] += nbytes
        if stats:
            numbers = np.random.default_rng(at).normal(0, 0.02 * (at % 5 + 1), shape)
            tensors[-1]["stats"] = statistics(numbers)
    total = sum(tensor["nbytes"] for tensor in tensors)
    count = {"tensors": len(tensors), "parameters": total // 2, "bytes": total}
    held = [sum(tensor["file"] == name for tensor in tensors) for name in names] if len(shapes) < 999 else [0] * files
    return {
        "schema": 1,
        "path": "models/tiny",
        "format": "hf",
        "why": "config.json",
        "family": "llama",
        "evidence": "model_type 'llama'",
        "release": None,
        "problem": None,
        "config_source": None,
        "converted_from": None,
        "model_parallel": None,
        "tied": False,
        "notices": [],
        "facts": [],
        "parameters": total // 2,
        "bytes": total,
        "dtypes": {"BF16": count},
        "dims": {"dim": 8, "n_layers": 4},
        "files": [
            {"name": name, "bytes": ends[name], "tensors": some, "rank": 0}
            for name, some in zip(names, held, strict=True)
        ],
        "tensors": tensors,
        **changes,
    }


def statistics(values: np.ndarray[Any, Any]) -> dict[str, Any]:
    names = ("min", "max", "mean", "std")
    return {
        **{name: float(getattr(np, name)(values)) if values.size else None for name in names},
        "nan": 0,
        "inf": 0,
        "zero_fraction": float(np.mean(values == 0)) if values.size else 0.0,
        "checksum": f"xxh3_64:{0:016x}",
    }


def difference(shapes: Mapping[str, list[int]] | None = None, **changes: Any) -> dict[str, Any]:
    """What ``diff --json`` would say of two models; with ``shapes``, of two that are the same."""
    tensors = []
    for at, (key, shape) in enumerate((shapes or keys_of_a_model()).items()):
        status, delta = "same", [0, 0.0, 0]
        if shapes is None and ".layers." in key:
            layer = int(key.split(".")[2])
            status, delta = (
                ("differs", [min(at, prod(shape)), 10.0**-layer / (at + 1), at + 2]) if layer else ("same", [0, 0.0, 0])
            )
        count, tensor = prod(shape), {"key_a": key, "key_b": key, "shape_a": shape, "shape_b": shape}
        tensor |= {"dtype_a": "BF16", "dtype_b": "BF16", "nbytes": 2 * count, "status": status, "note": None}
        differing, size, ulp = delta
        measured = {"max_abs": size * 3, "mean_abs": size / 10, "relative_norm": size, "max_ulp": ulp}
        found = {"where": [0] * len(shape), "first": [0] * len(shape)} if differing else {"where": None, "first": None}
        tensor["delta"] = {"count": count, "differing": differing, **measured, "nan_mismatch": 0, **found}
        tensors.append(tensor)
    if shapes is None:
        alter(tensors)
    counts = dict.fromkeys(("same", "differs", "shape", "dtype", "only_a", "only_b"), 0)
    for tensor in tensors:
        counts[tensor["status"]] += 1
    side = {"path": changes.pop("path", "models/base"), "format": "hf", "family": "llama", "model_parallel": None}
    side |= {"tensors": len(tensors), "parameters": 1000, "bytes": 2000}
    config = [
        {"name": "rope_theta", "a": 1e4, "b": 5e5},
        {"name": "rope", "a": {"f": 8, "g": 1}, "b": {"f": 4, "g": 1}},
    ]
    return {
        "schema": 1,
        "a": side,
        "b": {**side, "path": "models/tuned", "parameters": 1008},
        "values": True,
        "same": counts["same"] == len(tensors),
        "through": "keys",
        "counts": counts,
        "notices": [],
        "tensors": tensors,
        "config": [] if shapes else config,
        **changes,
    }


def alter(tensors: list[dict[str, Any]]) -> None:
    """One of each of the other kinds of difference."""
    by_key = {tensor["key_a"]: tensor for tensor in tensors}
    none = {"delta": None}
    by_key["lm_head.weight"].update(status="shape", shape_b=[40, 8], **none)
    by_key["model.norm.weight"].update(status="only_a", key_b=None, shape_b=None, dtype_b=None, **none)
    by_key["model.embed_tokens.weight"].update(status="dtype", dtype_b="F32")
    wrong = by_key["model.layers.3.mlp.up_proj.weight"]["delta"]
    wrong.update(nan_mismatch=2, max_abs=float("inf"), relative_norm=float("nan"))
    added = {"key_a": None, "key_b": "model.extra.weight", "status": "only_b", "shape_a": None, "shape_b": [8]}
    tensors.append({**added, "dtype_a": None, "dtype_b": "BF16", "nbytes": 16, "note": None, "delta": None})


def rows(page: Page, host: str = "#tensors") -> list[str]:
    """The first cells of the rows that there are."""
    return page.eval_on_selector_all(f"{host} tbody tr:not(.space)", "all => all.map(row => row.cells[0].textContent)")


def tips(page: Page, host: str, *, across: int, down: int) -> list[str]:
    """What is said at the points of a grid over a picture, row by row; nothing where there is nothing."""
    found: list[str] = page.locator(f"{host} canvas").evaluate(
        """(canvas, [across, down]) => {
            const tip = document.getElementById("tip");
            const box = canvas.getBoundingClientRect();
            const at = (x, y) => ({
                clientX: box.x + (box.width * (x + 0.5)) / across,
                clientY: box.y + (box.height * (y + 0.5)) / down,
            });
            return Array.from({ length: across * down }, (_, place) => {
                const point = at(place % across, Math.floor(place / across));
                canvas.dispatchEvent(new PointerEvent("pointermove", point));
                return tip.hidden ? "" : tip.innerText;
            });
        }""",
        [across, down],
    )
    return found


def picture(page: Page, host: str) -> str:
    found: str = page.locator(f"{host} canvas").first.evaluate("canvas => canvas.toDataURL()")
    return found


def colours_at_mark(page: Page, host: str) -> set[tuple[int, ...]]:
    """The colours of the item that is marked."""
    found = page.locator(host).evaluate("""host => {
        const [canvas, mark] = [host.querySelector("canvas"), host.querySelector(".mark")];
        const [outer, inner] = [canvas.getBoundingClientRect(), mark.getBoundingClientRect()];
        const scale = canvas.width / outer.width;
        const at = [inner.x - outer.x, inner.y - outer.y, inner.width, inner.height];
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        const pixels = copy.getImageData(...at.map(value => Math.round(value * scale))).data;
        return Array.from({length: pixels.length / 4}, (_, pixel) => [...pixels.slice(pixel * 4, pixel * 4 + 3)]);
    }""")
    return {tuple(pixel) for pixel in found}


def pick(page: Page, host: str, *keys: str) -> str:
    """Walk over a picture with the keyboard from its first item; what is said there."""
    canvas = page.locator(f"{host} canvas").first
    canvas.evaluate("canvas => canvas.blur()")
    canvas.focus()
    for key in keys:
        canvas.press(key)
    return page.locator("#tip").inner_text()


def choose(page: Page, host: str, text: str) -> None:
    page.locator(f"{host} label").filter(has_text=re.compile(f"^{re.escape(text)}$")).click()


def bad_colour(page: Page) -> tuple[int, ...]:
    """The colour of what is wrong, as the page resolves it."""
    colour = page.locator("#heat-bad b").evaluate("b => getComputedStyle(b).color")
    return tuple(map(int, re.findall(r"\d+", colour)[:3]))


# Every text that is seen, against the nearest ground below it (WCAG 2: 4.5, and 3 for large text).
CONTRAST = """() => {
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
        .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
    const ground = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return parse(getComputedStyle(document.documentElement).backgroundColor);
    };
    const found = [];
    for (const element of document.body.querySelectorAll("*")) {
        if (element.closest("script, noscript, [hidden]") || !element.checkVisibility()) continue;
        if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
        const [one, other] = [parse(getComputedStyle(element).color), ground(element)].map(light).sort((a, b) => b - a);
        found.push([element.textContent.slice(0, 40), (one + 0.05) / (other + 0.05)]);
    }
    return found;
}"""


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def contrast(one: str, other: str) -> float:
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)
