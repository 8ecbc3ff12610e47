"""Files that are staged on a local disk."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ckpt_convert.errors import NotEnoughSpaceError
from ckpt_convert.storage.folder import Folder

SIZE = 4 << 20


def failing(number: int) -> Callable[..., Any]:
    """A C library whose fallocate fails."""

    class Library:
        @staticmethod
        def fallocate(*_: Any) -> int:
            ctypes.set_errno(number)
            return -1

    return lambda *args, **options: Library


def write_file(path: Path) -> bytes:
    """Write a file of SIZE bytes; returns what is in it then."""
    with Folder.at(path) as folder, folder.file("a.bin", SIZE) as file:
        file.write(SIZE - 3, memoryview(b"end"))
        file.write(0, memoryview(b"begin"))
    return (path / "a.bin").read_bytes()


def test_the_blocks_of_a_large_file_are_reserved_before_it_is_written(tmp_path: Path) -> None:
    with Folder.at(tmp_path) as folder, folder.file("a.bin", SIZE):
        found = (tmp_path / "a.bin").stat()
        assert found.st_size == SIZE
        if found.st_blocks == 0:
            pytest.skip("the file system cannot reserve blocks")
        assert found.st_blocks * 512 >= SIZE


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_is_noticed_before_a_byte_is_written(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", failing(number))
    with pytest.raises(NotEnoughSpaceError, match=r"a\.bin: cannot be made"):
        write_file(tmp_path)
    assert (tmp_path / "a.bin").stat().st_blocks == 0


@pytest.mark.parametrize("library", [failing(errno.EOPNOTSUPP), failing(errno.EINTR), lambda *_, **__: object()])
def test_a_file_is_written_all_the_same_where_blocks_cannot_be_reserved(
    library: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    assert write_file(tmp_path) == b"begin" + bytes(SIZE - 8) + b"end"


@pytest.mark.parametrize("offset", [0, 1, 4096, (1 << 17) - 1, 3 * (1 << 17) + 77])
def test_the_cache_is_written_from_multiple_to_multiple(
    offset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, true = [], os.pwrite

    def pwrite(fd: int, data: memoryview, at: int) -> int:
        writes.append((at, at + len(data)))
        return true(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = random.Random(offset).randbytes(2_500_000)
    with Folder.at(tmp_path) as folder, folder.file("a.bin", 2 * SIZE) as file:
        file.write(offset, memoryview(content))
    assert (tmp_path / "a.bin").read_bytes()[offset : offset + len(content)] == content
    end = offset + len(content)
    cuts = [at for at in range(0, end, 1 << 17) if at > offset]
    assert writes == list(pairwise([offset, *cuts, end]))
