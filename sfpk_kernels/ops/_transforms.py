"""The ops under autograd, forward-mode derivatives, torch.func and vmap.

``torch.library.register_autograd`` knows plain backward passes only: under ``torch.func.grad`` an op with such a
formula fails, and forward-mode derivatives pass through it as zeros. Where such a transform is active, a differentiable
op is therefore called inside a :class:`torch.autograd.Function` that knows them all, and otherwise directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree

from ._named import argument_tuple


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active (and is not being compiled)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or getattr(forward_ad, "_current_level", -1) >= 0


def is_tracked(tensor: Tensor) -> bool:
    """Whether derivatives by this tensor are being recorded."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", -1) < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def refuse_derivatives(op: str, what: str, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raises where derivatives by one of the named tensors are being recorded, but ``what`` has none."""
    for name, tensor in tensors:
        if tensor is not None and is_tracked(tensor):
            raise ValueError(
                f"{op}: {name}: wanted a tensor without gradient, as {what}, got one that records it: call detach() on "
                "it, or the op under torch.no_grad()"
            )


class Formula:
    """A registered op and its derivatives. Results are always a list of tensors.

    A call is a named tuple of the op's arguments; what belongs to each of them (tangents, whether a gradient is wanted,
    batched dimensions) comes as such a tuple as well.
    """

    def __init__(
        self,
        op: str,  # "sfpk::name", defined
        # (call, gradients by the results, whether one is wanted of each argument) → gradients by the arguments' names
        backward: Callable[[Any, list[Tensor], Any], dict[str, Any]],
        # (call, tangents of its arguments or None) → tangents of the results
        tangents: Callable[[Any, Any], list[Tensor]],
        # (call, the batched dimension of each argument or None, batch size) → results, batched along 0; None for one by
        # one
        batch: Callable[[Any, Any, int], list[Tensor] | None],
    ) -> None:
        self.name, self.backward, self.tangents, self.batch = op, backward, tangents, batch
        self.bind = argument_tuple(op)
        self.op = getattr(torch.ops.sfpk, op.removeprefix("sfpk::"))

    def __call__(self, *arguments: Any, **named: Any) -> list[Tensor]:
        """The op's results, differentiable by whichever route is open."""
        if not transformed():
            return _listed(self.op(*arguments, **named))
        given = self.bind(*arguments, **named)
        call = _Call(self, given)
        return list(_Transformed.apply(call, *call.tensors(given)))

    def like(self, call: Any, **changes: Any) -> list[Tensor]:
        """Called with the arguments of ``call``, perhaps another op's, that it knows by name; some changed or added."""
        return self(**{name: getattr(call, name) for name in self.bind._fields if hasattr(call, name)} | changes)

    def ordered(self, call: Any, gradients: dict[str, Any]) -> list[Any]:
        """Gradients in the order of the arguments, a list for each list of tensors."""
        return [
            gradients.get(name) or [None] * len(a) if _is_tensors(a) else gradients.get(name)
            for name, a in zip(self.bind._fields, call, strict=True)
        ]

    def register(self) -> None:
        """Plain backward passes, by torch.library."""

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            call = self.bind(*inputs)
            ctx.call = _Call(self, call)
            ctx.save_for_backward(*savable(ctx.call.tensors(call)))
            ctx.results = [(r.shape, r.dtype, r.device) for r in _listed(output)]

        def backward(ctx: Any, grads: Any) -> tuple[Any, ...]:
            call = ctx.call.filled(ctx.saved_tensors)
            wanted = self.bind(*(
                [t.requires_grad for t in a] if _is_tensors(a) else isinstance(a, Tensor) and a.requires_grad
                for a in call
            ))  # fmt: skip
            gradients = self.ordered(call, self.backward(call, _materialized(ctx, grads), wanted))
            # torch takes an empty list of numbers for one of tensors, and leaves out trailing defaults.
            returned = tuple([] if isinstance(a, list) and not a else g for a, g in zip(call, gradients, strict=True))
            return returned[: len(ctx.needs_input_grad)]

        torch.library.register_autograd(self.name, backward, setup_context=setup_context)


@dataclass(frozen=True)
class _Call:
    """The arguments of a call but for its tensors."""

    formula: Formula
    arguments: Sequence[Any]

    def __post_init__(self) -> None:
        kept = [len(a) if _is_tensors(a) else 1 if isinstance(a, Tensor) else 0 for a in self.arguments]
        statics = [None if isinstance(a, Tensor) or _is_tensors(a) else a for a in self.arguments]
        lists = [_is_tensors(a) for a in self.arguments]
        object.__setattr__(self, "arguments", list(zip(kept, lists, statics, strict=True)))

    @staticmethod
    def tensors(arguments: Sequence[Any]) -> list[Tensor]:
        return [t for a in arguments for t in (a if _is_tensors(a) else [a] if isinstance(a, Tensor) else [])]

    def filled(self, values: Sequence[Any], *, statics: bool = True) -> Any:
        """The arguments with ``values`` for the tensors, None for the rest unless ``statics``; a named tuple."""
        left: Iterator[Any] = iter(values)
        return self.formula.bind(*(
            [next(left) for _ in range(count)] if is_list else next(left) if count else static if statics else None
            for count, is_list, static in self.arguments
        ))  # fmt: skip


