"""Makes the checkpoints that the benchmarks run on, without ckpt-convert: with safetensors, sparse ones by hand.

python benchmarks/checkpoints.py DIR                 the 1.5 B Llama of docs/benchmarks.md (3.0 GB, 4 files)
python benchmarks/checkpoints.py DIR --layers 48     one of three times the layers
python benchmarks/checkpoints.py DIR --sparse-405b   Llama 3.1 405B's headers over sparse files (no bytes)
python benchmarks/checkpoints.py DIR --moe           a Qwen3 MoE of 16 experts (2.1 GB, 4 files)
python benchmarks/checkpoints.py DIR --tuned SRC     SRC with every weight changed a little, as by fine-tuning
python benchmarks/checkpoints.py DIR --adapter 16    PEFT's files of an adapter of rank 16 of that Llama's linear layers
python benchmarks/checkpoints.py DIR --adapter 8 --modules q_proj v_proj
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Mapping
from pathlib import Path

BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def keys(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Hugging Face keys and shapes of a Llama, in the order of the layers."""
    dim, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        out |= {
            f"{at}input_layernorm.weight": (dim,),
            f"{at}self_attn.q_proj.weight": (heads, dim),
            f"{at}self_attn.k_proj.weight": (kv, dim),
            f"{at}self_attn.v_proj.weight": (kv, dim),
            f"{at}self_attn.o_proj.weight": (dim, heads),
            f"{at}post_attention_layernorm.weight": (dim,),
            f"{at}mlp.gate_proj.weight": (ffn, dim),
            f"{at}mlp.up_proj.weight": (ffn, dim),
            f"{at}mlp.down_proj.weight": (dim, ffn),
        }
    out["model.norm.weight"] = (dim,)
    out["lm_head.weight"] = (config["vocab_size"], dim)
    return out


def moe_keys(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Hugging Face keys and shapes of a Qwen3 MoE, in the order of the layers."""
    dim, ffn, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    out = {}
    for key, shape in keys(config).items():
        layer, found, _ = key.partition("mlp.gate_proj.weight")
        if found:
            out |= {f"{layer}self_attn.{name}_norm.weight": (head,) for name in "qk"}
            out[f"{layer}mlp.gate.weight"] = (config["num_experts"], dim)
            for expert in range(config["num_experts"]):
                at = f"{layer}mlp.experts.{expert}."
                out |= {f"{at}gate_proj.weight": (ffn, dim), f"{at}up_proj.weight": (ffn, dim)}
                out[f"{at}down_proj.weight"] = (dim, ffn)
        elif ".mlp." not in key:
            out[key] = shape
    return out


def sharded(shapes: dict[str, tuple[int, ...]], files: int) -> list[dict[str, tuple[int, ...]]]:
    """The keys in ``files`` runs of about the same size."""
    sizes = {key: 2 * size(shape) for key, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(files)]
    for key, shape in shapes.items():
        groups[min(files - 1, (done + sizes[key] // 2) * files // total)][key] = shape
        done += sizes[key]
    return groups


def size(shape: tuple[int, ...]) -> int:
    count = 1
    for part in shape:
        count *= part
    return count


def config(**sizes: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **sizes,
    }


def write(directory: Path, content: dict[str, object], files: int, *, sparse: bool) -> None:
    """config.json, the shards and their index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    groups = sharded((moe_keys if "num_experts" in content else keys)(content), files)  # type: ignore[arg-type]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{files:05d}.safetensors"
        weight_map |= dict.fromkeys(group, name)
        (write_sparse if sparse else write_random)(directory / name, group, number)
    total = sum(2 * size(shape) for group in groups for shape in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_random(path: Path, group: dict[str, tuple[int, ...]], seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    save_file({key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in group.items()}, path, {"format": "pt"})


def write_sparse(path: Path, group: dict[str, tuple[int, ...]], seed: int) -> None:
    write_headers(path, {key: ("BF16", shape) for key, shape in group.items()})


def write_headers(path: Path, group: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """A safetensors file of these dtypes and shapes that takes no room; returns the bytes that its tensors would."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for key, (dtype, shape) in group.items():
        end = at + BYTES[dtype] * size(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}  # type: ignore[dict-item]
        at = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + at)
    return at


def write_described(
    directory: Path, content: Mapping[str, object], tensors: Mapping[str, tuple[str, tuple[int, ...]]], files: int
) -> None:
    """A sparse checkpoint of these dtypes and shapes, with its config.json and index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    groups = sharded({key: shape for key, (_, shape) in tensors.items()}, files)
    weight_map, total = {}, 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{files:06d}.safetensors"
        weight_map |= dict.fromkeys(group, name)
        total += write_headers(directory / name, {key: tensors[key] for key in group})
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tuned(directory: Path, source: Path) -> None:
    """A copy whose weights differ from the source's by one part in a hundred or so."""
    import torch
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        if path.suffix != ".safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
            continue
        torch.manual_seed(1000 + number)
        tensors = {key: tensor * (1 + 0.01 * torch.randn_like(tensor)) for key, tensor in load_file(path).items()}
        save_file(tensors, directory / path.name, {"format": "pt"})


def write_adapter(directory: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, modules: list[str]) -> None:
    """PEFT's files of an adapter of these modules, in float32, whose delta is small beside the weights."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    torch.manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        name = key.removesuffix(".weight")
        if name.rpartition(".")[2] in modules:
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn((rank, shape[1])) / 50
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn((shape[0], rank)) / 50
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sparse-405b", action="store_true")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--tuned", type=Path, metavar="SRC")
    parser.add_argument("--adapter", type=int, metavar="RANK")
    parser.add_argument("--modules", nargs="+", default=list(LINEAR), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.tuned:
        write_tuned(arguments.directory, arguments.tuned)
    elif arguments.moe:
        content = config(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=10, num_attention_heads=32,
            num_key_value_heads=4, head_dim=128, vocab_size=32000, num_experts=16, moe_intermediate_size=768,
        )  # fmt: skip
        content |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts_per_tok": 2,
            "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        }  # fmt: skip
        write(arguments.directory, content, 4, sparse=False)
    elif arguments.sparse_405b:
        content = config(
            hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
            num_key_value_heads=8, head_dim=128, vocab_size=128256,
        )  # fmt: skip
        write(arguments.directory, content, 191, sparse=True)
    else:
        content = config(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=arguments.layers, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=128256,
        )  # fmt: skip
        if arguments.adapter:
            write_adapter(arguments.directory, keys(content), arguments.adapter, arguments.modules)  # type: ignore[arg-type]
        else:
            write(arguments.directory, content, 4, sparse=False)


if __name__ == "__main__":
    main()
