"""Sources that are no local path: repositories of the Hugging Face Hub, through its local cache."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ckpt_convert.errors import CheckpointNotFoundError, InputError
from ckpt_convert.storage import place as places
from ckpt_convert.storage.names import WEIGHT_SUFFIXES
from ckpt_convert.storage.place import Location, Place, at

PREFIX = "hf://"
_MOST = 1 << 28
"""Bytes of an index."""

_REPO = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZERS = ("tokenizer.", "tekken", "vocab", "spiece", "sentencepiece")
_NEVER = ["onnx/*", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot"]


def here(source: Location) -> Place | None:
    """The place of a source that is there, listed; None where there is none; raises UsageError as ``locate`` does."""
    if isinstance(source, str) and source.startswith(PREFIX):
        return None
    place = places.locate(source).listed()
    return place if place.is_there() else None


def locate(source: Location, revision: str | None = None, *, format: str | None = None) -> Place:
    """The place of a source: a path first, then a Hub id (``org/name``, ``hf://org/name``), cached or downloaded.

    ``format`` is what is wanted of a repository that holds several: hf if not said. Raises CheckpointNotFoundError when
    it is neither, or cannot be had.
    """
    there = here(source)
    if there is not None:
        return there
    text = str(source)
    repo = text.removeprefix(PREFIX)
    if not _REPO.fullmatch(repo) or not isinstance(source, str):
        if places.locate(source).link() is not None:
            raise CheckpointNotFoundError(f"{source}: is a link that leads nowhere")
        raise CheckpointNotFoundError(f"{source}: no such file or directory, and no Hub id (org/name) either")
    cached = _cached(repo, revision, format)
    if cached is not None and _has_tokenizer(cached):
        return at(cached)
    try:
        return at(_downloaded(repo, revision, format))
    except CheckpointNotFoundError:
        if cached is None:
            raise
        return at(cached)  # its weights are all there; what lacks is said where it is needed


def snapshot(path: Place) -> Place:
    """The snapshot in a model's folder of the Hub's cache (``models--org--name``); any other path as it is.

    It is the one that ``main`` is, or the only one; raises CheckpointNotFoundError where that leaves a choice.
    """
    folder = path / "snapshots"
    if not path.name.startswith("models--") or not folder.is_folder():
        return path
    there = sorted(folder.folders())
    main = path / "refs" / "main"
    if main.is_regular():
        commit = main.read(256).decode(errors="replace").strip()
        there = [entry for entry in there if entry.name == commit] or there
    if len(there) == 1:
        return there[0]
    found = ", ".join(map(str, there[:4])) or "none"
    raise CheckpointNotFoundError(
        f"{path}: is a folder of the Hub's cache, and does not say which snapshot is meant; give one of them ({found})"
    )


def _cached(repo: str, revision: str | None, format: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = _place(Path(snapshot_download(repo, revision=revision, local_files_only=True)), format)
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return (
        path if _complete(path, format) else None
    )  # the cache also holds snapshots of which only the tokenizer was loaded


def _downloaded(repo: str, revision: str | None, format: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        # Unlike list_repo_files, this asks once: a mistyped path is to be told at once, not after half a minute.
        names = [file.rfilename for file in HfApi().model_info(repo, revision=revision, timeout=30).siblings or []]
        ignored = [*_NEVER, *_other_weights(names, format)]
        return _place(Path(snapshot_download(repo, revision=revision, ignore_patterns=ignored)), format)
    except Exception as error:  # whatever the network and the Hub come up with
        raise CheckpointNotFoundError(
            f"{repo}: no such path, and the Hub does not give it: {_first_line(error)}; "
            "check the name, your connection, and (for gated models) `hf auth login`"
        ) from error


def _has_tokenizer(snapshot: Path) -> bool:
    """Whether a tokenizer is among the cached files: a program that only loads weights leaves it on the Hub."""
    return any(entry.name.startswith(_TOKENIZERS) for entry in snapshot.iterdir())


def _complete(snapshot: Path, format: str | None) -> bool:
    """Whether a snapshot has the weights that are wanted: a single file, or all that an index names."""
    if format == "meta":
        return any(snapshot.glob("consolidated*"))
    if any((snapshot / name).exists() for name in ("model.safetensors", "pytorch_model.bin")):
        return True
    indexes = [*snapshot.glob("*.index.json"), *snapshot.glob("*.index.*.json")]
    for index in indexes:
        try:
            files = set(json.loads(at(index).read(_MOST))["weight_map"].values())
        except (InputError, ValueError, KeyError, AttributeError, TypeError):
            continue
        if all((snapshot / str(file)).exists() for file in files):
            return True
    return not indexes and any(entry.suffix in WEIGHT_SUFFIXES for entry in snapshot.iterdir())


def _place(snapshot: Path, format: str | None) -> Path:
    """Where in a snapshot the weights lie: Meta's own are in ``original/`` beside Hugging Face's."""
    original = snapshot / "original"
    return original if format == "meta" and any(original.glob("consolidated*")) else snapshot


def _other_weights(names: Iterable[str], format: str | None) -> list[str]:
    """Patterns of the weights that a repository holds once more in another format or container."""
    if format == "meta":
        return ["model*.safetensors", "pytorch_model*"]
    if any(name.endswith(".safetensors") and not name.startswith("consolidated") for name in names):
        return ["*.bin", "*.pth", "*.pt", "consolidated*", "original/*"]
    return ["original/*"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
