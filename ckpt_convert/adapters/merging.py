"""Merging an adapter in files into a checkpoint: which weights change, planned from headers, computed when read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from ckpt_convert.adapters.config import ALL_LINEAR, is_module_name
from ckpt_convert.adapters.stored import MergedWeight, StoredAdapter
from ckpt_convert.checkpoint import legacy_keys
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensor
from ckpt_convert.checkpoint.quantized.computed_file import ComputedFile, Make
from ckpt_convert.convert.changes import ChangedTensors
from ckpt_convert.convert.translate import SourceReading
from ckpt_convert.dtypes import CAST_FROM, CASTABLE
from ckpt_convert.errors import CkptConvertError, ConfigError, KeyMismatchError, ShapeMismatchError
from ckpt_convert.models.core.table import Dims, Family, Instance, StoredTensorSpec
from ckpt_convert.storage.checksums import digest
from ckpt_convert.tensors.header import Header, StoredTensor, WeightFile
from ckpt_convert.tensors.lazy import LazyTensor, from_source
from ckpt_convert.wording import indented_list

_WEIGHT = ".weight"
_COMPUTED = "computed"


@dataclass
class _Problems:
    """What does not fit, by kind of error."""

    config: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    @property
    def found(self) -> list[str]:
        return [*self.config, *self.keys, *self.shapes]

    def raise_if_any(self, what: str) -> None:
        kind: type[CkptConvertError] = ShapeMismatchError
        kind = ConfigError if self.config else KeyMismatchError if self.keys else kind
        if self.found:
            raise kind(f"{what}: the adapter does not fit the base:{indented_list(self.found)}")


class AdapterMerge:
    """The change of a conversion that merges an adapter into the base; see ``convert.changes.TensorChange``."""

    def __init__(self, adapter: StoredAdapter) -> None:
        self._adapter = adapter
        self._overflows: dict[tuple[str, int], int] = {}

    def overflows(self) -> Mapping[str, int]:
        """Count by key the finite base values that became infinite in what was computed so far."""
        counts: dict[str, int] = {}
        for (key, _), count in sorted(self._overflows.items()):
            counts[key] = counts.get(key, 0) + count
        return counts

    def plan(self, source: Identified, reading: SourceReading) -> ChangedTensors:
        """The merged weights, and those that the adapter's file has whole; raises what lists everything wrong."""
        problems = _Problems()
        match = _Match(self._adapter, source, reading, problems)
        whole, checks = match.whole()
        merged = dict(match.merged({**reading.logicals.tensors, **whole}))
        match.check_targets()
        problems.raise_if_any(str(self._adapter.file.place))
        return self._changed(source, reading, merged, whole, checks)

    def _changed(
        self,
        source: Identified,
        reading: SourceReading,
        merged: Mapping[Instance, MergedWeight],
        whole: Mapping[Instance, LogicalTensor],
        checks: list[Equality],
    ) -> ChangedTensors:
        from ckpt_convert.adapters import computing  # not before: it needs NumPy, and a plan does not

        inputs = (*source.stored, *self._adapter.file.stored)
        buffers = computing.Buffers(inputs)
        made: dict[Instance, tuple[StoredTensor, Make]] = {}
        before = reading.logicals.tensors
        for instance, weight in merged.items():
            make: Make = partial(computing.MergedMatrix, weight, buffers, self._overflows)
            made[instance] = _described(before[instance]), make
        for instance, tensor in whole.items():
            if instance not in merged:
                make = partial(computing.CastTensor, tensor, before[instance].dtype, buffers, self._overflows)
                made[instance] = _described(before[instance]), make
        reader = ComputedFile(self._adapter.file.files[0].reader, list(made.values()))
        scales = [(instance.name, weight.scale) for instance, weight in merged.items()]
        own = self._adapter.file.files[0]
        name = f"{own.name} at scales {digest(repr(scales).encode())}"  # a resumed merge has to have the same
        file = WeightFile(name, 0, own.place, reader, Header(_COMPUTED, reader.size, reader.tensors))
        first = len(inputs)
        tensors = {
            instance: replace(before[instance], tensor=from_source(first + number, tensor.shape), location=own.name)
            for number, (instance, tensor) in enumerate(zip(made, reader.tensors, strict=True))
        }
        steps = {
            first + number: "merge the adapter" if instance in merged else "as the adapter has it"
            for number, instance in enumerate(made)
        }
        stored = (*inputs, *((file, tensor) for tensor in reader.tensors))
        return ChangedTensors(tensors, stored, steps, tuple(checks), identities=self._adapter.identities)


