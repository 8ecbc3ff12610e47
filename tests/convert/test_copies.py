"""More ranks than key/value heads, as in the release of Llama 3.1 405B for 16: neighbours hold copies of a head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt_convert import ConfigError, TiedWeightsError, convert_checkpoint
from ckpt_convert.checkpoint.checkpoint import Checkpoint, open_identified
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.llama import params as llama_params
from ckpt_convert.models.llama import releases as llama_releases
from ckpt_convert.models.llama.params import params_to_hf
from ckpt_convert.models.llama.releases import L3_1, Release
from tests.helpers import assert_same, bits, edit_json, read_meta, read_safetensors, sums

HEADS, KV, HEAD_DIM, DIM, LAYERS = 8, 2, 6, 48, 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=64, hidden_size=DIM, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    start = 1
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.arange(start, start + tensor.numel(), dtype=torch.float32).reshape(tensor.shape))
            start += tensor.numel()
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path, max_shard_size="60KB")
    return path


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model be a release, as Llama 3.1 405B is one."""
    row = Release("Tiny 405B", 2, DIM, HEADS, LAYERS, KV, 64, None, 1e-5, 64, 5e5, None, 8192, L3_1)
    monkeypatch.setattr(llama_params, "RELEASES", (row,))
    monkeypatch.setattr(llama_releases, "RELEASES", (row,))


