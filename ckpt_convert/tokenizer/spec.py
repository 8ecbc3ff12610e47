"""What a family says of its tokenizer: all that a file of tiktoken ranks leaves to the code that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TiktokenSpec:
    """A tokenizer whose tokenizer.model holds tiktoken ranks and nothing else.

    ``title`` is what messages call it, ``tokens`` how many ranks it has, ``pattern`` the regular expression that splits
    texts. Behind the ranks follow so many ``specials``; ``names`` are those that have one, by their position, which are
    ``names_of`` a release; ``also_named`` what other releases call them. ``begin`` and ``end`` are the names of the
    tokens around a text, ``turn`` of the one at the end of a turn. ``others`` are tokenizers with other patterns and
    special tokens, by how many ranks they have.
    """

    title: str
    tokens: int
    pattern: str
    specials: int
    names: Mapping[int, str]
    names_of: str
    begin: str
    end: str
    turn: str
    also_named: tuple[Mapping[int, str], ...] = ()
    others: Mapping[int, str] = field(default_factory=dict)

    def special_names(self, named: Mapping[int, str]) -> tuple[str, ...]:
        """The names of the special tokens behind the ranks, the ids without a name numbered as reserved ones."""
        names: list[str] = []
        reserved = 0
        for index in range(self.specials):
            names.append(named.get(index, f"<|reserved_special_token_{reserved}|>"))
            reserved += index not in named
        return tuple(names)
