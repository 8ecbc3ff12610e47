"""Fine-tune all weights of a Llama in plain PyTorch; every saved step is a checkpoint like the source.

    python recipes/full_finetune.py                          # makes a tiny Llama first; takes half a minute
    python recipes/full_finetune.py --source Llama-3.2-1B/   # a Hugging Face directory

Run it again after an interruption: it goes on where the newest saved step ends.
"""

from __future__ import annotations

import argparse
import copy
import logging
from pathlib import Path

import common
import torch
from native_llama import NativeLlama
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ckpt_convert import Checkpointer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a Hugging Face checkpoint; without it a tiny one is made")
    parser.add_argument("--output-dir", default="runs/full", help="a directory, or one in a bucket: s3://bucket/run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", default="20 steps", help="also: '1 epoch', '30 min', '2_000_000 tokens'")
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=320)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-check", action="store_true", help="do not load the result with transformers")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # the checkpointer says what it does
    logging.getLogger("torch").setLevel(logging.WARNING)
    source = args.source or common.tiny_llama()
    examples, held_out = common.text_examples(source / "tokenizer.json", args.length, args.examples)

    torch.manual_seed(args.seed)
    model = NativeLlama.from_config(source / "config.json")  # float32; the source is bfloat16, and so is what is saved
    loader = DataLoader(examples, args.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    with Checkpointer(
        source=source,
        output_dir=args.output_dir,
        model_format="native",
        save_every=args.save_every,
        keep_last=2,
        best="val_loss:min",
        keep_best=1,
        keep_last_training_state=1,
        asynchronous=True,
        save_on_signal=True,
    ) as checkpointer:
        checkpointer.load_model(model)
        checkpointer.resume(model=model, optimizer=optimizer, lr_scheduler=scheduler, dataloader=loader)
        table = common.LossTable(args.log_every)
        for blocks in common.batches(checkpointer, loader, args.steps):
            loss = common.loss_of(model, blocks)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            lr = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            checkpointer.step(tokens=blocks[:, 1:].numel(), samples=len(blocks))

            step, val_loss = checkpointer.progress.step, None
            if step % args.eval_every == 0 or step == args.steps:
                val_loss = common.evaluate(model, held_out)
                checkpointer.report(val_loss=val_loss)
            table.add(step, loss.item(), lr, val_loss)

    if checkpointer.should_stop:
        print(f"stopped after step {checkpointer.progress.step}; run this again to go on")
        return
    print(f"weights   {common.checksum(model.state_dict())}")
    print(f"optimizer {common.checksum(optimizer.state_dict())}")
    for saved in checkpointer.saved:
        print(f"{saved.place}  {saved.metrics}")
    if not args.no_check:
        # The files hold the source's bfloat16, so the training model is rounded likewise before the comparison.
        rounded = copy.deepcopy(model).bfloat16().float()
        theirs = common.load_with_transformers(checkpointer.saved[-1].path)
        common.compare_logits(rounded, theirs, torch.stack(held_out[:2]))


if __name__ == "__main__":
    main()
