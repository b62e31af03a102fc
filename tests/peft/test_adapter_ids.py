"""Which adapter runs on which row: in training, recomputed, compiled, and in other threads.

Past 500 lines: what every case needs, a fused model and PEFT's logits row by row, stands here once.
"""

import copy
import gc
import sys
import threading
import weakref
from functools import partial

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoHaConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

import hydra_kernels.peft as hydra_peft
from hydra_kernels.peft import adapter_ids
from tests.peft.models import (
    adapter_gradients,
    llama_config,
    make_config,
    make_model,
    make_tokens,
)

PEFT_VERSION = Version(peft.__version__)
NAMES = ("one", "two")


def make_fused(name="llama", **kwargs):
    model = make_model(name, NAMES, **kwargs)
    hydra_peft.fuse(model)
    return model


def upstream(logits):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(logits.shape, generator=generator)


def by_pefts_adapters(model, tokens, ids):
    """Logits with one call of PEFT for each row, the adapter of that row made active."""
    rows = []
    for row, i in zip(tokens, ids, strict=True):
        if i < 0:
            with model.disable_adapter():
                rows.append(model(row[None]).logits)
        else:
            model.base_model.set_adapter(NAMES[i])
            rows.append(model(row[None]).logits)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_()
    return torch.cat(rows)


def test_adapter_names_are_in_the_order_they_were_added():
    model = make_fused()
    assert hydra_peft.adapter_names(model) == ["one", "two"]
    with pytest.raises(ValueError, match="no adapters"):
        hydra_peft.adapter_names(nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("ids", [[0, 1, -1], [1, 1, 1], [-1, -1, -1]], ids=str)
def test_a_mixed_batch_equals_one_adapter_at_a_time(name, ids):
    model = make_fused(name)
    tokens = make_tokens()
    expected = by_pefts_adapters(model, tokens, ids)
    with adapter_ids(model, torch.tensor(ids)):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    if len(set(ids)) == 1:
        with adapter_ids(model, ids[0]):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_one_id_for_each_token(name):
    model = make_fused(name)
    tokens = make_tokens(2, 5)
    rows = torch.tensor([[0, 0, 1, 1, -1], [1, -1, -1, 0, 0]])
    same = torch.tensor([0, 1])
    with adapter_ids(model, same):
        expected = model(tokens).logits
    with adapter_ids(model, same[:, None].expand(2, 5)):
        torch.testing.assert_close(model(tokens).logits, expected)
    with adapter_ids(model, rows):
        mixed = model(tokens).logits
    torch.testing.assert_close(mixed[0, :2], expected[0, :2])
    assert not torch.allclose(mixed[0, 2:], expected[0, 2:])


def test_every_adapter_of_a_mixed_batch_trains():
    """A mixed batch's gradients are the sums of its rows'; PEFT's adapter_names raises here."""
    model = make_fused()
    tokens = make_tokens()
    ids = [0, 1, -1]
    with adapter_ids(model, torch.tensor(ids)):
        logits = model(tokens).logits
        logits.backward(upstream(logits))
    mixed = adapter_gradients(model)
    model.zero_grad(set_to_none=True)
    expected = by_pefts_adapters(model, tokens, ids)
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
    # PEFT switches requires_grad between the rows, so that each is differentiated on its own
    for i, name in enumerate(NAMES):
        model.base_model.set_adapter(name)
        row = model(tokens[i : i + 1]).logits
        row.backward(upstream(expected)[i : i + 1])
        for parameter, gradient in adapter_gradients(model).items():
            if f".{name}." in parameter:
                torch.testing.assert_close(mixed[parameter], gradient, rtol=1e-4, atol=1e-5)
    assert any(".one." in n for n in mixed) and any(".two." in n for n in mixed)


def test_roles_touch_nothing_of_the_model():
    model = make_fused()
    frozen = next(p for n, p in model.named_parameters() if "lora_" in n)
    frozen.requires_grad_(False)
    before = [(p.requires_grad, p._version) for p in model.parameters()], model.active_adapters
    tokens = make_tokens()
    for ids in (1, -1, torch.tensor([0, 1, -1]), None, 0):
        with adapter_ids(model, ids):
            model(tokens)
    assert before == ([(p.requires_grad, p._version) for p in model.parameters()],
                      model.active_adapters)  # fmt: skip


def calls_to_switch(layers, ids):
    """Python and C calls that entering and leaving a role makes, whatever the machine is doing."""
    config = llama_config()
    config.num_hidden_layers = layers
    model = get_peft_model(LlamaForCausalLM(config), make_config(), adapter_name="one")
    model.add_adapter("two", make_config())
    hydra_peft.fuse(model)
    model.gradient_checkpointing_enable()
    calls = 0

    def count(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    def switch():
        with adapter_ids(model, ids):
            pass

    switch()  # the first looks at every module
    sys.setprofile(count)
    try:
        switch()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("ids", [1, -1, torch.tensor([0, 1, -1])], ids=str)
def test_switching_costs_one_call_a_block_and_looks_at_no_layer(ids):
    """PEFT's disable_adapter makes some hundred calls for each of a block's seven layers."""
    few, many = (calls_to_switch(layers, ids) for layers in (1, 4))
    assert few < 50
    assert many - few <= 3  # whether its checkpointing is wrapped yet


def test_contexts_nest_and_end_by_an_exception():
    model = make_fused()
    tokens = make_tokens()
    plain = model(tokens).logits
    with adapter_ids(model, 1):
        second = model(tokens).logits
        with adapter_ids(model, None):
            assert torch.equal(model(tokens).logits, plain)
        with pytest.raises(ZeroDivisionError), adapter_ids(model, -1):
            raise ZeroDivisionError
        assert torch.equal(model(tokens).logits, second)
    assert torch.equal(model(tokens).logits, plain)
    role = adapter_ids(model, 1)
    with role, role:
        assert torch.equal(model(tokens).logits, second)
    assert torch.equal(model(tokens).logits, plain)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (2, "between -1 and 1, got 2"),
        (-2, "got -2"),
        (torch.tensor([0.0]), "integers"),
        (torch.tensor([True]), "integers"),
        (torch.tensor([0, 2]), "adapter_ids"),
    ],
    ids=str,
)
def test_refusals_at_entry(ids, message):
    with pytest.raises(ValueError, match=message):
        adapter_ids(make_fused(), ids)


