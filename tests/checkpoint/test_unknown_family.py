"""Models that no table is of: their checkpoints go into other files of Hugging Face's format, under their own keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ckpt_convert
from ckpt_convert.adapters.config import AdapterConfig
from ckpt_convert.analysis.check.run import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint import generic_model
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.errors import (
    ConfigError,
    KeyMismatchError,
    ShapeMismatchError,
    UnsupportedFamilyError,
    UsageError,
)
from ckpt_convert.tensors.lazy import from_source
from tests.helpers import GOLDEN, Tensors, assert_same, bits, edit_json, read_safetensors, sums

auto: Any = transformers
"""Whose types are not known."""

NOTICE = "model_type 'gpt2' has no table: keys are taken as they are"


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    config = auto.GPT2Config(
        n_embd=24, n_layer=3, n_head=4, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return auto.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def gpt2(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "gpt2", max_shard_size="20KB")
    return tmp_path / "gpt2"


def made(path: Path, tensors: Tensors, **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def loaded(path: Path, model: Any) -> Tensors:
    """The state of the model that transformers makes of a directory, which it takes every tensor of."""
    found, info = type(model).from_pretrained(path, output_loading_info=True)
    assert not any(info.values())
    state: Tensors = found.state_dict()
    return state


def test_the_same_files_come_out(gpt2: Path, tmp_path: Path) -> None:
    report = ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf", verify=True)
    assert sums(tmp_path / "out") == sums(gpt2)
    assert (report.family, report.notices, report.verified) == ("unknown", [NOTICE], 40)
    again = ckpt_convert.convert_checkpoint(tmp_path / "out", tmp_path / "again", to="hf", verify=True)
    assert sums(tmp_path / "again") == sums(gpt2)
    assert again.notices == [NOTICE]


@pytest.mark.parametrize(
    "options",
    [{"shards": 3}, {"max_shard_size": 9000}, {"container": "bin"}, {"container": "dcp"}, {"container": "pt"}],
    ids=str,
)
def test_other_files_hold_the_same(gpt2: Path, tmp_path: Path, model: Any, options: Any) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(gpt2, out, to="hf", verify=True, **options)
    if options.get("container") not in ("dcp", "pt"):
        assert_same(loaded(out, model), model.state_dict())
    with open_identified(gpt2) as a, open_identified(out) as b:
        found = compare_checkpoints(a, b)
        assert found.same
        assert found.aligned_by == "keys"
    ckpt_convert.convert_checkpoint(out, tmp_path / "back", to="hf", like=gpt2, verify=True)
    assert sums(tmp_path / "back") == sums(gpt2)


def test_only_numbers_of_floating_point_are_cast(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(4).double(),
        "c": torch.arange(6).reshape(2, 3),
        "d": torch.tensor([True, False]),
        "e": torch.randn(8).to(torch.float8_e4m3fn),
        "f": torch.randint(0, 255, (3,), dtype=torch.uint8),
        "g": torch.tensor(2.5),
        "h": torch.empty(0, 3),
    }
    source = made(tmp_path / "source", tensors, model_type="mystery")
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", dtype="bfloat16", verify=True)
    found = read_safetensors(tmp_path / "out")
    cast = {key: tensor.to(torch.bfloat16) if key in "abegh" else tensor for key, tensor in tensors.items()}
    assert_same(found, cast)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["native", "meta", "torchtitan"])
def test_another_format_is_refused(gpt2: Path, tmp_path: Path, to: str) -> None:
    with pytest.raises(UnsupportedFamilyError) as caught:
        ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to=to)
    text = str(caught.value)
    assert text.startswith(f"{gpt2}/config.json: model_type 'gpt2' is no known family (`ckpt-convert formats`")
    assert text.endswith("; if it has the keys and RoPE layout of one of them, say so with `family=`")
    assert not (tmp_path / "out").exists()


def test_keys_are_literal(tmp_path: Path) -> None:
    keys = [
        "{layer}",
        "a.{layer}.b",
        "a.0.b",
        "%d.%s",
        "",
        ".",
        "..x",
        "a b\n",
        "ключ",
        "layers.01.w",
        "{",
        "x.{layer:odd}",
    ]
    tensors = {key: torch.full((2, at + 1), float(at)) for at, key in enumerate(keys)}
    source = made(tmp_path / "source", tensors, model_type="mystery")
    ckpt_convert.convert_checkpoint(source, tmp_path / "two", to="hf", shards=2, verify=True)
    assert_same(read_safetensors(tmp_path / "two"), tensors)
    ckpt_convert.convert_checkpoint(tmp_path / "two", tmp_path / "back", to="hf", like=source, verify=True)
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_an_output_is_carried_as_it_is(tmp_path: Path, is_stored: bool, is_tied: bool) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(6, 4)}
    if is_stored:
        tensors["lm_head.weight"] = torch.randn(6, 4)  # another one, whatever the config says
    source = made(tmp_path / "source", tensors, model_type="mystery", tie_word_embeddings=is_tied)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert sums(tmp_path / "out") == sums(source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "bin", to="hf", container="bin", verify=True)
    assert_same(torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True), tensors)


def test_another_head_of_a_family_with_a_table(tmp_path: Path) -> None:
    config = auto.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        num_labels=3,
    )
    model = auto.AutoModelForTokenClassification.from_config(config)
    model.save_pretrained(tmp_path / "tagger")
    report = ckpt_convert.convert_checkpoint(tmp_path / "tagger", tmp_path / "out", to="hf", shards=2, verify=True)
    why = "architectures is 'LlamaForTokenClassification', which has no table"
    assert report.notices == [f"{why}: keys are taken as they are"]
    assert_same(loaded(tmp_path / "out", model), model.state_dict())
    with pytest.raises(UnsupportedFamilyError, match=r"'score\.\w+' is no key of llama's language model"):
        ckpt_convert.convert_checkpoint(tmp_path / "tagger", tmp_path / "native", to="native")


def test_a_model_without_its_head_keeps_its_keys(tmp_path: Path) -> None:
    body = auto.AutoModel.from_pretrained(GOLDEN / "llama" / "hf")
    body.save_pretrained(tmp_path / "body")
    report = ckpt_convert.convert_checkpoint(tmp_path / "body", tmp_path / "out", to="hf", verify=True)
    assert report.family == "unknown"
    assert sums(tmp_path / "out") == sums(tmp_path / "body")
    with pytest.raises(UnsupportedFamilyError, match="if it is one all the same, pass `family=`"):
        ckpt_convert.convert_checkpoint(tmp_path / "body", tmp_path / "native", to="native")
    # An embedding model of tied weights is whole without it.
    tied = auto.AutoModel.from_pretrained(GOLDEN / "llama_tied" / "hf")
    tied.save_pretrained(tmp_path / "tied")
    ckpt_convert.convert_checkpoint(tmp_path / "tied", tmp_path / "native", to="native", verify=True)
    expected = read_safetensors(GOLDEN / "llama_tied" / "native.safetensors")
    assert_same(read_safetensors(tmp_path / "native"), expected)


def test_a_config_without_a_model_type(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"down.0.weight": torch.ones(2)}, architecture="vit_tiny_patch16")
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert report.notices == ["config.json names no model_type: keys are taken as they are"]
    assert sums(tmp_path / "out") == sums(source)


def test_without_a_config_nothing_says_what_it_is(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"down.0.weight": torch.ones(2)})
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", from_format="hf")


def test_like_has_to_have_the_same_keys(gpt2: Path, tmp_path: Path) -> None:
    tensors = read_safetensors(gpt2)
    content = json.loads((gpt2 / "config.json").read_text())
    tensors["transformer.extra"] = torch.ones(2)
    other = made(tmp_path / "other", tensors, **content)
    with pytest.raises(ShapeMismatchError, match=r"has other keys than this model, such as transformer\.extra"):
        ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf", like=other)
    with pytest.raises(UsageError, match="is a llama, but"):
        ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf", like=GOLDEN / "llama" / "hf")


def test_files_that_contradict_each_other_are_refused(gpt2: Path, tmp_path: Path) -> None:
    first, second = sorted(gpt2.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, {"format": "pt"})
    with pytest.raises(KeyMismatchError, match="contradict each other"):
        ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf")


def test_verify_goes_by_what_transformers_have_in_common(gpt2: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf")
    report = check_checkpoint(tmp_path / "out")
    assert report.findings == ()
    assert report.family is None
    assert {"layers", "checksum", "record"} <= set(report.checks)
    assert [skip.check for skip in report.skipped] == ["keys"]
    edit_json(gpt2 / "config.json", n_layer=5)
    assert [(finding.check, finding.expected) for finding in check_checkpoint(gpt2).findings] == [("config", "5")]


def test_a_damaged_byte_is_found(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(gpt2, out, to="hf")
    file = sorted(out.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert [finding.check for finding in check_checkpoint(out).findings] == ["checksum"]
    with open_identified(gpt2) as a, open_identified(out) as b:
        assert compare_checkpoints(a, b).counts["differs"] == 1


class TestCheckpointer:
    """A model whose keys in memory are those of the files."""

    @pytest.mark.parametrize("kind", ["gpt2", "bert"])
    def test_unchanged_weights_give_the_same_files(self, tmp_path: Path, kind: str) -> None:
        config = {
            "gpt2": lambda: auto.GPT2Config(
                n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=2
            ),
            "bert": lambda: auto.BertConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=40,
                vocab_size=50,
                max_position_embeddings=16,
            ),
        }[kind]()
        classes = {"gpt2": auto.GPT2LMHeadModel, "bert": auto.BertForMaskedLM}
        original = classes[kind](config)
        original.save_pretrained(tmp_path / "source", max_shard_size="20KB")
        model = classes[kind](config)
        checkpointer = ckpt_convert.Checkpointer(
            source=tmp_path / "source", output_dir=tmp_path / "run", model_format="hf", save_every="1 step"
        )
        with checkpointer:
            checkpointer.load_model(model)
            assert_same(model.state_dict(), original.state_dict())
            assert checkpointer.config["model_type"] == kind
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            checkpointer.register(model=model, optimizer=optimizer)
            checkpointer.step()
            first = saved(tmp_path / "run", 1)
            assert {name: sums(first)[name] for name in sums(tmp_path / "source")} == sums(tmp_path / "source")
            inputs = torch.randint(0, 50, (2, 8))
            model(inputs, labels=inputs).loss.backward()
            optimizer.step()
            checkpointer.step()
        second = saved(tmp_path / "run", 2)
        assert_same(loaded(second, model), model.state_dict())
        assert bits(next(model.parameters())) != bits(next(original.parameters()))

        resumed = classes[kind](config)
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.1)
        again = ckpt_convert.Checkpointer(
            source=tmp_path / "source", output_dir=tmp_path / "run", model_format="hf", save_every="1 step"
        )
        with again:
            progress = again.resume(model=resumed, optimizer=optimizer)
        assert progress is not None
        assert progress.step == 2
        assert_same(resumed.state_dict(), model.state_dict())

    def test_an_output_that_is_stored_though_it_is_tied(self, gpt2: Path, model: Any, tmp_path: Path) -> None:
        tensors = read_safetensors(gpt2)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
        source = made(tmp_path / "source", tensors, **json.loads((gpt2 / "config.json").read_text()))
        run = tmp_path / "run"
        with ckpt_convert.Checkpointer(source=source, output_dir=run, model_format="hf") as checkpointer:
            checkpointer.load_model(model)
            checkpointer.register(model=model)
            checkpointer.save()
        name = "model.safetensors"
        assert sums(saved(run, 0))[name] == sums(source)[name]

        tensors["lm_head.weight"][0, 0] += 1
        other = made(tmp_path / "other", tensors, **json.loads((gpt2 / "config.json").read_text()))
        with pytest.raises(KeyMismatchError, match="the checkpoint does not tie them"):
            ckpt_convert.Checkpointer(source=other, model_format="hf").load_model(model)

    def test_other_keys_are_listed(self, gpt2: Path, model: Any) -> None:
        other = {key.replace(".attn.", ".attention."): tensor for key, tensor in model.state_dict().items()}
        with pytest.raises(KeyMismatchError) as caught:
            ckpt_convert.Checkpointer(source=gpt2, model_format="hf").load_model(other)
        text = str(caught.value)
        assert "transformer.h.0.attn.c_attn.bias: the checkpoint has it, the model has not" in text
        assert "transformer.h.0.attention.c_attn.bias: the model has it, the checkpoint has not" in text

    def test_another_layout_of_the_model_and_adapters_need_a_table(self, gpt2: Path, model: Any) -> None:
        for layout, adapter in (("native", None), ("hf", AdapterConfig(rank=2, alpha=4))):
            with pytest.raises(UnsupportedFamilyError, match="model_type 'gpt2' is no known family"):
                ckpt_convert.Checkpointer(source=gpt2, model_format=layout, adapter=adapter).load_model(model)


def saved(run: Path, step: int) -> Path:
    """The directory of a step."""
    return next(path for path in run.glob("step_*") if int(path.name.partition("_")[2]) == step)


def test_a_table_of_many_keys() -> None:
    tensors = [
        SourceTensor(f"layers.{at}.w", "BF16", from_source(at, (2, 4)), "model.safetensors") for at in range(20_000)
    ]
    family = generic_model.generic_family(tensors)
    assert [entry.key for entry in family.stored_specs("hf", {})] == [tensor.key for tensor in tensors]
    assert family.formats == ("hf",)
    assert family.has_key("hf", "layers.7.w")
    assert not family.has_key("hf", "layers.{layer}.w")


def test_a_copy_of_a_directory_takes_its_other_files_along(gpt2: Path, tmp_path: Path) -> None:
    (gpt2 / "modeling_own.py").write_text("x = 1\n")
    ckpt_convert.convert_checkpoint(gpt2, tmp_path / "out", to="hf", shards=2)
    assert (tmp_path / "out" / "modeling_own.py").read_text() == "x = 1\n"
