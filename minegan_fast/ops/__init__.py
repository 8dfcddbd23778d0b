"""What is computed: one file an op, each with its equations, reference, gradients, checks and backends."""

from ._op import BackendUnavailable, backend_report, backends, use_backend
from .bias_act import bias_act

__all__ = ["BackendUnavailable", "backend_report", "backends", "bias_act", "use_backend"]
