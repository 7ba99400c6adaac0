"""What the documents tell is there: commands, and files that links lead to."""

import re
from pathlib import Path

import pytest

from mirasol.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_there_and_take_what_they_are_given(page, capsys):
    for line in re.findall(r"python -m mirasol ([a-z].*)", page.read_text(encoding="utf-8")):
        name, *words = line.partition("#")[0].rstrip("`").split()
        assert name.rstrip("`.,") in COMMANDS
        with pytest.raises(SystemExit):
            COMMANDS[name.rstrip("`.,")](["--help"])
        told = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in told, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
