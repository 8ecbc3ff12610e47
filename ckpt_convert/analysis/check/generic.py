"""Config against headers for families without a table: what nearly every transformer has in common.

Keys number layers and experts, ``vocab_size`` is the rows of the embedding, ``hidden_size`` the width of the norms.
What is not certain for every architecture is a warning, or not reported, unless the family is known to be built like
Llama. ``tests/reliability/test_verdicts_sweep.py`` runs these checks on every model of transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.checkpoint.conventions import EMBEDDINGS, SIZES, setting_name, size_of, text_config
from ckpt_convert.checkpoint.findings import Finding, Severity
from ckpt_convert.checkpoint.quantized.schemes import FP8
from ckpt_convert.dtypes import CASTABLE
from ckpt_convert.models.registry import UNLISTED
from ckpt_convert.wording import first_few

_NUMBER = re.compile(r"(?:(?<=\.)|\A)(0|[1-9][0-9]{0,5})(?=\.)")
_LISTS = ("layers", "layer", "h", "blocks", "block", "experts")
_OTHER_PARTS = ("vis", "image", "audio", "speech", "mtp", "draft", "encoder", "projector", "code_predictor")
_DECODER = ("num_decoder_layers", "decoder_layers")
"""The number of decoder layers in configs of encoder-decoder models."""

_TRUNKS = frozenset(("model", "transformer", "gpt_neox", "backbone", "decoder", "language_model", "text_model"))
"""The modules above the stack of layers that a config counts; a stack below other modules is another model's."""

_SPARE_ROWS = 64
"""An embedding may have this many more rows than the vocabulary: added tokens, or padding to a round number."""

_WEIGHTS = (*CASTABLE, *FP8.dtypes)
_NORMS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "model.norm.weight",
    "ln_1.weight",
    "ln_f.weight",
)
_FEW = 4
"""A part that at most one layer in this many lacks is missing; otherwise the model may be built so."""


@dataclass(frozen=True, slots=True)
class StoredShape:
    """A stored tensor: shape (None if only its key is known, as its file cannot be opened) and dtype."""

    shape: tuple[int, ...] | None
    dtype: str


Lists = Mapping[str, Mapping[int, frozenset[str]]]
"""Prefix of a numbered part of keys, with the dot → number → the rests of the keys (numbers of experts as *)."""


