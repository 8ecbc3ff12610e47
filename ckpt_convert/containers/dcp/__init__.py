"""torch.distributed.checkpoint's (DCP's) directories, and the names of their files."""

import re

DCP_INDEX = ".metadata"
DCP_SUFFIX = ".distcp"
INDEX_OF_RANK = re.compile(r"__(\d+)\.metadata")


def is_dcp_index(name: str) -> bool:
    """Whether a file of this name is the metadata of all ranks or of one."""
    return name == DCP_INDEX or INDEX_OF_RANK.fullmatch(name) is not None
