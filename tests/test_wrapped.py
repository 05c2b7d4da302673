"""Weights that cannot be pruned as they stand are named with what to do; the rest of the model is pruned right."""

import copy
import io
import os
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sfpk_kernels import Coordinates, MaskSet
from sfpk_kernels import prune as search
from sfpk_kernels.coordinates.flat import named_parameters
from sfpk_kernels.coordinates.wrapped import check_plain, originals

from .settings import population

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def reasons(model):
    return {skip.name: skip.reason for skip in Coordinates(model).skipped}


def wrapped(wrap):
    """A layer under something, between two plain ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), wrap(nn.Linear(12, 12)), nn.Tanh(), nn.Linear(12, 4))


def pickled(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Correction(nn.Module):
    """A parametrization with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(12, 12)

    def forward(self, weight):
        return self.mix(weight)


def by(kind):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", kind())
        return layer

    return wrap


_INSIDE = "parametrizations.weight."

# What was put around a layer, the parameters it left there, what to call, and that call.
WRAPPED = {
    "spectral_norm": (
        nn.utils.spectral_norm, ["weight_orig"], "torch.nn.utils.remove_spectral_norm", nn.utils.remove_spectral_norm,
    ),
    "weight_norm": (
        nn.utils.weight_norm, ["weight_g", "weight_v"], "torch.nn.utils.remove_weight_norm",
        nn.utils.remove_weight_norm,
    ),
    "prune": (
        lambda layer: prune.random_unstructured(layer, "weight", 0.5), ["weight_orig"], "prune.remove",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "prune, twice": (
        lambda layer: prune.l1_unstructured(prune.random_unstructured(layer, "weight", 0.5), "weight", 0.2),
        ["weight_orig"], "prune.remove", lambda layer: prune.remove(layer, "weight"),
    ),
    **{
        name: (
            wrap, names, "parametrize.remove_parametrizations",
            lambda layer: parametrize.remove_parametrizations(layer, "weight"),
        )
        for name, wrap, names in (
            ("parametrized: weight_norm", parametrizations.weight_norm, [f"{_INSIDE}original0", f"{_INSIDE}original1"]),
            ("parametrized: spectral_norm", parametrizations.spectral_norm, [f"{_INSIDE}original"]),
            ("parametrized: orthogonal", parametrizations.orthogonal, [f"{_INSIDE}original"]),
            ("parametrized: own", by(Symmetric), [f"{_INSIDE}original"]),
            ("parametrized: with a layer", by(Correction), [f"{_INSIDE}original", f"{_INSIDE}0.mix.weight"]),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("carried", [lambda m: m, copy.deepcopy, pickled], ids=["made", "copied", "pickled"])
@pytest.mark.parametrize(("wrap", "names", "call", "unwrap"), WRAPPED.values(), ids=WRAPPED.keys())
def test_a_wrapped_layer_is_named_with_what_removes_it(wrap, names, call, unwrap, carried, vectors):
    model = wrapped(wrap)
    with torch.no_grad():
        model(vectors[0][0])
    if carried is not pickled or not hasattr(model[2], "parametrizations"):  # which torch does not pickle
        model = carried(model)
    why = reasons(model)
    for name in names:
        assert f"call {call} first" in why[f"2.{name}"]
    assert [tensor.name for tensor in Coordinates(model).tensors] == ["0.weight", "4.weight"]
    text = Coordinates(model).describe()
    assert ("prune.remove first" in text) == (call == "prune.remove")
    assert originals(model) == {"2.weight": why[f"2.{names[0]}"]}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = population(sparsity=0.5, n_particles=2, n_steps=3)
    result = search(model, vectors, config=config)
    assert set(result.mask) == {"0.weight", "4.weight"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.mask.apply_(model)
    assert MaskSet.from_model(model) == result.mask
    unwrap(model[2])
    assert "2.weight" in [tensor.name for tensor in Coordinates(model).tensors], "what it said helps"
    assert not originals(model)


def test_with_nothing_else_to_prune_the_error_says_so():
    for wrap, _, call, _ in WRAPPED.values():
        with pytest.raises(ValueError, match=rf"at least one prunable tensor, got none(.|\n)*{re.escape(call)} first"):
            Coordinates(nn.Sequential(wrap(nn.Linear(12, 12))))


def test_other_parameters_of_a_layer_are_no_unknown_layer():
    layer = nn.Linear(4, 4)
    layer.scale_orig = nn.Parameter(torch.ones(4))
    assert reasons(layer)["scale_orig"] == "neither weight nor bias of its Linear"


def exported(model):
    return torch.export.export(model, (torch.randn(2, 8),)).module()


def statically_quantized(model):
    backend = next(
        (one for one in ("x86", "fbgemm", "qnnpack") if one in torch.backends.quantized.supported_engines), None
    )
    if backend is None:
        pytest.skip("no quantized kernels here")
    ao = torch.ao.quantization
    model = nn.Sequential(ao.QuantStub(), model, ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig(backend)
    ao.prepare(model, inplace=True)
    model(torch.randn(4, 8))
    return ao.convert(model)


WITHOUT_LAYERS = {
    "scripted": (torch.jit.script, "it is scripted or traced .torch.jit.: prune the model first"),
    "traced": (lambda m: torch.jit.trace(m, torch.randn(2, 8)), "it is scripted or traced"),
    "frozen": (lambda m: torch.jit.freeze(torch.jit.script(m.eval())), "it is scripted or traced"),
    "exported": (exported, r"it is an exported graph \(torch.export\): prune the model first and export it then"),
    "unflattened": (
        lambda m: torch.export.unflatten(torch.export.export(m, (torch.randn(2, 8),))),
        "it is an exported graph",
    ),
    "quantized on the fly": (
        lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}),
        "0.weight +12×8 .*quantized: prune the model before that",
    ),
    "quantized": (statically_quantized, "1.0.weight +12×8 .*quantized: prune the model before that"),
}


@pytest.mark.parametrize(("make", "words"), WITHOUT_LAYERS.values(), ids=WITHOUT_LAYERS.keys())
def test_models_without_layers(mlp, make, words):
    with pytest.raises(ValueError, match=rf"^model: wanted (.|\n)*{words}"):
        Coordinates(make(mlp))


def test_a_single_exported_layer():
    with pytest.raises(ValueError, match=r"it is an exported graph \(torch.export\)"):
        Coordinates(exported(nn.Linear(8, 4)))


@pytest.mark.parametrize("kind", ["scripted", "traced", "exported", "unflattened"])
def test_such_a_part_of_a_model_is_named(mlp, kind):
    """Their modes and buffers cannot be put back as they were."""
    make, words = WITHOUT_LAYERS[kind]
    with pytest.raises(ValueError, match=f"^model: wanted .* got others: 1.body {words.removeprefix('it ')}"):
        Coordinates(nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"body": make(mlp)})))


def test_a_quantized_part_is_left_alone(mlp, vectors):
    model = nn.Sequential(torch.ao.quantization.quantize_dynamic(mlp, {nn.Linear}), nn.Linear(4, 4))
    assert [tensor.name for tensor in Coordinates(model).tensors] == ["1.weight"]
    assert reasons(model)["0.0.weight"] == "quantized: prune the model before that"
    result = search(model, vectors, config=population(sparsity=0.5, n_particles=2, n_steps=2))
    assert list(result.mask) == ["1.weight"]


def test_a_graph_without_layers(mlp):
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, 8))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    model = nn.Sequential(torch.fx.symbolic_trace(Functions()), nn.Linear(4, 4))
    assert "0.w" in reasons(model)
    assert "in a graph without layers" in reasons(model)["0.w"]


