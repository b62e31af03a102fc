"""Programs around a PEFT model, unchanged: trainers, preparations, compilers, other processes."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

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


class Tokens(Dataset):
    def __init__(self):
        self.rows = torch.randint(1, 31, (8, 6), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def train(model, folder, **kwargs):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        logging_steps=1,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **kwargs,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", True), ("gpt2", False)])
def test_transformers_trainer(name, checkpointing, tmp_path):
    stock = make_model(name)
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    kwargs = {"gradient_checkpointing": checkpointing}
    expected = train(stock, tmp_path / "stock", **kwargs)
    assert train(fused, tmp_path / "fused", **kwargs) == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3  # it learns
    torch.manual_seed(0)
    base = make_base(name)
    base.load_state_dict(copy.deepcopy(stock).unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path / "fused" / "checkpoint-3").eval()
    tokens = make_tokens()
    torch.testing.assert_close(
        loaded(tokens).logits, stock.eval()(tokens).logits, rtol=1e-3, atol=1e-4
    )


def test_accelerate():
    model = make_model()
    hydra_peft.fuse(model)
    tokens = make_tokens()
    before = model(tokens).logits.detach()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(tokens, labels=tokens).loss)
    optimizer.step()
    whole = accelerator.unwrap_model(prepared)
    assert whole is model
    assert not torch.allclose(whole(tokens).logits, before)
    state = accelerator.get_state_dict(prepared)
    assert list(state) == list(model.state_dict())


def test_training_prepared_for_a_quantised_base():
    stock = get_peft_model(prepare_model_for_kbit_training(make_base("llama")), make_config())
    randomize(stock)
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    tokens = make_tokens()
    gradients = []
    for model in (stock, fused):
        model.train()(tokens, labels=tokens).loss.backward()
        gradients.append(adapter_gradients(model))
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_adapter_is_loaded_onto_a_model_that_is_or_becomes_fused(low_memory, tmp_path):
    stock = make_model().eval()
    stock.save_pretrained(tmp_path)
    tokens = make_tokens()
    expected = stock(tokens).logits
    torch.manual_seed(0)
    base = make_base("llama")
    with hydra_peft.fused_layers() as report:
        fused = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_memory)
    assert len(report.taken) == 14 and report.waiting == {}
    torch.testing.assert_close(fused(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # another adapter than the loaded one
        for name, parameter in fused.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    again = PeftModel.from_pretrained(fused.get_base_model(), tmp_path, adapter_name="again")
    again.set_adapter("again")
    layers = [m for m in again.modules() if isinstance(m, lora.Linear)]
    assert {type(layer) for layer in layers} == {hydra_peft.FusedLinear}
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)


IN_ANOTHER_PROCESS = """
import sys, torch
model, tokens, expected = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(tokens).logits, expected["one"])
from hydra_kernels.peft import adapter_ids, unfuse
with adapter_ids(model, "two"):
    torch.testing.assert_close(model(tokens).logits, expected["two"])
unfuse(model)
torch.testing.assert_close(model(tokens).logits, expected["one"])
kinds = {type(m).__module__ for m in model.modules()}
assert not any("hydra" in kind for kind in kinds), kinds
torch.save(model, sys.argv[2])
assert b"hydra" not in open(sys.argv[2], "rb").read()
"""


def test_a_saved_model_is_loaded_in_a_process_that_knows_nothing_of_it(tmp_path):
    with hydra_peft.fused_layers():
        model = make_model("classifier", NAMES).eval()
    tokens = make_tokens()
    expected = {"one": model(tokens).logits}
    with hydra_peft.adapter_ids(model, "two"):
        expected["two"] = model(tokens).logits
        torch.save((model, tokens, expected), tmp_path / "fused.pt")
    program = [sys.executable, "-c", IN_ANOTHER_PROCESS]
    program += [str(tmp_path / "fused.pt"), str(tmp_path / "stock.pt")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_copy_trains_on_its_own():
    model = make_model("llama", NAMES)
    hydra_peft.fuse(model)
    tokens = make_tokens()
    with hydra_peft.adapter_ids(model, 0):
        model(tokens)
    copied = copy.deepcopy(model)
    before = {name: p.clone() for name, p in copied.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    with hydra_peft.adapter_ids(model, torch.tensor([0, 1, -1])):
        model(tokens).logits.square().sum().backward()
    optimizer.step()
    assert adapter_gradients(copied) == {}
    assert all(torch.equal(p, before[name]) for name, p in copied.named_parameters())
    with hydra_peft.adapter_ids(copied, torch.tensor([0, 1, -1])):
        copied(tokens).logits.square().sum().backward()
    first, second = adapter_gradients(model), adapter_gradients(copied)
    assert first.keys() == second.keys() != set()
    for name, gradient in second.items():
        torch.testing.assert_close(gradient, first[name])


def test_threads_train_one_model_with_adapters_of_their_own():
    model = make_model("llama", NAMES)
    hydra_peft.fuse(model)
    tokens = make_tokens()

    def gradients(i):
        with hydra_peft.adapter_ids(model, i):
            wanted = [p for n, p in model.named_parameters() if f".{NAMES[i]}." in n]
            loss = model(tokens).logits.square().sum()
            return torch.autograd.grad(loss, wanted)

    expected = [gradients(i) for i in (0, 1)]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: gradients(i)})) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        for gradient, other in zip(found[i], expected[i], strict=True):
            torch.testing.assert_close(gradient, other)


def test_compiled_training_has_one_graph_for_all_ids():
    model = make_model("llama", NAMES, lora_dropout=0.0)
    hydra_peft.fuse(model)
    tokens = make_tokens()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def gradients(run, ids):
        model.zero_grad(set_to_none=True)
        with hydra_peft.adapter_ids(model, ids):
            run(input_ids=tokens).logits.square().sum().backward()
        return {n: g for n, g in adapter_gradients(model).items() if g.any()}

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for ids in ([0, 1, -1], [1, 1, 1], [-1, -1, 0]):
        expected = gradients(model, torch.tensor(ids))
        found = gradients(compiled, torch.tensor(ids))
        assert found.keys() == expected.keys() != set()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
