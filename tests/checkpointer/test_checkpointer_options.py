"""What is written: dtypes, formats, contents, names and files beside; from a source, a config alone, or a seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_convert import Checkpointer, TransferProgress
from ckpt_convert.analysis.check import check_checkpoint
from ckpt_convert.checkpointer.checkpointer import saver_of
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.errors import CkptConvertError, KeyMismatchError, OutputExistsError, UsageError
from recipes.native_llama import NativeLlama
from tests.checkpointer.training import LLAMA, Trained, bfloat16_source, make_model
from tests.helpers import GOLDEN, Tensors, assert_same, read_meta, read_safetensors, sums

NATIVE = GOLDEN / "llama" / "native.safetensors"


def saved(output_dir: Path, model: Any, source: Any = LLAMA, steps: int = 1, **options: Any) -> Path:
    """The last step of a run that changes nothing."""
    with Checkpointer(source, output_dir, **{"contents": "weights", **options}) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for _ in range(steps):
            checkpointer.step()
    return checkpointer.saved[-1].path


def cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


# dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_each_tensor_in_the_dtype_of_the_source_whatever_training_uses(dtype: torch.dtype, tmp_path: Path) -> None:
    step = saved(tmp_path / "out", make_model(LLAMA, dtype))
    expected = cast(cast(read_safetensors(LLAMA), dtype), torch.float32)
    assert_same(read_safetensors(step), expected)


def test_the_source_s_dtypes_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    import safetensors.torch

    tensors = read_safetensors(LLAMA)
    mixed = {key: tensor.bfloat16() if "mlp" in key else tensor for key, tensor in tensors.items()}
    (tmp_path / "source").mkdir()
    safetensors.torch.save_file(mixed, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    (tmp_path / "source" / "config.json").write_bytes((LLAMA / "config.json").read_bytes())
    step = saved(tmp_path / "out", make_model(LLAMA), tmp_path / "source")
    assert sums(step) == sums(tmp_path / "source")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_an_export_dtype_for_all(dtype: Any, tmp_path: Path) -> None:
    step = saved(tmp_path / "out", make_model(), export_dtype=dtype)
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert_same(read_safetensors(step), cast(read_safetensors(LLAMA), wanted))
    assert json.loads((step / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


# Formats


def test_meta_from_huggingface(tmp_path: Path) -> None:
    step = saved(tmp_path / "out", make_model(), output_format="meta")
    (found,), (expected,) = read_meta(step), read_meta(GOLDEN / "llama" / "meta-mp1")
    found.pop("rope.freqs", None), expected.pop("rope.freqs", None)
    assert_same(found, expected)
    assert json.loads((step / "params.json").read_text())["dim"] == 72


def test_native_from_huggingface(tmp_path: Path) -> None:
    step = saved(tmp_path / "out", make_model(), output_format="native")
    assert_same(read_safetensors(step), read_safetensors(NATIVE))


def test_huggingface_from_meta(tmp_path: Path) -> None:
    step = saved(tmp_path / "out", make_model(), GOLDEN / "llama" / "meta-mp2", output_format="hf")
    assert_same(read_safetensors(step), read_safetensors(LLAMA))
    config, expected = (json.loads((path / "config.json").read_text()) for path in (step, LLAMA))
    for name in ("hidden_size", "num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings"):
        assert config[name] == expected[name], name
    assert config["rope_parameters"]["rope_theta"] == expected["rope_parameters"]["rope_theta"]
    assert config["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.parametrize("model_format", ["hf", "meta", "native"])
def test_any_layout_of_the_training_model(model_format: str, tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path / "loaded", model_format=model_format) as checkpointer:
        model = checkpointer.load_state_dict()
    expected = {
        "hf": read_safetensors(LLAMA),
        "meta": {k: v for k, v in read_meta(GOLDEN / "llama" / "meta-mp1")[0].items() if k != "rope.freqs"},
        "native": read_safetensors(NATIVE),
    }[model_format]
    assert_same(model, expected)
    for tensor in model.values():
        tensor.zero_()
    step = saved(tmp_path / "out", model, model_format=model_format)
    assert_same(model, expected)
    assert sums(step) == sums(LLAMA)


def test_a_dict_of_any_format(tmp_path: Path) -> None:
    with Checkpointer(GOLDEN / "llama" / "meta-mp4", tmp_path / "out") as checkpointer:
        assert_same(checkpointer.load_state_dict("native"), read_safetensors(NATIVE))
        assert_same(checkpointer.load_state_dict("hf"), read_safetensors(LLAMA))
        with pytest.raises(UsageError, match="known: "):
            checkpointer.load_state_dict("gguf")


def test_what_was_loaded_is_reported_with_its_dtypes(tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source")
    seen = []
    model = make_model()
    with Checkpointer(source, tmp_path / "out", progress=seen.append) as checkpointer:
        loaded = checkpointer.load_model(model)
    assert loaded.tensors == len(model.state_dict())
    assert dict(loaded.dtypes) == {("bfloat16", "float32"): loaded.tensors}
    assert loaded.bytes == 2 * sum(parameter.numel() for parameter in model.parameters())
    assert seen


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_progress_of_a_save_is_told(asynchronous: bool, tmp_path: Path) -> None:
    seen: list[TransferProgress] = []
    options = {"asynchronous": asynchronous, "contents": "weights"}
    with Checkpointer(LLAMA, tmp_path / "out", progress=seen.append, **options) as checkpointer:  # type: ignore[arg-type]
        checkpointer.register(model=make_model())
        checkpointer.save()
    assert {one.phase for one in seen} == {"saving"}
    nbytes = sum(tensor.nbytes for tensor in read_safetensors(LLAMA).values())
    assert (seen[0], seen[-1]) == (TransferProgress("saving", 0, nbytes), TransferProgress("saving", nbytes, nbytes))


# Contents


def test_weights_only_at_any_step(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path, contents="weights", save_every=1) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 2)
    for number in (1, 2):
        assert sums(tmp_path / f"step_{number}").keys() == sums(LLAMA).keys()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("every", [2, 3], ids=["saved already", "not saved yet"])
def test_the_last_save_may_differ(every: int, asynchronous: bool, tmp_path: Path) -> None:
    trained = Trained()
    final = {"contents": "weights", "export_dtype": torch.bfloat16}
    options = {"save_every": every, "asynchronous": asynchronous, "final": final}
    with Checkpointer(LLAMA, tmp_path, **options) as checkpointer:  # type: ignore[arg-type]
        checkpointer.load_model(trained.model)
        checkpointer.register(**trained.parts)
        trained.go(checkpointer, 4)
    assert checkpointer.saved[-1].contents == "weights"
    assert checkpointer.saved[0].contents == "full"
    found = read_safetensors(tmp_path / "step_4")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert torch.equal(found["lm_head.weight"], trained.model.state_dict()["output.weight"].bfloat16())
    assert not (tmp_path / "step_4" / "training_state").exists()


def test_the_last_save_in_another_format(tmp_path: Path) -> None:
    step = saved(tmp_path, make_model(), steps=2, save_every=1, final={"output_format": "meta"})
    assert (step / "consolidated.00.pth").exists()
    assert sums(tmp_path / "step_1") == sums(LLAMA)


def test_extra_files_are_copied_into_every_directory(tmp_path: Path) -> None:
    (tmp_path / "finetune.yaml").write_text("lr: 1\n")
    saved(tmp_path / "out", make_model(), steps=3, save_every=1, extra_files=[tmp_path / "finetune.yaml"])
    assert [p.read_text() for p in sorted((tmp_path / "out").glob("step_*/finetune.yaml"))] == ["lr: 1\n"] * 3


def test_an_extra_file_that_is_not_there_or_in_the_way_is_known_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with Checkpointer(LLAMA, tmp_path / "out", extra_files=[tmp_path / "nothing"]) as checkpointer:
        with pytest.raises(UsageError, match="nothing: no such file"):
            checkpointer.register(model=make_model())
        checkpointer.close()
    (tmp_path / "model-00001-of-00004.safetensors").write_text("")
    with Checkpointer(LLAMA, tmp_path / "o", extra_files=[tmp_path / "model-00001-of-00004.safetensors"]) as other:
        with pytest.raises(UsageError, match="extra_files"):
            other.register(model=make_model())
        other.close()


# Names


def test_a_template_for_the_directories(tmp_path: Path) -> None:
    model = make_model()
    options = {"directory": "{run_name}-e{epoch}-s{step:05d}", "run_name": "alpaca", "keep_last": 1}
    with Checkpointer(LLAMA, tmp_path, save_every=2, contents="weights", **options) as checkpointer:  # type: ignore[arg-type]
        checkpointer.register(model=model)
        for _ in range(5):
            checkpointer.step()
        checkpointer.end_epoch()
    assert [path.name for path in tmp_path.glob("alpaca*")] == ["alpaca-e1-s00005"]
    with Checkpointer(LLAMA, tmp_path, contents="weights", **options) as checkpointer:  # type: ignore[arg-type]
        progress = checkpointer.resume(model=model)
    assert progress == Progress(step=5, epoch=1, seconds=progress.seconds if progress else 0)


@pytest.mark.parametrize("template", ["step", "{step}/{epoch}", "../{step}", "{loss}-{step}", ".{step}"])
def test_a_template_that_gives_no_name_of_its_own_to_each_step(template: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Checkpointer(LLAMA, tmp_path, directory=template)


# Beginnings


def test_a_seed_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = make_model()
    with Checkpointer(None, tmp_path, config=LLAMA / "config.json") as checkpointer:
        assert checkpointer.create_seed_checkpoint(model) == tmp_path / "step_0"
    assert [saved.step for saved in checkpointer.saved] == [0]
    again = make_model()
    with Checkpointer(tmp_path / "step_0", tmp_path / "other") as other:
        other.load_model(again)
    assert_same(again.state_dict(), model.state_dict())
    third = make_model()
    with Checkpointer(None, tmp_path, config=LLAMA / "config.json") as checkpointer:
        progress = checkpointer.resume(model=third)
    assert progress is not None
    assert progress.step == 0
    assert_same(third.state_dict(), model.state_dict())


def test_a_seed_checkpoint_does_not_replace_a_run(tmp_path: Path) -> None:
    saved(tmp_path, make_model(), steps=2)
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        with pytest.raises(OutputExistsError):
            checkpointer.create_seed_checkpoint(make_model())
        checkpointer.close()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_pretraining_from_a_config(tied: bool, tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text()) | {"tie_word_embeddings": tied}
    trained = Trained(model=NativeLlama.from_config(config))
    with Checkpointer(None, tmp_path, config=config, save_every=3) as checkpointer:
        with pytest.raises(UsageError, match="no weights to load"):
            checkpointer.load_model(trained.model)
        assert checkpointer.resume(**trained.parts) is None
        trained.go(checkpointer, 5)
    again = Trained(model=NativeLlama.from_config(config))
    with Checkpointer(None, tmp_path, config=config) as checkpointer:
        progress = checkpointer.resume(**again.parts)
    assert progress is not None
    assert progress.step == 5
    assert_same(again.model.state_dict(), trained.model.state_dict())
    assert json.loads((tmp_path / "step_5" / "config.json").read_text())["tie_word_embeddings"] == tied
    keys = set(read_safetensors(tmp_path / "step_5"))
    assert keys == set(read_safetensors(LLAMA)) - ({"lm_head.weight"} if tied else set())


def test_a_run_that_goes_on_from_elsewhere(tmp_path: Path) -> None:
    model = make_model()
    with Checkpointer(LLAMA, tmp_path, save_every=10, contents="weights") as checkpointer:
        checkpointer.register(model=model, progress=Progress(step=98, tokens=5))
        for _ in range(3):
            checkpointer.step(tokens=1)
    assert [(saved.step, saved.progress.tokens) for saved in checkpointer.saved] == [(100, 7), (101, 8)]


# What does not fit is known at the start


def test_keys_that_cannot_be_explained_are_all_named(tmp_path: Path) -> None:
    model = make_model()
    model.head = torch.nn.Linear(2, 3)
    del model.norm
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        for call in (checkpointer.load_model, lambda model: checkpointer.register(model=model)):
            with pytest.raises(KeyMismatchError) as caught:
                call(model)
            for key in ("head.weight", "head.bias", "norm"):
                assert key in str(caught.value)
        checkpointer.close()


def test_another_layout_than_was_said_is_told_at_the_start(tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path, model_format="hf") as checkpointer:
        with pytest.raises(KeyMismatchError, match=r"model_format='hf'[\s\S]*embed_tokens\.weight: the ch"):
            checkpointer.load_model(make_model())
        checkpointer.close()


def test_another_size_is_told_at_the_start(tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text()) | {"intermediate_size": 96}
    model = NativeLlama.from_config(config)
    with Checkpointer(LLAMA, tmp_path / "out") as checkpointer:
        for call in (checkpointer.load_model, lambda model: checkpointer.register(model=model)):
            with pytest.raises(CkptConvertError, match=r"layers\.\S*mlp\.w1\.weight") as caught:
                call(model)
            assert "`config=`" not in str(caught.value)
        assert "the model in memory does not fit" in str(caught.value)
        assert "made the source" in str(caught.value)
        checkpointer.close()


class Opaque:
    def state_dict(self) -> dict[str, Any]:
        return {"what": object()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_state_that_cannot_be_saved_is_told_at_the_start(tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        with pytest.raises(UsageError, match=r"extra/what: is a builtins\.object"):
            checkpointer.resume(model=make_model(), extra=Opaque())
        checkpointer.close()


def test_an_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(LLAMA, tmp_path / "source")
    for place in (source, source / "runs"):
        with pytest.raises(OutputExistsError, match="is inside the source"):
            Checkpointer(source, place)
    assert sums(source) == sums(LLAMA)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(OutputExistsError, match="is a file, but output_dir is a directory"):
        Checkpointer(LLAMA, tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_source_that_the_run_itself_would_delete_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, make_model())
    with Checkpointer(tmp_path / "step_1", tmp_path, keep_last=1, overwrite=True) as checkpointer:
        with pytest.raises(OutputExistsError, match="is a step of this very output_dir"):
            checkpointer.register(model=make_model())
        checkpointer.close()
    assert sums(tmp_path / "step_1") == sums(LLAMA)


@pytest.mark.parametrize(
    "options",
    [
        {"model_format": "megatron"},
        {"export_dtype": "int7"},
        {"contents": "everything"},
        {"output_format": "gguf"},
        {"final": {"dtype": "float16"}},
        {"final": {"export_dtype": "int7"}},
        {"family": "gpt2"},
        {"source": None},
    ],
)
def test_options_that_are_none_are_refused_before_anything_happens(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Checkpointer(**{"source": LLAMA, "output_dir": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_saved_step_is_a_source_whose_own_runs_files_do_not_come_along(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1")
    options: dict[str, Any] = {"extra_files": [tmp_path / "recipe.yaml"]}
    model = make_model(LLAMA)
    with Checkpointer(LLAMA, tmp_path / "one", **options) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        saver_of(checkpointer).more_files = lambda: {"trainer_state.json": b"{}"}
        checkpointer.step()
    (tmp_path / "recipe.yaml").write_text("lr: 2")
    step = saved(tmp_path / "two", model, tmp_path / "one" / "step_1", **options)
    assert (step / "recipe.yaml").read_text() == "lr: 2"
    assert not (step / "trainer_state.json").exists()
    assert not (step / "training_state").exists()
    assert check_checkpoint(step).findings == ()
    assert {name: value for name, value in sums(step).items() if name != "recipe.yaml"} == sums(LLAMA)


def test_a_config_that_is_a_dict_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    code = f"""
import json
from pathlib import Path
from ckpt_convert import Checkpointer
config = json.loads(Path({str(GOLDEN / "llama" / "hf" / "config.json")!r}).read_text())
with Checkpointer(None, {str(tmp_path / "out")!r}, config=config) as checkpointer:
    print(checkpointer.config["hidden_size"])
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "72\n"), result.stderr
    assert list((tmp_path / "temporary").iterdir()) == []
