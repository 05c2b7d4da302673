"""States with one entry altered at random."""

import copy
import math

import torch

_OTHERS = (None, True, 3, -1, 10**30, 1.5, math.nan, math.inf, "x", b"x", [], {}, (1, 2), object(), {"a": 1}, [None])


def places(value, path=()):
    """Paths to every entry of nested dicts and lists, inner ones, too."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def get(value, path):
    for key in path:
        value = value[key]
    return value


def changed(value, path, change):
    """A copy in which ``change(container, key)`` was applied to one entry; tuples on the way become lists."""
    value = list(value) if isinstance(value, tuple) else copy.copy(value)
    if len(path) == 1:
        change(value, path[0])
    else:
        value[path[0]] = changed(value[path[0]], path[1:], change)
    return value


def _tensors(tensor, draw):
    flat = tensor.reshape(-1)
    some = tensor.clone()
    if tensor.numel():
        place = draw.randrange(tensor.numel())
        value = draw.choice([math.nan, math.inf, 1e30]) if tensor.is_floating_point() else 255 - int(flat[place])
        some.view(-1)[place] = value
    return [
        some,
        tensor.to(torch.float64) if tensor.dtype != torch.float64 else tensor.to(torch.float32),
        tensor.to(torch.int32),
        tensor.to(torch.complex64),
        tensor[..., :-1] if tensor.dim() else tensor[None],
        tensor[None],
        flat if tensor.dim() > 1 else tensor.expand(2, *tensor.shape),
        tensor.new_empty(0),
        tensor.to("meta"),
        tensor.to_sparse() if tensor.numel() and tensor.dtype != torch.uint8 else tensor[:0],
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        tensor.numpy(force=True) if tensor.dtype != torch.bfloat16 else tensor.tolist(),
        torch.full_like(tensor, 7),
    ]


def alter(state, draw):
    """An altered copy of a state; words that say what was done; whether a part of it alone is another value."""
    path = draw.choice(list(places(state)))
    value = get(state, path)

    def write(new):
        return changed(state, path, lambda container, key: container.__setitem__(key, new))

    kinds = ["other", "other", "missing", "extra"]
    kinds += ["own"] * 4 if not isinstance(value, str | None.__class__) else ["own"]
    kind = draw.choice(kinds)
    if kind == "missing":
        return changed(state, path, lambda container, key: container.pop(key)), f"{path} removed"
    if kind == "extra":
        if isinstance(value, dict):
            return write({**value, draw.choice(["more", 3, None]): 1}), f"{path} with another entry"
        if isinstance(value, list):
            return write([*value, *(value[-1:] or [1])]), f"{path} longer"
        return {**state, "more": value}, "another entry"
    new = draw.choice(_OTHERS)
    if kind == "own":
        if isinstance(value, torch.Tensor):
            number = draw.randrange(13)
            new, kind = _tensors(value, draw)[number], f"own {number}"
        elif isinstance(value, bool | str):
            new = value[:-1] if isinstance(value, str) else not value
        elif isinstance(value, int):
            new = value + draw.choice([-1, 1, 2, 1000, -1000])
        elif isinstance(value, float):
            new = draw.choice([-value - 1, value + 1.5, math.nan, math.inf, -math.inf, value * 3, str(value)])
        elif isinstance(value, list | tuple):
            new = draw.choice([list(value)[:-1], list(value)[::-1], [list(value)], set(), dict(enumerate(value))])
        elif isinstance(value, dict):
            new = draw.choice([list(value.items()), {}, dict.fromkeys(value)])
    words = f"{path}: {kind}: {type(new).__name__} {new!r:.60}" if not hasattr(new, "is_nested") else f"{path}: {kind}"
    return write(new), words
