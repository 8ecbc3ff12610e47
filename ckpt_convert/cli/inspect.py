"""``inspect``: what a checkpoint is and which tensors it holds; from headers alone, except for statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ckpt_convert.cli import facts as looking
from ckpt_convert.cli import options
from ckpt_convert.cli.commands import SUMMARIES
from ckpt_convert.cli.facts import Facts, Statistics
from ckpt_convert.cli.listing import body
from ckpt_convert.cli.text import command_line, echo, echo_json, terminal_width
from ckpt_convert.cli.view import SORTS, Order, View, header, matching, ordered
from ckpt_convert.storage.place import Location, Place, StorageOptions, with_options
from ckpt_convert.storage.reader import DEFAULT_WORKERS


def _order(context: click.Context, parameter: click.Parameter, value: str) -> Order:
    by, _, direction = value.partition(":")
    if by not in SORTS or direction not in ("", "asc", "desc"):
        raise click.BadParameter(f"{value!r} should be name, size or offset, with :asc or :desc behind it if you like")
    return Order(by, SORTS[by] if not direction else direction == "desc")


@click.command(
    short_help=SUMMARIES["inspect"],
    epilog="""\b
Examples:
  ckpt-convert inspect Llama-3.2-1B                        what is it?
  ckpt-convert inspect meta-llama/Llama-3.2-1B             the same, on the Hub
  ckpt-convert inspect Llama-3.2-1B --tree --depth 2       where are the bytes?
  ckpt-convert inspect Llama-3.2-1B --filter '*.self_attn.*' --full
  ckpt-convert inspect Llama-3.2-1B --sort size | head     the largest
  ckpt-convert inspect Llama-3-70B/original --by-shard     what has each rank?
  ckpt-convert inspect step-1000.pt --fail-on-nan          did training diverge?
  ckpt-convert inspect Llama-3.2-1B --stats --html llama.html
  ckpt-convert inspect Llama-3.2-1B --json | jq -r '.tensors[].key'

