"""Masks that hold while a model is trained: weights set to 0 again after every optimizer step."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from ..coordinates.flat import named_parameters
from ..coordinates.wrapped import check_plain
from .followed import Followed, all_inside, has_hooks, names_of
from .masked_parameters import MaskedParameters, Watch

if TYPE_CHECKING:
    from .maskset import MaskSet

logger = logging.getLogger(__name__)

# Methods beside ``step`` in which optimizers write weights: schedule-free ones, SAM, Lookahead.
_WRITERS = ("train", "eval", "first_step", "second_step", "sync_lookahead")

WRITTEN = (
    "they were set to 0 again. Something else than the steps that are followed wrote them: an optimizer around that "
    "one, weights exchanged for averages, load_state_dict; after writing weights call apply_() of what enforce() "
    "returned, or the model is evaluated and saved with them"
)


class MaskEnforcer:
    """Keeps the removed weights of an optimizer's parameters at exactly 0; see :meth:`MaskSet.enforce`.

    The weights are masked when it is made and after every step of the optimizer, until :meth:`remove`: those that the
    optimizer holds at that step, also in parameter groups that were added later. A closure passed to ``step`` runs on
    masked weights, and the gradients of removed weights are 0 after it, so that optimizers that call it repeatedly
    (LBFGS) stay within the masks. As a context manager it is removed at the end of the block. The forward pass has no
    hooks, and optimizer state (momentum) is left alone. It cannot be copied or pickled, and copies of the optimizer
    are not enforced.

    Optimizers inside the given one are followed, too, and so are ``train``, ``eval``, ``first_step`` and
    ``second_step`` of each. Removed weights that are found alive before a step, after one of an optimizer around
    another, or at the end are set to 0 again (not at the end) and reported in the log, once.
    """

    def __init__(self, masks: MaskSet, optimizer: torch.optim.Optimizer, model: nn.Module | None, strict: bool):
        self._masks = masks
        self._optimizers = all_inside(optimizer)
        hooked = [inside for inside in self._optimizers if has_hooks(inside)]
        if not hooked:
            raise TypeError(
                f"optimizer: wanted a torch.optim.Optimizer with step hooks, got {type(optimizer).__name__}"
            )
        self._optimizer = hooked[0]
        self._named: dict[str, nn.Parameter] | None = None  # None: the optimizer knows the names
        if model is not None:
            masks.check(model)
            self._named = named_parameters(model)
        self._owned: list[nn.Parameter] = []  # all of the optimizers
        self._held: dict[str, nn.Parameter] = {}  # those with a mask
        self._masked = MaskedParameters(masks, {})
        self._watch = Watch()
        self._follow()
        missing = [name for name in masks if name not in self._held]
        if missing and strict:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(
                f"optimizer: wanted one that holds every masked parameter, got one without {', '.join(missing[:5])}"
                f"{more} (strict=False enforces only those it holds)"
            )
        self._handles: list[Any] = []
        try:
            for inside in self._optimizers:
                if has_hooks(inside):
                    self._handles.append(inside.register_step_pre_hook(self._before_step))
                    self._handles.append(inside.register_step_post_hook(self._after_step))
                else:
                    self._handles.append(Followed(inside, "step", self._masking_arguments, self._after_writing))
                for name in _WRITERS:
                    if callable(getattr(inside, name, None)):
                        self._handles.append(Followed(inside, name, None, self._after_writing))
            self.apply_()
        except BaseException:
            self._release()
            raise

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
        if self._handles:
            self._watch.look(self._masked, "when enforcement ended", "they stay as they are", wait=True)
        self._release()

    def _release(self) -> None:
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []

    def _follow(self) -> None:
        """Take over the parameters that the optimizer holds now, unless they are those of before."""
        owned = [
            parameter for inside in self._optimizers for group in inside.param_groups for parameter in group["params"]
        ]
        if len(owned) == len(self._owned) and all(map(operator.is_, owned, self._owned)):
            return
        named = names_of(self._optimizer) if self._named is None else self._named
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
            check_plain(name, parameter, "optimizer")
        self._masked = MaskedParameters(self._masks, held)
        self._held, self._owned = held, owned

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._follow()  # here, because an error should come before the step
        self._watch.look(self._masked, f"before a step of {type(optimizer).__name__}", WRITTEN)
        if self._watch.said:  # whatever writes them will do so again
            self._masked.apply_()
        changed, kwargs = self._masking_arguments(args[1:], kwargs)  # the first one is the optimizer
        return (args[0], *changed), kwargs

    def _masking_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """What a step is called with, its closure on masked weights."""
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._masking(kwargs["closure"])}
        if args and callable(args[0]):
            return (self._masking(args[0]), *args[1:]), kwargs
        return args, kwargs

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

    def _after_writing(self, optimizer: Any, method: str) -> None:
        """After a method that is no step with hooks, whose last writing was not masked."""
        self._follow()
        then = "they were set to 0 again, and will be each time it writes them"
        self._watch.look(self._masked, f"after {method}() of {type(optimizer).__name__}", then)
        self._masked.apply_()

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
