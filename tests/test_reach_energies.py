"""Bare parameters, RNN weights, experts, own classes: masked passes are those of a model with masked weights."""

import copy

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, Execution, MaskSet, SFPKConfig, SFPKPruner, default_loss, prune
from sfpk_kernels.modeling import whole_model
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.search.energy import ParticleEnergy, _swap, capture, graphed

from .fake_graphs import DEVICE, Machine
from .interruptions import every_moment
from .reach_nets import KINDS, Recurrent, sequences
from .settings import population
from .snapshot import Snapshot

N = 3
MODES = [(kind, mode) for kind in KINDS for mode in ("sequential", "vmap") if mode == "sequential" or KINDS[kind][3]]


def task(kind):
    build, batch, options, _ = KINDS[kind]
    torch.manual_seed(0)
    model = build()
    coordinates = Coordinates(model, **options)
    keep = torch.rand(N, coordinates.d, generator=torch.Generator().manual_seed(1)) > 0.3
    return model, [batch() for _ in range(N)], coordinates, keep


def energies(model, batches, coordinates, keep, mode, **options):
    energy = ParticleEnergy(model, default_loss, coordinates, coordinates.flatten(model), mode=mode, **options)
    with guarded(model, bn="batch", training=False):
        return energy(keep, batches)


def by_hand(model, batches, coordinates, keep):
    losses, grads = [], []
    for mask, batch in zip(keep, batches, strict=True):
        twin = copy.deepcopy(model).eval()
        with torch.no_grad():
            for parameter, part in zip(coordinates.parameters(twin), coordinates.split(mask), strict=True):
                parameter.mul_(part)
        loss = default_loss(twin, batch)
        loss.backward()
        losses.append(loss.detach().double())
        grads.append(torch.cat([parameter.grad.flatten() for parameter in coordinates.parameters(twin)]))
    return torch.stack(losses), torch.stack(grads)


def held(model):
    """The very tensors that RNN layers run on."""
    return [[id(one) for one in module._flat_weights] for module in model.modules() if isinstance(module, nn.RNNBase)]


@pytest.mark.parametrize(("kind", "mode"), MODES)
def test_a_masked_pass_is_that_of_masked_weights(kind, mode):
    model, batches, coordinates, keep = task(kind)
    losses, grads = by_hand(model, batches, coordinates, keep)
    assert (grads.abs().sum(dim=1) > 0).all()
    snapshot, lists = Snapshot(model), held(model)
    found = energies(model, batches, coordinates, keep, mode)
    torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], grads, rtol=1e-4, atol=1e-6)
    snapshot.check()
    assert held(model) == lists
    default_loss(model, batches[0]).backward()  # it still runs on its own weights
    assert all(parameter.grad is not None for parameter in coordinates.parameters(model))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe"])
