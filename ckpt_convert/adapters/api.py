"""``merge_adapter``: a base with an adapter merged in, in any format."""

from __future__ import annotations

from contextlib import closing
from typing import Unpack

from ckpt_convert.adapters.merging import AdapterMerge
from ckpt_convert.adapters.stored import open_adapter
from ckpt_convert.checkpoint import locate
from ckpt_convert.checkpoint.checkpoint import open_identified
from ckpt_convert.convert.api import Report, RunOptions, SourceOptions, plan_request, run_request
from ckpt_convert.convert.plan import Plan
from ckpt_convert.convert.request import OutputOptions, Request, requested
from ckpt_convert.dtypes import DequantizedDType, OutputDType
from ckpt_convert.errors import AmbiguousFormatError
from ckpt_convert.formats.base import ContainerName, FormatName
from ckpt_convert.storage.place import Location, StorageOptions, with_options
from ckpt_convert.storage.reader import reading
from ckpt_convert.tensors.progress import ProgressCallback


def merge_adapter(
    base: Location,
    adapter: Location,
    dst: Location,
    *,
    to: FormatName | None = None,
    alpha: float | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    from_format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    dtype: OutputDType | None = None,
    dequantize: DequantizedDType | None = None,
    shards: int | None = None,
    max_shard_size: int | None = None,
    model_parallel: int | None = None,
    container: ContainerName | None = None,
    like: Location | None = None,
    allow_overflow: bool = False,
    storage_options: StorageOptions | None = None,
) -> Report:
    """Merge a LoRA or DoRA adapter into its base: W + scale · B · A, streamed, in the base's files or in any format.

        report = merge_adapter("Llama-3.2-1B", "my-lora", "Llama-3.2-1B-merged", verify=True)
        print(report.files, report.moves)

    Each row is computed in float32 (float64 for a float64 base) and rounded once, to the base's dtype.

    Args:
        base: a directory, a weight file, a URL, or a Hub id of the checkpoint that the adapter was trained on.
        adapter: a directory with PEFT's adapter_model.safetensors (or .bin) and adapter_config.json, a Hub id of one,
            or the file of an adapter such as torchtune's adapter_0.pt, beside its adapter_config.json.
        dst: the directory or URL to write; its parent is created.
        to: the format of the output: "hf", "meta", "native" or "torchtitan"; by default the base's.
        alpha: the adapter's alpha, where no adapter_config.json says it: the scale is alpha / rank.
        overwrite: replace a checkpoint at ``dst``, once the new one is complete; in a bucket, before it is written.
        resume: continue an interrupted merge of the same files.
        verify: read the output again and compare every tensor, bit for bit, before ``dst`` appears.
        workers: the number of threads; by default one for each core, from 2 to 4.
        progress: called with ``TransferProgress`` values, from several threads, one at a time.
        from_format: the format of ``base``, where it cannot be detected.
        family: the name of the architecture, such as "llama", where it cannot be detected.
        config: the config.json or params.json of a ``base`` that has none.
        revision: branch, tag or commit, where ``base`` is a Hub id.
        adapter_revision: branch, tag or commit, where ``adapter`` is a Hub id.
        dtype: "float32", "float16" or "bfloat16": cast every floating-point tensor, once merged.
        dequantize: "bfloat16" or "float32": merge into the values of a base in fp8 or MXFP4.
        shards: the number of files, about equal in bytes.
        max_shard_size: the most bytes of a file.
        model_parallel: the number of tensor-parallel ranks of a "meta" output, one file each.
        container: "safetensors", "bin", "pth", "pt" or "dcp", as far as the target has it.
        like: a checkpoint whose file names, key-to-file assignment, config and tokenizer the output takes.
        allow_overflow: write finite values that become infinite, instead of refusing.
        storage_options: options of the stores of URLs; see docs/storage.md.

    Raises:
        InputError: base or adapter cannot be read, or do not fit each other; one error lists all that is wrong.
        UsageError: options that do not fit each other, the base or the target; an alpha that is missing.
        LossyConversionError: finite values would become infinite; see ``allow_overflow``.
        What else ``convert_checkpoint`` raises.
    """
    base, adapter, dst, config, like = with_options(storage_options, base, adapter, dst, config, like)
    origin = SourceOptions(base, from_format, family, config, revision, like)
    with closing(open_adapter(adapter, alpha, adapter_revision)) as opened:
        request = _request(
            origin,
            to,
            dtype=dtype,
            dequantize=dequantize,
            shards=shards,
            max_shard_size=max_shard_size,
            model_parallel=model_parallel,
            container=container,
            allow_overflow=allow_overflow,
        )
        run = RunOptions(overwrite, resume, verify, workers, progress)
        return run_request(origin, dst, request, run, AdapterMerge(opened))


def plan_merge(
    base: Location,
    adapter: Location,
    *,
    to: FormatName | None = None,
    alpha: float | None = None,
    from_format: FormatName | None = None,
    family: str | None = None,
    config: Location | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    like: Location | None = None,
    storage_options: StorageOptions | None = None,
    **options: Unpack[OutputOptions],
) -> Plan:
    """The plan of ``merge_adapter``, from headers alone."""
    base, adapter, config, like = with_options(storage_options, base, adapter, config, like)
    origin = SourceOptions(base, from_format, family, config, revision, like)
    with closing(open_adapter(adapter, alpha, adapter_revision)) as opened:
        return plan_request(origin, _request(origin, to, **options), AdapterMerge(opened))


def _request(origin: SourceOptions, to: str | None, **options: Unpack[OutputOptions]) -> Request:
    """The request, to the base's format where ``to`` is None."""
    return requested(to=to or _format_of(origin), like=origin.like, **options)


@reading()
def _format_of(origin: SourceOptions) -> str:
    place = locate.locate_checkpoint(origin.path, origin.revision, format=origin.format)
    with open_identified(place, format=origin.format, family=origin.family, config=origin.config) as base:
        if base.format is None:
            raise AmbiguousFormatError(f"{base.place}: {base.why}; {base.advice}")
        return base.format
