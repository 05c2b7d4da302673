"""Runs the host's side of the GPU path without a GPU: fake CUDA tensors, launches recorded instead of made."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sfpk_kernels import _extension
from sfpk_kernels.ops import _checks as check
from sfpk_kernels.ops.averaging import triton_kernels as averaging
from sfpk_kernels.ops.masking import cuda as masking_cuda
from sfpk_kernels.ops.masking import triton_kernels as masking
from sfpk_kernels.ops.selection import triton_kernels as selection
from sfpk_kernels.ops.transition import triton_kernels as transition

CUDA_OPS = ("topk_device_", "masked_weights_device_", "mask_gradient_device_")
KERNELS = {
    transition: ("transition", "combine"),
    selection: ("count_digits", "choose_digit", "count_ties", "find_chunk", "find_tie", "write_mask"),
    masking: ("apply", "products", "group_sums"),
    averaging: ("average",),
}
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")


@dataclass
class Launch:
    """What was launched, and on which device."""

    name: str
    device: torch.device | None  # the current one, as the guards set it; None for ops that guard themselves (C++)
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self.arguments) if isinstance(leaf, Tensor)]


@dataclass
class Recording:
    """Everything that happened."""

    launches: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)  # reads by the host, and copies to a device that wait for it
    current: list[torch.device] = field(default_factory=lambda: [torch.device("cuda:0")])


class _Waits(TorchDispatchMode):
    """Notes operators for which the host waits."""

    def __init__(self, recording: Recording):
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type == "cuda"}
        if "cuda" in devices and any(read in name for read in READS):
            self._recording.waits.append(name)
        if name in ("index", "index_put", "index_put_"):  # by bools: as many as there are
            indices = [i for i in args[1] if i is not None]
            if any(i.dtype == torch.bool for i in indices):
                self._recording.waits.append(f"{name} by bools")
        result = function(*args, **kwargs)
        if isinstance(result, Tensor):
            devices.add(result.device.type)
        if name == "_to_copy" and {"cpu", "cuda"} <= devices and not kwargs.get("non_blocking"):
            self._recording.waits.append(f"{name} between devices")
        return result


class _Indexing(TorchFunctionMode):
    """Indexing and copies by other operators: their own ask for the CUDA device, which is not there."""

    def __init__(self, recording: Recording):
        super().__init__()
        self._recording = recording

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            return _at(*args)
        if function is Tensor.__setitem__:
            tensor, key, value = args
            self._write(_at(tensor, key), value)
            return None
        if function is Tensor.copy_:
            return self._write(args[0], args[1], **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _write(self, place: Tensor, value: Any, non_blocking: bool = False) -> Tensor:
        if isinstance(value, Tensor):
            value.expand(place.shape)  # it has to fit
            if value.device.type != place.device.type and not non_blocking:
                self._recording.waits.append("copy_ between devices")
        return place.zero_()


def _at(tensor: Tensor, key: Any) -> Tensor:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if not isinstance(k, Tensor)]:
        i = next(i for i, k in enumerate(keys) if k is Ellipsis)
        taken = sum(k is not None for k in keys) - 1
        keys[i : i + 1] = [slice(None)] * (tensor.dim() - taken)
    dim, indices = 0, []
    for k in keys:
        if k is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(k, slice):
            if k != slice(None):
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, k.start, k.stop, k.step or 1)
        elif isinstance(k, Tensor):
            indices += [None] * (dim - len(indices)) + [k]
        else:
            tensor = tensor.select(dim, k)
            continue
        dim += 1
    return torch.ops.aten.index.Tensor(tensor, indices) if indices else tensor


class _Kernel:
    def __init__(self, name: str, recording: Recording):
        self._name, self._recording = name, recording

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            device = self._recording.current[-1]
            self._recording.launches.append(Launch(self._name, device, tuple(grid), arguments, constants))

        return launch


@contextlib.contextmanager
def recorded(cuda_is_built: bool = True):
    """Everything inside works on fake tensors; yields the :class:`Recording`."""
    recording = Recording()

    @contextlib.contextmanager
    def guard(device):
        recording.current.append(torch.device(device))
        try:
            yield
        finally:
            recording.current.pop()

    def op(name):
        def run(*arguments):
            recording.launches.append(Launch(name, None, (1,), arguments, {}))

        return run

    _extension.load()
    masking_cuda._borders.cache_clear()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        enter(mock.patch.object(torch.cuda, "device", guard))
        # Addresses of fake tensors are all the same.
        enter(mock.patch.object(check, "share_memory", return_value=False))
        missing = None if cuda_is_built else "built without CUDA"
        enter(mock.patch.object(_extension, "without_cuda", return_value=missing))
        for module, names in KERNELS.items():
            for name in names:
                enter(mock.patch.object(module, name, _Kernel(name, recording)))
        for name in CUDA_OPS:
            enter(mock.patch.object(torch.ops.sfpk_cpp, name, op(name)))
        stack.callback(masking_cuda._borders.cache_clear)  # fake tensors must not stay in it
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(_Waits(recording))
        enter(_Indexing(recording))
        yield recording


__all__ = ["CUDA_OPS", "DataDependentOutputException", "Launch", "Recording", "recorded"]
