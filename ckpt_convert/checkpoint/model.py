"""Determining the model of some weights: family, config with Hugging Face's keys, and the table's dimensions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckpt_convert.checkpoint import diagnosis, legacy_keys
from ckpt_convert.checkpoint.hints import ConfigFile, Hints
from ckpt_convert.checkpoint.keys import Keys
from ckpt_convert.checkpoint.legacy_keys import KeyNames
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.record import Record
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.errors import ConfigError, KeyMismatchError, UnsupportedFamilyError
from ckpt_convert.formats.base import load_json
from ckpt_convert.models import FAMILIES, Family
from ckpt_convert.models.core.config import AXES, ConfigOptions, type_of
from ckpt_convert.models.core.params import Weights
from ckpt_convert.models.core.rows import recorded_embedding_axis
from ckpt_convert.models.core.table import Dims
from ckpt_convert.values import frozen
from ckpt_convert.wording import option_text

Ranks = Sequence[Mapping[str, SourceTensor]]


@frozen()
class Model:
    """The model of some weights: family, evidence for it, config with Hugging Face's keys, and its dimensions.

    ``tied`` is None where only the bytes decide whether output and embedding are tied.
    """

    family: Family
    evidence: str
    config: Mapping[str, Any]
    dims: Dims
    tied: bool | None
    notices: tuple[str, ...] = ()

    def with_tied(self, tied: bool) -> Model:
        """The same model once it is known whether its output is tied."""
        config = {**self.config, "tie_word_embeddings": tied}
        return replace(self, config=config, dims=self.dims.replace(tied=int(tied)), tied=tied)

    @property
    def release(self) -> str | None:
        """The name of the known release that has these sizes."""
        return self.family.params.release(self.config) if self.family.params else None


@frozen()
class Recorded:
    """What the record of an earlier conversion states about a checkpoint."""

    tied: bool | None = None
    cut: int | None = None
    config: Mapping[str, Any] | None = None
    family: str | None = None


def model_of(keys: Keys, stated: ConfigFile, hints: Hints, record: Record | None = None) -> Model:
    """The model that a checkpoint's config describes.

    Raises what ``model_from`` does, and ConfigError where there is no config or it cannot be read.
    """
    opened, where = keys.opened, str(stated.file)
    content = _config(keys, stated, hints)
    if not content:
        raise ConfigError(
            f"{where}: is empty ({{}}), so it does not describe the model; put the model's own back, or pass another "
            "with `config=`"
        )
    before = str(record.manifest.get("family")) if record is not None else None
    if type_of(content) is not None:
        # First, since describing the tensors of a large model takes a while, in vain if the family is unknown.
        names = (keys.names.of(key) for key in opened.keys)
        family, _ = by_model_type(content, where, hints.family, str(opened.format), names, before)
        if hints.family is None:
            _refuse_other_head(keys, family, content, where)
    model = model_from(
        content,
        where,
        str(opened.format),
        keys.ranks,
        hints.options,
        family=hints.family,
        recorded=_recorded(opened, stated, hints, record),
    )
    return model if stated.file.is_regular_file() or hints.family else replace(model, evidence="its keys")


def _refuse_other_head(keys: Keys, family: Family, config: Mapping[str, Any], config_name: str) -> None:
    """Raise UnsupportedFamilyError for a classifier or other head of a family whose table has its language model.

    Both architectures in the config and the keys have to show it: configs often name a class that does not fit the
    weights.
    """
    if keys.opened.format != "hf" or _is_language_model(config):
        return
    why = _other_head(family, config, [keys.names.of(key) for key in keys.opened.keys if keys.is_weight(key)])
    if why is not None:
        raise UnsupportedFamilyError(
            f"{config_name}: {why}, which is what its table describes; if it is one all the same, pass `family=`"
        )


def _other_head(family: Family, config: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Why a model is not the family's language model, where config and keys (in Hugging Face's format) both show it."""
    if _is_language_model(config):
        return None
    names = _architectures(config)
    other = next((key for key in keys if not family.has_key("hf", key)), None)
    if other is not None and "lm_head.weight" not in keys:
        return f"architectures is {names[0]!r}, and {other!r} is no key of {family.name}'s language model"
    output = next((row.hf.template for row in family.rows if row.name == "output" and row.hf is not None), None)
    if names[0].endswith("Model") and output is not None and output not in keys and not _is_tied(family, config):
        return f"architectures is {names[0]!r}, and there is no {output}, so it is not {family.name}'s language model"
    return None


