"""What a store's errors say, as one sentence each: what was asked, what the store said, the way out.

The errors of libraries are dumps over many lines, which hold addresses with queries, and answers with keys in them. So
they are neither shown nor kept as the cause of ours.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ckpt_convert.errors import CkptConvertError, UnreadableError, UnwritableError
from ckpt_convert.storage.remote.settings import OPTION

_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z][A-Za-z -]*))?")
_CODE = re.compile(r"<Code>([\w.]{1,64})</Code>")
_MESSAGE = re.compile(r"<Message>([^<\n]{1,300})")
_JSON = re.compile(r'"message": ?\\?"([^"\\\n]{1,300})')
_SYSTEM = re.compile(r'message: "([^"]{1,100})"')
_BAD_NAME = re.compile(r'Path "([^"]*)"')

_KEYS = "look at the credentials: access key, secret, session token"
_ADVICE_BY_CODE = {
    "NoSuchBucket": "look at the bucket's name and at the endpoint, or create it",
    "ContainerNotFound": "look at the container's name and at the endpoint, or create it",
    "InvalidAccessKeyId": _KEYS,
    "SignatureDoesNotMatch": f"{_KEYS}; and at the region",
    "ExpiredToken": "get new credentials, and run it again",
    "TokenRefreshRequired": "get new credentials, and run it again",
    "AuthenticationFailed": "look at the credentials: account, key, token",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "PermanentRedirect": f"it is in another region: set AWS_REGION, or `region` in {OPTION}",
    "AuthorizationHeaderMalformed": f"look at the region: AWS_REGION, or `region` in {OPTION}",
    "EntityTooSmall": "the store takes no parts of this size; report this",
    "NoSuchUpload": "something else ended the upload, such as a rule of the bucket; run it again",
}
_ADVICE_BY_STATUS = {
    "301": _ADVICE_BY_CODE["PermanentRedirect"],
    "307": _ADVICE_BY_CODE["PermanentRedirect"],
    "400": f"look at the region, the endpoint and {OPTION}",
    "401": _KEYS,
    "403": "look at what the credentials may do (list, get, put, delete), and at the name, since a store may answer so "
    "for what is not there, too",
    "404": "look at the name and at the endpoint",
    "429": "the store is busy; run it again later",
    "503": "the store is busy or not available; run it again later",
}
_AGAIN = "look at the endpoint and the connection, and run it again"


def describe(text: str) -> tuple[str, str]:
    """What a store said, and the way out, from the text of an error of obstore's."""
    first = text.partition("\n\nDebug source")[0]
    if (status := _STATUS.search(first)) is not None:
        code, message = _CODE.search(text), _MESSAGE.search(text) or _JSON.search(text)
        return describe_answer(
            status[1], code[1] if code else (status[2] or "").strip(), message[1].strip() if message else ""
        )
    if "without LOCATION" in first:
        return describe_answer("301", "PermanentRedirect", "")
    if (name := _BAD_NAME.search(first)) is not None:
        return (
            f"there is an object named {name[1][:200]!r}, which is no path",
            "remove or rename it: no part of a name may be empty, `.` or `..`",
        )
    if "imedOut" in text or "timed out" in text:
        return "it did not answer in time", _AGAIN
    if "dns error" in text or "failed to lookup" in text:
        return "its host is not known", "look at the endpoint, the region and the connection, and run it again"
    if (system := _SYSTEM.search(text)) is not None:
        return f"no connection: {system[1]}", _AGAIN
    if "orked process" in first:
        return "the process was forked after the store was used", "use the `spawn` method of multiprocessing"
    if "HTTP error" in first or "sending request" in first:
        return "the connection was lost", _AGAIN
    return first.strip().splitlines()[0][:200], _AGAIN


def is_lost(text: str) -> bool:
    """Whether this error of obstore's is that of a connection that was lost in a request which it does not send again.

    It does so where the request changes nothing, but not for the body of a listing. A body that continued beyond its
    end had a wrong length at first.
    """
    first = text.partition("\n\nDebug source")[0]
    status = _STATUS.search(first)
    return "HTTP error" in first and " retries, " not in first if status is None else status[1] == "416"


def describe_answer(status: str, code: str, message: str) -> tuple[str, str]:
    """What a store said, and the way out, from the parts of its answer."""
    said = " ".join(filter(None, (f"it answered {status}", code))) + (f" ({message.rstrip('.')})" if message else "")
    return said, _ADVICE_BY_CODE.get(code) or _ADVICE_BY_STATUS.get(status) or _AGAIN


@contextlib.contextmanager
def asking(label: str, operation: str, kind: type[CkptConvertError] = UnreadableError) -> Iterator[None]:
    """Turn a store's errors into one of ``kind``; other errors of ours pass.

    ``label`` names what was asked for, and ``operation`` completes "cannot be …".
    """
    import obstore  # noqa: F401  # whole: in the middle of another thread's import, its submodule would be found empty
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        raise failure(label, operation, *describe(str(error)), kind) from None
    except CkptConvertError as error:
        if not isinstance(error, UnreadableError | UnwritableError) or str(error).startswith(label):
            raise
        raise kind(f"{label}: cannot be {operation}: {error}") from None


def failure(label: str, operation: str, said: str, advice: str, kind: type[CkptConvertError]) -> CkptConvertError:
    """The error for a request that a store did not carry out."""
    return kind(f"{label}: cannot be {operation}: {said}; {advice}")
