"""``repair``: the kept weights of every layer solved anew, so that its outputs are those of the dense model."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..coordinates.flat import named_parameters, unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import default_loss, forward, move_to
from ..modeling.batchnorm import recalibrate_batchnorm
from ..modeling.layers import Hooks
from ..modeling.state import autograd_allowed, guarded, seeded
from ..modeling.turns import alone, end_contexts
from ..modeling.whole_model import Registered, WholeModel
from ..search.energy import LossFn
from ..utils.arguments import called, check_least, check_loader, check_loss_fn, check_model, check_positive
from .distillation import check_dense
from .layer_moments import masked_layers, moments_of, own_bias, stages
from .layer_repair import LayerRepair, Way
from .measured import check_mask, held_batches, mean_loss, tensor_of

_CALL = "repair(model, mask, loader, loss_fn=…)"
GUARDS = ("loss", "output", None)


@dataclasses.dataclass(frozen=True)
class RepairResult:
    """What :func:`repair` did; the model holds the weights."""

    layers: list[LayerRepair]  # in order of execution
    skipped: dict[str, str]  # masked tensors that are no such layers, by name, and why
    loss_before: float  # of the guard, on the held-out batches, of the masked model
    loss_after: float
    seconds: float

    @property
    def rejected(self) -> list[str]:
        """Layers whose change the guard refused."""
        return [layer.name for layer in self.layers if not layer.kept]

    def __repr__(self) -> str:
        return (
            f"RepairResult({len(self.layers)} layers, {len(self.rejected)} rejected, loss {self.loss_before:.4f} → "
            f"{self.loss_after:.4f}, {self.seconds:.1f} s)"
        )


@called(_CALL)
@alone
def repair(
    model: nn.Module,
    mask: MaskSet,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    dense: nn.Module | None = None,
    guard: str | None = "loss",
    evaluate: Iterable[Any] | None = None,
    max_batches: int | None = 64,
    damping: float = 0.01,
    iterations: int = 30,
    seed: int = 0,
) -> RepairResult:
    """Mask ``model`` and solve its kept weights anew, layer by layer, in place; no gradients, removed weights stay 0.

    For each Linear and Conv2d layer, in order of execution: min over the kept weights W and the bias b of
    ‖Y - W X - b‖² + λ‖W - W_masked‖², where Y are the outputs of that layer in the dense model and X its inputs in the
    model repaired so far (layer-wise reconstruction as in Frantar and Alistarh 2022, arXiv:2208.11580, eq. 1, here with
    the dense model's own outputs). Of the ways of 1, ½ and ¼ towards the solution the one with the least loss on
    held-out batches is taken, or none where none lowers it (the guard). It helps most after a one-shot or a magnitude
    mask, and little or nothing after a searched one, where :func:`finetune_masked` is what helps.

    Everything is measured in eval mode, batch-norm on the batch's statistics; at the end its running statistics are
    recalibrated on the calibration batches. Cost: for every layer (those with one input, such as q, k and v, share it)
    one forward pass of the dense and of the pruned model over the calibration batches; three of the pruned one over the
    held-out ones (of both, to compare outputs); S·(C² + C·R) multiplications for the moments of S samples
    (for a convolution S counts positions, C is channels times kernel size); ``iterations``·R·C² for the solution: for
    C = 4,096, R = 10,000 and S = 131,072 that is 8·10¹² and 5·10¹². Memory: two copies of the model, and a few times
    C² and R·C numbers for one layer (those with one input) at a time.

    After an error or an interruption the model is as it came in.

    Args:
        model: the dense model, to be masked and repaired; or one masked already, with ``dense``.
        mask: of ``model``.
        loader: calibration batches, held meanwhile.
        loss_fn: ``loss_fn(model, batch) -> scalar``, for the guard, and to run the model; ``None`` for the default loss
            (and a plain forward pass).
        dense: the dense model, not changed; ``None`` for ``model`` as it came in.
        guard: ``"loss"``: of the task, which needs labels; ``"output"``: the squared distance of the model's outputs
            from the dense ones, as a share of their squares; ``None``: every solution is taken as it is, and the loss
            that is reported is that of ``"output"``.
        evaluate: the held-out batches; ``None`` for the last quarter of those taken from ``loader``.
        max_batches: taken from ``loader``; ``None`` for all.
        damping: λ as a share of the mean of the diagonal of X Xᵀ, > 0.
        iterations: of conjugate gradients, ≥ 1.
        seed: of the order of the data.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: masks of another model, one that is masked already without ``dense``, a ``dense`` that is no copy of
            it, too few batches, no layer to repair, an option out of its range.
        FloatingPointError: a loss, inputs or outputs that are not finite.
    """
    check_model(model)
    check_mask(mask, model, _CALL)
    model = unwrapped(model)
    check_loader(loader)
    check_loss_fn(loss_fn)
    if guard not in GUARDS:
        raise ValueError(f"guard: wanted 'loss', 'output' or None, got {guard!r}")
    if max_batches is not None:
        check_least("max_batches", max_batches, 1, " or None")
    check_positive("damping", damping)
    check_least("iterations", iterations, 1)
    if dense is None:
        _check_is_dense(model, mask)
    else:
        check_dense("dense", dense, model)
        mask.check(dense)
        dense = unwrapped(dense)
    layers, skipped = masked_layers(model, mask)
    device = next(iter(named_parameters(model).values())).device
    with seeded(seed, device):
        held = None if evaluate is None else held_batches("evaluate", evaluate)
        calibration = list(islice(loader, max_batches))
    if held is None:
        count = max(1, len(calibration) // 4)
        calibration, held = calibration[:-count], calibration[-count:]
    if not calibration:
        raise ValueError(
            "loader: wanted at least one batch to calibrate on, and one more to judge by unless evaluate= has some, "
            f"got {len(held) if evaluate is None else 0}"
        )
    started = time.perf_counter()
    dense = copy.deepcopy(model) if dense is None else dense
    parts = Registered(model), Registered(dense), Hooks(model, dense), WholeModel(model)
    loss = loss_fn or default_loss if guard == "loss" else _distance_from(dense)
    run = loss_fn or forward

    def judge() -> float:
        return mean_loss(model, loss, held, device, "batch")

    try:
        with autograd_allowed():
            mask.apply_(model)
            with guarded(model, bn="batch", training=False), guarded(dense, bn="batch", training=False):
                before = least = judge()
                order = stages(model, layers, move_to(calibration[0], device), run)
                reached = {layer for stage in order for layer in stage}
                skipped |= {layer.tensor.name: "not called" for layer in layers if layer not in reached}
                if not order:
                    raise ValueError(f"mask: wanted masks of Linear or Conv2d layers that are called, got {skipped}")
                done: list[LayerRepair] = []
                for stage in order:
                    moments = moments_of(stage, model, dense, calibration, device, run)
                    for layer in stage:
                        problem = moments.pop(layer).problem(centred=own_bias(layer) is not None)
                        way = Way(layer, mask, problem, damping, iterations)
                        done.append(way.walked(None if guard is None else judge, least))
                        least = done[-1].loss
                after = judge()
            recalibrate_batchnorm(model, calibration, forward_fn=run)
        return RepairResult(done, skipped, before, after, time.perf_counter() - started)
    except BaseException as error:
        end_contexts(error)
        for part in parts:
            part.restore()
        raise


def _check_is_dense(model: nn.Module, mask: MaskSet) -> None:
    """That some of what the mask removes is still there.

    Raises:
        ValueError: it was removed before, so that there is nothing to repair towards.
    """
    parameters = named_parameters(model)
    removed = [parameters[name].detach()[~mask[name].to(parameters[name].device)] for name in mask]
    if mask.kept < mask.prunable and not any(bool(values.any()) for values in removed):
        raise ValueError(
            "model: wanted the dense model, whose outputs are the aim, got one whose removed weights are all 0: pass "
            "it before masking, or the dense one as dense="
        )


def _distance_from(dense: nn.Module) -> LossFn:
    """The squared distance from the dense outputs, as a share of their squares."""

    def distance(model: nn.Module, batch: Any) -> Tensor:
        wanted, output = (tensor_of(forward(each, batch)).float() for each in (dense, model))
        return (output - wanted).square().sum() / wanted.square().sum()

    return distance
