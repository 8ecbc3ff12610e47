"""``diff_checkpoints``: where two checkpoints differ, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ckpt_convert.analysis.diff.compare import Diff, compare_checkpoints
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.formats.base import FormatName
from ckpt_convert.storage.place import Location, StorageOptions, with_options
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.progress import ProgressCallback


def diff_checkpoints(
    a: Location,
    b: Location,
    *,
    values: bool = True,
    filters: Sequence[str] = (),
    format_a: FormatName | None = None,
    format_b: FormatName | None = None,
    family: str | None = None,
    config_a: Location | None = None,
    config_b: Location | None = None,
    revision_a: str | None = None,
    revision_b: str | None = None,
    cache: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    storage_options: StorageOptions | None = None,
) -> Diff:
    """Compare two checkpoints tensor by tensor, whatever their formats, files and ranks.

        diff = diff_checkpoints("Llama-3.2-1B", "my-finetune")
        print(diff.same, diff.counts)

    Tensors are aligned through the family's table: in one RoPE layout, with fused and split tensors put together.

    Args:
        a: a directory, a weight file, a URL, or a Hub id such as "meta-llama/Llama-3.2-1B".
        b: the same, of the other checkpoint.
        values: compare every value; otherwise keys, shapes and dtypes only.
        filters: globs such as "*.mlp.*"; only tensors with a key, in a or in b, that matches one are compared.
        format_a: "hf", "meta", "native" or "torchtitan", where the format of a cannot be detected.
        format_b: the same for b.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config_a: a config.json or params.json to use for a instead of its own.
        config_b: the same for b.
        revision_a: branch, tag or commit, where a is a Hub id.
        revision_b: the same for b.
        cache: download repositories of the Hub into its cache first, instead of reading ranges.
        workers: the number of processes; by default one for each core, from 2 to 4.
        progress: called with ``TransferProgress`` values.
        storage_options: options of the stores that URLs are in, such as {"endpoint": "https://…"}; see docs/storage.md.

    Raises:
        InputError: a checkpoint cannot be read; its subclasses say why.
        UsageError: no such format or family.
    """

    a, b, config_a, config_b = with_options(storage_options, a, b, config_a, config_b)

    def is_wanted(*keys: str) -> bool:
        return not filters or any(fnmatchcase(key, glob) for key in keys for glob in filters)

    with (
        open_identified(a, format=format_a, family=family, config=config_a, revision=revision_a, cache=cache) as left,
        open_identified(b, format=format_b, family=family, config=config_b, revision=revision_b, cache=cache) as right,
    ):
        return compare_checkpoints(
            left, right, values=values, is_wanted=is_wanted, workers=workers or DEFAULT_WORKERS, progress=progress
        )
