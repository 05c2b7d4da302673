"""The default loss is cross-entropy, or a refusal that says what to pass instead; arguments that were swapped."""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import Coordinates, Execution, SFPKConfig, baselines, default_loss, prune
from sfpk_kernels.cli._task import WrongTask, call_task
from sfpk_kernels.modeling.batches import BatchStream
from sfpk_kernels.modeling.labels import check_targets, label_loss
from sfpk_kernels.search.settings import chosen
from sfpk_kernels.utils.arguments import check_loader, check_loss_fn

from .settings import population

N = 6


def head(outputs):
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, outputs))


class Given(nn.Module):
    """A model that returns what it was given, for outputs of any kind."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, _):
        return self.output


LABELS = torch.arange(N) % 4
ONE_HOT = F.one_hot(LABELS, 4)
SEVERAL = (torch.arange(N * 4).view(N, 4) % 3 > 0).float()

WRONG = {
    "regression, one output": (head(1), torch.randn(N, 1), "F.mse_loss"),
    "regression, several outputs": (head(4), torch.randn(N, 4), "F.mse_loss"),
    "regression, positive": (head(4), torch.rand(N, 4) + 0.5, "F.mse_loss"),
    "regression, flat targets": (head(4), torch.randn(N), "F.mse_loss"),
    "one output, flat targets": (head(1), torch.randn(N), "F.mse_loss"),
    "squeezed output": (nn.Sequential(head(1), nn.Flatten(0)), torch.randn(N), "F.mse_loss"),
    "squeezed output, one positive": (nn.Sequential(head(1), nn.Flatten(0)), F.one_hot(LABELS[1], N).float(), "binary"),
    "one output, two classes": (head(1), torch.zeros(N, dtype=torch.long), "binary_cross_entropy_with_logits"),
    "one output, two classes, squeezed": (nn.Sequential(head(1), nn.Flatten(0)), LABELS % 2, "binary"),
    "one output for everything": (nn.Sequential(head(1), nn.Flatten(0), nn.Softmax(0)), LABELS % 2, "binary"),
    "several labels": (head(4), SEVERAL, "binary_cross_entropy_with_logits"),
    "several labels, integers": (head(4), SEVERAL.long(), "binary_cross_entropy_with_logits"),
    "several labels, bools": (head(4), SEVERAL.bool(), "binary_cross_entropy_with_logits"),
    "one-hot integers": (head(4), ONE_HOT, r"batch\[1\].argmax\(1\)"),
    "class numbers in a column": (head(4), LABELS.view(N, 1), r"batch\[1\].flatten\(\)"),
    "class numbers as floats": (head(4), LABELS.float(), r"batch\[1\].long\(\)"),
    "class numbers as bools": (head(2), LABELS.bool(), r"batch\[1\].long\(\)"),
    "logits as targets": (head(4), 3 * torch.randn(N, 4), "F.mse_loss"),
    "percentages": (head(4), 100.0 * ONE_HOT, "F.mse_loss"),
    "not a number": (head(4), torch.full((N, 4), float("nan")), "F.mse_loss"),
    "another number of samples": (head(4), LABELS[:3], "loss_fn"),
    "classes in the last dimension": (Given(torch.randn(N, 7, 4)), torch.zeros(N, 7).long(), r"flatten\(0, 1\)"),
    "numbers from 1": (head(4), LABELS + 1, "number the classes from 0"),
    "a class too many": (head(3), LABELS, "0 … 2 for 3 outputs, got 0 … 3"),
    "complex": (head(4), torch.randn(N, 4, dtype=torch.complex64), "loss_fn"),
    "no logits: tuple": (Given((torch.randn(N, 4),)), LABELS, r"model\(batch\[0\]\)\[0\]"),
    "no logits: dict": (Given({"out": torch.randn(N, 4)}), LABELS, r'model\(batch\[0\]\)\["out"\]'),
    "no logits: object": (Given(types.SimpleNamespace(logits=torch.randn(N, 4))), LABELS, r"\)\.logits"),
    "no logits: None": (Given(None), LABELS, "got NoneType"),
}

RIGHT = {
    "class numbers": (head(4), LABELS),
    "one-hot floats": (head(4), ONE_HOT.float()),
    "distributions": (head(4), torch.randn(N, 4).softmax(1)),
    "distributions in bf16": (head(300).bfloat16(), torch.randn(N, 300).softmax(1).bfloat16()),
    "distributions in fp16": (head(300), torch.randn(N, 300).softmax(1).half().float()),
    "mixed up labels": (head(4), 0.3 * ONE_HOT + 0.7 * ONE_HOT.flip(0)),
    "places to ignore": (head(4), LABELS.masked_fill(LABELS == 2, -100)),
    "pixels": (nn.Conv2d(3, 5, 1), torch.randint(5, (N, 8, 8))),
    "pixels, distributions": (nn.Conv2d(3, 5, 1), torch.randn(N, 5, 8, 8).softmax(1)),
}


def inputs(model):
    if isinstance(model, nn.Conv2d):
        return torch.randn(N, 3, 8, 8)
    return torch.randn(N, 8, dtype=next((p.dtype for p in model.parameters()), torch.float32))


@pytest.mark.parametrize(("model", "y", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_classification_is_refused_with_what_to_pass_instead(model, y, words):
    with pytest.raises((TypeError, ValueError), match=f"^loss_fn: the default loss.*{words}"):
        default_loss(model, (inputs(model), y))


@pytest.mark.parametrize(("model", "y"), RIGHT.values(), ids=RIGHT.keys())
def test_what_is_one_stays_cross_entropy(model, y):
    x = inputs(model)
    assert torch.equal(default_loss(model, (x, y)), F.cross_entropy(model(x), y))
    check_targets((x, y))


def test_a_single_sample():
    model, x = head(4), torch.randn(8)
    for y in (torch.tensor(2), torch.tensor(0)):
        assert torch.equal(default_loss(model, (x, y)), F.cross_entropy(model(x), y))


def test_smoothed_labels():
    model, x = head(4), torch.randn(N, 8)
    assert torch.equal(label_loss(model(x), LABELS, 0.1), F.cross_entropy(model(x), LABELS, label_smoothing=0.1))
    with pytest.raises(ValueError, match="loss_fn: the default loss"):
        label_loss(model(x), torch.randn(N, 4), 0.1)


@pytest.mark.parametrize("mode", ["auto", "vmap", "sequential"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_a_run_is_refused_before_its_first_step(mode, outputs):
    model = head(outputs)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loader = [(x, 2 * x[:, :outputs]) for x in torch.randn(4, N, 8)]
    steps = []
    how = {"config": population(sparsity=0.5, n_particles=2, n_steps=2), "execution": Execution(energy_mode=mode)}
    with pytest.raises(ValueError, match=r"loss_fn: the default loss.*pass loss_fn=lambda model, batch: F.mse_loss"):
        prune(model, loader, **how, callbacks=[steps.append])
    assert not steps
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="loss_fn: the default loss"):
        baselines.snip(model, loader, 0.5)
    result = prune(model, loader, loss_fn=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), **how)
    assert result.history[0].energy > 0


def expressions(text):
    """What stands behind "lambda model, batch:" in a message, up to the bracket that closes it."""
    for part in text.split("lambda model, batch: ")[1:]:
        depth = 0
        for end, letter in enumerate(part):
            depth += {"(": 1, ")": -1}.get(letter, 0)
            if letter == ")" and depth == 0:
                yield part[: end + 1]
                break


NO_REMEDY_AS_IT_STANDS = (
    "regression, flat targets",
    "another number of samples",
    "numbers from 1",
    "a class too many",
    "complex",
    "None",
)


@pytest.mark.filterwarnings("error:Using a target size")  # that is broadcast
@pytest.mark.parametrize("name", [name for name in WRONG if not name.endswith(NO_REMEDY_AS_IT_STANDS)])
def test_the_remedies_work(name):
    """One of the functions a message proposes runs, as it stands there, on what was refused."""
    model, y, _ = WRONG[name]
    batch = (inputs(model), y)
    with pytest.raises((TypeError, ValueError)) as caught:
        default_loss(model, batch)
    losses = []
    for code in expressions(str(caught.value)):
        try:
            losses.append(eval(f"lambda model, batch: {code}", {"F": F})(model, batch))
        except (TypeError, ValueError, RuntimeError, IndexError, UserWarning):
            continue  # the other of two: for regression, or for classes
    if name != "not a number":
        assert any(bool(torch.isfinite(loss)) for loss in losses), str(caught.value)


@pytest.mark.parametrize("y", [torch.randn(N, 4), torch.rand(N, 1), SEVERAL])
def test_targets_on_any_device_are_looked_at_in_the_first_batch(y):
    with pytest.raises(ValueError, match="loss_fn: the default loss, cross-entropy, wants float targets that are"):
        check_targets((torch.randn(N, 8), y))


@pytest.mark.parametrize("batch", [{"x": 1}, torch.randn(4), (torch.randn(4),), (torch.randn(4, 2), LABELS), "text"])
def test_other_batches_are_not_its_matter(batch):
    check_targets(batch)


def of_names(first, second):
    scope = {}
    exec(f"def loss({first}, {second}): return 0", scope)
    return scope["loss"]


TAKEN_FOR_A_LOSS = {
    "module": nn.CrossEntropyLoss(),
    "another module": nn.MSELoss(),
    "weighted": nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
    "three arguments": nn.TripletMarginLoss(),
    "function": F.cross_entropy,
    "function of another": F.mse_loss,
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "lambda": lambda output, target: F.cross_entropy(output, target),
    "short names": lambda p, y: F.cross_entropy(p, y),
    "own names": of_names("y_pred", "y_true"),
    "more own names": of_names("logits", "labels"),
    "class": nn.CrossEntropyLoss,
    "one argument": lambda batch: batch,
    "three wanted": lambda model, x, y: x,
    "model": head(4),
}


@pytest.mark.parametrize("loss_fn", TAKEN_FOR_A_LOSS.values(), ids=TAKEN_FOR_A_LOSS.keys())
def test_a_function_of_output_and_target_is_no_loss_fn(loss_fn):
    with pytest.raises(TypeError, match=r"^loss_fn: wanted a function \(model, batch\) -> scalar.*got "):
        check_loss_fn(loss_fn)
    with pytest.raises(WrongTask, match=r"^loss_fn: wanted a function \(model, batch\) -> scalar"):
        call_task(lambda: (head(4), loss_fn, []))


def test_the_words_for_a_criterion():
    words = r"got CrossEntropyLoss, a function of \(input, target\): pass loss_fn=lambda model, batch: criterion\(model"
    with pytest.raises(TypeError, match=words):
        check_loss_fn(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match=r"lambda model, batch: mse_loss\(model\(batch\[0\]\), batch\[1\]\)"):
        check_loss_fn(F.mse_loss)
    with pytest.raises(TypeError, match=r"got the class MSELoss: criterion = MSELoss\(\), then"):
        check_loss_fn(nn.MSELoss)


class Holding(nn.Module):
    def forward(self, model, batch, scale=1.0):
        return scale * model(batch).sum()


class Callable:
    def __call__(self, network, data):
        return network(data).sum()


GOOD = {
    "none": None,
    "default": default_loss,
    "lambda": lambda model, batch: 0,
    "short": lambda m, b: 0,
    "odd names": lambda a, b: 0,
    "model and y": lambda model, y: 0,
    "anything": lambda *args, **kwargs: 0,
    "defaults": lambda model, batch, alpha=0.5: 0,
    "keyword": functools.partial(lambda model, batch, *, alpha: 0, alpha=1),
    "module": Holding(),
    "object": Callable(),
    "method": Callable().__call__,
    "builtin": max,
}


@pytest.mark.parametrize("loss_fn", GOOD.values(), ids=GOOD.keys())
def test_a_function_of_model_and_batch_is_one(loss_fn):
    check_loss_fn(loss_fn)


CONFIG = population(sparsity=0.5)
ORDER = r"the call is prune\(model, loader, sparsity, loss_fn=…\)"


@pytest.mark.parametrize(
    "loader",
    [CONFIG, nn.CrossEntropyLoss(), head(4), default_loss, nn.ModuleList([head(4)])],
    ids=lambda v: str(v)[:20],
)
def test_something_else_in_the_place_of_the_loader(loader, mlp):
    for act in (
        lambda: check_loader(loader),
        lambda: BatchStream(loader, torch.device("cpu"), 4),
        lambda: prune(mlp, loader, config=CONFIG),
    ):
        with pytest.raises(TypeError, match=f"^loader: wanted an iterable of batches, got .*{ORDER}"):
            act()


def test_a_dataset_or_one_batch_in_the_place_of_the_loader():
    dataset = torch.utils.data.TensorDataset(torch.randn(4, 8), LABELS[:4])
    with pytest.raises(TypeError, match=r"got the dataset TensorDataset: pass DataLoader\(.*batch_size"):
        check_loader(dataset)
    for batch in (torch.randn(3), {"x": 1}, "text"):
        with pytest.raises(TypeError, match=r"put a single batch in a list, \[batch\]"):
            check_loader(batch)
    check_loader(torch.utils.data.DataLoader(dataset, 2))
    check_loader([])


@pytest.mark.parametrize("loss_fn", [[], torch.utils.data.DataLoader([1]), CONFIG, "cross_entropy", 3])
def test_something_else_in_the_place_of_the_loss(loss_fn):
    with pytest.raises(TypeError, match=f"^loss_fn: wanted a function .model, batch. -> scalar or None, got .*{ORDER}"):
        check_loss_fn(loss_fn)


@pytest.mark.parametrize("config", [[], default_loss, torch.utils.data.DataLoader([1]), nn.CrossEntropyLoss()])
def test_something_else_in_the_place_of_the_config(config):
    with pytest.raises(TypeError, match=f"^config: wanted an SFPKConfig, got .*{ORDER}"):
        chosen("prune(model, loader, sparsity, loss_fn=…)", None, config, None)


def test_config_as_a_class_or_dict():
    for config in (SFPKConfig, {"sparsity": 0.9}):
        with pytest.raises(TypeError, match=r"^config: wanted an SFPKConfig, got .*make one with SFPKConfig\(sp"):
            chosen("prune(…)", None, config, None)
    assert chosen("prune(…)", None, CONFIG, None) == (CONFIG, Execution())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ([], ORDER),
        (default_loss, ORDER),
        (nn.Linear, "the class Linear: pass a trained instance"),
        (head(2).state_dict(), "a state_dict has no layers"),
        (types.SimpleNamespace(model=head(2)), "pass its .model"),
    ],
)
def test_something_else_in_the_place_of_the_model(model, words):
    with pytest.raises(TypeError, match=f"^model: wanted an nn.Module, got .*{words}"):
        Coordinates(model)
