"""Faults are injected: kill −9 between writes, a full disk, an interrupt, a second writer; nothing half-done stays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert.errors import CorruptFileError, LockedError, NotEnoughSpaceError, OutputExistsError, VerificationError
from ckpt_convert.storage import staging
from ckpt_convert.storage.staging import Staging
from tests.helpers import GOLDEN, edit_json, sums

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
ROOT = Path(__file__).parent.parent.parent

KILLED = """
    import itertools, os, signal, sys
    import ckpt_convert
    from ckpt_convert.convert import execute
    from ckpt_convert.storage.staging import StagedFile
    execute.PIECE = 4096
    execute.BLOCK = 1024
    calls, last, real = itertools.count(), int(sys.argv[3]), StagedFile.write
    def write(self, offset, data):
        if next(calls) == last:
            real(self, offset, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, offset, data)
    StagedFile.write = write
    resume = len(sys.argv) > 4
    report = ckpt_convert.convert(sys.argv[1], sys.argv[2], to="meta", model_parallel=2, workers=2, resume=resume)
    print(report.resumed_bytes)
"""


def run(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    ckpt_convert.convert(HF, tmp_path / "expected", to="meta", model_parallel=2)
    return sums(tmp_path / "expected")


@pytest.mark.parametrize("moment", [0, 3, 57, 211, 400, 560])
def test_kill_then_resume_then_a_plain_run(moment: int, tmp_path: Path, expected: dict[str, str]) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    assert run(KILLED, HF, out, moment).returncode == -signal.SIGKILL
    assert not out.exists()
    assert partial.is_dir()
    kept = tmp_path / "kept"
    shutil.copytree(partial, kept)

    resumed = run(KILLED, HF, out, -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert sums(out) == expected
    assert not partial.exists()
    if moment > 200:
        assert int(resumed.stdout) > 0

    shutil.rmtree(out)
    shutil.copytree(kept, partial)
    ckpt_convert.convert(HF, out, to="meta", model_parallel=2, verify=True)
    assert sums(out) == expected
    assert not partial.exists()


def test_resume_does_not_trust_what_was_damaged_meanwhile(tmp_path: Path, expected: dict[str, str]) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    run(KILLED, HF, out, 500)
    file = partial / "consolidated.00.pth"
    data = bytearray(file.read_bytes())
    data[5000:90000] = bytes(85000)
    file.write_bytes(data)
    resumed = run(KILLED, HF, out, -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert sums(out) == expected


def test_resume_of_another_conversion_starts_anew(tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, GOLDEN / "llama_tied" / "hf", tmp_path / "out", 300)
    report = ckpt_convert.convert(HF, tmp_path / "out", to="meta", model_parallel=2, resume=True)
    assert report.resumed_bytes == 0
    assert sums(tmp_path / "out") == expected


FULL = """
    import resource, sys
    from ckpt_convert.cli import main
    limit = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    main(["hf-to-meta", sys.argv[1], sys.argv[2]])
"""


def test_a_full_disk_is_one_clear_error_and_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    failed = run(FULL, HF, out, 200_000)
    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert "--resume" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not out.exists()
    ckpt_convert.convert(HF, out, to="meta", resume=True, verify=True)
    assert not (tmp_path / ".out.partial").exists()


def test_enospc_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter(range(10_000))

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if next(calls) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(NotEnoughSpaceError, match=r"No space left on device.*--resume"):
        ckpt_convert.convert(HF, tmp_path / "out", to="meta")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_too_little_space_is_noticed_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(NotEnoughSpaceError, match=r"needs [\d,]+ bytes, but the disk has 1 free"):
        ckpt_convert.convert(HF, tmp_path / "out", to="meta")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
    import os, signal, sys
    from ckpt_convert.cli import main
    from ckpt_convert.storage.staging import StagedFile
    real, calls = StagedFile.write, iter(range(1000))
    def write(self, offset, data):
        if next(calls) == 30:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, offset, data)
    StagedFile.write = write
    main(["hf-to-meta", sys.argv[1], sys.argv[2]])
"""


