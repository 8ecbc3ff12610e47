"""The hashes that the Hub states of its files: in its cache they are the names of the files' contents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ckpt_convert.analysis.check.lenient_open import LenientCheckpoint
from ckpt_convert.analysis.check.spans import Span
from ckpt_convert.checkpoint.findings import Finding
from ckpt_convert.errors import CkptConvertError
from ckpt_convert.storage import checksums
from ckpt_convert.storage.base import OpenFile
from ckpt_convert.storage.hub import content_hash


def check_hub_hashes(opened: LenientCheckpoint) -> list[Span]:
    """Every file beside the weights, and the weights, as spans to read; none for what does not come from the Hub."""
    checkpoint = opened.checkpoint
    place = checkpoint.place
    # Files that are open already are read once for all checks.
    known = {file.name: file.reader for file in checkpoint.files if isinstance(file.reader, OpenFile)}
    spans = []
    for file in sorted(place.files() if place.is_folder() else [place]):
        expected = content_hash(file)
        if expected is None:
            continue
        try:
            reader = known.get(file.name) or file.open(file.name)
        except (CkptConvertError, OSError):
            continue  # reported by what needs the file
        # Files in git are named by the hash of a header and the content, files in LFS by that of the content.
        digest = checksums.new("sha256" if len(expected) == 64 else "sha1")
        if len(expected) == 40:
            digest.update(b"blob %d\0" % reader.size)
        spans.append(Span(reader, file.name, 0, reader.size, digest.update, _compare(file.name, digest, expected)))
    return spans


def _compare(name: str, digest: checksums.Digest, expected: str) -> Callable[[], Iterable[Finding]]:
    def finish() -> Iterator[Finding]:
        found = digest.hexdigest()
        if found != expected:
            text = (
                f"{name} is not what the Hub has: its hash is {found}, and should be {expected}; its download was "
                "damaged, or it was edited: download it again with hf_hub_download(…, force_download=True), since else "
                "the cache is believed"
            )
            yield Finding("error", "checksum", text, name, None, expected, found)

    return finish
