"""Fused layers compute what PEFT's compute, and leave PEFT everything else."""

import copy
import io

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from torch import nn
from transformers import LlamaForCausalLM

import hydra_kernels.peft as hydra_peft
from tests.peft.models import (
    adapter_gradients,
    llama_config,
    make_base,
    make_config,
    make_model,
    make_tokens,
    randomize,
)

PEFT_VERSION = Version(peft.__version__)
MODELS = ["llama", "gpt2", "opt", "classifier"]


def run(model, tokens):
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=tokens).logits
    generator = torch.Generator().manual_seed(1)
    logits.backward(torch.randn(logits.shape, generator=generator).to(logits.dtype))
    return logits.detach(), adapter_gradients(model)


def assert_same_run(model, other, tokens):
    logits, gradients = run(model, tokens)
    expected, expected_gradients = run(other, tokens)
    torch.testing.assert_close(logits, expected)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name, gradient in gradients.items():
        expected = expected_gradients[name]
        # PEFT's own are up to 6e-6 of the largest off those in float64, the fused ones 1.5e-6.
        atol = 1e-5 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=atol)


def count_fast(monkeypatch):
    calls = []
    fast = hydra_peft.FusedLinear._fast_forward

    def counted(self, *args):
        calls.append(self)
        return fast(self, *args)

    monkeypatch.setattr(hydra_peft.FusedLinear, "_fast_forward", counted)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_fused_model_computes_what_pefts_does(name, monkeypatch):
    calls = count_fast(monkeypatch)
    stock = make_model(name)
    fused = copy.deepcopy(stock)
    report = hydra_peft.fuse(fused)
    tokens = make_tokens()
    assert_same_run(fused, stock, tokens)
    linears = [m for m in fused.modules() if isinstance(m, lora.Linear)]
    assert len(report.taken) == len(linears) > 0
    assert not report.left
    assert len(calls) == len(linears)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])  # a classifier's head is one adapter's
def test_two_active_adapters_add_up(name):
    stock = make_model(name, ("one", "two"))
    stock.base_model.set_adapter(["one", "two"])
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    assert_same_run(fused, stock, make_tokens())


def test_unfuse_gives_pefts_class_back():
    model = make_model()
    layers = {n: type(m) for n, m in model.named_modules()}
    model.gradient_checkpointing_enable()
    checkpoints = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    hydra_peft.fuse(model)
    assert {n: type(m) for n, m in model.named_modules()} != layers
    with hydra_peft.adapter_ids(model, 0):
        model(make_tokens())
    hydra_peft.unfuse(model)
    assert {n: type(m) for n, m in model.named_modules()} == layers
    after = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    assert after == checkpoints and any(after)
    assert not any(
        key in vars(m)
        for m in model.modules()
        for key in ("_current", "_usage", "_group", "_hydra_model")
    )


def test_a_fused_layer_is_shown_as_pefts_and_as_fused():
    model = make_model()
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    before = repr(layer).splitlines()
    hydra_peft.fuse(model)
    first, *rest = before
    assert first == "lora.Linear("
    assert repr(layer).splitlines() == [first, "  fused", *rest]


def test_parameters_and_state_dict_survive():
    model = make_model(adapters=("one", "two"))
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    hydra_peft.fuse(model)
    with hydra_peft.adapter_ids(model, torch.tensor([0, 1, -1])):
        model(make_tokens())
        assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert list(peft.get_peft_model_state_dict(model, adapter_name="two"))


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_are_fused_and_have_ids_of_their_own(how):
    model = make_model(adapters=("one", "two"))
    hydra_peft.fuse(model)
    tokens = make_tokens()
    with hydra_peft.adapter_ids(model, 1):
        if how == "deepcopy":
            copied = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        expected = model(tokens).logits
        first = copied(tokens).logits  # PEFT's active adapter, "one"
    assert any(type(m) is hydra_peft.FusedLinear for m in copied.modules())
    assert not torch.equal(first, expected)
    with hydra_peft.adapter_ids(copied, 1):
        torch.testing.assert_close(copied(tokens).logits, expected)
        torch.testing.assert_close(model(tokens).logits, first)


def through_register(base, config, **kwargs):
    hydra_peft.register(config)
    return get_peft_model(base, config, **kwargs)


