"""The recipe: data, augmentation, losses, the two stages, snapshots and evaluation."""

from .config import TransferConfig, load_config
from .estimate import DoesNotFit
from .recipe import dry_run, transfer
from .run import TrainingDiverged, TransferResult

__all__ = ["DoesNotFit", "TrainingDiverged", "TransferConfig", "TransferResult", "dry_run", "load_config", "transfer"]
