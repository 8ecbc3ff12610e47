"""Meta's and Mistral's directories: params.json and consolidated files, one for each tensor-parallel rank."""

from __future__ import annotations

from pathlib import PurePosixPath

from ckpt_convert.errors import AmbiguousFormatError, CheckpointNotFoundError
from ckpt_convert.formats import names
from ckpt_convert.formats.base import Format, WeightDirectory, WeightName
from ckpt_convert.storage.place import Place


def find(directory: Place) -> WeightDirectory | None:
    """``consolidated.NN.pth`` for each rank, ``.NN.pt`` for each part, or one file; raises if a number is missing."""
    numbered = sorted(
        (int(match[1]), entry.name) for entry in directory.files() if (match := names.RANK.fullmatch(entry.name))
    )
    single = [name for name in names.SINGLE_RANK if (directory / name).is_regular_file()]
    if not numbered and not single:
        return None
    if len(single) + bool(numbered) > 1:
        found = ", ".join([*single, *(name for _, name in numbered)])
        raise AmbiguousFormatError(
            f"{directory}: has several consolidated checkpoints, {found}; give the file that is meant, or move the rest"
        )
    if single:
        return WeightDirectory((WeightName(single[0]),))
    ranks = [rank for rank, _ in numbered]
    if ranks != list(range(len(ranks))):
        first = next(at for at, rank in enumerate([*ranks, -1]) if at != rank)
        twice = first > 0 and first < len(ranks) and ranks[first] == ranks[first - 1]
        what = f"rank {ranks[first]} twice" if twice else f"missing: {names.rank_name(first)}"
        raise CheckpointNotFoundError(
            f"{directory}: found {', '.join(name for _, name in numbered[:16])}; {what}. "
            "Every rank's file is needed, once; download or copy it again"
        )
    # Files named .pt are not ranks: those of Mixtral (December 2023) each hold some of the whole tensors.
    return WeightDirectory(tuple(WeightName(name, 0 if name.endswith(".pt") else rank) for rank, name in numbered))


def file_names(count: int, container: str) -> list[str]:
    if container == "safetensors":
        return [names.SINGLE_RANK[0]]
    return [names.rank_name(rank) for rank in range(count)]


def _uses(name: str) -> bool:
    file = PurePosixPath(name).name.lower()
    documents = file.startswith(names.DOCUMENT_PREFIXES) or file.endswith((".md", ".txt"))
    return documents or file.startswith("tokenizer.model") or file == "tekken.json"


FORMAT = Format("meta", find, file_names, ("pth", "safetensors"), "params.json", _uses, has_ranks=True)
