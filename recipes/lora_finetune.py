"""Fine-tune a Llama with LoRA (or DoRA) in plain PyTorch; every saved step is an adapter that peft loads.

python recipes/lora_finetune.py                          # makes a tiny Llama first; takes half a minute
python recipes/lora_finetune.py --source Llama-3.2-1B/   # a Hugging Face directory
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from pathlib import Path

import common
import torch
from native_llama import LoRALinear, NativeLlama, add_lora
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from ckpt_convert import AdapterConfig, Checkpointer

TARGETS = ("q_proj", "k_proj", "v_proj", "output_proj")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a Hugging Face checkpoint; without it a tiny one is made")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lora"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", default="20 steps")
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=320, help="every eighth is held out")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--dora", action="store_true", help="learn the magnitude of each row, too")
    parser.add_argument("--merged", action="store_true", help="write the full weights, too, into each step's merged/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-check", action="store_true", help="do not load the result with peft")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO)  # the checkpointer says what it does
    logging.getLogger("torch").setLevel(logging.WARNING)
    source = args.source or common.tiny_llama()
    examples, held_out = common.text_examples(source / "tokenizer.json", args.length, args.examples)

    torch.manual_seed(args.seed)
    model = NativeLlama.from_config(source / "config.json")
    parameters = add_lora(model, args.rank, args.alpha, TARGETS, dora=args.dora)
    loader = DataLoader(examples, args.batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=0.0)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    with Checkpointer(
        source=source,
        output_dir=args.output_dir,
        model_format="native",
        save_every=args.save_every,
        keep_last=2,
        best="val_loss:min",
        keep_best=1,
        asynchronous=True,
        adapter=AdapterConfig(rank=args.rank, alpha=args.alpha, target_modules=TARGETS, use_dora=args.dora),
        merged=args.merged,
    ) as checkpointer:
        checkpointer.load_model(model)  # the base
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.reset_magnitude()  # DoRA starts from the norms of the base's rows
        checkpointer.resume(model=model, optimizer=optimizer, lr_scheduler=scheduler, dataloader=loader)
        table = common.LossTable(args.log_every)
        for blocks in common.batches(checkpointer, loader, args.steps):
            loss = common.loss_of(model, blocks)
            loss.backward()
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
    for saved in checkpointer.saved:
        print(f"{saved.path}  {saved.metrics}")
    if not args.no_check and importlib.util.find_spec("peft"):
        from peft import PeftModel

        base = common.load_with_transformers(source)
        theirs = PeftModel.from_pretrained(base, checkpointer.saved[-1].path).eval()
        common.compare_logits(model, theirs, torch.stack(held_out[:2]))


if __name__ == "__main__":
    main()
