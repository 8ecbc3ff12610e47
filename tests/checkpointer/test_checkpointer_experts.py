"""transformers' mixtures of experts: together in memory, apart in files; transformers itself is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckpt_convert import Checkpointer
from ckpt_convert.errors import KeyMismatchError
from tests.checkpointer.training import train_hf
from tests.helpers import GOLDEN, sums

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [53, 5, 8, 9, 7, 9, 3, 2]])
SIZES = {
    "vocab_size": 56, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 12, "num_key_value_heads": 4,
    "head_dim": 10, "intermediate_size": 28, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
QWEN = {**SIZES, "moe_intermediate_size": 20, "num_experts": 5}
MLA = {
    "kv_lora_rank": 18, "q_lora_rank": 22, "qk_rope_head_dim": 6, "qk_nope_head_dim": 10, "v_head_dim": 8,
    "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 20,
}  # fmt: skip

CONFIGS: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=5),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=18),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN, mlp_only_layers=[1]),
    "qwen3_moe_tied": lambda: transformers.Qwen3MoeConfig(**QWEN, tie_word_embeddings=True),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**SIZES | MLA | {"num_key_value_heads": 12, "head_dim": 6}),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**SIZES | MLA | {"num_key_value_heads": 12, "head_dim": 6}),
    "gpt_oss": lambda: transformers.GptOssConfig(**SIZES, num_local_experts=5),
}


def saved(name: str, directory: Path) -> Path:
    """A small model of this kind with weights that say something, as transformers saves it in several files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() < 2), std=0.2)
    model.save_pretrained(directory, max_shard_size="80KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def loaded(directory: Path) -> torch.nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def empty(directory: Path) -> torch.nn.Module:
    """A model with other weights."""
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_and_saving_unchanged(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    model = empty(source)
    expected = logits(loaded(source))
    assert expected.std() > 0.05
    assert not torch.allclose(logits(model), expected)
    with Checkpointer(source, tmp_path / "out", model_format="hf", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        assert torch.equal(logits(model), expected)
        checkpointer.register(model=model)
        checkpointer.step()
    step = tmp_path / "out" / "step_1"
    weights = {name: digest for name, digest in sums(source).items() if "safetensors" in name or name == "config.json"}
    assert len(weights) > 2
    assert weights.items() <= sums(step).items()
    assert torch.equal(logits(loaded(step)), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_training_and_resuming(name: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / "source")
    model = empty(source).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(source, tmp_path / "out", model_format="hf", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model, optimizer=optimizer)
        train_hf(checkpointer, model, optimizer, TOKENS)
    trained = logits(model.eval())
    assert not torch.allclose(trained, logits(loaded(source)))
    assert torch.equal(logits(loaded(tmp_path / "out" / "step_2")), trained)

    again = empty(source)
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    with Checkpointer(source, tmp_path / "out", model_format="hf") as checkpointer:
        progress = checkpointer.resume(model=again, optimizer=other)
    assert progress is not None
    assert progress.step == 2
    assert torch.equal(logits(again), trained)


def test_layers_that_the_model_in_memory_lacks_are_kept(tmp_path: Path) -> None:
    """transformers has no use for the layers that predict further tokens, but they are a part of the checkpoint."""
    source = GOLDEN / "deepseek_mtp" / "hf"
    model = empty(source)
    with Checkpointer(source, tmp_path / "out", model_format="hf", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        checkpointer.step()
    assert not any("layers.2." in key for key in model.state_dict())
    assert sums(source).items() <= sums(tmp_path / "out" / "step_1").items()


def test_what_does_not_fit_is_said_in_the_names_of_the_model(tmp_path: Path) -> None:
    source = saved("qwen3_moe", tmp_path / "source")
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_experts = 4
    model = transformers.AutoModelForCausalLM.from_config(config)
    with (
        Checkpointer(source, tmp_path / "out", model_format="hf") as checkpointer,
        pytest.raises(KeyMismatchError, match=r"experts.gate_up_proj: expected \[5, 40, 36\], found \[4, 40, 36\]"),
    ):
        checkpointer.load_model(model)
