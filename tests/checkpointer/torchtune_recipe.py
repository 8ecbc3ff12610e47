"""A recipe of torchtune, unchanged, on a tiny model: ``python -m tests.checkpointer.torchtune_recipe OPTIONS`` (JSON).

torchtune imports packages for the downloading of data and models, of which a recipe that has its own needs nothing.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

_ONLY_FOR_DOWNLOADS = {
    "datasets": ["load_dataset", "load_from_disk", "Dataset"],
    "datasets.distributed": ["split_dataset_by_node"],
    "kagglehub": [],
    "kagglehub.auth": ["set_kaggle_credentials"],
    "blobfile": [],
}
_RECIPES = {
    "full": ("full_finetune_single_device", "FullFinetuneRecipeSingleDevice"),
    "lora": ("lora_finetune_single_device", "LoRAFinetuneRecipeSingleDevice"),
}
_LLAMA = {
    "vocab_size": 56,
    "num_layers": 3,
    "num_heads": 12,
    "num_kv_heads": 4,
    "embed_dim": 72,
    "max_seq_len": 256,
    "intermediate_dim": 104,
    "rope_base": 500000,
    "norm_eps": 1e-5,
}
_LORA = {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True}


class Tokenizer:
    """What a recipe asks of a tokenizer."""

    pad_id = 0


def examples(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Twelve texts of eight tokens."""
    rows = [[1 + (7 * row + 3 * at) % 50 for at in range(8)] for row in range(12)]
    return [{"tokens": row, "labels": row} for row in rows]


def config(options: dict[str, Any]) -> dict[str, Any]:
    """A recipe's config, as torchtune ships them, for a run of so many epochs."""
    lora = options["recipe"] == "lora"
    adapter = {**_LORA, "lora_rank": 4, "lora_alpha": 8, "use_dora": options.get("dora", False)} if lora else {}
    return {
        "model": {"_component_": f"torchtune.models.llama3_1.{'lora_' if lora else ''}llama3_1", **_LLAMA, **adapter},
        "tokenizer": {"_component_": f"{__spec__.name}.Tokenizer"},
        "dataset": {"_component_": f"{__spec__.name}.examples"},
        "checkpointer": options["checkpointer"],
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
        "optimizer_in_bwd": False,
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 1},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": options["checkpointer"]["output_dir"] + "-log",
        },
        "resume_from_checkpoint": options["resume"],
        "save_adapter_weights_only": options.get("adapter_only", False),
        "output_dir": options["checkpointer"]["output_dir"],
        "epochs": options["epochs"],
        "seed": 5,
        "shuffle": True,
        "batch_size": 4,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1,
        "compile": False,
        "device": "cpu",
        "dtype": options["dtype"],
        "log_every_n_steps": 1,
    }


def main() -> None:
    """Run the recipe until its last epoch, or until ``stop`` of its epochs are saved."""
    options = json.loads(sys.argv[1])
    sys.path.insert(0, options["packages"])
    for name, entries in _ONLY_FOR_DOWNLOADS.items():
        stub = ModuleType(name)
        vars(stub).update(dict.fromkeys(entries, object))
        sys.modules[name] = stub
    from omegaconf import OmegaConf

    module, name = _RECIPES[options["recipe"]]
    cfg = OmegaConf.create(config(options))
    recipe = runpy.run_path(str(Path(options["packages"], "recipes", f"{module}.py")))[name](cfg=cfg)
    recipe.setup(cfg=cfg)
    save, stop = recipe.save_checkpoint, options.get("stop")

    def saving(epoch: int) -> None:
        save(epoch=epoch)
        if epoch + 1 == stop:
            Path(options["checkpointer"]["output_dir"], "stopped").touch()
            raise SystemExit(0)

    recipe.save_checkpoint = saving
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    main()