\b
layers.{0..3,5..15}.wq.weight denotes one tensor in each of these layers,
all of one shape and dtype; ×15 counts them. docs/inspect.md explains the
rest, docs/json.md the JSON. Exit codes: 0 shown, 1 NaN or Inf found
(--fail-on-nan), 2 usage, 3 no readable checkpoint.""",
)
@options.Argument("path")
@click.option("--full", is_flag=True, help="One line for each tensor.")
@click.option("--tree", is_flag=True, help="The tree of modules, with the total size of each.")
@click.option("--depth", type=click.IntRange(1), metavar="N", help="Levels of the tree (implies --tree).")
@click.option("--by-shard", is_flag=True, help="List the tensors file by file.")
@options.FILTERS
@click.option(
    "--sort",
    "order",
    default="name",
    show_default=True,
    metavar="KEY[:asc|desc]",
    callback=_order,
    help="By name, size, or offset (one line for each stored piece, with its offset and file).",
)
@click.option("--stats", is_flag=True, help="Read the tensors: min, max, mean, std, zeros, NaN, Inf, checksum.")
@click.option("--fail-on-nan", is_flag=True, help="Exit with 1 where there is NaN or Inf (implies --stats).")
@options.JSON
@options.HTML
@options.from_format()
@options.FAMILY
@options.config()
@options.revision()
@options.CACHE
@options.WORKERS
@options.STORE_OPTIONS
def inspect(
    path: str,
    revision: str | None,
    cache: bool,
    from_format: str | None,
    storage_options: StorageOptions | None,
    **given: Any,
) -> None:
    """Show what a checkpoint is and what it holds: format, family, files, and every tensor's key, shape and dtype.

    PATH is a directory, one weight file, a URL or a Hub id (org/name). Only headers are read, however large the files
    are; --stats reads the tensors too, in little memory.
    """
    from ckpt_convert.cli import notices

    _check(**given)
    with notices.on_stderr():
        source = options.in_cache(path, revision, from_format, cache=cache)
        _look(_locate(source, revision, storage_options), from_format, **given)


def _look(path: Place, from_format: str | None, **options: Any) -> None:
    from ckpt_convert.checkpoint.checkpoint import open_identified

    family, config = options["family"], options["config"]
    glance = not (options["stats"] or options["fail_on_nan"])
    with open_identified(path, format=from_format, family=family, config=config, glance=glance) as checkpoint:
        _show(looking.gather(checkpoint), **options)


def _show(
    facts: Facts,
    *,
    filters: tuple[str, ...],
    order: Order,
    full: bool,
    tree: bool,
    depth: int | None,
    by_shard: bool,
    stats: bool,
    fail_on_nan: bool,
    workers: int | None,
    as_json: bool,
    html: str | None,
    **_: object,
) -> None:
    view = View(
        filters=filters,
        order=order,
        full=full or order.by == "offset",
        by_shard=by_shard,
        tree=tree or depth is not None,
        depth=depth,
        width=terminal_width(),
    )
    statistics = _statistics(facts, view, workers) if stats or fail_on_nan else None
    if html is None and not as_json:
        echo("\n".join([*header(facts, view.width), "", *_body(facts, view, statistics)]))
    else:
        document = looking.document(facts, ordered(facts, view), statistics)
        if html is not None:
            from ckpt_convert.cli.html import inspect_page
            from ckpt_convert.cli.pages import write_page
            from ckpt_convert.cli.stated import stated

            write_page(html, inspect_page(document, stated(facts.checkpoint.files), command_line()))
        if as_json:
            echo_json(document)
    if statistics is not None and fail_on_nan:
        from ckpt_convert.cli.stats_view import refuse_nan

        refuse_nan(facts, statistics)


def _check(**options: Any) -> None:
    """Refuse options that would be ignored, and early a page that could not be written."""
    given = {name for name, value in options.items() if value}
    stats = given & {"stats", "fail_on_nan"}
    tree = given & {"tree", "depth"}
    is_document = bool(given & {"as_json", "html"})
    by_piece = "by_shard" in given or (options["order"].by == "offset" and not is_document)
    for is_wrong, text in (
        (tree and given & {"full", "by_shard"}, "--tree shows modules; leave out --full and --by-shard"),
        (tree and by_piece, "--tree shows modules, which have no offset; sort by name or size"),
        (is_document and (tree or "by_shard" in given), "--json and --html have every tensor and file; leave out "
         "--tree and --by-shard"),
        (tree and stats, "--stats are by tensor; leave out --tree"),
        (stats and by_piece, "--stats are by tensor, ranks joined; leave out --by-shard and --sort offset"),
        ("workers" in given and not stats, "--workers is for reading tensors; it needs --stats"),
    ):  # fmt: skip
        if is_wrong:
            raise click.UsageError(text)
    if options["html"] is not None:
        from ckpt_convert.cli.pages import check_page

        check_page(options["html"], with_json=options["as_json"])


def _statistics(facts: Facts, view: View, workers: int | None) -> Statistics:
    from ckpt_convert.analysis.stats.stats import tensor_statistics
    from ckpt_convert.cli.progress import Bar

    keys = [info.key for info in matching(facts, view)]
    with Bar() as bar:
        return dict(tensor_statistics(facts.checkpoint, keys, workers=workers or DEFAULT_WORKERS, progress=bar))


def _body(facts: Facts, view: View, statistics: Statistics | None) -> Iterator[str]:
    if statistics is None:
        return body(facts, view)
    from ckpt_convert.cli import stats_view

    return stats_view.body(facts, view, statistics)


def _locate(path: Location, revision: str | None, storage_options: StorageOptions | None) -> Place:
    from ckpt_convert.checkpoint import locate

    (given,) = with_options(storage_options, path)
    return locate.locate_checkpoint(given, revision)
