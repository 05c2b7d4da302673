"""What a run must leave alone."""

import copy

import torch


def strided(model):
    """Its tensors that have memory of their own."""
    return [t for t in (*model.parameters(), *model.buffers()) if t.layout == torch.strided]


class Snapshot:
    """Everything about a model that a run must leave alone."""

    def __init__(self, model):
        self.model = model
        self.values = copy.deepcopy(model.state_dict())
        self.identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self.buffers = {name: id(b) for name, b in model.named_buffers()}
        self.flags = {name: p.requires_grad for name, p in model.named_parameters()}
        self.modes = [m.training for m in model.modules()]
        self.tracking = [getattr(m, "track_running_stats", None) for m in model.modules()]
        self.grads = {name: p.grad for name, p in model.named_parameters()}
        self.resizable = [t.untyped_storage().resizable() for t in strided(model)]  # no longer after t.numpy()

    def check(self):
        model = self.model
        for name, value in model.state_dict().items():
            assert torch.equal(value, self.values[name]), name
        assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == self.identities
        assert {name: id(b) for name, b in model.named_buffers()} == self.buffers
        assert {name: p.requires_grad for name, p in model.named_parameters()} == self.flags
        assert [m.training for m in model.modules()] == self.modes
        assert [getattr(m, "track_running_stats", None) for m in model.modules()] == self.tracking
        assert {name: p.grad for name, p in model.named_parameters()} == self.grads
        assert all(p.is_leaf for p in model.parameters())
        assert [t.untyped_storage().resizable() for t in strided(model)] == self.resizable
