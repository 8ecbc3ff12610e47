"""Writing the directory of one saved step, all or nothing."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ckpt_convert.adapters.merge import MergedReader
from ckpt_convert.checkpoint import record
from ckpt_convert.checkpoint.record import TRAINING_STATE
from ckpt_convert.checkpointer.run import saved_steps
from ckpt_convert.checkpointer.state import dcp_files, training_state
from ckpt_convert.checkpointer.state.serialize import SerializedState
from ckpt_convert.checkpointer.state.shared_state import SharedState
from ckpt_convert.convert import output, ownership
from ckpt_convert.convert.auxiliary_files import AuxiliaryFile
from ckpt_convert.convert.execute import check_losses, loss_text, run_checks
from ckpt_convert.convert.sharing import OwnParts
from ckpt_convert.convert.sources import OpenPlan
from ckpt_convert.errors import CkptConvertError, OutputExistsError, SourceChangedError, UnreadableError
from ckpt_convert.storage import workspace
from ckpt_convert.storage.checksums import digest
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import DEFAULT_WORKERS
from ckpt_convert.storage.system import Advice
from ckpt_convert.storage.workspace import Folder, Stage
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import human_bytes, indented_list

log = logging.getLogger("ckpt_convert")

SAVING = "saving"
"""The phase of the progress of a save."""

_UNTOUCHED = "the step was not saved, earlier ones are untouched"
ADVICE = Advice(
    f"{_UNTOUCHED}; free some space, or keep fewer (keep_last)",
    f"{_UNTOUCHED}; look at its permissions, the disk and the connection to it",
)


@dataclass(frozen=True)
class StepContents:
    """The contents of the directory of a step.

    ``weights`` is the plan that writes these, below ``weights_in`` (the directory itself, or the folder beside an
    adapter), None where there are none; ``files`` are small files by name; ``state`` is the training state, None for
    none; ``training`` gives the manifest's section, to which the checksums of what is written are added; it is asked
    when the manifest is written, as metrics may arrive until then; ``own`` is what this process writes of the weights,
    where several do; ``is_read_soon`` says that weights and state should stay in the page cache.
    """

    weights: OpenPlan | None
    training: Callable[[], Mapping[str, Any]]
    state: Mapping[str, SerializedState] | SharedState | None = None
    files: Mapping[str, bytes] | None = None
    extra: Sequence[Place] = ()
    weights_in: str = ""
    own: OwnParts | None = None
    is_read_soon: bool = False

    def weights_folder(self, folder: Folder) -> Folder:
        """The folder for the weights, in that of the step."""
        return self._for_large(folder.subfolder(self.weights_in) if self.weights_in else folder)

    def state_folder(self, folder: Folder) -> Folder:
        """The folder for the training state, in that of the step."""
        return self._for_large(folder.subfolder(TRAINING_STATE))

    def _for_large(self, folder: Folder) -> Folder:
        return folder if self.is_read_soon else folder.past_cache()

    @property
    def names(self) -> list[str]:
        """The files that will be written, as far as they are known in advance."""
        weights = PurePosixPath(self.weights_in)
        written = [str(weights / name) for name in (self.weights.plan.names if self.weights is not None else ())]
        names = self.state.names if isinstance(self.state, SharedState) else dcp_files.NAMES
        state = [f"{TRAINING_STATE}/{name}" for name in names] if self.state is not None else []
        return [*written, *(self.files or ()), *(place.name for place in self.extra), *state, record.MANIFEST]

    @property
    def nbytes(self) -> int:
        if isinstance(self.state, SharedState):
            state = self.state.nbytes
        else:
            packed = self.state.values() if self.state is not None else ()
            state = sum(tensor.nbytes for one in packed for tensor in one.tensors.values())
        files = sum(map(len, self.files.values())) if self.files else 0
        extra = sum(place.identity().size for place in self.extra)
        return state + files + extra + (self.weights.plan.disk if self.weights is not None else 0)


def write_step(
    step: StepContents,
    destination: Place,
    *,
    workers: int = DEFAULT_WORKERS,
    mode: int = 0o777,
    alone: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a step into ``destination``, which appears complete; one of ours that is there is replaced.

    ``mode`` are the permissions that its files and folders may have at most; ``alone`` says that the directory above is
    locked. Where nothing can be renamed, what is replaced is removed first.
    Raises OutputExistsError where something else has the name, and CkptConvertError for what goes wrong while writing:
    ``destination`` is then unchanged, and nothing half-written is left.
    """
    with staged(step, destination, mode=mode, alone=alone) as staging:
        weights = _weights(step, step.weights, staging, workers, progress) if step.weights is not None else None
        complete(step, staging, weights, _state(step, staging, workers))


