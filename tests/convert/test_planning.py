"""The stages of a plan, and carrying it out, with plain values: no checkpoint, no file, no directory."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from ckpt_convert.checkpointer.live.tensors import MemoryReaders, all_of, as_planning_source
from ckpt_convert.convert import planning
from ckpt_convert.convert.execute import FinishedPiece, execute
from ckpt_convert.convert.partition import Piece, partition_pieces, split_into_pieces
from ckpt_convert.convert.plan import Plan, SourceFile
from ckpt_convert.convert.planning import PlanInputs
from ckpt_convert.convert.request import Request
from ckpt_convert.errors import ShapeMismatchError, UsageError
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.tensors.lazy import LazyTensor
from tests.values import CONFIG, SHAPES, file, identified, opened

KEYS = tuple(SHAPES)


def given(to: str, stated: dict[str, object] = CONFIG, **request: object) -> PlanInputs:
    files = opened(file("a.safetensors", *KEYS[:6]), file("b.safetensors", *KEYS[6:]))
    return PlanInputs(identified(files, stated), Request(to=to, **request))  # type: ignore[arg-type]


def planned(to: str, **request: object) -> Plan:
    return planning.make_plan(given(to, **request)).plan


class Bytes:
    """A file in which every byte says where it is."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.size, self.seed = name, 1 << 20, seed

    def readinto(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes((at * 7 + self.seed + (at >> 8)) % 251 for at in range(offset, offset + len(buffer)))


class Kept:
    """A staged file in memory."""

    is_past_cache = False

    def __init__(self, name: str, size: int) -> None:
        self.name, self.data = name, bytearray(size)

    def write(self, offset: int, data: memoryview) -> None:
        self.data[offset : offset + len(data)] = data


class Memory:
    """Staged files in memory."""

    def __init__(self, plan: Plan) -> None:
        self.files = [Kept(one.name, one.size) for one in plan.files]
        self.done: list[FinishedPiece] = []

    def file(self, number: int) -> Kept:
        return self.files[number]

    def earlier_checksum(self, piece: Piece) -> None:
        return None

    def add(self, done: FinishedPiece) -> None:
        self.done.append(done)


def sources(plan: Plan) -> dict[SourceFile, Bytes]:
    return {source: Bytes(source.name, number) for number, source in enumerate(plan.sources)}


def written(plan: Plan, runs: list[list[Piece]]) -> tuple[list[bytes], list[FinishedPiece]]:
    output = Memory(plan)
    for run in runs:
        execute(plan, run, sources(plan), output, workers=2)  # type: ignore[arg-type]
    return [bytes(one.data) for one in output.files], output.done


def test_identify_says_whose_weights_they_are_and_refuses_what_has_no_way() -> None:
    model, said = planning.identify_model(given("meta"))
    assert (model.family.name, said) == ("llama", [])
    with pytest.raises(UsageError, match="does not fit a hf source"):
        planning.identify_model(given("native", config=ConfigOptions(rope_factor=8.0)))


def test_translate_makes_every_tensor_of_the_target_once() -> None:
    one = given("meta", model_parallel=2)
    model, _ = planning.identify_model(one)
    found = planning.translate_tensors(one, model, None)
    keys = [(target.rank, target.key) for target in found.targets]
    assert len(keys) == len(set(keys)) == 2 * (len(SHAPES) + 1)  # Meta's layout has an output of its own
    assert found.ranks == 2
    assert found.target_layout is None


def test_assign_gives_every_tensor_its_place_in_a_file() -> None:
    one = given("hf", shards=3)
    model, _ = planning.identify_model(one)
    found = planning.translate_tensors(one, model, None)
    assigned = planning.assign_files(one, found)
    assert [made.name for made in assigned.files] == [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
    for made in assigned.files:
        ends = [placed.offset + placed.nbytes for placed in made.tensors]
        assert [placed.offset for placed in made.tensors[1:]] == ends[:-1]
        assert ends[-1] == made.size


def test_what_lies_beside_is_said_with_its_origin() -> None:
    one = given("hf", shards=2)
    model, _ = planning.identify_model(one)
    found = planning.translate_tensors(one, model, None)
    put = planning.plan_auxiliary(one, found, planning.assign_files(one, found))
    assert {side.name: side.origin for side in put.files} == {
        "ckpt_convert/config.json": "generated",
        "config.json": "generated",
        "model.safetensors.index.json": "generated",
    }
    assert all(side.content for side in put.files)


def test_all_that_is_wrong_is_said_before_anything_is_planned() -> None:
    with pytest.raises(ShapeMismatchError, match="shapes that disagree with the config"):
        planning.make_plan(given("meta", {**CONFIG, "intermediate_size": 32}))


def test_a_plan_is_a_value() -> None:
    plan = planned("meta", model_parallel=2)
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.fingerprint.__self__ is again
    assert [source.name for source in plan.sources] == ["a.safetensors", "b.safetensors"]
    assert all(source.identity is not None for source in plan.sources)
    with pytest.raises(AttributeError):
        plan.files = ()  # type: ignore[misc]


def test_the_plan_of_a_model_in_memory_holds_none_of_its_tensors() -> None:
    one = given("hf")
    tensors = {key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in SHAPES.items()}
    live = as_planning_source(all_of(tensors), "hf")
    made = planning.make_plan(PlanInputs(one.source, one.request, in_memory=live))
    assert [source.name for source in made.plan.sources] == [f"memory:{key}" for key in SHAPES]
    assert pickle.loads(pickle.dumps(made.plan)) == made.plan
    later = {key: tensor + 1 for key, tensor in tensors.items()}
    output = Memory(made.plan)
    execute(made.plan, split_into_pieces(made.plan.files), MemoryReaders(all_of(later)), output, workers=1)  # type: ignore[arg-type]
    placed = made.plan.files[0].tensors[0]
    assert (
        output.files[0].data[placed.offset :][:2] == later[placed.key].flatten()[:1].view(torch.uint8).numpy().tobytes()
    )


@pytest.mark.parametrize("to", ["hf", "meta", "native", "torchtitan"])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_a_partition_covers_every_byte_of_every_tensor_once(
    to: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt_convert.convert.partition.PIECE", 100)
    plan = planned(to)
    runs = partition_pieces(plan.files, count)
    assert len(runs) == count
    assert [piece for run in runs for piece in run] == split_into_pieces(plan.files)
    for number, made in enumerate(plan.files):
        taken = [at for run in runs for p in run if p.file == number for at in range(p.offset, p.offset + p.nbytes)]
        of_tensors = [at for placed in made.tensors for at in range(placed.offset, placed.offset + placed.nbytes)]
        assert sorted(taken) == of_tensors


def test_pieces_written_apart_are_those_written_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt_convert.convert.partition.PIECE", 96)
    plan = planned("meta", model_parallel=2)
    whole, done = written(plan, [split_into_pieces(plan.files)])
    parts, in_parts = written(plan, list(reversed(partition_pieces(plan.files, 3))))
    assert whole == parts
    assert {one.piece: one.checksum for one in done} == {one.piece: one.checksum for one in in_parts}


def test_what_is_written_is_what_lazy_tensors_say() -> None:
    plan = planned("meta")
    (data, *_), _ = written(plan, [split_into_pieces(plan.files)])
    read = [Bytes(source.name, number) for number, source in enumerate(plan.sources)]
    for placed in plan.files[0].tensors:
        wanted = _elements(placed.tensor, plan, read)
        assert data[placed.offset : placed.offset + placed.nbytes] == wanted, placed.key


def _elements(tensor: LazyTensor, plan: Plan, read: list[Bytes]) -> bytes:
    """The bytes of two-byte elements, one by one."""
    out = bytearray(tensor.size * 2)
    for copy in tensor.copies():
        at, stored = plan.stored_in[copy.source], plan.stored[copy.source]
        steps = [(0, 0)]
        for count, source, target in copy.dims:
            steps = [(s + n * source, t + n * target) for s, t in steps for n in range(count)]
        for source, target in steps:
            buffer = bytearray(2)
            read[at].readinto(stored.offset + (copy.source_offset + source) * 2, memoryview(buffer))
            place = (copy.target_offset + target) * 2
            out[place : place + 2] = buffer
    return bytes(out)


def test_nothing_of_these_has_a_directory() -> None:
    assert not Path("somewhere").exists()
