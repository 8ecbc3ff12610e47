"""Files that a recipe copies into every step never take the place of what makes it a checkpoint; nor does {}."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert import AdapterConfig, Checkpointer, ConfigError, UsageError
from tests.checkpointer.training import LLAMA, make_model
from tests.command import run
from tests.helpers import GOLDEN, sums

TOKENIZER = '{"model": {"vocab": {}}}'


def saved(source: Path, output_dir: Path, extra: list[Path], **options: Any) -> Path:
    with Checkpointer(source, output_dir, contents="weights", extra_files=extra, **options) as checkpointer:
        checkpointer.register(model=make_model())
        checkpointer.step()
    return output_dir / "step_1"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer and a licence."""
    path = shutil.copytree(LLAMA, tmp_path / "source")
    (path / "tokenizer.json").write_text(TOKENIZER)
    (path / "LICENSE").write_text("free")
    return path


@pytest.mark.parametrize(
    ("name", "output_format"),
    [
        *((name, "hf") for name in ("config.json", "model.safetensors.index.json", "model-00002-of-00004.safetensors")),
        *((name, "meta") for name in ("params.json", "consolidated.00.pth")),
        *((name, "native") for name in ("training_state", "ckpt_convert", "adapter_config.json")),
        (".metadata", "torchtitan"),
    ],
)
def test_what_makes_it_a_checkpoint_is_not_replaced(
    name: str, output_format: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=f"extra_files: {name} would take the place"):
        saved(source, tmp_path / "out", [tmp_path / name], output_format=output_format)
    assert not list((tmp_path / "out").glob("step*"))


def test_neither_is_an_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    made = make_model().requires_grad_(False)
    linear = made.layers[0].attn.q_proj
    linear.lora_a, linear.lora_b = (linear.weight.new_ones(shape) for shape in ((2, 72), (linear.weight.shape[0], 2)))
    with Checkpointer(
        LLAMA, tmp_path / "out", adapter=AdapterConfig(rank=2, alpha=4), extra_files=tmp_path / "adapter_config.json"
    ) as checkpointer:
        added = {f"layers.0.attn.q_proj.{name}": getattr(linear, name) for name in ("lora_a", "lora_b")}
        with pytest.raises(UsageError, match=r"adapter_config\.json would take the place"):
            checkpointer.register(model=made.state_dict() | added)
        checkpointer.close()


def test_two_of_one_name_are_refused(source: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes").write_text(folder)
    with pytest.raises(UsageError, match="two of them are called notes"):
        saved(source, tmp_path / "out", [tmp_path / "a" / "notes", tmp_path / "b" / "notes"])


def test_a_replaced_tokenizer_is_said_once(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_text(TOKENIZER + " ")
    step = saved(source, tmp_path / "out", [tmp_path / "tokenizer.json"])
    (said,) = warnings(caplog)
    assert "takes the place of the source's tokenizer.json" in said
    assert (step / "tokenizer.json").read_text() == TOKENIZER + " "
    caplog.clear()
    saved(step, tmp_path / "again", [tmp_path / "tokenizer.json"])  # the source has it as its own
    assert warnings(caplog) == []


def test_other_files_and_the_same_file_are_copied_without_a_word(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = [tmp_path / name for name in ("recipe.yaml", "params.json", "vocab.txt")]
    for path in extra:
        path.write_text("1")
    step = saved(source, tmp_path / "out", [*extra, source / "tokenizer.json"])
    kept = {name: digest for name, digest in sums(source).items() if not name.endswith(".safetensors")}
    assert kept.items() <= sums(step).items()
    assert [(step / path.name).read_text() for path in extra] == ["1", "1", "1"]
    assert warnings(caplog) == []


# An empty config


@pytest.mark.parametrize(("case", "name"), [("llama/hf", "config.json"), ("llama/meta-mp2", "params.json")])
def test_an_empty_config_is_an_error(case: str, name: str, tmp_path: Path) -> None:
    path = shutil.copytree(GOLDEN / case, tmp_path / "checkpoint")
    (path / name).write_text("{}\n")
    found = run("verify", path, "--json", code=1)
    findings = [one for one in json.loads(found.stdout)["findings"] if one["severity"] == "error"]
    assert [one["file"] for one in findings] == [name]
    assert "is empty ({})" in findings[0]["text"]
    with pytest.raises(ConfigError, match=rf"{name}: is empty \({{}}\)"):
        ckpt_convert.convert_checkpoint(path, tmp_path / "out", to="native")
    with pytest.raises(ConfigError, match=rf"{name}: is empty \({{}}\)"), Checkpointer(path, tmp_path / "o") as opened:
        opened.load_model(make_model())
    with ckpt_convert.open_checkpoint(
        path, config=LLAMA / "config.json" if "hf" in case else GOLDEN / case / name
    ) as o:
        assert o.family == "llama"  # the way round


def test_a_file_beside_the_weights_that_may_be_empty_is_no_error(tmp_path: Path) -> None:
    path = shutil.copytree(LLAMA, tmp_path / "checkpoint")
    (path / "special_tokens_map.json").write_text("{}")
    run("verify", "--quick", path, code=0)
