"""``merge-adapter``: a LoRA or DoRA adapter merged into its base."""

from __future__ import annotations

from typing import Any

import click

from ckpt_convert import formats
from ckpt_convert.cli import options as common
from ckpt_convert.cli.commands import SUMMARIES
from ckpt_convert.cli.convert import run_or_show_plan
from ckpt_convert.dtypes import CASTS, DEQUANTIZED_DTYPES

_CONTAINERS = list(dict.fromkeys(name for format in formats.ALL.values() for name in format.containers))


@click.command(
    "merge-adapter",
    short_help=SUMMARIES["merge-adapter"],
    epilog="""\b
Examples:
  ckpt-convert merge-adapter Llama-3.2-1B my-lora Llama-3.2-1B-merged --verify
  ckpt-convert merge-adapter Llama-3.2-1B my-lora out --to meta
  ckpt-convert merge-adapter Llama-3.2-1B epoch_0/adapter_0.pt out --alpha 16
  ckpt-convert merge-adapter Llama-3.2-1B my-lora out --dry-run""",
)
@common.Argument("base")
@common.Argument("adapter")
@common.Argument("dst")
@click.option("--to", type=click.Choice(list(formats.ALL)), help="Format of DST (default: that of BASE).")
@click.option("--alpha", type=float, metavar="X", help="The adapter's alpha, where no adapter_config.json says it.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read no tensor, write nothing.")
@click.option("--verify", is_flag=True, help="Read the output again and compare every tensor, bit for bit.")
@click.option("--resume", is_flag=True, help="Continue an interrupted merge.")
@click.option("--overwrite", is_flag=True, help="Replace DST once the new output is complete (in a bucket: before).")
@click.option("--dtype", type=click.Choice(list(CASTS)), help="Cast floating-point tensors, once merged.")
@click.option("--allow-overflow", is_flag=True, help="Write values that become infinite.")
@click.option("--dequantize", type=click.Choice(list(DEQUANTIZED_DTYPES)), help="Merge into values of fp8 and MXFP4.")
@click.option("--shards", type=int, metavar="N", help="Number of files, of about equal size.")
@click.option("--max-shard-size", metavar="SIZE", help="Most bytes of a file, such as 5GB.")
@click.option("--model-parallel", type=int, metavar="N", help="Number of tensor-parallel ranks (files) of meta.")
@click.option("--container", type=click.Choice(_CONTAINERS), help="Container of the files.")
@click.option("--like", metavar="DIR", help="Take file names, key-to-file assignment, config and tokenizer from DIR.")
@common.from_format("BASE")
@common.FAMILY
@common.config("BASE")
@common.revision("BASE")
@click.option("--adapter-revision", metavar="NAME", help="Branch, tag or commit, where ADAPTER is a Hub id.")
@common.STORE_OPTIONS
@common.WORKERS
@common.JSON
@common.QUIET
def merge_adapter(*, base: str, adapter: str, **options: Any) -> int | None:
    """Merge ADAPTER into BASE, and write whole weights to DST, in the files of BASE or in another format.

    ADAPTER is a directory of PEFT's (LoRA, DoRA, rsLoRA, modules_to_save), a Hub id of one, or the file of an adapter
    such as torchtune's adapter_0.pt. BASE is a path or a Hub id (org/name). Each row is computed in float32, and
    rounded once to the dtype of BASE.
    """
    from ckpt_convert.adapters import api

    return run_or_show_plan(api.merge_adapter, api.plan_merge, base, adapter, **options)
