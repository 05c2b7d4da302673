"""sfpk_kernels: exact mask kernels for PyTorch, and SFPK one-shot pruning on top of them."""

from . import _supported  # noqa: F401 - first: it refuses what the others cannot run with

# isort: split
from . import baselines, ops
from ._version import __version__
from .batches import default_loss
from .batchnorm import recalibrate_batchnorm
from .config import SFPKConfig
from .coordinates import Coordinates
from .dense_files import load_exported
from .exporting import ExportReport, export
from .gradual import GradualPruner, GradualResult
from .masks import MaskSet
from .planning import Plan, plan
from .pruner import SFPKPruner, prune
from .records import StepRecord
from .result import PruneResult
from .retraining import RetrainConfig, retrain

__all__ = [
    "Coordinates",
    "ExportReport",
    "GradualPruner",
    "GradualResult",
    "MaskSet",
    "Plan",
    "PruneResult",
    "RetrainConfig",
    "SFPKConfig",
    "SFPKPruner",
    "StepRecord",
    "__version__",
    "baselines",
    "default_loss",
    "export",
    "load_exported",
    "ops",
    "plan",
    "prune",
    "recalibrate_batchnorm",
    "retrain",
]
