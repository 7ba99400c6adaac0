"""What key paths cost, counted and reviewed: figures.json, one section a test, exact numbers.

    def test_something(figures):
        figures("a section", {"a figure": 12})

A figure that rose, fell, is new or is gone fails the test and is named. `make figures` writes all sections anew; what
changed there is for the review. Nothing is timed, so that the figures hold on every machine with the versions of
constraints.txt and constraints-newest.txt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
COMMAND = "make figures"


def check(section: str, found: Mapping[str, int], file: Path = FILE) -> None:
    """Whether a section is as it was reviewed.

    Raises:
        AssertionError: it is not; the message says which figures moved, and how to renew them.
    """
    moved = changes(json.loads(file.read_text()).get(section, {}), found)
    lines = "\n".join(f"  {line}" for line in moved)
    assert not moved, f"{section}, against {file.name}:\n{lines}\nIf that is meant, `{COMMAND}` renews the figures."


def changes(reviewed: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """What differs, in words: what became dearer first."""
    both = [(name, reviewed[name], found[name]) for name in reviewed if name in found]
    return [
        *(f"{name}: rose from {was} to {now}" for name, was, now in both if now > was),
        *(f"{name}: fell from {was} to {now}" for name, was, now in both if now < was),
        *(f"{name}: {found[name]}, which is new" for name in found if name not in reviewed),
        *(f"{name}: was {reviewed[name]}, is gone" for name in reviewed if name not in found),
    ]


def renew(section: str, found: Mapping[str, int], file: Path = FILE) -> None:
    """Put a section in place of the one of its name."""
    sections = json.loads(file.read_text()) if file.exists() else {}
    sections[section] = dict(sorted(found.items()))
    file.write_text(json.dumps(sections, indent=1, sort_keys=True) + "\n")
