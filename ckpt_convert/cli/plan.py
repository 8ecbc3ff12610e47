"""Showing a plan: what a dry run prints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import click

from ckpt_convert.checkpoint.conventions import SIZES
from ckpt_convert.cli import colors, plan_tree
from ckpt_convert.cli.text import Labelled, echo, echo_json, escape, labelled, plural, terminal_width
from ckpt_convert.cli.tree import in_short
from ckpt_convert.convert import explain
from ckpt_convert.convert.plan import UNKNOWN, Plan
from ckpt_convert.storage.by_rename import existing_parent
from ckpt_convert.storage.place import Place
from ckpt_convert.wording import human_bytes

_LABEL = len("generated") + 2
"""The width of the column of labels, above the tree and below it."""


def free_space(dst: Place) -> int | None:
    """Free bytes on the file system of DST; None where it is on none."""
    return shutil.disk_usage(existing_parent(dst.local)).free if dst.is_local else None


def as_dict(plan: Plan, dst: Place, workers: int) -> dict[str, Any]:
    """The plan as JSON-ready values."""
    return {
        "source": str(plan.source.place),
        "destination": str(dst),
        "source_format": plan.formats[0] or UNKNOWN,
        "target_format": plan.formats[1] or UNKNOWN,
        "family": plan.family,
        "evidence": plan.source.evidence,
        "release": plan.source.release,
        "dims": dict(plan.dims),
        "tensors": plan.tensors,
        "bytes": plan.tensor_bytes,
        "moves": dict(plan.bytes_by_kind),
        "groups": [group.as_dict() for group in plan_tree.groups(explain.explain_plan(plan))],
        "files": [{"name": f.name, "bytes": f.size, "tensors": len(f.tensors)} for f in plan.weights],
        "side_files": {
            side.name: side.origin for side in plan.auxiliary_files if not side.name.startswith("ckpt_convert/")
        },
        "drops": list(plan.passthrough),
        "ties": list(plan.ties),
        "embedding": {"axis": plan.embedding_split.axis, "why": plan.embedding_split.reason}
        if plan.embedding_split is not None
        else None,
        "notices": list(plan.notices),
        "disk": plan.disk,
        "disk_free": free_space(dst),
        "memory": plan.memory(workers),
    }


def show_plan(plan: Plan, dst: Place, *, as_json: bool, quiet: bool, workers: int) -> None:
    """Print the plan."""
    if as_json:
        echo_json(as_dict(plan, dst, workers))
        return
    if quiet:
        return
    width = terminal_width()
    tree = plan_tree.lines(plan_tree.groups(explain.explain_plan(plan)), width)
    shown = [
        *labelled(_facts(plan, dst), width, least=_LABEL),
        "",
        *tree,
        "",
        *labelled(_output(plan, dst, workers), width, least=_LABEL),
    ]
    echo("\n".join(shown))
    echo("nothing was written", err=True)


def _labelled(label: str, text: str, color: str | None = None) -> Labelled:
    return Labelled(label, text.split(" "), color)


def _facts(plan: Plan, dst: Place) -> Iterator[Labelled]:
    """The source, the target and the tensors."""
    source = plan.source
    release = f", sizes of {source.release}" if source.release else ""
    before, after = (name or "tensors as stored" for name in plan.formats)
    yield _labelled("source", f"{escape(str(source.place))}  ({before}: {source.why})")
    yield _labelled("target", f"{escape(str(dst))}  ({after})")
    yield _labelled("family", f"{plan.family}{release}  ({source.evidence})")
    yield _labelled("dims", ", ".join(f"{name} {plan.dims[name]}" for name in SIZES if name in plan.dims))
    if plan.embedding_split is not None:
        yield _labelled(
            "embedding", f"ranks split its {plan.embedding_split.description}  ({escape(plan.embedding_split.reason)})"
        )
    moves = ", ".join(f"{human_bytes(size)} {kind}" for kind, size in plan.bytes_by_kind.items() if size)
    yield _labelled("tensors", f"{plan.tensors}, {human_bytes(plan.tensor_bytes)}: {moves}")


def _output(plan: Plan, dst: Place, workers: int) -> Iterator[Labelled]:
    """The output's files, what becomes of the rest, and the disk and memory needed."""
    for at, file in enumerate(plan.weights[:16]):
        label = "files" if at == 0 else ""
        yield _labelled(label, f"{escape(file.name)}  {plural(len(file.tensors), 'tensor')}  {human_bytes(file.size)}")
    if len(plan.weights) > 16:
        yield _labelled("", f"… and {len(plan.weights) - 16} more")
    for origin in ("copied", "generated", "restored"):
        names = [
            side.name
            for side in plan.auxiliary_files
            if side.origin == origin and not side.name.startswith("ckpt_convert/")
        ]
        if names:
            yield _labelled(origin, escape(", ".join(names)))
    for tie in plan.ties:
        yield _labelled("tied", escape(tie))
    carried = (
        escape(in_short(plan.passthrough)) if plan.passthrough else "nothing: the target has a place for everything"
    )
    yield _labelled("carried", carried)
    free = free_space(dst)
    if free is None:
        yield _labelled("store", f"{human_bytes(plan.disk)} needed")
    else:
        lacking = click.style("  not enough", fg="red") if free < plan.disk else ""
        yield _labelled("disk", f"{human_bytes(plan.disk)} needed, {human_bytes(free)} free{lacking}")
    yield _labelled("memory", f"about {human_bytes(plan.memory(workers))} with {plural(workers, 'worker')}")
    for notice in plan.notices:
        yield _labelled("notice", escape(notice), colors.WARNING)
