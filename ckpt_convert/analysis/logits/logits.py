"""Running checkpoints through transformers, to see that they load and compute, and that two compute the same.

This is a sanity check; ``diff`` is the proof. Equal logits on a few random prompts do not show that all weights are
equal, and logits of equal weights may differ by the order of additions. They show what no comparison of bytes can: that
the config fits the weights, and that the model works.
"""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ckpt_convert.analysis.logits.model import Architecture, load_model, read_architecture
from ckpt_convert.checkpoint.identify import Identified
from ckpt_convert.errors import ShapeMismatchError, UsageError
from ckpt_convert.tensors.progress import ProgressCallback, ProgressCounter

if TYPE_CHECKING:
    import torch

_AT_ONCE = 64
"""Positions that are compared in one step, in double precision."""


@dataclass(frozen=True, slots=True)
class LogitsRun:
    """What one checkpoint computed, after it loaded with no missing and no unexpected keys.

    ``finite`` is whether no logit is NaN or infinite (else ``entropy`` and ``largest`` are None). ``entropy`` is the
    mean entropy of the next token in nats (an untrained model comes near ``uniform_entropy``, the logarithm of the
    vocabulary's size), ``largest`` the largest absolute logit.
    """

    path: str
    format: str
    model_type: str
    parameters: int
    vocab_size: int
    uniform_entropy: float
    finite: bool
    entropy: float | None
    largest: float | None
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LogitPosition:
    """One logit: the prompt, the position in it (from 0), and the next token."""

    prompt: int
    position: int
    token: int


@dataclass(frozen=True, slots=True)
class LogitsDifference:
    """How far the logits of b are from those of a.

    ``max_abs`` (at ``at``) and ``mean_abs`` are over all logits; ``kl_mean`` and ``kl_max`` are KL(a‖b) over the
    positions, in nats; ``agreement`` is the share of positions with the same likeliest token.
    """

    max_abs: float
    mean_abs: float
    kl_mean: float
    kl_max: float
    agreement: float
    at: LogitPosition


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """The result of ``compare_logits``; ``difference`` is None without b, and if logits of either are not finite."""

    prompts: int
    length: int
    seed: int
    a: LogitsRun
    b: LogitsRun | None = None
    difference: LogitsDifference | None = None

    @property
    def finite(self) -> bool:
        """Whether every logit is a number."""
        return self.a.finite and (self.b is None or self.b.finite)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


