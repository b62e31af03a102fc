"""What fuse, register and fused_layers say of a model: what runs faster, what does not, and why."""

import copy
import logging
import pickle

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from torch import nn

import hydra_kernels.peft as hydra_peft
from tests.peft.models import make_base, make_config, make_model, make_tokens


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, lora.Linear)]


def of_each(change):
    def apply(model):
        for layer in layers_of(model):
            change(layer)

    return apply


def a_double_b(layer):
    layer.lora_B["default"].double()


def two_active(model):
    model.add_adapter("two", make_config(lora_dropout=0.5))
    model.base_model.set_adapter(["default", "two"])


def two_dtypes(model):
    model.add_adapter("two", make_config())
    for layer in layers_of(model):
        layer.lora_A["two"].double()
        layer.lora_B["two"].double()
    model.base_model.set_adapter(["default", "two"])


WAITING = {  # change of a model: what its report says
    "dora": ({"use_dora": True}, None, "a variant of LoRA, DoraLinearVariant"),
    "bias": ({"lora_bias": True, "target_modules": ["fc1"]}, None, "a bias"),
    "disabled": ({}, lambda model: model.base_model.disable_adapter_layers(), "disabled"),
    "merged": ({}, lambda model: model.merge_adapter(), "merged"),
    "inactive": ({}, of_each(lambda layer: layer.set_adapter([])), "none of its adapters is"),
    "base class": (
        {},
        of_each(lambda layer: layer.base_layer.__setattr__("__class__", Other)),
        "its base layer is .*Other",
    ),
    "base hook": (
        {},
        of_each(lambda layer: layer.base_layer.register_forward_hook(lambda *_: None)),
        "its base layer has hooks",
    ),
    "hook": (
        {},
        of_each(lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None)),
        "adapter default has hooks",
    ),
    "class": (
        {},
        of_each(lambda layer: layer.lora_A["default"].__setattr__("__class__", Other)),
        "lora_A of class .*Other",
    ),
    "dropout class": (
        {},
        of_each(lambda layer: layer.lora_dropout.update({"default": nn.Tanh()})),
        "dropout of class .*Tanh",
    ),
    "dtypes": ({}, of_each(a_double_b), "lora_A in torch.float32 and a lora_B in torch.float64"),
    "scaling": (
        {},
        of_each(
            lambda layer: layer.scaling.update({"default": torch.ones((), requires_grad=True)})
        ),
        "a scaling that is",
    ),
    "two with dropout": ({}, two_active, "several active adapters have dropout"),
    "two dtypes": ({}, two_dtypes, "differ in dtype"),
}


class Other(nn.Linear):
    pass


@pytest.mark.parametrize("case", WAITING)
def test_says_which_layers_run_pefts_forward_still_and_only_those(case, monkeypatch):
    config, change, message = WAITING[case]
    fast = []
    run = hydra_peft.FusedLinear._fast_forward
    monkeypatch.setattr(
        hydra_peft.FusedLinear,
        "_fast_forward",
        lambda self, *args: fast.append(self) or run(self, *args),
    )
    model = make_model("opt", **config)
    report = hydra_peft.fuse(model)
    if change is not None:
        assert report.waiting == {}
        model(make_tokens())
        assert len(fast) == len(report.taken)
        fast.clear()
        change(model)
    assert report.waiting.keys() == set(report.taken) != set()
    layer = layers_of(model)[0]
    assert message.split(".*")[0] in str(report)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Linear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], len(self.weight))
        )
        layer(torch.randn(2, layer.in_features))
    assert fast == []


def test_one_line_for_each_reason_and_one_for_the_count():
    model = make_model("opt", use_dora=True, target_modules=["q_proj", "k_proj", "embed_tokens"])
    report = hydra_peft.fuse(model)
    lines = str(report).splitlines()
    assert lines[0] == "4 LoRA layers fused, 1 left to PEFT"
    prefix = "base_model.model.model.decoder."
    assert lines[1:] == [
        f"  left: {prefix}embed_tokens: its class is peft.tuners.lora.layer.Embedding",
        f"  fused, but PEFT's forward runs: {report.taken[0]} and 3 more: "
        "adapter default is a variant of LoRA, DoraLinearVariant",
    ]


def logged(caplog):
    found = [(r.levelno, r.getMessage()) for r in caplog.records if r.name == "hydra_kernels"]
    caplog.clear()
    return found


def test_warns_where_nothing_runs_faster_and_only_there(caplog):
    caplog.set_level(logging.INFO, "hydra_kernels")
    hydra_peft.fuse(make_model("llama"))
    assert logged(caplog) == [(logging.INFO, "14 LoRA layers fused, 0 left to PEFT")]
    hydra_peft.fuse(make_base("llama"))
    [(level, message)] = logged(caplog)
    assert level == logging.WARNING
    assert message == "no LoRA layer of PEFT in LlamaForCausalLM: call fuse after get_peft_model"
    for config in ({"use_dora": True}, {"target_modules": ["embed_tokens"]}):
        report = hydra_peft.fuse(make_model("llama", **config))
        assert logged(caplog) == [(logging.WARNING, str(report))]
    with hydra_peft.fused_layers():
        pass
    [(level, message)] = logged(caplog)
    assert level == logging.WARNING and "within fused_layers" in message
    with pytest.raises(ValueError, match="got str"):
        hydra_peft.fuse("model")


def test_a_copied_config_fills_the_report_that_register_gave():
    config = make_config()
    report = hydra_peft.register(config)
    model = get_peft_model(make_base("llama"), copy.deepcopy(config))
    assert len(report.taken) == len(layers_of(model)) == 14
    assert report.waiting == {}
    # A model is saved with its configs.
    factory = pickle.loads(pickle.dumps(config))._custom_modules[nn.Linear]
    assert factory.report.taken == []
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_report_keeps_no_layer():
    report = hydra_peft.fuse(make_model("llama", use_dora=True))
    assert len(report.taken) == 14
    assert report.waiting == {}


def test_pefts_own_layers_are_made_again_after_the_context():
    create = lora.LoraModel._create_new_module
    with pytest.raises(ZeroDivisionError), hydra_peft.fused_layers() as outer:
        with hydra_peft.fused_layers() as inner:
            make_model("llama")
        raise ZeroDivisionError
    assert len(inner.taken) == len(outer.taken) == 14
    assert inner.left == outer.left == {}
    assert lora.LoraModel._create_new_module is create
    assert {type(layer) for layer in layers_of(make_model("llama"))} == {lora.Linear}
