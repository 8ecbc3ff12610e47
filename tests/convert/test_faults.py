"""Faults are injected: kill −9 between writes, a full disk, an interrupt, a second writer; nothing half-done stays."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import xxhash

import ckpt_convert
from ckpt_convert.convert import ownership, partition
from ckpt_convert.errors import (
    CorruptFileError,
    LockedError,
    NotEnoughSpaceError,
    OutputExistsError,
    UnwritableError,
    VerificationError,
)
from ckpt_convert.storage import lock, staging
from ckpt_convert.storage.staging import Staging
from tests.helpers import GOLDEN, crc64, edit_json, sums

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
ROOT = Path(__file__).parent.parent.parent

KILLED = """
    import itertools, os, signal, sys
    import ckpt_convert
    from ckpt_convert.convert import partition
    from ckpt_convert.tensors import blocks
    from ckpt_convert.storage.folder import StagedFile
    partition.PIECE = 4096
    blocks.BLOCK = 1024
    calls, last, real = itertools.count(), int(sys.argv[3]), StagedFile.write
    def write(self, offset, data):
        if next(calls) == last:
            real(self, offset, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, offset, data)
    StagedFile.write = write
    resume = len(sys.argv) > 4
    report = ckpt_convert.convert_checkpoint(sys.argv[1], sys.argv[2], to="meta", model_parallel=2, workers=2,
                                             resume=resume)
    print(report.resumed_bytes)
