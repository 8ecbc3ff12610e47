"""The names of a checkpoint's files: weights, shards, ranks and indexes, and auxiliary files.

All rules about file names are here, as predicates of a name alone. ``storage.names`` checks that a name stays inside
its directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ckpt_convert.containers.dcp import DCP_INDEX, DCP_SUFFIX, is_dcp_index
from ckpt_convert.storage.names import JOURNAL, PARTIAL

SUFFIXES = {"safetensors": ".safetensors", "bin": ".bin", "pth": ".pth", "pt": ".pt", "dcp": DCP_SUFFIX}
"""The suffix of weight files by container."""

WEIGHT_SUFFIXES = tuple(suffix for container, suffix in SUFFIXES.items() if container != "dcp")
LOOSE_SUFFIXES = (*WEIGHT_SUFFIXES, ".ckpt")
"""Also a suffix that no format uses for its weights."""

GGUF_SUFFIX = ".gguf"

_FOREIGN = (GGUF_SUFFIX, ".h5", ".msgpack", ".onnx", ".ot")
"""Suffixes of weights for other programs, which repeat those of the checkpoint."""

RECORD_FOLDER = "ckpt_convert"
NEVER_ENTERED = ("original", ".git", ".cache", "onnx", RECORD_FOLDER, "training_state")
"""Folders of a checkpoint whose files are not auxiliary files."""

ADAPTER = "adapter"
"""The prefix of an adapter's files."""

TRAINING_PREFIXES = (
    *(f"{ADAPTER}_", "training_args", "optimizer", "optim.", "scheduler", "rng_state", "scaler.", "recipe_state"),
    *("random_states", "sampler", "zero_pp_rank", "dl_state_dict"),
)
"""Prefixes of files that trainers (transformers, accelerate, torchtune, DeepSpeed) save beside weights."""

_TITLED = r"((pytorch_|tf_|flax_|rust_|adapter_)?model|consolidated|diffusion_\w+_model)\b.*"
"""Names that only weights have, of whichever program."""

_PIECES = rf".+{re.escape(DCP_SUFFIX)}"

TOKENIZER_PREFIXES = (
    *("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "tekken", "chat_template", "spiece"),
    "sentencepiece",
)
"""Prefixes of tokenizer files."""

_READ = ("tokenizer.json", "tokenizer.model", "tekken", "vocab", "spiece", "sentencepiece")
"""Prefixes of the files from which a tokenizer can be loaded."""

DOCUMENT_PREFIXES = ("readme", "license", "use_policy", "notice", "model_card", "responsible")
"""Prefixes of model cards and licenses, in lower case."""

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
"""Patterns of auxiliary files, in lower case."""

_COMPLETING = ("config.json", "params.json", "adapter_config.json", "model_index.json", DCP_INDEX)

_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp", ".download")

# One file, shards, ranks.

SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})(?P<suffix>\.\w+)")
RANK = re.compile(r"consolidated\.(\d{2,})\.(pth|pt|safetensors)")
CONSOLIDATED = "consolidated"
"""The prefix of Meta's weight files."""

SINGLE_RANK = ("consolidated.safetensors", "consolidated.pth", "consolidated.pt")

_FOUND = (
    r"(?:model|diffusion_pytorch_model)(?:\.[\w-]+)?\.safetensors"
    r"|(?:pytorch_model|diffusion_pytorch_model)(?:\.[\w-]+)?\.bin"
)
"""Names of weight files, with or without a variant, that transformers and diffusers find without an index."""

HF_STEMS = {"safetensors": "model", "bin": "pytorch_model"}
"""The stem of transformers' weight files by container."""

TRANSFORMERS_NAMES = tuple(stem + SUFFIXES[container] for container, stem in HF_STEMS.items())
"""The names under which transformers finds weights, in its order; their indexes end with .index.json."""

ADAPTER_CONFIG = f"{ADAPTER}_config.json"
ADAPTER_WEIGHTS = (f"{ADAPTER}_model.safetensors", f"{ADAPTER}_model.bin")


def container_of(name: str) -> str:
    """The container of a weight file by its suffix; torch's if the suffix is unknown."""
    return next((container for container, suffix in SUFFIXES.items() if PurePosixPath(name).suffix == suffix), "pth")


def shard_name(stem: str, number: int, total: int, suffix: str, width: int = 5) -> str:
    return f"{stem}-{number:0{width}d}-of-{total:0{width}d}{suffix}"


def numbered_names(count: int, stem: str, suffix: str) -> list[str]:
    """``model.safetensors``, or ``model-00001-of-00004.safetensors`` and so on."""
    if count == 1:
        return [f"{stem}{suffix}"]
    return [shard_name(stem, number, count, suffix) for number in range(1, count + 1)]


def rank_name(rank: int) -> str:
    """The name of a rank's file in Meta's layout."""
    return f"{CONSOLIDATED}.{rank:02d}.pth"


def common_file_names(count: int, container: str) -> list[str] | None:
    """The names of new files in the containers that several formats share; None for any other."""
    if container == "dcp":
        return [f"__0_{number}{DCP_SUFFIX}" for number in range(count)]
    return numbered_names(count, "model", ".pt") if container == "pt" else None


