"""What was wanted of the defaults before they were measured. Each goal: (results, place) -> met, or None: no cells."""

from quality_results import COLLAPSED, DEFAULT, SPARSE, Results, estimate

RIVALS = (("kernel", "transfergan"), ("adversarial", "freezed"), ("kernel", "scratch"))


def below_rivals(results: Results, place: tuple[str, int]) -> bool | None:
    """A lower mean, paired over seeds, than each rival that was run there."""
    found = [estimate(values) for way in RIVALS if (values := results.differences(place, DEFAULT, way))]
    return all(value.mean < 0 for value in found) if found else None


def not_worse_than_dense(results: Results, place: tuple[str, int]) -> bool | None:
    value = estimate(results.differences(place, SPARSE, DEFAULT))
    return None if value is None else value.verdict != "worse"


def below_random(results: Results, place: tuple[str, int]) -> bool | None:
    value = estimate(results.differences(place, SPARSE, ("kernel", "random")))
    return None if value is None else value.mean < 0


def in_the_prior(results: Results, place: tuple[str, int]) -> bool | None:
    """Of all seeds, at the last step."""
    noted = [r["curve"][-1]["noted"] for r in results.seeds(place, DEFAULT).values() if r["curve"]]
    noted = [n for n in noted if {"latent_norm", "latent_dimensions"} <= n.keys()]
    return all(0.9 <= n["latent_norm"] <= 1.1 and n["latent_dimensions"] >= 1 / 3 for n in noted) if noted else None


def diverse(results: Results, place: tuple[str, int]) -> bool | None:
    records = [r for r in results.seeds(place, DEFAULT).values() if r["curve"]]
    return all(r["curve"][-1]["diversity"] >= COLLAPSED for r in records) if records else None


def quarter(results: Results, place: tuple[str, int]) -> bool | None:
    value = results.mean(place, DEFAULT)
    return None if value is None else value.mean <= 0.25


GOALS = {
    "KID at most a quarter of the source's": quarter,
    "lower KID than TransferGAN, FreezeD and scratch, as far as they were run": below_rivals,
    "MineGAN++ not worse than dense by more than the interval": not_worse_than_dense,
    "MineGAN++ lower than random neurons": below_random,
    "mined z: |z|²/d within 0.9 and 1.1, effective dimension at least a third": in_the_prior,
    "diversity at least a third of the real images'": diverse,
}
