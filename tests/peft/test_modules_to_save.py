"""Modules that PEFT keeps a copy of for each adapter: under adapter ids each row runs its own."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import hydra_kernels.peft as hydra_peft
from tests.peft.models import (
    adapter_gradients,
    make_base,
    make_config,
    make_model,
    make_tokens,
    randomize,
)

NAMES = ("one", "two")


def make_classifier():
    """A classifier with a head for each adapter, all different, and its stock copy."""
    fused = make_model("classifier", NAMES).eval()
    for name, parameter in fused.named_parameters():
        if "score" in name:
            nn.init.normal_(parameter)
            parameter.requires_grad_("modules_to_save" in name)
    stock = copy.deepcopy(fused)
    hydra_peft.fuse(fused)
    return fused, stock


def by_pefts_adapters(stock, tokens):
    """The logits (3, B, 1) of all rows by each adapter, and, last, by none."""
    found = []
    for name in NAMES:
        stock.set_adapter(name)
        found.append(stock(tokens).logits)
    with stock.disable_adapter():
        found.append(stock(tokens).logits)
    return torch.stack(found)


@pytest.mark.parametrize("active", NAMES)
def test_each_row_has_the_head_of_its_adapter(active):
    fused, stock = make_classifier()
    tokens = make_tokens()
    expected = by_pefts_adapters(stock, tokens)
    fused.set_adapter(active)
    for i in (0, 1, -1):
        for ids in (i, torch.tensor(i), torch.full((3,), i)):
            with hydra_peft.adapter_ids(fused, ids):
                logits = fused(tokens).logits
            torch.testing.assert_close(logits, expected[i], rtol=1e-4, atol=1e-5)
    with hydra_peft.adapter_ids(fused, torch.tensor([1, -1, 0])):
        logits = fused(tokens).logits
    mixed = expected[torch.tensor([1, 2, 0]), torch.arange(3)]
    torch.testing.assert_close(logits, mixed, rtol=1e-4, atol=1e-5)
    plain = fused(tokens).logits
    torch.testing.assert_close(plain, expected[NAMES.index(active)], rtol=1e-4, atol=1e-5)
    with fused.disable_adapter(), hydra_peft.adapter_ids(fused, 1):
        logits = fused(tokens).logits
    torch.testing.assert_close(logits, expected[-1], rtol=1e-4, atol=1e-5)


def test_each_head_trains_on_its_own_rows():
    fused, _ = make_classifier()
    tokens = make_tokens(4)
    ids = torch.tensor([1, 0, -1, 1])

    def heads(rows):
        fused.zero_grad(set_to_none=True)
        with hydra_peft.adapter_ids(fused, ids[rows]):
            fused(tokens[rows]).logits.square().sum().backward()
        found = adapter_gradients(fused)
        return {name: found[f"base_model.model.score.modules_to_save.{name}.weight"]
                for name in NAMES}  # fmt: skip

    mixed = heads(torch.arange(4))
    alone = {"one": heads(ids == 0)["one"], "two": heads(ids == 1)["two"]}
    for name in NAMES:
        assert mixed[name].abs().max() > 0
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_without_a_copy_runs_the_module_itself():
    torch.manual_seed(0)
    config = make_config(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(make_base("llama"), config, adapter_name="one")
    model.add_adapter("two", make_config(target_modules=["q_proj"]))
    randomize(model)
    embedding = model.get_base_model().model.embed_tokens
    with torch.no_grad():
        embedding.modules_to_save["one"].weight.mul_(2)
    stock = copy.deepcopy(model)
    hydra_peft.fuse(model)
    tokens = make_tokens()
    expected = []
    for name in NAMES:
        stock.base_model.set_adapter(name)
        expected.append(stock(tokens).logits)
    assert not torch.allclose(expected[0], expected[1])
    for ids in (torch.tensor([0, 1, 1]), torch.tensor([0, 1, 1])[:, None].expand(tokens.shape)):
        with hydra_peft.adapter_ids(model, ids):
            logits = model(tokens).logits
        torch.testing.assert_close(logits[:1], expected[0][:1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1:], expected[1][1:], rtol=1e-4, atol=1e-5)
    with hydra_peft.adapter_ids(model, 1):
        torch.testing.assert_close(model(tokens).logits, expected[1], rtol=1e-4, atol=1e-5)


def test_new_ids_of_heads_do_not_recompile():
    fused, stock = make_classifier()
    tokens = make_tokens()
    expected = by_pefts_adapters(stock, tokens)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fused.get_base_model(), backend=backend, fullgraph=True)
    for i in (0, 1, -1):
        with hydra_peft.adapter_ids(fused, i), torch.no_grad():
            logits = compiled(tokens).logits
        torch.testing.assert_close(logits, expected[i], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.last = nn.Identity()

    def forward(self, x):
        return self.last(self.first(x))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Pooled(nn.Module):
    def forward(self, x):
        return x.sum(0)


@pytest.mark.parametrize(("last", "what"), [(Pair(), "tuple"), (Pooled(), r"\(6,\)")])
def test_refuses_what_has_no_rows_to_choose(last, what):
    base = TwoOutputs()
    base.last = last
    config = make_config(target_modules=["first"], modules_to_save=["last"], task_type=None)
    model = get_peft_model(base, config)
    hydra_peft.fuse(model)
    x = torch.randn(3, 6)
    with (
        pytest.raises(ValueError, match=f"no leading part of .* {what}"),
        hydra_peft.adapter_ids(model, torch.tensor([0, -1, 0])),
    ):
        model(x)
    with hydra_peft.adapter_ids(model, 0):
        model(x)


def test_copies_and_unfusing():
    fused, stock = make_classifier()
    tokens = make_tokens()
    keys = list(stock.state_dict())
    with hydra_peft.adapter_ids(fused, 1):
        expected = fused(tokens).logits
        copied = copy.deepcopy(fused)
        plain = copied(tokens).logits
        assert list(fused.state_dict()) == keys
    torch.testing.assert_close(plain, fused(tokens).logits)
    assert not torch.allclose(plain, expected)
    with hydra_peft.adapter_ids(copied, 1):
        torch.testing.assert_close(copied(tokens).logits, expected)
    score = fused.get_base_model().score
    assert type(score) is not ModulesToSaveWrapper
    with (
        pytest.raises(ValueError, match="exclude each other"),
        hydra_peft.adapter_ids(fused, 1),
    ):
        score(torch.randn(3, 16), adapter_names=["one", "one", "two"])
    hydra_peft.unfuse(fused)
    assert type(score) is ModulesToSaveWrapper
    assert "_current" not in vars(score)
