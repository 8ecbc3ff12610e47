"""python -m tests.models.tables: writes the files anew, after a change that is meant to change tables."""

from __future__ import annotations

from tests.models.tables.files import FOLDER, expected

for old in FOLDER.glob("*.txt"):
    old.unlink()
for name, text in expected().items():
    (FOLDER / f"{name}.txt").write_text(text)