def through_context(base, config, **kwargs):
    with hydra_peft.fused_layers():
        return get_peft_model(base, config, **kwargs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrap", [through_register, through_context])
def test_layers_created_fused(name, wrap):
    stock = make_model(name)
    fused = make_model(name, wrap=wrap)
    kinds = {type(m) for m in fused.modules() if isinstance(m, lora.LoraLayer)}
    assert kinds == {hydra_peft.FusedLinear}
    fused.load_state_dict(stock.state_dict())
    assert_same_run(fused, stock, make_tokens())


@pytest.mark.parametrize("wrap", [through_register, through_context])
def test_fan_in_fan_out_is_set_for_a_conv1d(wrap):
    config = make_config()
    assert not config.fan_in_fan_out
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):
        model = wrap(make_base("gpt2"), config)
    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    assert layer.fan_in_fan_out
    assert layer.is_target_conv_1d_layer
    randomize(model)
    model.eval()
    tokens = make_tokens()
    before = model(tokens).logits
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.plain = nn.Linear(8, 8)
        self.scaled = Scaled(8, 8)
        self.conv = nn.Conv1d(8, 8, 1)

    def forward(self, tokens):
        x = self.scaled(self.plain(self.embed(tokens)))
        return self.conv(x.transpose(1, 2))


@pytest.mark.parametrize("way", ["fuse", "register", "context"])
def test_reports_say_what_was_left_and_why(way):
    config = make_config(target_modules=["embed", "plain", "scaled", "conv"], task_type=None)
    if way == "register":
        report = hydra_peft.register(config)
        model = get_peft_model(Mixed(), config)
    elif way == "context":
        with hydra_peft.fused_layers() as report:
            model = get_peft_model(Mixed(), config)
    else:
        model = get_peft_model(Mixed(), config)
        report = hydra_peft.fuse(model)
    names = ["embed", "plain", "scaled", "conv"]
    if way == "register":  # PEFT asks its hook for targets of the registered types only
        names = ["plain", "scaled"]
    by_name = {name.split(".")[-1]: why for name, why in report.left.items()}
    if way != "fuse" and PEFT_VERSION < Version("0.19"):  # which does not tell the names
        by_name = {names[int(name.split()[-1]) - 1]: why for name, why in by_name.items()}
        assert report.taken == [f"layer {names.index('plain') + 1}"]
    else:
        assert [name.split(".")[-1] for name in report.taken] == ["plain"]
    kinds = {"embed": "Embedding", "scaled": "Scaled", "conv": "Conv1d"}
    assert set(by_name) == set(names) - {"plain"}
    assert all(kinds[name] in why for name, why in by_name.items())
    assert "1 LoRA layers fused" in str(report)
    tokens = torch.randint(0, 7, (2, 3))
    stock = copy.deepcopy(model)
    hydra_peft.unfuse(stock)
    torch.testing.assert_close(model(tokens), stock(tokens))
    with pytest.raises(ValueError, match="run PEFT's own code"):
        hydra_peft.adapter_ids(model, 0)


def add_hook(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: out * 3)


def give_own_forward(layer):
    forward = layer.lora_B["default"].forward
    layer.lora_B["default"].forward = lambda x: forward(x) * 3


