"""The processes that make a checkpointer together: what they tell each other, and how all of them learn what failed.

They talk through the store of torch.distributed, never by a collective: a background thread may do that while the
training communicates, and a process that is gone is found (heartbeat.py). The first rank hears all others and answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch.distributed as dist

from ckpt_convert import errors
from ckpt_convert.checkpointer.distributed import heartbeat
from ckpt_convert.checkpointer.distributed.heartbeat import Beat, Vigil, read_beat
from ckpt_convert.checkpointer.distributed.outcomes import FAILED, OK, failure, joined
from ckpt_convert.checkpointer.distributed.speaking import Line, say_for, speaking
from ckpt_convert.errors import CkptConvertError, UsageError, error_text
from ckpt_convert.wording import first_few

T = TypeVar("T")
P = ParamSpec("P")

log = logging.getLogger("ckpt_convert")

DEADLINE = 600.0
"""Seconds for which a rank that is alive, and takes no part, is waited for."""

FAREWELL = 5.0
"""Seconds for which the first rank waits for the others at the end."""


def of_group(process_group: Any) -> Ranks | None:
    """The ranks of a process group, or of the default one (None), where there are several; None for a single process.

    Raises UsageError for what is no group, and for one that this process is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise UsageError("process_group: torch.distributed is not initialized")
        return None
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise UsageError(f'process_group={process_group!r}: expected a group, None for the default one, or "rank0"')
    rank, count = dist.get_rank(process_group), dist.get_world_size(process_group)
    if rank < 0:
        raise UsageError("process_group: this process is not in it; make the checkpointer on those that are")
    if count == 1:
        return None
    store = store_of_group()
    members = ",".join(map(str, dist.get_process_group_ranks(process_group)))
    group = f"ckpt_convert/ranks/{hashlib.sha256(members.encode()).hexdigest()[:16]}"
    number = store.add(f"{group}/made_by/{rank}", 1)  # the same on all of them, which make the same checkpointers
    prefix = f"{group}/{number}"
    line = heartbeat.Line(store, f"{prefix}/alive/{rank}")
    line.call("set", f"{prefix}/host/{rank}", socket.gethostname())
    return Ranks(line, rank, count, prefix, process_group=process_group)


def store_of_group() -> Any:
    """The store that the default group was made with; there is no public way to it."""
    return dist.distributed_c10d._get_default_store()