def test_an_exported_program(mlp):
    with pytest.raises(TypeError, match="got ExportedProgram: an exported program has no layers, prune"):
        Coordinates(torch.export.export(mlp, (torch.randn(2, 8),)))


def test_a_graph_with_its_layers_is_pruned(mlp):
    assert [tensor.name for tensor in Coordinates(torch.fx.symbolic_trace(mlp)).tensors] == ["0.weight", "2.weight"]


def with_weight(mlp, make):
    mlp[0].weight = nn.Parameter(make(mlp[0].weight.detach()), requires_grad=False)
    return mlp


class Packed(torch.Tensor):
    """A tensor subclass that keeps its numbers elsewhere, like those of quantization packages."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


class PackedSparse(Packed):
    pass


SPECIAL = {
    "coo": (lambda w: w.to_sparse(), r"0.weight, which is sparse \(sparse_coo\): make it dense first"),
    "csr": (lambda w: w.to_sparse_csr(), r"0.weight, which is sparse \(sparse_csr\): make it dense first"),
    "subclass": (Packed, "0.weight, a Packed: prune before quantizing"),
    "sparse subclass": (PackedSparse, "0.weight, a PackedSparse: make it dense first"),
}


@pytest.mark.parametrize(("make", "words"), SPECIAL.values(), ids=SPECIAL.keys())
def test_weights_that_are_no_dense_tensors(mlp, make, words):
    model = with_weight(mlp, make)
    with pytest.raises(ValueError, match=rf"^model: wanted dense weights, got {words}.*ignored_layers=\['0.weight'\]"):
        Coordinates(model)
    assert [t.name for t in Coordinates(model, ignored_layers=["0.weight"]).tensors] == ["2.weight"], "what it said"
    with pytest.raises(ValueError, match=rf"^optimizer: wanted dense weights, got {words}"):
        check_plain("0.weight", model[0].weight, "optimizer")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_codes(mlp, dtype):
    why = reasons(with_weight(mlp, lambda w: w.to(dtype)))
    assert why["0.weight"] == f"dtype {str(dtype)[6:]}: quantized, prune the model before that"


def test_a_parameter_class_of_ones_own_is_a_parameter(mlp):
    class Own(nn.Parameter):
        pass

    mlp[0].weight = Own(mlp[0].weight.detach())
    assert [tensor.name for tensor in Coordinates(mlp).tensors] == ["0.weight", "2.weight"]


def test_weights_that_are_not_there_are_named(mlp):
    with pytest.raises(
        ValueError, match=r"got cpu, meta \(0.0.weight on cpu, 1.weight on meta\): load its weights first"
    ):
        Coordinates(nn.Sequential(mlp, nn.Linear(4, 4, device="meta")))
    with pytest.raises(ValueError, match="got 0.weight and all others on the meta device: load its weights first"):
        Coordinates(nn.Sequential(nn.Linear(2, 2, device="meta")))
    for lazy in (nn.LazyLinear(2), nn.LazyConv2d(2, 3), nn.LazyBatchNorm1d()):
        with pytest.raises(ValueError, match="got 1.weight, lazy: run one forward pass first"):
            Coordinates(nn.Sequential(mlp, lazy))


class DTensor(Packed):
    """By name: the real one needs a process group."""


class FlatParameter(nn.Parameter):
    """By name: FSDP's."""


