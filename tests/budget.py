"""Run a command, say how much processor time it and its processes took, and fail where that is over a budget.

python -m tests.budget SECONDS COMMAND…

Time on the clock depends on what else a machine does, so tests are held to processor time. Processes count that were
waited for: those of tests/checkpointer/pool.py, which are children of a server that nobody waits for, do not.
"""

from __future__ import annotations

import resource
import subprocess
import sys


def main(budget: float, command: list[str]) -> int:
    code = subprocess.call(command)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    print(f"{seconds:.0f} CPU-seconds, of {budget:.0f} at most")
    return code or int(seconds > budget)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
