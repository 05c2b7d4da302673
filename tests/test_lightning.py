"""SFPKCallback with the real Lightning."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfpk_kernels import MaskSet
from sfpk_kernels.baselines import magnitude

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint, ModelPruning

from sfpk_kernels.integrations.lightning import SFPKCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Plain(LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        self.automatic_optimization = not manual
        self.steps = 0

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch, _):
        self.seen_in_validation = MaskSet.from_model(self)

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.steps += 1

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), 0.05)
        return [torch.optim.SGD(self.net[i].parameters(), 0.1, momentum=0.9) for i in (0, 2)]


class Watch(SFPKCallback):
    """Looks at the weights after every batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.exact = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.exact.append(MaskSet.from_model(pl_module.get_submodule(self.submodule)) == self.masks)


@pytest.fixture
def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(40, 8), torch.randint(4, (40,))), 8)


def trainer(tmp_path, *callbacks, **options):
    return Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=list(callbacks), **{"max_epochs": 2, **options},
    )  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_exact_sparsity_saved_reloaded_resumed(tmp_path, loader, accumulate):
    model = Plain()
    masks = magnitude(model, 0.7)
    dense = copy.deepcopy(model.state_dict())
    callback = Watch(masks)
    saved = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    first = trainer(tmp_path, callback, saved, accumulate_grad_batches=accumulate)
    first.fit(model, loader, loader)
    assert model.steps == 2 * (5 if accumulate == 1 else 3)
    assert callback.exact == [True] * 10
    assert MaskSet.from_model(model) == masks
    assert model.seen_in_validation == masks
    assert not torch.equal(model.net[0].weight[masks["net.0.weight"]], dense["net.0.weight"][masks["net.0.weight"]])

    loaded = Plain.load_from_checkpoint(tmp_path / "last.ckpt")
    assert MaskSet.from_model(loaded) == masks

    again = Watch()  # takes the masks of the checkpoint
    resumed = Plain()
    trainer(tmp_path, again, max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")
    assert again.masks == masks
    assert again.exact == [True] * 5
    assert MaskSet.from_model(resumed) == masks


def test_it_ends_with_the_fit(tmp_path, loader):
    model = Plain()
    masks = magnitude(model, 0.7)
    fitted = trainer(tmp_path, SFPKCallback(masks))
    fitted.fit(model, loader)
    optimizer = fitted.optimizers[0]
    nn.functional.cross_entropy(model.net(torch.randn(8, 8)), torch.randint(4, (8,))).backward()
    optimizer.step()
    assert MaskSet.from_model(model).kept > masks.kept


def test_several_optimizers_by_hand_and_a_submodule(tmp_path, loader):
    model = Plain(manual=True)
    masks = magnitude(model.net, 0.6)
    callback = Watch(masks, "net")
    trainer(tmp_path, callback).fit(model, loader)
    assert callback.exact == [True] * 10
    assert MaskSet.from_model(model.net) == masks


class Parts(LightningModule):
    """Backbone and head, trained by whatever requires gradients at the start."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 12), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)


def test_groups_that_are_added_later(tmp_path, loader):
    model = Parts()
    callback = Watch(magnitude(model, 0.8))
    before = model.backbone[0].weight.detach().clone()
    trainer(tmp_path, BackboneFinetuning(2, verbose=False), callback, max_epochs=3).fit(model, loader)
    assert callback.exact == [True] * 15
    kept = callback.masks["backbone.0.weight"]
    assert not torch.equal(model.backbone[0].weight[kept], before[kept]), "it was unfrozen"


def test_optimizers_that_are_exchanged(tmp_path, loader):
    class Exchanging(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.trainer.optimizers = [torch.optim.SGD(self.parameters(), 0.1)]

    model = Exchanging()
    callback = Watch(magnitude(model, 0.7))
    trainer(tmp_path, callback, max_epochs=3).fit(model, loader)
    assert callback.exact == [True] * 15


def test_masked_a_last_time(tmp_path, loader):
    class Late(Plain):
        def on_train_batch_end(self, *_):
            nn.init.ones_(self.net[0].weight)

    model = Late()
    masks = magnitude(model, 0.7)
    trainer(tmp_path, SFPKCallback(masks)).fit(model, loader)
    assert MaskSet.from_model(model) == masks


def test_clipping_counts_kept_weights_alone(tmp_path, loader):
    class Clipped(Plain):
        def configure_gradient_clipping(self, optimizer, **options):
            self.removed = self.net[0].weight.grad[~masks["net.0.weight"]]
            super().configure_gradient_clipping(optimizer, **options)

    model = Clipped()
    masks = magnitude(model, 0.7)
    trainer(tmp_path, SFPKCallback(masks), gradient_clip_val=0.1).fit(model, loader)
    assert len(model.removed)
    assert (model.removed == 0).all()


def test_lbfgs(tmp_path, loader):
    class Quasi(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), 0.5, max_iter=4)

    model = Quasi()
    callback = Watch(magnitude(model, 0.7))
    trainer(tmp_path, callback).fit(model, loader)
    assert callback.exact == [True] * 10


def test_several_callbacks_for_several_submodules(tmp_path, loader):
    def callbacks(model, *masks):
        return [SFPKCallback(m, name) for m, name in zip(masks, ("backbone", "head"), strict=True)]

    model = Parts()
    masks = [magnitude(part, share) for part, share in ((model.backbone, 0.7), (model.head, 0.4))]
    trainer(
        tmp_path, *callbacks(model, *masks), ModelCheckpoint(dirpath=tmp_path, save_last=True)
    ).fit(model, loader)  # fmt: skip
    assert [MaskSet.from_model(part) for part in (model.backbone, model.head)] == masks
    resumed, again = Parts(), callbacks(model, None, None)
    trainer(tmp_path, *again, max_epochs=3).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt")
    assert [callback.masks for callback in again] == masks
    assert [MaskSet.from_model(part) for part in (resumed.backbone, resumed.head)] == masks


def test_copies_while_training_enforce_nothing(tmp_path, loader):
    class Copying(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.copied = copy.deepcopy(trainer.callbacks[0])

    model, copying = Plain(), Copying()
    callback = Watch(magnitude(model, 0.7))
    trainer(tmp_path, callback, copying).fit(model, loader)
    assert callback.exact == [True] * 10
    assert copying.copied.masks == callback.masks
    assert not copying.copied._enforcers


def test_a_callback_taken_up_again_is_told_what_to_do(tmp_path, loader):
    for share in (0.5, 0.7):
        model = Plain()
        saved = ModelCheckpoint(dirpath=tmp_path / str(share), save_last=True)
        trainer(tmp_path, SFPKCallback(magnitude(model, share)), saved).fit(model, loader)
    callback = SFPKCallback()
    trainer(tmp_path, callback, max_epochs=3).fit(Plain(), loader, ckpt_path=tmp_path / "0.5" / "last.ckpt")
    with pytest.raises(ValueError, match="a new callback with masks=None goes on with those of the checkpoint"):
        trainer(tmp_path, callback, max_epochs=3).fit(Plain(), loader, ckpt_path=tmp_path / "0.7" / "last.ckpt")


def test_refusals(tmp_path, loader):
    model = Plain()
    masks = magnitude(model, 0.7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="masks: wanted a MaskSet or None, got dict"):
        SFPKCallback({})
    with pytest.raises(TypeError, match="submodule: wanted a name"):
        SFPKCallback(masks, model.net)
    with pytest.raises(ValueError, match=r"net.0.weight is not in the model"):
        trainer(tmp_path, SFPKCallback(masks, "net")).fit(model, loader)
    with pytest.raises(ValueError, match="submodule: wanted a part of the module, got 'nothing'"):
        trainer(tmp_path, SFPKCallback(masks, "nothing")).fit(model, loader)
    with pytest.raises(ValueError, match="masks: wanted a MaskSet, or a checkpoint with masks"):
        trainer(tmp_path, SFPKCallback()).fit(model, loader)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer(tmp_path, SFPKCallback(masks), ModelCheckpoint(dirpath=tmp_path, save_last=True)).fit(model, loader)
    other = SFPKCallback(magnitude(Plain(), 0.5))
    with pytest.raises(ValueError, match="masks: wanted those of the checkpoint"):
        trainer(tmp_path, other, max_epochs=3).fit(Plain(), loader, ckpt_path=tmp_path / "last.ckpt")


class Other(SFPKCallback):
    """Another class, which Lightning itself accepts beside the first."""


def weights(model, *names):
    return MaskSet({name: torch.rand(model.get_parameter(name).shape) > 0.5 for name in names})


def refused_at_the_start(tmp_path, loader, model, *callbacks, words):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"^callbacks: wanted one that prunes {words}"):
        trainer(tmp_path, *callbacks).fit(model, loader)
    assert model.steps == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "not even masked"


def test_two_callbacks_on_one_module_are_refused_at_the_start(tmp_path, loader):
    model = Plain()
    whole, part = magnitude(model, 0.7), magnitude(model.net, 0.5)
    words = r"net.0.weight, net.2.weight, got SFPKCallback and another SFPKCallback: put all masks"
    refused_at_the_start(tmp_path, loader, model, SFPKCallback(whole), SFPKCallback(part, "net"), words=words)
    words = "net.0.weight, net.2.weight, got SFPKCallback and Other: put all masks of a parameter into one"
    refused_at_the_start(tmp_path, loader, model, SFPKCallback(whole), Other(whole), words=words)
    one = weights(model, "net.0.weight")
    refused_at_the_start(tmp_path, loader, model, Other(one), SFPKCallback(whole), words="net.0.weight, got Other and")


def test_a_callback_added_later_is_refused_too(tmp_path, loader):
    model = Plain()
    masks = magnitude(model, 0.7)
    fitted = trainer(tmp_path, SFPKCallback(masks))
    fitted.callbacks.append(SFPKCallback(masks))
    with pytest.raises(ValueError, match="got SFPKCallback and another SFPKCallback"):
        fitted.fit(model, loader)
    assert model.steps == 0


def test_masks_that_come_from_a_checkpoint_are_looked_at(tmp_path, loader):
    model = Plain()
    masks = magnitude(model, 0.7)
    trainer(tmp_path, SFPKCallback(masks), ModelCheckpoint(dirpath=tmp_path, save_last=True)).fit(model, loader)
    resumed = Plain()
    with pytest.raises(ValueError, match="callbacks: wanted one that prunes net.0.weight"):
        trainer(tmp_path, SFPKCallback(), Other(masks), max_epochs=3).fit(
            resumed, loader, ckpt_path=tmp_path / "last.ckpt"
        )
    assert resumed.steps == 0


@pytest.mark.parametrize("ours_first", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_lightnings_own_pruning_of_the_same_weights(tmp_path, loader, ours_first, listed):
    model = Plain()
    own = ModelPruning("l1_unstructured", [(model.net[2], "weight")] if listed else None, amount=0.3, verbose=0)
    ours = SFPKCallback(magnitude(model, 0.7))
    names = "net.2.weight" if listed else "net.0.weight, net.2.weight"
    callbacks = (ours, own) if ours_first else (own, ours)
    refused_at_the_start(
        tmp_path, loader, model, *callbacks, words=f"{names}, got SFPKCallback and ModelPruning: leave"
    )


def test_lightnings_own_pruning_of_other_weights(tmp_path, loader):
    model = Plain()
    masks = weights(model, "net.0.weight")
    own = ModelPruning("l1_unstructured", [(model.net[2], "weight")], amount=0.3)
    trainer(tmp_path, own, SFPKCallback(masks)).fit(model, loader)
    assert torch.equal(model.net[0].weight != 0, masks["net.0.weight"])
    assert (model.net[2].weight == 0).any()


def test_a_model_that_was_pruned_before_is_refused_at_the_start(tmp_path, loader):
    model = Plain()
    masks = magnitude(model, 0.7)
    nn.utils.prune.random_unstructured(model.net[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"net.0.weight is .*under torch.nn.utils.prune: call prune.remove first"):
        trainer(tmp_path, SFPKCallback(masks)).fit(model, loader)
    assert model.steps == 0


def test_weights_written_between_steps_are_said_once(tmp_path, loader, caplog):
    class Writing(Plain):
        def on_train_batch_start(self, *_):
            nn.init.ones_(self.net[0].weight)

    model = Writing()
    callback = Watch(magnitude(model, 0.7))
    trainer(tmp_path, callback).fit(model, loader)
    assert callback.exact == [True] * 10
    assert sum("removed weights were not 0 before a step" in record.getMessage() for record in caplog.records) == 1
