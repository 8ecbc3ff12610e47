"""Checking a checkpoint: all problems in one report; one broken file does not prevent checking the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckpt_convert import log
from ckpt_convert.analysis.check import (
    auxiliary_files,
    checksums,
    directory,
    generic,
    hub_hashes,
    root_causes,
    table,
    training,
)
from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint, open_leniently, without_directory
from ckpt_convert.analysis.check.report import Skipped, Verification, by_severity
from ckpt_convert.analysis.check.spans import ExpectedEqual, Share
from ckpt_convert.checkpoint import diagnosis
from ckpt_convert.checkpoint.findings import Finding, Severity, failed_check
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.checkpoint.mapping import Equality, LogicalTensors
from ckpt_convert.checkpoint.model import Model
from ckpt_convert.checkpoint.opening import describe_part
from ckpt_convert.checkpoint.record import MANIFEST, MERGED
from ckpt_convert.convert import ties
from ckpt_convert.errors import CkptConvertError, UnsupportedFamilyError
from ckpt_convert.formats.base import load_json
from ckpt_convert.storage.place import Location, checked_place
from ckpt_convert.wording import option_text

if TYPE_CHECKING:
    from ckpt_convert.tensors.progress import ProgressCallback


@dataclass
class _Work:
    """The progress of a check; ``values`` is whether tensors are read, ``share`` which; ``expected`` pairs to compare.

    ``described`` is the checkpoint whose tensors ``expected`` refers to, if it is not the view: a quantized one as
    dequantized values.
    """

    opened: LenientCheckpoint
    values: bool
    share: Share
    findings: list[Finding] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    expected: list[ExpectedEqual] = field(default_factory=list)
    described: Identified | None = None

    def done(self, check: str, findings: Iterable[Finding] = ()) -> None:
        self.findings.extend(findings)
        if check not in self.checks:
            self.checks.append(check)

    def skip(self, why: str, *checks: str) -> None:
        self.skipped.extend(Skipped(check, why) for check in checks)


def check_checkpoint(
    path: Location,
    *,
    format: str | None = None,
    family: str | None = None,
    config: Location | None = None,
    values: bool = True,
    merged: bool = True,
    workers: int = 2,
    progress: ProgressCallback | None = None,
    share: Share | None = None,
) -> Verification:
    """Check a checkpoint: a directory, or one weight file.

    ``values`` reads every byte; without it only headers and small files are read. ``merged`` checks the full weights
    beside an adapter as well. Of several processes, each reads its ``share``. Problems of the checkpoint are in the
    report. Raises CheckpointNotFoundError, UsageError or ConfigError if nothing can be checked.
    """
    opened = open_leniently(checked_place(path), format=format, family=family, config=config)
    share = share or Share()
    work = _Work(opened, values, share)
    try:
        report = _report(work, workers, progress)
    finally:
        opened.checkpoint.close()
    inner = opened.checkpoint.place / MERGED
    if merged and "training" in report.checks and (inner / MANIFEST).is_regular_file():
        beside = check_checkpoint(inner, values=values, workers=workers, progress=progress, share=share)
        report = _with_merged(report, beside)
    return report


def _with_merged(report: Verification, inner: Verification) -> Verification:
    """The report with the findings of the folder of the full weights."""
    findings = (
        replace(one, text=f"{MERGED}/: {one.text}", file=f"{MERGED}/{one.file or ''}") for one in inner.findings
    )
    return replace(
        report,
        checks=tuple(dict.fromkeys((*report.checks, *inner.checks))),
        findings=by_severity([*report.findings, *findings]),
        bytes_read=report.bytes_read + inner.bytes_read,
    )


def _report(work: _Work, workers: int, progress: ProgressCallback | None) -> Verification:
    opened, checkpoint = work.opened, work.opened.checkpoint
    work.done("files", opened.findings)
    work.done("container")
    work.done("duplicate", root_causes.merge_exchanged_files(directory.check_index(opened), "index"))
    if checkpoint.directory.index is not None:
        work.done("index")
        if opened.has_all_headers and not opened.damaged_files:
            work.done("index", directory.check_index_totals(opened))
    if checkpoint.place.is_folder():
        work.done("leftover", directory.check_leftovers(opened))
        work.done("shards", directory.check_shard_numbers(opened))
        work.done("shards", directory.check_file_names(opened))
        work.done("side-files", auxiliary_files.check_auxiliary_files(checkpoint))
        if (found := training.check_saved_step(checkpoint.place, work.values, work.share)) is not None:
            work.done("training", found)
    _against_config(work)
    nbytes_read = _read(work, workers, progress)
    return Verification(
        path=str(checkpoint.place),
        format=checkpoint.format,
        family=opened.view.family,
        files=len(checkpoint.files),
        tensors=len(opened.view.tensors),
        nbytes=sum(info.nbytes for info in opened.view.tensors.values()),
        checks=tuple(work.checks),
        skipped=tuple(work.skipped),
        findings=by_severity(work.findings),
        bytes_read=nbytes_read,
        kind=diagnosis.describe_files(opened.view.keys, opened.view.tensors),
    )


def _against_config(work: _Work) -> None:
    """Keys, shapes and tied weights against the config: through the family's table, or by general conventions."""
    view = work.opened.view
    path = view.config_file
    content = None
    if path.is_regular_file():
        try:
            content = load_json(path)
        except CkptConvertError as error:
            work.done("config", [failed_check("config", error, without_directory(str(error), view.place), path.name)])
    else:
        content = _from_shapes(work)
    if not view.stored:
        work.skip("there are no tensors to look at", "config", "keys", "tied")
        return
    if (part := describe_part(view.place)) is not None:
        work.skip(f"the file is {part}, and no whole model; give the directory for these", "config", "keys", "tied")
        return
    mixed, why = root_causes.check_ranks(work.opened, content)
    if why:
        work.done("shards", mixed)
        work.skip(f"the ranks are not those of one checkpoint: {why}", "config", "keys", "tied", "replicas")
        return
    if (cause := diagnosis.unmerged_adapter(work.opened.view.opened)) is not None:
        work.done("keys", [Finding("error", "keys", cause)])
        work.skip("an adapter was not merged", "config", "tied")
        return
    if (cause := diagnosis.zero3_placeholders(work.opened.view.opened)) is not None:
        work.done("keys", [Finding("error", "keys", cause)])
        work.skip("the weights are placeholders", "config", "tied")
        return
    model = _model(work, content)
    if model is not None and content is not None:
        for caveat in model.family.caveats(str(view.format)):
            log.warning("%s", caveat)
        _through_table(work, model, content, path.name)
    else:
        _in_general(work, content)
    if checked := model.config if model is not None else content:
        work.done("tokenizer", auxiliary_files.check_tokenizer(view, checked))
        if view.format == "hf":
            work.done("config", auxiliary_files.check_config_dtype(view, content))