def partitioned(mlp):
    mlp[0].weight.ds_id = 0
    return mlp


def flattened(mlp):
    mlp[2].bias = FlatParameter(torch.ones(4))
    return mlp


SHARDED = {
    "tensor parallel": (lambda m: with_weight(m, DTensor), r"0.weight, a DTensor \(FSDP2"),
    "flat": (
        lambda m: (setattr(m[2], "bias", FlatParameter(torch.ones(4))), m)[1],
        r"2.bias, a FlatParameter \(FSDP\)",
    ),
    "partitioned": (partitioned, "0.weight, a parameter that DeepSpeed has partitioned"),
}


@pytest.mark.parametrize(("make", "words"), SHARDED.values(), ids=SHARDED.keys())
def test_parts_of_parameters_are_refused_everywhere(mlp, make, words):
    masks = MaskSet({name: torch.rand(mlp.get_parameter(name).shape) > 0.5 for name in ("0.weight", "2.weight")})
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    model = make(mlp)
    wanted = rf"^model: wanted parameters that are whole in this process, got {words}.*: prune the model before it is"
    for act in (
        lambda: Coordinates(model),
        lambda: Coordinates(model, ignored_layers=["0"]),
        lambda: named_parameters(model),
        lambda: masks.check(model),
        lambda: masks.apply_(model),
        lambda: masks.enforce(optimizer, model),
        lambda: masks.to_torch_prune(model),
        lambda: MaskSet.from_model(model),
    ):
        with pytest.raises(ValueError, match=wanted):
            act()


