"""What is written stays the same, byte for byte, while the code is put in order."""

from __future__ import annotations

from tests import fixed_outputs


def test_outputs_are_as_they_were() -> None:
    assert fixed_outputs.differing(fixed_outputs.made()) == []
