"""What mmd2 is held against: every pair, one by one, in float64."""

import numpy as np
import torch

KERNELS = ["gaussian", "laplacian", "polynomial", "energy"]


def sample(n, d, seed=0, shift=0.0, dtype=torch.float64):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift).to(dtype)


def brute_kernel(kernel, p, q, sigma):
    difference = p - q
    if kernel == "gaussian":
        return np.exp(-(difference**2).sum() / (2 * sigma**2))
    if kernel == "laplacian":
        return np.exp(-np.abs(difference).sum() / sigma)
    if kernel == "polynomial":
        return (np.dot(p, q) / len(p) + 1) ** 3
    return -np.sqrt((difference**2).sum())


def brute_median(z, order):
    return np.median([np.linalg.norm(z[i] - z[j], ord=order) for i in range(len(z)) for j in range(i + 1, len(z))])


def brute_mmd2(x, y, kernel, bandwidth, unbiased):
    x, y = x.double().numpy(), y.double().numpy()
    if bandwidth is None:
        bandwidth = brute_median(np.concatenate([x, y]), 1 if kernel == "laplacian" else 2)
    values = []
    for sigma in np.atleast_1d(bandwidth):
        means = [
            np.mean([brute_kernel(kernel, p, q, sigma) for i, p in enumerate(z) for j, q in enumerate(z) if i != j])
            if unbiased
            else np.mean([brute_kernel(kernel, p, q, sigma) for p in z for q in z])
            for z in (x, y)
        ]
        cross = np.mean([brute_kernel(kernel, p, q, sigma) for p in x for q in y])
        values.append(means[0] + means[1] - 2 * cross)
    return np.mean(values)
