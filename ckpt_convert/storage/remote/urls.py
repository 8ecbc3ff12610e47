"""URLs of stores: which store a scheme denotes, and where in it a URL points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from ckpt_convert.storage.base import Store

_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "oci"})

Address = tuple[Store, PurePosixPath]
"""A store, and a name in it."""


def address_of(url: str, options: Mapping[str, object] | None = None) -> Address | None:
    """The store and the name that a URL denotes; None if it is no URL, or its scheme is that of no store.

    ``options`` are the ``storage_options`` of a caller. Nothing is asked of the store. Raises UsageError for a URL that
    is not of its scheme's form.
    """
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower() if rest or "://" in url else ""
    if scheme in _BUCKETS:
        from ckpt_convert.storage.remote import buckets  # not before: most places are paths

        return buckets.address_in_bucket(scheme, rest, options or {})
    if scheme in ("https", "http"):
        from ckpt_convert.storage.remote import web

        return web.address_on_web(url, options or {})
    return None
