"""The output directory of a run: its lock, the numbering and retention of its steps, and the pointer to the newest."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpointer.distributed.exchange import Exchange, Writers
from ckpt_convert.checkpointer.distributed.ranks import Ranks, packed, unpacked
from ckpt_convert.checkpointer.distributed.single_writer import Claim
from ckpt_convert.checkpointer.run import retention, saved_steps
from ckpt_convert.checkpointer.run.naming import DirectoryTemplate
from ckpt_convert.checkpointer.run.progress import Progress
from ckpt_convert.checkpointer.run.saved_steps import SavedStep
from ckpt_convert.checkpointer.save import shared
from ckpt_convert.checkpointer.save.writer import StepContents, obstacle, write_step
from ckpt_convert.convert.output import output_permissions
from ckpt_convert.errors import CkptConvertError, OutputExistsError, UsageError, error_text
from ckpt_convert.storage import pointer, workspace
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.reader import reading
from ckpt_convert.storage.system import writing
from ckpt_convert.storage.workspace import HeldLock, Workspace
from ckpt_convert.tensors.progress import ProgressCallback
from ckpt_convert.wording import indented_list

log = logging.getLogger("ckpt_convert")

LOCK = ".ckpt-convert-lock"

_CACHED_BY_PAGE = {"nfs", "nfs4", "cifs", "smb3"}
"""File systems whose clients cache by page, and do not lock it while they write.

