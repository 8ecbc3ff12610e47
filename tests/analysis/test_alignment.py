"""Keys that differ in nothing but what stands before them are compared; what has no keys in common is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.errors import UnsupportedFamilyError
from tests.helpers import GOLDEN


def test_the_state_of_a_training_run_is_compared_with_the_model_in_it(tmp_path: Path) -> None:
    model = {"layers.0.weight": torch.ones(2, 3), "layers.0.bias": torch.ones(2)}
    save_file(model, tmp_path / "model.safetensors")
    torch.save({"model": model, "epoch": torch.tensor(3)}, tmp_path / "run.pt")
    for one, other in (("model.safetensors", "run.pt"), ("run.pt", "model.safetensors")):
        with open_identified(tmp_path / one) as a, open_identified(tmp_path / other) as b:
            found = compare_checkpoints(a, b)
        assert sorted(change.status for change in found.changes) == sorted(
            ["same", "same", "only_b" if other == "run.pt" else "only_a"]
        )
        assert any("'model.'" in notice for notice in found.notices)


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    with (
        open_identified(tmp_path) as a,
        open_identified(GOLDEN / "llama/hf") as b,
        pytest.raises(UnsupportedFamilyError, match="merge_and_unload"),
    ):
        compare_checkpoints(a, b)
