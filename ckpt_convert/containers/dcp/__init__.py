"""torch.distributed.checkpoint's directories, and what their files are called."""

import re

DCP_INDEX = ".metadata"
DCP_SUFFIX = ".distcp"
INDEX_OF_RANK = re.compile(r"__(\d+)\.metadata")


def is_dcp_index(name: str) -> bool:
    """Whether a file of this name is the metadata, or a rank's."""
    return name == DCP_INDEX or INDEX_OF_RANK.fullmatch(name) is not None
