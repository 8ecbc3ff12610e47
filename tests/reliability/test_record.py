"""The record: every byte of an output is under a checksum, and the same output has one manifest, whoever wrote it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash

import ckpt_convert
from ckpt_convert import Checkpointer, CorruptFileError, NotEnoughSpaceError
from recipes.native_llama import add_lora
from tests.checkpointer.training import Trained, make_model
from tests.command import run as command
from tests.helpers import crc64, edit_json, sums, write_manifest

EARLIER = Path(__file__).parent.parent.parent / "fixtures" / "schema1"
"""What was written before manifests had a checksum of themselves: a source, what was made of it, and a saved step."""

HF = EARLIER / "hf"
MANIFEST = "ckpt_convert/manifest.json"
EDITED = "edited or damaged"
PIECE = 64 << 20

Path_ = tuple[Any, ...]


def verified(path: Path, *options: str) -> list[dict[str, Any]]:
    """What ``verify`` finds; its exit code has to say whether there are errors."""
    done = command("verify", path, "--json", *options)
    document = json.loads(done.stdout)
    assert done.returncode == (1 if document["errors"] else 0), done.stderr
    found: list[dict[str, Any]] = document["findings"]
    return found


def manifest_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return content


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a file for people and one that only some formats have a use for."""
    path = tmp_path_factory.mktemp("source") / "hf"
    shutil.copytree(HF, path)
    (path / "README.md").write_text("A model.\n")
    return path


@pytest.fixture(scope="module")
def outputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each container: safetensors, torch zip, torch.distributed.checkpoint; and a saved step."""
    place = tmp_path_factory.mktemp("outputs")
    ckpt_convert.convert_checkpoint(source, place / "meta", to="meta", model_parallel=2)
    ckpt_convert.convert_checkpoint(place / "meta", place / "hf", to="hf")
    ckpt_convert.convert_checkpoint(source, place / "torchtitan", to="torchtitan")
    (place / "recipe.yaml").write_text("lr: 0.1\n")
    trained = Trained(source)
    with Checkpointer(source, place / "run", save_every=2, extra_files=[place / "recipe.yaml"]) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 2)
        checkpointer.report(val_loss=2.5)
    return {**{name: place / name for name in ("hf", "meta", "torchtitan")}, "step": place / "run" / "step_2"}


@pytest.fixture
def output(request: pytest.FixtureRequest, outputs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of one of them, to be damaged, under the name that it has."""
    original = outputs[request.param]
    return Path(shutil.copytree(original, tmp_path / original.name))


EACH = pytest.mark.parametrize("output", ["hf", "meta", "torchtitan", "step"], indirect=True)


# What the manifest says


