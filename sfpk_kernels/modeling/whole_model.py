"""A model as it was, to be put back after work that changes it in place has failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Registered:
    """Which tensors a model has under which names, the values of its buffers, and the modes of its modules.

    Not the values of its parameters: for work that puts others in their place, and writes none.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._attributes = [
            (module, name, module.__dict__[name])
            for module in modules
            for name in ("training", "track_running_stats")
            if name in module.__dict__
        ]
        self._registered = [
            (module, dict(module._parameters), dict(module._buffers), set(module._non_persistent_buffers_set))
            for module in modules
        ]
        self._forwards = [(module, module.__dict__.get("forward")) for module in modules]  # of instances, where any
        self._buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
        self._modes = _Modes()

    @torch.no_grad()
    def _restore(self) -> None:
        for module, name, value in self._attributes:
            module.__dict__[name] = value
        for module, forward in self._forwards:
            if forward is not None:
                module.__dict__["forward"] = forward
            elif "forward" in module.__dict__:
                del module.__dict__["forward"]
        for module, parameters, buffers, non_persistent in self._registered:
            _refill(module._parameters, parameters)
            _refill(module._buffers, buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
            _relist(module)
        for buffer, version, saved in self._buffers:
            if buffer._version != version and not spread(buffer):
                buffer.copy_(saved)

    def restore(self) -> None:
        """Everything, whatever part of it was put back already."""
        self._restore()
        self._modes.restore()


class _Modes:
    """Autograd and autocast of this thread: a block that was interrupted as it ended may have left them on or off."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
        ]
        self._nesting = _nesting()

    def restore(self) -> None:
        torch.set_grad_enabled(self._grad)
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        while _nesting() > self._nesting:
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


def _nesting() -> int:
    """How many autocast blocks are open; inside one its casts of weights are kept."""
    return torch.autocast_increment_nesting() * 0 + torch.autocast_decrement_nesting()  # no line in between to stop at


class WholeModel:
    """Copies of all values, and everything beside them that training may change.

    Args:
        model: which parameters and buffers it has, their values, ``requires_grad`` flags, gradients (not copied, see
            :meth:`put_gradients_aside`) and the modes of its modules are kept.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._registered = [
            (module, dict(module._parameters), dict(module._buffers), set(module._non_persistent_buffers_set))
            for module in modules
        ]
        held = list(tensors(model).values())
        self._values = [(tensor, tensor.data, tensor.detach().clone()) for tensor in held]
        self._parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def put_gradients_aside(self) -> None:
        """Gradients that are there are kept from being written; they come back with :meth:`restore`."""
        for parameter, _, _ in self._parameters:
            parameter.grad = None

    def restore_modes(self) -> None:
        """Train or eval, as each module was."""
        for module, training in self._modes:
            module.training = training

    @torch.no_grad()
    def restore(self) -> None:
        """Everything; the same tensors, also where others have taken their place or their memory was exchanged."""
        self.restore_modes()
        for module, parameters, buffers, non_persistent in self._registered:
            _refill(module._parameters, parameters)
            _refill(module._buffers, buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
            _relist(module)
        for tensor, data, saved in self._values:
            if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype or tensor.shape != data.shape:
                tensor.data = data  # such as after model.half() or model.to(device)
            if not spread(tensor):  # nobody can write those
                tensor.copy_(saved)
        for parameter, requires_grad, grad in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


class Buffers:
    """The buffers of a model, such as batch-norm statistics, kept before each step and put back where it fails."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._registered: list[tuple[nn.Module, dict[str, Any]]] = []
        self._live: list[Tensor] = []
        self._saved: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """As they are now."""
        self._registered = [(module, dict(module._buffers)) for module in self._modules if module._buffers]
        found = {id(b): b for _, buffers in self._registered for b in buffers.values() if b is not None}
        live = [buffer for buffer in found.values() if not spread(buffer)]
        if len(live) != len(self._live) or any(a is not b for a, b in zip(live, self._live, strict=True)):
            self._live, self._saved = live, [buffer.clone() for buffer in live]
        elif live:
            torch._foreach_copy_(self._saved, live)  # into the memory of the step before, few launches on a GPU

    @torch.no_grad()
    def restore(self) -> None:
        """As they were kept."""
        for module, buffers in self._registered:
            _refill(module._buffers, buffers)
        for buffer, saved in zip(self._live, self._saved, strict=True):
            buffer.copy_(saved)


def _refill(entries: dict[str, Any], saved: dict[str, Any]) -> None:
    """The saved entries, in their order."""
    if list(entries) != list(saved) or any(entries[name] is not value for name, value in saved.items()):
        entries.update(saved)  # first: an interruption leaves none out
        for name in [name for name in entries if name not in saved]:
            del entries[name]
        for name, value in saved.items():
            del entries[name]
            entries[name] = value


def _relist(module: nn.Module) -> None:
    """The list of its weights that an RNN layer runs on, from its parameters: others may have stood in for them."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def spread(tensor: Tensor) -> bool:
    """Whether elements share memory, as in an expanded buffer."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write the values of every parameter and buffer, but those that nobody can write."""
    for name, tensor in tensors(model).items():
        if not spread(tensor):
            tensor.copy_(values[name])
