"""Torch-Pruning's dependency graph of a model, as links between positions. Imports torch_pruning."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency.index_mapping import update_index_mapping

from .governed import UNFOLLOWED
from .outputs import leaf, reached, tensors_in

Side = tuple[int, str]  # (number of a node, "in" | "out"; "out" alone where both are the same positions)
_TWO_SIDED = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention, nn.RNNBase)

_READERS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm)


@dataclass(frozen=True)
class Link:
    """Positions of one side that belong to positions of another."""

    source: Side
    target: Side
    positions: Callable[[Sequence[int]], list[tuple[int, int]]]  # of the source → (source, target)


class Traced:
    """The nodes of a model's graph, and the links between them.

    Args:
        model: a copy that may be spoilt: parameters require gradients, its mode is eval.
        args, kwargs: what it is called with; floating point tensors count as fixed channels.
        deadline: a time of ``time.monotonic()``.

    Raises:
        TimeoutError: it was later than that.
    """

    def __init__(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], deadline: float):
        self._outputs: set[Any] = set()
        self._unfollowed: dict[Any, nn.Module] = {}
        self._computed: list[Tensor] = []
        leaves, spec = _pytree.tree_flatten((tuple(args), dict(kwargs)))
        leaves = [leaf(one) for one in leaves]
        self.inputs = [one for one in leaves if isinstance(one, Tensor) and one.requires_grad]
        graph = _Graph(deadline, self.inputs)

        def forward(model: nn.Module, _: Any) -> Any:
            # Clones: what is written in place must be no leaf.
            given = [one.clone() if isinstance(one, Tensor) else one for one in leaves]
            positional, named = _pytree.tree_unflatten(given, spec)
            marked = [module for module in model.modules() if isinstance(module, UNFOLLOWED)]
            handles = [module.register_forward_hook(self._mark) for module in marked]
            handles += [m.register_forward_hook(self._note) for m in model.modules() if isinstance(m, _READERS)]
            try:
                with _Unfused():
                    return model(*positional, **named)
            finally:
                for handle in handles:
                    handle.remove()

        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                graph.build_dependency(
                    model,
                    torch.zeros((), dtype=torch.float32, device="cpu"),  # not looked at
                    forward_fn=forward,
                    output_transform=self._leaving,
                    unwrapped_parameters=[(one, 1 if one.dim() > 1 else 0) for one in self.inputs],
                    verbose=False,
                )
                self._mend_sizes(graph)
        except (TypeError, IndexError, AttributeError, KeyError, ZeroDivisionError, RecursionError) as error:
            if not self._outputs:  # the model's own
                raise
            raise ValueError(
                f"model: Torch-Pruning cannot follow its graph ({type(error).__name__}: {error}): pass a part of it"
            ) from error
        self.names: dict[nn.Parameter, str] = graph._param_to_name
        self.nodes = list(graph.module2node.values())
        self._numbers = {id(node): number for number, node in enumerate(self.nodes)}
        self._deadline = deadline

    def _mark(self, module: nn.Module, _: Any, output: Any) -> None:
        self._unfollowed.update((one.grad_fn, module) for one in tensors_in(output) if one.grad_fn is not None)

    def _note(self, module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._computed.append(output)

    def _leaving(self, outputs: Any) -> list[Tensor]:
        found = [one for one in tensors_in(outputs) if one.grad_fn is not None]
        if not found:
            raise ValueError("model: wanted outputs that hold tensors computed from its weights, got none")
        self._outputs = {one.grad_fn for one in found}
        # A layer that reads what is pruned must fit it, even if nothing comes of its output.
        before = reached(self._outputs)
        found += [one for one in self._computed if one.grad_fn is not None and one.grad_fn not in before]
        self._computed = []
        return found

    def sides(self, node: Any) -> tuple[str, ...]:
        """``("in", "out")``, or ``("out",)`` for what maps positions to themselves."""
        return ("in", "out") if isinstance(node.module, _TWO_SIDED) else ("out",)

    def leaves_model(self, node: Any) -> bool:
        """Whether what the node computes is an output of the model."""
        return node.grad_fn in self._outputs or not node.outputs

    def unfollowed(self, node: Any) -> nn.Module | None:
        """The module whose output a node is, if it is of a kind that the graph does not know."""
        return self._unfollowed.get(node.grad_fn)

    def links(self) -> Iterator[Link]:
        """Both ways for every edge of the graph."""
        for number, node in enumerate(self.nodes):
            ins = len(node.inputs)
            for place, dependency in enumerate(node.dependencies):
                if time.monotonic() > self._deadline:
                    raise TimeoutError
                target = dependency.target
                source_side = ("in" if place < ins else "out") if len(self.sides(node)) == 2 else "out"
                target_side = ("out" if place < ins else "in") if len(self.sides(target)) == 2 else "out"
                first, second = dependency.index_mapping
                piece = self._piece(node, place)
                first = first if piece is None else piece
                mappings = [one for one in (first, second) if one is not None]
                source, goal = (number, source_side), (self._numbers[id(target)], target_side)
                yield Link(source, goal, functools.partial(_map, mappings))

    def pieces(self, node: Any) -> tuple[int, int] | None:
        """(positions of a piece, pieces) for chunk and split along the channels into equal parts."""
        sizes = getattr(node.grad_fn, "_saved_self_sym_sizes", None)
        size = getattr(node.grad_fn, "_saved_split_size", None)
        if node.type != tp.ops.OPTYPE.SPLIT or not sizes or not isinstance(size, int):
            return None
        if node.grad_fn._saved_dim != 1 or len(sizes) < 2 or sizes[1] % size:
            return None
        return size, sizes[1] // size

    def _mend_sizes(self, graph: _Graph) -> None:
        """Sizes of the parts of splits, guessed where autograd keeps none, and of what they are joined to."""
        nodes = list(graph.module2node.values())
        pieces = [(node, self.pieces(node)) for node in nodes if self.pieces(node)]
        for node, sizes in pieces:
            assert sizes is not None
            node.module.split_sizes = [sizes[0]] * len(node.outputs)  # one an edge
        if pieces:
            for node in nodes:
                if node.type == tp.ops.OPTYPE.CONCAT:
                    node.module.concat_sizes = None
            update_index_mapping(graph)

    def _piece(self, node: Any, place: int) -> _Piece | None:
        """For an edge of a split: which part of it. Torch-Pruning takes every edge for a part of its own."""
        inputs = len(node.inputs)
        if place < inputs:
            split, reader, reverse = node.inputs[place], node, True
            before = sum(one is split for one in node.inputs[:place])
        else:
            split, reader, reverse = node, node.outputs[place - inputs], False
            before = sum(one is reader for one in node.outputs[: place - inputs])
        pieces = self.pieces(split)
        if pieces is None:
            return None
        edges = [
            (function, number)
            for function, number in reader.grad_fn.next_functions
            if function is not None and ("accumulategrad" not in function.name().lower() or self._is_input(function))
        ]
        if len(edges) != len(reader.inputs):
            return None  # a module that is called more than once
        numbers = [number for (_, number), one in zip(edges, reader.inputs, strict=True) if one is split]
        return _Piece(pieces[0], numbers[before], reverse)

    def _is_input(self, function: Any) -> bool:
        return any(function.variable is one for one in (*self.inputs, *self.names))


@dataclass(frozen=True)
class _Piece:
    """Positions of a split node ↔ positions of one part of it."""

    size: int
    number: int
    to_whole: bool

    def __call__(self, pairs: list[Any]) -> list[Any]:
        start = self.size * self.number
        if self.to_whole:
            return [_HybridIndex(idx=p.idx + start, root_idx=p.root_idx) for p in pairs if p.idx < self.size]
        inside = [p for p in pairs if start <= p.idx < start + self.size]
        return [_HybridIndex(idx=p.idx - start, root_idx=p.root_idx) for p in inside]


class _Unfused(TorchFunctionMode):
    """Gated linear units as the chunk and the product that they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_glu if func is F.glu else func)(*args, **(kwargs or {}))


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


class _Graph(tp.DependencyGraph):
    """With fixed inputs, whose channels are known, and an end in time: shapes are looked up along all paths."""

    def __init__(self, deadline: float, inputs: list[Tensor]):
        super().__init__()
        self._deadline = deadline
        self._inputs = {id(one): one for one in inputs}

    def get_out_channels(self, module_or_node: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        module = getattr(module_or_node, "module", module_or_node)
        if id(module) in self._inputs:
            return int(module.shape[1 if module.dim() > 1 else 0])
        channels: int | None = super().get_out_channels(module_or_node)
        return channels

    def get_in_channels(self, module_or_node: Any) -> int | None:
        if time.monotonic() > self._deadline:
            raise TimeoutError
        channels: int | None = super().get_in_channels(module_or_node)
        return channels


def _map(mappings: Iterable[Any], positions: Sequence[int]) -> list[tuple[int, int]]:
    mappings = tuple(mappings)
    if not mappings:
        return [(position, position) for position in positions]
    pairs = [_HybridIndex(idx=position, root_idx=position) for position in positions]
    for mapping in mappings:
        pairs = mapping(pairs)
    return [(pair.root_idx, pair.idx) for pair in pairs if pair.root_idx is not None]
