from __future__ import annotations

import io

import click
import pytest

from ckpt_convert.cli.text import (
    Labelled,
    bar,
    columns,
    display_width,
    escape,
    fits,
    human_count,
    labelled,
    number,
    plural,
    real,
    shorten,
    wrap,
)
from ckpt_convert.wording import human_bytes


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("日本語 é ×", "日本語 é ×"),
        ("a b", "a b"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\ttab\r", "two\\x0alines\\x09tab\\x0d"),
        ("\x00\x7f", "\\x00\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # C1: a terminal may take it for ESC [
        ("abc\u202egnp", "abc\\u202egnp"),  # writes backwards
        ("\u2066\u2069\u200f\u061c", "\\u2066\\u2069\\u200f\\u061c"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("lone \ud800", "lone \\ud800"),
        ("tag\U000e0041", "tag\\U000e0041"),
    ],
)
def test_escape_shows_what_would_not_be_seen_as_itself(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (16128, "16.1 kB"),
        (134_217_728, "134 MB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (999_999_999, "1.0 GB"),
        (1_073_741_824, "1.07 GB"),
        (2_996_965_376, "3.0 GB"),
        (9_996_000_000, "10.0 GB"),
        (99_960_000_000, "100 GB"),
        (811_706_777_600, "812 GB"),
        (5 * 10**21, "5000 EB"),
    ],
)
def test_bytes_are_decimal_and_have_three_digits(size: int, shown: str) -> None:
    assert human_bytes(size) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (56, "56"), (999, "999"), (34_500, "34.5 K"), (1_235_814_400, "1.24 B"), (405_853_388_800, "406 B")],
)
def test_counts(count: int, shown: str) -> None:
    assert human_count(count) == shown


def test_numbers_and_plurals() -> None:
    assert number(1_235_814_400) == "1,235,814,400"
    assert plural(1, "file") == "1 file"
    assert plural(0, "file") == "0 files"
    assert plural(1137, "tensor") == "1,137 tensors"
    assert plural(2, "entry", "entries") == "2 entries"


@pytest.mark.parametrize("width", range(1, 45))
def test_shorten_fits_and_keeps_both_ends(width: int) -> None:
    key = "model.layers.{0..15}.self_attn.q_proj.weight"
    short = shorten(key, width)
    assert display_width(short) <= width
    head, mark, tail = short.partition("…")
    assert key.startswith(head)
    assert key.endswith(tail)
    assert mark or short == key


def test_shorten_counts_wide_characters_twice() -> None:
    assert display_width("日本語") == 6
    assert display_width(shorten("日本語" * 10, 9)) <= 9


def test_columns_are_aligned_without_trailing_blanks() -> None:
    rows = [("a", "[1]", "", "5 B", ""), ("longer", "[1, 2]", "", "100 kB", "note")]
    assert columns(rows, right=frozenset({3})) == ["a       [1]        5 B", "longer  [1, 2]  100 kB  note"]


def test_columns_count_the_width_of_characters_not_their_number() -> None:
    assert columns([("日本", "x"), ("abcd", "x")]) == ["日本  x", "abcd  x"]


def test_columns_shorten_the_first_column_only_as_far_as_needed() -> None:
    rows = [("model.layers.0.self_attn.q_proj.weight", "[2048, 2048]")]
    assert not fits(rows, 48)
    (line,) = columns(rows, width=48)
    assert len(line) == 48
    assert line.endswith("q_proj.weight  [2048, 2048]")
    assert fits(rows, 52)
    assert columns(rows, width=52) == columns(rows)


@pytest.mark.parametrize("width", [10, 20, 30, 40])
def test_a_key_has_a_line_of_its_own_in_a_narrow_terminal(width: int) -> None:
    (text,) = columns([("model.layers.0.self_attn.q_proj.weight", "[2048, 2048]", "BF16", "8 MB")], width=width)
    key, *rest = text.splitlines()
    assert key == shorten("model.layers.0.self_attn.q_proj.weight", width)
    assert "  ".join(map(str.strip, rest)) == "[2048, 2048]  BF16  8 MB"
    assert all(line.startswith("  ") for line in rest)
    assert max(map(len, rest)) <= max(width, 14)


def test_columns_that_can_be_spared_go_first() -> None:
    rows = [("model.layers.0.self_attn.q_proj.weight", "[2048, 2048]", "17%", "====")]
    for width, spared in ((63, set()), (62, {"===="}), (57, {"===="}), (56, {"====", "17%"}), (50, {"====", "17%"})):
        (line,) = columns(rows, width=width, spare=(3, 2))
        assert {cell for cell in rows[0] if cell not in line} - {rows[0][0]} == spared
        assert len(line) <= width


def test_columns_can_be_painted_without_losing_their_place() -> None:
    rows = [("a", "1"), ("bcd", "22")]
    plain = columns(rows, right=frozenset({1}))
    painted = columns(rows, right=frozenset({1}), styles={0: "red", 1: lambda cell: f"\x1b[1m{cell}\x1b[0m"})
    assert painted != plain
    assert [click.unstyle(line) for line in painted] == plain


@pytest.mark.parametrize("width", range(21, 75))
def test_shorten_keeps_braces_whole_or_leaves_them_out(width: int) -> None:
    short = shorten("model.layers.{0..60}.mlp.experts.{0..255}.down_proj.weight_scale_inv", width)
    assert short.count("{") == short.count("}") == short.count("{0..60}") + short.count("{0..255}")
    assert width - 8 < display_width(short) <= width or width > 68


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.5, 0.99, 1])
def test_a_bar_is_as_long_as_the_share(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    eighths = {"█": 8, "▉": 7, "▊": 6, "▋": 5, "▌": 4, "▍": 3, "▎": 2, "▏": 1}
    assert sum(eighths[char] for char in bar(share, 16)) == round(share * 128)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert bar(share, 16) == "#" * round(share * 16)


def test_labels_stand_in_a_column_and_words_wrap_beside_it() -> None:
    said = [Labelled("path", ["a/b"]), Labelled("notice", ["not used:", "old.safetensors,", "x.bin"], "yellow")]
    assert [click.unstyle(line) for line in labelled(said, 26)] == [
        "path    a/b",
        "notice  not used:",
        "        old.safetensors,",
        "        x.bin",
    ]
    assert click.unstyle([*labelled(said, None, least=10)][1]) == "notice    not used: old.safetensors, x.bin"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (-0.02217, "-0.0222"), (1234.5, "1234"), (3.4e38, "3.4e+38"), (1e-9, "1e-09")]
)
def test_numbers_have_three_digits_that_matter(value: float, shown: str) -> None:
    assert real(value) == shown


def test_no_rows_are_no_lines() -> None:
    assert columns([]) == []


def test_wrap_breaks_between_words_only() -> None:
    assert wrap(["n_layers 16,", "dim 2048,", "a-very-long-word-that-stays-whole"], 22) == [
        "n_layers 16, dim 2048,",
        "a-very-long-word-that-stays-whole",
    ]
