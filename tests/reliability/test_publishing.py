"""What is published is what was written, whole or not at all, whatever else writes there and wherever it is stopped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ckpt_convert
from ckpt_convert import CkptConvertError, OutputExistsError, TransferProgress
from ckpt_convert.convert import ownership
from ckpt_convert.storage import staging
from ckpt_convert.storage.names import JOURNAL
from tests.checkpointer.training import make_model
from tests.helpers import GOLDEN, sums

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"
FIRST = "model-00001-of-00004.safetensors"


class Stopped(KeyboardInterrupt):
    """An interruption of this test's own."""


def near_the_end(act: Callable[[], object]) -> Callable[[TransferProgress], None]:
    """A progress callback that does something once, when most of the weights are written."""
    left = [act]

    def progress(progress: TransferProgress) -> None:
        if progress.phase == "converting" and progress.done > 0.9 * progress.total and left:
            left.pop()()

    return progress


def convert(
    out: Path, progress: Callable[[TransferProgress], None] | None = None, **options: Any
) -> ckpt_convert.Report:
    return ckpt_convert.convert_checkpoint(HF, out, to="native", workers=1, progress=progress, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    convert(out)
    return sums(out)


# Others write there


def partial_removed(partial: Path) -> None:
    shutil.rmtree(partial)


def partial_exchanged_for_a_link(partial: Path) -> None:
    partial.rename(partial.with_name("moved"))
    shutil.copytree(HF, partial.with_name("theirs"))
    partial.symlink_to("theirs")


def partial_exchanged(partial: Path) -> None:
    partial.rename(partial.with_name("moved"))
    shutil.copytree(partial.with_name("moved"), partial)


def file_removed(partial: Path) -> None:
    (partial / FIRST).unlink()


def file_replaced(partial: Path) -> None:
    shutil.copy2(partial / FIRST, partial / "copy")
    (partial / "copy").replace(partial / FIRST)


def file_longer(partial: Path) -> None:
    with (partial / FIRST).open("ab") as file:
        file.write(b"more")


def file_scribbled_on(partial: Path) -> None:
    with (partial / FIRST).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"oops")
    os.utime(partial / FIRST, (1, 1))  # the clock of files may be too slow to tell


def file_linked(partial: Path) -> None:
    (partial.with_name("other name")).hardlink_to(partial / FIRST)


def file_added(partial: Path) -> None:
    (partial / "stray.bin").write_text("mine")


def folder_added(partial: Path) -> None:
    (partial / "photos").mkdir()
    (partial / "photos" / "cat.jpg").write_text("mine")


@pytest.mark.parametrize(
    "interfere",
    [partial_removed, partial_exchanged_for_a_link, partial_exchanged, file_removed, file_replaced, file_longer,
     file_scribbled_on, file_linked, file_added, folder_added],
    ids=lambda one: one.__name__,
)  # fmt: skip
def test_nothing_is_published_where_something_else_wrote(interfere: Callable[[Path], None], tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    with pytest.raises(CkptConvertError, match=r"\.out\.partial"):
        convert(tmp_path / "out", near_the_end(lambda: interfere(partial)))
    assert not os.path.lexists(tmp_path / "out")
    theirs = [path for path in (partial / "stray.bin", partial / "photos" / "cat.jpg") if path.exists()]
    assert [path.read_text() for path in theirs] == ["mine"] * ("added" in interfere.__name__)  # what is theirs stays
    if not theirs and interfere not in (partial_exchanged, partial_exchanged_for_a_link, file_replaced):
        assert not os.path.lexists(partial)
    if (tmp_path / "theirs").exists():
        assert sums(tmp_path / "theirs") == sums(HF)


def test_resuming_writes_through_no_link(tmp_path: Path, expected: dict[str, str]) -> None:
    def stop() -> None:
        raise Stopped

    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(Stopped) as stopped:
        convert(out, near_the_end(stop))
    assert any("`resume=True` continues it" in note for note in stopped.value.__notes__)
    names = sorted(path.name for path in partial.glob("*.safetensors"))
    victims = [tmp_path / f"victim {number}" for number in range(4)]
    for victim in victims:
        victim.write_bytes(b"precious")
    (partial / names[0]).unlink()
    (partial / names[0]).symlink_to(victims[0])
    (partial / names[1]).unlink()
    (partial / names[1]).hardlink_to(victims[1])
    (partial / names[2]).unlink()
    (partial / names[2]).mkdir()  # a directory in a file's place
    (partial / names[2] / "inside").write_bytes(b"x")
    (partial / "ckpt_convert").symlink_to(tmp_path)
    convert(out, resume=True)
    assert sums(out) == expected
    assert [victim.read_bytes() for victim in victims] == [b"precious"] * 4
    assert not (out / "ckpt_convert").is_symlink()
    assert (out / names[1]).stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "directory"])
