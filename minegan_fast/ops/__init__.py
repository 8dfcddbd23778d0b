"""What is computed: one file an op, each with its equations, reference, gradients, checks and backends."""

from ._op import BackendUnavailable, backend_report, backends, use_backend
from ._row_table import RowTensor, write_rows
from .bias_act import bias_act
from .miner import Chain, Mapping, miner
from .minibatch_stddev import minibatch_stddev
from .mmd import mmd2
from .mmd_groups import MmdTarget, mmd_groups
from .modulated_conv2d import modulated_conv2d
from .noise_bias_act import noise_bias_act
from .penalty import interpolate
from .row_gradient import dense_is_faster, row_gradient
from .row_score import row_score
from .row_update import Hyperparameters, RowUpdate
from .transposed_conv2d import transposed_conv2d
from .upfirdn2d import upfirdn2d
from .winner import winner

__all__ = [
    "BackendUnavailable",
    "Chain",
    "Hyperparameters",
    "Mapping",
    "MmdTarget",
    "RowTensor",
    "RowUpdate",
    "backend_report",
    "backends",
    "bias_act",
    "dense_is_faster",
    "interpolate",
    "miner",
    "minibatch_stddev",
    "mmd2",
    "mmd_groups",
    "modulated_conv2d",
    "noise_bias_act",
    "row_gradient",
    "row_score",
    "transposed_conv2d",
    "upfirdn2d",
    "use_backend",
    "winner",
    "write_rows",
]
