"""Layers that read the same input run as one group, where that is certain, and compute the same.

Past 500 lines: one block, and one count of the groups that ran, serve all the cases.
"""

import copy
import gc
import threading
import weakref
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import hydra_kernels.peft as hydra_peft
from hydra_kernels.peft import siblings
from tests.peft.models import (
    adapter_gradients,
    make_config,
    make_model,
    make_tokens,
    randomize,
)


@pytest.fixture
def groups(monkeypatch):
    """How many layers each group ran that was run, be its input as small as it may."""
    monkeypatch.setattr(siblings, "LEAST_NUMEL", 0)
    ran = []
    run = siblings.gated_linear_group

    def counted(x, weights, *args, **kwargs):
        ran.append(len(weights))
        return run(x, weights, *args, **kwargs)

    monkeypatch.setattr(siblings, "gated_linear_group", counted)
    return ran


class Block(nn.Module):
    """q, k and v of one input, with something between and after them that a test may set."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 8)
        self.k = nn.Linear(6, 4)
        self.v = nn.Linear(6, 5, bias=False)
        self.between = nn.Identity()
        self.end = nn.Identity()

    def forward(self, x):
        q = self.q(x).tanh()
        k = self.k(x)
        self.between(x)
        v = self.v(x)
        self.end(v)
        return torch.cat((q, k, v), -1)


def make_block(**kwargs):
    config = make_config(target_modules=["q", "k", "v"], task_type=None, **kwargs)
    block = inject_adapter_in_model(config, Block())
    randomize(block)
    return block


def run(model, x, *, grad=True):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = model(x)
    if not grad:
        return y, {}
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return y.detach(), {"x": x.grad, **adapter_gradients(model)}


def assert_same_run(model, other, x, **kwargs):
    (y, gradients), (expected, wanted) = run(model, x, **kwargs), run(other, x, **kwargs)
    torch.testing.assert_close(y, expected)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [2, 3] * 2),
        ("opt", [3] * 2),
        ("gpt2", []),  # one product makes all three
        ("classifier", [2, 3] * 2),
    ],
)
def test_which_layers_of_a_model_are_groups(name, expected, groups):
    model = make_model(name)
    stock = copy.deepcopy(model)
    hydra_peft.fuse(model)
    tokens = make_tokens()
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits)
    assert sorted(groups) == sorted(expected)
    with hydra_peft.adapter_ids(model, torch.tensor([0, -1, 0])):
        model(tokens)
    assert sorted(groups) == sorted(expected * 2)
    assert siblings._slot.put_by is None  # every output was taken


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0, 3)], ids=str)
def test_a_group_computes_what_pefts_layers_do(leading, grad, groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)
    assert_same_run(block, stock, torch.randn(*leading, 6), grad=grad)
    assert groups == ([3] if grad else [])


def test_a_small_input_is_not_worth_a_group(groups, monkeypatch):
    monkeypatch.undo()
    run_group = siblings.gated_linear_group
    monkeypatch.setattr(
        siblings,
        "gated_linear_group",
        lambda *a, **k: groups.append(a[0].numel()) or run_group(*a, **k),
    )
    block = make_block()
    hydra_peft.fuse(block)
    rows = -(-siblings.LEAST_NUMEL // 6)
    for each in (rows - 1, rows):
        block(torch.randn(each, 6))
    assert groups == [6 * rows]


def test_a_layer_without_an_adapter_between_two_others(groups):
    block = inject_adapter_in_model(make_config(target_modules=["q", "v"]), Block())
    randomize(block)
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)
    assert_same_run(block, stock, torch.randn(3, 6))
    assert groups == [2]


def scale_input(block, x):
    x.mul_(2)


def scale_weight(block, x):
    with torch.no_grad():
        block.v.lora_A["default"].weight.mul_(2)


def replace_weight(block, x):
    block.v.lora_B["default"].weight = nn.Parameter(torch.ones(5, 4))


def scale_base(block, x):
    block.v.base_layer.weight.data = block.v.base_layer.weight.data * 2


def set_scaling(block, x):
    block.v.scaling["default"] = 7.0


def disable(block, x):
    block.v.enable_adapters(False)


def merge(block, x):
    block.v.merge()


def add_hook(block, x):
    block.v.lora_A["default"].register_forward_hook(lambda module, args, y: y * 3)


def activate_none(block, x):
    block.v.set_adapter([])


def freeze(block, x):
    block.v.lora_B.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [scale_input, scale_weight, replace_weight, scale_base, set_scaling, disable, merge, add_hook,
     activate_none, freeze],
)  # fmt: skip
def test_a_change_between_siblings_is_seen(change, groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)
    for each in (block, stock):
        each.between.forward = lambda x, each=each: change(each, x.detach())
    x = torch.randn(3, 6)
    if change in (scale_input, scale_weight):
        torch.testing.assert_close(block(x.clone()), stock(x.clone()))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run(block, x)
        groups.pop()
    else:
        assert_same_run(block, stock, x)
    assert groups == [3]


@pytest.mark.parametrize("how", ["ids", "a tensor", "in place", "both", "no_grad", "autocast"])
def test_ids_and_modes_changed_between_siblings_are_seen(how, groups):
    config = make_config(target_modules=["q", "k", "v"], task_type=None)
    model = get_peft_model(Block(), config, adapter_name="one")
    model.add_adapter("two", config)
    randomize(model)
    hydra_peft.fuse(model)
    block = model.get_base_model()
    x = torch.randn(3, 6)
    ids = torch.zeros(3, dtype=torch.long)

    @contextmanager
    def in_place():
        ids.fill_(1)
        yield
        ids.zero_()

    @contextmanager
    def both():
        block.v.set_adapter(["one", "two"])
        yield

    change = {
        "ids": hydra_peft.adapter_ids(model, 1),
        "a tensor": hydra_peft.adapter_ids(model, torch.ones_like(ids)),
        "in place": in_place(),
        "both": both(),
        "no_grad": torch.no_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
    }[how]
    with hydra_peft.adapter_ids(model, None if how == "both" else ids):
        before = block.v(x)
        with change:
            after = block.v(x)
        if how == "both":
            block.v.set_adapter(["one"])
        if how in ("both", "in place"):  # a context that is entered once
            change = {"both": both, "in place": in_place}[how]()
        assert not torch.equal(before, after) or before.requires_grad != after.requires_grad
        seen = []
        block.between.forward = lambda x: change.__enter__()
        block.end.forward = lambda v: (seen.append(v), change.__exit__(None, None, None))
        model(x)
    assert groups == [3]
    assert torch.equal(seen[0], after)
    assert (seen[0].dtype, seen[0].requires_grad) == (after.dtype, after.requires_grad)


def sibling_hook(block):
    block.k.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def sibling_forward(block):
    forward = block.k.forward
    block.k.forward = lambda x: forward(x * 2)


def sibling_disabled(block):
    block.k.enable_adapters(False)


def sibling_merged(block):
    block.k.merge()


def sibling_in_float64(block):
    block.k.lora_A.double()
    block.k.lora_B.double()


def tensor_scaling(block):
    block.k.scaling["default"] = torch.tensor(0.5)


def sibling_inactive(block):
    block.k.set_adapter([])


@pytest.mark.parametrize(
    "change",
    [sibling_hook, sibling_forward, sibling_disabled, sibling_merged, sibling_in_float64,
     tensor_scaling, sibling_inactive],
)  # fmt: skip
def test_no_group_where_a_sibling_runs_otherwise(change, groups):
    block = make_block()
    hydra_peft.fuse(block)
    stock = copy.deepcopy(block)
    hydra_peft.unfuse(stock)
    change(block)
    change(stock)
    assert_same_run(block, stock, torch.randn(3, 6))
    assert groups == []


def test_no_group_under_dropout_whose_masks_differ_by_layer(groups):
    block = make_block(lora_dropout=0.5).train()
    hydra_peft.fuse(block)
    block(torch.randn(3, 6))
    assert groups == []
    block.eval()(torch.randn(3, 6))
    assert groups == [3]


def test_no_group_of_an_input_without_a_version(groups):
    block = make_block().requires_grad_(False)
    hydra_peft.fuse(block)
    with torch.inference_mode():
        x = torch.randn(3, 6)
    expected = block(x.clone())
    assert groups == [3]
    assert torch.equal(block(x), expected)
    assert groups == [3]


def test_gradients_by_functional_transforms(groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)
    x = torch.randn(3, 6)
    found = []
    for each in (block, stock):
        parameters = {n: p.detach() for n, p in each.named_parameters() if "lora_" in n}

        def loss(parameters, each=each):
            return torch.func.functional_call(each, parameters, (x,)).square().sum()

        found.append(torch.func.grad(loss)(parameters))
        found.append({"x": torch.func.vmap(each)(x)})
    assert groups == []
    torch.testing.assert_close(found.pop(1), found.pop())
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)


def test_no_group_where_ids_are_made_for_each_layer(groups):
    """The rows of flattened sequences: another tensor at every layer, which none would take."""
    config = make_config(target_modules=["q", "k", "v"], task_type=None)
    model = get_peft_model(Block(), config)
    randomize(model)
    hydra_peft.fuse(model)
    x = torch.randn(3, 4, 6)
    with hydra_peft.adapter_ids(model, torch.tensor([0, -1, 0])):
        expected = model(x)
        assert groups == [3]
        torch.testing.assert_close(model(x.view(12, 6)), expected.view(12, -1))
    assert groups == [3]


def test_what_was_left_is_dropped_before_more_is_made(groups, monkeypatch):
    block = make_block()
    hydra_peft.fuse(block)
    block.k.register_forward_pre_hook(lambda module, args: None)
    block(torch.randn(3, 6))
    assert groups == []
    block.k._forward_pre_hooks.clear()
    block.between.forward = lambda x: x.detach().add_(0)  # v's input has another version now
    block(torch.randn(3, 6))
    assert groups == [3] and siblings._slot.put_by is not None
    run_group = siblings.gated_linear_group
    monkeypatch.setattr(
        siblings,
        "gated_linear_group",
        lambda *a, **k: groups.append(siblings._slot.put_by) or run_group(*a, **k),
    )
    block(torch.randn(3, 6))
    assert groups == [3, None, 3]


def test_transposed_layers_are_in_no_group(groups):
    block = Block()
    block.q, block.k = Conv1D(8, 6), Conv1D(4, 6)
    block = inject_adapter_in_model(
        make_config(target_modules=["q", "k", "v"], fan_in_fan_out=True), block
    )
    randomize(block)
    stock = copy.deepcopy(block)
    assert len(hydra_peft.fuse(block).taken) == 3
    assert_same_run(block, stock, torch.randn(3, 6))
    assert groups == []


def test_no_group_where_its_first_layer_alone_has_dropout(groups):
    block = make_block().train()
    block.q.lora_dropout["default"] = nn.Dropout(1.0)
    hydra_peft.fuse(block)
    x = torch.randn(3, 6)
    torch.testing.assert_close(block(x)[:, :8], block.q.base_layer(x).tanh())
    assert groups == []


def test_a_layer_called_from_elsewhere_leads_no_group(groups):
    block = make_block()
    hydra_peft.fuse(block)
    x = torch.randn(3, 6)
    torch.testing.assert_close(block.q(x).tanh(), block(x)[:, :8])
    assert groups == [3]
    block.q(x)
    assert groups == [3]


def test_what_an_exception_left_is_dropped_by_the_next_group(groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)

    def fail(x):
        raise ZeroDivisionError

    block.between.forward = fail
    x = torch.randn(3, 6)
    with pytest.raises(ZeroDivisionError):
        block(x)
    left = siblings._slot.put_by
    held = weakref.ref(left.outputs[id(block.v)][0])
    del left, block.between.forward
    assert_same_run(block, stock, torch.randn(3, 6))
    assert held() is None
    assert siblings._slot.put_by is None


class CheckpointedBlock(nn.Module):
    def __init__(self, block, use_reentrant):
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_runs_the_same_groups(use_reentrant, groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)

    checkpointed = CheckpointedBlock(block, use_reentrant)
    x = torch.randn(3, 6)
    y, gradients = run(checkpointed, x)
    expected, wanted = run(stock, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients.pop("x"), wanted.pop("x"))
    assert gradients.keys() == {f"block.{name}" for name in wanted}
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[f"block.{name}"], gradient)
    assert groups == ([3] if use_reentrant else [3, 3])  # reentrant: the forward has no autograd


def test_outputs_may_be_changed_in_place(groups):
    block = make_block()
    stock = copy.deepcopy(block)
    hydra_peft.fuse(block)
    for each in (block, stock):
        each.q.register_forward_hook(lambda module, args, y: y.mul_(2))
        each.v.register_forward_hook(lambda module, args, y: y.add_(1))
    assert_same_run(block, stock, torch.randn(2, 3, 6))


def test_copies_have_groups_of_their_own(groups):
    block = make_block()
    hydra_peft.fuse(block)
    x = torch.randn(3, 6)
    copied = copy.deepcopy(block)
    torch.testing.assert_close(copied(x), block(x))
    assert groups == [3]  # the copy has none yet
    hydra_peft.fuse(copied)
    with torch.no_grad():
        block.v.lora_B["default"].weight.zero_()
    changed = copied(x)
    assert groups == [3, 3]
    assert not torch.equal(changed, block(x))
    hydra_peft.unfuse(copied)
    torch.testing.assert_close(copied(x), changed)
    assert groups == [3, 3, 3]


def test_ids_group_layers_that_were_created_fused(groups):
    with hydra_peft.fused_layers():
        model = make_model()
    tokens = make_tokens()
    plain = model(tokens).logits
    assert groups == []
    with hydra_peft.adapter_ids(model, 0):
        torch.testing.assert_close(model(tokens).logits, plain)
    assert sorted(groups) == [2, 2, 3, 3]


def test_groups_keep_no_deleted_model(groups):
    block = make_block()
    hydra_peft.fuse(block)
    block(torch.randn(3, 6))
    layer = weakref.ref(block.k)
    gc.disable()
    try:
        del block
        assert layer() is None
    finally:
        gc.enable()


def test_a_layer_of_two_parents_is_in_no_group(groups):
    block, other = Block(), Block()
    other.q = block.q
    both = inject_adapter_in_model(
        make_config(target_modules=["q", "k", "v"]), nn.Sequential(block, other)
    )
    both[1].q = both[0].q
    hydra_peft.fuse(both)
    both[0](torch.randn(3, 6))
    both[1](torch.randn(3, 6))
    assert groups == []


def test_threads_take_their_own_outputs(groups):
    block = make_block()
    hydra_peft.fuse(block)
    inputs = torch.randn(2, 4, 3, 6)
    expected = [[block(x) for x in each] for each in inputs]
    meet = threading.Barrier(2)
    block.between.forward = lambda x: meet.wait(timeout=60)
    wrong = []

    def work(i):
        for x, y in zip(inputs[i], expected[i], strict=True):
            if not torch.equal(block(x), y):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Forwards:
    """Each says in its name which calls, if any, are certain to read the same input."""

    def a_b__in_one_expression(self, x):
        return self.down(self.act(self.a(x)) * self.b(x))

    def a_b__between_other_statements(self, x):
        shape = x.shape
        y = self.a(x).view(shape)
        z, n = self.b(x), 2
        return y * z * n

    def none__other_variables(self, x, y):
        return self.a(x) + self.b(y)

    def none__assigned_between(self, x):
        y = self.a(x)
        x = x * 2
        return y + self.b(x)

    def none__a_branch_between(self, x):
        y = self.a(x)
        if y.sum() > 0:
            return y
        return y + self.b(x)

    def none__conditional(self, x):
        return self.a(x) + (self.b(x) if x.sum() > 0 else 0)

    def none__short_circuit(self, x):
        return self.a(x) + (x is None or self.b(x))

    def none__in_a_branch(self, x):
        if x.sum() > 0:
            y = self.a(x)
            z = self.b(x)
        return y + z

    def none__twice(self, x):
        y = self.a(x) + self.b(x)
        return y + self.a(x)

    def none__other_arguments(self, x):
        return self.a(x) + self.b(x, 2) + self.c(input=x)

    def none__of_other_objects(self, x, other):
        return self.a(x) + other.b(x)

    def none__later(self, x):
        return self.a(x), lambda: self.b(x)

    def none__walrus(self, x):
        return self.a(x), (x := x * 2), self.b(x)


@pytest.mark.parametrize("name", [name for name in vars(Forwards) if "__" in name[1:-2]])
def test_which_calls_are_certain_to_read_the_same(name):
    runs = siblings._called_alike(getattr(Forwards, name))
    names = name.split("__")[0]
    assert runs == ([] if names == "none" else [tuple(names.split("_"))])


def test_a_forward_without_source_has_no_groups():
    assert siblings._called_alike(eval("lambda self, x: self.a(x) + self.b(x)")) == []


def test_a_forward_that_was_replaced_later_leads_no_group(groups, monkeypatch):
    block = make_block()
    hydra_peft.fuse(block)
    monkeypatch.setattr(Block, "forward", lambda self, x: self.q(x))
    block(torch.randn(3, 6))
    assert groups == []
