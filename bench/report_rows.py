"""The rows of a results file as the report's tables and plots read them."""

import math
from collections.abc import Iterable

OURS, BACKENDS = "minegan_fast", ("", "cuda", "triton", "cpp", "reference")  # "": the automatic choice
COMPACT, MASK, LOOP = "compact leaves", "mask", "nn.Sequential in a loop"


class Machine:
    """The rows of one results file, and the automatic backend's row of each case."""

    def __init__(self, content: dict):
        self.rows, self.runs = content["rows"], content["runs"]
        self.gpu = any("empty_us" in run["ceilings"] for run in self.runs.values())
        self.name = next(iter(self.runs.values()))["device"] if self.runs else ""
        self.time = "graph_us" if self.gpu else "median_us"

    def case(self, row: dict) -> list[dict]:
        same = ("op", "pass", "shape", "dtype")
        return [r for r in self.rows if all(r[name] == row[name] for name in same)]

    def ours(self, op: str, **wanted) -> Iterable[dict]:
        """One row a case: that of the backend that is chosen where nobody forces one."""
        seen = set()
        for row in sorted(
            (r for r in self.rows if r["op"] == op and r["provider"] == OURS),
            key=lambda r: BACKENDS.index(r["backend"]),
        ):
            case = str((row["pass"], row["shape"], row["dtype"]))
            if case not in seen and all(row.get(name) == value for name, value in wanted.items()):
                seen.add(case)
                yield row

    def ratio(self, row: dict, provider: str, field: str | None = None) -> float:
        """How many times as much as ours the provider needs, by default of time (on a GPU: both in CUDA graphs)."""
        field = field or self.time
        other = next((r for r in self.case(row) if r["provider"] == provider), {})
        if not (other.get(field) and row.get(field)):
            return math.nan
        return other[field] / row[field]

    def above_floor(self, row: dict) -> float:
        """Time over that of the least bytes at the copy bandwidth of the run; on a GPU less 4 µs of launch and tail."""
        floor = row["bytes"] / self.runs[row["run"]]["ceilings"]["copy_gb_s"] / 1e3
        return (row[self.time] - (4 if self.gpu else 0)) / floor if row.get(self.time) else math.nan


def updates(machine, average=False, most=1.0, **wanted):
    rows = machine.ours("row_update", average=average, **wanted)
    return [row for row in rows if row["network"] != "small layers" and row["density"] <= most]
