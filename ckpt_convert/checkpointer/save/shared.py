"""Writing the directory of one saved step from several ranks: the directory that one process would write.

The first rank makes the directory and its files. Every rank then writes what it owns at its place in them, flushes it,
and hands in what that adds to the checksums of each piece, or its error. The first one sums that, which proves that
every byte was written once, writes the manifest, and publishes. All of them learn how that ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.save.writer import (
    ADVICE,
    SAVING,
    StepContents,
    complete,
    explained,
    staged,
    warn_of_losses,
    weights_folder,
)
from ckpt_convert.checkpointer.state import shared_state
from ckpt_convert.checkpointer.state.shared_state import SharedState
from ckpt_convert.convert import agreement, output
from ckpt_convert.convert.agreement import Look
from ckpt_convert.convert.combine import WrittenPart, whole_pieces, written_parts
from ckpt_convert.convert.execute import execute
from ckpt_convert.convert.partition import runs, split_into_pieces
from ckpt_convert.convert.publish import JoinedOutput, StagedOutput
from ckpt_convert.convert.sources import OpenPlan
from ckpt_convert.storage import workspace
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.workspace import Folder, Stage
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter


def save(
    step: StepContents,
    destination: Place,
    ranks: Ranks,
    *,
    workers: int,
    mode: int,
    published: Callable[[], None],
    progress: ProgressCallback | None = None,
) -> None:
    """Write a step together with the other ranks, which do the same; ``published`` is what the first one does then.

    Raises what ``writer.save`` does, on all ranks with one text, which names the rank that failed.
    """
    what = f"the save of {destination.name}"
    with _Shared(step, destination, ranks, workers, mode, progress) as shared:
        begun = ranks.round(what, shared.look, shared.begin)
        ranks.round(what, lambda: shared.write(begun), lambda reports: shared.finish(reports, published))


class _Shared(contextlib.ExitStack):
    """What one rank does for a step. What is half-written when it is left is removed."""

    _staging: Stage
    _staged: StagedOutput
    _found: Look

    def __init__(
        self,
        step: StepContents,
        destination: Place,
        ranks: Ranks,
        workers: int,
        mode: int,
        progress: ProgressCallback | None,
    ) -> None:
        super().__init__()
        self._step = step
        self._destination = destination
        self._ranks = ranks
        self._workers = workers
        self._mode = mode
        self._progress = progress

    def look(self) -> bytes:
        """What this rank finds in the values that decide what is written."""
        weights = self._step.weights
        if weights is None:
            return packed(None)
        return packed(agreement.look(weights.plan, weights.sources, self._ranks.is_first).as_json())

    def begin(self, looks: Sequence[bytes]) -> list[bytes]:
        """Make the directory and its files; the answer is its name until it is published, and what all have found."""
        found = None
        if self._step.weights is not None:
            self._found = agreement.merge([Look.from_json(unpacked(one)) for one in looks])
            found = self._found.as_json()
            agreement.settle(self._step.weights.plan, self._found)
        self._staging = self.enter_context(staged(self._step, self._destination, mode=self._mode, alone=True))
        if self._step.weights is not None:
            plan = self._step.weights.plan
            self._staged = self.enter_context(
                StagedOutput(plan, self._staging, weights_folder(self._step, self._staging))
            )
            self._staged.begin(split_into_pieces(plan.files))
            self._staged.create_files()
        if isinstance(self._step.state, SharedState):
            shared_state.make_files(self._staging.folder.subfolder(TRAINING_STATE), self._ranks.count)
        first = self._step.state.optimizer_names if isinstance(self._step.state, SharedState) else ""
        return [packed([self._staging.place.name, found, first])]

    def write(self, begun: bytes) -> bytes:
        """Write what this rank owns into the files that are there; returns what was written where."""
        name, found, first = unpacked(begun)
        place = self._destination.parent / name
        with explained(self._destination), workspace.workspace_of(place).join(place, ADVICE) as folder:
            parts, state = [], None
            if self._step.weights is not None:
                inner = folder.subfolder(self._step.weights_in) if self._step.weights_in else folder
                parts = self._write_weights(self._step.weights, inner, Look.from_json(found))
            if isinstance(self._step.state, SharedState):
                state = shared_state.write_own(folder.subfolder(TRAINING_STATE), self._step.state, first)
        return packed([[part.as_json() for part in parts], state])

    def _write_weights(self, planned: OpenPlan, folder: Folder, found: Look) -> list[WrittenPart]:
        plan = agreement.settle(planned.plan, found)
        joined = JoinedOutput(plan, folder)
        try:
            mine = list(runs(plan.files, partial(agreement.owns, plan, first=self._ranks.is_first)))
            counter = ProgressCounter(SAVING, sum(piece.nbytes for piece in mine), self._progress)
            done = execute(plan, mine, planned.sources, joined, workers=self._workers, counter=counter)
        finally:
            joined.close()
        return written_parts(plan.files, done)

    def finish(self, reports: Sequence[bytes], published: Callable[[], None]) -> list[bytes]:
        """Put together what all ranks have written, and publish it."""
        with explained(self._destination):
            said = [unpacked(report) for report in reports]
            parts = [WrittenPart(*part) for written, _ in said for part in written]
            weights = self._finish_weights(self._step.weights, parts) if self._step.weights is not None else None
            state = None
            if isinstance(self._step.state, SharedState):
                inner = self._staging.folder.subfolder(TRAINING_STATE)
                state = shared_state.finish(inner, self._step.state, [state for _, state in said])
            complete(self._step, self._staging, weights, state)
            self.close()
        published()
        return [b""]

    def _finish_weights(self, planned: OpenPlan, parts: Sequence[WrittenPart]) -> dict[str, Any]:
        plan = planned.plan
        whole = whole_pieces(split_into_pieces(plan.files), parts)
        for one in whole:
            self._staged.add(one)
        folder = weights_folder(self._step, self._staging)
        written = output.finish_output(plan, whole, self._staged, folder, self._workers, None)
        lost = {key: count for key, count in self._found.nonzero.items() if count}
        warn_of_losses(self._step, self._staging, lost, written.overflows)
        return written.manifest
