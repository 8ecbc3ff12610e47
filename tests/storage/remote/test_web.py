"""Files of web servers, read by ranges: every byte under one etag, failures that pass, and what is never shown."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath

import pytest

from ckpt_convert.errors import SourceChangedError, UnreadableError, UsageError
from ckpt_convert.storage.base import FileKind, read_range
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote.http import Patience
from ckpt_convert.storage.remote.urls import address_of
from ckpt_convert.storage.remote.web import WebStore, parse_web_url
from tests.servers import faults
from tests.servers.faults import FaultProxy, Rule
from tests.servers.http import Answer, HttpServer, Request
from tests.servers.web import WebServer, file_answer

NAME = "models/llama/model.safetensors"
DATA = bytes(range(256)) * 4096  # 1 MiB, more than what is read at once for a header
SIGNED = "X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0123abcd"
QUICK = Patience(timeout=5.0, retry_for=5.0, connect_for=5.0, pause=0.001)
IMPATIENT = Patience(timeout=1.0, retry_for=0.02, connect_for=0.02, pause=0.01)


def place_of(url: str, patience: Patience = QUICK) -> Place:
    store, path = parse_web_url(url, patience)
    return Place(store, path)


def whole(place: Place) -> bytes:
    with place.open() as file:
        return read_range(file, 0, file.size)


@pytest.fixture
def proxy(web: WebServer) -> Iterator[FaultProxy]:
    """A server of the file, behind a proxy that misbehaves."""
    web.files[NAME] = DATA
    with FaultProxy(web.url) as server:
        yield server


FAULTS = {
    "503": faults.status(503, b"busy"),
    "429": faults.status(429, b"too many"),
    "reset": faults.reset,
    "lost": faults.lost,
    "cut at once": faults.cut(0),
    "cut": faults.cut(1000),
    "too short": faults.wrong_length(-1000),
}
"""Faults, of each of which a few in a row pass."""


class TestNames:
    def test_a_file_is_asked_for_by_its_name(self, web: WebServer) -> None:
        web.files[NAME] = DATA
        folder = place_of(f"{web.url}/models/llama")
        assert (folder / "model.safetensors").kind() is FileKind.FILE
        assert (folder / "model.safetensors").identity().size == len(DATA)
        assert (folder / "config.json").kind() is None
        assert str(folder / "model.safetensors") == f"{web.url}/{NAME}"
        assert web.log.sent("get") < 100  # answers that there is nothing, and one byte

    def test_a_listing_has_the_names_that_are_known(self, web: WebServer) -> None:
        web.files |= {NAME: DATA, "models/llama/a/b": b"b", "models/other": b""}
        store, path = parse_web_url(f"{web.url}/models/llama/", QUICK)
        known = {name: entry for name in web.files if (entry := store.entry(name)) is not None}
        place = Place(store.with_names(known), path).listed()
        assert place.kind() is FileKind.FOLDER
        assert sorted(child.name for child in place.children()) == ["a", "model.safetensors"]
        assert place.store.list("models/llama") == {name: known[name] for name in known if name != "models/other"}
        assert list(place.store.list("models/llama", deep=False)) == [NAME]
        assert known["models/other"].size == 0

    @pytest.mark.parametrize("path", ["with space/a+b.json", "ü/100%25.json", "a(1)~$,;=@!.json"])
    def test_names_are_quoted_once(self, path: str, web: WebServer) -> None:
        web.files[path.replace("%25", "%")] = b"here"
        assert whole(place_of(f"{web.url}/{path}")) == b"here"

    @pytest.mark.parametrize("url", ["https://", "http:///x", "https://host:port/x", "https://host:99999/x"])
    def test_what_is_no_url(self, url: str) -> None:
        with pytest.raises(UsageError, match=r"the URL should have the form https://host/path"):
            parse_web_url(url)

    def test_nothing_is_written(self, web: WebServer) -> None:
        place = place_of(f"{web.url}/x")
        for write in (
            lambda: place.store.put("x", b""),
            lambda: place.store.create("x", 1),
            lambda: place.store.delete(["x"]),
        ):
            with pytest.raises(UsageError, match=r"/x: nothing can be written to a web server"):
                write()
        assert len(web.log) == 0

    def test_a_page_for_every_name_is_no_file(self) -> None:
        page = Answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<!doctype html>")
        with HttpServer(lambda request: page) as server:
            place = place_of(f"{server.url}/config.json")
            assert not place.is_present()
            with pytest.raises(UnreadableError, match=r"config.json: .*with a web page.*look at the URL"):
                place.open()


class TestReading:
    def test_ranges(self, web: WebServer) -> None:
        web.files[NAME] = DATA
        with place_of(f"{web.url}/{NAME}").open() as file:
            web.log.clear()
            assert read_range(file, 10, 20) == DATA[10:30]
            assert read_range(file, 300_000, 600_000) == DATA[300_000:900_000]
            assert read_range(file, len(DATA) - 5, 5) == DATA[-5:]
        assert len(web.log) == 3

    def test_an_empty_file(self, web: WebServer) -> None:
        web.files["empty"] = b""
        assert whole(place_of(f"{web.url}/empty")) == b""

    def test_it_goes_to_another_process_open_or_not(self, web: WebServer) -> None:
        web.files[NAME] = DATA
        place = place_of(f"{web.url}/{NAME}?{SIGNED}")
        with place.open() as file:
            assert read_range(pickle.loads(pickle.dumps(file)), 5, 5) == DATA[5:10]
        there = pickle.loads(pickle.dumps(place))
        assert there == place
        assert whole(there) == DATA

    def test_several_threads_share_connections(self, web: WebServer) -> None:
        web.files[NAME] = DATA
        wrong: list[int] = []
        with place_of(f"{web.url}/{NAME}").open() as file:

            def read(start: int) -> None:
                if read_range(file, start, 70_000) != DATA[start : start + 70_000]:
                    wrong.append(start)

            threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 800_000, 50_000)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not wrong

    def test_a_connection_is_used_again(self, web: WebServer) -> None:
        web.files |= {NAME: DATA, "other": b"12"}
        place = place_of(f"{web.url}/{NAME}")
        assert whole(place) == DATA
        assert (place.store.entry("other"), place.store.entry("nothing"))[1] is None
        assert len(web._connections) == 1
        web.drop_connections()  # as servers do with connections that are idle
        assert whole(place) == DATA

    @pytest.mark.parametrize("change", ["bytes", "size", "gone"])
    def test_a_change_between_two_ranges_is_an_error_that_names_the_file(self, change: str, web: WebServer) -> None:
        web.files[NAME] = DATA
        with place_of(f"{web.url}/{NAME}?{SIGNED}").open() as file:
            assert read_range(file, 0, 10) == DATA[:10]
            web.files[NAME] = {"bytes": DATA[::-1], "size": DATA[:-1], "gone": b""}[change]
            if change == "gone":
                del web.files[NAME]
            with pytest.raises(SourceChangedError, match=r"/model.safetensors: the source changed while it was read"):
                read_range(file, 500_000, 300_000)

    def test_a_server_without_ranges_serves_small_files_only(self) -> None:
        large = bytes(17 << 20)
        with WebServer({"config.json": b"{ }", NAME: large}, ranges=False) as web:
            with place_of(f"{web.url}/config.json").open() as file:
                assert read_range(file, 1, 2) == b" }"
            with (
                place_of(f"{web.url}/{NAME}").open() as file,
                pytest.raises(UnreadableError, match=r"model.safetensors: .*no ranges of files.*download it"),
            ):
                read_range(file, 0, 10)

    def test_a_server_that_says_nothing_of_a_files_version_is_refused(self) -> None:
        def serve(request: Request) -> Answer:
            answer = file_answer(request, DATA)
            return Answer(answer.status, {k: v for k, v in answer.headers.items() if k != "ETag"}, answer.body)

        with HttpServer(serve) as server, pytest.raises(UnreadableError, match="neither ETag nor Last-Modified"):
            place_of(f"{server.url}/{NAME}").open()

    def test_the_time_of_the_last_change_does_where_there_is_no_etag(self) -> None:
        times = ["Mon, 01 Jan 2024 00:00:00 GMT"]

        def serve(request: Request) -> Answer:
            answer = file_answer(request, DATA)
            headers = {k: v for k, v in answer.headers.items() if k != "ETag"}
            return Answer(answer.status, {**headers, "Last-Modified": times[-1]}, answer.body)

        with HttpServer(serve) as server, place_of(f"{server.url}/{NAME}").open() as file:
            assert read_range(file, 0, 10) == DATA[:10]
            times.append("Mon, 01 Jan 2024 00:00:01 GMT")
            with pytest.raises(SourceChangedError):
                read_range(file, 500_000, 10)

    def test_bytes_that_are_compressed_are_refused(self) -> None:
        def serve(request: Request) -> Answer:
            answer = file_answer(request, DATA)
            return Answer(answer.status, {**answer.headers, "Content-Encoding": "gzip"}, answer.body)

        with (
            HttpServer(serve) as server,
            place_of(f"{server.url}/{NAME}").open() as file,
            pytest.raises(UnreadableError, match="sends it compressed"),
        ):
            read_range(file, 0, 10)


class TestFailures:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_what_may_pass_is_asked_again(self, fault: str, proxy: FaultProxy) -> None:
        with place_of(f"{proxy.url}/{NAME}").open() as file:
            rule = proxy.add(Rule(FAULTS[fault], times=3))
            assert read_range(file, 300_000, 600_000) == DATA[300_000:900_000]
            assert rule.hits == 3

    def test_what_has_come_is_not_asked_for_again(self) -> None:
        asked: list[str] = []

        def serve(request: Request) -> Answer:
            """At most 200,000 bytes at a time, as a server may."""
            asked.append(request.headers["range"])
            start, end = map(int, asked[-1].removeprefix("bytes=").split("-"))
            end = min(end, start + 199_999)
            return file_answer(Request("GET", "/", {"range": f"bytes={start}-{end}"}), DATA)

        with HttpServer(serve) as server, place_of(f"{server.url}/{NAME}").open() as file:
            assert read_range(file, 300_000, 500_000) == DATA[300_000:800_000]
        assert asked[1:] == ["bytes=300000-799999", "bytes=500000-799999", "bytes=700000-799999"]

    @pytest.mark.parametrize("fault", ["503", "reset", "cut at once"])
    def test_what_does_not_pass_is_one_error(self, fault: str, proxy: FaultProxy) -> None:
        with place_of(f"{proxy.url}/{NAME}?{SIGNED}", IMPATIENT).open() as file:
            proxy.add(Rule(FAULTS[fault], times=None))
            with pytest.raises(
                UnreadableError, match=rf"^{proxy.url}/{NAME}: cannot be read: .*try again later$"
            ) as it:
                read_range(file, 0, 600_000)
        assert "Signature" not in str(it.value)
        assert it.value.__cause__ is None

    def test_an_outage_in_the_middle(self, proxy: FaultProxy) -> None:
        with place_of(f"{proxy.url}/{NAME}").open() as file:
            assert read_range(file, 0, 10) == DATA[:10]
            with proxy.down():
                timer = threading.Timer(0.2, proxy._down.clear)
                timer.start()
                assert read_range(file, 300_000, 600_000) == DATA[300_000:900_000]
                timer.join()

    def test_an_etag_that_is_another_is_never_read_past(self, proxy: FaultProxy) -> None:
        with place_of(f"{proxy.url}/{NAME}").open() as file:
            proxy.add(Rule(faults.cut(1000)))
            proxy.add(Rule(faults.changed_etag))
            with pytest.raises(SourceChangedError, match="its etag was"):
                read_range(file, 300_000, 600_000)

    def test_a_server_that_does_not_answer(self, web: WebServer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
            with pytest.raises(UnreadableError, match="does not answer in time"):
                place_of(url, Patience(timeout=0.05, retry_for=0.1, connect_for=0.1, pause=0.01)).open()

    def test_a_server_that_is_not_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        with pytest.raises(UnreadableError, match="Connection refused"):
            place_of(f"http://127.0.0.1:{port}/x", IMPATIENT).open()

    def test_a_name_that_no_server_has_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def look_up(*_: object, **__: object) -> None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        with pytest.raises(UnreadableError, match="there is no server of this name"):
            place_of("https://nowhere.invalid/x", Patience(retry_for=100, connect_for=100)).open()

    @pytest.mark.parametrize(("status", "way"), [(403, "get a new link"), (401, "logged in"), (500, "try again later")])
    def test_refusals(self, status: int, way: str) -> None:
        expected = rf"/x: cannot be read: .*answers {status} .*{way}"
        with HttpServer(lambda request: Answer(status)) as server, pytest.raises(UnreadableError, match=expected):
            place_of(f"{server.url}/x", IMPATIENT).open()

    def test_how_long_is_waited_is_an_option(self) -> None:
        options = {"read_timeout": "5s", "retry_timeout": "2", "region": "for another store"}
        address = address_of("https://host/x", options)
        assert address is not None
        assert address[0] == WebStore("https://host", patience=Patience(timeout=5.0, retry_for=2.0, connect_for=2.0))
        with pytest.raises(UsageError, match="no store has the option 'timeuot'"):
            address_of("https://host/x", {"timeuot": 1})


class TestRedirects:
    def test_where_a_redirect_led_is_asked_directly_until_it_expires(self, web: WebServer) -> None:
        with WebServer({"blob": DATA}, query="signature=1") as cdn:
            web.redirects[NAME] = f"{cdn.url}/blob?signature=1"
            with place_of(f"{web.url}/{NAME}").open() as file:
                web.log.clear()
                assert read_range(file, 0, 300_000) == DATA[:300_000]
                assert read_range(file, 300_000, 300_000) == DATA[300_000:600_000]
                assert len(web.log) == 1
                cdn._query = "signature=2"
                web.redirects[NAME] = f"{cdn.url}/blob?signature=2"
                assert read_range(file, 600_000, 300_000) == DATA[600_000:900_000]
                assert len(web.log) == 2

    def test_a_password_is_sent_to_its_own_server_only(self) -> None:
        seen: dict[str, list[str | None]] = {"first": [], "second": []}

        def serve(name: str, answer: Callable[[Request], Answer]) -> Callable[[Request], Answer]:
            def noted(request: Request) -> Answer:
                seen[name].append(request.headers.get("authorization"))
                return answer(request)

            return noted

        with HttpServer(serve("second", lambda request: file_answer(request, DATA))) as second:
            target = {"Location": f"{second.url.replace('127.0.0.1', 'localhost')}/x"}
            with HttpServer(serve("first", lambda request: Answer(302, target))) as first:
                place = place_of(first.url.replace("//", "//user:pass%40word@") + "/x")
                assert whole(place) == DATA
        assert set(seen["first"]) == {"Basic dXNlcjpwYXNzQHdvcmQ="}
        assert set(seen["second"]) == {None}
        assert "pass" not in f"{place} {place!r}"

    def test_redirects_end(self, web: WebServer) -> None:
        web.redirects["x"] = "/x"
        with pytest.raises(UnreadableError, match="redirects without end"):
            place_of(f"{web.url}/x").open()

    def test_a_redirect_leads_to_the_web(self, web: WebServer) -> None:
        web.redirects["x"] = "file:///etc/passwd"
        with pytest.raises(UnreadableError, match="should have the form https://"):
            place_of(f"{web.url}/x").open()


def test_a_query_string_is_used_and_never_shown() -> None:
    with WebServer({"m/config.json": DATA}, query=SIGNED) as web:
        place = place_of(f"{web.url}/m?{SIGNED}")
        assert whole(place / "config.json") == DATA
        with pytest.raises(UnreadableError) as refused:
            (place / "nothing").open()
        shown = f"{place} {place!r} {refused.value} {place.store.label('x')}"
        assert "Signature" not in shown
        assert "AKIA" not in shown
    assert place == Place(place.store, PurePosixPath("m"))
