"""Where endpoints and credentials come from, in which order, and what is said when there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from ckpt_convert.errors import CkptConvertError, UnreadableError, UsageError
from ckpt_convert.storage.place import checked_place
from ckpt_convert.storage.remote.credentials import CredentialProvider, Credentials, find_credentials
from ckpt_convert.storage.remote.settings import resolve
from tests.servers.s3 import Bucket


@pytest.fixture(autouse=True)
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment that says nothing of stores, and a home without files of the AWS tools."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "S3_", "GCS_", "GOOGLE_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def profiles(home: Path) -> None:
    (home / ".aws").mkdir()
    (home / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id = D\naws_secret_access_key = d\n"
        "[work]\naws_access_key_id = W\naws_secret_access_key = w\naws_session_token = t\n"
    )
    (home / ".aws" / "config").write_text(
        "[default]\nregion = eu-west-1\n[profile work]\nregion = us-west-2\nendpoint_url = https://store.example\n"
    )


class TestEndpoints:
    def test_variables_in_their_order(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        profiles(tmp_path)
        assert resolve("s3", ()).config == {"region": "eu-west-1"}
        for name, url in (
            ("AWS_PROFILE", None),
            ("S3_ENDPOINT_URL", "https://composer"),
            ("AWS_ENDPOINT_URL", "https://all"),
            ("AWS_ENDPOINT_URL_S3", "https://s3"),
        ):
            monkeypatch.setenv(name, url or "work")
            assert resolve("s3", ()).config["endpoint"] == (url or "https://store.example")
        assert resolve("s3", (("endpoint", "https://option"),)).config["endpoint"] == "https://option"

    def test_plain_http_is_allowed_where_the_endpoint_says_so(self) -> None:
        assert resolve("s3", (("endpoint", "http://127.0.0.1:9"),)).client["allow_http"] == "true"
        assert "allow_http" not in resolve("s3", (("endpoint", "https://127.0.0.1:9"),)).client

    def test_times(self) -> None:
        settings = resolve("s3", (("max_retries", "3"), ("read_timeout", "5"), ("timeout", "2m")))
        assert settings.seconds("read_timeout") == 5
        assert settings.seconds("timeout") == 120
        assert settings.retries.most == 3
        for wrong in ("soon", "5 years"):
            with pytest.raises(UsageError, match="timeout: expected a time such as 30s or 2m"):
                resolve("s3", (("timeout", wrong),))


class TestCredentials:
    def found(self, *options: tuple[str, str]) -> Credentials:
        return find_credentials(resolve("s3", options))

    def test_options_then_environment_then_profile(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        profiles(tmp_path)
        assert self.found() == Credentials("D", "d")
        monkeypatch.setenv("AWS_PROFILE", "work")
        assert self.found() == Credentials("W", "w", "t")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "e")
        assert self.found() == Credentials("E", "e")
        assert self.found(("profile", "default")) == Credentials("D", "d")
        assert self.found(("access_key_id", "O"), ("secret_access_key", "o")) == Credentials("O", "o")
        with pytest.raises(UsageError, match="need each other"):
            self.found(("access_key_id", "O"))
        with pytest.raises(UsageError, match="the profile other is neither in"):
            self.found(("profile", "other"))

    def test_they_are_not_shown(self) -> None:
        assert repr(Credentials("KEY", "secret", "token")) == "Credentials(expires=None)"

    def test_without_any_one_sentence_says_what_to_set(self) -> None:
        with pytest.raises(
            CkptConvertError, match=r"s3://bucket/a: cannot be listed: no credentials were found: set AWS_"
        ):
            checked_place("s3://bucket/a").listed()

    def test_a_public_bucket_needs_none(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        bucket.put("a", b"x")
        with pytest.raises(UnreadableError, match="answered 403"):  # moto's buckets are not public
            checked_place(f"s3://{bucket.name}/a").read(1)

    def test_composers_keys_make_gs_the_s3_interface_of_google(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert resolve("gs", ()).speaks == "gs"
        monkeypatch.setenv("GCS_KEY", "G")
        monkeypatch.setenv("GCS_SECRET", "g")
        settings = resolve("gs", ())
        assert settings.speaks == "s3"
        assert settings.config["endpoint"] == "https://storage.googleapis.com"
        assert find_credentials(settings) == Credentials("G", "g")

    def test_a_connection_string_of_azure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        text = "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=a2V5PT0=;EndpointSuffix=core.windows.net"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
        assert resolve("az", ()).config == {"account_name": "me", "account_key": "a2V5PT0="}


class Roles(BaseHTTPRequestHandler):
    """The services that hand out the credentials of a role: of a container, an instance, a pod."""

    expires = datetime.now(UTC) + timedelta(hours=1)
    asked: list[str] = []  # noqa: RUF012 - the server makes an object for each request

    def _answer(self) -> None:
        self.asked.append(f"{self.command} {self.path}")
        if self.path == "/latest/api/token":
            text = "session"
        elif self.path.endswith("/security-credentials/"):
            text = "my-role"
        elif self.path == "/sts":
            found = {"AccessKeyId": "R", "SecretAccessKey": "r", "SessionToken": "s", "Expiration": 4e9}
            result = {"AssumeRoleWithWebIdentityResult": {"Credentials": found}}
            text = json.dumps({"AssumeRoleWithWebIdentityResponse": result})
        else:
            expires = self.expires.strftime("%Y-%m-%dT%H:%M:%SZ")
            text = json.dumps({"AccessKeyId": "R", "SecretAccessKey": "r", "Token": "s", "Expiration": expires})
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_POST = _answer  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""


class TestRoles:
    @pytest.fixture
    def url(self) -> Iterator[str]:
        Roles.asked.clear()
        with HTTPServer(("127.0.0.1", 0), Roles) as server:
            thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()
            thread.join()

    def test_of_a_container(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/creds")
        assert find_credentials(resolve("s3", ())).session_token == "s"

    def test_of_an_instance(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
        assert find_credentials(resolve("s3", ())).access_key_id == "R"
        assert Roles.asked[0] == "PUT /latest/api/token"
        assert Roles.asked[-1].endswith("/security-credentials/my-role")

    def test_of_a_pod(self, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("jwt\n")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::1:role/x")
        monkeypatch.setenv("AWS_STS_ENDPOINT", f"{url}/sts")
        assert find_credentials(resolve("s3", ())).secret_access_key == "r"

    def test_they_are_fetched_again_before_they_expire(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/creds")
        provider = CredentialProvider(resolve("s3", ()))
        assert provider() is provider()
        monkeypatch.setattr(Roles, "expires", datetime.now(UTC) + timedelta(minutes=2))
        soon = CredentialProvider(resolve("s3", ()))
        assert soon() is not soon()
        assert len(Roles.asked) == 3

    def test_a_service_that_is_not_there_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/creds?secret=x")
        with pytest.raises(UnreadableError, match=r"127\.0\.0\.1: gives no credentials") as caught:
            find_credentials(resolve("s3", ()))
        assert "secret" not in str(caught.value)
