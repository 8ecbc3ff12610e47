"""Opened files with what they are: their keys, what of them is quantized, the family, the config, the record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckpt_convert.checkpoint import diagnosis, mapping, opening
from ckpt_convert.checkpoint.findings import Finding, raise_if_any
from ckpt_convert.checkpoint.hints import ConfigFile, Hints, read_config
from ckpt_convert.checkpoint.keys import Keys, refuse_clashes
from ckpt_convert.checkpoint.legacy_keys import KeyNames
from ckpt_convert.checkpoint.mapping import SourceTensor
from ckpt_convert.checkpoint.model import Model, from_shapes, is_bare, model_of, names_of
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.record import Layout, Record
from ckpt_convert.checkpoint.tensor_info import TensorInfo, describe_tensors
from ckpt_convert.dtypes import DTYPES
from ckpt_convert.errors import (
    AmbiguousFormatError,
    CkptConvertError,
    InputError,
    KeyMismatchError,
    UnsupportedFamilyError,
)
from ckpt_convert.formats.base import WeightDirectory
from ckpt_convert.models import FAMILIES
from ckpt_convert.storage.base import Entry
from ckpt_convert.storage.place import Place
from ckpt_convert.tensors.header import StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor, concat

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.quantized.detect import Quantization
    from ckpt_convert.checkpoint.quantized.view import Dequantized

_ADVICE = {
    "peft": "merge the adapter into its base model first (peft's merge_and_unload), then convert that",
    "dcp": "say which format it is with `from_format=`, and give its config.json with `config=` if none lies in "
    "ckpt_convert/",
    "gguf": "it can be looked at, not converted; take the original checkpoint",
}
"""What to do about what is no format, by kind."""


@dataclass(frozen=True, eq=False)
class Identified:
    """Opened files, and what is told of them from headers, config and record alone.

    All of it is worked out when it is first asked for: a listing has no need of a family. ``dequantized`` says that the
    files are those of a quantized checkpoint, read as numbers.
    """

    opened: OpenedFiles
    stated_config: ConfigFile
    hints: Hints = field(default_factory=Hints)
    record: Record | None = None
    dequantized: Dequantized | None = None

    def close(self) -> None:
        opening.close_files(self.files)

    def __enter__(self) -> Identified:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def place(self) -> Place:
        return self.opened.place

    @property
    def root(self) -> Place:
        """The directory that the weight files lie in."""
        return self.opened.root

    @property
    def format(self) -> str | None:
        """None when the files are of no format that is known."""
        return self.opened.format

    @property
    def why(self) -> str:
        """What the format was told by, or what the files are."""
        return self.opened.why

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """(label, text): more that the files say of themselves, such as an adapter's base model."""
        return self.opened.facts

    @property
    def identities(self) -> Mapping[Place, Entry]:
        """The files of the directory and the record as they were before any of them was read."""
        return self.opened.identities

    @property
    def directory(self) -> WeightDirectory:
        return self.opened.directory

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self.opened.files

    @property
    def stored(self) -> tuple[tuple[WeightFile, StoredTensor], ...]:
        """Every stored tensor with its file, in file and offset order; the position is its number as a source."""
        return self.opened.stored

    @property
    def config_file(self) -> Place:
        """The config that was given, else the place of the format's own, where there may be none."""
        return self.stated_config.file

    @cached_property
    def quantization(self) -> Quantization | None:
        """What of it is quantized, None for nothing; told from headers and config."""
        if self.dequantized is not None or self.format != "hf":
            return None
        from ckpt_convert.checkpoint.quantized.detect import detect_quantization

        return detect_quantization(self.opened, self.stated_config.content_or_empty)

    @cached_property
    def keys(self) -> Keys:
        """The tensors by key. Those of a quantized checkpoint are left as they are: no table knows its scales."""
        if self.format is None or self.quantization is not None:
            return Keys(self.opened)
        tensors = [(tensor.key, tensor.shape) for file in self.files for tensor in file.header.tensors]
        return Keys(self.opened, self._names_of(tensors, self.directory.weight_map or ()))

    def _names_of(self, tensors: Sequence[tuple[str, Sequence[int]]], listed: Iterable[str]) -> KeyNames:
        return names_of(tensors, listed, self.stated_config.content_or_empty, str(self.format), self.hints.family)

    @property
    def names(self) -> KeyNames:
        """What the keys of the files are called in their format; ``tensors`` and ``stored`` have those of the files."""
        return self.keys.names

    @property
    def ranks(self) -> list[dict[str, SourceTensor]]:
        """As ``Keys.ranks``."""
        return self.keys.ranks

    @property
    def contradictions(self) -> list[Finding]:
        """Where the files disagree with each other, or with the index."""
        return self.keys.contradictions

    def is_weight(self, key: str) -> bool:
        """Whether a key is one of the model's, and not of what else its training run has saved."""
        return self.keys.is_weight(key)

    @property
    def key_notices(self) -> list[str]:
        """How keys are read that are not those of the format, and what is passed over as it is no weight."""
        return self.keys.notices

    @cached_property
    def is_bare(self) -> bool:
        """Whether the keys are those of a model without its head, which an output of the same format keeps."""
        known = self.stated_config.content_or_empty if self.format is not None else {}
        return is_bare(self.names, known, self.format, self.hints.family)

    @cached_property
    def family(self) -> str | None:
        """The name of the family, None when it is not known (``model`` says why, and has its table)."""
        try:
            return self.model.family.name
        except CkptConvertError:
            return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The config in the words of Hugging Face's config.json, None when there is none."""
        try:
            return self.model.config
        except CkptConvertError:
            return self.stated_config.content if self.config_file.name != "params.json" else None

    @cached_property
    def model(self) -> Model:
        """Family and config; raises ConfigError or UnsupportedFamilyError where they are not to be had."""
        if self.format is None:
            raise AmbiguousFormatError(f"{self.place}: {self.why}; {self.advice}")
        if (
            cause := diagnosis.zero3_placeholders(self.opened)
        ) is not None:  # of any family: there are no values to move
            raise KeyMismatchError(f"{self.place}: {cause}")
        model = self._model
        if (cause := diagnosis.unmerged_adapter(self.opened)) is not None:
            raise KeyMismatchError(f"{self.place}: {cause}")
        if self.unknown_scheme is not None:
            raise UnsupportedFamilyError(
                f"{self.place}: is quantized ({self.unknown_scheme}), which is no scheme that is known here: it can "
                "only be laid out anew as it is (`to='hf'`); for anything else dequantize it with the tool that made "
                "it, or take the model that was quantized"
            )
        return model

    @cached_property
    def _model(self) -> Model:
        """What the config describes, whatever it is that the files hold."""
        return model_of(self.keys, self.stated_config, self.hints, self.record)

    def model_for(self, *formats: str) -> Model:
        """``model``, for what has to do with these formats alone.

        Where Hugging Face's is the only one, a family that is not known does not matter: its keys are taken as they
        are, and so are those of quantized tensors. Raises what ``model`` does for anything else, and what does not fit
        of a quantized checkpoint.
        """
        wanted = frozenset((str(self.format), *formats))
        try:
            model = self.model
        except UnsupportedFamilyError:
            if wanted != {"hf"} or not self.files:
                raise
            return self._unknown
        from ckpt_convert.checkpoint.quantized import as_stored

        if self.quantization is None:
            return as_stored.unquantized(model, self.format, wanted)
        as_stored.refuse_formats(self.quantization, model, wanted, self.place)
        return self._carried

    @cached_property
    def _unknown(self) -> Model:
        from ckpt_convert.checkpoint import generic_model

        return generic_model.generic_model(self.config or {}, self.unknown_scheme, self.ranks[0].values())

    @cached_property
    def _carried(self) -> Model:
        """The model of quantized tensors as they are, once they were held against the table of the family."""
        from ckpt_convert.checkpoint.quantized import as_stored

        assert self.quantization is not None
        found, model, what = self.quantization, self.model, str(self.place)
        raise_if_any(found.findings, what)
        numbers = as_stored.dequantized_tensors(found, self.ranks[0], self._shapes(found, model))
        names = self._names_of([(key, one.shape) for key, one in numbers.items()], ())
        refuse_clashes(names, self.place)
        weights = {
            (name := names.of(key)): one._replace(key=name) for key, one in numbers.items() if names.is_weight(key)
        }
        logicals, misfits = mapping.examine_column(model.family, "hf", model.dims, [weights])
        raise_if_any(misfits, what)
        order = dict.fromkeys(names.stored.get(one.key, one.key) for one in logicals.tensors.values())
        return as_stored.passthrough_model(found, model, self.ranks[0], order)

    @cached_property
    def unknown_scheme(self) -> str | None:
        """The config's word for how the weights are quantized, where no rule knows it and the headers show it."""
        if self.format != "hf" or self.dequantized is not None or self.quantization is not None:
            return None
        from ckpt_convert.checkpoint.quantized.detect import unknown_scheme

        scheme = unknown_scheme(self.stated_config.content_or_empty)
        if scheme is None or self.contradictions:
            return None
        try:
            model = self._model
        except CkptConvertError:
            return scheme
        _, misfits = mapping.examine_column(model.family, str(self.format), model.dims, self.ranks)
        return scheme if misfits else None

    def with_values(
        self, found: Quantization, dtype: str, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Identified:
        """The same with quantized tensors as numbers of ``dtype``; config and model say nothing of a quantization.

        What does not belong together, or cannot be read, is at least described, in ``shapes`` where headers do not say
        them.
        """
        from ckpt_convert.checkpoint.quantized import view

        said = self.stated_config.loaded
        return replace(
            self,
            opened=view.dequantized_files(self.opened, found, dtype, shapes),
            stated_config=self.stated_config
            if said is None
            else replace(self.stated_config, loaded=view.without_quantization(said)),
            dequantized=view.Dequantized(dtype, found.text),
        )

    def describe_dequantized(self, found: Quantization, model: Model) -> Identified:
        """The same with each quantized tensor as one of numbers, to be looked at: not all of them can be read.

        What headers do not say of a shape is taken to be as the table has it.
        """
        return self.with_values(found, "float32", self._shapes(found, model))

    def _shapes(self, found: Quantization, model: Model) -> dict[str, tuple[int, ...]]:
        """The shapes of the numbers that headers do not say, as the table has them."""
        unsaid = {key for key, one in found.tensors.items() if one.shape is None}
        entries = model.family.entries("hf", model.dims) if unsaid else ()
        return {entry.key: entry.shape("hf", model.dims) or () for entry in entries if entry.key in unsaid}

    @cached_property
    def from_shapes(self) -> dict[str, Any] | None:
        """The config that the tensors themselves show, of a family whose files come without one."""
        return from_shapes(self.keys, self.hints.family)

    @property
    def advice(self) -> str:
        """What to do about files that are of no format."""
        kinds = {self.directory.kind, *(file.header.kind for file in self.files)}
        return next(
            (advice for kind, advice in _ADVICE.items() if kind in kinds), "say which format it is with `from_format=`"
        )

    def refuse_foreign(self) -> None:
        """Raise UnsafeFileError where a pickle asks for more than tensors and plain data: that can only be shown."""
        for file in self.files:
            if file.header.foreign:
                from ckpt_convert.containers.pickle import torchpickle

                raise torchpickle.refusal_error(str(file.place), "data.pkl", *file.header.foreign)

    @property
    def params(self) -> tuple[Place, dict[str, Any]] | None:
        """params.json of a meta checkpoint, or what was given instead of it."""
        if self.format != "meta" or self.stated_config.content is None:
            return None
        return self.stated_config.file, self.stated_config.content

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by key, ranks and pieces joined: full shape, dtype, bytes, and the parts it lies in.

        Where several files of no known format have a key, theirs are called ``file:key``.
        """
        cuts = self._cuts() if len(self.files) > 1 and self.format == "meta" else {}
        cuts = {self.names.stored.get(key, key): cut for key, cut in cuts.items()}
        return describe_tensors(self.stored, self.keys.key_in_file, cuts, self.format == "meta")

    def _cuts(self) -> dict[str, tuple[int | None, int]]:
        """The axis of each key that ranks cut, and how many of them in succession hold the same part."""
        try:
            model = self.model
        except CkptConvertError:
            return {}
        ranks = max(file.rank for file in self.files) + 1
        return {
            entry.key: (entry.cut_axis("meta", model.dims), entry.column("meta").repeats(model.dims, ranks))
            for entry in model.family.entries("meta", model.dims)
        }

    @property
    def notices(self) -> list[str]:
        """What a reader should know about the files: objects that are no tensors, files that are not used."""
        numbers = [self.dequantized.notice] if self.dequantized is not None else []
        return [*opening.file_notices(self.place, self.files), *self.key_notices, *self._caveats, *numbers]

    @property
    def _caveats(self) -> tuple[str, ...]:
        family = FAMILIES.get(self.family) if self.family else None
        return family.caveats(str(self.format)) if family is not None else ()

    def layout(self, *, literal: bool = False) -> Layout:
        """How this checkpoint lies in its files, to be recorded or imitated.

        With keys that are not those of the format, or with more than weights: how the weights alone would lie there,
        under the keys of the format; ``literal`` takes everything as it is.
        """
        if self.dequantized is not None:
            from ckpt_convert.checkpoint.quantized import view

            return view.dequantized_layout(self.opened)
        from ckpt_convert.checkpoint.snapshot import snapshot_layout  # not needed to look at a checkpoint

        return snapshot_layout(self.keys, literal=literal or self.keys.has_only_weights)

    def info(self, key: str) -> TensorInfo:
        """What is known of a tensor, by its key in the files or in the format; raises KeyError for an unknown key."""
        return self.tensors[key if key in self.tensors else self.names.stored.get(key, key)]

    def joined(self, key: str) -> tuple[LazyTensor, str]:
        """A tensor by its key in the files, or in the format: ranks and pieces joined, and its dtype.

        Its tiles are numbered as ``stored``.

        Raises KeyError for an unknown key, AmbiguousFormatError where nothing says how ranks are joined,
        KeyMismatchError where two files have the key, and InputError for a packing whose numbers cannot be told apart.
        """
        info = self.info(key)
        key = info.key
        if not info.settled:
            raise AmbiguousFormatError(
                f"{self.place}: {key} lies on {len(info.parts)} ranks, and nothing says how to join them; "
                "give the model's params.json (or config=)"
            )
        if info.dtype not in DTYPES:
            raise InputError(
                f"{self.place}: {key} is {info.dtype}, which packs several numbers together; its values cannot be read"
            )
        if key in self.keys.duplicates:
            raise KeyMismatchError(f"{self.place}: {self.keys.duplicates[key]}; give one of the files")
        tensors = [rank[key].tensor for rank in self.keys.stored_ranks if key in rank]
        tensors = tensors[:: info.copies]
        whole = concat(tensors, info.axis) if info.axis is not None and len(tensors) > 1 else tensors[0]
        return whole, info.dtype


def identify(opened: OpenedFiles, hints: Hints | None = None, record: Record | None = None) -> Identified:
    """What opened files are, with the config that was given or lies beside them, and what an earlier record says."""
    hints = hints or Hints()
    return Identified(opened, read_config(opened, hints.config), hints, record)
