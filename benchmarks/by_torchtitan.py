"""torchtitan's own way from a Hugging Face Llama to its checkpoint, or back, for comparison.

As its conversion scripts do it: make the model, give its state dict the other side's keys, let
torch.distributed.checkpoint fill that, give it the keys of this side, and save. Needs torchtitan 0.3.0, and for the
model of docs/benchmarks.md only:

PYTHON benchmarks/by_torchtitan.py from-hf SRC DST
PYTHON benchmarks/by_torchtitan.py to-hf SRC DST
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torchtitan.models.llama3 import Llama3StateDictAdapter, llama3_configs


def main() -> None:
    direction, source, target = sys.argv[1:]
    config = dataclasses.replace(llama3_configs["1B"]("flex"), enable_weight_tying=False)
    torch.set_default_dtype(torch.bfloat16)  # its script fills a model in float32, twice the bytes of this one
    state: dict[str, Any] = config.build().state_dict()
    with torch.inference_mode():
        adapter = Llama3StateDictAdapter(config, None)
        if direction == "from-hf":
            theirs = adapter.to_hf(state)
            dcp.load(theirs, storage_reader=HuggingFaceStorageReader(source), no_dist=True)
            dcp.save(adapter.from_hf(theirs), checkpoint_id=target, no_dist=True)
        else:
            dcp.load(state, checkpoint_id=source, no_dist=True)
            theirs = adapter.to_hf(state)
            mapping = dict.fromkeys(theirs, 1)
            writer = HuggingFaceStorageWriter(path=target, fqn_to_index_mapping=mapping, save_distributed=False)
            dcp.save(theirs, storage_writer=writer, no_dist=True)
    for path in Path(target).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
