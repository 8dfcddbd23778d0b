"""What bench/results/quality.json holds, and what may be said of it: means over seeds, and paired comparisons."""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from quality_plan import ADVERSARIAL_ONLY, FURTHER, METHODS
from quality_settings import SETTINGS

DEFAULT, SPARSE = ("kernel", "minegan"), ("kernel", "minegan++")
DEFAULT_DENSITY = 0.1
COLLAPSED = 1 / 3  # of the real images' diversity
# Quantiles 0.975 of Student's t by degrees of freedom; beyond the last, the normal distribution's is near.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
     2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
NORMAL = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean of n values and the half width of its 95 % interval, None of a single value."""

    mean: float
    half: float | None
    n: int

    @property
    def verdict(self) -> str:
        """Of a difference of which less is better."""
        if self.half is None or abs(self.mean) <= self.half:
            return "not told apart"
        return "better" if self.mean < 0 else "worse"


def estimate(values: list[float]) -> Estimate | None:
    """None of no value."""
    if not values:
        return None
    n, half = len(values), None
    if n > 1:
        t = T[n - 2] if n - 2 < len(T) else NORMAL
        half = t * statistics.stdev(values) / n**0.5
    return Estimate(statistics.fmean(values), half, n)


@dataclass
class Results:
    """records: cells as they were merged; their key is (setting, count, loss, method, variant, seed)."""

    records: list[dict]
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        self.by_key = {}
        for record in self.records:
            cell = record["cell"]
            names = ("setting", "count", "loss", "method", "variant", "seed")
            self.by_key[tuple(cell[name] for name in names)] = record

    @classmethod
    def load(cls, path: Path) -> "Results":
        if not path.exists():
            return cls([])
        held = json.loads(path.read_text())
        return cls(held["cells"], held["facts"])

    @property
    def places(self) -> list[tuple[str, int]]:
        """(setting, count) of all cells without a variant, in the order of settings and of counts."""
        found = {(k[0], k[1]) for k in self.by_key if k[4] == ""}
        return sorted(found, key=lambda place: (list(SETTINGS).index(place[0]), place[1]))

    def ways(self, setting: str | None = None, count: int | None = None) -> list[tuple[str, str]]:
        """(loss, method) of the cells without a variant, in the order of the methods."""
        found = {k[2:4] for k in self.by_key if k[4] == "" and setting in (None, k[0]) and count in (None, k[1])}
        order = [*METHODS, *ADVERSARIAL_ONLY, *FURTHER]
        return sorted(found, key=lambda way: (way[0] != "kernel", order.index(way[1])))

    def source_kid(self, setting: str, seed: int) -> float | None:
        """Held-out KID of the source: of any method that starts from it."""
        for (name, _, _, method, _, other), record in self.by_key.items():
            if (name, other) == (setting, seed) and method != "scratch" and record["curve"]:
                return record["curve"][0]["kid"]
        return None

    def relative(self, record: dict, index: int = -1, name: str = "kid") -> float | None:
        """A KID of a snapshot in that of the source; None where the run diverged or the source's is not known."""
        cell = record["cell"]
        kid = self.source_kid(cell["setting"], cell["seed"])
        if record["diverged"] or not kid:
            return None
        return record["curve"][index][name] / kid

    def seeds(self, place: tuple[str, int], way: tuple[str, str], variant: str = "") -> dict[int, dict]:
        return {key[5]: record for key, record in self.by_key.items() if key[:5] == (*place, *way, variant)}

    def final(self, place: tuple[str, int], way: tuple[str, str], variant: str = "", name: str = "kid") -> dict:
        """{seed: value of the last snapshot}; a KID in that of the source. Diverged runs are left out."""
        values = {}
        for seed, record in self.seeds(place, way, variant).items():
            last = self.relative(record, name=name) if name.startswith("kid") else record["curve"][-1][name]
            if last is not None and not record["diverged"]:
                values[seed] = last
        return values

    def mean(self, place, way, variant: str = "", name: str = "kid") -> Estimate | None:
        return estimate(list(self.final(place, way, variant, name).values()))

    def differences(self, place, way, other, variants: tuple[str, str] = ("", "")) -> list[float]:
        """Relative held-out KID of one way minus that of another, of the seeds that both have."""
        a, b = self.final(place, way, variants[0]), self.final(place, other, variants[1])
        return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]

    def densities(self) -> dict[float, str]:
        """Fractions of the generator that were tried, and the variant of each: none of the default's."""
        tried = {key[4] for key in self.by_key if key[4].startswith("density=")}
        found = {float(variant.split("=")[1]): variant for variant in tried}
        return dict(sorted({**found, DEFAULT_DENSITY: ""}.items())) if found else {}

    def best_way(self, place: tuple[str, int]) -> tuple[str, str] | None:
        means = {way: self.mean(place, way) for way in self.ways(*place)}
        means = {way: value.mean for way, value in means.items() if value}
        return min(means, key=means.get) if means else None
