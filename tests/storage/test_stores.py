"""What every store does: one suite for all of them."""

import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ckpt_convert.errors import (
    CheckpointNotFoundError,
    CkptConvertError,
    CorruptFileError,
    OutputExistsError,
    SourceChangedError,
    UnreadableError,
    UnsafeFileError,
)
from ckpt_convert.storage.base import FileKind, Version, read_blocks, read_range
from ckpt_convert.storage.memory import MemoryStore
from ckpt_convert.storage.object_store import ObjectFile
from ckpt_convert.storage.place import FilePool, Place, as_place, check_unchanged, checked_place

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)), "ckpt_convert/layouts/hf/layout.json": b"[]"}


@pytest.fixture(params=["local", "memory", "s3", "azure"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A folder with some files, in each store."""
    if request.param != "local":
        stores = {"s3": "s3_store", "azure": "azure_store"}
        store = MemoryStore() if request.param == "memory" else request.getfixturevalue(stores[request.param])
        for name, data in FILES.items():
            store.put(f"models/llama/{name}", data)
        return Place(store, PurePosixPath("models/llama"))
    for name, data in FILES.items():
        (tmp_path / "llama" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "llama" / name).write_bytes(data)
    return as_place(tmp_path / "llama")


@pytest.fixture(params=["asked", "listed", "noted"])
def folder(request: pytest.FixtureRequest, root: Place) -> Place:
    """The same, asked as one goes, and listed before."""
    return {"asked": root, "listed": root.listed(), "noted": root.with_listing()}[request.param]


class TestNames:
    def test_what_is_there(self, folder: Place) -> None:
        assert folder.kind() is FileKind.FOLDER
        assert (folder / "config.json").kind() is FileKind.FILE
        assert (folder / "ckpt_convert").is_folder()
        assert (folder / "ckpt_convert/layouts").is_folder()
        assert not (folder / "config").is_present()
        assert not (folder / "config.json" / "x").is_present()

    def test_what_lies_right_below(self, folder: Place) -> None:
        assert sorted(folder.children()) == [
            folder / name for name in ("ckpt_convert", "config.json", "model.safetensors")
        ]
        assert sorted(folder.files()) == [folder / "config.json", folder / "model.safetensors"]
        assert folder.folders() == [folder / "ckpt_convert"]

    def test_what_lies_anywhere_below(self, folder: Place) -> None:
        assert sorted(place.relative_name(folder) for place in folder.entries()) == sorted(FILES)

    def test_what_lies_in_a_folder(self, folder: Place) -> None:
        inner = folder / "ckpt_convert"
        assert inner.children() == inner.folders() == [inner / "layouts"]
        assert inner.files() == []
        assert [*(inner / "layouts").entries()] == [inner / "layouts" / "hf" / "layout.json"]
        assert [*(inner / "layouts" / "hf").entries(deep=False)] == [inner / "layouts" / "hf" / "layout.json"]
        assert [here.relative_name(folder.parent) for here, _, _ in folder.walk(lambda name: name != "hf")] == [
            *(folder.name, f"{folder.name}/ckpt_convert", f"{folder.name}/ckpt_convert/layouts")
        ]

    @pytest.mark.parametrize("name", ["config.json", "nothing"])
    def test_what_is_no_folder_has_nothing_below(self, folder: Place, name: str) -> None:
        with pytest.raises(UnreadableError):
            (folder / name).children()

    def test_a_list_says_what_each_file_is(self, root: Place) -> None:
        listed = root.store.list(str(root.path))
        assert {name.removeprefix(f"{root.path}/"): entry.size for name, entry in listed.items()} == {
            name: len(data) for name, data in FILES.items()
        }
        assert set(root.store.list(str(root.path), deep=False)) == {
            f"{root.path}/{name}" for name in ("config.json", "model.safetensors")
        }
        assert all(root.store.entry(name) == entry for name, entry in listed.items())

    def test_a_place_is_a_value(self, folder: Place) -> None:
        assert folder / "a" == folder / "a"
        assert len({folder / "a", folder / "a", folder / "b"}) == 2
        assert (folder / "a.b.json").parent == folder
        assert (folder / "a.b.json").suffix == ".json"
        assert (folder / "a.b.json").stem == "a.b"
        assert checked_place(folder) is folder

    def test_another_store_is_another_place(self) -> None:
        assert Place(MemoryStore(), PurePosixPath("a")) != Place(MemoryStore(), PurePosixPath("a")) != as_place("a")

    def test_it_goes_to_another_process(self, folder: Place) -> None:
        there = pickle.loads(pickle.dumps(folder / "config.json"))
        assert there.is_regular_file()
        assert there.read(10) == b"{}"


class TestReading:
    def test_ranges(self, folder: Place) -> None:
        with (folder / "model.safetensors").open() as file:
            assert file.size == 256
            assert read_range(file, 250, 6) == bytes(range(250, 256))
            assert read_range(file, 256, 0) == b""
            assert b"".join(map(bytes, read_blocks(file, 100))) == bytes(range(256))

    def test_many_ranges(self, folder: Place) -> None:
        wanted = [(200, 20), (0, 10), (5, 10)]
        buffers = [bytearray(nbytes) for _, nbytes in wanted]
        with (folder / "model.safetensors").open() as file:
            file.read_many([(offset, memoryview(buffer)) for (offset, _), buffer in zip(wanted, buffers, strict=True)])
        assert [bytes(buffer) for buffer in buffers] == [bytes(range(at, at + nbytes)) for at, nbytes in wanted]

    def test_a_range_beyond_the_end(self, folder: Place) -> None:
        with (
            (folder / "model.safetensors").open(called="model") as file,
            pytest.raises(CorruptFileError, match="model: ends at byte 256, 4 bytes too early"),
        ):
            file.readinto(250, memoryview(bytearray(10)))

    def test_a_small_file_has_a_limit(self, folder: Place) -> None:
        assert (folder / "config.json").read(2) == b"{}"
        with pytest.raises(UnsafeFileError, match="where a file of its kind has 1 at most"):
            (folder / "config.json").read(1)

    @pytest.mark.parametrize("name", ["ckpt_convert", "nothing"])
    def test_what_is_no_file_is_not_opened(self, folder: Place, name: str) -> None:
        with pytest.raises((UnsafeFileError, UnreadableError)):
            (folder / name).open()

    def test_a_pool_gives_what_was_expected(self, folder: Place) -> None:
        pool = FilePool(max_open=1)
        place = folder / "config.json"
        with pool.open(place, place.identity()) as first:
            assert read_range(first, 0, 2) == b"{}"
        with pool.open(place, place.identity()) as second:
            assert second is first
        pool.close()


class TestSafety:
    def test_a_name_stays_inside(self, folder: Place) -> None:
        assert folder.resolve_member("config.json", "the index") == folder / "config.json"
        for name in ("../x", "/x", "a/../b", ".", ""):
            with pytest.raises(UnsafeFileError, match="the index: names the file"):
                folder.resolve_member(name, "the index")

    def test_what_is_missing_is_named(self, folder: Place) -> None:
        with pytest.raises(CheckpointNotFoundError, match=r"x\.bin: is not there, though the index needs it"):
            folder.resolve_member("x.bin", "the index")

    @pytest.mark.parametrize("where", ["one", "one/two", "one/two/three.bin"])
    def test_a_link_anywhere_in_a_name_leads_out(self, tmp_path: Path, where: str) -> None:
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        for folder in (inside, outside):
            (folder / "one" / "two").mkdir(parents=True)
            (folder / "one" / "two" / "three.bin").write_bytes(b"x")
        assert as_place(inside).resolve_member("one/two/three.bin", "the index").is_present()
        (inside / where).rename(tmp_path / "moved")
        (inside / where).symlink_to(outside / where)
        with pytest.raises(UnsafeFileError, match=f"leaves the directory, to {outside}/one/two/three.bin"):
            as_place(inside).resolve_member("one/two/three.bin", "the index")
        (inside / where).unlink()
        (inside / where).symlink_to(inside / "again")
        (tmp_path / "moved").rename(inside / "again")
        assert as_place(inside).resolve_member("one/two/three.bin", "the index").is_present()

    def test_a_folder_is_no_file(self, folder: Place) -> None:
        with pytest.raises(UnsafeFileError, match="is not a regular file"):
            folder.resolve_member("ckpt_convert", "the index")


class TestChanges:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda place: place.store.put(str(place.path), b"{} "), "it had 2 bytes and has 3 now"),
            (lambda place: place.store.put(str(place.path), b"[]"), "it was "),
            (lambda place: place.store.delete([str(place.path)]), "it was removed"),
        ],
        ids=["longer", "other", "removed"],
    )
    def test_a_file_that_changes_is_told(self, folder: Place, change: Callable[[Place], Any], said: str) -> None:
        place = folder / "config.json"
        before = place.identity()
        assert check_unchanged({place: before}) == []
        change(place)
        told = f"changed while it was read: {said}"
        with pytest.raises(SourceChangedError, match=told):
            check_unchanged({place: before})
        with pytest.raises(SourceChangedError, match=told), place.open(expected=before) as file:
            read_range(file, 0, 1)


class TestWriting:
    def test_a_file_is_put_whole(self, root: Place) -> None:
        made = root.store.put(str(root.path / "new"), b"data")
        assert (root / "new").read(10) == b"data"
        assert (root / "new").identity() == made

    def test_create_only(self, root: Place) -> None:
        root.store.put(str(root.path / "new"), b"1", create_only=True)
        with pytest.raises(OutputExistsError):
            root.store.put(str(root.path / "new"), b"2", create_only=True)
        assert (root / "new").read(10) == b"1"

    def test_if_match(self, root: Place) -> None:
        name = str(root.path / "new")
        first = root.store.put(name, b"1")
        second = root.store.put(name, b"2", if_match=first.etag)
        assert second.etag != first.etag
        with pytest.raises(OutputExistsError):
            root.store.put(name, b"3", if_match=first.etag)
        with pytest.raises(OutputExistsError):
            root.store.put(f"{name}er", b"3", if_match=first.etag)
        assert (root / "new").read(10) == b"2"

    def test_ranges_in_any_order(self, root: Place) -> None:
        writer = root.store.create(str(root.path / "new"), 6)
        writer.write(3, memoryview(b"def"))
        assert not (root / "new").is_present()
        writer.write(0, memoryview(b"abc"))
        made = writer.complete()
        assert (root / "new").read(10) == b"abcdef"
        assert (root / "new").identity() == made

    def test_what_is_given_up_leaves_nothing(self, root: Place) -> None:
        writer = root.store.create(str(root.path / "new"), 6)
        writer.write(0, memoryview(b"abc"))
        writer.abort()
        assert sorted(place.relative_name(root) for place in root.entries()) == sorted(FILES)

    def test_delete(self, root: Place) -> None:
        root.store.delete([str(root.path / name) for name in ("config.json", "nothing")])
        assert not (root / "config.json").is_present()


class TestMemory:
    """What only holds of a store where every look is a request."""

    def test_a_listing_answers_without_requests(self) -> None:
        store = MemoryStore({f"a/{name}": data for name, data in FILES.items()})
        folder = Place(store, PurePosixPath("a")).listed()
        assert (folder / "config.json").is_regular_file()
        assert not (folder / "nothing").is_present()
        assert len(folder.children()) == 3
        assert folder.resolve_member("config.json", "me").identity().size == 2
        assert store.requests == {"list": 1}

    def test_small_reads_that_are_close_are_one_request(self) -> None:
        store = MemoryStore({"a": bytes(1 << 20)})
        with Place(store, PurePosixPath("a")).listed().open() as file:
            for offset in (0, 8, 16, 4096):
                read_range(file, offset, 8)
            assert store.requests["get"] == 1
            read_range(file, 0, 1 << 19)
            assert store.requests["get"] == 2
            file.read_many([(offset, memoryview(bytearray(1 << 12))) for offset in range(1 << 19, 1 << 20, 1 << 16)])
            assert store.requests["get"] == 3

    def test_latency_is_counted(self) -> None:
        store = MemoryStore({"a": b"1"}, latency=0.5)
        Place(store, PurePosixPath("a")).read(1)
        assert store.requests == {"head": 1, "get": 1}
        assert store.waited == 1.0

    def test_it_has_no_path(self) -> None:
        with pytest.raises(CkptConvertError, match="memory://a: is on no disk of this machine"):
            _ = Place(MemoryStore(), PurePosixPath("a")).local


def test_a_local_place_is_called_as_it_was_given() -> None:
    for text in ("a/b", "./a//b", "/a/b", ".", "a"):
        assert str(as_place(text)) == str(Path(text))
        assert str(as_place(text) / "c") == str(Path(text) / "c")
        assert str(as_place(text).parent) == str(Path(text).parent)


def test_a_process_caches_few_runs_of_small_ranges_however_many_files_are_open() -> None:
    asked: list[int] = []

    def opened(number: int) -> ObjectFile:
        def fetch(offset: int, nbytes: int) -> bytes:
            asked.append(number)
            return bytes(nbytes)

        file = ObjectFile(str(number), Version(1 << 20, "x"), fetch)
        file.join([(0, 100), (100, 200)])
        return file

    files = [opened(number) for number in range(12)]
    for first, numbers in ((0, range(12)), (100, range(12)), (100, range(4, 12))):
        asked.clear()
        for number in numbers:
            files[number].readinto(first, memoryview(bytearray(100)))
        assert asked == ([] if len(numbers) == 8 else [*range(12)])