@dataclass
class Ranks:
    """This process, ``rank`` of ``count``, and the others; every method is called by all of them, in one order.

    The keys of the store that are theirs begin with ``root``. What is said in them is deleted once it was heard.
    ``name`` is that of the channel, "" for the first one.
    """

    line: heartbeat.Line
    rank: int
    count: int
    root: str
    name: str = ""
    _raised: list[Exception] = field(default_factory=list)
    process_group: Any = None
    """The group of torch.distributed that they are; None for the default one."""
    _turn: int = field(default=0, init=False)
    _answered: list[str] = field(default_factory=list, init=False)
    _calls: list[str] = field(default_factory=list, init=False)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that hears the others, and writes what only one may."""
        return self.rank == 0

    def channel(self, name: str) -> Ranks:
        """The same ranks, whose turns are counted apart, for another thread."""
        return Ranks(self.line, self.rank, self.count, self.root, name, self._raised, self.process_group)

    def together(self, what: str, act: Callable[[], T]) -> T:
        """Do something that may take several turns; where it fails on one rank, all raise that, whatever turn it is.

        ``what`` is it in words, for messages. What only other ranks warn of is logged by the first one at the end.
        """
        kept: list[Line] = []
        with self.at_work():
            self._calls.append(what)
            try:
                with speaking(self.rank, kept):
                    result = act()
            except Exception as error:
                if not self._is_known(error):
                    failed = error
                    self.round("", lambda: _raise(failed), _nothing)
                raise
            else:
                self.round("", lambda: packed(kept) if kept else b"", lambda heard: _speak_for(kept, heard))
            finally:
                self._calls.pop()
        return result

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the others wait for this rank in the block, however long it takes until it comes to its next turn."""
        inside = self.line.heart.inside
        inside[self.name] = inside.get(self.name, 0) + 1
        try:
            yield
        finally:
            inside[self.name] -= 1

    def call_around(self, what: str) -> str:
        """The call of all ranks in which something is done, where it is in one: the same in all of its turns."""
        return self._calls[0] if self._calls else what

    def first(self, what: str, act: Callable[[], bytes | None]) -> bytes:
        """Let the first rank do something, and all of them have its result, or raise its error."""
        return self.round(what, bytes, lambda _: [act() or b""])

    def round(
        self, what: str, mine: Callable[[], bytes], decide: Callable[[Sequence[bytes]], Sequence[bytes]]
    ) -> bytes:
        """Let every rank say something, and the first one ``decide`` what to answer: each, or one answer for all.

        Where one of them fails, is gone, or takes no part before the deadline, all raise one error, which names it.
        """
        turn, what = self._next(), " in ".join(filter(None, [what, *reversed(self._calls)]))
        outcome, error = self._outcome(mine)
        if not self.is_first:
            self._put(f"{turn}/{self.rank}", outcome)
            return self._heard(turn, what, error)
        others, lost = self._others(turn, what)
        outcomes = [outcome, *others]
        self._forget()
        failed = [*lost, *(one for one in outcomes if one[:1] == FAILED)]
        answers = [joined(failed, self.count)]
        if not failed:
            try:
                answers = [OK + one for one in decide([one[1:] for one in outcomes])]
            except Exception as raised:
                answers, error = [self._failure(raised)], raised
        self._answer(turn, answers)
        return self._opened(answers[0], error)

    def propose(self, key: str, value: bytes) -> None:
        """Say something that the others may look at, at any time; the first rank to do so is heard."""
        self.line.call("compare_set", self._key(key), "", value.decode())

    def proposed(self, key: str) -> bytes | None:
        """What some rank has proposed, None for nothing; nobody is waited for."""
        return self._get(key) if self._has(key) else None

    def count_in(self, key: str, number: int = 1) -> int:
        """Count this rank among those that say something; the number of all that have. 0: only ask."""
        return int(self.line.call("add", self._key(key), number))

    def watch(self, key: str) -> None:
        """Let the thread that beats look whether somebody has proposed something."""
        self.line.heart.watched.add(self._key(key))

    def has_seen(self, key: str) -> bool:
        """Whether it has seen that, some seconds ago; nobody is asked."""
        return self._key(key) in self.line.heart.seen

    def leave(self) -> None:
        """Say that this rank takes part in nothing more, so that nobody waits for it until the deadline.

        The first one, whose process may have the store, stays a little until the others have heard its last answer.
        """
        with contextlib.suppress(CkptConvertError):
            self.line.call("set", self._of_rank("left", self.rank), b"")
            self.line.call("set", self._left_by_any, b"")
            pause, until = _Pause(), time.monotonic() + (FAREWELL if self.is_first else 0)
            while not all(self._has_left(rank) for rank in range(1, self.count)) and time.monotonic() < until:
                pause()
        self.line.close()

    def _next(self) -> int:
        self._turn += 1
        self.line.heart.turns[self.name] = self._turn
        return self._turn

    def _outcome(self, act: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
        try:
            return OK + act(), None
        except Exception as error:
            return self._failure(error), error

    def _failure(self, error: Exception) -> bytes:
        who = "" if self._is_known(error) else f"rank {self.rank} on {socket.gethostname()}"
        return failure(type(error).__name__, who, error_text(error))

    def _others(self, turn: int, what: str) -> tuple[list[bytes], list[bytes]]:
        """What the other ranks say in this turn, in their order; and that some say nothing, as a failure."""
        left = list(range(1, self.count))
        heard: list[bytes] = []
        wait = _Wait(self, turn, what)
        while left:
            # Looked at first: the last that one says still counts.
            closed = self._has_any_left()
            if self._has(f"{turn}/{left[0]}"):
                heard.append(self._take(f"{turn}/{left.pop(0)}"))
                wait.pause.restart()
                continue
            missing = [rank for rank in left if not self._has(f"{turn}/{rank}")] if closed or wait.vigil.is_due else []
            absent = [rank for rank in missing if closed and self._has_left(rank)]
            if missing and (lost := self._absence(absent, what) if absent else wait.lost(missing)):
                return heard, [lost]
            wait.pause()
        return heard, []

    def _heard(self, turn: int, what: str, cause: Exception | None = None) -> bytes:
        """What the first rank answers."""
        wait = _Wait(self, turn, what)
        while True:
            gone = self._has_left(0)
            for key in (f"{turn}/answer", f"{turn}/answer/{self.rank}"):
                if self._has(key):
                    return self._opened(self._get(key), cause)
            if lost := self._absence([0], what) if gone else wait.lost([0]):
                return self._opened(lost, cause)
            wait.pause()

    def _absence(self, ranks: Sequence[int], what: str) -> bytes:
        text = f"took no part in {what}: its checkpointer is closed, most likely after an error"
        return failure(CkptConvertError.__name__, self.named(ranks), text)

    def named(self, ranks: Sequence[int]) -> str:
        """Ranks as messages name them: with their hosts, as far as they have said them."""
        return f"rank {first_few([f'{rank}{self._on_host(rank)}' for rank in ranks[:9]], 8, ' and others')}"

    def _on_host(self, rank: int) -> str:
        key = self._of_rank("host", rank)
        return f" on {self.line.call('get', key).decode()}" if self.line.call("check", [key]) else ""

    def beat_of(self, rank: int) -> Beat | None:
        """What a rank has said of itself last; None for one that makes no checkpointer."""
        key = self._of_rank("alive", rank)
        return read_beat(self.line.call("get", key)) if self.line.call("check", [key]) else None

    def _opened(self, outcome: bytes, cause: Exception | None = None) -> bytes:
        """What was said; raises it where it is an error."""
        if outcome[:1] == OK:
            return outcome[1:]
        kind, who, text = json.loads(outcome[1:])
        made = getattr(errors, kind, CkptConvertError)
        simple = issubclass(made, CkptConvertError) and made is not errors.LossyConversionError
        raised = (made if simple else CkptConvertError)(f"{who}: {text}" if who else text)
        self._raised.append(raised)
        raise raised from cause

    def _is_known(self, error: BaseException | None) -> bool:
        """Whether an error is, or follows from, one that all ranks have raised."""
        while error is not None:
            if any(error is one for one in self._raised):
                return True
            error = error.__cause__ or error.__context__
        return False

    def _answer(self, turn: int, answers: Sequence[bytes]) -> None:
        """Answer all with one, or each with its own."""
        for rank, answer in enumerate(answers):
            key = f"{turn}/answer" if len(answers) == 1 else f"{turn}/answer/{rank}"
            self._put(key, answer)
            self._answered.append(key)

    def _forget(self) -> None:
        """Delete what was answered in turns before: whoever takes part in this one has heard it."""
        for key in self._answered:
            self.line.call("delete_key", self._key(key))
        self._answered.clear()

    def _has_left(self, rank: int) -> bool:
        return bool(self.line.call("check", [self._of_rank("left", rank)]))

    @property
    def _left_by_any(self) -> str:
        return f"{self.root}/left"

    def _has_any_left(self) -> bool:
        """Whether some rank has: one question, where there may be a thousand ranks."""
        return bool(self.line.call("check", [self._left_by_any]))

    def _of_rank(self, what: str, rank: int) -> str:
        """The key of what a rank says once, whatever turn it is, and for all channels."""
        return f"{self.root}/{what}/{rank}"

    def _key(self, key: str) -> str:
        return f"{self.root}/{self.name}/{key}"

    def _has(self, key: str) -> bool:
        return bool(self.line.call("check", [self._key(key)]))

    def _get(self, key: str) -> bytes:
        value = self.line.call("get", self._key(key))
        return value if isinstance(value, bytes) else value.encode()

    def _put(self, key: str, value: bytes) -> None:
        self.line.call("set", self._key(key), value)

    def _take(self, key: str) -> bytes:
        value = self._get(key)
        self.line.call("delete_key", self._key(key))
        return value


class _OfRanks(Protocol):
    """An object that is made on every rank."""

    _ranks: Ranks | None


Self_ = TypeVar("Self_", bound=_OfRanks)


def on_all_ranks(method: Callable[Concatenate[Self_, P], T]) -> Callable[Concatenate[Self_, P], T]:
    """Let what fails on one rank in a method that all of them call be raised on all."""

    @wraps(method)
    def call(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self._ranks is None:
            return method(self, *args, **kwargs)
        return self._ranks.together(f"{method.__name__}()", lambda: method(self, *args, **kwargs))

    return call


def first_speaks(method: Callable[Concatenate[Self_, P], T]) -> Callable[Concatenate[Self_, P], T]:
    """Let the first rank alone log in a method in which all ranks do the same."""

    @wraps(method)
    def call(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with speaking(rank_of(self._ranks)):
            return method(self, *args, **kwargs)

    return call


def rank_of(ranks: Ranks | None) -> int | None:
    """The number of this one of several ranks; None for a single process."""
    return None if ranks is None else ranks.rank


class _Pause:
    """Waits a little, at each call longer: a wait in the store itself would never see that somebody is gone."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._seconds = 0.0005

    def __call__(self) -> None:
        time.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, 0.05)


class _Wait:
    """The wait for other ranks in one turn: as long as they live and take part, or for DEADLINE seconds."""

    def __init__(self, ranks: Ranks, turn: int, what: str) -> None:
        self._ranks, self._what = ranks, what
        self.vigil = Vigil(ranks.name, turn, ranks.line.gone)
        self.pause = _Pause()

    def lost(self, missing: Sequence[int]) -> bytes | None:
        """Look at those that are waited for, if it is time; what is wrong with them, as a failure."""
        vigil = self.vigil
        if not vigil.is_due:
            return None
        vigil.look({rank: self._ranks.beat_of(rank) for rank in missing})
        if gone := vigil.silent:
            return self._failure(
                gone,
                f"has not been heard of for {heartbeat.SILENCE:g} s, while the others waited for it in "
                f"{self._ranks.call_around(self._what)}; its process has ended or is stopped, or its machine cannot be "
                "reached",
            )
        if absent := vigil.away(DEADLINE):
            return self._failure(
                absent,
                f"took no part in {self._what} within {DEADLINE:g} s; every process makes the same calls of the "
                "checkpointer, so it waits elsewhere, or makes no checkpointer",
            )
        if self._ranks.is_first and vigil.waits_long():
            self._report(missing)
        return None

    def _failure(self, ranks: Sequence[int], text: str) -> bytes:
        return failure(CkptConvertError.__name__, self._ranks.named(ranks), text)

    def _report(self, missing: Sequence[int]) -> None:
        away = self.vigil.away()
        level, state = (logging.WARNING, "has not come to it yet") if away else (logging.INFO, "is at work on it")
        text = "%s: has waited %.0f s so far for %s, which %s"
        log.log(level, text, self._what, self.vigil.waited, self._ranks.named(away or missing), state)


def packed(content: Any) -> bytes:
    """JSON-ready values as ranks send them."""
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)


def unpacked(data: bytes) -> Any:
    """What ``packed`` was given."""
    return json.loads(zlib.decompress(data))


def _raise(error: Exception) -> bytes:
    raise error


def _speak_for(said: Sequence[Line], heard: Sequence[bytes]) -> list[bytes]:
    """Log the warnings of other ranks, in the first one, which has ``said`` its own."""
    say_for({rank: [(level, text) for level, text in unpacked(one)] for rank, one in enumerate(heard) if one}, said)
    return [b""]


def _nothing(_: Sequence[bytes]) -> list[bytes]:
    return [b""]
