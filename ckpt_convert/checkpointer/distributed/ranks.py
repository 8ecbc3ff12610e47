"""The processes that make a checkpointer together: what they tell each other, and how all of them learn what failed.

They talk through the store of torch.distributed, never by a collective: a background thread may do that while the
training communicates, and a process that is gone is found by a deadline. The first rank hears all others and answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch.distributed as dist

from ckpt_convert import errors
from ckpt_convert.errors import CkptConvertError, UsageError, error_text
from ckpt_convert.wording import first_few, indented_list

T = TypeVar("T")
P = ParamSpec("P")

DEADLINE = 600.0
"""Seconds after which a rank that says nothing is taken to be gone."""

FAREWELL = 5.0
"""Seconds for which the first rank waits for the others at the end."""

STORE_ERRORS = (RuntimeError, ConnectionError)
"""What torch's stores raise: ``DistError`` and its kinds are RuntimeErrors."""

_OK, _FAILED = b"+", b"-"


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
    ranks = Ranks(store, rank, count, f"{group}/{number}")
    ranks.say_host()
    return ranks


def store_of_group() -> Any:
    """The store that the default group was made with; there is no public way to it."""
    return dist.distributed_c10d._get_default_store()


@dataclass
class Ranks:
    """This process, ``rank`` of ``count``, and the others; every method is called by all of them, in one order.

    ``prefix`` are the keys of the store that are theirs. What is said in it is deleted once it was heard.
    """

    store: Any
    rank: int
    count: int
    prefix: str
    _turn: int = field(default=0, init=False)
    _answered: list[str] = field(default_factory=list, init=False)
    _raised: list[Exception] = field(default_factory=list)
    _root: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that hears the others, and writes what only one may."""
        return self.rank == 0

    def say_host(self) -> None:
        """Let the others name this process's host where it says nothing more."""
        self._call(self.store.set, self._of_rank("host", self.rank), socket.gethostname())

    def channel(self, name: str) -> Ranks:
        """The same ranks, whose turns are counted apart, for another thread."""
        prefix = f"{self.prefix}/{name}"
        return Ranks(self.store, self.rank, self.count, prefix, self._raised, self._root or self.prefix)

    def together(self, what: str, act: Callable[[], T]) -> T:
        """Do something that may take several turns; where it fails on one rank, all raise that, whatever turn it is.

        ``what`` is it in words, for the message of a deadline.
        """
        try:
            result = act()
        except Exception as error:
            if not self._is_known(error):
                failed = error
                self.round(what, lambda: _raise(failed), _nothing)
            raise
        self.round(what, bytes, _nothing)
        return result

    def first(self, what: str, act: Callable[[], bytes | None]) -> bytes:
        """Let the first rank do something, and all of them have its result, or raise its error."""
        return self.round(what, bytes, lambda _: [act() or b""])

    def round(
        self, what: str, mine: Callable[[], bytes], decide: Callable[[Sequence[bytes]], Sequence[bytes]]
    ) -> bytes:
        """Let every rank say something, and the first one ``decide`` what to answer: each, or one answer for all.

        Where one of them fails, or says nothing before the deadline, all raise one error, which names it.
        """
        turn = self._next()
        outcome, error = self._outcome(mine)
        if not self.is_first:
            self._put(f"{turn}/{self.rank}", outcome)
            return self._heard(turn, what, error)
        outcomes = [outcome, *self._others(turn, what)]
        self._forget()
        failed = [one for one in outcomes if one[:1] == _FAILED]
        answers = [_joined(failed)]
        if not failed:
            try:
                answers = [_OK + one for one in decide([one[1:] for one in outcomes])]
            except Exception as raised:
                answers, error = [self._failure(raised)], raised
        self._answer(turn, answers)
        return self._opened(answers[0], error)

    def propose(self, key: str, value: bytes) -> None:
        """Say something that the others may look at, at any time; the first rank to do so is heard."""
        self._call(self.store.compare_set, self._key(key), "", value.decode())

    def proposed(self, key: str) -> bytes | None:
        """What some rank has proposed, None for nothing; nobody is waited for."""
        return self._get(key) if self._has(key) else None

    def leave(self) -> None:
        """Say that this rank takes part in nothing more, so that nobody waits for it until the deadline.

        The first one, whose process may have the store, stays a little until the others have heard its last answer.
        """
        with contextlib.suppress(CkptConvertError):
            self._call(self.store.set, self._of_rank("left", self.rank), b"")
            waiting = _Waiting(FAREWELL if self.is_first else 0)
            while not all(self._has_left(rank) for rank in range(1, self.count)) and waiting.more():
                pass

    def _next(self) -> int:
        self._turn += 1
        return self._turn

    def _outcome(self, act: Callable[[], bytes]) -> tuple[bytes, Exception | None]:
        try:
            return _OK + act(), None
        except Exception as error:
            return self._failure(error), error

    def _failure(self, error: Exception) -> bytes:
        return _failure(type(error).__name__, f"rank {self.rank} on {socket.gethostname()}: {error_text(error)}")

    def _others(self, turn: int, what: str) -> list[bytes]:
        """What the other ranks say in this turn, in their order; in the place of those that say nothing, that."""
        left = {rank: f"{turn}/{rank}" for rank in range(1, self.count)}
        heard: dict[int, bytes] = {}
        waiting = _Waiting(DEADLINE)
        while left:
            # Looked at first: the last that one says still counts.
            gone = {rank for rank in left if self._has_left(rank)}
            there = [rank for rank, key in left.items() if self._has(key)]
            for rank in there:
                heard[rank] = self._take(left.pop(rank))
            if absent := sorted(gone & left.keys()):
                return [self._absence(absent, what)]
            if left and not there and not waiting.more():
                return [self._silence(sorted(left), what, DEADLINE)]
        return [heard[rank] for rank in sorted(heard)]

    def _heard(self, turn: int, what: str, cause: Exception | None = None) -> bytes:
        """What the first rank answers."""
        waiting = _Waiting(2 * DEADLINE)  # it waits itself for those that say nothing
        while True:
            gone = self._has_left(0)
            for key in (f"{turn}/answer", f"{turn}/answer/{self.rank}"):
                if self._has(key):
                    return self._opened(self._get(key), cause)
            if gone:
                return self._opened(self._absence([0], what), cause)
            if not waiting.more():
                return self._opened(self._silence([0], what, 2 * DEADLINE), cause)

    def _silence(self, ranks: Sequence[int], what: str, seconds: float) -> bytes:
        return _failure(
            CkptConvertError.__name__,
            f"{self._named(ranks)}: took no part in {what} within {seconds:g} s; every process makes the same "
            "calls of the checkpointer, so it has ended, or it waits elsewhere",
        )

    def _absence(self, ranks: Sequence[int], what: str) -> bytes:
        text = f"{self._named(ranks)}: took no part in {what}: its checkpointer is closed, most likely after an error"
        return _failure(CkptConvertError.__name__, text)

    def _named(self, ranks: Sequence[int]) -> str:
        """Ranks as messages name them: with their hosts, as far as they have said them."""
        return f"rank {first_few([f'{rank}{self._on_host(rank)}' for rank in ranks[:9]], 8, ' and others')}"

    def _on_host(self, rank: int) -> str:
        key = self._of_rank("host", rank)
        return f" on {self._call(self.store.get, key).decode()}" if self._call(self.store.check, [key]) else ""

    def _opened(self, outcome: bytes, cause: Exception | None = None) -> bytes:
        """What was said; raises it where it is an error."""
        if outcome[:1] == _OK:
            return outcome[1:]
        kind, text = json.loads(outcome[1:])
        made = getattr(errors, kind, CkptConvertError)
        simple = issubclass(made, CkptConvertError) and made is not errors.LossyConversionError
        raised = (made if simple else CkptConvertError)(text)
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
            self._call(self.store.delete_key, self._key(key))
        self._answered.clear()

    def _call(self, act: Callable[..., Any], *given: Any) -> Any:
        try:
            return act(*given)
        except STORE_ERRORS as error:
            raise CkptConvertError(
                f"rank {self.rank}: the store of torch.distributed does not answer ({error}); the process that has it, "
                "most often rank 0's or torchrun's, has ended"
            ) from error

    def _has_left(self, rank: int) -> bool:
        return bool(self._call(self.store.check, [self._of_rank("left", rank)]))

    def _of_rank(self, what: str, rank: int) -> str:
        """The key of what a rank says once, whatever turn it is, and for all channels."""
        return f"{self._root or self.prefix}/{what}/{rank}"

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}"

    def _has(self, key: str) -> bool:
        return bool(self._call(self.store.check, [self._key(key)]))

    def _get(self, key: str) -> bytes:
        value = self._call(self.store.get, self._key(key))
        return value if isinstance(value, bytes) else value.encode()

    def _put(self, key: str, value: bytes) -> None:
        self._call(self.store.set, self._key(key), value)

    def _take(self, key: str) -> bytes:
        value = self._get(key)
        self._call(self.store.delete_key, self._key(key))
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


class _Waiting:
    """Looks again and again, for so many seconds: a wait in the store itself would keep the training from using it."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._pause = 0.0005

    def more(self) -> bool:
        """Wait a little; False where the time is over."""
        if time.monotonic() > self._until:
            return False
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, 0.05)
        return True


def packed(content: Any) -> bytes:
    """JSON-ready values as ranks send them."""
    return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)


def unpacked(data: bytes) -> Any:
    """What ``packed`` was given."""
    return json.loads(zlib.decompress(data))


def _failure(kind: str, text: str) -> bytes:
    return _FAILED + json.dumps([kind, text]).encode()


def _joined(failed: Sequence[bytes]) -> bytes:
    """Several failures as one, of the first one's kind."""
    said = [json.loads(one[1:]) for one in failed]
    texts = [text for _, text in said]
    return _failure(said[0][0], texts[0] if len(texts) == 1 else indented_list(texts).lstrip()) if said else b""


def _raise(error: Exception) -> bytes:
    raise error


def _nothing(_: Sequence[bytes]) -> list[bytes]:
    return [b""]
