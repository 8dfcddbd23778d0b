"""Text from elsewhere, fit for a line."""


def one_line(text: str) -> str:
    """Without control characters, which names in a file and messages of other machines can hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
