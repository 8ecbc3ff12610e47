"""Makes the pictures of the documentation: real commands on a real, small model, as a terminal and a browser show them.

    python docs/pictures.py              all of them, into docs/pictures, in about two minutes
    python docs/pictures.py diff page    only those whose name begins so
    python docs/pictures.py rooms        that of the package's rooms, which needs nothing

Terminals need nothing but the project's own packages; the pages need playwright and a Chromium (the system's, else
playwright's own). The model is trained a little on this repository's own text, so that its weights look like weights.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
COLUMNS = 100
WINDOW = {"width": 1280, "height": 900}
MOST = 300_000
"""Bytes that a picture may have, since they are kept in the repository."""

BASE, TUNED, META, BROKEN = "tiny-llama", "tiny-llama-tuned", "tiny-llama-meta", "tiny-llama-broken"
ADAPTER = "tiny-llama-lora"


@dataclass(frozen=True)
class Terminal:
    """A command as a terminal shows it; ``code`` is the exit code that it should have."""

    name: str
    command: str
    code: int = 0


@dataclass(frozen=True)
class Page:
    """A page that a command writes, or a ``section`` of it, as a browser shows it in a light and in a dark room."""

    name: str
    command: str
    code: int = 0
    section: str = ""


TERMINALS = (
    Terminal("inspect", f"inspect {BASE}"),
    Terminal("inspect-tree", f"inspect {BASE} --tree --depth 3"),
    Terminal("inspect-stats", f"inspect {BASE} --stats"),
    Terminal("show", f"show {BASE} model.layers.3.self_attn.q_proj.weight"),
    Terminal("verify", f"verify {META}"),
    Terminal("verify-findings", f"verify {BROKEN}", code=1),
    Terminal("diff", f"diff {BASE} {TUNED}", code=1),
    Terminal("merge-adapter", f"merge-adapter {BASE} {ADAPTER} {BASE}-merged --dry-run"),
    Terminal("dry-run", f"convert {BASE} {META}-4 --to meta --model-parallel 4 --dry-run"),
)
PAGES = (
    Page("page-inspect", f"inspect {TUNED} --stats --html"),
    Page("page-inspect-statistics", f"inspect {TUNED} --stats --html", section="#heat-section"),
    Page("page-diff", f"diff {BASE} {TUNED} --html", code=1),
)


@dataclass(frozen=True)
class Room:
    """A room of the package: what is done there, and what a conversion and a save do on their way through it."""

    name: str
    what: str
    conversion: str = ""
    save: str = ""


ROOMS = (
    Room("cli", "commands, flags, color, progress", "1 options, dry run, progress bar"),
    Room("checkpointer", "what a recipe has: save, resume", "", "1 is a save due? · 2 take the state"),
    Room("analysis", "verify, diff, logits, statistics", "", "at resume: is the step sound?"),
    Room("adapters", "LoRA, DoRA, PEFT's files, merging", "", "3 PEFT's keys and files"),
    Room("convert", "plan, execute, publish", "6 plan · 8 pieces · 11 read back", "4 plan, made once · 6 pieces"),
    Room("checkpoint", "keys, family, config, record", "4 what is it? · 10 manifest", "8 manifest"),
    Room("formats", "directories, and names of files", "3 which files, which format", "5 the source's names"),
    Room("containers", "bytes of one file, new headers", "2 headers · 7 new headers", "5 the source's headers"),
    Room("models", "one table for each family", "5 through two columns", "4 through two columns"),
    Room("tokenizer", "tokenizer.model and .json", "5 for the other side"),
    Room("tensors", "lazy tensors, reading, workers", "8 rows in order, cast", "6 rows in order, cast"),
    Room("storage", "places, staging, publishing", "2 list · 9 write · 12 rename", "7 write · 9 rename, point, prune"),
)
"""From top to bottom: each imports only what is below it."""


def draw_rooms() -> str:
    """The rooms one above the other, with the ways of one conversion and of one save."""
    row, left, top = 46, 20, 62
    ways = ((448, "#1f6feb", "one conversion"), (716, "#b35900", "one save"))
    height = top + row * len(ROOMS) + 16
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="{height}" viewBox="0 0 1000 {height}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        f'<rect width="1000" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="{left}" y="34" fill="#57606a">a room imports what is below it</text>',
    ]
    for x, color, title in ways:
        out.append(f'<text x="{x + 14}" y="34" fill="{color}" font-weight="600">{title}</text>')
        out.append(f'<path d="M{x} {top}V{height - 22}" stroke="{color}" stroke-opacity="0.35" stroke-width="2"/>')
    for number, room in enumerate(ROOMS):
        y = top + row * number
        out.append(f'<rect x="{left}" y="{y}" width="404" height="36" rx="6" fill="#f6f8fa" stroke="#d0d7de"/>')
        out.append(f'<text x="{left + 12}" y="{y + 23}" fill="#1f2328" font-weight="600">{room.name}</text>')
        out.append(f'<text x="{left + 120}" y="{y + 23}" fill="#57606a">{room.what}</text>')
        for (x, color, _), stop in zip(ways, (room.conversion, room.save), strict=True):
            if stop:
                out.append(f'<circle cx="{x}" cy="{y + 18}" r="5" fill="{color}"/>')
                out.append(f'<text x="{x + 14}" y="{y + 23}" fill="#1f2328">{stop}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def make_models(folder: Path) -> None:
    """A Llama in three shards, the same after a few more steps on the upper half, and the first in Meta's layout."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    )
    text = b"".join(path.read_bytes() for path in sorted((ROOT / "ckpt_convert").rglob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = LlamaForCausalLM(config)
    train(model, data, 10, {name: 2e-3 for name, _ in model.named_parameters()})
    save(model, folder / BASE)
    # As fine-tuning is often done: the upper half only, and the less the farther a layer is from the output.
    layers = {name: int(found[1]) for name, _ in model.named_parameters() if (found := re.search(r"\.(\d+)\.", name))}
    train(model, data, 4, {name: 5e-4 * 0.7 ** (15 - layer) for name, layer in layers.items() if layer >= 8})
    save(model, folder / TUNED)
    run(f"hf-to-meta {BASE} {META} --model-parallel 2 --quiet", folder)
    break_one(folder / BASE, folder / BROKEN)
    make_adapter(model, folder / ADAPTER)


def make_adapter(model: Any, path: Path) -> None:
    """An adapter of the attention of the upper half, as PEFT writes one."""
    import safetensors.torch
    import torch

    tensors = {}
    for name, weight in model.named_parameters():
        if re.search(r"\.([89]|1\d)\.self_attn\.[qv]_proj\.", name):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, weight.shape[1]) / 16
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 8) / 64
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": r".*\.([89]|1\d)\.self_attn\.[qv]_proj"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def break_one(source: Path, path: Path) -> None:
    """A copy as careless hands leave one: a shard cut short, one left from before, an edited config."""
    shutil.copytree(source, path)
    last = max(path.glob("*.safetensors"))
    with last.open("rb+") as file:
        file.truncate(last.stat().st_size - 100_000)
    shutil.copy(source / "model-00001-of-00003.safetensors", path / "model-00001-of-00002.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))


def train(model: Any, data: Any, steps: int, rates: dict[str, float]) -> None:
    """A few optimizer steps on runs of bytes; parameters without a rate stay as they are."""
    import torch

    groups = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in rates)
        if name in rates:
            groups.append({"params": [parameter], "lr": rates[name]})
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        starts = torch.randint(len(data) - 65, (2,))
        batch = torch.stack([data[start : start + 64] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save(model: Any, path: Path) -> None:
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(path, max_shard_size="9MB")


def words(command: str) -> list[str]:
    return [sys.executable, "-m", "ckpt_convert", *shlex.split(command)]


def environment() -> dict[str, str]:
    """Ours without what would change how things look, and with this repository's package."""
    dropped = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}


def run(command: str, folder: Path, code: int = 0) -> None:
    done = subprocess.run(words(command), cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    check(command, done.returncode, code, done.stdout + done.stderr)


def check(command: str, found: int, expected: int, shown: str) -> None:
    if found != expected:
        sys.exit(f"ckpt-convert {command}: exit code {found}, expected {expected}\n{shown}")


def on_a_terminal(command: str, folder: Path, code: int) -> str:
    """What a command prints on a terminal of ``COLUMNS``; what it says on standard error (progress) is left out."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words(command), cwd=folder, env=environment(), stdout=follower, stderr=errors) as process,
    ):
        os.close(follower)
        shown = b"".join(iter(lambda: _part(leader), b""))
        os.close(leader)
        process.wait()
        errors.seek(0)
        check(command, process.returncode, code, errors.read().decode())
    return shown.decode().replace("\r\n", "\n")


def _part(leader: int) -> bytes:
    try:
        return os.read(leader, 1 << 16)
    except OSError:  # how Linux says that the other side is closed
        return b""


def svg(text: str, title: str) -> str:
    """A window of a terminal with this text, colours and all; it refers to nothing outside of itself."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.text import Text

    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in Text.from_ansi(text).split("\n", allow_blank=True):
        # Cut as a terminal cuts what no command has wrapped.
        console.print(*line.divide(range(COLUMNS, len(line), COLUMNS)), sep="\n", soft_wrap=True)
    # Without the fonts that the format fetches from elsewhere: a terminal's picture looks right in any monospace.
    format = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    made = console.export_svg(title=title, code_format=format, unique_id="terminal")
    return "\n".join(line.rstrip() for line in made.splitlines()) + "\n"


def draw_terminal(terminal: Terminal, folder: Path) -> None:
    shown = on_a_terminal(terminal.command, folder, terminal.code)
    command = f"ckpt-convert {terminal.command}"
    write(f"{terminal.name}.svg", svg(f"\x1b[1m$ {command}\x1b[0m\n{shown.rstrip()}", command).encode())


def draw_page(page: Page, folder: Path, browser: Any) -> None:
    run(f"{page.command} {page.name}.html", folder, page.code)
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport=WINDOW, color_scheme=scheme, reduced_motion="reduce")
        tab = context.new_page()
        tab.goto((folder / f"{page.name}.html").as_uri())
        tab.wait_for_timeout(500)
        shown = tab.locator(page.section) if page.section else tab
        write(f"{page.name}-{scheme}.png", shown.screenshot())
        context.close()


def with_browser(draw: Callable[[Any], None]) -> None:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        draw(browser)
        browser.close()


def write(name: str, data: bytes) -> None:
    if len(data) > MOST:
        sys.exit(f"{name}: {len(data)} bytes, more than the {MOST} that a picture may have")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / name).write_bytes(data)
    print(f"{name}  {len(data) / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all pictures without")
    wanted = tuple(parser.parse_args().names) or ("",)
    if "rooms".startswith(wanted):
        write("rooms.svg", draw_rooms().encode())
    if wanted == ("rooms",):
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_models(folder)
        for terminal in TERMINALS:
            if terminal.name.startswith(wanted):
                draw_terminal(terminal, folder)
        pages = [page for page in PAGES if page.name.startswith(wanted)]
        if pages:
            with_browser(lambda browser: [draw_page(page, folder, browser) for page in pages] and None)


if __name__ == "__main__":
    main()
