"""Runs of bytes are written where they belong, whatever their offsets and lengths, past the page cache or not."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import numpy as np
import pytest

from ckpt_convert.storage.folder import Folder
from ckpt_convert.storage.system import LARGE, PAGE
from ckpt_convert.tensors import runs
from ckpt_convert.tensors.runs import BUFFER, RunWriter

SIZE = 5 * BUFFER + 12345


@pytest.fixture
def content() -> memoryview:
    return np.random.default_rng(0).integers(0, 255, SIZE, dtype=np.uint8).data


def write(folder: Folder, content: memoryview, cuts: list[int], blocks: int) -> list[bool]:
    """Write the content in runs between the cuts, the last one first, each in blocks; whether each write was direct."""
    direct = []
    true = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        direct.append(_is_direct(fd))
        return true(fd, data, offset)

    writer = RunWriter()
    with pytest.MonkeyPatch.context() as patch, folder.file("file", len(content)) as file:
        patch.setattr(os, "pwrite", pwrite)
        for start, end in reversed([*zip(cuts, [*cuts[1:], len(content)], strict=True)]):
            writer.begin(file, start)
            for at in range(start, end, blocks):
                writer.write(content[at : min(at + blocks, end)])
            writer.end()
        file.sync()
    return direct


def _is_direct(fd: int) -> bool:
    flags = next(
        line.split()[1] for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if "flags" in line
    )
    return bool(int(flags, 8) & os.O_DIRECT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("past_cache", [False, True])
def test_any_runs_make_up_the_file(seed: int, past_cache: bool, content: memoryview, tmp_path: Path) -> None:
    chance = random.Random(seed)
    cuts = sorted({0, PAGE, 3 * PAGE + 1, *(chance.randrange(SIZE) for _ in range(6))})
    with Folder.at(tmp_path) as folder:
        write(folder.past_cache() if past_cache else folder, content, cuts, chance.choice([1 << 20, 999_983]))
    assert (tmp_path / "file").read_bytes() == content


def test_whole_pages_go_past_the_cache_where_that_is_asked_for(content: memoryview, tmp_path: Path) -> None:
    with Folder.at(tmp_path) as folder:
        direct = folder.past_cache()
        with direct.file("other", 0) as file:
            if not file.is_past_cache:
                pytest.skip("the file system of the temporary directory has no such writes")
        whole = write(direct, content, [0], LARGE)
        assert whole == [True] * 5 + [False]  # the rest is too short
        (tmp_path / "file").unlink()
    with Folder.at(tmp_path) as folder:
        assert not any(write(folder, content, [0], LARGE))


def test_large_writes_take_turns_with_huge_pages_and_small_ones_do_not(
    content: memoryview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small, true = [], set(), os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        if len(data) == BUFFER:
            large.append(address)
        else:
            small.add(address // BUFFER)
        return true(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with Folder.at(tmp_path) as folder, folder.past_cache().file("file", 8 * BUFFER + 9 * PAGE) as file:
        if not file.is_past_cache:
            pytest.skip("the file system of the temporary directory has no such writes")
        writer = RunWriter()
        writer.begin(file, 0)
        for _ in range(8):
            writer.write(content[:BUFFER])
        writer.end()
        for number in range(9):
            writer.begin(file, 8 * BUFFER + number * PAGE + 1)
            writer.write(content[:99])
            writer.end()
    assert [address % BUFFER for address in large] == [0] * 8
    assert len(set(large[:6])) == 6
    assert large[6:] == large[:2]
    assert len(small) == 1


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages to ask for"
)
def test_the_buffers_ask_for_huge_pages() -> None:
    for buffer in runs._huge_pages(2):
        buffer[0] = 1
        permissions, flags = _mapping(buffer.ctypes.data)
        assert permissions == "rw-p"  # shared memory has no huge pages
        assert "hg" in flags
        assert buffer.ctypes.data % BUFFER == 0


def _mapping(address: int) -> tuple[str, list[str]]:
    """The permissions of the mapping that an address is in, and its flags, as proc_pid_smaps(5) has them."""
    permissions, is_inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            first, last = (int(word, 16) for word in words[0].split("-"))
            permissions, is_inside = words[1], first <= address < last
        elif words[0] == "VmFlags:" and is_inside:
            return permissions, words[1:]
    raise AssertionError(f"no mapping has {address:#x}")


def test_a_system_that_refuses_such_writes_gets_ordinary_ones(
    content: memoryview, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if _is_direct(fd):
            raise OSError(22, "Invalid argument")
        return true(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with Folder.at(tmp_path) as folder, folder.past_cache().file("file", SIZE) as file:
        writer = RunWriter()
        writer.begin(file, 0)
        writer.write(content)
        writer.end()
    assert (tmp_path / "file").read_bytes() == content
