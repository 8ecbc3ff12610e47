"""The memory of a conversion is that of its buffers: a model of four times the size takes no more."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FEW, MANY = 4, 16
"""Layers, of 22 MB each."""

SLACK = 16 << 20
"""What else may differ: headers, the plan, a growing heap. The larger model has 250 MB more."""

CONVERT = """
import json, re, sys
import ckpt_convert
source, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ckpt_convert.convert_checkpoint(source, out, workers=2, **options)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def write_model(folder: Path, layers: int) -> int:
    """A Llama of zeros that take no place on the disk; returns the bytes of its tensors."""
    dim, wide, kv = 1024, 2816, 256
    of_layer = {
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (wide, dim),
        "mlp.up_proj": (wide, dim),
        "mlp.down_proj": (dim, wide),
    }
    shapes = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in of_layer.items()}
    shapes |= {"model.embed_tokens": (64, dim), "model.norm": (dim,), "lm_head": (64, dim)}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    return end


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
@pytest.mark.parametrize(
    "options",
    [{"to": "meta", "model_parallel": 2, "verify": True}, {"to": "native", "dtype": "float32"}],
    ids=["reordered and split", "cast"],
)
def test_a_model_of_several_times_the_budget_takes_no_more_memory(options: dict[str, Any], tmp_path: Path) -> None:
    peaks = {}
    for layers in (FEW, MANY):
        source = tmp_path / str(layers)
        size = write_model(source, layers)
        command = [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "out"), json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[layers] = 1024 * int(done.stdout)
        for folder in (source, tmp_path / "out"):
            shutil.rmtree(folder)
    assert size > 5 * peaks[MANY]
    assert abs(peaks[MANY] - peaks[FEW]) < SLACK
