"""The store of a bucket: S3 and what speaks it, Google Cloud Storage, Azure Blob Storage."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any, TypeVar

from ckpt_convert.errors import (
    CorruptFileError,
    OutputExistsError,
    UnreadableError,
    UnsafeFileError,
    UnwritableError,
)
from ckpt_convert.storage.base import Entry, FileKind, Version, Writer, source_changed
from ckpt_convert.storage.listing import ROOT, name_prefix
from ckpt_convert.storage.object_store import ObjectFile, ObjectStore
from ckpt_convert.storage.remote.clients import Client, client_of
from ckpt_convert.storage.remote.failures import asking, is_lost
from ckpt_convert.storage.remote.requests import TOKEN
from ckpt_convert.storage.remote.settings import StoreOptions
from ckpt_convert.storage.remote.uploads import PART, PartWriter, SpooledWriter, abort_open

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class ObjectStorage(ObjectStore):
    """A bucket (a container, for Azure); its clients are made in each process when they are first needed.

    ``scheme`` is "s3", "gs" or "az"; ``options`` may be secret and appear nowhere.
    """

    scheme: str
    bucket: str
    options: StoreOptions = field(default=(), repr=False)

    # What is there

    def list(self, prefix: str, *, deep: bool = True) -> dict[str, Entry]:
        import obstore

        folder = None if prefix == ROOT else prefix

        def items(store: Any) -> Any:
            if deep:
                return [item for page in obstore.list(store, folder, chunk_size=1000) for item in page]
            return obstore.list_with_delimiter(store, folder)["objects"]

        with asking(self.label(prefix), "listed"):
            found = _without_markers(prefix, {item["path"]: _version(item) for item in self._ask(items)})
        if not found and folder is not None and (own := self.entry(prefix)) is not None:
            found[prefix] = own
        return found

    def children(self, folder: str) -> Mapping[str, FileKind | None]:
        import obstore

        with asking(self.label(folder), "listed"):
            found = self._ask(lambda store: obstore.list_with_delimiter(store, None if folder == ROOT else folder))
        files: dict[str, Entry] = {item["path"]: _version(item) for item in found["objects"]}
        kinds: dict[str, FileKind | None] = {
            name[len(name_prefix(folder)) :]: FileKind.FILE for name in _without_markers(folder, files)
        }
        kinds |= {str(name).rpartition("/")[2]: FileKind.FOLDER for name in found["common_prefixes"]}
        if not kinds:
            raise UnreadableError(f"{self.label(folder)}: cannot be listed: it is no folder, or not there (any more)")
        return kinds

    def kind(self, name: str) -> FileKind | None:
        import obstore

        with asking(self.label(name), "listed"):
            found = self._ask(lambda store: obstore.list_with_delimiter(store, None if name == ROOT else name))
        if found["objects"] or found["common_prefixes"]:
            return FileKind.FOLDER
        return FileKind.FILE if name != ROOT and self.entry(name) is not None else None

    def entry(self, name: str) -> Entry | None:
        import obstore

        with asking(self.label(name), "looked at"):
            try:
                return _version(self._ask(lambda store: obstore.head(store, name)))
            except FileNotFoundError:
                return None

    # Reading

    def open(self, name: str, expected: Entry | None = None, called: str | None = None) -> ObjectFile:
        """As ``Store.open``; ``expected`` is compared with every read, not here."""
        identity = expected or self.entry(name)
        if identity is None:
            raise UnsafeFileError(f"{self.label(name)}: is not a regular file, or not there (any more)")
        return ObjectFile(called or self.label(name), identity, partial(self._fetch, name, identity))

    def _fetch(self, name: str, identity: Entry, offset: int, nbytes: int) -> memoryview:
        """A range of an object, if the object is the one that was seen first."""
        import obstore
        from obstore.exceptions import PreconditionError

        label = self.label(name)
        options: dict[str, Any] = {"range": (offset, offset + nbytes)}
        if not identity.etag.startswith("W/"):  # a weak etag matches nothing
            options["if_match"] = identity.etag

        def read(store: Any) -> memoryview:
            found = obstore.get(store, name, options=options)  # type: ignore[arg-type]
            what = identity.change(_version(found.meta))
            if what is not None:
                raise source_changed(label, what)
            return memoryview(found.bytes())

        with asking(label, "read"):
            try:
                data = self._ask(read)
            except (FileNotFoundError, PreconditionError):
                raise self._changed(name, identity) from None
        if len(data) != nbytes:
            raise CorruptFileError(f"{label}: {nbytes:,} bytes were asked for from {offset:,}, and {len(data):,} came")
        return data

    def _changed(self, name: str, identity: Entry) -> Exception:
        now = self.entry(name)
        what = "it was removed" if now is None else identity.change(now) or "it was rewritten, and restored"
        return source_changed(self.label(name), what)

    # Writing

    def put(self, name: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> Entry:
        return self._put(name, data, "create" if create_only else if_match, uuid.uuid4().hex)

    def _put(self, name: str, data: bytes | bytearray | IO[bytes], condition: str | None, token: str) -> Entry:
        """Write an object, with "create" if there is none, or if its etag is the condition.

        A request whose answer was lost is sent again, and finds the object that it made itself: the token tells.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        label = self.label(name)
        mode: Any = condition if condition in (None, "create") else {"e_tag": condition}
        size = len(data) if isinstance(data, bytes | bytearray) else None

        def write(store: Any) -> Any:
            if not isinstance(data, bytes | bytearray):
                data.seek(0)
            return obstore.put(
                store,
                name,
                data,
                mode=mode,
                attributes={TOKEN: token},
                use_multipart=None if size is None else False,
                chunk_size=PART,
                max_concurrency=2,
            )

        with asking(label, "written", UnwritableError):
            try:
                made = self._ask(write)
            except (AlreadyExistsError, PreconditionError, FileNotFoundError) as error:
                if isinstance(error, FileNotFoundError) and condition in (None, "create"):
                    raise
                if (found := self._with_token(name, token)) is not None:
                    return found
                what = "is there already" if condition == "create" else "was written by something else meanwhile"
                raise OutputExistsError(f"{label}: {what}") from None
        etag = made["e_tag"]
        if etag is None or size is None:
            found = self.entry(name)
            if found is None:
                raise UnwritableError(f"{label}: cannot be written: it was removed at once by something else")
            return found
        return Version(size, etag)

    def _with_token(self, name: str, token: str) -> Entry | None:
        """The object, if it holds this token; None for another, or for none."""
        import obstore

        with asking(self.label(name), "looked at"):
            try:
                found = self._ask(lambda store: obstore.get(store, name, options={"head": True}))
            except FileNotFoundError:
                return None
            return _version(found.meta) if found.attributes.get(TOKEN) == token else None

    def create(self, name: str, size: int | None) -> Writer:
        target = _Target(self, name)
        with asking(target.label, "written", UnwritableError):
            parts = self._client().parts
        return PartWriter(parts, name, target, size) if parts is not None else SpooledWriter(target, size)

    def delete(self, names: Iterable[str]) -> None:
        wanted = [*names]
        if not wanted:
            return
        with asking(self.label(wanted[0]), "removed", UnwritableError):
            if self._client().parts is not None:
                self._remove(wanted)
                return
            for name in wanted:
                with contextlib.suppress(FileNotFoundError):
                    self._remove(name)

    def _remove(self, names: str | Sequence[str]) -> None:
        import obstore

        self._ask(lambda store: obstore.delete(store, names))

    def abort_uploads(self, names: Iterable[str], prefix: str) -> None:
        with asking(self.label(prefix), "cleaned up", UnwritableError):
            if (parts := self._client().parts) is not None:
                abort_open(parts, self.label(prefix), [*names], prefix)

    def label(self, name: str) -> str:
        return f"{self.scheme}://{self.bucket}" if name == ROOT else f"{self.scheme}://{self.bucket}/{name}"

    def _ask(self, ask: Callable[[Any], _Answer]) -> _Answer:
        """What ``ask`` gets from obstore's client; asked again where the connection was lost (see ``is_lost``)."""
        from obstore.exceptions import BaseError

        client = self._client()
        for _ in client.retries.attempts():
            try:
                return ask(client.obstore)
            except BaseError as error:
                if not is_lost(str(error)):
                    raise
                lost = error
        raise lost

    def _client(self) -> Client:
        return client_of(self.scheme, self.bucket, self.options)


@dataclass(frozen=True)
class _Target:
    """An object that is being written."""

    store: ObjectStorage
    name: str

    @property
    def label(self) -> str:
        return self.store.label(self.name)

    def put(self, data: bytes | bytearray | IO[bytes], *, create_only: bool, token: str) -> Entry:
        return self.store._put(self.name, data, "create" if create_only else None, token)

    def found(self, token: str) -> Entry | None:
        return self.store._with_token(self.name, token)

    def entry(self) -> Entry | None:
        return self.store.entry(self.name)


def _version(item: Any) -> Version:
    """The entry of obstore's description of an object; a store without etags has the time of its last change.

    Azure's listings have etags without the quotes that its other answers have.
    """
    etag = item["e_tag"] or str(item["last_modified"])
    modified = item["last_modified"].timestamp()
    return Version(item["size"], etag if etag.endswith('"') else f'"{etag}"', modified)


def _without_markers(prefix: str, found: dict[str, Entry]) -> dict[str, Entry]:
    """The objects without the empty ones that consoles make for folders, which have the name of a folder."""
    folders = {prefix}
    for name in found:
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    return {name: entry for name, entry in found.items() if entry.size or name not in folders}
