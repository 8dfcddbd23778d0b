"""Metrics of generated images on features [N, D], x of the fakes, y of the reals: tensors or arrays in, floats out."""

from .bootstrap import bootstrap
from .clusters import IntraClusterDiversity, intra_cluster_diversity
from .features import FeatureExtractor
from .frechet import FeatureStatistics, fid
from .kernel import kid, kmmd
from .manifold import precision_recall
from .spread import diversity, mean_variance, nearest

__all__ = [
    "FeatureExtractor",
    "FeatureStatistics",
    "IntraClusterDiversity",
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
