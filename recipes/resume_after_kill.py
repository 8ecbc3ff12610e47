"""Kill a fine-tuning run with SIGKILL at random moments; resumed, it ends with the very same bits.

python recipes/resume_after_kill.py                           # kills twice
python recipes/resume_after_kill.py --kills 5 --batch-size 2  # what it does not know goes to full_finetune.py
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).with_name("full_finetune.py")


STEP = r" *{} +\d+\.\d+ "
"""The line that the recipe prints after a step."""


def train(
    output_dir: Path | str, options: list[str], kill_at: tuple[str, str] | None = None, delay: float = 0.0
) -> dict[str, str]:
    """Run the recipe and show its notices; kill it ``delay`` seconds after a line that begins like ``kill_at``.

    That is a pattern, and what happened then. Returns the checksums that it ended with; none if it was killed.
    """
    options = [*options, "--output-dir", str(output_dir), "--log-every", "1", "--no-check"]
    checksums: dict[str, str] = {}
    lines = []
    command = [sys.executable, str(RECIPE), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in child.stdout or ():
        lines.append(line)
        if kill_at is not None and re.match(kill_at[0], line):
            time.sleep(delay)
            child.kill()  # SIGKILL: nothing in the child gets a chance to tidy up
            child.wait()
            print(f"    killed after {kill_at[1]}")
            return {}
        if found := re.match(r"(weights|optimizer) +([0-9a-f]{64})$", line):
            checksums[found[1]] = found[2]
        elif re.search(r"resumed|fresh start|half-written|skipped", line):
            print(f"    {line.rstrip()}")
    if child.wait():
        raise SystemExit(f"the run failed:\n{''.join(lines)}")
    return checksums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/killed"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", default="3 steps")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of the moments; without it they differ each time")
    args, options = parser.parse_known_args()
    options += ["--steps", str(args.steps), "--save-every", args.save_every]
    for name in ("whole", "killed"):
        shutil.rmtree(args.output_dir / name, ignore_errors=True)

    print("without interruption")
    expected = train(args.output_dir / "whole", options)

    # Later runs are killed later, or some would only repeat what an earlier one did.
    moments = random.Random(args.seed)
    kills = sorted(moments.sample(range(1, args.steps), args.kills))
    print(f"killed after steps {', '.join(map(str, kills))}")
    for step in kills:
        train(args.output_dir / "killed", options, (STEP.format(step), f"step {step}"), moments.uniform(0, 0.1))
    found = train(args.output_dir / "killed", options)

    print(f"\n{'sha256 of the':14} {'without interruption':20}  killed and resumed")
    for what, sum_ in expected.items():
        print(f"{what:14} {sum_[:19]}…  {found[what][:19]}…  {'same' if found[what] == sum_ else 'DIFFERENT'}")
    if found != expected:
        raise SystemExit("the resumed run ended elsewhere")


if __name__ == "__main__":
    main()
