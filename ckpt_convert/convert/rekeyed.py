"""A checkpoint's tensors under the keys and in the layout of another format, without writing it or reading a byte."""

from __future__ import annotations

from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.model import naming
from ckpt_convert.convert import translate
from ckpt_convert.tensors.blocks import TypedTensor


def tensors_as(source: Identified, format: str) -> dict[str, TypedTensor]:
    """The tensors that a conversion to ``format`` would write, by key, with the ranks of Meta's format joined.

    Their sources are indices into ``source.stored``. Where only bytes decide whether the output is tied, it counts as
    not tied. Raises what planning the conversion raises of the weights: UnsupportedFamilyError, KeyMismatchError, ….
    """
    source.refuse_foreign()
    name, stored_format = str(source.place), str(source.format)
    model = source.model_for(stored_format, format)
    with naming(str(source.config_file)):
        translate.check_formats(model, name, stored_format, format)
    reading = translate.read_source(model, stored_format, source.ranks, name)
    made = translate.write_target(reading, format, name, keep_tied=None if format == stored_format else ())
    return {target.key: TypedTensor(target.tensor, target.dtype) for target in made.targets}
