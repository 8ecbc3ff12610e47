"""torch.distributed.checkpoint's (DCP's) directories, and the names of their files."""

import re

DCP_INDEX = ".metadata"
DCP_SUFFIX = ".distcp"
INDEX_OF_RANK = r"__(\d+)\.metadata"


def is_dcp_index(name: str) -> bool:
    """Whether a file of this name is the metadata of all ranks or of one."""
    return name == DCP_INDEX or re.fullmatch(INDEX_OF_RANK, name) is not None
