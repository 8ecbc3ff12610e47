"""What one gets by installing: names, a wheel without strays, and no torch where none is needed."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ckpt_convert
from ckpt_convert import families

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ckpt_convert"
LLAMA = ROOT / "fixtures" / "golden" / "llama" / "hf"
HEAVY = ("torch", "transformers", "safetensors")
"""torch alone takes longer to import than a small checkpoint to convert; the others are for tests only."""


def imports(code: str, *arguments: str) -> set[str]:
    """The top-level modules that a fresh interpreter has imported after running ``code``."""
    script = f"import sys\n{code}\nprint('\\n' + ' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


COMMAND_LINE = """
from ckpt_convert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
"""


def test_importing_the_package_imports_no_torch() -> None:
    found = imports("import ckpt_convert")
    assert not found.intersection((*HEAVY, "numpy", "click"))


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("hf-to-meta", "--help"),
        ("formats",),
        ("inspect", str(LLAMA)),
        ("inspect", str(LLAMA), "--json"),
        ("inspect", str(LLAMA.parent / "meta-mp2")),
        ("verify", str(LLAMA), "--quick"),
        ("verify", str(LLAMA)),
        ("diff", str(LLAMA), str(LLAMA.parent / "meta-mp2")),
        ("hf-to-meta", str(LLAMA), "out", "--dry-run"),
        ("hf-to-meta", str(LLAMA), "out", "--model-parallel", "2", "--verify"),
        ("hf-to-native", str(LLAMA), "out"),
        ("hf-to-torchtitan", str(LLAMA), "out", "--verify"),
        ("meta-to-hf", str(LLAMA.parent / "meta-mp2"), "out"),
        ("hf-to-meta", str(LLAMA), "out", "--dtype", "bfloat16", "--verify"),
    ],
    ids=lambda words: " ".join(word for word in words if "/" not in word),
)
def test_commands_import_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    placed = [str(tmp_path / word) if word == "out" else word for word in words]
    found = imports(COMMAND_LINE, *placed)
    assert not found.intersection(HEAVY)
    if "--model-parallel" in words:  # it did run, here, to its end
        assert (tmp_path / "out" / "consolidated.01.pth").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", str(LLAMA)),
        ("inspect", str(LLAMA.parent / "meta-mp2"), "--json"),
        ("inspect", str(LLAMA), "--tree"),
        ("verify", str(LLAMA), "--quick"),
        ("verify", str(LLAMA.parent / "meta-mp2"), "--quick", "--json"),
        ("hf-to-meta", str(LLAMA), "out", "--dry-run"),
        *((name, "--help") for name in ("convert", "inspect", "verify", "diff")),
    ],
    ids=lambda words: " ".join(word for word in words if "/" not in word),
)
def test_what_reads_headers_alone_starts_at_once(words: tuple[str, ...]) -> None:
    found = imports(COMMAND_LINE, *words)
    assert not found.intersection((*HEAVY, "numpy", "multiprocessing", "rich", "huggingface_hub"))


def test_imports_point_one_way() -> None:
    """The command line uses the library, which uses families and files; nothing looks back."""
    below = {"models": ("convert", "storage", "cli"), "storage": ("models", "convert", "cli"), "convert": ("cli",)}
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for room, others in below.items()
        for path in (ROOT / "ckpt_convert" / room).rglob("*.py")
        for line in path.read_text().splitlines()
        if (found := re.match(r"\s*(?:from|import) ckpt_convert\.(\w+)", line)) and found[1] in others
    ]
    assert wrong == []


def called(path: Path) -> set[str]:
    """What a module calls by a dotted name, such as os.umask, and what it assigns to by one."""
    tree = ast.parse(path.read_text())
    nodes: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            nodes.append(node.func)
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            nodes += [target.value if isinstance(target, ast.Subscript) else target for target in targets]
    return {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}


def test_threads_and_processes_are_started_in_one_module() -> None:
    starting = {"ThreadPoolExecutor", "ProcessPoolExecutor", "threading.Thread", "os.fork", "subprocess.Popen"}
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if called(path) & starting}
    renewal = {"storage/store_lock.py"}  # below the module that starts all others
    assert found == {"tensors/pool.py"} | renewal


def test_only_the_command_touches_what_all_of_a_process_has() -> None:
    """The process is the command's own; the library's is another's, which may run threads meanwhile."""
    switches = {
        *("gc.disable", "gc.enable", "gc.freeze", "gc.set_threshold", "os.umask", "os.chdir", "os.environ"),
        *("os.putenv", "os.environ.setdefault", "os.environ.update", "os.environ.pop", "constants.HF_HUB_OFFLINE"),
        *("warnings.catch_warnings", "warnings.simplefilter", "warnings.filterwarnings", "logging.disable"),
        *("chatter.set_verbosity", "transformers.logging.set_verbosity", "sys.setrecursionlimit", "signal.signal"),
        *("torch.set_num_threads", "torch.set_default_dtype", "torch.set_grad_enabled", "locale.setlocale"),
    }
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if called(path) & switches}
    asked_for = {"checkpointer/save/signals.py"}  # save_on_signal=True: handlers are all that a signal has
    assert {name for name in found - asked_for if not name.startswith("cli/")} == {"__main__.py"}