def is_found_without_index(name: str) -> bool:
    """Whether loaders find a weight file of this name without an index."""
    return re.fullmatch(_FOUND, name) is not None


def is_variant(name: str, names: Iterable[str]) -> bool:
    """Whether a file is a variant of another one, as ``x.fp16.safetensors`` beside ``x.safetensors``."""
    stem, _, suffix = name.rpartition(".")
    return "." in stem and f"{stem.rpartition('.')[0]}.{suffix}" in names


# Indexes.

INDEX_SUFFIX = ".index.json"
_INDEX = re.compile(r"(?P<weights>.+)\.index(?:\.(?P<variant>[\w-]+))?\.json")


def is_index(name: str) -> bool:
    """Whether a file maps keys to weight files; it is useless without them, so it is never an auxiliary file."""
    return _INDEX.fullmatch(name) is not None


def index_for(weights: str) -> str:
    """The index for the shards of a file as transformers names it; the name of a variant (model.fp16) is moved."""
    stem, _, suffix = weights.rpartition(".")
    stem, dot, variant = stem.partition(".")
    return f"{stem}.{suffix}.index{dot}{variant}.json"


def indexed_weights(index: str) -> str:
    """The name, without shard numbers, of the files that an index maps keys to."""
    return index.partition(".index.")[0]


def is_any_index(name: str) -> bool:
    """Whether a file is an index of weights, for any container."""
    return is_index(name) or is_dcp_index(name)


# Weights and auxiliary files.

WELL_KNOWN_NAMES = (
    *("config.json", "generation_config.json", "params.json", "checklist.chk", ADAPTER_CONFIG, *ADAPTER_WEIGHTS),
    *TRANSFORMERS_NAMES,
    *(f"{name}{INDEX_SUFFIX}" for name in TRANSFORMERS_NAMES),
    *("diffusion_pytorch_model.safetensors", f"diffusion_pytorch_model.safetensors{INDEX_SUFFIX}"),
    *("model.pt", *SINGLE_RANK, f"{CONSOLIDATED}.00.pth", f"{CONSOLIDATED}.00.pt", DCP_INDEX),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "README.md", "LICENSE"),
)
"""The names that a checkpoint's files most likely have, for places that cannot be listed; an index names the rest."""


def is_weights(name: str) -> bool:
    """Whether a file holds weights by its suffix, those of torch.distributed.checkpoint excluded."""
    return name.endswith(WEIGHT_SUFFIXES)


def is_any_weights(name: str) -> bool:
    """As ``is_weights``, or weights of another program."""
    return name.endswith((*WEIGHT_SUFFIXES, *_FOREIGN))


def is_certainly_weights(name: str) -> bool:
    """Whether a file certainly holds weights: no other file would have this name."""
    shard, suffix = SHARD.fullmatch(name), PurePosixPath(name).suffix
    if re.fullmatch(_PIECES, name) or (shard is not None and suffix in (*WEIGHT_SUFFIXES, GGUF_SUFFIX)):
        return True
    return re.fullmatch(_TITLED, name) is not None and name.endswith((*WEIGHT_SUFFIXES, *_FOREIGN, ".onnx_data"))


def may_be_weights(name: str) -> bool:
    """Whether a file may hold weights, by its name."""
    return name.endswith((*LOOSE_SUFFIXES, GGUF_SUFFIX))


def is_never_auxiliary(name: str) -> bool:
    """Whether a file is certainly not auxiliary: weights of any program, or an index."""
    return is_index(name) or is_any_weights(name)


def is_plain_weights(name: str) -> bool:
    """Whether a weight file belongs to no consolidated or adapter checkpoint and no training state."""
    return not name.startswith((CONSOLIDATED, ".", *TRAINING_PREFIXES))


def is_unfinished(name: str) -> bool:
    """Whether a file is the unfinished result of a download or a conversion."""
    return name.endswith(_UNFINISHED) or (name.startswith(".") and name.endswith(PARTIAL))


def is_known_auxiliary(name: str) -> bool:
    """Whether this is a known name of auxiliary files; a file with another name belongs to the user."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _BESIDE)


def makes_loadable(name: str) -> bool:
    """Whether this file makes loaders accept a directory as a model, so that it must be written last."""
    return name in _COMPLETING or is_any_index(name)


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether a tokenizer can be loaded from files of these names."""
    return any(name.startswith(_READ) and not name.endswith(".chk") for name in names)


# Repositories, which may hold a model several times.


def is_meta(names: Iterable[str]) -> bool:
    return any(name.startswith(CONSOLIDATED) for name in names)


def unwanted_patterns(names: Iterable[str], format: str | None) -> list[str]:
    """Patterns of files of a repository that are not needed: weights of other programs and other formats."""
    never = ["onnx/*", *(f"*{suffix}" for suffix in _FOREIGN)]
    if format == "meta":
        return [*never, "model*.safetensors", "pytorch_model*"]
    if any(name.endswith(SUFFIXES["safetensors"]) and not name.startswith(CONSOLIDATED) for name in names):
        others = [f"*{suffix}" for suffix in WEIGHT_SUFFIXES if suffix != SUFFIXES["safetensors"]]
        return [*never, *others, f"{CONSOLIDATED}*", "original/*"]
    return [*never, "original/*"]
