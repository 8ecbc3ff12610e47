"""The parts of Flux in files: text encoders, autoencoder and transformer, there and back, and what is refused.

Their tables are compared with torchtune's, diffusers' and torchtitan's converters in test_families; the files here are
those of fixtures/golden.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner

import ckpt_convert
from ckpt_convert.analysis.check.run import check_checkpoint
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.cli import cli
from ckpt_convert.convert.api import plan_conversion
from ckpt_convert.errors import ConfigError, KeyMismatchError, LossyConversionError, TiedWeightsError
from ckpt_convert.models import FAMILIES
from ckpt_convert.models.flux_autoencoder import from_shapes
from tests.helpers import GOLDEN, assert_same, edit_json, read_safetensors, sums

FAMILY = "flux_autoencoder"
WHOLE = GOLDEN.parent / "whole"
PLACES = (
    ("clip/hf", "native"),
    ("../whole/clip", "native"),
    ("t5/hf", "native"),
    ("../whole/t5", "native"),
    ("flux_autoencoder/hf", "native"),
    ("flux_vae/hf", "native"),
    ("flux/hf", "torchtitan"),
)


def copy(case: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / case, tmp_path / "source"))


def carried(source: Path, to: str) -> set[str]:
    made = plan_conversion(source, to=to)
    return set(made.passthrough)


@pytest.mark.parametrize(("case", "form"), PLACES)
def test_there_and_back_file_for_file(case: str, form: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / case, tmp_path / "there", to=form, verify=True)
    ckpt_convert.convert_checkpoint(tmp_path / "there", tmp_path / "back", to="hf", verify=True)
    assert sums(tmp_path / "back") == sums(GOLDEN / case)


@pytest.mark.parametrize("case", ["clip", "t5"])
def test_the_encoder_of_a_whole_model_is_the_encoder(case: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(WHOLE / case, tmp_path / "native", to="native")
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / case / "native.safetensors"))
    with ckpt_convert.open_checkpoint(WHOLE / case) as full:
        rest = {key for key in full if key.startswith(("vision_", "visual_", "decoder.", "lm_head"))}
    rest |= {"clip": {"text_projection.weight", "logit_scale", "text_model.embeddings.position_ids"}, "t5": set()}[case]
    assert carried(WHOLE / case, "native") == rest - {"decoder.embed_tokens.weight"}


@pytest.mark.parametrize("case", ["clip", "t5"])
def test_transformers_reads_what_comes_of_native_alone(case: str, tmp_path: Path) -> None:
    kind = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}[case]
    scaled = {key: tensor * 1e-4 for key, tensor in read_safetensors(GOLDEN / case / "native.safetensors").items()}
    safetensors.torch.save_file(scaled, tmp_path / "native.safetensors")
    config = GOLDEN / case / "hf" / "config.json"
    ckpt_convert.convert_checkpoint(tmp_path / "native.safetensors", tmp_path / "hf", to="hf", config=config)
    found, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = kind(kind.config_class.from_pretrained(GOLDEN / case / "hf")).eval()
    tensors = {key: tensor * 1e-4 for key, tensor in read_safetensors(GOLDEN / case / "hf").items()}
    if case == "clip":
        tensors = {key.removeprefix("text_model."): tensor for key, tensor in tensors.items()}
    expected.load_state_dict(tensors, strict=False)
    tokens = torch.tensor([[3, 7, 11, 22]])
    assert torch.equal(found(tokens).last_hidden_state, expected(tokens).last_hidden_state)


def test_clip_as_transformers_saves_its_text_model(tmp_path: Path) -> None:
    config = transformers.CLIPTextConfig.from_pretrained(GOLDEN / "clip" / "hf")
    transformers.CLIPTextModel(config).save_pretrained(tmp_path / "hf")
    written = read_safetensors(tmp_path / "hf")
    golden = {k.removeprefix("text_model."): v for k, v in read_safetensors(GOLDEN / "clip" / "hf").items()}
    assert written.keys() == golden.keys()
    safetensors.torch.save_file(golden, tmp_path / "hf" / "model.safetensors")
    report = ckpt_convert.convert_checkpoint(tmp_path / "hf", tmp_path / "native", to="native")
    assert report.family == "clip_text"
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / "clip" / "native.safetensors"))
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(tmp_path / "hf")


def test_a_changed_embedding_comes_back_under_all_its_names(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(WHOLE / "t5", tmp_path / "native", to="native")
    file = tmp_path / "native" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["token_embedding.weight"] += 0.5
    safetensors.torch.save_file(tensors, file)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    back = read_safetensors(tmp_path / "back")
    for key in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        assert torch.equal(back[key], tensors["token_embedding.weight"]), key


def test_only_the_names_that_were_there_come_back(tmp_path: Path) -> None:
    source = copy("t5/hf", tmp_path)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(source)


def test_the_plan_says_what_becomes_of_tied_names(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["convert", str(WHOLE / "t5"), str(tmp_path / "out"), "--to", "native", "--dry-run"]
    )
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert "tied: stored once" in lines["encoder.embed_tokens.weight"]
    assert "kept in the record" in lines["lm_head.weight"]
    assert len(lines["carried"]) < 800
    assert "decoder.block.{0,1}.layer.0.SelfAttention.k.weight" in lines["carried"]
    assert lines["carried"].endswith(" more")


def test_embeddings_of_t5_that_differ(tmp_path: Path) -> None:
    source = copy("../whole/t5", tmp_path)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["encoder.embed_tokens.weight"] += 1
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(TiedWeightsError, match=r"encoder\.embed_tokens\.weight and shared\.weight differ"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    assert not (tmp_path / "native").exists()


def test_t5_without_a_gate_has_no_place_in_native(tmp_path: Path) -> None:
    source = copy("t5/hf", tmp_path)
    file = source / "model.safetensors"
    tensors = {k: v for k, v in safetensors.torch.load_file(file).items() if "wi_1" not in k}
    safetensors.torch.save_file({key.replace("wi_0", "wi"): value for key, value in tensors.items()}, file)
    edit_json(source / "config.json", feed_forward_proj="relu")
    with pytest.raises(KeyMismatchError, match=r"no place for 3 tensors: encoder\.block\.0\.layer\.1\.Dense"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")


def test_the_vision_tower_may_be_absent_although_the_config_has_one(tmp_path: Path) -> None:
    source = copy("../whole/clip", tmp_path)
    shutil.copy(GOLDEN / "clip" / "hf" / "model.safetensors", source)
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")
    assert carried(source, "native") == set()
    assert_same(read_safetensors(tmp_path / "native"), read_safetensors(GOLDEN / "clip" / "native.safetensors"))


@pytest.mark.parametrize("family", ["flux_autoencoder", None])
def test_an_autoencoder_without_config(family: str | None, tmp_path: Path) -> None:
    source = tmp_path / "ae.safetensors"
    shutil.copy(GOLDEN / "flux_autoencoder" / "hf" / "ae.safetensors", source)
    with open_identified(source, family=family) as found:
        assert (found.format, found.why, found.family) == ("hf", "its keys", FAMILY)
        assert found.model.evidence == ("as asked for" if family else "its keys")
    ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native", **({"family": family} if family else {}))
    golden = read_safetensors(GOLDEN / "flux_autoencoder" / "native.safetensors")
    assert_same(read_safetensors(tmp_path / "native"), golden)
    ckpt_convert.convert_checkpoint(tmp_path / "native", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == {"ae.safetensors": sums(GOLDEN / "flux_autoencoder" / "hf")["ae.safetensors"]}
    assert check_checkpoint(source, family=family).findings == ()


def test_a_native_autoencoder_without_config(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / "flux_autoencoder" / "native.safetensors", tmp_path / "hf", to="hf")
    assert sorted(sums(tmp_path / "hf")) == ["ae.safetensors"]
    assert_same(read_safetensors(tmp_path / "hf"), read_safetensors(GOLDEN / "flux_autoencoder" / "hf"))


@pytest.mark.parametrize("case", ["flux_autoencoder", "flux_vae"])
def test_the_shapes_show_the_sizes(case: str) -> None:
    expected = {"block_out_channels": [2, 4, 6, 6], "in_channels": 3, "latent_channels": 5, "out_channels": 3}
    for path in (GOLDEN / case / "hf", GOLDEN / case / "native.safetensors"):
        found = from_shapes({key: tuple(tensor.shape) for key, tensor in read_safetensors(path).items()})
        assert expected.items() <= found.items()


def test_what_is_no_autoencoder(tmp_path: Path) -> None:
    safetensors.torch.save_file({"encoder.conv_in.weight": torch.zeros(2, 3, 3, 3)}, tmp_path / "ae.safetensors")
    with pytest.raises(ConfigError, match="not the convolutions that a Flux autoencoder begins and ends with"):
        ckpt_convert.convert_checkpoint(
            tmp_path / "ae.safetensors", tmp_path / "native", to="native", from_format="hf", family="flux_autoencoder"
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_out_channels": [2, 4, 6]}, r"block_out_channels must be a list of 4 sizes, found \[2, 4, 6\]"),
        ({"block_out_channels": [2, 4, 6, "6"]}, "block_out_channels.3 must be a whole number"),
        ({"layers_per_block": 3}, "layers_per_block must be 2 as in Flux, found 3"),
    ],
)
def test_configs_of_other_autoencoders(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    source = copy("flux_autoencoder/hf", tmp_path)
    edit_json(source / "config.json", **changes)
    with pytest.raises(ConfigError, match=words):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")


def test_the_guidance_of_flux_dev_is_carried(tmp_path: Path) -> None:
    source = copy("flux/hf", tmp_path)
    edit_json(source / "config.json", guidance_embeds=True)
    file = source / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "time_text_embed.guidance_embedder"
    guidance = {
        f"{name}.linear_1.weight": torch.arange(18 * 256).reshape(18, 256).float(),
        f"{name}.linear_1.bias": torch.arange(18).float(),
        f"{name}.linear_2.weight": torch.arange(18 * 18).reshape(18, 18).float(),
        f"{name}.linear_2.bias": torch.arange(18).float(),
    }
    safetensors.torch.save_file({**tensors, **guidance}, file, {"format": "pt"})
    with pytest.raises(LossyConversionError):  # torchtitan's model computes without it
        ckpt_convert.convert_checkpoint(source, tmp_path / "torchtitan", to="torchtitan")
    ckpt_convert.convert_checkpoint(source, tmp_path / "torchtitan", to="torchtitan", allow_loss=True)
    assert carried(source, "torchtitan") == guidance.keys()
    ckpt_convert.convert_checkpoint(tmp_path / "torchtitan", tmp_path / "back", to="hf")
    assert sums(tmp_path / "back") == sums(source)


@pytest.mark.parametrize(
    ("case", "form", "stem"),
    [
        ("flux", "torchtitan", "diffusion_pytorch_model"),
        ("flux_vae", "native", "diffusion_pytorch_model"),
        ("flux_autoencoder", "native", "ae"),
        ("t5", "native", "model"),
    ],
)
def test_files_are_called_as_the_library_calls_them(case: str, form: str, stem: str, tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(GOLDEN / case / "hf", tmp_path / "there", to=form, container="pt", shards=1)
    (weights,) = (tmp_path / "there").glob("*.pt")
    config = GOLDEN / case / "hf" / "config.json"
    for shards, names in ((1, ["{}"]), (2, ["{}-00001-of-00002", "{}-00002-of-00002"])):
        out = tmp_path / str(shards)
        ckpt_convert.convert_checkpoint(weights, out, to="hf", from_format=form, config=config, shards=shards)
        assert sorted(file.stem for file in out.glob("*.safetensors")) == [name.format(stem) for name in names]
        assert (out / f"{stem}.safetensors.index.json").exists() is (shards == 2)
        assert_same(read_safetensors(out), read_safetensors(GOLDEN / case / "hf"))


def test_the_last_norm_has_its_halves_in_the_other_order() -> None:
    hf = read_safetensors(GOLDEN / "flux" / "hf")
    config = json.loads((GOLDEN / "flux" / "hf" / "config.json").read_text())
    made = ckpt_convert.convert_state_dict(hf, config, source="hf", target="torchtitan")
    assert isinstance(made, dict)
    scale, shift = hf["norm_out.linear.bias"].chunk(2)
    assert torch.equal(made["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale]))


def test_the_defaults_are_those_of_transformers() -> None:
    clip, t5 = transformers.CLIPConfig(), transformers.T5Config()
    found = FAMILIES["clip"].dims({"model_type": "clip"})
    assert (found["vocab_size"], found["n_positions"]) == (
        clip.text_config.vocab_size,
        clip.text_config.max_position_embeddings,
    )
    assert [found[name] for name in ("dim", "n_layers", "n_heads", "ffn_dim", "projection_dim")] == [
        clip.text_config.hidden_size,
        clip.text_config.num_hidden_layers,
        clip.text_config.num_attention_heads,
        clip.text_config.intermediate_size,
        clip.projection_dim,
    ]
    assert [found[f"vision_{name}"] for name in ("dim", "ffn_dim")] == [
        clip.vision_config.hidden_size,
        clip.vision_config.intermediate_size,
    ]
    assert found["n_patches"] == (clip.vision_config.image_size // clip.vision_config.patch_size) ** 2 + 1
    found = FAMILIES["t5"].dims({})
    assert [found[name] for name in ("vocab_size", "dim", "head_dim", "ffn_dim", "n_layers", "n_heads")] == [
        t5.vocab_size,
        t5.d_model,
        t5.d_kv,
        t5.d_ff,
        t5.num_layers,
        t5.num_heads,
    ]
    assert found["n_decoder_layers"] == t5.num_decoder_layers
    assert found["gated"] == t5.is_gated_act
    assert found["n_buckets"] == t5.relative_attention_num_buckets


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight"),
        ("clip", "vision_model.encoder.layers.0.mlp.fc2.bias"),
    ],
)
def test_half_a_layer_of_what_is_carried(case: str, key: str, tmp_path: Path) -> None:
    source = copy(f"../whole/{case}", tmp_path)
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    del tensors[key]
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    with pytest.raises(KeyMismatchError, match=key.replace(".", r"\.")):
        ckpt_convert.convert_checkpoint(source, tmp_path / "native", to="native")


def test_an_older_clip_says_its_sizes_twice() -> None:
    said = {"model_type": "clip", "text_config": {"hidden_size": 512}, "text_config_dict": {"hidden_size": 768}}
    assert FAMILIES["clip"].dims(said)["dim"] == transformers.CLIPConfig(**said).text_config.hidden_size == 768


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_every_key_that_transformers_writes_is_known(feed_forward: str, tmp_path: Path) -> None:
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, vocab_size=23, feed_forward_proj=feed_forward)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert check_checkpoint(tmp_path / "t5").findings == ()
    vision = {"hidden_size": 18, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = json.loads((GOLDEN / "clip" / "hf" / "config.json").read_text())
    whole = transformers.CLIPConfig(text_config=text, vision_config={**vision, "image_size": 12, "patch_size": 4})
    transformers.CLIPModel(whole).save_pretrained(tmp_path / "clip")
    assert check_checkpoint(tmp_path / "clip").findings == ()
    transformers.CLIPTextModelWithProjection(whole.text_config).save_pretrained(tmp_path / "projected")
    assert check_checkpoint(tmp_path / "projected").findings == ()
