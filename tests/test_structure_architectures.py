"""Published architectures: shrunk computes what masked does, and costs are those that are counted."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from sfpk_kernels.structure import Costs, find_structure, gated_call, select, shrink

from .architectures.proof import alive, random_keep
from .snapshot import Snapshot

pytest.importorskip("torch_pruning")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160}
WORDS = {"vocab_size": 120, **SMALL}
TEN = {"num_labels": 10}


def of_images(model, config, size=64, **options):
    """One of transformers, for images of that size."""

    def build():
        made = getattr(transformers, config)(**TEN, **options)
        return getattr(transformers, model)(made), {"pixel_values": torch.randn(2, 3, size, size)}

    return build


def of_words(model, config, **options):
    """One of transformers, for words."""

    def build():
        made = getattr(transformers, config)(**options)
        return getattr(transformers, model)(made), {"input_ids": torch.randint(0, 120, (2, 9))}

    return build


def of_suite(factory, *shape):
    """One of the suite's."""
    return lambda: (factory(), torch.randn(2, *shape))


def of_timm(name, size=64, **options):
    """One of timm."""

    def build():
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=10, **options), torch.randn(2, 3, size, size)

    return build


GROUPED = {**WORDS, "num_attention_heads": 8, "num_key_value_heads": 2}
CONV = {"channel"}
BLOCK = {"head", "neuron"}
NETS = {  # what is built, kinds of coordinates
    "suite-resnet-20": (of_suite(models.resnet, 3, 32, 32), CONV),
    "suite-resnet-18": (of_suite(models.resnet18, 3, 64, 64), CONV),
    "suite-vgg": (of_suite(models.vgg, 3, 32, 32), CONV),
    "suite-mobilenet-v1": (of_suite(models.mobilenet, 3, 64, 64), CONV),
    "suite-vit": (of_suite(lambda: models.Vit(192, 4, 3, image=64), 3, 64, 64), BLOCK),
    "resnet-50": (of_images("ResNetForImageClassification", "ResNetConfig", embedding_size=16,
                            hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3]), CONV),
    "mobilenet-v1": (of_images("MobileNetV1ForImageClassification", "MobileNetV1Config", depth_multiplier=0.5), CONV),
    "mobilenet-v2": (of_images("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.5), CONV),
    "efficientnet": (of_images("EfficientNetForImageClassification", "EfficientNetConfig", width_coefficient=0.5,
                               depth_coefficient=0.5, hidden_dim=640), CONV),
    "regnet": (of_images("RegNetForImageClassification", "RegNetConfig", embedding_size=16,
                         hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 3, 1], groups_width=16), CONV),
    "convnext": (of_images("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[24, 48, 96, 192],
                           depths=[2, 2, 3, 2], layer_scale_init_value=0.5), {"channel", "neuron"}),
    "deit": (of_images("DeiTForImageClassification", "DeiTConfig", image_size=64, patch_size=16, **SMALL), BLOCK),
    "vit": (of_images("ViTForImageClassification", "ViTConfig", image_size=64, patch_size=16, **SMALL), BLOCK),
    "swin": (of_images("SwinForImageClassification", "SwinConfig", image_size=64, embed_dim=32, depths=[2, 2],
                       num_heads=[2, 4], window_size=4), BLOCK),
    "bert": (of_words("BertForMaskedLM", "BertConfig", **WORDS), BLOCK),
    "llama-sdpa": (of_words("LlamaForCausalLM", "LlamaConfig", attn_implementation="sdpa", **GROUPED), BLOCK),
    "llama-eager": (of_words("LlamaForCausalLM", "LlamaConfig", attn_implementation="eager", **GROUPED), BLOCK),
    "gpt-2": (of_words("GPT2LMHeadModel", "GPT2Config", vocab_size=120, n_embd=64, n_layer=3, n_head=4), BLOCK),
    "timm-mobilenet-v3": (of_timm("mobilenetv3_small_100"), CONV),
    "timm-resnext-50": (of_timm("resnext50_32x4d", layers=(1, 2, 1, 1)), CONV),
    "timm-regnet-y": (of_timm("regnety_002"), CONV),
    "timm-convnext": (of_timm("convnext_atto"), CONV),
    "timm-deit-t": (of_timm("deit_tiny_patch16_224", img_size=64, depth=4), BLOCK),
    "timm-swin": (of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4, depths=(2, 2, 2, 2)), BLOCK),
}  # fmt: skip


def call(model, inputs):
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_masked_is_shrunk_and_predicted_is_counted(name):
    build, kinds = NETS[name]
    torch.manual_seed(0)
    model, inputs = build()
    model = alive(model, inputs)
    snapshot = Snapshot(model)
    structure = find_structure(model, inputs)
    assert {group.kind for group in structure.groups} == kinds
    assert len(structure.groups) > 3
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    costs = Costs(model, structure, args, kwargs)
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(structure.size, generator=generator)
    chosen = {budget: select(structure, costs, score, 0.5, budget) for budget in ("macs", "params")}
    keeps = [*chosen.values(), *(random_keep(structure, share, generator) for share in (0.1, 0.4, 0.8))]
    with torch.no_grad():
        dense = call(model, inputs)
        assert (dense[0] - dense[1]).abs().max() > 1e-2 * dense.abs().max()  # it depends on its inputs
        for keep in keeps:
            smaller = shrink(model, structure, keep)
            masked, shrunk = gated_call(model, structure, keep, args, kwargs), call(smaller, inputs)
            masked = masked if isinstance(masked, torch.Tensor) else masked.logits
            assert (masked - shrunk).abs().max() <= 1e-5 * torch.maximum(dense.abs().max(), masked.abs().max())
            assert (masked - dense).abs().max() > 1e-3 * dense.abs().max()
            assert costs.cost(keep, "params") == sum(p.numel() for p in smaller.parameters())
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                call(smaller, inputs)
            assert costs.cost(keep, "macs") == counter.get_total_flops() // 2
    for budget, keep in chosen.items():
        assert 0.45 * costs.dense[budget] < costs.cost(keep, budget) <= 0.5 * costs.dense[budget] + 0.5
    snapshot.check()


REFUSED = {  # what is built, which module and why
    "convolution in an MLP": (
        of_images("SegformerForImageClassification", "SegformerConfig", hidden_sizes=[16, 32, 48, 64],
                  num_attention_heads=[1, 2, 3, 4], depths=[1, 1, 1, 1]),
        r"removing some neurons of segformer\S*mlp.fc1 cannot be done right, the smaller model raises .* "
        r"ignored_layers=\['segformer\S*fc1'\]",
    ),
    "group norm": (
        of_images("PoolFormerForImageClassification", "PoolFormerConfig", hidden_sizes=[16, 32, 48, 64],
                  depths=[1, 1, 1, 1]),
        r"the outputs of poolformer\S*projection cannot be removed one by one, as they reach \S*norm "
        r"\(PoolFormerGroupNorm\): the statistics of its groups .* ignored_layers=",
    ),
    "a scale for every head": (
        of_images("Swinv2ForImageClassification", "Swinv2Config", image_size=64, embed_dim=32, depths=[2, 2],
                  num_heads=[2, 4], window_size=4),
        r"removing some heads of swinv2\S*self.query cannot be done right, the smaller model raises .* ignored_layers=",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shrunk_right_is_refused_by_name(name):
    build, words = REFUSED[name]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    snapshot = Snapshot(model)
    with pytest.raises(ValueError, match=words):
        find_structure(model, inputs)
    snapshot.check()
