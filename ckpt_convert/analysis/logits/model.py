"""Loading a checkpoint of any format into a causal language model of transformers, on the CPU in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ckpt_convert import dtypes
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.convert.execute import byte_comparer
from ckpt_convert.convert.translate import translate
from ckpt_convert.errors import (
    ConfigError,
    KeyMismatchError,
    ShapeMismatchError,
    TiedWeightsError,
    UnsupportedFamilyError,
    UsageError,
    require_package,
)
from ckpt_convert.formats.names import ADAPTER_CONFIG, TRANSFORMERS_NAMES, index_for
from ckpt_convert.tensors.blocks import BlockReader, TypedTensor
from ckpt_convert.tensors.lazy import LazyTensor, from_source
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter
from ckpt_convert.wording import indented_list

if TYPE_CHECKING:
    import torch

_LEFT_OUT = (
    "auto_map",  # code of the checkpoint's own
    "transformers_weights",  # another file
    "attn_implementation",  # these name kernels, which may be fetched from the Hub
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "fusion_config",
)
"""Options of a config that load code, other files or kernels, and do not change what the model computes."""


@dataclass(frozen=True)
class Architecture:
    """The class in transformers, its config, and the limits on tokens.

    ``positions`` is the largest number of tokens that it takes, None if the config does not say.
    """

    model_type: str
    model_class: Any
    config: Any
    vocab_size: int
    positions: int | None


def require_packages() -> None:
    """Raise MissingPackageError where what computes logits is not installed."""
    for package in ("torch", "transformers"):
        require_package(package, "computing logits")


def read_architecture(checkpoint: Identified) -> Architecture:
    """The class and config of transformers for the checkpoint's config.

    Raises MissingPackageError without transformers, UnsupportedFamilyError for what is no causal language model that it
    knows, ConfigError for a config that it rejects.
    """
    content = checkpoint.model.config if checkpoint.format != "hf" else checkpoint.config
    if content is None:
        raise ConfigError(f"{checkpoint.place}: has no config.json; pass `config=` with the model's")
    require_packages()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    name = content.get("model_type")
    where = f"{checkpoint.place}: model_type {name!r}"
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        own = " (its config names code of its own, which is never run)" if "auto_map" in content else ""
        raise UnsupportedFamilyError(
            f"{where} is unknown to transformers {transformers.__version__}{own}; a newer one may know it: "
            "pip install --upgrade transformers"
        )
    kept = {key: value for key, value in content.items() if key not in _LEFT_OUT}
    try:
        config = CONFIG_MAPPING[name].from_dict(kept)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        text = config.get_text_config()
    except ImportError as error:
        raise _lacking(checkpoint, error) from error
    except Exception as error:
        raise ConfigError(f"{checkpoint.place}: transformers refuses the config: {_said(error)}") from error
    vocab = getattr(text, "vocab_size", None)
    if model_class is None or not isinstance(vocab, int) or vocab < 1:
        raise UnsupportedFamilyError(
            f"{where} is no causal language model in transformers {transformers.__version__}, so it has no logits of a "
            "next token; diff compares its weights"
        )
    positions = getattr(text, "max_position_embeddings", None)
    return Architecture(name, model_class, config, vocab, positions if isinstance(positions, int) else None)


def load_model(
    checkpoint: Identified, architecture: Architecture, progress: ProgressCallback | None
) -> tuple[Any, tuple[str, ...]]:
    """The model with its weights, and notices about it.

    A Hugging Face directory is opened by transformers itself. The weights of any other are converted tensor by tensor
    and passed in memory. Raises KeyMismatchError, ShapeMismatchError or TiedWeightsError for weights that do not
    fit, listing them all.
    """
    import torch

    config = architecture.config
    options: dict[str, Any] = {}
    notices: tuple[str, ...] = ()
    if _opens(checkpoint):
        path: str | None = str(checkpoint.root.local)
        counter = ProgressCounter("loading", sum(tensor.nbytes for _, tensor in checkpoint.stored), progress)
    else:
        path = None
        if checkpoint.format == "hf":
            options["state_dict"] = _as_they_are(checkpoint, progress)
        else:
            options["state_dict"], tied = _translated(checkpoint, progress)
            config.tie_word_embeddings = tied
            notices = checkpoint.model.notices
    try:
        model, info = architecture.model_class.from_pretrained(
            path,
            config=config,
            torch_dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise _lacking(checkpoint, error) from error
    except MemoryError:
        raise
    except Exception as error:
        raise ConfigError(f"{checkpoint.place}: transformers cannot load it: {_said(error)}") from error
    _refuse(checkpoint, info)
    if path is not None:
        counter.add(counter.total)
    return model.eval(), notices


def _opens(checkpoint: Identified) -> bool:
    """Whether transformers would find just these files in the directory, and a model rather than an adapter."""
    if (
        checkpoint.format != "hf"
        or not checkpoint.root.is_local
        or not checkpoint.place.is_folder()
        or (checkpoint.root / ADAPTER_CONFIG).is_present()
    ):
        return False
    if checkpoint.key_notices:
        return False
    index, names = checkpoint.directory.index, [file.name for file in checkpoint.files]
    return index in map(index_for, TRANSFORMERS_NAMES) if index else names in [[name] for name in TRANSFORMERS_NAMES]


def _as_they_are(checkpoint: Identified, progress: ProgressCallback | None) -> dict[str, torch.Tensor]:
    """Every tensor of a Hugging Face checkpoint under its key in the format."""
    _ = checkpoint.ranks  # refuses keys given twice
    tensors = [
        (checkpoint.names.of(tensor.key), TypedTensor(from_source(number, tensor.shape, tensor.strides), tensor.dtype))
        for number, (_, tensor) in enumerate(checkpoint.stored)
        if checkpoint.is_weight(tensor.key)
    ]
    return _made(checkpoint, tensors, progress)


def _translated(checkpoint: Identified, progress: ProgressCallback | None) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors under Hugging Face's keys and in its RoPE layout, and whether the output is tied to the embedding."""
    path = str(checkpoint.place)
    equal = byte_comparer(checkpoint.stored)
    made = translate(
        checkpoint.model, str(checkpoint.format), "hf", checkpoint.ranks, path, equal=equal, keep_tied=False
    )
    failed = [check.message for check in made.checks if not equal(check)]
    if failed:
        raise TiedWeightsError(f"{path}: tensors that have to be equal are not:{indented_list(failed)}")
    tensors = [(target.key, TypedTensor(target.tensor, target.dtype)) for target in made.targets]
    return _made(checkpoint, tensors, progress), bool(made.dims["tied"])


