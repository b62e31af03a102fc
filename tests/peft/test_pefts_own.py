"""What PEFT does to its layers, done to fused ones: only their forward is another."""

import copy

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, __version__, get_peft_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

import hydra_kernels.peft as hydra_peft
from tests.peft.models import (
    llama_config,
    make_base,
    make_config,
    make_model,
    make_tokens,
    randomize,
)

PEFT_VERSION = Version(__version__)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
TARGETS = ["q_proj", "v_proj", "up_proj"]


def both(**kwargs):
    """A model with adapters "one" and "two", and its fused copy."""
    stock = make_model("llama", ("one", "two"), **{"target_modules": TARGETS, **kwargs})
    fused = copy.deepcopy(stock)
    assert not hydra_peft.fuse(fused).left
    return stock, fused


def assert_same(stock, fused, rtol=1e-4, atol=1e-5):
    tokens = make_tokens()
    torch.testing.assert_close(fused(tokens).logits, stock(tokens).logits, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"r": 16},  # more than the layers are wide
    ],
    ids=str,
)
def test_configurations(kwargs):
    if kwargs.get("init_lora_weights") == "orthogonal":
        if PEFT_VERSION < Version("0.18"):
            pytest.skip("PEFT before 0.18 has no orthogonal initialisation")
        kwargs = {**kwargs, "r": 4}  # it asks for an even rank
    stock, fused = both(**kwargs)
    assert_same(stock, fused)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_weighted_adapter(kind):
    stock, fused = both(r=4)
    for model in (stock, fused):
        model.add_weighted_adapter(["one", "two"], [0.3, 0.9], "sum", combination_type=kind)
        model.set_adapter("sum")
    assert_same(stock, fused)
    with hydra_peft.adapter_ids(fused, 2):
        assert_same(stock, fused)
    for model in (stock, fused):
        model.delete_adapter("sum")
    assert_same(stock, fused)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_unloading(safe):
    stock, fused = both()
    tokens = make_tokens()
    for name in ("one", "two"):
        with hydra_peft.adapter_ids(fused, hydra_peft.adapter_names(fused).index(name)):
            expected = fused(tokens).logits
        merged = copy.deepcopy(fused).merge_and_unload(safe_merge=safe, adapter_names=[name])
        assert not any(isinstance(m, lora.LoraLayer) for m in merged.modules())
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    for layer, other in zip(stock.modules(), fused.modules(), strict=True):
        if isinstance(layer, lora.Linear):
            assert torch.equal(layer.get_delta_weight("one"), other.get_delta_weight("one"))
    fused.merge_adapter(safe_merge=safe)
    assert_same(stock, fused)
    fused.unmerge_adapter()
    assert_same(stock, fused)
    unloaded = copy.deepcopy(fused).unload()
    with fused.disable_adapter():
        torch.testing.assert_close(unloaded(tokens).logits, fused(tokens).logits)


def test_scaling_layers():
    stock, fused = both()
    for model in (stock, fused):
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.set_scale("one", 3.0)
                layer.scale_layer(0.5)
    assert_same(stock, fused)
    for model in (stock, fused):
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.unscale_layer(None)
    assert_same(stock, fused)


def test_saving_and_loading(tmp_path):
    stock, fused = both()
    fused.save_pretrained(tmp_path)
    base = make_base("llama")
    base.load_state_dict(copy.deepcopy(stock).unload().state_dict())
    for name in ("one", "two"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name)
        stock.set_adapter(name)
        assert_same(stock, loaded)
        report = hydra_peft.fuse(loaded)
        assert report.taken and not report.left
        assert_same(stock, loaded)
        loaded.load_adapter(tmp_path / "one", "again")
        loaded.set_adapter("again")
        stock.set_adapter("one")
        assert_same(stock, loaded)


def test_hot_swapping(tmp_path):
    stock, fused = both(r=4)
    fused.save_pretrained(tmp_path)
    tokens = make_tokens()
    stock.set_adapter("two")
    hotswap_adapter(fused, tmp_path / "two", "one", torch_device="cpu")
    with hydra_peft.adapter_ids(fused, 0):
        torch.testing.assert_close(fused(tokens).logits, stock(tokens).logits)


def test_a_classifiers_head_is_saved_and_trained():
    base = LlamaForSequenceClassification(llama_config())
    model = get_peft_model(base, make_config("classifier", target_modules=["q_proj"]))
    report = hydra_peft.fuse(model)
    assert [name.split(".")[-1] for name in report.taken] == ["q_proj"] * 2
    model(make_tokens()).logits.sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("score.modules_to_save" in name for name in gradients)
    assert any("q_proj.lora_B" in name for name in gradients)


WAYS = pytest.mark.parametrize("way", ["fuse", "register", "context"])


def wrap(way, base, config):
    if way == "register":
        report = hydra_peft.register(config)
        return get_peft_model(base, config), report
    if way == "context":
        with hydra_peft.fused_layers() as report:
            return get_peft_model(base, config), report
    model = get_peft_model(base, config)
    return model, hydra_peft.fuse(model)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 1)

    def forward(self, tokens):
        x = self.first(self.embed(tokens))
        return self.conv(x.transpose(1, 2))


