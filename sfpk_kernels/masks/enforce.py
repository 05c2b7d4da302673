"""Masks that hold while a model is trained: weights set to 0 again after every optimizer step."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..coordinates.flat import named_parameters
from ..coordinates.wrapped import check_plain

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


class MaskedParameters:
    """Parameters with the places where their weights are removed, ready to be masked often.

    Args:
        masks: one for each of ``parameters``, at least.
        parameters: by the names of the masks, in the masks' shapes.
    """

    def __init__(self, masks: MaskSet, parameters: Mapping[str, nn.Parameter]):
        self._names = list(parameters)
        self._removed = [(parameter, (~masks[name]).to(parameter.device)) for name, parameter in parameters.items()]

    def __len__(self) -> int:
        return len(self._removed)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set the removed weights to exactly 0, in place."""
        for parameter, removed in self._where():
            parameter.masked_fill_(removed, 0)

    @torch.no_grad()
    def alive(self) -> dict[str, Tensor]:
        """How many removed weights are not 0, by name, 0-d and on their device; on the CPU only those above 0."""
        counts = {}
        for name, (parameter, removed) in zip(self._names, self._where(), strict=True):
            found = parameter.bool().logical_and_(removed)
            if found.device.type != "cpu" or bool(found.any()):
                counts[name] = found.count_nonzero()
        return counts

    def _where(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters with their removed places, on the device they are on now."""
        for number, (parameter, removed) in enumerate(self._removed):
            if removed.device != parameter.device:
                removed = removed.to(parameter.device)
                self._removed[number] = (parameter, removed)
            yield parameter, removed

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


class Watch:
    """Looks for removed weights that are not 0 where they should be, and says so once.

    On a GPU what was found is read when it has arrived, at a later look: the host never waits, unless it is told to.
    """

    def __init__(self) -> None:
        self.said = False
        self._asked: tuple[list[str], Tensor, Any, str] | None = None  # names, counts, event, when

    def look(
        self,
        masked: MaskedParameters,
        when: str,  # for the message
        then: str,  # what becomes of them
        wait: bool = False,
    ) -> None:
        """Look now; what is known to be found is reported."""
        if self.said or torch.compiler.is_compiling() or _capturing():
            return
        self._read(then, wait)
        if self.said or self._asked is not None:  # the look before is still under way
            return
        counts = masked.alive()
        if not counts:
            return
        numbers = list(counts.values())
        device = numbers[0].device
        together = torch.stack([number.to(device, non_blocking=True) for number in numbers])
        event = None
        if device.type == "cuda":
            host = torch.empty(together.shape, dtype=together.dtype, device="cpu", pin_memory=True)
            host.copy_(together, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            together = host
        self._asked = list(counts), together, event, when
        self._read(then, wait)

    def _read(self, then: str, wait: bool) -> None:
        if self._asked is None:
            return
        names, counts, event, when = self._asked
        if event is not None:
            if wait:
                event.synchronize()
            elif not event.query():
                return
        self._asked = None
        found = {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}
        if found:
            self.said = True
            listed = ", ".join(f"{name} ({count:,})" for name, count in list(found.items())[:5])
            more = f" and {len(found) - 5} more tensors" if len(found) > 5 else ""
            logger.warning(
                "masks: %s removed weights were not 0 %s, in %s%s: %s (said once)",
                f"{sum(found.values()):,}", when, listed, more, then,
            )  # fmt: skip


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
        self._optimizers = _all_inside(optimizer)
        hooked = [inside for inside in self._optimizers if _has_hooks(inside)]
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
                if _has_hooks(inside):
                    self._handles.append(inside.register_step_pre_hook(self._before_step))
                    self._handles.append(inside.register_step_post_hook(self._after_step))
                else:
                    self._handles.append(_Followed(inside, "step", self._masking_arguments, self._after_writing))
                for name in _WRITERS:
                    if callable(getattr(inside, name, None)):
                        self._handles.append(_Followed(inside, name, None, self._after_writing))
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


class _Followed:
    """A method of an object with something done after it, until :meth:`remove`; copies of the object have it plain."""

    def __init__(
        self,
        holder: Any,
        name: str,
        arguments: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any]] | None,
        after: Callable[[Any, str], None],
    ):
        before = getattr(holder, name)
        self._holder, self._name, self._active = holder, name, True
        self._own = vars(holder).get(name)  # where something else has put itself before the method, such as a scheduler

        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not holder:
                return getattr(type(this), name)(this, *args, **kwargs)
            if self._active and arguments is not None:
                args, kwargs = arguments(args, kwargs)
            value = before(*args, **kwargs)
            if self._active:
                after(holder, name)
            return value

        functools.update_wrapper(method, before)
        method.__name__ = name  # by which copies and pickles find the plain method
        self._method = MethodType(method, holder)
        setattr(holder, name, self._method)

    def remove(self) -> None:
        """The method as it was; where something has put itself before it meanwhile, it stays and does nothing."""
        self._active = False
        if vars(self._holder).get(self._name) is self._method:
            if self._own is None:
                delattr(self._holder, self._name)
            else:
                setattr(self._holder, self._name, self._own)


def _all_inside(optimizer: Any) -> list[Any]:
    """An optimizer and those it holds, however deep: around another one (accelerate's, Lookahead), or of several."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if any(one is other for other in found):
            continue
        held: list[Any] = []
        if hasattr(one, "__dict__"):
            for value in vars(one).values():
                held += value if isinstance(value, list | tuple) else value.values() if _is_dict(value) else [value]
        inside = [other for other in held if isinstance(other, torch.optim.Optimizer)]
        if isinstance(one, torch.optim.Optimizer) or (inside and callable(getattr(one, "step", None))):
            found.append(one)
            waiting += inside
    return [one for one in found if isinstance(getattr(one, "param_groups", None), list)]


def _is_dict(value: Any) -> bool:
    return type(value) is dict and len(value) < 1_000  # optimizer state is a defaultdict


def _has_hooks(optimizer: Any) -> bool:
    """Whether its steps call hooks: not those of wrappers that were never set up as optimizers."""
    return hasattr(optimizer, "_optimizer_step_post_hooks") and bool(getattr(type(optimizer).step, "hooked", False))


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, during which nothing can be asked."""
    with contextlib.suppress(RuntimeError):
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return False


def _named(optimizer: Any) -> dict[str, nn.Parameter]:
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
