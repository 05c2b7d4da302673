"""What cannot be shrunk right is an error that names the module, in seconds; never a wrong model."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfpk_kernels.structure import Costs, find_structure
from sfpk_kernels.utils import extras

from .snapshot import Snapshot
from .structured_nets import IMAGE, Head, plain

pytest.importorskip("torch_pruning")


class Through(nn.Module):
    """A convolution, something, a convolution."""

    def __init__(self, something, channels=8, after=8, groups=1):
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, channels, 3, padding=1, groups=1), something
        self.b, self.head = nn.Conv2d(after, 8, 1, groups=groups), Head(8)

    def forward(self, x):
        return self.head(F.relu(self.b(self.middle(F.relu(self.a(x))))))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Sequence(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.a, self.rnn, self.b = nn.Linear(5, 8), kind(8, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.rnn(F.relu(self.a(x)))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.b = nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.b(x + self.attention(x, x, x, need_weights=False)[0])


class Detector(nn.Module):
    """Anchors: what is computed for one position is reshaped into rows."""

    def __init__(self, depth):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Conv2d(8, 21, 1) for _ in range(3))

    def forward(self, x):
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(features[-1] + block(F.relu(torch.stack(features).sum(0))))
        rows = []
        for head, feature in zip(self.heads, features[-3:], strict=True):
            y = head(feature)
            n, _, h, w = y.shape
            rows.append(y.view(n, 3, 7, h, w).permute(0, 1, 3, 4, 2).reshape(n, -1, 7))
        return torch.cat(rows, 1)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def uneven(x):
    a, b = x.split([5, 3], 1)
    return torch.cat([b, a], 1)


REFUSED = {
    "GroupNorm": (lambda: Through(nn.GroupNorm(2, 8)), r"outputs of a .* they reach middle \(GroupNorm\)"),
    "LayerNorm of images": (lambda: Through(nn.LayerNorm([8, 8, 8])), r"outputs of a .* middle \(LayerNorm\)"),
    "PixelShuffle": (lambda: Through(nn.PixelShuffle(2), 16, 4), r"outputs of a .* middle \(PixelShuffle\)"),
    "ChannelShuffle": (lambda: Through(nn.ChannelShuffle(2)), r"outputs of a .* middle \(ChannelShuffle\)"),
    "pixel_shuffle": (lambda: Through(Call(lambda x: F.pixel_shuffle(x, 2)), 16, 4), "outputs of a|channels of a"),
    "shuffle by hand": (lambda: Through(Call(shuffled)), "channels of a cannot"),
    "shuffle between groups": (lambda: Through(Call(shuffled), groups=2), "channels of a cannot"),
    "split": (lambda: Through(Call(uneven)), "channels of a cannot|outputs of a"),
    "slice": (lambda: Through(Call(lambda x: x[:, :6]), after=6), "channels of a cannot|outputs of a"),
    "flip": (lambda: Through(Call(lambda x: x.flip(1))), "channels of a cannot"),
    "roll": (lambda: Through(Call(lambda x: x.roll(1, 1))), "channels of a cannot"),
    "softmax": (lambda: Through(Call(lambda x: x.softmax(1))), "channels of a cannot"),
    "normalize": (lambda: Through(Call(lambda x: F.normalize(x, dim=1))), "channels of a cannot"),
    "local response norm": (lambda: Through(nn.LocalResponseNorm(3, alpha=1.0)), "channels of a cannot"),
    "spectral norm": (
        lambda: Through(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))), "computed from others",
    ),
    "LSTM": (lambda: Sequence(nn.LSTM), r"outputs of a .* rnn \(LSTM\)"),
    "GRU": (lambda: Sequence(nn.GRU), r"outputs of a .* rnn \(GRU\)"),
    "MultiheadAttention": (Attention, r"outputs of a .* attention \(MultiheadAttention\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    factory, words = REFUSED[name]
    model = factory()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    snapshot = Snapshot(model)
    x = torch.randn(2, 4, 5) if hasattr(model, "rnn") or isinstance(model, Attention) else torch.randn(IMAGE)
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"model: .*({words}).*") as raised:
        find_structure(model, x)
    assert time.monotonic() - start < 10
    snapshot.check()
    if "ignored_layers=['a']" in str(raised.value):  # what is said helps
        assert not removable(model, x) & {"a"}


def removable(model, x):
    """Groups that are left with what was named ignored; none of them may be an error as well."""
    try:
        return {group.name for group in find_structure(model, x, ignored_layers=["a"]).groups}
    except ValueError as error:
        if "found none" not in str(error) or "a: ignored_layers" not in str(error):
            raise
        return set()


def test_detection_heads_take_seconds():
    structure = find_structure(Detector(14), torch.randn(IMAGE))
    assert [(group.name, group.size) for group in structure.groups] == [("stem", 8)]
    assert all(structure.protected[f"heads.{i}"] == "leaves the model" for i in range(3))


def test_a_graph_that_takes_too_long():
    model = Detector(14)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"its graph could not be followed within time_limit=0.001 s"):
        find_structure(model, torch.randn(IMAGE), time_limit=1e-3)
    assert time.monotonic() - start < 5


class Rotated(nn.Module):
    """Attention with rotary positions and one projection for all, by heads: a layout that has no adapter."""

    def __init__(self):
        super().__init__()
        self.a, self.qkv, self.b = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(F.relu(self.a(x))).view(n, length, 2, 12).transpose(1, 2).chunk(3, -1)
        q, k = (torch.cat([-one[..., 2:], one[..., :2]], -1) + one for one in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.b(y.transpose(1, 2).reshape(n, length, 8))


def test_attention_of_an_unknown_layout():
    with pytest.raises(ValueError, match="model: .*(qkv|cannot follow its graph)"):
        find_structure(Rotated(), torch.randn(2, 4, 5))


def test_errors_of_the_model_itself_are_its_own():
    class Broken(nn.Linear):
        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        find_structure(nn.Sequential(nn.Linear(3, 3), Broken(3, 2)), torch.randn(1, 3))


def test_models_that_write_into_their_input():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    x = torch.randn(IMAGE)
    before = x.clone()
    structure = find_structure(model, x)
    Costs(model, structure, (x,))
    assert [group.name for group in structure.groups] == ["1"]
    assert torch.equal(x, before)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: wanted an nn\.Module, got dict"):
        find_structure({}, torch.randn(IMAGE))
    with pytest.raises(ValueError, match="time_limit: wanted a finite number > 0, got 0"):
        find_structure(plain(), torch.randn(IMAGE), time_limit=0)
    with pytest.raises(TypeError, match="ignored_layers: wanted a list, got 'a'"):
        find_structure(plain(), torch.randn(IMAGE), ignored_layers="a")
    with pytest.raises(ValueError, match="wanted outputs that hold tensors computed from its weights"):
        find_structure(nn.Sequential(nn.Linear(3, 3), Call(lambda x: 3)), torch.randn(1, 3))


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setattr(extras, "_installed", lambda module: module != "torch_pruning")
    with pytest.raises(
        ImportError, match="structured pruning of this model needs torch-pruning: pip install torch-pruning"
    ):
        find_structure(plain(), torch.randn(IMAGE))
