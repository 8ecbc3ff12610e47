"""Config and tokenizer files of an output, copied byte for byte or translated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.conventions import QUANTIZATION_CONFIGS
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.model import Model, naming
from ckpt_convert.convert import auxiliary_files
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.request import Request
from ckpt_convert.dtypes import DTYPES, majority_float_dtype, torch_name
from ckpt_convert.errors import ConfigError, ShapeMismatchError, UnsupportedFamilyError, option_error
from ckpt_convert.formats.base import JSON_LIMIT, load_json, render_json
from ckpt_convert.formats.names import RECORD_FOLDER, has_tokenizer
from ckpt_convert.models.core.config import Translated, type_of
from ckpt_convert.models.core.rope import read_rope
from ckpt_convert.storage.place import Place
from ckpt_convert.tokenizer.spec import TiktokenSpec
from ckpt_convert.wording import option_text

if TYPE_CHECKING:
    from ckpt_convert.tokenizer.translation import GeneratedTokenizer


@dataclass(frozen=True)
class ConfigFiles:
    """The config files to write, and notices about them."""

    files: tuple[AuxiliaryFile, ...]
    notices: tuple[str, ...] = ()


def choose_configs(
    source: Identified,
    model: Model,
    request: Request,
    like: Identified | None,
    written: str | None = None,
    ranks: int = 1,
    cut: int | None = None,
) -> ConfigFiles:
    """The target's config, and config.json for the record; raises ConfigError for what the target cannot express.

    ``written`` is torch's name of the dtype of most weights in the output; ``ranks`` is the number of ranks that
    params.json is for, which split the embedding on the axis ``cut`` where there is a choice.
    """
    if source.verbatim is not None:
        own = source.config_file if source.place.is_folder() else None
        there = own is not None and own.is_regular_file()
        return ConfigFiles((auxiliary_files.file_from("config.json", "copied", own),) if own and there else ())
    config, origin = _config(source, model, request, like, written)
    files = [AuxiliaryFile.of(record.CONFIG, origin, config)]
    notices: tuple[str, ...] = _token_notice(model) if source.format == "meta" and origin == "generated" else ()
    if request.to == "hf" and not _shown_by_shapes(source, model):
        files.append(AuxiliaryFile.of("config.json", origin, config))
    if request.to == "meta":
        params, origin, notices = _params(source, model, request, like, ranks, cut)
        files.append(AuxiliaryFile.of("params.json", origin, params))
    elif source.params is not None and _is_params(source.params[1]):
        name = f"{RECORD_FOLDER}/layouts/meta/params.json"
        files.append(auxiliary_files.file_from(name, "carried", source.params[0]))
    return ConfigFiles(tuple(files), notices)


def _shown_by_shapes(source: Identified, model: Model) -> bool:
    """Whether the config adds nothing to the shapes, of a family whose files come without one."""
    from_shapes = model.family.from_shapes
    if from_shapes is None or not source.files:
        return False
    said = {key: value for key, value in model.config.items() if key not in ("dtype", "torch_dtype")}
    return said == from_shapes({key: found.shape for key, found in source.ranks[0].items()})


def _token_notice(model: Model) -> tuple[str, ...]:
    text = model.config.get("text_config", {})  # of a model with vision
    ids = {name: {**text, **model.config}.get(f"{name}_token_id") for name in ("bos", "eos")}
    return (
        f"params.json does not have token ids: took {ids['bos']} as bos and {ids['eos']} as eos, as in base models; "
        "for an instruct model, put its own eos_token_id into config.json and generation_config.json",
    )


def translated_tokenizer(
    source: Identified, request: Request, model: Model, like: Identified | None
) -> dict[str, AuxiliaryFile]:
    """Tokenizer files that loaders of the target need and the source has in another form.

    They are translated when they are written, which takes seconds.
    """
    here = {**auxiliary_files.find_nearby_tokenizer(source), **auxiliary_files.find_auxiliary(source)}
    restored = source.record.passthrough_files if source.record else {}
    if like is not None and has_tokenizer(auxiliary_files.find_auxiliary(like)):
        return {}
    if request.to == source.format or request.to == "native":
        return {}
    model_file = next((name for name in sorted(here) if name.startswith("tokenizer.model")), None)  # or Mistral's .v3
    if request.to == "hf" and model_file is not None:
        names: tuple[str, ...] = ("tokenizer.json", "tokenizer_config.json")
        names = tuple(name for name in names if name not in here and name not in restored)
        if "tokenizer.json" not in names:
            return {}
        path = here[model_file]
    elif request.to == "meta" and "tokenizer.json" in here and "tokenizer.model" not in {**here, **restored}:
        names = ("tokenizer.model",)
        path = here["tokenizer.json"]
    else:
        return {}

    rows = model.family.tokens(model.dims) if request.to == "hf" else None
    made = TranslatedTokenizer(path, request.to, model.family.tiktoken, rows)
    return {name: AuxiliaryFile(name, "generated", generated=made) for name in names}


@dataclass(frozen=True)
class TranslatedTokenizer:
    """The target's tokenizer files for the tokenizer at ``place``; ``rows`` are the rows of the embedding."""

    place: Place
    target: str
    spec: TiktokenSpec
    rows: int | None

    @cached_property
    def _made(self) -> GeneratedTokenizer:
        from ckpt_convert.tokenizer import translation as tokenizer

        data = self.place.read(JSON_LIMIT)
        if self.target == "hf":
            return tokenizer.generated_for_hf(self.spec, data, self.rows)
        return tokenizer.generated_for_meta(self.spec, {self.place.name: data})

    @property
    def files(self) -> Mapping[str, bytes]:
        return self._made.files

    @property
    def notices(self) -> tuple[str, ...]:
        return self._made.notices


