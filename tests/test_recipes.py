"""The recipes are what people copy: each has to run, leave the files it promises, and say what it shows."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ckpt_convert
from tests.helpers import GOLDEN, assert_same, read_safetensors

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
SMALL = ["--batch-size", "4", "--length", "32", "--examples", "64", "--eval-every", "2", "--log-every", "1"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that the scaling shows within the few positions of a test
}


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look themselves up there
    spec.loader.exec_module(found)
    return found


native_llama = module("native_llama")


def config(**changes: Any) -> dict[str, Any]:
    """Twelve heads over four, head_dim not hidden_size/heads, all sizes different."""
    return {
        "model_type": "llama",
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 56,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": ROPE,
        **changes,
    }


def pair(values: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A transformers Llama with random weights, and ours with the same ones, converted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**{**values, "initializer_range": 0.1})).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    weights = theirs.state_dict()
    if values["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    ours = native_llama.NativeLlama.from_config(values)
    ours.load_state_dict(ckpt_convert.convert_state_dict(weights, values, source="hf", target="native"))
    return ours, theirs


def tokens(length: int = 150) -> torch.Tensor:
    return torch.arange(2 * length).mul(7919).remainder(56).view(2, length)


class TestNativeLlama:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("rope", [ROPE, LLAMA3], ids=["default", "llama3"])
    @torch.no_grad()
    def test_computes_what_transformers_computes(self, tied: bool, rope: dict[str, Any]) -> None:
        ours, theirs = pair(config(tie_word_embeddings=tied, rope_parameters=rope))
        torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("name", ["llama", "llama_tied"])
    @torch.no_grad()
    def test_takes_torchtunes_tensors(self, name: str) -> None:
        """The golden native tensors were made by torchtune's own code, the golden HF ones by transformers."""
        from transformers import LlamaForCausalLM

        ours = native_llama.NativeLlama.from_config(GOLDEN / name / "hf" / "config.json")
        golden = read_safetensors(GOLDEN / name / "native.safetensors")
        ours.load_state_dict({key: tensor.float() for key, tensor in golden.items()})
        theirs = LlamaForCausalLM.from_pretrained(GOLDEN / name / "hf", dtype=torch.float32).eval()
        expected = theirs(tokens(40)).logits
        assert expected.isfinite().all()
        torch.testing.assert_close(ours(tokens(40)), expected)

    def test_the_scaling_shows(self) -> None:
        """The test above could not tell a scaling that is left out if its positions were too few."""
        plain, scaled = (
            native_llama.rope_frequencies(native_llama.LlamaConfig.read(config(rope_parameters=rope)))
            for rope in ({**LLAMA3, "rope_type": "default"}, LLAMA3)
        )
        assert plain[0] == scaled[0]
        assert scaled[-1] == pytest.approx(plain[-1] / 8)

    def test_reads_the_rope_of_older_configs(self) -> None:
        older = config(rope_parameters=None, rope_theta=500.0, rope_scaling={k: LLAMA3[k] for k in [*LLAMA3][2:]})
        older["rope_scaling"]["rope_type"] = "llama3"
        read = native_llama.LlamaConfig.read
        expected = native_llama.rope_frequencies(read(config(rope_parameters=LLAMA3)))
        assert torch.equal(native_llama.rope_frequencies(read(older)), expected)

    def test_refuses_a_scaling_that_it_does_not_know(self) -> None:
        model = native_llama.NativeLlama.from_config(config(rope_parameters={**LLAMA3, "rope_type": "yarn"}))
        with pytest.raises(ValueError, match="'yarn'"):
            model(tokens(4))

    def test_generates_greedily(self) -> None:
        ours, theirs = pair(config())
        prompt = tokens(6)[:1]
        expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert ours.generate(prompt, 8).tolist() == expected.tolist()
        first = int(expected[0, 6])
        assert ours.generate(prompt, 8, stop=first).tolist() == expected[:, :7].tolist()


