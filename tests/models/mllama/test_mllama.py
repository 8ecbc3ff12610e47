"""Llama 3.2 Vision through every column, its tables of tiles, and its configs, against transformers and plain torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import ckpt_convert
from ckpt_convert import ConfigError, convert_checkpoint, convert_state_dict
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.mllama import config as mllama_config
from ckpt_convert.models.mllama import params as mllama_params
from ckpt_convert.models.mllama.config import VisionModel, aspect_ratios, dims, sets
from ckpt_convert.models.mllama.params import cross_layers, hf_to_params, is_params, params_to_hf
from ckpt_convert.tensors.lazy import LazyTensor, concat
from tests.helpers import GOLDEN, Tensors, assert_same, bits, read_meta, read_safetensors, sums

TILES = 3


def all_ratios(tiles: int) -> list[tuple[int, int]]:
    """As transformers' image processor has them, which needs torchvision to be imported."""
    return [(one, other) for one in range(1, tiles + 1) for other in range(1, tiles + 1) if one * other <= tiles]


RATIOS = all_ratios(TILES)
TEXT: dict[str, Any] = {
    "vocab_size": 56, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "cross_attention_layers": [1, 4], "max_position_embeddings": 8192, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "attention_heads": 4, "num_hidden_layers": 3, "num_global_layers": 2, "intermediate_size": 44,
    "vision_output_dim": 96, "image_size": 28, "patch_size": 7, "max_num_tiles": TILES,
    "intermediate_layers_indices": [0, 1], "supported_aspect_ratios": [list(ratio) for ratio in RATIOS],
}  # fmt: skip
SMALL = VisionModel(32, 3, 2, 4, 44, 3, 7, (0, 1))
TABLES = (
    "vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision_model.pre_tile_positional_embedding.embedding.weight",
    "vision_model.post_tile_positional_embedding.embedding.weight",
)
GRIDS = {
    "native": (
        "encoder.clip.token_pos_embedding.global_token_positional_embedding",
        "encoder.clip.pre_tile_pos_embed.embedding",
        "encoder.clip.post_tile_pos_embed.embedding",
    ),
    "meta": (
        "vision_model.vision_encoder.gated_positional_embedding",
        "vision_model.vision_encoder.pre_tile_pos_embed.embedding",
        "vision_model.vision_encoder.post_tile_pos_embed.embedding",
    ),
}
V11B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vision_chunk_size": 448,
    "vision_max_num_chunks": 4, "vision_num_cross_attention_layers": 8,
}  # fmt: skip
V90B = {
    **V11B, "dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "vision_chunk_size": 560,
    "vision_num_cross_attention_layers": 20,
}  # fmt: skip

Grids = dict[str, torch.Tensor]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Meta's code have a vision model that fits a test."""
    for module in (mllama_config, mllama_params):
        monkeypatch.setattr(module, "WIRED", SMALL)


def coded(tensors: Tensors) -> Tensors:
    """Tensors of these shapes in which no number is there twice."""
    out, start = {}, 1
    for key, tensor in tensors.items():
        out[key] = torch.arange(start, start + tensor.numel(), dtype=torch.float32).reshape(tensor.shape)
        start += tensor.numel()
    assert start < 1 << 24  # all of them are exact in float32
    return out


