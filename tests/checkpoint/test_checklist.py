from __future__ import annotations

import hashlib
import os
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from ckpt_convert.checkpoint import checklist
from ckpt_convert.errors import CheckpointNotFoundError, CorruptFileError, UnsafeFileError
from ckpt_convert.storage.place import as_place

MD5 = "0804c42ca65584f50234a86d71e6916a"
OTHER_MD5 = "016017be6040da87604f77703b92f2bc"
SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"


def test_a_checklist_of_md5_hashes_is_read_in_its_order() -> None:
    entries = checklist.parse_checklist(f"{MD5}  params.json\n{OTHER_MD5}  consolidated.00.pth\n")

    assert list(entries.items()) == [("params.json", MD5), ("consolidated.00.pth", OTHER_MD5)]
    assert checklist.hash_algorithm(entries) == "md5"


def test_a_checklist_of_sha256_hashes_is_told_by_their_length() -> None:
    assert checklist.hash_algorithm(checklist.parse_checklist(f"{SHA256}  tokenizer.model\n")) == "sha256"


@pytest.mark.parametrize(
    "text",
    [
        f"{MD5} *params.json\n",  # md5sum --binary
        f"{MD5}  ./params.json\n",
        f"{MD5.upper()}  params.json\r\n\r\n",
        f"\n{MD5}  params.json",
        f"{MD5}  params.json\n{MD5}  params.json\n",
    ],
)
def test_other_spellings_of_the_same_list_are_read(text: str) -> None:
    assert checklist.parse_checklist(text) == {"params.json": MD5}


def test_an_empty_checklist_lists_nothing() -> None:
    assert checklist.parse_checklist("") == {}
    assert checklist.hash_algorithm({}) == "md5"


def test_names_with_spaces_and_folders_are_kept() -> None:
    assert list(checklist.parse_checklist(f"{MD5}  a folder/a  file.pth\n")) == ["a folder/a  file.pth"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"{MD5[:-1]}  params.json", "line 1"),
        (f"{MD5}  params.json\nhello", "line 2"),
        (f"{MD5}", "line 1"),
        ("z" * 32 + "  params.json", "line 1"),
        (f"{MD5}  params.json\n{OTHER_MD5}  params.json", "params.json"),
        (f"{MD5}  params.json\n{SHA256}  tokenizer.model", "32, 64"),
    ],
)
def test_what_is_no_checklist_is_refused_and_the_line_named(text: str, named: str) -> None:
    with pytest.raises(CorruptFileError, match=named):
        checklist.parse_checklist(text)


UNSAFE = ["/etc/passwd", "../params.json", "a/../../params.json", "..", ".", "..\\params.json", "C:\\a", "a\x1b[2J"]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_the_directory_are_refused_everywhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError):
        checklist.parse_checklist(f"{MD5}  {name}\n")
    with pytest.raises(UnsafeFileError):
        checklist.check_hashes(as_place(tmp_path), {name: MD5})
    with pytest.raises(UnsafeFileError):
        checklist.render_checklist({name: MD5})
    with pytest.raises(UnsafeFileError):
        checklist.hash_files(as_place(tmp_path), [name])


def test_rendering_gives_metas_lines_back() -> None:
    text = f"{MD5}  params.json\n{OTHER_MD5}  consolidated.00.pth\n"

    assert checklist.render_checklist(checklist.parse_checklist(text)) == text.encode()


@pytest.mark.parametrize("entries", [{"a": "123"}, {"a": MD5, "b": SHA256}, {"a ": MD5}, {"a\nb": MD5}])
def test_what_a_checklist_cannot_hold_is_not_rendered(entries: dict[str, str]) -> None:
    with pytest.raises(CorruptFileError):
        checklist.render_checklist(entries)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "params.json").write_bytes(b'{"dim": 16}')
    (tmp_path / "consolidated.00.pth").write_bytes(bytes(range(256)) * 8192 + b"tail")
    (tmp_path / "empty").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_whole_files_give_no_finding(checkpoint: Path, kind: checklist.Algorithm) -> None:
    names = ["consolidated.00.pth", "params.json", "empty"]
    entries = checklist.hash_files(as_place(checkpoint), names, kind)
    (checkpoint / "checklist.chk").write_bytes(checklist.render_checklist(entries))

    assert entries == {name: hashlib.new(kind, (checkpoint / name).read_bytes()).hexdigest() for name in names}
    assert checklist.check_hashes(as_place(checkpoint)) == []


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_coreutils_reads_what_is_rendered(checkpoint: Path, kind: checklist.Algorithm) -> None:
    entries = checklist.hash_files(as_place(checkpoint), ["consolidated.00.pth", "params.json"], kind)
    (checkpoint / "checklist.chk").write_bytes(checklist.render_checklist(entries))

    subprocess.run([f"{kind}sum", "--check", "--strict", "checklist.chk"], cwd=checkpoint, check=True)


def test_a_flipped_bit_is_found_with_both_hashes(checkpoint: Path) -> None:
    entries = checklist.hash_files(as_place(checkpoint), ["params.json", "consolidated.00.pth"])
    damaged = bytearray((checkpoint / "consolidated.00.pth").read_bytes())
    damaged[-1] ^= 1
    (checkpoint / "consolidated.00.pth").write_bytes(damaged)

    [finding] = checklist.check_hashes(as_place(checkpoint), entries)

    assert finding.file == "consolidated.00.pth"
    assert finding.expected == f"md5 {entries['consolidated.00.pth']}"
    assert finding.found == f"md5 {hashlib.md5(damaged).hexdigest()}"
    assert "consolidated.00.pth: expected md5" in str(finding)


def test_missing_files_and_other_things_under_the_name_are_findings(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "pipe")
    (checkpoint / "folder").mkdir()
    names = ["gone.pth", "params.json/below", "pipe", "folder"]

    findings = checklist.check_hashes(as_place(checkpoint), dict.fromkeys(names, MD5))

    assert [finding.file for finding in findings] == names
    assert [finding.found for finding in findings[:2]] == ["no such file"] * 2
    assert [finding.found for finding in findings[2:]] == ["something that is not a file"] * 2


def test_a_directory_without_a_checklist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"checklist\.chk"):
        checklist.check_hashes(as_place(tmp_path))


def test_a_checklist_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checklist.chk").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(CorruptFileError, match="UTF-8"):
        checklist.check_hashes(as_place(tmp_path))


def test_memory_does_not_grow_with_the_file_and_every_byte_is_reported(tmp_path: Path) -> None:
    size = 64 << 20
    with (tmp_path / "large.pth").open("wb") as file:
        file.truncate(size)
    seen: list[int] = []
    tracemalloc.start()
    try:
        digest = checklist.hash_file(as_place(tmp_path / "large.pth"), "md5", advance=seen.append)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert digest == hashlib.md5(bytes(size)).hexdigest()
    assert sum(seen) == size
    assert peak < 4 << 20