class TestLora:
    @pytest.mark.parametrize("dora", [False, True])
    @torch.no_grad()
    def test_starts_as_the_base_model(self, dora: bool) -> None:
        model, _ = pair(config())
        before = model(tokens(20))
        native_llama.add_lora(model, 4, 8, ["q_proj", "w2", "output"], dora=dora)
        torch.testing.assert_close(model(tokens(20)), before)

    def test_keys_and_shapes(self) -> None:
        model = native_llama.NativeLlama.from_config(config())
        base = set(model.state_dict())
        trained = native_llama.add_lora(model, 4, 8, ["k_proj"], dora=True)
        state = model.state_dict()
        added = {key: tuple(state[key].shape) for key in state.keys() - base}
        assert added == {
            f"layers.{layer}.attn.k_proj.{key}": shape
            for layer in range(2)
            for key, shape in {"lora_a.weight": (4, 72), "lora_b.weight": (32, 4), "magnitude": (32,)}.items()
        }
        assert base <= state.keys()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == added.keys()
        assert len(trained) == len(added)

    @pytest.mark.parametrize("dora", [False, True])
    @torch.no_grad()
    def test_adds_the_scaled_product(self, dora: bool) -> None:
        base = torch.nn.Linear(5, 7, bias=False)
        layer = native_llama.LoRALinear(base, 2, 6.0, dora=dora)
        torch.nn.init.normal_(layer.lora_b.weight)
        expected = base.weight + 3.0 * (layer.lora_b.weight @ layer.lora_a.weight)
        if dora:
            expected = expected / expected.norm(dim=1, keepdim=True) * base.weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(layer(torch.eye(5)), expected.T)

    @torch.no_grad()
    def test_dora_starts_from_weights_that_are_loaded_later(self) -> None:
        model, _ = pair(config())
        before, weights = model(tokens(20)), model.state_dict()
        other = native_llama.NativeLlama.from_config(config())
        native_llama.add_lora(other, 4, 8, ["q_proj", "w2"], dora=True)
        other.load_state_dict(weights, strict=False)
        assert not torch.allclose(other(tokens(20)), before)
        for layer in other.modules():
            if isinstance(layer, native_llama.LoRALinear):
                layer.reset_magnitude()
        torch.testing.assert_close(other(tokens(20)), before)

    def test_an_unknown_target_is_an_error(self) -> None:
        model = native_llama.NativeLlama.from_config(config())
        with pytest.raises(ValueError, match="no linear layer is called wq"):
            native_llama.add_lora(model, 4, 8, ["q_proj", "wq"])


def start(place: Path, recipe: str, *options: str) -> str:
    """Run a recipe as a user would; returns what it printed."""
    # One thread: where other programs are busy, threads of such small models spend their time waiting for each other.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RECIPES / recipe), *options]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def full(place: Path) -> str:
    """What the full fine-tuning printed; it made the tiny checkpoint that the other recipes start from, too."""
    return start(place, "full_finetune.py", "--steps", "10", "--save-every", "2 steps", *SMALL)


@pytest.mark.usefixtures("full")
class TestFullFinetune:
    def test_the_loss_falls(self, full: str) -> None:
        rows = [line.split() for line in full.splitlines() if re.match(r" +\d+ ", line)]
        assert [int(row[0]) for row in rows] == list(range(1, 11))
        assert [row[0] for row in rows if len(row) == 4] == ["2", "4", "6", "8", "10"]
        assert float(rows[-1][1]) < float(rows[0][1])

    def test_a_saved_step_is_like_the_source(self, place: Path) -> None:
        source, step = place / "runs/tiny-llama", place / "runs/full/step_10"
        assert {path.name for path in source.iterdir()} < {path.name for path in step.iterdir()}
        for path in source.iterdir():
            same = path.read_bytes() == (step / path.name).read_bytes()
            assert same == (path.suffix != ".safetensors"), path.name
        before, after = read_safetensors(source), read_safetensors(step)
        assert {key: (tensor.dtype, tensor.shape) for key, tensor in before.items()} == {
            key: (tensor.dtype, tensor.shape) for key, tensor in after.items()
        }

    def test_keeps_the_last_two_and_the_best(self, place: Path, full: str) -> None:
        kept = dict(re.findall(r"^runs/full/(step_\d+)  \{'val_loss': ([\d.]+)\}$", full, re.MULTILINE))
        assert {"step_8", "step_10"} <= kept.keys()
        assert kept.keys() == {path.name for path in (place / "runs/full").glob("step_*")}
        assert (place / "runs/full/latest").resolve().name == "step_10"

    def test_only_the_last_can_be_resumed(self, place: Path) -> None:
        heavy = [path.parent.name for path in (place / "runs/full").glob("step_*/training_state")]
        assert heavy == ["step_10"]

    def test_transformers_agrees(self, full: str) -> None:
        assert AGREES.search(full)


AGREES = re.compile(r"^logits: at most \d\.\de-0[5-9] apart", re.MULTILINE)


LORA = ["lora_finetune.py", "--save-every", "2 steps", "--dora", "--merged", *SMALL]


@pytest.fixture(scope="module")
def lora(place: Path, full: str) -> str:
    """What the fine-tuning of an adapter printed."""
    return start(place, *LORA, "--steps", "4")


