"""Every saved step is what transformers loads: nothing missing, unexpected or mismatched, and the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ckpt_convert import Checkpointer
from recipes.native_llama import NativeLlama
from tests.checkpointer.training import Trained, bfloat16_source, train_hf, trainable
from tests.helpers import GOLDEN

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [53, 5, 8, 9, 7, 9, 3, 2]])


def from_pretrained(directory: Path, **options: Any) -> torch.nn.Module:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def train(source: Any, output_dir: Path, steps: int, model: NativeLlama, load: bool = True, **options: Any) -> None:
    trained = Trained(model=model)
    with Checkpointer(source, output_dir, **{"save_every": 2, **options}) as checkpointer:
        if load:
            checkpointer.load_model(model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, steps)


def assert_same_logits(ours: NativeLlama, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        found, expected = theirs(TOKENS).logits, ours.eval()(TOKENS)
    assert found.std() > 0.05  # logits that say something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("case", ["llama", "llama2", "llama_tied", "mistral"])
def test_every_step_of_a_run(case: str, asynchronous: bool, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source", GOLDEN / case / "hf")
    model = NativeLlama.from_config(source / "config.json")
    train(source, tmp_path / "out", 5, model, asynchronous=asynchronous)
    for step in (2, 4):
        from_pretrained(tmp_path / "out" / f"step_{step}")
    theirs = from_pretrained(tmp_path / "out" / "latest")
    assert theirs.dtype == torch.float32
    assert_same_logits(model, theirs)
    unchanged = from_pretrained(source)
    with torch.no_grad():
        assert (unchanged(TOKENS).logits - theirs(TOKENS).logits).abs().max() > 0.01  # the training did something


def test_float32_training_from_a_bfloat16_source(tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source")
    model = NativeLlama.from_config(source / "config.json")
    train(source, tmp_path / "out", 3, model)
    theirs = from_pretrained(tmp_path / "out" / "step_3")
    assert theirs.dtype == torch.bfloat16
    assert_same_logits(model.bfloat16().float(), from_pretrained(tmp_path / "out" / "step_3", dtype=torch.float32))


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_from_meta_s_files(degree: int, tmp_path: Path) -> None:
    source = trainable(tmp_path / "source", GOLDEN / "llama" / f"meta-mp{degree}")
    model = NativeLlama.from_config(GOLDEN / "llama" / "hf" / "config.json")
    train(source, tmp_path / "out", 3, model, output_format="hf")
    assert_same_logits(model, from_pretrained(tmp_path / "out" / "step_3"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pretraining_from_a_config(tied: bool, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / "llama" / "hf" / "config.json").read_text()) | {"tie_word_embeddings": tied}
    torch.manual_seed(1)
    model = NativeLlama.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    train(None, tmp_path, 3, model, load=False, config=config)
    assert_same_logits(model, from_pretrained(tmp_path / "step_3"))


def test_a_model_of_transformers_is_trained_itself(tmp_path: Path) -> None:
    source = trainable(tmp_path / "source", GOLDEN / "llama_tied" / "hf")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(source))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(source, tmp_path / "out", model_format="hf", save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer)
        train_hf(checkpointer, model, optimizer, TOKENS)
    theirs = from_pretrained(tmp_path / "out" / "step_2")
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, model.eval()(TOKENS).logits)

    again = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(source))
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    with Checkpointer(source, tmp_path / "out", model_format="hf") as checkpointer:
        progress = checkpointer.resume(model=again, optimizer=other)
    assert progress is not None
    assert progress.step == 2
    for number, state in optimizer.state_dict()["state"].items():
        assert torch.equal(other.state_dict()["state"][number]["exp_avg"], state["exp_avg"])
