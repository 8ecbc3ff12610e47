"""What says how an object store is reached: options, the environment, and the files of the stores' own tools."""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from ckpt_convert.errors import UsageError
from ckpt_convert.storage.remote.retries import Retries

StoreOptions = tuple[tuple[str, str], ...]
"""Options of a store, sorted by key; their values may be secret."""

OPTION = "`storage_options={…}`"

_CLIENT = frozenset(
    {"timeout", "connect_timeout", "read_timeout", "proxy_url", "proxy_excludes", "root_certificate", "allow_http"}
)
_CLIENT_DEFAULTS = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "10m"}
_RETRY = {"max_retries": "20", "retry_timeout": "180"}
_UNITS = {"s": 1.0, "ms": 0.001, "m": 60.0, "min": 60.0}

# fmt: off
_S3 = frozenset(
    {"access_key_id", "secret_access_key", "session_token", "region", "endpoint",
     "virtual_hosted_style_request", "skip_signature", "profile", "server_side_encryption", "sse_kms_key_id",
     "sse_bucket_key_enabled", "request_payer", "disable_bulk_delete", "unsigned_payload"}
)
_GS = frozenset(
    {"service_account", "service_account_key", "application_credentials", "bearer_token", "base_url",
     "skip_signature", "access_key_id", "secret_access_key", "endpoint", "region"}
)
_AZ = frozenset(
    {"account_name", "account_key", "client_id", "client_secret", "tenant_id", "authority_host", "sas_key",
     "token", "endpoint", "use_emulator", "credential_type", "use_azure_cli", "federated_token_file",
     "msi_endpoint", "skip_signature", "connection_string"}
)
# fmt: on
_KNOWN = {"s3": _S3, "gs": _GS, "az": _AZ, "https": frozenset[str]()}
_PREFIXES = {"s3": ("aws_",), "gs": ("google_", "gcs_"), "az": ("azure_storage_", "azure_"), "https": ()}
_ALIASES = {
    "s3": {
        "token": "session_token",
        "default_region": "region",
        "endpoint_url": "endpoint",
        "endpoint_url_s3": "endpoint",
    },
    "gs": {"key": "access_key_id", "secret": "secret_access_key", "endpoint_url": "endpoint"},
    "az": {"sas_token": "sas_key", "access_key": "account_key", "endpoint_url": "endpoint"},
    "https": {},
}

GCS_S3_ENDPOINT = "https://storage.googleapis.com"


def known_option(scheme: str, key: str) -> str | None:
    """The name of an option as it is kept here; None if stores of this scheme have no such option."""
    name = key.lower()
    for prefix in _PREFIXES[scheme]:
        name = name.removeprefix(prefix)
    name = _ALIASES[scheme].get(name, name)
    return name if name in _KNOWN[scheme] or name in _CLIENT or name in _RETRY else None


def check_options(scheme: str, bucket: str, given: Mapping[str, object]) -> StoreOptions:
    """The options for this bucket; raises UsageError for a key that no store has.

    A key is that of an option, or the URL of a bucket with a mapping of options for it alone. Keys of stores with
    another scheme are left out, since the source and the target of a conversion may be different stores.
    """
    options: dict[str, str] = {}
    alone: Mapping[str, object] = {}
    for key, value in given.items():
        if "://" in key:
            if key.rstrip("/") == f"{scheme}://{bucket}":
                alone = _mapping(key, value)
            continue
        if not any(known_option(known, key) for known in _KNOWN):
            raise UsageError(f"{OPTION}: no store has the option {key!r}; see docs/storage.md", "storage_options")
        if (name := known_option(scheme, key)) is not None:
            options[name] = _text(value)
    for key, value in alone.items():
        name = known_option(scheme, key)
        if name is None:
            raise UsageError(f"{OPTION}: {scheme}:// has no option {key!r}; see docs/storage.md", "storage_options")
        options[name] = _text(value)
    return tuple(sorted(options.items()))


