"""Starting a fine-tuning: a checkpoint in a model that is not quite its own, and the best step of another run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, LlamaConfig

from ckpt_convert import Checkpointer, convert_checkpoint
from ckpt_convert.errors import CheckpointNotFoundError, KeyMismatchError, UsageError
from tests.checkpointer.training import LLAMA, Trained, train_hf

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 3}


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=40, intermediate_size=24, num_key_value_heads=1, pad_token_id=0, **SIZES, **options)


def bert() -> BertConfig:
    return BertConfig(vocab_size=40, intermediate_size=24, max_position_embeddings=16, **SIZES)


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A causal language model."""
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(llama()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_language_model_into_a_classifier(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForSequenceClassification(llama())
    before, stored = copied(model), transformers.LlamaForCausalLM.from_pretrained(base).state_dict()
    checkpointer = Checkpointer(base, model_format="hf")
    with pytest.raises(KeyMismatchError, match=r"strict=False loads what fits[\s\S]*lm_head.weight[\s\S]*score.weight"):
        checkpointer.load_model(model)
    assert same(copied(model), before)
    report = checkpointer.load_model(model, strict=False)
    now = copied(model)
    assert torch.equal(now.pop("score.weight"), before["score.weight"])
    assert same(now, {key: stored[key] for key in now})
    assert (report.missing, report.unexpected) == (("score.weight",), ("lm_head.weight",))
    assert report.tensors == len(now)
    assert report.left_out == {
        "score.weight": "the model has it, the checkpoint has not",
        "lm_head.weight": "the checkpoint has it, the model has not",
    }
    assert "2 left out:" in str(report)
    assert [record.levelno for record in caplog.records if "left out" in record.message] == [logging.WARNING]


def test_what_is_excluded_is_no_mismatch(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForSequenceClassification(llama())
    report = Checkpointer(base, model_format="hf").load_model(model, exclude=["score", "lm_head.weight"])
    assert report.excluded == ("score.weight", "lm_head.weight")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_some_modules_alone(base: Path) -> None:
    model = transformers.LlamaForCausalLM(llama())
    before, stored = copied(model), transformers.LlamaForCausalLM.from_pretrained(base).state_dict()
    report = Checkpointer(base, model_format="hf").load_model(model, include="model.layers.1", exclude="*.mlp.*")
    loaded = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    attention = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}
    assert loaded == attention  # the norms of both are ones
    assert all(torch.equal(model.state_dict()[key], stored[key]) for key in attention)
    assert report.tensors == len(attention) + 2
    assert set(report.excluded) == set(before) - attention - {
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
    }


def test_a_glob_that_matches_no_key_names_the_nearest(base: Path) -> None:
    model = transformers.LlamaForSequenceClassification(llama())
    before = copied(model)
    checkpointer = Checkpointer(base, model_format="hf")
    with pytest.raises(UsageError, match=r"`exclude='lm_haed.weight'`: matches no key \(did you mean lm_head.weight"):
        checkpointer.load_model(model, exclude=["lm_haed.weight"])
    with pytest.raises(UsageError, match=r"`include='vision\*'`: matches no key; the keys are:"):
        checkpointer.load_model(model, strict=False, include=["vision*"])
    with pytest.raises(UsageError, match="leave no tensor to load"):
        checkpointer.load_model(model, exclude="*")
    assert same(copied(model), before)


def test_a_resized_vocabulary(base: Path) -> None:
    model = transformers.LlamaForCausalLM(llama())
    model.resize_token_embeddings(48)
    before = copied(model)
    report = Checkpointer(base, model_format="hf").load_model(model, strict=False)
    shapes = "expected [40, 16], found [48, 16] in the model"
    assert report.mismatched == {"model.embed_tokens.weight": shapes, "lm_head.weight": shapes}
    assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
    # Loaded first and resized then, the rows of the tokens that there were are kept.
    model = transformers.LlamaForCausalLM(llama())
    Checkpointer(base, model_format="hf").load_model(model)
    loaded = copied(model)["lm_head.weight"]
    model.resize_token_embeddings(48)
    assert torch.equal(model.state_dict()["lm_head.weight"][:40], loaded)


@pytest.mark.parametrize(
    ("config", "base_class", "head_class", "head"),
    [
        (llama, transformers.LlamaModel, transformers.LlamaForSequenceClassification, "score"),
        (bert, transformers.BertModel, transformers.BertForSequenceClassification, "classifier"),
        (gpt2, transformers.GPT2Model, transformers.GPT2ForSequenceClassification, "score"),
    ],
    ids=["llama", "bert", "gpt2"],
)
def test_a_base_model_into_a_model_with_a_head_and_back(
    config: Any, base_class: Any, head_class: Any, head: str, tmp_path: Path
) -> None:
    torch.manual_seed(2)
    backbone = base_class(config())
    backbone.save_pretrained(tmp_path / "backbone")
    model = head_class(config())
    report = Checkpointer(tmp_path / "backbone", model_format="hf").load_model(model, exclude=head)
    assert report.tensors == len(backbone.state_dict())
    assert same(model.base_model.state_dict(), backbone.state_dict())
    model.save_pretrained(tmp_path / "model")
    again = base_class(config())
    Checkpointer(tmp_path / "model", model_format="hf").load_model(again, exclude=head)
    assert same(again.state_dict(), backbone.state_dict())


def test_weights_that_the_model_ties_and_the_checkpoint_does_not(base: Path) -> None:
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=True))
    stored = transformers.LlamaForCausalLM.from_pretrained(base).state_dict()
    checkpointer = Checkpointer(base, model_format="hf")
    with pytest.raises(KeyMismatchError, match=r"lm_head.weight: is tied to model.embed_tokens.weight in the model"):
        checkpointer.load_model(model)
    report = checkpointer.load_model(model, strict=False)
    assert list(report.left_out) == ["lm_head.weight"]
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


