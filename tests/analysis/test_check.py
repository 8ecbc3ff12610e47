"""Faults are put into copies of good checkpoints, and the check has to name each, and to name nothing else."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ckpt_convert
from ckpt_convert.analysis.check import Verification, check_checkpoint
from ckpt_convert.analysis.check.spans import Share
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.errors import CheckpointNotFoundError
from ckpt_convert.storage.names import replaced_path
from ckpt_convert.storage.reader import LocalFile
from tests.helpers import GOLDEN, bits, edit_json, edit_manifest, read_meta, read_safetensors

FORMS = sorted(path for path in GOLDEN.glob("*/*") if path.is_dir() or path.suffix == ".safetensors")
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00004.safetensors"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return copied("llama/hf", tmp_path)


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    return copied("llama/meta-mp2", tmp_path)


def copied(name: str, tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / name, target)
    return target


def errors(report: Verification) -> list[Finding]:
    return [finding for finding in report.findings if finding.severity == "error"]


def only(report: Verification, severity: str = "error") -> Finding:
    """The one finding there is, of this severity."""
    assert [finding.severity for finding in report.findings] == [severity], report.findings
    return report.findings[0]


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Save a safetensors file again with some tensors changed, added, or (None) removed."""
    tensors = safetensors.torch.load_file(path)
    for key, tensor in changes.items():
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor.contiguous()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def edit_map(path: Path, **changes: str | None) -> None:
    index = json.loads(path.read_text())
    for key, file in changes.items():
        if file is None:
            del index["weight_map"][key]
        else:
            index["weight_map"][key] = file
    path.write_text(json.dumps(index))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.parent.name}-{form.name}")
def test_good_checkpoints_have_no_findings(form: Path) -> None:
    report = check_checkpoint(form)
    assert report.findings == ()
    files = [form] if form.is_file() else [*form.glob("*.safetensors"), *form.glob("*.pth")]
    assert report.files == len(files)
    tensors = {key for file in files for key in _keys(file)}
    assert report.tensors == len(tensors)


def _keys(file: Path) -> list[str]:
    if file.suffix == ".pth":
        return list(torch.load(file, weights_only=True))
    return list(safetensors.torch.load_file(file))


@pytest.mark.parametrize("to", ["hf", "meta", "native"])
@pytest.mark.parametrize(("case", "dtype"), [("llama", None), ("llama", "bfloat16"), ("llama_tied", None)])
def test_what_we_write_has_no_findings_and_its_checksums_are_checked(
    tmp_path: Path, case: str, dtype: str | None, to: str
) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / case / "hf", tmp_path / "out", to=to, dtype=dtype)
    report = check_checkpoint(tmp_path / "out")
    assert report.findings == ()
    assert {"checksum", "record", "values", "keys", "config"} <= set(report.checks)
    assert report.skipped == ()


def test_the_quick_check_reads_no_values(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", tmp_path / "out", to="meta")
    report = check_checkpoint(tmp_path / "out", values=False)
    assert report.bytes_read == 0
    assert report.findings == ()
    assert {skipped.check for skipped in report.skipped} >= {"values", "crc", "checksum"}


def test_only_checks_that_apply_are_said_to_be_skipped(hf: Path) -> None:
    assert [skipped.check for skipped in check_checkpoint(hf, values=False).skipped] == ["values"]


def test_every_byte_is_read_once(hf: Path) -> None:
    assert check_checkpoint(hf).bytes_read == sum(t.nbytes for t in read_safetensors(hf).values())


# Files


def test_shares_are_the_whole(tmp_path: Path) -> None:
    """Several processes read every byte once, each about as many, and find together what one finds."""
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", out, to="hf")
    file = next(out.glob("*.safetensors"))
    flip(file, file.stat().st_size - 9)
    whole = check_checkpoint(out)
    parts = [check_checkpoint(out, share=Share(number, 3)) for number in range(3)]
    read = [part.bytes_read for part in parts]
    assert sum(read) == whole.bytes_read
    assert max(read) - min(read) < whole.bytes_read / 20
    assert {finding.text for part in parts for finding in part.findings} == {one.text for one in whole.findings}
    assert sum(not part.ok for part in parts) == 1


def test_a_missing_shard_is_one_finding_and_the_rest_is_checked(hf: Path) -> None:
    (hf / SHARD).unlink()
    edit_json(hf / "config.json", vocab_size=57)
    shard, config = errors(check_checkpoint(hf))
    lost = [key for key, file in json.loads((hf / INDEX).read_text())["weight_map"].items() if file == SHARD]
    assert (shard.check, shard.file) == ("files", SHARD)
    assert f"{len(lost)} tensors" in shard.text
    assert config.check == "config"
    assert "vocab_size is 57 in config.json, but model.embed_tokens.weight has 56 rows" in config.text


def test_a_link_that_leads_nowhere(hf: Path) -> None:
    (hf / SHARD).unlink()
    (hf / SHARD).symlink_to("../blobs/gone")
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file, finding.found) == ("files", SHARD, "broken link")


