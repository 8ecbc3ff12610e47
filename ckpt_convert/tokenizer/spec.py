"""A family's description of its tokenizer: everything that a file of tiktoken ranks does not contain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from ckpt_convert.values import frozen


@frozen()
class TiktokenSpec:
    """A tokenizer whose tokenizer.model holds tiktoken ranks and nothing else.

    title: its name in messages.
    n_ranks: how many ranks the file has.
    pattern: the regular expression that splits texts.
    n_special_tokens: how many special tokens follow the ranks.
    special_names: their names by position, where they have one; the others are reserved tokens.
    names_from: the release that uses these names.
    bos, eos: the special tokens at the beginning and the end of a text.
    end_of_turn: the special token at the end of a turn.
    alternative_names: the names that other releases give the special tokens.
    other_tokenizers: tokenizers with another pattern and other special tokens, by their number of ranks.
    """

    title: str
    n_ranks: int
    pattern: str
    n_special_tokens: int
    special_names: Mapping[int, str]
    names_from: str
    bos: str
    eos: str
    end_of_turn: str
    alternative_names: tuple[Mapping[int, str], ...] = ()
    other_tokenizers: Mapping[int, str] = field(default_factory=dict)

    def special_token_names(self, named: Mapping[int, str]) -> tuple[str, ...]:
        """The names of the special tokens after the ranks; unnamed ones are numbered reserved tokens."""
        names: list[str] = []
        reserved = 0
        for index in range(self.n_special_tokens):
            names.append(named.get(index, f"<|reserved_special_token_{reserved}|>"))
            reserved += index not in named
        return tuple(names)
