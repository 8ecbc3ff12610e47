"""Every command in an environment without torch: it prints and writes there what it does with torch.

python -m tests.without_torch .venv-notorch/bin/python    # make check-notorch, which also makes that environment
python -m tests.without_torch --oldest                    # constraints for make check-oldest

Python runs this file once in each of the two environments: a process for each command would take minutes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

FORMATS = ("hf", "meta", "native", "torchtitan")
DTYPES = ("float32", "float16", "bfloat16")
LLAMA, FP8, F64, OLD, ADAPTER = (f"../input/{name}" for name in ("llama", "fp8", "float64", "before-1.6", "adapter"))

COMMANDS: list[tuple[str, ...]] = [
    *(
        (
            f"{source}-to-{target}",
            LLAMA if source == "hf" else f"hf-to-{source}",
            f"{source}-to-{target}",
            "--verify",
            "-q",
        )
        for source, target in permutations(FORMATS, 2)
    ),
    *(
        ("convert", source, f"{name}{dtype}", "--to", "native", "--dtype", dtype, "--allow-overflow", "-q")
        for source, name in ((F64, ""), *((dtype, f"{dtype}-") for dtype in DTYPES))
        for dtype in DTYPES
    ),
    ("convert", LLAMA, "planned", "--to", "meta", "--model-parallel", "2", "--dry-run"),
    ("convert", LLAMA, "dcp", "--to", "torchtitan", "--container", "dcp", "-q"),
    ("convert", "dcp", "back", "--to", "hf", "--like", LLAMA, "-q"),
    ("convert", OLD + "/consolidated.00.pth", "as-stored", "--container", "pt", "-q"),
    ("convert", OLD + "/consolidated.00.pth", "one-layer", "--include", "layers.0", "-q"),
    ("convert", OLD, "from-before-1.6", "--to", "hf", "-q"),
    ("convert", FP8, "dequantized", "--to", "meta", "--dequantize", "bfloat16", "-q"),
    ("merge-adapter", LLAMA, ADAPTER, "merged", "--to", "meta", "--verify", "-q"),
    ("inspect", LLAMA, "--stats"),
    ("inspect", "hf-to-meta", "--json"),
    ("inspect", OLD, "--stats"),
    ("inspect", FP8, "--tree"),
    ("show", LLAMA, "model.embed_tokens.weight"),
    ("show", LLAMA, "layers.0.attention.wq.weight[0:2, :3]", "--as", "meta", "--json"),
    ("show", FP8, "model.layers.0.mlp.up_proj.weight", "--dequantize", "bfloat16"),
    ("show", OLD, "norm.weight[-3:]"),
    ("show", "dcp", "norm.weight", "--npy", "norm.npy"),
    ("verify", LLAMA, "--json"),
    ("verify", "hf-to-torchtitan", "--against", LLAMA),
    ("diff", LLAMA, "hf-to-meta", "--json"),
    ("diff", F64, "float16", "--ignore-dtype"),
    ("diff", F64, "bfloat16", "--tolerance", "1e-3", "--json"),
    ("formats", "--json"),
]
"""The words of each command, run in this order in an empty directory beside ``input``."""


def main(python: str) -> None:
    """Run everything in this environment and in the other one, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder) / "input")
        found = [
            run_in(program, Path(folder) / name) for program, name in ((sys.executable, "with"), (python, "without"))
        ]
    different = [name for name in found[0] | found[1] if found[0].get(name) != found[1].get(name)]
    if different:
        sys.exit("\n".join(["with and without torch differ:", *(f"  {name}" for name in different)]))
    print(f"{len(COMMANDS)} commands print and write the same without torch: {len(found[0])} outputs and files")


def make_inputs(directory: Path) -> None:
    """Checkpoints as others write them, which takes torch: a Llama, also in float64, in fp8, and in old files."""
    import shutil

    import safetensors.torch
    import torch

    from tests.checkpoint.quantizing import LLAMA, fp8_llama
    from tests.helpers import GOLDEN, edit_json

    shutil.copytree(LLAMA, directory / "llama")
    fp8_llama(directory / "fp8")
    shutil.copytree(GOLDEN / "llama" / "meta-mp2", directory / "before-1.6")
    for file in (directory / "before-1.6").glob("*.pth"):
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    shutil.copytree(LLAMA, directory / "float64")
    edit_json(directory / "float64" / "config.json", dtype="float64", torch_dtype=None)
    for file in (directory / "float64").glob("*.safetensors"):
        # From what is subnormal in bfloat16 to what is too large for it, with no value that float32 has exactly.
        wide = {key: tensor.double() ** 5 * 1e-40 / 3 for key, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(wide, file, {"format": "pt"})
    make_adapter(directory / "adapter")


def make_adapter(directory: Path) -> None:
    """PEFT's files of an adapter of some layers of the Llama."""
    import safetensors.torch
    import torch

    sizes = {"q_proj": (72, 72), "v_proj": (24, 72)}
    tensors = {}
    for layer, name in ((layer, name) for layer in range(3) for name in sizes):
        module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        tensors[f"{module}.lora_A.weight"] = torch.sin(torch.arange(2.0 * sizes[name][1])).reshape(2, -1)
        tensors[f"{module}.lora_B.weight"] = torch.cos(torch.arange(2.0 * sizes[name][0])).reshape(-1, 2)
    directory.mkdir()
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [*sizes]}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def run_in(python: str, directory: Path) -> dict[str, str]:
    """What each command printed and ended with, and the sha256 of each file, in the environment of this Python."""
    directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-P", str(Path(__file__).resolve())]
    done = subprocess.run(command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return found | {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def run_here() -> dict[str, str]:
    """Run everything in this process, and read through the library; returns what was printed, and read."""
    if find_spec("torch") is None:
        refuse_training()
    return {" ".join(words): run(words) for words in COMMANDS} | {"open_checkpoint": read(FP8)}


def run(words: tuple[str, ...]) -> str:
    """The exit code of a command, and what it printed."""
    from ckpt_convert.cli import main

    printed, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), None
    with contextlib.redirect_stdout(printed):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    if code not in (None, 0) and not (code == 1 and words[0] == "diff"):
        sys.exit(f"{' '.join(words)}: exit code {code}")
    printed.seek(0)
    return f"{code}\n{re.sub(r', .* free', '', printed.read())}"  # how much of the disk is free, changes


def refuse_training() -> None:
    """Without torch, what trains has to say how to install it."""
    import ckpt_convert

    try:
        ckpt_convert.Checkpointer  # noqa: B018
    except ckpt_convert.MissingPackageError as error:
        if str(error).endswith("pip install 'ckpt-convert[train]'"):
            return
        raise
    sys.exit("Checkpointer was imported without torch")


def read(path: str) -> str:
    """The sha256 of a checkpoint's tensors as numpy arrays."""
    import ckpt_convert

    with ckpt_convert.open_checkpoint(path) as checkpoint:
        arrays = {key: tensor.numpy() for key, tensor in checkpoint.items()}
    return "\n".join(f"{key} {a.dtype} {hashlib.sha256(a.tobytes()).hexdigest()}" for key, a in arrays.items())


def oldest() -> str:
    """The constraints by which pip installs the oldest versions of what the package depends on."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    return "\n".join(dependency.replace(">=", "==") for dependency in project["dependencies"])


if __name__ == "__main__":
    if sys.argv[1:] == ["--oldest"]:
        print(oldest())
    elif len(sys.argv) == 2:
        main(os.path.abspath(sys.argv[1]))
    else:
        print(json.dumps(run_here()))