def _from_shapes(work: _Work) -> dict[str, Any] | None:
    """The config derived from the shapes, for a family whose checkpoints have none."""
    try:
        return work.opened.view.from_shapes
    except CkptConvertError as error:
        work.done("config", [failed_check("config", error, without_directory(str(error), work.opened.view.place))])
        return None


def _model(work: _Work, content: Mapping[str, Any] | None) -> Model | None:
    """Family and dimensions; an inconsistent config is a finding, an unknown family is not."""
    opened, view = work.opened, work.opened.view
    if opened.missing_ranks:
        gone = ", ".join(map(str, opened.missing_ranks))
        work.skip(f"rank {gone} has no file", "keys", "replicas", "tied")
        return None
    if content is None:
        why = (
            f"has no config that can be read, so nothing says what the sizes should be; give {_config(view)}"
            if view.format is not None
            else "is of no format that is known, so nothing says what the keys should be"
        )
        work.skip(f"the checkpoint {why}", "config", "keys", "tied")
        return None
    try:
        return view.model
    except UnsupportedFamilyError as error:
        work.skip(without_directory(str(error), view.place).partition("\n")[0], "keys")
    except CkptConvertError as error:
        if view.format is not None and not opened.unreadable_files:
            file = view.config_file.name
            work.done("config", [failed_check("config", error, without_directory(str(error), view.place), file)])
        work.skip(without_directory(str(error), view.place).partition("\n")[0], "keys")
    return None


def _through_table(work: _Work, model: Model, content: Mapping[str, Any], where: str) -> None:
    opened, view = work.opened, work.opened.view
    names = opened.checkpoint.names
    lost = [
        names.of(k)
        for k, file in (opened.checkpoint.directory.weight_map or {}).items()
        if file in opened.unreadable_files
    ]
    if opened.unreadable_files and not lost:
        work.skip("files cannot be opened, and nothing says what is in them", "keys", "tied", "replicas")
        return
    broken: Collection[str] = ()
    if (quantization := view.quantization) is not None:
        view = work.described = view.describe_dequantized(quantization, model)
        work.done("quantised", quantization.findings)
        names, broken = view.names, {view.names.of(key) for key in quantization.broken}
    shapes = {names.of(key): info.shape for key, info in view.tensors.items() if view.is_weight(key)}
    stored = table.StoredShapes(str(view.format), view.ranks, shapes, frozenset(lost))
    logicals, findings = table.check_table(model, stored, content, where)
    work.done("config", [finding for finding in findings if finding.key not in broken])
    work.done("keys")
    _ties(work, model, logicals)
    if len(view.ranks) > 1 and work.values:
        work.done("replicas")
        work.expected += [_replica(equality) for equality in logicals.replica_checks]


