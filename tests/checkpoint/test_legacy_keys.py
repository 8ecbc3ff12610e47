"""Keys behind wrappers, nestings and prefixes of other releases are read as the format's own, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import ckpt_convert
from ckpt_convert.analysis.check.run import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint import legacy_keys
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.errors import AmbiguousFormatError, KeyMismatchError
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.core.table import Family, Key, Row
from ckpt_convert.models.llama.table import LLAMA
from tests.cli.inspecting import body, document, facts, text
from tests.helpers import GOLDEN, Tensors, assert_same, bits, read_meta, read_safetensors, sums

LLAMA_HF = GOLDEN / "llama" / "hf"
CONFIG = LLAMA_HF / "config.json"
HF = read_safetensors(LLAMA_HF)
PLAIN: Mapping[str, Tensors] = {
    "hf": HF,
    "native": read_safetensors(GOLDEN / "llama" / "native.safetensors"),
    "torchtitan": read_safetensors(GOLDEN / "llama" / "torchtitan.safetensors"),
    "meta": read_meta(GOLDEN / "llama" / "meta-mp1")[0],
}

OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}

auto: Any = transformers
"""Whose types are not known."""

Rename = Callable[[str], str]


def before(prefix: str) -> Rename:
    return lambda key: prefix + key


def in_layers(part: str) -> Rename:
    """What wrapping every layer by itself does to the keys."""

    def rename(key: str) -> str:
        parts = key.split(".")
        if "layers" not in parts:
            return key
        at = parts.index("layers") + 2
        return ".".join([*parts[:at], part, *parts[at:]])

    return rename


EVERYWHERE: Mapping[str, Rename] = {
    "torch.compile": before("_orig_mod."),
    "compiled layers": in_layers("_orig_mod"),
    "DDP": before("module."),
    "DDP of torch.compile": before("module._orig_mod."),
    "torch.compile of DDP": before("_orig_mod.module."),
    "FSDP": lambda key: in_layers("_fsdp_wrapped_module")(f"_fsdp_wrapped_module.{key}"),
    "checkpointed layers": in_layers("_checkpoint_wrapped_module"),
    "a module of another": before("model."),
}
IN_HF: Mapping[str, Rename] = {
    "without model.": lambda key: key.removeprefix("model."),
    "doubled model.": lambda key: key.replace("model.", "model.model.") if key.startswith("model.") else key,
    "the text of a vision model": before("language_model."),
    "the same, as transformers 5 has it": lambda key: key.replace("model.", "model.language_model."),
    "wrappers without model.": lambda key: f"module._orig_mod.{key.removeprefix('model.')}",
}
VARIANTS = [(format, name) for format in PLAIN for name in EVERYWHERE] + [("hf", name) for name in IN_HF]


def renamed(tensors: Tensors, rename: Rename) -> Tensors:
    out = {rename(key): tensor for key, tensor in tensors.items()}
    assert len(out) == len(tensors)
    return out


def checkpoint_of(tensors: Tensors, path: Path) -> Path:
    path.mkdir()
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    shutil.copy(CONFIG, path)
    return path


@pytest.mark.parametrize(("format", "name"), VARIANTS)
def test_a_variant_gives_what_the_plain_one_gives(tmp_path: Path, format: str, name: str) -> None:
    rename = {**EVERYWHERE, **IN_HF}[name]
    source = tmp_path / "weights.pth"
    torch.save(renamed(PLAIN[format], rename), source)
    target = "native" if format == "hf" else "hf"
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=target, config=CONFIG, verify=True)
    assert report.source_format == format
    assert any("keys are read with" in notice for notice in report.notices)
    assert_same(read_safetensors(tmp_path / "out"), PLAIN[target])


@pytest.mark.parametrize("format", PLAIN)
@pytest.mark.parametrize(
    "nest",
    [
        lambda weights: {"model": weights, "optimizer": OPTIMIZER, "epoch": 3},
        lambda weights: {"state_dict": weights, "optimizer_states": [OPTIMIZER], "global_step": 7},
        lambda weights: {"module": weights, "lr_scheduler": None},
        lambda weights: {"model": {f"module._orig_mod.{key}": tensor for key, tensor in weights.items()}},
        lambda weights: {"state": {"model": weights, "optimizers": {"AdamW": OPTIMIZER}}, "rng": [torch.ones(3)]},
        lambda weights: {**weights, "optimizer": OPTIMIZER},
    ],
    ids=["model", "Lightning", "DeepSpeed", "wrapped", "Composer", "beside the weights"],
)
def test_weights_in_an_entry_of_a_training_run(
    tmp_path: Path, format: str, nest: Callable[[Tensors], dict[str, Any]]
) -> None:
    content = nest(PLAIN[format])
    torch.save(content, tmp_path / "last.pt")
    target = "native" if format == "hf" else "hf"
    report = ckpt_convert.convert_checkpoint(
        tmp_path / "last.pt", tmp_path / "out", to=target, config=CONFIG, verify=True
    )
    assert report.source_format == format
    assert_same(read_safetensors(tmp_path / "out"), PLAIN[target])
    said = " ".join(report.notices)
    assert ("skipped, as they are no weights: " in said) == ("optim" in str(content.keys()) or "state" in content)


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    torch.save({"model": HF, "optimizer": OPTIMIZER, "rng_state": torch.ones(2), "epoch": 3}, tmp_path / "last.pt")
    with open_identified(tmp_path / "last.pt", config=CONFIG) as checkpoint:
        assert checkpoint.why == "its keys, as the notices say"
        assert checkpoint.notices[1:] == [
            "30 keys are read without 'model.' before them",
            "skipped, as they are no weights: 3 tensors of optimizer, rng_state",
        ]
        # What is passed over can be looked at all the same, under the keys of the file.
        assert Checkpoint(checkpoint)["rng_state"].tobytes() == bits(torch.ones(2))
        assert Checkpoint(checkpoint)["model.lm_head.weight"].tobytes() == bits(HF["lm_head.weight"])
        assert Checkpoint(checkpoint)["lm_head.weight"].tobytes() == bits(HF["lm_head.weight"])


def test_the_ranks_of_metas_files_nested_under_model(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "llama" / "meta-mp2", tmp_path / "meta"))
    for file in source.glob("*.pth"):
        torch.save({"model": torch.load(file, weights_only=True), "iteration": 9}, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "hf", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), HF)
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="meta", verify=True)
    for found, expected in zip(read_meta(tmp_path / "back"), read_meta(GOLDEN / "llama" / "meta-mp2"), strict=True):
        assert_same(found, expected)
    with open_identified(source) as a, open_identified(LLAMA_HF) as b:
        assert a.tensors["model.layers.0.attention.wq.weight"].shape == (72, 72)  # ranks joined
        assert compare_checkpoints(a, b).same
    assert [finding.text for finding in check_checkpoint(source).findings] == []


def test_files_and_assignment_stay_and_keys_become_the_formats(tmp_path: Path) -> None:
    source = Path(shutil.copytree(LLAMA_HF, tmp_path / "hf"))
    for file in sorted(source.glob("*.safetensors")):
        save_file(renamed(load_file(file), before("_orig_mod.")), file, {"format": "pt"})
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {f"_orig_mod.{key}": name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    ckpt_convert.convert_checkpoint(source, tmp_path / "same", to="hf", verify=True)
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(tmp_path / "same")
    for out in (tmp_path / "same", tmp_path / "back"):
        for file in sorted(LLAMA_HF.glob("*.safetensors")):
            assert_same(load_file(out / file.name), load_file(file))
        expected = json.loads((LLAMA_HF / index.name).read_text())["weight_map"]
        assert json.loads((out / index.name).read_text())["weight_map"] == expected
    again = tmp_path / "again"
    ckpt_convert.convert_checkpoint(tmp_path / "same", again, to="hf")
    assert sums(again) == sums(tmp_path / "same")


def test_a_file_that_mixes_variants(tmp_path: Path) -> None:
    ways = [before(""), before("module."), before("_orig_mod."), before("state_dict.module.")]
    mixed = {ways[at % len(ways)](key): tensor for at, (key, tensor) in enumerate(HF.items())}
    source = checkpoint_of(mixed, tmp_path / "source")
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "out"), HF)
    assert report.notices == [
        "7 keys are read without '_orig_mod', which torch.compile put there",
        "8 keys are read without 'module.' before them",
        "7 keys are read without 'state_dict.module.' before them",
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"norm.weight": "model.norm.weight"}, "model.norm.weight and norm.weight are both model.norm.weight"),
        (
            {"_orig_mod.lm_head.weight": "lm_head.weight"},
            "_orig_mod.lm_head.weight and lm_head.weight are both lm_head.weight",
        ),
        (
            {"module.lm_head.weight": "lm_head.weight", "state.lm_head.weight": "lm_head.weight"},
            "lm_head.weight and module.lm_head.weight are both lm_head.weight",
        ),
    ],
)
def test_two_keys_that_are_one_are_refused(tmp_path: Path, more: Mapping[str, str], words: str) -> None:
    source = checkpoint_of({**HF, **{key: HF[same] for key, same in more.items()}}, tmp_path / "source")
    for target in ("hf", "native"):
        with pytest.raises(KeyMismatchError, match="contradict each other") as caught:
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=target)
        assert f"{words}; remove the one that is not meant" in str(caught.value)
    found = [finding.text for finding in check_checkpoint(source).findings if finding.severity == "error"]
    assert f"{words}; remove the one that is not meant" in found
    assert len(found) == len(more)
    with pytest.raises(KeyMismatchError, match=r"lm_head|norm"):
        ckpt_convert.convert_state_dict(
            {**HF, **{key: HF[same] for key, same in more.items()}}, CONFIG, source="hf", target="native"
        )


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    norm = {"model.norm.weight": HF["model.norm.weight"]}
    torch.save({"model": HF, "state_dict": norm}, tmp_path / "two.pt")
    with pytest.raises(KeyMismatchError) as caught:
        ckpt_convert.convert_checkpoint(tmp_path / "two.pt", tmp_path / "out", to="native", config=CONFIG)
    words = "model.model.norm.weight and state_dict.model.norm.weight are both model.norm.weight"
    assert words in str(caught.value)
    # An average of the weights is no entry that is known to be no weights.
    torch.save({"model": HF, "ema": HF}, tmp_path / "ema.pt")
    with pytest.raises(AmbiguousFormatError, match="fit no format"):
        ckpt_convert.convert_checkpoint(tmp_path / "ema.pt", tmp_path / "out", to="native", config=CONFIG)
    with pytest.raises(KeyMismatchError, match="30 unexpected keys"):
        ckpt_convert.convert_checkpoint(
            tmp_path / "ema.pt", tmp_path / "out", to="native", from_format="hf", config=CONFIG
        )


def test_a_key_with_two_readings_is_refused() -> None:
    family = Family(
        name="two",
        title="",
        model_types=("two",),
        dims=lambda config: {"tied": 0, "dim": 4, "n_layers": 1},
        rows=(Row("a", ("dim",), hf=Key("model.head.weight")), Row("b", ("dim",), hf=Key("head.weight"))),
    )
    names = legacy_keys.read_keys(["module.head.weight"], [family], "hf")
    assert names.canonical == {}
    assert names.clashes == (
        (
            "module.head.weight",
            "module.head.weight may be head.weight or model.head.weight; rename it to the one that is meant",
        ),
    )
    assert legacy_keys.read_keys(["model.head.weight", "head.weight"], [family], "hf") is legacy_keys.PLAIN


@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.0.attn.weight",
        "module.unheard_of.weight",
        "optimizer_of_mine.model.norm.weight",
        "model.norm.weight.more",
        "modulemodel.norm.weight",
        "_orig_model.norm.weight",
        "model..norm.weight",
        "",
        "model\nmodule.norm.weight",
    ],
)
def test_what_is_no_key_of_the_table_stays_as_it_is(key: str) -> None:
    names = legacy_keys.read_keys([key, *HF], [LLAMA], "hf")
    assert names.is_identity
    assert names.notices == ()


def test_an_unexpected_key_is_named_as_the_file_has_it(tmp_path: Path) -> None:
    tensors = renamed({**HF, "model.extra.weight": torch.ones(2)}, before("module."))
    source = checkpoint_of(tensors, tmp_path / "source")
    with pytest.raises(KeyMismatchError, match="1 unexpected key") as caught:
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native")
    assert "module.model.extra.weight [2] in model.safetensors" in str(caught.value)


def test_the_vision_models_of_transformers_before_and_after_they_were_renamed() -> None:
    """The families' tables have the keys of the files; in memory transformers has others since 4.52."""
    family = FAMILIES["gemma3"]
    old = [entry.key for entry in family.stored_specs("hf", _AnyDims())]

    def new(key: str) -> str:
        if key.startswith("language_model.lm_head."):
            return key.removeprefix("language_model.")
        if key.startswith("language_model.model."):
            return key.replace("language_model.model.", "model.language_model.")
        return f"model.{key}"

    names = legacy_keys.read_keys(map(new, old), [family], "hf")
    assert [names.of(new(key)) for key in old] == old
    assert names.clashes == ()
    assert legacy_keys.read_keys(old, [family], "hf") is legacy_keys.PLAIN


