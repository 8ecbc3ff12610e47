"""Files that are staged on a local disk."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
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
