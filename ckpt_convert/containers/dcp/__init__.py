"""torch.distributed.checkpoint's directories."""

DCP_INDEX = ".metadata"
DCP_SUFFIX = ".distcp"
