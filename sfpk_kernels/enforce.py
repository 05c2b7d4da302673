"""Masks that hold while a model is trained: weights set to 0 again after every optimizer step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from .coordinates import named_parameters

if TYPE_CHECKING:
    from .masks import MaskSet


class MaskedParameters:
    """Parameters with the places where their weights are removed, ready to be masked often.

    Args:
        masks: one for each of ``parameters``, at least.
        parameters: by the names of the masks, in the masks' shapes.
    """

    def __init__(self, masks: MaskSet, parameters: Mapping[str, nn.Parameter]):
        self._removed = [(parameter, (~masks[name]).to(parameter.device)) for name, parameter in parameters.items()]

    def __len__(self) -> int:
        return len(self._removed)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the removed weights to exactly 0, in place."""
        for number, (parameter, removed) in enumerate(self._removed):
            if removed.device != parameter.device:
                removed = removed.to(parameter.device)
                self._removed[number] = (parameter, removed)
            parameter.masked_fill_(removed, 0)

    @torch.no_grad()
    def mask_gradients_(self) -> None:
        """Set the gradients of the removed weights to 0, in place."""
        for parameter, removed in self._removed:
            if parameter.grad is None:
                continue
            removed = removed.to(parameter.grad.device)
            if parameter.grad.layout == torch.sparse_coo:  # of an embedding: rows by their numbers
                parameter.grad = parameter.grad.coalesce()
                parameter.grad.values().masked_fill_(removed[tuple(parameter.grad.indices())], 0)
            else:
                parameter.grad.masked_fill_(removed, 0)


class MaskEnforcer:
    """Keeps the removed weights of an optimizer's parameters at exactly 0; see :meth:`MaskSet.enforce`.

    The weights are masked when it is made and after every step of the optimizer, until :meth:`remove`: those that the
    optimizer holds at that step, also in parameter groups that were added later. A closure passed to ``step`` runs on
    masked weights, and the gradients of removed weights are 0 after it, so that optimizers that call it repeatedly
    (LBFGS) stay within the masks. As a context manager it is removed at the end of the block. The forward pass has no
    hooks, and optimizer state (momentum) is left alone. It cannot be copied or pickled, and copies of the optimizer
    are not enforced.
    """

    def __init__(self, masks: MaskSet, optimizer: torch.optim.Optimizer, model: nn.Module | None, strict: bool):
        self._masks = masks
        self._optimizer = _with_hooks(optimizer)
        self._named: dict[str, nn.Parameter] | None = None  # None: the optimizer knows the names
        if model is not None:
            masks.check(model)
            self._named = named_parameters(model)
        self._owned: list[nn.Parameter] = []  # all of the optimizer
        self._held: dict[str, nn.Parameter] = {}  # those with a mask
        self._masked = MaskedParameters(masks, {})
        self._follow()
        missing = [name for name in masks if name not in self._held]
        if missing and strict:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"optimizer: wanted one that holds every masked parameter, got one without {', '.join(missing[:5])}"
                f"{more} (strict=False enforces only those it holds)"
            )
        self._handles: list[Any] = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self.apply_()

    @property
    def active(self) -> bool:
        """Whether steps are still followed by masking."""
        return bool(self._handles)

    def __len__(self) -> int:
        """Masked parameters of this optimizer."""
        return len(self._masked)

    def apply_(self) -> None:
        """Mask now, such as after weights were loaded between two steps."""
        self._follow()
        self._masked.apply_()

    def mask_gradients_(self) -> None:
        """Set the gradients of removed weights to 0, such as before ``clip_grad_norm_``, which else counts them."""
        self._follow()
        self._masked.mask_gradients_()

    def remove(self) -> None:
        """Stop enforcing; the weights stay as they are. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _follow(self) -> None:
        """Take over the parameters that the optimizer holds now, unless they are those of before."""
        owned = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if len(owned) == len(self._owned) and all(map(operator.is_, owned, self._owned)):
            return
        named = _named(self._optimizer) if self._named is None else self._named
        ids = {id(parameter) for parameter in owned}
        held = {name: named[name] for name in self._masks if name in named and id(named[name]) in ids}
        for name, parameter in held.items():
            if parameter.shape != self._masks[name].shape:
                raise ValueError(
                    f"optimizer: wanted {name} in the shape of its mask, {tuple(self._masks[name].shape)}, "
                    f"got {tuple(parameter.shape)}"
                )
            if parameter.is_meta:
                raise ValueError(f"optimizer: wanted {name} with its values, got it on the meta device")
        self._masked = MaskedParameters(self._masks, held)
        self._held, self._owned = held, owned

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._follow()  # here, because an error should come before the step
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._masking(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # the first one is the optimizer
            return (args[0], self._masking(args[1]), *args[2:]), kwargs
        return None

    def _masking(self, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure on masked weights, with no gradient for them."""

        def masking(*args: Any, **kwargs: Any) -> Any:
            self.apply_()
            loss = closure(*args, **kwargs)
            self.mask_gradients_()
            return loss

        return masking

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.apply_()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "MaskEnforcer: wanted to stay with its optimizer, got copied or pickled: a copy would enforce nothing; "
            "call masks.enforce(optimizer, model) for the copied optimizer"
        )

    def __enter__(self) -> MaskEnforcer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def _with_hooks(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, or the one inside a wrapper that was never set up as one (accelerate's)."""
    inner = optimizer
    while isinstance(inner, torch.optim.Optimizer) and not hasattr(inner, "_optimizer_step_post_hooks"):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer: wanted a torch.optim.Optimizer with step hooks, got {type(optimizer).__name__}")
    return inner


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer that was made from ``model.named_parameters()``."""
    named: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                "optimizer: its parameters have no names: pass the model too, enforce(optimizer, model), "
                "or make the optimizer from model.named_parameters()"
            )
        named.update(zip(group["param_names"], group["params"], strict=True))
    return named
