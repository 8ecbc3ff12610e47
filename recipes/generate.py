"""Take a saved step, of any format, into a model in plain torch: generate from it, and measure its perplexity.

python recipes/generate.py runs/full/latest --prompt "def main("
python recipes/generate.py runs/lora/latest/merged            # of a run with --merged
python recipes/generate.py Llama-3.2-1B-meta/ --tokenizer Llama-3.2-1B/tokenizer.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import common
import torch
from native_llama import NativeLlama
from tokenizers import Tokenizer

import ckpt_convert


def load(path: Path) -> NativeLlama:
    """The model of a checkpoint, in float32."""
    with ckpt_convert.open_checkpoint(path) as checkpoint:
        if checkpoint.config is None:
            raise SystemExit(f"{path}: holds no config")
        model = NativeLlama.from_config(checkpoint.config)
        weights = {key: tensor.torch() for key, tensor in checkpoint.items()}  # Meta's ranks joined
        native = ckpt_convert.convert_state_dict(
            weights, checkpoint.config, source=str(checkpoint.format), target="native"
        )
    model.load_state_dict(native)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; the checkpoint's own if not given")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--tokens", type=int, default=32, help="at most as many are generated")
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--examples", type=int, default=320, help="as in training: every eighth is held out")
    args = parser.parse_args()

    model = load(args.checkpoint)
    file = args.tokenizer or args.checkpoint / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))

    prompt = torch.tensor([tokenizer.encode(args.prompt).ids])
    print(repr(tokenizer.decode(model.generate(prompt, args.tokens)[0].tolist())))

    _, held_out = common.text_examples(file, args.length, args.examples)
    loss = common.evaluate(model, held_out)
    print(f"loss {loss:.4f} nats, perplexity {math.exp(loss):.1f}")


if __name__ == "__main__":
    main()
