"""Small networks whose matrices torch's Linear does not hold: bare parameters, RNN weights, experts, own classes."""

import torch
from torch import nn
from torch.nn import functional as F

D, CLASSES, TOKENS = 8, 4, 5


class OwnLinear(nn.Module):
    """As in PyTorch Geometric: not nn.Linear, (out, in)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Transposed(nn.Module):
    """(in, out), multiplied from the right."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x):
        return x @ self.weight


class Attention(nn.Module):
    """A layer on graphs as in GATConv: an own Linear, and two bare vectors per head."""

    def __init__(self, inputs, heads, outputs):
        super().__init__()
        self.heads, self.outputs = heads, outputs
        self.lin = OwnLinear(inputs, heads * outputs)
        self.att_src = nn.Parameter(torch.randn(1, heads, outputs))
        self.att_dst = nn.Parameter(torch.randn(1, heads, outputs))

    def forward(self, x):  # every node sees every node
        h = self.lin(x).unflatten(-1, (self.heads, self.outputs))
        scores = (h * self.att_src).sum(-1).unsqueeze(-3) + (h * self.att_dst).sum(-1).unsqueeze(-2)
        return torch.einsum("...ijh,...jho->...iho", F.leaky_relu(scores).softmax(-2), h).flatten(-2)


class Bare(nn.Module):
    """Parameters of the model itself, in a list and in a dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(D, 12) / 3)
        self.more = nn.ParameterList([nn.Parameter(torch.randn(12, 12) / 3) for _ in range(2)])
        self.named = nn.ParameterDict({"out": nn.Parameter(torch.randn(12, CLASSES) / 3)})
        self.scale = nn.Parameter(torch.ones(12))

    def forward(self, x):
        x = torch.tanh(x @ self.first) * self.scale
        for weight in self.more:
            x = torch.tanh(x @ weight)
        return x @ self.named["out"]


class Own(nn.Module):
    """Classes of one's own."""

    def __init__(self):
        super().__init__()
        self.graph = Attention(D, 2, 6)
        self.right = Transposed(12, 10)
        self.last = OwnLinear(10, CLASSES)

    def forward(self, x):  # (batch, tokens, D)
        return self.last(torch.tanh(self.right(torch.tanh(self.graph(x))))).mean(-2)


class Recurrent(nn.Module):
    """A tagger: two directions, two layers, the output of each a projection."""

    def __init__(self, kind=nn.LSTM, **options):
        super().__init__()
        self.rnn = kind(D, 6, num_layers=2, bidirectional=True, batch_first=True, **options)
        width = 2 * (options.get("proj_size") or 6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x)[0]).mean(1)


class Cell(nn.Module):
    """Step by step."""

    def __init__(self, kind=nn.LSTMCell):
        super().__init__()
        self.cell = kind(D, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        state = None
        for token in x.unbind(1):
            state = self.cell(token, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Experts(nn.Module):
    """Three-dimensional weights, (experts, inputs, outputs)."""

    is_transposed = True

    def __init__(self, count=3):
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, D, 12) / 3)
        self.up_bias = nn.Parameter(torch.zeros(count, 12))
        self.down = nn.Parameter(torch.randn(count, 12, D) / 3)

    def forward(self, x, shares):  # (tokens, D), (tokens, experts)
        hidden = torch.tanh(torch.einsum("td,edf->tef", x, self.up) + self.up_bias)
        return torch.einsum("tef,efd,te->td", hidden, self.down, shares)


class Mixture(nn.Module):
    """Every expert sees every token, by its share."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.mlp = Experts()
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.head(x + self.mlp(x, self.router(x).softmax(-1)))


def flat():
    """A batch (x, y)."""
    return torch.randn(6, D), torch.randint(CLASSES, (6,))


def sequences():
    """A batch (x, y) of several tokens each."""
    return torch.randn(6, TOKENS, D), torch.randint(CLASSES, (6,))


BARE = ["first", "more", "named"]
# How it is built, what a batch is, what is asked for, whether particles can go through it together.
KINDS = {
    "bare": (Bare, flat, {"include": BARE}, True),
    "own": (Own, sequences, {"include": ["re:.*att_"]}, True),
    "lstm": (Recurrent, sequences, {}, False),
    "lstm-projected": (lambda: Recurrent(proj_size=3), sequences, {"include_biases": True}, False),
    "gru": (lambda: Recurrent(nn.GRU), sequences, {}, False),
    "rnn": (lambda: Recurrent(nn.RNN), sequences, {}, False),
    "lstm-cell": (Cell, sequences, {}, True),
    "gru-cell": (lambda: Cell(nn.GRUCell), sequences, {}, True),
    "experts": (Mixture, flat, {}, True),
}