def test_ctrl_c_says_what_is_left_and_exits_130(tmp_path: Path) -> None:
    result = run(INTERRUPTED, HF, tmp_path / "out")
    assert result.returncode == 130, result.stderr
    assert "--resume continues it" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with Staging(tmp_path / "out"), pytest.raises(LockedError, match="another process is writing it"):
        ckpt_convert.convert(HF, tmp_path / "out", to="meta")
    ckpt_convert.convert(HF, tmp_path / "out", to="meta")


def test_what_a_killed_run_left_is_accepted_by_nothing(tmp_path: Path) -> None:
    run(KILLED, HF, tmp_path / "out", 300)
    with pytest.raises(CorruptFileError, match="unfinished output"):
        ckpt_convert.convert(tmp_path / ".out.partial", tmp_path / "other", to="hf")
    with pytest.raises(CorruptFileError, match="unfinished output"):
        ckpt_convert.open_checkpoint(tmp_path / ".out.partial")
    assert not (tmp_path / ".out.partial" / "params.json").exists()  # so Meta's loaders do not take it either


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert(HF, out, to="meta")
    before = sums(out)
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputExistsError):
        ckpt_convert.convert(HF, out, to="native")
    assert sums(out) == before


def test_a_file_is_converted_into_a_folder_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "llama" / "native.safetensors", file)
    ckpt_convert.convert(file, tmp_path / "out", to="hf", config=HF / "config.json", verify=True)
    with pytest.raises(OutputExistsError):
        ckpt_convert.convert(file, tmp_path, to="hf", config=HF / "config.json", overwrite=True)


def test_a_link_to_the_destination_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        ckpt_convert.convert(HF, tmp_path / "out", to="meta", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert (tmp_path / "disk" / "params.json").exists()


def test_an_existing_output_is_only_replaced_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ckpt_convert.convert(HF, out, to="meta")  # an empty directory is no output
    before = sums(out)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        ckpt_convert.convert(HF, out, to="native")
    assert sums(out) == before
    ckpt_convert.convert(HF, out, to="native", overwrite=True)
    assert not list(out.glob("*.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_puts_the_old_output_back_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert(HF, out, to="meta")
    before, real = sums(out), os.rename

    def rename(source: object, target: object) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        ckpt_convert.convert(HF, out, to="native", overwrite=True)
    assert sums(out) == before


@pytest.mark.parametrize("where", [".", "inside", "inside/deeper"])
def test_the_input_is_never_written(where: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    before = sums(source)
    with pytest.raises(OutputExistsError, match="lies inside the source"):
        ckpt_convert.convert(source, source / where, to="meta", overwrite=True)
    with pytest.raises(OutputExistsError, match="holds the source"):
        ckpt_convert.convert(source, tmp_path, to="meta", overwrite=True)
    assert sums(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refused_input_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    edit_json(source / "config.json", num_hidden_layers=4)
    with pytest.raises(ckpt_convert.CkptConvertError):
        ckpt_convert.convert(source, tmp_path / "out", to="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_verify_finds_a_flipped_bit_and_then_nothing_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, query = os.pwrite, 72 * 72 * 4
    flipped = iter([True])

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if len(data) == query and next(flipped, False):
            data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(VerificationError, match=r"q_proj.weight: differs from layers.0.attention.wq.weight at byte"):
        ckpt_convert.convert(HF, tmp_path / "out", to="meta", verify=True, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_file_modes_honour_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        ckpt_convert.convert(HF, tmp_path / "out", to="native")
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_everything_is_flushed_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real_sync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        real_sync(fd)

    def rename(source: Path, target: Path) -> None:
        unsynced = [path for path in Path(source).rglob("*") if path.stat().st_ino not in synced]
        assert unsynced == []
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    ckpt_convert.convert(META, tmp_path / "out", to="hf")
    assert tmp_path.stat().st_ino in synced


def test_without_preadv_fadvise_and_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tmp_path / "expected"
    ckpt_convert.convert(HF, expected, to="meta", model_parallel=2)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(staging, "fcntl", None)
    run(KILLED, HF, tmp_path / "out", 300)
    report = ckpt_convert.convert(HF, tmp_path / "out", to="meta", model_parallel=2, verify=True, resume=True)
    assert report.resumed_bytes > 0
    assert sums(tmp_path / "out") == sums(expected)
