"""Checks of auxiliary files: readable, complete, and of the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_convert.checkpoint.conventions import EMBEDDINGS, size_of, text_config
from ckpt_convert.checkpoint.findings import Finding, failed_check
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.dtypes import CASTABLE, DTYPES, torch_name
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.formats.base import load_json
from ckpt_convert.formats.names import is_never_auxiliary
from ckpt_convert.storage.base import read_range
from ckpt_convert.storage.place import Place

_LOADED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "params.json",
    "preprocessor_config.json",
)
_MARK = b"\xef\xbb\xbf"
_POINTER = b"version https://git-lfs"


def check_auxiliary_files(checkpoint: Identified) -> Iterator[Finding]:
    """Auxiliary files that no program can read, or that are links or pointers instead of the files."""
    if not checkpoint.place.is_folder():
        return
    for path in sorted(checkpoint.place.children()):
        name = path.name
        if name.startswith(".") or is_never_auxiliary(name):
            continue
        if path.kind() is None and (target := path.link()) is not None:
            yield _error(name, f"is a link that leads nowhere (to {target}); download or copy the file again")
        elif path.is_regular_file():
            yield from _file(path)
        elif not path.is_folder():
            yield _error(
                name, "is not a regular file (a pipe, a device); move it elsewhere, and put the file itself there"
            )


def _file(path: Place) -> Iterator[Finding]:
    name = path.name
    try:
        with path.open() as file:
            start = read_range(file, 0, min(file.size, 64))
    except CkptConvertError as error:
        yield failed_check("side-files", error, str(error).replace(str(path), name), name)
        return
    if not start and not name.startswith("__init__"):
        text = f"{name}: the file is empty; download or copy it again"
        yield Finding("error" if name in _LOADED else "warning", "side-files", text, name)
    elif start.startswith(_POINTER):
        yield _error(name, "it is a git-lfs pointer, not the file itself; run git lfs pull in its repository")
    elif start.startswith(_MARK) and name in _LOADED:
        yield _error(name, "starts with a byte order mark, which transformers does not read; save it as UTF-8 without")
    elif name.endswith(".json"):
        try:
            if not load_json(path) and name == "adapter_config.json":
                yield _error(name, "is empty ({}), so it says nothing of the adapter; copy it again")
        except CkptConvertError as error:
            text = str(error).replace(str(path), name)
            lists = name not in _LOADED and "expected a JSON object" in text
            if not lists:
                yield failed_check("side-files", error, text, name, severity="error" if name in _LOADED else "warning")


def check_tokenizer(checkpoint: Identified, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the tokenizer has more tokens than the embedding has rows."""
    path = checkpoint.root / "tokenizer.json"
    if not path.is_regular_file():
        return
    rows = _rows(checkpoint) or size_of(text_config(config), "vocab_size")
    try:
        count = _tokens(load_json(path))
    except CkptConvertError:
        return
    if rows is not None and count is not None and count > rows:
        text = (
            f"tokenizer.json has tokens up to number {count - 1}, but the embedding has {rows} rows; the tokenizer "
            "belongs to another model, or the embedding was not resized when tokens were added"
        )
        yield Finding("warning", "tokenizer", text, "tokenizer.json", None, str(rows), str(count))


def check_config_dtype(checkpoint: Identified, config: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Whether the config names the majority dtype of the weights."""
    said = (config or {}).get("dtype", (config or {}).get("torch_dtype"))
    found = checkpoint.opened.majority_dtype
    if not isinstance(said, str) or found not in CASTABLE or not checkpoint.stored:
        return
    name = DTYPES[found].torch
    if torch_name(said) not in (name, "auto"):
        text = (
            f"dtype is {said[:60]} in config.json, but most weights are {name}; loaders that trust the config will "
            "cast them"
        )
        yield Finding("note", "config", text, "config.json", None, said[:60], name)


def _rows(checkpoint: Identified) -> int | None:
    for key, info in checkpoint.tensors.items():
        if key.endswith(EMBEDDINGS) and len(info.shape) == 2 and info.settled:
            return info.shape[0]
    return None


def _tokens(content: Mapping[str, Any]) -> int | None:
    """One more than the largest id, None if the file has another structure."""
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: list[int] = []
    if isinstance(vocab, dict):
        ids += [value for value in vocab.values() if type(value) is int]
    elif isinstance(vocab, list):
        ids += [len(vocab) - 1]
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            ids.append(token["id"])
    return max(ids) + 1 if ids else None


def _error(name: str, what: str) -> Finding:
    return Finding("error", "side-files", f"{name}: {what}", name)
