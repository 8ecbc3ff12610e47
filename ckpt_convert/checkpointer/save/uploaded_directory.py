"""The directory of a run in an object store: its steps are complete on a disk first, and are uploaded from there."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.distributed.exchange import Writers
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.run import retention, saved_steps
from ckpt_convert.checkpointer.run.naming import DirectoryTemplate
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.save.run_directory import RunDirectory, only_warned
from ckpt_convert.checkpointer.save.step_upload import Turns, has_arrived, take_turns, turns_of
from ckpt_convert.checkpointer.save.upload import WAITING, Uploader, UploadOptions
from ckpt_convert.checkpointer.save.writer import StepContents
from ckpt_convert.errors import SourceChangedError, UsageError, VerificationError
from ckpt_convert.storage import workspace
from ckpt_convert.storage.by_rename import make_private_folder, remove_tree, temporary_place
from ckpt_convert.storage.place import Place, checked_place
from ckpt_convert.tensors.progress import ProgressCallback

log = logging.getLogger("ckpt_convert")

_WAITING = "waiting for uploads"
_MARKER = ".ckpt-convert-seen-"
"""How the name of a file begins that the first rank makes for the others to see."""


class UploadedDirectory(RunDirectory):
    """A run's directory whose steps are written to ``path``, on a disk, and uploaded behind the training.

    Pointers and retention are those of the directory in the store; on the disk the newest steps stay, and those that
    have not arrived. Several ranks upload each step together; the first one does all else.
    """

    def __init__(
        self,
        output_dir: Place,
        template: DirectoryTemplate,
        run_name: str | None,
        policy: retention.RetentionPolicy,
        ranks: Ranks | None,
        writers: Writers,
        options: UploadOptions,
    ) -> None:
        self._is_temporary = options.local_dir is None
        local = _local_dir(options.local_dir, ranks)
        super().__init__(local, template, run_name or output_dir.name, policy, ranks, writers)
        self.remote = RunDirectory(output_dir, template, self.run_name, policy, raises=True)
        self._options = options
        self._uploads = None if self.ranks is None else self.ranks.channel("upload")
        self._uploader = Uploader(options.deadline, self._uploads)
        self._uploading: SavedStep | None = None
        self._arrived: set[tuple[str, int]] = set()
        self._replaced: set[tuple[str, int]] = set()
        self._left: list[str] = []
        self._is_pruning = False

    # What is there

    @property
    def places(self) -> tuple[Place, ...]:
        return self.path, self.remote.path

    def check(self, source: Identified) -> None:
        super().check(source)
        self.remote.check(source)

    def _in_store(self, place: Place | None) -> Place | None:
        """The same step in the store."""
        return None if place is None else self.remote.path / place.name

    def stays_at(self, destination: Place) -> Place:
        return self.remote.path / destination.name

    # Opening and closing

    def open(self, source: Identified, options: Mapping[str, str]) -> None:
        """As ``RunDirectory.open``; raises UsageError, too, where a rank does not see the disk of the first one."""
        if self._is_open:
            return
        self._uploader = Uploader(self._options.deadline, self._uploads)  # that of a run before has ended
        super().open(source, options)
        if self.ranks is not None:
            self._look_together(self.ranks)

    def _look_together(self, ranks: Ranks) -> None:
        """Let all ranks see that the directory is the same for all, and upload what a run before has left."""
        what = f"looking into {self.path}"
        marker, left = unpacked(ranks.first(what, lambda: packed([self._make_marker(), self._left])))
        try:
            ranks.round(what, lambda: self._find_marker(marker), lambda _: [b""])
        finally:
            if ranks.is_first:
                self._remove_markers()
        for name in left if self.is_followed else ():
            self._submit(name)

    def _make_marker(self) -> str:
        """A new file, of a name that no cache of a network file system knows."""
        self._remove_markers()
        marker = self.path / f"{_MARKER}{uuid.uuid4().hex}"
        workspace.workspace_of(marker).replace_file(marker, b"")
        return marker.name

    def _find_marker(self, name: str) -> bytes:
        if not (self.path / name).without_listing().is_present():
            raise UsageError(
                f"local_dir={str(self._options.local_dir)!r}: is not the directory that the first rank has there; "
                "steps are put together in it before they are uploaded, so give one on a file system that all "
                "machines see"
            )
        return b""

    def _remove_markers(self) -> None:
        there = self.path.without_listing().listed().children()
        markers = [place.name for place in there if place.name.startswith(_MARKER)]
        workspace.workspace_of(self.path).remove(self.path, markers)

    def _open_for(self, every: Sequence[bytes], source: Identified) -> list[bytes]:
        hosts = {unpacked(one)[0] for one in every}
        if self._is_temporary and len(hosts) > 1:
            raise UsageError(
                f"{self.remote.path}: the steps of ranks on {len(hosts)} machines are put together before they are "
                "uploaded; give local_dir=, a directory on a file system that all of them see"
            )
        return super()._open_for(every, source)

    def _open(self, source: Identified) -> None:
        self.remote.stand_in = self._in_store(self.stand_in)
        on_disk = {saved.place.name for saved in saved_steps.scan_steps(self.path)}
        self.remote.unfinished = on_disk
        self.remote.open(source, {})
        super()._open(source)
        if on_disk - {*self._left}:
            saved_steps.clean_up(self.remote.path, self._left)

    def _take(self) -> None:
        if self._is_temporary:
            make_private_folder(self.path)
        super()._take()
        there = {saved.place.name: saved for saved in self.remote.saved}
        newest = max((saved.sequence for saved in there.values()), default=0)
        self._left = []
        for saved in saved_steps.scan_steps(self.path):
            name = saved.place.name
            if name in there and there[name].sequence == saved.sequence:
                self._arrived.add((name, saved.sequence))
                if there[name].metrics != saved.metrics:
                    self.amend(saved.place, saved.metrics, saved.progress.evals)
            elif saved.sequence > newest:
                self._left.append(name)  # the run was killed before it had arrived
                self._submit(name)
            else:
                log.warning("%s: is not in %s, whose steps are newer; it is left there", saved.place, self.remote.path)
        self._sequence = max(self._sequence, newest)

    def close(self) -> None:
        """Release both directories. Steps that have not arrived stay on the disk."""
        self._uploader.close()
        try:
            self.remote.close()
        finally:
            super().close()
        if self._is_temporary and not self.is_followed:
            left = saved_steps.scan_steps(self.path)
            if self._uploader.is_done:
                remove_tree(self.path)
            elif left:
                log.warning(
                    "%s has not arrived in %s, and stays in %s; local_dir=%r goes on with it",
                    *(", ".join(one.place.name for one in left), self.remote.path, self.path, str(self.path)),
                )

    # Saving

    def settle(self, *, alone: bool = False) -> None:
        """Wait until everything has arrived; raises what has failed for longer than the deadline.

        ``alone``: this rank waits for what it has to do with it, and the others may not wait.
        """
        if self.ranks is None or alone:
            self._uploader.wait()
        else:
            self.ranks.first(_WAITING, self._uploader.wait)

    def arrival(self) -> Callable[[], bool]:
        uploader = self._uploader
        return lambda: uploader.is_done

    def raise_failures(self) -> None:
        if self.ranks is None:
            self._uploader.check()

    def await_room(self, step: int, *, may_skip: bool) -> bool:
        """Whether to save a step: not while others are on their way, if such a save is to be left out; else waits."""
        if self.ranks is None:
            return self._await_room(step, may_skip=may_skip)
        return self.ranks.first(_WAITING, lambda: b"y" if self._await_room(step, may_skip=may_skip) else b"") == b"y"

    def _await_room(self, step: int, *, may_skip: bool) -> bool:
        self._uploader.check()
        if self._uploader.steps < WAITING:
            return True
        if may_skip and self._options.when_behind == "skip":
            log.warning("step %d is not saved: %d steps before it are still being uploaded", step, WAITING)
            return False
        log.warning("step %d waits until a step before it is uploaded", step)
        self._uploader.wait(WAITING - 1)
        return True

    def replace_later(self, steps: Iterable[SavedStep]) -> None:
        """``RunDirectory.replace_later``, also of steps on the disk that will have arrived by then."""
        steps = list(steps)
        self._replaced = {_key(one) for one in steps}
        super().replace_later(one for one in steps if one.place.parent == self.path)
        self.remote.replace_later(replace(one, place=self.remote.path / one.place.name) for one in steps)

    def warn_of_obstacles(self, step: int) -> None:
        super().warn_of_obstacles(step)
        if not self.is_followed:
            self.remote.warn_of_obstacles(step)

    def amend(self, destination: Place, metrics: Mapping[str, float], evals: int) -> None:
        """Write metrics that were reported after a save into its checkpoint, on the disk and in the store."""
        super().amend(self.path / destination.name, metrics, evals)
        if not self.is_followed:
            there = self.remote.path / destination.name
            what = f"writing the metrics of {there}"
            self._uploader.submit(what, lambda: self.remote.amend(there, metrics, evals))

    def _point_at(self, newest: Place) -> None:
        """Nothing: the pointers are in the store."""

    def _point_at_best(self) -> None:
        """Nothing: the pointers are in the store."""

    def _published(self, destination: Place) -> None:
        self._unwritten.pop(destination, None)
        with only_warned(f"{destination} is saved, but earlier checkpoints cannot be removed"):
            self._delete_superseded(destination)
        self._submit(destination.name)

    def _prune(self, resumed: Place | None = None) -> None:
        """Prune the store once what is on its way has arrived; steps on the disk go as they arrive."""
        self._write_metrics()
        kept = self._in_store(resumed)
        self._uploader.submit(f"pruning {self.remote.path}", lambda: self._prune_store(lambda: self.remote.prune(kept)))

    def write(
        self, step: StepContents, destination: Place, workers: int, progress: ProgressCallback | None = None
    ) -> None:
        """``RunDirectory.write``; the step is read again when it is uploaded."""
        super().write(replace(step, is_read_soon=True), destination, workers, progress)
        if self.is_followed:
            self._submit(destination.name)

    def _submit(self, name: str) -> None:
        there = self.remote.path / name
        self._uploader.submit(f"uploading {there}", lambda: self._upload(name), is_step=True)

    def _upload(self, name: str) -> None:
        """Upload a step; then move the store's pointers, prune it, and remove older steps from the disk.

        Of several ranks, each uploads its share. Raises VerificationError where not all of its files are in the store
        then.
        """
        here, there = self.path / name, self.remote.path / name
        self._uploading = None
        try:
            take_turns(here, there, self._uploads, lambda: self._turns(here, there))
        except SourceChangedError:
            if self.is_followed:
                return  # it is for the first rank to say what that means
            now, before = saved_steps.read_step(here), self._uploading
            if now is not None and before is not None and now.sequence == before.sequence:
                raise
            # It was saved again meanwhile, and that is to be uploaded after this.

    def _turns(self, here: Place, there: Place) -> Turns:
        """What the first rank does for an upload: none for a step that is gone or was replaced."""
        saved = saved_steps.read_step(here)
        if saved is None or self._is_replaced(saved):
            return
        self._uploading = saved
        self.remote.refuse_lost()
        if _key(saved) not in self._arrived:
            yield from turns_of(saved, there, 1 if self.ranks is None else self.ranks.count)
            if not has_arrived(saved, there):
                raise VerificationError(f"{there}: is not as it was uploaded from {here}; something else writes there")
            self._arrived.add(_key(saved))
        with only_warned(f"{self.path}: what has arrived cannot be removed"):
            self._drop_local()  # before the store is pruned, so that a step that is in neither was never complete
        if not self._is_replaced(saved):
            self._prune_store(lambda: self.remote.published(there))

    def _is_replaced(self, saved: SavedStep) -> bool:
        return _key(saved) in self._replaced

    def _prune_store(self, work: Callable[[], None]) -> None:
        """Work that removes steps from the store; what an earlier attempt has left half-removed goes first."""
        if self._is_pruning:
            saved_steps.clean_up(self.remote.path, self._left)
        self._is_pruning = True
        self.remote.stand_in = self._in_store(self.stand_in)
        work()
        self._is_pruning = False

    def _drop_local(self) -> None:
        steps = saved_steps.scan_steps(self.path)
        for saved in steps[: len(steps) - self._options.keep_local]:
            if saved.place != self.stand_in and _key(saved) in self._arrived:
                workspace.workspace_of(saved.place).withdraw(saved.place, saved_steps.RULES)
                log.info("%s removed: it is in %s", saved.place, self.remote.path)


def _key(saved: SavedStep) -> tuple[str, int]:
    """What tells a step from an earlier or later one in the same place."""
    return saved.place.name, saved.sequence


def _local_dir(given: str | Path | None, ranks: Ranks | None) -> Place:
    """The directory on the disk, by a new name where none is given; the same on all ranks."""
    if given is not None:
        return checked_place(given, "local_dir")
    if ranks is None:
        return temporary_place()
    return checked_place(ranks.first("naming a directory", lambda: str(temporary_place()).encode()).decode())
