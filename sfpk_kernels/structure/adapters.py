"""Transformer blocks: heads and the neurons of MLPs, by the names that their modules go by.

A head is one coordinate: its rows of the query, key and value projections and its columns of the output projection.
With grouped queries it is one key-value head and all query heads that read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .axes import Attribute, CoordinateGroup, Entry, Structure

# Queries, keys, values (or all three in one), and what reads the heads; where the head's numbers are kept: the module
# itself, or one inside it.
_ATTENTION: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("qkv",), "proj", ""),  # timm
    (("q_proj", "k_proj", "v_proj"), "o_proj", ""),  # Llama, Mistral, Qwen, Gemma
    (("q_proj", "k_proj", "v_proj"), "out_proj", ""),  # CLIP, OPT, BART, Whisper
    (("self.query", "self.key", "self.value"), "output.dense", "self"),  # BERT, RoBERTa, ELECTRA
    (("attention.query", "attention.key", "attention.value"), "output.dense", "attention"),  # ViT, DeiT
    (("q_lin", "k_lin", "v_lin"), "out_lin", ""),  # DistilBERT
    (("query", "key", "value"), "dense", ""),  # ALBERT
    (("c_attn",), "c_proj", ""),  # GPT-2
    (("query_key_value",), "dense", ""),  # GPT-NeoX, Bloom
)
_BY_HEAD = ("query_key_value",)  # queries, keys and values of one head, then of the next; else all queries come first
# Attention whose heads stay, and why.
_WHOLE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("q", "k", "v"), "o", "its heads stay: those of all layers share a bias of positions"),  # T5, MPNet
    (("qkv_proj",), "o_proj", "its heads stay: it takes their number from the configuration of all layers"),  # Phi-3
)
_MLP: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),  # timm, CLIP, OPT, BART
    (("gate_proj", "up_proj"), "down_proj"),  # Llama
    (("gate_up_proj",), "down_proj"),  # Phi-3: both in one, one after the other
    (("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Bloom
    (("intermediate.dense",), "output.dense"),  # BERT, ViT
    (("linear1",), "linear2"),  # torch.nn.TransformerEncoderLayer
    (("lin1",), "lin2"),  # DistilBERT
    (("ffn",), "ffn_output"),  # ALBERT
    (("c_fc",), "c_proj"),  # GPT-2
    (("wi_0", "wi_1"), "wo"),  # T5 v1.1
    (("wi",), "wo"),  # T5
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_SIZES = ("head_dim", "attention_head_size", "head_size")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "split_size")
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def blocks(model: nn.Module, ignored: Collection[str] = ()) -> Structure | None:
    """The structure of a model that has blocks of a known kind, else None.

    Args:
        model: as it is.
        ignored: names of modules whose outputs all stay.
    """
    found = _Collected(model, set(ignored))
    known = False
    for name, module in model.named_modules():
        known |= isinstance(module, _BLOCKS)
        for producers, reader, inside in _ATTENTION:
            layers = _layers(module, (*producers, reader))
            numbers = _submodule(module, inside)
            if layers is not None and numbers is not None and found.heads(name, producers, reader, layers, numbers):
                known = True
                break
        else:
            known |= found.whole(name, module)
        for producers, reader in _MLP:
            layers = _layers(module, (*producers, reader))
            if layers is not None:
                found.neurons(name, producers, reader, layers)
    if not known or not found.groups:
        return None
    return Structure(tuple(found.groups), tuple(found.entries), (), tuple(found.attributes), found.protected)


@dataclass
class _Layer:
    """A Linear, or a Conv1D of transformers, whose weight lies the other way."""

    module: nn.Module
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self.module._parameters.get("bias")


class _Collected:
    """Groups, entries and attributes, one block after the other."""

    def __init__(self, model: nn.Module, ignored: set[str]):
        self.groups: list[CoordinateGroup] = []
        self.entries: list[Entry] = []
        self.attributes: list[Attribute] = []
        self.protected: dict[str, str] = {}
        self._tied = _tied(model)
        self._kept, self._read = dict.fromkeys(self._tied, "tied weights"), set[str]()
        self._kept.update(dict.fromkeys(ignored, "ignored_layers"))
        self._model = model

    def neurons(self, name: str, producers: Sequence[str], reader: str, layers: list[_Layer]) -> None:
        """The neurons between two layers of an MLP, of a gated one between three, or two with both parts in one."""
        width = layers[-1].inputs
        times = 2 if producers[0] == "gate_up_proj" else 1
        if all(layer.outputs == times * width for layer in layers[:-1]):
            index = torch.arange(width, dtype=torch.int64, device="cpu")
            self._add(name, producers, reader, layers, "neuron", [index.repeat(times)] * len(producers), width, index)

    def whole(self, name: str, module: nn.Module) -> bool:
        """Whether it is an attention whose heads stay; what computes them is then protected."""
        for producers, reader, reason in _WHOLE:
            layers = _layers(module, (*producers, reader))
            if layers is not None:
                for one in producers:
                    self.protected.setdefault(f"{name}.{one}" if name else one, reason)
                return True
        return False

    def heads(self, name: str, producers: Sequence[str], reader: str, layers: list[_Layer], numbers: nn.Module) -> bool:
        """The heads of an attention; whether it is one."""
        width = layers[-1].inputs
        counts = [getattr(numbers, one) for one in _HEADS if isinstance(getattr(numbers, one, None), int)]
        sizes = [getattr(numbers, one) for one in _SIZES if isinstance(getattr(numbers, one, None), int)]
        size = sizes[0] if sizes else None
        size = width // counts[0] if size is None and counts else size
        if not isinstance(size, int) or size < 1 or width % size:
            return False
        queries = width // size
        keys = queries if len(producers) == 1 else layers[1].outputs // size
        if len(producers) == 1:
            fits = layers[0].outputs == 3 * width
        else:
            fits = layers[0].outputs == width and layers[1].outputs == layers[2].outputs == keys * size
        if not fits or keys < 1 or queries % keys:
            return False
        key = torch.arange(keys, dtype=torch.int64, device="cpu")
        query = key.repeat_interleave(queries // keys)
        wide, narrow = query.repeat_interleave(size), key.repeat_interleave(size)
        indices = [wide, narrow, narrow]
        if len(producers) == 1:
            indices = [query.repeat_interleave(3 * size) if producers[0] in _BY_HEAD else wide.repeat(3)]
        first = self._add(name, producers, reader, layers, "head", indices, keys, wide)
        if first is not None:
            inside = self._of(numbers)
            for names, index in ((_HEADS, query), (_KEY_HEADS, key), (_WIDTHS, wide)):
                for one in names:
                    if getattr(numbers, one, None) == len(index):
                        self.attributes.append(Attribute(inside, one, index + first))
            for full, parameter in numbers.named_parameters(prefix=inside):  # a bias for every head, as in Swin
                if full.endswith("relative_position_bias_table") and parameter.shape[-1] == queries:
                    self.entries.append(Entry(full, parameter.dim() - 1, query + first, "follower"))
        return True

    def _add(
        self,
        name: str,
        producers: Sequence[str],
        reader: str,
        layers: Sequence[_Layer],
        kind: str,
        indices: Sequence[Tensor],  # the coordinate of every output of each producer, counted from 0
        size: int,
        read: Tensor,  # of every input of the reader
    ) -> int | None:
        """The first coordinate of a new group, or None if its weights must stay."""
        paths = [f"{name}.{one}" if name else one for one in (*producers, reader)]
        named = paths[0]
        kept = [path for path in paths[:-1] if path in self._kept]
        if paths[-1] in self._tied:
            kept.append(paths[-1])
        if kept or size < 2 or paths[-1] in self._read:
            self.protected.update({path: self._kept[path] for path in kept})
            return None
        self._read.add(paths[-1])
        first = sum(group.size for group in self.groups)
        self.groups.append(CoordinateGroup(named, kind, first, size))
        for path, layer, index in zip(paths, layers, indices, strict=False):
            self.entries.append(Entry(f"{path}.weight", 1 if layer.transposed else 0, index + first, "producer"))
            if layer.bias is not None:
                self.entries.append(Entry(f"{path}.bias", 0, index + first, "follower"))
        gate = 0 if layers[-1].transposed else 1
        self.entries.append(Entry(f"{paths[-1]}.weight", gate, read + first, "gate"))
        return first

    def _of(self, module: nn.Module) -> str:
        return next(name for name, one in self._model.named_modules() if one is module)


def _layers(module: nn.Module, paths: Sequence[str]) -> list[_Layer] | None:
    """The layers at these paths, or None if one is missing or something else."""
    found = []
    for path in paths:
        layer = _submodule(module, path)
        transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        if layer is None or not (transposed or type(layer) in _LINEAR):
            return None
        if layer._parameters.get("weight") is None:  # computed from others
            return None
        found.append(_Layer(layer, transposed))
    return found


_LINEAR = (
    nn.Linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _tied(model: nn.Module) -> set[str]:
    """Names of modules with a parameter that goes by several names."""
    names = [(name, id(one)) for name, one in model.named_parameters(remove_duplicate=False)]
    uses = Counter(one for _, one in names)
    return {name.rpartition(".")[0] for name, one in names if uses[one] > 1}
