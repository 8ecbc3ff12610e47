"""``inspect --tree``: the modules of a model, and what each holds in all."""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from ckpt_convert.cli import modules
from ckpt_convert.cli.modules import Module, build
from ckpt_convert.cli.tree import Entry
from tests.cli.inspecting import body, on_terminal, run, save, text, write_keys
from tests.helpers import GOLDEN, read_safetensors

HF = GOLDEN / "llama" / "hf"


def entries(*keys: str, nbytes: int = 16) -> list[Entry]:
    return [Entry(key, (4, 2), "BF16", nbytes) for key in keys]


def names(found: tuple[Module, ...], indent: str = "") -> list[str]:
    return [line for m in found for line in (indent + m.name, *names(m.children, indent + "  "))]


def test_equal_layers_share_a_line_and_lonely_modules_are_joined() -> None:
    keys = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("attn.q.weight", "mlp.up.weight")]
    assert names(build(entries(*keys, "model.norm.weight", "lm_head.weight"))) == [
        "lm_head.weight",
        "model",
        "  layers.{0..3}",
        "    attn.q.weight",
        "    mlp.up.weight",
        "  norm.weight",
    ]


def test_layers_that_differ_anywhere_below_are_apart() -> None:
    """Three dense layers before the experts, as DeepSeek has them."""
    dense = [f"layers.{layer}.mlp.{name}" for layer in range(3) for name in ("down", "up")]
    sparse = [
        f"layers.{layer}.mlp.experts.{e}.{name}" for layer in range(3, 8) for e in range(4) for name in ("a", "b")
    ]
    assert names(build(entries(*dense, *sparse))) == [
        "layers",
        "  {0..2}.mlp",
        "    down",
        "    up",
        "  {3..7}.mlp.experts.{0..3}",
        "    a",
        "    b",
    ]
    (other, *_) = build([*entries("layers.0.w", "layers.2.w"), Entry("layers.1.w", (4, 3), "BF16", 24)])
    assert [child.name for child in other.children] == ["{0,2}.w", "1.w"]


def test_the_order_of_keys_in_files_makes_no_difference() -> None:
    assert names(build(entries("l.0.a", "l.0.b", "l.1.b", "l.1.a"))) == ["l.{0,1}", "  a", "  b"]


def test_a_module_may_have_the_name_of_a_tensor() -> None:
    (found,) = build(entries("a", "a.b"))
    assert (found.name, found.tensors, [child.name for child in found.children]) == ("a", 2, ["b"])


def test_sums_are_those_of_the_tensors() -> None:
    """Every module's bytes, parameters and tensors, against a plain sum over the keys that start with its name."""
    tensors = read_safetensors(HF)
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for key, tensor in tensors.items():
        parts = key.split(".")
        for end in range(1, len(parts) + 1):
            total = sizes[".".join(parts[:end])]
            total[0] += 1
            total[1] += tensor.numel()
            total[2] += tensor.numel() * tensor.element_size()
    found = build([Entry(k, tuple(t.shape), "F32", t.numel() * 4) for k, t in tensors.items()])

    def walk(level: tuple[Module, ...], above: str, times: int) -> None:
        for module in level:
            name = (above + module.name).replace("{0..2}", "0")
            assert [
                n * times // (module.copies * times) for n in (module.tensors, module.parameters, module.nbytes)
            ] == (sizes[name])
            walk(module.children, f"{name}.", times * module.copies)

    walk(found, "", 1)
    assert sum(module.nbytes for module in found) == sum(t.numel() * 4 for t in tensors.values())


@pytest.mark.cli
def test_91_000_tensors_are_few_objects() -> None:
    keys = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.{kind}"
        for layer in range(61)
        for expert in range(256)
        for name in ("gate", "up", "down")
        for kind in ("weight", "weight_scale_inv")
    ]
    (found,) = build(entries(*keys))
    assert (found.name, found.copies, found.tensors) == (
        "model.layers.{0..60}.mlp.experts.{0..255}",
        61 * 256,
        len(keys),
    )