def _mapping(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{OPTION}: {key} needs a mapping of options", "storage_options")
    return value


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def oci_endpoint(options: StoreOptions, bucket: str, name: PurePosixPath, namespace: str) -> StoreOptions:
    """The options of a bucket of Oracle's, if they say where its S3 interface is; else raises UsageError."""
    if "endpoint" in dict(options):
        return options
    host = f"{namespace or 'NAMESPACE'}.compat.objectstorage.REGION.oraclecloud.com"
    raise UsageError(
        f"oci://{bucket}: this store is reached by its S3 interface: write s3://{bucket}/{name}, with "
        f"AWS_ENDPOINT_URL=https://{host}, AWS_REGION=REGION and a customer secret key as AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY"
    )


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a store: what obstore is given, and what our own requests need.

    speaks: "s3", "gs" or "az": the protocol.
    config: the store's own options.
    client: those of the HTTP client.
    """

    speaks: str
    config: Mapping[str, str] = field(repr=False)
    client: Mapping[str, Any] = field(repr=False)
    retries: Retries
    profile: str | None = None

    @property
    def retry(self) -> dict[str, Any]:
        """obstore's ``RetryConfig``."""
        return {"max_retries": self.retries.most, "retry_timeout": timedelta(seconds=self.retries.seconds)}

    def seconds(self, name: str) -> float:
        """A time limit of the client."""
        return parse_seconds(name, str(self.client[name]))

    def flag(self, name: str) -> bool:
        """Whether an option is switched on."""
        return self.config.get(name, "").lower() in ("true", "1", "yes", "on")


def resolve(scheme: str, options: StoreOptions) -> Settings:
    """The settings of a store, of these options and the environment; raises UsageError for an invalid value."""
    given = dict(options)
    client: dict[str, Any] = {**_CLIENT_DEFAULTS, **{name: given.pop(name) for name in _CLIENT if name in given}}
    retry = {name: given.pop(name, default) for name, default in _RETRY.items()}
    for name in _CLIENT_DEFAULTS:
        client[name] = f"{round(parse_seconds(name, client[name]) * 1000)}ms"
    profile = given.pop("profile", None)
    speaks = scheme
    if scheme == "gs" and (hmac := _gcs_hmac(given)) is not None:
        speaks, given = "s3", hmac
    elif scheme == "s3":
        profile = profile or os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        given = _s3_config(given, profile)
    elif scheme == "az":
        given = _azure_config(given)
    endpoint = given.get("endpoint") or given.get("base_url") or ""
    if endpoint.startswith("http://"):
        client["allow_http"] = "true"
    try:
        most = int(retry["max_retries"])
    except ValueError:
        raise UsageError(f"{OPTION}: max_retries: expected a number", "storage_options") from None
    retries = Retries(most, parse_seconds("retry_timeout", retry["retry_timeout"]))
    return Settings(speaks, given, client, retries, profile)


def parse_seconds(name: str, text: str) -> float:
    """Seconds of "30", "30s", "500ms" or "2m"; raises UsageError."""
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text[len(number) :].strip() or "s"
    try:
        return float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        raise UsageError(f"{OPTION}: {name}: expected a time such as 30s or 2m", "storage_options") from None


def _gcs_hmac(given: Mapping[str, str]) -> dict[str, str] | None:
    """The settings of Google's S3 interface, if there are HMAC keys for it (also as Composer's variables)."""
    key = given.get("access_key_id") or os.environ.get("GCS_KEY")
    secret = given.get("secret_access_key") or os.environ.get("GCS_SECRET")
    if not key or not secret:
        return None
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "endpoint": given.get("endpoint", GCS_S3_ENDPOINT),
        "region": given.get("region", "auto"),
        "disable_bulk_delete": "true",  # its S3 interface has no request for several names
    }


def _s3_config(given: dict[str, str], profile: str | None) -> dict[str, str]:
    environment = os.environ
    file = profile_of(profile)
    found = {
        "endpoint": environment.get("AWS_ENDPOINT_URL_S3")
        or environment.get("AWS_ENDPOINT_URL")
        or environment.get("S3_ENDPOINT_URL")
        or file.get("endpoint_url", ""),
        "region": environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or file.get("region", ""),
    }
    for name in ("skip_signature", "virtual_hosted_style_request", "request_payer", "unsigned_payload"):
        found[name] = environment.get(f"AWS_{name.upper()}", "")
    for name in ("server_side_encryption", "sse_kms_key_id", "sse_bucket_key_enabled"):
        found[name] = environment.get(f"AWS_{name.upper()}", "")
    config = {**{name: value for name, value in found.items() if value}, **given}
    config.setdefault("region", "us-east-1")
    return config


def profile_of(profile: str | None) -> Mapping[str, str]:
    """The settings of a profile in the AWS tools' files; credentials from the one, the rest from the other.

    Raises UsageError if a profile is asked for by name and is in neither.
    """
    environment = os.environ
    name = profile or "default"
    found: dict[str, str] = {}
    config = Path(environment.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    for path, section in ((config, name if name == "default" else f"profile {name}"), (credentials, name)):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            raise UsageError(f"{path}: is no file of profiles; look at it, or set AWS_CONFIG_FILE to another") from None
        if parser.has_section(section):
            found |= dict(parser.items(section))
    if not found and profile is not None:
        raise UsageError(f"the profile {profile} is neither in {config} nor in {credentials}; look at AWS_PROFILE")
    return found


def _azure_config(given: dict[str, str]) -> dict[str, str]:
    """The settings for obstore, which reads the AZURE_ variables itself but knows no connection string."""
    text = given.pop("connection_string", None) or os.environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    parts = dict(part.partition("=")[::2] for part in text.split(";") if "=" in part)
    names = {"AccountName": "account_name", "AccountKey": "account_key", "SharedAccessSignature": "sas_key"}
    found = {names[key]: value for key, value in parts.items() if key in names}
    if endpoint := parts.get("BlobEndpoint") or os.environ.get("AZURE_STORAGE_ENDPOINT"):
        found["endpoint"] = endpoint
    if account := os.environ.get("AZURE_STORAGE_ACCOUNT"):
        found.setdefault("account_name", account)
    return {**found, **given}