class _AnyDims(dict[str, int]):
    def __missing__(self, name: str) -> int:
        return 2


class TestRealWrappers:
    """What torch and transformers themselves make of the keys."""

    @pytest.fixture
    def model(self) -> Any:
        return auto.AutoModelForCausalLM.from_pretrained(LLAMA_HF)

    def test_torch_compile(self, model: Any, tmp_path: Path) -> None:
        wrapped: Any = torch.compile(model)
        state = wrapped.state_dict()
        assert all(key.startswith("_orig_mod.") for key in state)
        self.converts(state, tmp_path)

    def test_compiled_layers(self, model: Any, tmp_path: Path) -> None:
        for at, layer in enumerate(model.model.layers):
            model.model.layers[at] = torch.compile(layer)
        state = model.state_dict()
        assert "model.layers.0._orig_mod.self_attn.q_proj.weight" in state
        self.converts(state, tmp_path)

    def test_data_parallel(self, model: Any, tmp_path: Path) -> None:
        state = torch.nn.DataParallel(model).state_dict()
        assert all(key.startswith("module.") for key in state)
        self.converts(state, tmp_path)

    def test_the_model_without_its_head(self, model: Any, tmp_path: Path) -> None:
        state = {**model.model.state_dict(), "lm_head.weight": model.lm_head.weight.detach()}
        assert "layers.0.self_attn.q_proj.weight" in state
        self.converts(state, tmp_path)

    def converts(self, state: Tensors, tmp_path: Path) -> None:
        torch.save(state, tmp_path / "model.pt")
        ckpt_convert.convert_checkpoint(
            tmp_path / "model.pt", tmp_path / "native", to="native", config=CONFIG, verify=True
        )
        assert_same(read_safetensors(tmp_path / "native"), PLAIN["native"])
        found = ckpt_convert.convert_state_dict(state, CONFIG, source="hf", target="native")
        assert isinstance(found, dict)
        assert_same(found, PLAIN["native"])
        out = tmp_path / "hf"
        ckpt_convert.convert_checkpoint(tmp_path / "model.pt", out, to="hf", config=CONFIG, shards=2)
        loaded, info = auto.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        assert_same(loaded.state_dict(), HF)


