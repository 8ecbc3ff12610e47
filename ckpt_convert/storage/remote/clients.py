"""The clients of each store, one set for a process: obstore's, and for S3 one for what obstore does not offer."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt_convert.errors import MissingPackageError, UsageError
from ckpt_convert.storage.remote.credentials import CredentialProvider
from ckpt_convert.storage.remote.failures import describe
from ckpt_convert.storage.remote.requests import PartRequests
from ckpt_convert.storage.remote.retries import Retries
from ckpt_convert.storage.remote.settings import OPTION, Settings, StoreOptions, resolve

_VARIABLES = ("AWS_", "S3_", "GCS_", "GOOGLE_", "AZURE_")
"""Prefixes of the environment variables that say how a store is reached."""

_OURS = ("access_key_id", "secret_access_key", "session_token")


@dataclass(frozen=True)
class Client:
    """``obstore`` for most requests, ``parts`` for uploads part by part where the store speaks S3."""

    obstore: Any
    retries: Retries
    parts: PartRequests | None


_clients: dict[tuple[Any, ...], Client] = {}
_lock = threading.Lock()


def client_of(scheme: str, bucket: str, options: StoreOptions) -> Client:
    """The client of a store, made when it is first used; the credentials have been found when it returns.

    Raises MissingPackageError, UsageError for settings that do not fit each other, UnreadableError without credentials.
    """
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES)))
    key = (scheme, bucket, options, environment)  # what a notebook sets after an error counts for the next try
    with _lock:
        client = _clients.get(key)
        if client is None:
            client = _clients[key] = _make(resolve(scheme, options), bucket)
    if client.parts is not None and client.parts.credentials is not None:
        client.parts.credentials()
    return client


def _make(settings: Settings, bucket: str) -> Client:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError as error:
        raise MissingPackageError(
            f"object stores need the package obstore, which cannot be imported ({error}): "
            "pip install 'ckpt-convert[remote]'"
        ) from None
    config: Any = dict(settings.config)
    shared: dict[str, Any] = {"client_options": dict(settings.client), "retry_config": settings.retry}
    try:
        if settings.speaks == "gs":
            return Client(GCSStore(bucket, config=config, **shared), settings.retries, None)
        if settings.speaks == "az":
            return Client(AzureStore(bucket, config=config, **shared), settings.retries, None)
        credentials = None if settings.flag("skip_signature") else CredentialProvider(settings)
        if credentials is not None:
            shared["credential_provider"] = credentials.for_obstore
        made = S3Store(bucket, config=_s3_config(settings.config), **shared)
        return Client(made, settings.retries, PartRequests(settings, bucket, credentials))
    except (BaseError, ValueError) as error:
        raise UsageError(f"{bucket}: {describe(str(error))[0]}; look at {OPTION} and the environment") from None


def _s3_config(config: Mapping[str, str]) -> Any:
    given = {name: value for name, value in config.items() if name not in _OURS}
    if "endpoint" in given:
        given["aws_endpoint_url_s3"] = given["endpoint"]  # else the variable of this name would win
    return given
