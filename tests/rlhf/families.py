"""Tiny models with random weights, one of each family, and a tokenizer for them."""

from __future__ import annotations

import functools

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hydra_rlhf.model import HydraModel, default_lora_config

VOCAB = 97  # a prime, so that no block divides it
PAD, EOS = 0, 1
_SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=PAD,
    bos_token_id=None,
    eos_token_id=EOS,
)
_GATED = dict(_SMALL, intermediate_size=48, num_key_value_heads=2)

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_GATED),
    "mistral": lambda: transformers.MistralConfig(**_GATED, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**_GATED),
    "qwen3": lambda: transformers.Qwen3Config(**_GATED, head_dim=8),
    # A projection in and out, and ReLU.
    "opt": lambda: transformers.OPTConfig(**_SMALL, ffn_dim=48, word_embed_proj_dim=16),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SMALL, intermediate_size=48),
    "phi3": lambda: transformers.Phi3Config(**_GATED),
    "gemma2": lambda: transformers.Gemma2Config(
        **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    ),
}
FAMILIES = tuple(CONFIGS)
_OLD = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
# Families that nothing was written for, each with something of its own; fewer tests run on them.
_MORE = {
    "phi": lambda: transformers.PhiConfig(**_SMALL, intermediate_size=48),  # a biased head
    "gemma": lambda: transformers.GemmaConfig(**_GATED, head_dim=8),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **_GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    ),
    # A linear class of its own.
    "falcon": lambda: transformers.FalconConfig(
        **_OLD, hidden_size=32, num_hidden_layers=3, num_attention_heads=4
    ),
    "olmo2": lambda: transformers.Olmo2Config(**_GATED),
    "starcoder2": lambda: transformers.Starcoder2Config(**_GATED),
    "gptj": lambda: transformers.GPTJConfig(
        **_OLD, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4
    ),
    # Biases of attention in the place of positions.
    "bloom": lambda: transformers.BloomConfig(**_OLD, hidden_size=32, n_layer=3, n_head=4),
    "cohere": lambda: transformers.CohereConfig(**_GATED),  # logits times a scale
    "granite": lambda: transformers.GraniteConfig(**_GATED, logits_scaling=4.0),
    # Every other layer sees a window.
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_OLD,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=64,
        window_size=4,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_GATED, num_local_experts=4),
}
CONFIGS.update(_MORE)
MORE = tuple(_MORE)
THREE = ("llama", "gpt2", "opt")  # rotary and gated, fused QKV in a Conv1D, learned positions


def make_lm(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> torch.nn.Module:
    """A causal LM whose logits are spread enough for sampling to matter."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update(changes)
    lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            # transformers starts biases at 0 and norms at 1, which would hide mistakes in them.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "norm" not in name:
                parameter.normal_(std=0.15)
    return lm.eval()


def make_model(
    family: str, adapters=("actor", "critic"), *, seed: int = 0, trained: bool = False, **lora
) -> HydraModel:
    """A HydraModel with rank-4 adapters and a random reward head.

    trained: give every lora_B weights, as after some updates.
    """
    lm = make_lm(family, seed=seed)
    head = torch.nn.Linear(lm.get_output_embeddings().weight.shape[1], 1, bias=False)
    config = default_lora_config(lm, **{"r": 4, "lora_alpha": 8, **lora}) if adapters else None
    model = HydraModel(lm, adapters=adapters, lora_config=config, reward_head=head)
    if trained:
        train_by_chance(model)
    return model


def train_by_chance(model: HydraModel, scale: float = 0.1) -> None:
    with torch.no_grad():
        for name, parameter in model.base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)


def batch(rows: int = 4, prompt: int = 6, response: int = 5, *, padded: bool = True, seed: int = 1):
    """(input_ids, attention_mask, response_mask): left-padded prompts, right-padded responses."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, prompt + response), generator=g)
    mask = torch.ones_like(ids)
    response_mask = torch.ones(rows, response, dtype=torch.bool)
    if padded:
        for row in range(rows):
            left, right = row % prompt, (row * 2) % response
            mask[row, :left] = 0
            if right:
                mask[row, -right:] = 0
                response_mask[row, -right:] = False
        ids[mask == 0] = PAD
    return ids, mask, response_mask


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w2 to w96; pad and EOS have their own."""
    vocab = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="w2"
    )


PROMPTS = [" ".join(f"w{2 + (7 * i + 3 * j) % 90}" for j in range(1 + i % 5)) for i in range(12)]
