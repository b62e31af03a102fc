"""Three LoRA adapters trained from one batch, each on its own rows, on a model of PEFT's.

python examples/many_adapters.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from tiny_model import pairs, tiny_model

import hydra_kernels.peft


def main(steps: int = 10) -> tuple[list[float], list[float]]:
    """Loss of each adapter before and after."""
    base, tokenizer = tiny_model()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(base, lora, adapter_name="a0")
    for name in ("a1", "a2"):
        model.add_adapter(name, lora)
    print(hydra_kernels.peft.fuse(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)  # of all adapters, from the start

    rows = pairs(12)
    texts = [rows[i]["prompt"] + rows[i]["chosen"] for i in range(12)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ids = torch.arange(12) % 3  # row i trains adapter i % 3

    def losses() -> torch.Tensor:
        with hydra_kernels.peft.adapter_ids(model, ids):
            logits = model(**batch).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )
        return torch.stack([each[ids == i].sum() / (labels[ids == i] >= 0).sum() for i in range(3)])

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = losses().tolist()
    for _ in range(steps):
        losses().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = losses().tolist()
    for i in range(3):
        print(f"adapter a{i}: loss {before[i]:.3f} -> {after[i]:.3f}")
    return before, after


if __name__ == "__main__":
    main()
