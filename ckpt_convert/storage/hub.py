"""Sources that are no local path: repositories of the Hugging Face Hub, through its local cache."""

from __future__ import annotations

import re
from pathlib import Path

from ckpt_convert.errors import CheckpointNotFoundError

PREFIX = "hf://"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")

_IGNORED = ["original/*", "onnx/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The local path of a source: a path first, then a Hub id (``org/name``, ``hf://org/name``), cached or downloaded.

    Raises CheckpointNotFoundError when it is neither, or cannot be had.
    """
    text = str(source)
    if not text.startswith(PREFIX) and Path(source).exists():
        return Path(source)
    repo = text.removeprefix(PREFIX)
    if not _REPO.fullmatch(repo) or isinstance(source, Path):
        raise CheckpointNotFoundError(f"{source}: no such file or directory, and no Hub id (org/name) either")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, ignore_patterns=_IGNORED))
    except Exception:  # not cached, or not all of it: the Hub is asked
        pass
    try:
        return Path(snapshot_download(repo, revision=revision, ignore_patterns=_IGNORED))
    except Exception as error:
        raise CheckpointNotFoundError(
            f"{source}: no such path, and the Hub does not give it: {_first_line(error)}; "
            "check the name, your connection, and (for gated models) `hf auth login`"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
