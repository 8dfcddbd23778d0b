"""How good is what a run makes: features of its images against those of images that it has not seen."""

import statistics
import warnings

import torch
from torch import Tensor

from minegan_fast import metrics

LEVEL = 0.95


def measure(fake: Tensor, train: Tensor, validation: Tensor, test: Tensor) -> dict:
    """Features [N, D] each. kid: against `test`, with its interval; kid_train, kid_validation; precision and recall;
    nearest: median distance to the closest training image, in that of the real images in `test`; diversity: mean
    distance between two images, in that of real ones.
    """
    equal = min(len(fake), len(test))  # precision and recall depend on the numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of few images: the interval says it
        precision, recall = metrics.precision_recall(fake[:equal], test[:equal])
    value, low, high = kid(fake, test)
    own, real = (metrics.nearest(x, train)[0].median() for x in (fake, test))
    return {
        "kid": value, "kid_low": low, "kid_high": high, "kid_train": kid(fake, train)[0],
        "kid_validation": kid(fake, validation)[0], "precision": precision, "recall": recall,
        "nearest": float(own / real), "diversity": metrics.diversity(fake) / metrics.diversity(test),
    }  # fmt: skip


def kid(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """KID of all pairs, and the ends of its jackknife interval (`metrics.bootstrap` has the definition).

    x [N, D], y [M, D], N, M >= 3. Every value with one row left out follows from the kernel's row sums, which is why
    this is not `metrics.bootstrap` of `mmd2`: that computes N + M distances.
    """
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    rows, columns = (k.fill_diagonal_(0).sum(1) for k in (xx, yy))
    across, back = xy.sum(1), xy.sum(0)
    xx, yy, xy = rows.sum(), columns.sum(), across.sum()

    def distance(xx, yy, xy, n, m):
        return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)

    value = float(distance(xx, yy, xy, n, m))
    without_x = distance(xx - 2 * rows, yy, xy - across, n - 1, m)
    without_y = distance(xx, yy - 2 * columns, xy - back, n, m - 1)
    variance = sum((len(v) - 1) * float(v.var(correction=0)) for v in (without_x, without_y))
    width = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2) * variance**0.5
    return value, value - width, value + width


def found_class(mined, label: int, samples: int = 1000) -> dict:
    """Whether a class miner has found a label: the mean of its embeddings is closest to that label's; `share`: of how
    many of its embeddings that is true. With one-hot embeddings the closest is the largest entry."""
    with torch.no_grad():
        u = torch.randn(samples, mined.input_dim, generator=torch.Generator().manual_seed(5))
        embeddings = mined.class_miner(u)
    share = (embeddings.argmax(1) == label).float().mean()
    return {"label": label, "found": int(embeddings.mean(0).argmax()) == label, "share": float(share)}
