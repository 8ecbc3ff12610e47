"""Reward models: a family of their own, told from the language model by the class that the config names and the keys.

What torchtune's converter makes of them is compared in test_families.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import ckpt_convert
from ckpt_convert import CkptConvertError
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.models import FAMILIES
from tests.helpers import GOLDEN, assert_same, edit_json, read_safetensors, sums

TOKENS = torch.tensor([[1, 5, 9, 33, 2, 17, 40, 8, 8, 21]])


@pytest.fixture(params=["llama_reward", "mistral_reward"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def copied(case: str, tmp_path: Path) -> Path:
    return shutil.copytree(GOLDEN / case / "hf", tmp_path / "hf")


def family_of(path: Path) -> str:
    with open_identified(path) as checkpoint:
        return checkpoint.model.family.name


def test_files_to_native_and_back(case: str, tmp_path: Path) -> None:
    source = GOLDEN / case / "hf"
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", verify=True)
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / case / "native.safetensors"))
    assert family_of(tmp_path / "native") == case
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_scores_are_the_same_after_a_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 72, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 56}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=12, num_key_value_heads=4, num_labels=1, pad_token_id=0, tie_word_embeddings=True
    )
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "hf")
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native", verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    loaded: Any = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    again, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same(again.state_dict(), model.state_dict())
    with torch.no_grad():  # sums of floats depend on where in memory the weights lie
        torch.testing.assert_close(again.eval()(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("labels", "rows"), [(None, 2), ({"0": "a", "1": "b", "2": "c"}, 3)])
def test_the_config_counts_the_labels(labels: dict[str, str] | None, rows: int, tmp_path: Path) -> None:
    source = copied("llama_reward", tmp_path)
    edit_json(source / "config.json", id2label=labels, label2id=None)
    with pytest.raises(CkptConvertError, match=rf"score\.weight: expected \[{rows}, 72\], found \[1, 72\]"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")


@pytest.mark.parametrize(
    "said", [{}, {"num_labels": 5}, {"id2label": {"0": "a"}}, {"id2label": {"0": "a"}, "num_labels": 1}]
)
def test_labels_are_counted_as_transformers_counts_them(said: dict[str, Any]) -> None:
    content = {**transformers.LlamaConfig(head_dim=128).to_dict(), "id2label": None, "label2id": None, **said}
    counted = FAMILIES["llama_reward"].config_dims(content)["n_labels"]
    assert counted == transformers.LlamaConfig.from_dict({**content, **said}).num_labels


def test_a_bias_that_a_trainer_added_is_carried_along(case: str, tmp_path: Path) -> None:
    source = copied(case, tmp_path)
    shard = next(source.glob("model-00001-of-*"))
    tensors = safetensors.torch.load_file(shard)
    labels = 1 if case == "llama_reward" else 3
    tensors["score.bias"] = torch.arange(labels) + 0.5
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"weight_map": {', f'"weight_map": {{"score.bias": "{shard.name}",'))
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", verify=True)
    assert report.drops == ["score.bias"]
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / case / "native.safetensors"))
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def test_meta_has_no_place_for_a_score(case: str, tmp_path: Path) -> None:
    with pytest.raises(CkptConvertError, match=f"the {case} table has no meta column; it has hf, native"):
        ckpt_convert.convert_checkpoint(GOLDEN / case / "hf", tmp_path / "meta", to="meta")


def test_a_config_that_names_the_class_of_other_weights_is_not_believed(tmp_path: Path) -> None:
    source = copied("llama", tmp_path)
    edit_json(source / "config.json", architectures=["LlamaForSequenceClassification"])
    assert family_of(source) == "llama"
    edit_json(source / "config.json", architectures=["LlamaForCausalLM"])
    assert family_of(source) == "llama"


def test_the_keys_alone_make_no_reward_model(tmp_path: Path) -> None:
    """A token classifier, say, whose score is one of each token, has the same keys and more."""
    source = copied("llama_reward", tmp_path)
    edit_json(source / "config.json", architectures=["LlamaForTokenClassification"])
    with pytest.raises(
        CkptConvertError, match=r"'LlamaForTokenClassification', and 'score\.weight' is no key of llama"
    ):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", family="llama_reward")
    assert report.family == "llama_reward"
