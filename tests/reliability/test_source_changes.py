"""A source that is changed, replaced or removed while it is read gives one error, and never a mixture of two models."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert import Checkpointer, SourceChangedError, TransferProgress
from tests.checkpointer.training import LLAMA, Trained, trainable
from tests.helpers import sums

TO = {"hf": "meta", "meta": "hf", "native": "hf", "torchtitan": "hf"}
"""For each format that is read, one to be written."""

DAY = 86_400 * 10**9


def source_of(format: str, place: Path) -> Path:
    """A checkpoint with everything that may lie beside weights: index, config, other files, a record."""
    first = place.with_name(f"{place.name}-hf")
    shutil.copytree(LLAMA, first)
    (first / "README.md").write_text("a model\n")
    if format == "hf":
        ckpt_convert.convert_checkpoint(first, place.with_name(f"{place.name}-native"), to="native")
        ckpt_convert.convert_checkpoint(place.with_name(f"{place.name}-native"), place, to="hf")
    else:
        ckpt_convert.convert_checkpoint(first, place, to=format, **({"model_parallel": 2} if format == "meta" else {}))
    for file in place.rglob("*"):
        os.utime(file, ns=(DAY, DAY))
    return place


def once(act: Callable[[], object]) -> Callable[[TransferProgress], None]:
    """A progress callback that acts when the first bytes have been converted."""
    left = iter([act])

    def called(progress: TransferProgress) -> None:
        if progress.phase == "converting" and progress.done:
            for do in left:
                do()

    return called


def rewrite(file: Path) -> None:
    """Other bytes, as many, in the same place."""
    data = file.read_bytes()
    file.write_bytes(bytes(byte ^ 1 for byte in data))
    os.utime(file, ns=(DAY, 2 * DAY))


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\n")
    os.utime(file, ns=(DAY, DAY))


def exchange(file: Path) -> None:
    """Another file under the name."""
    other = file.with_name(f".{file.name}.other")
    shutil.copyfile(file, other)
    rewrite(other)
    os.replace(other, file)


CHANGES = (rewrite, lengthen, exchange, Path.unlink)


@pytest.mark.parametrize("format", TO)
def test_each_file_of_a_source_may_not_change(format: str, tmp_path: Path) -> None:
    """Weights, parts, index, config, metadata, files beside them, the record: the error names the one that changed."""
    source = source_of(format, tmp_path / "source")
    kept = tmp_path / "kept"
    shutil.copytree(source, kept)
    changes = itertools.cycle(CHANGES)
    for name in [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]:
        change = next(changes)

        def act(name: str = name, change: Callable[[Path], object] = change) -> None:
            change(source / name)

        with pytest.raises(SourceChangedError, match="the source changed while it was read") as caught:
            ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=TO[format], progress=once(act))
        assert str(caught.value).startswith(f"{source / name}: "), (name, change)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.partial").exists()
        shutil.rmtree(source)
        shutil.copytree(kept, source)


@pytest.mark.parametrize("format", TO)
def test_another_model_in_the_place_of_the_source(format: str, tmp_path: Path) -> None:
    """As another conversion with --overwrite does it: the directory is exchanged by a rename."""
    source, other = source_of(format, tmp_path / "source"), tmp_path / "other"
    shutil.copytree(source, other)
    for file in other.iterdir():
        if file.is_file():
            os.utime(file, ns=(DAY, 2 * DAY))

    def act() -> None:
        source.rename(tmp_path / "old")
        other.rename(source)

    with pytest.raises(SourceChangedError, match=r"replaced at .*, and was of"):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to=TO[format], progress=once(act))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", TO)
def test_a_source_that_is_removed(format: str, tmp_path: Path) -> None:
    source = source_of(format, tmp_path / "source")
    with pytest.raises(SourceChangedError, match="it was removed"):
        ckpt_convert.convert_checkpoint(
            source, tmp_path / "out", to=TO[format], progress=once(lambda: shutil.rmtree(source))
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", TO)
def test_what_changes_no_content_is_no_change(format: str, tmp_path: Path) -> None:
    """Permissions, access times, a further link to a file, a further file beside it; a copy is only mentioned."""
    source = source_of(format, tmp_path / "source")
    expected = ckpt_convert.convert_checkpoint(source, tmp_path / "expected", to=TO[format])
    files = [path for path in source.rglob("*") if path.is_file()]

    def touch() -> None:
        for number, file in enumerate(files):
            file.chmod(0o640)
            os.utime(file, ns=(2 * DAY, DAY))
            os.link(file, tmp_path / f"link{number}")
        (source / "notes.log").write_text("somebody else's\n")

    report = ckpt_convert.convert_checkpoint(
        source, tmp_path / "touched", to=TO[format], verify=True, progress=once(touch)
    )
    assert report.notices == expected.notices
    (source / "notes.log").unlink()

    def copy_on_write() -> None:
        for file in files:
            shutil.copy2(file, file.with_name("other"))
            os.replace(file.with_name("other"), file)

    report = ckpt_convert.convert_checkpoint(source, tmp_path / "copied", to=TO[format], progress=once(copy_on_write))
    assert "replaced by a copy of the same size and time" in " ".join(report.notices)
    assert sums(tmp_path / "copied") == sums(tmp_path / "touched") == sums(tmp_path / "expected")


def test_permissions_do_not_cost_what_an_interrupted_conversion_has_done(tmp_path: Path) -> None:
    source = source_of("hf", tmp_path / "source")

    def interrupt(progress: TransferProgress) -> None:
        if progress.phase == "converting" and 2 * progress.done > progress.total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", workers=1, progress=interrupt)
    for file in source.rglob("*.safetensors"):
        file.chmod(0o400)
    report = ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="meta", resume=True)
    assert report.resumed_bytes > 0


def test_parts_are_not_opened_for_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each opening by path may find another file; and on a network each costs a round trip."""
    source = tmp_path / "source"
    ckpt_convert.convert_checkpoint(LLAMA, source, to="torchtitan", shards=2)
    opened: list[str] = []
    real = os.open

    def counted(path: object, *arguments: object, **options: object) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", counted)
    ckpt_convert.convert_checkpoint(source, tmp_path / "out", to="hf", workers=2)
    parts = [path for path in opened if path.endswith(".distcp")]
    assert len(set(parts)) == 2
    assert len(parts) <= 2 * 3  # for the layout of the source, and for each worker


def test_a_checkpointers_source_may_not_change_either(tmp_path: Path) -> None:
    """What every save reads again of it: here generation_config.json. Its permissions may."""
    source = trainable(tmp_path / "source")
    trained = Trained(source)

    def train() -> None:
        with Checkpointer(source, tmp_path / "run", save_every=1) as checkpointer:
            checkpointer.load_model(trained.model)
            checkpointer.resume(**trained.parts)
            trained.go(checkpointer, 1)
            (source / "generation_config.json").chmod(0o400)
            trained.go(checkpointer, 2)
            (source / "config.json").write_text(" {}")  # read once, when the first save was planned
            trained.go(checkpointer, 3)
            (source / "generation_config.json").chmod(0o600)
            lengthen(source / "generation_config.json")
            trained.go(checkpointer, 4)

    with pytest.raises(SourceChangedError, match=r"generation_config\.json: the source changed while it was read"):
        train()
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_1", "step_2", "step_3"]