def test_a_link_that_leaves_the_directory(hf: Path, tmp_path: Path) -> None:
    (hf / SHARD).rename(tmp_path / "elsewhere.safetensors")
    (hf / SHARD).symlink_to(tmp_path / "elsewhere.safetensors")
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("files", SHARD)
    assert "leaves the directory" in finding.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
        (b"<html><body>login</body></html>", "web page"),
        (b"\x08\0\0\0\0\0\0\0{}}}}}}}", "JSON"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{", "expected"),
        (b"PK\3\4", "truncated"),
        (b"\x80\x02c__builtin__\neval\n.", ""),
    ],
)
def test_a_file_that_is_no_weight_file(hf: Path, content: bytes, said: str) -> None:
    (hf / SHARD).write_bytes(content)
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("container", SHARD)
    assert said in finding.text


def test_a_truncated_file_says_how_much_is_missing(hf: Path) -> None:
    data = (hf / SHARD).read_bytes()
    (hf / SHARD).write_bytes(data[:-100])
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("container", SHARD)
    assert "100 bytes are missing" in finding.text


def test_bytes_after_the_last_tensor(hf: Path) -> None:
    with (hf / SHARD).open("ab") as file:
        file.write(b"garbage")
    finding = only(check_checkpoint(hf))
    assert finding.check == "container"
    assert "7 bytes after the last tensor" in finding.text


def test_holes_and_overlaps_are_all_named(tmp_path: Path) -> None:
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "c": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]},
        "d": {"dtype": "F31", "shape": [2], "data_offsets": [28, 36]},
        "e": {"dtype": "F32", "shape": [3], "data_offsets": [28, 36]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(36))
    texts = [finding.text for finding in errors(check_checkpoint(tmp_path / "model.safetensors"))]
    assert len(texts) == 3
    assert "'d' should have a dtype" in texts[0]
    assert "'e' is F32 of shape [3], which takes 96 bits" in texts[1]
    assert "'b' overlaps the tensors before it by 4 bytes" in texts[2]
    del header["d"], header["e"]
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(28))
    texts = [finding.text for finding in errors(check_checkpoint(tmp_path / "model.safetensors"))]
    assert any("8 bytes before 'c' belong to no tensor" in text for text in texts)


def test_a_truncated_torch_file(meta: Path) -> None:
    path = meta / "consolidated.01.pth"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    first, *rest = errors(check_checkpoint(meta))
    assert (first.check, first.file) == ("container", "consolidated.01.pth")
    assert "truncated" in first.text
    missing = int(first.text.split("at least ")[1].split(" ")[0])
    assert len(data) // 2 - 12_000 < missing <= len(data) - len(data) // 2
    assert not rest


def test_bytes_after_the_end_of_a_torch_file(meta: Path) -> None:
    with (meta / "consolidated.01.pth").open("ab") as file:
        file.write(b"garbage")
    finding = only(check_checkpoint(meta))
    assert finding.check == "container"
    assert "7 bytes after the end" in finding.text


def test_a_flipped_bit_in_a_torch_file_is_found_by_its_crc(meta: Path) -> None:
    path = meta / "consolidated.01.pth"
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    at = path.read_bytes().index(b"PK\3\4", member.header_offset) + 30
    name, extra = struct.unpack("<HH", path.read_bytes()[at - 4 : at])
    flip(path, at + name + extra + 5)
    with pytest.raises(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        archive.read(member.filename)
    finding = only(check_checkpoint(meta))
    assert (finding.check, finding.file) == ("crc", "consolidated.01.pth")
    assert member.filename in finding.text
    assert finding.expected == f"{member.CRC:08x}" != finding.found


def test_a_hostile_pickle_is_named_and_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "consolidated.00.pth")
    report = check_checkpoint(tmp_path)
    assert errors(report)[0].check == "container"
    assert not (tmp_path / "ran").exists()


class Foreign:
    """What a training script may leave in a checkpoint."""


def test_objects_beside_the_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "x": Foreign()}, tmp_path / "model.bin")
    report = check_checkpoint(tmp_path / "model.bin")
    assert only(report).check == "container"
    assert f"asks for '{Foreign.__module__}.Foreign'" in only(report).text
    assert report.tensors == 1


def test_a_torch_file_whose_pickle_is_damaged_is_not_said_to_be_too_long(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model.bin")
    data = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(data.replace(b"\x80\x02}", b"\x80\x02N"))
    finding = only(check_checkpoint(tmp_path / "model.bin"))
    assert finding.check == "container"
    assert "after the end" not in finding.text


# Index


def test_an_index_that_names_a_wrong_file(hf: Path) -> None:
    edit_map(hf / INDEX, **{"model.norm.weight": SHARD})
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.key, finding.expected) == ("index", "model.norm.weight", SHARD)
    assert finding.found == "model-00004-of-00004.safetensors"


def test_a_key_that_the_index_does_not_list(hf: Path) -> None:
    edit_map(hf / INDEX, **{"model.norm.weight": None})
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.key) == ("index", "model.norm.weight")


