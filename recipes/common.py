"""What the recipes share: a tiny checkpoint to start from, text to train on, evaluation, and a table of losses."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from ckpt_convert import Checkpointer

RUNS = Path("runs")


def tiny_llama(directory: Path = RUNS / "tiny-llama") -> Path:
    """A checkpoint with random weights, as transformers saves one (bfloat16, 4 shards); made unless it is there."""
    if not directory.exists():
        from demo import make_checkpoint

        unfinished = directory.with_name(f".{directory.name}.partial")
        unfinished.mkdir(parents=True, exist_ok=True)
        print(make_checkpoint(unfinished, tiny=True))
        unfinished.rename(directory)
    return directory


def text_examples(tokenizer_json: Path, length: int, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """The standard library's own source files as examples to train on, and every eighth one held out.

    An example has ``length`` + 1 tokens, one more than the model reads, so that it holds its targets as well. There
    are at most ``most`` in all.
    """
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[e-z]*.py")):
        if len(tokens) < most * (length + 1):
            tokens += tokenizer.encode(path.read_text("utf-8", "replace")).ids
    most = min(most, len(tokens) // (length + 1))
    blocks = list(torch.tensor(tokens[: most * (length + 1)]).view(most, length + 1))
    return [block for at, block in enumerate(blocks) if at % 8], blocks[::8]


def batches(checkpointer: Checkpointer, loader: Iterable[Tensor], steps: int) -> Iterator[Tensor]:
    """The batches that are left to train on, epoch by epoch, until all steps are done or a signal came."""
    if checkpointer.progress.step >= steps:
        return
    for _ in checkpointer.epochs():
        for batch in loader:
            yield batch
            if checkpointer.progress.step >= steps or checkpointer.should_stop:
                return


def loss_of(model: nn.Module, blocks: Tensor) -> Tensor:
    """The mean cross-entropy of each next token, in nats. ``blocks`` is [batch, length + 1]."""
    logits = model(blocks[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), blocks[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, blocks: list[Tensor], batch_size: int = 8) -> float:
    """The mean loss over all blocks.

    It draws no random numbers (a DataLoader would, even unshuffled), so that a run which is killed between a save and
    the evaluation after it still goes on exactly like one which is not.
    """
    model.eval()
    losses = [loss_of(model, torch.stack(blocks[at : at + batch_size])) for at in range(0, len(blocks), batch_size)]
    model.train()
    return float(torch.stack(losses).mean())


class LossTable:
    """Prints a row now and then: the mean training loss since the last row, and what else is given."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.losses: list[float] = []
        print(f"{'step':>6} {'loss':>8} {'lr':>9} {'val_loss':>9}", flush=True)

    def add(self, step: int, loss: float, lr: float, val_loss: float | None = None) -> None:
        self.losses.append(loss)
        if step % self.every == 0 or val_loss is not None:
            mean = math.fsum(self.losses) / len(self.losses)
            print(f"{step:6} {mean:8.4f} {lr:9.2e}" + (f" {val_loss:9.4f}" if val_loss is not None else ""), flush=True)
            self.losses.clear()


def checksum(*parts: Any) -> str:
    """A sha256 of tensors, numbers and texts in nested dicts and lists, such as state dicts; equal only bit for bit."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add([str(value.dtype), *value.shape])
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, Mapping):
            add([[key, value[key]] for key in sorted(value, key=str)])
        elif isinstance(value, Iterable) and not isinstance(value, str):
            digest.update(b"[")
            for item in value:
                add(item)
            digest.update(b"]")
        else:
            digest.update(f"{value!r},".encode())

    add(parts)
    return digest.hexdigest()


def load_with_transformers(directory: Path) -> nn.Module:
    """The saved step as any user of transformers would load it; fails if a tensor is missing or superfluous."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if wrong := {what: keys for what, keys in report.items() if keys}:
        raise SystemExit(f"{directory}: transformers says {wrong}")
    return model.eval()


@torch.no_grad()
def compare_logits(ours: nn.Module, theirs: nn.Module, tokens: Tensor) -> None:
    """Print how far two models' logits are apart; exit if they are more than rounding apart."""
    ours.eval()
    one, other = ours(tokens), theirs(tokens).logits
    apart = float((one - other).abs().max())
    print(f"logits: at most {apart:.1e} apart (standard deviation {float(other.std()):.2f})")
    if not apart < 1e-4:
        raise SystemExit("the logits differ")
