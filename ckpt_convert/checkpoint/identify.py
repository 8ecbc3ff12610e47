"""Identifying opened files: their keys, quantization, family, config and record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckpt_convert.checkpoint import diagnosis, opening
from ckpt_convert.checkpoint.conventions import CODE_DTYPES, quantization_config
from ckpt_convert.checkpoint.findings import Finding, raise_if_any
from ckpt_convert.checkpoint.hints import ConfigFile, Hints, read_config
from ckpt_convert.checkpoint.keys import Keys, refuse_clashes
from ckpt_convert.checkpoint.legacy_keys import KeyNames
from ckpt_convert.checkpoint.model import Model, from_shapes, is_bare, model_of, names_of
from ckpt_convert.checkpoint.opening import OpenedFiles
from ckpt_convert.checkpoint.record import Layout, Record
from ckpt_convert.checkpoint.tensor_info import SourceTensor, TensorInfo, describe_tensors
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
from ckpt_convert.values import frozen

if TYPE_CHECKING:
    from ckpt_convert.checkpoint.quantized.detect import Quantization
    from ckpt_convert.checkpoint.quantized.view import Dequantized

_ADVICE = {
    "peft": "merge the adapter into its base model first (peft's merge_and_unload), then convert that",
    "dcp": "say which format it is with `from_format=`, and give its config.json with `config=` if there is none in "
    "ckpt_convert/",
    "gguf": "it can be looked at, not converted; take the original checkpoint",
}
"""The way out for files of no known format, by kind."""


@frozen()
class Verbatim:
    """Tensors are taken as they are stored, whatever the model; ``format`` is the one that was detected, if any."""

    format: str | None


@frozen(eq=False)
class Identified:
    """Opened files, and what headers, config and record say about them.

    Everything is computed on first use, so that a listing does not look for a family. ``dequantized`` is set where the
    files are those of a quantized checkpoint, read as dequantized values; ``verbatim`` where the model does not matter.
    """

    opened: OpenedFiles
    stated_config: ConfigFile
    hints: Hints = field(default_factory=Hints)
    record: Record | None = None
    dequantized: Dequantized | None = None
    verbatim: Verbatim | None = None

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
        """The directory of the weight files."""
        return self.opened.root

    @property
    def format(self) -> str | None:
        """None when the files are of no known format."""
        return self.opened.format

    @property
    def why(self) -> str:
        """The evidence for the format, or what the files are."""
        return self.opened.why

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """(label, text) pairs from the files' own metadata, such as an adapter's base model."""
        return self.opened.facts

    @property
    def identities(self) -> Mapping[Place, Entry]:
        """The files of the directory and of the record, with size and etag before any of them was read."""
        return self.opened.identities

    @property
    def directory(self) -> WeightDirectory:
        return self.opened.directory

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self.opened.files

    @property
    def stored(self) -> tuple[tuple[WeightFile, StoredTensor], ...]:
        """Every stored tensor with its file, in file and offset order; lazy tensors refer to them by position."""
        return self.opened.stored

    @property
    def config_file(self) -> Place:
        """The config that was passed, else the place of the format's own config, which need not exist."""
        return self.stated_config.file

    @cached_property
    def quantization(self) -> Quantization | None:
        """The quantization, detected from headers and config; None where nothing is quantized."""
        if self.dequantized is not None or self.verbatim is not None or self.format != "hf":
            return None
        config = self.stated_config.content_or_empty
        if not quantization_config(config) and all(stored.dtype not in CODE_DTYPES for _, stored in self.stored):
            return None
        from ckpt_convert.checkpoint.quantized.detect import detect_quantization

        return detect_quantization(self.opened, config)

    @cached_property
    def keys(self) -> Keys:
        """The tensors by key. The keys of a quantized checkpoint stay as stored: no table has its scales."""
        if self.format is None or self.verbatim is not None or self.quantization is not None:
            return Keys(self.opened)
        tensors = [(tensor.key, tensor.shape) for file in self.files for tensor in file.header.tensors]
        return Keys(self.opened, self._names_of(tensors, self.directory.weight_map or ()))

    def _names_of(self, tensors: Sequence[tuple[str, Sequence[int]]], listed: Iterable[str]) -> KeyNames:
        return names_of(tensors, listed, self.stated_config.content_or_empty, str(self.format), self.hints.family)

    @property
    def names(self) -> KeyNames:
        """Maps stored keys to the format's keys; ``tensors`` and ``stored`` have stored keys."""
        return self.keys.names

    @property
    def ranks(self) -> list[dict[str, SourceTensor]]:
        """See ``Keys.ranks``."""
        return self.keys.ranks

    @property
    def contradictions(self) -> list[Finding]:
        """Where the files disagree with each other, or with the index."""
        return self.keys.contradictions

    def is_weight(self, key: str) -> bool:
        """Whether a key is one of the model's weights, and not of other training state."""
        return self.keys.is_weight(key)

    @property
    def key_notices(self) -> list[str]:
        """Which keys are read under other names, and which are skipped because they are no weights."""
        return self.keys.notices

    @cached_property
    def is_bare(self) -> bool:
        """Whether the keys are those of a model without its head class; an output of the same format keeps them."""
        known = self.stated_config.content_or_empty if self.format is not None else {}
        return is_bare(self.names, known, self.format, self.hints.family)

    @cached_property
    def family(self) -> str | None:
        """The name of the family, None when it is unknown; ``model`` then raises the reason."""
        try:
            return self.model.family.name
        except CkptConvertError:
            return None

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The config with the keys of Hugging Face's config.json, None when there is none."""
        try:
            return self.model.config
        except CkptConvertError:
            return self.stated_config.content if self.config_file.name != "params.json" else None

    @cached_property
    def model(self) -> Model:
        """Family and config; raises ConfigError or UnsupportedFamilyError where they cannot be determined."""
        if self.format is None:
            raise AmbiguousFormatError(f"{self.place}: {self.why}; {self.advice}")
        if (cause := diagnosis.zero3_placeholders(self.opened)) is not None:  # of any family: there are no values
            raise KeyMismatchError(f"{self.place}: {cause}")
        if self.verbatim is not None:
            return self._verbatim_model
        model = self._model
        if (cause := diagnosis.unmerged_adapter(self.opened)) is not None:
            raise KeyMismatchError(f"{self.place}: {cause}")
        if self.unknown_scheme is not None:
            raise UnsupportedFamilyError(
                f"{self.place}: is quantized ({self.unknown_scheme}), an unknown scheme: it can only be re-sharded "
                "(`to='hf'`); for anything else dequantize it with the tool that made it, or convert the original "
                "model"
            )
        return model

    @cached_property
    def _model(self) -> Model:
        """The model that the config describes, before the files are checked against it."""
        return model_of(self.keys, self.stated_config, self.hints, self.record)

    def model_for(self, *formats: str) -> Model:
        """``model`` for reading and writing these formats only.

        If Hugging Face's is the only format, an unknown family gets a generic table of its stored keys, and so does a
        quantized checkpoint. Otherwise raises what ``model`` does, and KeyMismatchError or ShapeMismatchError for
        quantized tensors that do not fit the family's table.
        """
        wanted = frozenset((str(self.format), *formats))
        try:
            model = self.model
        except UnsupportedFamilyError:
            if wanted != {"hf"} or not self.files:
                raise
            return self._generic_model
        from ckpt_convert.checkpoint.quantized import as_stored

        if self.quantization is None:
            return as_stored.unquantized(model, self.format, wanted)
        as_stored.refuse_formats(self.quantization, model, wanted, self.place)
        return self._passthrough_model

    @cached_property
    def _generic_model(self) -> Model:
        from ckpt_convert.checkpoint import generic_model

        return generic_model.generic_model(self.config or {}, self.unknown_scheme, self.ranks[0].values())

    @cached_property
    def _verbatim_model(self) -> Model:
        from ckpt_convert.checkpoint import generic_model

        return generic_model.verbatim_model(self.ranks[0].values())

    @cached_property
    def _passthrough_model(self) -> Model:
        """The model with quantized tensors as stored, after checking them against the family's table."""
        from ckpt_convert.checkpoint import mapping
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
        """The config's quant_method, where no rule knows it and the stored tensors do not fit the family's table."""
        if self.format != "hf" or self.dequantized is not None or self.quantization is not None:
            return None
        if self.verbatim is not None:
            return None
        config = self.stated_config.content_or_empty
        if not quantization_config(config) and "quantization" not in config:
            return None
        from ckpt_convert.checkpoint import mapping
        from ckpt_convert.checkpoint.quantized.detect import unknown_scheme

        scheme = unknown_scheme(config)
        if scheme is None or self.contradictions:
            return None
        try:
            model = self._model
        except CkptConvertError:
            return scheme
        _, misfits = mapping.examine_column(model.family, str(self.format), model.dims, self.ranks)
        return scheme if misfits else None

    def with_values(
        self, quantization: Quantization, dtype: str, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Identified:
        """The same with quantized tensors as values of ``dtype``, and a config without its quantization.

        Tensors that cannot be dequantized are described, but raise when they are read. ``shapes`` are those that
        headers do not give.
        """
        from ckpt_convert.checkpoint.quantized import view

        said = self.stated_config.loaded
        return replace(
            self,
            opened=view.dequantized_files(self.opened, quantization, dtype, shapes),
            stated_config=self.stated_config
            if said is None
            else replace(self.stated_config, loaded=view.without_quantization(said)),
            dequantized=view.Dequantized(dtype, quantization.text),
        )

    def describe_dequantized(self, quantization: Quantization, model: Model) -> Identified:
        """The same with each quantized tensor described as dequantized, for inspection: not all can be read.

        Shapes that headers do not give are those of the table.
        """
        return self.with_values(quantization, "float32", self._shapes(quantization, model))

    def _shapes(self, quantization: Quantization, model: Model) -> dict[str, tuple[int, ...]]:
        """The dequantized shapes that headers do not give, from the table."""
        unsaid = {key for key, one in quantization.tensors.items() if one.shape is None}
        entries = model.family.stored_specs("hf", model.dims) if unsaid else ()
        return {entry.key: entry.shape("hf", model.dims) or () for entry in entries if entry.key in unsaid}

    @cached_property
    def from_shapes(self) -> dict[str, Any] | None:
        """The config derived from tensor shapes, of a family whose files come without one."""
        return from_shapes(self.keys, self.hints.family)

    @property
    def advice(self) -> str:
        """The way out for files of no known format."""
        kinds = {self.directory.kind, *(file.header.kind for file in self.files)}
        return next(
            (advice for kind, advice in _ADVICE.items() if kind in kinds), "say which format it is with `from_format=`"
        )

    def refuse_foreign(self) -> None:
        """Raise UnsafeFileError for a pickle with other objects than tensors and plain data: it can only be shown."""
        for file in self.files:
            if file.header.foreign:
                from ckpt_convert.containers.pickle import torchpickle

                raise torchpickle.refusal_error(str(file.place), "data.pkl", *file.header.foreign)

    @property
    def params(self) -> tuple[Place, dict[str, Any]] | None:
        """params.json of a meta checkpoint, or the config that was passed instead of it, with its content."""
        if self.format != "meta" or self.stated_config.content is None:
            return None
        return self.stated_config.file, self.stated_config.content

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by key, ranks and pieces joined: full shape, dtype, bytes, and its parts in files.

        Keys that several files of no known format have become ``file:key``.
        """
        splits = self._splits() if len(self.files) > 1 and self.format == "meta" else {}
        splits = {self.names.stored.get(key, key): cut for key, cut in splits.items()}
        return describe_tensors(self.stored, self.keys.key_in_file, splits, self.format == "meta")

    def _splits(self) -> dict[str, tuple[int | None, int]]:
        """For each key the axis that ranks split, and the number of consecutive ranks with equal replicas."""
        try:
            model = self.model
        except CkptConvertError:
            return {}
        ranks = max(file.rank for file in self.files) + 1
        return {
            entry.key: (entry.tp_axis("meta", model.dims), entry.column("meta").replicas(model.dims, ranks))
            for entry in model.family.stored_specs("meta", model.dims)
        }

    @property
    def notices(self) -> list[str]:
        """What a user should know about the files: objects that are no tensors, files that are not used."""
        numbers = [self.dequantized.notice] if self.dequantized is not None else []
        return [*opening.file_notices(self.place, self.files), *self.key_notices, *self._caveats, *numbers]

    @property
    def _caveats(self) -> tuple[str, ...]:
        family = FAMILIES.get(self.family) if self.family else None
        return family.caveats(str(self.format)) if family is not None else ()

    def layout(self, *, literal: bool = False) -> Layout:
        """The layout of this checkpoint in its files, to record it or to write others like it.

        If keys are not those of the format, or there is more than weights, it is the layout of the weights alone under
        the keys of the format; ``literal`` keeps everything as stored.
        """
        if self.dequantized is not None:
            from ckpt_convert.checkpoint.quantized import view

            return view.dequantized_layout(self.opened)
        from ckpt_convert.checkpoint.snapshot import snapshot_layout  # inspecting a checkpoint does not need it

        return snapshot_layout(self.keys, literal=literal or self.keys.has_only_weights)

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype and parts of a tensor, by its stored key or the format's; raises KeyError for an unknown key."""
        return self.tensors[key if key in self.tensors else self.names.stored.get(key, key)]

    def joined(self, key: str) -> tuple[LazyTensor, str]:
        """A tensor with ranks and pieces joined, by its stored key or the format's, and its dtype.

        Its tiles refer to ``stored`` by position.

        Raises KeyError for an unknown key, AmbiguousFormatError where it is not known how ranks are joined,
        KeyMismatchError where two files have the key, and InputError for packed values that cannot be separated.
        """
        info = self.info(key)
        key = info.key
        if not info.settled:
            raise AmbiguousFormatError(
                f"{self.place}: {key} is on {len(info.parts)} ranks, and nothing says how to join them; "
                "give the model's params.json (or config=)"
            )
        if info.dtype not in DTYPES:
            raise InputError(
                f"{self.place}: {key} is {info.dtype}, which packs several values together and cannot be read by value"
            )
        if key in self.keys.duplicates:
            raise KeyMismatchError(f"{self.place}: {self.keys.duplicates[key]}; give one of the files")
        tensors = [rank[key].tensor for rank in self.keys.stored_ranks if key in rank]
        tensors = tensors[:: info.copies]
        whole = concat(tensors, info.axis) if info.axis is not None and len(tensors) > 1 else tensors[0]
        return whole, info.dtype


def identify(opened: OpenedFiles, hints: Hints | None = None, record: Record | None = None) -> Identified:
    """Identify opened files, with the config that was passed or the one beside them, and the record of a conversion."""
    hints = hints or Hints()
    return Identified(opened, read_config(opened, hints.config), hints, record)
