"""Writing runs of bytes of a file through buffers that the system may take to the disk as they are."""

from __future__ import annotations

import contextlib
import itertools
import mmap
from itertools import pairwise
from typing import Any

import numpy as np

from ckpt_convert.storage.system import LARGE, PAGE
from ckpt_convert.storage.workspace import StagedFile

BUFFER = 2 << 20
"""Bytes of a buffer, and of a write: a huge page.

Of pages of 4 KiB a virtio disk takes 254 in a request, of this one all. Measured on ext4, past the page cache, with two
threads: 1.8 GB/s of small pages, 2.4 of huge ones."""

_BUFFERS = 6
"""Buffers that a writer has, one after the other.

The disk of a virtual machine is another core: to write again to memory that this has just read takes up to ten times as
long as to write to other memory."""


class RunWriter:
    """Writes one run of a file after another, each from front to back; not to be shared between threads.

    Past the page cache go only whole pages of a file that are whole pages of memory, so there the bytes are put
    together in a buffer, whose first one begins a page. What a run has of the pages in which it begins and ends is
    written apart.
    """

    def __init__(self) -> None:
        self._buffers = itertools.cycle(_huge_pages(_BUFFERS))
        self._buffer = next(self._buffers)
        self._file: StagedFile | None = None
        self._page = self._start = self._end = 0
        """The offset in the file of the buffer's first byte; where in the buffer there is something to be written."""

    def begin(self, file: StagedFile, offset: int) -> None:
        """Begin a run at an offset of a file; what is left of a run that was not ended is forgotten."""
        self._file = file
        self._start = self._end = offset % PAGE
        self._page = offset - self._start

    def write(self, data: memoryview) -> None:
        """Write the next bytes of the run, or keep them for later."""
        if self._file is not None and not self._file.is_past_cache:
            self._file.write(self._page + self._end, data)
            self._page += len(data)
            return
        left = np.frombuffer(data, np.uint8)
        while len(left):
            size = min(len(left), BUFFER - self._end)
            np.copyto(self._buffer[self._end : self._end + size], left[:size])
            self._end += size
            left = left[size:]
            if self._end == BUFFER:
                self.end()

    def end(self) -> None:
        """Write what was kept."""
        first, last = -(-self._start // PAGE) * PAGE, self._end // PAGE * PAGE
        is_large = last - first >= LARGE
        cuts = [self._start, first, last, self._end] if is_large else [self._start, self._end]
        for start, end in pairwise(cuts):
            if start < end and self._file is not None:
                self._file.write(self._page + start, self._buffer[start:end].data)
        self._page += self._end
        self._start = self._end = 0
        if is_large:
            self._buffer = next(self._buffers)


def _huge_pages(count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Buffers, each of them a huge page where the system has those."""
    memory = mmap.mmap(-1, (count + 1) * BUFFER, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % BUFFER
    return [whole[at : at + BUFFER] for at in range(first, first + count * BUFFER, BUFFER)]
