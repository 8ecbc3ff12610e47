"""The model in memory: never changed by saving, and unwrapped from what it is wrapped in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckpt_convert import Checkpointer
from ckpt_convert.checkpointer.state import training_state
from ckpt_convert.errors import KeyMismatchError, TiedWeightsError, UsageError
from recipes.native_llama import NativeLlama
from tests.checkpointer.training import LLAMA, Trained, bfloat16_source, make_model
from tests.helpers import GOLDEN, assert_same, bits, read_safetensors, sums

TIED = GOLDEN / "llama_tied" / "hf"
BOTH = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def saved(model: Any, output_dir: Path, source: Path = LLAMA, load: bool = True, **options: Any) -> dict[str, str]:
    """The sha256 of the files of a step that was saved of a model, loaded from the source before."""
    with Checkpointer(source, output_dir, **{"save_every": 1, "contents": "weights", **options}) as checkpointer:
        if load:
            checkpointer.load_model(model)
        checkpointer.register(model=model)
        checkpointer.step()
    return sums(output_dir / "step_1")


# Never changed


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saving_changes_nothing_in_memory(dtype: torch.dtype, asynchronous: bool, tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source")
    trained = Trained(source, dtype)

    def everything() -> dict[str, Any]:
        moments = {f"{id(of)} {key}": t for of, one in trained.optimizer.state.items() for key, t in one.items()}
        named = {**trained.model.state_dict(keep_vars=True), **moments}
        return {
            "values": {key: (id(t), t.data_ptr(), bits(t), t.dtype, t.requires_grad) for key, t in named.items()},
            "gradients": {key: None if p.grad is None else bits(p.grad) for key, p in trained.model.named_parameters()},
            "groups": [[id(p) for p in group["params"]] for group in trained.optimizer.param_groups],
            "training": [module.training for module in trained.model.modules()],
            "random": bits(torch.get_rng_state()),
            "class": type(trained.model),
        }

    with Checkpointer(source, tmp_path / "out", asynchronous=asynchronous, export_dtype="float16") as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 2)
        before = everything()
        checkpointer.save()
        checkpointer.wait()
        after = everything()
    for what, value in before.items():
        assert after[what] == value, what


def test_values_are_those_at_the_call_whatever_training_does_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is held up until the weights and the optimizer have changed; the first save's buffers serve again."""
    go_on = threading.Event()
    true = training_state.write_state

    def held(*args: Any) -> Any:
        assert go_on.wait(60)
        return true(*args)

    from ckpt_convert.convert import output

    true_output = output.write_output

    def held_output(*args: Any, **options: Any) -> Any:
        assert go_on.wait(60)
        return true_output(*args, **options)

    source = bfloat16_source(tmp_path / "source")
    trained = Trained(source)
    with Checkpointer(source, tmp_path / "out", asynchronous=True) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 1)
        checkpointer.save()
        checkpointer.wait()
        trained.go(checkpointer, 2)
        weights = {key: tensor.clone() for key, tensor in trained.model.state_dict().items()}
        moments = [one["exp_avg"].clone() for one in trained.optimizer.state_dict()["state"].values()]
        monkeypatch.setattr(training_state, "write_state", held)
        monkeypatch.setattr(output, "write_output", held_output)
        checkpointer.save()
        trained.go(checkpointer, 4)
        go_on.set()
        checkpointer.wait()
    again = Trained(source)
    with Checkpointer(source, tmp_path / "other") as other:
        other.resume(**again.parts, from_=tmp_path / "out" / "step_2")
    assert_same(again.model.state_dict(), weights)
    for found, moment in zip(again.optimizer.state_dict()["state"].values(), moments, strict=True):
        assert bits(found["exp_avg"]) == bits(moment)


def test_one_save_at_a_time_the_next_one_waits(tmp_path: Path) -> None:
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path, asynchronous=True, save_every=1) as checkpointer:
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 4)
        assert len([saved.step for saved in checkpointer.saved]) >= 3
    assert [(saved.step, saved.sequence) for saved in checkpointer.saved] == [(1, 1), (2, 2), (3, 3), (4, 4)]


# Wrapped


@BOTH
def test_compiled(asynchronous: bool, tmp_path: Path) -> None:
    model = torch.compile(make_model(), backend="eager")
    assert saved(model, tmp_path, asynchronous=asynchronous) == sums(LLAMA)
    assert any(key.startswith("_orig_mod.") for key in model.state_dict())


def test_compiled_in_part(tmp_path: Path) -> None:
    model = make_model()
    for number, layer in enumerate(model.layers):
        model.layers[number] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    assert saved(model, tmp_path) == sums(LLAMA)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_distributed_data_parallel(compiled: bool, tmp_path: Path) -> None:
    ddp = nn.parallel.DistributedDataParallel(make_model())
    model = torch.compile(ddp, backend="eager") if compiled else ddp
    assert saved(model, tmp_path / "out") == sums(LLAMA)
    assert all(key.removeprefix("_orig_mod.").startswith("module.") for key in model.state_dict())
    assert saved(ddp.state_dict(), tmp_path / "dict") == sums(LLAMA)