def test_a_key_that_no_file_has(hf: Path) -> None:
    rewrite(hf / "model-00004-of-00004.safetensors", **{"model.norm.weight": None})
    found = check_checkpoint(hf)
    assert {(f.check, f.key) for f in errors(found)} == {("index", "model.norm.weight"), ("keys", "model.norm.weight")}


@pytest.mark.parametrize("name", ["total_size", "total_parameters"])
def test_a_wrong_total(hf: Path, name: str) -> None:
    index = json.loads((hf / INDEX).read_text())
    right = index["metadata"][name]
    index["metadata"][name] += 4
    (hf / INDEX).write_text(json.dumps(index))
    finding = only(check_checkpoint(hf), "warning")
    assert (finding.check, finding.expected, finding.found) == ("index", str(right + 4), str(right))
    assert name in finding.text
    index["metadata"][name] = right - 4
    (hf / INDEX).write_text(json.dumps(index))
    # Hugging Face counts no buffers among the parameters, so there may be more.
    assert [finding.found for finding in check_checkpoint(hf).findings] == (
        [str(right)] if name == "total_size" else []
    )


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', '{"weight_map": "x"}']
)
def test_an_index_that_is_none(hf: Path, content: str) -> None:
    (hf / INDEX).write_text(content)
    report = check_checkpoint(hf)
    assert only(report).check == "index"
    assert report.tensors == 30


def test_an_index_that_leaves_the_directory(hf: Path) -> None:
    edit_map(hf / INDEX, **{"model.norm.weight": "../../etc/passwd"})
    first, second = errors(check_checkpoint(hf))
    assert "../../etc/passwd" in first.text
    assert (second.check, second.key) == ("index", "model.norm.weight")


def test_keys_in_two_shards(hf: Path) -> None:
    norm = read_safetensors(hf)["model.norm.weight"]
    rewrite(hf / SHARD, **{"model.norm.weight": norm})
    duplicate = errors(check_checkpoint(hf))[0]
    assert (duplicate.check, duplicate.key) == ("duplicate", "model.norm.weight")
    assert SHARD in duplicate.text
    assert "model-00004-of-00004.safetensors" in duplicate.text
    assert [finding.check for finding in check_checkpoint(hf).findings] == ["duplicate"]
    rewrite(hf / SHARD, **{"model.norm.weight": norm[:5]})  # not the one that the index means
    assert [finding.check for finding in check_checkpoint(hf).findings] == ["duplicate"]


# What lies beside


def test_a_stale_shard(hf: Path) -> None:
    stale = "model-00003-of-00003.safetensors"
    shutil.copy(hf / SHARD, hf / stale)
    finding = only(check_checkpoint(hf), "warning")
    assert (finding.check, finding.file) == ("leftover", stale)
    assert "stale shard" in finding.text


def test_another_set_of_files_is_a_note(hf: Path) -> None:
    torch.save({"a": torch.ones(2)}, hf / "pytorch_model.bin")
    finding = only(check_checkpoint(hf), "note")
    assert (finding.check, finding.file) == ("leftover", "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "content", "severity", "said"),
    [
        ("model-00001-of-00004.safetensors.incomplete", b"x", "warning", "download"),
        (".out.partial", b"x", "warning", "conversion that did not end"),
        ("consolidated.safetensors", b"x", "note", "Meta's layout"),
        ("other.safetensors", b"x", "warning", "is not used"),
        ("pytorch_model.bin.index.json", b'{"weight_map": {"a": "gone.bin"}}', "warning", "names 1 files"),
        ("consolidated.safetensors.index.json", b'{"weight_map": {}}', None, ""),
        ("other.safetensors.index.json", b'{"weight_map": {}}', "warning", "is not used"),
        ("optimizer.bin", b"x", None, ""),
        ("training_args.bin", b"x", None, ""),
        ("__init__.py", b"", None, ""),
        ("chat_templates.json", b"[]", None, ""),
    ],
)
def test_what_may_lie_beside_the_weights(hf: Path, name: str, content: bytes, severity: str | None, said: str) -> None:
    (hf / name).write_bytes(content)
    found = [(finding.check, finding.severity, finding.file) for finding in check_checkpoint(hf).findings]
    assert found == ([("leftover", severity, name)] if severity else [])
    assert all(said in finding.text for finding in check_checkpoint(hf).findings)


def test_what_an_overwritten_conversion_left(hf: Path) -> None:
    replaced_path(hf).mkdir()
    assert only(check_checkpoint(hf), "warning").file == replaced_path(hf).name


def test_a_side_file_that_is_a_link_to_nowhere(hf: Path) -> None:
    (hf / "tokenizer.json").symlink_to("../blobs/gone")
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("side-files", "tokenizer.json")
    assert "../blobs/gone" in finding.text


def test_an_index_beside_a_single_file(hf: Path) -> None:
    safetensors.torch.save_file(read_safetensors(hf), hf / "model.safetensors")
    report = check_checkpoint(hf)
    assert {finding.check for finding in report.findings} == {"leftover"}
    assert INDEX in {finding.file for finding in report.findings}


def test_what_an_interrupted_conversion_left(hf: Path) -> None:
    hf.with_name(f".{hf.name}.partial").mkdir()
    assert only(check_checkpoint(hf), "warning").check == "leftover"
    (hf / ".ckpt-convert-journal").write_text("")
    assert [finding.severity for finding in check_checkpoint(hf).findings] == ["error", "warning"]


