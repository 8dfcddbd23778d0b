"""Metrics of generated images on features [N, D], x of the fakes, y of the reals: tensors or arrays in, floats out."""

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
