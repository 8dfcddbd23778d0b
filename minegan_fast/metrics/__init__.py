"""Metrics of generated images.

Functions take features [N, D], x of the fakes and y of the reals, tensors or arrays, and give floats. Their classes in
capitals take the same features batch by batch. `intra_cluster_diversity` takes images and a perceptual distance.

A number that too few samples make meaningless comes with one UserWarning that says why.
"""

from .bootstrap import bootstrap
from .clusters import IntraClusterDiversity, intra_cluster_diversity
from .features import FeatureExtractor
from .frechet import FeatureStatistics, fid
from .kernel import kid, kmmd
from .manifold import precision_recall
from .spread import diversity, mean_variance, nearest
from .streaming import FID, KID, KMMD, MeanVariance, PrecisionRecall

__all__ = [
    "FID",
    "KID",
    "KMMD",
    "FeatureExtractor",
    "FeatureStatistics",
    "IntraClusterDiversity",
    "MeanVariance",
    "PrecisionRecall",
    "bootstrap",
    "diversity",
    "fid",
    "intra_cluster_diversity",
    "kid",
    "kmmd",
    "mean_variance",
    "nearest",
    "precision_recall",
]