def test_shards_without_an_index_of_which_one_is_missing(hf: Path) -> None:
    (hf / INDEX).unlink()
    (hf / SHARD).unlink()
    report = check_checkpoint(hf)
    (shards,) = [finding for finding in report.findings if finding.check == "shards"]
    assert SHARD in shards.text
    assert (shards.severity, shards.expected, shards.found) == ("error", "4", "3")


def test_shards_of_which_the_index_names_only_some(hf: Path) -> None:
    index = json.loads((hf / INDEX).read_text())
    lost = [key for key, file in index["weight_map"].items() if file == SHARD]
    edit_map(hf / INDEX, **dict.fromkeys(lost))
    (hf / SHARD).unlink()
    warning = next(finding for finding in check_checkpoint(hf).findings if finding.check == "shards")
    assert (warning.severity, warning.file) == ("warning", INDEX)
    assert "names 3 of 4 shards, and not number 2" in warning.text


def test_shards_may_be_counted_from_0(tmp_path: Path) -> None:
    for number in range(2):
        safetensors.torch.save_file(
            {f"x.{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors"
        )
    assert check_checkpoint(tmp_path).findings == ()


def test_shards_of_two_sets(hf: Path) -> None:
    (hf / SHARD).rename(hf / "model-00002-of-00003.safetensors")
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"] = {k: v.replace("2-of-00004", "2-of-00003") for k, v in index["weight_map"].items()}
    (hf / INDEX).write_text(json.dumps(index))
    assert only(check_checkpoint(hf), "warning").check == "shards"
    (hf / INDEX).unlink()
    assert [finding.severity for finding in check_checkpoint(hf).findings if finding.check == "shards"] == ["error"]


@pytest.mark.parametrize(
    ("name", "content", "severity"),
    [
        ("generation_config.json", b"{", "error"),
        ("tokenizer_config.json", b"", "error"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n", "error"),
        ("notes.json", b"{", "warning"),
        ("tokenizer.model", b"", "warning"),
    ],
)
def test_side_files_that_nothing_can_read(hf: Path, name: str, content: bytes, severity: str) -> None:
    (hf / name).write_bytes(content)
    finding = only(check_checkpoint(hf), severity)
    assert (finding.check, finding.file) == ("side-files", name)


def test_a_tokenizer_that_is_larger_than_the_embedding(hf: Path) -> None:
    vocab = {f"t{number}": number for number in range(55)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": [{"id": 55, "content": "<a>"}]}
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert check_checkpoint(hf).findings == ()
    tokenizer["added_tokens"] = [{"id": 56, "content": "<b>"}]
    (hf / "tokenizer.json").write_text(json.dumps(tokenizer))
    finding = only(check_checkpoint(hf), "warning")
    assert (finding.check, finding.expected, finding.found) == ("tokenizer", "56", "57")
    assert finding.file == "tokenizer.json"
    for rows, findings in ((56, 0), (57, 1)):
        unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0]] * rows}}
        (hf / "tokenizer.json").write_text(json.dumps(unigram))
        assert len(check_checkpoint(hf).findings) == findings


def test_a_dtype_that_the_weights_do_not_have_is_a_note(hf: Path) -> None:
    edit_json(hf / "config.json", dtype="bfloat16")
    finding = only(check_checkpoint(hf), "note")
    assert (finding.file, finding.expected, finding.found) == ("config.json", "bfloat16", "float32")
    for fine in ("float32", "torch.float32", "auto"):
        edit_json(hf / "config.json", dtype=fine)
        assert check_checkpoint(hf).findings == ()


# Config against shapes: one cause, not hundreds of misfits


@pytest.mark.parametrize(
    ("setting", "wrong", "right"),
    [
        ("vocab_size", 57, 56),
        ("num_hidden_layers", 2, 3),
        ("num_hidden_layers", 4, 3),
        ("intermediate_size", 100, 104),
        ("num_key_value_heads", 2, 4),
        ("num_key_value_heads", 12, 4),
        ("hidden_size", 96, 72),
        ("attention_bias", True, False),
    ],
)
def test_one_wrong_setting_is_one_finding_that_names_it(hf: Path, setting: str, wrong: Any, right: Any) -> None:
    edit_json(hf / "config.json", **{setting: wrong})
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("config", "config.json")
    assert (finding.expected, finding.found) == (str(wrong), str(right))
    assert finding.text.startswith(f"{setting} is {json.dumps(wrong)} in config.json")


def test_a_wrong_head_dim_may_be_a_wrong_number_of_heads(hf: Path) -> None:
    edit_json(hf / "config.json", head_dim=12)
    finding = only(check_checkpoint(hf))
    assert finding.text.startswith("head_dim is 12 in config.json")
    edit_json(hf / "config.json", head_dim=None, hidden_size=96)
    assert "has 72 columns" in only(check_checkpoint(hf)).text


