"""LMHead: what transformers' models do behind their trunk, to the bit."""

import copy
import types

import peft
import pytest
import torch
import transformers

from hydra_kernels.nn import LMHead
from hydra_kernels.nn.lm_head import _behind_the_head

SMALL = dict(vocab_size=83, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
LLAMA = dict(**SMALL, intermediate_size=48, num_key_value_heads=2, pad_token_id=0)
CONFIGS = {
    "llama": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(vocab_size=83, n_embd=32, n_layer=1, n_head=2),
    # word_embed_proj_dim: the trunk projects down to the width of the head, as OPT-350m's
    "opt": transformers.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "gpt-neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=48),
    "phi": transformers.PhiConfig(**SMALL, intermediate_size=48),
    "gemma2": transformers.Gemma2Config(**LLAMA, head_dim=16, final_logit_softcapping=0.5),
    "cohere": transformers.CohereConfig(**LLAMA, logit_scale=0.25),
    "granite": transformers.GraniteConfig(**LLAMA, logits_scaling=3.0),
}


def make(name):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Untrained logits are nearly 0, where no soft cap shows, and biases are 0.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def hidden_and_logits(model, ids):
    """What the model feeds its head, by another road than LMHead's: a hook on the trunk."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(base, base.base_model_prefix)
    with torch.no_grad():
        return trunk(input_ids=ids).last_hidden_state, model(input_ids=ids).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_is_the_models_own_head(name):
    model = make(name)
    head = LMHead.from_model(model)
    ids = torch.randint(1, 83, (2, 7))
    hidden, logits = hidden_and_logits(model, ids)
    assert torch.equal(head.logits(hidden), logits)
    assert head.weight is model.get_output_embeddings().weight
    if name == "phi":
        assert head.bias is not None and head.bias.abs().max() > 0

    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    out = head.logprob(hidden, targets, temperature=0.7, ref_hidden=hidden.flip(0))
    z, z_ref = logits.double() / 0.7, logits.double().flip(0) / 0.7
    logp, logq = torch.log_softmax(z, -1), torch.log_softmax(z_ref, -1)
    keep = targets != -100

    def chosen(log):
        return torch.where(keep, log.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1), 0)

    # 2e-5: float32 logits up to 30, rounded once more
    for actual, exact in [
        (out.logprobs, chosen(logp)),
        (out.ref_logprobs, chosen(logq)),
        (out.entropy, torch.where(keep, -(logp.exp() * logp).sum(-1), 0)),
        (out.kl, torch.where(keep, (logp.exp() * (logp - logq)).sum(-1), 0)),
    ]:
        torch.testing.assert_close(actual.double(), exact, rtol=2e-5, atol=2e-5)


def test_says_what_it_found():
    assert LMHead.from_model(make("gemma2")).softcap == 0.5
    assert LMHead.from_model(make("cohere")).scale == 0.25
    assert LMHead.from_model(make("granite")).scale == pytest.approx(1 / 3)
    assert LMHead.from_model(make("llama")).scale == 1.0


def test_softcap_behind_a_scale():
    """cap(2 x): no model of transformers in the tests has both, some (MuseGlimmer) do."""
    head = LMHead(torch.nn.Parameter(torch.randn(11, 4)), softcap=1.5, multiplier=2.0)
    hidden, targets = torch.randn(5, 4), torch.randint(11, (5,))
    exact = torch.log_softmax(head.logits(hidden) / 0.8, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(head.logprob(hidden, targets, temperature=0.8).logprobs, exact)


def test_logprob_casts_to_the_heads_dtype_and_hands_on_its_settings():
    head = LMHead(torch.nn.Parameter(torch.randn(11, 4)))
    hidden, ref_hidden = torch.randn(2, 5, 4).bfloat16()
    targets = torch.tensor([3, 1, 10, 0, 7])
    expected = head.logprob(hidden.float(), targets, ref_hidden=ref_hidden.float())
    out = head.logprob(hidden, targets, ref_hidden=ref_hidden)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    ignored = head.logprob(hidden, targets, ignore_index=10).logprobs
    assert (ignored == 0).tolist() == (targets == 10).tolist()
    with pytest.raises(NotImplementedError, match="no such backend"):
        head.logprob(hidden, targets, backend="tpu")


def test_training_through_a_tied_head_reaches_the_embedding():
    model = make("llama-tied")
    head = LMHead.from_model(model)
    hidden = torch.randn(3, 32)
    head.logprob(hidden, torch.tensor([1, 2, 3])).logprobs.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def lora(model, **kwargs):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **kwargs))


def test_sees_through_wrappers():
    model = make("llama")
    weight = model.get_output_embeddings().weight
    wrapped = lora(model, target_modules=["q_proj"])
    assert LMHead.from_model(wrapped).weight is weight
    assert LMHead.from_model(torch.compile(wrapped)).weight is weight


def test_sees_through_a_distributed_wrapper():
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel, which needs a process group
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = make("llama")
    weight = model.get_output_embeddings().weight
    assert LMHead.from_model(Wrapper(torch.compile(model))).weight is weight


def test_a_model_without_memory_is_not_run():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert LMHead.from_model(model).weight.is_meta


@pytest.mark.parametrize(
    "names, expected",
    [
        (dict(final_logit_softcapping=30.0), (30.0, 1.0, 1.0)),
        (dict(logits_soft_cap=20.0, lm_head_multiplier=0.5), (20.0, 0.5, 1.0)),  # xLSTM, Falcon-H1
        (dict(output_logit_soft_cap=15.0, output_multiplier=2.0), (15.0, 2.0, 1.0)),
        (dict(logit_scale=4.0, logits_scaling=8.0), (None, 4.0, 8.0)),
        (dict(model_type="hyperclovax", logits_scaling=8.0), (None, 8.0, 1.0)),
        (dict(final_logit_softcapping=None, logits_scaling=None), (None, 1.0, 1.0)),
    ],
    ids=lambda p: "-".join(p) if isinstance(p, dict) else "",
)
def test_names_in_configurations(names, expected):
    """Also where they are the language model's part of a larger configuration."""
    text = types.SimpleNamespace(**names)
    whole = types.SimpleNamespace(get_text_config=lambda: text)
    for config in (text, whole):
        assert tuple(_behind_the_head(config).values()) == expected


def test_refuses_an_adapted_head_unless_merged():
    model = lora(make("llama"), target_modules=["lm_head"], init_lora_weights=False)
    with pytest.raises(ValueError, match="head of LlamaForCausalLM carries a LoRA adapter"):
        LMHead.from_model(model)
    model.merge_adapter()
    head = LMHead.from_model(model)
    hidden, logits = hidden_and_logits(model, torch.randint(1, 83, (1, 5)))
    assert torch.equal(head.logits(hidden), logits)

    copied = lora(make("llama"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="modules_to_save"):
        LMHead.from_model(copied)


def test_refuses_what_has_no_head():
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        LMHead.from_model(make("llama").model)
    with pytest.raises(ValueError, match="Linear has no output embeddings"):
        LMHead.from_model(torch.nn.Linear(2, 2))


def test_refuses_a_quantised_head():
    model = make("llama")
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(83, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantised"):
        LMHead.from_model(model)


class Surprising(transformers.LlamaForCausalLM):
    """An architecture that caps or scales its logits and says so nowhere."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.surprise(out.logits)
        return out


@pytest.mark.parametrize("surprise", [lambda z: 30.0 * torch.tanh(z / 30.0), lambda z: 0.9 * z])
def test_refuses_logits_that_are_not_the_heads(surprise):
    model = Surprising(copy.deepcopy(CONFIGS["llama"]))
    model.surprise = surprise
    with pytest.raises(ValueError, match="Surprising does something to its logits"):
        LMHead.from_model(model)
    assert LMHead.from_model(model, verify=False).softcap is None


class Twice(transformers.LlamaForCausalLM):
    """An architecture that asks its head again, for tokens further ahead say."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.lm_head(torch.zeros(1, 32))
        return out


def test_refuses_a_head_that_is_used_twice():
    with pytest.raises(ValueError, match="Twice uses its head 2 times"):
        LMHead.from_model(Twice(copy.deepcopy(CONFIGS["llama"])))


def test_says_what_it_is():
    weight, bias = (torch.nn.Parameter(torch.zeros(size)) for size in ((11, 4), 11))
    assert repr(LMHead(weight)) == "LMHead(D=4, V=11, bias=False, scale=1.0)"
    shown = "LMHead(D=4, V=11, bias=True, scale=0.5, softcap=30.0)"
    assert repr(LMHead(weight, bias, softcap=30.0, divisor=2.0)) == shown


def test_verifying_leaves_no_trace():
    model = make("gpt2").train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    LMHead.from_model(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert not model.get_output_embeddings()._forward_pre_hooks
