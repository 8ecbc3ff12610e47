"""Heads of which only a part rotates: a family like StableLM, with transformers and torch as the judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ckpt_convert
from ckpt_convert.errors import ConfigError
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.config import CONFIG, base_dims, optional_bool
from ckpt_convert.models.core.picking import columns
from ckpt_convert.models.core.rope import rotary_dim
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.core.table_check import check_table
from ckpt_convert.models.parts.decoder import ATTENTION, EMBEDDING, FFN, OUTPUT
from tests.helpers import Tensors, assert_same, read_safetensors, sums

HEADS, KV_HEADS, HEAD_DIM, DIM, LAYERS = 6, 3, 12, 72, 2
FACTOR, TURNED = 0.5, 6


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    sizes = base_dims(config)
    return {
        **sizes,
        "rotary_dim": rotary_dim(config, sizes["head_dim"], default=0.25),
        "qk_norm": int(optional_bool(config, "qk_layernorm", CONFIG, False)),
    }


def norm_bias(name: str, hf: str, native: str) -> Row:
    return Row(f"{name}.bias", ("dim",), hf=Key(f"{hf}.bias"), native=Key(f"{native}.bias"))


def head_norm(name: str, count: str) -> Row:
    """A norm for each head."""
    return Row(
        f"attention.{name}_norm",
        ("head_dim",),
        heads="1",
        rotary_dim="rotary_dim",
        enabled_by="qk_norm",
        hf=Key(f"model.layers.{{layer}}.self_attn.{name}_layernorm.norms.{{{count}}}.weight", rope="half"),
        native=Key(f"layers.{{layer}}.attn.{name}_norm.{{{count}}}.scale", rope="interleaved"),
    )


STABLELM = Family(
    name="stablelm",
    title="StableLM",
    model_types=("stablelm",),
    dims=dims,
    indices={"layer": "n_layers", "head": "n_heads", "kv_head": "n_kv_heads"},
    unverified={"native": "it is the layout of this test"},
    rows=columns(
        (
            *EMBEDDING,
            *(row.replace(rotary_dim="rotary_dim") if row.heads else row for row in ATTENTION),
            norm_bias("attention_norm", "model.layers.{layer}.input_layernorm", "layers.{layer}.sa_norm"),
            head_norm("q", "head"),
            head_norm("k", "kv_head"),
            *FFN,
            norm_bias("ffn_norm", "model.layers.{layer}.post_attention_layernorm", "layers.{layer}.mlp_norm"),
            *OUTPUT,
            norm_bias("norm", "model.norm", "norm"),
        ),
        "hf",
        "native",
    ),
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> transformers.PreTrainedModel:
    """A model in ``tmp_path / "hf"``, every element of it another number; its family is known."""
    monkeypatch.setitem(FAMILIES.registered, "stablelm", STABLELM)
    config = transformers.StableLmConfig(
        hidden_size=DIM, intermediate_size=104, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=56, qk_layernorm=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": FACTOR},
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config)
    count = 0
    with torch.no_grad():
        for parameter in made.parameters():
            numbers = torch.arange(count, count + parameter.numel()).reshape(parameter.shape)
            parameter.copy_(torch.sin(numbers.double()) / 4 + (parameter.dim() == 1))
            count += parameter.numel()
    made.save_pretrained(tmp_path / "hf")
    return made.eval()


def neighbours(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The first rows of each head that rotate side by side, i with i + TURNED/2; the others where they are."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    first, second = by_head[:, : TURNED // 2], by_head[:, TURNED // 2 : TURNED]
    turned = torch.stack([first, second], dim=2).flatten(1, 2)
    return torch.cat([turned, by_head[:, TURNED:]], dim=1).reshape(rows.shape)


def expected(hf: Tensors) -> Tensors:
    """Some tensors of the native layout, by a formula of its own."""
    out = {}
    for layer in range(LAYERS):
        here, there = f"model.layers.{layer}.self_attn", f"layers.{layer}.attn"
        for name, heads in (("q", HEADS), ("k", KV_HEADS)):
            out[f"{there}.{name}_proj.weight"] = neighbours(hf[f"{here}.{name}_proj.weight"], heads)
            for head in range(heads):
                norm = hf[f"{here}.{name}_layernorm.norms.{head}.weight"]
                out[f"{there}.{name}_norm.{head}.scale"] = neighbours(norm, 1)
        out[f"{there}.v_proj.weight"] = hf[f"{here}.v_proj.weight"]
    return out


def test_only_what_rotates_is_reordered_and_norms_follow(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    report = ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native", verify=True)
    assert report.family == "stablelm"
    native, wanted = read_safetensors(tmp_path / "native"), expected(read_safetensors(tmp_path / "hf"))
    assert_same({key: native[key] for key in wanted}, wanted)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(tmp_path / "hf")
    in_memory = ckpt_convert.convert_state_dict(
        model.state_dict(), model.config.to_dict(), source="hf", target="native"
    )
    assert isinstance(in_memory, dict)
    assert_same({key: in_memory[key] for key in wanted}, wanted)


def scores(weights: Tensors, x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """q · k of the first layer, turned as each layout does it: norms, then the rotation of neighbours or of halves."""
    angles = torch.arange(x.shape[0])[:, None] / 10000.0 ** (torch.arange(0, TURNED, 2) / TURNED)
    out = []
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        module = "layers.0.attn" if interleaved else "model.layers.0.self_attn"
        norm = f"{module}.{name}_norm.{{}}.scale" if interleaved else f"{module}.{name}_layernorm.norms.{{}}.weight"
        y = (x @ weights[f"{module}.{name}_proj.weight"].T).reshape(len(x), heads, HEAD_DIM)
        y = torch.nn.functional.layer_norm(y, (HEAD_DIM,))
        y = y * torch.stack([weights[norm.format(head)] for head in range(heads)])
        turned, rest = y[..., :TURNED], y[..., TURNED:]
        if interleaved:
            pairs = torch.view_as_complex(turned.reshape(len(x), heads, -1, 2).contiguous())
            turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)
        else:
            cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
            half = torch.cat([-turned[..., TURNED // 2 :], turned[..., : TURNED // 2]], -1)
            turned = turned * cos + half * sin
        out.append(torch.cat([turned, rest], -1))
    q, k = out
    return torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(HEADS // KV_HEADS, 1))


def test_both_layouts_compute_the_same(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    """What a wrong order of rows, or of a norm, would show in; a round trip would not."""
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native")
    x = torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))
    hf = scores(read_safetensors(tmp_path / "hf"), x, interleaved=False)
    native = scores(read_safetensors(tmp_path / "native"), x, interleaved=True)
    assert torch.allclose(hf, native, atol=1e-4, rtol=1e-5)
    assert hf.std() > 0.1


def test_a_table_that_knows_of_whole_heads_alone_is_refused(
    model: transformers.PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But within one format, and where all of each head rotates, it does."""
    naive = STABLELM.replace(rows=lambda rows: (row.replace(rotary_dim=None) for row in rows if not row.derived))
    monkeypatch.setitem(FAMILIES.registered, "stablelm", naive)
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is 0\.5, so only a part of each head rotates"):
        ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native")
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        ckpt_convert.convert_state_dict(model.state_dict(), model.config.to_dict(), source="hf", target="native")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "same", to="hf", verify=True)
    config = model.config.to_dict()
    config["rope_parameters"]["partial_rotary_factor"] = 1.0
    ckpt_convert.convert_state_dict(model.state_dict(), config, source="hf", target="native")


def test_a_norm_that_does_not_follow_its_rows_is_refused() -> None:
    def unfit(row: Row) -> Row:
        keys = {name: replace(key, rope=None) for name, key in row.columns.items()}
        return row.replace(heads=None, rotary_dim=None, **keys) if row.name == "attention.q_norm" else row

    with pytest.raises(ValueError, match=r"has the RoPE layout of 'attention\.q'"):
        check_table(STABLELM.replace(rows=lambda rows: (unfit(row) for row in rows if not row.derived)))


@pytest.mark.parametrize("factor", [0.24, 1.5, 0.0])
def test_a_factor_that_gives_no_even_part_of_a_head_is_refused(factor: float) -> None:
    config = {"hidden_size": 120, "num_attention_heads": 10, "partial_rotary_factor": factor}
    with pytest.raises(ConfigError):
        rotary_dim(config, 13)