def test_several_wrong_settings_are_all_named(hf: Path) -> None:
    edit_json(hf / "config.json", vocab_size=60, intermediate_size=100, num_hidden_layers=5)
    said = {finding.text.split(" ")[0] for finding in errors(check_checkpoint(hf))}
    assert said == {"vocab_size", "intermediate_size", "num_hidden_layers"}


def test_the_words_of_params_json(meta: Path) -> None:
    edit_json(meta / "params.json", n_layers=4)
    finding = only(check_checkpoint(meta))
    assert (finding.check, finding.file) == ("config", "params.json")
    assert finding.text.startswith("n_layers is 4 in params.json, but the files have 3 layers, 0 to 2")
    edit_json(meta / "params.json", n_layers=3, vocab_size=60)
    assert "vocab_size is 60" in only(check_checkpoint(meta)).text
    edit_json(meta / "params.json", vocab_size=56, n_kv_heads=2)
    assert only(check_checkpoint(meta)).text.startswith("n_kv_heads is 2 in params.json")
    edit_json(meta / "params.json", n_kv_heads=None)
    heads = json.loads((meta / "params.json").read_text())["n_heads"]
    assert only(check_checkpoint(meta)).text.startswith(f"n_kv_heads is not in params.json, which means {heads}")


def test_a_missing_and_a_misshapen_tensor_are_not_blamed_on_the_config(hf: Path) -> None:
    (hf / INDEX).unlink()
    rewrite(
        hf / "model-00004-of-00004.safetensors", **{"model.norm.weight": torch.ones(71), "extra.weight": torch.ones(2)}
    )
    rewrite(hf / "model-00001-of-00004.safetensors", **{"model.layers.0.self_attn.q_proj.weight": None})
    found = {(finding.check, finding.key) for finding in errors(check_checkpoint(hf))}
    assert found == {
        ("keys", "model.norm.weight"),
        ("keys", "extra.weight"),
        ("keys", "model.layers.0.self_attn.q_proj.weight"),
    }


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "llama"}', '{"model_type": 7}', "{}"])
def test_a_config_that_says_nothing(hf: Path, content: str) -> None:
    (hf / "config.json").write_text(content)
    report = check_checkpoint(hf)
    assert report.tensors == 30
    assert report.bytes_read
    if content != "{}":
        assert {finding.check for finding in report.findings} <= {"config", "side-files"}


# Tied, replicated


def test_tied_weights_that_differ_or_are_stored_twice(tmp_path: Path) -> None:
    path = copied("llama/hf", tmp_path)
    edit_json(path / "config.json", tie_word_embeddings=True)
    finding = only(check_checkpoint(path))
    place = ("tied", "lm_head.weight", "model-00004-of-00004.safetensors")
    assert (finding.check, finding.key, finding.file) == place
    embedding = read_safetensors(path)["model.embed_tokens.weight"]
    rewrite(path / "model-00004-of-00004.safetensors", **{"lm_head.weight": embedding})
    finding = only(check_checkpoint(path), "note")
    assert (finding.check, finding.key, finding.file) == place


def test_an_output_that_should_be_there(tmp_path: Path) -> None:
    path = copied("llama_tied/hf", tmp_path)
    edit_json(path / "config.json", tie_word_embeddings=False)
    finding = only(check_checkpoint(path))
    assert (finding.check, finding.key) == ("tied", "lm_head.weight")
    assert "tie_word_embeddings" in finding.text


def test_replicas_that_differ(meta: Path) -> None:
    tensors = read_meta(meta)[1]
    tensors["norm.weight"][3] += 1
    torch.save(tensors, meta / "consolidated.01.pth")
    finding = only(check_checkpoint(meta))
    assert (finding.check, finding.key) == ("replicas", "norm.weight")
    assert "rank 1" in finding.text


def test_a_missing_rank(tmp_path: Path) -> None:
    path = copied("llama/meta-mp4", tmp_path)
    (path / "consolidated.02.pth").unlink()
    report = check_checkpoint(path)
    assert only(report).check == "files"
    assert "consolidated.02" in only(report).text
    assert report.bytes_read


def test_a_key_that_one_rank_lacks(meta: Path) -> None:
    tensors = read_meta(meta)[1]
    del tensors["layers.1.attention.wq.weight"]
    torch.save(tensors, meta / "consolidated.01.pth")
    finding = only(check_checkpoint(meta))
    assert (finding.check, finding.key) == ("keys", "layers.1.attention.wq.weight")
    assert "rank 1" in finding.text


# Checksums and values


def test_one_flipped_bit_in_what_we_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "meta-mp2", out, to="hf", shards=2)
    name = sorted(path.name for path in out.glob("*.safetensors"))[1]
    flip(out / name, (out / name).stat().st_size - 40)
    finding = only(check_checkpoint(out))
    assert (finding.check, finding.file) == ("checksum", name)
    assert finding.key in safetensors.torch.load_file(out / name)
    manifest = (out / "ckpt_convert" / "manifest.json").read_text()
    assert str(finding.expected) in manifest
    assert str(finding.found) not in manifest


