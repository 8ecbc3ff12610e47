"""The image autoencoder of Flux.

There are two layouts on the Hub. hf of ``flux_autoencoder``: the single file ``ae.safetensors`` as Black Forest Labs
published it, with the keys of their code and without a config, which the converter of diffusers 0.42.1 reads; hf of
``flux_vae``: AutoencoderKL of diffusers 0.42.1 (the ``vae`` folder). native: FluxAutoencoder of torchtune 0.6.1, with
the keys of its converter. The attention's projections are 1×1 convolutions in the first layout, matrices in the others.
The first numbers the decoder's levels from the image to the latent, against the order of execution, the others from the
latent to the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.errors import ConfigError
from ckpt_convert.models.core.builders import layer_norm, linear
from ckpt_convert.models.core.config import CONFIG, optional_int
from ckpt_convert.models.core.table import Family, Key, Row

LEVELS = 4
RESNETS = 2
"""Resnet blocks per level of the encoder; the decoder has one more."""

CHANNELS = [128, 256, 512, 512]
"""FLUX.1's."""


def dims(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes in diffusers' config.json of an AutoencoderKL; defaults are those of FLUX.1.

    Raises ConfigError for other numbers of levels or blocks than Flux has.
    """
    channels = config.get("block_out_channels", CHANNELS)
    if not isinstance(channels, list) or len(channels) != LEVELS:
        raise ConfigError(
            f"{CONFIG}: block_out_channels must be a list of {LEVELS} sizes, found {channels!r}; correct {CONFIG}"
        )
    resnets = optional_int(config, "layers_per_block", CONFIG, RESNETS)
    if resnets != RESNETS:
        raise ConfigError(f"{CONFIG}: layers_per_block must be {RESNETS} as in Flux, found {resnets}; correct {CONFIG}")
    named = {f"block_out_channels.{level}": size for level, size in enumerate(channels)}
    ch = [optional_int(named, name, CONFIG, 0) for name in named]
    return {
        **{f"ch_{level}": size for level, size in enumerate(ch)},
        **{f"widens_{level}": int(ch[level] != ch[level - 1]) for level in range(1, LEVELS)},
        "ch_image": optional_int(config, "in_channels", CONFIG, 3),
        "ch_out": optional_int(config, "out_channels", CONFIG, 3),
        "ch_latent": optional_int(config, "latent_channels", CONFIG, 16),
        "tied": 0,
    }


def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Derive a config, with diffusers' keys and the name of the published class, from the shapes of the tensors.

    ``shapes`` are by key in any of the layouts. Raises ConfigError if they are of no such autoencoder.
    """
    first = shapes.get("encoder.conv_in.weight", ())
    last = next((shapes[key] for key in ("decoder.end.2.weight", "decoder.conv_out.weight") if key in shapes), ())
    latent = shapes.get("decoder.conv_in.weight", ())
    widths = [
        next((shapes[key] for key in _conv2(level) if key in shapes and len(shapes[key]) == 4), (0,))[0]
        for level in range(LEVELS)
    ]
    if not (len(first) == len(last) == len(latent) == 4 and all(widths)):
        raise ConfigError(
            "the weights have not the convolutions that a Flux autoencoder begins and ends with, so its sizes are not "
            "known; check the keys with `ckpt-convert inspect`, or give its config.json with `config=`"
        )
    return {
        "_class_name": "AutoEncoder",
        "block_out_channels": widths,
        "in_channels": first[1],
        "latent_channels": latent[1],
        "layers_per_block": RESNETS,
        "out_channels": last[0],
    }


def _conv2(level: int) -> tuple[str, ...]:
    return tuple(f"{spelling.down(level)}.0.{spelling.conv2}.weight" for spelling in (BFL, DIFFUSERS, NATIVE))


@dataclass(frozen=True)
class Spelling:
    """One layout's key parts; {side} is encoder or decoder, {level} counts from the image on."""

    block: str
    down_part: str
    up_part: str
    resample: tuple[str, str]
    norm1: str
    conv1: str
    norm2: str
    conv2: str
    shortcut: str
    mid: tuple[str, str, str]
    attention: tuple[str, str, str, str, str]
    norm_out: str
    conv_out: str
    from_image: bool

    def down(self, level: int) -> str:
        """The blocks of a level of the encoder."""
        return f"encoder.{self.down_part}.{level}.{self.block}"

    def up_level(self, level: int) -> str:
        return f"decoder.{self.up_part}.{level if self.from_image else LEVELS - 1 - level}"

    def up(self, level: int) -> str:
        """The blocks of a level of the decoder."""
        return f"{self.up_level(level)}.{self.block}"


BFL = Spelling(
    block="block",
    down_part="down",
    up_part="up",
    resample=("downsample.conv", "upsample.conv"),
    norm1="norm1",
    conv1="conv1",
    norm2="norm2",
    conv2="conv2",
    shortcut="nin_shortcut",
    mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
    attention=("norm", "q", "k", "v", "proj_out"),
    norm_out="norm_out",
    conv_out="conv_out",
    from_image=True,
)

DIFFUSERS = Spelling(
    block="resnets",
    down_part="down_blocks",
    up_part="up_blocks",
    resample=("downsamplers.0.conv", "upsamplers.0.conv"),
    norm1="norm1",
    conv1="conv1",
    norm2="norm2",
    conv2="conv2",
    shortcut="conv_shortcut",
    mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    norm_out="conv_norm_out",
    conv_out="conv_out",
    from_image=False,
)

NATIVE = Spelling(
    block="layers",
    down_part="down",
    up_part="up",
    resample=("downsample.conv", "upsample.conv"),
    norm1="main.0",
    conv1="main.2",
    norm2="main.3",
    conv2="main.5",
    shortcut="shortcut",
    mid=("mid.0", "mid.1", "mid.2"),
    attention=("norm", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj"),
    norm_out="end.0",
    conv_out="end.2",
    from_image=False,
)


def _conv(name: str, out: str, in_: str, hf: str, native: str) -> Iterator[Row]:
    yield from linear(name, (out, in_, "3", "3"), bias=True, hf=hf, native=native)


def _resnet(spelling: Spelling, name: str, out: str, in_: str, hf: str, native: str, when: str | None) -> Iterator[Row]:
    """Norm and convolution twice, and a 1×1 convolution shortcut if the width may change (``when``)."""
    yield from layer_norm(f"{name}.norm1", in_, hf=f"{hf}.{spelling.norm1}", native=f"{native}.{NATIVE.norm1}")
    yield from _conv(f"{name}.conv1", out, in_, f"{hf}.{spelling.conv1}", f"{native}.{NATIVE.conv1}")
    yield from layer_norm(f"{name}.norm2", out, hf=f"{hf}.{spelling.norm2}", native=f"{native}.{NATIVE.norm2}")
    yield from _conv(f"{name}.conv2", out, out, f"{hf}.{spelling.conv2}", f"{native}.{NATIVE.conv2}")
    if when is not None:
        yield from linear(
            f"{name}.shortcut",
            (out, in_, "1", "1"),
            bias=True,
            enabled_by=when,
            hf=f"{hf}.{spelling.shortcut}",
            native=f"{native}.{NATIVE.shortcut}",
        )


def _middle(spelling: Spelling, side: str) -> Iterator[Row]:
    top = f"ch_{LEVELS - 1}"
    first, attention, second = spelling.mid
    yield from _resnet(spelling, f"{side}.mid.0", top, top, f"{side}.{first}", f"{side}.{NATIVE.mid[0]}", None)
    here, there = f"{side}.{attention}", f"{side}.{NATIVE.mid[1]}"
    # The matrices of the attention are 1×1 convolutions in BFL's files.
    shape = (top, top, "1", "1") if spelling is BFL else None
    for part, hf, native in zip(("norm", "q", "k", "v", "o"), spelling.attention, NATIVE.attention, strict=True):
        name, module = f"{side}.mid.attention.{part}", f"{there}.{native}"
        if part == "norm":
            yield from layer_norm(name, top, hf=f"{here}.{hf}", native=module)
        else:
            yield from linear(name, (top, top), bias=True, hf=Key(f"{here}.{hf}", shape=shape), native=module)
    yield from _resnet(spelling, f"{side}.mid.1", top, top, f"{side}.{second}", f"{side}.{NATIVE.mid[2]}", None)


def _ends(spelling: Spelling, side: str, width: str, out: str) -> Iterator[Row]:
    hf, native = f"{side}.{spelling.norm_out}", f"{side}.{NATIVE.norm_out}"
    yield from layer_norm(f"{side}.norm_out", width, hf=hf, native=native)
    yield from _conv(f"{side}.conv_out", out, width, f"{side}.{spelling.conv_out}", f"{side}.{NATIVE.conv_out}")


def _rows(spelling: Spelling) -> Iterator[Row]:
    """The table, with one of the layouts as hf; the rows of the decoder's levels are numbered from the image on."""
    yield from _conv("encoder.conv_in", "ch_0", "ch_image", "encoder.conv_in", "encoder.conv_in")
    for level in range(LEVELS):
        out = f"ch_{level}"
        for at in range(RESNETS):
            in_, widens = (f"ch_{level - 1}", f"widens_{level}") if at == 0 and level > 0 else (out, None)
            hf, native = f"{spelling.down(level)}.{at}", f"{NATIVE.down(level)}.{at}"
            yield from _resnet(spelling, f"encoder.{level}.{at}", out, in_, hf, native, widens)
        if level < LEVELS - 1:
            hf, native = (f"encoder.{one.down_part}.{level}.{one.resample[0]}" for one in (spelling, NATIVE))
            yield from _conv(f"encoder.{level}.downsample", out, out, hf, native)
    yield from _middle(spelling, "encoder")
    yield from _ends(spelling, "encoder", f"ch_{LEVELS - 1}", "2*ch_latent")

    yield from _conv("decoder.conv_in", f"ch_{LEVELS - 1}", "ch_latent", "decoder.conv_in", "decoder.conv_in")
    yield from _middle(spelling, "decoder")
    for level in reversed(range(LEVELS)):
        out = f"ch_{level}"
        for at in range(RESNETS + 1):
            top = level == LEVELS - 1
            in_, widens = (f"ch_{level + 1}", f"widens_{level + 1}") if at == 0 and not top else (out, None)
            hf, native = f"{spelling.up(level)}.{at}", f"{NATIVE.up(level)}.{at}"
            yield from _resnet(spelling, f"decoder.{level}.{at}", out, in_, hf, native, widens)
        if level > 0:
            hf, native = (f"{one.up_level(level)}.{one.resample[1]}" for one in (spelling, NATIVE))
            yield from _conv(f"decoder.{level}.upsample", out, out, hf, native)
    yield from _ends(spelling, "decoder", "ch_0", "ch_out")


FLUX_AUTOENCODER = Family(
    name="flux_autoencoder",
    title="Flux's image autoencoder (ae.safetensors)",
    model_types=("AutoEncoder", "AutoencoderKL"),
    rows=tuple(_rows(BFL)),
    dims=dims,
    indices={},
    from_shapes=from_shapes,
    stem="ae",
)

FLUX_VAE = FLUX_AUTOENCODER.replace(
    name="flux_vae",
    title="Flux's image autoencoder as diffusers' vae",
    model_types=("AutoencoderKL",),
    stem="diffusion_pytorch_model",
    rows=tuple(_rows(DIFFUSERS)),
    from_shapes=None,  # diffusers' files always come with a config
)
