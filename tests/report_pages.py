"""A page, parsed."""

import json
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """elements: (tag, attributes, text inside with that of its children) of every element, in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict, list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        assert not self.open, "an element is not closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, tag: str, **wanted) -> list[tuple[dict, str]]:
        wanted = {"class" if name == "kind" else name: value for name, value in wanted.items()}
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(n) == value for n, value in wanted.items())
        ]

    def titles(self) -> list[str]:
        return [text for _, text in self.all("h2")]

    def charts(self) -> dict[str, dict]:
        """{title and names: what a pointer shows}."""
        figures = self.all("figure", kind="chart")
        return {text.split("\n")[0].strip(): json.loads(a["data-points"]) for a, text in figures}

    def series(self) -> dict[str, dict[int, float]]:
        """{name: {step: value}} of all charts."""
        found = {}
        for data in self.charts().values():
            for name, values in data["series"].items():
                found[name] = {s: v for s, v in zip(data["steps"], values, strict=True) if v is not None}
        return found
