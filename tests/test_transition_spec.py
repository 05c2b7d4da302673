"""The arguments of the transition stand once: schemas, spec and backends know them by the same names."""

import inspect

import pytest
import torch

from sfpk_kernels.ops import transition, transition_
from sfpk_kernels.ops._named import argument_names, by_name, schema_of
from sfpk_kernels.ops.transition import Columns, Shard, TransitionSpec, stages

STAGES = {f"transition_{stage}" for stage in stages.BACKENDS}
SCHEMA = (
    "sfpk::transition_(Tensor(a!) masks, Tensor grads, Tensor? weights, Tensor? saliency, Tensor? sizes, "
    "Tensor(b!)? residual, Tensor[] state, float step, float radius, float repulsion, str kernel, str density, "
    "float? target_density, float consensus, float eps, SymInt seed, SymInt step_index, str nonfinite, SymInt only, "
    "float? angle, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def test_the_schema():
    """Saved programs and other languages call the op by it."""
    assert str(torch.ops.sfpk.transition_.default._schema) == SCHEMA


def test_the_public_function_takes_what_the_spec_holds():
    """Under the same names, with the same defaults; a row is None or a number there."""
    parameters = inspect.signature(transition_).parameters
    for part in (Columns, TransitionSpec):
        for name in part._fields:
            public = "row" if name == "only" else name
            default = part._field_defaults.get(name, inspect.Parameter.empty)
            assert parameters[public].default == (None if name == "only" else default), name
    rest = set(parameters) - {*Columns._fields, *TransitionSpec._fields}
    assert rest == {"masks", "grads", "state", "residual", "row", "backend"}


@pytest.mark.parametrize("op", sorted({"transition_", *STAGES}))
def test_schemas_hold_the_parts_whole(op):
    names = argument_names(f"sfpk::{op}")
    for part in (Columns, TransitionSpec, Shard):
        found = [name for name in names if name in part._fields]
        assert found in ([], list(part._fields))


def test_backends_take_the_same_arguments():
    for backends in (transition.BACKENDS, *stages.BACKENDS.values()):
        signatures = [list(inspect.signature(backend.run).parameters) for backend in backends.values()]
        assert all(names == signatures[0] for names in signatures)


def test_the_parts_as_schema():
    assert schema_of(Shard) == "SymInt d, Tensor? total, SymInt first_column"
    assert schema_of(Columns) == "Tensor? weights, Tensor? saliency, Tensor? sizes"


def test_arguments_are_bound_by_name():
    names = argument_names("sfpk::transition_")
    given = by_name("sfpk::transition_", lambda arguments: arguments)(*range(5), **dict.fromkeys(names[5:], 0))
    assert given._fields == names
    assert (given.masks, given.grads, given.weights, given.sizes, given.backend) == (0, 1, 2, 4, 0)
    with pytest.raises(TypeError, match="backend"):
        by_name("sfpk::transition_", lambda arguments: arguments)(*range(len(names) - 1))
