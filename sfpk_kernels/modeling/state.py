"""Leave a model as it was: the guard around everything that runs it, and seeded randomness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from ..config import SFPKConfig

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_STATISTICS_NORMS = nn.modules.batchnorm._NormBase  # batch and instance norm


@contextmanager
def guarded(
    model: nn.Module,
    *,
    bn: str,  # "batch" | "running": which statistics batch-norm normalizes with
    training: bool,  # train mode for everything but batch-norm
) -> Iterator[None]:
    """Put ``model`` into the mode energies are measured in; put everything back at the end, also on errors.

    With ``bn="batch"`` batch-norm normalizes with the batch it sees and neither reads nor writes its running
    statistics (train mode without tracking), so that it also runs under vmap. Buffers get their registration and
    their values back, whatever the forward pass did to them. Modes are switched and put back module by module: a
    ``train`` or ``eval`` of the model's own is never called, so that what it does to weights is not done.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [m for m in model.modules() if isinstance(m, _STATISTICS_NORMS)]
    tracking = [(module, module.track_running_stats) for module in norms]
    registered = [
        (module, dict(module._buffers), set(module._non_persistent_buffers_set)) for module in model.modules()
    ]
    values = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        # Not by train(): a model's own may do more than to switch (merge adapters, freeze stages).
        for module, _ in modes:
            module.training = training
        for norm in norms:
            norm.training = bn == "batch"
            if bn == "batch":
                norm.track_running_stats = False
        yield
    finally:
        for module, before in modes:
            module.training = before
        for norm, tracked in tracking:
            norm.track_running_stats = tracked
        for module, buffers, non_persistent in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
        with torch.no_grad():
            for buffer, version, saved in values:
                if buffer._version != version:  # expanded buffers cannot be written, by the model neither
                    buffer.copy_(saved)


def mode_note(config: SFPKConfig) -> str:
    """For errors that come out of a model or a loss_fn, which may want the other mode."""
    other = "eval" if config.model_mode == "train" else "train"
    return (
        f"sfpk_kernels: the model was in {config.model_mode} mode; "
        f"SFPKConfig(model_mode={other!r}) puts it into {other} mode"
    )


@contextmanager
def autograd_allowed() -> Iterator[None]:
    """Lift a surrounding ``torch.inference_mode()``: what is made inside are normal tensors. Else nothing changes."""
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        yield


def check_no_inference_tensors(model: nn.Module) -> None:
    """Refuse a model whose tensors autograd cannot read.

    Raises:
        ValueError: one was made under ``torch.inference_mode()``.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(
                f"model: wanted tensors that autograd can read, got {name}, made under torch.inference_mode(): build "
                "or load the model outside of it, or pass copy.deepcopy(model) made there"
            )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from torch's generators as after ``manual_seed(seed)``; the callers' state is back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