def hook_the_base(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def replace_dropout(layer):
    layer.lora_dropout["default"] = nn.Tanh()


def give_a_bias(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def double_the_gradient(layer):
    layer.lora_A["default"].register_full_backward_hook(
        lambda module, dx, dy: dx if dx[0] is None else (dx[0] * 2,)
    )


def halve_the_bases_gradient(layer):
    layer.base_layer.register_full_backward_pre_hook(lambda module, dy: (dy[0] / 2,))


@pytest.mark.parametrize("change", [double_the_gradient, halve_the_bases_gradient])
def test_hooks_of_the_backward_pass_run_pefts_code(change):
    model = make_model("llama")
    stock = copy.deepcopy(model)
    hydra_peft.fuse(model)
    plain = run(model, make_tokens())[1]
    for layer in [m for m in [*stock.modules(), *model.modules()] if isinstance(m, lora.Linear)]:
        change(layer)
    tokens = make_tokens()
    assert_same_run(model, stock, tokens)
    changed = run(model, tokens)[1]
    assert any(not torch.allclose(changed[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    "change", [add_hook, give_own_forward, hook_the_base, replace_dropout, give_a_bias]
)
def test_changed_submodules_run_pefts_code(change):
    plain = make_model()
    stock = copy.deepcopy(plain)
    for layer in [m for m in stock.modules() if isinstance(m, lora.Linear)]:
        change(layer)
    fused = copy.deepcopy(plain)
    for layer in [m for m in fused.modules() if isinstance(m, lora.Linear)]:
        change(layer)
    hydra_peft.fuse(fused)
    tokens = make_tokens()
    assert not torch.equal(fused(tokens).logits, plain(tokens).logits)
    torch.testing.assert_close(fused(tokens).logits, stock(tokens).logits)
    with hydra_peft.adapter_ids(fused, 0):
        torch.testing.assert_close(fused(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize(
    "kwargs",
    [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "fc1"]}],
    ids=str,
)
def test_variants_and_biases_run_pefts_code(kwargs):
    stock = make_model("opt", ("one", "two"), **kwargs)
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    tokens = make_tokens()
    assert_same_run(fused, stock, tokens)
    rows = []
    for i, adapter in enumerate(("one", "two")):
        stock.set_adapter(adapter)
        rows.append(stock(tokens[i : i + 1]).logits)
    with stock.disable_adapter():
        rows.append(stock(tokens[2:]).logits)
    with hydra_peft.adapter_ids(fused, torch.tensor([0, 1, -1])):
        torch.testing.assert_close(fused(tokens).logits, torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_ids_of_what_pefts_code_runs_keep_its_dtypes():
    """Biases of float32 adapters over bfloat16: the adapter in float32, the layer in bfloat16."""
    config = make_config(lora_bias=True, target_modules=["fc1"])
    model = get_peft_model(make_base("opt").bfloat16(), config, adapter_name="one")
    model.add_adapter("two", config)
    randomize(model)
    stock = copy.deepcopy(model)
    hydra_peft.fuse(model)
    layer, other = (
        next(m for m in each.modules() if isinstance(m, lora.Linear)) for each in (model, stock)
    )
    assert layer.lora_A["one"].weight.dtype == torch.float32
    x = torch.randn(3, 2, layer.in_features, dtype=torch.bfloat16)
    expected = [layer.base_layer(x)]
    for name in ("one", "two"):
        other.set_adapter(name)
        expected.append(other(x))
    with hydra_peft.adapter_ids(model, torch.tensor([-1, 0, 1])):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.stack([expected[i][i] for i in range(3)]))


def test_merged_disabled_and_named_adapters_are_pefts():
    model = make_model(adapters=("one", "two")).eval()
    stock = copy.deepcopy(model)
    hydra_peft.fuse(model)
    tokens = make_tokens()
    names = ["two", "__base__", "one"]
    torch.testing.assert_close(
        model(tokens, adapter_names=names).logits, stock(tokens, adapter_names=names).logits
    )
    model.merge_adapter()
    stock.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits)
    with pytest.raises(ValueError, match="merged"), hydra_peft.adapter_ids(model, 0):
        model(tokens)
    with model.disable_adapter(), stock.disable_adapter():
        off = model(tokens).logits
        torch.testing.assert_close(off, stock(tokens).logits)
        with hydra_peft.adapter_ids(model, 1):
            assert torch.equal(model(tokens).logits, off)


def test_scaling_is_read_at_each_call():
    model = make_model()
    hydra_peft.fuse(model)
    stock = copy.deepcopy(model)
    hydra_peft.unfuse(stock)
    tokens = make_tokens()
    for value in (0.25, torch.tensor(3.0)):
        for m in [*model.modules(), *stock.modules()]:
            if isinstance(m, lora.Linear):
                m.scaling["default"] = value
        torch.testing.assert_close(model(tokens).logits, stock(tokens).logits)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_over_a_bfloat16_base(autocast):
    stock = get_peft_model(make_base("llama").bfloat16(), make_config())
    randomize(stock)
    assert next(p for n, p in stock.named_parameters() if "lora_A" in n).dtype == torch.float32
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, gradients = run(fused, tokens)
        expected, expected_gradients = run(stock, tokens)
    assert logits.dtype == expected.dtype == torch.bfloat16
    # 8 bits of mantissa through two layers
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        difference = gradient - expected_gradients[name]
        assert difference.norm() < 0.1 * expected_gradients[name].norm()


def test_dtypes_that_pefts_layers_refuse_are_refused():
    stock = get_peft_model(make_base("llama").bfloat16(), make_config())
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    for model in (stock, fused):
        layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(3, layer.in_features))
        x = torch.randn(3, layer.in_features, dtype=torch.bfloat16)
        layer(x)
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        layer.base_layer.bias = nn.Parameter(torch.zeros(layer.out_features))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)


def test_a_word_embedding_tied_to_an_adapted_head():
    config = llama_config()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    stock = get_peft_model(
        LlamaForCausalLM(config), make_config(target_modules=["lm_head", "q_proj"])
    )
    base = stock.get_base_model()
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight
    randomize(stock)
    fused = copy.deepcopy(stock)
    assert len(hydra_peft.fuse(fused).taken) == 3
    assert_same_run(fused, stock, make_tokens())


def test_every_layer_of_a_tied_transposed_or_strided_weight():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    base[1].weight = nn.Parameter(torch.randn(6, 12)[:, ::2])
    stock = get_peft_model(base, make_config(target_modules=["0", "1"], task_type=None))
    randomize(stock)
    layer = stock.base_model.model[1]
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(6, 4).t())
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(4, 6).t())
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    for x in (torch.randn(6), torch.randn(0, 6), torch.randn(6, 5).t(), torch.randn(2, 0, 6)):
        torch.testing.assert_close(fused(x), stock(x))