def _is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether the config names a language model class, or no class at all."""
    names = _architectures(config)
    return not names or any("CausalLM" in name or "LMHead" in name for name in names)


def _is_tied(family: Family, config: Mapping[str, Any]) -> bool:
    try:
        return bool(family.config_dims(config)["tied"])
    except ConfigError:
        return True


def names_of(
    tensors: Sequence[tuple[str, Sequence[int]]],
    listed: Iterable[str],
    config: Mapping[str, Any],
    format: str,
    requested: str | None,
) -> KeyNames:
    """The format's names of stored keys with these shapes, as far as config or keys determine the family.

    ``listed`` are the keys in an index, including those of files that cannot be opened; ``requested`` is the requested
    family. Keys of a model without a table stay as stored.
    """
    stored = [*(key for key, _ in tensors), *listed]
    likely = FAMILIES.of_params(config) if type_of(config) is None and requested is None else []
    if any(legacy_keys.knows_all(stored, family, format) for family in likely):
        return legacy_keys.PLAIN  # before the tables of all the others are imported
    families = candidates(config, format, requested, stored)
    scalars = legacy_keys.loose_scalars(tensors)
    names = legacy_keys.read_keys(stored, families, format, scalars)
    if names.is_identity or requested is not None or type_of(config) is None or format != "hf":
        return names
    keys = [names.of(key) for key in stored if key not in names.non_weights]
    heads = [_other_head(family, config, keys) for family in families]
    return legacy_keys.PLAIN if None not in heads else names


def is_bare(names: KeyNames, config: Mapping[str, Any], format: str | None, requested: str | None) -> bool:
    """Whether transformers saved the base model without its head class, so that keys lack the prefix ``model.``.

    The base model class only loads these keys.
    """
    if format != "hf" or requested is not None or _is_language_model(config) or names.non_weights:
        return False
    shortened = bool(names.canonical) and all(name == f"model.{key}" for key, name in names.canonical.items())
    return shortened and _architectures(config)[0].endswith("Model")


def candidates(config: Mapping[str, Any], format: str, requested: str | None, keys: Iterable[str]) -> list[Family]:
    """The candidate families with this format: the one ``requested``, those of the config's model_type, or all.

    Families from other packages are left out where a built-in one has all of the ``keys``.
    """
    if requested is not None:
        return [FAMILIES[requested]] if requested in FAMILIES and format in FAMILIES[requested].formats else []
    model_type = type_of(config)
    if model_type is not None:
        return [f for f in FAMILIES.of_type(model_type, _architectures(config)) if format in f.formats]
    built_in = [family for family in FAMILIES.built_in if format in family.formats]
    return [*built_in, *_outside(keys, format)]


def _outside(keys: Iterable[str], format: str) -> list[Family]:
    """The families from outside with this format that keys without a config may be of: none where a built-in one fits.

    No package is imported for a checkpoint that does not need it, and none makes such a checkpoint ambiguous.
    """
    if any(legacy_keys.knows_all(keys, family, format) for family in FAMILIES.built_in):
        return []
    return [family for family in FAMILIES.outside.values() if format in family.formats]


def _config(keys: Keys, stated: ConfigFile, hints: Hints) -> Mapping[str, Any]:
    content = stated.content if stated.content is not None else from_shapes(keys, hints.family)
    if content is None:
        path, root = keys.opened.place, keys.opened.root
        name, above = stated.file.relative_name(root), diagnosis.parent_config(path)
        way = "`config=` with its config.json or params.json"
        if above is not None:
            way = f"{option_text('config', above)}, the run's config"
        raise ConfigError(f"{path}: has no {name}, so the model's sizes are not known; pass {way}")
    return content


def from_shapes(keys: Keys, requested: str | None) -> dict[str, Any] | None:
    """The config derived from tensor shapes, of a family whose files come without one.

    The family is the requested one, else the only one of these that knows every key.
    """
    opened = keys.opened
    if requested is not None:
        fits = [FAMILIES[requested]] if requested in FAMILIES else []
    else:
        format, stored = str(opened.format), opened.keys
        likely = [*(f for f in FAMILIES.with_shapes if format in f.formats), *_outside(stored, format)]
        fits = [f for f in likely if f.from_shapes is not None and all(f.has_key(format, key) for key in stored)]
    if len(fits) != 1 or fits[0].from_shapes is None or len(keys.ranks) != 1:
        return None
    with naming(str(opened.place)):
        return fits[0].from_shapes({key: source.shape for key, source in keys.ranks[0].items()})


def _recorded(opened: OpenedFiles, stated: ConfigFile, hints: Hints, record: Record | None) -> Recorded:
    """What the record states; its config counts only while the params.json made from it is unchanged."""
    if record is None:
        return Recorded()
    cut = recorded_embedding_axis(record.manifest.get("dims", {}))
    options = hints.options
    asked = options.rope_factor or options.rope_theta or options.max_positions or hints.config
    counts = opened.format == "meta" and not asked and record.unchanged(stated.file.name)
    path = record.config if counts else None
    config = load_json(path) if path is not None else None
    return Recorded(record.tied, cut, config, str(record.manifest.get("family")))


def model_from(
    content: Mapping[str, Any],
    config_name: str,
    format: str,
    ranks: Ranks,
    options: ConfigOptions,
    *,
    family: str | None = None,
    recorded: Recorded | None = None,
) -> Model:
    """The model that the content of a config.json or params.json describes; ``config_name`` names the file in messages.

    ``ranks`` are the stored tensors, whose shapes give what params.json does not state; ``family`` overrides detection.
    Raises UnsupportedFamilyError, ConfigError, or KeyMismatchError for weights without an embedding.
    """
    with naming(config_name):
        return _model_from(content, config_name, format, ranks, options, family, recorded or Recorded())


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Add the path of the file to a ConfigError of a family's translation, which only knows the file's name."""
    try:
        yield
    except ConfigError as error:
        name, colon, rest = str(error).partition(": ")
        if not colon or not path.endswith(name) or path == name:
            raise
        raise ConfigError(f"{path}: {rest}") from error


