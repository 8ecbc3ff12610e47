"""Measures a run whose steps are uploaded into a bucket against one on a disk: stall, memory, bytes and requests.

A process holds the weights of a small Llama (187 MB), and saves them asynchronously, in turn into a directory and into
one that is uploaded: once with nothing on its way, and once more while that is uploaded. The server is moto, in a
process of its own, which takes most of the time: so stalls are told, and no times of uploads.

python benchmarks/uploads.py --rounds 7
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from checkpoints import config, write  # noqa: E402
from remote import BUCKET, serving  # noqa: E402
from save_once import _forget_peak, _memory, native  # noqa: E402

from ckpt_convert import Checkpointer  # noqa: E402
from ckpt_convert.checkpointer.checkpointer import saver_of  # noqa: E402
from ckpt_convert.storage.remote.objects import ObjectStorage  # noqa: E402
from ckpt_convert.storage.remote.requests import PartRequests  # noqa: E402

MIB = 1 << 20
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
}


class Sent:
    """Counts the requests that write, and the bytes of their bodies."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.nbytes = 0
        self._lock = threading.Lock()
        self._wrap(PartRequests, "put_part", "part")
        self._wrap(ObjectStorage, "_put", "put")

    def _wrap(self, owner: type, name: str, kind: str) -> None:
        true: Callable[..., Any] = getattr(owner, name)

        def counted(*given: Any, **options: Any) -> Any:
            body = next(one for one in (*given, *options.values()) if isinstance(one, bytes | bytearray | memoryview))
            with self._lock:
                self.requests[kind] += 1
                self.nbytes += len(body)
            return true(*given, **options)

        setattr(owner, name, counted)


class Stall(NamedTuple):
    """Seconds for which a call held the caller, and for which that had the processor."""

    wall: float
    processor: float

    @classmethod
    def of(cls, work: Callable[[], object]) -> Stall:
        wall, processor = time.perf_counter(), time.thread_time()
        work()
        return cls(time.perf_counter() - wall, time.thread_time() - processor)


class Measured:
    """A checkpointer that saves every step, asynchronously, and what its saves took."""

    def __init__(self, name: str, source: Path, output: str, model: Any, **options: Any) -> None:
        self.name = name
        self.stalls: list[Stall] = []
        self.busy: list[Stall] = []
        self.memory = 0
        self._checkpointer = Checkpointer(
            source, output, contents="weights", save_every=1, asynchronous=True, keep_last=1, **options
        )
        self._checkpointer.register(model=model)
        self.close = self._checkpointer.close

    def save(self) -> None:
        """Save twice, the second time while the first step may be uploaded."""
        saver = saver_of(self._checkpointer)
        os.sync()
        before = _memory("VmRSS")
        _forget_peak()
        self.stalls.append(Stall.of(self._checkpointer.step))
        saver.background.wait()  # the step is complete on the disk, and on its way
        self.busy.append(Stall.of(self._checkpointer.step))
        self._checkpointer.wait()
        self.memory = max(self.memory, _memory("VmHWM") - before)


def measure(source: Path, place: Path, rounds: int) -> str:
    """The table."""
    model = native(source)
    sent = Sent()
    local = Measured("into a directory", source, str(place / "local"), model)
    bucket = Measured("into a bucket", source, f"s3://{BUCKET}/run", model, local_dir=place / "disk", keep_local=0)
    for one in (local, bucket):  # buffers are made, and what is needed is imported
        one.save()
        one.stalls.clear()
        one.busy.clear()
        one.memory = 0
    requests, nbytes = Counter(sent.requests), sent.nbytes
    for _ in range(rounds):
        local.save()
        bucket.save()
    size = sum(path.stat().st_size for path in (place / "local" / "latest").rglob("*") if path.is_file())
    uploaded, steps = (sent.nbytes - nbytes) / size, 2 * rounds
    for one in (local, bucket):
        one.close()
    lines = [
        f"{size / 1e6:,.0f} MB a step, {rounds} rounds",
        "",
        "| saved | stall | of the processor | while one is uploaded | of the processor | memory above the copy |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in (local, bucket):
        cells = [
            f"{statistics.median(getattr(stall, what) for stall in stalls):.3f} s"
            for stalls in (one.stalls, one.busy)
            for what in Stall._fields
        ]
        lines.append(f"| {' | '.join([one.name, *cells])} | {one.memory / MIB:.0f} MiB |")
    writes = Counter({kind: (count - requests[kind]) // steps for kind, count in sent.requests.items()})
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(writes.items()))
    lines += ["", f"Uploaded: {uploaded / steps:.4f} × the bytes of a step, in {told} requests for each."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where to write, on the disk to be measured")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=given.work))
    write(place / "source", config(**SIZES), 4, sparse=False)
    with serving() as server:
        os.environ |= {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        try:
            print(measure(place / "source", place, given.rounds))
        finally:
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
