"""Checking a checkpoint: all problems in one report."""

from __future__ import annotations

from ckpt_convert.analysis.check.report import Skipped, Verification
from ckpt_convert.analysis.check.run import check_checkpoint

__all__ = ["Skipped", "Verification", "check_checkpoint"]