class Wrapper(nn.Module):
    """As DistributedDataParallel: has the model, and nothing of PEFT's."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_wrapper_of_the_model_knows_what_became_of_it():
    model, tokens = make_fused(), make_tokens()
    wrapper = Wrapper(model)
    with adapter_ids(wrapper, 1):
        second = model(tokens).logits
    model.delete_adapter("one")
    with adapter_ids(wrapper, 0):
        assert torch.equal(model(tokens).logits, second)
    hydra_peft.unfuse(model)
    with pytest.raises(ValueError, match="PEFT's own code"):
        adapter_ids(wrapper, 0)
    hydra_peft.fuse(model)
    with adapter_ids(wrapper, -1):
        assert not torch.equal(model(tokens).logits, second)


def test_an_adapter_replaced_by_one_of_its_name_is_seen():
    model = make_fused(target_modules=["q_proj"])
    with adapter_ids(model, 1):
        pass
    model.delete_adapter("two")
    model.add_adapter("two", make_config(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"PEFT's own code.*o_proj"):
        adapter_ids(model, 1)


def test_names_stand_for_ids():
    model = make_fused()
    tokens = make_tokens()
    for names, ids in (
        ("two", 1),
        ("__base__", -1),
        (["two", "__base__", "one"], torch.tensor([1, -1, 0])),
        ((0, "two", -1), torch.tensor([0, 1, -1])),
    ):
        with adapter_ids(model, ids):
            expected = model(tokens).logits
        with adapter_ids(model, names):
            assert torch.equal(model(tokens).logits, expected)
    for names in ("three", ["one", "three", "one"]):
        with pytest.raises(ValueError, match=r"no adapter is called 'three' \(adapters: one, two"):
            adapter_ids(model, names)
    for wrong in (0.5, [None, 0, 1], [0.5, 0, 1]):
        with pytest.raises(TypeError, match="integer"):
            adapter_ids(model, wrong)
    layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
    with adapter_ids(model, []):
        assert layer(torch.randn(0, 4, layer.in_features)).shape[0] == 0


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"trainable_token_indices": [1, 2]}, r"embed_tokens \(TrainableTokensWrapper"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"embed_tokens \(Embedding"),
        ({"target_parameters": ["layers.0.mlp.down_proj.weight"]}, r"down_proj \(ParamWrapper"),
    ],
    ids=str,
)
def test_refuses_what_would_run_the_active_adapter_whatever_the_ids(config, what):
    model = make_model("llama", NAMES[:1], **{"target_modules": ["q_proj"], **config})
    hydra_peft.fuse(model)
    with pytest.raises(ValueError, match=what):
        adapter_ids(model, 0)


def test_refuses_another_method_beside_lora():
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config())
    model = get_peft_model(base, make_config(target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["v_proj"], r=2))
    hydra_peft.fuse(model)
    with pytest.raises(ValueError, match="v_proj"):
        adapter_ids(model, 0)


@pytest.mark.skipif(PEFT_VERSION < Version("0.19"), reason="PEFT before 0.19 has no BD-LoRA")
def test_variants_that_change_their_input_in_place():
    """BD-LoRA adds to what it is given: other rows' must stay."""
    blocks = peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=[], nblocks=2)
    model = make_fused(target_modules=["q_proj"], use_bdlora=blocks, r=4)
    model.eval()
    stock = copy.deepcopy(model)
    hydra_peft.unfuse(stock)
    tokens = make_tokens()
    ids = [0, -1, 1]
    with adapter_ids(model, torch.tensor(ids)):
        mixed = model(tokens).logits
    expected = by_pefts_adapters(stock, tokens, ids)
    assert not torch.allclose(expected[0], expected[1])
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    PEFT_VERSION < Version("0.19"), reason="PEFT before 0.19 has no aLoRA as a second adapter"
)
def test_an_alora_is_refused_by_name_and_the_others_are_not():
    model = make_model("llama", NAMES[:1])
    model.add_adapter("two", make_config(alora_invocation_tokens=[3, 4]))
    hydra_peft.fuse(model)
    tokens = make_tokens()
    for ids in (0, -1):
        with adapter_ids(model, ids):
            model(tokens)
    for ids in (1, torch.tensor([0, 1, -1])):
        with pytest.raises(ValueError, match="two is an aLoRA"), adapter_ids(model, ids):
            model(tokens)