def test_a_journal_that_is_none_is_replaced(kind: str, tmp_path: Path, expected: dict[str, str]) -> None:
    partial, victim = tmp_path / ".out.partial", tmp_path / "victim"
    partial.mkdir()
    victim.write_bytes(b"precious")
    journal = partial / ".ckpt-convert-journal"
    if kind == "symlink":
        journal.symlink_to(victim)
    elif kind == "hardlink":
        journal.hardlink_to(victim)
    else:
        journal.mkdir()
    convert(tmp_path / "out", resume=True)
    assert sums(tmp_path / "out") == expected
    assert victim.read_bytes() == b"precious"


# What comes last


@pytest.mark.parametrize(
    ("to", "last"),
    [("hf", {"config.json", "model.safetensors.index.json"}), ("meta", {"params.json"}), ("torchtitan", {".metadata"})],
)
def test_what_makes_a_directory_a_model_is_written_last(
    to: str, last: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(HF, tmp_path / "source")
    (source / "zzz.txt").write_text("a file with a late name")
    made: list[str] = []
    real = os.open

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            made.append(Path(os.fsdecode(path)).name)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", opened)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=to, shards=2 if to == "hf" else None)
    assert made[-1] == "manifest.json"
    assert set(made[-1 - len(last) : -1]) == last


# Flushing


@contextlib.contextmanager
def fsync_failing(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> Iterator[None]:
    """Let flushing the directories whose name ends so fail."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) and os.readlink(f"/proc/self/fd/{fd}").endswith(name):
            raise OSError(number, os.strerror(number))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def test_a_directory_that_cannot_be_flushed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    for name in (".out.partial", "ckpt_convert"):
        with fsync_failing(monkeypatch, errno.EIO, name), pytest.raises(CkptConvertError, match="flushed to disk"):
            convert(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with (
        fsync_failing(monkeypatch, errno.EIO, tmp_path.name),
        pytest.raises(CkptConvertError, match=r"Input/output error; .*out is complete, but may be gone"),
    ):
        convert(tmp_path / "out")
    assert sums(tmp_path / "out") == expected
    for number in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such call
        with fsync_failing(monkeypatch, number, ""):
            convert(tmp_path / "out", overwrite=True)


def test_a_file_that_fails_as_it_is_closed_is_one_error_and_is_closed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = os.close, []

    def close(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")  # which fails for a descriptor that is closed already
        real(fd)
        if path.endswith(f".out.partial/{FIRST}"):
            failed.append(fd)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(CkptConvertError, match=rf"{FIRST}: cannot be closed: Input/output error.*`resume=True`"):
        convert(tmp_path / "out")
    assert len(failed) == 1


# Permissions


def test_nobody_may_read_what_they_could_not_read_before(tmp_path: Path) -> None:
    source = shutil.copytree(HF, tmp_path / "source")
    for path in source.iterdir():
        path.chmod(0o640)
    (source / FIRST).chmod(0o400)
    (source / "config.json").chmod(0o444)
    convert_from = {"private": 0o700, "open": 0o755}
    for name, mode in convert_from.items():
        source.chmod(mode)
        ckpt_convert.convert_checkpoint(source, tmp_path / name, to="meta")
        found = {path.relative_to(tmp_path / name).as_posix(): path.stat().st_mode & 0o777
                 for path in (tmp_path / name).rglob("*")}  # fmt: skip
        assert (tmp_path / name).stat().st_mode & 0o777 == mode & 0o700
        assert set(found.values()) == {0o600, 0o700}, found
    (source / FIRST).chmod(0o644)
    for path in source.iterdir():
        path.chmod(0o644)
    ckpt_convert.convert_checkpoint(source, tmp_path / "usual", to="meta")
    assert (tmp_path / "usual" / "params.json").stat().st_mode & 0o777 == 0o644 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Replacing


class Faults:
    """Lets the n-th call of the system that changes something fail, once the weights are written."""

    NAMES = ("open", "unlink", "rmdir", "rename", "fsync", "pwrite", "ftruncate", "listdir", "mkdir", "close")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> None:
        self.left, self.error, self.armed, self.done = number, error, False, False
        for name in self.NAMES:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name), after=name == "close"))

    def _counting(self, call: Callable[..., Any], after: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            fails = False
            if self.armed:
                self.left -= 1
                fails = self.left == 0
            if fails and not after:
                self.done = True
                raise self.error()
            result = call(*args, **options)
            if fails:
                self.done = True
                raise self.error()
            return result

        return counted

    def arm(self) -> None:
        self.armed = True


def eio() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("error", [Stopped, eio], ids=["Ctrl-C", "EIO"])
def test_an_overwrite_that_is_stopped_anywhere_leaves_one_of_both(
    error: Callable[[], BaseException],
    exchange: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, str],
) -> None:
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: object())
    ckpt_convert.convert_checkpoint(HF, tmp_path / "old", to="hf", shards=1)
    before = sums(tmp_path / "old")
    stride = 5 if error is Stopped else 8
    seen = set()
    for number in range(1, 500, stride):
        place = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "old", place / "out")
        out = place / "out"
        with monkeypatch.context() as patch:
            faults = Faults(patch, number, error)
            raised: BaseException | None = None
            try:
                convert(out, near_the_end(faults.arm), overwrite=True)
            except (Stopped, CkptConvertError) as found:
                raised = found
            faults.armed = False
        there = sums(out)
        assert there in (before, expected)
        left = sorted(path.name for path in place.iterdir() if path.name != "out")
        if raised is None:
            assert there == expected
        elif there == expected and left:  # complete, and what it replaced is named
            said = "\n".join([str(raised), *getattr(raised, "__notes__", [])])
            assert "is complete" in said
            assert left[0] in said
        seen.add((there == expected, raised is None))
        convert(out, overwrite=True)  # the next run is not hindered
        assert sums(out) == expected
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place)
        if not faults.done:
            break
    else:
        pytest.fail("it was never stopped too late")
    assert {(False, False), (True, True)} <= seen


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interruption_of_the_exchange_itself(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    real = ctypes.CDLL

    class Library:
        @staticmethod
        def renameat2(*args: Any) -> int:
            if moment == "after":
                real(None, use_errno=True).renameat2(*args)
            raise Stopped

    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(HF, out, to="meta")
    before = sums(out)
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda *args, **options: Library)
        with pytest.raises(Stopped) as stopped:
            convert(out, overwrite=True)
    assert sums(out) == (before if moment == "before" else expected)
    (note,) = stopped.value.__notes__
    assert ("out is complete; what it replaced is still in" in note) == (moment == "after")
    convert(out, overwrite=True, resume=True)
    assert sums(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_replaced_and_cannot_be_removed_is_a_warning_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, expected: dict[str, str]
) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "out", to="meta")

    def refused(path: Any, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refused)
        convert(tmp_path / "out", overwrite=True)
    assert sums(tmp_path / "out") == expected
    (record,) = caplog.records
    assert "out is complete, but what it replaced is still in" in record.getMessage()
    assert str(tmp_path / ".out.partial") in record.getMessage()
    convert(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_put_into_the_destination_meanwhile_are_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ckpt_convert.convert_checkpoint(HF, out, to="meta")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        convert(out, near_the_end(lambda: (out / "thesis.tex").write_text("mine")), overwrite=True)
    assert (out / "thesis.tex").read_text() == "mine"


# Signals

COMMAND = """
import os, runpy, signal, sys
number = int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests may have it ignored
real, left = os.pwrite, [30]
def pwrite(fd, data, offset):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), number)
    return real(fd, data, offset)
