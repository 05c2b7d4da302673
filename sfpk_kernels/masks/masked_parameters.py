"""Parameters whose removed weights are set to 0 again and again, and a look at whether they were."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .maskset import MaskSet

logger = logging.getLogger(__name__)


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


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded, during which nothing can be asked."""
    with contextlib.suppress(RuntimeError):
        return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return False
