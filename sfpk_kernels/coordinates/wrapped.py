"""Weights that cannot be pruned as they stand: wrapped, sharded, quantized, scripted; and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_GRAPHS = ("InterpreterModule", "UnflattenedModule")  # of torch.export.unflatten
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
_PLAIN_DISPATCH = Tensor.__torch_dispatch__


def check_not_sharded(name: str, parameter: Tensor, argument: str = "model") -> None:
    """That a parameter is whole in this process.

    Raises:
        ValueError: it is a part of one (FSDP, tensor parallelism, DeepSpeed).
    """
    kinds = {kind.__name__ for kind in type(parameter).__mro__}
    if "DTensor" in kinds:
        what = "a DTensor (FSDP2, tensor parallelism)"
    elif "FlatParameter" in kinds:
        what = "a FlatParameter (FSDP)"
    elif hasattr(parameter, "ds_id"):
        what = "a parameter that DeepSpeed has partitioned"
    else:
        return
    raise ValueError(
        f"{argument}: wanted parameters that are whole in this process, got {name}, {what}: prune the model before it "
        "is sharded, or gather its weights into a plain copy"
    )


def check_plain(name: str, parameter: Tensor, argument: str = "model") -> None:
    """That a weight is a dense tensor of numbers, in which single ones can be set to 0.

    Raises:
        ValueError: it is sharded, sparse, quantized or some other kind of tensor.
    """
    check_not_sharded(name, parameter, argument)
    kind = type(parameter)
    if parameter.layout != torch.strided:
        layout = str(parameter.layout).removeprefix("torch.")
        got, remedy = f"{name}, which is sparse ({layout})", "make it dense first, nn.Parameter(weight.to_dense())"
    elif "Sparse" in kind.__name__ and kind.__torch_dispatch__ is not _PLAIN_DISPATCH:
        got, remedy = f"{name}, a {kind.__name__}", "make it dense first, nn.Parameter(weight.to_dense())"
    elif kind.__torch_dispatch__ is not _PLAIN_DISPATCH and kind is not nn.Parameter:
        got, remedy = f"{name}, a {kind.__name__}", "prune before quantizing, or whatever made it one"
    else:
        return
    raise ValueError(
        f"{argument}: wanted dense weights, got {got}: {remedy}, or leave it out, ignored_layers=[{name!r}]"
    )


def check_structure(model: nn.Module) -> None:
    """That a model is made of layers in Python, and its weights are whole.

    Raises:
        ValueError: it, or a part of it, was scripted, traced or exported; it was sharded.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        got = "it is" if name == "" else f"{name} is"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"model: wanted layers in Python, got others: {got} scripted or traced (torch.jit): prune the model "
                "first and script it then"
            )
        if type(module).__name__ in _GRAPHS or (isinstance(module, fx.GraphModule) and "train" in vars(module)):
            raise ValueError(
                f"model: wanted layers in Python, got others: {got} an exported graph (torch.export): prune the model "
                "first and export it then"
            )
    for name, parameter in model.named_parameters():
        check_not_sharded(name, parameter)


def reserved(model: nn.Module) -> dict[str, str]:
    """Prefixes of names under which nothing is pruned (with their dot, ``""`` for all), and why."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = f"{prefix}." if prefix else ""
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if isinstance(module, parametrize.ParametrizationList):
            by = ", ".join(type(one).__name__.lstrip("_") for one in module)
            found[inside] = f"parametrized ({by}): call parametrize.remove_parametrizations first"
        elif "BaseTunerLayer" in kinds:
            found[inside] = (
                f"under a peft adapter ({type(module).__name__}), whose merging would fill its zeros: "
                "merge_and_unload() or unload() first"
            )
        elif "AuxiliaryTrainingWrapper" in kinds:
            found[f"{inside}original_module."] = "kept aside by peft, which trains a copy (modules_to_save)"
        elif any(name.lower().startswith("lora_") for name in _own_names(module)):
            found[inside] = "under a low-rank adapter, whose merging would fill its zeros: merge it for good first"
        elif isinstance(module, fx.GraphModule) and not _has_layers(module):
            found[inside] = "in a graph without layers (torch.fx): prune the model it was made from"
    return found


def taken_over(module: nn.Module, local: str) -> str | None:
    """Why a parameter of ``module`` is not its weight but something it is computed from, or None."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, SpectralNorm) and local == f"{hook.name}_orig":
            return "under torch.nn.utils.spectral_norm: call torch.nn.utils.remove_spectral_norm first"
        if isinstance(hook, WeightNorm) and local in (f"{hook.name}_g", f"{hook.name}_v"):
            return "under torch.nn.utils.weight_norm: call torch.nn.utils.remove_weight_norm first"
        if isinstance(hook, prune.BasePruningMethod) and local == f"{hook._tensor_name}_orig":
            return "already under torch.nn.utils.prune: call prune.remove first"
    if local.endswith("_orig") and f"{local.removesuffix('_orig')}_mask" in module._buffers:  # hooks lost in a copy
        return "already under torch.nn.utils.prune: call prune.remove first"
    return None


def originals(model: nn.Module) -> dict[str, str]:
    """By the names that weights had before they were taken over or parametrized: why they have them no longer."""
    found: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        inside = f"{prefix}." if prefix else ""
        for local in module._parameters:
            why = taken_over(module, local)
            if why is not None:
                found[inside + local.rpartition("_")[0]] = why
        if parametrize.is_parametrized(module):
            for local in module.parametrizations:
                found[inside + local] = reserved(module.parametrizations[local])[""]
    return found


def quantized(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Weights that quantized layers keep packed, not as parameters: name, shape, why they are not prunable."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if type(module).__module__.startswith(_QUANTIZED) and callable(getattr(module, "weight", None)):
            shape = tuple(module.weight().shape)
            yield f"{prefix}.weight" if prefix else "weight", shape, "quantized: prune the model before that"


def _has_layers(graph: fx.GraphModule) -> bool:
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    return any(next(graph.get_submodule(target).parameters(), None) is not None for target in called)


def _own_names(module: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in module.named_children())
    yield from (name for name, _ in module.named_parameters(recurse=False))
