"""What each of two processes saves with torch.distributed.checkpoint: a module without what only tests import."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def save_cut_tensors(here: Path) -> None:
    """Save with torch.distributed.checkpoint, with metadata of all ranks and with metadata of each."""
    mesh = init_device_mesh("cpu", (2,))
    whole = {
        "rows": (torch.arange(35.0).reshape(5, 7), Shard(0)),
        "columns": (torch.arange(20).reshape(4, 5).bfloat16(), Shard(1)),
        "few": (torch.arange(3.0).reshape(1, 3), Shard(0)),
        "copied": (torch.arange(6.0), Replicate()),
    }
    tensors = {key: distribute_tensor(tensor, mesh, [placed]) for key, (tensor, placed) in whole.items()}
    state = {"model": tensors, "step": 7}
    dcp.save(state, checkpoint_id=here / "together")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(here / "apart"), use_collectives=False)