def test_ids_keep_no_deleted_model():
    model = make_fused()
    model.gradient_checkpointing_enable()
    with adapter_ids(model, torch.tensor([0, 1, -1])):
        model(make_tokens())
    layer = weakref.ref(next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear)))
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_a_model_that_moved_has_its_ids_there():
    model = make_fused()
    with adapter_ids(model, 1):
        pass
    with adapter_ids(model.to("meta"), 1):
        layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
        assert layer._current.now.ids.device.type == "meta"
    assert adapter_ids(model, ["one"])._ids.device.type == "meta"


def test_ids_are_brought_to_a_layer_on_another_device():
    model = make_fused(target_modules=["up_proj"]).to("meta")
    layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
    x = torch.randn(3, 2, layer.in_features, device="meta")
    for ids in (None, 1, torch.tensor([0, 1, -1])):
        with adapter_ids(model, ids):
            y = layer(x)
        assert y.shape == (3, 2, layer.out_features)
        assert y.device.type == "meta"


def test_rows_that_are_not_those_of_the_sequences_are_refused():
    """As those that a router sends to an expert: as many as three sequences could have."""
    model = make_fused(target_modules=["up_proj"])
    layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
    with adapter_ids(model, torch.tensor([0, 1, -1])):
        y = layer(torch.randn(3, 4, layer.in_features))
        layer(y.new_zeros(12, layer.in_features))
        for rows in (4, 6, 24):
            with pytest.raises(ValueError, match=r"\(3,\) is no leading part of .*beams"):
                layer(y.new_zeros(rows, layer.in_features))
    nothing = torch.zeros(0, dtype=torch.long)
    with adapter_ids(model, nothing):
        assert layer(torch.randn(0, 4, layer.in_features)).shape == (0, 4, layer.out_features)
        layer(torch.randn(0, layer.in_features))
    with pytest.raises(ValueError, match="no leading part"), adapter_ids(model, nothing):
        layer._current.now.tokens = 4
        layer(torch.randn(4, layer.in_features))