def test_experts_that_a_router_chooses(kind):
    """As transformers stores and calls them: which tokens an expert sees follows from the masked weights."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30,
        "intermediate_size": 24,
    }  # fmt: skip
    more = {"num_local_experts": 4} if kind == "Mixtral" else {
        "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.2)
    ids = [torch.randint(30, (4, 6)) for _ in range(N)]
    batches = [{"input_ids": one, "labels": one} for one in ids]
    coordinates = Coordinates(model)
    assert sum(tensor.numel for tensor in coordinates.tensors if tensor.stack == 4) > 0.3 * coordinates.d
    keep = torch.rand(N, coordinates.d, generator=torch.Generator().manual_seed(1)) > 0.3
    losses, grads = by_hand(model, batches, coordinates, keep)
    snapshot = Snapshot(model)
    found = energies(model, batches, coordinates, keep, "sequential")
    torch.testing.assert_close(found[0], losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], grads, rtol=1e-4, atol=1e-6)
    snapshot.check()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_agree(kind, monkeypatch):
    real = capture.captured
    monkeypatch.setattr(graphed, "captured", lambda once, row, model, device: real(once, row, model, DEVICE))
    model, batches, coordinates, keep = task(kind)
    expected = energies(model, batches, coordinates, keep, "sequential")
    snapshot, lists = Snapshot(model), held(model)
    with Machine().installed():
        found = energies(model, batches, coordinates, keep, "cudagraph")
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    snapshot.check()
    assert held(model) == lists


@pytest.mark.parametrize("kind", ["bare", "lstm", "experts"])
@pytest.mark.parametrize(("options", "share"), [({"precision": "bf16"}, 0.15), ({"microbatch": 2}, 1e-4)])
def test_other_precisions_and_micro_batches(kind, options, share):
    model, batches, coordinates, keep = task(kind)
    expected = energies(model, batches, coordinates, keep, "sequential")
    found = energies(model, batches, coordinates, keep, "sequential", **options)
    assert ((found[1] - expected[1]).norm(dim=1) <= share * expected[1].norm(dim=1)).all()


@pytest.mark.parametrize("kind", ["bare", "lstm", "experts"])
def test_layers_of_mixed_precision(kind):
    """The first matrix in fp64: each tensor is written in the dtype of its own."""
    model, batches, coordinates, keep = task(kind)
    expected = energies(model, batches, coordinates, keep, "sequential")
    model.double()
    mixed = Coordinates(model, **KINDS[kind][2])
    found = energies(model, [(x.double(), y) for x, y in batches], mixed, keep, "sequential")
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(found[1].float(), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_mask(kind, tmp_path):
    """Searched, saved, loaded, applied, enforced, handed over: exact zeros where the mask says, and there alone."""
    model, batches, coordinates, _ = task(kind)
    options, snapshot, lists = KINDS[kind][2], Snapshot(model), held(model)
    result = prune(model, batches, config=population(0.5, n_particles=2, n_steps=3), **options)
    snapshot.check()
    assert held(model) == lists
    assert result.mask.shapes == {tensor.name: tensor.shape for tensor in coordinates.tensors}
    assert result.mask.kept == round(coordinates.d / 2)
    result.mask.save(tmp_path / "mask.safetensors")
    masks = MaskSet.load(tmp_path / "mask.safetensors")
    assert masks == result.mask
    twin = copy.deepcopy(model)
    masks.apply_(twin)
    for name, parameter in twin.named_parameters():
        dense = model.get_parameter(name)
        assert torch.equal(parameter, dense * masks[name] if name in masks else dense), name
    assert MaskSet.from_model(twin, **options) == masks
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.1, weight_decay=0.1)
    with masks.enforce(optimizer, twin):
        for batch in batches:
            optimizer.zero_grad()
            default_loss(twin, batch).backward()
            optimizer.step()
    assert MaskSet.from_model(twin, **options) == masks
    assert not any(torch.equal(twin.get_parameter(name), model.get_parameter(name)) for name in masks)


@pytest.mark.parametrize("kind", ["own", "lstm", "gru-cell", "experts"])
def test_handed_over_to_torch(kind):
    model, batches, coordinates, keep = task(kind)
    masks = MaskSet.from_flat(keep[0], coordinates)
    masked = masks.apply_(copy.deepcopy(model))
    twin = masks.to_torch_prune(copy.deepcopy(model))
    torch.testing.assert_close(twin(batches[0][0]), masked(batches[0][0]))


@pytest.mark.parametrize("kind", ["bare", "lstm", "experts"])
def test_a_run_goes_on_from_a_file(kind, tmp_path):
    model, batches, _, _ = task(kind)
    options = {"config": SFPKConfig(0.5, n_steps=6), **KINDS[kind][2]}
    whole, first, second = (SFPKPruner(model, **options) for _ in range(3))
    for step in range(6):
        whole.step([batches[step % N]])
    for step in range(3):
        first.step([batches[step]])
    first.save(tmp_path / "run.sfpk")
    second.load(tmp_path / "run.sfpk")
    for step in range(3, 6):
        second.step([batches[step % N]])
    assert torch.equal(second.particles, whole.particles)
    assert not torch.equal(second.particles, first.particles)


def test_an_rnn_that_was_interrupted_anywhere_runs_on_its_own_weights():
    torch.manual_seed(0)
    model, batch = Recurrent(), sequences()
    snapshot, lists, before = Snapshot(model), held(model), model(batch[0])
    execution = Execution(energy_mode="sequential")
    count = 0

    def work():
        pruner = SFPKPruner(model, config=SFPKConfig(0.5, n_steps=1), execution=execution)
        pruner.step([batch])

    for _ in every_moment(work, [_swap.__file__, whole_model.__file__], step=13):
        count += 1
        assert held(model) == lists
        assert torch.equal(model(batch[0]), before)
        snapshot.check()
    assert count > 20
