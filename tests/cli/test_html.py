"""The pages, in a real browser: what is seen, what is said under the pointer, and that nothing in a file can act."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, expect, sync_playwright
from safetensors.numpy import save_file

from ckpt_convert import __version__
from ckpt_convert.cli.diff import diff
from ckpt_convert.cli.html import diff_page, inspect_page
from ckpt_convert.cli.inspect import inspect
from ckpt_convert.cli.text import Printed, command_line, escape
from ckpt_convert.wording import human_bytes
from tests import command
from tests.cli.pages import (
    CONTRAST,
    LAYERS,
    MODULES,
    bad_colour,
    choose,
    colours_at_mark,
    contrast,
    difference,
    document,
    keys_of_a_model,
    luminance,
    pick,
    picture,
    rows,
    statistics,
    tips,
)
from tests.helpers import GOLDEN

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "ckpt_convert" / "cli" / "html" / "assets"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = (
    *("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "]]>", "{{data}}"),
    *("a\x1b[31m.0.weight\n", "\u202egnp.1.weight", "\ud800.weight", "\u2028x", "a b", "&lt;b&gt;", "'\"`${alert(1)}"),
    *("__proto__", "constructor.0.weight", "x.007.1.weight", "x.0", "0", ".1", "1..2", "..", ".", "1.", "9999999999.w"),
)
Open = Callable[..., Page]


def run(command: Any, *arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(command, [*map(str, arguments), "--json"])
    assert result.stdout.startswith("{"), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all of this; where there is none, the tests fail with what to install."""
    found = subprocess.run([ROOT / "tests" / "browser.sh"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.fail(found.stderr.strip(), pytrace=False)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found.stdout.strip(), args=FLAGS)
        yield running
        running.close()


@dataclass
class Tab:
    """The tab that pages are opened in, and what they said and asked for in it."""

    page: Page
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Tab:
    """A tab without a network."""
    found = Tab(browser.new_context(offline=True).new_page())
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("dialog", lambda dialog: (found.said.append(dialog.message), dialog.dismiss()))
    found.page.on("request", lambda request: found.asked.append(request.url))
    return found


@pytest.fixture
def show(tab: Tab, tmp_path: Path) -> Iterator[Open]:
    """Opens a page from a file; at the end it must have said nothing, asked for nothing and failed nowhere."""
    opened = []

    def open_page(html: str, *, scheme: str = "light", width: int = 1400) -> Page:
        path = tmp_path / f"page-{len(opened)}.html"
        path.write_text(html, encoding="utf-8")
        opened.append(path.as_uri())
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.goto(opened[-1])
        expect(tab.page.locator("#tensors tbody tr:not(.space)").first).to_be_visible()
        return tab.page

    yield open_page
    tab.page.evaluate("localStorage.clear()")
    tab.page.goto("about:blank")
    said, asked = tab.said.copy(), tab.asked.copy()
    tab.said.clear()
    tab.asked.clear()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "about:"))] == opened


@pytest.mark.parametrize(
    "path",
    ["llama/hf", "llama/meta-mp4", "llama_tied/native.safetensors", "qwen2/hf", "llama2/meta-mp2"],
)
def test_a_page_for_each_format(path: str, show: Open) -> None:
    found = run(inspect, GOLDEN / path, "--stats")
    page = show(inspect_page(found))
    expect(page.locator("h1")).to_have_text(path if path.endswith("/hf") else Path(path).name)
    text = page.locator("main").inner_text()
    assert f"{found['parameters']:,}" in text
    assert human_bytes(found["bytes"]) in text
    assert (found["family"] or "unknown") in text
    assert rows(page) == [tensor["key"] for tensor in found["tensors"]][: len(rows(page))]
    assert len(list(filter(None, tips(page, "#map", across=12, down=6)))) > 60
    assert len(set(tips(page, "#heat", across=40, down=40))) > 9


def test_the_header_has_the_facts_and_the_notices(show: Open) -> None:
    changes = {"notices": ["the rope factor is that of Llama 3.1"], "release": "Llama 3.2 1B", "tied": True}
    page = show(inspect_page(document(keys_of_a_model(), **changes)))
    text = page.locator("section").first.inner_text()
    for said in ("Llama 3.2 1B", "the rope factor is that of Llama 3.1", "BF16", "n_layers 4", "config.json"):
        assert said in text, said
    expect(page).to_have_title("tiny")


