"""Settings of both classes in one call."""

from sfpk_kernels import SFPKConfig
from sfpk_kernels.compat.fields import separated


def both(make, *values, **fields):
    """``config`` and ``execution`` for prune and the others; ``make`` makes the config."""
    method, execution = separated(fields)
    return {"config": make(*values, **method), "execution": execution}


def population(sparsity, **fields):
    """Of several particles moved by the radius: what is not said of the method is that of this preset."""
    return SFPKConfig.preset("population", sparsity=sparsity, **fields)
