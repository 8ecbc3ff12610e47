"""The states of the global random number generators: Python, NumPy, torch, and each accelerator device."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ckpt_convert.checkpointer.distributed.speaking import OWN
from ckpt_convert.errors import CorruptFileError
from ckpt_convert.storage.checksums import digest

log = logging.getLogger("ckpt_convert")

State = dict[str, Any]


def get_rng_state(accelerators: bool = True) -> State:
    """The state of every global generator, as a tree for ``serialize``; draws nothing and initializes no device."""
    state: State = {
        "python": get_python_state(random),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if accelerators and (kind := _accelerator()) is not None:
        module: Any = torch.get_device_module(kind)
        every = getattr(module, "get_rng_state_all", None)  # MPS has but one device
        state["accelerators"] = {kind: every() if every is not None else [module.get_rng_state()]}
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set every generator that ``state`` has to what it was.

    A device that is not there any more is named in a warning; the others are set. Raises CorruptFileError for what is
    no state of a generator.
    """
    try:
        if "python" in state:
            set_python_state(random, state["python"])
        if "numpy" in state:
            np.random.set_state(state["numpy"])
        if "torch" in state:
            torch.set_rng_state(state["torch"])
        for kind, states in state.get("accelerators", {}).items():
            _restore_devices(kind, states)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CorruptFileError(
            f"rng: is no state of the random number generators ({error}); resume from another checkpoint, "
            'or without it (exclude=["rng*"])'
        ) from error


def derived(state: Mapping[str, Any], rank: int, count: int) -> State:
    """What one of ``count`` ranks goes on with after another number of them: the same each time, another for each rank.

    ``state`` is that of the first rank of before.
    """
    drawn = digest(b"".join([state["torch"].numpy().tobytes(), f"{rank} of {count}".encode()]))
    seed = int(drawn, 16)
    return {
        "python": get_python_state(random.Random(seed)),
        "numpy": np.random.RandomState(seed % 2**32).get_state(legacy=False),
        "torch": torch.Generator().manual_seed(seed).get_state(),
    }


def get_python_state(generator: Any) -> State:
    """The state of a ``random.Random``, or of the module itself."""
    version, words, gauss = generator.getstate()
    return {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}


def set_python_state(generator: Any, state: Mapping[str, Any]) -> None:
    """Set it; raises KeyError, TypeError, ValueError or AttributeError for what is no such state."""
    generator.setstate((state["version"], tuple(state["words"].tolist()), state["gauss"]))


def _restore_devices(kind: str, states: list[torch.Tensor]) -> None:
    here = _accelerator(started=False)
    count = min(torch.accelerator.device_count(), len(states)) if here == kind else 0
    module: Any = torch.get_device_module(kind) if count else None
    for number, state in enumerate(states[:count]):
        if hasattr(module, "get_rng_state_all"):
            module.set_rng_state(state, number)
        else:
            module.set_rng_state(state)
    if count < len(states):
        gone = ", ".join(f"{kind}:{number}" for number in range(count, len(states)))
        log.warning(
            "the random state of %s was saved, but this machine has %s; what is drawn there will differ",
            gone,
            f"{count} such device{'s' if count != 1 else ''}" if count else "no such device",
            extra=OWN,
        )


def _accelerator(started: bool = True) -> str | None:
    """The kind of accelerator; with ``started`` only where it is in use, for asking would set its devices up."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    if found is None:
        return None
    in_use = getattr(torch.get_device_module(found.type), "is_initialized", lambda: True)
    return found.type if not started or in_use() else None
