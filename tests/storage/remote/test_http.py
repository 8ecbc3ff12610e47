"""What networks put between: encryption, certificates, proxies; and what is never logged."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt_convert.errors import UnreadableError
from ckpt_convert.storage.place import Place
from ckpt_convert.storage.remote.http import Patience
from ckpt_convert.storage.remote.web import parse_web_url
from tests.servers.http import Answer, HttpServer, Request
from tests.servers.web import WebServer, file_answer

DATA = bytes(range(256)) * 2000
QUICK = Patience(timeout=5.0, retry_for=0.05, connect_for=0.05, pause=0.01)


def read(url: str) -> bytes:
    store, path = parse_web_url(url, QUICK)
    return Place(store, path).read(1 << 20)


def serve(request: Request) -> Answer:
    return file_answer(request, DATA)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The certificate of 127.0.0.1 and models.invalid, signed by itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("models.invalid")]
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path / "certificate.pem"
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(made.public_bytes(encoding) + private)
    return path


@pytest.fixture
def encrypted(certificate: Path) -> Iterator[HttpServer]:
    """A server that speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with HttpServer(serve) as server:
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        yield server


class TestEncryption:
    def test_a_certificate_that_is_not_known_is_refused_at_once(self, encrypted: HttpServer) -> None:
        with pytest.raises(UnreadableError, match=r"certificate is not accepted: .*self.signed.*SSL_CERT_FILE"):
            read(encrypted.url.replace("http://", "https://") + "/x")
        assert len(encrypted.log) == 0

    @pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
    def test_a_certificate_that_the_environment_names(
        self, name: str, encrypted: HttpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, str(certificate))
        assert read(encrypted.url.replace("http://", "https://") + "/x") == DATA

    def test_a_redirect_does_not_leave_encryption(
        self, encrypted: HttpServer, certificate: Path, web: WebServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        web.files["x"] = DATA
        encrypted._answer = lambda request: Answer(302, {"Location": f"{web.url}/x"})
        with pytest.raises(UnreadableError, match="redirects from https to http"):
            read(encrypted.url.replace("http://", "https://") + "/x")
        assert len(web.log) == 0


class TestProxies:
    def test_http_through_a_proxy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []

        def proxy(request: Request) -> Answer:
            seen.append((request.target, request.headers.get("proxy-authorization")))
            return serve(request)

        with HttpServer(proxy) as server:
            monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:pass@"))
            assert read("http://models.invalid/a/b?x=1") == DATA
        assert set(seen) == {("http://models.invalid:80/a/b?x=1", "Basic dXNlcjpwYXNz")}

    def test_https_through_a_tunnel(
        self, encrypted: HttpServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            asked: list[bytes] = []
            threading.Thread(target=_tunnel, args=(listener, encrypted.url, asked), daemon=True).start()
            monkeypatch.setenv("https_proxy", f"http://user:pass@127.0.0.1:{listener.getsockname()[1]}")
            assert read("https://models.invalid/x") == DATA
        assert asked[0].startswith(b"CONNECT models.invalid:443 HTTP/1.")
        assert b"proxy-authorization: basic dxnlcjpwyxnz" in asked[0].lower()

    def test_this_machine_is_asked_without_a_proxy(self, web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        web.files["x"] = DATA
        assert read(f"{web.url}/x") == DATA

    def test_what_no_proxy_names_is_asked_without_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        monkeypatch.setenv("no_proxy", ".invalid")
        asked: list[object] = []

        def look_up(host: str, *_: object, **__: object) -> None:
            asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "")

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        with pytest.raises(UnreadableError, match="no server of this name"):
            read("http://models.invalid/x")
        assert asked == ["models.invalid"]


def _tunnel(listener: socket.socket, server: str, asked: list[bytes]) -> None:
    """A proxy for one connection: whatever is asked for, it leads to ``server``."""
    client, _ = listener.accept()
    asked.append(client.recv(1 << 16))
    upstream = socket.create_connection(("127.0.0.1", int(server.rpartition(":")[2])))
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    for source, target in ((client, upstream), (upstream, client)):
        threading.Thread(target=_pump, args=(source, target), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with WebServer({"x": DATA}, query="sig=secret") as web:
        assert read(web.url.replace("//", "//user:word@") + "/x?sig=secret") == DATA
        with pytest.raises(UnreadableError):
            read(f"{web.url}/x?sig=other")
    assert caplog.records == []