def table_of(grid: torch.Tensor) -> torch.Tensor:
    """Hugging Face's table of Meta's grid, as its converter from Meta's files makes it."""
    tiles, _, tokens, width = grid.shape
    ratios = all_ratios(tiles)
    table = torch.zeros(len(ratios) + 1, tiles, tokens, width)
    for number, (height, breadth) in enumerate(ratios, start=1):
        table[number, : height * breadth] = grid[:height, :breadth].reshape(height * breadth, tokens, width)
    return table.flatten(1)


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as transformers saves it, every element another number: also where its tables repeat themselves."""
    model = MllamaForConditionalGeneration(
        MllamaConfig(text_config=MllamaTextConfig(**TEXT), vision_config=MllamaVisionConfig(**VISION))
    )
    numbers = coded({name: tensor.detach() for name, tensor in model.named_parameters()})
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(numbers[name])
    path = tmp_path_factory.mktemp("mllama")
    model.save_pretrained(path, max_shard_size="200KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture(scope="module")
def whole(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with tables that are as Hugging Face's converter makes them."""
    path = tmp_path_factory.mktemp("consistent") / "mllama"
    shutil.copytree(tables, path)
    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for key in set(TABLES) & tensors.keys():
            tokens = tensors[key].shape[1] // (TILES * 32)
            start = int(tensors[key][1, 0])
            grid = torch.arange(start, start + TILES * TILES * tokens * 32, dtype=torch.float32)
            tensors[key] = table_of(grid.reshape(TILES, TILES, tokens, 32))
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return path


