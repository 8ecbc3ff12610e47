"""What tests of transformers' Trainer share: a tiny model, and runs that end where they were not to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


class StoppedError(Exception):
    """A run that ends where it was not to."""


class StopAt(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends a run before or after the checkpointer's callback hears of a step, or within an evaluation there."""

    def __init__(self, step: int, event: str = "on_step_end") -> None:
        def stop(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise StoppedError

        setattr(self, event, stop)


def saved_llama(into: Path, **options: Any) -> Path:
    """A Llama with dropout, saved in bfloat16 with these options of ``save_pretrained``."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
        attention_dropout=0.1,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(into, **options)
    return into