def test_files_that_are_not_those_that_were_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", out, to="meta", model_parallel=2)
    first, second = (out / f"consolidated.0{rank}.pth" for rank in range(2))
    whole, size = second.read_bytes(), second.stat().st_size
    second.write_bytes(whole + b"more")
    found = {finding.check: finding for finding in errors(check_checkpoint(out))}
    assert (found["checksum"].file, found["checksum"].expected) == (second.name, str(size))
    assert found["checksum"].found == str(size + 4)
    second.write_bytes(whole)
    manifest = json.loads((out / "ckpt_convert" / "manifest.json").read_text())
    for change, severity, said in (
        ({second.name: None}, "warning", "was not there"),
        ({"consolidated.02.pth": manifest["files"][first.name]}, "error", "consolidated.02.pth is missing"),
    ):
        files = {name: entry for name, entry in (manifest["files"] | change).items() if entry}
        edit_manifest(out, files=files)
        (finding,) = [finding for finding in check_checkpoint(out).findings if finding.check == "checksum"]
        assert finding.severity == severity
        assert said in finding.text
    manifest["files"][first.name]["pieces"][0][1] += 4
    edit_manifest(out, files=manifest["files"])
    found = {finding.key: finding for finding in errors(check_checkpoint(out))}
    assert {(finding.check, finding.file) for finding in found.values()} == {("checksum", first.name)}
    assert found.keys() == {None, manifest["files"][first.name]["pieces"][0][0]}
    assert "belong to no tensor" in found[None].text


def test_the_record_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", out, to="meta")
    written = (out / "params.json").read_bytes()
    edit_json(out / "params.json", norm_eps=2e-5)
    finding = only(check_checkpoint(out))
    assert (finding.check, finding.file) == ("checksum", "params.json")
    (out / "params.json").write_bytes(written)
    (out / "ckpt_convert" / "config.json").write_text("{}")
    assert {finding.check for finding in errors(check_checkpoint(out))} == {"record", "config"}
    (out / "ckpt_convert" / "manifest.json").unlink()
    assert only(check_checkpoint(out), "warning").check == "record"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 3},
        {"schema": 1},
        {"files": 5},
        {"files": {"../x": {"size": 1, "pieces": []}}},
        {"files": {"consolidated.00.pth": {"size": "1", "pieces": [[]]}}},
        {"files": {"consolidated.00.pth": {"size": 472522, "pieces": [["a", -1, 2, "x"]]}}},
        {"checksum": "rot13"},
        {"side_files": [1]},
        {"record": {"../../x": "0"}},
    ],
)
def test_a_damaged_manifest_is_a_finding(tmp_path: Path, change: dict[str, object]) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(GOLDEN / "llama" / "hf", out, to="meta")
    edit_manifest(out, **change)
    assert {finding.check for finding in errors(check_checkpoint(out))} <= {"record", "checksum"}
    assert errors(check_checkpoint(out))


def test_metas_checklist(meta: Path) -> None:
    names = ["consolidated.00.pth", "consolidated.01.pth", "params.json"]
    sums = {name: hashlib.md5((meta / name).read_bytes()).hexdigest() for name in names}
    (meta / "checklist.chk").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
    report = check_checkpoint(meta)
    assert report.findings == ()
    assert "checklist" in report.checks
    assert report.skipped == ()
    (meta / "params.json").write_text((meta / "params.json").read_text() + " ")
    finding = only(check_checkpoint(meta))
    assert (finding.check, finding.file, finding.expected) == ("checklist", "params.json", sums["params.json"])
    assert finding.found == hashlib.md5((meta / "params.json").read_bytes()).hexdigest()
    with (meta / "checklist.chk").open("a") as file:
        file.write(f"{'0' * 32}  consolidated.02.pth\n{'0' * 32}  tokenizer.model\n")
    (meta / "params.json").write_text((meta / "params.json").read_text()[:-1])
    missing = {(finding.file, finding.severity) for finding in check_checkpoint(meta).findings}
    assert missing == {("consolidated.02.pth", "error"), ("tokenizer.model", "warning")}