def tokenizer_notice(source: Identified, request: Request, model: Model, names: Iterable[str]) -> tuple[str, ...]:
    """A notice for an output in another format without a tokenizer; ``names`` are its auxiliary files.

    Within a format a missing tokenizer is not reported.
    """
    needs = request.to in ("hf", "meta") and request.to != source.format and "vocab_size" in model.dims
    if not needs or has_tokenizer(names):
        return ()
    return (
        f"the output has no tokenizer, since {source.place} has none; take one from another checkpoint of the model "
        "with `like=DIR`, or copy its files there",
    )


def _config(
    source: Identified, model: Model, request: Request, like: Identified | None, written: str | None
) -> tuple[bytes, str]:
    """The bytes of config.json, and whether they were copied, restored or generated."""
    content: Mapping[str, Any]
    verbatim: bytes | None
    if like is not None and request.to == "hf":
        content, verbatim = load_json(like.root / "config.json"), (like.root / "config.json").read(JSON_LIMIT)
        origin = "copied"
    else:
        content, verbatim = model.config, _verbatim_config(source, model)
        origin = "copied" if source.format == "hf" else "restored"
    if verbatim is not None and _stands(content, source, request, like, written):
        return verbatim, origin
    if verbatim is None and source.format != "hf":
        content = dict(sorted(content.items()))
    return _with_dtype(content, written or DTYPES[source.opened.majority_dtype].torch), "generated"


def _stands(
    config: Mapping[str, Any], source: Identified, request: Request, like: Identified | None, written: str | None
) -> bool:
    """Whether the config's dtype may stay: it is that of the output, or the source's own config and dtype are kept.

    A wrong dtype in the source's own config is not corrected; one in another config (``config``, ``like``) is.
    """
    said = config.get("dtype", config.get("torch_dtype"))
    if source.quantization is not None:
        return True  # for codes, the config's dtype is that of the computation
    if written is None or torch_name(said) == written:
        return True
    if request.dtype is not None or not source.files or source.dequantized is not None:
        return False
    if said is None:
        return True
    own = like is None and source.hints.config is None
    return own and written == majority_float_dtype((tensor.dtype, tensor.nbytes) for _, tensor in source.stored)


def _with_dtype(config: Mapping[str, Any], dtype: str) -> bytes:
    """config.json with this dtype, under its own key for it (transformers 4 and 5 differ), else under both keys.

    The same in sub-configs (text_config) that state a dtype.
    """
    content = _saying(config, dtype)
    if not any(key in content for key in _DTYPE_KEYS):
        content |= dict.fromkeys(_DTYPE_KEYS, dtype)
    return render_json(content)


_DTYPE_KEYS = ("dtype", "torch_dtype")


def _saying(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        key: dtype if key in _DTYPE_KEYS else _saying(value, dtype) if _is_part(key, value) else value
        for key, value in config.items()
    }


def _is_part(key: str, value: object) -> bool:
    return key.endswith("_config") and key not in QUANTIZATION_CONFIGS and isinstance(value, Mapping)