def test_inspect_shows_the_files_keys_and_says_how_they_are_read(tmp_path: Path) -> None:
    source = checkpoint_of(renamed(HF, before("module.")), tmp_path / "source")
    shown = text(source)
    assert facts(shown)["notice"] == "30 keys are read without 'module.' before them"
    assert facts(shown)["family"] == "llama (model_type 'llama')"
    assert body(shown)[0].startswith("module.lm_head.weight ")
    assert {f"module.{key}" for key in HF} == {tensor["key"] for tensor in document(source)["tensors"]}


def test_verify_and_diff_read_them_too(tmp_path: Path) -> None:
    source = checkpoint_of(renamed(HF, before("module.")), tmp_path / "source")
    report = check_checkpoint(source)
    assert report.findings == ()
    assert {"keys", "config", "tied"} <= set(report.checks)
    for other in (LLAMA_HF, GOLDEN / "llama" / "meta-mp2"):
        with open_identified(source) as a, open_identified(other) as b:
            found = compare_checkpoints(a, b)
            assert found.same
            assert found.aligned_by == "mapping"
            assert list(found.notices) == [f"{source}: 30 keys are read without 'module.' before them"]


def test_a_missing_shard_is_named_by_the_formats_keys(tmp_path: Path) -> None:
    source = Path(shutil.copytree(LLAMA_HF, tmp_path / "hf"))
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {f"module.{key}": name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    files = sorted(source.glob("*.safetensors"))
    for file in files:
        save_file(renamed(load_file(file), before("module.")), file, {"format": "pt"})
    files[1].unlink()
    found = [finding for finding in check_checkpoint(source).findings if finding.severity == "error"]
    assert [finding.file for finding in found] == [files[1].name]


def test_logits_are_those_of_the_plain_one(tmp_path: Path) -> None:
    from ckpt_convert.analysis.logits.logits import compare_logits

    source = checkpoint_of(renamed(HF, before("module._orig_mod.")), tmp_path / "source")
    with open_identified(source) as a, open_identified(LLAMA_HF) as b:
        found = compare_logits(a, b)
    assert found.difference is not None
    assert found.difference.agreement == 1


def test_a_state_dict_says_in_the_log_how_it_was_read(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckpt_convert"):
        ckpt_convert.convert_state_dict(renamed(HF, before("module.")), CONFIG, source="hf", target="hf")
    assert "the state dict: 30 keys are read without 'module.' before them" in caplog.messages


def test_a_run_that_starts_from_a_wrapped_checkpoint(tmp_path: Path) -> None:
    source = checkpoint_of(renamed(HF, before("_orig_mod.")), tmp_path / "source")
    model = auto.AutoModelForCausalLM.from_config(auto.AutoConfig.from_pretrained(LLAMA_HF))
    checkpointer = ckpt_convert.Checkpointer(source=source, output_dir=tmp_path / "run", model_format="hf")
    with checkpointer:
        checkpointer.load_model(model)
        assert_same(model.state_dict(), HF)
        checkpointer.register(model=model)
        checkpointer.save()
    saved = next((tmp_path / "run").glob("step_*"))
    assert_same(load_file(saved / "model.safetensors"), HF)


def test_a_vision_model_of_transformers_is_trained_under_its_keys_in_memory(tmp_path: Path) -> None:
    config = auto.Gemma3Config(
        text_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "vocab_size": 50,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    original = auto.Gemma3ForConditionalGeneration(config).bfloat16()
    original.save_pretrained(tmp_path / "source")
    stored, live = read_safetensors(tmp_path / "source"), original.state_dict()
    assert "language_model.model.norm.weight" in stored
    assert "model.language_model.norm.weight" in live

    model = auto.Gemma3ForConditionalGeneration(config)
    run = tmp_path / "run"
    with ckpt_convert.Checkpointer(source=tmp_path / "source", output_dir=run, model_format="hf") as checkpointer:
        checkpointer.load_model(model)  # in float32, as it is trained
        assert_same({key: tensor.bfloat16() for key, tensor in model.state_dict().items()}, live)
        checkpointer.register(model=model)
        checkpointer.save()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-6)  # less than bfloat16 can hold
        checkpointer.step()
    expected = sums(tmp_path / "source")
    assert {name: sums(run / "step_0")[name] for name in expected} == expected
    resumed = auto.Gemma3ForConditionalGeneration(config)
    with ckpt_convert.Checkpointer(source=tmp_path / "source", output_dir=run, model_format="hf") as checkpointer:
        progress = checkpointer.resume(model=resumed)
    assert progress is not None
    assert progress.step == 1
    assert_same(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_tables_of_frequencies_are_taken_along_in_every_family(tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(GOLDEN / name / "hf", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for file in sorted(source.glob("model*.safetensors")):
        tensors = load_file(file)
        layers = {int(key.split(".")[2]) for key in tensors if key.endswith("q_proj.weight")}
        tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.rand(head_dim // 2) for n in layers}
        save_file({**tensors, **tables}, file, {"format": "pt"})
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    native = tmp_path / "native"
    report = ckpt_convert.convert_checkpoint(source, native, to="native", verify=True)
    assert len(report.drops) == config["num_hidden_layers"]
    expected = read_safetensors(GOLDEN / name / "native.safetensors")
    assert_same(read_safetensors(native), expected)
    ckpt_convert.convert_checkpoint(native, tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)