def compare_logits(
    a: Identified,
    b: Identified | None = None,
    *,
    prompts: int = 3,
    length: int = 16,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> LogitsReport:
    """Run one checkpoint, or two, on the same ``prompts`` of ``length`` random tokens, and compare what comes out.

    Everything is computed on the CPU in float32, one model in memory at a time. Any format will do: what is not laid
    out as transformers expects is translated on the way, without a file in between. No code of a checkpoint is run and
    nothing is downloaded. This is a sanity check; ``diff`` is the proof.

    Raises MissingPackageError without transformers, UnsupportedFamilyError for a model that it does not know or
    that predicts no next token, KeyMismatchError or ShapeMismatchError for weights that do not fit their config, and
    ShapeMismatchError for two vocabularies of different sizes.
    """
    for name, value in (("prompts", prompts), ("length", length)):
        if value < 1:
            raise UsageError(f"{name} {value}: expected 1 or more")
    architectures = [read_architecture(checkpoint) for checkpoint in (a, b) if checkpoint is not None]
    for checkpoint, found in zip((a, b), architectures, strict=False):
        if checkpoint is not None and found.positions is not None and found.positions < length:
            raise UsageError(f"{checkpoint.place}: takes at most {found.positions} tokens, {length} were asked for")
    sizes = [found.vocab_size for found in architectures]
    if b is not None and sizes[0] != sizes[1]:
        raise ShapeMismatchError(
            f"{b.place}: has a vocabulary of {sizes[1]} tokens, {a.place} one of {sizes[0]}; "
            "their logits cannot be compared"
        )
    tokens = _tokens(sizes[0], prompts, length, seed)
    first, mine = _run(a, architectures[0], tokens, progress)
    if b is None:
        return LogitsReport(prompts, length, seed, first)
    gc.collect()  # the first model is gone before the second comes
    second, theirs = _run(b, architectures[1], tokens, progress)
    if mine.shape != theirs.shape:
        raise ShapeMismatchError(
            f"{b.place}: gives {theirs.shape[-1]} logits, {a.place} {mine.shape[-1]}; they cannot be compared"
        )
    difference = logits_difference(mine, theirs) if first.finite and second.finite else None
    return LogitsReport(prompts, length, seed, first, second, difference)


def logits_difference(a: torch.Tensor, b: torch.Tensor) -> LogitsDifference:
    """The difference between finite logits of one shape, [prompts, length, tokens]."""
    import torch

    _, length, vocab = a.shape
    largest, where, total, kl, agreeing = -1.0, 0, 0.0, [], 0
    rows = zip(torch.split(a.reshape(-1, vocab), _AT_ONCE), torch.split(b.reshape(-1, vocab), _AT_ONCE), strict=True)
    for at, (mine, theirs) in enumerate(rows):
        mine, theirs = mine.double(), theirs.double()
        delta = (mine - theirs).abs()
        total += float(delta.sum())
        if (peak := float(delta.max())) > largest:
            largest, where = peak, at * _AT_ONCE * vocab + int(delta.argmax())
        p, q = torch.log_softmax(mine, -1), torch.log_softmax(theirs, -1)
        # A token with p = 0 contributes nothing, whatever q is; rounding may give a sum below 0.
        terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
        kl.append(terms.sum(-1).clamp(min=0))
        agreeing += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    every = torch.cat(kl)
    position, token = divmod(where, vocab)
    return LogitsDifference(
        max_abs=largest,
        mean_abs=total / a.numel(),
        kl_mean=float(every.mean()),
        kl_max=float(every.max()),
        agreement=agreeing / len(every),
        at=LogitPosition(position // length, position % length, token),
    )


def _tokens(vocab: int, prompts: int, length: int, seed: int) -> torch.Tensor:
    import torch

    return torch.randint(vocab, (prompts, length), generator=torch.Generator().manual_seed(seed))


def _run(
    checkpoint: Identified, found: Architecture, tokens: torch.Tensor, progress: ProgressCallback | None
) -> tuple[LogitsRun, torch.Tensor]:
    """The logits of one checkpoint, [prompts, length, tokens], and their summary."""
    import torch

    model, notices = load_model(checkpoint, found, progress)
    counter = ProgressCounter("running", len(tokens), progress)
    out = []
    for prompt in tokens[:, None]:
        with torch.inference_mode():
            answer = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=False)
        out.append(answer.logits.float())
        counter.add(1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    del model
    made = torch.cat(out)
    finite = bool(made.isfinite().all())
    if finite and bool((made == made[..., :1]).all()):
        notices += ("all logits of a position are the same, so they say nothing of the weights",)
    outcome = LogitsRun(
        path=str(checkpoint.place),
        format=str(checkpoint.format),
        model_type=found.model_type,
        parameters=parameters,
        vocab_size=found.vocab_size,
        uniform_entropy=math.log(found.vocab_size),
        finite=finite,
        entropy=_entropy(made) if finite else None,
        largest=float(made.abs().max()) if finite else None,
        notices=notices,
    )
    return outcome, made


def _entropy(made: torch.Tensor) -> float:
    import torch

    total = 0.0
    rows = made.reshape(-1, made.shape[-1])
    for part in torch.split(rows, _AT_ONCE):
        p = torch.log_softmax(part.double(), -1)
        total -= float(torch.where(p.exp() > 0, p.exp() * p, 0.0).sum())
    return total / len(rows)
