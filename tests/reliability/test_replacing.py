"""What may take the place of what: a checkpoint that of a checkpoint, and nothing that of anybody's own files."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_convert
from ckpt_convert import Checkpointer, OutputExistsError
from recipes.native_llama import add_lora
from tests import command
from tests.checkpointer.training import make_model
from tests.helpers import GOLDEN, sums

HF = GOLDEN / "llama" / "hf"
MODEL = make_model()


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    mine = [record for record in caplog.records if record.name == "ckpt_convert"]
    return [record.getMessage() for record in mine if record.levelno >= logging.WARNING]


def put(directory: Path, *names: str) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")


def firmware(out: Path) -> None:
    put(out, "photos/cat.jpg")
    (out / "firmware.bin").write_bytes(b"\x7fELF" + bytes(100))


def our_own_repository(out: Path) -> None:
    put(out, "ckpt_convert/__init__.py", "ckpt_convert/convert/api.py", "README.md")


def output_with_photos(out: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, out, to="meta")
    put(out, "photos/cat.jpg")


def git_clone(out: Path) -> None:
    shutil.copytree(HF, out)
    put(out, ".git/HEAD")


def several_models(out: Path) -> None:
    for name in ("llama", "mistral"):
        shutil.copytree(HF, out / name)


def results_beside_weights(out: Path) -> None:
    shutil.copytree(HF, out)
    put(out, "eval_results.json")


def notes_in_the_record(out: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, out, to="native")
    put(out, "ckpt_convert/notes.txt")


def only_a_readme(out: Path) -> None:
    put(out, "README.md", "LICENSE")


def a_link(out: Path) -> None:
    shutil.copytree(HF, out)
    (out / "data").symlink_to("/")


FOREIGN: dict[Callable[[Path], None], str] = {
    firmware: "photos/",
    our_own_repository: "ckpt_convert/__init__.py",
    output_with_photos: "photos/",
    git_clone: ".git/",
    several_models: "llama/, mistral/",
    results_beside_weights: "eval_results.json",
    notes_in_the_record: "ckpt_convert/notes.txt",
    only_a_readme: "README.md",
    a_link: "data",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_overwriting_refuses_what_it_would_lose_and_names_it(make: Callable[[Path], None], tmp_path: Path) -> None:
    out = tmp_path / "out"
    make(out)
    before = tree(out)
    with pytest.raises(OutputExistsError, match="choose another name") as refused:
        ckpt_convert.convert_checkpoint(HF, out, to="meta", overwrite=True)
    assert FOREIGN[make] in str(refused.value)
    assert tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_line_refuses_it_too(tmp_path: Path) -> None:
    firmware(tmp_path / "out")
    refused = command.run("hf-to-meta", HF, tmp_path / "out", "--overwrite", code=2)
    assert "firmware.bin, photos/" in refused.stderr
    assert (tmp_path / "out" / "photos" / "cat.jpg").exists()


def download(out: Path) -> None:
    """As ``hf download`` leaves a repository of a released model."""
    shutil.copytree(HF, out)
    shutil.copytree(GOLDEN / "llama" / "meta-mp2", out / "original")
    put(out, "README.md", "LICENSE", "LICENSE.txt", "USE_POLICY.md", ".gitattributes", "generation_config.json")
    put(out, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "merges.txt")
    put(out, ".cache/huggingface/.gitignore", ".cache/huggingface/download/config.json.metadata", "vocab.json")
    put(out, "modeling_llama.py", "configuration_llama.py", "tokenizer.model", "original/tokenizer.model")


def saved_by_torch(out: Path) -> None:
    dcp.save({"model": torch.ones(3)}, checkpoint_id=out, no_dist=True)


def by_other_names(out: Path) -> None:
    put(out, "config.json", "preprocessor_config.json", "trainer_state.json")
    torch.save({"a": torch.ones(3)}, out / "my_finetune.pt")
    torch.save({"a": torch.ones(3)}, out / "old.bin", _use_new_zipfile_serialization=False)
    shutil.copy(HF / "model-00001-of-00004.safetensors", out / "x.safetensors")
    (out / "pytorch_model.bin").write_bytes(b"cut")


def links_to_weights(out: Path) -> None:
    out.mkdir()
    for path in HF.iterdir():
        (out / path.name).symlink_to(path)


def an_output_that_was_edited(out: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, out, to="native")
    put(out, "model.safetensors.index.json", "README.md", "ckpt_convert/manifest.json")
    (out / "empty").mkdir()


@pytest.mark.parametrize(
    "make",
    [download, saved_by_torch, by_other_names, links_to_weights, an_output_that_was_edited],
    ids=lambda make: make.__name__,
)
def test_checkpoints_of_all_kinds_are_replaced_without_a_word(
    make: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = sums(HF)
    make(tmp_path / "out")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "expected", to="native")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native", overwrite=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "out"]
    assert sums(HF) == source
    assert warnings(caplog) == []


# The places beside a destination


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_places_beside_the_destination_are_ours_only_with_a_mark(name: str, there: bool, tmp_path: Path) -> None:
    if there:
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    put(tmp_path / name, "thesis.tex", "model.safetensors")
    before = tree(tmp_path / name)
    if name == ".out.partial":
        for resume in (False, True):
            with pytest.raises(OutputExistsError, match=r"\.out\.partial: is in the way .*thesis\.tex.*move it"):
                ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native", overwrite=True, resume=resume)
    else:
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native", overwrite=True)
        assert (tmp_path / "out" / "model-00001-of-00004.safetensors").exists()
    assert tree(tmp_path / name) == before


# Steps


def run(output_dir: Path, steps: int, **options: object) -> Checkpointer:
    """Save some steps of nothing but weights."""
    with Checkpointer(HF, output_dir, save_every=1, contents="weights", **options) as saver:  # type: ignore[arg-type]
        saver.resume(model=MODEL)
        for _ in range(steps):
            saver.step()
    return saver


def test_pruning_removes_what_was_written_and_keeps_the_rest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, 2)
    put(tmp_path / "step_1", "eval_results.json", "README.md", "plots/loss.png", "ckpt_convert/notes.txt")
    run(tmp_path, 1, keep_last=1)
    assert sorted(tree(tmp_path / "step_1")) == [
        "README.md", "ckpt_convert/notes.txt", "eval_results.json", "plots/loss.png"]  # fmt: skip
    assert not (tmp_path / "step_2").exists()
    run(tmp_path, 1, keep_last=1)
    (warning,) = [text for text in warnings(caplog) if "removed" in text]  # once
    assert f"the checkpoint in {tmp_path / 'step_1'} was removed" in warning
    assert "eval_results.json" in warning
    assert [saved.step for saved in Checkpointer(HF, tmp_path).saved] == [4]


@pytest.mark.parametrize("contents", ["full", "adapter"])
def test_every_file_of_a_step_is_one_that_pruning_knows(contents: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    (tmp_path / "recipe.yaml").write_text("lr: 1")
    model = make_model()
    options: dict[str, object] = {"extra_files": [tmp_path / "recipe.yaml"], "keep_last": 1}
    if contents == "adapter":
        adapter = LoraConfig(target_modules=["q_proj"])
        model = get_peft_model(model, adapter)  # type: ignore[arg-type, assignment]
        options |= {"adapter": adapter, "merged": True}
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    with Checkpointer(HF, tmp_path / "out", save_every=1, **options) as saver:  # type: ignore[arg-type]
        saver.load_model(model)
        saver.register(model=model, optimizer=optimizer)
        for _ in range(2):
            saver.step()
    assert sorted(path.name for path in (tmp_path / "out").glob("*step*")) == ["step_2"]
    assert (tmp_path / "out" / "step_2" / "merged" / "config.json").exists() == (contents == "adapter")


def test_a_step_with_files_of_the_user_is_not_saved_over(tmp_path: Path) -> None:
    run(tmp_path, 3)
    put(tmp_path / "step_2", "eval_results.json")
    before = tree(tmp_path / "step_2")
    with Checkpointer(HF, tmp_path, save_every=1, contents="weights") as saver:
        saver.resume(model=MODEL, from_=1)
        with pytest.raises(OutputExistsError, match=r"(?s)step_2: .*eval_results\.json.*move that elsewhere"):
            saver.step()
        assert tree(tmp_path / "step_2") == before
        saver.step()  # step 3 has nothing that is not its own
        assert (saver.progress.step, saver.saved[-1].step) == (3, 3)
    assert not list(tmp_path.glob(".step*"))


def test_starting_anew_keeps_what_the_user_put_into_steps(tmp_path: Path) -> None:
    run(tmp_path, 3)
    put(tmp_path / "step_3", "eval_results.json")
    with Checkpointer(HF, tmp_path, save_every=1, contents="weights", overwrite=True) as saver:
        saver.register(model=MODEL)
        saver.step()
        assert [saved.step for saved in saver.saved] == [1]
    assert sorted(tree(tmp_path / "step_3")) == ["eval_results.json"]


def test_what_interruptions_leave_of_a_removal_or_an_amendment_is_tidied(tmp_path: Path) -> None:
    run(tmp_path, 3)
    put(tmp_path / "step_1", "eval_results.json")
    (tmp_path / "step_1").rename(tmp_path / ".step_1.deleted.partial")  # killed at once
    (tmp_path / "step_2").rename(tmp_path / ".step_2.deleted.partial")  # killed in the middle
    put(tmp_path / ".step_2.deleted.partial", ".ckpt-convert-journal")
    (tmp_path / ".step_2.deleted.partial" / "model-00001-of-00004.safetensors").unlink()
    put(tmp_path / "step_3", "ckpt_convert/.manifest.json.partial")
    run(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step_1", "step_3"]
    assert sorted(tree(tmp_path / "step_1")) == ["eval_results.json"]
    assert not (tmp_path / "step_3" / "ckpt_convert" / ".manifest.json.partial").exists()


def adapters(output_dir: Path, steps: int, **options: object) -> None:
    """A run whose steps hold an adapter, and in ``merged/`` a checkpoint with a manifest of its own."""
    model = make_model(HF)
    config = ckpt_convert.AdapterConfig(2, 4.0, target_modules=("q_proj",))
    with Checkpointer(HF, output_dir, adapter=config, merged=True, save_every=1, **options) as checkpointer:  # type: ignore[arg-type]
        checkpointer.load_model(model)
        add_lora(model, 2, 4.0, ("q_proj",), dora=False)
        checkpointer.resume(model=model)
        while checkpointer.progress.step < steps:
            checkpointer.step()


def test_a_removal_that_is_interrupted_anywhere_is_finished_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters(tmp_path / "whole", 2)
    unlink, removed = os.unlink, 0
    for stop in (*range(1, 20, 4), *range(20, 60)):
        run_dir = tmp_path / f"run-{stop}"
        shutil.copytree(tmp_path / "whole", run_dir, symlinks=True)
        removed = 0

        def killed(*arguments: object, stop: int = stop, **named: object) -> None:
            nonlocal removed
            removed += 1
            if removed == stop:
                raise KeyboardInterrupt
            unlink(*arguments, **named)  # type: ignore[arg-type]

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(os, "unlink", killed)
            adapters(run_dir, 2, keep_last=1)
        adapters(run_dir, 2, keep_last=1)
        assert sorted(path.name for path in run_dir.iterdir() if not path.name.endswith("lock")) == ["latest", "step_2"]
        if removed < stop:
            break
    else:
        pytest.fail("more files are removed than the test goes through")
