"""sfpk_kernels: exact mask kernels for PyTorch, and SFPK one-shot pruning on top of them."""

from . import _supported  # noqa: F401 - first: it refuses what the others cannot run with

# isort: split
from . import baselines, ops
from ._version import __version__
from .config import SFPKConfig
from .coordinates.flat import Coordinates
from .execution import Execution
from .export.export import ExportReport, export
from .export.loading import load_exported
from .export.measure import Latency
from .export.semi_structured import SemiStructured, to_semi_structured
from .masks.maskset import MaskSet
from .modeling.batches import default_loss
from .modeling.batchnorm import recalibrate_batchnorm
from .retraining.finetune import FinetuneResult, finetune_masked
from .retraining.gradual import GradualPruner
from .retraining.layer_repair import LayerRepair
from .retraining.loop import RetrainConfig, retrain
from .retraining.repair import RepairResult, repair
from .retraining.shots import GradualResult
from .retraining.structured_shots import StructuredGradualResult
from .search.planning import Plan, plan
from .search.prune import prune
from .search.pruner import SFPKPruner
from .search.records import StepRecord
from .search.result import PruneResult
from .search.structured.result import StructuredResult

__all__ = [
    "Coordinates",
    "Execution",
    "ExportReport",
    "FinetuneResult",
    "GradualPruner",
    "GradualResult",
    "Latency",
    "LayerRepair",
    "MaskSet",
    "Plan",
    "PruneResult",
    "RepairResult",
    "RetrainConfig",
    "SFPKConfig",
    "SFPKPruner",
    "SemiStructured",
    "StepRecord",
    "StructuredGradualResult",
    "StructuredResult",
    "__version__",
    "baselines",
    "default_loss",
    "export",
    "finetune_masked",
    "load_exported",
    "ops",
    "plan",
    "prune",
    "recalibrate_batchnorm",
    "repair",
    "retrain",
    "to_semi_structured",
]
