"""Diagnosing files that are not plain model weights: one cause with its way out, instead of many symptoms."""

from __future__ import annotations

from collections.abc import Mapping

from ckpt_convert.checkpoint import legacy_keys
from ckpt_convert.checkpoint.keys import Keys
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.tensor_info import TensorInfo
from ckpt_convert.formats import peft
from ckpt_convert.formats.names import ADAPTER_CONFIG
from ckpt_convert.storage.place import Place

_BASE = ".base_layer."
_ADAPTERS = (".lora_A.", ".lora_embedding_A.", ".lora_", ".ia3_", ".vera_", ".hada_", ".lokr_", ".oft_", ".boft_")


_SLOTS = frozenset(
    (
        *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "mu_product", "momentum_buffer", "square_avg"),
        *("acc_delta", "grad_avg", "sum", "prev", "eta", "mu", "ax", "exp_avg_sq_row", "exp_avg_sq_col"),
        *("state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "prev_step_size", "step_size"),
    )
)
"""Names of the state that optimizers keep for each parameter."""

_LIGHTNING = "pytorch-lightning_version"


def non_weight_keys(opened_keys: Keys, tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """The keys of tensors that are no weights: optimizer state, and other training state."""
    if opened_keys.opened.format is not None and opened_keys.has_only_weights:
        return frozenset()
    if opened_keys.opened.format is not None:
        return frozenset(key for key in tensors if not opened_keys.is_weight(key))
    scalars = legacy_keys.loose_scalars((key, info.shape) for key, info in tensors.items())
    return frozenset(key for key in tensors if legacy_keys.is_training_entry(key, scalars) or _is_slot(key))


def describe_files(opened_keys: Keys, tensors: Mapping[str, TensorInfo]) -> str | None:
    """What the files are, where they are not a model's weights, or more than these; None for weights alone."""
    opened = opened_keys.opened
    if opened.directory.kind == peft.KIND:
        return opened.why
    keys = list(tensors)
    objects = {name: kind for file in opened.files for name, kind in file.header.objects.items()}
    if any(".lora_down." in key for key in keys) and any(".lora_up." in key for key in keys):
        return "LoRA of kohya's kind (lora_down, lora_up), for the model that it was trained on"
    if _LIGHTNING in objects:
        return "Lightning checkpoint: the model's weights are under state_dict, beside the state of its training"
    if opened.format is not None and opened_keys.has_only_weights:
        return None
    if opened.format is None and "(all)" in objects and keys:
        return f"a pickled object ({objects['(all)']}), not a state dict"
    if opened.format is None and any(".lora_A." in key for key in keys) and not any(_BASE in key for key in keys):
        return f"LoRA adapter under PEFT's keys, without {ADAPTER_CONFIG}"
    if keys and all(map(_is_slot, keys)):
        return "optimizer state, without the weights that it is of"
    if any(map(_is_slot, keys)):
        return "training checkpoint: weights and the state of their optimizer"
    return None


def _is_slot(key: str) -> bool:
    *parts, last = key.split(".")
    return last in _SLOTS and "state" in parts


def unmerged_adapter(opened: OpenedFiles) -> str | None:
    """The message for an unmerged PEFT adapter stored together with its base model; None for other files."""
    keys = opened.keys
    base = next((key for key in keys if _BASE in key), None)
    adapter = next((key for part in _ADAPTERS for key in keys if part in key), None)
    if base is None or adapter is None or opened.directory.kind == peft.KIND:
        return None  # an adapter may contain its base model's embedding
    return (
        f"the weights are those of a whole PEFT model with an unmerged adapter ({base}, {adapter}); "
        "where it was saved, merge it and save that: model.merge_and_unload().save_pretrained(DIR); or save the "
        "adapter alone: model.save_pretrained(DIR)"
    )


def parent_config(directory: Place) -> Place | None:
    """A config.json in the parent directory: a Trainer's, which saves FSDP weights in a subdirectory."""
    path = directory.absolute().parent / "config.json"
    return path if directory.is_folder() and path.is_regular_file() else None


def zero3_placeholders(opened: OpenedFiles) -> str | None:
    """The message for weights that are empty placeholders of DeepSpeed's ZeRO-3; None for other files."""
    weights = [tensor for _, tensor in opened.stored if tensor.key.endswith("weight")]
    empty = [tensor.key for tensor in weights if tensor.shape == (0,)]
    if 4 * len(empty) <= len(weights):
        return None
    return (
        f"{len(empty)} of {len(weights)} weights are empty, of shape [0] ({empty[0]}): placeholders of DeepSpeed's "
        "ZeRO-3, whose ranks hold the values; save them gathered (stage3_gather_16bit_weights_on_model_save), or run "
        "zero_to_fp32.py in the checkpoint's directory"
    )
