"""The store of local files: names are paths, and links are followed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from ckpt_convert.errors import CheckpointNotFoundError, OutputExistsError, UnsafeFileError
from ckpt_convert.storage import names as paths
from ckpt_convert.storage.base import Entry, FileKind, require_regular_file, source_changed
from ckpt_convert.storage.reader import FileIdentity, LocalFile, reading, unreadable_error
from ckpt_convert.storage.system import sync_directory, take_place, writing
from ckpt_convert.values import frozen

_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors for a path that refers to nothing, or cannot exist."""


@frozen()
class LocalStore:
    """The files of this machine; a name is a path, absolute or relative to the working directory."""

    @property
    def prefers_listing(self) -> bool:
        return False

    def kind(self, name: str) -> FileKind | None:
        try:
            return _kind(os.stat(name).st_mode)
        except OSError as error:
            if error.errno not in _NOTHING:
                raise unreadable_error(error, name, "looked at") from error
        except ValueError:  # a null byte
            pass
        return None

    def entry(self, name: str) -> FileIdentity | None:
        with reading(name, "looked at"):
            try:
                return FileIdentity.of(os.stat(name))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        out: dict[str, Entry] = {}
        waiting = [prefix]
        while waiting:
            folder = waiting.pop()
            with reading(prefix, "listed"), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting += [entry.path] if deep else []
                    else:
                        with contextlib.suppress(FileNotFoundError):  # a link that leads nowhere
                            if entry.is_file():
                                out[_joined(folder, entry.name)] = FileIdentity.of(entry.stat())
        return out

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        with reading(folder, "listed"), os.scandir(folder) as entries:
            return {entry.name: self._kind_of(entry) for entry in entries}

    def _kind_of(self, entry: os.DirEntry[str]) -> FileKind | None:
        if entry.is_file(follow_symlinks=False):
            return FileKind.FILE
        return FileKind.FOLDER if entry.is_dir(follow_symlinks=False) else self.kind(entry.path)

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> LocalFile:
        return LocalFile(Path(name), called, expected=expected)

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        """As ``Store.put``; ``if_match`` is checked right before the file is replaced, not atomically."""
        path = Path(name)
        writer = self.create(name, len(data))
        try:
            writer.write(0, memoryview(data))
            if if_match is not None and ((there := self.entry(name)) is None or there.etag != if_match):
                raise OutputExistsError(f"{path}: was written by something else meanwhile")
            return writer.complete(create_only=create_only)
        except BaseException:
            writer.abort()
            raise

    def create(self, name: str, size: int | None) -> _Writer:
        return _Writer(Path(name), size)

    def delete(self, names: Iterable[str]) -> None:
        for name in names:
            with writing(name, "removed"), contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    def abort_uploads(self, names: Iterable[str], prefix: str) -> None:
        """Nothing: a temporary file of a writer that was killed is replaced by the next one."""

    def label(self, name: str) -> str:
        return name

    def local(self, name: str) -> Path:
        return Path(name)

    def real(self, name: str) -> str:
        with reading(name, "looked at"):
            return os.path.realpath(name)

    def absolute(self, name: str) -> str:
        return str(Path(name).absolute())

    def link(self, name: str) -> str | None:
        with reading(name, "looked at"):
            try:
                return os.readlink(name)
            except OSError as error:
                if error.errno in (errno.EINVAL, *_NOTHING):
                    return None
                raise

    def guard(self, folder: str, name: str, named_by: str) -> None:
        """As ``Store.guard``; in a snapshot of the Hub's cache, links may also lead into its ``blobs``."""
        path = Path(folder) / name
        kind = self.kind(str(path))
        if kind is None and self.link(str(path)) is not None:
            raise CheckpointNotFoundError(f"{path}: is a link that leads nowhere; download or copy the file again")
        require_regular_file(str(path), kind, named_by)
        if not any(self.link(str(part)) for part in (path, *path.parents[: name.count("/")])):
            return  # nothing below the folder is a link
        with reading(path, "looked at"):
            real, roots = path.resolve(), [Path(folder).resolve()]
        roots += [above.parent / "blobs" for above in roots[0].parents if above.name == "snapshots"]
        if not any(real.is_relative_to(root) for root in roots):
            raise UnsafeFileError(
                f"{path}: is a link that leaves the directory, to {real}; copy the file in, or give the directory "
                "that it is in"
            )

    def mode(self, name: str) -> int:
        with reading(name, "looked at"):
            try:
                return stat.S_IMODE(os.stat(name).st_mode) & 0o777 | 0o700
            except (FileNotFoundError, NotADirectoryError):
                raise source_changed(name, "it was removed") from None


LOCAL = LocalStore()


def _kind(mode: int) -> FileKind:
    if stat.S_ISREG(mode):
        return FileKind.FILE
    return FileKind.FOLDER if stat.S_ISDIR(mode) else FileKind.OTHER


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else os.path.join(folder, name)


class _Writer:
    """A file that is written under a temporary name, and renamed when it is complete."""

    def __init__(self, path: Path, size: int | None) -> None:
        self._path = path
        self._partial = paths.partial_path(path)
        with writing(path):
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with writing(path):
                os.ftruncate(self._fd, size or 0)
        except BaseException:
            self.abort()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        done = 0
        with writing(self._path):
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], offset + done)

    def complete(self, *, create_only: bool = False) -> Entry:
        with writing(self._path):
            found = os.fstat(self._fd)
            if create_only:
                self._link()
            else:
                take_place(self._fd, self._partial, self._path)
            self._close()
        return FileIdentity.of(found)

    def _link(self) -> None:
        """Publish the file only if its name is free."""
        os.fsync(self._fd)
        try:
            os.link(self._partial, self._path)
        except FileExistsError:
            raise OutputExistsError(f"{self._path}: is there already") from None
        os.unlink(self._partial)
        sync_directory(self._path.parent)

    def abort(self) -> None:
        if self._fd >= 0:
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self._partial)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)
