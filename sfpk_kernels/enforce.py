"""Masks that hold while a model is trained: weights set to 0 again after every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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


class MaskEnforcer:
    """Keeps the removed weights of an optimizer's parameters at exactly 0; see :meth:`MaskSet.enforce`.

    The weights are masked when it is made and after every step of the optimizer, until :meth:`remove`. As a context
    manager it is removed at the end of the block. The forward pass has no hooks, and optimizer state (momentum) is
    left alone.
    """

    def __init__(self, masks: MaskSet, optimizer: torch.optim.Optimizer, model: nn.Module | None, strict: bool):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: wanted a torch.optim.Optimizer, got {type(optimizer).__name__}")
        named = _named(optimizer) if model is None else dict(model.named_parameters(remove_duplicate=False))
        if model is not None:
            masks.check(model)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name in masks if name not in named or id(named[name]) not in owned]
        if missing and strict:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"optimizer: wanted one that holds every masked parameter, got one without {', '.join(missing[:5])}"
                f"{more} (strict=False enforces only those it holds)"
            )
        held = {name: named[name] for name in masks if name not in missing}
        for name, parameter in held.items():
            if parameter.shape != masks[name].shape:
                raise ValueError(
                    f"optimizer: wanted {name} in the shape of its mask, {tuple(masks[name].shape)}, "
                    f"got {tuple(parameter.shape)}"
                )
        self._masked = MaskedParameters(masks, held)
        self.apply_()
        self._handle: Any = optimizer.register_step_post_hook(self._after_step)

    @property
    def active(self) -> bool:
        """Whether steps are still followed by masking."""
        return self._handle is not None

    def __len__(self) -> int:
        """Masked parameters of this optimizer."""
        return len(self._masked)

    def apply_(self) -> None:
        """Mask now, such as after weights were loaded between two steps."""
        self._masked.apply_()

    def remove(self) -> None:
        """Stop enforcing; the weights stay as they are. A second call does nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.apply_()

    def __enter__(self) -> MaskEnforcer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


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
