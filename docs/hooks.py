"""What the site takes from the repository as it stands: the page of the kernels is written from the ops' own files, and
the documents that lie outside `docs/` become pages of it."""

import ast
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"tables.md": "bench/TABLES.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINKS = {  # as written in the repository -> as pages of the site
    "../CONTRIBUTING.md": "contributing.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "../bench/TABLES.md": "tables.md",
    "bench/TABLES.md": "tables.md",
}
KERNELS = "<!-- kernels -->"


def on_files(files, config):
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"\]\(([^)#]+)\)", lambda found: f"]({_link(found[1])})", markdown)
    return markdown.replace(KERNELS, kernels())


def _link(target: str) -> str:
    target = LINKS.get(target, target)
    return target.removeprefix("docs/")


def kernels() -> str:
    """A section an op: the equations that its file begins with, its backends, where its rows are."""
    measured = set(re.findall(r"\*\*`(\w+)`", (ROOT / "bench" / "TABLES.md").read_text()))
    sections = []
    for path in sorted((ROOT / "minegan_fast" / "ops").glob("*.py")):
        text = path.read_text()
        backends = sorted(set(re.findall(r'^@\w+\.register\("(\w+)"', text, re.MULTILINE)))
        if not backends:
            continue
        rows = f"[measured](tables.md), `{path.stem}`" if path.stem in measured else "measured within other ops"
        said = ast.get_docstring(ast.parse(text))
        sections.append(
            f"## {path.stem}\n\nBackends: reference, {', '.join(backends)}. {rows}.\n\n```text\n{said}\n```\n"
        )
    return "\n".join(sections)
