"""Plain values of a small model: headers of files that are nowhere, what its config says, and no checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ckpt_convert.checkpoint.hints import ConfigFile, Hints
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.containers.build import TensorSpec, layout_from_specs
from ckpt_convert.formats.base import WeightDirectory
from ckpt_convert.storage.base import Version
from ckpt_convert.storage.place import as_place
from ckpt_convert.tensors.header import FileLayout, WeightFile

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (24, 16),
    "model.layers.0.mlp.up_proj.weight": (24, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 24),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.norm.weight": (16,),
}


class HeaderAlone:
    """A file of which nobody may read a tensor."""

    def __init__(self, name: str, layout: FileLayout) -> None:
        self.name, self.size, self._literals = name, layout.header.size, layout.literals

    def readinto(self, offset: int, buffer: memoryview) -> None:
        for start, data in self._literals:
            if start <= offset and offset + len(buffer) <= start + len(data):
                buffer[:] = data[offset - start : offset - start + len(buffer)]
                return
        raise AssertionError(f"{self.name}: a tensor was read, at {offset}")


def file(name: str, *keys: str, dtype: str = "BF16", more: Sequence[TensorSpec] = ()) -> WeightFile:
    """A safetensors file of these tensors, and ``more``."""
    specs = [(key, dtype, SHAPES[key.removeprefix("module.")]) for key in keys]
    made = layout_from_specs(name, "safetensors", [*specs, *more], {"format": "pt"})
    return WeightFile(name, 0, as_place(Path(name)), HeaderAlone(name, made), made.header)


def opened(*files: WeightFile, format: str | None = "hf", weight_map: dict[str, str] | None = None) -> OpenedFiles:
    index = "model.safetensors.index.json" if weight_map is not None else None
    seen = {one.place: Version(one.header.size, "1") for one in files}
    path, directory = as_place(Path("somewhere/model.safetensors")), WeightDirectory((), index, weight_map)
    return OpenedFiles(path, format, "as asked for", directory, files, identities=seen)


def identified(files: OpenedFiles, config: dict[str, Any] | None, hints: Hints | None = None) -> Identified:
    return Identified(files, ConfigFile(as_place(Path("somewhere/config.json")), config), hints or Hints())
