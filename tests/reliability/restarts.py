"""Runs training scripts in forked processes, and kills them after each call of the checkpointer, one after the other.

A program of its own: ``python -m tests.reliability.restarts PLACE`` prints what came of each script as JSON. It imports
torch once and trains nothing itself, so that its forks are as good as fresh processes, and start at once.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import random
import re
import runpy
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from ckpt_convert import Checkpointer, CheckpointerCallback

assert CheckpointerCallback  # and with it all that a recipe imports

ROOT = Path(__file__).parent.parent.parent
CALLS = ("step", "report", "end_epoch")
SMALL = "--steps 4 --batch-size 4 --length 16 --examples 16 --eval-every 2 --log-every 1 --no-check --source demo/hf"

Call = tuple[str, int]
"""A method of the checkpointer, and the step at which it returned."""


def recipe(name: str, *words: str) -> Callable[[], object]:
    def run() -> None:
        sys.argv = [name, *words]
        sys.path.insert(0, str(ROOT / "recipes"))
        runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")

    return run


def documented() -> list[Callable[[], object]]:
    """The examples of docs/checkpointer.md; later ones use the imports of earlier ones."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpointer.md").read_text(), re.DOTALL)
    imports = [line for block in blocks for line in block.splitlines() if re.match(r"(from|import) ", line)]
    return [lambda code=block: exec("\n".join([*imports, code]), {}) for block in blocks]


def scripts() -> dict[str, tuple[Callable[[], object], str]]:
    """Each script, and the directory of its checkpoints."""
    loop, _, trainer = documented()  # the one between them takes one step, which no restart comes back to
    return {
        "docs: a loop": (loop, "runs/first"),
        "docs: Trainer": (trainer, "runs/trainer"),
        "full_finetune.py": (recipe("full_finetune.py", *SMALL.split(), "--save-every", "3 steps"), "runs/full"),
        "lora_finetune.py": (
            recipe("lora_finetune.py", *SMALL.split(), "--save-every", "1 epoch", "--merged"),
            "runs/lora",
        ),
    }


def forked(work: Callable[[], Any], place: Path) -> Any:
    """What ``work`` gives in a process of its own in ``place``; None where that was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            place.mkdir(exist_ok=True, parents=True)
            os.chdir(place)
            with (place / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            with open(write, "w") as result:
                result.write(json.dumps(work()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os.close(write)
    with open(read) as answer:
        text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"{place}: {(place / 'output').read_text()[-4000:]}")
    return json.loads(text) if status == 0 else None


def watched(script: Callable[[], object], output_dir: str, kill_after: Call | None = None) -> dict[str, Any]:
    """Run a script; its calls, what was warned of, and the files of its newest checkpoint."""
    calls: list[Call] = []
    warned: list[str] = []
    for name in CALLS:
        setattr(Checkpointer, name, _counted(name, calls, kill_after))
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ckpt_convert").addHandler(handler)
    random.seed(0)  # which a fork does anew otherwise, and which is saved
    script()
    return {"calls": calls, "warned": warned, "files": files_of(Path(output_dir) / "latest")}


def _counted(name: str, calls: list[Call], kill_after: Call | None) -> Callable[..., Any]:
    call = getattr(Checkpointer, name)

    def counted(self: Checkpointer, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        calls.append((name, self.progress.step))
        if calls[-1] == kill_after:
            self.wait()  # kills within a save are another test's, and at no moment that is known
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return counted


def files_of(directory: Path) -> dict[str, str]:
    """The sha256 of every file, but for those that tell the time or the place."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "trainer_state.json", "adapter_config.json")
    }


def restarted(script: Callable[[], object], output_dir: str, place: Path, demo: Path) -> dict[str, Any]:
    """What comes of a script that runs through, and of one that is killed after each call and started again.

    Each start goes on from what the one before has left. What comes between two steps is returned from once only, so
    that a copy of what was there before the step is killed there, and then run to its end.
    """
    whole, killed, aside = (place / name for name in ("whole", "killed", "aside"))
    for one in (whole, killed):
        one.mkdir(parents=True)
        (one / "demo").symlink_to(demo)
    expected = forked(lambda: watched(script, output_dir), whole)
    calls = [tuple(call) for call in expected["calls"]]
    ends = []
    for step in range(1, calls[-1][1] + 1):
        *others, last = [call for call in reversed(calls) if call[1] == step]
        for call in others:
            shutil.copytree(killed, aside, symlinks=True)
            assert forked(lambda call=call: watched(script, output_dir, call), aside) is None, call
            ends.append(forked(lambda: watched(script, output_dir), aside))
            shutil.rmtree(aside)
        assert forked(lambda last=last: watched(script, output_dir, last), killed) is None, last
    ends.append(forked(lambda: watched(script, output_dir), killed))
    return {"whole": expected, "ends": ends}


def main(place: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    demo = runpy.run_path(str(ROOT / "recipes" / "demo.py"))
    forked(lambda: demo["make_checkpoint"](Path("demo/hf"), tiny=True), place)
    gc.freeze()  # a collection in a fork would copy all that is there
    return {
        name: restarted(script, output_dir, place / str(number), place / "demo")
        for number, (name, (script, output_dir)) in enumerate(scripts().items())
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = main(Path(sys.argv[1]).absolute())
    print(json.dumps(answer))