os.pwrite = pwrite
runpy.run_module("ckpt_convert", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_signal_that_ends_it_says_what_is_left(name: str, tmp_path: Path) -> None:
    number = int(getattr(signal, name))
    words = [
        sys.executable,
        "-c",
        COMMAND,
        str(number),
        "hf-to-native",
        str(HF),
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + number, ended.stderr
    assert f"{tmp_path / '.out.partial'} holds what is done; --resume continues it" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


# Mount points


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    real = os.lstat

    def lstat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        found = real(path, *args, **options)
        if os.fspath(path) != str(out):
            return found
        return os.stat_result([found[0], found[1], found.st_dev + 1, *found[3:]])  # as another file system has it

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", lstat)
        with pytest.raises(OutputExistsError, match=r"is a mount point.*such as .*out/model"):
            convert(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    convert(out)


MOUNTED = """
set -e
mkdir "$1/volume" "$1/part"
mount -t tmpfs none "$1/volume"
mount --bind "$1/part" "$1/part"
for place in volume part; do
    "$2" -m ckpt_convert hf-to-native "$3" "$1/$place" --quiet && exit 9
    test -z "$(ls -A "$1/$place")"
    "$2" -m ckpt_convert hf-to-native "$3" "$1/$place/model" --quiet
    test -n "$(ls -A "$1/$place/model")"
done
test -z "$(ls -A "$1" | grep partial)"
echo done
"""


def test_real_mount_points(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces; the test before this one stands in")
    words = ["unshare", "-Urm", "sh", "-c", MOUNTED, "sh", str(tmp_path), sys.executable, str(HF)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.stdout == "done\n", ran.stderr
    assert ran.stderr.count("is a mount point") == 2


def test_what_is_removed_is_at_no_time_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "whole", to="hf")
    unlink = os.unlink
    for stop in range(1, 12):
        place = tmp_path / f"at-{stop}"
        shutil.copytree(tmp_path / "whole", place / "out")
        removed = 0

        def killed(name: str, *arguments: object, stop: int = stop, **named: object) -> None:
            nonlocal removed
            removed += "journal" not in str(name)
            if removed == stop:
                raise KeyboardInterrupt
            unlink(name, *arguments, **named)  # type: ignore[arg-type]

        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(os, "unlink", killed)
            ckpt_convert.convert_checkpoint(HF, place / "out", to="hf", shards=2, overwrite=True)
        partial = place / ".out.partial"
        if partial.exists() and (partial / "config.json").exists():
            assert len(list(partial.glob("*.safetensors"))) == 4
            assert (partial / "generation_config.json").exists()
        ckpt_convert.convert_checkpoint(HF, place / "out", to="hf", shards=2, overwrite=True)
        assert not partial.exists()


def test_what_is_in_folders_is_removed_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt_convert.convert_checkpoint(HF, tmp_path / "whole", to="hf")
    (tmp_path / "whole").rename(tmp_path / "merged")
    ckpt_convert.convert_checkpoint(HF, tmp_path / "whole", to="hf")
    (tmp_path / "merged").rename(tmp_path / "whole" / "merged")
    unlink, gone = os.unlink, []

    def noted(name: str, *arguments: object, **named: object) -> None:
        gone.append(name)
        unlink(name, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", noted)
    fd = os.open(tmp_path / "whole", os.O_RDONLY)
    staging.remove_staged(fd, tmp_path / "whole", ownership.publish_order)
    os.close(fd)
    assert not (tmp_path / "whole").exists()
    assert gone[-1] == JOURNAL
    ranks = [ownership.publish_order(name) for name in gone]
    assert ranks == sorted(ranks, reverse=True)
    assert {"merged/config.json", "config.json"} <= {*gone[:8]}


def test_what_was_moved_aside_is_removed_in_the_end_however_often_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    """Without an exchange of names, a run that is killed leaves ``.out.replaced`` to the next one; as may that one."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: object())
    out, aside = tmp_path / "out", tmp_path / ".out.replaced"
    ckpt_convert.convert_checkpoint(HF, out, to="hf", shards=1)
    real = os.unlink

    def stops(allowed: int) -> Callable[..., None]:
        left = iter(range(allowed))

        def unlink(*arguments: Any, **options: Any) -> None:
            if aside.exists() and next(left, None) is None:
                raise Stopped
            real(*arguments, **options)

        return unlink

    for allowed in (0, 1, 2, 3, 4):
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", stops(allowed))
            with pytest.raises(Stopped):
                convert(out, overwrite=True)
        assert sums(out) == expected
        assert (aside / JOURNAL).exists()
    convert(out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["model-00001-of-00004.safetensors", "config.json"])
def test_a_file_that_cannot_be_looked_at_once_it_is_made_is_in_nobodys_way(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(HF)
    opened, looked = os.open, os.fstat
    made: list[int] = []

    def open_(path: object, flags: int, *arguments: object, **named: object) -> int:
        fd = opened(path, flags, *arguments, **named)  # type: ignore[arg-type, call-overload]
        if path == name and flags & os.O_CREAT:
            made.append(fd)
        return int(fd)

    def fstat(fd: int) -> os.stat_result:
        if fd in made:
            made.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return looked(fd)

    def save() -> None:
        with ckpt_convert.Checkpointer(HF, tmp_path, save_every=1, contents="weights") as saver:
            saver.resume(model=model)
            saver.step()

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", open_)
        patched.setattr(os, "fstat", fstat)
        with pytest.raises(CkptConvertError, match=name):
            save()
    save()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != ".") == ["latest", "step_1"]
    assert not list(tmp_path.glob(".step*"))


def test_what_was_replaced_and_has_no_mark_yet_is_removed_by_the_next_overwrite(tmp_path: Path) -> None:
    """A writer was killed when old and new had changed places: the old one, a plain checkpoint, has no mark."""
    source, out, partial = GOLDEN / "llama" / "hf", tmp_path / "out", tmp_path / ".out.partial"
    ckpt_convert.convert_checkpoint(source, out, to="meta")
    whole = sums(out)
    shutil.copytree(source, partial)
    with pytest.raises(OutputExistsError):
        ckpt_convert.convert_checkpoint(source, out, to="meta")
    assert sums(partial) == sums(source)
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="in the way"):
        ckpt_convert.convert_checkpoint(source, out, to="meta", overwrite=True)
    assert (partial / "notes.txt").read_text() == "mine"
    (partial / "notes.txt").unlink()
    ckpt_convert.convert_checkpoint(source, out, to="meta", overwrite=True)
    assert not partial.exists()
    assert sums(out) == whole