"""


def run(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "expected", to="meta", model_parallel=2)
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
    ckpt_convert.convert_checkpoint(HF, out, to="meta", model_parallel=2, verify=True)
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
    report = ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", model_parallel=2, resume=True)
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
    ckpt_convert.convert_checkpoint(HF, out, to="meta", resume=True, verify=True)
    assert not (tmp_path / ".out.partial").exists()


def test_enospc_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter(range(10_000))

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if next(calls) == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(NotEnoughSpaceError, match=r"No space left on device.*`resume=True`"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


def test_too_little_space_is_noticed_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(NotEnoughSpaceError, match=r"needs [\d,]+ bytes, but the disk has 1 free"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
    import os, signal, sys
    from ckpt_convert.cli import main
    from ckpt_convert.storage.folder import StagedFile
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may have it ignored
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
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")


def test_what_a_killed_run_left_is_accepted_by_nothing(tmp_path: Path) -> None:
    run(KILLED, HF, tmp_path / "out", 300)
    with pytest.raises(CorruptFileError, match="unfinished output"):
        ckpt_convert.convert_checkpoint(tmp_path / ".out.partial", tmp_path / "other", to="hf")
    with pytest.raises(CorruptFileError, match="unfinished output"):
        ckpt_convert.open_checkpoint(tmp_path / ".out.partial")
    assert not (tmp_path / ".out.partial" / "params.json").exists()  # so Meta's loaders do not take it either


def test_a_run_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(HF, out, to="meta")
    before = sums(out)
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(OutputExistsError):
        ckpt_convert.convert_checkpoint(HF, out, to="native")
    assert sums(out) == before


def test_a_file_is_converted_into_a_folder_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "llama" / "native.safetensors", file)
    ckpt_convert.convert_checkpoint(file, tmp_path / "out", to="hf", config=HF / "config.json", verify=True)
    with pytest.raises(OutputExistsError):
        ckpt_convert.convert_checkpoint(file, tmp_path, to="hf", config=HF / "config.json", overwrite=True)


def test_a_link_to_the_destination_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    for _ in range(2):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert (tmp_path / "disk" / "params.json").exists()


def test_an_existing_output_is_only_replaced_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ckpt_convert.convert_checkpoint(HF, out, to="meta")  # an empty directory is no output
    before = sums(out)
    with pytest.raises(OutputExistsError, match="`overwrite=True`"):
        ckpt_convert.convert_checkpoint(HF, out, to="native")
    assert sums(out) == before
    ckpt_convert.convert_checkpoint(HF, out, to="native", overwrite=True)
    assert not list(out.glob("*.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_puts_the_old_output_back_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(HF, out, to="meta")
    before, real = sums(out), os.rename

    def rename(source: object, target: object) -> None:
        if str(source).endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(UnwritableError, match=r"out: cannot be replaced: Input/output error.*`resume=True`"):
        ckpt_convert.convert_checkpoint(HF, out, to="native", overwrite=True)
    assert sums(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]


@pytest.mark.parametrize("where", [".", "inside", "inside/deeper"])
def test_the_input_is_never_written(where: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    before = sums(source)
    with pytest.raises(OutputExistsError, match="is inside the source"):
        ckpt_convert.convert_checkpoint(source, source / where, to="meta", overwrite=True)
    with pytest.raises(OutputExistsError, match="contains the source"):
        ckpt_convert.convert_checkpoint(source, tmp_path, to="meta", overwrite=True)
    assert sums(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_refused_input_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    edit_json(source / "config.json", num_hidden_layers=4)
    with pytest.raises(ckpt_convert.CkptConvertError):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta")
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
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", verify=True, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_file_modes_honour_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native")
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
    ckpt_convert.convert_checkpoint(META, tmp_path / "out", to="hf")
    assert tmp_path.stat().st_ino in synced


def test_without_preadv_fadvise_and_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tmp_path / "expected"
    ckpt_convert.convert_checkpoint(HF, expected, to="meta", model_parallel=2)
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.setattr(lock, "fcntl", None)
    run(KILLED, HF, tmp_path / "out", 300)
    report = ckpt_convert.convert_checkpoint(
        HF, tmp_path / "out", to="meta", model_parallel=2, verify=True, resume=True
    )
    assert report.resumed_bytes > 0
    assert sums(tmp_path / "out") == sums(expected)


def test_resume_after_a_line_of_the_journal_was_cut(tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, HF, tmp_path / "out", 400)
    journal = tmp_path / ".out.partial" / ".ckpt-convert-journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    resumed = run(KILLED, HF, tmp_path / "out", -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) > 0
    assert sums(tmp_path / "out") == expected


@pytest.mark.parametrize("resume", [False, True])
def test_nothing_of_another_conversion_stays(resume: bool, tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, GOLDEN / "llama_tied" / "hf", tmp_path / "out", 300)
    (tmp_path / ".out.partial" / "model-00009-of-00009.safetensors").write_bytes(b"stale")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", model_parallel=2, resume=resume)
    assert sums(tmp_path / "out") == expected


def test_a_partial_directory_that_goes_away_while_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, first = lock.fcntl.flock, iter([True])

    def flock(fd: int, operation: int) -> None:
        if next(first, False):
            (tmp_path / ".out.partial").rmdir()  # as the holder before us does when it is done
        real(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_that_leads_nowhere_is_no_destination(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputExistsError, match="leads nowhere"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_resume_after_the_source_changed_starts_anew(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    run(KILLED, source, tmp_path / "out", 560)
    file = source / "model-00001-of-00004.safetensors"
    stat = file.stat()
    with file.open("r+b") as handle:  # other values, as many bytes
        handle.seek(-8, os.SEEK_END)
        handle.write(bytes(8))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    resumed = run(KILLED, source, tmp_path / "out", -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    assert int(resumed.stdout) == 0
    ckpt_convert.convert_checkpoint(source, tmp_path / "plain", to="meta", model_parallel=2)
    assert sums(tmp_path / "out") == sums(tmp_path / "plain")


def test_progress_of_a_resumed_conversion_reaches_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "PIECE", 4096)
    run(KILLED, HF, tmp_path / "out", 400)
    seen: list[ckpt_convert.TransferProgress] = []
    report = ckpt_convert.convert_checkpoint(
        HF, tmp_path / "out", to="meta", model_parallel=2, resume=True, progress=seen.append
    )
    assert report.resumed_bytes > 0
    assert seen[-1].done == seen[-1].total


def test_what_an_earlier_overwrite_left_aside_is_no_hindrance(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")  # a run was killed while it removed the old output
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="native", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*.pth"))


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "expected", to="meta", model_parallel=2)
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: read(fd, [buffers[0][:1000]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:1000], offset))
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", model_parallel=2)
    assert sums(tmp_path / "out") == sums(tmp_path / "expected")


def test_resume_on_the_command_line(tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, HF, tmp_path / "out", 560)
    code = """
        import sys
        from ckpt_convert.cli import main
        from ckpt_convert.convert import ownership, partition
        partition.PIECE = 4096
        main(["hf-to-meta", sys.argv[1], sys.argv[2], "--model-parallel", "2", "--resume"])
    """
    done = run(code, HF, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "resumed: " in done.stdout
    assert sums(tmp_path / "out") == expected


def test_resume_twice(tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, HF, tmp_path / "out", 400)
    assert run(KILLED, HF, tmp_path / "out", 60, "resume").returncode == -signal.SIGKILL
    resumed = run(KILLED, HF, tmp_path / "out", -1, "resume")
    assert int(resumed.stdout) > 0
    assert sums(tmp_path / "out") == expected


def test_a_longer_file_of_an_earlier_attempt_leaves_no_tail(tmp_path: Path, expected: dict[str, str]) -> None:
    run(KILLED, HF, tmp_path / "out", 400)
    (tmp_path / ".out.partial" / "params.json").write_bytes(b" " * 10_000)
    resumed = run(KILLED, HF, tmp_path / "out", -1, "resume")
    assert int(resumed.stdout) > 0
    assert sums(tmp_path / "out") == expected


def test_the_manifest_has_the_checksums_of_the_pieces(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", model_parallel=2)
    manifest = json.loads((tmp_path / "out" / "ckpt_convert" / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (file["size"], len(file["pieces"])) == (len(data), 30)
        for key, offset, nbytes, checksum in file["pieces"]:
            assert crc64(data[offset : offset + nbytes]) == checksum, key
        starts = [*(offset for _, offset, _, _ in file["pieces"]), len(data)]
        ends = [0, *(offset + nbytes for _, offset, nbytes, _ in file["pieces"])]
        header = b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))
        assert crc64(header) == file["header"]
    for entry in manifest["side_files"]:
        assert xxhash.xxh3_64_hexdigest((tmp_path / "out" / entry["name"]).read_bytes()) == entry["checksum"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_being_full(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: bytes, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(NotEnoughSpaceError, match="`resume=True`"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")


def test_resume_only_needs_room_for_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(KILLED, HF, tmp_path / "out", 560)
    needed = ckpt_convert.plan_conversion(HF, to="meta", model_parallel=2).disk
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, needed // 2))
    with pytest.raises(NotEnoughSpaceError):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "other", to="meta", model_parallel=2)
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta", model_parallel=2, resume=True, verify=True)


def test_resume_does_not_mix_models_whose_files_are_of_one_size_and_time(tmp_path: Path) -> None:
    for name in ("p", "q"):
        shutil.copytree(HF, tmp_path / name)
    file = tmp_path / "q" / "model-00001-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    file.write_bytes(data)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    run(KILLED, tmp_path / "p", tmp_path / "out", 560)
    resumed = run(KILLED, tmp_path / "q", tmp_path / "out", -1, "resume")
    assert resumed.returncode == 0, resumed.stderr
    ckpt_convert.convert_checkpoint(tmp_path / "q", tmp_path / "plain", to="meta", model_parallel=2)
    assert sums(tmp_path / "out") == sums(tmp_path / "plain")


def test_resume_forgets_side_files_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    shutil.copytree(HF, source)
    (source / "README.md").write_text("old")
    monkeypatch.setattr(Staging, "commit", lambda self: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native")
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert (tmp_path / ".out.partial" / "README.md").exists()
    (source / "README.md").unlink()
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="native", resume=True)
    assert "README.md" not in sums(tmp_path / "out")


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
def test_a_source_with_the_name_of_a_place_of_ours(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copytree(HF, source)
    before = sums(source)
    with pytest.raises(OutputExistsError, match="rename it"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", overwrite=True)
    assert sums(source) == before


def test_overwrite_does_not_remove_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("years")
    with pytest.raises(OutputExistsError, match="holds no checkpoint"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "thesis", to="meta", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "years"


def test_a_link_in_the_place_of_the_partial_directory_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "precious").touch()
    (tmp_path / ".out.partial").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputExistsError, match="is in the way"):
        ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    assert (tmp_path / "victim" / "precious").exists()


def test_what_is_left_aside_is_removed_by_the_next_run_whatever_becomes_of_it(tmp_path: Path) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.replaced")
    with Staging(tmp_path / "out", ownership.RULES, overwrite=True):
        assert not (tmp_path / ".out.replaced").exists()


def test_few_files_are_open_at_a_time(tmp_path: Path) -> None:
    code = """
        import resource, sys
        import ckpt_convert
        resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
        ckpt_convert.convert_checkpoint(sys.argv[1], sys.argv[2], to="hf", shards=30, workers=2)
        for _ in range(5):
            ckpt_convert.plan_conversion(sys.argv[2], to="meta")
        ckpt_convert.convert_checkpoint(sys.argv[2], sys.argv[2] + "2", to="native", workers=2)
    """
    done = run(code, HF, tmp_path / "out")
    assert done.returncode == 0, done.stderr
