"""Training runs that are killed, interrupted or failed at any call, and have to end with the same bits as undisturbed.

A run is fourteen steps of a tiny Llama: AdamW, a schedule, dropout, shuffled data, evaluations, the best kept, with one
of several ways of saving. What it ends with: weights, optimizer, loss of every step, random numbers, progress, and the
directories that it keeps, file for file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.faults import forked
from benchmarks.faults.conversions import CUT, KILL, Case, read_calls
from benchmarks.faults.forked import Ended, Fault
from recipes.native_llama import add_lora
from tests.checkpointer.training import Trained, make_model

EPOCHS = 2
STEPS = 14  # of seven batches an epoch
EVERY = 3
"""Steps from one evaluation to the next."""
SAVING = {"save_every": [EVERY, "1 epoch"], "keep_last": 2, "keep_last_training_state": 1, "best": "val_loss:min"}
ADAPTER = ("q_proj", "v_proj")
VARIANTS: dict[str, dict[str, Any]] = {
    "weights and state": {},
    "merged adapter": {"adapter": True, "merged": True},
    "final in bfloat16": {"final": {"contents": "weights", "export_dtype": "bfloat16"}},
    "adapter": {"adapter": True},
}


@dataclass(frozen=True)
class Run:
    """A training run into ``root/out``; what came of it is in ``root``."""

    variant: str
    asynchronous: bool
    source: Path
    steps: int = STEPS

    def job(self, root: Path) -> Callable[[], int]:
        def train() -> int:
            import ckpt_convert

            try:
                self._train(root)
            except ckpt_convert.CkptConvertError as error:
                print(f"error: {error}", file=sys.stderr)
                return 3
            except KeyboardInterrupt:
                return 130
            return 0

        return train

    def _train(self, root: Path) -> None:
        from ckpt_convert import AdapterConfig, Checkpointer

        options = {**SAVING, **VARIANTS[self.variant], "asynchronous": self.asynchronous}
        adapter = options.pop("adapter", None)
        model = make_model(self.source)
        with Checkpointer(
            self.source,
            root / "out",
            adapter=AdapterConfig(2, 4.0, target_modules=ADAPTER) if adapter else None,
            **options,
        ) as checkpointer:
            checkpointer.load_model(model)
            if adapter:
                torch.manual_seed(17)
                add_lora(model, 2, 4.0, ADAPTER, dora=False)
            trained = Trained(self.source, model=model)
            if adapter:
                chosen = [one for one in model.parameters() if one.requires_grad]
                trained.optimizer = torch.optim.AdamW(chosen, 3e-3)
                trained.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trained.optimizer, lambda s: 1 / (1 + s / 10))
            begun = checkpointer.resume(**trained.parts)
            ended = begun is not None and begun.step >= self.steps
            if begun and begun.step % EVERY == 0 and "val_loss" not in checkpointer.saved[-1].metrics:
                checkpointer.report(val_loss=evaluated(model))  # a kill came before the step's evaluation was written
            with (root / "losses").open("a", buffering=1) as log:
                self._loop(checkpointer, trained, log)
        progress = {name: one for name, one in checkpointer.progress.as_dict().items() if name != "seconds"}
        drawn = [random.random(), float(torch.rand(()))]
        result = {
            "weights": hashed(model.state_dict()),
            "optimizer": hashed(trained.optimizer.state_dict()),
            "schedule": trained.lr_scheduler.state_dict()["last_epoch"],
            "progress": progress,
            "drawn": drawn,
        }
        if ended and "final" in options:  # what a finished run is resumed from is its export, as it was asked for
            result = {"progress": progress}
        (root / "result.json").write_text(json.dumps(result, indent=1))

    def _loop(self, checkpointer: Any, trained: Trained, log: TextIO) -> None:
        for _ in checkpointer.epochs(EPOCHS):
            for tokens in trained.dataloader:
                if checkpointer.progress.step == self.steps:
                    return
                loss = trained.update(tokens) + random.random() / 64
                step = checkpointer.progress.step + 1
                log.write(f"{step} {loss.hex()}\n")
                checkpointer.step(tokens=tokens[:, 1:].numel(), samples=len(tokens))
                if step % EVERY == 0:
                    checkpointer.report(val_loss=evaluated(trained.model))

    def start(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)


def evaluated(model: torch.nn.Module) -> float:
    """A metric that the weights alone determine, and that goes up and down."""
    return float(sum(parameter.double().sum() for parameter in model.parameters()).sin())


def hashed(value: Any) -> Any:
    """The same structure with each tensor's digest in its place."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): hashed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hashed(one) for one in value]
    return value


