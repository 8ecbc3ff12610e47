"""Slices that are exchanged, so that one rank writes each range of a file: how much, with how much memory, and when."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckpt_convert import Checkpointer, CkptConvertError, UsageError
from ckpt_convert.checkpoint.record import MANIFEST
from ckpt_convert.checkpointer.distributed import exchange, ranks
from ckpt_convert.checkpointer.save import shared
from ckpt_convert.convert import combine, partition, sharing
from ckpt_convert.convert.sharing import PAGE
from ckpt_convert.storage import by_rename
from ckpt_convert.tensors.lazy import BLOCK, SCRATCH
from tests.checkpoint.quantizing import fp8_llama
from tests.checkpointer.pool import Pool, split
from tests.checkpointer.test_distributed_saving import check, save_slices, train_split, update
from tests.checkpointer.training import LLAMA, make_model, trainable
from tests.helpers import GOLDEN, sums

SMALL = 1 << 13
"""Bytes of pieces that are small enough for several rounds."""

LIMIT = 1 << 22
"""Bytes of pieces that are small beside the model."""

WEIGHTS = ".safetensors"

NORMS = {"input_layernorm", "post_attention_layernorm", "norm"}


def save_slices_by_owners(here: Path, source: Path, model_format: str) -> int:
    """Save slices of every kind through owners, in several rounds; returns how many."""
    with (
        mock.patch.object(partition, "PIECE", SMALL),
        mock.patch.object(exchange.Exchange, "swap", autospec=True, side_effect=exchange.Exchange.swap) as swap,
    ):
        save_slices(here, source, model_format, "exchange")
    return swap.call_count


@pytest.mark.parametrize(
    ("family", "model_format"),
    [
        ("gpt_oss", "torchtitan"),
        ("mixtral", "meta"),
        ("qwen3_moe", "torchtitan"),
        ("phi3", "native"),
        ("llama4", "native"),
    ],
)
def test_every_step_between_slices_and_files(pool: Pool, family: str, model_format: str, tmp_path: Path) -> None:
    """Experts are stacked or apart, projections fused, tensors transposed: the files are the source's."""
    source = GOLDEN / family / "hf"
    assert min(pool.run(save_slices_by_owners, tmp_path, source, model_format, world=4)) > 2
    found = {name: one for name, one in sums(tmp_path / "out" / "step_0").items() if name.endswith(".safetensors")}
    assert found.items() <= sums(source).items()


@pytest.mark.parametrize("how", ["fsdp", "tp"])
def test_a_source_of_quantized_blocks(pool: Pool, how: str, tmp_path: Path) -> None:
    """Its tensors are written dequantized, in the files of one process; blocks cross what ranks have."""
    source = tmp_path / "source"
    fp8_llama(source, source=trainable(tmp_path / "plain", dtype=torch.bfloat16))
    pool.run(train_split, tmp_path, how, source, {"writers": "exchange"}, world=3)
    check(tmp_path, source)


# Which rank writes what, and when


