"""Frechet distance between two sets of features."""

import warnings

import torch

from ._inputs import as_pair


def fid(x, y) -> float:
    """Frechet distance of two normal distributions fitted to the features: FID, for Inception features.

    |mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), S the unbiased covariances, in float64.
    x [N, D], y [M, D]: features of the fakes and of the reals, N, M >= 2.

    With centred rows X, Y the trace of the root is the sum of the singular values of X Y^T / sqrt((N-1)(M-1)), taken
    from the QR factors where there are more rows than dimensions. So a singular covariance needs no regularisation and
    no error of sqrt(machine epsilon) is made, as roots of its zero eigenvalues would make. A sample with
    N <= D warns: its covariance has at most rank N-1, which biases the distance upwards; kid and kmmd are unbiased.
    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017.
    """
    x, y = as_pair(x, y, least=2)
    D = x.shape[1]
    few = " and ".join(f"{name} has {len(z)} samples" for name, z in (("x", x), ("y", y)) if len(z) <= D)
    if few:
        warnings.warn(
            f"{few} for {D} dimensions: the covariance is rank-deficient and FID is biased upwards; "
            f"compare only equal sample sizes, or use kid or kmmd",
            stacklevel=2,
        )
    means = [z.mean(0) for z in (x, y)]
    roots = [(z - mean) / (len(z) - 1) ** 0.5 for z, mean in zip((x, y), means, strict=True)]
    variance = sum(root.square().sum() for root in roots)
    a, b = (torch.linalg.qr(root, mode="r").R if len(root) > D else root for root in roots)
    fidelity = torch.linalg.svdvals(a @ b.T).sum()
    # The distance cannot be negative, its rounding can.
    return max(0.0, float((means[0] - means[1]).square().sum() + variance - 2 * fidelity))
