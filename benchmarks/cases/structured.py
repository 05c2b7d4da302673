"""One call of a model that structured pruning made smaller, beside the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfpk_kernels.baselines import structured_magnitude
from sfpk_kernels.structure import find_structure, gated_call

from ..models import Vit, resnet18, resnet50
from ..registry import NAIVE, Case, Op, Provider, Shape

TOLERANCE = 1e-4  # of the largest output; sums of thousands of products in another order
REMOVED = (0.5, 0.75)  # of the multiply-accumulates
DENSE = 0.0
MODELS: dict[str, Callable[[int], nn.Module]] = {  # by the side of the images
    "resnet-18": lambda image: resnet18(),
    "resnet-50": lambda image: resnet50(),
    "deit-s": lambda image: Vit(384, 12, 6, image=image, classes=1000),
    "deit-t": lambda image: Vit(192, 12, 3, image=image, classes=1000),
}


@dataclass
class Inputs:
    """Models by the fraction that was removed, and what they are called with."""

    models: dict[float, nn.Module]
    x: Tensor
    threads: int


@dataclass
class Output:
    """Whose it is, too: each has its own reference."""

    removed: float
    logits: Tensor


def build(shape: Shape, device: torch.device) -> Case:
    """Untrained models with the same fraction removed of every layer, by magnitude.

    Raises:
        ImportError: torch-pruning is needed and not installed.
    """
    torch.manual_seed(0)
    model = MODELS[shape["model"]](shape["image"]).eval().to(device)
    x = torch.randn(shape["batch"], 3, shape["image"], shape["image"], dtype=torch.float32, device="cpu").to(device)
    structure = find_structure(model, x[:1], check=False)  # each case is judged by its own comparison
    found = {
        removed: structured_magnitude(model, removed, example_inputs=x[:1], structure=structure, allocation="uniform")
        for removed in REMOVED
    }
    inputs = Inputs({DENSE: model, **{r: one.shrink(model) for r, one in found.items()}}, x, shape["threads"])
    dense = found[REMOVED[0]].dense["macs"]

    def check(output: Output) -> str | None:
        logits, removed = output.logits, output.removed
        with torch.inference_mode():
            everything = torch.ones(structure.size, dtype=torch.bool)
            keep = everything if removed == DENSE else found[removed].keep
            wanted = gated_call(model, structure, keep, (x,))
        if removed != DENSE and found[removed].left["macs"] > round((1 - removed) * dense):
            return f"{found[removed].left['macs']:,} of {dense:,} multiply-accumulates are left"
        difference = float((logits - wanted).abs().max() / wanted.abs().max())
        return None if difference <= TOLERANCE else f"differs from the masked model by {difference:.1e}"

    held = sum(p.numel() for one in inputs.models.values() for p in one.parameters())
    return Case({**shape, "macs": dense}, inputs, 0, check, 4 * held)


def one_call(removed: float) -> Callable[[Case], Callable[[], Output]]:
    """The model without so much of its multiply-accumulates."""

    def make(case: Case) -> Callable[[], Output]:
        inputs: Inputs = case.inputs
        model = inputs.models[removed]

        def call() -> Output:
            with torch.inference_mode(), on_threads(inputs.threads):
                return Output(removed, model(inputs.x))

        return call

    return make


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many threads of the CPU."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def _shapes(names: tuple[str, ...], image: int, batches: tuple[int, ...] = (1, 16)) -> tuple[Shape, ...]:
    return tuple({"model": name, "batch": batch, "image": image, "threads": 1} for name in names for batch in batches)


SHAPES = {
    "quick": _shapes(("deit-t",), 32, (1,)),
    "default": _shapes(("resnet-18", "deit-s"), 160),
    "full": _shapes(("resnet-18", "resnet-50", "deit-s", "deit-t"), 160),
    "cuda default": _shapes(("deit-s",), 160, (16,)),
}

OPS = (
    Op("shrunk", "one call of a shrunk model", SHAPES, build,
       (Provider(NAIVE, one_call(DENSE)),
        *(Provider(f"ours, {100 * removed:.0f} % of MACs removed", one_call(removed)) for removed in REMOVED)),
       "structured"),
)  # fmt: skip