def check_layers(keys: Iterable[str], config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Missing layers and experts, and parts that a layer or expert lacks although others have them."""
    found = _lists(keys)
    experts = {prefix: numbers for prefix, numbers in found.items() if _name(prefix) == "experts"}
    layers = {prefix: numbers for prefix, numbers in found.items() if prefix not in experts}
    for prefix, numbers in layers.items():
        yield from _gaps(prefix, numbers)
        yield from _holes(prefix, numbers)
    if config is not None:
        yield from _layer_count(layers, text_config(config))
    yield from _experts(experts, text_config(config or {}))


def check_shapes(tensors: Mapping[str, StoredShape], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Sizes in the config against the shapes; ``tensors`` by key."""
    text = text_config(config)
    own = {
        key: tensor.shape
        for key, tensor in tensors.items()
        if tensor.shape and tensor.dtype in _WEIGHTS and not _is_other(key)
    }
    likely: Severity = "error" if has_standard_keys(config) else "warning"
    hidden = size_of(text, *SIZES["dim"])
    vocab = size_of(text, "vocab_size")
    embeddings = [key for key in own if key.endswith(EMBEDDINGS) and len(own[key]) == 2]
    rows = [*embeddings, *(key for key in own if key == "lm_head.weight" and len(own[key]) == 2)]
    further = [key for key in rows if 0 < own[key][0] - (vocab or 0) <= _SPARE_ROWS and likely != "error"]
    yield from _differ("error", "vocab_size", vocab, [(key, own[key], 0) for key in rows if key not in further])
    yield from _differ("note", "vocab_size", vocab, [(key, own[key], 0) for key in further])
    norms = [(key, own[key], 0) for key in own if key.endswith(_NORMS) and len(own[key]) == 1]
    widths = {*(shape[0] for _, shape, _ in norms), *(own[key][1] for key in embeddings)}
    if likely == "error" or len(widths) == 1:  # else some norms are wider by design
        yield from _differ("error", setting_name(text, "dim"), hidden, norms)
    yield from _blocks(own, text, hidden, likely)
    experts = size_of(text, *SIZES["n_experts"])
    fused = [(k, s, 0) for k, s in own.items() if re.search(r"\.experts\.[a-z_]+(\.weight)?\Z", k) and len(s) > 2]
    yield from _differ("error", setting_name(text, "n_experts"), experts, fused)


def check_tied(
    tensors: Mapping[str, StoredShape], config: Mapping[str, Any]
) -> tuple[list[Finding], tuple[str, str] | None]:
    """A missing output layer as a finding, and the keys of two tensors that the config ties."""
    said = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    embedding = min((key for key in tensors if key.endswith(EMBEDDINGS) and not _is_other(key)), key=len, default=None)
    output = next((key for key in tensors if key == "lm_head.weight" or key.endswith(".lm_head.weight")), None)
    architectures = config.get("architectures")
    predicts = isinstance(architectures, list) and any("CausalLM" in str(name) for name in architectures)
    if said is False and predicts and output is None and embedding is not None and not _projects(tensors, embedding):
        text = (
            "lm_head.weight is missing, but tie_word_embeddings is false in config.json; set it to true if the output "
            "is the embedding, or find the shard that holds it"
        )
        return [Finding("error", "tied", text, None, "lm_head.weight")], None
    if said is not True or output is None or embedding is None:
        return [], None
    ours, theirs = tensors[embedding], tensors[output]
    return [], (embedding, output) if ours == theirs and ours.shape is not None else None


def has_standard_keys(config: Mapping[str, Any]) -> bool:
    """Whether the model is known to be built like Llama, so that a mismatch is an error."""
    return str(config.get("model_type")) in UNLISTED


def _projects(tensors: Mapping[str, StoredShape], embedding: str) -> bool:
    """Whether another matrix (or one of unknown shape) has a row for each token: the output layer by any name."""
    shape = tensors[embedding].shape
    return shape is None or any(
        tensor.shape is None or (len(tensor.shape) == 2 and tensor.shape[0] == shape[0])
        for key, tensor in tensors.items()
        if not key.endswith(EMBEDDINGS)
    )


def _blocks(
    own: Mapping[str, tuple[int, ...]], text: Mapping[str, Any], hidden: int | None, likely: Severity
) -> Iterator[Finding]:
    heads = size_of(text, "num_attention_heads")
    kv = size_of(text, "num_key_value_heads") or heads
    head_dim = size_of(text, "head_dim") or (hidden // heads if hidden and heads and hidden % heads == 0 else None)

    def of(*ends: str) -> list[tuple[str, tuple[int, ...], int]]:
        return [(key, shape, 0) for key, shape in own.items() if key.endswith(ends) and len(shape) == 2]

    if heads and kv and head_dim and likely == "error":
        q, k = of(".self_attn.q_proj.weight"), of(".self_attn.k_proj.weight", ".self_attn.v_proj.weight")
        yield from _differ(likely, "num_attention_heads", heads, q, head_dim)
        yield from _differ(likely, "num_key_value_heads", kv, k, head_dim)
    dense = of(".mlp.gate_proj.weight", ".mlp.up_proj.weight")
    yield from _differ(likely, "intermediate_size", size_of(text, "intermediate_size"), dense)
    experts = [entry for entry in of(".gate_proj.weight", ".up_proj.weight") if ".experts." in entry[0]]
    yield from _differ(likely, "moe_intermediate_size", size_of(text, "moe_intermediate_size"), experts)


def _differ(
    severity: Severity,
    name: str,
    expected: int | None,
    tensors: list[tuple[str, tuple[int, ...], int]],
    each: int = 1,
) -> Iterator[Finding]:
    """One finding for all tensors whose size at an axis is not ``expected`` (heads, say) times ``each``."""
    wrong = [(key, shape[axis]) for key, shape, axis in tensors if shape[axis] != (expected or 0) * each]
    if expected is None or not wrong:
        return
    key, size = wrong[0]
    unit = "values" if len(tensors[0][1]) == 1 else "rows" if len(tensors[0][1]) == 2 else "entries"
    fits = f", which fits {size // each}" if each > 1 and size % each == 0 else ""
    more = f" ({len(wrong)} of {len(tensors)} such tensors differ)" if len(tensors) > 1 else ""
    text = (
        f"{name} is {expected} in config.json, but {key} has {size} {unit}{fits}{more}; "
        "correct config.json, or use the weights that belong to it"
    )
    yield Finding(severity, "config", text, "config.json", key, str(expected * each), str(size))


def _layer_count(layers: Lists, text: Mapping[str, Any]) -> Iterator[Finding]:
    trunks = [prefix for prefix in layers if not _is_other(prefix) and _is_trunk(prefix)]
    if len(trunks) != 1:
        return  # it depends on the architecture which stack the config counts
    (prefix,) = trunks
    names = SIZES["n_layers"]
    if "decoder." in prefix and size_of(text, *_DECODER) is not None:
        names = _DECODER
    expected = size_of(text, *names)
    if expected is None:
        return
    found = max(layers[prefix]) + 1
    others = (numbers for other, numbers in layers.items() if other != prefix and not _is_other(other))
    if any(max(numbers) + 1 == expected for numbers in others):
        return  # the config counts that one
    further = found > expected and any("nextn" in name or "mtp" in name for name in text)
    if found != expected and not further:
        name = next(name for name in names if name in text)
        text_ = (
            f"{name} is {expected} in config.json, but the files have {found} layers, "
            f"{prefix}0 to {prefix}{found - 1}; correct config.json, or find the files that are missing"
        )
        yield Finding("error", "config", text_, "config.json", None, str(expected), str(found))


def _gaps(prefix: str, numbers: Mapping[int, frozenset[str]]) -> Iterator[Finding]:
    lacking = sorted(set(range(min(max(numbers), 100_000))) - set(numbers))
    if len(numbers) < _FEW or not lacking or len(lacking) * _FEW > len(numbers):
        return
    for number in lacking:
        text = f"{prefix}{number} is missing, but the files have {prefix}{min(numbers)} to {prefix}{max(numbers)}"
        yield Finding("error", "layers", f"{text}; find the file that holds it", None, f"{prefix}{number}")


def _holes(prefix: str, numbers: Mapping[int, frozenset[str]]) -> Iterator[Finding]:
    """Keys that a layer lacks although neighboring layers, which are otherwise the same, have them.

    A first or last layer that lacks a whole module is built that way; one between others may be.
    """
    kinds = Counter(numbers.values())
    usual = [kind for kind, count in kinds.items() if count >= _FEW - 1]
    for number, kind in sorted(numbers.items()):
        whole = next((other for other in usual if kind < other and kinds[kind] * (_FEW - 1) <= kinds[other]), None)
        if whole is None or (number in (0, max(numbers)) and len(whole - kind) > len(kind)):
            continue
        around = [at for at, other in numbers.items() if other == whole]
        is_between = min(around) < number < max(around)
        modules = {rest.partition(".")[0] for rest in kind}
        for rest in sorted(whole - kind):
            module = rest.partition(".")[0]
            if (
                module not in modules and not is_between
            ) or module.isdecimal():  # a stage with numbered layers of its own
                continue
            severity: Severity = "error" if is_between and module in modules else "warning"
            text = (
                f"{prefix}{number}.{rest} is missing, although {kinds[whole]} layers like it have it; "
                "find the file that holds it"
            )
            yield Finding(severity, "layers", text, None, f"{prefix}{number}.{rest}")


def _experts(found: Lists, text: Mapping[str, Any]) -> Iterator[Finding]:
    if not found:
        return
    whole = frozenset().union(*(kind for numbers in found.values() for kind in numbers.values()))
    stated = size_of(text, *SIZES["n_experts"])
    counts = Counter(max(numbers) + 1 for numbers in found.values() if len(numbers) == max(numbers) + 1)
    usual = counts.most_common(1)[0][0] if counts else max(max(numbers) + 1 for numbers in found.values())
    count = usual if stated is None else stated
    if stated is not None and usual < stated and 2 * counts[usual] > len(found) and len(found) > 1:
        said = (
            f"{setting_name(text, 'n_experts')} is {stated} in config.json, but {counts[usual]} of {len(found)} layers "
            f"have {usual} experts; correct config.json, or find the files that are missing"
        )
        yield Finding("error", "config", said, "config.json", None, str(stated), str(usual))
        count = usual
    for prefix, numbers in found.items():
        lacking = sorted(set(range(min(count, 100_000))) - set(numbers))
        if lacking:
            named = first_few(lacking, 8)
            said = (
                f"{prefix[:-1]} has {len(set(numbers) & set(range(count)))} of {count} experts: expert {named} "
                f"{'is' if len(lacking) == 1 else 'are'} missing; find the file that holds "
                f"{'it' if len(lacking) == 1 else 'them'}"
            )
            key = f"{prefix}{lacking[0]}"
            yield Finding("error", "layers", said, None, key, str(count), str(count - len(lacking)))
        # Entries after those that the config counts may be no experts (LongCat's).
        for number, kind in sorted((number, kind) for number, kind in numbers.items() if number < count):
            for rest in sorted(whole - kind):
                said = (
                    f"{prefix}{number}.{rest} is missing, although other experts have it; find the file that holds it"
                )
                yield Finding("error", "layers", said, None, f"{prefix}{number}.{rest}")


def _lists(keys: Iterable[str]) -> Lists:
    out: dict[str, dict[int, set[str]]] = {}
    for key in keys:
        for match in _NUMBER.finditer(key):
            prefix = key[: match.start()]
            if _name(prefix) in _LISTS:
                rest = re.sub(r"\bexperts\.\d+\.", "experts.*.", key[match.end() + 1 :])
                out.setdefault(prefix, {}).setdefault(int(match[0]), set()).add(rest)
    return {prefix: {n: frozenset(rests) for n, rests in numbers.items()} for prefix, numbers in out.items()}


def _is_trunk(prefix: str) -> bool:
    """Whether a stack belongs to the model itself, not to a module that the config counts separately."""
    return _TRUNKS.issuperset(prefix.split(".")[:-2])


def _name(prefix: str) -> str:
    return prefix.removesuffix(".").rpartition(".")[2]


def _is_other(key: str) -> bool:
    """Whether a key belongs to another part than the language model: a vision tower, say, or a multi-token head."""
    return any(part in key for part in _OTHER_PARTS)