What is of no tensor, the first rank writes when all others have closed the files, which shows it what they wrote.
"""

_BY_PAGE = b"by page"


class RunDirectory:
    """The directory that holds the steps of a run."""

    def __init__(
        self,
        path: Place,
        template: DirectoryTemplate,
        run_name: str | None,
        policy: retention.RetentionPolicy,
        ranks: Ranks | None = None,
        writers: Writers = "auto",
        *,
        raises: bool = False,
    ) -> None:
        """``raises``: what fails after a step is complete is an error, for a caller that tries again, not a warning."""
        self.path = path
        self._raises, self._only_warned = raises, _raised if raises else only_warned
        self._exchange = None if ranks is None else Exchange(ranks.channel("save"))
        self._writers = writers
        self.ranks = None if self._exchange is None else self._exchange.ranks
        """The processes that write it together, of which only the first changes anything but their weights and state;
        None where one process writes it alone."""
        self.policy = policy
        self._template = template
        self.run_name = run_name or path.absolute().name
        template.check_run_name(self.run_name)
        self._lock: HeldLock | None = None
        self._is_open = False
        self._mode = 0o777
        self._claim: Claim | None = None
        self._sequence = 0
        self.stand_in: Place | None = None
        """The step that replaces a lost source; it is kept as long as the run continues."""
        self.unfinished: Collection[str] = ()
        """Names of steps that are gone on with where they are half-written."""
        self._superseded: tuple[SavedStep, ...] = ()
        self._unwritten: dict[Place, tuple[Mapping[str, float], int]] = {}

    def open(self, source: Identified, options: Mapping[str, str]) -> None:
        """Lock the directory for this process, and clean up what a killed one left; repeated calls do nothing.

        Raises LockedError where another checkpointer has it, UsageError where another process of this run has, and
        OutputExistsError where saving would touch the source.
        """
        if self._is_open:
            return
        if self.ranks is None:
            self._open(source)
        else:
            said = packed([socket.gethostname(), options])
            answer = self.ranks.round(f"opening {self.path}", lambda: said, lambda every: self._open_for(every, source))
            self._writers = "exchange" if answer == _BY_PAGE else self._writers
        self._is_open = True

    def _open_for(self, every: Sequence[bytes], source: Identified) -> list[bytes]:
        """Take the directory for all ranks; the answer is whether its pages must each have one writer.

        That is on a file system whose clients cache by page, for several machines: of two that write into one page,
        one would overwrite what the other has written. Raises UsageError for options that differ between the ranks,
        and where they are to write so.
        """
        hosts, options = zip(*map(unpacked, every), strict=True)
        lines = [
            f"rank {rank}: {name} is {value}, on rank 0 {options[0].get(name)}"
            for rank, mine in enumerate(options)
            for name, value in mine.items()
            if value != options[0].get(name)
        ]
        if lines:
            raise UsageError(f"the ranks were given different options:{indented_list(lines)}")
        kind = self._workspace.file_system(self.path)
        by_page = len(set(hosts)) > 1 and kind in _CACHED_BY_PAGE
        if by_page and self._writers == "direct":
            raise UsageError(
                f"{self.path}: is on {kind}, where the ranks of {len(set(hosts))} machines would overwrite parts of "
                'each other\'s writes; leave writers="direct" out, and each page has one writer, or choose an '
                "output_dir on a parallel file system (Lustre, GPFS)"
            )
        self._open(source)
        return [_BY_PAGE if by_page else b""]

    def _open(self, source: Identified) -> None:
        with reading(source.place, "looked at"):
            self.check(source)
            self._refuse_step(source)
            if source.files:
                self._mode = output_permissions(source)
        with writing(self.path, "opened for saving"):
            self._take()

    def _take(self) -> None:
        self._workspace.make_folder(self.path)
        self._claim = Claim(self.path, self._workspace.identity(self.path))
        held = f"{self.path}: another checkpointer is writing here; close() it, or choose another output_dir"
        self._lock = self._workspace.lock(self.path / LOCK, held)
        saved_steps.clean_up(self.path, self.unfinished)
        for name in (self._template.latest_name, self._template.best_name):
            if name is not None:
                self._workspace.check_pointer(self.path, name)
        there = self.saved
        self._sequence = there[-1].sequence if there else 0
        if there:
            self._point_at(there[-1].place)  # a run may have ended, or failed, between the two
            self._point_at_best()

    @property
    def _workspace(self) -> Workspace:
        return workspace.workspace_of(self.path)

    @property
    def conflict(self) -> str | None:
        """Why nothing may be written here: another process of this run writes here. None if there is no conflict."""
        return self._claim.trouble() if self._claim is not None else None

    def close(self) -> None:
        self._is_open = False
        if self._exchange is not None:
            self._exchange.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @property
    def places(self) -> tuple[Place, ...]:
        """Where the steps are; of one that is in several places, the first has it."""
        return (self.path,)

    @property
    def saved(self) -> list[SavedStep]:
        """The complete checkpoints, oldest first."""
        return saved_steps.scan_places(self.places)

    def settle(self, *, alone: bool = False) -> None:
        """Wait until what was saved is where it belongs: it is, once it is written."""

    def arrival(self) -> Callable[[], bool]:
        """A function that says whether what was saved is where it belongs; it keeps no directory alive."""
        return lambda: True

    def raise_failures(self) -> None:
        """Raise what has failed since the steps were written: nothing does."""

    def await_room(self, step: int, *, may_skip: bool) -> bool:
        """Whether to save a step, once there is room for it: there always is."""
        return True

    def refuse_lost(self) -> None:
        """Raise LockedError if the lock was lost to another process."""
        if self._lock is not None:
            self._lock.refuse_lost()

    @property
    def best(self) -> SavedStep | None:
        """The best checkpoint by the first metric of the policy, None if none has it."""
        metric = self.policy.metric(None)
        return None if metric is None else retention.best_step(self.saved, metric)

    def replace_later(self, steps: Iterable[SavedStep]) -> None:
        """Delete these once the next checkpoint is complete: they belong to a run that was started over."""
        self._superseded = tuple(steps)

    def destination(self, progress: Progress, metrics: Mapping[str, float]) -> Place:
        """The directory of a step with the metrics that it has so far."""
        return self.path / self._template.format(progress, self.run_name, metrics)

    def stays_at(self, destination: Place) -> Place:
        """Where a step stays that is saved in ``destination``."""
        return destination

    def next_sequence(self) -> int:
        """The sequence number of the next save; the newest checkpoint has the highest."""
        self._sequence += 1
        return self._sequence

    def write(
        self, step: StepContents, destination: Place, workers: int, progress: ProgressCallback | None = None
    ) -> None:
        """Write a step; once it is complete, move the pointer, and delete what the policy does not keep."""
        if self._exchange is not None:
            published = partial(self._published, destination)
            shared.save(
                step,
                destination,
                self._exchange,
                writers=self._writers,
                workers=workers,
                mode=self._mode,
                published=published,
                progress=progress,
            )
        else:
            write_step(step, destination, workers=workers, mode=self._mode, alone=True, progress=progress)
            self._published(destination)

    def published(self, destination: Place) -> None:
        """Move the pointers to a complete step, and delete what the policy does not keep."""
        self._published(destination)

    def prune(self, resumed: Place | None) -> None:
        """Delete what the policy does not keep, except the resumed step."""
        self._prune(resumed)

    def _published(self, destination: Place) -> None:
        self._unwritten.pop(destination, None)
        self._point_at(destination)
        with self._only_warned(f"{destination} is saved, but earlier checkpoints cannot be looked through"):
            self._delete_superseded(destination)
            self._prune()

    def _delete_superseded(self, destination: Place) -> None:
        """Delete the steps of a run that was started over, now that its first one is complete."""
        gone = tuple(one for one in self._superseded if one.place != destination)
        retention.apply_retention(retention.RetentionDecision(delete=gone), raises=self._raises)
        self._superseded = ()

    @property
    def is_followed(self) -> bool:
        """Whether another rank changes the directory, and this one does not."""
        return self.ranks is not None and not self.ranks.is_first

    def _point_at(self, newest: Place) -> None:
        if (name := self._template.latest_name) is not None:
            with self._only_warned(f"{newest} is saved, but {name} cannot be made to lead to it"):
                if pointer.pointer_target(self.path, name) != newest:
                    self._workspace.point(self.path, name, newest.name)

    def _point_at_best(self) -> None:
        """Let the pointer lead to the best checkpoint, or remove it where none has the metric."""
        if (name := self._template.best_name) is None:
            return
        with self._only_warned(f"{self.path}: {name} cannot be made to lead to the best checkpoint"):
            best, target = self.best, pointer.read_pointer(self.path / name)
            if best is None and target is not None:
                self._workspace.remove(self.path, [name])
            elif best is not None and target != best.place.name:
                self._workspace.point(self.path, name, best.place.name)

    def amend(self, destination: Place, metrics: Mapping[str, float], evals: int) -> None:
        """Write metrics that were reported after a save into its checkpoint, if that still exists.

        What cannot be written is warned of, and tried again before any checkpoint is removed.
        """
        if self.is_followed:
            return
        self._unwritten[destination] = metrics, evals
        with self._only_warned(f"{destination} is saved, but its metrics cannot be written now"):
            if self._write_metrics():
                self._prune()

    def warn_of_obstacles(self, step: int) -> None:
        """Warn now of files in the directories of later steps: saving there would fail, hours later."""
        found: list[str] = []
        if self.is_followed:
            return
        with self._only_warned(f"{self.path}: files in the way of later steps cannot be examined"):
            steps = {
                one.place: one.step for one in self.saved if self.destination(one.progress, one.metrics) == one.place
            }
            for place in self.path.listed().children():
                if place not in steps and (named := self._template.step_of(place.name, self.run_name)) is not None:
                    steps[place] = named
            ahead = sorted((at, place) for place, at in steps.items() if at > step)
            found = [said for _, place in ahead if (said := obstacle(place))]
        if found:
            log.warning(
                "this run is at step %d, and a later step will not be saved over what is in its way; move that "
                "elsewhere before the run comes to it:%s",
                step,
                indented_list(found),
            )

    def after_resume(self, resumed: SavedStep) -> None:
        """Delete what a killed run had no time to delete, except the resumed step; warn if that lacks the metric."""
        if self.is_followed:
            return
        there = [saved for saved in self.saved if saved.place != resumed.place]
        if lacking := [name for name in self.policy.metrics if name not in resumed.metrics]:
            # If every other checkpoint has it, the run was most likely killed between the save and the report.
            expected = bool(there) and all(name in saved.metrics for saved in there for name in lacking)
            log.log(
                logging.WARNING if expected else logging.INFO,
                "%s: has no %s, as the run ended before report(), or reports none for this step, so it is not among "
                "the best; to have it counted, evaluate it and report() before the next step()",
                resumed.place,
                " and no ".join(map(repr, lacking)),
            )
        self._prune(resumed.place)

    def _prune(self, resumed: Place | None = None) -> None:
        self._write_metrics()
        self._point_at_best()  # before the former best one is removed
        decision = retention.decide_retention(self.saved, self.policy, {resumed, self.stand_in})
        retention.apply_retention(decision, raises=self._raises)

    def _write_metrics(self) -> bool:
        """Write the metrics that are not in their checkpoint yet; returns whether there were any."""
        changed = False
        for destination, (metrics, evals) in list(self._unwritten.items()):
            saved = saved_steps.read_step(destination)
            if saved is not None and (saved.metrics, saved.progress.evals) != (metrics, evals):
                counted = {**saved.progress.as_dict(), "evals": evals}
                saved_steps.amend_step(saved, metrics={**saved.metrics, **metrics}, progress=counted)
                changed = True
            del self._unwritten[destination]
        return changed

    def check(self, source: Identified) -> None:
        """Raise OutputExistsError if saving would write into the source, or if a file has the name."""
        if self.path.is_local and self.path.is_present() and not self.path.is_folder():
            raise OutputExistsError(f"{self.path}: is a file, but output_dir is a directory; choose another name")
        here, origin = self.path.real(), source.place.real()
        if source.files and origin.is_folder() and (here == origin or here.is_inside(origin)):
            raise OutputExistsError(
                f"{self.path}: is inside the source {source.place}, which is never written; choose another output_dir"
            )

    def _refuse_step(self, source: Identified) -> None:
        """Raise OutputExistsError if the retention policy could delete the source."""
        root = source.place.real()
        if not source.files or source.place == self.stand_in:
            return
        if root.parent == self.path.real() and saved_steps.read_step(root) is not None:
            raise OutputExistsError(
                f"{source.place}: is a step of this very output_dir, which later steps may replace; choose "
                "another output_dir, or resume() with the source that the run began with"
            )


@contextlib.contextmanager
def _raised(what: str) -> Iterator[None]:
    yield


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Turn errors after a step is complete into warnings: the step is saved, and training continues."""
    try:
        yield
    except (OSError, CkptConvertError) as error:
        log.warning("%s: %s", what, error_text(error))
