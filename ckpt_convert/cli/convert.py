"""The commands that convert: ``convert`` and one for each pair of formats."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ckpt_convert import formats
from ckpt_convert.cli import options as common
from ckpt_convert.cli.commands import CONVERSIONS, FORMAT_TITLES, SUMMARIES
from ckpt_convert.cli.notices import notice, on_stderr
from ckpt_convert.cli.progress import Bar
from ckpt_convert.cli.text import echo, escape, json_text, plural
from ckpt_convert.cli.tree import in_short
from ckpt_convert.convert.plan import UNKNOWN
from ckpt_convert.dtypes import CASTS, DEQUANTIZED_DTYPES
from ckpt_convert.errors import UsageError
from ckpt_convert.models.core.config import AXES
from ckpt_convert.storage.place import output_place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.wording import human_bytes

if TYPE_CHECKING:
    from ckpt_convert.convert.api import Report
    from ckpt_convert.convert.plan import Plan
    from ckpt_convert.storage.place import Location

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal, as on the Hub), "512MiB" or "1000000"; raises UsageError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"--max-shard-size {text}: expected a size such as 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    if len(match[1]) > 15:
        raise UsageError(f"--max-shard-size: {match[1][:15]}… is no size of a file")
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def _options(source: str | None, to: str | None) -> list[click.Option]:
    """The options of such a command; those that do not fit its formats are parsed (and refused) but hidden."""
    meta, sharded, params = to in (None, "meta"), to != "meta", source in (None, "meta")
    targets = [formats.ALL[to]] if to else formats.ALL.values()
    containers = list(dict.fromkeys(name for target in targets for name in target.containers))

    def option(*names: str, shown: bool = True, **settings: Any) -> click.Option:
        return click.Option(names, hidden=not shown, **settings)

    def flag(name: str, text: str, *, shown: bool = True) -> click.Option:
        return option(*name.split(), is_flag=True, help=text, shown=shown)

    names = click.Choice(list(FORMAT_TITLES))
    dtypes = click.Choice(list(CASTS))
    dequantized, quantized = click.Choice(list(DEQUANTIZED_DTYPES)), source in (None, "hf")
    styles = click.Choice(list(AXES))
    general = [
        option("--to", type=names, help="Format of DST; --container alone keeps tensors as stored."),
        option("--include", multiple=True, metavar="GLOB", help="Only these stored keys, or modules; can be repeated."),
        option("--exclude", multiple=True, metavar="GLOB", help="Leave these out; can be repeated."),
        common.from_format("SRC").parameter,
    ]
    return [
        *(general if to is None else []),
        flag("--dry-run", "Show the plan; read no tensor, write nothing."),
        flag("--verify", "Read the output again and compare every tensor, bit for bit."),
        flag("--resume", "Continue an interrupted conversion."),
        flag("--overwrite", "Replace DST once the new output is complete (in a bucket: before)."),
        option("--dtype", type=dtypes, help="Cast floating-point tensors."),
        flag("--allow-overflow", "Write values too large for --dtype as infinite."),
        flag("--allow-loss", "Leave out values that DST has no place for."),
        option("--dequantize", type=dequantized, help="Write the values of fp8 and MXFP4 weights.", shown=quantized),
        option("--shards", type=int, metavar="N", help="Number of files, of about equal size.", shown=sharded),
        option("--max-shard-size", metavar="SIZE", help="Most bytes of a file, such as 5GB.", shown=sharded),
        option("--model-parallel", type=int, metavar="N", help="Number of tensor-parallel ranks (files).", shown=meta),
        option("--container", type=click.Choice(containers), help="Container of the files."),
        option(
            "--like",
            metavar="DIR",
            help="Take file names, key-to-file assignment, config and tokenizer from DIR.",
            shell_complete=common.complete_path,
        ),
        common.FAMILY.parameter,
        common.config("SRC").parameter,
        option("--rope-factor", type=float, help="RoPE scaling factor that params.json does not hold.", shown=params),
        option("--rope-theta", type=float, help="RoPE theta that params.json does not hold.", shown=params),
        option("--max-positions", type=int, help="Context length that params.json does not hold.", shown=params),
        option(
            "--meta-style",
            type=styles,
            help="Whose params.json and embedding split.",
            shown=meta,
        ),
        flag("--drop-rope-scaling", "Leave out a RoPE scaling that the target cannot express.", shown=meta),
        common.revision("SRC").parameter,
        common.CACHE.parameter,
        common.WORKERS.parameter,
        common.STORE_OPTIONS.parameter,
        common.JSON.parameter,
        common.QUIET.parameter,
    ]


def _command(name: str, source: str | None, to: str | None) -> click.Command:
    def run(**options: Any) -> int | None:
        options.setdefault("to", to)
        options.setdefault("from_format", source)
        return _convert(**options)

    usage = "SRC is a path, a URL or a Hub id (org/name); DST is a directory, or a URL in an object store."
    examples = [f"ckpt-convert {name} SRC DST --dry-run", f"ckpt-convert {name} SRC DST --verify"]
    if to is None:
        usage += (
            " A model of no known family stays in Hugging Face's format (--to hf), under its own keys. With "
            "--container and no --to, tensors are taken as they are stored, whatever they are of: a .pt, .ckpt or .bin "
            "file, or a directory of torch.distributed.checkpoint, becomes safetensors, or with --container pt one .pt."
        )
        examples = [
            "ckpt-convert convert Llama-3.2-1B out --to meta",
            "ckpt-convert convert Llama-3-70B/original out --to meta --model-parallel 2",
            "ckpt-convert convert Llama-3.2-1B out --to hf --max-shard-size 1GB",
            "ckpt-convert convert outputs/ out --to hf --like Llama-3.2-1B",
            "ckpt-convert convert last.ckpt out --container safetensors",
            "ckpt-convert convert step-1000/ out --container pt",
        ]
    elif to == "meta":
        examples.append(f"ckpt-convert {name} SRC DST --model-parallel 2")
    arguments = [common.Argument(name).parameter for name in ("src", "dst")]
    return click.Command(
        name,
        callback=run,
        params=[*arguments, *_options(source, to)],
        help=f"{SUMMARIES[name]}\n\n{usage}",
        epilog="\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples),
    )


def _convert(*, src: str, cache: bool, quiet: bool, **options: Any) -> int | None:
    from ckpt_convert.convert import api

    with on_stderr(hidden=quiet):
        source = common.in_cache(src, options["revision"], options["from_format"], cache=cache)
    return run_or_show_plan(api.convert_checkpoint, api.plan_conversion, source, quiet=quiet, **options)


def run_or_show_plan(
    convert: Callable[..., Report],
    plan: Callable[..., Plan],
    *sources: Location,
    dst: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    max_shard_size: str | None,
    verify: bool,
    resume: bool,
    overwrite: bool,
    workers: int | None,
    **options: Any,
) -> int | None:
    """Convert the sources and print the report; with ``dry_run``, print the plan instead."""
    with on_stderr(hidden=quiet):
        options["max_shard_size"] = parse_size(max_shard_size) if max_shard_size is not None else None
        if dry_run:
            from ckpt_convert.cli.plan import show_plan

            made = plan(*sources, **options)
            show_plan(made, output_place(dst, "DST"), as_json=as_json, quiet=quiet, workers=workers or DEFAULT_WORKERS)
            return None
        with Bar(hidden=quiet) as bar:
            report = convert(
                *sources,
                dst,
                verify=verify,
                resume=resume,
                overwrite=overwrite,
                workers=workers,
                progress=bar,
                **options,
            )
        show_report(report, as_json=as_json, quiet=quiet)
    return 0  # DST is complete, even if the report could not be printed


def show_report(report: Report, *, as_json: bool, quiet: bool) -> None:
    """Print what a conversion did; its notices go to standard error."""
    if as_json:
        echo(json_text(report.as_dict(), indent=2))
    if quiet:
        return
    for text in report.notices:
        notice(text)
    if as_json:
        return
    rate = report.bytes / max(report.seconds, 1e-3)
    formats = f"{report.family}: {report.source_format} → {report.target_format}"
    echo(
        f"{'as stored' if report.target_format == UNKNOWN else formats}, {plural(report.tensors, 'tensor')}, "
        f"{human_bytes(report.bytes)} in {plural(len(report.files), 'file')}, "
        f"{report.seconds:.1f} s ({human_bytes(int(rate))}/s)"
    )
    for tie in report.ties:
        echo(f"  tied: {escape(tie)}")
    if report.merged:
        echo(f"  merged: an adapter into {plural(report.merged, 'weight')}")
    if report.drops:
        echo(f"  kept in the record, as the target has no place for it: {escape(in_short(report.drops))}")
    for origin in ("copied", "generated", "restored"):
        names = [escape(name) for name, how in report.side_files.items() if how == origin]
        if names:
            echo(f"  {origin}: {', '.join(names)}")
    if report.resumed_bytes:
        echo(f"  resumed: {human_bytes(report.resumed_bytes)} were done already")
    if report.verified is not None:
        echo(f"  verified: {plural(report.verified, 'tensor')} equal, bit for bit")
    echo(escape(report.destination))


COMMANDS = {
    "convert": _command("convert", None, None),
    **{name: _command(name, *name.split("-to-")) for name in CONVERSIONS},
}