def test_what_computes_with_tensors_does_import_torch() -> None:
    """So the tests above can fail."""
    assert "torch" in imports("import ckpt_convert; ckpt_convert.convert_state_dict")


@pytest.mark.parametrize("name", ckpt_convert.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(ckpt_convert, name))
    assert name in dir(ckpt_convert)


@pytest.mark.parametrize("name", families.__all__)
def test_every_name_for_a_family_from_outside_is_there(name: str) -> None:
    assert callable(getattr(families, name)) or name in ("CONFIG", "PARAMS")


def test_the_package_of_conversions_is_no_function() -> None:
    assert not callable(importlib.import_module("ckpt_convert.convert"))


WITHOUT_TORCH = """
import json, pydoc, sys
sys.modules["torch"] = None
import ckpt_convert
pydoc.render_doc(ckpt_convert)  # help() works, and lists what there is
assert set(ckpt_convert.__all__) - set(dir(ckpt_convert)) == set(ckpt_convert._PACKAGES)
found = {}
for name in ckpt_convert.__all__:
    try:
        getattr(ckpt_convert, name)
    except ImportError as error:
        assert isinstance(error, ckpt_convert.MissingPackageError), error
        assert error.__suppress_context__  # a traceback has nothing but this line
        found[name] = str(error)
print(json.dumps(found))
"""


def test_without_torch_what_trains_says_in_a_sentence_how_to_install_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert set(found) == {
        "Checkpointer",
        "CheckpointerCallback",
        "Final",
        "TorchtuneCheckpointer",
        "convert_state_dict",
    }
    for name, text in found.items():
        assert text.startswith(f"{name} needs the package torch, which cannot be imported (")
        assert text.endswith("): pip install 'ckpt-convert[train]'")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ckpt_convert.no_such_name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of the wheel, built from this tree without asking the network."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: list[str]) -> None:
    """A `models` or `cli` at the top would shadow the module of that name in somebody's recipe."""
    roots = {name.partition("/")[0] for name in wheel}
    assert roots == {"ckpt_convert", f"ckpt_convert-{ckpt_convert.__version__}.dist-info"}
    assert not [name for name in wheel if name.endswith((".pyc", ".pth", ".safetensors"))]


def test_the_wheel_holds_every_module_and_the_mark_of_types(wheel: list[str]) -> None:
    package = ROOT / "ckpt_convert"
    kinds = (".py", ".html", ".css", ".js")
    modules = {path.relative_to(ROOT).as_posix() for path in package.rglob("*") if path.suffix in kinds}
    assert modules | {"ckpt_convert/py.typed"} <= set(wheel)


def test_the_wheel_has_the_command_and_the_license(wheel: list[str]) -> None:
    suffixes = {name.partition(".dist-info/")[2] for name in wheel}
    assert {"entry_points.txt", "licenses/LICENSE"} <= suffixes