def expected(tensors: dict[str, torch.Tensor], name: str, rank: int, ranks: int) -> torch.Tensor:
    """What a rank holds of a layer's keys or values, as Meta's resharding makes it: repeated, then cut."""
    whole = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
    if name == "k":
        whole = whole.view(KV, 2, HEAD_DIM // 2, DIM).transpose(1, 2).reshape(KV * HEAD_DIM, DIM)
    heads = whole.view(KV, HEAD_DIM, DIM)
    return torch.repeat_interleave(heads, ranks // KV, 0)[rank]


@pytest.mark.parametrize("ranks", [4, 8])
def test_neighbours_hold_copies_and_params_json_counts_them(ranks: int, source: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(source, tmp_path / "meta", to="meta", model_parallel=ranks, verify=True)
    tensors = read_safetensors(source)
    for rank, found in enumerate(read_meta(tmp_path / "meta")):
        for name in "kv":
            mine = found[f"layers.1.attention.w{name}.weight"]
            assert bits(mine) == bits(expected(tensors, name, rank, ranks))
        assert found["layers.1.attention.wq.weight"].shape == (HEADS * HEAD_DIM // ranks, DIM)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["n_kv_heads"] == ranks
    assert f"params.json counts {ranks} key/value heads, one for each rank: copies of the model's 2" in report.notices
    convert_checkpoint(tmp_path / "meta", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(source)


def released_by_meta(source: Path, there: Path, ranks: int) -> Path:
    """A directory as Meta releases it: weights and params.json alone, without a record."""
    convert_checkpoint(source, there / "made", to="meta", model_parallel=ranks)
    meta = there / "meta"
    meta.mkdir()
    for file in [*(there / "made").glob("*.pth"), there / "made" / "params.json"]:
        file.rename(meta / file.name)
    return meta


@pytest.mark.usefixtures("released")
def test_a_release_for_more_ranks_than_heads(source: Path, tmp_path: Path) -> None:
    meta = released_by_meta(source, tmp_path, 8)
    report = convert_checkpoint(meta, tmp_path / "hf", to="hf", verify=True)
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(source))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == KV
    assert (
        "params.json counts 8 key/value heads, one for each of 8 ranks; took 2, as in Tiny 405B, of which "
        "adjacent ranks hold replicas"
    ) in report.notices
    convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native", verify=True)
    convert_checkpoint(tmp_path / "native", tmp_path / "back", to="meta", verify=True)
    assert sums(tmp_path / "back") == sums(meta)


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize(("before", "after"), [(8, 2), (2, 8), (8, 4), (1, 4), (4, 1)])
def test_over_other_ranks(before: int, after: int, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "before", to="meta", model_parallel=before)
    convert_checkpoint(tmp_path / "before", tmp_path / "after", to="meta", model_parallel=after, verify=True)
    assert json.loads((tmp_path / "after" / "params.json").read_text())["n_kv_heads"] == max(after, KV)
    convert_checkpoint(source, tmp_path / "at once", to="meta", model_parallel=after)
    for mine, theirs in zip(read_meta(tmp_path / "after"), read_meta(tmp_path / "at once"), strict=True):
        assert_same(mine, theirs)


@pytest.mark.usefixtures("released")
def test_the_tensors_are_shown_as_the_model_has_them(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "meta", to="meta", model_parallel=8)
    with open_identified(tmp_path / "meta") as checkpoint:
        info = checkpoint.tensors["layers.0.attention.wk.weight"]
        assert info.shape == (KV * HEAD_DIM, DIM)
        assert len(info.parts) == 8
        whole = Checkpoint(checkpoint)["layers.1.attention.wv.weight"].torch()
    assert torch.equal(whole, read_safetensors(source)["model.layers.1.self_attn.v_proj.weight"])


@pytest.mark.usefixtures("released")
def test_copies_that_differ_are_refused(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "meta", to="meta", model_parallel=4)
    rank = torch.load(tmp_path / "meta" / "consolidated.03.pth", weights_only=True)
    rank["layers.1.attention.wk.weight"][0, 0] += 1
    torch.save(rank, tmp_path / "meta" / "consolidated.03.pth")
    with pytest.raises(TiedWeightsError) as error:
        convert_checkpoint(tmp_path / "meta", tmp_path / "hf", to="hf")
    assert (
        "layers.1.attention.wk.weight: rank 3 (consolidated.03.pth) and rank 2 (consolidated.02.pth) differ, but every "
        "rank of 2 in succession has to hold the same values; the files are not from one checkpoint"
    ) in str(error.value)


@pytest.mark.parametrize(("ranks", "words"), [
    (3, "n_heads = 8 is not divisible by 3"),
    (16, "n_heads = 8 is not divisible by 16"),
])  # fmt: skip
def test_ranks_that_do_not_fit(ranks: int, words: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        convert_checkpoint(source, tmp_path / "meta", to="meta", model_parallel=ranks)
    assert str(error.value).endswith("`model_parallel=` may be 1, 2, 4, 8")


def test_params_json_of_the_release_for_16_ranks() -> None:
    params: dict[str, Any] = {
        "dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 16, "vocab_size": 128256,
        "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "norm_eps": 1e-05, "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }  # fmt: skip
    assert params_to_hf(params, Weights(vocab_size=None)).content["num_key_value_heads"] == 8
    assert params_to_hf({**params, "n_kv_heads": 8}, Weights(vocab_size=None)).content["num_key_value_heads"] == 8
    # The same number of heads as no release has: they are all different.
    found = params_to_hf({**params, "n_layers": 125}, Weights(vocab_size=None))
    assert found.content["num_key_value_heads"] == 16
    assert not any("copies" in notice for notice in found.notices)


def test_params_json_says_itself_how_many_heads_where_no_release_does(source: Path, tmp_path: Path) -> None:
    """Without a record nothing tells copies from heads, and the model is the same with as many heads as ranks."""
    meta = released_by_meta(source, tmp_path, 4)
    convert_checkpoint(meta, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_key_value_heads"] == 4
    models = [LlamaForCausalLM.from_pretrained(path) for path in (source, tmp_path / "hf")]
    with torch.no_grad():
        for model in models:
            for number, tensor in enumerate(model.parameters()):
                tensor.mul_(1e-6 * (1 + number % 3))
        first, second = (model(input_ids=torch.arange(10).reshape(1, 10)).logits for model in models)
    torch.testing.assert_close(first, second)
    edit_json(meta / "params.json", n_kv_heads=2)
    convert_checkpoint(meta, tmp_path / "again", to="hf")
    assert_same(read_safetensors(tmp_path / "again"), read_safetensors(source))
