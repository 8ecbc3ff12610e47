"""What the files of a checkpoint are called: weights, shards, ranks and indexes, and what lies beside them.

Every rule about names is here, as a question that a name answers alone. That a name stays inside its directory is
``storage.names``'s to see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX, is_dcp_index
from ckpt_convert.storage.names import JOURNAL, PARTIAL

SUFFIXES = {"safetensors": ".safetensors", "bin": ".bin", "pth": ".pth", "pt": ".pt", "dcp": DCP_SUFFIX}
"""How the names of weight files end, by the container that they are."""

WEIGHT_SUFFIXES = tuple(suffix for container, suffix in SUFFIXES.items() if container != "dcp")
LOOSE_SUFFIXES = (*WEIGHT_SUFFIXES, ".ckpt")
"""The same, with what no format calls its weights by."""

GGUF_SUFFIX = ".gguf"

_FOREIGN = (GGUF_SUFFIX, ".h5", ".msgpack", ".onnx", ".ot")
"""How weights of other programs end, which lie beside those of a checkpoint once more."""

RECORD_FOLDER = "ckpt_convert"
NEVER_ENTERED = ("original", ".git", ".cache", "onnx", RECORD_FOLDER, "training_state")
"""Folders of a checkpoint whose files are none of those beside its weights."""

ADAPTER = "adapter"
"""How the names of an adapter's files begin."""

TRAINING_PREFIXES = (
    *(f"{ADAPTER}_", "training_args", "optimizer", "optim.", "scheduler", "rng_state", "scaler.", "recipe_state"),
    *("random_states", "sampler", "zero_pp_rank", "dl_state_dict"),
)
"""How the names of files begin that trainers (transformers, accelerate, torchtune, DeepSpeed) keep beside weights."""

_TITLED = re.compile(r"((pytorch_|tf_|flax_|rust_|adapter_)?model|consolidated|diffusion_\w+_model)\b.*")
"""How weights begin that are some by their name alone, of whichever program."""

_PIECES = re.compile(rf".+{re.escape(DCP_SUFFIX)}")

TOKENIZER_PREFIXES = (
    *("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template", "spiece"),
    "sentencepiece",
)
"""How the names of tokenizer files begin."""

_READ = ("tokenizer.json", "tokenizer.model", "tekken", "vocab", "spiece", "sentencepiece")
"""How those begin that one can be read from."""

DOCUMENT_PREFIXES = ("readme", "license", "use_policy", "notice", "model_card", "responsible")
"""How model cards and licenses begin, in small letters."""

_BESIDE = (
    # configs
    *("config.json", "*_config.json", "config_*.json", "configuration.json", "params.json", "modules.json"),
    *("model_index.json", "recipe.yaml", "trainer_state.json", "checklist.chk", JOURNAL),
    # tokenizers and chat templates
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tekken.json"),
    *("*.tiktoken", "spiece.model", "sentencepiece*.model", "source.spm", "target.spm", "chat_template*", "*.jinja"),
    # the model's own code
    *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "processing_*.py", "modular_*.py"),
    *("image_processing_*.py", "video_processing_*.py", "feature_extraction_*.py", "generation_utils.py"),
    # model card and licenses
    *(*(f"{name}*" for name in DOCUMENT_PREFIXES), "licence*", "copying*", "*acceptable_use*", ".gitattributes"),
)
"""What lies beside weights, in small letters."""

_COMPLETING = ("config.json", "params.json", "adapter_config.json", "model_index.json", DCP_INDEX)

_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp", ".download")

# One file, shards, ranks.

SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<suffix>\.\w+)")
RANK = re.compile(r"consolidated\.(\d{2,})\.(pth|pt|safetensors)")
CONSOLIDATED = "consolidated"
"""How the names of Meta's weight files begin, wherever they lie."""

SINGLE_RANK = ("consolidated.safetensors", "consolidated.pth", "consolidated.pt")

_FOUND = re.compile(
    r"(?:model|diffusion_pytorch_model)(?:\.[\w-]+)?\.safetensors"
    r"|(?:pytorch_model|diffusion_pytorch_model)(?:\.[\w-]+)?\.bin"
)
"""The names, with or without a variant, of the weights that transformers and diffusers find without an index."""

HF_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
"""What transformers calls the weights of a model, by their container."""

TRANSFORMERS_NAMES = tuple(stem + SUFFIXES[container] for container, stem in HF_STEMS.items())
"""The names, or with .index.json behind them the indices, under which transformers finds weights, in its order."""

ADAPTER_CONFIG = f"{ADAPTER}_config.json"
ADAPTER_WEIGHTS = (f"{ADAPTER}_model.safetensors", f"{ADAPTER}_model.bin")


def container_of(name: str) -> str:
    """The container that a weight file is by its name; torch's, where the ending says nothing."""
    return next((container for container, suffix in SUFFIXES.items() if PurePosixPath(name).suffix == suffix), "pth")


def shard_name(stem: str, number: int, total: int, suffix: str, width: int = 5) -> str:
    return f"{stem}-{number:0{width}d}-of-{total:0{width}d}{suffix}"


