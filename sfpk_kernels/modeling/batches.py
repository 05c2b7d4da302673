"""Mini-batches: an endless stream from any iterable, moved to the model's device, and the default loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import IterableDataset

from ..utils.arguments import check_loader
from .labels import label_loss


class BatchStream:
    """Batches from an iterable, started again from its beginning whenever it ends.

    Args:
        loader: a DataLoader, a list, or any other iterable of batches. A one-shot iterator (a generator) works
            as long as it yields enough.
        device: where tensors inside a batch are moved.
        needed: batches the run will take, for the error message.
        what: what they are counted in, likewise.

    Raises:
        TypeError: not an iterable.
        ValueError: on :meth:`take`, an empty loader, or a one-shot iterator that has run out.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, needed: int, what: str = "particles × steps"):
        check_loader(loader)
        self._loader = loader
        self._device = device
        self._needed = f"{needed} batches ({what})"
        self._taken = 0
        self._iterator: Iterator[Any] = iter(loader)
        self.one_shot = self._iterator if self._iterator is loader else None  # cannot be started again

    def take(self, count: int) -> list[Any]:
        """The next ``count`` batches."""
        return [move_to(self._next(), self._device) for _ in range(count)]

    def skip(self, count: int) -> None:
        """Pass over ``count`` batches."""
        for _ in range(count):
            self._next()

    def _next(self) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._taken == 0 and self.one_shot is not None:
                raise ValueError(
                    f"loader: wanted {self._needed}, got a one-shot iterator that is empty, or was read to its end "
                    "before: pass a list or a DataLoader, which can be started again"
                ) from None
            if self._taken == 0:
                raise ValueError(f"loader: wanted batches, got an empty iterable{self._remedy()}") from None
            if self.one_shot is not None:
                raise ValueError(
                    f"loader: wanted {self._needed}, got a one-shot iterator that "
                    f"ended after {self._taken}: pass a list or a DataLoader, which can be started again"
                ) from None
            self._iterator = iter(self._loader)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"loader: wanted {self._needed}, got {self._taken}: "
                    f"a second pass over the loader yields nothing{self._remedy()}"
                ) from None
        self._taken += 1
        return batch

    def _remedy(self) -> str:
        """For what looks as if it could be started again."""
        if isinstance(getattr(self._loader, "dataset", self._loader), IterableDataset):
            return ": its IterableDataset should open its source in __iter__, anew for every pass"
        return ""


def move_to(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it (nested lists, tuples, dicts) on ``device``."""
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(batch)  # such as the Hugging Face BatchEncoding
    return pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), batch)


def forward(model: nn.Module, batch: Any) -> Any:
    """The model's output on a batch: ``model(x)`` for (x, y, …), ``model(**batch)`` for dicts and (dict, …).

    Raises:
        TypeError: another kind of batch.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and batch:
        if isinstance(batch[0], Tensor):
            return model(batch[0])
        if isinstance(batch[0], Mapping):
            return model(**batch[0])
    if isinstance(batch, Tensor):
        return model(batch)
    raise TypeError(
        f"batch: wanted a tensor, a tuple (x, …) or a dict, got {_kind(batch)}: pass forward_fn(model, batch)"
    )


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy for batches ``(x, y)``; the output's ``.loss`` (or ``["loss"]``) for dict batches.

    ``y`` holds class numbers, or a distribution over the classes for every sample, which are in the output's second
    dimension (the only one of an output for a single sample). Whether floats are distributions is looked at in plain
    passes on the CPU; the first pass of a run, its trial, is always plain.

    Raises:
        TypeError: another kind of batch, an output without a loss or logits, labels of a wrong dtype.
        ValueError: labels that are none for this output: floats that are no distribution (regression, several labels
            for one sample), another shape, a model with one output, numbers beyond the classes. The message says which
            ``loss_fn`` to pass instead.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise TypeError(
                "loss_fn: the default loss of a dict batch is the model output's .loss, got an output of "
                f"{type(output).__name__} without one: put labels into the batch, or pass loss_fn(model, batch), such "
                'as loss_fn=lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"])'
            )
        return loss
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
        raise TypeError(
            f"loss_fn: the default loss wants batches (x, y) of tensors or dicts, got {_kind(batch)}: "
            "pass loss_fn(model, batch), such as "
            "loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])"
        )
    x, y = batch
    output = model(x)
    if not isinstance(output, Tensor):
        raise TypeError(
            "loss_fn: the default loss of a batch (x, y) wants the model to return logits, got "
            f"{type(output).__name__}: pass loss_fn(model, batch), such as loss_fn=lambda model, batch: "
            f"F.cross_entropy(model(batch[0]){_logits_of(output)}, batch[1])"
        )
    return label_loss(output, y)


def _logits_of(output: Any) -> str:
    """How to reach the logits in an output, for an example in a message."""
    for name in ("logits", "out", "last_hidden_state"):
        if isinstance(output, Mapping) and name in output:
            return f'["{name}"]'
        if hasattr(output, name):
            return f".{name}"
    if isinstance(output, Mapping):
        return f"[{next(iter(output), 'logits')!r}]"
    return "[0]" if isinstance(output, tuple | list) else ""


def _kind(batch: Any) -> str:
    if isinstance(batch, tuple | list):
        return f"{type(batch).__name__} of {', '.join(type(item).__name__ for item in batch) or 'nothing'}"
    return type(batch).__name__
