"""What another process does of a conversion: a module without torch, which such a process would import for nothing."""

from __future__ import annotations

import pickle
from pathlib import Path

from ckpt_convert.convert.execute import FinishedPiece, execute
from ckpt_convert.convert.publish import JoinedOutput
from ckpt_convert.convert.sources import ReopenedSources
from ckpt_convert.storage.folder import Folder
from ckpt_convert.storage.system import Advice


def write_part(data: bytes, folder: str) -> list[FinishedPiece]:
    """Write some pieces of a plan into files that another process has made."""
    plan, pieces = pickle.loads(data)
    sources = ReopenedSources(plan)
    with Folder.joined(Path(folder), Advice()) as directory:
        joined = JoinedOutput(plan, directory)
        done = execute(plan, pieces, sources, joined, workers=1)
        joined.close()
    sources.close()
    return done