def _model_from(
    content: Mapping[str, Any],
    config_name: str,
    format: str,
    ranks: Ranks,
    options: ConfigOptions,
    family: str | None,
    recorded: Recorded,
) -> Model:
    if type_of(content) is not None:
        found, evidence = by_model_type(content, config_name, family, format, ranks[0], recorded.family)
        return _described(found, evidence, content, format, ranks, options, recorded)
    found, evidence = _by_params(content, config_name, family)
    if recorded.config is not None:
        return _described(found, evidence, recorded.config, format, ranks, options, recorded)
    tied = recorded.tied
    if tied is None and _first_part(found, "output", format, ranks) is None:
        tied = True
    if found.params is None:
        raise UnsupportedFamilyError(f"{config_name}: family {found.name} has no params.json")
    sizes = _sizes(found, config_name, format, ranks)
    shapes = {key: source.shape for key, source in ranks[0].items()}
    translated = found.params.to_hf(content, Weights(**sizes, tied=tied is not False, shapes=shapes), options)
    said = found.params.styles.of_params(content) if found.params.styles is not None else None
    if said is not None:
        recorded = replace(recorded, cut=AXES[said[0]])
    model = _described(found, evidence, translated.content, format, ranks, options, recorded)
    return replace(model, tied=tied, notices=translated.notices)


def _described(
    family: Family,
    evidence: str,
    config: Mapping[str, Any],
    format: str,
    ranks: Ranks,
    options: ConfigOptions,
    recorded: Recorded,
) -> Model:
    dims = family.config_dims(config)
    keys = max(map(len, ranks))
    for symbol in family.indices.values():
        if dims[symbol] > max(keys, 4096):
            raise ConfigError(f"config.json: {symbol} is {dims[symbol]}, but the files hold only {keys} tensors")
    cut = _cut(family, config, format, ranks, options, recorded)
    return Model(family, evidence, config, dims.with_embedding_axis(cut), bool(dims["tied"]))


