"""Gates in flat buffers give what the plain functions give."""

import copy

import pytest
import torch

from sfpk_kernels.ops.masking import PreparedMasking
from sfpk_kernels.structure import GateBuffers, find_structure, gate_gradient, gated_weights

from .structured_nets import NETS, make
from .test_structure_adapters import vit

pytest.importorskip("torch_pruning")


def parts(name):
    """(structure, the model's tensors)"""
    model, x = vit() if name == "vit" else make(name)
    structure = find_structure(model, x, check=False)
    return structure, {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def filled(buffers, keep):
    memory, views = buffers.new()
    for one in memory:
        one.fill_(torch.nan)
    buffers.fill_(memory, keep)
    return views


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", [*NETS, "vit"])
def test_as_the_plain_ones(name, dtype):
    structure, tensors = parts(name)
    tensors = {name: one.to(getattr(torch, dtype)) for name, one in tensors.items()}
    grads = {entry.tensor: torch.randn_like(tensors[entry.tensor]) for entry in structure.gates}
    for backend in (None, "reference"):
        buffers = GateBuffers(structure, tensors, backend)
        for keep in (torch.rand(structure.size) < 0.5, torch.rand(structure.size)):
            views = filled(buffers, keep)
            wanted = gated_weights(structure, tensors, keep)
            assert views.keys() == wanted.keys()
            for tensor, view in views.items():
                if keep.dtype == torch.bool:
                    assert torch.equal(view, wanted[tensor]), tensor
                else:  # there the value is rounded to the weights' dtype before it is multiplied
                    torch.testing.assert_close(view, wanted[tensor])
        wide, wide_grads = ({n: one.double() for n, one in some.items()} for some in (tensors, grads))
        exact = gate_gradient(structure, wide, wide_grads)
        size = gate_gradient(structure, *({n: one.abs() for n, one in some.items()} for some in (wide, wide_grads)))
        found = buffers.gradient(grads)
        assert found.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        # Each product is rounded to fp32, as are the sums of each weight and the result.
        error = 1e-12 if dtype == "float64" else 2**-23
        assert bool(((found.double() - exact).abs() <= error * size).all())


def test_memory_formats_stay():
    structure, tensors = parts("residual")
    plain = GateBuffers(structure, tensors)
    moved = {n: w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for n, w in tensors.items()}
    moved["head.fc.weight"] = moved["head.fc.weight"].t().contiguous().t()
    buffers = GateBuffers(structure, moved)
    keep = torch.rand(structure.size) < 0.5
    grads = {entry.tensor: torch.randn_like(tensors[entry.tensor]) for entry in structure.gates}
    views = filled(buffers, keep)
    for name, wanted in filled(plain, keep).items():
        assert torch.equal(views[name], wanted)
        assert views[name].stride() == moved[name].stride()
    torch.testing.assert_close(buffers.gradient(grads), plain.gradient(grads))


def test_gaps_in_memory_are_no_trouble():
    structure, tensors = parts("residual")
    spaced = {name: one.repeat_interleave(2, -1)[..., ::2] for name, one in tensors.items()}
    keep = torch.rand(structure.size) < 0.5
    wanted = filled(GateBuffers(structure, tensors), keep)
    for name, view in filled(GateBuffers(structure, spaced), keep).items():
        assert torch.equal(view, wanted[name])


def test_two_dtypes_and_weights_without_a_gradient():
    structure, tensors = parts("squeeze-excite")
    first, *others = [entry.tensor for entry in structure.gates]
    tensors[first] = tensors[first].bfloat16()
    grads = {entry.tensor: torch.randn_like(tensors[entry.tensor]) for entry in structure.gates}
    buffers = GateBuffers(structure, tensors)
    keep = torch.rand(structure.size) < 0.5
    for name, view in filled(buffers, keep).items():
        assert view.dtype == tensors[name].dtype
        assert torch.equal(view, gated_weights(structure, tensors, keep)[name])
    for left in ({first}, set(others), {first, others[0]}, set()):
        given = {name: grad for name, grad in grads.items() if name in left}
        zeros = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        wanted = gate_gradient(structure, tensors, {**zeros, **given})
        torch.testing.assert_close(buffers.gradient(given), wanted, rtol=1e-5, atol=1e-6)


def test_removed_weights_are_zero_whatever_they_were():
    structure, tensors = parts("plain")
    gate = structure.gates[0]
    tensors = copy.deepcopy(tensors)
    column = tensors[gate.tensor].select(gate.dim, 1)
    column.fill_(torch.inf)
    keep = torch.arange(structure.size) != gate.index[1]
    assert bool((filled(GateBuffers(structure, tensors), keep)[gate.tensor].select(gate.dim, 1) == 0).all())


def test_bits_do_not_depend_on_threads():
    """Of weights that several threads share."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 130, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(130, 300, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(4800, 10),
    )  # fmt: skip
    structure = find_structure(net, torch.randn(1, 3, 4, 4), check=False)
    tensors = {name: p.detach() for name, p in net.named_parameters()}
    grads = {entry.tensor: torch.randn_like(tensors[entry.tensor]) for entry in structure.gates}
    buffers = GateBuffers(structure, tensors)
    keep = torch.rand(structure.size)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([buffers.gradient(grads), *filled(buffers, keep).values()])
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_nothing_waits_for_the_device():
    pytest.importorskip("triton")
    from .recorder import recorded

    structure, tensors = parts("flatten")
    buffers = GateBuffers(structure, tensors)
    with recorded() as recording:
        for flat in buffers._flats:
            for name in ("dense", "always", "read"):
                setattr(flat, name, moved(getattr(flat, name)))
            layout = [(one.outer, one.groups, one.inner) for one in flat.masking.pieces]
            flat.masking = PreparedMasking(flat.dense, layout)
        buffers._places = moved(buffers._places)
        memory, views = buffers.new()
        keep = torch.empty(structure.size, dtype=torch.bool, device="cuda:1")
        buffers.fill_(memory, keep)  # the first call brings what stays there
        recording.waits.clear()
        buffers.fill_(memory, keep)
        assert buffers.gradient({name: torch.empty_like(view) for name, view in views.items()}).shape == keep.shape
    assert not recording.waits


def moved(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:1")
