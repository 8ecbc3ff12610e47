"""``inspect --stats``: what tensors hold, in lines, against numpy and xxhash."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash

from ckpt_convert.analysis.stats.summary import Stats, Summary
from ckpt_convert.cli.stats_view import pooled
from tests import command
from tests.cli.inspecting import body, document, run, text
from tests.helpers import GOLDEN, bits, read_safetensors

HF = GOLDEN / "llama" / "hf"


def cells(path: object, *options: str) -> dict[str, dict[str, str]]:
    """The table: key → column → what it says, by the places of the columns' names."""
    heading, *lines = body(text(path, "--stats", *options))
    names = heading.split()
    ends = [*(heading.index(name) + len(name) for name in names[:-1]), None]
    table = {}
    for line in lines[: lines.index("")]:
        words = {name: line[:end].split("  ")[-1].strip() for name, end in zip(names, ends, strict=True)}
        table[line.split("  ")[0]] = words
    return table


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    tensors = {f"layers.{layer}.w": torch.full((3, 5), float(layer)) for layer in range(4)}
    tensors["layers.2.w"][1, 1] = float("nan")
    tensors["layers.2.w"][0, :2] = float("-inf")
    tensors["layers.3.w"][2, 4] = float("inf")
    safetensors.torch.save_file({**tensors, "fine": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_each_tensor_is_as_numpy_and_xxhash_have_it() -> None:
    true = read_safetensors(HF)
    for tensor in document(HF, "--stats")["tensors"]:
        values, stats = true[tensor["key"]].double().numpy(), tensor["stats"]
        assert (stats["min"], stats["max"], stats["nan"], stats["inf"]) == (values.min(), values.max(), 0, 0)
        assert stats["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert stats["std"] == pytest.approx(values.std(), rel=1e-9)
        assert stats["zero_fraction"] == (values == 0).mean()
        assert stats["checksum"] == f"xxh3_64:{xxhash.xxh3_64_hexdigest(bits(true[tensor['key']]))}"


def test_a_collapsed_line_pools_its_tensors() -> None:
    true = read_safetensors(HF)
    key = "model.layers.{}.self_attn.q_proj.weight"
    values = np.stack([true[key.format(layer)].double().numpy() for layer in range(3)])
    row = cells(HF)[key.format("{0..2}")]
    expected = (values.min(), values.max(), values.mean(), values.std())
    assert [row[name] for name in ("min", "max", "mean", "std")] == [f"{value:.0f}" for value in expected]


def test_full_has_a_line_and_a_checksum_for_each_tensor() -> None:
    sums = {tensor["key"]: tensor["stats"]["checksum"] for tensor in document(HF, "--stats")["tensors"]}
    assert {key: f"xxh3_64:{row['xxh3']}" for key, row in cells(HF, "--full").items()} == sums


def test_a_checksum_does_not_depend_on_the_cut_over_ranks() -> None:
    one, two = (
        {tensor["key"]: tensor["stats"] for tensor in document(GOLDEN / "llama" / form, "--stats")["tensors"]}
        for form in ("meta-mp1", "meta-mp2")
    )
    assert one == two


@pytest.mark.parametrize("seed", range(4))
def test_pooling_is_what_numpy_says_of_all_values(seed: int) -> None:
    chance = np.random.default_rng(seed)
    arrays = [chance.normal(10.0**seed, 1, size).astype(np.float32) for size in (1, 7, 1000, 0)]
    arrays[1][2] = np.nan
    arrays[2][5] = 0
    parts = []
    for array in arrays:
        summary = Summary("F32")
        summary.add(array.tobytes())
        parts.append(summary.result())
    found, every = pooled(parts), np.concatenate(arrays).astype(np.float64)
    finite = every[np.isfinite(every)]
    assert (found.count, found.nan, found.inf, found.zeros) == (1008, 1, 0, 1)
    assert (found.min, found.max) == (finite.min(), finite.max())
    assert found.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert found.std == pytest.approx(finite.std(), rel=1e-9)


def test_pooling_survives_the_ends_of_float64_and_nothing_at_all() -> None:
    huge = Stats(count=2, min=-1e308, max=1e308, mean=0.0, std=1e308)
    assert pooled([huge, huge]).std == pytest.approx(1e308)
    assert pooled([]) == Stats()
    nothing = Stats(count=3, nan=3)
    assert pooled([nothing, nothing]) == Stats(count=6, nan=6)


def test_nan_and_inf_are_counted_and_kept_out_of_the_rest(sick: Path) -> None:
    lines = body(text(sick, "--stats"))
    assert lines[0].split() == ["shape", "dtype", "min", "max", "mean", "std", "zeros", "NaN", "Inf"]
    assert lines[2].split()[-3:] == ["25.0%", "1", "3"]
    assert lines[-1] == "1 NaN and 3 Inf in 63 numbers, in 2 tensors"
    assert body(text(sick, "--stats", "--filter", "fine"))[3] == "no NaN and no Inf in 3 numbers"


def test_columns_that_have_nothing_to_say_are_left_out() -> None:
    assert body(text(HF, "--stats"))[0].split() == ["shape", "dtype", "min", "max", "mean", "std"]


def test_only_the_tensors_that_match_are_read(tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*-0000[234]-*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-4:] = b"\xff\xff\xff\xff"  # NaN
        file.write_bytes(data)
    found = document(tmp_path / "hf", "--stats", "--filter", "model.embed_tokens.*")["tensors"]
    assert [tensor["stats"]["nan"] for tensor in found] == [0]
    assert sum(tensor["stats"]["nan"] for tensor in document(tmp_path / "hf", "--stats")["tensors"]) == 3


def test_packed_numbers_have_a_checksum_and_nothing_else(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}     '
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    row = cells(tmp_path / "w.safetensors", "--full")["w"]
    assert (row["min"], row["std"], row["xxh3"]) == ("-", "-", xxhash.xxh3_64_hexdigest(b"abc"))
    assert body(text(tmp_path / "w.safetensors", "--stats"))[-1] == (
        "no NaN and no Inf in 0 numbers; 1 packed tensor could not be looked into"
    )


def test_nothing_to_read_is_no_error(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    assert body(text(tmp_path / "none.safetensors", "--stats")) == ["no tensors"]
    assert body(text(HF, "--stats", "--filter", "nothing")) == ["no key matches nothing"]


class TestFailOnNan:
    def test_names_the_keys_after_printing(self, sick: Path) -> None:
        done = command.run("inspect", sick, "--fail-on-nan", code=1)
        assert "in 2 tensors" in done.stdout
        assert done.stderr.splitlines()[-3:] == [
            f"error: {sick}: 2 tensors hold NaN or infinite values:",
            "    layers.2.w: 1 NaN, 2 Inf",
            "    layers.3.w: 1 Inf",
        ]

    def test_json_is_whole_all_the_same(self, sick: Path) -> None:
        result = run(sick, "--fail-on-nan", "--json", code=1)
        assert '"nan": 1, "inf": 2' in result.stdout
        assert result.stdout.endswith("}\n")

    def test_what_a_filter_leaves_out_does_not_count(self, sick: Path) -> None:
        assert "no NaN" in text(sick, "--fail-on-nan", "--filter", "fine")

    def test_a_sound_checkpoint_passes(self) -> None:
        run(HF, "--fail-on-nan")

    def test_an_escape_in_a_key_stays_one(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"\x1b[31m": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
        done = command.run("inspect", tmp_path / "a.safetensors", "--fail-on-nan", code=1)
        assert "\x1b" not in done.stderr
        assert "\\x1b[31m: 1 NaN" in done.stderr


@pytest.mark.parametrize("workers", ["1", "3"])
def test_workers_change_nothing(workers: str) -> None:
    assert body(text(HF, "--stats", "--workers", workers)) == body(text(HF, "--stats"))
