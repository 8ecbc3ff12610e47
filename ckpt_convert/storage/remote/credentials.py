"""Credentials for S3: from options, the environment, profiles, or the machine's role."""

from __future__ import annotations

import json
import os
import threading
import urllib.parse
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ckpt_convert.errors import UnreadableError, UsageError
from ckpt_convert.storage.remote.settings import OPTION, Settings, profile_of

_EARLY = timedelta(minutes=5)
"""Credentials are fetched again this long before they expire."""

_METADATA = "http://169.254.169.254"
_CONTAINER = "http://169.254.170.2"


@dataclass(frozen=True)
class Credentials:
    """Keys that sign requests; ``expires`` is None for those that stay valid."""

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expires: datetime | None = None

    def for_obstore(self) -> dict[str, Any]:
        """The same as obstore's ``S3Credential``."""
        return {
            "access_key_id": self.access_key_id,
            "secret_access_key": self.secret_access_key,
            "token": self.session_token,
            "expires_at": self.expires,
        }


class CredentialProvider:
    """Credentials of one store, fetched when they are first needed and again before they expire."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._known: Credentials | None = None

    def __call__(self) -> Credentials:
        """Raises UnreadableError if there are none."""
        with self._lock:
            known = self._known
            if known is None or (known.expires is not None and known.expires - _EARLY < datetime.now(UTC)):
                self._known = known = find_credentials(self._settings)
            return known

    def for_obstore(self) -> dict[str, Any]:
        """obstore's ``S3CredentialProvider``."""
        return self().for_obstore()


def find_credentials(settings: Settings) -> Credentials:
    """The credentials of a store; sources in the order of the AWS tools. Raises UnreadableError if there are none."""
    for source in (_of_options, _of_environment, _of_profile, _of_web_identity, _of_container, _of_instance):
        found = source(settings)
        if found is not None:
            return found
    raise UnreadableError(
        "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public "
        f"bucket give `skip_signature` as {OPTION}"
    )


def _of_options(settings: Settings) -> Credentials | None:
    key, secret = (settings.config.get(name) for name in ("access_key_id", "secret_access_key"))
    if bool(key) != bool(secret):
        raise UsageError(f"{OPTION}: access_key_id and secret_access_key need each other", "storage_options")
    return Credentials(key, secret, settings.config.get("session_token")) if key and secret else None


def _of_environment(settings: Settings) -> Credentials | None:
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    token = os.environ.get("AWS_SESSION_TOKEN") or os.environ.get("AWS_SECURITY_TOKEN")
    # A profile that is asked for as an option is nearer than the environment.
    asked = settings.profile is not None and settings.profile not in _profiles_of_environment()
    return Credentials(key, secret, token) if key and secret and not asked else None


def _profiles_of_environment() -> set[str | None]:
    return {os.environ.get("AWS_PROFILE"), os.environ.get("AWS_DEFAULT_PROFILE")}


_OF_BOTO = ("sso_session", "sso_start_url", "credential_process", "role_arn", "credential_source", "login_session")
"""Settings of profiles whose credentials only the AWS tools' own library fetches."""


def _of_profile(settings: Settings) -> Credentials | None:
    file = profile_of(settings.profile)
    key, secret = file.get("aws_access_key_id"), file.get("aws_secret_access_key")
    if key and secret and "role_arn" not in file:
        return Credentials(key, secret, file.get("aws_session_token"))
    return _of_boto(settings.profile) if any(name in file for name in _OF_BOTO) else None


def _of_boto(profile: str | None) -> Credentials | None:
    """The credentials of a profile with a role, a single sign-on or a process, by botocore."""
    try:
        from botocore.session import Session
    except ImportError:
        raise UnreadableError(
            f"the profile {profile or 'default'} gets its credentials from a sign-on, a role or a process, which needs "
            "botocore: pip install botocore"
        ) from None
    found = Session(profile=profile).get_credentials()
    if found is None:
        return None
    frozen, until = found.get_frozen_credentials(), datetime.now(UTC) + 2 * _EARLY  # botocore renews them itself
    return Credentials(frozen.access_key, frozen.secret_key, frozen.token, until)


def _of_web_identity(settings: Settings) -> Credentials | None:
    """A role by the token in a file, as pods on EKS have one."""
    file, role = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"), os.environ.get("AWS_ROLE_ARN")
    if not file or not role:
        return None
    endpoint = os.environ.get("AWS_STS_ENDPOINT") or os.environ.get("AWS_ENDPOINT_URL_STS")
    query = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": os.environ.get("AWS_ROLE_SESSION_NAME", "ckpt-convert"),
        "WebIdentityToken": Path(file).read_text(encoding="ascii").strip(),
    }
    answer = _ask(
        "POST",
        endpoint or f"https://sts.{settings.config['region']}.amazonaws.com",
        {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"},
        body=urllib.parse.urlencode(query).encode(),
    )
    try:
        found = json.loads(answer)["AssumeRoleWithWebIdentityResponse"]
        found = found["AssumeRoleWithWebIdentityResult"]["Credentials"]
        return Credentials(
            found["AccessKeyId"],
            found["SecretAccessKey"],
            found["SessionToken"],
            datetime.fromtimestamp(float(found["Expiration"]), UTC),
        )
    except (ValueError, KeyError, TypeError):
        raise UnreadableError("the token service gave no credentials; look at AWS_ROLE_ARN") from None


def _of_container(settings: Settings) -> Credentials | None:
    """The role of a container on ECS, or of a pod with EKS Pod Identity."""
    relative = os.environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    full = f"{_CONTAINER}{relative}" if relative else os.environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if not full:
        return None
    token = os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
    if file := os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
        token = Path(file).read_text(encoding="ascii").strip()
    return _parse(_ask("GET", full, {"Authorization": token} if token else {}))


def _of_instance(settings: Settings) -> Credentials | None:
    """The role of an instance on EC2; None if there is no such service to ask."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", _METADATA).rstrip("/")
    try:
        token = _ask("PUT", f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}).decode()
        headers = {"X-aws-ec2-metadata-token": token}
        roles = f"{base}/latest/meta-data/iam/security-credentials/"
        role = _ask("GET", roles, headers).decode().split()
        return _parse(_ask("GET", roles + role[0], headers)) if role else None
    except UnreadableError:
        return None


def _parse(answer: bytes) -> Credentials:
    try:
        found = json.loads(answer)
        expires = datetime.fromisoformat(found["Expiration"])
        return Credentials(found["AccessKeyId"], found["SecretAccessKey"], found["Token"], expires)
    except (ValueError, KeyError, TypeError):
        raise UnreadableError("the machine's role gave no credentials; look at what it is attached to") from None


def _ask(method: str, url: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
    """One short request to a service that hands out credentials; raises UnreadableError, without its answer."""
    import urllib3

    host = urllib.parse.urlsplit(url).hostname
    try:
        answer = urllib3.request(
            method, url, headers=headers, body=body, timeout=2.0, redirect=False, retries=urllib3.Retry(1, redirect=0)
        )
    except urllib3.exceptions.HTTPError as error:
        raise UnreadableError(f"{host}: gives no credentials ({type(error).__name__})") from None
    if answer.status != 200:
        raise UnreadableError(f"{host}: gives no credentials (status {answer.status})")
    return answer.data
