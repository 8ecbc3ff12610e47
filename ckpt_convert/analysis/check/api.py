"""``verify_checkpoint``: everything that is wrong with a checkpoint, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckpt_convert.analysis.check.accept import accept_files
from ckpt_convert.analysis.check.cross_checks import Opening, check_logits, compare_with
from ckpt_convert.analysis.check.report import Verification
from ckpt_convert.analysis.check.run import check_checkpoint
from ckpt_convert.checkpoint import locate
from ckpt_convert.checkpoint.opening import checkpoint_place
from ckpt_convert.formats.base import FormatName
from ckpt_convert.storage.place import (
    Location,
    StorageOptions,
    checked_place,
    with_options,
)
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.tensors.progress import ProgressCallback


def verify_checkpoint(
    path: Location,
    *,
    values: bool = True,
    against: Location | None = None,
    logits: bool = False,
    accept: str | Sequence[str] = (),
    format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    cache: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    storage_options: StorageOptions | None = None,
) -> Verification:
    """Check a checkpoint: files, headers, index, config against shapes, tied weights, replicas, checksums, values.

        result = verify_checkpoint("Llama-3.2-1B")
        for finding in result.findings:
            print(finding.severity, finding.check, finding.text)

    What is wrong with the checkpoint is a finding, not an exception. Nothing is written, except with ``accept``.

    Args:
        path: a directory, a weight file, a URL, or a Hub id such as "meta-llama/Llama-3.2-1B".
        values: read every byte once; otherwise headers and small files only.
        against: a checkpoint, in any format, that every tensor is compared with.
        logits: also run the model in transformers, on random tokens.
        accept: names of edited config or tokenizer files; first, their checksums in the manifest are renewed.
        format: "hf", "meta", "native" or "torchtitan", where it cannot be detected.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config: a config.json or params.json to use instead of the checkpoint's own.
        revision: branch, tag or commit, where ``path`` is a Hub id.
        cache: download repositories of the Hub into its cache first, instead of reading ranges; ``logits`` does so too.
        workers: the number of threads; by default one for each core, from 2 to 4.
        progress: called with ``TransferProgress`` values, from several threads, one at a time.
        storage_options: options of the stores that URLs are in, such as {"endpoint": "https://…"}; see docs/storage.md.

    Raises:
        CheckpointNotFoundError: there is nothing at ``path``.
        ConfigError: ``config`` cannot be read.
        MissingPackageError: ``logits`` without torch or transformers.
        UsageError: no such format or family, or ``accept`` names a file that cannot be accepted.
    """
    if logits:
        from ckpt_convert.analysis.logits.model import require_packages

        require_packages()
    path, against, config = with_options(storage_options, path, against, config)
    names = (accept,) if isinstance(accept, str) else tuple(accept)
    accepted = tuple(accept_files(checkpoint_place(checked_place(path)), names)) if names else None
    cache = cache or logits
    this = Opening(locate.locate_checkpoint(path, revision, cache=cache), format, family, config)
    other = Opening(locate.locate_checkpoint(against, cache=cache), None, family) if against is not None else None
    count = workers or DEFAULT_WORKERS
    result = check_checkpoint(
        this.place, format=format, family=family, config=config, values=values, workers=count, progress=progress
    )
    result = replace(result, accepted=accepted)
    if other is not None:
        result = compare_with(result, this, other, values=values, workers=count, progress=progress)
    return check_logits(result, this, other, progress=progress) if logits else result