def test_numbers_that_are_none(hf: Path) -> None:
    norm = read_safetensors(hf)["model.norm.weight"].clone()
    norm[1], norm[2], norm[5] = float("nan"), float("inf"), float("-inf")
    rewrite(hf / "model-00004-of-00004.safetensors", **{"model.norm.weight": norm})
    finding = only(check_checkpoint(hf), "warning")
    assert (finding.check, finding.key, finding.found) == ("values", "model.norm.weight", "3")
    assert "1 NaN and 2 infinite of 72 numbers" in finding.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_numbers_of_every_width(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.ones(300_001, dtype=torch.float32)
    tensor[7], tensor[300_000] = float("nan"), float("inf")
    safetensors.torch.save_file(
        {"a": torch.ones(3, dtype=torch.uint8), "w": tensor.to(dtype)}, tmp_path / "x.safetensors"
    )
    assert "1 NaN and 1 infinite of 300,001" in only(check_checkpoint(tmp_path / "x.safetensors"), "warning").text


def test_nothing_but_zeros(hf: Path) -> None:
    norm = torch.zeros(72)
    rewrite(hf / "model-00004-of-00004.safetensors", **{"model.norm.weight": norm})
    assert "zeros" in only(check_checkpoint(hf), "warning").text


def test_zeros_where_they_are_usual_and_numbers_close_to_zero_are_fine(tmp_path: Path) -> None:
    tensors = {"a.bias": torch.zeros(5), "scale.weight": torch.zeros(1), "b.weight": torch.full((5,), -1e-44)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert check_checkpoint(tmp_path / "x.safetensors").findings == ()


def test_numbers_between_those_of_a_tensor_are_none_of_its_own(tmp_path: Path) -> None:
    numbers = torch.arange(10.0)
    numbers[1] = torch.nan
    torch.save({"w": numbers[::2]}, tmp_path / "x.pt")
    assert check_checkpoint(tmp_path / "x.pt").findings == ()


def test_numbers_that_lie_across_the_blocks_that_are_read(tmp_path: Path) -> None:
    count = 3 << 20
    tensors = {"a": torch.ones(3, dtype=torch.uint8), "w": torch.full((count,), torch.nan, dtype=torch.bfloat16)}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "BF16", "shape": [count], "data_offsets": [3, 3 + 2 * count]},
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(map(bits, tensors.values())))
    (tmp_path / "checklist.chk").write_text(f"{hashlib.md5(file.read_bytes()).hexdigest()}  {file.name}\n")
    finding = only(check_checkpoint(tmp_path), "warning")
    assert (finding.key, finding.found) == ("w", str(count))


def test_a_disk_that_fails_is_an_error_that_names_the_file(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (hf / SHARD).stat().st_size
    whole = LocalFile.readinto

    def readinto(self: LocalFile, offset: int, buffer: memoryview) -> None:
        if self.name == SHARD and offset + len(buffer) > size - 8:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        whole(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "readinto", readinto)
    finding = only(check_checkpoint(hf))
    assert (finding.check, finding.file) == ("values", SHARD)
    assert "Input/output error" in finding.text


# Families that have no table


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    """A directory as Qwen3-MoE's: five layers of four experts, one shard a layer."""
    path = tmp_path / "moe"
    path.mkdir()
    weight_map = {}
    shared = {
        "model.embed_tokens.weight": torch.randn(40, 16),
        "model.norm.weight": torch.ones(16),
        "lm_head.weight": torch.randn(40, 16),
    }
    for layer in range(5):
        tensors = {
            f"self_attn.{name}_proj.weight": torch.randn(rows, 16) for name, rows in (("q", 16), ("k", 8), ("v", 8))
        }
        tensors |= {"self_attn.o_proj.weight": torch.randn(16, 16), "mlp.gate.weight": torch.randn(4, 16)}
        tensors |= {f"{name}_layernorm.weight": torch.ones(16) for name in ("input", "post_attention")}
        for expert in range(4):
            for name in ("gate", "up", "down"):
                tensors[f"mlp.experts.{expert}.{name}_proj.weight"] = torch.randn(
                    *((6, 16) if name != "down" else (16, 6))
                )
        file = f"model-{layer + 1:05d}-of-00005.safetensors"
        tensors = {f"model.layers.{layer}.{key}": value for key, value in tensors.items()} | (
            shared if not layer else {}
        )
        safetensors.torch.save_file(tensors, path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["FlexOlmoForCausalLM"], "model_type": "flex_olmo", "vocab_size": 40, "hidden_size": 16,
        "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_experts": 4,
        "moe_intermediate_size": 6, "intermediate_size": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def drop(path: Path, layer: int, part: str) -> None:
    """Remove keys of a layer, from its file and from the index."""
    file = path / f"model-{layer + 1:05d}-of-00005.safetensors"
    keys = [key for key in safetensors.torch.load_file(file) if part in key]
    rewrite(file, **dict.fromkeys(keys))
    edit_map(path / INDEX, **dict.fromkeys(keys))


def test_an_unknown_family_is_checked_by_what_all_have_in_common(moe: Path) -> None:
    report = check_checkpoint(moe)
    assert report.findings == ()
    assert report.family is None
    assert {"layers", "config", "tied"} <= set(report.checks)
    assert "keys" in {skipped.check for skipped in report.skipped}


def test_a_missing_expert_is_named(moe: Path) -> None:
    drop(moe, 3, ".experts.2.")
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.key) == ("layers", "model.layers.3.mlp.experts.2")
    assert "3 of 4 experts: expert 2 is missing" in finding.text
    assert (finding.expected, finding.found) == ("4", "3")


def test_a_part_of_an_expert_that_is_missing(moe: Path) -> None:
    drop(moe, 3, ".experts.3.down_proj")
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.key) == ("layers", "model.layers.3.mlp.experts.3.down_proj.weight")


def test_a_hole_in_a_layer(moe: Path) -> None:
    drop(moe, 2, "q_proj")
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.key) == ("layers", "model.layers.2.self_attn.q_proj.weight")


def test_a_hole_in_the_last_layer_may_be_how_the_model_is_built(moe: Path) -> None:
    drop(moe, 4, "q_proj")
    finding = only(check_checkpoint(moe), "warning")
    assert (finding.check, finding.key) == ("layers", "model.layers.4.self_attn.q_proj.weight")


