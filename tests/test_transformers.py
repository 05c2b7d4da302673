"""SFPKTrainerCallback with the real Hugging Face Trainer, on a tiny random model."""

import copy
import shutil

import pytest
import torch

from sfpk_kernels import MaskSet
from sfpk_kernels.baselines import magnitude

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sfpk_kernels.integrations.transformers import MASK_FILE, SFPKTrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 50, (24, 6), generator=generator)
        self.labels = torch.randint(0, 2, (24,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(6, dtype=torch.long), "labels": self.labels[i]}


class Watch(SFPKTrainerCallback):
    """Looks at the weights after every optimizer step, and at the start."""

    def __init__(self, masks=None):
        super().__init__(masks)
        self.exact = []

    def on_step_end(self, args, state, control, **kwargs):
        self.exact.append(MaskSet.from_model(kwargs["model"]) == self.masks)


def tiny(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    )


def trainer(folder, model, *callbacks, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=0.01, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="steps", save_steps=2, logging_strategy="no",
        **{"max_steps": 4, "save_total_limit": 2, **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=list(callbacks))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_exact_sparsity_saved_reloaded_resumed(tmp_path, accumulate):
    model = tiny()
    masks = magnitude(model, 0.7)
    dense = copy.deepcopy(model.state_dict())
    callback = Watch(masks)
    trainer(tmp_path, model, callback, gradient_accumulation_steps=accumulate).train()
    assert callback.exact == [True] * 4
    assert MaskSet.from_model(model) == masks
    name = next(iter(masks))
    assert not torch.equal(model.state_dict()[name][masks[name]], dense[name][masks[name]]), "it has trained"

    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        assert MaskSet.load(folder / MASK_FILE) == masks
        assert MaskSet.from_model(BertForSequenceClassification.from_pretrained(folder)) == masks
    assert SFPKTrainerCallback.from_checkpoint(folder).masks == masks

    again, resumed = Watch(), tiny(1)  # takes the masks of the checkpoint
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulate}
    trainer(tmp_path, resumed, again, **options).train(resume_from_checkpoint=str(folder))
    assert again.masks == masks
    assert again.exact == [True] * 2
    assert MaskSet.from_model(resumed) == masks


def test_without_the_callback_weights_return(tmp_path):
    model = tiny()
    masks = magnitude(model, 0.7)
    masks.apply_(model)
    trainer(tmp_path, model).train()
    assert MaskSet.from_model(model).kept > masks.kept


def test_callback_states_restored_by_the_trainer(tmp_path):
    masks = magnitude(tiny(), 0.7)
    trainer(tmp_path, tiny(), SFPKTrainerCallback(masks)).train()
    model = tiny(1)
    options = {"max_steps": 6, "restore_callback_states_from_checkpoint": True}
    trainer(tmp_path, model, SFPKTrainerCallback(), **options).train(resume_from_checkpoint=True)
    assert MaskSet.from_model(model) == masks


def test_masks_lost_to_the_option_that_restores_callbacks(tmp_path):
    masks = magnitude(tiny(), 0.7)
    trainer(tmp_path / "a", tiny(), SFPKTrainerCallback(masks)).train()
    options = {"max_steps": 6, "restore_callback_states_from_checkpoint": True}
    callback = SFPKTrainerCallback.from_checkpoint(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(ValueError, match=r"leave that option off\): SFPKTrainerCallback.from_checkpoint"):
        trainer(tmp_path / "b", tiny(), callback, **options).train(str(tmp_path / "a" / "checkpoint-4"))


def test_the_folder_of_another_run_is_not_read(tmp_path):
    """A checkpoint of the same step lies in output_dir, of a run with other masks."""
    masks, others = (magnitude(tiny(), share) for share in (0.7, 0.3))
    trainer(tmp_path / "dense", tiny()).train()
    trainer(tmp_path / "pruned", tiny(), SFPKTrainerCallback(masks)).train()
    trainer(tmp_path / "here", tiny(), SFPKTrainerCallback(others)).train()
    for before in ("dense", "pruned"):
        shutil.copytree(tmp_path / "here", tmp_path / before / "here")
        checkpoint, here = str(tmp_path / before / "checkpoint-4"), tmp_path / before / "here"
        with pytest.raises(ValueError, match="got neither"):
            trainer(here, tiny(), SFPKTrainerCallback(), max_steps=6).train(checkpoint)
        model, callback = tiny(), SFPKTrainerCallback(masks)
        trainer(here, model, callback, max_steps=6).train(checkpoint)
        assert callback.masks == masks
        assert MaskSet.from_model(model) == masks


def test_two_callbacks_are_refused(tmp_path):
    model = tiny()
    masks = magnitude(model, 0.7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="callbacks: wanted one SFPKTrainerCallback in a Trainer, got a second one"):
        trainer(tmp_path, model, Watch(masks), SFPKTrainerCallback(masks))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    late = trainer(tmp_path, model, SFPKTrainerCallback(masks))
    late.add_callback(SFPKTrainerCallback(masks))
    with pytest.raises(ValueError, match="got a second one"):
        late.train()
    again = trainer(tmp_path, model, SFPKTrainerCallback(masks))
    again.train()
    again.train()
    assert MaskSet.from_model(model) == masks


def test_refusals(tmp_path):
    model = tiny()
    masks, others = magnitude(model, 0.7), magnitude(model, 0.5)
    with pytest.raises(TypeError, match="masks: wanted a MaskSet or None, got str"):
        SFPKTrainerCallback("masks")
    with pytest.raises(ValueError, match="masks: wanted a MaskSet, or a checkpoint with masks"):
        trainer(tmp_path / "a", model, SFPKTrainerCallback()).train()
    wrong = MaskSet({"nothing.weight": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"nothing.weight is not in the model"):
        trainer(tmp_path / "a", model, SFPKTrainerCallback(wrong)).train()
    trainer(tmp_path / "a", model, SFPKTrainerCallback(masks)).train()
    folder = tmp_path / "a" / "checkpoint-4"
    with pytest.raises(ValueError, match="masks: wanted those of the checkpoint, with the fingerprint"):
        trainer(tmp_path / "a", tiny(), SFPKTrainerCallback(others), max_steps=6).train(
            resume_from_checkpoint=str(folder)
        )
    elsewhere = tmp_path / "elsewhere" / "checkpoint-4"
    shutil.copytree(folder, elsewhere)
    with pytest.raises(ValueError, match="masks: wanted those of the checkpoint, with the fingerprint"):
        trainer(tmp_path / "b", tiny(), SFPKTrainerCallback(others), max_steps=6).train(
            resume_from_checkpoint=str(elsewhere)
        )
    with pytest.raises(ValueError, match=r"got neither: SFPKTrainerCallback.from_checkpoint\(folder\) takes them"):
        trainer(tmp_path / "b", tiny(), SFPKTrainerCallback(), max_steps=6).train(resume_from_checkpoint=str(elsewhere))
    fresh = tiny()
    callback = SFPKTrainerCallback.from_checkpoint(elsewhere)
    trainer(tmp_path / "b", fresh, callback, max_steps=6).train(resume_from_checkpoint=str(elsewhere))
    assert MaskSet.from_model(fresh) == masks


def test_weights_written_between_steps_are_said_once(tmp_path, caplog):
    class Writing(Watch):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            torch.nn.init.ones_(kwargs["model"].classifier.weight)

        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control, **kwargs)
            self.started.append(MaskSet.from_model(kwargs["model"]) == self.masks)

    model = tiny()
    callback = Writing(magnitude(model, 0.7))
    callback.started = []
    trainer(tmp_path, model, callback).train()
    assert callback.exact == [True] * 4
    assert callback.started == [True] * 4
    said = [record.getMessage() for record in caplog.records if "removed weights were not 0" in record.getMessage()]
    assert len(said) == 1
    assert "before a step of the Trainer, in classifier.weight (" in said[0]
    assert MaskSet.from_model(model) == callback.masks, "masked a last time"
