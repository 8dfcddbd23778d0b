"""Links between the documents, as they are read in the repository and as pages of the site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench" / "TABLES.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Of GitHub's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    broken, of_the_site = [], document.is_relative_to(ROOT / "docs") and (ROOT / "docs" / "hooks.py").read_text()
    for target in LINK.findall(document.read_text()):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists():
            if not (of_the_site and f'"{name}"' in of_the_site):
                broken.append(target)
        elif anchor and path.suffix == ".md" and anchor not in anchors(path.read_text()):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert pages
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_every_public_name_has_a_page():
    import minegan_fast

    rooms = {name for name in minegan_fast.__all__ if hasattr(getattr(minegan_fast, name), "__path__")}
    for room in rooms:
        page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
        assert f"::: minegan_fast.{room}\n" in page
    assert "::: minegan_fast\n" in (ROOT / "docs" / "api" / "minegan_fast.md").read_text()