def test_replicas_of_dataparallel_are_refused_ids():
    model = make_fused()
    layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
    x = torch.randn(2, layer.in_features)
    expected = layer(x)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"), adapter_ids(model, 1):
        layer._replicate_for_data_parallel()
    # As torch's replicate does: parameters become attributes.
    modules = {
        name: module._replicate_for_data_parallel() for name, module in layer.named_modules()
    }
    replica = modules[""]
    for name, module in layer.named_modules():
        for key in module._modules:
            modules[name]._modules[key] = modules[f"{name}.{key}".lstrip(".")]
        for key, parameter in module._parameters.items():
            if parameter is None:
                modules[name]._parameters[key] = None
            else:
                setattr(modules[name], key, parameter.detach().clone())
    torch.testing.assert_close(replica(x), expected)


@pytest.mark.parametrize("ids", [[0, 2, 1], [0, 1]], ids=str)
def test_refusals_in_the_forward(ids):
    model = make_fused()
    with pytest.raises(ValueError, match="adapter_ids"), adapter_ids(model, torch.tensor(ids)):
        model(make_tokens())


def test_adapter_names_and_ids_exclude_each_other():
    model = make_fused()
    layer = next(m for m in model.modules() if isinstance(m, hydra_peft.FusedLinear))
    x = torch.randn(2, layer.in_features)
    with adapter_ids(model, 1):
        torch.testing.assert_close(layer(x, adapter_names=None), layer(x))
        with pytest.raises(ValueError, match="exclude each other"):
            layer(x, adapter_names=["one", "two"])


def test_adapters_added_later_have_ids():
    model = make_fused()
    with adapter_ids(model, 1):
        model(make_tokens())
    model.add_adapter("three", model.peft_config["one"])
    tokens = make_tokens()
    with adapter_ids(model, 2):
        fresh = model(tokens).logits  # its B is zero
    with adapter_ids(model, -1):
        torch.testing.assert_close(model(tokens).logits, fresh)
    model.delete_adapter("one")
    with adapter_ids(model, 0):
        second = model(tokens).logits
    model.base_model.set_adapter("two")
    torch.testing.assert_close(second, model(tokens).logits)


def test_a_layer_that_was_put_in_later_has_ids_after_fuse():
    model = make_fused()
    tokens = make_tokens()
    stock = copy.deepcopy(model)
    hydra_peft.unfuse(stock)
    with adapter_ids(model, 1):
        expected = model(tokens).logits
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj = stock.get_base_model().model.layers[0].self_attn.q_proj
    hydra_peft.fuse(model)
    with adapter_ids(model, 1):
        torch.testing.assert_close(model(tokens).logits, expected)