def _made(
    checkpoint: Identified, tensors: Iterable[tuple[str, TypedTensor]], progress: ProgressCallback | None
) -> dict[str, torch.Tensor]:
    """The tensors in memory, floating-point ones in float32."""
    tensors = list(tensors)
    mover = BlockReader(checkpoint.stored)
    counter = ProgressCounter(
        "loading", sum(dtypes.nbytes(one.dtype, one.tensor.shape) for _, one in tensors), progress
    )
    return {key: _read(mover, one.tensor, one.dtype, counter) for key, one in tensors}


def _read(mover: BlockReader, tensor: LazyTensor, dtype: str, counter: ProgressCounter) -> torch.Tensor:
    import numpy as np
    import torch

    target = "F32" if dtype in dtypes.CASTABLE else dtype
    nbytes = dtypes.nbytes(target, tensor.shape)
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = data.numpy()
    for offset, block in mover.blocks(tensor, dtype, target):
        view[offset : offset + len(block)] = np.frombuffer(block, np.uint8)
        counter.add(len(block) * dtypes.DTYPES[dtype].bits // dtypes.DTYPES[target].bits)
    name = dtypes.DTYPES[target].torch
    elements = data.view(getattr(torch, name)) if name else data
    return elements.reshape(tensor.shape) if elements.numel() == prod(tensor.shape) else elements


def _refuse(checkpoint: Identified, info: Mapping[str, Any]) -> None:
    """Raise an error that lists the missing, unexpected and mismatched keys of transformers' loading report."""
    missing, unexpected = (sorted(map(str, info.get(f"{name}_keys") or ())) for name in ("missing", "unexpected"))
    misshapen = [
        f"{key}: expected {list(wanted)}, found {list(given)}"
        for key, given, wanted in sorted(info.get("mismatched_keys") or (), key=str)
    ]
    other = [str(text) for text in info.get("error_msgs") or ()]
    titles = {
        "missing keys": missing,
        "unexpected keys": unexpected,
        "shapes that disagree with the config": misshapen,
        "other problems": other,
    }
    said = [f"\n  {len(lines)} {title}:{indented_list(lines)}" for title, lines in titles.items() if lines]
    if said:
        error = KeyMismatchError if missing or unexpected else ShapeMismatchError
        raise error(f"{checkpoint.place}: transformers loads it, but not as its config says:{''.join(said)}")


def _lacking(checkpoint: Identified, error: ImportError) -> UsageError:
    return UsageError(f"{checkpoint.place}: transformers needs another package to load it: {_said(error)}")


def _said(error: Exception) -> str:
    """The message of another library's error, as one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{'…' if len(text) > 400 else ''}"
