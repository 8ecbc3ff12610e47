"""Fine-tune all weights of a Llama on several processes with FSDP2; every saved step is a checkpoint like the source.

    torchrun --standalone --nproc-per-node 2 recipes/distributed_finetune.py    # makes a tiny Llama first
    torchrun --standalone --nproc-per-node 3 recipes/distributed_finetune.py --steps 60    # goes on, with three

Each process holds, reads and writes its slices; nothing is gathered. Run it again after an interruption, with as many
processes as there are then: it goes on where the newest saved step ends, behind the samples that were seen.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import common
import torch
import torch.distributed as dist
from native_llama import NativeLlama
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler

from ckpt_convert import Checkpointer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a Hugging Face checkpoint; without it a tiny one is made")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", default="10 steps")
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=12, help="of all processes together")
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def sharded(source: Path, device: torch.device) -> NativeLlama:
    """A model of which each process has room for its slices, and nothing else; their values are still to be loaded."""
    with torch.device("meta"):
        model = NativeLlama.from_config(source / "config.json")
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model.to_empty(device=device)


def main() -> None:
    args = parse_arguments()
    dist.init_process_group()  # gloo on CPUs, NCCL on GPUs, with torchrun's ranks
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
        device = torch.device(torch.accelerator.current_accelerator() or "cpu")
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.ERROR)
    logging.getLogger("torch").setLevel(logging.WARNING)
    if args.source is None and rank == 0:
        common.tiny_llama()
    dist.barrier()
    source = args.source or common.tiny_llama()
    examples, _ = common.text_examples(source / "tokenizer.json", args.length, args.examples)

    model = sharded(source, device)
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(examples, drop_last=True)  # type: ignore[arg-type]
    loader = DataLoader(examples, args.batch_size // world, sampler=sampler, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    with Checkpointer(
        source, args.output_dir, save_every=args.save_every, keep_last=2, asynchronous=True
    ) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer, lr_scheduler=scheduler, dataloader=loader)
        for blocks in common.batches(checkpointer, loader, args.steps):
            loss = common.loss_of(model, blocks.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.step(tokens=world * blocks[:, 1:].numel(), samples=world * len(blocks))
            if checkpointer.progress.step % args.log_every == 0:
                mean = loss.detach()
                dist.all_reduce(mean)
                if rank == 0:
                    print(f"step {checkpointer.progress.step:4}  loss {mean.item() / world:.4f}", flush=True)

    if rank == 0:
        for saved in checkpointer.saved:
            print(saved.path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
