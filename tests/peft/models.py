"""Tiny models with random weights, and adapters whose B is not zero."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
)

VOCABULARY = 31


def llama_config():
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=1,
    )


def make_base(name):
    if name == "llama":
        return LlamaForCausalLM(llama_config())
    if name == "classifier":
        return LlamaForSequenceClassification(llama_config())
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=64,
                n_embd=16,
                n_layer=2,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    assert name == "opt"
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
        )
    )


def make_config(name="llama", **kwargs):
    defaults = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": "all-linear",
        "task_type": "SEQ_CLS" if name == "classifier" else "CAUSAL_LM",
        "fan_in_fan_out": name == "gpt2",
    }
    return LoraConfig(**{**defaults, **kwargs})


def randomize(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def make_model(name="llama", adapters=("default",), wrap=get_peft_model, **kwargs):
    """A PEFT model whose adapters have ranks 4, 5, ... and all ask for gradients."""
    torch.manual_seed(0)
    model = wrap(make_base(name), make_config(name, **kwargs), adapter_name=adapters[0])
    for i, adapter in enumerate(adapters[1:], start=1):
        model.add_adapter(adapter, make_config(name, **{"r": 4 + i, **kwargs}))
    randomize(model)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.requires_grad_()
    return model.train()


def make_tokens(rows=3, length=6):
    return torch.randint(1, VOCABULARY, (rows, length))


def adapter_gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
