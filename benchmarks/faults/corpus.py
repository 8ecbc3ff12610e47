"""Sound checkpoints of a few kilobytes of every kind, and what is done with each when one of its files is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import safetensors.torch
import sentencepiece
import torch
from torch.distributed import checkpoint as dcp

from benchmarks.faults import forked
from recipes import demo

Words = tuple[str, ...]
"""A command; {} is the checkpoint, {out} a place for an output."""

LOOK: tuple[Words, ...] = (("inspect", "{}"), ("verify", "{}"), ("verify", "{}", "--json"))
WIDTH, VOCAB, LAYERS = 16, 528, 2


@dataclass(frozen=True)
class Subject:
    """A file that is damaged: what kind it is (a row of the table), where, and what is then run."""

    kind: str
    directory: Path
    file: str
    commands: tuple[Words, ...]


def tensors(vocab: int = VOCAB, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """A Llama of 16 channels, 4 heads over 2; every value tells its place."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"model.embed_tokens": (vocab, WIDTH), "model.norm": (WIDTH,), "lm_head": (vocab, WIDTH)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + name: (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {at + f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qo"}
        shapes |= {at + f"self_attn.{name}_proj": (WIDTH // 2, WIDTH) for name in "kv"}
        shapes |= {at + f"mlp.{name}_proj": (24, WIDTH) for name in ("gate", "up")}
        shapes |= {at + "mlp.down_proj": (WIDTH, 24)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()
    }


def write_hf(directory: Path, state: Mapping[str, torch.Tensor], *, container: str = "safetensors") -> Path:
    """Two shards, an index, config and generation config."""
    directory.mkdir(parents=True)
    keys = sorted(state)
    stem, ending = ("model", "safetensors") if container == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number, part in enumerate((keys[:9], keys[9:]), 1):
        name = f"{stem}-{number:05d}-of-00002.{ending}"
        chosen = {key: state[key] for key in part}
        if container == "safetensors":
            safetensors.torch.save_file(chosen, directory / name, {"format": "pt"})
        else:
            torch.save(chosen, directory / name)
        weight_map |= dict.fromkeys(part, name)
    size = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    ending = "safetensors.index.json" if container == "safetensors" else "bin.index.json"
    (directory / f"{stem}.{ending}").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": len(state["lm_head.weight"]),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6}')
    return directory


def make(*words: object) -> None:
    """Run a command in a child; it has to succeed."""
    ended = forked.run(forked.command(*words))
    if ended.status:
        raise SystemExit(f"{words}: {ended.err}")


def warm(hf: Path, place: Path) -> None:
    """Run the commands in this very process, so that the children find everything imported."""
    for words in (
        ("hf-to-meta", hf, place / "warm", "--verify"),
        ("inspect", hf),
        ("verify", hf),
        ("verify", hf, "--json"),
    ):
        with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.redirect_stderr(io.StringIO()):
            forked.command(*words)()
    shutil.rmtree(place / "warm")


def _tokenizers(folder: Path) -> None:
    tokenizer = demo.train_tokenizer(VOCAB - 256 - 4)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40 + "".join(map(chr, range(33, 120))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spm"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )


def _gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "βγ", ""] * 20)
    writer.add_tensor("token_embd.weight", np.arange(640, dtype=np.float32).reshape(20, 32))
    writer.add_tensor("norm", np.arange(7, dtype=np.float16))
    quantized = gguf.quants.quantize(np.ones((2, 256), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _adapter(directory: Path) -> None:
    directory.mkdir()
    at = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    lora = {f"{at}A.weight": torch.randn(2, WIDTH), f"{at}B.weight": torch.randn(WIDTH, 2)}
    safetensors.torch.save_file(lora, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def build(place: Path) -> list[Subject]:
    """Make all of them below a folder; returns what can be damaged."""
    made = place / "made"
    made.mkdir(parents=True)
    _tokenizers(made)
    state = tensors()
    hf = write_hf(place / "hf", state)
    shutil.copy(made / "tokenizer.json", hf)
    (hf / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    warm(hf, place)
    bin_ = write_hf(place / "bin", state, container="bin")
    torch.save(dict(state), place / "bin" / "legacy.tmp", _use_new_zipfile_serialization=False)
    legacy = place / "legacy"
    legacy.mkdir()
    shutil.move(place / "bin" / "legacy.tmp", legacy / "pytorch_model.bin")
    shutil.copy(hf / "config.json", legacy)
    nest = place / "nest"
    nest.mkdir()
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"model": dict(state), "optimizer": optimizer, "epoch": 3, "best": None}, nest / "run.pt")
    make("hf-to-meta", hf, place / "meta", "--model-parallel", 2)
    (place / "meta" / "checklist.chk").write_text(
        "".join(
            f"{hashlib.md5((place / 'meta' / name).read_bytes()).hexdigest()}  {name}\n"
            for name in ("consolidated.00.pth", "consolidated.01.pth", "params.json")
        )
    )
    plain = place / "plain-meta"
    shutil.copytree(place / "meta", plain, ignore=shutil.ignore_patterns("ckpt_convert"))
    spm = write_hf(place / "spm-hf", tensors(400))
    shutil.copy(made / "spm.model", spm / "tokenizer.model")
    make("meta-to-native", place / "meta", place / "native")
    make("hf-to-torchtitan", hf, place / "titan")
    dcp.save({key: tensor.clone() for key, tensor in state.items()}, checkpoint_id=place / "dcp", no_dist=True)
    (place / "gguf").mkdir()
    _gguf(place / "gguf" / "model.gguf")
    _adapter(place / "adapter")

    to_meta: Words = ("hf-to-meta", "{}", "{out}", "--verify")
    to_native: Words = ("hf-to-native", "{}", "{out}")
    from_meta = (("meta-to-hf", "{}", "{out}", "--verify"), ("meta-to-hf", "{}", "{out}", "--dry-run"))
    again: Words = ("convert", "{}", "{out}", "--to", "hf", "--shards", "1")
    subjects = [
        Subject("safetensors", hf, "model-00001-of-00002.safetensors", (*LOOK, to_meta, again, to_native)),
        Subject("torch zip", bin_, "pytorch_model-00001-of-00002.bin", (*LOOK, again, to_native)),
        Subject("torch zip", plain, "consolidated.01.pth", (*LOOK, *from_meta)),
        Subject("torch zip", nest, "run.pt", LOOK),
        Subject("torch before zip", legacy, "pytorch_model.bin", (LOOK[0], LOOK[1], again)),
        Subject("DCP .metadata", place / "titan", ".metadata", (*LOOK, ("torchtitan-to-hf", "{}", "{out}"))),
        Subject("DCP .metadata", place / "dcp", ".metadata", LOOK),
        Subject("DCP data", place / "dcp", "__0_0.distcp", LOOK),
        Subject("GGUF", place / "gguf", "model.gguf", LOOK),
        Subject("index", hf, "model.safetensors.index.json", (*LOOK, to_meta)),
        Subject("index", bin_, "pytorch_model.bin.index.json", (*LOOK, to_native)),
        Subject("config.json", hf, "config.json", (*LOOK, to_meta, to_native)),
        Subject("config.json", hf, "generation_config.json", (LOOK[1], to_meta)),
        Subject("params.json", plain, "params.json", (*LOOK, *from_meta)),
        Subject("tokenizers", hf, "tokenizer.json", (LOOK[1], to_meta)),
        Subject("tokenizers", hf, "tokenizer_config.json", (LOOK[1], to_meta)),
        Subject("tokenizers", plain, "tokenizer.model", (LOOK[1], from_meta[0])),
        Subject("tokenizers", spm, "tokenizer.model", (LOOK[1], to_meta)),
        Subject("adapters", place / "adapter", "adapter_config.json", LOOK),
        Subject("adapters", place / "adapter", "adapter_model.safetensors", LOOK),
        Subject("checklist.chk", place / "meta", "checklist.chk", (*LOOK, from_meta[0])),
    ]
    for directory, back in ((place / "meta", from_meta[0]), (place / "native", ("native-to-hf", "{}", "{out}"))):
        for path in sorted((directory / "ckpt_convert").rglob("*")):
            if path.is_file():
                name = path.relative_to(directory).as_posix()
                kind = "manifest" if name.endswith("manifest.json") else "record"
                subjects.append(Subject(kind, directory, name, (*LOOK, back)))
    return subjects + _journal(place, hf)


def _journal(place: Path, hf: Path) -> list[Subject]:
    """A conversion that was killed as its last files were written: what --resume then reads is damaged."""
    holder = place / "killed"
    holder.mkdir()
    words = ("hf-to-meta", hf, holder / "out")
    calls = forked.run(forked.command(*words), forked.Fault(holder)).calls
    for at in range(calls - 5, 0, -5):
        shutil.rmtree(holder)
        holder.mkdir()
        forked.run(forked.command(*words), forked.Fault(holder, at, forked.SIGNALS + 9))
        partial = holder / ".out.partial"
        journals = [path for path in partial.glob(".*") if path.is_file() and b"\n[" in path.read_bytes()[:4096]]
        if journals and (partial / "consolidated.00.pth").exists():
            resume: Words = ("hf-to-meta", str(hf), "{}/out", "--resume", "--quiet")
            name = journals[0].relative_to(holder).as_posix()
            return [Subject("journal", holder, name, (resume,))]
    raise SystemExit("no kill left a journal")


def on_python(directory: Path, source: Path) -> Callable[[], int]:
    """A job: a run is resumed from a step; refusing is fine, anything but a CkptConvertError is not."""

    def job() -> int:
        import ckpt_convert
        from tests.checkpointer.training import Trained

        trained = Trained(source)
        try:
            with ckpt_convert.Checkpointer(source, directory, save_last=False) as checkpointer:
                checkpointer.load_model(trained.model)
                checkpointer.resume(**trained.parts)
        except ckpt_convert.CkptConvertError as error:
            print(f"error: {error}")
            return 3
        return 0

    return job