@contextmanager
def recorded_writes() -> Iterator[list[tuple[str, int, int]]]:
    """What this process writes into weight files while all ranks write: (file, offset, bytes)."""
    found: list[tuple[str, int, int]] = []
    real = os.pwrite

    def pwrite(handle: int, data: Any, offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        if name.endswith(WEIGHTS):
            found.append((name, offset, len(data)))
        return real(handle, data, offset)

    def write(self: shared._Shared, begun: bytes) -> bytes:
        with mock.patch.object(os, "pwrite", pwrite):
            return real_write(self, begun)

    real_write = shared._Shared.write
    with mock.patch.object(shared._Shared, "write", write):
        yield found


def make_large(here: Path) -> Path:
    """A checkpoint of one large tensor, and some small ones."""
    source = here / "source"
    source.mkdir()
    whole = {"large.weight": torch.arange(4096 * 2048, dtype=torch.float32).reshape(4096, 2048)}
    whole |= {f"norm_{number}": torch.full((1000,), float(number)) for number in range(4)}
    save_file(whole, source / "model.safetensors")
    (source / "config.json").write_text('{"model_type": "unheard-of"}')
    return source


def save_large(here: Path, source: Path, asynchronous: bool) -> tuple[int, int, int]:
    """Save it by columns, in several rounds; the bytes written, those of memory at most, and the entries reported."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"model_format": "hf", "contents": "weights", "workers": 1, "writers": "exchange"}
    with (
        mock.patch.object(partition, "PIECE", LIMIT),
        mock.patch.object(shared, "written_parts", side_effect=shared.written_parts) as reported,
        recorded_writes() as written,
        Checkpointer(source, here / "out", asynchronous=asynchronous, **options) as checkpointer,
    ):
        whole = checkpointer.load_state_dict("hf")
        model = {
            key: distribute_tensor(one, mesh, [Shard(one.dim() - 1)], src_data_rank=None) for key, one in whole.items()
        }
        checkpointer.register(model=model)
        tracemalloc.start()
        checkpointer.save()
        checkpointer.wait()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    ((files, done), _) = reported.call_args
    return sum(nbytes for _, _, nbytes in written), peak, len(combine.written_parts(files, done))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_shares_memory_and_messages(pool: Pool, asynchronous: bool, tmp_path: Path) -> None:
    """Each rank writes as much as the others, in the memory of three pieces, and reports as many entries as it has."""
    source = make_large(tmp_path)
    written, peaks, reported = zip(*pool.run(save_large, tmp_path, source, asynchronous, world=4), strict=True)
    assert sums(source).items() <= sums(tmp_path / "out" / "step_0").items()
    assert all(abs(nbytes / sum(written) - 1 / 4) < 0.05 / 4 for nbytes in written)
    readers = 2 * (BLOCK + SCRATCH)  # of the thread that writes runs, and of the exchange
    assert max(peaks) < 3 * LIMIT + readers + (2 << 20)
    pieces = len(json.loads((tmp_path / "out/step_0" / MANIFEST).read_text())["files"]["model.safetensors"]["pieces"])
    assert sum(reported) < pieces + 4


def save_on_machines(here: Path, kind: str, machines: int, writers: str) -> tuple[str, set[tuple[str, int]]]:
    """Save from ranks of so many machines on a file system of this type: what is raised, and the pages written."""
    with pytest.MonkeyPatch.context() as patch, recorded_writes() as written:
        patch.setattr(by_rename, "file_system_type", lambda _: kind)
        patch.setattr(socket, "gethostname", lambda: f"machine{dist.get_rank() % machines}")
        try:
            train_split(here, "fsdp x tp", LLAMA, {"writers": writers})
        except UsageError as error:
            return str(error), set()
    pages = {
        (name, page)
        for name, offset, nbytes in written
        for page in range(offset // PAGE, -(-(offset + nbytes) // PAGE))
    }
    return "", pages


def shared_pages(found: list[tuple[str, set[tuple[str, int]]]]) -> int:
    """How many pages more than one rank has written into."""
    counts = Counter(page for _, pages in found for page in pages)
    return sum(count > 1 for count in counts.values())


def test_where_clients_cache_by_page_each_page_has_one_writer(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(save_on_machines, tmp_path, "nfs4", 2, "auto", world=4)
    assert sum(bool(pages) for _, pages in found) == 4
    assert not shared_pages(found)
    check(tmp_path, LLAMA)


def test_several_machines_are_refused_where_each_is_to_write_its_slices(pool: Pool, tmp_path: Path) -> None:
    said = {text for text, _ in pool.run(save_on_machines, tmp_path, "nfs4", 2, "direct", world=4)}
    assert len(said) == 1
    assert "is on nfs4, where the ranks of 2 machines would overwrite parts of each other's writes" in said.pop()


@pytest.mark.parametrize(("kind", "machines"), [("nfs4", 1), ("lustre", 2)])
def test_slices_are_written_as_they_are_elsewhere(pool: Pool, kind: str, machines: int, tmp_path: Path) -> None:
    """Of one machine, and on file systems whose clients lock what they write."""
    assert shared_pages(pool.run(save_on_machines, tmp_path, kind, machines, "auto", world=4))


def save_short_runs(here: Path) -> set[str]:
    """Save with many short runs, as those of any slice of columns are taken to be; the tensors that are exchanged."""
    exchanged = set()

    def write(*given: Any) -> Any:
        files, ranges = given[1].files, given[5]
        exchanged.update(files[piece.file].tensors[piece.tensor].key for own in ranges for piece in own)
        return exchange.write_exchanged(*given)

    with (
        mock.patch.object(sharing, "FEW", 10),
        mock.patch.object(sharing, "SHORT", 200),
        mock.patch.object(shared, "write_exchanged", write),
    ):
        train_split(here, "tp", LLAMA, {})
    return exchanged


def test_tensors_with_short_runs_are_exchanged(pool: Pool, tmp_path: Path) -> None:
    found = pool.run(save_short_runs, tmp_path, world=4)
    assert found[0]
    assert found == [found[0]] * 4
    assert {key.split(".")[-2] for key in found[0]} <= {"o_proj", "down_proj", "input_layernorm"} | NORMS
    check(tmp_path, LLAMA)


# Beside the training


def train_meanwhile(here: Path) -> float:
    """Save behind the training, which talks to the other ranks all the while; the sum of what it has talked."""
    model = split(make_model(), "tp")
    value = torch.zeros(1 << 16)
    with (
        mock.patch.object(partition, "PIECE", SMALL),
        Checkpointer(LLAMA, here / "out", contents="weights", asynchronous=True, writers="exchange") as checkpointer,
    ):
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        for _ in range(2):
            checkpointer.step()
            checkpointer.save()
            update(model)
            for _turn in range(50):
                value += 1
                dist.all_reduce(value)
                value /= dist.get_world_size()
            checkpointer.wait()
    return float(value[0])


def test_an_exchange_does_not_meet_the_training(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(train_meanwhile, tmp_path, world=4) == [100.0] * 4
    with mock.patch.object(partition, "PIECE", SMALL):
        check(tmp_path, LLAMA)


# Connections


def break_off(here: Path) -> str:
    """Lose a rank's connections between two rounds, and save again; what was raised."""
    real, rounds = exchange.Exchange.swap, 0

    def swap(self: exchange.Exchange, *given: Any) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 2 and dist.get_rank() == 1:
            self.close()
        real(self, *given)

    model = make_model()
    with (
        mock.patch.object(partition, "PIECE", SMALL),
        mock.patch.object(exchange.Exchange, "swap", swap),
        Checkpointer(LLAMA, here / "out", contents="weights", writers="exchange") as checkpointer,
    ):
        checkpointer.load_model(model)
        checkpointer.register(model=model)
        with pytest.raises(CkptConvertError) as raised, mock.patch.object(ranks, "DEADLINE", 2.0):
            checkpointer.save()
        assert not list((here / "out").glob("step_*"))
        checkpointer.save()
    return str(raised.value)


def test_connections_that_are_lost_are_made_again_at_the_next_save(pool: Pool, tmp_path: Path) -> None:
    said = set(pool.run(break_off, tmp_path, world=3))
    assert len(said) == 1
    assert "a connection was lost while the ranks exchanged slices" in said.pop()
    assert sums(LLAMA).items() <= sums(tmp_path / "out" / "step_0").items()
