"""One checkpointer for one directory where each process of a run writes alone (``process_group="rank0"``).

Processes tell each other through the store of torch.distributed, never by a collective: a checkpointer may be made on
one process alone, and the others must not have to wait for it.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch.distributed as dist

from ckpt_convert.checkpointer.distributed.heartbeat import STORE_ERRORS
from ckpt_convert.checkpointer.distributed.ranks import store_of_group
from ckpt_convert.errors import UsageError


class Claim:
    """The one process that may write into a directory; of a run of one process nothing is asked."""

    def __init__(self, directory: object, identity: str) -> None:
        """Claim a directory, which ``identity`` tells from others; raises UsageError where another process has."""
        self._directory = directory
        self._store = _store()
        if self._store is None:
            return
        self._key = f"ckpt_convert/{hashlib.sha256(identity.encode()).hexdigest()}"
        self._refused = f"{self._key}/refused"
        self._rank = str(dist.get_rank())
        holder = _text(self._store.compare_set(self._key, "", self._rank))
        if holder != self._rank:
            self._store.set(self._refused, self._rank)
            raise UsageError(self._message(holder, self._rank))

    def trouble(self) -> str | None:
        """That another process was refused since, of which this one learns here; None where all is well."""
        if self._store is None:
            return None
        with contextlib.suppress(*STORE_ERRORS):
            if self._store.check([self._refused]):
                return self._message(self._rank, _text(self._store.get(self._refused)))
        return None

    def release(self) -> None:
        """Let another process have the directory."""
        store, self._store = self._store, None
        if store is not None:
            with contextlib.suppress(*STORE_ERRORS):
                store.delete_key(self._refused)
                store.delete_key(self._key)

    def _message(self, holder: str, other: str) -> str:
        return (
            f"{self._directory}: process {holder} and process {other} each made a checkpointer for this output_dir, "
            'and would write the same directories alone (process_group="rank0"); leave process_group out, so that all '
            "save together, make it on one process (if torch.distributed.get_rank() == 0), and without output_dir on "
            "those that only load, or give each process an output_dir of its own"
        )


def _store() -> Any:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return store_of_group()


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
