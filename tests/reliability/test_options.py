"""Options of a checkpointer that are wrong, contradict each other or do nothing are refused when it is made."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_convert
from ckpt_convert import AdapterConfig, Checkpointer, Final, UsageError
from tests.checkpointer.training import LLAMA, make_model

ADAPTER = {"adapter": AdapterConfig(rank=2, alpha=4)}
BEST = {"best": "val_loss:min"}

SAMPLES: dict[str, dict[str, Any]] = {
    "source=None": {"source": None, "config": LLAMA / "config.json"},
    "model_format": {"model_format": "hf"},
    "config": {"config": LLAMA / "config.json"},
    "family": {"family": "llama"},
    "source_format": {"source_format": "hf"},
    "save_every": {"save_every": ["2 steps", "1 epoch", "1 eval"]},
    "save_first": {"save_first": True},
    "save_last": {"save_last": False},
    "save_best": {"save_best": True, **BEST},
    "keep_last": {"keep_last": 2},
    "best": BEST,
    "keep_best": {"keep_best": 2, "keep_last": 1, **BEST},
    "keep_last_training_state": {"keep_last_training_state": 1},
    "weights": {"contents": "weights"},
    "adapter alone": {"contents": "adapter", **ADAPTER},
    "final": {"final": {"contents": "weights"}},
    "asynchronous": {"asynchronous": True},
    "export_dtype": {"export_dtype": torch.bfloat16},
    "output_format": {"output_format": "meta"},
    "extra_files": {"extra_files": ["recipe.yaml"]},
    "adapter": ADAPTER,
    "merged": {"merged": True, **ADAPTER},
    "directory": {"directory": "{run_name}-{epoch}-{step:06d}"},
    "run_name": {"run_name": "alpaca"},
    "latest_name": {"latest_name": None},
    "best_name": {"best_name": None, **BEST},
    "before_save": {"before_save": lambda: None},
    "emit": {"emit": dict},
    "save_on_signal": {"save_on_signal": "SIGUSR1"},
    "overwrite": {"overwrite": True},
    "workers": {"workers": 1},
}
"""Every option with a value that is not its default, and with what it needs to have an effect at all."""

CONTRADICTIONS = {
    ("source=None", "source_format"): "source_format",
    ("save_last", "final"): "final: does nothing with save_last=False",
    ("keep_last_training_state", "weights"): 'contents="weights"',
    ("keep_last_training_state", "adapter alone"): 'contents="adapter"',
    ("adapter alone", "export_dtype"): "export_dtype: does nothing for an adapter",
    ("adapter alone", "output_format"): "output_format: does nothing for an adapter",
    ("adapter alone", "merged"): 'merged=True, contents="adapter"',
    ("export_dtype", "adapter"): "export_dtype: does nothing for an adapter",
    ("output_format", "adapter"): "output_format: does nothing for an adapter",
    ("adapter alone", "emit"): "emit: the weights of an adapter are those of the model",
    ("adapter", "emit"): "emit: the weights of an adapter are those of the model",
    ("merged", "emit"): "emit: the weights of an adapter are those of the model",
}


def made(tmp_path: Path, **options: Any) -> Checkpointer:
    return Checkpointer(**{"source": LLAMA, "output_dir": tmp_path / "out", **options})


def test_each_pair_of_options_fits_or_is_refused_with_both_names(tmp_path: Path) -> None:
    refused = {}
    for (one, first), (other, second) in itertools.combinations(SAMPLES.items(), 2):
        if {one, other} == {"weights", "adapter alone"}:
            continue  # two values of one option
        try:
            made(tmp_path, **(first | second)).close()
        except UsageError as error:
            refused[one, other] = str(error)
    assert refused.keys() == CONTRADICTIONS.keys()
    for pair, text in CONTRADICTIONS.items():
        assert text in refused[pair], pair
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"merged": True}, "merged=True: there is no adapter"),
        ({"contents": "adapter"}, 'contents="adapter": there is no adapter'),
        ({"final": {"contents": "adapter"}}, 'contents="adapter": there is no adapter'),
        ({"final": {"contents": "everything"}}, "final: contents='everything'"),
        ({"final": {"output_format": "gguf"}}, "final: output_format='gguf'"),
        ({"final": Final(export_dtype="int7")}, "final: export_dtype='int7'"),
        ({"final": {"export_dtype": "float16"}, **ADAPTER}, "export_dtype: does nothing for an adapter"),
        ({"merged": True, "contents": "adapter", "final": Final(contents="adapter"), **ADAPTER}, "merged=True"),
        ({"keep_best": 2, **BEST}, "keep_best=2: does nothing without keep_last="),
        ({"keep_best": 2, "keep_last": 1}, "keep_best=2: best by what"),
        ({"save_best": True}, "save_best=True: best by what"),
        ({"workers": 0}, "workers=0"),
        ({"workers": True}, "workers=True"),
        ({"latest_name": "latest-{run_name}"}, "latest_name='latest-{run_name}': has braces"),
        ({"latest_name": "../latest"}, "latest_name='../latest': is no plain name"),
        ({"latest_name": "runs/latest"}, "latest_name='runs/latest': expected one name"),
        ({"latest_name": ".latest.pointer"}, "are for pointers that are being made"),
        ({"directory": "step_{step}.deleted"}, "are for what is being written, replaced or removed"),
        ({"directory": "step_{step}.partial"}, "names that end in .partial"),
        ({"directory": "{step}-{run_name}", "run_name": "a.replaced"}, "gives '1000000000000000-a.replaced'"),
        ({"directory": ".step_{step}"}, "names with a dot in front are for what is not finished"),
        ({"latest_name": ""}, "latest_name='': is no plain name"),
        ({"run_name": "{epoch}"}, "run_name='{epoch}': has braces"),
        ({"run_name": "a/b", "directory": "{run_name}-{step}"}, "gives 'a/b-"),
        ({"output_dir": "runs/{run_name}"}, "output_dir='runs/{run_name}': has braces"),
        ({"output_dir": "runs/{step:06d}"}, "has braces"),
        ({"directory": "ep{epoch}-ba{batch}"}, "there is no variable {batch}"),
        ({"save_every": lambda: True}, "save_every"),
        ({"save_every": lambda progress, event, more: True}, "save_every"),
        ({"source": None, "config": None}, "source=None: give config="),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_or_does_nothing(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, **options)
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"merged": True, "contents": "adapter", "final": {"contents": "weights"}, **ADAPTER},
        {"merged": True, "contents": "weights", "final": {"contents": "adapter"}, **ADAPTER},
        {"merged": True, "export_dtype": "bfloat16", "output_format": "meta", **ADAPTER},
        {"final": Final(contents="weights", export_dtype=torch.bfloat16)},
        {"directory": "{{{step}}}"},
        {"latest_name": ".latest", "run_name": "a b"},
        {"latest_name": "latest.pointer", "directory": "partial-{step}.deleted_later"},
        {"output_dir": "runs/{alpaca}"},
        {"save_every": lambda progress: False},
        {"save_every": lambda progress, event: False},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_close_to_it_and_right(options: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path, **options).close()


def test_everything_that_is_wrong_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        made(tmp_path, contents="all", workers=-1, final={"contents": "weights"}, save_last=False)
    for text in ("contents='all'", "workers=-1", "final: does nothing"):
        assert text in str(caught.value)


def test_options_for_opening_do_nothing_for_an_open_source(tmp_path: Path) -> None:
    with ckpt_convert.open_checkpoint(LLAMA) as source:
        for options in ({"family": "llama"}, {"source_format": "hf"}, {"config": LLAMA / "config.json"}):
            with pytest.raises(UsageError, match="for a source that is open already"):
                made(tmp_path, **{"source": source, **options})
        made(tmp_path, source=source)


def test_one_extra_file_may_be_given_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr: 1")
    for given in (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml")):
        with made(tmp_path, extra_files=given, overwrite=True) as checkpointer:
            checkpointer.register(model=make_model())
            checkpointer.step()
        assert (tmp_path / "out" / "step_1" / "recipe.yaml").read_text() == "lr: 1"
        shutil.rmtree(tmp_path / "out")


def test_a_last_save_in_a_dtype_of_torchs(tmp_path: Path) -> None:
    with made(tmp_path, final=Final(export_dtype=torch.float16)) as checkpointer:  # type: ignore[arg-type]
        checkpointer.register(model=make_model().requires_grad_(False).half())
        checkpointer.step()
    with ckpt_convert.open_checkpoint(tmp_path / "out" / "step_1") as step:
        assert {tensor.dtype for tensor in step.values()} == {"F16"}
