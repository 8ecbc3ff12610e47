"""Files that are copied into every step: which names they may not have, and which files they replace."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ckpt_convert import formats
from ckpt_convert.checkpoint.record import MERGED, TRAINING_STATE
from ckpt_convert.containers.dcp import DCP_INDEX
from ckpt_convert.convert.plan import Plan
from ckpt_convert.errors import UsageError
from ckpt_convert.formats.names import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD_FOLDER, is_index
from ckpt_convert.storage.checksums import digest, digest_file
from ckpt_convert.storage.place import Place


def check_extra_files(extra: Sequence[Place], plan: Plan | None) -> None:
    """Refuse names of files that a step has: weights, their index, the config, an adapter's files, our folders.

    ``plan`` writes the weights, None where there are none beside these files. Raises UsageError.
    """
    taken = {RECORD_FOLDER, TRAINING_STATE, MERGED, ADAPTER_CONFIG, *ADAPTER_WEIGHTS}
    if plan is not None:
        taken |= {file.name for file in plan.files} | {DCP_INDEX, formats.ALL[plan.target].config or ""}
        taken |= {side.name for side in plan.auxiliary_files if is_index(side.name)}
    names = [path.name for path in extra]
    wrong = [f"{name} would take the place of a file that every step has" for name in names if name in taken]
    wrong += [f"two of them are called {name}" for name in sorted({name for name in names if names.count(name) > 1})]
    if wrong:
        raise UsageError(f"extra_files: {'; '.join(wrong)}; rename it, or leave it out")


def replaced_files(extra: Sequence[Place], plan: Plan, own: Collection[str]) -> Iterator[str]:
    """A line for each file of the source, such as a tokenizer, that an extra file replaces.

    ``own`` are the names of what an earlier run had copied into a step that is now the source.
    """
    side = {one.name: one for one in plan.auxiliary_files}
    for path in extra:
        there = side.get(path.name)
        if there is None or path.name in own:
            continue
        made = there.content if there.place is None else None
        before = digest_file(there.place) if there.place is not None else None if made is None else digest(made)
        if before is not None and before != digest_file(path):
            yield f"extra_files: {path} takes the place of the source's {path.name} in every step"