def test_an_optimizer_of_parts(mlp):
    masks = MaskSet({"0.weight": torch.rand(12, 8) > 0.5})
    model = with_weight(mlp, DTensor)
    optimizer = torch.optim.SGD([(name, p) for name, p in model.named_parameters()], 0.1)
    with pytest.raises(ValueError, match=r"^optimizer: wanted parameters that are whole in this process, got 0.weight"):
        masks.enforce(optimizer)


def test_fsdp2_in_one_process(mlp, vectors, tmp_path):
    """The real thing."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or distributed.is_initialized() or "RANK" in os.environ:
        pytest.skip("needs a process group of its own")
    from torch.distributed.device_mesh import init_device_mesh

    fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard
    masks = MaskSet({name: torch.rand(mlp.get_parameter(name).shape) > 0.5 for name in ("0.weight", "2.weight")})
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = fully_shard(mlp, mesh=init_device_mesh("cpu", (1,)))
        for act in (
            lambda: masks.apply_(model),
            lambda: search(model, vectors, 0.5),
        ):
            with pytest.raises(ValueError, match=r"wanted parameters that are whole .* got 0.weight, a DTensor"):
                act()
    finally:
        distributed.destroy_process_group()


class Adapted(nn.Module):
    """A low-rank adapter as several packages build it: layers beside the weight."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a, self.lora_b = (
            nn.Linear(layer.in_features, 2, bias=False),
            nn.Linear(2, layer.out_features, bias=False),
        )

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias) + self.lora_b(self.lora_a(x))


class AdaptedWeight(nn.Linear):
    """Or: parameters in the layer."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.lora_A = nn.Parameter(torch.randn(2, layer.in_features))
        self.lora_B = nn.Parameter(torch.randn(layer.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


@pytest.mark.parametrize("kind", [Adapted, AdaptedWeight])
def test_low_rank_adapters_and_what_is_under_them_are_left_alone(kind, vectors):
    model = wrapped(kind)
    assert [tensor.name for tensor in Coordinates(model).tensors] == ["0.weight", "4.weight"]
    why = reasons(model)
    assert all("merging would fill its zeros" in why[name] for name in why if name.startswith("2."))
    result = search(model, vectors, config=population(sparsity=0.5, n_particles=2, n_steps=2))
    assert set(result.mask) == {"0.weight", "4.weight"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        return self.o(torch.relu(self.b(torch.relu(self.a(x)))))


OF_ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_")


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig"])
def test_peft(kind, vectors):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["a"]}
    if kind == "IA3Config":
        options["feedforward_modules"] = []
    if kind == "OFTConfig":
        options |= {"r": 0, "oft_block_size": 4}
    if kind == "LoraConfig":
        options["modules_to_save"] = ["o"]
    model = peft.get_peft_model(Net(), getattr(peft, kind)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and any(
                part in name for part in ("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_")
            ):
                parameter.add_(0.1 * torch.randn_like(parameter))
    last = "o.modules_to_save.default.weight" if kind == "LoraConfig" else "o.weight"
    pruned = ["base_model.model.b.weight", f"base_model.model.{last}"]
    assert [tensor.name for tensor in Coordinates(model).tensors] == pruned
    why = reasons(model)
    assert "merge_and_unload() or unload() first" in why["base_model.model.a.base_layer.weight"]
    if kind == "LoraConfig":
        assert why["base_model.model.o.original_module.weight"].startswith("kept aside by peft")
    config = population(sparsity=0.5, n_particles=2, n_steps=3)
    result = search(model, vectors, config=config)
    result.mask.apply_(model)
    merged = model.merge_and_unload()
    zeros = {name: int((merged.get_parameter(f"{name}.weight") == 0).sum()) for name in ("a", "b", "o")}
    assert zeros["a"] == 0
    assert zeros["b"] + zeros["o"] == result.mask.prunable - result.mask.kept, "they survive merging"
    assert "a.weight" in [tensor.name for tensor in Coordinates(merged).tensors]