class _Transformed(torch.autograd.Function):
    """A :class:`Formula` as torch.func wants it."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_listed(call.formula.op(*call.filled(tensors))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*savable(tensors))
        ctx.save_for_forward(*savable(tensors))
        ctx.set_materialize_grads(False)
        ctx.results = [(r.shape, r.dtype, r.device) for r in output]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        formula, call = ctx.call.formula, ctx.call.filled(ctx.saved_tensors)
        wanted = ctx.call.filled(ctx.needs_input_grad[1:], statics=False)
        gradients = formula.ordered(call, formula.backward(call, _materialized(ctx, grads), wanted))
        flat: list[Any] = [None]
        for argument, gradient in zip(call, gradients, strict=True):
            if _is_tensors(argument):
                flat += gradient
            elif isinstance(argument, Tensor):
                flat.append(gradient)
        return tuple(flat)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        arguments = ctx.call.filled(ctx.saved_tensors)
        return tuple(ctx.call.formula.tangents(arguments, ctx.call.filled(tangents, statics=False)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: _Call, *tensors: Tensor) -> tuple[Any, Any]:
        arguments, dims = call.filled(tensors), call.filled(in_dims[1:], statics=False)
        results = call.formula.batch(arguments, dims, info.batch_size)
        if results is None:
            results = one_by_one(call.formula, arguments, dims, info.batch_size)
        return tuple(results), (0,) * len(results)


def one_by_one(function: Callable[..., Any], arguments: Sequence[Any], dims: Sequence[Any], count: int) -> list[Tensor]:
    """The results of ``count`` calls, stacked."""

    def entry(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, list | tuple):
            return [entry(v, d, i) for v, d in zip(value, dim or [None] * len(value), strict=True)]
        return value if dim is None else value.select(dim, i)

    calls = [_listed(function(*map(entry, arguments, dims, [i] * len(arguments)))) for i in range(count)]
    return [torch.stack(results) for results in zip(*calls, strict=True)]


def register_vmap(name: str, op: Callable[..., Any], *, mutated: dict[int, str] | None = None) -> None:
    """vmap of an op without derivatives, one call per entry; ``mutated``: which arguments it changes in place."""

    def rule(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        for i, argument in (mutated or {}).items():
            if arguments[i] is not None and dims[i] is None:
                raise ValueError(
                    f"{name.removeprefix('sfpk::')}: {argument}: wanted it batched under vmap like the others, as "
                    "it is changed in place, got one for the whole batch"
                )
        out: list[Any] = []

        def run(*entry: Any) -> list[Tensor]:
            out[:] = [op(*entry)]
            return _listed(out[0])

        results = one_by_one(run, arguments, dims, info.batch_size)
        whole = _pytree.tree_unflatten(results, _pytree.tree_structure(out[0]))
        return whole, _pytree.tree_map(lambda _: 0, whole)

    torch.library.register_vmap(name, rule)


def detached(tensors: Any) -> Any:
    """A tensor or a list of them without their gradients; None stays None."""
    if isinstance(tensors, list):
        return [t.detach() for t in tensors]
    return tensors if tensors is None else tensors.detach()


def underived(result: Tensor, message: str, inputs: Sequence[Tensor]) -> Tensor:
    """``result`` as it is; asking for a derivative of it by one of the inputs raises with ``message``."""
    done: Tensor = _Underived.apply(result, message, *inputs)
    return done


class _Underived(torch.autograd.Function):
    """See :func:`underived`."""

    @staticmethod
    def forward(result: Tensor, message: str, *inputs: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.message, *rest = inputs
        ctx.count = len(rest)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:
        if grad is not None:
            raise NotImplementedError(ctx.message)
        return (None,) * (2 + ctx.count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], result: Tensor, message: str, *inputs: Tensor) -> tuple[Tensor, Any]:
        return underived(result, message, inputs), in_dims[0]


def savable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that autograd may keep: those made under inference mode are copied."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return list(tensors)
    return [t.clone() if t.is_inference() else t for t in tensors]


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], Tensor)


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _materialized(ctx: Any, grads: Any) -> list[Tensor]:
    given = [grads] if grads is None or isinstance(grads, Tensor) else grads
    return [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(given, ctx.results, strict=True)
    ]