def merged(ranks: list[Tensors], config: dict[str, Any]) -> Tensors:
    """Meta's ranks as Hugging Face's tensors, as its converter reads them, in plain torch."""
    text, vision = config["text_config"], config["vision_config"]
    heads, kv, width = text["num_attention_heads"], text["num_key_value_heads"], text["hidden_size"]
    out: Tensors = {}

    def same(key: str) -> torch.Tensor:
        for rank in ranks:
            assert torch.equal(rank[key], ranks[0][key]), key
        return ranks[0][key]

    def cat(key: str, axis: int = 0) -> torch.Tensor:
        return torch.cat([rank[key] for rank in ranks], axis)

    def halves(tensor: torch.Tensor, count: int) -> torch.Tensor:
        return tensor.view(count, len(tensor) // count // 2, 2, width).transpose(1, 2).reshape(tensor.shape)

    embeddings = [cat(f"text_model.{key}.weight") for key in ("tok_embeddings", "learnable_embedding")]
    out["language_model.model.embed_tokens.weight"] = torch.cat(embeddings)
    out["language_model.lm_head.weight"] = cat("text_model.output.weight")
    out["language_model.model.norm.weight"] = same("text_model.norm.weight")
    cross = text["cross_attention_layers"]
    own = [layer for layer in range(text["num_hidden_layers"]) if layer not in cross]
    for layer in range(text["num_hidden_layers"]):
        ours = f"language_model.model.layers.{layer}"
        is_cross = layer in cross
        theirs = f"text_model.cross_attention_layers.{cross.index(layer)}" if is_cross else ""
        theirs = theirs or f"text_model.layers.{own.index(layer)}"
        attention = "cross_attn" if is_cross else "self_attn"
        for name in "qkv":
            whole = cat(f"{theirs}.attention.w{name}.weight")
            if not is_cross and name != "v":
                whole = halves(whole, heads if name == "q" else kv)
            out[f"{ours}.{attention}.{name}_proj.weight"] = whole
        out[f"{ours}.{attention}.o_proj.weight"] = cat(f"{theirs}.attention.wo.weight", 1)
        out[f"{ours}.input_layernorm.weight"] = same(f"{theirs}.attention_norm.weight")
        out[f"{ours}.post_attention_layernorm.weight"] = same(f"{theirs}.ffn_norm.weight")
        for mine, key, axis in (("gate", "w1", 0), ("down", "w2", 1), ("up", "w3", 0)):
            out[f"{ours}.mlp.{mine}_proj.weight"] = cat(f"{theirs}.feed_forward.{key}.weight", axis)
        if is_cross:
            for name in "qk":
                out[f"{ours}.cross_attn.{name}_norm.weight"] = same(f"{theirs}.attention.{name}_norm.weight")
            out[f"{ours}.cross_attn_attn_gate"] = same(f"{theirs}.gate_attn")[0].view(1)
            out[f"{ours}.cross_attn_mlp_gate"] = same(f"{theirs}.gate_ffwd")[0].view(1)
    encoder = "vision_model.vision_encoder"
    out["multi_modal_projector.weight"] = cat("vision_model.vision_projection.weight")
    out["multi_modal_projector.bias"] = cat("vision_model.vision_projection.bias")
    side = vision["patch_size"]
    out["vision_model.patch_embedding.weight"] = cat(f"{encoder}.conv1._linear.weight").reshape(-1, 3, side, side)
    out["vision_model.class_embedding"] = same(f"{encoder}.class_embedding")
    positions = "vision_model.gated_positional_embedding"
    out[f"{positions}.embedding"] = same(f"{encoder}.positional_embedding")
    out[f"{positions}.gate"] = same(f"{encoder}.gated_positional_embedding_gate")
    out[f"{positions}.tile_embedding.weight"] = table_of(same(f"{encoder}.gated_positional_embedding"))
    for name in ("pre", "post"):
        place = f"vision_model.{name}_tile_positional_embedding"
        out[f"{place}.embedding.weight"] = table_of(same(f"{encoder}.{name}_tile_pos_embed.embedding"))
        out[f"{place}.gate"] = same(f"{encoder}.{name}_tile_pos_embed.gate")
        for part in ("weight", "bias"):
            out[f"vision_model.layernorm_{name}.{part}"] = same(f"{encoder}.ln_{name}.{part}")
    for kind, count in (("transformer", "num_hidden_layers"), ("global_transformer", "num_global_layers")):
        for layer in range(vision[count]):
            theirs, ours = f"{encoder}.{kind}.resblocks.{layer}", f"vision_model.{kind}.layers.{layer}"
            for name in "qkvo":
                out[f"{ours}.self_attn.{name}_proj.weight"] = cat(f"{theirs}.attn.w{name}.weight", int(name == "o"))
            for part in ("weight", "bias"):
                out[f"{ours}.mlp.fc1.{part}"] = cat(f"{theirs}.mlp.c_fc.{part}")
                out[f"{ours}.input_layernorm.{part}"] = same(f"{theirs}.ln_1.{part}")
                out[f"{ours}.post_attention_layernorm.{part}"] = same(f"{theirs}.ln_2.{part}")
            out[f"{ours}.mlp.fc2.weight"] = cat(f"{theirs}.mlp.c_proj.weight", 1)
            out[f"{ours}.mlp.fc2.bias"] = same(f"{theirs}.mlp.c_proj.bias")
            if kind == "global_transformer":
                for gate in ("gate_attn", "gate_ffn"):
                    out[f"{ours}.{gate}"] = same(f"{theirs}.{gate}")
    return out


def config_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return content


def without_record(directory: Path, name: Path) -> Path:
    """The weights and params.json alone, as Meta publishes them."""
    name.mkdir()
    for file in directory.iterdir():
        if file.is_file() and (file.suffix == ".pth" or file.name == "params.json"):
            shutil.copy(file, name / file.name)
    return name


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_to_meta_and_back(ranks: int, whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "meta", to="meta", model_parallel=ranks, verify=True)
    found = read_meta(tmp_path / "meta")
    assert len(found) == ranks
    assert_same(merged(found, config_of(whole)), read_safetensors(whole))
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(whole)
    meta = without_record(tmp_path / "meta", tmp_path / "published")
    convert_checkpoint(meta, tmp_path / "anew", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "anew"), read_safetensors(whole))
    convert_checkpoint(tmp_path / "anew", tmp_path / "again", to="meta", verify=True)
    assert sums(tmp_path / "again") == sums(meta)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2)])
