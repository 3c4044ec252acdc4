"""dist_train: kill anything at any instant, run the same command, and get the run that never died.

The public names are imported when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_train.checkpoint.dcp_reader import StorageReader
    from dist_train.checkpoint.dcp_writer import StorageWriter
    from dist_train.checkpoint.inference import load_model
    from dist_train.checkpoint.policy import CheckpointPolicy
    from dist_train.data import data_loader, evaluation_loader
    from dist_train.drill.fault_plan import FaultPlan
    from dist_train.errors import DistTrainError, ExitCode, StopReason
    from dist_train.health.policy import HealthPolicy
    from dist_train.history import read_metrics
    from dist_train.metrics import MAE, SMAPE, Accuracy, EarlyStopping, Mean, Metric
    from dist_train.options import RunOptions
    from dist_train.run import Run
    from dist_train.trainer import TrainConfig, Trainer, TrainResult, seed_everything
    from dist_train.world import init_distributed

__version__ = "0.1.0"

_HOMES = {
    "Accuracy": "metrics",
    "CheckpointPolicy": "checkpoint.policy",
    "DistTrainError": "errors",
    "EarlyStopping": "metrics",
    "ExitCode": "errors",
    "FaultPlan": "drill.fault_plan",
    "HealthPolicy": "health.policy",
    "MAE": "metrics",
    "Mean": "metrics",
    "Metric": "metrics",
    "Run": "run",
    "RunOptions": "options",
    "SMAPE": "metrics",
    "StopReason": "errors",
    "StorageReader": "checkpoint.dcp_reader",
    "StorageWriter": "checkpoint.dcp_writer",
    "TrainConfig": "trainer",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "data_loader": "data",
    "evaluation_loader": "data",
    "init_distributed": "world",
    "load_model": "checkpoint.inference",
    "read_metrics": "history",
    "seed_everything": "trainer",
}
__all__ = [
    "MAE",
    "SMAPE",
    "Accuracy",
    "CheckpointPolicy",
    "DistTrainError",
    "EarlyStopping",
    "ExitCode",
    "FaultPlan",
    "HealthPolicy",
    "Mean",
    "Metric",
    "Run",
    "RunOptions",
    "StopReason",
    "StorageReader",
    "StorageWriter",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "data_loader",
    "evaluation_loader",
    "init_distributed",
    "load_model",
    "read_metrics",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dist_train' has no attribute {name!r}")
    return getattr(import_module(f"dist_train.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