def test_what_is_not_the_language_model_has_sizes_of_its_own(moe: Path) -> None:
    rewrite(moe / "model-00001-of-00005.safetensors", **{"visual.model.norm.weight": torch.ones(24)})
    edit_map(moe / INDEX, **{"visual.model.norm.weight": "model-00001-of-00005.safetensors"})
    config = json.loads((moe / "config.json").read_text())
    for layers, said in ((5, []), (6, ["num_hidden_layers is 6 in config.json"])):
        text = config | {"num_hidden_layers": layers}
        (moe / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": text}))
        assert [finding.text.partition(",")[0] for finding in check_checkpoint(moe).findings] == said


def test_a_layer_that_looks_ahead_is_not_counted_by_the_config(moe: Path) -> None:
    edit_json(moe / "config.json", num_hidden_layers=4, num_nextn_predict_layers=1)
    assert check_checkpoint(moe).findings == ()


def test_an_encoder_has_no_output(moe: Path) -> None:
    drop(moe, 0, "lm_head")
    edit_json(moe / "config.json", architectures=["Qwen3MoeModel"])
    assert check_checkpoint(moe).findings == ()


def test_tied_weights_of_two_shapes_are_not_compared(moe: Path) -> None:
    rewrite(moe / "model-00001-of-00005.safetensors", **{"lm_head.weight": torch.ones(41, 16)})
    edit_json(moe / "config.json", tie_word_embeddings=True)
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.found) == ("config", "41")


def test_what_is_not_sure_of_a_strange_model_is_a_warning(moe: Path) -> None:
    edit_json(moe / "config.json", model_type="strange", moe_intermediate_size=8)
    assert only(check_checkpoint(moe), "warning").found == "6"


def test_experts_in_one_tensor_are_counted(moe: Path) -> None:
    for layer in range(5):
        drop(moe, layer, ".experts.")
        file = f"model-{layer + 1:05d}-of-00005.safetensors"
        fused = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        rewrite(moe / file, **{fused: torch.randn(4, 16, 12)})
        edit_map(moe / INDEX, **{fused: file})
    assert check_checkpoint(moe).findings == ()
    edit_json(moe / "config.json", num_experts=8)
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.expected, finding.found) == ("config", "8", "4")


def test_heads_of_keys_are_those_of_queries_unless_said(moe: Path) -> None:
    edit_json(moe / "config.json", num_key_value_heads=None, head_dim=None)
    finding = only(check_checkpoint(moe))
    assert finding.text.startswith("num_key_value_heads is 4")


def test_a_missing_layer(moe: Path) -> None:
    drop(moe, 2, "model.layers.2.")
    found = errors(check_checkpoint(moe))
    assert [(finding.check, finding.key) for finding in found] == [("layers", "model.layers.2")]


@pytest.mark.parametrize(
    ("setting", "wrong", "right"),
    [
        ("vocab_size", 48, "40"),
        ("num_hidden_layers", 6, "5"),
        ("num_hidden_layers", 4, "5"),
        ("num_experts", 8, "4"),
        ("hidden_size", 32, "16"),
        ("num_key_value_heads", 4, "8"),
        ("moe_intermediate_size", 8, "6"),
    ],
)
def test_a_wrong_setting_of_an_unknown_family(moe: Path, setting: str, wrong: int, right: str) -> None:
    edit_json(moe / "config.json", **{setting: wrong})
    finding = only(check_checkpoint(moe))
    assert (finding.check, finding.file, finding.found) == ("config", "config.json", right)
    assert finding.text.startswith(f"{setting} is {wrong} in config.json")


def test_a_file_by_itself_lacks_no_layers_that_may_lie_in_another(tmp_path: Path) -> None:
    keys = [f"transformer.h.{layer}.mlp.weight" for layer in range(9) if layer != 3]
    safetensors.torch.save_file({key: torch.ones(2) for key in keys}, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path / "model.safetensors").findings == ()
    finding = only(check_checkpoint(tmp_path))
    assert (finding.check, finding.key) == ("layers", "transformer.h.3")


def test_tied_weights_of_an_unknown_family(moe: Path) -> None:
    edit_json(moe / "config.json", tie_word_embeddings=True)
    assert only(check_checkpoint(moe)).check == "tied"
    edit_json(moe / "config.json", tie_word_embeddings=False)
    drop(moe, 0, "lm_head")
    assert only(check_checkpoint(moe)).key == "lm_head.weight"


def test_a_missing_shard_hides_no_other_finding_and_invents_none(moe: Path) -> None:
    (moe / "model-00003-of-00005.safetensors").unlink()
    assert only(check_checkpoint(moe)).check == "files"


# What cannot be checked at all


def test_only_nothing_is_an_error_of_its_own(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(CheckpointNotFoundError):
            check_checkpoint(path)


def test_a_directory_of_which_only_the_index_is_left(hf: Path) -> None:
    for file in hf.glob("*.safetensors"):
        file.unlink()
    assert [finding.check for finding in errors(check_checkpoint(hf))] == ["files"] * 4
