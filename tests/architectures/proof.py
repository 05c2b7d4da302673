"""What is shown of an architecture: masked is shrunk, costs are as counted, budgets are met to the finest."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfpk_kernels.structure import Costs, ShrinkRecipe, find_structure, gated_call, select, shrink
from sfpk_kernels.structure.outputs import tensors_in

from .attentive import Product


def alive(model, inputs):
    """Weights and norms as large as in a trained net, statistics of batch-norm as met: no output is constant."""
    generator = torch.Generator().manual_seed(5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                inside = parameter.shape[0] if "c_" in name else parameter[0].numel()  # Conv1D of GPT-2 is (in, out)
                parameter.copy_(values * (1.5 / inside) ** 0.5)
            else:
                shift = 1 if "weight" in name or "lambda" in name or "gamma" in name else 0
                parameter.copy_(shift + 0.2 * values)
        model.eval()
        for norm in norms:
            norm.train().momentum = 1.0
        call(model, inputs)
    return model.eval()


def call(model, inputs):
    """All outputs in one row per example."""
    args, kwargs = split(inputs)
    return joined(model(*args, **kwargs))


def split(inputs):
    return ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})


def joined(outputs):
    return torch.cat([one.flatten(1) for one in tensors_in(outputs)], 1)


def counted(model, inputs):
    """(parameters, multiplications): each layer's by the shapes that its hook sees, and products of matrices."""
    total = 0

    def look(module, args, output):
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            total += args[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output.numel() * module.weight.shape[1]
        else:
            total += output.numel() * args[0].shape[-1]

    kinds = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, Product)
    handles = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return sum(p.numel() for p in model.parameters()), total


def by_torch(model, inputs):
    """The same, for attention that no hook sees, as torch counts operations."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        call(model, inputs)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def random_keep(structure, share, generator):
    """Bernoulli, of every group and every layer one at least."""
    keep = torch.rand(structure.size, generator=generator) >= share
    for layer in [*(torch.arange(g.first, g.first + g.size) for g in structure.groups), *structure.layers]:
        if not keep[layer].any():
            keep[layer[0]] = True
    return keep


def prove(model, inputs, count=counted, sparsity=0.5, **options):
    """All of it; gives the structure.

    Args:
        model, inputs: what is looked at, at least two examples.
        count: counts parameters and multiplications.
        options: of ``find_structure``.
    """
    args, kwargs = split(inputs)
    structure = find_structure(model, inputs, **options)
    costs = Costs(model, structure, args, kwargs)
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(structure.size, generator=generator)
    chosen = {
        (budget, multiple): select(structure, costs, score, sparsity, budget, round_to=multiple)
        for budget, multiple in (("macs", 1), ("params", 1), ("channels", 1), ("macs", 8))
    }
    with torch.no_grad():
        dense = call(model, inputs)
        assert (dense[0] - dense[1]).abs().max() > 1e-2 * dense.abs().max()  # it depends on its inputs
        assert dict(zip(("params", "macs"), count(model, inputs), strict=True)).items() <= costs.dense.items()
        for keep in (*chosen.values(), *(random_keep(structure, share, generator) for share in (0.1, 0.7))):
            smaller = shrink(model, structure, keep)
            masked, shrunk = joined(gated_call(model, structure, keep, args, kwargs)), call(smaller, inputs)
            scale = torch.maximum(dense.abs().max(), masked.abs().max())
            assert (masked - shrunk).abs().max() <= 1e-5 * scale
            assert (masked - dense).abs().max() > 1e-3 * dense.abs().max()
            assert count(smaller, inputs) == (costs.cost(keep, "params"), costs.cost(keep, "macs"))
            assert all(p.numel() for p in smaller.parameters())
            one = {name: x[:1] for name, x in kwargs.items()} if kwargs else inputs[:1]
            assert (call(smaller, one) - shrunk[:1]).abs().max() <= 1e-4 * scale
    for (budget, multiple), keep in chosen.items():
        finest(structure, costs, score, keep, budget, multiple, sparsity)
    return structure


def finest(structure, costs, score, keep, budget, multiple, sparsity):
    """No more than the cost allowed, multiples kept, and there is no room for a single step more of any group."""
    limit = round((1 - sparsity) * costs.dense[budget])
    assert costs.cost(keep, budget) <= limit
    for group in structure.groups:
        count = int(keep[group.span].sum())
        assert 0 < count <= group.size
        assert count % multiple == 0 or count == group.size
        removed = (~keep[group.span]).nonzero().flatten() + group.first
        best = removed[score[removed].argsort(descending=True)]
        places = range(0, len(best), max(len(best) // 8, 1)) if multiple == 1 else range(min(len(best), 1))
        for first in places:
            more = keep.clone()
            more[best[first : first + multiple]] = True
            assert costs.cost(more, budget) > limit, f"room for more of {group.name}"


def prove_gradients(model, inputs):
    """In train mode the kept weights of the masked model have the gradients that those of the smaller one have."""
    model, inputs = copy.deepcopy(model).double().train(), inputs.double()
    structure = find_structure(model, inputs, check=False)
    keep = random_keep(structure, 0.4, torch.Generator().manual_seed(2))
    smaller = shrink(model, structure, keep)
    recipe = ShrinkRecipe.of(structure, keep)
    outputs = joined(gated_call(model, structure, keep, (inputs,))), call(smaller, inputs)
    for found in outputs:
        (found * torch.linspace(-1, 1, found.shape[1], dtype=found.dtype)).square().sum().backward()
    wanted = dict(smaller.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in wanted.values())
    for name, parameter in model.named_parameters():
        got = parameter.grad
        for dim, places in recipe.slices.get(name, {}).items():
            got = got.index_select(dim, torch.tensor(places))
        assert (got - wanted[name].grad).abs().max() <= 1e-8 * largest, name
    for name, buffer in smaller.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            seen = model.get_buffer(name)[recipe.slices.get(name, {}).get(0, slice(None))]
            assert (seen - buffer).abs().max() <= 1e-8 * seen.abs().max(), name