@pytest.mark.usefixtures("group")
def test_a_wrapped_run_is_resumed_by_one_that_is_not_wrapped(tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source")
    inner = make_model(source)
    trained = Trained(model=torch.compile(nn.parallel.DistributedDataParallel(inner), backend="eager"))  # type: ignore[arg-type]
    with Checkpointer(source, tmp_path / "out", save_every=2) as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 3)
    plain = Trained(source)
    with Checkpointer(source, tmp_path / "out") as checkpointer:
        checkpointer.resume(**plain.parts)
    assert_same(plain.model.state_dict(), inner.state_dict())
    for found, expected in zip(plain.optimizer.state.values(), trained.optimizer.state.values(), strict=True):
        assert_same(found, expected)


# Tied


class Aliased(nn.Module):
    """A tied model whose state dict names the one tensor twice, as torch.nn models that tie by assignment do."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        inner = NativeLlama.from_config(source / "config.json")
        self.tok_embeddings, self.layers, self.norm = inner.tok_embeddings, inner.layers, inner.norm
        self.output = nn.Linear(72, 56, bias=False)
        self.output.weight = self.tok_embeddings.weight


def test_tied_weights_that_are_one_tensor_are_written_as_the_source_has_them(tmp_path: Path) -> None:
    model = Aliased(TIED)
    assert {"output.weight", "tok_embeddings.weight"} <= model.state_dict().keys()
    assert saved(model, tmp_path, TIED) == sums(TIED)
    assert model.output.weight is model.tok_embeddings.weight


def test_weights_tied_in_the_model_alone_do_not_swallow_the_head_of_the_source(tmp_path: Path) -> None:
    model = Aliased(LLAMA)
    before = bits(model.tok_embeddings.weight)
    with pytest.raises(KeyMismatchError, match=r"is tied to \S+ in the model, but the checkpoint does not tie them"):
        saved(model, tmp_path)
    assert bits(model.tok_embeddings.weight) == before


def test_tied_weights_are_resumed_exactly(tmp_path: Path) -> None:
    source = bfloat16_source(tmp_path / "source", TIED)

    class Runs(Aliased):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.output(self.norm(self.tok_embeddings(tokens)))

    trained, again = Trained(model=Runs(source)), Trained(model=Runs(source))
    with Checkpointer(source, tmp_path / "out") as checkpointer:
        checkpointer.load_model(trained.model)
        checkpointer.resume(**trained.parts)
        trained.go(checkpointer, 3)
    with Checkpointer(source, tmp_path / "out") as checkpointer:
        checkpointer.resume(**again.parts)
    assert_same(again.model.state_dict(), trained.model.state_dict())
    assert again.model.output.weight is again.model.tok_embeddings.weight


def test_weights_that_a_config_ties_but_that_differ_are_refused(tmp_path: Path) -> None:
    """A head that went its own way cannot be written: loaders would tie it again, and lose it without a word."""
    model = dict(make_model(TIED).state_dict())
    model["output.weight"] = model["tok_embeddings.weight"] + 1
    with pytest.raises((TiedWeightsError, KeyMismatchError), match=r"output\.weight|lm_head\.weight|tok_embeddings"):
        saved(model, tmp_path, TIED, load=False)
    assert not list(tmp_path.glob("step_*"))


def test_one_tensor_under_two_names_where_the_config_does_not_tie(tmp_path: Path) -> None:
    """Both are written: only the config says what is tied."""
    model = make_model()
    model.output.weight = model.tok_embeddings.weight  # type: ignore[union-attr]
    saved(model, tmp_path, load=False)
    found = read_safetensors(tmp_path / "step_1")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


# transformers' models in memory


@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_a_model_of_transformers_with_a_live_head(case: str, tmp_path: Path) -> None:
    import transformers

    source = GOLDEN / case / "hf"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(source))
    assert "lm_head.weight" in model.state_dict()
    assert saved(model, tmp_path, source, model_format="hf") == sums(source)
    expected = transformers.LlamaForCausalLM.from_pretrained(source)
    assert_same(model.state_dict(), expected.state_dict())


# Memory of other kinds


def test_tensors_that_lie_in_memory_in_another_order(tmp_path: Path) -> None:
    model = {key: t.t().contiguous().t() if t.dim() == 2 else t for key, t in make_model().state_dict().items()}
    assert not model["layers.0.attn.q_proj.weight"].is_contiguous()
    assert saved(model, tmp_path) == sums(LLAMA)
    assert_same(
        {k: t.contiguous() for k, t in model.items()}, read_safetensors(GOLDEN / "llama" / "native.safetensors")
    )


def test_tensors_that_are_views_of_one_buffer(tmp_path: Path) -> None:
    shapes = {key: tensor.shape for key, tensor in make_model().state_dict().items()}
    buffer = torch.zeros(sum(shape.numel() for shape in shapes.values()) + 3)
    model, at = {}, 3
    for key, shape in shapes.items():
        model[key] = buffer[at : at + shape.numel()].view(shape)
        at += shape.numel()
    assert saved(model, tmp_path) == sums(LLAMA)


@pytest.mark.parametrize("given", [None, "model.pt", [1]])
def test_what_is_no_model_is_said_so(given: Any, tmp_path: Path) -> None:
    with Checkpointer(LLAMA, tmp_path) as checkpointer:
        for call in (checkpointer.load_model, lambda model: checkpointer.register(model=model)):
            with pytest.raises(UsageError, match=f"expected a module, .* found a {type(given).__name__}"):
                call(given)


def test_a_state_dict_with_something_else_than_tensors(tmp_path: Path) -> None:
    model = {**make_model().state_dict(), "step": 3, "name": "x"}
    with pytest.raises(KeyMismatchError, match=r"step: is a int[\s\S]*name: is a str"):
        saved(model, tmp_path, load=False)
