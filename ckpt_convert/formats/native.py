"""Native directories (torchtune's keys): shards as in Hugging Face's layout, but no config.json at the root.

Without config.json, no Hugging Face loader accepts such a directory; the config is in ``ckpt_convert/``.
"""

from __future__ import annotations

from ckpt_convert.formats import hf
from ckpt_convert.formats.base import Format, WeightDirectory, WeightName, plain_weights
from ckpt_convert.formats.names import INDEX_SUFFIX, SUFFIXES, common_file_names, index_for, numbered_names
from ckpt_convert.storage.place import Place


def find(directory: Place) -> WeightDirectory | None:
    """Indexed shards, or every plain weight file of the first suffix that occurs."""
    for suffix in (".safetensors", ".pt", ".pth", ".bin"):
        index = f"model{suffix}{INDEX_SUFFIX}"
        if (directory / index).is_present():
            return hf.weights_from_index(directory, index)
        names = plain_weights(directory, (suffix,))
        if names:
            return WeightDirectory(tuple(WeightName(name) for name in names))
    return None


def file_names(count: int, container: str) -> list[str]:
    return common_file_names(count, container) or numbered_names(count, "model", SUFFIXES[container])


def index_name(container: str) -> str:
    """The name of the index for shards of a container."""
    return index_for(f"model.{container}")


def _uses(name: str) -> bool:
    return name != "config.json"


FORMAT = Format("native", find, file_names, ("safetensors", "bin", "pth", "dcp", "pt"), None, _uses)