def kept(root: Path) -> dict[str, str]:
    """Every file that the run keeps by its digest; of manifests the metrics and what of them tells no time."""
    found = {}
    for path in sorted((root / "out").rglob("*")):
        name = path.relative_to(root / "out").as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.name == "manifest.json":
            content = json.loads(path.read_text())
            training = content.get("training", {"progress": {}})
            said = {key: training.get(key) for key in ("metrics", "contents")}
            progress = {key: one for key, one in training["progress"].items() if key != "seconds"}
            found[name] = json.dumps([said, progress, content.get("files")], sort_keys=True)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def ended_alike(root: Path, expected: Path) -> str | None:
    """Whether a run ended with the bits of the undisturbed one; what differs."""
    if not (root / "result.json").exists():
        return "no result"
    ours, theirs = (json.loads((one / "result.json").read_text()) for one in (root, expected))
    for name, one in ours.items():
        if one != theirs[name]:
            return f"{name} differs: {str(one)[:200]} instead of {str(theirs[name])[:200]}"
    curve = dict(line.split() for line in (expected / "losses").read_text().splitlines())
    for line in (root / "losses").read_text().splitlines():
        step, _, loss = line.partition(" ")
        if loss and curve[step] != loss:
            return f"the loss of step {step} was another"
    mine, whole = kept(root), kept(expected)
    names = [name for name in mine.keys() | whole.keys() if mine.get(name) != whole.get(name)]
    first = sorted(names)[0] if names else ""
    return f"keeps other files: {sorted(names)[:6]}; {mine.get(first)} instead of {whole.get(first)}" if names else None


def expected(run: Run, place: Path) -> Path:
    """Where the undisturbed run lies; made when it is first asked for."""
    root = place / "undisturbed" / f"{run.variant} {run.asynchronous} {run.steps}"
    if not root.exists():
        run.start(root)
        ended = forked.run(run.job(root), Fault(root / "out", 0, 0, root / "calls"))
        if ended.status:
            raise SystemExit(f"{run}: {ended.status} {ended.err}")
    return root


def calls_of(run: Run, place: Path) -> list[str]:
    return read_calls(expected(run, place) / "calls")


def runs(source: Path, asynchronous: bool) -> list[Run]:
    return [Run(variant, asynchronous, source) for variant in VARIANTS]


def finish(run: Run, root: Path, place: Path) -> str | None:
    """Start the run once more, undisturbed: it goes on, and ends like the undisturbed one."""
    ended = forked.run(run.job(root))
    if ended.status:
        return f"the next start ended with {ended.status}: {ended.err[-700:]}"
    return ended_alike(root, expected(run, place))


def kills(made: Sequence[Run], place: Path, first: int, count: int) -> Iterator[str | None]:
    """``count`` kills −9 at calls by chance, each run until it ends; several in one run."""
    number = first
    while number < first + count:
        chance = random.Random(number)
        run = made[number % len(made)]
        root = place / "killed"
        run.start(root)
        longest = len(calls_of(run, place))
        wrong, killed, started = None, 0, number
        while killed < 3 and number < first + count:
            ended = forked.run(run.job(root), Fault(root / "out", chance.randint(1, longest), KILL))
            if ended.status != -signal.SIGKILL:
                wrong = f"ended with {ended.status}: {ended.err[-700:]}" if ended.status else None
                break
            killed += 1
            number += 1
        number += killed == 0
        wrong = wrong or finish(run, root, place)
        for at in range(max(1, killed)):
            said = f"kill {started} of {run.variant}, asynchronous={run.asynchronous}: {wrong}"
            yield said if wrong and not at else None


def faults(run: Run, chosen: Sequence[Case], place: Path, first: int, count: int) -> Iterator[str | None]:
    """Each call of a run fails once in each way: the run ends as undisturbed, or with one error and then goes on."""
    root = place / "failing"
    for at, call, kind in chosen[first : first + count]:
        run.start(root)
        fault = Fault(root / "out", at, kind)
        ended = forked.run(run.job(root), fault)
        wrong = _faulty(ended, kind) or finish(run, root, place)
        yield f"{run.variant} {call}, {fault}: {wrong}" if wrong else None


def _faulty(ended: Ended, kind: int) -> str | None:
    if kind > CUT:
        return None if ended.status in (0, 130, forked.SIGNALS - kind) else f"{ended.status}: {ended.err[-700:]}"
    return forked.complaint(ended, (0, 3))
