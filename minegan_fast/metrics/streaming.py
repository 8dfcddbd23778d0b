"""Metrics of features that come batch by batch: update, compute, reset."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from ._inputs import Array, as_features
from .frechet import FeatureStatistics, Normal, frechet_distance
from .kernel import kid, kmmd
from .manifold import precision_recall


class _Rows:
    """A sample of which all rows are kept."""

    def __init__(self, count: int, rows: Tensor):
        self.count, self.parts = count, [rows]

    @classmethod
    def of(cls, x: Tensor):
        return cls(len(x), x.clone())  # the caller may fill the same memory with the next batch

    def merge(self, other: "_Rows") -> None:
        self.parts += other.parts
        self.count += other.count

    @property
    def rows(self) -> Tensor:
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]

    def state(self) -> dict[str, Tensor | int]:
        return {"count": self.count, "rows": self.rows}


class _Root(_Rows):
    """Mean [D] and a root [r <= 2D, D] of the scatter matrix of a sample, in float64.

    Centred rows are stacked, and by QR brought back to D where they are more than 2D. Unlike sums of squares that does
    not square the condition, so the distance is the one of the rows themselves, also where the covariance is singular.
    """

    def __init__(self, count: int, rows: Tensor, mean: Tensor):
        super().__init__(count, rows)
        self.mean, self.held = mean, len(rows)
        self._reduce()

    def _reduce(self) -> None:
        if self.held > 2 * len(self.mean):
            self.parts = [torch.linalg.qr(self.rows, mode="r").R]
            self.held = len(self.parts[0])

    @classmethod
    def of(cls, x: Tensor):
        x = x.double()
        mean = x.mean(0)
        return cls(len(x), (x - mean)[: len(x) if len(x) > 1 else 0], mean)

    def merge(self, other: "_Root") -> None:
        shift, share = other.mean - self.mean, other.count / (self.count + other.count)
        self.parts.append(shift[None] * (self.count * share) ** 0.5)
        self.mean = self.mean + share * shift
        super().merge(other)
        self.held += 1 + other.held
        self._reduce()

    def normal(self) -> Normal:
        return Normal(self.mean, self.rows / (self.count - 1) ** 0.5, self.count)

    def state(self) -> dict[str, Tensor | int]:
        return {"count": self.count, "rows": self.rows, "mean": self.mean}


class _Variance:
    """Mean and sum of squared deviations [D] of a sample, in float64."""

    def __init__(self, count: int, mean: Tensor, squares: Tensor):
        self.count, self.mean, self.squares = count, mean, squares

    @classmethod
    def of(cls, x: Tensor):
        x = x.double()
        mean = x.mean(0)
        return cls(len(x), mean, (x - mean).square().sum(0))

    def merge(self, other: "_Variance") -> None:
        shift, share = other.mean - self.mean, other.count / (self.count + other.count)
        self.mean = self.mean + share * shift
        self.squares = self.squares + other.squares + self.count * share * shift.square()
        self.count += other.count

    def state(self) -> dict[str, Tensor | int]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}


S = TypeVar("S", bound="_Streaming")


class _Streaming:
    """What the metrics below have in common. `update` says what a batch must be.

    samples: {"fake": ..., "real": ...}, those of which there is anything. kind: D, dtype and device of every batch.
    """

    _sample: type = _Rows
    _sides = ("fake", "real")

    def __init__(self):
        self._samples, self._kind = {}, None

    def __repr__(self) -> str:
        fakes, reals = self.counts
        return f"{type(self).__name__}({fakes} fake, {reals} real samples)"

    @property
    def counts(self) -> tuple[int, int]:
        """Fake and real samples seen."""
        fake, real = (self._samples[side].count if side in self._samples else 0 for side in ("fake", "real"))
        return fake, real

    def update(self, features: Array, real: bool) -> None:
        """Adds a batch: features [B >= 1, D] of reals (real=True) or of fakes, tensor or array.

        The first batch of either fixes D, dtype (float64, or float32 for all else) and device; ValueError for a batch
        of others, and for NaN and inf. The batch itself is not referenced after.
        """
        if not isinstance(real, bool):
            raise TypeError(f"real must be True or False, not {type(real).__name__}")
        x = as_features(features, "features")
        self._check_kind((x.shape[1], x.dtype, x.device))
        self._add("real" if real else "fake", self._sample.of(x))

    def _check_kind(self, kind: tuple) -> None:
        self._kind = self._kind or kind
        for word, got, expected in zip(("dimensions", "dtype", "device"), kind, self._kind, strict=True):
            if got != expected:
                raise ValueError(f"every batch must have the {word} of the first, {expected}, got {got}")

    def _add(self, side: str, sample) -> None:
        if side not in self._sides:
            return
        if side in self._samples:
            self._samples[side].merge(sample)
        else:
            self._samples[side] = sample

    def _ready(self, least: int = 2) -> list:
        counts = dict(zip(("fake", "real"), self.counts, strict=True))
        if any(counts[side] < least for side in self._sides):
            seen = " and ".join(f"{counts[side]} {side}" for side in self._sides)
            each = " of each" if len(self._sides) > 1 else ""
            raise ValueError(f"{type(self).__name__} has seen {seen} samples, it needs at least {least}{each}")
        return [self._samples[side] for side in self._sides]

    def merge(self, other: "_Streaming") -> None:
        """Adds what another of the same class has seen, for example in another process."""
        if type(other) is not type(self):
            raise TypeError(f"{type(self).__name__} cannot merge {type(other).__name__}")
        if other._kind is not None:
            self._check_kind(other._kind)
        for side, sample in other._samples.items():
            self._add(side, self._sample(**sample.state()))

    def reset(self, keep_real: bool = False) -> None:
        """Forgets all samples. With keep_real it keeps the reals, for a training run whose reals stay the same."""
        self._samples = {side: sample for side, sample in self._samples.items() if keep_real and side == "real"}
        self._kind = self._kind if self._samples else None

    def to(self: S, device: str | torch.device) -> S:
        """Moves what is kept to a device, in place; returns itself. Later batches must be there."""
        self.load_state_dict(_moved(self.state_dict(), device))
        return self

    def state_dict(self) -> dict:
        """Tensors, numbers and strings that `torch.save` writes and `torch.load(weights_only=True)` reads; not the
        options of the class."""
        state: dict[str, Any] = {"metric": type(self).__name__}
        if self._kind is not None:
            D, dtype, device = self._kind
            state["like"] = torch.empty(0, D, dtype=dtype, device=device)
        return state | {side: sample.state() for side, sample in self._samples.items()}

    def load_state_dict(self, state: dict) -> None:
        """Replaces all that was seen. ValueError for the state of another class, or one that is incomplete."""
        name = type(self).__name__
        if state.get("metric") != name:
            raise ValueError(f"expected a state of {name}, got one of {state.get('metric')}")
        try:
            samples = {side: self._sample(**state[side]) for side in self._sides if side in state}
            like = state["like"] if samples else state.get("like")
        except (TypeError, KeyError) as error:
            raise ValueError(f"this state of {name} is not whole: {error}") from error
        self._samples = samples
        self._kind = None if like is None else (like.shape[1], like.dtype, like.device)


def _moved(value, device):
    if isinstance(value, dict):
        return {key: _moved(entry, device) for key, entry in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


class FID(_Streaming):
    """`fid` of batches. No features are kept but the mean and a root of the covariance, at most [2D, D] in float64.

    Equal to `fid` of all features to rounding, also of fewer samples than dimensions.
    """

    _sample = _Root

    def compute(self) -> float:
        """FID of what was seen; ValueError before 2 samples of each. `fid` says what warns."""
        fake, real = self._ready()
        return frechet_distance(fake.normal(), real.normal(), ("fake", "real"))

    def statistics(self, real: bool) -> FeatureStatistics:
        """The statistics of the reals or of the fakes seen, to save or to compare; ValueError before 2 samples."""
        side = "real" if real else "fake"
        count = self.counts[real]
        if count < 2:
            raise ValueError(f"FID has seen {count} {side} samples, statistics need at least 2")
        return FeatureStatistics.of_normal(self._samples[side].normal())


class KID(_Streaming):
    """`kid` of batches, with its options. All features are kept, as float32 unless they come as float64."""

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0):
        super().__init__()
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> tuple[float, float]:
        """Mean and deviation over subsets of what was seen; ValueError before 2 samples of each."""
        fake, real = self._ready()
        return kid(fake.rows, real.rows, self.subsets, self.subset_size, self.seed)


class KMMD(_Streaming):
    """`kmmd` of batches, with its option. All features are kept, as float32 unless they come as float64."""

    def __init__(self, sigma: float = 1.0):
        super().__init__()
        self.sigma = sigma

    def compute(self) -> float:
        """KMMD of what was seen; ValueError before 2 samples of each."""
        fake, real = self._ready()
        return kmmd(fake.rows, real.rows, self.sigma)


class PrecisionRecall(_Streaming):
    """`precision_recall` of batches, with its option. All features are kept, as float32 unless they come as float64."""

    def __init__(self, k: int = 3):
        super().__init__()
        self.k = k

    def compute(self) -> tuple[float, float]:
        """Precision and recall of what was seen; ValueError before k + 1 samples of each."""
        fake, real = self._ready(self.k + 1)
        return precision_recall(fake.rows, real.rows, self.k)


class MeanVariance(_Streaming):
    """`mean_variance` of batches of fakes. Two float64 vectors [D] are kept."""

    _sample = _Variance
    _sides = ("fake",)

    def update(self, features: Array, real: bool = False) -> None:
        """Adds a batch, features [B >= 1, D]; reals are checked, as every metric checks them, and not counted."""
        super().update(features, real)

    def compute(self) -> float:
        """Mean variance of what was seen; ValueError before 2 samples."""
        (fake,) = self._ready()
        return float((fake.squares / (fake.count - 1)).mean())
