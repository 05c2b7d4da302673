"""What a step over channels, heads and neurons costs beside forward and backward: selection, gates, move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfpk_kernels._dispatch import where_present
from sfpk_kernels.ops import TransitionStats, transition_
from sfpk_kernels.structure import Costs, GateBuffers, Structure, find_structure, gate_gradient, gated_weights, select

from ..models import Vit, resnet, resnet18
from ..registry import NAIVE, Call, Case, Op, Provider, Seeded, Shape
from .structured import on_threads
from .transition import PLAIN

GATE = 1e-5  # of the largest gradient; kept coordinates and gated weights are compared exactly
SPARSITY = 0.5  # of the multiply-accumulates
PASS = "forward and backward"
MODELS: dict[str, tuple[Callable[[int], nn.Module], int]] = {  # by the side of the images; and their channels
    "resnet-demo": (lambda image: resnet(8, 16, channels=1), 1),
    "resnet-18": (lambda image: resnet18(), 3),
    "deit-t": (lambda image: Vit(192, 12, 3, image=image, classes=1000), 3),
}


@dataclass
class Inputs:
    """A model, a batch, scores of its coordinates, and gradients of the weights that read them."""

    model: nn.Module
    structure: Structure
    costs: Costs
    dense: dict[str, Tensor]
    score: Tensor  # (C,)
    grads: dict[str, Tensor] = field(default_factory=dict)
    x: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32, device="cpu"))
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64, device="cpu"))
    threads: int = 1


@dataclass
class Output:
    """Of one particle's step; empty where it was the pass alone."""

    keep: Tensor | None = None  # (C,) bool
    gated: dict[str, Tensor] = field(default_factory=dict)
    gradient: Tensor | None = None  # (C,)


def build(shape: Shape, device: torch.device) -> Case:
    """An untrained model; its coordinates have random scores, its weights random gradients.

    Raises:
        ImportError: torch-pruning is needed and not installed.
    """
    torch.manual_seed(0)
    make, channels = MODELS[shape["model"]]
    model = make(shape["image"]).to(device)
    random = Seeded(device)
    x = random.randn(shape["batch"], channels, shape["image"], shape["image"])
    structure = find_structure(model.eval(), x[:1], check=False)
    costs = Costs(model, structure, (x[:1],))
    parameters = dict(model.named_parameters())
    dense = {entry.tensor: parameters[entry.tensor].detach() for entry in structure.gates}
    grads = {name: random.randn(*weight.shape) for name, weight in dense.items()}
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)
    score = random.rand(structure.size)
    inputs = Inputs(model.train(), structure, costs, dense, score, grads, x, labels, shape["threads"])
    wanted = plain(inputs)

    def check(output: Output) -> str | None:
        if output.keep is None or output.gradient is None or wanted.keep is None or wanted.gradient is None:
            return None  # the pass has nothing to compare
        if not torch.equal(output.keep, wanted.keep):
            return f"{int((output.keep != wanted.keep).sum()):,} coordinates differ"
        wrong = [name for name, weight in wanted.gated.items() if not torch.equal(weight, output.gated[name])]
        if wrong:
            return f"gated weights differ: {', '.join(wrong)}"
        error = float((output.gradient - wanted.gradient).abs().max() / wanted.gradient.abs().max())
        return None if error <= GATE else f"the gradient is off by {error:.1e}"

    size = sum(weight.numel() for weight in dense.values())
    return Case({**shape, "coordinates": structure.size}, inputs, 0, check, 12 * size)


def plain(inputs: Inputs) -> Output:
    """By the functions that say what is computed."""
    keep = select(inputs.structure, inputs.costs, inputs.score, SPARSITY).to(inputs.score.device)
    gated = gated_weights(inputs.structure, inputs.dense, keep)
    return Output(keep, gated, gate_gradient(inputs.structure, inputs.dense, inputs.grads))


def _arithmetic(gates: Callable[[Inputs], Callable[[Tensor], Output]], backend: str | None) -> Callable[[Case], Call]:
    """Selection, gates and move of one particle."""

    def make(case: Case) -> Call:
        inputs: Inputs = case.inputs
        run = gates(inputs)
        particles = torch.ones(1, inputs.structure.size, dtype=torch.float32, device=inputs.score.device)
        state: TransitionStats | None = None
        options: dict[str, Any] = dict(PLAIN)

        def call() -> Output:
            nonlocal state
            with torch.no_grad(), on_threads(inputs.threads):
                keep = select(inputs.structure, inputs.costs, inputs.score, SPARSITY).to(inputs.score.device)
                output = run(keep)
                assert output.gradient is not None
                state = transition_(particles, output.gradient[None], state=state, backend=backend, **options)
            return output

        return call

    return make


def _plain_gates(inputs: Inputs) -> Callable[[Tensor], Output]:
    buffers = {name: torch.empty_like(weight) for name, weight in inputs.dense.items()}

    def run(keep: Tensor) -> Output:
        for name, weight in gated_weights(inputs.structure, inputs.dense, keep).items():
            buffers[name].copy_(weight)
        return Output(keep, buffers, gate_gradient(inputs.structure, inputs.dense, inputs.grads))

    return run


def _our_gates(backend: str) -> Callable[[Inputs], Callable[[Tensor], Output]]:
    def make(inputs: Inputs) -> Callable[[Tensor], Output]:
        gates = GateBuffers(inputs.structure, inputs.dense, backend)
        memory, gated = gates.new()

        def run(keep: Tensor) -> Output:
            gates.fill_(memory, keep)
            return Output(keep, gated, gates.gradient(inputs.grads))

        return run

    return make


def _pass(case: Case) -> Call:
    """One batch through the model and back to the weights that are gated."""
    inputs: Inputs = case.inputs
    names = dict(inputs.model.named_parameters())
    leaves = [names[name] for name in inputs.dense]
    for name, parameter in names.items():
        parameter.requires_grad_(name in inputs.dense)

    def call() -> Output:
        with on_threads(inputs.threads):
            for leaf in leaves:
                leaf.grad = None
            F.cross_entropy(inputs.model(inputs.x), inputs.labels).backward()
        return Output()

    return call


def _why_not(backend: str) -> Callable[[Shape, torch.device], str | None]:
    def why_not(shape: Shape, device: torch.device) -> str | None:
        from sfpk_kernels.ops.masking import BACKENDS

        if backend == "triton" and device.type != "cuda":
            return "Triton kernels run on GPUs; their interpreter is not timed"
        reason = BACKENDS[backend].why_not(torch.ones(1, dtype=torch.float32, device=device))
        return reason.splitlines()[0] if reason else None

    return why_not


def _shapes(*some: tuple[str, int, int]) -> tuple[Shape, ...]:
    return tuple({"model": name, "batch": batch, "image": image, "threads": 1} for name, image, batch in some)


SHAPES = {
    "quick": _shapes(("resnet-demo", 8, 16)),
    "default": _shapes(("resnet-demo", 8, 64), ("resnet-18", 160, 16), ("deit-t", 160, 16)),
    "full": _shapes(("resnet-18", 160, 64), ("deit-t", 160, 64)),
}

OPS = (
    Op("structured_step", "selection, gates and move of one particle, beside its pass", SHAPES, build,
       (Provider(NAIVE, _arithmetic(_plain_gates, "reference")),
        *(Provider(f"ours[{backend}]", _arithmetic(_our_gates(backend), where_present(backend)), _why_not(backend))
          for backend in ("cpp", "cuda", "triton", "reference")),
        Provider(PASS, _pass)),
       "structured_step"),
)  # fmt: skip
