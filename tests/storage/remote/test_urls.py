"""URLs of stores: what they denote, what is refused, and that nothing secret is repeated."""

from __future__ import annotations

import pickle
from pathlib import PurePosixPath
from typing import Any

import pytest

from ckpt_convert.errors import UsageError
from ckpt_convert.storage.place import Place, checked_place, with_options
from ckpt_convert.storage.remote.objects import ObjectStorage


def located(options: dict[str, object], url: str) -> Any:
    (place,) = with_options(options, url)
    return place


SECRETS: dict[str, object] = {
    "access_key_id": "AKIASECRET",
    "secret_access_key": "hushhush",
    "session_token": "tokentoken",
}


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3a://bucket/a/b/", "s3://bucket/a/b"),
        ("S3://bucket", "s3://bucket"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("az://container/a", "az://container/a"),
        ("azure://container/a", "az://container/a"),
        ("abfss://container@account.dfs.core.windows.net/a", "az://container/a"),
    ],
)
def test_a_url_is_a_place(url: str, label: str) -> None:
    place = checked_place(url)
    assert str(place) == label
    assert place == checked_place(url)
    assert pickle.loads(pickle.dumps(place)) == place
    assert str(place / "config.json") == f"{label}/config.json"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", r"s3://: names no bucket"),
        ("s3:///a", r"s3:///a: names no bucket"),
        ("s3://bucket/a//b", r"has an empty part"),
        ("s3://bucket/../b", r"`\.\.` in its path"),
        ("s3://bucket/a?secret=hushhush", r"s3://bucket/a: has a query"),
        ("s3://AKIASECRET:hushhush@bucket/a", r"s3://…: has a user or a key in it"),
        ("s3://AKIASECRET:hush/hushhush@bucket/a", r"s3://…: has a user or a key in it"),
        ("abfss://container/a", r"names no container, or no account"),
        ("oci://bucket@namespace/a", r"write s3://bucket/a, with AWS_ENDPOINT_URL=https://namespace\.compat"),
        ("r2://bucket/a", r"r2:// addresses are not supported"),
    ],
)
def test_what_is_no_url_of_a_store_is_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        checked_place(url)
    assert "hushhush" not in str(caught.value)
    assert "AKIASECRET" not in str(caught.value)


def test_options_belong_to_the_value_and_are_not_shown() -> None:
    place = located(SECRETS, "s3://bucket/a")
    assert isinstance(place, Place)
    assert place == located(dict(reversed(SECRETS.items())), "s3://bucket/a")
    assert place != checked_place("s3://bucket/a")
    assert not any(secret in text for secret in map(str, SECRETS.values()) for text in (repr(place), str(place)))


def test_options_of_one_bucket_are_for_it_alone() -> None:
    options = {"region": "eu-west-1", "s3://other": {"region": "us-west-2"}, "google_base_url": "http://127.0.0.1"}
    assert checked_place(located(options, "s3://bucket/a")).store == ObjectStorage(
        "s3", "bucket", (("region", "eu-west-1"),)
    )
    assert checked_place(located(options, "s3://other/a")).store == ObjectStorage(
        "s3", "other", (("region", "us-west-2"),)
    )
    assert with_options(options, "s3://bucket/a", "models/a", None)[1:] == ["models/a", None]
    with pytest.raises(UsageError, match="nothing here is the URL of a store"):
        located(options, "models/a")
    with pytest.raises(UsageError, match="no store has the option 'regoin'"):
        located({"regoin": "x"}, "s3://bucket/a")


def test_an_endpoint_makes_a_bucket_of_oracles() -> None:
    place = located({"endpoint": "https://oracle"}, "oci://bucket@namespace/a")
    assert place == Place(ObjectStorage("s3", "bucket", (("endpoint", "https://oracle"),)), PurePosixPath("a"))