class TestLoraFinetune:
    def test_a_saved_step_is_an_adapter(self, place: Path, lora: str) -> None:
        directory = place / "runs/lora/step_4"
        names = {path.name for path in directory.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= names
        assert not [name for name in names if name.startswith("model")]
        written = json.loads((directory / "adapter_config.json").read_text())
        assert (written["r"], written["lora_alpha"]) == (8, 16)
        assert set(written["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}

    def test_the_adapter_was_trained(self, place: Path, lora: str) -> None:
        tensors = read_safetensors(place / "runs/lora/step_4")
        assert len(tensors) == 3 * 4 * 3  # A, B and magnitude of four linear layers in each of three
        assert all(tensor.any() for tensor in tensors.values())

    def test_the_merged_weights_are_like_the_source(self, place: Path, lora: str) -> None:
        source, merged = place / "runs/tiny-llama", place / "runs/lora/step_4/merged"
        assert {path.name for path in source.iterdir()} < {path.name for path in merged.iterdir()}

    def test_peft_agrees(self, lora: str) -> None:
        assert AGREES.search(lora)

    def test_goes_on_where_it_was(self, place: Path, lora: str) -> None:
        again = start(place, *LORA, "--steps", "6", "--no-check")
        assert [line.split()[0] for line in (lora + again).splitlines() if re.match(r" +\d+ ", line)] == list("123456")


DISTRIBUTED = ["--length", "32", "--examples", "64", "--save-every", "2 steps"]


@pytest.mark.usefixtures("full")
def test_a_run_of_two_processes_that_is_killed_goes_on_with_one(place: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    options = [str(RECIPES / "distributed_finetune.py"), *DISTRIBUTED]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        [*launch, "2", *options, "--steps", "1000"],
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stderr is not None
    said = next((line for line in run.stderr if line.startswith("saved runs/distributed/step_4")), "")
    os.killpg(run.pid, signal.SIGKILL)  # all of its processes, at whatever they are doing
    run.communicate()
    assert said
    done = subprocess.run(
        [*launch, "1", *options, "--steps", "12"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^resumed from \S*step_\d+, at step \d+$", done.stderr, re.MULTILINE)
    source, step = place / "runs/tiny-llama", place / "runs/distributed/latest"
    assert {path.name for path in source.iterdir()} < {path.name for path in step.iterdir()}
    assert read_safetensors(step).keys() == read_safetensors(source).keys()


@pytest.fixture(scope="module")
def generated(place: Path, full: str) -> str:
    """What was generated from the last step of the full fine-tuning."""
    return start(place, "generate.py", "runs/full/latest", "--length", "32", "--examples", "64", "--tokens", "8")


class TestGenerate:
    def test_measures_what_training_measured(self, full: str, generated: str) -> None:
        assert generated.startswith("'def main(")
        found = re.search(r"^loss ([\d.]+) nats, perplexity ([\d.]+)$", generated, re.MULTILINE)
        expected = re.search(r"^runs/full/step_10  \{'val_loss': ([\d.]+)\}$", full, re.MULTILINE)
        assert found
        assert expected
        # The files hold bfloat16, the model that trained float32.
        assert float(found[1]) == pytest.approx(float(expected[1]), abs=0.01)

    def test_reads_another_format(self, place: Path, full: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(RECIPES))
        load = module("generate").load
        ckpt_convert.convert_checkpoint(place / "runs/full/step_10", place / "meta", to="meta", model_parallel=2)
        assert_same(load(place / "meta").state_dict(), load(place / "runs/full/step_10").state_dict())


class TestTrainToS3:
    @pytest.mark.slow
    def test_goes_on_from_the_bucket_alone(self, place: Path) -> None:
        options = ["--steps", "8", "--save-every", "2 steps", *SMALL]
        printed = start(place, "train_to_s3.py", *options)
        assert "killed after a step has arrived\n" in printed
        assert re.search(r"resumed from s3://training/run/step_\d+\b", printed)
        assert re.search(r"^run/step_8/model-00001-of-00004\.safetensors +[\d,]+$", printed, re.MULTILINE)
        for what in ("weights", "optimizer"):
            assert re.search(rf"^{what} +([0-9a-f]{{19}}…)  \1  same$", printed, re.MULTILINE)


class TestResumeAfterKill:
    def test_ends_with_the_same_bits(self, place: Path, full: str) -> None:
        printed = start(place, "resume_after_kill.py", "--steps", "12", "--kills", "1", "--seed", "5", *SMALL)
        assert "killed after step 10\n" in printed
        assert re.search(r"resumed from \S+/step_\d+\b", printed)
        for what in ("weights", "optimizer"):
            assert re.search(rf"^{what} +([0-9a-f]{{19}}…)  \1  same$", printed, re.MULTILINE)
