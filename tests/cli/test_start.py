"""What a start imports: `--help` and `inspect` answer at once, and this is the list of what they need for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import GOLDEN

ROOT = GOLDEN.parent.parent

HELP = {"ckpt_convert", "__main__", "_version", "cli", "cli.commands", "cli.flags", "cli.text", "errors", "wording"}

INSPECT = """
    ckpt_convert __main__ _version dtypes errors log values wording
    checkpoint checkpoint.checkpoint checkpoint.conventions checkpoint.diagnosis checkpoint.findings checkpoint.hints
    checkpoint.identify checkpoint.keys checkpoint.legacy_keys checkpoint.locate checkpoint.model checkpoint.opening
    checkpoint.record checkpoint.tensor_info
    cli cli.colors cli.commands cli.facts cli.flags cli.inspect cli.listing cli.notices cli.options cli.stated cli.text
    cli.tree cli.view
    containers containers.dcp containers.layout containers.safetensors
    formats formats.base formats.hf formats.meta formats.names formats.native formats.peft formats.torchtitan
    models models.core models.core.config models.core.params models.core.rope models.core.rows models.core.stored_specs
    models.core.table models.registry
    models.llama models.llama.config models.llama.params models.llama.releases models.llama.table models.llama.widths
    storage storage.base storage.hub storage.listing storage.local storage.names storage.place
    storage.pointer storage.reader storage.system
    tensors tensors.axes tensors.header tensors.lazy
"""
"""What `inspect` needs for a Llama in Hugging Face's layout: a module that is added makes every start slower."""

SLOW = """
    asyncio bz2 concurrent ctypes difflib email fastcrc hashlib http huggingface_hub importlib.metadata logging lzma
    multiprocessing numpy pickle random rich shutil socket ssl string subprocess tempfile textwrap torch traceback
    urllib.request xxhash zipfile zlib
"""
"""What takes a millisecond or more, and that headers do not need."""


def imported(*words: str) -> tuple[set[str], set[str]]:
    """Our modules, and all others, that a command has imported at its end."""
    code = (
        f"import sys; sys.argv = ['ckpt-convert', *{list(words)!r}]\n"
        "from ckpt_convert.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(file=sys.stderr, *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = set(done.stderr.split())
    ours = {name for name in names if name.partition(".")[0] == "ckpt_convert"}
    return {name.removeprefix("ckpt_convert.") for name in ours}, names - ours


def test_help() -> None:
    ours, others = imported("--help")
    assert ours == HELP
    assert others & set(SLOW.split()) <= {"bz2", "lzma", "shutil", "textwrap", "zlib"}  # as click lays out its help


@pytest.mark.parametrize("options", [(), ("--json",), ("--full",)], ids=" ".join)
def test_inspect(options: tuple[str, ...]) -> None:
    ours, others = imported("inspect", str(GOLDEN / "llama" / "hf"), *options)
    assert ours == set(INSPECT.split())
    assert not others & set(SLOW.split())


@pytest.mark.parametrize("name", ["qwen3_moe/hf", "mistral/hf", "gemma2/hf"])
def test_inspect_of_another_family_imports_its_table(name: str) -> None:
    ours, others = imported("inspect", str(GOLDEN / name))
    assert {module for module in ours - set(INSPECT.split()) if not module.startswith("models.")} == set()
    assert not others & set(SLOW.split())


@pytest.mark.parametrize("stated", [None, "26"])
def test_the_threads_of_openblas_do_not_wait_awake_unless_that_is_wanted(stated: str | None) -> None:
    code = (
        "import os, sys; sys.argv = ['ckpt-convert', '--version']\n"
        "from ckpt_convert.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print(os.environ['OPENBLAS_THREAD_TIMEOUT'], 'numpy' in sys.modules)"
    )
    given = {name: value for name, value in os.environ.items() if name != "OPENBLAS_THREAD_TIMEOUT"}
    given |= {"OPENBLAS_THREAD_TIMEOUT": stated} if stated else {}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == [stated or "4", "False"]


def test_dataclasses_of_a_start_are_completed_late() -> None:
    paths = [(ROOT / "ckpt_convert").joinpath(*name.split(".")) for name in INSPECT.split()[1:]]
    sources = [path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths]
    assert [str(path) for path in sources if "\n@dataclass(frozen" in path.read_text()] == []