def test_a_key_of_thousands_of_parts_is_no_problem() -> None:
    (found,) = build(entries("a." * 5000 + "w"))
    assert found.name == "a." * 5000 + "w"


class TestLines:
    def test_plain(self) -> None:
        assert body(text(HF, "--tree", "--filter", "model.*norm*")) == [
            "model                                                 504  2.02 kB",
            "├─ layers.{0..2}                                  ×3  432  1.73 kB",
            "│  ├─ input_layernorm.weight           [72]  F32      216    864 B",
            "│  └─ post_attention_layernorm.weight  [72]  F32      216    864 B",
            "└─ norm.weight                         [72]  F32       72    288 B",
            "",
            "7 of 30 tensors match model.*norm*, 2.02 kB",
        ]

    def test_depth(self) -> None:
        lines = body(text(HF, "--depth", "2"))
        assert [line.split()[-1] for line in lines[2:4]] == ["kB", "tensors"]
        assert lines[3].startswith("├─ layers.{0..2}")
        assert lines[3].endswith("27 tensors")
        assert len(lines) == 5
        assert len(body(text(HF, "--tree", "--depth", "1"))) == 2

    def test_siblings_by_size(self) -> None:
        lines = body(text(HF, "--tree", "--sort", "size"))
        assert [line.split()[0] for line in lines if line[0] not in "├│└"] == ["model", "lm_head.weight"]
        assert lines[1].split()[1] == "layers.{0..2}"
        lines = body(text(HF, "--tree", "--sort", "size:asc"))
        assert lines[0].split()[0] == "lm_head.weight"
        assert body(text(HF, "--tree", "--sort", "name:desc"))[0].split()[0] == "model"

    def test_holes_are_pointed_out_but_not_behind_a_filter(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "a.safetensors", [f"layers.{layer}.{n}" for layer in (0, 1, 3) for n in "wb"])
        assert body(text(tmp_path / "a.safetensors", "--tree"))[0].endswith("missing 2")
        assert "missing" not in text(tmp_path / "a.safetensors", "--tree", "--filter", "layers.*")

    def test_shares_are_of_the_whole_checkpoint(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        save(tmp_path / "a.safetensors", a__w=torch.zeros(3), b__w=torch.zeros(1))
        (line, *_) = body(on_terminal(monkeypatch, 80, tmp_path / "a.safetensors", "--tree", "--filter", "a.*"))
        assert line == "a.w  [3]  F32  3  12 B  75.0%  ███████████████"

    def test_ranks_and_what_they_hold(self) -> None:
        assert any(line.endswith("2 × [36, 72]") for line in body(text(GOLDEN / "llama" / "meta-mp2", "--tree")))

    def test_ascii_where_the_output_has_no_lines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(modules, "can_say", lambda text: text.isascii())
        lines = body(text(HF, "--tree"))
        assert lines[2].startswith("|- embed_tokens.weight")
        assert lines[-1].startswith("`- norm.weight")

    def test_no_shape_is_counted_that_is_not_known(self, tmp_path: Path) -> None:
        for file in (GOLDEN / "llama" / "meta-mp2").glob("*.pth"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (line, *_) = [line for line in body(text(tmp_path, "--tree")) if line.startswith("norm.weight")]
        assert line.split() == ["norm.weight", "[72]", "F32", "576", "B", "on", "2", "ranks"]


@pytest.mark.parametrize(
    "options",
    [
        ["--tree", "--full"],
        ["--depth", "2", "--by-shard"],
        ["--tree", "--sort", "offset"],
        ["--tree", "--json"],
        ["--by-shard", "--json"],
        ["--depth", "1", "--html", "-"],
        ["--tree", "--stats"],
        ["--depth", "0"],
        ["--workers", "2"],
        ["--stats", "--by-shard"],
        ["--stats", "--sort", "offset"],
        ["--html", "-", "--json"],
        ["--html", ""],
    ],
    ids=" ".join,
)
def test_options_that_would_be_ignored_are_refused(options: list[str]) -> None:
    assert "Usage:" in run(HF, *options, code=2).output


def test_the_encoding_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_convert.cli.text import can_say

    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert can_say("×")
    assert not can_say("├")
