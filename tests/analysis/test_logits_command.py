"""Logits through transformers: any format computes what its Hugging Face twin does, and what does not fit is said.

The golden tensors are coded, far too large to compute with. Every element is replaced by a small number that only its
value decides, so that the outside converters' order of rows and cut over ranks stay what they are.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from transformers.utils import logging as chatter

from ckpt_convert.analysis.logits import logits as logits_module
from ckpt_convert.analysis.logits.logits import LogitsReport, compare_logits
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.cli.notices import silent_transformers
from ckpt_convert.errors import (
    CkptConvertError,
    ConfigError,
    KeyMismatchError,
    MissingPackageError,
    ShapeMismatchError,
    UnsupportedFamilyError,
    UsageError,
)
from ckpt_convert.tensors.progress import TransferProgress
from tests.helpers import GOLDEN, Tensors, edit_json, read_safetensors


def small(tensors: Tensors) -> Tensors:
    """Numbers between -1 and 1, as good as random, and the same for the same coded element."""
    return {key: (torch.sin(tensor.double()) * 43758.5453 % 2 - 1).float() for key, tensor in tensors.items()}


def make_small(path: Path) -> None:
    for file in [path] if path.is_file() else path.iterdir():
        if file.suffix == ".safetensors":
            safetensors.torch.save_file(small(safetensors.torch.load_file(file)), file, {"format": "pt"})
        elif file.suffix == ".pth":
            torch.save(small(torch.load(file, weights_only=True)), file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for case in ("llama", "llama_tied", "mistral", "qwen2"):
        shutil.copytree(GOLDEN / case, folder / case)
        for path in (folder / case).iterdir():
            make_small(path)
    return folder


@pytest.fixture
def hf(folder: Path, tmp_path: Path) -> Path:
    """A copy of the small llama to spoil."""
    return Path(shutil.copytree(folder / "llama" / "hf", tmp_path / "hf"))


def run(a: Path, b: Path | None = None, *, config: Path | None = None, **options: int) -> LogitsReport:
    with open_identified(a) as one:
        if b is None:
            return compare_logits(one, **options)
        with open_identified(b, config=config) as other:
            return compare_logits(one, other, **options)


def respell(hf: Path, change: Callable[[Tensors], None]) -> None:
    """Let ``change`` spoil the tensors, and write them as one file."""
    tensors = read_safetensors(hf)
    change(tensors)
    for file in (*hf.glob("*.safetensors"), *hf.glob("*.index.json")):
        file.unlink()
    safetensors.torch.save_file(tensors, hf / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("case", ["llama", "llama_tied", "mistral", "qwen2"])
def test_one_checkpoint_gives_what_transformers_gives(case: str, folder: Path) -> None:
    path = folder / case / "hf"
    report = run(path, prompts=2, length=9, seed=5)
    tokens = torch.randint(56, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(path)(tokens).logits
    entropy = torch.distributions.Categorical(logits=expected.double()).entropy().mean().item()
    assert report.a.entropy == pytest.approx(entropy, rel=1e-4)
    assert report.a.largest == pytest.approx(expected.abs().max().item(), rel=1e-4)
    assert report.a.entropy < 0.95 * report.a.uniform_entropy
    assert report.finite
    assert report.b is report.difference is None
    assert report.a.notices == ()
    assert json.loads(json.dumps(report.as_dict()))["a"]["model_type"] == case.removesuffix("_tied")


@pytest.mark.parametrize(
    ("case", "other"),
    [
        *[(case, f"meta-mp{n}") for case in ("llama", "llama_tied") for n in (1, 2, 4)],
        ("mistral", "meta-mp1"),
        *[(case, "native.safetensors") for case in ("llama", "llama_tied", "mistral")],
    ],
)
def test_every_format_computes_the_same(case: str, other: str, folder: Path) -> None:
    hf = folder / case / "hf"
    report = run(hf, folder / case / other, config=hf / "config.json" if other.endswith("safetensors") else None)
    assert report.difference is not None
    assert report.difference.max_abs < 1e-4
    assert report.difference.kl_max < 1e-6
    assert report.difference.agreement == 1
    assert report.b is not None
    assert report.b.parameters == report.a.parameters


def test_what_params_json_does_not_hold_is_told(folder: Path) -> None:
    report = run(folder / "llama" / "hf", folder / "llama" / "meta-mp2")
    assert report.b is not None
    assert any("`rope_factor=`" in notice for notice in report.b.notices)


@pytest.mark.parametrize("projection", ["q", "k"])
def test_one_wrong_order_of_rows_shows(projection: str, folder: Path, hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        key = f"model.layers.1.self_attn.{projection}_proj.weight"
        heads = tensors[key].shape[0] // 6
        tensors[key] = tensors[key].view(heads, 2, 3, 72).transpose(1, 2).reshape(-1, 72).contiguous()

    respell(hf, spoil)
    difference = run(folder / "llama" / "hf", hf).difference
    assert difference is not None
    assert difference.max_abs > 0.1
    assert difference.kl_mean > 1e-3


def test_the_figures_of_a_difference() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 50, 7), torch.randn(3, 50, 7)
    b[2, 17, 4] = a[2, 17, 4] + 20
    found = logits_module.logits_difference(a, b)
    delta = (a.double() - b.double()).abs()
    kl = torch.nn.functional.kl_div(
        b.double().log_softmax(-1), a.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert found.max_abs == delta.max().item()
    assert found.mean_abs == pytest.approx(delta.mean().item())
    assert found.kl_mean == pytest.approx(kl.mean().item())
    assert found.kl_max == pytest.approx(kl.max().item())
    assert found.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    assert (found.at.prompt, found.at.position, found.at.token) == (2, 17, 4)
    same = logits_module.logits_difference(a, a.clone())
    assert (same.max_abs, same.mean_abs, same.kl_mean, same.kl_max, same.agreement) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("name", ["weights-a.safetensors", "pytorch_model.bin"])
def test_names_that_transformers_would_not_find_and_those_it_would(name: str, folder: Path, hf: Path) -> None:
    respell(hf, lambda tensors: None)
    if name.endswith(".bin"):
        torch.save(safetensors.torch.load_file(hf / "model.safetensors"), hf / name)
        (hf / "model.safetensors").unlink()
    else:
        (hf / "model.safetensors").rename(hf / name)
    difference = run(folder / "llama" / "hf", hf).difference
    assert difference is not None
    assert difference.max_abs == 0


def test_bfloat16_weights_are_computed_with_in_float32(folder: Path, tmp_path: Path) -> None:
    meta = Path(shutil.copytree(folder / "llama" / "meta-mp2", tmp_path / "meta"))
    for file in meta.glob("*.pth"):
        tensors = torch.load(file, weights_only=True)
        torch.save({key: tensor.bfloat16() for key, tensor in tensors.items()}, file)
    difference = run(folder / "llama" / "hf", meta).difference
    assert difference is not None
    assert 1e-4 < difference.max_abs < 2
    assert difference.agreement > 0.5


def test_logits_that_are_no_numbers_are_told_and_not_compared(folder: Path, hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    respell(hf, spoil)
    report = run(folder / "llama" / "hf", hf)
    assert not report.finite
    assert report.difference is None
    assert report.b is not None
    assert (report.b.finite, report.b.entropy, report.b.largest) == (False, None, None)
    assert "NaN" not in json.dumps(report.as_dict())


def test_logits_that_are_all_the_same_are_told() -> None:
    (notice,) = run(GOLDEN / "llama" / "hf").a.notices  # so large that RMSNorm overflows
    assert "say nothing of the weights" in notice


def test_what_is_missing_unexpected_or_misshapen_is_listed(hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.down_proj.extra"] = tensors.pop("model.layers.1.mlp.down_proj.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()

    respell(hf, spoil)
    with pytest.raises(KeyMismatchError) as error:
        run(hf)
    text = str(error.value)
    assert "1 missing keys:\n    model.layers.1.mlp.down_proj.weight" in text
    assert "1 unexpected keys:\n    model.layers.1.mlp.down_proj.extra" in text
    assert "lm_head.weight: expected [56, 72], found [50, 72]" in text


def spoiled_config(**changes: object) -> Callable[[Path], None]:
    return lambda hf: edit_json(hf / "config.json", **changes)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoiled_config(model_type="rosetta"), UnsupportedFamilyError, "pip install --upgrade transformers"),
        (spoiled_config(model_type="rosetta", auto_map={"AutoModel": "evil.py"}), UnsupportedFamilyError, "never run"),
        (spoiled_config(model_type="vit"), UnsupportedFamilyError, "no causal language model"),
        (spoiled_config(model_type=["llama"]), UnsupportedFamilyError, "unknown"),
        (spoiled_config(hidden_size="wide"), ConfigError, "transformers"),
        (spoiled_config(num_hidden_layers=4), KeyMismatchError, "model.layers.3.mlp.up_proj.weight"),
        (spoiled_config(hidden_size=73), CkptConvertError, "transformers"),
        (spoiled_config(max_position_embeddings=8), UsageError, "takes at most 8 tokens, 16 were asked for"),
        (spoiled_config(quantization_config={"quant_method": "gptq", "bits": 4}), CkptConvertError, "transformers"),
        (lambda hf: (hf / "config.json").unlink(), ConfigError, "`config=`"),
    ],
)
def test_bad_input_is_a_clear_error(
    spoil: Callable[[Path], None], error: type[CkptConvertError], message: str, hf: Path
) -> None:
    spoil(hf)
    with pytest.raises(error) as caught:
        run(hf)
    assert message in str(caught.value)
    assert str(hf) in str(caught.value)


def test_two_vocabularies_cannot_be_compared(folder: Path, hf: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[key] = tensors[key][:50].clone()

    respell(hf, spoil)
    edit_json(hf / "config.json", vocab_size=50)
    with pytest.raises(ShapeMismatchError, match=r"vocabulary of 50 tokens, .* one of 56"):
        run(folder / "llama" / "hf", hf)


def test_without_transformers_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=re.escape("pip install 'ckpt-convert[hf]'")):
        run(folder / "llama" / "hf")


@pytest.mark.parametrize("options", [{"prompts": 0}, {"length": 0}])
def test_no_prompts_are_a_usage_error(options: dict[str, int], folder: Path) -> None:
    with pytest.raises(UsageError, match="expected 1 or more"):
        run(folder / "llama" / "hf", **options)


def test_transformers_is_silent_meanwhile_and_itself_again_afterwards(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = (chatter.get_verbosity(), chatter.is_progress_bar_enabled())
    seen: list[tuple[str, bool]] = []
    first, second = open_identified(folder / "llama" / "hf"), open_identified(folder / "llama" / "meta-mp2")
    with first as a, second as b, silent_transformers():
        compare_logits(a, b, progress=lambda at: seen.append((at.phase, constants.HF_HUB_OFFLINE)))
    assert capfd.readouterr() == ("", "")
    assert {phase for phase, _ in seen} == {"loading", "running"}
    assert all(offline for _, offline in seen)
    assert not constants.HF_HUB_OFFLINE
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before


def test_the_command_lets_transformers_say_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(folder / "llama" / "hf"), "--quick", "--logits", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "ckpt_convert", *words], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_the_library_touches_no_switch_of_the_process_and_asks_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it goes on the network"))
    filters = list(warnings.filters)
    before = (chatter.get_verbosity(), chatter.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE, filters)
    seen = []

    def look(_: TransferProgress) -> None:
        now = list(warnings.filters)
        seen.append((chatter.get_verbosity(), chatter.is_progress_bar_enabled(), constants.HF_HUB_OFFLINE, now))

    with open_identified(folder / "llama" / "hf") as a, open_identified(folder / "llama" / "meta-mp2") as b:
        compare_logits(a, b, progress=look)
    assert seen
    assert all(one == before for one in seen)


def test_progress_comes_to_its_total(folder: Path) -> None:
    seen: dict[str, TransferProgress] = {}
    with open_identified(folder / "llama" / "meta-mp4") as a:
        compare_logits(a, prompts=4, progress=lambda at: seen.update({at.phase: at}))
    assert (seen["loading"].done, seen["loading"].total) == (469728, 469728)
    assert (seen["running"].done, seen["running"].total) == (4, 4)