@contextlib.contextmanager
def staged(step: StepContents, destination: Place, *, mode: int = 0o777, alone: bool = False) -> Iterator[Stage]:
    """A directory to write a step into, which appears complete at the end of the block; raises what ``save`` does."""
    started = time.monotonic()
    with explained(destination):
        if found := obstacle(destination):
            raise OutputExistsError(f"{found}\nmove that elsewhere, or choose another directory name or output_dir")
        store = workspace.workspace_of(destination)
        rules = ownership.STEP_RULES
        with store.stage(destination, rules, overwrite=True, mode=mode, advice=ADVICE, alone=alone) as staging:
            try:
                store.check_space(destination, step.nbytes)
                staging.expect(step.names)
                yield staging
                if step.weights is not None:
                    step.weights.plan.check_sources()
                staging.commit()
                nbytes = staging.folder.nbytes
            except BaseException:
                staging.discard()
                raise
    log.info("saved %s (%s in %.1f s)", destination, human_bytes(nbytes), time.monotonic() - started)


@contextlib.contextmanager
def explained(destination: Place) -> Iterator[None]:
    """Add to errors while a step is written that it was not saved, and that earlier ones are untouched."""
    try:
        yield
    except OSError as error:
        raise CkptConvertError(
            f"{error.filename or destination}: cannot be written: {error.strerror or error}; {destination.name} was "
            "not saved, earlier steps are untouched"
        ) from error
    except (UnreadableError, SourceChangedError) as error:
        raise type(error)(f"{error}; {destination} was not saved, earlier steps are untouched") from error


def obstacle(destination: Place) -> str:
    """What prevents saving a step in a place, as a message; "" for nothing. Raises UnreadableError.

    It is what is no checkpoint of ours, or what somebody has put into one. What damage has left of one may be replaced
    by the run that comes back to it.
    """
    destination = destination.listed()
    if (not destination.is_present() and destination.link() is None) or workspace.workspace_of(destination).is_leftover(
        destination
    ):
        return ""
    folder = destination.is_folder()
    there = sorted(place.name for place in destination.children()) if folder else [destination.name]
    if there and not saved_steps.is_damaged(destination) and saved_steps.read_step(destination) is None:
        return f"{destination}: is there already and is no checkpoint of this checkpointer:{indented_list(there)}"
    foreign = ownership.unlisted_files(destination) if there else []
    if not foreign:
        return ""
    return f"{destination}: is to be saved again, and holds what is none of its files:{indented_list(foreign)}"


def _state(step: StepContents, staging: Stage, workers: int) -> training_state.Files | None:
    if step.state is None or isinstance(step.state, SharedState):
        return None
    return training_state.write_state(step.state_folder(staging.folder), step.state, workers)


def complete(
    step: StepContents, staging: Stage, weights: dict[str, Any] | None, state: training_state.Files | None
) -> None:
    """Write everything except weights and training state, which are written already, and the manifest last."""
    manifest: dict[str, Any] = {"schema": record.SCHEMA, "checksum": record.ALGORITHMS}
    if weights is not None and not step.weights_in:
        manifest = weights
    elif weights is not None:
        step.weights_folder(staging.folder).write(record.MANIFEST, record.render_manifest(weights))
    files = {name: _file(name, data, staging) for name, data in (step.files or {}).items()}
    extra = {place.name: _copy(place, staging) for place in step.extra}
    kept = None if state is None else {"files": state}
    manifest["training"] = {**step.training(), "training_state": kept, "extra_files": extra, "files": files}
    staging.folder.write(record.MANIFEST, record.render_manifest(manifest))


def _weights(
    step: StepContents, planned: OpenPlan, staging: Stage, workers: int, progress: ProgressCallback | None
) -> dict[str, Any]:
    plan, sources = planned.plan, planned.sources
    plan.refuse_unreadable()
    run_checks(plan, sources)
    lost = check_losses(plan, sources)
    folder = step.weights_folder(staging.folder)
    written = output.write_output(plan, sources, staging, workers, progress, folder, phase=SAVING)
    warn_of_losses(step, staging, lost, written.overflows | merged_overflows(step))
    return written.manifest


def merged_overflows(step: StepContents) -> dict[str, int]:
    """Count by key the finite base values that became infinite when this process merged an adapter into them."""
    if step.weights is None or step.weights_in != record.MERGED:
        return {}
    readers = (reader for reader in step.weights.sources.values() if isinstance(reader, MergedReader))
    return {reader.name: reader.overflowed for reader in readers if reader.overflowed}


def warn_of_losses(step: StepContents, staging: Stage, lost: Mapping[str, int], overflows: Mapping[str, int]) -> None:
    """Warn of tensors with values that the files cannot hold, or that overflow their dtype."""
    kept = "training_state keeps them exact" if step.state is not None else "nothing keeps them exact"
    if lost:
        text = "%s: %s change what the model computes, and its files have no place for them; %s"
        log.warning(text, staging.destination, loss_text(lost), kept)
    if overflows:
        text = "%s: %s in the files, whose dtype is too narrow for them; %s"
        log.warning(text, staging.destination, output.overflow_text(overflows), kept)


def _file(name: str, data: bytes, staging: Stage) -> dict[str, Any]:
    staging.folder.write(name, data)
    return {"size": len(data), "checksum": digest(data)}


def _copy(place: Place, staging: Stage) -> dict[str, Any]:
    checksum = output.write_auxiliary_file(AuxiliaryFile(place.name, "copied", place), staging.folder)
    return {"size": place.identity().size, "checksum": checksum}
