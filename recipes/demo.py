"""A Hugging Face Llama becomes a Meta checkpoint and comes back, file for file.

Writes ./demo (400 MB) within half a minute; with --tiny a model of 3 MB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RECORD = "ckpt_convert"
HF, META, BACK = "demo/hf", "demo/meta", "demo/back"

# Llama 3's: how it splits text before merging, and the names behind its tokens.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
NAMED = {
    0: BEGIN,
    1: END,
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
SPECIAL_TOKENS = 256


def train_tokenizer(tokens: int) -> Tokenizer:
    """A byte-level BPE like Llama 3's, trained on Python's own standard library."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    def pipeline(model: models.BPE) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    learner = pipeline(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    texts = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))
    learner.train_from_iterator((text.read_text("utf-8", "replace") for text in texts), trainer)

    # tiktoken, which Llama 3 was trained with, merges any two tokens that make a third one, the lowest id first.
    vocab = learner.get_vocab(with_added_tokens=False)
    merges = [
        (left, right)
        for token in sorted(vocab, key=vocab.__getitem__)
        for left, right in sorted(
            ((token[:at], token[at:]) for at in range(1, len(token)) if token[:at] in vocab and token[at:] in vocab),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    ]
    tokenizer = pipeline(models.BPE(vocab, merges, ignore_merges=True))
    numbers = iter(range(SPECIAL_TOKENS))
    tokenizer.add_special_tokens(
        [NAMED.get(at) or f"<|reserved_special_token_{next(numbers)}|>" for at in range(SPECIAL_TOKENS)]
    )
    begin = (BEGIN, tokenizer.token_to_id(BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[begin]
    )
    return tokenizer


def make_checkpoint(directory: Path, *, tiny: bool) -> str:
    """Save a Llama with random weights and a tokenizer as a release would have them; returns a line about it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)

    tokenizer = train_tokenizer(1000 if tiny else 8000)
    size = (
        {"hidden_size": 192, "intermediate_size": 544, "num_hidden_layers": 3}
        if tiny
        else {"hidden_size": 768, "intermediate_size": 2112, "num_hidden_layers": 8}
    )
    config = LlamaConfig(
        **size,
        vocab_size=-(-tokenizer.get_vocab_size() // 16) * 16,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # the norms, which start as ones: each its own
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(directory, max_shard_size="1MB" if tiny else "40MB")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END).save_pretrained(directory)
    return (
        f"A Llama with random weights, saved by transformers {transformers.__version__}: "
        f"{model.num_parameters() / 1e6:.1f} M parameters, bfloat16, "
        f"{len(list(directory.glob('*.safetensors')))} shards, {config.vocab_size} tokens."
    )


def run(*words: str) -> None:
    """Run ckpt-convert as one would in a terminal; its output goes where ours goes."""
    click.secho(f"\n$ {shlex.join(['ckpt-convert', *words])}", bold=True)
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "ckpt_convert", *words], check=False).returncode
    if code:
        sys.exit(f"ckpt-convert ended with code {code}")


def checksums(directory: Path) -> dict[str, str]:
    """The sha256 of every file, without the record that ckpt-convert puts beside what it writes."""
    out = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_file() and name.parts[0] != RECORD:
            with path.open("rb") as file:
                out[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def compare(before: Path, after: Path) -> bool:
    """Show the checksums of two directories side by side; returns whether they agree."""
    one, other = checksums(before), checksums(after)
    names = sorted(one.keys() | other.keys())
    width = max(map(len, names))
    click.secho(f"\n{'sha256 of each file':{width}}  {before!s:17}  {after}", bold=True)
    different = 0
    for name in names:
        left, right = one.get(name), other.get(name)
        different += left != right
        verdict = click.style("same", fg="green") if left == right else click.style("DIFFERENT", fg="red", bold=True)
        shown = [f"{checksum[:16]}…" if checksum else "not there" for checksum in (left, right)]
        click.echo(f"{name:{width}}  {shown[0]:17}  {shown[1]:17}  {verdict}")
    if different:
        click.secho(f"\n{different} of {len(names)} files DIFFER.", fg="red", bold=True)
    else:
        click.secho(f"\nAll {len(names)} files came back from Meta's layout the same, byte for byte.", bold=True)
        click.echo(f"({after}/{RECORD} is new: it records the conversion.)")
    return not different


def suggest() -> None:
    """Name what to try next, as it can be run here."""
    python = os.path.relpath(sys.executable)
    program = os.path.join(os.path.dirname(python), "ckpt-convert")
    click.secho("\nEverything is in ./demo. Three things to try next:", bold=True)
    for command, why in (
        (f"{program} diff {HF} {META}", "the same weights? Across formats and ranks"),
        (f"{program} inspect {HF} --html demo/page.html", "a page for the browser"),
        (f"{python} recipes/full_finetune.py", "train a tiny Llama; stopped and started again, it resumes"),
    ):
        click.echo(f"  {command:58}  # {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a model of a few megabytes")
    arguments = parser.parse_args()

    for directory in (HF, META, BACK):
        shutil.rmtree(directory, ignore_errors=True)
    click.echo(make_checkpoint(Path(HF), tiny=arguments.tiny))
    run("hf-to-meta", HF, META, "--model-parallel", "2", "--verify")
    run("inspect", META)
    run("meta-to-hf", META, BACK)
    if not compare(Path(HF), Path(BACK)):
        return 1
    suggest()
    return 0


if __name__ == "__main__":
    sys.exit(main())