def _verbatim_config(source: Identified, model: Model) -> bytes | None:
    """The bytes of the config.json that describes the model, None when it was translated from params.json."""
    own = "config.json" if source.format == "hf" else record.CONFIG
    for path in (source.hints.config, source.root / own):
        if path is not None and path.is_regular_file() and load_json(path) == model.config:
            return path.read(JSON_LIMIT)
    return None


def _params(
    source: Identified, model: Model, request: Request, like: Identified | None, ranks: int, cut: int | None
) -> tuple[bytes, str, tuple[str, ...]]:
    """params.json for this number of ranks, its origin, and notices."""
    if like is not None and like.params is not None:
        return like.params[0].read(JSON_LIMIT), "copied", ()
    data, origin, notices = _params_of_model(source, model, request, cut)
    content = json.loads(data)
    params = model.family.params
    adapted = params.for_ranks(content, model.dims, ranks) if params is not None else Translated(content)
    if adapted.content == content:
        return data, origin, notices
    return _render_params(adapted.content), "generated", (*notices, *adapted.notices)


def _params_of_model(
    source: Identified, model: Model, request: Request, cut: int | None
) -> tuple[bytes, str, tuple[str, ...]]:
    asked = request.config.meta_style is not None or request.config.drop_rope_scaling
    recorded = recorded_params(source)
    if recorded is not None and not asked:
        return recorded, "copied" if source.format == "meta" else "restored", ()
    if model.family.params is None:
        raise UnsupportedFamilyError(f"{source.place}: family {model.family.name} has no params.json")
    with naming(str(source.root / "config.json")):
        styles = model.family.params.styles
        options = request.config if styles is None or cut is None else styles.options_for(request.config, cut)
        translated = model.family.params.from_hf(model.config, options)
    beside = " (not needed as long as the folder ckpt_convert is beside it)"
    notices = tuple(text + beside if "to convert back" in text else text for text in translated.notices)
    return _render_params(translated.content), "generated", notices


def recorded_params(source: Identified) -> bytes | None:
    """The original params.json, as long as the config that was made from it is unchanged."""
    if source.format == "meta":
        is_own = source.params is not None and _is_params(source.params[1])
        return source.params[0].read(JSON_LIMIT) if source.params and is_own else None
    if source.record is None or source.hints.config is not None:
        return None
    path = source.record.meta_file("params.json")
    config = "config.json" if source.format == "hf" else record.CONFIG
    if path is None or not source.record.unchanged(config):
        return None
    return path.read(JSON_LIMIT)


def _is_params(content: Mapping[str, Any]) -> bool:
    """Whether this is a params.json, and not a config.json that was passed instead of one."""
    return type_of(content) is None


def _render_params(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def check_like(source: Identified, model: Model, like: Identified) -> list[str]:
    """Refuse a ``like`` of another family or other sizes; returns notices where its config differs."""
    try:
        theirs = like.model_for(str(like.format))
    except ConfigError:
        return []  # native files without a record: only names and assignment are used, which the keys have to fit
    if theirs.family.name != model.family.name:
        raise option_error(
            "like", like.place, f"is a {theirs.family.name}, but {source.place} is a {model.family.name}"
        )
    if theirs.family.literal:
        return []  # the keys have to fit, too; nothing else of such a model is known
    sizes = [
        f"{name}: expected {value}, found {theirs.dims.get(name)}"
        for name, value in model.dims.items()
        if name not in model.dims.decided_by_weights and theirs.dims.get(name) != value
    ]
    if sizes:
        raise ShapeMismatchError(
            f"{option_text('like', like.place)}: has other sizes than {source.place}: {'; '.join(sizes)}; "
            "give a checkpoint of the same model"
        )
    rope, other_rope = read_rope(model.config), read_rope(theirs.config)
    pairs = {
        "rope theta": (rope.theta, other_rope.theta),
        "rope scaling": ((rope.kind, rope.parameters), (other_rope.kind, other_rope.parameters)),
        **{name: (model.config.get(name), theirs.config.get(name)) for name in _COMPARED},
    }
    taken = f"{option_text('like', like.place)}: its config is taken, which says"
    return [
        f"{taken} {name} {other}, where {source.place} says {mine}"
        for name, (mine, other) in pairs.items()
        if mine != other
    ]


_COMPARED = ("rms_norm_eps", "hidden_act", "sliding_window", "max_position_embeddings")
"""Settings that change the model's results beside the sizes and RoPE."""