def _described(base: LogicalTensor) -> StoredTensor:
    return StoredTensor(base.key, base.dtype, base.tensor.shape, 0)


class _Match:
    """An adapter's modules and weights as rows of the base's table."""

    def __init__(self, adapter: StoredAdapter, source: Identified, reading: SourceReading, problems: _Problems) -> None:
        self._adapter, self._problems = adapter, problems
        self._source, self._logicals, self._model = source, reading.logicals, reading.model
        self._family: Family = reading.model.family
        self._dims: Dims = reading.model.dims
        self._shift = {number: len(source.stored) + number for number in range(len(adapter.file.stored))}
        self._layout, self._specs = self._find_layout()
        self._names = self._read_names()
        self._adapted: set[str] = set()

    def merged(self, weights: Mapping[Instance, LogicalTensor]) -> Iterator[tuple[Instance, MergedWeight]]:
        """Each row of ``weights`` with an adapter; what does not fit is added to the problems."""
        for module, keys in self._adapter.parameters.items():
            spec = self._spec(module)
            if spec is None:
                continue
            a, b = self._tensor(keys["A"]), self._tensor(keys["B"])
            magnitude = self._tensor(keys["magnitude"]) if "magnitude" in keys else None
            if not self._fits(module, spec, a, b, magnitude):
                continue
            self._adapted.add(module)
            scale = self._adapter.scale(a.tensor.shape[0], *self._both_names(module, spec))
            for instance, start, size in self._rows(spec):
                base = weights.get(instance)
                if base is None or base.dtype not in CASTABLE:
                    self._no_base(module, spec, base)
                    break
                part = self._part(magnitude, instance, start, size) if magnitude is not None else None
                yield instance, MergedWeight(base, a, self._part(b, instance, start, size), scale, part)

    def whole(self) -> tuple[dict[Instance, LogicalTensor], list[Equality]]:
        """The weights that the adapter's file has whole, and for those that are tied the check that they are equal."""
        out: dict[Instance, LogicalTensor] = {}
        checks = []
        for name, key in self._adapter.whole.items():
            spec = self._specs.get(self._names.of(name))
            tensor = self._tensor(key)
            if spec is None:
                self._problems.keys.append(f"{name}: is saved whole, and the base has no such tensor")
                continue
            expected = spec.shape(self._layout, self._dims)
            if tensor.tensor.shape != expected:
                self._problems.shapes.append(
                    f"{name}: expected {list(expected or ())} as in the base, found {list(tensor.tensor.shape)}; an "
                    "adapter that resizes the embedding needs a base model that is resized as well"
                )
                continue
            for instance, part in spec.split(self._layout, tensor.tensor, self._dims).items():
                column = instance.row.column(self._layout) or spec.column(self._layout)
                logical = replace(tensor, tensor=column.to_logical(part, instance.row, self._dims))
                base = self._logicals.tensors.get(instance)
                if base is None or base.dtype not in CASTABLE or logical.dtype not in CAST_FROM:
                    self._no_base(name, spec, base)
                elif self._is_tied(instance):
                    if (check := self._tie_check(base, logical)) is not None:
                        checks.append(check)
                else:
                    out[instance] = logical
        return out, checks

    def check_targets(self) -> None:
        """Report modules that the config names by words, that the base has, and that lack their adapter."""
        config = self._adapter.config
        words = config.target_modules if config is not None else None
        if words is None or words == ALL_LINEAR or isinstance(words, str) or self._problems.found:
            return
        saved = {name.removesuffix(_WEIGHT) for name in self._adapter.whole}
        for key in self._specs:
            module = key.removesuffix(_WEIGHT)
            named = key.endswith(_WEIGHT) and any(is_module_name(word, module) for word in words)
            if named and module not in self._adapted and module not in saved and self._is_linear(self._specs[key]):
                self._problems.keys.append(f"{module}: has no adapter, but the config's target_modules name it")

    def _find_layout(self) -> tuple[str, dict[str, StoredTensorSpec]]:
        """The layout whose keys the adapter's modules have, with its keys: PEFT's is Hugging Face's."""
        order = ("hf",) if self._adapter.is_peft else (str(self._source.format), "native", "hf", "meta", "torchtitan")
        known = [name for name in dict.fromkeys(order) if name in self._family.formats]
        found: list[tuple[int, str, dict[str, StoredTensorSpec]]] = []
        for layout in known:
            specs = {spec.key: spec for spec in self._family.stored_specs(layout, self._dims)}
            count = sum(f"{module}{_WEIGHT}" in specs for module in self._adapter.parameters)
            if count == len(self._adapter.parameters):
                return layout, specs
            found.append((count, layout, specs))
        return max(found, key=lambda one: one[0], default=(0, "hf", {}))[1:]

    def _read_names(self) -> legacy_keys.KeyNames:
        """The layout's names of the adapter's, which may be those of a newer class of transformers."""
        if self._family.literal:
            return legacy_keys.PLAIN
        keys = [f"{module}{_WEIGHT}" for module in self._adapter.parameters]
        return legacy_keys.read_keys([*keys, *self._adapter.whole], [self._family], self._layout)

    def _spec(self, module: str) -> StoredTensorSpec | None:
        """The stored tensor of a module that can have an adapter; None, with the problem, for any other."""
        key = self._names.of(f"{module}{_WEIGHT}")
        spec = self._specs.get(key)
        if spec is None:
            near = difflib.get_close_matches(key, self._specs, 1, 0.8)
            hint = f"; the nearest is {near[0].removesuffix(_WEIGHT)}" if near else ""
            what = f"{self._family.name} in the {self._layout} layout" if not self._family.literal else "the base"
            self._problems.keys.append(f"{module}: is no linear layer of {what}{hint}{self._quantized}")
        elif not self._is_linear(spec):
            self._problems.keys.append(f"{module}: {key} is no matrix of a linear layer, so it has no adapter")
            spec = None
        elif any(self._is_tied(instance) for instance in spec.instances):
            self._problems.config.append(
                f"{module}: is tied to the embedding, which would be changed as well; untie the base first "
                "(tie_word_embeddings: false, and both weights in its files)"
            )
            spec = None
        return spec

    def _is_linear(self, spec: StoredTensorSpec) -> bool:
        """Whether a stored tensor is [out, in] of one linear layer, or of several that are fused row by row."""
        columns = [one.row.column(self._layout) or spec.column(self._layout) for one in spec.instances]
        simple = all(not c.transposed and c.shape is None and c.fused in (None, 0) for c in columns)
        return simple and not spec.stacked and all(len(one.row.shape) == 2 for one in spec.instances)

    def _is_tied(self, instance: Instance) -> bool:
        if not self._model.tied:
            return False
        row, rows = instance.row, self._family.rows
        return row.tied_to is not None or any(other.tied_to == row.name for other in rows)

    def _tie_check(self, base: LogicalTensor, own: LogicalTensor) -> Equality | None:
        """The check that a tied weight in the adapter's file is the base's, as PEFT saves it beside an adapter."""
        if own.dtype != base.dtype:
            self._problems.config.append(
                f"{own.key}: is saved whole as {own.dtype}, and tied in the base, where it is {base.dtype}"
            )
            return None
        said = f"{own.key}: was trained whole (modules_to_save), but the base ties it to another weight"
        return Equality(base.tensor, own.tensor, base.dtype, said, own.key)

    def _fits(
        self,
        module: str,
        spec: StoredTensorSpec,
        a: LogicalTensor,
        b: LogicalTensor,
        magnitude: LogicalTensor | None,
    ) -> bool:
        """Whether the shapes and dtypes of a module's parameters are right; if not, they are among the problems."""
        rows, columns = spec.shape(self._layout, self._dims) or (0, 0)
        config, before = self._adapter.config, len(self._problems.shapes)
        rank = max(a.tensor.shape[0], 1) if a.tensor.shape else 1
        stated = config.rank_of(*self._both_names(module, spec)) if config is not None else rank
        expected: list[tuple[str, LogicalTensor, tuple[int, ...]]]
        expected = [("A", a, (stated, columns)), ("B", b, (rows, stated))]
        expected += [("magnitude", magnitude, (rows,))] if magnitude is not None else []
        for name, tensor, shape in expected:
            if tensor.tensor.shape != shape:
                found = list(tensor.tensor.shape)
                self._problems.shapes.append(f"{module}: {name}: expected {list(shape)}, found {found}")
            if tensor.dtype not in CAST_FROM:
                self._problems.shapes.append(f"{module}: {name}: expected a floating-point dtype, found {tensor.dtype}")
        if config is not None and config.use_dora != (magnitude is not None):
            has = "has no magnitude" if config.use_dora else "has a magnitude"
            self._problems.keys.append(f"{module}: {has}, but the config says use_dora={config.use_dora}")
        return len(self._problems.shapes) == before

    def _both_names(self, module: str, spec: StoredTensorSpec) -> tuple[str, ...]:
        """The names of a module by which a config may call it: the file's, the layout's and Hugging Face's."""
        names = [module, spec.key, *(str(one.key("hf")) for one in spec.instances if one.row.hf is not None)]
        return tuple(dict.fromkeys(name.removesuffix(_WEIGHT) for name in names))

    def _rows(self, spec: StoredTensorSpec) -> Iterator[tuple[Instance, int, int]]:
        """The rows of a stored tensor that each instance in it has: (instance, first, number)."""
        start = 0
        for instance in spec.instances:
            size = instance.row.sizes(self._dims)[0]
            yield instance, start, size
            start += size

    def _part(self, tensor: LogicalTensor, instance: Instance, start: int, size: int) -> LogicalTensor:
        """Rows of a B or a magnitude in the logical layout of an instance."""
        part = tensor.tensor.narrow(0, start, size)
        column, turned = instance.row.column(self._layout), instance.row.rotation(self._dims)
        if turned is not None and column is not None:
            part = column.rows_to_logical(part, *turned)
        return replace(tensor, tensor=part)

    def _tensor(self, key: str) -> LogicalTensor:
        """A tensor of the adapter's file, whose lazy tensor refers to the stored tensors of both."""
        tensor, dtype = self._adapter.file.joined(key)
        return LogicalTensor(dtype, self._shifted(tensor), key, self._adapter.file.place.name)

    def _shifted(self, tensor: LazyTensor) -> LazyTensor:
        return tensor.with_sources(self._shift)

    def _no_base(self, name: str, spec: StoredTensorSpec, base: LogicalTensor | None) -> None:
        found = "does not have it" if base is None else f"has it as {base.dtype}"
        self._problems.keys.append(f"{name}: the base {found}{self._quantized}")

    @property
    def _quantized(self) -> str:
        if self._source.quantization is None and self._source.unknown_scheme is None:
            return ""
        return "; the base is quantized: `dequantize='bfloat16'` merges into its values"