class Scaled(torch.Tensor):
    """Stands for a quantised weight: a tensor subclass that computes in its own way."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            with torch._C.DisableTorchFunctionSubclass():
                return function(x, weight * 2, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})


@WAYS
def test_what_is_no_linear_layer_runs_beside_the_fused_ones(way):
    torch.manual_seed(0)
    base = Mixture()
    config = LoraConfig(r=2, target_modules=["embed", "first", "conv"])
    stock = get_peft_model(copy.deepcopy(base), config)
    randomize(stock)
    nn.init.normal_(stock.base_model.model.embed.lora_embedding_A["default"])
    fused, _ = wrap(way, base, config)
    fused.load_state_dict(stock.state_dict())
    assert type(fused.base_model.model.first) is hydra_peft.FusedLinear
    tokens = torch.randint(0, 7, (2, 3))
    torch.testing.assert_close(fused(tokens), stock(tokens))


@WAYS
def test_a_parameter_as_target_is_pefts(way):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    config = LoraConfig(r=2, target_modules=["0"], target_parameters=["1.weight"])
    stock = get_peft_model(copy.deepcopy(base), config)
    randomize(stock)
    fused, report = wrap(way, base, config)
    fused.load_state_dict(stock.state_dict())
    assert len(report.taken) == 1 and len(report.left) == 1
    x = torch.randn(3, 6)
    torch.testing.assert_close(fused(x), stock(x))


@WAYS
def test_a_mixture_of_experts(way):
    """Its experts are parameters, which PEFT's code adapts beside the fused attention."""
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(
            **{k: v for k, v in llama_config().to_dict().items() if k in SIZES},
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )
    names = [n for n, _ in base.named_parameters() if n.endswith("experts.down_proj")]
    if not names:
        pytest.skip("transformers before 5 has a module for each expert")
    target = names[0].split("layers.0.")[1]
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=[target])
    stock = get_peft_model(copy.deepcopy(base), config)
    randomize(stock)
    fused, report = wrap(way, base, config)
    fused.load_state_dict(stock.state_dict())
    assert len(report.taken) == 4
    assert way == "register" or len(report.left) == 2
    assert_same(stock.eval(), fused.eval())


@WAYS
def test_a_weight_of_a_class_of_its_own_is_left_to_peft(way):
    """Quantised and sharded weights are such, and only their class knows what they compute."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8))
    weight = nn.Parameter(base[0].weight.detach().as_subclass(Scaled), requires_grad=False)
    base[0].weight = weight
    assert type(base[0].weight) is Scaled
    config = LoraConfig(r=2, target_modules=["0"])
    model, report = wrap(way, base, config)
    assert report.taken == []
    assert ["Scaled" in why for why in report.left.values()] == [True]
    x = torch.randn(3, 6)
    doubled = 2 * x @ weight.as_subclass(torch.Tensor).t() + base[0].bias
    torch.testing.assert_close(model(x).as_subclass(torch.Tensor), doubled)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_fused_layer_saves_nothing_more_for_backward(dropout):
    """PEFT saves a float32 copy of x for a float32 adapter over bfloat16, and one for dropout."""
    layers = {}
    for name in ("bare", "stock", "fused"):
        base = nn.Sequential(nn.Linear(64, 32)).bfloat16()
        if name != "bare":
            config = LoraConfig(r=4, target_modules=["0"], lora_dropout=dropout)
            base = get_peft_model(base, config).train()
        layers[name] = base
    hydra_peft.fuse(layers["fused"])
    x = torch.randn(256, 64, dtype=torch.bfloat16, requires_grad=True)
    saved = {}
    for name, model in layers.items():
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def pack(t, held=held, seen=seen):
            if t.untyped_storage().data_ptr() not in held:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        saved[name] = sum(seen.values())
        del y
    assert saved["fused"] <= saved["bare"] + 64  # a seed of two int64
    assert saved["stock"] > saved["bare"] + x.nbytes  # or this test sees nothing


def test_llama_layers_replicated_share_their_weights():
    torch.manual_seed(0)
    config = make_config(layer_replication=[(0, 2), (1, 2)])
    stock = get_peft_model(LlamaForCausalLM(llama_config()), config)
    randomize(stock)
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    assert len(fused.base_model.model.model.layers) == 3
    assert_same(stock, fused)


def test_dropout_is_off_in_evaluation():
    stock, fused = both(lora_dropout=0.5)
    assert_same(stock.eval(), fused.eval())


def test_each_of_several_active_adapters_draws_its_own_mask():
    """The second undoes the first; what their masks differ in is left."""
    model = make_model("llama", ("one", "two"), r=4, target_modules=["q_proj"], lora_dropout=0.5)
    hydra_peft.fuse(model)
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    with torch.no_grad():
        layer.lora_A["two"].weight.copy_(layer.lora_A["one"].weight)
        layer.lora_B["two"].weight.copy_(-layer.lora_B["one"].weight)
    layer.set_adapter(["one", "two"])
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x))
    assert (layer.train()(x) - layer.base_layer(x)).abs().max() > 0.1


def test_adapters_drop_with_their_own_probabilities():
    stock, fused = both(lora_dropout=0.0)
    for layer in fused.modules():
        if isinstance(layer, lora.Linear):
            layer.lora_dropout["two"] = nn.Dropout(0.5)
    tokens = make_tokens()
    with hydra_peft.adapter_ids(fused.train(), torch.zeros(3, dtype=torch.long)):
        expected = stock.train()(tokens).logits
        torch.testing.assert_close(fused(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_scaling_that_is_trained_gets_its_gradient():
    gradients = []
    for model in both():
        scaling = torch.tensor(0.5, requires_grad=True)
        model.base_model.model.model.layers[0].self_attn.q_proj.scaling["one"] = scaling
        torch.manual_seed(1)
        model(make_tokens()).logits.square().sum().backward()
        gradients.append(scaling.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_hooks_on_all_modules_see_those_of_a_layer():
    seen = []
    for model in both():
        called = []
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, y, called=called: called.append(type(module).__name__)
        )
        try:
            model(make_tokens())
        finally:
            hook.remove()
        seen.append(called.count("Linear") + called.count("FusedLinear"))
    assert seen[0] == seen[1]
