"""Settings of both classes in one call."""

from sfpk_kernels.compat.fields import separated


def both(make, *values, **fields):
    """``config`` and ``execution`` for prune and the others; ``make`` makes the config."""
    method, execution = separated(fields)
    return {"config": make(*values, **method), "execution": execution}
