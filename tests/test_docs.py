"""What README and docs show is run here, on the demo's checkpoint in small."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_convert
from ckpt_convert.models import FAMILIES, FORMATS
from tests.command import run
from tests.servers.s3 import S3Server

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def script(name: str) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with demo/hf in it, as ``make demo`` leaves one."""
    demo = script("recipes/demo.py")
    path = tmp_path_factory.mktemp("readme")
    demo.make_checkpoint(path / "demo" / "hf", tiny=True)
    return path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```console" in page.read_text()], ids=lambda page: page.name
)
def test_the_sessions_run_and_say_what_they_show(
    page: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "hf").symlink_to(folder / "demo" / "hf")
    monkeypatch.chdir(tmp_path)
    if page.name == "quantized.md":
        (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        exec(compile(code, page.name, "exec"), {})
    sessions = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    steps = [step for session in sessions for step in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]]
    assert steps
    for step in steps:
        command, _, shown = step.partition("\n")
        program, name, *words = shlex.split(command)
        assert program == "ckpt-convert"
        done = run(name, *words)
        # What checks and compares says with 1 that something is wrong, or different.
        assert done.returncode in ((0, 1) if name in ("diff", "verify") else (0,)), done.stderr
        found = done.stdout + done.stderr
        for line in filter(None, map(str.strip, shown.splitlines())):
            # Sizes differ in the small checkpoint, and so does the number of its layers.
            start = re.sub(r"\{0\.\.7\}", "{0..2}", line.split()[0])
            assert start in found, (command, line)


def test_the_commands_and_the_python_with_buckets_run(
    folder: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the buckets that the pages name, of a server on this machine."""
    page = (ROOT / "docs" / "storage.md").read_text()
    buckets = {name: s3_server.bucket(name) for name in ("bucket", "mine", "public-models")}
    try:
        for name, path in (("bucket", "models/llama"), ("public-models", "llama")):
            for file in (folder / "demo" / "hf").iterdir():
                buckets[name].put(f"{path}/{file.name}", file.read_bytes())
        buckets["public-models"].publish()
        ckpt_convert.convert_checkpoint(folder / "demo" / "hf", "s3://bucket/Llama-3.2-1B-meta", to="meta")
        commands = re.findall(r"^ {4}ckpt-convert (.*s3://.*)$", README + page, re.MULTILINE)
        assert len(commands) >= 6
        for words in map(shlex.split, commands):
            # Of what --verify compares, and of a model and its conversion, nothing differs.
            run(*words, code=0)
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        exec(compile(code.replace("https://ACCOUNT.r2.cloudflarestorage.com", s3_server.url), "storage.md", "exec"), {})
        assert "llama-meta/ckpt_convert/manifest.json" in buckets["mine"].files
    finally:
        for made in buckets.values():
            made.remove()


def test_the_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(folder)
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert space["report"].verified == space["report"].tensors
    assert "model.layers.0.self_attn.q_proj.weight" in space["state_dict"]


def test_the_python_of_its_page_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "hf").symlink_to(folder / "demo" / "hf")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL):
        exec(compile(code, "python.md", "exec"), space)
    assert len(space["ranks"]) == space["plan"].request.model_parallel


def test_the_page_of_the_errors_has_all_of_them_with_their_codes() -> None:
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)
    said = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    public = {name: getattr(ckpt_convert, name) for name in ckpt_convert.__all__ if name.endswith("Error")}
    bases = {"CkptConvertError", "InputError"}
    assert said == {name: error.exit_code for name, error in public.items() if name not in bases}


def test_the_recipes_of_the_checkpointer_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "hf").symlink_to(folder / "demo" / "hf")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "checkpointer.md").read_text()
    space: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "checkpointer.md", "exec"), space)
    found = space["AutoModelForCausalLM"].from_pretrained("runs/first/latest")
    written = re.search(r"runs/first/\n((?: {6}.*\n)+)", page)
    assert written is not None
    for name in re.findall(r"^ {6}(\w+)", written[1], re.MULTILINE):
        assert os.path.lexists(tmp_path / "runs" / "first" / name), name
    trained = space["model"].state_dict()
    assert all(torch.equal(tensor, trained[key].to(tensor.dtype)) for key, tensor in found.state_dict().items())
    assert (tmp_path / "runs" / "trainer" / "latest").resolve().name == "step_6"


def test_the_table_of_families_is_that_of_the_code() -> None:
    tables = script("docs/tables.py")
    page = tables.PAGE.read_text()
    assert tables.updated(page) == page, "out of date: run python docs/tables.py"
    lines = page.splitlines()
    for family in FAMILIES.values():
        (line,) = (line for line in lines if line.startswith(f"| {family.name} |"))
        *_, hf, meta, native, torchtitan, _ = (cell.strip() for cell in line.split("|"))
        said = dict(zip(FORMATS, (hf, meta, native, torchtitan), strict=True))
        assert {format for format, cell in said.items() if cell.startswith("yes")} == set(family.formats)
        assert {format for format, cell in said.items() if cell.endswith("*")} == set(family.unverified)


def test_a_table_that_is_out_of_date_is_found() -> None:
    tables = script("docs/tables.py")
    page = tables.PAGE.read_text()
    older = page.replace("| llama | Llama 1,", "| llama | Llama 0,")
    assert older != page
    assert tables.updated(older) == page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_links_of_the_readme_are_absolute_and_lead_into_this_tree() -> None:
    """A package index shows the page without the rest of the repository."""
    links = dict(re.findall(r"^\[([^]]+)\]: (\S+)$", README, re.MULTILINE))
    text = re.sub(r"```[\s\S]*?```|`[^`\n]*`|(?m:^    .*$)", "", README)
    named = set(re.findall(r"(?<!\])\[([^]\n]+)\](?![(:\[])|\]\[([^]]+)\]", text))
    assert {one or other for one, other in named} == links.keys()
    assert "](" not in text
    home = "https://(?:raw.githubusercontent.com/ckpt-convert/ckpt-convert|github.com/ckpt-convert/ckpt-convert/(?:blob|tree))"
    for target in links.values():
        path = re.fullmatch(rf"{home}/main/(.+)", target)
        assert path is not None, target
        assert (ROOT / path[1]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    rooms = "cli|checkpointer|analysis|adapters|convert|checkpoint|formats|containers|models|tokenizer|tensors|storage"
    folders = f"{rooms}|recipes|benchmarks|docs|tests"
    for name in re.findall(rf"`((?:{folders})/[\w/.*]+)`", page.read_text()):
        candidates = [ROOT / name, ROOT / "ckpt_convert" / name]
        if "*" in name:
            assert any(list(c.parent.glob(c.name)) for c in candidates), name
        elif name != "models/starcoder2.py":
            assert any(c.exists() for c in candidates), name


def test_the_two_commands_are_the_makefiles() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
