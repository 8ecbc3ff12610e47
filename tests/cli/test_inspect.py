from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ckpt_convert import log
from ckpt_convert.cli.notices import on_stderr
from ckpt_convert.errors import CkptConvertError
from tests import command
from tests.cli.inspecting import body, document, facts, run, save, text, write_keys
from tests.helpers import CASES, GOLDEN, bits, edit_json, read_meta, read_safetensors
from tests.servers.hub import FakeHub

ROOT = Path(__file__).parent.parent.parent
META = ("meta-mp1", "meta-mp2", "meta-mp4")


def dtype_name(tensor: torch.Tensor) -> str:
    return {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}[tensor.dtype]


def stored(directory: Path, part: Mapping[str, Any]) -> bytes:
    """The bytes where the JSON says that they are."""
    start, size = int(part["offset"]), int(part["nbytes"])
    return (directory / str(part["file"])).read_bytes()[start : start + size]


class TestJson:
    @pytest.mark.parametrize("case", CASES)
    def test_tensors_in_one_piece_are_where_it_says(self, case: str) -> None:
        directory = GOLDEN / case / "hf"
        found, expected = document(directory), read_safetensors(directory)
        assert (found["schema"], found["format"]) == (1, "hf")
        assert found["family"] == ("mistral" if case == "mistral" else "llama")
        assert {tensor["key"] for tensor in found["tensors"]} == set(expected)
        for tensor in found["tensors"]:
            assert set(tensor) == {"key", "shape", "dtype", "nbytes", "file", "offset"}
            true = expected[tensor["key"]]
            assert tensor["shape"] == list(true.shape)
            assert tensor["dtype"] == dtype_name(true)
            assert tensor["nbytes"] == true.numel() * true.element_size()
            assert stored(directory, tensor) == bits(true)

    @pytest.mark.parametrize(
        ("case", "layout"), [(case, layout) for case in CASES for layout in META if (GOLDEN / case / layout).exists()]
    )
    def test_parts_of_ranks_are_where_it_says(self, case: str, layout: str) -> None:
        directory = GOLDEN / case / layout
        found, ranks = document(directory), read_meta(directory)
        whole = {tensor["key"]: tensor["shape"] for tensor in document(GOLDEN / case / "meta-mp1")["tensors"]}
        assert found["model_parallel"] == len(ranks)
        assert {tensor["key"] for tensor in found["tensors"]} == set(ranks[0])
        for tensor in found["tensors"]:
            parts = tensor["parts"] if len(ranks) > 1 else [{**tensor, "rank": 0}]
            assert tensor["shape"] == whole[tensor["key"]]
            assert [part["rank"] for part in parts] == list(range(len(ranks)))
            for part in parts:
                true = ranks[part["rank"]][tensor["key"]]
                assert part["shape"] == list(true.shape)
                assert tensor["dtype"] == dtype_name(true)
                assert stored(directory, part) == bits(true)

    @pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied"])
    def test_each_tensor_counts_once_however_it_is_cut(self, case: str) -> None:
        (one,) = read_meta(GOLDEN / case / "meta-mp1")
        for layout in META:
            found = document(GOLDEN / case / layout)
            assert found["parameters"] == sum(tensor.numel() for tensor in one.values())
            assert found["bytes"] == sum(len(bits(tensor)) for tensor in one.values())
            assert found["dtypes"] == {
                "F32": {"tensors": len(one), "parameters": found["parameters"], "bytes": found["bytes"]}
            }

    def test_files(self) -> None:
        directory = GOLDEN / "llama" / "meta-mp2"
        assert document(directory)["files"] == [
            {"name": f"consolidated.0{rank}.pth", "bytes": size, "tensors": 30, "rank": rank}
            for rank in range(2)
            for size in [(directory / f"consolidated.0{rank}.pth").stat().st_size]
        ]

    @pytest.mark.parametrize(("case", "tied"), [("llama", False), ("llama_tied", True)])
    def test_what_else_is_known(self, case: str, tied: bool) -> None:
        directory = GOLDEN / case / "hf"
        found = document(directory)
        assert found["tied"] is tied
        assert found["path"] == str(directory)
        assert found["evidence"] == "model_type 'llama'"
        assert found["config_source"] == str(directory / "config.json")
        assert found["model_parallel"] is None
        assert found["notices"] == []
        assert document(GOLDEN / case / "meta-mp1")["tied"] is None  # only the bytes can tell

    def test_a_strided_tensor_lies_in_no_one_piece(self, tmp_path: Path) -> None:
        base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        torch.save({"plain": base, "turned": base.t()}, tmp_path / "weights.pt")
        plain, turned = document(tmp_path / "weights.pt")["tensors"]
        assert plain["shape"] == [4, 6]
        assert stored(tmp_path, plain) == bits(base)
        assert (turned["shape"], turned["nbytes"]) == ([6, 4], 96)
        assert "offset" not in turned
        (part,) = turned["parts"]
        assert (part["strides"], part["offset"]) == ([1, 6], plain["offset"])

    def test_the_order_is_the_one_asked_for(self) -> None:
        directory = GOLDEN / "llama" / "hf"
        sizes = [tensor["nbytes"] for tensor in document(directory, "--sort", "size")["tensors"]]
        assert sizes == sorted(sizes, reverse=True)
        sizes = [tensor["nbytes"] for tensor in document(directory, "--sort", "size:asc")["tensors"]]
        assert sizes == sorted(sizes)
        places = [(t["file"], t["offset"]) for t in document(directory, "--sort", "offset")["tensors"]]
        assert places == sorted(places)
        keys = [tensor["key"] for tensor in document(directory, "--sort", "name:desc")["tensors"]]
        assert (keys[0], keys[-1]) == ("model.norm.weight", "lm_head.weight")

    def test_the_filter_leaves_the_totals_alone(self) -> None:
        directory = GOLDEN / "llama" / "hf"
        found = document(directory, "--filter", "*.q_proj.*", "--filter", "lm_head.*")
        assert [tensor["key"] for tensor in found["tensors"]] == [
            "lm_head.weight",
            *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)),
        ]
        assert found["parameters"] == document(directory)["parameters"]

    def test_keys_with_control_characters_come_back_as_they_are(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "a.safetensors", ["\x1b[31mred\n", "right\u202eleft"])
        output = text(tmp_path / "a.safetensors", "--json")
        assert output.isascii()
        assert {tensor["key"] for tensor in json.loads(output)["tensors"]} == {"\x1b[31mred\n", "right\u202eleft"}


