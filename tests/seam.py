"""Watches which of our modules ask the system for files, while commands, conversions, saves and resumes run.

``python -m tests.seam DIRECTORY SCENARIO`` prints what was asked for outside ``ckpt_convert.storage`` and the command
line, one call a line. It is a process of its own, because an audit hook stays for good; children that it forks write
to the same place.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"  # the other helpers import torch

EVENTS = frozenset(
    (
        *("open", "os.listdir", "os.scandir", "os.walk", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link"),
        *("os.symlink", "os.truncate", "os.chmod", "os.utime", "os.chdir", "tempfile.mkstemp", "tempfile.mkdtemp"),
        *("shutil.rmtree", "shutil.copyfile", "shutil.copytree", "shutil.move", "glob.glob", "pathlib.Path.glob"),
    )
)
"""What the system is asked for files, as Python's audit events call it."""

ROOMS = ("ckpt_convert.storage", "ckpt_convert.cli")
"""Where that is done."""

EXCEPTED = ("importlib", "torch", "transformers", "huggingface_hub", "tokenizers", "accelerate", "linecache")
"""Who asks on behalf of somebody else: the import system, torch.load of old files, and libraries that take paths."""

HF = GOLDEN / "llama" / "hf"
META = GOLDEN / "llama" / "meta-mp2"


class Watch:
    """An audit hook that notes what is asked for from elsewhere, as "MODULE:LINE EVENT ARGUMENT"."""

    def __init__(self) -> None:
        self.out = os.dup(1)
        self.active = False
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in EVENTS or (event == "open" and not isinstance(arguments[0], str | bytes)):
            return
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name = str(frame.f_globals.get("__name__"))
            if name.partition(".")[0] in EXCEPTED or name.startswith(ROOMS):
                return
            if name.partition(".")[0] == "ckpt_convert":
                os.write(self.out, f"{name}:{frame.f_lineno} {event} {arguments[0]}\n".encode())
                return
            frame = frame.f_back


def commands(there: Path) -> None:
    """Every command, on whatever it may be given."""
    import torch

    from ckpt_convert.cli import main

    (there / "old").mkdir()
    torch.save({"a.weight": torch.zeros(2, 3)}, there / "old" / "model.bin", _use_new_zipfile_serialization=False)
    for words in (
        ("formats",),
        ("hf-to-meta", str(HF), str(there / "meta"), "--verify"),
        ("hf-to-torchtitan", str(HF), str(there / "titan"), "--verify"),
        ("hf-to-native", str(HF), str(there / "native"), "--dry-run"),
        ("meta-to-hf", str(META), str(there / "hf"), "--like", str(HF)),
        ("meta-to-hf", str(there / "meta"), str(there / "hf"), "--overwrite"),
        ("convert", str(there / "titan"), str(there / "back"), "--to", "hf", "--resume"),
        ("inspect", str(HF)),
        ("inspect", str(there / "meta"), "--stats", "--json"),
        ("inspect", str(there / "titan"), "--html", str(there / "page.html")),
        ("inspect", str(there / "old" / "model.bin")),
        ("verify", str(HF)),
        ("verify", str(there / "meta"), "--against", str(HF)),
        ("verify", str(there / "old")),
        ("verify", str(there / "nothing")),
        ("diff", str(HF), str(there / "meta"), "--json"),
    ):
        try:
            main(list(words))
        except SystemExit as end:
            if "nothing" not in " ".join(words) and end.code not in (None, 0, 1):
                raise


def training(there: Path) -> None:
    """Saves of each kind, pruning, resuming, a step that is interrupted, and an adapter's base."""
    from ckpt_convert import Checkpointer
    from tests.checkpointer.training import Trained, trainable

    source = trainable(there / "source")
    (there / "notes.txt").write_text("mine")
    options = {
        "save_every": 2,
        "keep_last": 2,
        "best": "val_loss:min",
        "keep_best": 1,
        "extra_files": [there / "notes.txt"],
    }
    for until, more in ((5, {}), (9, {"asynchronous": True}), (12, {"export_dtype": "bfloat16", "latest_name": None})):
        trained = Trained(source)
        with Checkpointer(source, there / "runs", **{**options, **more}) as checkpointer:
            checkpointer.load_model(trained.model)
            checkpointer.resume(**trained.parts)
            trained.go(checkpointer, until, evaluate=2)
    with Checkpointer(
        None, there / "new", config={**json.loads((source / "config.json").read_bytes())}
    ) as checkpointer:
        checkpointer.create_seed_checkpoint(Trained(source).model)


def interruption(there: Path) -> None:
    """A conversion that fails half way, and is continued."""
    import ckpt_convert

    def stop(progress: ckpt_convert.TransferProgress) -> None:
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            ckpt_convert.convert_checkpoint(HF, there / "out", to="meta", progress=stop, workers=1, resume=True)
    ckpt_convert.convert_checkpoint(HF, there / "out", to="meta", resume=True)


def offense(there: Path) -> None:
    """What is to be noticed: a file that is opened by one of our modules that is no storage."""
    exec(
        "import os, shutil\nopen(there / 'new', 'w').close()\nos.listdir(there)",
        {"__name__": "ckpt_convert.x", "there": there},
    )


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "commands": commands,
    "training": training,
    "interruption": interruption,
    "offense": offense,
}


if __name__ == "__main__":
    watch = Watch()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    watch.active = True
    SCENARIOS[sys.argv[2]](Path(sys.argv[1]))
