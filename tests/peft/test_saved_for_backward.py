"""What a fused layer keeps for its backward pass, beyond the bare layer, in all mixes of dtypes."""

import contextlib
import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hydra_kernels.peft as hydra_peft
from hydra_kernels.peft import siblings

M, K, R = 4096, 2048, 16
MIB = 2**20


class Results(TorchDispatchMode):
    """What any operator made, and whether it is still there: saved tensors, or held otherwise."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.storages[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        return result

    def bytes_alive(self, but):
        but = {t.untyped_storage().data_ptr() for t in but}
        alive = [n for p, (held, n) in self.storages.items() if held() is not None and p not in but]
        return sum(alive)


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
    results = Results()
    with mode, results:
        ys = model(x)
    return results.bytes_alive([x, *ys, *model.parameters()])


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
