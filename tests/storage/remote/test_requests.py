"""How many requests commands make, as the server counts them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from benchmarks import checkpoints
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.analysis.diff.compare import compare_checkpoints
from ckpt_convert.analysis.stats.stats import tensor_statistics
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.convert.partition import split_into_pieces
from tests.command import run
from tests.helpers import GOLDEN, read_safetensors
from tests.servers.s3 import Bucket, S3Server
from tests.servers.sparse import BUCKET, SparseBucket

HF = GOLDEN / "llama" / "hf"
SHARDS = len(list(HF.glob("*.safetensors")))


def fill(bucket: Bucket, name: str, folder: Path) -> str:
    """Put the files of a folder into a bucket, the manifest last; the URL."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stem == "manifest")
    for path in paths:
        bucket.put(f"{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"s3://{bucket.name}/{name}"


def inspected(server: S3Server, url: str) -> dict[str, int]:
    server.log.clear()
    run("inspect", url, code=0)
    return dict(server.log.kinds())


def test_inspect_lists_once_and_reads_config_and_headers(bucket: Bucket, s3_server: S3Server) -> None:
    assert inspected(s3_server, fill(bucket, "m", HF)) == {"list": 1, "get": 1 + SHARDS}


def test_inspect_of_an_output_reads_manifest_and_config(bucket: Bucket, s3_server: S3Server, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "hf", to="hf")
    assert inspected(s3_server, fill(bucket, "m", tmp_path / "hf")) == {"list": 1, "get": 2}


def test_a_weight_file_alone_is_looked_up_with_its_neighbors(bucket: Bucket, s3_server: S3Server) -> None:
    fill(bucket, "m", HF)
    url = f"s3://{bucket.name}/m/{sorted(HF.glob('*.safetensors'))[0].name}"
    assert sum(inspected(s3_server, url).values()) <= 6


def header(keys: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of F8 tensors whose bytes are all zero."""
    described, at = {}, 0
    for key, shape in keys.items():
        described[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    text = json.dumps(described).encode()
    return len(text).to_bytes(8, "little") + text + bytes(at)


def test_191_shards_within_200_requests(bucket: Bucket, s3_server: S3Server) -> None:
    """As many files as Llama 3.1 405B has, each with a few of its tensors, though of small sizes."""
    config = json.loads((HF / "config.json").read_text()) | {"num_hidden_layers": 126, "tie_word_embeddings": False}
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    keys: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for layer in range(126):
        at = f"model.layers.{layer}."
        keys |= {f"{at}{name}_layernorm.weight": (dim,) for name in ("input", "post_attention")}
        keys |= {f"{at}self_attn.{name}_proj.weight": (dim, dim) for name in "qo"}
        keys |= {f"{at}self_attn.{name}_proj.weight": (kv, dim) for name in "kv"}
        keys |= {f"{at}mlp.{name}_proj.weight": (ffn, dim) for name in ("gate", "up")}
        keys[f"{at}mlp.down_proj.weight"] = (dim, ffn)
    keys |= {"model.norm.weight": (dim,), "lm_head.weight": (config["vocab_size"], dim)}
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for number, key in enumerate(keys):
        name = f"model-{number * 191 // len(keys) + 1:05d}-of-00191.safetensors"
        files.setdefault(name, {})[key] = keys[key]
    bucket.put("m/config.json", json.dumps(config).encode())
    weight_map = {key: name for name, held in files.items() for key in held}
    bucket.put("m/model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}).encode())
    for name, held in files.items():
        bucket.put(f"m/{name}", header(held))
    assert len(files) == 191
    assert inspected(s3_server, f"s3://{bucket.name}/m") == {"list": 1, "get": 1 + 191}
    ckpt_convert.convert_checkpoint(f"s3://{bucket.name}/m", f"s3://{bucket.name}/out", to="hf")
    assert inspected(s3_server, f"s3://{bucket.name}/out") == {"list": 1, "get": 2}


def test_the_sizes_of_405b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """812 GB in 191 sparse files: with a manifest three requests, without one 193."""
    config = checkpoints.config(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, head_dim=128, vocab_size=128256,
    )  # fmt: skip
    checkpoints.write(tmp_path / "m", config, 191, sparse=True)
    plan = ckpt_convert.plan_conversion(tmp_path / "m", to="hf")
    files: dict[str, Any] = {file.name: {"size": file.size, "header": "0" * 16, "pieces": []} for file in plan.files}
    for piece in split_into_pieces(plan.files):
        file = plan.files[piece.file]
        described = [file.tensors[piece.tensor].key, piece.offset, piece.nbytes, "0" * 16]
        files[file.name]["pieces"].append(described)
    with SparseBucket(tmp_path) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        shown = run("inspect", f"s3://{BUCKET}/m", code=0).stdout
        assert server.log.kinds() == {"list": 1, "get": 1 + 191}
        (tmp_path / "m" / "ckpt_convert").mkdir()
        manifest = record.render_manifest(plan.manifest(files, [], {}))
        (tmp_path / "m" / record.MANIFEST).write_bytes(manifest)
        assert len(manifest) < 2_000_000
        server.log.clear()
        again = run("inspect", f"s3://{BUCKET}/m", code=0).stdout
        assert server.log.kinds() == {"list": 1, "get": 2}
        assert again.partition("\n\n")[2] == shown.partition("\n\n")[2]
        assert "405,853,388,800" in shown


@pytest.mark.parametrize("target", ["hf", "meta"])
def test_a_conversion_fetches_each_byte_once(bucket: Bucket, s3_server: S3Server, target: str) -> None:
    url = fill(bucket, "m", HF)
    s3_server.log.clear()
    ckpt_convert.convert_checkpoint(f"{url}", f"s3://{bucket.name}/out", to=target)
    size = sum(path.stat().st_size for path in HF.glob("*.safetensors"))
    headers = sum(min(path.stat().st_size, 1 << 18) for path in HF.glob("*.safetensors"))
    fetched = sum(one.sent for one in s3_server.log.all("get") if one.name.endswith(".safetensors"))
    assert fetched <= size + headers


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with many small tensors: 363 in one file of 6 MB."""
    made = tmp_path_factory.mktemp("deep") / "hf"
    made.mkdir()
    golden, generator = read_safetensors(HF), torch.Generator().manual_seed(0)
    layer = {key: tensor.shape for key, tensor in golden.items() if ".layers.0." in key}
    tensors = {key: tensor for key, tensor in golden.items() if ".layers." not in key}
    for number in range(40):
        for key, shape in layer.items():
            tensors[key.replace(".0.", f".{number}.")] = torch.randn(shape, generator=generator)
    config = json.loads((HF / "config.json").read_text()) | {"num_hidden_layers": 40}
    (made / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


def stored_as(format: str, deep: Path, tmp_path: Path) -> Path:
    if format != "hf":
        ckpt_convert.convert_checkpoint(deep, tmp_path / format, to=format)
    return tmp_path / format if format != "hf" else deep


@pytest.mark.parametrize("format", ["hf", "meta", "torchtitan"])
def test_small_tensors_are_read_together(
    bucket: Bucket, s3_server: S3Server, deep: Path, tmp_path: Path, format: str
) -> None:
    """Whatever reads all tensors makes few requests, and fetches each byte once."""
    source = stored_as(format, deep, tmp_path)
    url = fill(bucket, "m", source)
    weights = [path for path in source.iterdir() if path.suffix in (".safetensors", ".pth", ".distcp")]
    size = sum(path.stat().st_size for path in weights)

    def statistics() -> None:
        with open_identified(url) as opened:
            list(tensor_statistics(opened, opened.tensors, workers=2))

    def each() -> None:
        with ckpt_convert.open_checkpoint(url) as opened:
            for key in opened:
                opened[key].tobytes()

    def differences() -> None:
        with open_identified(url) as far, open_identified(deep) as near:
            assert compare_checkpoints(far, near).same

    for number, work in enumerate(
        (
            lambda: ckpt_convert.convert_checkpoint(url, tmp_path / "a", to="native"),
            lambda: ckpt_convert.convert_checkpoint(url, tmp_path / "b", to="meta", model_parallel=2),
            lambda: ckpt_convert.convert_checkpoint(
                url, tmp_path / "c", to="hf", dtype="bfloat16", allow_overflow=True
            ),
            lambda: check_checkpoint(url),
            statistics,
            each,
            differences,
        )
    ):
        s3_server.log.clear()
        work()
        asked = [one for path in weights for one in s3_server.log.all("get", name=f"{bucket.name}/m/{path.name}")]
        assert len(asked) <= 5, number
        assert sum(one.sent for one in asked) <= 1.05 * size, number
