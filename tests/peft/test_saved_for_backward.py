"""What a fused layer keeps for its backward pass, beyond the bare layer, in all mixes of dtypes."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._pytree import tree_leaves

import hydra_kernels.peft as hydra_peft
from hydra_kernels.peft import siblings

M, K, R = 4096, 2048, 16
MIB = 2**20


def held(node, seen):
    """Tensors that a graph's nodes hold besides what autograd saves, as attributes of a ctx."""
    if node is None or node in seen:
        return []
    seen.add(node)
    found = [
        t
        for t in tree_leaves(list(getattr(node, "__dict__", {}).values()))
        if isinstance(t, torch.Tensor)
    ]
    for parent, _ in node.next_functions:
        found += held(parent, seen)
    return found


class Three(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, dtype=dtype) for n in (48, 16, 32))
        self.requires_grad_(False)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x)


def saved(model, x, autocast):
    mode = contextlib.nullcontext()
    if autocast:
        mode = torch.autocast("cpu", getattr(torch, autocast))
    kept = []
    with mode, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = model(x)
    seen = set()
    kept += [t for y in ys for t in held(y.grad_fn, seen)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    given = {t.untyped_storage().data_ptr() for t in (x, *ys, *model.parameters())}
    return sum(n for pointer, n in storages.items() if pointer not in given)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("base", "adapter", "autocast"),
    [
        ("float32", "float32", ""),
        ("bfloat16", "bfloat16", ""),
        ("bfloat16", "float32", ""),
        ("float32", "bfloat16", ""),
        ("float16", "float32", ""),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "float32", "bfloat16"),
        ("float32", "float32", "float16"),
    ],
)
def test_saves_at_most_a_fifth_of_a_mebibyte(base, adapter, autocast, dropout, monkeypatch):
    torch.manual_seed(0)
    ran = []
    group = siblings.gated_linear_group
    monkeypatch.setattr(
        siblings, "gated_linear_group", lambda *a, **k: ran.append(1) or group(*a, **k)
    )
    bare = Three(getattr(torch, base))
    x = torch.randn(M, K, dtype=getattr(torch, base), requires_grad=True)
    config = LoraConfig(r=R, target_modules=["q", "k", "v"], lora_dropout=dropout)
    stock = get_peft_model(copy.deepcopy(bare), config).train()
    for name, module in stock.named_modules():
        if name.endswith(("lora_A", "lora_B")):
            module.to(getattr(torch, adapter))
    fused = copy.deepcopy(stock)
    hydra_peft.fuse(fused)
    allowed = saved(bare, x, autocast) + 3 * 0.2 * MIB
    assert saved(fused, x, autocast) <= allowed
    assert len(ran) == (dropout == 0.0)  # as a group, and each layer alone
    if dropout > 0.0 or base != adapter or autocast not in ("", base):
        assert saved(stock, x, autocast) > allowed + x.numel()  # or this test sees nothing
