"""Masks meet models and checkpoints whose names have something before them: it is said, and never guessed."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfpk_kernels import MaskSet, export, load_exported
from sfpk_kernels.cli import main

from .wrappers import WRAPPERS, compiled


def net():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


class Lit(nn.Module):
    """Holds a model as LightningModules do."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.metric = nn.Linear(2, 2)

    def forward(self, x):
        return self.model(x)


@pytest.fixture
def masks():
    return MaskSet({"0.weight": torch.rand(12, 8) > 0.6, "2.weight": torch.rand(4, 12) > 0.3}, {"a": 1})


def removed_are_zero(masks, model):
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    return all(torch.equal(weights[name] == 0, ~mask) for name, mask in masks.items())


HOLDERS = {
    "model.": Lit,
    "model.model.": lambda model: Lit(Lit(model)),
    "model._orig_mod.": lambda model: Lit(compiled(model)),
    "0.": nn.Sequential,
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_holds_the_model(masks, name, caplog):
    model = net()
    whole = HOLDERS[name](model)
    prefix = name
    with caplog.at_level(logging.INFO):
        assert masks.apply_(whole) is whole
    assert f"they fit with prefix '{prefix}' added" in caplog.text
    assert caplog.records[0].levelname == "WARNING"
    assert removed_are_zero(masks, model)
    # The other way round: masks made from the whole, on the model alone.
    again = MaskSet.from_model(whole, ignored_layers=["re:.*metric"] if hasattr(whole, "metric") else ())
    assert all(name.startswith(prefix) for name in again)
    other = net()
    caplog.clear()
    again.apply_(other)
    assert f"prefix '{prefix}' of the masks taken away" in caplog.text
    assert removed_are_zero(masks, other)
    assert again.fitted_to(other) == masks
    assert masks.fitted_to(whole).metadata == {"a": 1}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_around_what_holds_it(masks, wrap):
    model = net()
    masks.apply_(wrap(Lit(model)))
    assert removed_are_zero(masks, model)


def test_layers_that_are_compiled_one_by_one(masks, caplog):
    model = net()
    first, last = model[0], model[2]
    model[0] = compiled(first)
    with caplog.at_level(logging.INFO):
        masks.apply_(model)
    assert "they fit with wrappers inside the names left out" in caplog.text
    assert removed_are_zero(masks, nn.Sequential(first, nn.Tanh(), last))
    assert MaskSet.from_model(model).fitted_to(net()) == masks


def test_the_same_names_are_taken_as_they_are_and_nothing_is_said(masks, caplog):
    model = net()
    assert masks.fitted_to(model) is masks
    assert not caplog.records


@pytest.mark.parametrize("named", [False, True])
def test_training_stays_under_the_masks(masks, named):
    model = net()
    whole = Lit(model)
    optimizer = torch.optim.SGD(whole.named_parameters() if named else whole.parameters(), lr=0.1, momentum=0.9)
    with masks.enforce(optimizer, whole) as enforcer:
        assert len(enforcer) == 2
        for _ in range(3):
            whole(torch.randn(5, 8)).square().sum().backward()
            optimizer.step()
            assert removed_are_zero(masks, model)


def test_masks_that_fit_several_parts_are_refused(masks):
    both = nn.ModuleDict({"a": net(), "b": net()})
    before = [value.clone() for value in both.state_dict().values()]
    words = r"model: wanted one part that these masks fit, got several, at the prefixes 'a\.', 'b\.'"
    with pytest.raises(ValueError, match=words):
        masks.apply_(both)
    with pytest.raises(ValueError, match=words):
        masks.enforce(torch.optim.SGD(both.parameters(), lr=0.1), both)
    assert all(torch.equal(a, b) for a, b in zip(before, both.state_dict().values(), strict=True))
    masks.apply_(both["b"])
    assert removed_are_zero(masks, both["b"])
    shared = net()
    masks.apply_(nn.ModuleDict({"a": shared, "b": shared}))  # the same parameters by two names
    assert removed_are_zero(masks, shared)


def test_another_model_is_none_that_fits(masks):
    other = Lit(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)))
    with pytest.raises(ValueError, match="wanted the model these masks were made for, .*0.weight is not in the model"):
        masks.apply_(other)
    of_encoder = MaskSet({f"encoder.{name}": mask for name, mask in masks.items()})
    with pytest.raises(ValueError, match="encoder.0.weight is not in the model"):
        of_encoder.apply_(nn.ModuleDict({"decoder": net()}))  # of the same shapes


def test_a_parallel_models_masks_on_what_holds_the_model(masks):
    model = net()
    MaskSet({f"module.{name}": mask for name, mask in masks.items()}).apply_(Lit(model))
    assert removed_are_zero(masks, model)


def test_export_takes_them_too(masks, tmp_path):
    whole = Lit(net())
    report = export(whole, tmp_path / "m", kind="packed", masks=masks)
    assert report.kept == masks.kept
    other = load_exported(Lit(net()), tmp_path / "m")
    assert removed_are_zero(masks, other.model)


PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
def test_the_command_on_checkpoints(masks, prefix, suffix, tmp_path, capsys):
    masks.save(tmp_path / "mask")
    state = {f"{prefix}{name}": value for name, value in net().state_dict().items()}
    weights, out = tmp_path / f"w{suffix}", tmp_path / f"o{suffix}"
    if suffix == ".safetensors":
        save_file(state, weights)
    else:
        torch.save({"epoch": 3, "state_dict": state} if suffix == ".ckpt" else state, weights)
    command = ["masks", "apply", str(tmp_path / "mask"), str(weights), "--out", str(out)]
    assert main(command) == 0
    assert f"(prefix {prefix!r} added)" in capsys.readouterr().out
    found = load_file(out) if suffix == ".safetensors" else torch.load(out)
    if suffix == ".ckpt":
        assert found.pop("epoch") == 3
        found = found["state_dict"]
    assert list(found) == list(state) if suffix != ".safetensors" else found.keys() == state.keys()
    for name, mask in masks.items():
        assert torch.equal(found[f"{prefix}{name}"], state[f"{prefix}{name}"] * mask)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prefix_added"] == prefix


def test_the_command_on_a_checkpoint_of_lightning(masks, tmp_path, capsys):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, number):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 8), batch_size=4))
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    masks.save(tmp_path / "mask")
    arguments = [str(tmp_path / name) for name in ("mask", "w.ckpt")]
    assert main(["masks", "apply", *arguments, "--out", str(tmp_path / "o.ckpt")]) == 0
    assert "(prefix 'net.' added)" in capsys.readouterr().out
    again = Module.load_from_checkpoint(tmp_path / "o.ckpt", weights_only=True)
    assert torch.equal(again.net[0].weight, module.net[0].weight * masks["0.weight"])
    assert torch.equal(again.net[2].bias, module.net[2].bias)
    masks.apply_(module)
    assert removed_are_zero(masks, module.net)


def test_the_command_on_several_parts(masks, tmp_path, capsys):
    masks.save(tmp_path / "mask")
    save_file(nn.ModuleDict({"a": net(), "b": net()}).state_dict(), tmp_path / "w.safetensors")
    command = ["masks", "apply", str(tmp_path / "mask"), str(tmp_path / "w.safetensors")]
    assert main([*command, "--out", str(tmp_path / "o.safetensors")]) == 2
    assert "WEIGHTS: wanted one part that these masks fit, got several" in capsys.readouterr().err
    assert not (tmp_path / "o.safetensors").exists()