def by_model_type(
    config: Mapping[str, Any],
    config_name: str,
    requested: str | None,
    format: str,
    keys: Iterable[str],
    recorded_family: str | None = None,
) -> tuple[Family, str]:
    """The family that a config.json names, and the evidence; raises UnsupportedFamilyError for an unknown one.

    Of several families with the model_type it is the one that knows most of the ``keys`` in ``format``; of equals, the
    family recorded ``recorded_family``, else one whose class the config names.
    """
    if requested is not None:
        return FAMILIES[requested], "as asked for"
    model_type = type_of(config)
    found = FAMILIES.of_type(model_type, _architectures(config))
    if len(found) > 1:
        keys = list(keys)
        found.sort(
            key=lambda family: (
                sum(not family.has_key(format, key) for key in keys),
                family.name != recorded_family,
                not family.architectures,
            )
        )
    name = "model_type" if "model_type" in config else "_class_name"
    if found:
        return found[0], f"{name} {model_type!r}"
    raise UnsupportedFamilyError(
        f"{config_name}: {name} {model_type!r} is no known family (`ckpt-convert formats` lists them); if it has the "
        "keys and RoPE layout of one of them, say so with `family=`"
    )


def _architectures(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names."""
    stated = config.get("architectures")
    return [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []


def _by_params(params: Mapping[str, Any], config_name: str, requested: str | None) -> tuple[Family, str]:
    if requested is not None:
        return FAMILIES[requested], "as asked for"
    fits = [
        (family, evidence)
        for family in FAMILIES.of_params(params)
        if family.params is not None and (evidence := family.params.evidence(params))
    ]
    if len(fits) == 1:
        return fits[0]
    found = ", ".join(sorted(map(str, params))[:12])
    names = ", ".join(FAMILIES.with_params)
    raise UnsupportedFamilyError(
        f"{config_name}: fits {'more than one' if fits else 'no'} family (it has: {found}); say which with `family=` "
        f"({names})"
    )


def _first_part(family: Family, row: str, format: str, ranks: Ranks) -> tuple[int, ...] | None:
    """The shape of a row's tensor on rank 0 (the first of a list), None where it is fused, missing or no matrix."""
    column = next((r.column(format) for r in family.rows if r.name == row), None)
    if column is None or column.fused is not None:
        return None
    parts = column.template.split(".")
    source = ranks[0].get(".".join("0" if part.startswith("{") else part for part in parts))
    return source.shape if source is not None and len(source.shape) == 2 else None


def _sizes(family: Family, config_name: str, format: str, ranks: Ranks) -> dict[str, int]:
    """The sizes that params.json leaves to the shapes: the vocabulary and the width of the feed-forward layers."""
    output = _first_part(family, "output", format, ranks)
    embedding = _first_part(family, "tok_embeddings", format, ranks)
    gate = _first_part(family, "ffn.gate", format, ranks)
    sizes = {}
    if output is not None:
        sizes["vocab_size"] = output[0] * len(ranks)
    elif embedding is not None:
        sizes["vocab_size"] = embedding[0]
    else:
        raise KeyMismatchError(
            f"{config_name}: the weights have neither an embedding nor an output in the {format} format, so they are "
            "not a whole checkpoint of that format; check the keys with `ckpt-convert inspect`"
        )
    if gate is not None:
        sizes["ffn_dim"] = gate[0] * len(ranks)
    return sizes


def _cut(
    family: Family,
    config: Mapping[str, Any],
    format: str,
    ranks: Ranks,
    options: ConfigOptions,
    recorded: Recorded,
) -> int:
    """The axis on which ranks split the embedding: from the shapes, else as recorded, else as released."""
    if family.params is None or not family.has_two_embedding_splits:
        return 0
    embedding = _first_part(family, "tok_embeddings", format, ranks)
    if len(ranks) > 1 and embedding is not None:
        return 0 if embedding[1] == config.get("hidden_size") else 1
    if recorded.cut is not None:
        return recorded.cut
    return AXES[family.params.styles.of_config(config, options)] if family.params.styles is not None else 0