class TestHeader:
    def test_hf(self) -> None:
        directory = GOLDEN / "llama" / "hf"
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        assert facts(text(directory)) == {
            "path": str(directory),
            "format": "hf (config.json and model.safetensors.index.json)",
            "family": "llama (model_type 'llama')",
            "dims": "n_layers 3, dim 72, n_heads 12, n_kv_heads 4, head_dim 6, ffn_dim 104, vocab_size 56",
            "files": f"4 files, safetensors, {round(size / 1000)} kB",
            "parameters": "117 K (117,432) in 30 tensors",
            "bytes": "470 kB (469,728)",
            "dtypes": "F32",
            "tied": "no",
        }

    def test_meta(self) -> None:
        found = facts(text(GOLDEN / "llama" / "meta-mp4"))
        assert found["format"] == "meta (consolidated.00.pth)"
        assert found["family"] == "llama (params.json has multiple_of)"
        assert found["ranks"] == "4 (tensor-parallel degree; the last column says what each holds)"
        assert found["files"].startswith("4 files, torch zip, ")
        assert found["tied"] == "unknown: the bytes of embedding and output decide"

    def test_the_known_release_of_the_same_sizes(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "model.safetensors", ["model.embed_tokens.weight"])
        config = {
            "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = facts(text(tmp_path))
        assert found["family"] == "llama, sizes of Llama 3.2 1B (model_type 'llama')"
        assert found["tied"] == "yes: the output is the embedding"
        assert document(tmp_path)["release"] == "Llama 3.2 1B"

    def test_dtypes_with_most_bytes_first(self, tmp_path: Path) -> None:
        save(tmp_path / "a.safetensors", a=torch.zeros(3), b=torch.zeros(90, dtype=torch.bfloat16))
        assert facts(text(tmp_path / "a.safetensors"))["dtypes"] == "BF16 180 B in 1 tensor, F32 12 B in 1 tensor"

    def test_what_it_was_converted_from(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "model.safetensors", ["tok_embeddings.weight"])
        (tmp_path / "ckpt_convert").mkdir()
        manifest: dict[str, Any] = {"schema": 1, "format": "native", "source": {"format": "hf"}}
        (tmp_path / "ckpt_convert" / "manifest.json").write_text(json.dumps(manifest))
        found = facts(text(tmp_path))
        assert found["converted"] == "from hf, recorded in ckpt_convert/"
        assert found["format"] == "native (ckpt_convert/manifest.json says so)"
        assert document(tmp_path)["converted_from"] == "hf"
        manifest["source"] = "\x1b[31m"
        (tmp_path / "ckpt_convert" / "manifest.json").write_text(json.dumps(manifest))
        assert "converted" not in facts(text(tmp_path))

    def test_files_that_are_not_used_are_noticed(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "model.safetensors", ["lm_head.weight"])
        write_keys(tmp_path / "old.safetensors", ["lm_head.weight"])
        edit = {"model_type": "llama"}
        (tmp_path / "config.json").write_text(json.dumps(edit))
        assert facts(text(tmp_path))["notice"] == "not used: old.safetensors"
        assert document(tmp_path)["notices"] == ["not used: old.safetensors"]


def test_layers_that_a_family_has_no_such_tensors_in_are_not_missing() -> None:
    output = text(GOLDEN / "mllama" / "hf")
    assert "layers.{0,2}.self_attn.q_proj.weight" in output
    assert "missing" not in output


class TestWithoutFamily:
    """Whatever is not known, the rest is shown, with a line that says why."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        write_keys(tmp_path / "model.safetensors", [f"h.{layer}.w" for layer in range(3)])
        (tmp_path / "config.json").write_text('{"model_type": "gpt_\\u001b[31moss"}')
        return tmp_path

    @pytest.mark.parametrize(("content", "words"), [("{}", "is empty"), ('{"model_type": ', "is no readable JSON")])
    def test_of_a_config_that_cannot_be_used(self, checkpoint: Path, content: str, words: str) -> None:
        (checkpoint / "config.json").write_text(content)
        assert facts(text(checkpoint))["family"].startswith(f"unknown: config.json: {words}")

    def test_of_an_unknown_model_type(self, checkpoint: Path) -> None:
        output = text(checkpoint)
        assert "model_type 'gpt_\\x1b[31moss' is no known family" in facts(output)["family"]
        assert facts(output)["tied"] == "unknown"
        assert body(output) == ["h.{0..2}.w  [2]  F32  ×3  24 B"]
        found = document(checkpoint)
        assert (found["family"], found["tied"], found["parameters"]) == (None, None, 6)
        assert "is no known family" in found["problem"]

    @pytest.mark.parametrize(
        "config", ["{", "[]", "{}", '{"model_type": []}', '{"model_type": "llama"}', '{"model_type": null}']
    )
    def test_of_a_config_that_is_none(self, checkpoint: Path, config: str) -> None:
        (checkpoint / "config.json").write_text(config)
        output = text(checkpoint)
        assert facts(output)["family"].startswith("unknown: ")
        assert body(output) == ["h.{0..2}.w  [2]  F32  ×3  24 B"]

    def test_of_a_config_with_the_sizes_of_several_parts(self, checkpoint: Path) -> None:
        inner = {"num_hidden_layers": 3, "hidden_size": 2, "vocab_size": 9}
        odd = {"num_attention_heads": -1, "head_dim": True, "intermediate_size": "8"}
        content = {"model_type": "of two parts", "vocab_size": 5, "text_config": inner, **odd}
        (checkpoint / "config.json").write_text(json.dumps(content))
        assert document(checkpoint)["dims"] == {"n_layers": 3, "dim": 2, "vocab_size": 5}

    def test_of_a_config_with_impossible_sizes(self, checkpoint: Path) -> None:
        for change in (
            {"num_attention_heads": 0},
            {"hidden_size": "x"},
            {"num_hidden_layers": -1},
            {"vocab_size": 1e99},
        ):
            (checkpoint / "config.json").write_bytes((GOLDEN / "llama" / "hf" / "config.json").read_bytes())
            edit_json(checkpoint / "config.json", **change)
            assert facts(text(checkpoint))["family"].startswith("unknown: ")

    def test_of_files_that_contradict_each_other(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "model-00001-of-00002.safetensors", ["a.w", "b.w"])
        write_keys(tmp_path / "model-00002-of-00002.safetensors", ["b.w"])
        weight_map = {
            "a.w": "model-00001-of-00002.safetensors",
            "b.w": "model-00002-of-00002.safetensors",
            "c.w": "model-00001-of-00002.safetensors",
        }
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "hf" / "config.json").read_bytes())
        output = text(tmp_path)
        assert "the files contradict each other: b.w is in model-00001" in facts(output)["family"]
        assert body(output) == ["a.w  [2]  F32  8 B", "b.w  [2]  F32  8 B  in 2 files"]
        assert [len(tensor.get("parts", [1])) for tensor in document(tmp_path)["tensors"]] == [1, 2]

    def test_ranks_without_params_have_no_full_shapes(self, tmp_path: Path) -> None:
        for rank in range(2):
            name = f"consolidated.0{rank}.pth"
            (tmp_path / name).write_bytes((GOLDEN / "llama" / "meta-mp2" / name).read_bytes())
        output = text(tmp_path, "--filter", "layers.0.attention.wq.weight")
        assert facts(output)["family"].startswith("unknown: has no params.json")
        assert facts(output)["parameters"] == "unknown, in 30 tensors"
        assert "may be split or replicated" in facts(output)["notice"]
        assert body(output)[0] == "layers.0.attention.wq.weight  [36, 72]  F32  20.7 kB  on 2 ranks"
        (tensor,) = document(tmp_path, "--filter", "layers.0.attention.wq.weight")["tensors"]
        assert (tensor["shape"], [part["shape"] for part in tensor["parts"]]) == (None, [[36, 72], [36, 72]])

    def test_a_config_can_be_given(self, tmp_path: Path) -> None:
        file = GOLDEN / "llama" / "native.safetensors"
        assert facts(text(file))["family"].startswith("unknown: ")
        output = text(file, "--config", GOLDEN / "llama" / "hf" / "config.json")
        assert facts(output)["family"] == "llama (model_type 'llama')"

    def test_family_and_format_can_be_given(self, checkpoint: Path) -> None:
        edit_json(checkpoint / "config.json", **json.loads((GOLDEN / "llama" / "hf" / "config.json").read_text()))
        edit_json(checkpoint / "config.json", model_type="my_llama")
        found = facts(text(checkpoint, "--family", "llama", "--from", "hf"))
        assert found["format"] == "hf (as asked for)"
        assert found["family"] == "llama (as asked for)"


class TestTree:
    def test_default(self) -> None:
        assert body(text(GOLDEN / "llama_tied" / "meta-mp2"))[:3] == [
            "layers.{0..2}.attention.wk.weight     [24, 72]   F32  ×3  20.7 kB  2 × [12, 72]",
            "layers.{0..2}.attention.wo.weight     [72, 72]   F32  ×3  62.2 kB  2 × [72, 36]",
            "layers.{0..2}.attention.wq.weight     [72, 72]   F32  ×3  62.2 kB  2 × [36, 72]",
        ]
        assert "norm.weight                           [72]       F32        288 B  2 copies" in body(
            text(GOLDEN / "llama_tied" / "meta-mp2")
        )

    def test_every_tensor_once_with_full(self) -> None:
        lines = body(text(GOLDEN / "llama" / "hf", "--full"))
        assert len(lines) == 30
        assert [line.split()[0] for line in lines[:3]] == [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
        ]

    def test_largest_first(self) -> None:
        lines = body(text(GOLDEN / "llama" / "hf", "--sort", "size"))
        assert lines[0].split()[0] == "model.layers.{0..2}.mlp.down_proj.weight"
        assert lines[-1].split()[0] == "model.norm.weight"

    def test_last_name_first(self) -> None:
        lines = body(text(GOLDEN / "llama" / "hf", "--sort", "name:desc"))
        assert [line.split()[0] for line in (lines[0], lines[-1])] == ["model.norm.weight", "lm_head.weight"]

    def test_pieces_of_tensors_that_are_spread_over_files(self, tmp_path: Path) -> None:
        tensors = {"even": torch.ones(4, 6), "uneven": torch.ones(5, 6)}
        items, chunks = [], {}
        for key, tensor in tensors.items():
            rows = [(at, min(2, len(tensor) - at)) for at in range(0, len(tensor), 2)]
            chunks[key] = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([some, 6])) for at, some in rows]
            for number, chunk in enumerate(chunks[key]):
                data = TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.size())
                index = MetadataIndex(key, chunk.offsets, number)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

        class Planner(DefaultSavePlanner):
            def resolve_data(self, item: WriteItem) -> torch.Tensor:
                assert item.tensor_data is not None
                return torch.ones(item.tensor_data.chunk.sizes)

        writer = FileSystemWriter(tmp_path / "dcp")
        writer.set_up_storage_writer(True)
        (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
        found = {
            key: TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.size(), chunks[key])
            for key, tensor in tensors.items()
        }
        writer.finish(Metadata(found), [writer.write_data(plan, Planner()).wait()])
        assert body(text(tmp_path / "dcp")) == [
            "even    [4, 6]  F32   96 B  2 × [2, 6]",
            "uneven  [5, 6]  F32  120 B  3 pieces",
        ]
        uneven = next(tensor for tensor in document(tmp_path / "dcp")["tensors"] if tensor["key"] == "uneven")
        assert [part["origin"] for part in uneven["parts"]] == [[0, 0], [2, 0], [4, 0]]

    def test_exceptions_and_holes(self, tmp_path: Path) -> None:
        tensors = {f"layers.{layer}.w": torch.zeros(4, 4) for layer in range(16) if layer != 4}
        tensors["layers.7.w"] = torch.zeros(4, 5)
        safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
        assert body(text(tmp_path / "a.safetensors")) == [
            "layers.{0..3,5,6,8..15}.w  [4, 4]  F32  ×14  896 B  missing 4",
            "layers.7.w                 [4, 5]  F32        80 B",
        ]

    def test_what_a_filter_hides_is_not_missing(self) -> None:
        lines = body(text(GOLDEN / "llama" / "hf", "--filter", "model.layers.[02].*.q_proj.*"))
        assert lines == [
            "model.layers.{0,2}.self_attn.q_proj.weight  [72, 72]  F32  ×2  41.5 kB",
            "",
            "2 of 30 tensors match model.layers.[02].*.q_proj.*, 41.5 kB",
        ]

    def test_a_filter_that_matches_nothing_says_so(self) -> None:
        assert body(text(GOLDEN / "llama" / "hf", "--filter", "\x1b*")) == ["no key matches \\x1b*"]

    def test_control_characters_never_reach_the_terminal(self, tmp_path: Path) -> None:
        write_keys(tmp_path / "a\x1b.safetensors", ["\x1b[31mred\nnew.0.line", "x\u202ey", "\x9b1m"])
        for options in ([], ["--full"], ["--by-shard"], ["--sort", "offset"], ["--by-shard", "--full"]):
            output = text(tmp_path / "a\x1b.safetensors", *options)
            assert "\\x1b[31mred\\x0anew.0.line" in output
            assert all(char == "\n" or char.isprintable() for char in output)

    def test_long_keys_are_whole_where_there_is_no_terminal(self, tmp_path: Path) -> None:
        key = "very_long." * 60 + "weight"
        write_keys(tmp_path / "a.safetensors", [key])
        assert body(text(tmp_path / "a.safetensors")) == [f"{key}  [2]  F32  8 B"]

    def test_lines_are_plain(self) -> None:
        for layout in ("hf", "meta-mp2"):
            for options in ([], ["--full"], ["--by-shard"], ["--sort", "offset"]):
                output = text(GOLDEN / "llama" / layout, *options)
                assert "\x1b" not in output
                assert "\t" not in output
                assert all(line == line.rstrip() for line in output.splitlines())


class TestShards:
    def test_each_file_by_itself(self) -> None:
        sections = text(GOLDEN / "llama" / "hf", "--by-shard").split("\n\n")[1:]
        assert [section.splitlines()[0] for section in sections] == [
            "model-00001-of-00004.safetensors  7 tensors  132 kB",
            "model-00002-of-00004.safetensors  9 tensors  147 kB",
            "model-00003-of-00004.safetensors  9 tensors  147 kB",
            "model-00004-of-00004.safetensors  5 tensors  47.4 kB",
        ]
        assert "missing" not in "".join(sections)

    def test_a_file_without_tensors_is_there_too(self, tmp_path: Path) -> None:
        for number, tensors in ((1, {"a": torch.ones(2)}), (2, {})):
            safetensors.torch.save_file(tensors, tmp_path / f"model-0000{number}-of-00002.safetensors")
        assert "model-00002-of-00002.safetensors  0 tensors" in text(tmp_path, "--by-shard")

    def test_layers_that_lie_in_another_file_are_not_missing(self, tmp_path: Path) -> None:
        for number, layers in ((1, (0, 2)), (2, (1,))):
            keys = [f"h.{layer}.w" for layer in layers]
            write_keys(tmp_path / f"model-0000{number}-of-00002.safetensors", keys)
        assert "h.{0,2}.w" in text(tmp_path, "--by-shard")
        assert "missing" not in text(tmp_path, "--by-shard")

    @pytest.mark.parametrize("by", ["name", "size"])
    @pytest.mark.parametrize("direction", ["asc", "desc"])
    def test_the_pieces_of_each_file_in_the_order_asked_for(self, by: str, direction: str) -> None:
        sections = text(GOLDEN / "llama" / "hf", "--by-shard", "--full", "--sort", f"{by}:{direction}")
        for section in sections.split("\n\n")[1:]:
            keys = [line.split()[0] for line in section.splitlines()[1:]]
            true = read_safetensors(GOLDEN / "llama" / "hf")
            values = [key if by == "name" else true[key].nbytes for key in keys]
            assert values == sorted(values, reverse=direction == "desc")  # type: ignore[type-var]
            assert len(keys) > 4

    def test_ranks_are_named_and_shapes_are_theirs(self) -> None:
        sections = text(GOLDEN / "llama" / "meta-mp2", "--by-shard", "--filter", "*.wq.*").split("\n\n")[1:-1]
        assert [section.splitlines()[0].split("  ")[:2] for section in sections] == [
            [f"consolidated.0{rank}.pth", f"rank {rank}"] for rank in range(2)
        ]
        for section in sections:
            assert section.splitlines()[1] == "  layers.{0..2}.attention.wq.weight  [36, 72]  F32  ×3  31.1 kB"

    def test_files_without_a_match_are_left_out(self) -> None:
        output = text(GOLDEN / "llama" / "hf", "--by-shard", "--filter", "lm_head.*")
        assert [line.split()[0] for line in body(output) if ".safetensors" in line] == [
            "model-00004-of-00004.safetensors"
        ]

    def test_full_has_the_offset_of_every_piece(self) -> None:
        directory = GOLDEN / "llama" / "meta-mp2"
        pieces = {(p["file"], t["key"]): p["offset"] for t in document(directory)["tensors"] for p in t["parts"]}
        found = {}
        file = ""
        for line in body(text(directory, "--by-shard", "--full")):
            if line.startswith("consolidated"):
                file = line.split()[0]
            elif line:
                found[file, line.split()[0]] = int(line.split()[-1])
        assert found == pieces

    @pytest.mark.parametrize("direction", ["asc", "desc"])
    def test_sort_by_offset_lists_pieces_as_the_files_have_them(self, direction: str) -> None:
        directory = GOLDEN / "llama" / "meta-mp2"
        lines = body(text(directory, "--sort", f"offset:{direction}"))
        places = [(line.split()[-1], int(line.split()[-2])) for line in lines]
        assert len(places) == 60
        assert places == sorted(places, reverse=direction == "desc")


class TestFiles:
    """One file of each container."""

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(5), "empty": torch.zeros(0, 7)}

    def check(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        found = {tensor["key"]: tensor for tensor in document(file)["tensors"]}
        assert set(found) == set(tensors)
        for key, tensor in tensors.items():
            assert found[key]["shape"] == list(tensor.shape)
            assert found[key]["dtype"] == dtype_name(tensor)
            assert found[key]["file"] == file.name
            assert stored(file.parent, found[key]) == bits(tensor)

    def test_safetensors(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
        self.check(tmp_path / "w.safetensors", tensors)

    @pytest.mark.parametrize("name", ["w.pth", "w.pt", "pytorch_model.bin"])
    def test_torch_zip(self, tmp_path: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
        torch.save(tensors, tmp_path / name)
        self.check(tmp_path / name, tensors)

    def test_legacy_torch(self, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        self.check(tmp_path / "old.pth", tensors)
        assert facts(text(tmp_path / "old.pth"))["files"].startswith("1 file, legacy torch, ")

    def test_notices_are_escaped_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        with on_stderr(hidden=False):
            log.warning("%s is kept", "a\x9b1m.pth")
        assert capsys.readouterr().err == "notice: a\\x9b1m.pth is kept\n"

    def test_objects_that_are_no_tensors_are_noticed(self, tmp_path: Path) -> None:
        torch.save({"model": {"w": torch.zeros(2)}, "step": 7}, tmp_path / "a.pt")
        assert "1 entry is no tensor: step (int)" in facts(text(tmp_path / "a.pt"))["notice"]

    def test_an_empty_checkpoint(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({}, tmp_path / "none.safetensors")
        output = text(tmp_path / "none.safetensors")
        assert facts(output)["parameters"] == "0 in 0 tensors"
        assert facts(output)["dtypes"] == "none"
        assert body(output) == ["no tensors"]
        assert document(tmp_path / "none.safetensors")["tensors"] == []


class TestRefusals:
    def test_what_is_not_there(self, tmp_path: Path) -> None:
        result = run(tmp_path / "nothing", code=1)
        assert isinstance(result.exception, CkptConvertError)
        assert result.exception.exit_code == 3

    def test_what_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(b"no such thing")
        assert isinstance(run(tmp_path / "a.safetensors", code=1).exception, CkptConvertError)
        assert isinstance(run(tmp_path, code=1).exception, CkptConvertError)

    @pytest.mark.parametrize(
        "option", [["--sort", "colour"], ["--sort", "size:up"], ["--sort", ""], ["--from", "gguf"], ["--nonsense"]]
    )
    def test_options_that_make_no_sense_are_usage_errors(self, option: list[str]) -> None:
        assert "Usage:" in run(GOLDEN / "llama" / "hf", *option, code=2).output

    def test_a_hub_id_is_asked_for_only_where_there_is_no_such_path(self, hub: FakeHub) -> None:
        files = {file.name: file.read_bytes() for file in (GOLDEN / "llama" / "hf").iterdir()}
        hub.add("some/model", {}).commit(files, "v2")
        run(GOLDEN / "llama" / "hf")
        assert len(hub.log) == 0
        assert facts(text("some/model", "--revision", "v2"))["family"] == "llama (model_type 'llama')"
        assert hub.log.kinds()["api"] == 1


class TestProcess:
    @pytest.mark.parametrize("layout", ["hf", "meta-mp2", "native.safetensors"])
    def test_imports_nothing_large(self, layout: str) -> None:
        code = (
            "import sys\n"
            "from ckpt_convert.cli.inspect import inspect\n"
            f"inspect.main([{str(GOLDEN / 'llama' / layout)!r}], standalone_mode=False)\n"
            "large = ['torch', 'numpy', 'transformers', 'huggingface_hub', 'tokenizers', 'safetensors', 'rich']\n"
            "sys.exit(' '.join(name for name in large if name in sys.modules) or 0)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "n_layers" in done.stdout or layout.startswith("native")

    @pytest.mark.parametrize("option", ["--full", "--json", "--tree", "--sort=offset", "--html=-"])
    def test_a_reader_that_has_enough_ends_it_quietly(self, tmp_path: Path, option: str) -> None:
        write_keys(tmp_path / "a.safetensors", [f"layers.{number}.some_quite_long_name" for number in range(9000)])
        command = [sys.executable, "-m", "ckpt_convert", "inspect", str(tmp_path / "a.safetensors"), option]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(100)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0
        process.stderr.close()

    @pytest.mark.parametrize(("encoding", "key"), [("utf-8", "重み"), ("latin-1", "\\u91cd\\u307f")])
    def test_an_output_that_cannot_say_a_key_gets_it_escaped(self, tmp_path: Path, encoding: str, key: str) -> None:
        write_keys(tmp_path / "a.safetensors", ["重み.0", "重み.1"])
        command = [sys.executable, "-m", "ckpt_convert", "inspect", str(tmp_path / "a.safetensors")]
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=environment)
        assert f"{key}.{{0,1}}  [2]  F32  ×2" in done.stdout.decode(encoding)

    @pytest.mark.parametrize(("arguments", "code"), [(["/nowhere"], 3), (["--sort", "colour", "."], 2)])
    def test_exit_codes(self, arguments: list[str], code: int) -> None:
        done = command.run("inspect", *arguments, code=code)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
