"""Every number in the docs comes from a committed JSON that says where it was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from code_blocks import PAGES, REPOSITORY

from barqtrain_hf.benchmarks.render import render


def test_tables_are_what_the_files_say() -> None:
    tables = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        tables += text.count("<!-- /")
        assert render(text, REPOSITORY) == text, f"run barqtrain_hf.benchmarks.render: {page.name}"
    assert tables >= 4


def test_every_measurement_names_its_origin() -> None:
    files = sorted((REPOSITORY / "docs" / "benchmarks").rglob("*.json"))
    assert len(files) >= 5
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        origin = content.get("environment", content)
        assert origin["device"] and origin["command"] and origin["versions"]["torch"], file
        assert any(file.name in page.read_text(encoding="utf-8") for page in PAGES), file


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in _anchors(file), f"{page.name}: {target}#{anchor}"


def _anchors(page: Path) -> list[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_quoted_messages_are_ours() -> None:
    """What README puts between “ and ” is what a user reads: in an error, a warning or the report."""
    files = [
        *(REPOSITORY / "barqtrain_hf").rglob("*.py"),
        *(REPOSITORY / "rust").glob("*/src/*.rs"),
    ]
    # Literals side by side are one.
    source = re.sub(r'"\s*f?"', "", "\n".join(path.read_text(encoding="utf-8") for path in files))
    quoted = re.findall(r"“(.+?)”", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    assert len(quoted) >= 5
    for message in (" ".join(words.split()) for words in quoted):
        assert message in source, f"no message of ours has {message!r}"