def test_an_adapter_that_a_layer_lacks_leaves_the_layer_alone():
    model = make_model("llama", ("one",), target_modules=["q_proj"])
    hydra_peft.fuse(model)
    other = model.peft_config["one"].__class__(
        r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model.add_adapter("two", other)
    with pytest.raises(ValueError, match="down_proj"):
        adapter_ids(model, 0)  # PEFT made new layers of its own
    hydra_peft.fuse(model)
    tokens = make_tokens()
    with adapter_ids(model, 0):
        first = model(tokens).logits
    torch.testing.assert_close(first, model(tokens).logits)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    ids = [0, 1, -1]
    expected = by_pefts_adapters(model, tokens, ids)
    with adapter_ids(model, torch.tensor(ids)):
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_threads_do_not_see_each_others_ids():
    model = make_fused()
    tokens = make_tokens()
    expected = {}
    for i in (-1, 0, 1):
        with adapter_ids(model, i):
            expected[i] = model(tokens).logits
    meet = threading.Barrier(3)
    wrong = []

    def work(i):
        with adapter_ids(model, i):
            for _ in range(5):
                meet.wait(timeout=60)
                if not torch.equal(model(tokens).logits, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (-1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def roles_then_one_backward(model, tokens):
    """Two roles and a mixed batch forward, then one backward for all of them, outside."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for ids in (0, 1, torch.tensor([1, -1, 0])):
        with adapter_ids(model, ids):
            logits = model(tokens).logits
        total = total + (logits * upstream(logits)).sum()
    with adapter_ids(model, -1):  # what a gate that is read at recomputation would see
        total.backward()
    return adapter_gradients(model)


def assert_same_gradients(actual, expected):
    assert actual.keys() == expected.keys() != set()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputation_sees_the_ids_of_its_own_forward(use_reentrant, when, name):
    model = make_model(name, NAMES, lora_dropout=0.2)
    tokens = make_tokens()
    if when == "after":
        hydra_peft.fuse(model)
    for module in model.modules():  # dropout would need the same generator in both runs
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if when == "before":
        hydra_peft.fuse(model)
    expected = roles_then_one_backward(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(roles_then_one_backward(model, tokens), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_draws_the_same_dropout(use_reentrant):
    model = make_fused(lora_dropout=0.3)
    tokens = make_tokens()
    torch.manual_seed(3)
    with adapter_ids(model, 1):
        logits = model(tokens).logits
        logits.backward(upstream(logits))
    expected = adapter_gradients(model)
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    with adapter_ids(model, 1):
        logits = model(tokens).logits
    logits.backward(upstream(logits))
    assert_same_gradients(adapter_gradients(model), expected)


class Block(nn.Module):
    """A model that checkpoints by hand, with the function it is given."""

    def __init__(self, model, run):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, tokens):
        decoder = self.model.get_base_model().model
        x = decoder.embed_tokens(tokens).requires_grad_()
        return self.run(decoder.layers[0].mlp, x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_hand(use_reentrant):
    model = make_fused()
    tokens = make_tokens()

    def gradients(run):
        model.zero_grad(set_to_none=True)
        block = Block(model, run)
        with adapter_ids(model, 1):
            out = block(tokens)
        with adapter_ids(model, 0):
            out.backward(upstream(out))
        return adapter_gradients(model)

    expected = gradients(lambda f, x: f(x))
    kept = partial(hydra_peft.checkpoint, model, use_reentrant=use_reentrant)
    assert_same_gradients(gradients(kept), expected)
    with pytest.raises(RuntimeError, match="keep_adapter_ids"):
        gradients(partial(checkpoint, use_reentrant=use_reentrant))
    assert_same_gradients(gradients(kept), expected)  # and the refusal left nothing behind


def test_new_ids_do_not_recompile():
    model = make_fused().eval()
    tokens = make_tokens()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend=backend, fullgraph=True)

    def check(ids):
        with adapter_ids(model, ids), torch.no_grad():
            torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)

    check(0)
    assert len(graphs) == 1
    for ids in (1, -1, 0):
        check(ids)
    assert len(graphs) == 1
    check(torch.tensor([0, 1, -1]))
    assert len(graphs) == 2  # another shape of ids
    for ids in ([1, 1, 1], [-1, -1, -1], [-1, 0, 1]):
        check(torch.tensor(ids))
    assert len(graphs) == 2


def test_ids_first_used_in_inference_mode_train():
    """An int's tensor is kept for the next time, when autograd may have to save it."""
    model = make_fused()
    tokens = make_tokens()
    with torch.inference_mode(), adapter_ids(model, 1):
        model(tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")
    with adapter_ids(model, 1):
        compiled(tokens).logits.square().mean().backward()
    # Compiled, the id is data, and adapters that no row used get zeros where eager has none.
    found = {name: g for name, g in adapter_gradients(model).items() if g.any()}
    with adapter_ids(model, 1):
        model.zero_grad()
        model(tokens).logits.square().mean().backward()
    assert_same_gradients(found, adapter_gradients(model))