def numbered_names(count: int, stem: str, suffix: str) -> list[str]:
    """``model.safetensors``, or ``model-00001-of-00004.safetensors`` and so on."""
    if count == 1:
        return [f"{stem}{suffix}"]
    return [shard_name(stem, number, count, suffix) for number in range(1, count + 1)]


def rank_name(rank: int) -> str:
    """The file of a rank in Meta's layout."""
    return f"{CONSOLIDATED}.{rank:02d}.pth"


def common_file_names(count: int, container: str) -> list[str] | None:
    """The names of new files in the containers that several formats have; None for any other."""
    if container == "dcp":
        return [f"__0_{number}{DCP_SUFFIX}" for number in range(count)]
    return numbered_names(count, "model", ".pt") if container == "pt" else None


def is_found_without_index(name: str) -> bool:
    """Whether loaders find a weight file of this name without an index."""
    return _FOUND.fullmatch(name) is not None


def is_variant(name: str, names: Iterable[str]) -> bool:
    """Whether a file holds once more what another one does, as ``x.fp16.safetensors`` beside ``x.safetensors``."""
    stem, _, suffix = name.rpartition(".")
    return "." in stem and f"{stem.rpartition('.')[0]}.{suffix}" in names


# Indexes.

INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"(?P<weights>.+)\.index(?:\.(?P<variant>[\w-]+))?\.json")


def is_index(name: str) -> bool:
    """Whether a file maps keys to weight files; it is of no use without them, so it goes with nothing else."""
    return _INDEX.fullmatch(name) is not None


def index_for(weights: str) -> str:
    """What transformers calls the index of the shards of a file: that of a variant (model.fp16) has its name inside."""
    stem, _, suffix = weights.rpartition(".")
    stem, dot, variant = stem.partition(".")
    return f"{stem}.{suffix}.index{dot}{variant}.json"


def indexed_weights(index: str) -> str:
    """The name, without a number, of the files that an index maps keys to."""
    return index.partition(".index.")[0]


def is_any_index(name: str) -> bool:
    """Whether a file says which weights lie where, in any container."""
    return is_index(name) or is_dcp_index(name)


# What is a weight, what is none, and what lies beside them.


def is_weights(name: str) -> bool:
    """Whether a file holds weights by how its name ends; those of torch.distributed.checkpoint say more than that."""
    return name.endswith(WEIGHT_SUFFIXES)


def is_any_weights(name: str) -> bool:
    """The same, or those of another program."""
    return name.endswith((*WEIGHT_SUFFIXES, *_FOREIGN))


def is_certainly_weights(name: str) -> bool:
    """Whether a file holds weights by its name alone, which no other file would have."""
    shard, suffix = SHARD.fullmatch(name), PurePosixPath(name).suffix
    if _PIECES.fullmatch(name) or (shard is not None and suffix in (*WEIGHT_SUFFIXES, GGUF_SUFFIX)):
        return True
    return _TITLED.fullmatch(name) is not None and name.endswith((*WEIGHT_SUFFIXES, *_FOREIGN, ".onnx_data"))


def may_be_weights(name: str) -> bool:
    """Whether a file may hold weights, for all that its name says."""
    return name.endswith((*LOOSE_SUFFIXES, GGUF_SUFFIX))


def is_never_auxiliary(name: str) -> bool:
    """Whether a file is none of those beside the weights, whatever it is: weights of any program, or an index."""
    return is_index(name) or is_any_weights(name)


def is_plain_weights(name: str) -> bool:
    """Whether weights belong to no consolidated or adapter checkpoint, and to no trainer."""
    return not name.startswith((CONSOLIDATED, ".", *TRAINING_PREFIXES))


def is_unfinished(name: str) -> bool:
    """Whether a download or a conversion left a file before it ended."""
    return name.endswith(_UNFINISHED) or (name.startswith(".") and name.endswith(PARTIAL))


def is_known_auxiliary(name: str) -> bool:
    """Whether checkpoints have a file of this name beside their weights: what has another name is somebody's."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _BESIDE)


def makes_loadable(name: str) -> bool:
    """Whether loaders take a directory for a model by this file, so that it is to be there last."""
    return name in _COMPLETING or is_any_index(name)


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether a tokenizer can be read from files of these names."""
    return any(name.startswith(_READ) and not name.endswith(".chk") for name in names)


# What is wanted of a repository, which may hold a model several times.


def is_meta(names: Iterable[str]) -> bool:
    return any(name.startswith(CONSOLIDATED) for name in names)


def unwanted_patterns(names: Iterable[str], format: str | None) -> list[str]:
    """Patterns of what is of no use among the files of a repository: other programs' weights, and other formats'."""
    never = ["onnx/*", *(f"*{suffix}" for suffix in _FOREIGN)]
    if format == "meta":
        return [*never, "model*.safetensors", "pytorch_model*"]
    if any(name.endswith(SUFFIXES["safetensors"]) and not name.startswith(CONSOLIDATED) for name in names):
        others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != SUFFIXES["safetensors"]]
        return [*never, *others, f"{CONSOLIDATED}*", "original/*"]
    return [*never, "original/*"]
