"""``--html``: where a page goes, and what is left when it cannot go there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt_convert.cli.pages import write_page
from ckpt_convert.errors import CkptConvertError, UsageError
from tests.cli.inspecting import run
from tests.helpers import GOLDEN

HF = GOLDEN / "llama" / "hf"


def test_a_page_is_written_and_nothing_else_printed(tmp_path: Path) -> None:
    result = run(HF, "--html", tmp_path / "page.html")
    assert result.stdout == ""
    assert result.stderr.startswith(f"wrote {tmp_path / 'page.html'} (")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "self_attn" in page
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


def test_the_page_has_the_statistics(tmp_path: Path) -> None:
    run(HF, "--html", tmp_path / "plain.html")
    run(HF, "--stats", "--html", tmp_path / "stats.html")
    assert (tmp_path / "stats.html").stat().st_size > (tmp_path / "plain.html").stat().st_size


def test_json_may_go_along(tmp_path: Path) -> None:
    assert run(HF, "--json", "--html", tmp_path / "page.html").stdout.startswith("{")


def test_standard_output() -> None:
    result = run(HF, "--html", "-")
    assert result.stdout.startswith("<!doctype html>")
    assert result.stderr == ""


def test_a_page_replaces_another_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page)
    write_page(str(link), "new")
    assert (page.read_text(), page.stat().st_mode & 0o777, link.is_symlink()) == ("new", 0o640, True)


def test_a_new_page_honours_the_umask(tmp_path: Path) -> None:
    was = os.umask(0o027)
    try:
        write_page(str(tmp_path / "page.html"), "new")
    finally:
        os.umask(was)
    assert (tmp_path / "page.html").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.html").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CkptConvertError, match=r"page\.html: cannot be written: No space"):
        write_page(str(tmp_path / "page.html"), "new")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("page.html", "old")]


@pytest.mark.parametrize("place", [".", "nowhere/page.html"])
def test_places_that_hold_no_page_are_refused(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="--html"):
        write_page(str(tmp_path / place), "page")
    result = run("/no/such/checkpoint", "--stats", "--html", tmp_path / place, code=1)
    assert isinstance(result.exception, UsageError)  # before anything is read


def test_text_that_utf_8_cannot_say_is_escaped(tmp_path: Path) -> None:
    write_page(str(tmp_path / "page.html"), "lone \ud800")
    assert (tmp_path / "page.html").read_text() == "lone \\ud800"