def test_over_other_ranks(before: int, after: int, whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(whole, tmp_path / "before", to="meta", model_parallel=before)
    convert_checkpoint(tmp_path / "before", tmp_path / "after", to="meta", model_parallel=after, verify=True)
    assert_same(merged(read_meta(tmp_path / "after"), config_of(whole)), read_safetensors(whole))


# What a grid of tiles and a table of aspect ratios cannot hold of each other


def meta_with(whole: Path, directory: Path, change: Callable[[Grids], None]) -> Path:
    """A published meta checkpoint of two ranks whose grids are changed."""
    convert_checkpoint(whole, directory / "made", to="meta", model_parallel=2)
    meta = without_record(directory / "made", directory / "meta")
    for file in meta.glob("*.pth"):
        tensors = torch.load(file, weights_only=True)
        change({key: tensors[key] for key in GRIDS["meta"]})
        torch.save(tensors, file)
    return meta


def numbered(grids: Grids) -> None:
    """Every cell of every grid another number, also those that no image has."""
    for at, grid in enumerate(grids.values()):
        grid.copy_(torch.arange(grid.numel(), dtype=torch.float32).reshape(grid.shape) + 1 + 100000 * at)


def test_a_table_that_contradicts_itself_comes_back(tables: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(tables, tmp_path / "native", to="native", verify=True)
    assert report.drops == sorted(TABLES)
    native, source = read_safetensors(tmp_path / "native"), read_safetensors(tables)
    for key, grid in zip(TABLES, GRIDS["native"], strict=True):
        # As torchtune reads it: of the shapes with all tiles, the last one wins; what none of them has is zero.
        tokens = native[grid].shape[2]
        expected = torch.zeros(TILES, TILES, tokens, 32)
        for number, (height, width) in enumerate(RATIOS, start=1):
            if height * width == TILES:
                expected[:height, :width] = source[key][number].reshape(height, width, tokens, 32)
        assert torch.equal(native[grid], expected)
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(tables)
    # A second trip is no different, and neither is one over a third format.
    convert_checkpoint(tmp_path / "back", tmp_path / "again", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "again"), native)
    convert_checkpoint(tmp_path / "again", tmp_path / "home", to="hf", verify=True)
    assert sums(tmp_path / "home") == sums(tables)


@pytest.mark.usefixtures("small")
def test_a_table_comes_back_over_two_formats(tables: Path, tmp_path: Path) -> None:
    convert_checkpoint(tables, tmp_path / "native", to="native")
    convert_checkpoint(tmp_path / "native", tmp_path / "meta", to="meta", model_parallel=4, verify=True)
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(tables)


@pytest.mark.usefixtures("small")
def test_cells_that_no_image_has_come_back(whole: Path, tmp_path: Path) -> None:
    meta = meta_with(whole, tmp_path, numbered)
    assert all(grid.all() for rank in read_meta(meta) for key, grid in rank.items() if key in GRIDS["meta"])
    report = convert_checkpoint(meta, tmp_path / "hf", to="hf", verify=True)
    assert report.drops == sorted(GRIDS["meta"])
    config = config_of(whole)
    assert_same(merged(read_meta(meta), config), read_safetensors(tmp_path / "hf"))
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(meta)
    convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native", verify=True)
    native = read_safetensors(tmp_path / "native")
    for mine, theirs in zip(GRIDS["native"], GRIDS["meta"], strict=True):
        assert torch.equal(native[mine], read_meta(meta)[0][theirs])
    convert_checkpoint(tmp_path / "native", tmp_path / "home", to="meta", verify=True)
    assert sums(tmp_path / "home") == sums(meta)


@pytest.mark.usefixtures("small")
def test_cells_come_back_over_two_formats(whole: Path, tmp_path: Path) -> None:
    meta = meta_with(whole, tmp_path, numbered)
    convert_checkpoint(meta, tmp_path / "native", to="native")
    convert_checkpoint(tmp_path / "native", tmp_path / "hf", to="hf", verify=True)
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(meta)


def change_one(path: Path, key: str, where: tuple[int, ...], value: float) -> None:
    (file,) = [f for f in path.glob("*.safetensors") if key in safetensors.torch.load_file(f)]
    tensors = safetensors.torch.load_file(file)
    tensors[key][where] = value
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def test_what_was_trained_since_wins_over_what_was_carried(tables: Path, tmp_path: Path) -> None:
    convert_checkpoint(tables, tmp_path / "native", to="native")
    change_one(tmp_path / "native", GRIDS["native"][1], (0, 0, 0, 5), -7.0)
    convert_checkpoint(tmp_path / "native", tmp_path / "hf", to="hf", verify=True)
    found, source = read_safetensors(tmp_path / "hf"), read_safetensors(tables)
    grid = read_safetensors(tmp_path / "native")[GRIDS["native"][1]]
    assert bits(found[TABLES[1]]) == bits(table_of(grid))
    assert (found[TABLES[1]] == -7.0).sum() == len(RATIOS)
    for key in (TABLES[0], TABLES[2]):
        assert bits(found[key]) == bits(source[key])  # these were not


@pytest.mark.usefixtures("small")
def test_a_table_that_was_trained_since_wins_over_the_grid(whole: Path, tmp_path: Path) -> None:
    meta = meta_with(whole, tmp_path, numbered)
    convert_checkpoint(meta, tmp_path / "hf", to="hf")
    number = RATIOS.index((1, 3)) + 1
    change_one(tmp_path / "hf", TABLES[2], (number, 2 * 32), -7.0)
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    before, after = read_meta(meta)[0], read_meta(tmp_path / "back")[0]
    for at in (0, 1):
        assert torch.equal(before[GRIDS["meta"][at]], after[GRIDS["meta"][at]])
    grid = after[GRIDS["meta"][2]]
    assert grid[0, 2, 0, 0] == -7.0
    assert not grid[1:, 2].any()
    assert torch.equal(grid[0, :2], before[GRIDS["meta"][2]][0, :2])


def test_another_dtype_is_another_value(tables: Path, tmp_path: Path) -> None:
    convert_checkpoint(tables, tmp_path / "native", to="native", dtype="bfloat16", verify=True)
    convert_checkpoint(tmp_path / "native", tmp_path / "hf", to="hf", verify=True)
    found = read_safetensors(tmp_path / "hf")[TABLES[1]]
    assert found.dtype == torch.bfloat16
    assert bits(found.float()) == bits(table_of(read_safetensors(tmp_path / "native")[GRIDS["native"][1]].float()))


def test_the_same_format_is_a_copy_whatever_the_tables_hold(tables: Path, tmp_path: Path) -> None:
    convert_checkpoint(tables, tmp_path / "hf", to="hf", shards=1, verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(tables))
    found = convert_state_dict(read_safetensors(tables), config_of(tables), source="hf", target="hf")
    assert isinstance(found, dict)
    assert_same(found, read_safetensors(tables))


def test_a_difference_in_what_repeats_itself_is_a_difference(tables: Path, tmp_path: Path) -> None:
    shutil.copytree(tables, tmp_path / "other")
    change_one(tmp_path / "other", TABLES[1], (0, 0), -7.0)  # the row of no aspect ratio
    with open_identified(tables) as one, open_identified(tmp_path / "other") as other:
        from ckpt_convert.analysis.diff.compare import compare_checkpoints

        found = compare_checkpoints(one, other)
    assert [change.key for change in found.changes if change.status != "same"] == [TABLES[1]]


def test_verify_reads_what_is_carried(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_convert.convert import shards

    usual = shards.passthrough_files

    def shifted(*arguments: Any) -> list[Any]:
        files = usual(*arguments)
        return [replace(files[0], tensors=tuple(replace(one, tensor=rolled(one.tensor)) for one in files[0].tensors))]

    def rolled(tensor: LazyTensor) -> LazyTensor:
        rows = tensor.shape[0]
        return concat([tensor.narrow(0, 1, rows - 1), tensor.narrow(0, 0, 1)], 0)

    monkeypatch.setattr(shards, "passthrough_files", shifted)
    with pytest.raises(ckpt_convert.VerificationError) as error:
        convert_checkpoint(tables, tmp_path / "out", to="native", verify=True)
    assert all(f"{key}: differs from {key} at byte " in str(error.value) for key in TABLES)
    monkeypatch.setattr(shards, "passthrough_files", lambda *arguments: [])
    with pytest.raises(ckpt_convert.VerificationError) as error:
        convert_checkpoint(tables, tmp_path / "out", to="native", verify=True)
    assert all(f"{key}: is not kept in the output's record" in str(error.value) for key in TABLES)


def test_the_words_of_a_plan_say_it(tables: Path) -> None:
    from ckpt_convert.convert import api, explain

    plan = api.plan_conversion(tables, to="native")
    moves = {move.source: move for move in explain.explain_plan(plan)}
    assert moves[TABLES[1]].steps == ("reshape",)
    assert moves["language_model.model.embed_tokens.weight"].steps == ("split off",)
    assert moves["language_model.model.layers.0.self_attn.q_proj.weight"].steps == ("rope half→interleaved",)
    assert moves["language_model.model.layers.1.cross_attn.q_proj.weight"].steps == (explain.COPY,)


@pytest.mark.usefixtures("small")
def test_a_grid_of_four_tiles_is_read_as_torchtune_reads_it(tmp_path: Path) -> None:
    """The golden case has consistent tables; of others, torchtune takes the last shape with all four tiles."""
    source = read_safetensors(GOLDEN / "mllama" / "hf")
    for at, key in enumerate(TABLES):
        source[key] = torch.arange(source[key].numel(), dtype=torch.float32).reshape(source[key].shape) + at
    config = json.loads((GOLDEN / "mllama" / "hf" / "config.json").read_text())
    found = convert_state_dict(source, config, source="hf", target="native")
    assert isinstance(found, dict)
    for key, grid in zip(TABLES, GRIDS["native"], strict=True):
        expected = torch.zeros_like(found[grid])
        for number, (height, width) in enumerate(config["vision_config"]["supported_aspect_ratios"], start=1):
            if height * width == 4:
                expected[:height, :width] = source[key][number].reshape(height, width, *expected.shape[2:])
        assert torch.equal(found[grid], expected)


# The model


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("through", ["native", "meta"])
def test_the_same_logits_after_a_trip(through: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: Any = MllamaConfig(text_config=MllamaTextConfig(**TEXT), vision_config=MllamaVisionConfig(**VISION))
    model: Any = MllamaForConditionalGeneration(config)
    model.eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "gate" in name or "embedding" in name:
                tensor.normal_()  # transformers starts them at zero
            if "tile_" in name and "weight" in name:
                tensor.copy_(table_of(torch.randn(TILES, TILES, tensor.shape[1] // (TILES * 32), 32)))
    model.save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"model_parallel": 4} if through == "meta" else {}
    convert_checkpoint(tmp_path / "source", tmp_path / "there", to=through, **options)
    there = tmp_path / "there"
    if through == "meta":
        there = without_record(there, tmp_path / "published")  # so that the config is the one that params.json gives
    convert_checkpoint(there, tmp_path / "back", to="hf")
    back: Any = MllamaForConditionalGeneration.from_pretrained(tmp_path / "back")
    back.eval()
    inputs = {
        "input_ids": torch.arange(20).reshape(1, 20),
        "pixel_values": torch.rand(1, 1, TILES, 3, 28, 28),
        "aspect_ratio_ids": torch.tensor([[RATIOS.index((1, 3)) + 1]]),
        "aspect_ratio_mask": torch.ones(1, 1, TILES, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 20, 1, TILES, dtype=torch.long),
    }
    with torch.no_grad():
        text = [one(input_ids=inputs["input_ids"]).logits for one in (model, back)]
        seen = [one(**inputs).logits for one in (model, back)]
    assert torch.equal(*text)
    assert torch.equal(*seen)
    assert not torch.equal(text[0], seen[0])


# Configs


def hf_of(params: dict[str, Any]) -> dict[str, Any]:
    return params_to_hf(params, Weights(vocab_size=None)).content


@pytest.mark.parametrize(("params", "name", "ranks"), [(V11B, "11B", 1), (V90B, "90B", 8)])
def test_released_params_come_back_exactly(params: dict[str, Any], name: str, ranks: int) -> None:
    config = hf_of(params)
    assert hf_to_params(config).content == params
    family = FAMILIES["mllama"].params
    assert family is not None
    assert family.release(config) == f"Llama 3.2 {name} Vision"
    assert family.model_parallel(config) == ranks


def test_the_generated_config_is_what_transformers_takes_by_itself(tmp_path: Path) -> None:
    """MllamaConfig's defaults are those of the release of 11B."""
    (tmp_path / "config.json").write_text(json.dumps(hf_of(V11B)))
    found: Any = AutoConfig.from_pretrained(tmp_path)
    theirs: Any = MllamaConfig()
    for part in ("text_config", "vision_config"):
        mine, expected = getattr(found, part).to_dict(), getattr(theirs, part).to_dict()
        for key in ("rope_parameters", "rope_theta", "rope_scaling", "_name_or_path"):
            mine.pop(key, None)
            expected.pop(key, None)
        assert mine == expected
    assert found.image_token_index == theirs.image_token_index == 128256
    assert found.text_config.rope_parameters == {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


@pytest.mark.parametrize("params", [V11B, V90B])
def test_the_generated_config_makes_the_model_that_was_released(params: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_of(params)))
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    on_disk = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
    theirs = {}
    for key, tensor in model.state_dict().items():
        front = next(front for front in on_disk if key.startswith(front))
        theirs[on_disk[front] + key.removeprefix(front)] = tuple(tensor.shape)
    family = FAMILIES["mllama"]
    sizes = family.config_dims(hf_of(params))
    ours = {
        entry.key: entry.shape("hf", sizes) for entry in family.stored_specs("hf", sizes) if "inv_freq" not in entry.key
    }
    assert ours == theirs


@pytest.mark.parametrize(
    ("own", "cross", "places"),
    [
        (32, 8, [3, 8, 13, 18, 23, 28, 33, 38]),  # as in the config.json of 11B
        (80, 20, list(range(3, 100, 5))),
        (4, 2, [1, 4]),
        (5, 2, [1, 5]),
        (2, 2, [0, 2]),
    ],
)
def test_where_cross_attention_layers_are(own: int, cross: int, places: list[int]) -> None:
    assert cross_layers(own, cross) == places
    # The layers that Meta's code puts them before: every k-th one, counted from the last.
    before = [sum(layer < place for layer in range(own + cross) if layer not in places) for place in places]
    assert before == list(range(own))[::-1][:: math.ceil(own / cross)][:cross][::-1]


def test_aspect_ratios_are_transformers_s() -> None:
    config: Any = MllamaVisionConfig()
    assert [list(ratio) for ratio in aspect_ratios(config.max_num_tiles)] == config.supported_aspect_ratios
    assert aspect_ratios(TILES) == [(1, 1), (1, 2), (1, 3), (2, 1), (3, 1)]


def test_defaults_of_an_absent_key_are_those_of_transformers() -> None:
    theirs: Any = MllamaConfig()
    found = dims({"model_type": "mllama"})
    text, vision = theirs.text_config, theirs.vision_config
    assert (found["dim"], found["n_layers"], found["n_kv_heads"], found["ffn_dim"], found["vocab_size"]) == (
        text.hidden_size, text.num_hidden_layers, text.num_key_value_heads, text.intermediate_size, text.vocab_size,
    )  # fmt: skip
    assert (found["vision_dim"], found["vision_layers"], found["vision_out"], found["tiles"], found["ratios"]) == (
        vision.hidden_size, vision.num_hidden_layers, vision.vision_output_dim, vision.max_num_tiles,
        len(vision.supported_aspect_ratios) + 1,
    )  # fmt: skip
    assert sets({"model_type": "mllama"})["cross"] == text.cross_attention_layers


def test_it_is_claimed_by_its_own_family_alone() -> None:
    assert [f.name for f in FAMILIES.values() if f.params is not None and f.params.evidence(V11B)] == ["mllama"]
    assert is_params({"model": V90B}) == "params.json has vision_num_cross_attention_layers"
    assert is_params({**V11B, "vision_num_cross_attention_layers": -1}) is None


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 39]},
         "config.json: text_config: cross_attention_layers must be [3, 8, 13, 18, 23, 28, 33, 38] for a Llama 3.2 "
         "Vision params.json with 32 self-attention and 8 cross-attention layers, found [3, 8, 13, 18, 23, 28, 33, "
         "39]; Meta's code puts them there"),
        ("text_config", {"cross_attention_layers": [3, 40]},
         "config.json: text_config: cross_attention_layers must be numbers of layers from 0 to 39, each once, found "
         "[3, 40]; correct config.json"),
        ("text_config", {"tie_word_embeddings": True},
         "config.json: text_config: tie_word_embeddings must be false for Llama 3.2 Vision, found true; its output has "
         "no rows for the 8 tokens that the embedding has beside the vocabulary; correct config.json"),
        ("text_config", {"num_hidden_layers": 20000},
         "config.json: text_config: num_hidden_layers must be a whole number from 1 to 10000, found 20000; correct "
         "config.json: text_config"),
        ("vision_config", {"hidden_size": 1152},
         "config.json: vision_config: hidden_size must be 1280 for a Llama 3.2 Vision params.json, found 1152; Meta's "
         "code has only this vision model"),
        ("vision_config", {"intermediate_layers_indices": [0, 7, 15, 23, 30]},
         "config.json: vision_config: intermediate_layers_indices must be [3, 7, 15, 23, 30] for a Llama 3.2 Vision "
         "params.json, found [0, 7, 15, 23, 30]; Meta's code has only this vision model"),
        ("vision_config", {"supported_aspect_ratios": [[1, 1], [2, 2]]},
         "config.json: vision_config: supported_aspect_ratios must be all of at most 4 tiles for a Llama 3.2 Vision "
         "params.json, found [[1, 1], [2, 2]]"),
        ("vision_config", {"supported_aspect_ratios": [[5, 1]]},
         "config.json: vision_config: supported_aspect_ratios must be pairs of numbers of tiles, of at most 4 "
         "together, found [[5, 1]]; correct config.json"),
        ("vision_config", {"max_num_tiles": 100000},
         "config.json: vision_config: max_num_tiles must be a whole number from 1 to 64, found 100000; correct "
         "config.json: vision_config"),
    ],
)  # fmt: skip
def test_what_meta_s_code_cannot_run_is_refused(part: str, changes: dict[str, Any], message: str) -> None:
    config = hf_of(V11B)
    config[part] |= changes
    family = FAMILIES["mllama"]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        (family.config_dims(config), hf_to_params(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_num_cross_attention_layers": 33},
         "params.json: vision_num_cross_attention_layers must be at most n_layers (32), found 33; correct params.json"),
        ({"vision_chunk_size": 0},
         "params.json: vision_chunk_size must be a whole number from 1 to 2147483648, found 0; correct params.json"),
        ({"vision_max_num_chunks": 65},
         "params.json: vision_max_num_chunks must be a whole number from 1 to 64, found 65; correct params.json"),
    ],
)  # fmt: skip
def test_unusable_params_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        hf_of({**V11B, **changes})


def test_too_many_ranks_are_refused(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mllama_config, mllama_params):
        monkeypatch.setattr(module, "WIRED", replace(SMALL))
    with pytest.raises(ConfigError, match=r"n_heads = 12 is not divisible by 8; .*`model_parallel=` may be 1, 2, 4"):
        convert_checkpoint(whole, tmp_path / "out", to="meta", model_parallel=8)


def test_positions_of_another_grid_are_refused(whole: Path) -> None:
    tensors = read_safetensors(whole)
    tensors["vision_model.gated_positional_embedding.embedding"] = torch.zeros(26, 32)
    with pytest.raises(ckpt_convert.CkptConvertError) as error:
        convert_state_dict(tensors, config_of(whole), source="hf", target="native")
    assert "vision_model.gated_positional_embedding.embedding: expected [17, 32], found [26, 32]" in str(error.value)
