"""Addresses in the buckets of object stores."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from ckpt_convert.errors import UsageError
from ckpt_convert.storage.remote.objects import ObjectStorage
from ckpt_convert.storage.remote.settings import OPTION, StoreOptions, check_options, oci_endpoint

Address = tuple[ObjectStorage, PurePosixPath]


def address_in_bucket(scheme: str, rest: str, options: Mapping[str, object]) -> Address:
    """The bucket and the name in it of a URL, given its scheme and what follows that; see ``urls.address_of``."""
    return _SCHEMES[scheme](rest, options)


def _bucket_and_name(scheme: str, rest: str, form: str) -> tuple[str, PurePosixPath]:
    """The parts of a URL after its scheme; what may hold a secret is not repeated in the error."""
    authority, _, name = rest.partition("/")
    parts = name.rstrip("/").split("/") if name.rstrip("/") else []
    user = ":" in authority or ("@" in authority and scheme not in ("abfss", "oci"))
    problem = None
    if user:
        problem = f"has a user or a key in it; credentials are given by the environment, or as {OPTION}"
    elif "?" in rest or "#" in rest:
        problem = f"has a query or a fragment, which such a URL does not; options are given as {OPTION}"
    elif not authority:
        problem = "names no bucket"
    elif any(part in ("", ".", "..") for part in parts):
        problem = "has an empty part, `.` or `..` in its path"
    if problem is not None:
        shown = "…" if user else re.split(r"[?#]", rest, maxsplit=1)[0]
        raise UsageError(f"{scheme}://{shown}: {problem}; expected {form}")
    return authority, PurePosixPath(*parts)


def _s3(rest: str, options: Mapping[str, object]) -> Address:
    bucket, name = _bucket_and_name("s3", rest, "s3://bucket/path")
    return ObjectStorage("s3", bucket, check_options("s3", bucket, options)), name


def _gs(rest: str, options: Mapping[str, object]) -> Address:
    bucket, name = _bucket_and_name("gs", rest, "gs://bucket/path")
    return ObjectStorage("gs", bucket, check_options("gs", bucket, options)), name


def _az(rest: str, options: Mapping[str, object]) -> Address:
    container, name = _bucket_and_name("az", rest, "az://container/path")
    return ObjectStorage("az", container, check_options("az", container, options)), name


def _abfss(rest: str, options: Mapping[str, object]) -> Address:
    """``abfss://container@account.dfs.core.windows.net/path``: Azure with the account in the URL."""
    form = "abfss://container@account.dfs.core.windows.net/path"
    authority, name = _bucket_and_name("abfss", rest, form)
    container, _, host = authority.partition("@")
    if not container or not host:
        raise UsageError(f"abfss://{authority}: names no container, or no account; expected {form}")
    account: StoreOptions = (("account_name", host.partition(".")[0]),)
    return ObjectStorage("az", container, (*check_options("az", container, options), *account)), name


def _oci(rest: str, options: Mapping[str, object]) -> Address:
    """Oracle's Object Storage by its S3 interface: ``oci://bucket@namespace/path``."""
    authority, name = _bucket_and_name("oci", rest, "oci://bucket@namespace/path")
    bucket, _, namespace = authority.partition("@")
    given = check_options("s3", bucket, options)
    return ObjectStorage("s3", bucket, oci_endpoint(given, bucket, name, namespace)), name


_SCHEMES: dict[str, Callable[[str, Mapping[str, object]], Address]] = {
    "s3": _s3,
    "s3a": _s3,
    "gs": _gs,
    "gcs": _gs,
    "az": _az,
    "azure": _az,
    "abfs": _abfss,
    "abfss": _abfss,
    "oci": _oci,
}
"""The function that reads the URLs of each scheme."""