def test_nothing_that_fits_is_an_error_whatever_strict_is(base: Path) -> None:
    model = transformers.BertModel(bert())
    with pytest.raises(KeyMismatchError, match="does not fit the model"):
        Checkpointer(base, model_format="hf").load_model(model, strict=False)


def test_from_any_format(tmp_path: Path) -> None:
    convert_checkpoint(LLAMA, tmp_path / "meta", to="meta")
    config = transformers.AutoConfig.from_pretrained(LLAMA, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    report = Checkpointer(tmp_path / "meta", model_format="hf").load_model(model, strict=False)
    stored = transformers.LlamaForCausalLM.from_pretrained(LLAMA, dtype=torch.float32).state_dict()
    assert report.missing == ("score.weight",)
    assert same(
        model.model.state_dict(), {key.removeprefix("model."): stored[key] for key in stored if "lm_head" not in key}
    )


def test_a_classifier_that_is_a_source_of_its_own_is_trained_and_saved(base: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification(llama())
    Checkpointer(base, model_format="hf").load_model(model, strict=False)
    model.save_pretrained(tmp_path / "start")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(tmp_path / "start", tmp_path / "out", model_format="hf") as checkpointer:
        checkpointer.register(model=model, optimizer=optimizer)
        for _ in range(2):
            model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([1])).loss.backward()
            optimizer.step()
            checkpointer.step()
    loaded, found = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "out" / "latest", output_loading_info=True
    )
    assert not any(found.values())
    assert same(loaded.state_dict(), model.state_dict())


@pytest.fixture
def other_run(tmp_path: Path) -> Path:
    """Four steps, of which the third is the best and the last the newest."""
    trained = Trained()
    with Checkpointer(LLAMA, tmp_path / "other", save_every=1, best="val_loss:min") as checkpointer:
        checkpointer.register(**trained.parts)
        for value in (3.0, 2.0, 1.0, 2.0):
            trained.go(checkpointer, checkpointer.progress.step + 1)
            checkpointer.report(val_loss=value)
    return tmp_path / "other"


@pytest.mark.parametrize(("from_", "step"), [("best", 3), ("latest", 4), (2, 2)])
def test_a_step_of_another_run(from_: Any, step: int, other_run: Path, tmp_path: Path) -> None:
    trained, expected = Trained(), Trained()
    with Checkpointer(LLAMA, tmp_path / "out", best="val_loss:min") as checkpointer:
        progress = checkpointer.resume(**trained.parts, from_=from_, from_dir=other_run)
        assert progress is not None
        assert progress.step == step
        trained.go(checkpointer, 5)
    with Checkpointer(LLAMA, tmp_path / "expected") as checkpointer:
        checkpointer.resume(**expected.parts, from_=other_run / f"step_{step}")
        expected.go(checkpointer, 5)
    assert same(trained.model.state_dict(), expected.model.state_dict())
    assert (tmp_path / "out" / "latest").readlink() == Path("step_5")
    assert not (other_run / "step_5").exists()


def test_the_best_of_another_run_as_the_start_of_this_one(other_run: Path, tmp_path: Path) -> None:
    trained = Trained()
    options: dict[str, Any] = {"from_": "best", "from_dir": other_run, "weights_only": True, "exclude": ["progress"]}
    with Checkpointer(LLAMA, tmp_path / "out", best="val_loss:min") as checkpointer:
        progress = checkpointer.resume(**trained.parts, **options)
        assert progress is not None
        assert progress.step == 0
        trained.go(checkpointer, 1)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("step")] == ["step_1"]


def test_another_run_only_where_this_one_has_nothing(other_run: Path, tmp_path: Path) -> None:
    """The first start takes the other run's step; after a kill, the run goes on from its own."""
    for until, started in ((4, 3), (6, 4)):
        trained = Trained()
        with Checkpointer(LLAMA, tmp_path / "out", best="val_loss:min") as checkpointer:
            progress = checkpointer.resume(**trained.parts)
            if progress is None:
                progress = checkpointer.resume(**trained.parts, from_="best", from_dir=other_run)
            assert progress is not None
            assert progress.step == started
            trained.go(checkpointer, until)


def test_what_another_run_does_not_have(other_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with Checkpointer(LLAMA, tmp_path / "out", best="accuracy:max") as checkpointer:
        for from_, from_dir, error, message in (
            ("latest", tmp_path / "empty", CheckpointNotFoundError, "empty: holds no complete checkpoint"),
            (9, other_run, CheckpointNotFoundError, "no complete checkpoint of step 9; it has: 1, 2, 3, 4"),
            ("best", other_run, CheckpointNotFoundError, "no checkpoint has the metric 'accuracy'"),
            (other_run / "step_2", other_run, UsageError, 'from_dir=.*: expected from_="latest"'),
        ):
            with pytest.raises(error, match=message):
                checkpointer.resume(**Trained().parts, from_=from_, from_dir=from_dir)


def test_a_model_of_transformers_goes_on_from_another_runs_best(base: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with Checkpointer(base, tmp_path / "other", model_format="hf", save_every=1, best="loss:min") as checkpointer:
        checkpointer.register(model=model, optimizer=optimizer)
        train_hf(checkpointer, model, optimizer, torch.tensor([[1, 2, 3, 4]]))
        checkpointer.report(loss=0.5)
    best = copied(model)
    fresh = transformers.LlamaForCausalLM(llama())
    with Checkpointer(base, tmp_path / "out", model_format="hf", best="loss:min") as checkpointer:
        checkpointer.resume(model=fresh, from_="best", from_dir=tmp_path / "other", weights_only=True)
    assert same(fresh.state_dict(), best)
