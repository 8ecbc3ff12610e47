from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result

import ckpt_convert
from ckpt_convert.cli.verify import verify
from ckpt_convert.errors import CkptConvertError
from tests import command
from tests.helpers import CASES, GOLDEN, edit_json, read_safetensors

ROOT = Path(__file__).parent.parent.parent
HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
VALIDATOR = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "schemas" / "verify.schema.json").read_text()))


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(verify, [str(argument) for argument in arguments], standalone_mode=False)
    assert result.exception is None, result.exception
    assert result.return_value == code, result.output
    return result


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json", code=code).stdout)
    return found


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy with a wrong size in the config, a truncated shard, and one that nothing uses."""
    path = tmp_path / "broken"
    shutil.copytree(HF, path)
    edit_json(path / "config.json", vocab_size=57)
    shutil.copy(path / "model-00002-of-00004.safetensors", path / "model-00003-of-00003.safetensors")
    shard = path / "model-00004-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_last_line_says_that_there_are_no_problems(case: str) -> None:
    for form in (GOLDEN / case).iterdir():
        last = run(form).stdout.splitlines()[-1]
        assert last.startswith("no problems: ")
        assert "checks: files, container" in last


def test_a_line_for_each_finding_errors_first_and_a_count_at_the_end(broken: Path) -> None:
    lines = run(broken, code=1).stdout.splitlines()
    found = [line for line in lines if line.startswith(("error", "warning", "note"))]
    assert [line.split()[:2] for line in found] == [
        ["error", "container"],
        ["error", "config"],
        ["warning", "leftover"],
    ]
    assert "8 bytes are missing" in found[0]
    assert lines[-1] == "2 errors, 1 warning"


def test_the_exit_code_is_zero_as_long_as_there_is_no_error(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "a")
    shutil.copy(
        tmp_path / "a" / "model-00002-of-00004.safetensors", tmp_path / "a" / "model-00003-of-00003.safetensors"
    )
    assert run(tmp_path / "a").stdout.splitlines()[-1] == "1 warning"
    assert run(tmp_path / "a", "--strict", code=1).stdout.splitlines()[-1] == "1 warning"
    assert run(tmp_path / "a", "--strict", "--quiet", code=1).stdout.startswith("warning  leftover")
    assert run(tmp_path / "a", "--quiet").output == ""
    assert run(HF, "--strict").stdout


def test_nothing_to_check_is_an_error_of_its_own(tmp_path: Path) -> None:
    done = command.run("verify", tmp_path / "gone", code=3)
    assert "no such file or directory" in done.stderr
    assert "Traceback" not in done.stderr
    command.run("verify", HF, "--config", tmp_path / "gone", code=3)
    command.run("verify", HF, "--family", "gone", code=2)


def test_quiet_prints_errors_alone(broken: Path) -> None:
    result = run(broken, "--quiet", code=1)
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["error", "error"]
    assert result.stderr == ""
    assert run(HF, "--quiet").output == ""


def test_quick_says_what_it_leaves_out() -> None:
    output = run(META, "--quick").stdout
    assert "no values read" in output
    assert "skipped  values, crc, replicas: values are not read" in output


def test_colours_are_for_terminals_and_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(HF, path)
    (path / "evil\x1b[31m.json").write_text("{")
    done = command.run("verify", path)
    assert "\x1b" not in done.stdout
    assert "evil\\x1b[31m.json" in done.stdout


def test_many_findings_of_one_check_are_cut_unless_full(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(HF, path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model-00001-of-00004.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    short, full = run(path, code=1).stdout, run(path, "--full", code=1).stdout
    wrong = full.count("error    index")
    assert short.count("error    index") == 12
    assert f"… and {wrong - 12} more of this check; --full shows them" in short


# JSON


def test_the_document_says_all_of_it(broken: Path) -> None:
    found = document(broken, code=1)
    VALIDATOR.validate(found)
    assert (found["schema"], found["path"]) == (1, str(broken))
    assert (found["format"], found["family"]) == ("hf", "llama")
    assert (found["errors"], found["warnings"], found["notes"]) == (2, 1, 0)
    assert {finding["check"] for finding in found["findings"]} <= set(found["checks"])
    by_check = {finding["check"]: finding for finding in found["findings"]}
    assert by_check["config"]["expected"] == "57"
    assert by_check["config"]["found"] == "56"
    assert by_check["container"]["file"] == "model-00004-of-00004.safetensors"


@pytest.mark.parametrize("form", sorted(GOLDEN.glob("*/*")), ids=lambda form: f"{form.parent.name}-{form.name}")
def test_every_document_is_as_the_schema_says(form: Path) -> None:
    found = document(form, "--quick")
    VALIDATOR.validate(found)
    assert found["bytes_read"] == 0


# Against another one


def test_two_forms_of_one_model_are_the_same() -> None:
    found = document(HF, "--against", GOLDEN / "llama" / "meta-mp4")
    VALIDATOR.validate(found)
    assert found["errors"] == 0
    assert "against" in found["checks"]
    assert found["against"]["same"] is True


def test_tensors_that_differ_are_named_and_share_lines(tmp_path: Path) -> None:
    path = tmp_path / "other"
    shutil.copytree(HF, path)
    changed = set()
    for file in sorted(path.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(file)
        for key in tensors:
            if key.endswith("mlp.up_proj.weight"):
                tensors[key][1, 2] += 8
                changed.add(key)
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
    found = document(META, "--against", path, code=1)
    assert len(changed) == found["errors"] == 3
    output = run(path, "--against", META, code=1).stdout
    assert "model.layers.{0..2}.mlp.up_proj.weight differ in values (×3)" in output
    assert output.splitlines()[-1] == "3 errors"
    full = run(path, "--against", META, "--full", code=1).stdout
    assert all(f"{key} differs in 1 of 7,488 elements, by up to 8" in full for key in changed)


def test_what_else_differs_is_said_with_both_sides(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": torch.ones(4, 6) for layer in range(3)}
    tensors |= {f"model.layers.{layer}.mlp.gate_proj.weight": torch.ones(5, 6) for layer in range(3)}
    ours = tensors | {"here": torch.ones(2), "cast": torch.ones(3)}
    theirs = {key: value[1:].clone() for key, value in tensors.items()}
    theirs |= {"there": torch.ones(2), "cast": torch.ones(3).double()}
    for name, held in (("a", ours), ("b", theirs)):
        safetensors.torch.save_file(held, tmp_path / f"{name}.safetensors")
    lines = run(tmp_path / "a.safetensors", "--against", tmp_path / "b.safetensors", code=1).stdout.splitlines()
    assert sorted(" ".join(line.split()[2:]) for line in lines if line.startswith("error")) == [
        "cast is F32 here and F64 there",
        "here is only here",
        "model.layers.{0..2}.mlp.gate_proj.weight has the shape [5, 6] here and [4, 6] there (×3)",
        "model.layers.{0..2}.mlp.up_proj.weight has the shape [4, 6] here and [3, 6] there (×3)",
        "there is only there",
    ]


def test_packed_numbers_that_differ_are_counted_in_bytes(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        data = np.full((3, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_K][1]), 1, np.uint8)
        data[0, :value] = 7
        writer.add_tensor("w", data, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    (found,) = document(a, "--against", b, code=1)["findings"]
    assert found["text"] == "w differs in 1 of 432 bytes"
    (same,) = document(a, "--against", a)["against"]["tensors"]
    assert (same["delta"]["differing"], same["delta"]["relative_norm"]) == (0, None)


def test_what_cannot_be_compared_is_an_error(broken: Path) -> None:
    found = document(broken, "--against", HF, code=1)
    assert found["against"] is None
    (finding,) = [finding for finding in found["findings"] if finding["check"] == "against"]
    assert "cannot be compared" in finding["text"]
    assert finding["file"] == str(HF)


# Hostile input


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "ckpt_convert/manifest.json"])
def test_no_json_file_however_damaged_gives_a_traceback(tmp_path: Path, name: str) -> None:
    path = tmp_path / "out"
    ckpt_convert.convert_checkpoint(META, path, to="hf", shards=2)
    good = (path / name).read_text()
    chance = random.Random(7)
    for change in [*range(25)]:
        content = json.loads(good)
        mangle(content, chance)
        (path / name).write_text(json.dumps(content))
        looked_at(path, change)


def test_no_config_of_an_unknown_family_gives_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / "qwen2" / "hf", path)
    good = (path / "config.json").read_text()
    chance = random.Random(13)
    for change in range(40):
        content = json.loads(good)
        for _ in range(3):
            mangle(content, chance)
        (path / "config.json").write_text(json.dumps(content))
        looked_at(path, change)


def mangle(content: Any, chance: random.Random) -> None:
    """Put something else in one place of a JSON document."""
    while isinstance(content, dict | list) and content:
        place = chance.choice(list(content) if isinstance(content, dict) else range(len(content)))
        if not isinstance(content[place], dict | list) or chance.random() < 0.3:
            content[place] = chance.choice(
                [None, True, -1, 10**400, 1e308, "\x1b[2J", "../..", [], {}, [[]], {"a": 1}, 0]
            )
            return
        content = content[place]


@pytest.mark.parametrize("form", ["hf", "meta-mp2"])
def test_no_weight_file_however_damaged_gives_a_traceback(tmp_path: Path, form: str) -> None:
    path = tmp_path / "a"
    shutil.copytree(GOLDEN / "llama" / form, path)
    file = sorted([*path.glob("*.safetensors"), *path.glob("*.pth")])[1]
    good = file.read_bytes()
    chance = random.Random(11)
    for change in range(40):
        data = bytearray(good)
        for _ in range(chance.choice([1, 3, 30])):
            data[chance.randrange(min(len(data), 4000) if change % 2 else len(data))] = chance.randrange(256)
        file.write_bytes(data[: chance.randrange(len(data)) if change % 5 == 0 else len(data)])
        looked_at(path, change)


def looked_at(path: Path, change: int) -> None:
    result = CliRunner().invoke(verify, [str(path)], standalone_mode=False)
    assert result.exception is None or isinstance(result.exception, CkptConvertError), (change, result.exc_info)


def test_a_quick_check_is_quick_to_start(tmp_path: Path) -> None:
    code = (
        "import sys; from ckpt_convert.analysis.check import check_checkpoint; "
        "check_checkpoint(sys.argv[1], values=False); "
        "print(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(HF)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "torch" not in done.stdout
    assert "transformers" not in done.stdout


def test_logits_are_computed(tmp_path: Path) -> None:
    found = document(HF, "--logits", "--against", META)
    VALIDATOR.validate(found)
    assert found["logits"]["difference"]["agreement"] == 1.0
    path = tmp_path / "nan"
    shutil.copytree(HF, path)
    file = path / "model-00004-of-00004.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    errors = [finding for finding in document(path, "--logits", code=1)["findings"] if finding["severity"] == "error"]
    assert [(finding["check"], finding["file"]) for finding in errors] == [("logits", str(path))]
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    said = [
        finding["text"] for finding in document(path, "--logits", code=1)["findings"] if finding["check"] == "logits"
    ]
    assert [text.partition(":")[0] for text in said] == ["cannot be computed"]
    (path / "config.json").write_text('{"model_type": "of nothing known"}')
    assert "logits" in [skipped["check"] for skipped in document(path, "--logits", code=1)["skipped"]]


def test_two_that_compute_something_else_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in "ab":
        path = tmp_path / name
        path.mkdir()
        shutil.copy(HF / "config.json", path)
        tensors = {key: torch.randn(value.shape) for key, value in read_safetensors(HF).items()}
        safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    report = document(tmp_path / "a", "--logits", "--against", tmp_path / "b", code=1)
    (warning,) = [finding for finding in report["findings"] if finding["check"] == "logits"]
    share = f"{100 * report['logits']['difference']['agreement']:.1f}%"
    assert (warning["severity"], warning["expected"], warning["found"]) == ("warning", "100%", share)
