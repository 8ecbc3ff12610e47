"""Azure's blob storage on loopback: azurite, which ``tests/azurite.sh --install`` gets."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import subprocess
import urllib.request
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account that every azurite has; both are published in its documentation."""

ROOT = Path(__file__).parent.parent.parent

_UNTIL_STDIN_ENDS = '"$@" & read -r _; kill $!; wait $!'
"""A shell command that runs another and ends it with its own input, so also where this process is killed."""


class Azurite:
    """A context manager; the blobs are in the memory of a process that ends with it, or with this process."""

    def __init__(self) -> None:
        program = _installed()
        words = [*("--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", "0", "--silent")]
        words += ["--skipApiVersionCheck", "--disableTelemetry", "--disableProductStyleUrl"]
        self._process = subprocess.Popen(
            ["sh", "-c", _UNTIL_STDIN_ENDS, "sh", "node", program, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if match := re.search(r"listens on (http://\S+)", line):
                self.url = f"{match[1]}/{ACCOUNT}"
                return
        raise AssertionError(f"azurite did not start: {''.join(said)}")

    def create_container(self, name: str) -> str:
        """Create an empty container; returns its name."""
        url = f"{self.url}/{name}?restype=container"
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
        signed = "".join(f"{key}:{value}\n" for key, value in headers.items())
        resource = f"/{ACCOUNT}{urlsplit(url).path}\nrestype:container"
        to_sign = "PUT" + "\n" * 12 + signed + resource
        digest = hmac.new(base64.b64decode(KEY), to_sign.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=30).close()
        return name

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Azurite:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _installed() -> str:
    """The path of azurite's program; what the script says where there is none is the test's failure."""
    found = subprocess.run([ROOT / "tests" / "azurite.sh"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr.strip()
    return found.stdout.strip()
