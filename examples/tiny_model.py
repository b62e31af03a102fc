"""A small Llama with random weights and a few preference pairs, to try commands on in seconds.

    python examples/tiny_model.py FOLDER

Writes FOLDER/tiny (model and tokenizer), FOLDER/pairs.jsonl, FOLDER/prompts.jsonl and
FOLDER/held_out.jsonl. The better answer of each pair is the polite one.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hydra_rlhf.data.bundled import build_tokenizer

SUBJECTS = "the cat|a dog|my neighbour|the weather|this book|our train".split("|")
QUALITIES = "late|early|friendly|loud|quiet|warm".split("|")


def pairs(count: int = 64, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        subject, quality = draw.choice(SUBJECTS), draw.choice(QUALITIES)
        rows.append(
            {
                "prompt": f"Is {subject} {quality}?",
                "chosen": f" Yes, thank you, {subject} is {quality}.",
                "rejected": f" No, go away, {subject} is not {quality}.",
            }
        )
    return rows


def tiny_model(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    texts = [text for row in pairs() for text in row.values()]
    tokenizer = build_tokenizer(texts, 400, model_max_length=64)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,  # so that a policy has something to be moved
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config), tokenizer


def write(folder: Path) -> Path:
    """Returns the folder of the model."""
    model, tokenizer = tiny_model()
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    rows = pairs()
    prompts = [{"prompt": row["prompt"]} for row in rows]
    for name, lines in (("pairs", rows), ("prompts", prompts[:48]), ("held_out", prompts[48:])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder / "tiny"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    target.mkdir(parents=True, exist_ok=True)
    print(f"wrote {write(target)}, pairs.jsonl, prompts.jsonl and held_out.jsonl in {target}")