def paths(content: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Where every value of a JSON document is, but for the document itself."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from paths(value, (*at, key))


def holder(content: Any, at: Path_) -> Any:
    for key in at[:-1]:
        content = content[key]
    return content


def edited(content: Any, at: Path_) -> Any:
    """Another value of the same kind, where there is one."""
    inside, key = holder(content, at), at[-1]
    value = inside[key]
    inside[key] = (
        not value
        if isinstance(value, bool)
        else value + 1
        if isinstance(value, int | float)
        else f"{value}x"
        if isinstance(value, str)
        else 0
    )
    return content


def renamed(content: Any, at: Path_) -> Any:
    inside, key = holder(content, at), at[-1]
    if isinstance(inside, dict):
        inside[f"{key}_"] = inside.pop(key)
    else:
        inside.append(inside.pop(key))
    return content


def removed(content: Any, at: Path_) -> Any:
    del holder(content, at)[at[-1]]
    return content


@EACH
def test_whatever_is_edited_renamed_or_removed_in_the_manifest_is_noticed(output: Path) -> None:
    text = (output / MANIFEST).read_text()
    tried = 0
    for at in paths(json.loads(text)):
        for change in (edited, renamed, removed):
            content = change(json.loads(text), at)
            if content == json.loads(text):
                continue  # the last entry of a list, put last
            (output / MANIFEST).write_text(json.dumps(content))
            with pytest.raises(ckpt_convert.InputError) as caught:
                ckpt_convert.open_checkpoint(output)
            newer = at == ("schema",) and change is edited
            assert ("newer ckpt-convert: update" if newer else EDITED) in str(caught.value), (at, change)
            tried += 1
    assert tried > 100


@pytest.mark.parametrize(
    ("output", "key"), [("hf", "manifest_checksum"), ("step", "training"), ("torchtitan", "files")], indirect=["output"]
)
def test_verify_says_so_and_the_command_fails(output: Path, key: str) -> None:
    content = renamed(manifest_of(output), (key,))
    (output / MANIFEST).write_text(json.dumps(content, indent=2))
    errors = [finding for finding in verified(output, "--quick") if finding["severity"] == "error"]
    assert [(finding["check"], finding["file"]) for finding in errors] == [("record", MANIFEST)]
    assert EDITED in errors[0]["text"]


@pytest.mark.parametrize("output", ["meta"], indirect=True)
def test_its_order_and_spaces_are_nobodys_business(output: Path) -> None:
    content = dict(reversed(manifest_of(output).items()))
    (output / MANIFEST).write_text(json.dumps(content, indent=7))
    assert verified(output) == []


@pytest.mark.parametrize("output", ["meta"], indirect=True)
def test_without_an_edited_manifest_the_weights_can_be_converted_as_the_message_says(
    output: Path, source: Path, tmp_path: Path
) -> None:
    edit_json(output / MANIFEST, tied=True)
    refused = command("meta-to-hf", output, tmp_path / "out")
    assert (refused.returncode, (tmp_path / "out").exists()) == (3, False)
    assert f"move the folder ckpt_convert out of {output}" in refused.stderr
    shutil.move(output / "ckpt_convert", tmp_path / "kept")
    done = command("meta-to-hf", output, tmp_path / "out", "--config", tmp_path / "kept" / "config.json", "--verify")
    assert done.returncode == 0, done.stderr
    assert command("diff", source, tmp_path / "out", "--quiet").returncode == 0


def test_one_of_a_newer_schema_asks_for_an_update(outputs: dict[str, Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(outputs["meta"], tmp_path / "meta"))
    write_manifest(output / MANIFEST, manifest_of(output) | {"schema": 3})
    with pytest.raises(ckpt_convert.ConfigError, match="newer ckpt-convert: update"):
        ckpt_convert.open_checkpoint(output)


@EACH
def test_what_it_says_is_true_and_tells_nothing_of_this_machine(output: Path, outputs: dict[str, Path]) -> None:
    content = manifest_of(output)
    said = {name: value for name, value in content.items() if name != "manifest_checksum"}
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    assert content["manifest_checksum"] == xxhash.xxh3_64_hexdigest(canonical)
    assert (content["schema"], content["checksum"]) == (2, {"weights": "crc64_xz", "files": "xxh3_64"})
    for name, entry in content["files"].items():
        data, position, between = (output / name).read_bytes(), 0, b""
        assert len(data) == entry["size"]
        for _, offset, nbytes, checksum in entry["pieces"]:
            assert crc64(data[offset : offset + nbytes]) == checksum
            between += data[position:offset]
            position = offset + nbytes
        assert crc64(between + data[position:]) == entry["header"]
    for path in outputs.values():
        assert str(path.parent) not in json.dumps(content)
    training = content.pop("training", None)
    assert "versions" not in json.dumps(content)
    if training is not None:
        assert training["run_name"] == "run"
        assert training["versions"] == {"ckpt_convert": ckpt_convert.__version__, "torch": torch.__version__}


# Every byte


def stretches(entry: dict[str, Any]) -> list[tuple[int, int]]:
    """The bytes of a weight file that belong to no tensor: headers, padding, what a zip archive says of its members."""
    ends = [0, *(offset + nbytes for _, offset, nbytes, _ in entry["pieces"])]
    starts = [*(offset for _, offset, _, _ in entry["pieces"]), entry["size"]]
    return [(end, start) for end, start in zip(ends, starts, strict=True) if end < start]


def named(findings: list[dict[str, Any]]) -> set[str]:
    """The files that findings are about."""
    return {finding["file"] for finding in findings if finding["severity"] != "note"}


@EACH
def test_a_flipped_bit_in_any_file_is_found(output: Path) -> None:
    chance = random.Random(output.name)
    weights = manifest_of(output)["files"]
    names = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    apart = {MANIFEST, ".metadata"}  # without which no other file is looked at
    for name in names - apart:
        if name in weights:
            _, offset, nbytes, _ = chance.choice(weights[name]["pieces"])
            flip(output / name, offset + chance.randrange(nbytes), chance.randrange(8))
        else:
            flip(output / name, chance.randrange((output / name).stat().st_size), chance.randrange(8))
    found = verified(output)
    assert names - apart <= named(found)
    assert all(finding["severity"] == "error" for finding in found if finding["file"] in weights)


@EACH
@pytest.mark.parametrize("where", ["in the first", "in the last", "in any"])
def test_a_flipped_bit_where_no_tensor_is(output: Path, where: str) -> None:
    chance = random.Random(f"{output.name} {where}")
    weights = manifest_of(output)["files"]
    for name, entry in weights.items():
        places = stretches(entry)
        if where == "in the last" and len(places) == 1:
            pytest.skip("there is one")
        start, end = {"in the first": places[0], "in the last": places[-1]}.get(where) or chance.choice(places)
        flip(output / name, chance.randrange(start, end), chance.randrange(8))
    found = [finding for finding in verified(output, "--quick") if finding["severity"] == "error"]
    assert {name for name in weights if any(name in finding["text"] for finding in found)} == weights.keys()


@pytest.mark.parametrize(("output", "name"), [("torchtitan", ".metadata"), ("step", MANIFEST)], indirect=["output"])
def test_a_flipped_bit_in_what_says_which_files_there_are(output: Path, name: str) -> None:
    size = (output / name).stat().st_size
    for at in random.Random(name).sample(range(size), 2):
        flip(output / name, at)
        assert name in named(verified(output, "--quick"))
        flip(output / name, at)
    assert verified(output, "--quick") == []


def test_the_full_weights_beside_an_adapter_are_verified_with_it(source: Path, tmp_path: Path) -> None:
    model = make_model(source)
    add_lora(model, 2, 4.0, ["q_proj"])
    adapter = ckpt_convert.AdapterConfig(rank=2, alpha=4, target_modules=["q_proj"])
    with Checkpointer(source, tmp_path / "run", adapter=adapter, merged=True, save_every=1) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        checkpointer.step()
    step = tmp_path / "run" / "step_1"
    assert verified(step) == []
    flipped = {"merged/model-00001-of-00002.safetensors", "merged/config.json", "adapter_model.safetensors"}
    for name in flipped:
        flip(step / name, (step / name).stat().st_size - 3)
    assert flipped <= named(verified(step))


# The same manifest


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """A disk that has room for so many writes."""
    pwrite, left = os.pwrite, after

    def limited(fd: int, data: Any, offset: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    os.pwrite = limited
    try:
        with pytest.raises(NotEnoughSpaceError):
            yield
    finally:
        os.pwrite = pwrite


def test_the_same_conversion_has_the_same_manifest_whoever_writes_it(source: Path, tmp_path: Path) -> None:
    def convert(name: str, **options: Any) -> ckpt_convert.Report:
        return ckpt_convert.convert_checkpoint(source, tmp_path / name, to="meta", model_parallel=2, **options)

    convert("one", workers=1)
    convert("four", workers=4)
    with full_disk(25):
        convert("resumed", workers=1)
    assert convert("resumed", resume=True).resumed_bytes > 0
    assert len({(tmp_path / name / MANIFEST).read_bytes() for name in ("one", "four", "resumed")}) == 1


def test_what_an_earlier_attempt_wrote_counts_only_with_its_checksum(source: Path, tmp_path: Path) -> None:
    with full_disk(8):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native", shards=1, workers=1)
    (weights,) = (tmp_path / ".out.partial").glob("*.safetensors")
    written = [at for at, byte in enumerate(weights.read_bytes()) if byte]
    flip(weights, written[-100])
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native", shards=1, resume=True)
    ckpt_convert.convert_checkpoint(source, tmp_path / "plain", to="native", shards=1)
    assert sums(tmp_path / "out") == sums(tmp_path / "plain")
    assert (tmp_path / "out" / MANIFEST).read_bytes() == (tmp_path / "plain" / MANIFEST).read_bytes()


def test_files_have_the_same_checksums_by_whatever_way_they_came(source: Path, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    ckpt_convert.convert_checkpoint(source, tmp_path / "titan", to="torchtitan")
    ways = {"hf": source, "native": tmp_path / "native", "torchtitan": tmp_path / "titan"}
    for name, way in ways.items():
        ckpt_convert.convert_checkpoint(way, tmp_path / f"by {name}", to="meta", model_parallel=2)
    found = [manifest_of(tmp_path / f"by {name}")["files"] for name in ways]
    ranks = ("consolidated.00.pth", "consolidated.01.pth")
    assert [{rank: files[rank] for rank in ranks} for files in found] == [
        {rank: found[0][rank] for rank in ranks}
    ] * len(ways)


def test_a_piece_is_a_fixed_range_wherever_its_bytes_come_from(tmp_path: Path) -> None:
    """An embedding of more than a piece, whose rows fill no piece, from whole files and from those of two ranks."""
    hf = tmp_path / "hf"
    hf.mkdir()
    rows, dim, kv, ffn = PIECE // 96 // 2 * 2 + 1000, 24, 12, 32
    shutil.copy(HF / "config.json", hf)
    sizes = {"vocab_size": rows, "hidden_size": dim, "intermediate_size": ffn, "head_dim": 6}
    edit_json(hf / "config.json", **sizes, tie_word_embeddings=True)
    shapes: dict[str, tuple[int, ...]] = {"self_attn.k_proj": (kv, dim), "self_attn.v_proj": (kv, dim)}
    shapes |= {"self_attn.q_proj": (dim, dim), "self_attn.o_proj": (dim, dim), "mlp.down_proj": (dim, ffn)}
    shapes |= {"mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim)}
    shapes |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (dim,))
    tensors = {f"model.layers.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    values = torch.arange(rows * dim, dtype=torch.float32).remainder_(251).reshape(rows, dim)
    tensors |= {"model.norm.weight": torch.ones(dim), "model.embed_tokens.weight": values}
    safetensors.torch.save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    ckpt_convert.convert_checkpoint(hf, tmp_path / "meta", to="meta", model_parallel=2)
    found = {}
    for source in ("hf", "meta"):
        ckpt_convert.convert_checkpoint(tmp_path / source, tmp_path / f"{source}-native", to="native", shards=1)
        (file,) = manifest_of(tmp_path / f"{source}-native")["files"].values()
        found[source] = [piece for piece in file["pieces"] if piece[0] == "tok_embeddings.weight"]
        shutil.rmtree(tmp_path / f"{source}-native")
    (_, start, *_), (_, second, *_) = found["hf"]
    assert (second - start, [nbytes for _, _, nbytes, _ in found["hf"]]) == (PIECE, [PIECE, rows * dim * 4 - PIECE])
    assert [piece[2:] for piece in found["hf"]] == [piece[2:] for piece in found["meta"]]
    data = memoryview(values.numpy()).cast("B")
    assert [checksum for *_, checksum in found["hf"]] == [crc64(bytes(data[:PIECE])), crc64(bytes(data[PIECE:]))]


def test_dtypes_that_fill_no_whole_bytes_are_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    count = (3 << 20) // 3 * 4
    data = random.Random(6).randbytes(count * 6 // 8)
    header = {"weight": {"dtype": "F6_E2M3", "shape": [count], "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (source / "config.json").write_text('{"model_type": "unheard_of", "vocab_size": 8}')
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


# Files beside the weights


@pytest.mark.parametrize("output", ["meta"], indirect=True)
def test_an_edited_config_is_an_error_until_it_is_accepted(output: Path, tmp_path: Path) -> None:
    edit_json(output / "params.json", norm_eps=2e-5)
    (output / "README.md").write_text("A better model.\n")
    before = manifest_of(output)
    found = verified(output)
    assert [(finding["severity"], finding["check"], finding["file"]) for finding in found] == [
        ("error", "checksum", "params.json"),
        ("warning", "checksum", "README.md"),  # which no program reads, and people edit as a matter of course
    ]
    for finding in found:
        assert EDITED in finding["text"]
        assert f"ckpt-convert verify {output} --accept {finding['file']}" in finding["text"]

    for name, why in (
        ("consolidated.00.pth", "only auxiliary files"),
        (MANIFEST, "is none of the auxiliary files"),
    ):
        refused = command("verify", output, "--accept", "params.json", "--accept", name)
        assert (refused.returncode, manifest_of(output)) == (2, before), refused.stderr
        assert why in refused.stderr

    done = command("verify", output, "--accept", "params.json", "--accept", "README.md", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["findings"]) == (0, [])
    assert [one["file"] for one in document["accepted"]] == ["params.json", "README.md"]
    assert document["accepted"][0] == {
        "file": "params.json",
        "expected": next(one["checksum"] for one in before["side_files"] if one["name"] == "params.json"),
        "found": xxhash.xxh3_64_hexdigest((output / "params.json").read_bytes()),
    }
    again = command("verify", output, "--quick", "--accept", "params.json")
    assert (again.returncode, "accepted" in again.stdout) == (0, False)  # there was nothing to renew


@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("output", ["meta"], indirect=True)
def test_a_conversion_takes_an_edited_config(output: Path, accepts: bool, tmp_path: Path) -> None:
    edit_json(output / "params.json", norm_eps=2e-5)
    if accepts:
        assert command("verify", output, "--accept", "params.json").returncode == 0
    report = ckpt_convert.convert_checkpoint(output, tmp_path / "hf", to="hf")
    said = [notice for notice in report.notices if EDITED in notice]
    assert [("params.json" in notice) for notice in said] == ([] if accepts else [True])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rms_norm_eps"] == 2e-5
    # A tokenizer or config that a conversion made is made anew by the next one; one that was edited is its user's.
    edit_json(tmp_path / "hf" / "generation_config.json", temperature=0.5)
    if accepts:
        assert command("verify", tmp_path / "hf", "--accept", "generation_config.json").returncode == 0
    ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.mark.parametrize("output", ["hf"], indirect=True)
def test_accepting_is_all_or_nothing(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the manifest cannot be written, it is as it was, and nothing is left beside it."""
    edit_json(output / "config.json", rms_norm_eps=2e-5)
    before = (output / MANIFEST).read_bytes()
    (output / "ckpt_convert" / ".manifest.json.partial").mkdir()
    failed = command("verify", output, "--accept", "config.json")
    assert (failed.returncode, (output / MANIFEST).read_bytes()) == (1, before)
    assert "manifest.json: cannot be written" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_accepting_where_there_is_no_record(source: Path, tmp_path: Path) -> None:
    done = command("verify", source, "--accept", "config.json")
    assert done.returncode == 3
    assert "has no ckpt_convert/manifest.json" in done.stderr


def test_a_run_resumes_from_an_edited_step_once_that_is_accepted(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Trained(source)
    with Checkpointer(source, tmp_path / "run", save_every=2) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 4)
    step = tmp_path / "run" / "step_4"
    edit_json(step / "config.json", rms_norm_eps=2e-5)
    (step / "README.md").write_text("Trained further.\n")
    with Checkpointer(source, tmp_path / "run", save_last=False) as checkpointer:
        with pytest.raises(CorruptFileError, match=EDITED) as caught:
            checkpointer.resume(**Trained(source).parts, from_=4)
        assert f"`verify_checkpoint('{step}', accept='config.json')`" in str(caught.value)
        assert "README.md" not in str(caught.value)
        progress = checkpointer.resume(**Trained(source).parts)  # the newest that is sound
        assert (progress.step if progress else None) == 2
    assert any("accept='config.json'" in record.getMessage() for record in caplog.records)
    assert command("verify", step, "--accept", "config.json").returncode == 0
    with Checkpointer(source, tmp_path / "run", save_last=False) as checkpointer:
        progress = checkpointer.resume(**Trained(source).parts)
        assert (progress.step if progress else None) == 4


def test_what_a_run_amends_stays_under_the_checksum(source: Path, tmp_path: Path) -> None:
    trained = Trained(source)
    options: dict[str, Any] = {"save_every": 2, "keep_last_training_state": 1, "best": "val_loss:min"}
    with Checkpointer(source, tmp_path / "run", **options) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 4, evaluate=2)
        checkpointer.wait()
        saved = {one.step: one for one in checkpointer.saved}
    assert manifest_of(tmp_path / "run" / "step_2")["training"]["training_state"] == "removed"
    assert saved.keys() == {2, 4}
    for step in (2, 4):
        path = tmp_path / "run" / f"step_{step}"
        assert "val_loss" in manifest_of(path)["training"]["metrics"]
        text = (path / MANIFEST).read_bytes()
        write_manifest(path / MANIFEST, manifest_of(path))
        assert json.loads(text) == manifest_of(path)
        ckpt_convert.open_checkpoint(path).close()


@pytest.mark.parametrize("key", ["sequence", "metrics", "progress", "directory"])
@pytest.mark.parametrize("output", ["step"], indirect=True)
def test_a_step_with_an_edited_manifest_is_not_resumed_from(
    output: Path, key: str, source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (output / MANIFEST).write_text(json.dumps(edited(manifest_of(output), ("training", key))))
    checkpointer = Checkpointer(source, output.parent, save_last=False)
    with pytest.raises(CorruptFileError, match="none that is sound"):
        checkpointer.resume(**Trained(source).parts)
    checkpointer.close()
    assert any(EDITED in record.getMessage() for record in caplog.records)


# Records of schema 1


def test_an_earlier_record_is_read_as_before(tmp_path: Path) -> None:
    meta = Path(shutil.copytree(EARLIER / "meta", tmp_path / "meta"))
    assert verified(meta) == []
    done = command("meta-to-hf", meta, tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr
    assert sums(tmp_path / "hf") == sums(HF)
    assert manifest_of(tmp_path / "hf")["schema"] == 2
    weights = meta / "consolidated.00.pth"
    flip(weights, manifest_of(meta)["files"][weights.name]["pieces"][3][1])
    edit_json(meta / "params.json", norm_eps=2e-5)
    assert {(finding["check"], finding["file"]) for finding in verified(meta)} == {
        *(("checksum", weights.name), ("checksum", "params.json"), ("crc", weights.name))
    }
    command("verify", meta, "--accept", "params.json")
    assert {finding["file"] for finding in verified(meta)} == {weights.name}
    assert (manifest_of(meta)["schema"], "manifest_checksum" in manifest_of(meta)) == (1, False)


def test_a_record_is_not_taken_for_an_earlier_one(outputs: dict[str, Path], tmp_path: Path) -> None:
    """Which would switch checks off."""
    output = Path(shutil.copytree(outputs["meta"], tmp_path / "meta"))
    content = manifest_of(output) | {"schema": 1}
    del content["manifest_checksum"]
    (output / MANIFEST).write_text(json.dumps(content))
    assert {finding["check"] for finding in verified(output)} == {"record"}


def test_a_run_goes_on_from_an_earlier_step(tmp_path: Path) -> None:
    run = Path(shutil.copytree(EARLIER / "run", tmp_path / "run"))
    assert verified(run / "step_2") == []
    trained = Trained(HF)
    with Checkpointer(HF, run, save_every=2) as checkpointer:
        progress = checkpointer.resume(**trained.parts)
        assert progress is not None
        assert (progress.step, progress.tokens, checkpointer.saved[0].metrics) == (2, 48, {"val_loss": 2.5})
        assert all(state["step"] == 2 for state in trained.optimizer.state_dict()["state"].values())
        checkpointer.report(val_loss=1.5)
        trained.go(checkpointer, 4)
    assert [manifest_of(run / f"step_{step}")["schema"] for step in (2, 4)] == [1, 2]
    assert manifest_of(run / "step_2")["training"]["metrics"] == {"val_loss": 1.5}
    assert verified(run / "step_2") == []
