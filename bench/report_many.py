"""The tables of docs/many.md: shares of several sources, as `minegan-fast demo --multi` has found them, and
bench/faces_and_eyes.py."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

NAMES = ("many-facts", "many-shares", "many-public")
SELECTORS = ("mixture", "winner")


def render(root: Path) -> dict[str, str]:
    """The text between the markers of NAMES. Each file is one seed's demo."""
    reports = [json.loads(path.read_text()) for path in sorted((root / "bench" / "quality").glob("demo-multi-*.json"))]
    public = root / "bench" / "quality" / "faces-and-eyes.json"
    found = dict.fromkeys(NAMES, "Not measured yet.\n")
    if public.exists():
        found["many-public"] = _public(json.loads(public.read_text()))
    if not reports:
        return found
    minutes = max(report["minutes"] for report in reports)
    machine = f"{reports[0]['device']}, torch {reports[0]['torch']}"
    facts = f"{len(reports)} seeds, at most {minutes} minutes each on {machine}.\n"
    rows = sorted((row for report in reports for row in report["rows"]), key=_place)
    head = ["fours in the target", "shares by", "0-2", "3-5", "6-8", "largest error, mean", "settled at step"]
    lines = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    for (fours, which), group in groupby(rows, _place):
        same = list(group)
        p = [_over(same, lambda row, i=i: 100 * row["p"][i]) for i in range(3)]
        error = sum(row["error"] for row in same) / len(same)
        steps = ", ".join("-" if row["steps"] is None else str(row["steps"]) for row in same)
        lines.append([f"{fours:.0%}", SELECTORS[which], *p, f"{error:.3f}", steps])
    return found | {"many-facts": facts, "many-shares": _table(lines)}


def _public(report: dict) -> str:
    steps = [*report["rows"][0]["faces"]]
    lines = [["shares by", *(f"step {step}" for step in steps)], ["---", *["---:"] * len(steps)]]
    lines += [[row["selector"], *(f"{100 * share:.0f} %" for share in row["faces"].values())] for row in report["rows"]]
    return _table(lines)


def _table(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _place(row: dict) -> tuple[float, int]:
    return row["fours"], SELECTORS.index(row["selector"])


def _over(rows: list[dict], value: Callable[[dict], float]) -> str:
    """ "24 % (21 to 27)": mean, least and most."""
    found = [value(row) for row in rows]
    return f"{sum(found) / len(found):.0f} % ({min(found):.0f} to {max(found):.0f})"