def _ties(work: _Work, model: Model, logicals: LogicalTensors) -> None:
    pair = ties.tied_pair(logicals) if model.tied is True else None
    if pair is None:
        work.done("tied")
        return
    output = next(i for i in logicals.tensors if i.row.tied_to and i not in logicals.omitted_ties)
    column = output.row.column(str(work.opened.view.format))
    key = logicals.tensors[output].key
    if pair.left.shape == pair.right.shape:
        _tie(work, pair, key, logicals.tensors[output].location, column is not None and column.omitted_if_tied)


def _tie(
    work: _Work, pair: Equality, key: str, file: str, should_be_absent: bool, severity: Severity = "error"
) -> None:
    if not work.values:
        work.skip("the values of the output and the embedding are not read", "tied")
        return
    work.done("tied")
    different = (
        f"{key} and the embedding differ, but the config ties them (tie_word_embeddings: true), so loaders "
        "use only one of them; set it to false if the output is a tensor of its own"
    )
    equal = f"{key} is stored although it is tied to the embedding and the same; loaders have no need of it"
    work.expected.append(
        ExpectedEqual(
            pair,
            Finding(severity, "tied", different, file, key),
            Finding("note", "tied", equal, file, key) if should_be_absent else None,
        )
    )


def _replica(equality: Equality) -> ExpectedEqual:
    text = equality.message
    return ExpectedEqual(equality, Finding("error", "replicas", text, None, equality.key or None))


def _in_general(work: _Work, content: Mapping[str, Any] | None) -> None:
    """The general checks, for a model without a table."""
    opened, view = work.opened, work.opened.view
    weight_map = opened.checkpoint.directory.weight_map or {}
    names = opened.checkpoint.names
    tensors = {
        names.of(key): generic.StoredShape(info.shape if info.settled else None, info.dtype)
        for key, info in view.tensors.items()
    }
    tensors |= {
        names.of(key): generic.StoredShape(None, "")
        for key, file in weight_map.items()
        if file in opened.unreadable_files
    }
    if view.place.is_folder() and (opened.has_all_headers or weight_map):
        hf = content if view.format == "hf" else None
        work.done("layers", generic.check_layers(tensors, hf))
    if content is None or view.format != "hf":
        return
    work.done("config", generic.check_shapes(tensors, content))
    findings, pair = generic.check_tied(tensors, content)
    if pair is None:
        work.done("tied", findings)
    else:
        embedding, output = (view.ranks[0][key] for key in pair)
        # Some classes ignore tie_word_embeddings (BigBirdPegasusForCausalLM).
        severity: Severity = "error" if generic.has_standard_keys(content) else "warning"
        _tie(
            work, Equality(embedding.tensor, output.tensor, output.dtype, ""), pair[1], output.location, True, severity
        )


def _read(work: _Work, workers: int, progress: ProgressCallback | None) -> int:
    """The checks that read tensors and the files of the record."""
    record = work.opened.checkpoint.record
    manifest, pieces = checksums.check_manifest(work.opened)
    listing, hashes = checksums.check_checklist(work.opened)
    if record is not None:
        work.done("record", [*checksums.check_auxiliary_files(record), *manifest])
    if listing or hashes:
        work.done("checklist", listing)
    if not work.values:
        kinds = {file.header.kind for file in work.opened.checkpoint.files}
        wanted = {"crc": "torch" in kinds, "checksum": record is not None, "replicas": len(work.opened.view.ranks) > 1}
        work.skip("values are not read", "values", *(name for name, applies in wanted.items() if applies))
        return 0
    from ckpt_convert.analysis.check import values

    crcs = list(values.crc_spans(work.opened))
    stated = hub_hashes.check_hub_hashes(work.opened)
    spans = [*values.finite_spans(work.opened), *crcs, *pieces, *hashes, *stated]
    compared = work.described or work.opened.view
    found, nbytes = values.read_spans(
        spans, work.expected, compared, workers=workers, progress=progress, share=work.share
    )
    work.done("values", root_causes.merge_zero_tensors(found, work.opened))
    if crcs:
        work.done("crc")
    if record is not None or stated:
        work.done("checksum")
    elif not hashes and "training" not in work.checks:
        why = f"no checksums came with it ({MANIFEST}, checklist.chk)"
        if (work.opened.checkpoint.root / MANIFEST).is_regular_file():
            why = f"{MANIFEST} cannot be relied on"
        work.skip(why, "checksum")
    return nbytes


def _config(view: Identified) -> str:
    above = diagnosis.parent_config(view.place)
    return "one with `config=`" if above is None else f"the one above with {option_text('config', above)}"
