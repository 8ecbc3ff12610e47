"""From one layout to another with plain values: tensors that exist nowhere, and no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ckpt_convert.checkpoint.mapping import Equality
from ckpt_convert.checkpoint.model import Model, model_from
from ckpt_convert.checkpoint.tensor_info import SourceTensor
from ckpt_convert.convert import ties, translate
from ckpt_convert.errors import KeyMismatchError, UnsupportedFamilyError
from ckpt_convert.models.core.config import ConfigOptions
from ckpt_convert.tensors.lazy import from_source
from tests.values import CONFIG, SHAPES

OUTPUT = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def sources(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, SourceTensor]:
    return {
        key: SourceTensor(key, "BF16", from_source(at, shape), "here") for at, (key, shape) in enumerate(shapes.items())
    }


def model(tied: bool | None, shapes: Mapping[str, tuple[int, ...]]) -> Model:
    config: dict[str, Any] = {**CONFIG, "tie_word_embeddings": tied is not False}
    found = model_from(config, "config.json", "hf", [sources(shapes)], ConfigOptions())
    return Model(found.family, found.evidence, found.config, found.dims, tied, found.notices)


BOTH = {**SHAPES, OUTPUT: SHAPES[EMBEDDING]}


def translated(
    tied: bool | None, shapes: Mapping[str, tuple[int, ...]], target: str, *, same: bool | None = None
) -> tuple[translate.Translation, list[Equality]]:
    """The translation, and the pairs that were compared on the way; ``same`` is what they were found to be, if so."""
    compared: list[Equality] = []

    def equal(check: Equality) -> bool:
        compared.append(check)
        return bool(same)

    made = translate.translate(
        model(tied, shapes), "hf", target, [sources(shapes)], "it", equal=equal if same is not None else None
    )
    return made, compared


def keys(made: translate.Translation) -> set[str]:
    return {target.key for target in made.targets}


def test_every_tensor_goes_from_one_column_into_the_other() -> None:
    made, compared = translated(False, BOTH, "meta")
    assert len(made.targets) == len(BOTH)
    assert {"tok_embeddings.weight", "output.weight", "layers.0.attention.wq.weight"} <= keys(made)
    assert not made.unmapped
    assert not made.checks
    assert not made.losses
    assert not compared


def test_a_column_is_written_as_it_was_read() -> None:
    made, _ = translated(False, BOTH, "hf")
    assert {target.key: target.tensor for target in made.targets} == {
        key: source.tensor for key, source in sources(BOTH).items()
    }


def test_a_config_that_ties_is_held_against_the_bytes_later() -> None:
    made, compared = translated(True, BOTH, "hf", same=False)
    assert not compared
    assert not made.checks  # as the source has it: both are written, and neither stands for the other
    reading = translate.read_source(model(True, BOTH), "hf", [sources(BOTH)], "it")
    (check,) = translate.write_target(reading, "hf", "it", keep_tied=False).checks
    assert OUTPUT in check.message


@pytest.mark.parametrize("same", [True, False])
def test_where_nothing_says_it_the_bytes_decide(same: bool) -> None:
    made, (pair,) = translated(None, BOTH, "meta", same=same)
    assert {pair.left, pair.right} == {sources(BOTH)[EMBEDDING].tensor, sources(BOTH)[OUTPUT].tensor}
    assert made.dims["tied"] == int(same)
    assert made.reading.model.tied is same
    assert made.reading.ties.undecided is None
    assert not made.checks  # they are known to be so


def test_where_nobody_compares_it_stays_undecided_and_room_is_kept_for_both() -> None:
    made, _ = translated(None, BOTH, "meta")
    assert made.reading.ties.undecided is not None
    assert "output.weight" in keys(made)
    assert made.ties == ["output and tok_embeddings: tied if equal, which the bytes decide"]


def test_a_model_in_memory_decides_by_what_it_has() -> None:
    assert ties.tied_in_memory(model(None, BOTH), "hf", SHAPES.keys()).tied is True
    assert ties.tied_in_memory(model(None, BOTH), "hf", BOTH.keys()).tied is False
    assert ties.tied_in_memory(model(True, BOTH), "hf", BOTH.keys()).tied is True


def test_all_that_does_not_fit_is_one_error() -> None:
    shapes = {key: shape for key, shape in BOTH.items() if "q_proj" not in key} | {"model.extra": (3,)}
    with pytest.raises(KeyMismatchError, match=r"(?s)1 missing keys.*q_proj.*1 unexpected keys.*model\.extra"):
        translated(False, shapes, "meta")


def test_a_format_that_a_family_has_not_is_refused() -> None:
    with pytest.raises(UnsupportedFamilyError, match="has no nowhere column"):
        translate.check_formats(model(False, BOTH), "it", "hf", "nowhere")