def test_the_treemap_says_what_is_under_the_pointer(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    said = tips(page, "#map", across=30, down=14)
    for key, shape in keys_of_a_model().items():
        if prod(shape) > 8:  # norms are thinner than a pixel here
            (tip, *_) = [tip for tip in said if tip.startswith(key)] or [""]
            assert str(shape) in tip, key
            assert "BF16" in tip
            assert human_bytes(2 * prod(shape)) in tip


def test_the_treemap_has_areas_in_the_colours_of_its_legend(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    shares: dict[str, float] = page.locator("#map canvas").evaluate("""canvas => {
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const found = {};
        for (let at = 0; at < pixels.length; at += 4) {
            const name = `rgb(${pixels[at]}, ${pixels[at + 1]}, ${pixels[at + 2]})`;
            found[name] = (found[name] ?? 0) + 4 / pixels.length;
        }
        return found;
    }""")
    swatches = page.locator("#map-legend > span")
    legend = {
        swatches.nth(at).inner_text(): swatches.nth(at).locator("i").evaluate("i => i.style.backgroundColor")
        for at in range(swatches.count())
    }
    assert set(legend) == {"attention", "feed-forward", "embedding, output", "norm"}
    # The area is that of the parameters, less what edges, names and headers take.
    total = sum(map(prod, keys_of_a_model().values()))
    for kind, expected in [("feed-forward", 4 * 24 * 8 / total), ("embedding, output", 2 * 32 * 8 / total)]:
        assert expected * 0.6 < shares[legend[kind]] < expected * 1.2, kind


def test_the_treemap_opens_a_layer_and_goes_back(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    crumbs = page.locator("#crumbs")
    before = picture(page, "#map")
    (tip, *_) = [tip for tip in tips(page, "#map", across=30, down=14) if "layers.2.mlp" in tip]
    box = page.locator("#map canvas").bounding_box()
    assert box is not None
    at = tips(page, "#map", across=30, down=14).index(tip)
    page.mouse.click(box["x"] + box["width"] * (at % 30 + 0.5) / 30, box["y"] + box["height"] * (at // 30 + 0.5) / 14)
    expect(crumbs).to_contain_text("layer 2")
    assert all(".layers.2." in tip or "layer 2" in tip for tip in tips(page, "#map", across=8, down=6) if tip)
    crumbs.get_by_role("button", name="all tensors").click()
    expect(crumbs).not_to_contain_text("layer 2")
    assert picture(page, "#map") == before
    pick(page, "#map")
    page.keyboard.press("Enter")
    expect(crumbs.locator("button")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(crumbs.locator("button")).to_have_count(0)


def test_the_treemap_groups_by_module_and_colours_by_dtype(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    pictures = [picture(page, "#map")]
    choose(page, "#map-controls .choice:first-child", "module")
    pictures.append(picture(page, "#map"))
    choose(page, "#map-controls .choice:last-child", "dtype")
    pictures.append(picture(page, "#map"))
    assert len(set(pictures)) == 3
    expect(page.locator("#map-legend")).to_have_text("BF16")


def test_the_strip_has_every_tensor_where_it_lies(show: Open) -> None:
    found = document(keys_of_a_model(), files=2)
    page = show(inspect_page(found))
    said = tips(page, "#strip", across=260, down=2)
    for file in found["files"]:
        here = [tip.splitlines()[0] for tip in said if file["name"] in tip]
        order = list(dict.fromkeys(line for line in here if line != file["name"]))
        expected = [tensor["key"] for tensor in found["tensors"] if tensor["file"] == file["name"]]
        assert order == expected
    (embedding, *_) = [tip for tip in said if tip.startswith("model.embed_tokens.weight")]
    assert re.search(r"offset\s+64\b", embedding)
    before = picture(page, "#strip")
    choose(page, "#strip-controls", "layer")
    assert picture(page, "#strip") != before
    expect(page.locator("#strip-legend")).to_contain_text("layer 3")


def test_a_tensor_cut_over_ranks_is_in_each_file(show: Open) -> None:
    found = run(inspect, GOLDEN / "llama" / "meta-mp2")
    page = show(inspect_page(found))
    said = [tip for tip in tips(page, "#strip", across=60, down=2) if "layers.0.attention.wo.weight" in tip]
    assert {name for name in ("consolidated.00.pth", "consolidated.01.pth") for tip in said if name in tip} == {
        "consolidated.00.pth",
        "consolidated.01.pth",
    }
    assert "50.0 % of it" in said[0]


@pytest.mark.parametrize(
    ("query", "pattern"),
    [
        ("q_proj", r"q_proj"),
        ("layers.1.", r"layers\.1\."),
        ("layers.*.mlp", r"layers\..*\.mlp"),
        ("layers.?.input*weight", r"layers\..\.input.*weight"),
        ("Q_PROJ 3", r"(?=.*3).*q_proj"),
        ("model.norm.weight", r"model\.norm\.weight"),
        ("(", r"\("),
    ],
)
def test_the_search_filters_the_table(query: str, pattern: str, show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    page.locator("#tensors input").fill(query)
    expected = sorted(key for key in keys_of_a_model() if re.search(pattern, key))
    output = page.locator("#tensors output")
    expect(output).to_contain_text(f"{len(expected)} of {len(keys_of_a_model())} tensors")
    assert sorted(rows(page)) == (expected or ["Nothing matches."])
    page.locator("#tensors input").fill("")
    expect(output).to_contain_text(f"{len(keys_of_a_model())} tensors,")


def test_the_table_is_sorted_by_any_column(show: Open) -> None:
    found = document(keys_of_a_model(), stats=True)
    page = show(inspect_page(found))
    header = page.locator("#tensors thead")
    by_size = sorted(found["tensors"], key=lambda tensor: tensor["nbytes"], reverse=True)
    header.get_by_role("button", name="size").click()
    expect(header.locator("[aria-sort]")).to_have_attribute("aria-sort", "descending")
    assert set(rows(page)[:2]) == {tensor["key"] for tensor in by_size[:2]}
    header.get_by_role("button", name="size").click()
    assert rows(page)[0] in {tensor["key"] for tensor in by_size if tensor["nbytes"] == by_size[-1]["nbytes"]}
    header.get_by_role("button", name="std").click()
    worst = sorted(found["tensors"], key=lambda tensor: tensor["stats"]["std"], reverse=True)
    assert rows(page)[:5] == [tensor["key"] for tensor in worst[:5]]
    header.get_by_role("button", name="key").click()
    assert rows(page)[0] == "lm_head.weight"
    header.get_by_role("button", name="dtype").click()
    expect(header.locator("[aria-sort]")).to_have_attribute("aria-sort", "ascending")
    sums: dict[str, int] = {}
    for tensor in found["tensors"]:
        module = re.sub(r"\d+", "*", tensor["key"])
        sums[module] = sums.get(module, 0) + tensor["nbytes"]
    assert [sums[module] for module in rows(page, "#modules")] == sorted(sums.values(), reverse=True)


def test_what_has_no_value_comes_last_whichever_way_the_rest_is_sorted(show: Open) -> None:
    found = document(keys_of_a_model(), stats=True)
    found["tensors"][3]["stats"].update(min=None, max=None, mean=None, std=None, nan=8)
    page = show(inspect_page(found))
    for order in ("descending", "ascending"):
        page.locator("#tensors thead").get_by_role("button", name="std").click()
        expect(page.locator("#tensors thead [aria-sort]")).to_have_attribute("aria-sort", order)
        assert rows(page)[-1] == found["tensors"][3]["key"]


def test_the_files_of_a_tensor_that_is_cut_are_counted(show: Open) -> None:
    page = show(inspect_page(run(inspect, GOLDEN / "llama" / "meta-mp4")))
    texts = page.locator("#tensors tbody tr:not(.space)").all_inner_texts()
    assert texts
    assert all("4 pieces" in text for text in texts)


def test_a_table_of_very_many_rows_is_short_and_reaches_its_end(show: Open) -> None:
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight": [64, 32]
        for layer in range(20)
        for expert in range(256)
        for name in ("down", "gate", "up")
    }
    html = inspect_page(document(experts, files=163))
    assert len(html) < 24 * len(experts) + 80_000
    page = show(html)
    expect(page.locator("#tensors output")).to_contain_text("15,360 tensors")
    assert page.locator("#tensors tr").count() < 60
    page.locator("#tensors .scroller").evaluate("box => { box.scrollTop = box.scrollHeight }")
    expect(page.locator("#tensors tbody")).to_contain_text("model.layers.19.mlp.experts.255.up_proj.weight")
    assert page.locator("#tensors tr").count() < 60
    box = page.locator("#strip").bounding_box()
    assert box is not None
    assert box["height"] < 1000  # 163 files and still on a screen
    said = tips(page, "#strip", across=8, down=41)
    assert len({name for tip in said for name in re.findall(r"model-\d+", tip)}) == 163


def test_keys_come_in_natural_order_whatever_order_they_are_in(show: Open) -> None:
    keys = [f"layers.{at}.wq.weight" for at in (10, 9, 2, 1, 0, 11)]
    page = show(inspect_page(document({key: [4, 4] for key in keys})))
    assert rows(page) == [f"layers.{at}.wq.weight" for at in (0, 1, 2, 9, 10, 11)]


def test_the_heatmap_says_key_and_values(show: Open) -> None:
    found = document(keys_of_a_model(), stats=True)
    page = show(inspect_page(found))
    by_key = {tensor["key"]: tensor["stats"] for tensor in found["tensors"]}
    # The first cell is that of the first module in layer 0; modules go down, layers go right.
    for keys, key in [
        ((), "model.layers.0.input_layernorm.weight"),
        (("ArrowRight",), "model.layers.1.input_layernorm.weight"),
        (("ArrowRight", "ArrowDown"), "model.layers.1.mlp.up_proj.weight"),
        (("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown"), "lm_head.weight"),  # outside of layers
    ]:
        tip = pick(page, "#heat", *keys)
        assert tip.startswith(key + "\n")
        for name in ("std", "min", "max"):
            (shown,) = re.findall(rf"^{name}\s+(\S+)", tip, re.MULTILINE)
            assert float(shown) == pytest.approx(by_key[key][name], rel=5e-3)


def test_each_statistic_has_a_heatmap_of_its_own(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model(), stats=True)))
    seen = {picture(page, "#heat")}
    for name in ("mean", "min", "max", "max |x|", "zeros"):
        choose(page, "#heat-controls", name)
        seen.add(picture(page, "#heat"))
    assert len(seen) == 6
    choose(page, "#heat-controls", "std")
    page.get_by_label("each row by itself").check()
    assert picture(page, "#heat") not in seen


def test_a_cell_of_experts_has_the_statistics_of_all_of_them(show: Open) -> None:
    found = document({f"model.layers.0.mlp.experts.{at}.up_proj.weight": [16, 8] for at in range(5)})
    parts = [np.random.default_rng(at).normal(at, at + 1, (16, 8)) for at in range(5)]
    parts[1][:2] = 0
    for tensor, part in zip(found["tensors"], parts, strict=True):
        tensor["stats"] = statistics(part)
    page = show(inspect_page(found))
    tip = pick(page, "#heat")
    everything = np.stack(parts)
    assert "model.layers.0.mlp.experts.*.up_proj.weight" in tip
    assert re.search(r"tensors\s+5\b", tip)
    for name in ("std", "mean", "min", "max"):
        (shown,) = re.findall(rf"^{name}\s+(\S+)", tip, re.MULTILINE)
        assert float(shown) == pytest.approx(getattr(np, name)(everything), rel=1e-3)
    assert re.search(r"^zeros\s+2\.5", tip, re.MULTILINE)  # 16 of 640
    page.keyboard.press("Enter")
    expect(page.locator("#tensors output")).to_contain_text("5 tensors")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nan_and_inf_are_marked_and_not_by_colour_alone(scheme: str, show: Open) -> None:
    found = document(keys_of_a_model(), stats=True)
    by_key = {tensor["key"]: tensor["stats"] for tensor in found["tensors"]}
    by_key["model.layers.1.mlp.up_proj.weight"].update(nan=3, inf=1)
    by_key["model.norm.weight"].update(nan=8, min=None, max=None, mean=None, std=None)
    page = show(inspect_page(found), scheme=scheme)
    tip = pick(page, "#heat", "ArrowRight", "ArrowDown")
    assert tip.startswith("model.layers.1.mlp.up_proj.weight")
    assert re.search(r"NaN\s+3\b", tip)
    assert re.search(r"Inf\s+1\b", tip)
    bad = bad_colour(page)
    marked = colours_at_mark(page, "#heat")
    assert bad in marked
    assert len(marked) > 2  # a cross is drawn into it
    pick(page, "#heat", "ArrowRight")
    assert bad not in colours_at_mark(page, "#heat")
    text = page.locator("#heat-bad").inner_text()
    assert "2 tensors with NaN or Inf" in text
    assert "model.layers.1.mlp.up_proj.weight 3 NaN, 1 Inf" in text
    expect(page.locator("#heat-legend")).to_contain_text("has NaN or Inf")


def test_without_statistics_there_is_no_heatmap(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    expect(page.locator("#heat-section")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["inspect", "diff"])
def test_text_stands_out(kind: str, scheme: str, show: Open) -> None:
    found = document(keys_of_a_model(), stats=True, notices=["a notice"])
    found["tensors"][1]["stats"]["nan"] = 1
    page = show(inspect_page(found) if kind == "inspect" else diff_page(difference()), scheme=scheme)
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 60
    assert [entry for entry in contrasts if entry[1] < 4.5] == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")


def test_names_on_the_colours_of_the_treemap_stand_out() -> None:
    source = (ASSETS / "colours.js").read_text()
    ink = re.search(r'INK = "(#\w+)"', source)
    palette = re.search(r"CATEGORIES = \[(.*)\]", source)
    assert ink is not None
    assert palette is not None
    for colour in re.findall(r"#\w+", palette[1]):
        assert contrast(ink[1], colour) > 4.5, colour


def test_the_sequential_scale_grows_evenly_in_lightness() -> None:
    source = (ASSETS / "colours.js").read_text()
    scale = re.search(r"VIRIDIS = \[(.*)\]", source)
    assert scale is not None
    lightness = np.array([116 * luminance(colour) ** (1 / 3) - 16 for colour in re.findall(r"#\w+", scale[1])])
    assert (np.diff(lightness) > 5).all()


def test_the_button_switches_between_light_and_dark(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())), scheme="dark")
    look = "getComputedStyle(document.body).backgroundColor"
    before, drawn = page.evaluate(look), picture(page, "#map")
    page.locator("#theme").click()
    assert page.evaluate(look) != before
    assert picture(page, "#map") != drawn
    page.locator("#theme").click()
    assert page.evaluate(look) == before
    assert picture(page, "#map") == drawn


@pytest.mark.parametrize("width", [700, 380])
@pytest.mark.parametrize("kind", ["inspect", "diff"])
def test_a_narrow_window_needs_no_scrolling_sideways(kind: str, width: int, show: Open) -> None:
    found = document(keys_of_a_model(), stats=True, path="models/" + "a-very-long-name-" * 12)
    page = show(inspect_page(found) if kind == "inspect" else diff_page(difference()), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_picture_fits_a_window_that_changes(show: Open) -> None:
    page = show(inspect_page(document(keys_of_a_model())))
    page.set_viewport_size({"width": 800, "height": 700})
    page.wait_for_function("document.querySelector('#map canvas').width <= 800")
    assert all(tips(page, "#map", across=6, down=6))


@pytest.mark.parametrize("kind", ["inspect", "diff"])
def test_what_files_say_is_only_ever_text(kind: str, show: Open) -> None:
    """Every key is there as it is (but for what cannot be seen, which is escaped), and none of them acts."""
    wicked = "</title></script><script>alert(2)</script>\x07"
    shapes = {key: [2, 2] for key in HOSTILE}
    if kind == "inspect":
        changes = {"path": wicked, "notices": [wicked], "family": wicked, "why": wicked, "evidence": wicked}
        found = document(
            shapes,
            stats=True,
            dims={wicked: 3, "theta": float("inf")},
            facts=[{"label": wicked, "text": wicked}],
            **changes,
        )
        for file in found["files"]:
            file["name"] = wicked + file["name"]
        for tensor in found["tensors"]:
            tensor["file"] = wicked + tensor["file"]
        page = show(inspect_page(found))
        said = tips(page, "#map", across=12, down=8) + tips(page, "#strip", across=60, down=2)
        assert any("alert(1)" in tip for tip in said)
        assert any("<script>alert(2)</script>\\x07" in tip for tip in said)
        expect(page).to_have_title(re.compile(re.escape("\\x07") + "$"))
    else:
        page = show(diff_page(difference(shapes, path=wicked, notices=[wicked])))
    assert page.locator("script").count() == 2
    assert page.locator("img, main script, main a, main iframe").count() == 0
    column = 0 if kind == "inspect" else 1
    seen = page.eval_on_selector_all(
        "#tensors tbody tr:not(.space)", f"all => all.map(row => row.cells[{column}].textContent)"
    )
    assert sorted(seen) == sorted(map(escape, HOSTILE))


def test_the_page_forbids_all_scripts_but_its_own() -> None:
    html = inspect_page(document({"</script><script>alert(1)</script>": [2]}))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert html.count("</script>") == 2
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", html)


def test_keys_are_the_same_after_all_that_makes_them_short(show: Open) -> None:
    """Templates, numbers and kinds come together again, with the right shapes."""
    keys = [
        "a.0.b.1.c",
        "a.0.b.2.c",
        "a.1.b.0",
        "a.b",
        "0.1.2",
        "7",
        "a.00.b",
        "a.1",
        "x.10.y",
        "x.9.y",
        "x.123456789.y",
    ]
    shapes = {key: [at + 1, 2] for at, key in enumerate(keys)}
    page = show(inspect_page(document(shapes)))
    seen = page.eval_on_selector_all(
        "#tensors tbody tr:not(.space)", "all => all.map(row => [row.cells[0].textContent, row.cells[1].textContent])"
    )
    assert dict(seen) == {key: str(shape) for key, shape in shapes.items()}


def test_two_that_are_the_same(show: Open) -> None:
    page = show(diff_page(run(diff, GOLDEN / "llama" / "hf", GOLDEN / "llama" / "meta-mp2")))
    verdict = page.locator("#verdict").inner_text()
    assert "Same" in verdict
    assert "All 30 tensors are the same, bit for bit" in verdict
    assert "through the mapping" in verdict
    sides = page.locator("#sides").inner_text()
    assert "llama/hf" in sides
    assert "llama/meta-mp2" in sides
    # Keys of both sides, where they are called differently.
    tip = pick(page, "#heat", "ArrowRight")
    assert "A model.layers.1.input_layernorm.weight\nB layers.1.attention_norm.weight" in tip
    for hidden in ("#structure-section", "#config-section"):
        expect(page.locator(hidden)).to_be_hidden()


def test_two_that_differ_say_how(show: Open) -> None:
    found = difference()
    page = show(diff_page(found))
    verdict = page.locator("#verdict").inner_text()
    for said in ("Different", "12 tensors with other values", "1 tensor of another shape", "1 tensor only in A"):
        assert said in verdict, said
    assert "2 entries of the config" in verdict
    structure = page.locator("#structure").inner_text()
    for said in (
        "model.norm.weight",
        "only in A",
        "model.extra.weight",
        "only in B",
        "[32, 8] → [40, 8]",
        "BF16 → F32",
    ):
        assert said in structure, said
    config = page.locator("#config").inner_text()
    assert re.search(r"rope_theta\s+10000\s+500000", config)
    assert re.search(r"rope\.f\s+8\s+4", config)
    assert "rope.g" not in config


def test_the_worst_comes_first_and_kinds_can_be_chosen(show: Open) -> None:
    found = difference()
    page = show(diff_page(found))
    keys = page.eval_on_selector_all("#tensors tbody tr:not(.space)", "a => a.map(r => r.cells[1].textContent)")
    assert keys[:3] == ["model.norm.weight", "model.extra.weight", "lm_head.weight"]
    assert keys[3] == "model.layers.3.mlp.up_proj.weight"  # NaN on one side
    assert keys[-1].startswith("model.layers.0.")
    choose(page, "#tensors-controls", "values differ 12")
    expect(page.locator("#tensors output")).to_have_text("12 of 20 tensors")
    page.locator("#tensors input").fill("layers.2")
    expect(page.locator("#tensors output")).to_have_text("4 of 20 tensors")
    page.locator("#tensors").get_by_role("button", name="max |Δ|").click()
    size = {tensor["key_a"]: tensor["delta"] and tensor["delta"]["max_abs"] for tensor in found["tensors"]}
    keys = page.eval_on_selector_all("#tensors tbody tr:not(.space)", "a => a.map(r => r.cells[1].textContent)")
    assert keys == sorted(keys, key=lambda key: size[key], reverse=True)


def test_each_measure_of_change_has_a_heatmap_of_its_own(show: Open) -> None:
    page = show(diff_page(difference()))
    seen = {picture(page, "#heat")}
    for name in ("max |Δ|", "mean |Δ|", "max ULP", "elements"):
        choose(page, "#heat-controls", name)
        seen.add(picture(page, "#heat"))
    assert len(seen) == 5
    legend = page.locator("#heat-legend")
    marks = (
        "same, bit for bit",
        "NaN on one side only",
        "only in A",
        "only in B",
        "shapes differ",
        "only dtypes differ",
    )
    for said in marks:
        expect(legend).to_contain_text(said)
    tip = pick(page, "#heat", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown")
    assert tip.startswith("model.layers.3.mlp.up_proj.weight")
    assert re.search(r"NaN\s+2 on one side only", tip)
    assert "Inf" in tip


def test_without_values_the_structure_is_shown(show: Open) -> None:
    found = run(diff, GOLDEN / "llama" / "hf", GOLDEN / "mistral" / "hf", "--no-values")
    page = show(diff_page(found))
    assert "values were not" in page.locator("#verdict").inner_text()
    expect(page.locator("#heat-title")).to_have_text("Structure")
    assert "shape differs" in page.locator("#structure").inner_text()


def test_a_checkpoint_without_tensors(show: Open) -> None:
    page = show(inspect_page(document({}, dtypes={}, files=0)))
    assert rows(page) == ["Nothing matches."]
    expect(page.locator("#tensors output")).to_have_text("0 tensors, 0 B")


def test_what_is_not_known_is_said_to_be_unknown(show: Open) -> None:
    """Shapes that no table tells, no place in a file, no format, tensors without elements."""
    found = document({"layers.0.wq": [4, 4], "layers.1.wq": [4, 4], "empty": [0, 3], "scalar": []}, stats=True)
    unknown, elsewhere, *_ = found["tensors"]
    unknown["shape"] = None
    del elsewhere["offset"]
    found.update(format=None, why="no such layout", family=None, dims=None, parameters=None, tied=None)
    page = show(inspect_page(found))
    text = page.locator("section").first.inner_text()
    assert text.count("unknown") == 3
    assert "unknown" in page.locator("#tensors").inner_text()
    said = "\n".join(tips(page, "#strip", across=40, down=2))
    assert re.search(r"offset\s+unknown", said)


def test_a_file_made_to_be_in_the_way(show: Open) -> None:
    """Keys of nothing but dots, very long ones, and as many stacks of layers as there are tensors."""
    keys = ["." * 20_000, "k" * 50_000, *(f"stack{at}.{at * 10**5}.x" for at in range(2_000))]
    page = show(inspect_page(document({key: [2] for key in keys}, stats=True, files=2_000)))
    expect(page.locator("#tensors output")).to_contain_text("2,002 tensors")
    assert any(tips(page, "#map", across=9, down=9))
    expect(page.locator("#strip-note")).to_contain_text("2,000 files (the first 1,200 are shown)")
    expect(page.locator("#heat canvas")).to_have_js_property("tagName", "CANVAS")


class TestDetails:
    """What a first look at a page stumbles over."""

    @pytest.mark.parametrize("width", [390, 900, 1241, 1280, 1400, 1920])
    def test_no_table_beside_another_is_cut(self, width: int, show: Open) -> None:
        page = show(inspect_page(document(keys_of_a_model())), width=width)
        cut = "at => at.querySelector('.scroller').scrollWidth - at.querySelector('.scroller').clientWidth"
        assert page.locator("#dtypes").evaluate(cut) <= 0
        expect(page.locator("#dtypes .more")).to_be_hidden()

    def test_a_table_that_goes_on_to_the_right_hints_at_it_until_its_end(self, show: Open) -> None:
        page = show(inspect_page(document(keys_of_a_model(), stats=True)), width=390)
        more = page.locator("#tensors .more")
        expect(more).to_be_visible()
        page.locator("#tensors .scroller").evaluate("at => { at.scrollLeft = at.scrollWidth; }")
        expect(more).to_be_hidden()
        page.locator("#tensors .scroller").evaluate("at => { at.scrollLeft = 0; }")
        expect(more).to_be_visible()

    def test_the_placeholder_shows_its_underscore(self, show: Open) -> None:
        page = show(inspect_page(document(keys_of_a_model())))
        box = page.locator("#tensors input[type=search]")
        assert "q_proj" in str(box.get_attribute("placeholder"))
        seen = box.screenshot()
        box.evaluate("at => { at.placeholder = at.placeholder.replace('_', ' '); }")
        assert box.screenshot() != seen

    @pytest.mark.parametrize("host", ["#map", "#strip", "#heat"])
    def test_the_keyboard_reaches_the_cells(self, host: str, show: Open) -> None:
        page = show(inspect_page(document(keys_of_a_model(), stats=True)))
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("host => document.activeElement?.closest?.(host) !== null", host):
                break
        tip = page.locator("#tip")
        expect(tip).to_be_visible()
        first = tip.inner_text()
        page.keyboard.press("ArrowRight")
        assert tip.inner_text() not in ("", first)
        page.keyboard.press("Tab")
        expect(tip).to_be_hidden()

    @pytest.mark.parametrize(("value", "shown"), [(1.76e-8, "1.76e-8"), (0.0204, "0.0204"), (1.8e-8, "1.80e-8")])
    def test_cells_show_what_the_legend_shows(self, value: float, shown: str, show: Open) -> None:
        found = document(keys_of_a_model(), stats=True)
        for tensor in found["tensors"]:
            tensor["stats"]["std"] = value
        page = show(inspect_page(found))
        assert page.locator("#heat-legend .ticks").inner_text() == shown
        drawn = page.evaluate(
            """() => {
                const texts = [], before = CanvasRenderingContext2D.prototype.fillText;
                CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
                    texts.push(text);
                    before.call(this, text, ...rest);
                };
                document.dispatchEvent(new Event("theme"));
                CanvasRenderingContext2D.prototype.fillText = before;
                return texts;
            }"""
        )
        assert drawn.count(shown) >= LAYERS * len(MODULES)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_the_edges_of_controls_stand_out(self, scheme: str, show: Open) -> None:
        page = show(inspect_page(document(keys_of_a_model())), scheme=scheme)
        for control in ("#theme", "#tensors input", "#map-controls span"):
            edge = page.locator(control).first.evaluate("at => getComputedStyle(at).borderTopColor")
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert contrast(*(as_hex(colour) for colour in (edge, ground))) >= 3, (control, edge, ground)

    @pytest.mark.parametrize(
        ("path", "title"),
        [
            ("demo/hf", "demo/hf"),
            ("models/Llama-3.2-1B", "Llama-3.2-1B"),
            ("run/step-100/", "run/step-100"),
            ("/data/llama/original", "llama/original"),
            ("/h/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123abcd", "meta-llama/Llama-3.2-1B"),
            ("org/name", "name"),
            ("a.safetensors", "a.safetensors"),
            ("https://host/hf", "host/hf"),
            ("s3://hf", "hf"),
            ("/", "/"),
        ],
    )
    def test_the_title_says_which_checkpoint_it_is(self, path: str, title: str) -> None:
        page = inspect_page(document(keys_of_a_model(), path=path))
        assert f"<title>{title}</title>" in page

    def test_a_directory_that_says_little_is_called_after_where_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "hf").mkdir()
        monkeypatch.chdir(tmp_path)
        for path, title in (("hf", f"{tmp_path.name}/hf"), (".", tmp_path.name)):
            assert f"<title>{title}</title>" in inspect_page(document(keys_of_a_model(), path=path))

    def test_the_sides_of_a_difference_are_called_as_the_title_calls_them(self, show: Open) -> None:
        found = difference(path="one/hf")
        page = show(diff_page(found))
        assert page.title() == "one/hf and tuned"
        assert [text.strip() for text in page.locator("#sides h2").all_inner_texts()] == ["Aone/hf", "Btuned"]

    def test_the_page_says_which_command_made_it(self, tmp_path: Path, show: Open) -> None:
        path = tmp_path / "a b"
        path.mkdir()
        save_file({"w": np.zeros(2, np.float32)}, path / "m.safetensors")
        command.run("inspect", path, "--html", tmp_path / "i.html", code=0)
        made = show((tmp_path / "i.html").read_text()).locator(".made")
        said = f"ckpt-convert inspect '{path}' --html {tmp_path / 'i.html'}"
        expect(made).to_have_text(f"Made by ckpt-convert {__version__}: {said}")
        command.run("diff", path, path, "--html", tmp_path / "d.html", code=0)
        expect(show((tmp_path / "d.html").read_text()).locator(".made code")).to_contain_text("ckpt-convert diff ")

    @pytest.mark.parametrize(
        ("word", "shown"),
        [
            ("https://me:pass@host/a?X-Sig=abc", "https://host/a?…"),
            ("https://token@host/a", "https://host/a"),
            ("s3://key:secret@bucket/a", "s3://bucket/a"),
            ("abfss://container@account/a", "abfss://container@account/a"),
            ("--config=https://host/a?X-Sig=abc", "--config=https://host/a?…"),
            ("--store-option=s3://bucket:secret_access_key=a=b", "--store-option=s3://bucket:secret_access_key=…"),
            ("a\nb", "a b"),
            ("--filter=*.mlp.*", "--filter=*.mlp.*"),
        ],
    )
    def test_nothing_secret_is_on_it(self, word: str, shown: str) -> None:
        with click.Context(click.Command("x"), obj=Printed(words=["inspect", word])):
            assert command_line() == shlex.join(["ckpt-convert", "inspect", shown])
        words = ["inspect", "a", "--store-option", "secret_access_key=abc\ndef@", "--json"]
        with click.Context(click.Command("x"), obj=Printed(words=words)):
            assert command_line() == "ckpt-convert inspect a --store-option 'secret_access_key=…' --json"


def as_hex(colour: str) -> str:
    """A colour as the browser computed it, as #rrggbb."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])
