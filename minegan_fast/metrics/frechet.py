"""Frechet distance between two sets of features, or between what is kept of them."""

import math
import os
import warnings
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files.atomic import atomic_path
from ._inputs import Array, as_features, as_tensor

_ASYMMETRY = 1e-5  # of the largest entry; files made in float32 have about 1e-7
_INFLATED = 1100  # how many times its packed size a member of a zip file may be: no more can be packed
_NEGATIVE = 1e-3  # of the largest eigenvalue; rounding makes no eigenvalue more negative than that


class Normal(NamedTuple):
    """A fitted normal distribution: mean [D], a root R [r, D] of the covariance R^T R, the samples it was fitted to."""

    mean: Tensor
    root: Tensor
    count: int | None


def _bounded(file, name: str) -> np.ndarray:
    """An array of an .npz file. ValueError: its header or the archive announces more than the file could hold."""
    entry = file.zip.getinfo(f"{name}.npy")
    if entry.file_size > _INFLATED * max(entry.compress_size, 1):
        raise ValueError(f"{name} is said to be {entry.file_size} bytes, packed into {entry.compress_size}")
    with file.zip.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ValueError(f"{name} is said to have the shape {list(shape)}, and the file holds {entry.file_size} bytes")
    return file[name]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean [D], unbiased covariance [D, D] and number of samples of a set of features: all that `fid` needs of it.

    mean, covariance: tensors or arrays, floating point; kept as float64 tensors. count: None where it is not known, as
    in the files of other projects; then `fid` cannot warn of too few samples.
    Raises TypeError or ValueError for other dtypes and shapes, NaN, inf, and matrices that are no covariance.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    def __post_init__(self):
        mean, covariance = as_tensor(self.mean, "mean"), as_tensor(self.covariance, "covariance")
        for name, value in (("mean", mean), ("covariance", covariance)):
            if not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, not {value.dtype}")
        D = mean.numel()
        if mean.shape != (D,) or D == 0 or covariance.shape != (D, D):
            raise ValueError(
                f"expected a mean [D] and a covariance [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
            )
        if mean.device != covariance.device:
            raise ValueError(
                f"mean and covariance must be on the same device, got {mean.device} and {covariance.device}"
            )
        for name, value in (("mean", mean), ("covariance", covariance)):
            if not value.isfinite().all():
                raise ValueError(f"{name} holds NaN or inf")
        if self.count is not None and self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got count {self.count}")
        mean, covariance = mean.detach().double(), covariance.detach().double()
        if (covariance - covariance.T).abs().max() > _ASYMMETRY * covariance.abs().max():
            raise ValueError("covariance is not symmetric")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", (covariance + covariance.T) / 2)
        object.__setattr__(self, "count", None if self.count is None else int(self.count))

    @classmethod
    def of(cls, x: Array) -> "FeatureStatistics":
        """The statistics of features x [N >= 2, D]."""
        return cls.of_normal(normal_of(x, "x"))

    @classmethod
    def of_normal(cls, normal: Normal) -> "FeatureStatistics":
        return cls(normal.mean, normal.root.T @ normal.root, normal.count)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureStatistics":
        """Reads an .npz file with `mu` and `sigma`, as pytorch-fid writes it, and `count` where `save` wrote it.

        Such numbers mean something only against features of the very network and image range that made the file.
        ValueError where the file holds anything else; a pickle within is never opened.
        """
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise ValueError(f"no file {path}: expected an .npz file of statistics")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not an .npz file")
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = [key for key in ("mu", "sigma") if key not in file.files]
                if missing:
                    raise ValueError(f"it has no {' and no '.join(missing)}; it holds {', '.join(file.files)}")
                mu, sigma = (as_tensor(_bounded(file, name), name) for name in ("mu", "sigma"))
                return cls(mu, sigma, int(_bounded(file, "count")) if "count" in file.files else None)
        except Exception as error:  # a damaged archive can raise anything
            raise ValueError(f"{path}: {(str(error) or type(error).__name__).splitlines()[0]}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file that `load` and pytorch-fid read: `mu`, `sigma`, and `count` where it is known."""
        mu, sigma = self.mean.cpu().numpy(), self.covariance.cpu().numpy()
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            if self.count is None:
                np.savez(file, mu=mu, sigma=sigma)
            else:
                np.savez(file, mu=mu, sigma=sigma, count=np.int64(self.count))

    def to(self, device: str | torch.device) -> "FeatureStatistics":
        return FeatureStatistics(self.mean.to(device), self.covariance.to(device), self.count)

    def normal(self) -> Normal:
        values, vectors = torch.linalg.eigh(self.covariance)
        if -values[0] > _NEGATIVE * values[-1]:
            raise ValueError(
                f"covariance has eigenvalues from {float(values[0]):.4g} to {float(values[-1]):.4g}: it is not one"
            )
        # Rounding turns eigenvalues of 0 into small numbers, whose roots would count.
        D = len(values)
        values = torch.where(values > D * torch.finfo(values.dtype).eps * values[-1], values, 0.0)
        rank = D if self.count is None else min(D, self.count - 1)
        return Normal(self.mean, (vectors * values.sqrt())[:, -rank:].T, self.count)


def normal_of(x: Array, name: str) -> Normal:
    x = as_features(x, name, 2, torch.float64)
    mean = x.mean(0)
    root = (x - mean) / (len(x) - 1) ** 0.5
    return Normal(mean, root, len(x))


def frechet_distance(x: Normal, y: Normal, names: tuple[str, str], stacklevel: int = 3) -> float:
    D = len(x.mean)
    named = list(zip(names, (x, y), strict=True))
    few = " and ".join(f"{name} has {z.count} samples" for name, z in named if z.count is not None and z.count <= D)
    if few:
        warnings.warn(
            f"{few} for {D} dimensions: the covariance is rank-deficient and FID is biased upwards; "
            f"compare only equal sample sizes, or use kid or kmmd",
            stacklevel=stacklevel,
        )
    variance = x.root.square().sum() + y.root.square().sum()
    a, b = (torch.linalg.qr(z.root, mode="r").R if len(z.root) > D else z.root for z in (x, y))
    fidelity = torch.linalg.svdvals(a @ b.T).sum()
    # The distance cannot be negative, its rounding can.
    return max(0.0, float((x.mean - y.mean).square().sum() + variance - 2 * fidelity))


def fid(x: "Array | FeatureStatistics", y: "Array | FeatureStatistics") -> float:
    """Frechet distance of two normal distributions fitted to the features: FID, for Inception features.

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), S the unbiased covariances, in float64.
    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2; or, of either, its `FeatureStatistics`.

    With roots X^T X = S_x and Y^T Y = S_y the trace of the matrix root is the sum of the singular values of X Y^T. Of
    features the centred rows are such a root (their QR factor, where there are more rows than dimensions), so that a
    singular covariance needs no regularisation and no error of sqrt(machine epsilon) is made, as roots of its zero
    eigenvalues would make. Of statistics the root is made from the eigenvalues, without those below what float64
    resolves of the matrix and without all but the largest count - 1.
    A sample with N <= D warns: its covariance has at most rank N-1, which biases the distance upwards; kid and kmmd are
    unbiased.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017.
    """
    fake, real = (z.normal() if isinstance(z, FeatureStatistics) else normal_of(z, n) for z, n in ((x, "x"), (y, "y")))
    if len(fake.mean) != len(real.mean):
        raise ValueError(f"x and y must have the same number of dimensions, got {len(fake.mean)} and {len(real.mean)}")
    if fake.mean.device != real.mean.device:
        raise ValueError(f"x and y must be on the same device, got {fake.mean.device} and {real.mean.device}")
    return frechet_distance(fake, real, ("x", "y"))
