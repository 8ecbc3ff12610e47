"""Measures conversions from one bucket to another: time, memory, bytes fetched and written, requests.

The server is moto, in a process of its own; the job is a process of its own, too, whose peak memory and I/O the system
says. moto is written for tests: on the machine of docs/benchmarks.md it takes most of the time, so that times compare
versions of ckpt-convert and say little of stores.

python benchmarks/checkpoints.py /tmp/bench
python benchmarks/remote.py /tmp/bench/llama                  hf-to-meta, then verify and inspect of the output
python benchmarks/remote.py /tmp/bench/llama --model-parallel 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "bench"
SERVER = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from tests.servers.s3 import S3Server
with S3Server() as server:
    bucket = server.bucket(sys.argv[2])
    print(server.url, flush=True)
    for line in sys.stdin:
        if line.strip() == "counts":
            kinds = server.log.kinds()
            sent = sum(server.log.sent(kind) for kind in kinds)
            print(dict(kinds), sent, len(bucket.uploads), sep="|", flush=True)
            server.log.clear()
"""
JOB = """
import resource, sys
from ckpt_convert import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("measured", peak, io["write_bytes"], file=sys.stderr)
sys.exit(code)
"""

UPLOAD = """
import sys
from pathlib import Path
import obstore
from obstore.store import S3Store
url, folder, bucket = sys.argv[1:]
store = S3Store(bucket, endpoint=url, region="us-east-1", client_options={"allow_http": True})
for path in sorted(Path(folder).iterdir()):
    with path.open("rb") as file:
        obstore.put(store, f"source/{path.name}", file, chunk_size=64 << 20, max_concurrency=1)
"""


class Server:
    """moto with an empty bucket."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SERVER, str(ROOT), BUCKET]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._answer()

    def counts(self) -> tuple[Counter[str], int, int]:
        """Requests by kind and bytes sent since the last call, and the uploads that are open."""
        assert self._process.stdin is not None
        self._process.stdin.write("counts\n")
        self._process.stdin.flush()
        kinds, sent, uploads = self._answer().split("|")
        return Counter(json.loads(kinds.replace("'", '"'))), int(sent), int(uploads)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.close()


def upload(server: Server, folder: Path) -> int:
    """Put the files of a folder into the bucket, by another process, so that this one stays small; the bytes."""
    subprocess.run([sys.executable, "-c", UPLOAD, server.url, str(folder), BUCKET], check=True)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(server: Server, name: str, *words: str) -> None:
    """Run a command, and print what it took."""
    server.counts()
    started = time.perf_counter()
    job = subprocess.run([sys.executable, "-c", JOB, *words], capture_output=True, text=True, check=False)
    took = time.perf_counter() - started
    if job.returncode:
        sys.exit(f"{name} failed: {job.stderr}")
    _, peak, written = job.stderr.splitlines()[-1].split()
    kinds, sent, uploads = server.counts()
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(
        f"| {name} | {took:.1f} s | {int(peak) / 1e6:.0f} MB | {sent / 1e6:,.1f} MB | {int(written) / 1e6:.2f} MB | "
        f"{sum(kinds.values())}: {requests} |",
        flush=True,
    )
    assert not uploads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--model-parallel", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with serving() as server:
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        size = upload(server, given.source)
        print(f"{size / 1e6:,.1f} MB in {len(list(given.source.iterdir()))} files\n", flush=True)
        print("| command | time | peak memory | fetched | written to disk | requests |\n|---|---|---|---|---|---|")
        source, target = f"s3://{BUCKET}/source", f"s3://{BUCKET}/meta"
        workers = ("--workers", str(given.workers), "--quiet")
        measure(server, "inspect, hf", "inspect", source)
        ranks = str(given.model_parallel)
        measure(server, "hf-to-meta", "hf-to-meta", source, target, "--model-parallel", ranks, *workers)
        measure(server, "inspect, meta", "inspect", target)
        measure(server, "meta-to-hf", "meta-to-hf", target, f"s3://{BUCKET}/back", *workers)
        measure(server, "verify, meta", "verify", target, *workers)
        measure(server, "diff", "diff", source, target, *workers)


if __name__ == "__main__":
    main()
