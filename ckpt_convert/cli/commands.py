"""The commands by group, with what each does in a sentence; the module of one is imported when it is used."""

from __future__ import annotations

import importlib
import os
from itertools import permutations

import click

from ckpt_convert.wording import did_you_mean

FORMAT_TITLES = {"hf": "Hugging Face", "meta": "Meta", "native": "native (torchtune)", "torchtitan": "torchtitan"}

CONVERSIONS = {
    f"{source}-to-{target}": f"Convert {FORMAT_TITLES[source]} to {FORMAT_TITLES[target]}."
    for source, target in permutations(FORMAT_TITLES, 2)
}

GROUPS = {
    "Convert": {
        "convert": "Convert SRC to any format, or re-shard it in its own.",
        **CONVERSIONS,
        "merge-adapter": "Merge a LoRA or DoRA adapter into its base.",
    },
    "Inspect": {
        "inspect": "Show what a checkpoint is and which tensors it holds.",
        "show": "Print the values of a tensor.",
        "verify": "Report everything that is wrong with a checkpoint.",
        "diff": "Show where two checkpoints differ, across formats.",
        "formats": "Show which families and formats are supported.",
    },
}

SUMMARIES = {name: summary for group in GROUPS.values() for name, summary in group.items()}


class Commands(click.Group):
    """A group that lists its commands without importing them, so that ``--help`` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in SUMMARIES:
            return None
        is_conversion = name == "convert" or name in CONVERSIONS
        module = "convert" if is_conversion else name.replace("-", "_")
        found = importlib.import_module(f"ckpt_convert.cli.{module}")
        command = found.COMMANDS[name] if is_conversion else getattr(found, module)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in SUMMARIES and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {name!r}{self._instead(name)}", ctx)
        return super().resolve_command(ctx, args)

    def _instead(self, name: str) -> str:
        """What was meant by a word that is no command."""
        if os.path.exists(name):
            import shlex

            return f"; it is a path: ckpt-convert inspect {shlex.quote(name)}"
        return did_you_mean(name, SUMMARIES) or "."

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, summaries in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([*summaries.items()])
